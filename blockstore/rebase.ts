/**
 * Rebase: a closed clone gets a newer version of its image to stand on, where nothing that it wrote is in the way. Main thread.
 *
 * A clone says of each block "mine" or "as in the image". On another image the un-owned blocks are the new one's. An owned block hides the new image's, and that is
 * only right where the new image has nothing new to say: where it differs from the old one, there is a conflict, and nothing is changed. A discarded block is
 * owned, too. Not compared are blocks that both images have from the same layer.
 *
 * "Owned by the clone" is what lies above the old image: the active layer, and sealed layers that the clone wrote and nobody else reads. Where snapshots or other
 * clones stand on what the clone wrote, it cannot be moved: they would be moved with it.
 *
 *   1. the new image is sealed, as for a clone of it                 (crash, conflict: nothing that anybody could see)
 *   2. owned blocks are compared, in pieces, while guests are served
 *   3. one transaction, if nothing of it changed meanwhile: the lowest of the clone's own layers stands on the new image. What only the clone read through is reclaimed
 */
import fs from 'node:fs';
import { promisify } from 'node:util';
import { setImmediate as nextTurn } from 'node:timers/promises';

import { onFoundation, type CloneParts, type Foundation } from './clone.js';
import { OffshootError, toOffshootError } from './errors.js';
import type { LayerFile } from './layer-files.js';
import { listedNames } from './listed-names.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow, NodeRow } from './meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from './units.js';

export interface RebaseParts extends CloneParts {
  readonly sourceTimeoutMs: number;
  reclaim(from?: readonly number[]): number;
  /** Ends what is being sealed as a group. */
  settleSeals(): void;
}

