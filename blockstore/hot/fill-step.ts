/**
 * One step of a fill: the next run of un-owned blocks is copied up, or owned as a hole where its source has one.
 *
 * The source is read before the claim is taken: sealed data never changes, so only the re-check under the claim
 * (`keepBlocks`) decides what is written, and a guest never waits for a source. Runs in the fill worker.
 */
import { BLOCK_BYTES, PAGE_BLOCKS } from '../units.js';
import type { SharedDisk } from './block-map.js';
import { FETCH, HAND_OVER, REQUEST_BYTES_MAX, type HotContext } from './context.js';
import { keepBlocks, readOrigin } from './data-path.js';
import { ownAsHole } from './discard.js';
import type { IoBuffer } from './door.js';
import { dataEnd, holeEnd } from './seek.js';

/** What a step did; one object a fill, written by each step. */
export interface FillProgress {
  /** Where the next step begins; every block before it is owned. */
  cursorBlock: number;
  copiedBytes: number;
  /**
   * The origin that was asked last and where its data ends: sealed files do not change, and a file system that has to look at
   * every page for its next hole (tmpfs) is asked once for each run of data.
   */
  dataOrigin: number;
  dataUntilBytes: number;
  /** Negative errno of the step, HAND_OVER when the map must grow first, FETCH when the bytes named below are needed, or 0. */
  failed: number;
  /** What the step needs of an origin that cannot be read directly: a part of its file. */
  wantedOrigin: number;
  wantedAtBytes: number;
  wantedBytes: number;
  /** What was fetched for it: content of the file of `fetchedOrigin` from `fetchedAtBytes` on; null: nothing. */
  fetched: Buffer | null;
  fetchedOrigin: number;
  fetchedAtBytes: number;
  /** Where the step failed, as an offset on the disk. */
  failedAtBytes: number;
}

export function newFillProgress(): FillProgress {
  return {
    cursorBlock: 0, copiedBytes: 0, dataOrigin: -1, dataUntilBytes: 0, failed: 0, wantedOrigin: 0, wantedAtBytes: 0, wantedBytes: 0, fetched: null,
    fetchedOrigin: 0, fetchedAtBytes: 0, failedAtBytes: 0,
  };
}

/** Looks at the origin's file behind a read: 0, or the negative errno that keeps what was read from being kept. */
export type VerifyOrigin = (origin: number) => number;

const ZERO_BLOCK = Buffer.alloc(BLOCK_BYTES);

/** Blocks looked at in one step while everything is owned or zero, so that a step stays short. */
const SCAN_BLOCKS = 64 * PAGE_BLOCKS;

/** True when the step reached the end of the disk. Callers hold the gate for the step only. */
export function fillStep(context: HotContext, disk: SharedDisk, buffer: IoBuffer, progress: FillProgress, verify: VerifyOrigin = () => 0): boolean {
  const { shared } = context;
  const sizeBytes = disk.sizeBytes();
  const endBlock = Math.ceil(sizeBytes / BLOCK_BYTES);
  const active = disk.activeOrigin();
  progress.failed = 0;
  if (endBlock > disk.capacityBlocks) {
    progress.failed = HAND_OVER;
    return false;
  }
  const scanEnd = Math.min(endBlock, progress.cursorBlock + SCAN_BLOCKS);
  while (progress.cursorBlock < scanEnd) {
    const at = progress.cursorBlock;
    const origin = disk.originOf(shared, at);
    if (origin === active) {
      progress.cursorBlock = disk.runEnd(shared, at + 1, scanEnd, origin);
      continue;
    }
    if (disk.originFd(origin) < 0 && at * BLOCK_BYTES < disk.originLimitBytes(origin)) return stepFetched(context, disk, buffer, progress, endBlock);
    const pageEnd = Math.min(endBlock, (Math.floor(at / PAGE_BLOCKS) + 1) * PAGE_BLOCKS);
    const runEnd = disk.runEnd(shared, at + 1, pageEnd, origin);
    const runEndBytes = Math.min(runEnd * BLOCK_BYTES, sizeBytes);
    const isKnownData = origin === progress.dataOrigin && at * BLOCK_BYTES < progress.dataUntilBytes;
    const dataAt = isKnownData ? at * BLOCK_BYTES : holeEnd(context, disk, origin, at * BLOCK_BYTES, runEndBytes);
    const holeEndBlock = dataAt >= runEndBytes ? runEnd : Math.floor(dataAt / BLOCK_BYTES);
    if (holeEndBlock > at) {
      progress.failed = ownAsHole(context, disk, at, holeEndBlock - 1, true);
      if (progress.failed < 0) return false;
      // A step ends here: what it may append to the journal is bounded.
      progress.cursorBlock = holeEndBlock;
      return progress.cursorBlock >= endBlock;
    }
    const from = at * BLOCK_BYTES;
    if (!isKnownData) {
      progress.dataOrigin = origin;
      progress.dataUntilBytes = Math.ceil(dataEnd(context, disk, origin, dataAt, sizeBytes) / BLOCK_BYTES) * BLOCK_BYTES;
    }
    const lengthBytes = Math.min(runEndBytes, progress.dataUntilBytes, from + REQUEST_BYTES_MAX) - from;
    progress.failedAtBytes = from;
    progress.failed = readOrigin(context, disk, origin, from, lengthBytes, buffer, 0);
    if (progress.failed === 0) progress.failed = verify(origin);
    if (progress.failed < 0) return false;
    const last = Math.ceil((from + lengthBytes) / BLOCK_BYTES) - 1;
    const kept = keepBlocks(context, disk, at, last, buffer, 0, from + lengthBytes);
    if (kept < 0) {
      progress.failed = kept;
      return false;
    }
    progress.copiedBytes += kept;
    progress.cursorBlock = last + 1;
    return progress.cursorBlock >= endBlock;
  }
  return progress.cursorBlock >= endBlock;
}

