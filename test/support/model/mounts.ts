/**
 * Gets rid of a FUSE mount whatever state it is in: abort of the connection through fusectl, then a lazy unmount.
 *
 * Nothing here touches a path under the mount. The connection's number is the minor number of the mount's device.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs';

import { command } from './command.js';

const CONNECTIONS = '/sys/fs/fuse/connections';

export interface MountEntry {
  readonly minor: number;
  readonly kind: string;
  readonly options: string;
}

/** The topmost mount on `mountDir` (an absolute real path without blanks), or null. */
export function mountEntry(mountDir: string): MountEntry | null {
  const lines = readFileSync('/proc/self/mountinfo', 'utf8').split('\n').filter((line) => line.split(' ')[4] === mountDir);
  const line = lines.at(-1);
  if (line === undefined) return null;
  const [left = '', right = ''] = line.split(' - ');
  const [, , device = ''] = left.split(' ');
  const [kind = '', , options = ''] = right.split(' ');
  return { minor: Number(device.split(':')[1]), kind, options: `${left.split(' ')[5] ?? ''},${options}` };
}

/** Every request of the mount fails from now on, and whoever waits for one is set free. */
export async function abortMount(mountDir: string): Promise<void> {
  const entry = mountEntry(mountDir);
  if (entry === null) return;
  const file = `${CONNECTIONS}/${entry.minor}/abort`;
  if (!existsSync(file)) await command('mount', ['-t', 'fusectl', 'none', CONNECTIONS], { timeoutMs: 5_000 });
  if (existsSync(file)) writeFileSync(file, '1');
}

export async function removeMount(mountDir: string): Promise<void> {
  for (let tries = 0; mountEntry(mountDir) !== null && tries < 5; tries += 1) {
    await abortMount(mountDir);
    await command('umount', ['-l', '-i', '--no-canonicalize', '--', mountDir], { timeoutMs: 10_000 });
  }
}
