/**
 * Changing a disk's virtual size, behind its gate. Main thread.
 *
 * Growing: the new end reads as zeros, whatever lies below. Shrinking: what lay behind the new end is gone for good; the
 * backing is only visible up to the smallest size that the layer ever had, and shared extents are cut, so that growing again
 * shows zeros and not what was cut off.
 *
 *   1. gate closed, pending first touches committed
 *   2. grow: the file gets longer, then the metadata        (crash between: the file is cut back at the next open)
 *      shrink: the metadata, then the file gets shorter       (crash between: the same; a file that cannot be cut takes the metadata back)
 *   3. the shared size changes, gate opens
 */
import fs from 'node:fs';

import type { Committer } from './committer.js';
import { isInDoubt } from './doubt.js';
import { OffshootError, toOffshootError } from './errors.js';
import { FLAG_COMPLETE, STATE_FAULTED } from './hot/block-map.js';
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import type { SharedExtent } from './meta/shared-extent-table.js';
import type { OpenDisk, OpenDisks } from './open-disks.js';
import { BLOCK_BYTES, assertBytes } from './units.js';

export interface ResizeParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly disks: OpenDisks;
  readonly committer: Committer;
}

export function resizeDisk(parts: ResizeParts, nodeId: number, sizeBytes: number): void {
  assertBytes(sizeBytes, 'the new size');
  const disk = parts.disks.acquire(nodeId);
  try {
    if ((disk.shared.state() & STATE_FAULTED) !== 0) throw new OffshootError('faulted', 'the disk is faulted, and keeps its size: see `offshoot show` for the reason', { nodeId });
    const oldBytes = disk.shared.sizeBytes();
    if (sizeBytes > oldBytes) grow(parts, disk, sizeBytes);
    else if (sizeBytes < oldBytes) parts.disks.withGate(disk, () => { shrink(parts, disk, sizeBytes); });
  } catch (error) {
    throw toOffshootError(error);
  } finally {
    parts.disks.release(nodeId);
  }
}

function grow(parts: ResizeParts, disk: OpenDisk, sizeBytes: number): void {
  const { meta, committer } = parts;
  const nowMs = Date.now();
  const change = (): void => {
    fs.ftruncateSync(disk.fd, sizeBytes);
    committer.syncNow(disk);
    recordSize(meta, disk.nodeId, sizeBytes, nowMs);
    disk.shared.setMtimeMs(nowMs);
  };
  const complete = (disk.shared.flags() & FLAG_COMPLETE) !== 0;
  if (complete || Math.ceil(sizeBytes / BLOCK_BYTES) <= disk.shared.capacityBlocks) {
    parts.disks.withGate(disk, () => {
      committer.commitLayerNow(disk);
      change();
      disk.shared.setSizeBytes(sizeBytes);
    });
    return;
  }
  parts.disks.rebuild(disk, sizeBytes, change);
}

function shrink(parts: ResizeParts, disk: OpenDisk, sizeBytes: number): void {
  const { meta, committer } = parts;
  const { shared } = disk;
  committer.commitLayerNow(disk);
  const layer = meta.layers.byId(disk.layerId);
  const oldBytes = shared.sizeBytes();
  const oldLimitBytes = layer?.backingLimitBytes ?? null;
  const extentsBefore = meta.sharedExtents.of(disk.layerId);
  const nowMs = Date.now();
  const record = (size: number, limitBytes: number | null, extents: readonly SharedExtent[] | null): void => {
    meta.transaction(() => {
      recordSize(meta, disk.nodeId, size, nowMs);
      if (layer?.complete === false) meta.layers.update(layer.id, { backingLimitBytes: limitBytes });
      if (extents === null) meta.sharedExtents.cutBehind(disk.layerId, size);
      else meta.sharedExtents.replaceAll(disk.layerId, extents);
    });
  };
  try {
    record(sizeBytes, Math.min(oldLimitBytes ?? Number.MAX_SAFE_INTEGER, sizeBytes), null);
  } catch (thrown) {
    // In doubt: the next server may find the disk cut. What a guest wrote behind the new end would be gone then, so it writes no more.
    if (isInDoubt(thrown)) committer.fault(disk, thrown);
    throw thrown;
  }
  try {
    fs.ftruncateSync(disk.fd, sizeBytes);
  } catch (thrown) {
    // Cut all the same: done. Not cut: what lies behind the new end would come back when the disk grows again, and the guest goes
    // on to use it; so nothing was done. When not even that can be written down, only a new server brings both together.
    if (fs.fstatSync(disk.fd).size !== sizeBytes) {
      undo(() => { record(oldBytes, oldLimitBytes, extentsBefore); }, thrown);
      throw thrown;
    }
  }
  shared.setSizeBytes(sizeBytes);
  for (let origin = 1; origin < shared.originCount(); origin += 1) {
    if (origin !== shared.activeOrigin()) shared.setOriginLimitBytes(origin, Math.min(shared.originLimitBytes(origin), sizeBytes));
  }
  shared.setMtimeMs(nowMs);
}

function undo(body: () => void, cause: unknown): void {
  try {
    body();
  } catch {
    throw new Error('the size of a disk is neither the old nor the new one', { cause });
  }
}

/** With the time that the open disk is given too: two looks at the clock would differ now and then. */
function recordSize(meta: MetaStore, nodeId: number, sizeBytes: number, nowMs: number): void {
  const nowUs = nowMs * 1000;
  meta.nodes.update(nodeId, { sizeBytes, mtimeUs: nowUs, ctimeUs: nowUs });
}
