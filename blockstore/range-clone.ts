/**
 * Range clones: blocks of one disk become blocks of another, or of itself elsewhere, and no data moves. Main thread.
 *
 * What the source has in a range is looked up in its open map, behind its gate, and sealed first if its active layer has some of
 * it: an extent only ever refers to a sealed layer that owns it. Ranges that a disk has from others are so passed on to whoever owns
 * them; nothing refers to what only refers on. In the target the blocks become un-owned, with another origin than the rest: a
 * write copies up as in any clone, and what is owned again comes before the shared extent.
 *
 *   1. the source's gate closed, its active layer sealed if it owns some of the ranges (as for a clone)  (crash: nothing was asked for)
 *   2. the target's gate closed, what is pending of it committed; if it owns some of the blocks, everything is committed and the
 *      journals' heads moved on: a record of before must not make them owned again
 *   3. a file that gets longer is made longer, and synced                                   (crash: cut at the next open)
 *   4. one transaction: rows of all ranges, the blocks un-owned, the size                   (crash: all or nothing)
 *   5. what lay there in the target's file is punched out                                   (crash: space that nothing refers to)
 *   6. a new map from the metadata takes the place of the open one, the gate opens
 *
 * Done a second time, it leads to the same.
 */
import fs from 'node:fs';

import { requireActive, requireNode, roomToBeIncomplete, sealOpen, type CloneParts } from './clone.js';
import { isInDoubt } from './doubt.js';
import { OffshootError } from './errors.js';
import { FLAG_COMPLETE, ORIGIN_ZERO, STATE_FAULTED } from './hot/block-map.js';
import type { HotContext } from './hot/context.js';
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE } from './hot/door.js';
import type { BlockRun, LayerRow, NewNode, NodeRow } from './meta/rows.js';
import { runsOf, type SharedExtent } from './meta/shared-extent-table.js';
import type { OpenDisk } from './open-disks.js';
import { trimShared } from './reclaim.js';
import { BLOCK_BYTES, DISK_BYTES_MAX, assertBytes } from './units.js';

export interface RangeParts extends CloneParts {
  readonly context: HotContext;
  /** Deletes what nothing refers to any more, of these layers and below. */
  reclaim(from: readonly number[]): number;
}

/** Both offsets are multiples of a block; so is the length, unless the range ends where the source does. */
export interface CopyRange {
  readonly sourceAtBytes: number;
  readonly targetAtBytes: number;
  readonly lengthBytes: number;
}

/** Extents that the layers of one disk may share. Each row costs some bytes of memory while the disk is open, and time to open it. */
const EXTENTS_MAX = 16_384;

/**
 * Puts `ranges` of the source into the target, in one transaction. All of them are the source's content of one moment, also where source and
 * target are the same disk. A file becomes longer if a range ends behind it. `also` runs in the transaction.
 */
export function cloneRanges(parts: RangeParts, sourceId: number, targetId: number, ranges: readonly CopyRange[], also: () => void = () => undefined): void {
  const { disks, meta } = parts;
  assertWritable(requireNode(meta, targetId));
  if (ranges.length === 0) return;
  assertApart(ranges);
  const extents = lookUp(parts, sourceId, ranges);
  const target = disks.acquire(targetId);
  try {
    apply(parts, target, ranges, extents, also);
  } finally {
    disks.release(targetId);
  }
}

/** A new disk of `sizeBytes` that is zeros but for the ranges; with them in one transaction. */
export function cloneRangesToNew(
  parts: RangeParts, sourceId: number, node: Pick<NewNode, 'parentId' | 'name' | 'mode' | 'uid' | 'gid' | 'copyOnRead'>, sizeBytes: number, ranges: readonly CopyRange[],
  also: () => void = () => undefined,
): NodeRow {
  const { meta, files } = parts;
  assertBytes(sizeBytes, 'the size of the new disk');
  assertApart(ranges);
  for (const range of ranges) assertWithin(range, sizeBytes);
  const extents = lookUp(parts, sourceId, ranges);
  const nowUs = Date.now() * 1000;
  return meta.transaction(() => {
    also();
    const layer = meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes, sealed: false, complete: false, createdUs: nowUs,
    });
    files.create(layer.id, sizeBytes);
    putExtents(parts, layer, extents);
    if (node.parentId !== null) meta.nodes.update(node.parentId, { mtimeUs: nowUs, ctimeUs: nowUs });
    return meta.nodes.insert({ ...node, kind: 'disk', sizeBytes, atimeUs: nowUs, mtimeUs: nowUs, ctimeUs: nowUs, layerId: layer.id, linkTarget: null, fault: null });
  });
}

