/**
 * Runs of blocks, sorted into pages: the arithmetic of the ownership table, without any SQL. Pure functions.
 *
 * A page is PAGE_BLOCKS blocks. Whatever covers whole pages stays a run of pages; the rest becomes one bitmap a page,
 * and a page that the runs fill up between them counts as whole.
 */
import { DISK_BYTES_MAX, BLOCK_BYTES, PAGE_BITMAP_BYTES, PAGE_BLOCKS } from '../units.js';
import type { BlockRun } from './rows.js';

/** Consecutive pages, `end` excluded. */
export interface PageRange {
  readonly first: number;
  readonly end: number;
}

export interface PageSet {
  /** Ascending, apart from each other by at least one page. */
  readonly whole: readonly PageRange[];
  /** Pages in part, none of them within `whole`. */
  readonly partial: ReadonlyMap<number, Uint8Array>;
}

const BLOCKS_MAX = DISK_BYTES_MAX / BLOCK_BYTES;

const BITS_SET = Uint8Array.from({ length: 256 }, (_, byte) => {
  let count = 0;
  for (let rest = byte; rest > 0; rest = Math.floor(rest / 2)) count += rest % 2;
  return count;
});

/** Number of blocks in a bitmap. */
export function countBlocks(bitmap: Uint8Array): number {
  let count = 0;
  for (const byte of bitmap) count += BITS_SET[byte] ?? 0;
  return count;
}

/** Adds the blocks of `source` to `target`. */
export function mergeBitmap(target: Uint8Array, source: Uint8Array): void {
  for (let index = 0; index < PAGE_BITMAP_BYTES; index += 1) target[index] = (target[index] ?? 0) | (source[index] ?? 0);
}

/** Sorts runs, in any order and perhaps overlapping, into pages. */
export function pagesOfRuns(runs: readonly BlockRun[]): PageSet {
  const ranges: PageRange[] = [];
  const partial = new Map<number, Uint8Array>();
  for (const run of runs) {
    assertRun(run);
    const end = run.block + run.count;
    const firstWhole = Math.ceil(run.block / PAGE_BLOCKS);
    const endWhole = Math.floor(end / PAGE_BLOCKS);
    if (firstWhole > endWhole) {
      setBits(bitmapOf(partial, endWhole), run.block % PAGE_BLOCKS, end % PAGE_BLOCKS);
      continue;
    }
    if (run.block % PAGE_BLOCKS !== 0) setBits(bitmapOf(partial, firstWhole - 1), run.block % PAGE_BLOCKS, PAGE_BLOCKS);
    if (end % PAGE_BLOCKS !== 0) setBits(bitmapOf(partial, endWhole), 0, end % PAGE_BLOCKS);
    if (firstWhole < endWhole) ranges.push({ first: firstWhole, end: endWhole });
  }
  for (const [page, bitmap] of partial) {
    if (!bitmap.every((byte) => byte === 0xff)) continue;
    ranges.push({ first: page, end: page + 1 });
  }
  const whole = joinRanges(ranges);
  for (const page of partial.keys()) if (isWithin(whole, page)) partial.delete(page);
  return { whole, partial };
}

/** Sets the bits from `from` up to, and without, `to`. */
function setBits(bitmap: Uint8Array, from: number, to: number): void {
  let bit = from;
  while (bit < to) {
    const index = Math.floor(bit / 8);
    if (bit % 8 === 0 && to - bit >= 8) {
      bitmap[index] = 0xff;
      bit += 8;
    } else {
      bitmap[index] = (bitmap[index] ?? 0) | (1 << (bit % 8));
      bit += 1;
    }
  }
}

function bitmapOf(partial: Map<number, Uint8Array>, page: number): Uint8Array {
  let bitmap = partial.get(page);
  if (bitmap === undefined) {
    bitmap = new Uint8Array(PAGE_BITMAP_BYTES);
    partial.set(page, bitmap);
  }
  return bitmap;
}

/** Sorts ranges and joins those that touch or overlap. */
function joinRanges(ranges: PageRange[]): PageRange[] {
  ranges.sort((left, right) => left.first - right.first);
  const joined: { first: number; end: number }[] = [];
  for (const range of ranges) {
    const last = joined.at(-1);
    if (last !== undefined && range.first <= last.end) last.end = Math.max(last.end, range.end);
    else joined.push({ first: range.first, end: range.end });
  }
  return joined;
}

function isWithin(ranges: readonly PageRange[], page: number): boolean {
  let low = 0;
  let high = ranges.length;
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    const range = ranges[middle];
    if (range !== undefined && range.end <= page) low = middle + 1;
    else high = middle;
  }
  const candidate = ranges[low];
  return candidate !== undefined && candidate.first <= page;
}

function assertRun({ block, count }: BlockRun): void {
  if (!Number.isSafeInteger(block) || !Number.isSafeInteger(count) || block < 0 || count <= 0 || block + count > BLOCKS_MAX) {
    throw new Error(`not a run of blocks: block ${block}, count ${count}`);
  }
}
