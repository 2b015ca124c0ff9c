/**
 * SEEK_DATA and SEEK_HOLE of an open disk: its own map first, then the holes of the files behind it.
 *
 * A false hole would make a backup write zeros, so in doubt the answer is data. Un-owned blocks of a clone are data
 * where their origin has data. Runs in the I/O workers and the main thread, inside the gate.
 */
import { Errno } from '../errors.js';
import { BLOCK_BYTES } from '../units.js';
import { FLAG_COMPLETE, ORIGIN_ZERO, type SharedDisk } from './block-map.js';
import type { HotContext } from './context.js';
import { SEEK_DATA, SEEK_END, SEEK_HOLE } from './door.js';

/** Runs looked at before the answer becomes "data here": bounds the time a request may take in a worker. */
const RUNS_MAX = 100_000;

/**
 * The first offset at or after `offsetBytes` that is data (`wantData`) or a hole; the end of the disk counts as a hole.
 * Negative errno: ENXIO when there is none.
 */
export function seekDisk(context: HotContext, disk: SharedDisk, offsetBytes: number, wantData: boolean): number {
  const sizeBytes = disk.sizeBytes();
  if (offsetBytes < 0 || offsetBytes >= sizeBytes) return -Errno.ENXIO;
  const complete = (disk.flags() & FLAG_COMPLETE) !== 0;
  const limitBlock = Math.ceil(sizeBytes / BLOCK_BYTES);
  let at = offsetBytes;
  for (let runs = 0; at < sizeBytes; runs += 1) {
    if (runs > RUNS_MAX) return wantData ? at : sizeBytes;
    const block = Math.floor(at / BLOCK_BYTES);
    const origin = complete ? disk.activeOrigin() : disk.originOf(context.shared, block);
    const endBlock = complete ? limitBlock : disk.runEnd(context.shared, block + 1, limitBlock, origin);
    const runEnd = Math.min(sizeBytes, endBlock * BLOCK_BYTES);
    const found = seekOrigin(context, disk, origin, at, runEnd, wantData);
    if (found >= 0) return found;
    if (found !== -Errno.ENXIO) return found;
    at = runEnd;
  }
  return wantData ? -Errno.ENXIO : sizeBytes;
}

/** The same within one run of one origin; -ENXIO when the run has nothing of the kind. */
function seekOrigin(context: HotContext, disk: SharedDisk, origin: number, from: number, to: number, wantData: boolean): number {
  const limit = origin === ORIGIN_ZERO ? 0 : Math.min(to, disk.originLimitBytes(origin));
  if (from >= limit) return wantData ? -Errno.ENXIO : from;
  const fd = disk.originFd(origin);
  // A source that would have to be asked: all of it counts as data.
  if (fd < 0) return wantData ? from : limit < to ? limit : -Errno.ENXIO;
  const delta = disk.originDeltaBytes(origin);
  const inFile = context.door.seek('origin-seek', fd, from + delta, wantData ? SEEK_DATA : SEEK_HOLE);
  const found = inFile < 0 ? inFile : inFile - delta;
  const noHole = limit < to ? limit : -Errno.ENXIO;
  // A file system that cannot tell has no holes.
  if (found < 0 && found !== -Errno.ENXIO) return wantData ? from : noHole;
  if (wantData) {
    if (found !== -Errno.ENXIO) return found < limit ? found : -Errno.ENXIO;
    const missing = Math.max(from, missingFrom(context, disk, origin, fd));
    return missing < limit ? missing : -Errno.ENXIO;
  }
  const hole = found < 0 ? from : found;
  if (hole >= limit) return noHole;
  return missingFrom(context, disk, origin, fd) <= hole ? noHole : hole;
}

/**
 * Where a sealed file ends that was cut behind our back, otherwise infinity: what is missing counts as data, which then
 * fails to be read. A hole would be an invention, and a fill would keep it for ever.
 */
function missingFrom(context: HotContext, disk: SharedDisk, origin: number, fd: number): number {
  if (origin === disk.activeOrigin()) return Number.POSITIVE_INFINITY;
  const end = context.door.seek('origin-end', fd, 0, SEEK_END);
  const endOnDisk = end - disk.originDeltaBytes(origin);
  return end < 0 || endOnDisk >= disk.originLimitBytes(origin) ? Number.POSITIVE_INFINITY : endOnDisk;
}

/**
 * For the fill: how far from `offsetBytes` the origin reads as zeros, as an offset (at most `to`). Returns `offsetBytes`
 * itself when data lies there.
 */
export function holeEnd(context: HotContext, disk: SharedDisk, origin: number, offsetBytes: number, to: number): number {
  const found = seekOrigin(context, disk, origin, offsetBytes, to, true);
  if (found === -Errno.ENXIO) return to;
  return found < 0 ? offsetBytes : Math.min(found, to);
}

/** For the fill: where the data at `offsetBytes` of the origin ends, at most `to`. */
export function dataEnd(context: HotContext, disk: SharedDisk, origin: number, offsetBytes: number, to: number): number {
  const found = seekOrigin(context, disk, origin, offsetBytes, to, false);
  return found < 0 ? to : Math.min(found, to);
}
