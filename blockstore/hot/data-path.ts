/**
 * Reads and writes of an open disk: the path that every guest request takes.
 *
 * Runs in the I/O workers, and in the main thread for transports without workers. Synchronous, no allocation, results
 * below zero are a negative errno. Callers have passed the disk's gate (`enterDisk`) and leave it afterwards.
 *
 * What a read does: the block map says which origin holds each block; runs with one origin become one pread into the
 * reply. Behind an origin's limit lie zeros. With copy-on-read, what came from elsewhere is then kept.
 *
 * What a write does: if all its blocks are owned, one pwrite. Otherwise it is a *first touch*:
 *
 *   1. the backing's content of a block written in part is read (sealed data never changes, so no claim is needed)
 *   2. the blocks are claimed
 *   3. data, with what copy-up brought, is written in full       (crash: not acknowledged, block still un-owned)
 *   4. the journal gets its record                               (crash: replayed; the guest may or may not have been answered)
 *   5. the block map is published, the claim released
 *   6. the caller replies
 *
 * A source that may not answer at once (a network, a file that is away) is never waited for here: the result is FETCH before anything
 * is claimed or written, and the request is run again by the main thread when the bytes are there.
 *
 * Un-owned to owned is a one-way street within a layer's life, so a block seen as owned needs no claim. Two partial
 * writes to one un-owned block cannot lose each other: whoever comes second finds it owned under the claim and writes
 * its own bytes only. A fill or a copy-on-read (`keepBlocks`) re-checks under the claim and so never overwrites a guest.
 */
import { Errno } from '../errors.js';
import { BLOCK_BYTES, DISK_BYTES_MAX } from '../units.js';
import { FLAG_COMPLETE, FLAG_COPY_ON_READ, FLAG_GROWABLE, ORIGIN_ZERO, STATE_FAULTED, blockBytesWithin, type SharedDisk } from './block-map.js';
import { FETCH, HAND_OVER, preadAll, pwriteAll, type HotContext } from './context.js';
import type { IoBuffer } from './door.js';
import { JOURNAL_OWN, JOURNAL_SIZE } from './journal.js';
import { refuseNew, refuseOwned } from './room.js';

/**
 * Reads up to `lengthBytes` at `offsetBytes` into `target` from `targetOffset` on. Bytes read (short only at the end of
 * the disk), a negative errno, or FETCH. Every byte of the answer was written by this call, so that nothing old leaks.
 */
export function readDisk(
  context: HotContext, disk: SharedDisk, offsetBytes: number, lengthBytes: number, target: IoBuffer, targetOffset: number,
): number {
  const sizeBytes = disk.sizeBytes();
  if (offsetBytes >= sizeBytes) return 0;
  const end = Math.min(offsetBytes + lengthBytes, sizeBytes);
  const flags = disk.flags();
  if ((flags & FLAG_COMPLETE) !== 0) {
    const failed = readOrigin(context, disk, disk.activeOrigin(), offsetBytes, end - offsetBytes, target, targetOffset);
    return failed < 0 ? failed : end - offsetBytes;
  }
  const limitBlock = Math.ceil(end / BLOCK_BYTES);
  const active = disk.activeOrigin();
  let at = offsetBytes;
  while (at < end) {
    const block = Math.floor(at / BLOCK_BYTES);
    const origin = disk.originOf(context.shared, block);
    const runEndBlock = disk.runEnd(context.shared, block + 1, limitBlock, origin);
    const runEnd = Math.min(end, runEndBlock * BLOCK_BYTES);
    const bufferAt = targetOffset + (at - offsetBytes);
    const failed = readOrigin(context, disk, origin, at, runEnd - at, target, bufferAt);
    if (failed < 0) return failed;
    if ((flags & FLAG_COPY_ON_READ) !== 0 && origin !== active && origin !== ORIGIN_ZERO) {
      const firstWhole = Math.ceil(at / BLOCK_BYTES);
      const endWhole = runEnd === sizeBytes ? runEndBlock : Math.floor(runEnd / BLOCK_BYTES);
      // Keeping is a favour: a store that is full fails the keeping, not the read.
      if (endWhole > firstWhole) keepBlocks(context, disk, firstWhole, endWhole - 1, target, bufferAt + (firstWhole * BLOCK_BYTES - at), runEnd);
    }
    at = runEnd;
  }
  return end - offsetBytes;
}

