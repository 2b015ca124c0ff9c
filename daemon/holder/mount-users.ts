/**
 * Who keeps a mount busy, for the sentence that says why it could not be unmounted.
 *
 * Reads /proc and /sys only: links there are names that the kernel remembers, so nothing under the mount is touched and nothing
 * waits for a server. A hint for people: files mapped but closed, other mount namespaces and kernel users (NFS) are not found.
 */
import { readFileSync, readdirSync, readlinkSync } from 'node:fs';

const USERS_MAX = 5;
/** Of the names that other users' processes have, those that harm no terminal. */
const SHOWN = /^[\p{L}\p{N} ._:/@+-]{1,200}$/u;

/** At most a handful of users of the mount at `mountDir`, as people would name them: `machine 'web1' (qemu-system-x86, pid 123)`. */
export function findMountUsers(mountDir: string): readonly string[] {
  const users: string[] = [];
  for (const pid of list('/proc')) {
    if (!/^\d+$/u.test(pid) || Number(pid) === process.pid) continue;
    if (usesMount(pid, mountDir)) users.push(nameOf(pid));
    if (users.length >= USERS_MAX) return users;
  }
  for (const device of list('/sys/block')) {
    if (!device.startsWith('loop')) continue;
    const backing = read(`/sys/block/${device}/loop/backing_file`);
    if (backing !== undefined && isWithin(backing, mountDir)) users.push(`/dev/${device}`);
    if (users.length >= USERS_MAX) return users;
  }
  return users;
}

/** A virtual machine is named by what QEMU was told that it is called, be it by us or by libvirt. */
function nameOf(pid: string): string {
  const program = read(`/proc/${pid}/comm`) ?? 'a process';
  const args = read(`/proc/${pid}/cmdline`)?.split('\0') ?? [];
  const guest = /^(?:guest=)?([^,=]+)/u.exec(args[args.indexOf('-name') + 1] ?? '')?.[1];
  const isMachine = program.startsWith('qemu') && args.includes('-name') && guest !== undefined && SHOWN.test(guest);
  return isMachine ? `machine '${guest}' (${program}, pid ${pid})` : `${program} (pid ${pid})`;
}

function usesMount(pid: string, mountDir: string): boolean {
  const links = [`/proc/${pid}/cwd`, `/proc/${pid}/root`, ...list(`/proc/${pid}/fd`).map((fd) => `/proc/${pid}/fd/${fd}`)];
  return links.some((link) => {
    const target = orUndefined(() => readlinkSync(link));
    return target !== undefined && isWithin(target, mountDir);
  });
}

function isWithin(path: string, directory: string): boolean {
  return path === directory || path.startsWith(`${directory}/`);
}

function list(directory: string): readonly string[] {
  return orUndefined(() => readdirSync(directory)) ?? [];
}

function read(path: string): string | undefined {
  return orUndefined(() => readFileSync(path, 'utf8').trim());
}

/** Processes end while they are looked at, and some may not be looked at: neither is a user that could be named. */
function orUndefined<T>(body: () => T): T | undefined {
  try {
    return body();
  } catch {
    return undefined;
  }
}
