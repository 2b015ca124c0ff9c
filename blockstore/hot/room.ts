/**
 * Whether a write may allocate: the store has room, and the limit of the disk's container is not reached.
 *
 * Runs in the threads that move blocks, before anything is read or written for the request. A limit is a number of blocks in shared memory,
 * which first touches take from and the main thread sets anew from what it measures (`quotas.ts`), so that a limit holds between two
 * looks as well. Writes to owned blocks allocate only in holes; they are asked for when little room is left, because the
 * question costs a system call. Refused are whole requests: ENOSPC for disks, which QEMU's werror=enospc pauses a guest for (it knows no other errno), and for
 * ordinary files EDQUOT, which says to whoever reads it that the file system as such is not full. A full store is ENOSPC for all.
 */
import { Errno } from '../errors.js';
import { BLOCK_BYTES } from '../units.js';
import { FLAG_GROWABLE, type SharedDisk } from './block-map.js';
import type { HotContext } from './context.js';
import { SEEK_HOLE } from './door.js';

/** With more room than this (256 MiB) nobody asks whether a write to owned blocks meets a hole. */
export const PLENTY_BLOCKS = 65_536;

/** Before un-owned blocks are written: 0 or a negative errno. Blocks among them that are owned already are given back at the next look. */
export function refuseNew(context: HotContext, disk: SharedDisk, first: number, last: number): number {
  const { shared } = context;
  if (shared.isStoreFull()) return -Errno.ENOSPC;
  const slot = disk.quotaSlot();
  if (slot === 0 || shared.takeRoom(slot, last - first + 1)) return 0;
  return limitErrno(disk);
}

/** Before blocks are written that the disk owns: 0 or a negative errno. `sizeBytes` is the disk's size before. */
export function refuseOwned(context: HotContext, disk: SharedDisk, fd: number, offsetBytes: number, end: number, sizeBytes: number): number {
  const { shared } = context;
  const slot = disk.quotaSlot();
  const full = shared.isStoreFull();
  const scarce = slot !== 0 && shared.room(slot) < PLENTY_BLOCKS;
  if (!full && !scarce) return 0;
  if (full) return end <= sizeBytes && isAllocated(context, fd, offsetBytes, end) ? 0 : -Errno.ENOSPC;
  const first = Math.floor(offsetBytes / BLOCK_BYTES);
  const endBlock = Math.ceil(end / BLOCK_BYTES);
  // Growth within its last block takes no new one.
  const sizeEndBlock = Math.ceil(sizeBytes / BLOCK_BYTES);
  const within = Math.min(end, sizeEndBlock * BLOCK_BYTES, Math.max(sizeBytes, offsetBytes));
  const blocks = offsetBytes >= within || isAllocated(context, fd, offsetBytes, within) ? endBlock - Math.max(first, sizeEndBlock) : endBlock - first;
  return blocks <= 0 || shared.takeRoom(slot, blocks) ? 0 : limitErrno(disk);
}

/** True when the range has no hole in it, so that writing to it takes no new space. */
function isAllocated(context: HotContext, fd: number, from: number, to: number): boolean {
  return context.door.seek('allocated-seek', fd, from, SEEK_HOLE) >= to;
}

function limitErrno(disk: SharedDisk): number {
  return (disk.flags() & FLAG_GROWABLE) === 0 ? -Errno.ENOSPC : -Errno.EDQUOT;
}
