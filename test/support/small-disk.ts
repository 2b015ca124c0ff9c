/** A tmpfs of a few MiB for a store, which can be filled to the last page, and emptied again. */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

import { makeTmpfsDir, type Cleanup } from './temp.js';

export class SmallDisk {
  readonly storeDir: string;
  readonly #ballast: string;

  constructor(sizeMib: number, cleanup: Cleanup) {
    const top = path.join(makeTmpfsDir('small', cleanup), 'fs');
    fs.mkdirSync(top);
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${sizeMib}m`, 'tmpfs', top]);
    cleanup.add(() => { execFileSync('umount', ['-l', top]); });
    this.storeDir = path.join(top, 'store');
    fs.mkdirSync(this.storeDir);
    this.#ballast = path.join(top, 'ballast');
  }

  leave(pages: number): void {
    fs.rmSync(this.#ballast, { force: true });
    const { bavail, bsize } = fs.statfsSync(this.storeDir);
    execFileSync('fallocate', ['-l', String(Math.max(1, (bavail - pages) * bsize)), this.#ballast]);
  }

  free(): void {
    fs.rmSync(this.#ballast, { force: true });
  }
}
