/**
 * Sealing and cloning: new disks over sealed layers, rows and no data.
 *
 * Clone of a disk that somebody writes to: its active layer is sealed and a new one put on top, behind the gate, in the
 * same transaction that makes the clones. A disk that has written nothing since it was last sealed is not sealed again:
 * its clones stand on the same layer, so that chains do not grow by cloning. Main thread.
 *
 *   1. gate closed, nobody inside
 *   2. pending first touches synced and committed; the active file is on the disk      (crash: as if nothing was asked)
 *   3. the new active layer's file is made, durable                                      (crash: a file nobody refers to)
 *   4. one transaction: layer sealed, new layer, node points to it, all clones' rows      (crash: all or nothing)
 *   5. the map's active origin moves on, the sealed file is opened for reading only
 *   6. gate opens
 */
import type { Committer } from './committer.js';
import { isInDoubt } from './doubt.js';
import { OffshootError } from './errors.js';
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow, NodeRow } from './meta/rows.js';
import type { OpenDisk, OpenDisks } from './open-disks.js';
import { BLOCK_BYTES } from './units.js';

/** Layers of a chain that may be sealed once more; below what an open disk can have, with room for seals while it is open. */
const CHAIN_LAYERS_MAX = 512;
/** The permission bit of a directory that hands its group on to what is made in it. */
const SET_GID = 0o2000;

export interface CloneParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly disks: OpenDisks;
  readonly committer: Committer;
  /** Makes the data of a node durable that is not open. */
  syncClosed(node: NodeRow): void;
  /** The node takes no more writes. */
  faultNode(nodeId: number, reason: string): void;
}

/** What clones of a node stand on. */
export interface Foundation {
  readonly backingId: number;
  readonly backingLimitBytes: number | null;
}

export interface CloneTarget {
  readonly parentId: number;
  readonly name: string;
}

export interface CloneOptions {
  readonly copyOnRead: boolean;
  /** Owner and permission bits of the clones; the source's when undefined, but the group of a set-group-id directory for what is made there. */
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  /** Called inside the transaction, with all clones made: what it writes is there exactly if they are. */
  readonly record?: (clones: readonly NodeRow[]) => void;
}

/** Makes a clone of `sourceId` at each target, in one transaction. `already-exists` names the target that is in the way. */
export function cloneNode(parts: CloneParts, sourceId: number, targets: readonly CloneTarget[], options: CloneOptions): NodeRow[] {
  return onFoundation(parts, sourceId, (foundation) => insertClones(parts.meta, sourceId, foundation, targets, options));
}

/** Seals the node if it has written anything, and runs `also` in the same transaction, with what may stand on the node as it is now. */
export function onFoundation<T>(parts: CloneParts, sourceId: number, also: (foundation: Foundation) => T): T {
  const { disks } = parts;
  disks.retireIdle(sourceId);
  const open = roomToSeal(disks, roomToBeIncomplete(disks, disks.get(sourceId)));
  if (open === undefined) return sealClosed(parts, sourceId, also);
  return disks.withGate(open, () => sealOpen(parts, open, also));
}

/** A disk that was sealed often while it was open has an origin for each time, although its layers were merged meanwhile. */
function roomToSeal(disks: OpenDisks, open: OpenDisk | undefined): OpenDisk | undefined {
  if (open === undefined || open.shared.originCount() < open.shared.originsMax - 1) return open;
  return disks.rebuild(open, 0, () => undefined);
}

/** A file that grew while it owned everything has a map that is too small for what it will be: an incomplete one. */
export function roomToBeIncomplete(disks: OpenDisks, open: OpenDisk | undefined): OpenDisk | undefined {
  if (open === undefined || open.shared.sizeBytes() <= open.shared.capacityBlocks * BLOCK_BYTES) return open;
  return disks.rebuild(open, 2 * open.shared.sizeBytes(), () => undefined);
}

function insertClones(
  meta: MetaStore, sourceId: number, foundation: Foundation, targets: readonly CloneTarget[], options: CloneOptions,
): NodeRow[] {
  const source = requireNode(meta, sourceId);
  const nowUs = Date.now() * 1000;
  const clones = targets.map(({ parentId, name }) => {
    const layer = meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: foundation.backingId, backingLimitBytes: foundation.backingLimitBytes,
      sizeBytes: source.sizeBytes, sealed: false, complete: false, createdUs: nowUs,
    });
    const directory = requireNode(meta, parentId);
    const inheritedGid = (directory.mode & SET_GID) === 0 ? source.gid : directory.gid;
    const made = meta.nodes.insert({
      parentId, name, kind: source.kind, mode: options.mode ?? source.mode, uid: options.uid ?? source.uid, gid: options.gid ?? inheritedGid,
      sizeBytes: source.sizeBytes, atimeUs: nowUs, mtimeUs: nowUs, ctimeUs: nowUs, layerId: layer.id, linkTarget: null,
      copyOnRead: options.copyOnRead, fault: null,
    });
    if (source.frozen) meta.snapshots.noteSource(made.id, source.id);
    return made;
  });
  for (const parentId of new Set(targets.map((target) => target.parentId))) meta.nodes.update(parentId, { mtimeUs: nowUs, ctimeUs: nowUs });
  options.record?.(clones);
  return clones;
}

