/**
 * What is mounted where, as the kernel lists it for this process; nothing that is mounted is touched. Main thread.
 */
import { readFileSync } from 'node:fs';

/** Mount points by the number of their device (`7:3`); the last one where there are several. */
export function mountedDevices(mountinfo: string = readFileSync('/proc/self/mountinfo', 'utf8')): ReadonlyMap<string, string> {
  return new Map(mountsIn(mountinfo).map(({ number, mountPoint }) => [number, mountPoint]));
}

/** The device that is mounted at a directory; null: none. */
export function deviceMountedAt(directory: string, mountinfo: string = readFileSync('/proc/self/mountinfo', 'utf8')): string | null {
  return mountsIn(mountinfo).findLast(({ mountPoint }) => mountPoint === directory)?.number ?? null;
}

function mountsIn(mountinfo: string): { readonly number: string; readonly mountPoint: string }[] {
  return mountinfo.split('\n').flatMap((line) => {
    const [, , number, , mountPoint] = line.split(' ');
    return number === undefined || mountPoint === undefined ? [] : [{ number, mountPoint: unescape(mountPoint) }];
  });
}

/** Blanks and the like are octal there. */
function unescape(text: string): string {
  return text.replaceAll(/\\([0-7]{3})/gu, (_match, digits: string) => String.fromCodePoint(Number.parseInt(digits, 8)));
}
