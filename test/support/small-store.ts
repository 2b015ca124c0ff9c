/**
 * A file system of a few hundred MiB on a loop device, for a store that is to become full in earnest: the errors, the delayed
 * allocation and the rounding are those of a real ext4 or XFS.
 */
import { existsSync, rmSync, statfsSync } from 'node:fs';
import { join } from 'node:path';

import { command, mustRun } from './model/command.js';
import { makeTempDir, type Cleanup } from './temp.js';

export type SmallFileSystem = 'ext4' | 'xfs';

export interface SmallStore {
  /** Does not exist yet. */
  readonly storeDir: string;
  freeBytes(): number;
  /** Takes all that is left, to the last block, as somebody else on the same file system would. */
  takeAll(): Promise<void>;
  giveBack(): void;
}

/** `ballastMib` of it are taken from the beginning: XFS cannot be made smaller than 300 MiB. */
export async function makeSmallStore(kind: SmallFileSystem, sizeMib: number, ballastMib: number, cleanup: Cleanup): Promise<SmallStore> {
  const top = makeTempDir(`small-${kind}`, cleanup);
  const image = join(top, 'image');
  const mountPoint = join(top, 'fs');
  await mustRun('truncate', ['-s', `${sizeMib}M`, image]);
  // Without blocks kept for root, which the daemon is.
  await mustRun(`mkfs.${kind}`, kind === 'ext4' ? ['-q', '-F', '-m', '0', image] : ['-q', image]);
  await mustRun('mkdir', [mountPoint]);
  await mustRun('mount', ['-o', 'loop', image, mountPoint]);
  cleanup.add(async () => {
    const { code } = await command('umount', [mountPoint]);
    if (code !== 0) await mustRun('umount', ['-l', mountPoint]);
  });
  if (ballastMib > 0) await mustRun('fallocate', ['-l', `${ballastMib}M`, join(mountPoint, 'ballast')]);
  const taken = join(mountPoint, 'taken');
  return {
    storeDir: join(mountPoint, 'store'),
    freeBytes: () => {
      const { bsize, bavail } = statfsSync(mountPoint);
      return bsize * bavail;
    },
    async takeAll() {
      for (const block of ['1M', '4k']) await command('dd', ['if=/dev/zero', `of=${taken}`, `bs=${block}`, 'oflag=append', 'conv=notrunc,fsync'], { timeoutMs: 120_000 });
    },
    giveBack: () => { if (existsSync(taken)) rmSync(taken); },
  };
}
