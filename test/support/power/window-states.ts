/** The states that a disk of the window model went through, and whether what was found is one that it may have. Pure functions. */
import type { Survival } from './window.js';

export const BLOCK_BYTES = 4096;
const SECTOR_BYTES = 512;

/** A list of states; `durable` and `answered` are indexes of it. */
export interface States<T> {
  readonly all: T[];
  durable: number;
  answered: number;
}

export interface DiskWindow {
  readonly name: string;
  /** Undefined until its making was answered, with the request that it belongs to. */
  made: 'asked' | 'answered';
  readonly request: number;
  removal: 'none' | 'asked' | 'answered';
  readonly size: States<number>;
  readonly blocks: States<Buffer>[];
}

/** How far a disk had come. */
export interface Snapshot {
  readonly request: number;
  readonly size: number;
  readonly blocks: readonly number[];
}

export function snapshotOf(disk: DiskWindow): Snapshot {
  return { request: disk.request, size: disk.size.answered, blocks: disk.blocks.map((states) => states.answered) };
}

export function contentNow(disk: DiskWindow): Buffer {
  return Buffer.concat(disk.blocks.map((states) => newest(states))).subarray(0, newest(disk.size));
}

export function setSize(disk: DiskWindow, sizeBytes: number): void {
  disk.size.all.push(sizeBytes);
  while (disk.blocks.length * BLOCK_BYTES < sizeBytes) disk.blocks.push(statesOf(Buffer.alloc(BLOCK_BYTES)));
}

/** Operations of one program come one after the other: everything asked for was answered. */
export function answer(disk: DiskWindow): void {
  disk.size.answered = disk.size.all.length - 1;
  for (const states of disk.blocks) states.answered = states.all.length - 1;
}

export function statesOf(first: Buffer): States<Buffer> {
  return { all: [first], durable: 0, answered: 0 };
}

export function newest<T>(states: States<T>): T {
  return states.all.at(-1)!;
}

export function padded(block: Buffer): Buffer {
  return block.length === BLOCK_BYTES ? block : Buffer.concat([block, Buffer.alloc(BLOCK_BYTES - block.length)]);
}

function oldest(states: States<unknown>, survival: Survival): number {
  return survival === 'window' ? states.durable : states.answered;
}

export function judgeDisk(disk: DiskWindow, content: Buffer, survival: Survival, tornBytes: number): string | null {
  const sizes = disk.size.all.slice(oldest(disk.size, survival));
  if (!sizes.includes(content.length)) return `it has ${content.length} bytes, and may have ${[...new Set(sizes)].join(' or ')}`;
  const unitBytes = survival === 'window' ? tornBytes : BLOCK_BYTES;
  for (let at = 0; at < content.length; at += BLOCK_BYTES) {
    const states = disk.blocks[at / BLOCK_BYTES]!;
    const allowed = states.all.slice(oldest(states, survival));
    const end = Math.min(content.length, at + BLOCK_BYTES);
    const block = content.subarray(at, end);
    if (newest(states).subarray(0, block.length).equals(block)) continue;
    const step = unitBytes < BLOCK_BYTES ? SECTOR_BYTES : BLOCK_BYTES;
    for (let from = 0; from < block.length; from += step) {
      const part = block.subarray(from, from + step);
      if (allowed.some((state) => state.subarray(from, from + part.length).equals(part))) continue;
      const older = states.all.findLastIndex((state) => state.subarray(from, from + part.length).equals(part));
      const what = older >= 0 ? `state ${older}` : part.every((byte) => byte === 0) ? 'zeros' : `bytes that it never held (${part.subarray(0, 16).toString('hex')}…)`;
      return `block ${at / BLOCK_BYTES}, +${from}, holds ${what}; allowed are states ${oldest(states, survival)} to ${states.all.length - 1}`;
    }
  }
  return null;
}

/** A block of a disk, with the index of the state that an operation gives it. */
export interface TurnedBlock {
  readonly block: number;
  readonly state: number;
}

/** What the blocks say of an operation that was not answered: one that is new tells that it happened, one that is not that it did not. */
export function evidenceOf(disk: DiskWindow, blocks: readonly TurnedBlock[], content: Buffer): { readonly isNew: number | null; readonly isOld: number | null } {
  let isNew: number | null = null;
  let isOld: number | null = null;
  for (const { block, state } of blocks) {
    const found = padded(content.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES));
    const { all } = disk.blocks[block]!;
    if (!found.equals(all[state]!)) isOld ??= block;
    else if (!all.slice(0, state).some((old) => old.equals(found))) isNew ??= block;
  }
  return { isNew, isOld };
}
