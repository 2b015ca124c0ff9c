/** The file system that a torture run has its store on: small and its own, so that it can be filled up; or a directory, which cannot. */
import { mkdirSync, rmSync, statfsSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { mustRun } from '../model/command.js';
import type { Cleanup } from '../temp.js';

export const STORE_FILE_SYSTEMS = ['ext4', 'xfs', 'dir'] as const;
export type StoreFileSystemName = (typeof STORE_FILE_SYSTEMS)[number];

const DEVICE_BYTES = 768 * 1024 * 1024;
/** What is left when the store is filled up. */
const LEFT_BYTES = 3 * 1024 * 1024;
const TIMEOUT_MS = 60_000;

export interface TortureStore {
  readonly storeDir: string;
  readonly canBeFull: boolean;
  /** Takes nearly all that is free. */
  fillUp(): Promise<void>;
  empty(): void;
}

export async function makeTortureStore(kind: StoreFileSystemName, directory: string, cleanup: Cleanup): Promise<TortureStore> {
  const top = join(directory, 'device');
  mkdirSync(top);
  if (kind !== 'dir') {
    const image = join(directory, 'device.img');
    writeFileSync(image, '');
    truncateSync(image, DEVICE_BYTES);
    await mustRun(`mkfs.${kind}`, kind === 'ext4' ? ['-q', '-F', '-m', '0', image] : ['-q', '-f', image], { timeoutMs: TIMEOUT_MS });
    await mustRun('mount', ['-o', 'loop', image, top], { timeoutMs: TIMEOUT_MS });
    cleanup.add(async () => { await mustRun('umount', [top], { timeoutMs: TIMEOUT_MS }); });
  }
  const filler = join(top, 'filler');
  const storeDir = join(top, 'store');
  return {
    storeDir,
    canBeFull: kind !== 'dir',
    async fillUp() {
      const { bsize, bavail } = statfsSync(top);
      await mustRun('fallocate', ['-l', String(Math.max(4096, bsize * bavail - LEFT_BYTES)), filler], { timeoutMs: TIMEOUT_MS });
    },
    empty() { rmSync(filler, { force: true }); },
  };
}
