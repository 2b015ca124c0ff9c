/** A file system of its own for a store: an image on a loop device, so that its power can be cut without cutting anybody else's. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';

import { command, mustRun } from '../model/command.js';
import { mountEntry } from '../model/mounts.js';
import { makeTempDir, type Cleanup } from '../temp.js';

export type LoopKind = 'xfs' | 'ext4' | 'btrfs';

/** XFS refuses less than 300 MB. */
const SIZE = '400M';
const LONG_MS = 60_000;

export interface LoopFileSystem {
  readonly kind: LoopKind;
  readonly directory: string;
  mount(): Promise<void>;
  /** Nobody may use it any more. */
  unmount(): Promise<void>;
  /** Stops at once, with nothing of what is in memory written: what the kernel has for a power cut. */
  shutDown(): Promise<void>;
}

export async function makeLoopFileSystem(kind: LoopKind, cleanup: Cleanup): Promise<LoopFileSystem> {
  const top = makeTempDir(kind, cleanup);
  const image = join(top, 'image');
  const directory = join(top, 'fs');
  mkdirSync(directory);
  await mustRun('truncate', ['-s', SIZE, image]);
  await mustRun(`mkfs.${kind}`, [kind === 'ext4' ? '-F' : '-f', '-q', image], { timeoutMs: LONG_MS });
  const unmount = async (): Promise<void> => {
    if (mountEntry(directory) !== null) await mustRun('umount', [directory], { timeoutMs: LONG_MS });
  };
  const mount = async (): Promise<void> => { await mustRun('mount', ['-o', 'loop', image, directory], { timeoutMs: LONG_MS }); };
  cleanup.add(async () => {
    // Lazily, when somebody still holds it: the loop device goes with its last user.
    if (mountEntry(directory) !== null && (await command('umount', [directory], { timeoutMs: LONG_MS })).code !== 0) await mustRun('umount', ['-l', directory]);
  });
  await mount();
  return {
    kind, directory, mount, unmount,
    shutDown: async () => { await mustRun('xfs_io', ['-x', '-c', 'shutdown', directory], { timeoutMs: LONG_MS }); },
  };
}