function assertWritable(node: NodeRow): void {
  if (node.frozen) throw new OffshootError('not-permitted', 'the target is part of a snapshot, which never changes: clone it, and copy to the clone', { nodeId: node.id, readOnly: true });
}

/** Blocks of the target that two ranges name would depend on the order of the ranges. */
function assertApart(ranges: readonly CopyRange[]): void {
  let end = 0;
  for (const range of [...ranges].sort((a, b) => a.targetAtBytes - b.targetAtBytes)) {
    const { sourceAtBytes, targetAtBytes, lengthBytes } = range;
    for (const value of [sourceAtBytes, targetAtBytes, lengthBytes]) assertBytes(value, 'an offset or length');
    assertBytes(targetAtBytes + lengthBytes, 'the end of a range');
    if (sourceAtBytes % BLOCK_BYTES !== 0 || targetAtBytes % BLOCK_BYTES !== 0) {
      throw new OffshootError('invalid-argument', `ranges begin at multiples of ${BLOCK_BYTES} bytes, which is a block: ${shown(range)} does not`);
    }
    if (lengthBytes === 0) throw new OffshootError('invalid-argument', `a range has at least one block: ${shown(range)} has none`);
    if (targetAtBytes < end) throw new OffshootError('invalid-argument', `two ranges overlap in the target, at ${targetAtBytes} where ${shown(range)} begins: name each block of it once`);
    end = targetAtBytes + Math.ceil(lengthBytes / BLOCK_BYTES) * BLOCK_BYTES;
  }
}

/** As it is written on the command line. */
function shown({ sourceAtBytes, targetAtBytes, lengthBytes }: CopyRange): string {
  return `${sourceAtBytes}:${targetAtBytes}:${lengthBytes}`;
}

function assertWithin(range: CopyRange, sizeBytes: number): void {
  if (range.targetAtBytes + range.lengthBytes <= sizeBytes) return;
  throw new OffshootError('too-large', `the range ${shown(range)} ends at ${range.targetAtBytes + range.lengthBytes}, behind the target's end at ${sizeBytes}: make the target larger (\`offshoot resize\`; a new one by its size), or the range shorter`);
}

/** What the source has in the ranges, as extents of the target; sealed when this returns. */
function lookUp(parts: RangeParts, sourceId: number, ranges: readonly CopyRange[]): SharedExtent[] {
  const { disks, meta } = parts;
  const acquired = disks.acquire(sourceId);
  try {
    const open = roomToBeIncomplete(disks, acquired) ?? acquired;
    return disks.withGate(open, () => {
      const active = requireActive(meta, disks, requireNode(meta, sourceId));
      const sizeBytes = open.shared.sizeBytes();
      const extents = ranges.flatMap((range) => {
        const { sourceAtBytes, lengthBytes } = range;
        const end = sourceAtBytes + lengthBytes;
        if (end > sizeBytes) throw new OffshootError('invalid-argument', `the range ${shown(range)} ends at ${end} of the source, which has ${sizeBytes} bytes: make it shorter`, { nodeId: sourceId });
        if (lengthBytes % BLOCK_BYTES !== 0 && end !== sizeBytes) {
          throw new OffshootError('invalid-argument', `a range has whole blocks of ${BLOCK_BYTES} bytes, unless it ends where the source does: ${shown(range)} ends within one`, { nodeId: sourceId });
        }
        return extentsOf(parts, open, active, range);
      });
      // Nobody is inside, so what the map said is what is sealed now.
      if (extents.some((extent) => extent.sourceLayerId === active.id)) sealOpen(parts, open, () => undefined);
      return extents;
    });
  } finally {
    disks.release(sourceId);
  }
}

