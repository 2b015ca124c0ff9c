/** What the workloads have in common: where a guest's request goes, and flushes that run meanwhile. */
import type { Random } from '../model/random.js';
import type { Guest } from './guest.js';

const BLOCK = 4096;

/** Offset and length of a guest's request: whole blocks, sectors, or any bytes. */
export function place(random: Random, sizeBytes: number, blocksMax: number): { readonly at: number; readonly length: number } {
  const grain = random.pick([BLOCK, BLOCK, 512, 1]);
  const length = Math.min(sizeBytes, grain * random.between(1, Math.max(1, Math.floor((blocksMax * BLOCK) / grain / (grain === 1 ? 2 : 1)))));
  return { at: grain * random.between(0, Math.floor((sizeBytes - length) / grain)), length };
}

/** Flushes that are under way, at most one a disk, and now and then one is waited for. */
export class Flushes {
  private readonly running = new Map<string, Promise<void>>();
  private readonly guest: Guest;

  constructor(guest: Guest) {
    this.guest = guest;
  }

  begin(disk: string): void {
    if (!this.running.has(disk)) this.running.set(disk, this.guest.flush(disk));
  }

  async end(): Promise<void> {
    const running = [...this.running.values()];
    this.running.clear();
    await Promise.all(running);
  }
}
