/**
 * Discards and write-zeroes: afterwards the range reads as zeros, never as the backing again.
 *
 * A discarded block is *owned* and its place in the layer's file is a hole. Un-owning it would bring the backing's data
 * back, and a mark of its own ("zeroed") would only say again what the hole says. Whole blocks are punched, which gives
 * their space back to the store at once; the parts of blocks at either end get zeros through the write path, copy-up
 * included. Runs in the I/O workers and in the main thread, inside the disk's gate.
 */
import { Errno } from '../errors.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../units.js';
import { FLAG_COMPLETE, STATE_FAULTED, type SharedDisk } from './block-map.js';
import { HAND_OVER, REQUEST_BYTES_MAX, enterDisk, leaveDisk, pwriteAll, type HotContext } from './context.js';
import { ownClaimed, writeDisk } from './data-path.js';
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE } from './door.js';

/** Pages of the map that a discard gives away before it looks around. */
const SLICE_PAGES = 32;

/**
 * Makes `lengthBytes` at `offsetBytes` read as zeros; what lies behind the end of the disk is ignored. 0, a negative
 * errno, or HAND_OVER when the map must grow first, or when the disk was retired meanwhile (then the gate is not passed
 * any more, and leaving it again does nothing).
 */
export function discardDisk(context: HotContext, disk: SharedDisk, offsetBytes: number, lengthBytes: number): number {
  if ((disk.state() & STATE_FAULTED) !== 0) return -Errno.EIO;
  const sizeBytes = disk.sizeBytes();
  const end = Math.min(offsetBytes + lengthBytes, sizeBytes);
  if (end <= offsetBytes) return 0;
  disk.setMtimeMs(Date.now());
  if ((disk.flags() & FLAG_COMPLETE) !== 0) {
    return punch(context, disk.originFd(disk.activeOrigin()), offsetBytes, end - offsetBytes);
  }
  if (Math.ceil(end / BLOCK_BYTES) > disk.capacityBlocks) return HAND_OVER;

  const firstWhole = Math.ceil(offsetBytes / BLOCK_BYTES);
  // A partial last block of the disk counts as whole.
  const endWhole = end === sizeBytes ? Math.ceil(end / BLOCK_BYTES) : Math.floor(end / BLOCK_BYTES);
  if (endWhole <= firstWhole) {
    return firstWhole * BLOCK_BYTES < end && offsetBytes < firstWhole * BLOCK_BYTES
      ? firstFailure(zeroBytes(context, disk, offsetBytes, firstWhole * BLOCK_BYTES), zeroBytes(context, disk, firstWhole * BLOCK_BYTES, end))
      : zeroBytes(context, disk, offsetBytes, end);
  }
  let failed = zeroBytes(context, disk, offsetBytes, firstWhole * BLOCK_BYTES);
  if (failed < 0) return failed;
  let pages = 0;
  // A page of the map at a time: claims stay short, and a page that is given away whole costs one word.
  for (let at = firstWhole; at < endWhole; ) {
    const segmentEnd = Math.min(endWhole, (Math.floor(at / PAGE_BLOCKS) + 1) * PAGE_BLOCKS);
    failed = ownAsHole(context, disk, at, segmentEnd - 1, false);
    if (failed < 0) return failed;
    at = segmentEnd;
    pages += 1;
    // A huge discard steps outside now and then: for room in the journal, and for whoever waits at the gate.
    if (pages % SLICE_PAGES === 0 && at < endWhole) {
      leaveDisk(context, disk);
      if (!enterDisk(context, disk)) return HAND_OVER;
      if (disk.sizeBytes() < end) return discardDisk(context, disk, at * BLOCK_BYTES, end - at * BLOCK_BYTES);
    }
  }
  return endWhole * BLOCK_BYTES < end ? zeroBytes(context, disk, endWhole * BLOCK_BYTES, end) : 0;
}

/**
 * Owns blocks as a hole: `onlyUnowned` leaves alone what is owned already (a fill that meets a hole of its source);
 * otherwise all of them become zeros (a discard). The segment must not be longer than a page of the map.
 */
export function ownAsHole(context: HotContext, disk: SharedDisk, first: number, last: number, onlyUnowned: boolean): number {
  const { shared } = context;
  const active = disk.activeOrigin();
  const fd = disk.originFd(active);
  const sizeBytes = disk.sizeBytes();
  shared.claim(disk.serial, first, last);
  let failed = 0;
  let at = first;
  while (at <= last && failed === 0) {
    let end = last + 1;
    let owned = false;
    if (onlyUnowned) {
      const origin = disk.originOf(shared, at);
      end = disk.runEnd(shared, at + 1, last + 1, origin);
      owned = origin === active;
    }
    if (!owned) {
      // Also where nothing was ever written as far as the map knows: a write that was never acknowledged may lie there.
      failed = punch(context, fd, at * BLOCK_BYTES, Math.min(end * BLOCK_BYTES, sizeBytes) - at * BLOCK_BYTES);
      if (failed === 0) failed = ownClaimed(context, disk, at, end - 1, active);
    }
    at = end;
  }
  shared.release(disk.serial, first, last);
  return failed;
}

function firstFailure(one: number, other: number): number {
  return one < 0 ? one : other;
}

/** Writes zeros into parts of blocks. 0 or a negative errno. */
function zeroBytes(context: HotContext, disk: SharedDisk, from: number, to: number): number {
  if (to <= from) return 0;
  const written = writeDisk(context, disk, from, to - from, context.zeros, 0);
  return written < 0 ? written : 0;
}

/** Punches a hole; writes zeros where the store's file system cannot punch. 0 or a negative errno. */
function punch(context: HotContext, fd: number, offsetBytes: number, lengthBytes: number): number {
  if (lengthBytes <= 0) return 0;
  const failed = context.door.fallocate('punch', fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsetBytes, lengthBytes);
  if (failed !== -Errno.EOPNOTSUPP) return failed;
  for (let at = 0; at < lengthBytes; at += REQUEST_BYTES_MAX) {
    const result = pwriteAll(context, 'punch-zeros', fd, context.zeros.address, Math.min(REQUEST_BYTES_MAX, lengthBytes - at), offsetBytes + at);
    if (result < 0) return result;
  }
  return 0;
}