export interface ConflictExtent {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

export interface RebaseOutcome {
  readonly rebased: boolean;
  /** Owned extents whose content differs between the images; the first CONFLICTS_MAX of them. */
  readonly conflicts: readonly ConflictExtent[];
  readonly conflictsTotal: number;
  readonly conflictBytes: number;
}

export const CONFLICTS_MAX = 1000;
const TRIES_MAX = 3;
/** Pages looked at in one step: 64 MiB of disk. */
const STEP_PAGES = 8;
const PIECE_BYTES = 1024 * 1024;
const readFile = promisify(fs.read);

/** One of the two images: its layers from the top, each as far as it can be seen, and their files. */
interface View {
  readonly layers: readonly LayerRow[];
  readonly limits: readonly number[];
  readonly files: readonly LayerFile[];
}

/** `force`: the clone's own blocks win where there are conflicts. */
export async function rebaseNode(parts: RebaseParts, nodeId: number, imageId: number, force: boolean): Promise<RebaseOutcome> {
  for (let tried = 1; ; tried += 1) {
    try {
      return await tryRebase(parts, nodeId, imageId, force);
    } catch (thrown) {
      // Layers were merged, or the image was written and sealed again, while contents were compared.
      if (!(thrown instanceof ChangedMeanwhile) || tried === TRIES_MAX) throw thrown;
    }
  }
}

class ChangedMeanwhile extends OffshootError {
  constructor(nodeId: number) {
    super('busy', 'the clone or the image changed while they were compared: close what uses them, and try again', { nodeId });
  }
}

async function tryRebase(parts: RebaseParts, nodeId: number, imageId: number, force: boolean): Promise<RebaseOutcome> {
  const { meta, disks } = parts;
  parts.settleSeals();
  const clone = closedClone(parts, nodeId);
  const image = nodeWithLayer(meta, imageId);
  assertFits(meta, clone, image);
  const own = ownLayers(meta, clone);
  const bottom = own.at(-1)!;
  const foundation = onFoundation(parts, imageId, (found) => found);
  if (foundation.backingId === bottom.backingId && foundation.backingLimitBytes === bottom.backingLimitBytes) return { rebased: true, conflicts: [], conflictsTotal: 0, conflictBytes: 0 };
  if (meta.layers.chain(foundation.backingId).some((layer) => own.some(({ id }) => id === layer.id))) {
    throw new OffshootError('invalid-argument', 'the new image stands on this clone itself: name a disk or snapshot that does not', { nodeId });
  }
  const result = force ? NO_CONFLICTS : await findConflicts(parts, clone, own, foundation);
  if (result.conflictsTotal > 0) return { rebased: false, ...result };
  parts.settleSeals();
  meta.transaction(() => {
    const now = ownLayers(meta, closedClone(parts, nodeId));
    const isSame = now.length === own.length && now.every((layer, i) => layer.id === own[i]!.id && layer.backingId === own[i]!.backingId);
    if (!isSame || disks.get(nodeId) !== undefined || meta.layers.byId(foundation.backingId)?.sealed !== true) throw new ChangedMeanwhile(nodeId);
    meta.layers.update(bottom.id, { backingId: foundation.backingId, backingLimitBytes: limitOf(bottom, clone, foundation) });
    const nowUs = Date.now() * 1000;
    meta.nodes.update(nodeId, { mtimeUs: nowUs, ctimeUs: nowUs });
    if (bottom.backingId !== null) parts.reclaim([bottom.backingId]);
  });
  return { rebased: true, ...NO_CONFLICTS };
}

const NO_CONFLICTS = { conflicts: [], conflictsTotal: 0, conflictBytes: 0 } as const;

/** The clone, with nobody using it and everything of it in the database. */
function closedClone(parts: RebaseParts, nodeId: number): NodeRow {
  const { meta, disks } = parts;
  disks.retireIdle(nodeId);
  const node = nodeWithLayer(meta, nodeId);
  if (disks.isUsed(nodeId)) throw new OffshootError('in-use', 'the clone is open, or is being filled: stop what uses it first, because its content changes', { nodeId });
  const fault = disks.faultOf(node);
  if (fault !== null) throw new OffshootError('faulted', `the clone is faulted: ${fault}`, { nodeId });
  return node;
}

function nodeWithLayer(meta: MetaStore, nodeId: number): NodeRow & { readonly layerId: number } {
  const node = meta.nodes.byId(nodeId);
  if (node === undefined) throw new OffshootError('not-found', `there is no node ${nodeId}`, { nodeId });
  const { layerId } = node;
  if (layerId === null) throw new OffshootError('is-a-directory', 'only disks and files have an image to stand on', { nodeId });
  return { ...node, layerId };
}

function assertFits(meta: MetaStore, clone: NodeRow, image: NodeRow): void {
  if (image.id === clone.id) throw new OffshootError('invalid-argument', 'a disk cannot stand on itself: name another image', { nodeId: clone.id });
  if (image.sizeBytes > clone.sizeBytes) {
    throw new OffshootError('invalid-argument',
      `the new image has ${image.sizeBytes} bytes, and the clone only ${clone.sizeBytes}: its end would be missing; make the clone larger first: offshoot resize ${meta.nodes.pathOf(clone.id)} ${image.sizeBytes}`,
      { nodeId: clone.id, sizeBytes: clone.sizeBytes, imageSizeBytes: image.sizeBytes });
  }
}

/** The clone's layers above its image, the active one first. */
function ownLayers(meta: MetaStore, clone: NodeRow): LayerRow[] {
  const chain = meta.layers.chain(clone.layerId ?? 0);
  const own: LayerRow[] = [];
  for (const layer of chain) {
    if (own.length > 0 && layer.writtenBy !== clone.id) break;
    if (own.length > 0 && meta.links.soleReader(layer.id) !== own.at(-1)!.id) {
      const others = meta.layers.dependantNodes(layer.id).filter((node) => node.id !== clone.id);
      const pathOf = (node: NodeRow): string => meta.nodes.pathOf(node.id);
      throw new OffshootError('in-use', `others stand on what this clone wrote, and would change with it: ${listedNames(others, pathOf)}; remove them first (a snapshot: offshoot snapshot rm), or make them independent (offshoot flatten)`, { nodeId: clone.id });
    }
    if (meta.links.hasSharedExtents(layer.id)) throw new OffshootError('not-supported', 'the clone has blocks that were cloned by range, or others have such blocks of it: flatten it instead', { nodeId: clone.id });
    own.push(layer);
  }
  const bottom = own.at(-1);
  if (bottom === undefined || bottom.complete || bottom.backingId === null) {
    throw new OffshootError('invalid-argument', 'it reads from no image: it is filled, or was never a clone; make a clone of the new image instead', { nodeId: clone.id });
  }
  return own;
}

/** What was cut off the clone once reads as zeros, and stays so. */
function limitOf(bottom: LayerRow, clone: NodeRow, foundation: Foundation): number | null {
  const cut = bottom.backingLimitBytes !== null && bottom.backingLimitBytes < clone.sizeBytes ? bottom.backingLimitBytes : Number.MAX_SAFE_INTEGER;
  const limit = Math.min(cut, foundation.backingLimitBytes ?? Number.MAX_SAFE_INTEGER);
  return limit === Number.MAX_SAFE_INTEGER ? null : limit;
}

type Conflicts = Omit<RebaseOutcome, 'rebased'>;

async function findConflicts(parts: RebaseParts, clone: NodeRow, own: readonly LayerRow[], foundation: Foundation): Promise<Conflicts> {
  const bottom = own.at(-1)!;
  const opened: LayerFile[] = [];
  try {
    // What was cut off the clone counts as owned, and is compared as what it was in the image.
    const before = viewOf(parts, bottom.backingId!, null, opened);
    const after = viewOf(parts, foundation.backingId, foundation.backingLimitBytes, opened);
    const list = new ConflictList();
    const cutAtBlock = Math.floor((bottom.backingLimitBytes ?? Number.MAX_SAFE_INTEGER) / BLOCK_BYTES);
    const endBlock = Math.ceil(clone.sizeBytes / BLOCK_BYTES);
    for (let firstBlock = 0; firstBlock < endBlock; firstBlock += STEP_PAGES * PAGE_BLOCKS) {
      const blocks = Math.min(STEP_PAGES * PAGE_BLOCKS, endBlock - firstBlock);
      const owned = new Int16Array(blocks);
      for (const layer of own) markLayer(parts.meta, layer, firstBlock, owned, 1);
      if (cutAtBlock < firstBlock + blocks) owned.fill(1, Math.max(0, cutAtBlock - firstBlock));
      if (owned.includes(1)) await compareStep(parts, { before, after, firstBlock, owned, sizeBytes: clone.sizeBytes, list });
      else await nextTurn();
    }
    return list.result();
  } finally {
    for (const file of opened) parts.files.release(file);
  }
}

function viewOf({ meta, files }: RebaseParts, layerId: number, limitBytes: number | null, opened: LayerFile[]): View {
  const layers = meta.layers.chain(layerId);
  if (layers.some((layer) => meta.links.hasSharedExtents(layer.id))) {
    throw new OffshootError('not-supported', 'one of the two images has blocks that were cloned by range: they cannot be compared; --force rebases without comparing', { layerId });
  }
  const limits: number[] = [];
  let limit = limitBytes ?? Number.MAX_SAFE_INTEGER;
  for (const layer of layers) {
    limits.push(Math.min(limit, layer.sizeBytes));
    limit = Math.min(limit, layer.backingLimitBytes ?? Number.MAX_SAFE_INTEGER);
  }
  const mine = layers.map((layer) => {
    const file = files.openSealed(layer);
    opened.push(file);
    return file;
  });
  return { layers, limits, files: mine };
}

/** Sets `value` for each block of the step that the layer owns. */
function markLayer(meta: MetaStore, layer: LayerRow, firstBlock: number, blocks: Int16Array, value: number): void {
  if (layer.complete) {
    blocks.fill(value);
    return;
  }
  const firstPage = firstBlock / PAGE_BLOCKS;
  meta.ownership.forEachBetween(layer.id, firstPage, firstPage + STEP_PAGES, (page, count, bitmap) => {
    const base = page * PAGE_BLOCKS - firstBlock;
    if (bitmap === null) {
      blocks.fill(value, Math.max(0, base), Math.max(0, Math.min(blocks.length, base + count * PAGE_BLOCKS)));
      return;
    }
    for (let bit = 0; bit < PAGE_BLOCKS && base + bit < blocks.length; bit += 1) if ((bitmap[bit >> 3]! & (1 << (bit & 7))) !== 0) blocks[base + bit] = value;
  });
}

interface Step {
  readonly before: View;
  readonly after: View;
  readonly firstBlock: number;
  readonly owned: Int16Array;
  readonly sizeBytes: number;
  readonly list: ConflictList;
}

/** For each block of the step the layer of the view that has it, counted from 1; 0: none. */
function holders(meta: MetaStore, view: View, firstBlock: number, count: number): Int16Array {
  const found = new Int16Array(count);
  for (let i = view.layers.length - 1; i >= 0; i -= 1) markLayer(meta, view.layers[i]!, firstBlock, found, i + 1);
  return found;
}

async function compareStep(parts: RebaseParts, step: Step): Promise<void> {
  const { before, after, firstBlock, owned, sizeBytes, list } = step;
  const old = holders(parts.meta, before, firstBlock, owned.length);
  const fresh = holders(parts.meta, after, firstBlock, owned.length);
  for (let at = 0; at < owned.length; ) {
    let end = at + 1;
    while (end < owned.length && owned[end] === owned[at] && old[end] === old[at] && fresh[end] === fresh[at] && (end - at) * BLOCK_BYTES < PIECE_BYTES) end += 1;
    const offsetBytes = (firstBlock + at) * BLOCK_BYTES;
    const lengthBytes = Math.min((firstBlock + end) * BLOCK_BYTES, sizeBytes) - offsetBytes;
    if (owned[at] === 1 && !isSameLayer(before, after, old[at]! - 1, fresh[at]! - 1, offsetBytes + lengthBytes)) {
      const [one, other] = await Promise.all([
        readView(parts, before, old[at]! - 1, offsetBytes, lengthBytes), readView(parts, after, fresh[at]! - 1, offsetBytes, lengthBytes),
      ]);
      for (let from = 0; from < lengthBytes; from += BLOCK_BYTES) {
        const to = Math.min(lengthBytes, from + BLOCK_BYTES);
        if (one.compare(other, from, to, from, to) !== 0) list.add(offsetBytes + from, to - from);
      }
    }
    at = end;
  }
  await nextTurn();
}

/** Both have it from the same layer, and see the same of it. */
function isSameLayer(before: View, after: View, old: number, fresh: number, endBytes: number): boolean {
  if (old < 0 || fresh < 0) return old < 0 && fresh < 0;
  if (before.layers[old]!.id !== after.layers[fresh]!.id) return false;
  return before.limits[old] === after.limits[fresh] || endBytes <= Math.min(before.limits[old]!, after.limits[fresh]!);
}

async function readView(parts: RebaseParts, view: View, index: number, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
  const content = Buffer.alloc(lengthBytes);
  if (index < 0) return content;
  const wanted = Math.min(lengthBytes, view.limits[index]! - offsetBytes);
  if (wanted <= 0) return content;
  const file = view.files[index]!;
  try {
    if (file.source !== null) {
      content.set(await file.source.read(offsetBytes, wanted, performance.now() + parts.sourceTimeoutMs));
      return content;
    }
    for (let got = 0; got < wanted; ) {
      const { bytesRead } = await readFile(file.fd, content, got, wanted - got, offsetBytes + got);
      if (bytesRead === 0) break;
      got += bytesRead;
    }
    return content;
  } catch (thrown) {
    throw toOffshootError(thrown);
  }
}

class ConflictList {
  readonly #extents: { offsetBytes: number; lengthBytes: number }[] = [];
  #total = 0;
  #bytes = 0;
  #lastEnd = -1;

  add(offsetBytes: number, lengthBytes: number): void {
    this.#bytes += lengthBytes;
    if (offsetBytes === this.#lastEnd) {
      const last = this.#extents.at(-1);
      if (this.#total <= CONFLICTS_MAX && last !== undefined) last.lengthBytes += lengthBytes;
    } else {
      this.#total += 1;
      if (this.#total <= CONFLICTS_MAX) this.#extents.push({ offsetBytes, lengthBytes });
    }
    this.#lastEnd = offsetBytes + lengthBytes;
  }

  result(): Conflicts {
    return { conflicts: this.#extents, conflictsTotal: this.#total, conflictBytes: this.#bytes };
  }
}