/** One range, run by run of one origin. Behind what may be seen of an origin lie zeros. */
function extentsOf({ context }: RangeParts, open: OpenDisk, active: LayerRow, range: CopyRange): SharedExtent[] {
  const { shared } = open;
  const isComplete = (shared.flags() & FLAG_COMPLETE) !== 0;
  const activeOrigin = shared.activeOrigin();
  const endBytes = range.sourceAtBytes + range.lengthBytes;
  const endBlock = Math.ceil(endBytes / BLOCK_BYTES);
  const offset = (range.targetAtBytes - range.sourceAtBytes) / BLOCK_BYTES;
  const extents: SharedExtent[] = [];
  for (let block = range.sourceAtBytes / BLOCK_BYTES; block < endBlock; ) {
    const origin = isComplete ? activeOrigin : shared.originOf(context.shared, block);
    const runEnd = isComplete ? endBlock : shared.runEnd(context.shared, block + 1, endBlock, origin);
    const limitBytes = origin === ORIGIN_ZERO ? 0 : origin === activeOrigin ? shared.sizeBytes() : Math.min(shared.originLimitBytes(origin), shared.sizeBytes());
    const dataBytes = Math.min(limitBytes, runEnd * BLOCK_BYTES, endBytes);
    const dataEnd = Math.max(block, Math.ceil(dataBytes / BLOCK_BYTES));
    if (dataEnd > block) {
      const layerId = origin === activeOrigin ? active.id : open.files[origin - 1]?.layerId;
      if (layerId === undefined) throw new Error(`origin ${origin} of node ${open.nodeId} has no layer`);
      extents.push({
        block: block + offset, count: dataEnd - block, sourceLayerId: layerId, sourceBlock: block + shared.originDeltaBytes(origin) / BLOCK_BYTES,
        limitBytes: dataBytes < dataEnd * BLOCK_BYTES ? dataBytes - block * BLOCK_BYTES : null,
      });
    }
    if (runEnd > dataEnd) extents.push({ block: dataEnd + offset, count: runEnd - dataEnd, sourceLayerId: null, sourceBlock: 0, limitBytes: null });
    if (extents.length > EXTENTS_MAX) throw tooMany();
    block = runEnd;
  }
  return extents;
}

function apply(parts: RangeParts, target: OpenDisk, ranges: readonly CopyRange[], extents: readonly SharedExtent[], also: () => void): void {
  const { meta, disks, committer } = parts;
  const { nodeId } = target;
  if ((target.shared.state() & STATE_FAULTED) !== 0) throw new OffshootError('faulted', 'the target is faulted and takes no changes: see `offshoot show` for the reason', { nodeId });
  const end = Math.max(...ranges.map((range) => range.targetAtBytes + range.lengthBytes));
  const isFile = requireNode(meta, nodeId).kind === 'file';
  let isChanged = false;
  let lost: readonly number[] = [];
  disks.rebuild(target, isFile ? 2 * end : 0, () => {
    const { shared } = target;
    const oldBytes = shared.sizeBytes();
    for (const range of ranges) {
      if (!isFile) assertWithin(range, oldBytes);
      // The rest of its last block is the target's, and would be zeros.
      if (range.lengthBytes % BLOCK_BYTES !== 0 && range.targetAtBytes + range.lengthBytes < oldBytes) {
        throw new OffshootError('invalid-argument', `the range ${shown(range)} ends within a block of the target: only one that reaches its end, at ${oldBytes}, may`, { nodeId });
      }
    }
    const active = requireActive(meta, disks, requireNode(meta, nodeId));
    const runs = runsOf(extents);
    const owned = runs.flatMap((run) => ownedOf(parts, target, run));
    if (owned.length > 0 || active.complete) {
      // Step 2, the other half: the records of these blocks lie behind the heads of the journals.
      committer.commitAllNow();
      requireActive(meta, disks, requireNode(meta, nodeId));
    }
    const sizeBytes = Math.max(oldBytes, end);
    if (sizeBytes > oldBytes) {
      assertBytes(sizeBytes, 'the new size');
      fs.ftruncateSync(target.fd, sizeBytes); // Step 3.
      committer.syncNow(target);
    }
    try {
      lost = meta.transaction(() => { // Step 4.
        also();
        return record(parts, nodeId, active, oldBytes, sizeBytes, extents);
      });
    } catch (thrown) {
      if (isInDoubt(thrown)) committer.fault(target, thrown);
      throw thrown;
    }
    isChanged = true;
    shared.setMtimeMs(Date.now());
    for (const { block, count } of owned) punch(parts, target, block * BLOCK_BYTES, count * BLOCK_BYTES); // Step 5.
  }, () => isChanged);
  if (lost.length > 0) parts.reclaim(lost);
}

