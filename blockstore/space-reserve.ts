/**
 * Space kept back, so that metadata can still commit when guests have filled the store.
 *
 * A file of its own is allocated when the store is opened. Before each transaction the main thread looks at what is free;
 * when that is little, writes that would allocate are refused first (a word in the shared memory that all threads see),
 * and the file's space is given back, which from then on only metadata takes. When there is room again, it is taken back
 * and the writes go on. A removal, which makes the room, therefore always commits. Main thread only.
 */
import fs from 'node:fs';
import path from 'node:path';

import { realDoor } from './hot/door.js';
import type { SharedState } from './hot/shared-state.js';

const RESERVE_BYTES_MIN = 8 * 1024 * 1024;
const RESERVE_BYTES_MAX = 64 * 1024 * 1024;
/** One part in so many of the file system is kept back, within the bounds above. */
const RESERVE_PART = 50;
/** Free space below which the store counts as full, as a part of the reserve. */
const LOW_PART = 4;

export class SpaceReserve {
  private readonly storeDir: string;
  private readonly shared: SharedState;
  private readonly onChange: (isFull: boolean, freeBytes: number) => void;
  private readonly reserveBytes: number;
  private readonly fd: number;
  private isFull = false;

  constructor(storeDir: string, shared: SharedState, onChange: (isFull: boolean, freeBytes: number) => void) {
    this.storeDir = storeDir;
    this.shared = shared;
    this.onChange = onChange;
    const { bsize, blocks } = fs.statfsSync(storeDir);
    this.reserveBytes = Math.min(RESERVE_BYTES_MAX, Math.max(RESERVE_BYTES_MIN, Math.floor((blocks * bsize) / RESERVE_PART)));
    this.fd = fs.openSync(path.join(storeDir, 'reserve'), fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_NOFOLLOW, 0o600);
    if (!this.take()) this.beFull(this.freeBytes());
  }

  /** Looks at what is free; called before each transaction and by the clock. Costs one statfs. */
  look(): void {
    let freeBytes: number;
    try {
      freeBytes = this.freeBytes();
    } catch {
      // A file system that does not even say what is free fails whoever uses it next, and says why.
      return;
    }
    if (!this.isFull && freeBytes < this.reserveBytes / LOW_PART) this.beFull(freeBytes);
    // Room for the reserve itself and as much again, or it would be given up at once.
    else if (this.isFull && freeBytes > 2 * this.reserveBytes && this.take()) {
      this.isFull = false;
      this.shared.setStoreFull(false);
      this.onChange(false, freeBytes);
    }
  }

  state(): { readonly isFull: boolean; readonly reservedBytes: number } {
    return { isFull: this.isFull, reservedBytes: this.isFull ? 0 : this.reserveBytes };
  }

  close(): void {
    fs.closeSync(this.fd);
  }

  private beFull(freeBytes: number): void {
    this.isFull = true;
    this.shared.setStoreFull(true);
    this.onChange(true, freeBytes);
    try {
      fs.ftruncateSync(this.fd, 0);
    } catch {
      // What was kept back stays so. The transaction that comes says by itself when it finds no room.
    }
  }

  private take(): boolean {
    return realDoor.fallocate('reserve-allocate', this.fd, 0, 0, this.reserveBytes) === 0;
  }

  private freeBytes(): number {
    const { bsize, bavail } = fs.statfsSync(this.storeDir);
    return bsize * bavail;
  }
}
