/**
 * Units of the block store, and the only place where one is turned into another.
 *
 * Block index, block count and byte offset are different branded types, so that the compiler finds the place where one
 * is used for another. Byte offsets are plain doubles, asserted below 2^53; they are divided and multiplied, never
 * shifted, because JavaScript's shifts wrap at 2^32 (a 4 GiB disk). Worker-safe: imports errors and nothing else.
 */
import { OffshootError } from './errors.js';

declare const unit: unique symbol;

/** Index of a 4 KiB block within a disk: byte offset / 4096. */
export type BlockIndex = number & { readonly [unit]: 'block-index' };
/** A number of 4 KiB blocks. */
export type BlockCount = number & { readonly [unit]: 'block-count' };

/** The unit of ownership. */
export const BLOCK_BYTES = 4096;
/** Blocks in one page of the block map and of the ownership table (8 MiB of disk). */
export const PAGE_BLOCKS = 2048;
/** Bytes of disk that one page of the map covers. */
export const PAGE_BYTES = BLOCK_BYTES * PAGE_BLOCKS;
/** Bytes of one ownership bitmap: one bit a block, block 0 in the lowest bit of byte 0. */
export const PAGE_BITMAP_BYTES = PAGE_BLOCKS / 8;
/** Sectors, where a protocol or a hypervisor counts in them. */
export const SECTOR_BYTES = 512;
/** Largest disk: 64 TiB. Block indexes then stay below 2^34, exact in a double. */
export const DISK_BYTES_MAX = 64 * 1024 ** 4;

/** The block that holds `offsetBytes`. */
export function blockOf(offsetBytes: number): BlockIndex {
  return Math.floor(offsetBytes / BLOCK_BYTES) as BlockIndex;
}

/** Blocks needed to hold `sizeBytes`, the last one perhaps in part. */
export function blocksFor(sizeBytes: number): BlockCount {
  return Math.ceil(sizeBytes / BLOCK_BYTES) as BlockCount;
}

/** Byte offset at which `block` begins. */
export function offsetOf(block: number): number {
  return block * BLOCK_BYTES;
}

/** Map pages needed for a disk of `sizeBytes`. */
export function pagesFor(sizeBytes: number): number {
  return Math.ceil(sizeBytes / PAGE_BYTES);
}

/** Asserts that a size or offset in bytes is a safe, non-negative integer no larger than the largest disk. */
export function assertBytes(value: number, what: string): number {
  if (!Number.isSafeInteger(value) || value < 0 || value > DISK_BYTES_MAX) {
    throw new OffshootError('invalid-argument', `${what} must be a whole number of bytes from 0 to 64 TiB, not ${value}`);
  }
  return value;
}