/** What of a run the target's active layer owns. */
function ownedOf({ context }: RangeParts, target: OpenDisk, run: BlockRun): BlockRun[] {
  const { shared } = target;
  const endBlock = Math.min(run.block + run.count, Math.ceil(shared.sizeBytes() / BLOCK_BYTES));
  if ((shared.flags() & FLAG_COMPLETE) !== 0) return endBlock > run.block ? [{ block: run.block, count: endBlock - run.block }] : [];
  const owned: BlockRun[] = [];
  for (let block = run.block; block < endBlock; ) {
    const origin = shared.originOf(context.shared, block);
    const end = shared.runEnd(context.shared, block + 1, endBlock, origin);
    if (origin === shared.activeOrigin()) owned.push({ block, count: end - block });
    block = end;
  }
  return owned;
}

/** The rows of the change; the layers that may have lost a reference by it. */
function record(parts: RangeParts, nodeId: number, active: LayerRow, oldBytes: number, sizeBytes: number, extents: readonly SharedExtent[]): number[] {
  const { meta } = parts;
  const before = meta.sharedExtents.sources(active.id);
  let layer = active;
  if (active.complete) {
    // What it noted as its backing was not consulted, and must not be from now on.
    meta.layers.update(active.id, { complete: false, backingId: null, backingLimitBytes: null });
    layer = { ...active, complete: false, backingId: null, backingLimitBytes: null };
    const blocks = Math.ceil(oldBytes / BLOCK_BYTES);
    if (blocks > 0) meta.ownership.add(active.id, [{ block: 0, count: blocks }]);
  }
  meta.ownership.remove(active.id, runsOf(extents));
  putExtents(parts, layer, extents);
  trimShared(meta, active.id);
  const nowUs = Date.now() * 1000;
  meta.nodes.update(nodeId, { sizeBytes, mtimeUs: nowUs, ctimeUs: nowUs });
  const after = new Set(meta.sharedExtents.sources(active.id));
  return before.filter((id) => !after.has(id));
}

function putExtents({ meta }: RangeParts, layer: LayerRow, extents: readonly SharedExtent[]): void {
  const { sharedExtents } = meta;
  // Where nothing lies below, what is neither owned nor shared reads as zeros.
  const zeros = layer.backingId === null ? extents.filter((extent) => extent.sourceLayerId === null) : [];
  for (const { block, count } of zeros) sharedExtents.cut(layer.id, block, block + count);
  sharedExtents.put(layer.id, layer.backingId === null ? extents.filter((extent) => extent.sourceLayerId !== null) : extents);
  const rows = meta.layers.chain(layer.id).reduce((sum, each) => sum + (each.complete ? 0 : sharedExtents.count(each.id)), 0);
  if (rows > EXTENTS_MAX) throw tooMany();
}

function tooMany(): OffshootError {
  return new OffshootError('not-supported', `a disk shares no more than ${EXTENTS_MAX} extents with others: fill the target (\`offshoot fill start\`) and try again, or copy the bytes`);
}

/** A failure leaves space that nothing refers to, and nothing worse: the next write to such a block writes all of it. */
function punch({ context }: RangeParts, target: OpenDisk, offsetBytes: number, lengthBytes: number): void {
  context.door.fallocate('range-punch', target.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsetBytes, Math.min(lengthBytes, DISK_BYTES_MAX - offsetBytes));
}