/**
 * The same for an origin whose bytes must be fetched: asks for them, or keeps what was fetched. Blocks of zeros become holes, since a source that
 * is asked from afar is not asked for its holes.
 */
function stepFetched(context: HotContext, disk: SharedDisk, buffer: IoBuffer, progress: FillProgress, endBlock: number): boolean {
  const at = progress.cursorBlock;
  const origin = disk.originOf(context.shared, at);
  const from = at * BLOCK_BYTES;
  const pageEnd = Math.min(endBlock, (Math.floor(at / PAGE_BLOCKS) + 1) * PAGE_BLOCKS);
  const runEnd = disk.runEnd(context.shared, at + 1, pageEnd, origin);
  const limitBytes = disk.originLimitBytes(origin);
  const toBytes = Math.min(runEnd * BLOCK_BYTES, disk.sizeBytes(), from + REQUEST_BYTES_MAX);
  const fileAt = from + disk.originDeltaBytes(origin);
  const { fetched } = progress;
  const skip = fileAt - progress.fetchedAtBytes;
  const fetchedBytes = fetched === null || progress.fetchedOrigin !== origin || skip < 0 ? 0 : fetched.length - skip;
  // Whole blocks, or up to where the source or the disk ends; what lies behind the source's end is zeros.
  const usable = from + fetchedBytes >= Math.min(limitBytes, toBytes) ? toBytes - from : Math.floor(fetchedBytes / BLOCK_BYTES) * BLOCK_BYTES;
  if (fetched === null || fetchedBytes <= 0 || usable <= 0) {
    progress.failed = FETCH;
    progress.failedAtBytes = from;
    progress.wantedOrigin = origin;
    progress.wantedAtBytes = fileAt;
    progress.wantedBytes = Math.min(toBytes, limitBytes) - from;
    return false;
  }
  const copied = fetched.copy(buffer.bytes, 0, skip, Math.min(fetched.length, skip + usable));
  buffer.bytes.fill(0, copied, usable);
  const zeros = isZero(buffer, 0, usable);
  let end = BLOCK_BYTES;
  while (end < usable && isZero(buffer, end, usable) === zeros) end += BLOCK_BYTES;
  end = Math.min(end, usable);
  const last = Math.ceil((from + end) / BLOCK_BYTES) - 1;
  const kept = zeros ? ownAsHole(context, disk, at, last, true) : keepBlocks(context, disk, at, last, buffer, 0, from + end);
  if (kept < 0) {
    progress.failed = kept;
    return false;
  }
  progress.copiedBytes += zeros ? end : kept;
  progress.cursorBlock = last + 1;
  return progress.cursorBlock >= endBlock;
}

function isZero(buffer: IoBuffer, from: number, to: number): boolean {
  const lengthBytes = Math.min(BLOCK_BYTES, to - from);
  return buffer.bytes.compare(ZERO_BLOCK, 0, lengthBytes, from, from + lengthBytes) === 0;
}