function sealClosed<T>(parts: CloneParts, nodeId: number, also: (foundation: Foundation) => T): T {
  const { meta, disks, files } = parts;
  const node = requireNode(meta, nodeId);
  const active = requireActive(meta, disks, node);
  if (isPristine(meta, active)) return meta.transaction(() => also(foundationBelow(active)));
  assertMayGrow(meta, active);
  // One that stands on nothing and was never opened has no file yet; from now on others read it.
  if (!active.complete && !files.exists(active.id) && meta.ownership.ownedBlocks(active.id) === 0) files.create(active.id, node.sizeBytes);
  // A closed disk has nothing pending, but its last writes may still be in the page cache.
  parts.syncClosed(node);
  return sealing(() => meta.transaction(() => {
    insertActive(meta, node, active, node.sizeBytes);
    return also({ backingId: active.id, backingLimitBytes: null });
  }), (doubt) => { parts.faultNode(nodeId, doubt.message); });
}

/** The next server may find the layer sealed: a write that lands in it until then would change the clones, so there is none. */
function sealing<T>(body: () => T, fault: (doubt: OffshootError) => void): T {
  try {
    return body();
  } catch (thrown) {
    if (isInDoubt(thrown)) fault(thrown);
    throw thrown;
  }
}

/** Seals the disk's active layer, unless it adds nothing; `also` runs in the same transaction, behind the gate. */
export function sealOpen<T>(parts: CloneParts, disk: OpenDisk, also: (foundation: Foundation) => T): T {
  const { meta, files, disks, committer } = parts;
  committer.commitLayerNow(disk); // Step 2.
  const node = requireNode(meta, disk.nodeId);
  const active = requireActive(meta, disks, node);
  if (isPristine(meta, active)) return meta.transaction(() => also(foundationBelow(active)));
  assertMayGrow(meta, active);
  if (disk.shared.originCount() >= disk.shared.originsMax - 1) {
    throw new OffshootError('busy', 'the disk was cloned too often while it was open: close it once, then clone it', { nodeId: disk.nodeId });
  }
  const sizeBytes = disk.shared.sizeBytes();
  let created: LayerRow | undefined;
  const result = sealing(() => meta.transaction(() => {
    created = insertActive(meta, node, active, sizeBytes);
    const made = also({ backingId: active.id, backingLimitBytes: null });
    // Step 3, inside step 4: its id is only known here, and an error still undoes all rows.
    files.create(created.id, sizeBytes);
    return made;
  }), (doubt) => { committer.fault(disk, doubt); });
  if (created === undefined) throw new Error('the transaction made no layer');
  try {
    disks.replaceActive(disk, { ...active, sealed: true, sizeBytes }, created); // Step 5.
  } catch (error) {
    // The metadata says one thing and the map another: only a new server can bring them together.
    throw new Error(`the map of node ${disk.nodeId} could not follow its seal`, { cause: error });
  }
  return result;
}

/** Seals `active` and puts a new, empty layer above it. Inside a transaction. */
export function insertActive(meta: MetaStore, node: NodeRow, active: LayerRow, sizeBytes: number): LayerRow {
  meta.layers.update(active.id, { sealed: true, sizeBytes, writtenBy: node.id });
  const layer = meta.layers.insert({
    kind: 'store', externalPath: null, externalIdentity: null, backingId: active.id, backingLimitBytes: null,
    sizeBytes, sealed: false, complete: false, createdUs: Date.now() * 1000,
  });
  meta.nodes.update(node.id, { layerId: layer.id, sizeBytes });
  return layer;
}

/** Sealing makes the chain one layer longer, and a chain that is too long could not be opened any more. */
export function assertMayGrow(meta: MetaStore, active: LayerRow): void {
  if (meta.layers.chain(active.id).length < CHAIN_LAYERS_MAX) return;
  throw new OffshootError('not-supported', `the disk stands on ${CHAIN_LAYERS_MAX} layers: fill it (\`offshoot fill start\`) before it is cloned again`, { layerId: active.id });
}

/** True when the layer adds nothing to what lies below it. */
export function isPristine(meta: MetaStore, layer: LayerRow): boolean {
  return !layer.complete && layer.backingId !== null && meta.ownership.isEmpty(layer.id) && meta.sharedExtents.isEmpty(layer.id);
}

export function foundationBelow(layer: LayerRow): Foundation {
  if (layer.backingId === null) throw new Error(`layer ${layer.id} has no backing`);
  return { backingId: layer.backingId, backingLimitBytes: layer.backingLimitBytes };
}

export function requireNode(meta: MetaStore, nodeId: number): NodeRow {
  const node = meta.nodes.byId(nodeId);
  if (node === undefined) throw new OffshootError('not-found', `there is no node ${nodeId}`, { nodeId });
  return node;
}

export function requireActive(meta: MetaStore, disks: OpenDisks, node: NodeRow): LayerRow {
  if (node.layerId === null) throw new OffshootError('is-a-directory', 'only disks and files can be cloned', { nodeId: node.id });
  const fault = disks.faultOf(node);
  if (fault !== null) throw new OffshootError('faulted', `the disk is faulted (${fault}); a clone would copy the damage`, { nodeId: node.id });
  const layer = meta.layers.byId(node.layerId);
  if (layer === undefined) throw new OffshootError('store-damaged', `the active layer ${node.layerId} is missing`, { nodeId: node.id });
  return layer;
}