/** Fills `lengthBytes` of `target` from one origin; 0, a negative errno, or FETCH. */
export function readOrigin(
  context: HotContext, disk: SharedDisk, origin: number, offsetBytes: number, lengthBytes: number, target: IoBuffer, targetOffset: number,
): number {
  const limit = origin === ORIGIN_ZERO ? 0 : disk.originLimitBytes(origin);
  const wanted = Math.max(0, Math.min(lengthBytes, limit - offsetBytes));
  let got = 0;
  if (wanted > 0) {
    const fd = disk.originFd(origin);
    const fileAt = offsetBytes + disk.originDeltaBytes(origin);
    if (fd < 0) {
      if (context.fetched?.copy(origin, fileAt, wanted, target, targetOffset) !== true) return FETCH;
      if (wanted < lengthBytes) target.bytes.fill(0, targetOffset + wanted, targetOffset + lengthBytes);
      return 0;
    }
    got = preadAll(context, 'origin-read', fd, target.address + targetOffset, wanted, fileAt);
    if (got < 0) return got;
    // A sealed file that ends before its recorded size was cut behind our back: zeros would be an invention.
    if (got < wanted && origin !== disk.activeOrigin()) return -Errno.EIO;
  }
  if (got < lengthBytes) target.bytes.fill(0, targetOffset + got, targetOffset + lengthBytes);
  return 0;
}

/**
 * Writes `lengthBytes` from `source` at `offsetBytes`. `lengthBytes`, a negative errno, HAND_OVER when the map must
 * grow first, or FETCH when the rest of a block must be fetched first. Not durable: that is what a flush is for.
 */
export function writeDisk(
  context: HotContext, disk: SharedDisk, offsetBytes: number, lengthBytes: number, source: IoBuffer, sourceOffset: number,
): number {
  if (lengthBytes === 0) return 0;
  if ((disk.state() & STATE_FAULTED) !== 0) return -Errno.EIO;
  const flags = disk.flags();
  const end = offsetBytes + lengthBytes;
  const sizeBytes = disk.sizeBytes();
  const grows = end > sizeBytes;
  if (grows && ((flags & FLAG_GROWABLE) === 0 || end > DISK_BYTES_MAX)) return -Errno.EFBIG;
  const first = Math.floor(offsetBytes / BLOCK_BYTES);
  const last = Math.floor((end - 1) / BLOCK_BYTES);
  if ((flags & FLAG_COMPLETE) === 0) {
    if (last >= disk.capacityBlocks) return HAND_OVER;
    if (!disk.isUniform(context.shared, first, last, disk.activeOrigin())) {
      return writeFirstTouch(context, disk, offsetBytes, lengthBytes, source, sourceOffset);
    }
  }
  const fd = disk.originFd(disk.activeOrigin());
  const refused = refuseOwned(context, disk, fd, offsetBytes, end, sizeBytes);
  if (refused < 0) return refused;
  const failed = pwriteAll(context, 'owned-write', fd, source.address + sourceOffset, lengthBytes, offsetBytes);
  if (failed < 0) return failed;
  if (grows) growTo(context, disk, end);
  disk.setMtimeMs(Date.now());
  return lengthBytes;
}

function growTo(context: HotContext, disk: SharedDisk, sizeBytes: number): void {
  // The kernel lets only one write past the end through at a time, so nobody else moves the size now.
  context.journal.append(context.shared, JOURNAL_SIZE, disk.nodeId, sizeBytes, 0);
  disk.setSizeBytes(sizeBytes);
}

function writeFirstTouch(
  context: HotContext, disk: SharedDisk, offsetBytes: number, lengthBytes: number, source: IoBuffer, sourceOffset: number,
): number {
  const { shared } = context;
  const end = offsetBytes + lengthBytes;
  const refused = refuseNew(context, disk, Math.floor(offsetBytes / BLOCK_BYTES), Math.floor((end - 1) / BLOCK_BYTES));
  if (refused < 0) return refused;
  const sizeAfter = Math.max(disk.sizeBytes(), end);
  const active = disk.activeOrigin();
  const first = Math.floor(offsetBytes / BLOCK_BYTES);
  const last = Math.floor((end - 1) / BLOCK_BYTES);
  const headBytes = offsetBytes - first * BLOCK_BYTES;
  const lastEnd = last * BLOCK_BYTES + blockBytesWithin(last, sizeAfter);
  const tailBytes = lastEnd - end;

  // Step 1. The scratch holds the write as whole blocks: what precedes it in the first block, it, what follows it in the last.
  if (headBytes > 0 || tailBytes > 0) {
    const failed = prepareCopyUp(context, disk, first, last, lastEnd, headBytes, tailBytes);
    if (failed < 0) return failed;
    source.bytes.copy(context.scratch.bytes, headBytes, sourceOffset, sourceOffset + lengthBytes);
  }

  shared.claim(disk.serial, first, last); // Step 2.
  // Somebody may have made the first or the last block owned since: then its other bytes are newer than ours.
  const withHead = headBytes > 0 && disk.originOf(shared, first) !== active ? headBytes : 0;
  const withTail = tailBytes > 0 && disk.originOf(shared, last) !== active ? tailBytes : 0;
  const from = withHead + withTail === 0 ? source.address + sourceOffset : context.scratch.address + headBytes - withHead;
  let failed = pwriteAll( // Step 3.
    context, 'first-touch-write', disk.originFd(active), from, withHead + lengthBytes + withTail, offsetBytes - withHead,
  );
  if (failed === 0) failed = ownClaimed(context, disk, first, last, active); // Steps 4 and 5.
  shared.release(disk.serial, first, last);
  if (failed < 0) return failed;
  if (end > disk.sizeBytes()) growTo(context, disk, end);
  disk.setMtimeMs(Date.now());
  return lengthBytes;
}

/** Reads what surrounds a partial write into the scratch: the head of block `first`, the tail of block `last`. */
function prepareCopyUp(
  context: HotContext, disk: SharedDisk, first: number, last: number, lastEnd: number, headBytes: number, tailBytes: number,
): number {
  const { shared, scratch } = context;
  const active = disk.activeOrigin();
  if (headBytes > 0) {
    const origin = disk.originOf(shared, first);
    if (origin !== active) {
      const failed = readOrigin(context, disk, origin, first * BLOCK_BYTES, headBytes, scratch, 0);
      if (failed < 0) return failed;
    }
  }
  if (tailBytes > 0) {
    const origin = disk.originOf(shared, last);
    if (origin !== active) {
      const tailAt = lastEnd - tailBytes;
      const failed = readOrigin(context, disk, origin, tailAt, tailBytes, scratch, tailAt - first * BLOCK_BYTES);
      if (failed < 0) return failed;
    }
  }
  return 0;
}

/** Steps 4 and 5: journal, then publish. The claim is held and the data is written. 0 or a negative errno. */
export function ownClaimed(context: HotContext, disk: SharedDisk, first: number, last: number, active: number): number {
  context.journal.append(context.shared, JOURNAL_OWN, disk.layerId(), first, last - first + 1);
  return disk.publish(context.shared, first, last, active) ? 0 : -Errno.ENOMEM;
}

/**
 * Keeps blocks that were read from a backing: for copy-on-read and fill. Writes those from `first` to `last` that are
 * still un-owned, from `source` at `sourceOffset` (which holds all of them), and owns them. Blocks that became owned
 * meanwhile are left alone. `validEnd` is the offset on the disk up to which `source` was filled: when the disk grew since,
 * a block that is only partly there is not kept. Bytes written or a negative errno.
 */
export function keepBlocks(
  context: HotContext, disk: SharedDisk, first: number, last: number, source: IoBuffer, sourceOffset: number, validEnd: number,
): number {
  const { shared } = context;
  if ((disk.state() & STATE_FAULTED) !== 0) return -Errno.EIO;
  if (last >= disk.capacityBlocks) return 0;
  const refused = refuseNew(context, disk, first, last);
  if (refused < 0) return refused;
  const active = disk.activeOrigin();
  const sizeBytes = disk.sizeBytes();
  shared.claim(disk.serial, first, last);
  let written = 0;
  let at = first;
  while (at <= last) {
    const origin = disk.originOf(shared, at);
    let end = disk.runEnd(shared, at + 1, last + 1, origin);
    if (origin !== active) {
      if (Math.min(end * BLOCK_BYTES, sizeBytes) > validEnd) end = Math.floor(validEnd / BLOCK_BYTES);
      const lengthBytes = Math.min(end * BLOCK_BYTES, sizeBytes) - at * BLOCK_BYTES;
      if (lengthBytes <= 0) break;
      const from = source.address + sourceOffset + (at - first) * BLOCK_BYTES;
      let failed = pwriteAll(context, 'keep-write', disk.originFd(active), from, lengthBytes, at * BLOCK_BYTES);
      if (failed === 0) failed = ownClaimed(context, disk, at, end - 1, active);
      if (failed < 0) {
        shared.release(disk.serial, first, last);
        return failed;
      }
      written += lengthBytes;
    }
    at = end;
  }
  shared.release(disk.serial, first, last);
  return written;
}
