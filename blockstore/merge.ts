/**
 * Merging two adjacent sealed layers into one, so that chains do not grow for ever. Main thread; the copying is `merge-copy.ts`.
 *
 * Two layers can be merged when nobody but the upper one refers to the lower one. What comes to be is a layer of its own, with an id
 * of its own: sealed layers and their files are not touched, so that whoever reads them goes on, and an id never changes its meaning.
 *
 *   1. a new file gets the blocks of both, the upper one's where both own one; fsync     (crash: a file in `import/`)
 *   2. one transaction: the new layer with what both own, over the lower one's backing; the file takes its place; whatever stood on the upper one
 *      stands on the new one; both old rows go                                           (crash: both chains are whole, the one or the other is there)
 *   3. open disks read both old layers from the new file
 *   4. the old files are unlinked                                                        (crash: files that nothing refers to)
 *
 * When the upper layer owns all that the lower one owns, there is nothing to copy: it takes the lower one's place over its backing, and keeps
 * its file and its checksums.
 *
 * The new file holds, at every block, what the chain of the two gave. So an open disk's map stays right with both origins at
 * the new file, whatever it says of either. Left alone are layers that other layers have blocks of (or that have blocks from elsewhere), layers
 * with known damage, which new checksums would hide, files that are used where they lie, and a complete lower layer: an image, which is
 * large as a rule, and one layer of a chain whatever happens.
 */
import { OffshootError, toOffshootError } from './errors.js';
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow } from './meta/rows.js';
import type { OpenDisk, OpenDisks } from './open-disks.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from './units.js';

export interface MergeParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly disks: OpenDisks;
}

/** Two layers that can be merged: `upper` stands on `lower`. */
export interface MergePair {
  readonly upper: LayerRow;
  readonly lower: LayerRow;
  /** What the merge has to copy at most; 0: nothing at all. */
  readonly costBytes: number;
}

/** Bytes that one of the two files has for the new one, at the same offset there. */
export interface MergeCopy {
  readonly from: 'upper' | 'lower';
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

/** How long step 3 waits for what is inside a disk: one that keeps its old files is served as well as before, until it is next opened. */
const EXCHANGE_WAIT_MS = 20;
/** Pages looked at in one step: 512 MiB of disk. */
const STEP_PAGES = 64;

/** The pair whose upper layer is this one; null when it has no partner. */
export function mergePair(meta: MetaStore, upperId: number): MergePair | null {
  const upper = meta.layers.byId(upperId);
  if (upper?.sealed !== true || upper.complete || upper.kind !== 'store' || upper.backingId === null) return null;
  const lower = meta.layers.byId(upper.backingId);
  if (lower?.sealed !== true || lower.complete || lower.kind !== 'store' || meta.links.soleReader(lower.id) !== upper.id) return null;
  for (const { id } of [upper, lower]) if (meta.links.hasSharedExtents(id) || meta.links.isDamaged(id)) return null;
  const costBytes = isCovered(meta, upper, lower) ? 0 : (meta.ownership.ownedBlocks(upper.id) + meta.ownership.ownedBlocks(lower.id)) * BLOCK_BYTES;
  return { upper, lower, costBytes };
}

/** Of the pairs in a chain, the one that is merged with the least work; null when there is none. `isReady` may leave a layer for later. */
export function cheapestPair(meta: MetaStore, activeId: number, isReady: (layer: LayerRow) => boolean = () => true): MergePair | null {
  let best: MergePair | null = null;
  for (const layer of meta.layers.chain(activeId)) {
    const pair = mergePair(meta, layer.id);
    if (pair === null || (pair.costBytes > 0 && !(isReady(pair.upper) && isReady(pair.lower)))) continue;
    if (best === null || pair.costBytes < best.costBytes) best = pair;
  }
  return best;
}

/** What is to be copied, in steps of which each is a short look at the metadata; ascending. Sealed layers do not change between them. */
export function* mergeCopies(meta: MetaStore, { upper, lower }: MergePair): Generator<readonly MergeCopy[], void, undefined> {
  const owners = new Uint8Array(STEP_PAGES * PAGE_BLOCKS);
  const lowerEnd = Math.min(upper.backingLimitBytes ?? Number.MAX_SAFE_INTEGER, lower.sizeBytes);
  for (let page = 0; ; ) {
    const next = Math.min(meta.ownership.nextPage(upper.id, page) ?? Infinity, meta.ownership.nextPage(lower.id, page) ?? Infinity);
    if (next === Infinity) return;
    page = next;
    owners.fill(0);
    mark(meta, lower.id, page, owners, LOWER);
    mark(meta, upper.id, page, owners, UPPER);
    yield copiesOf(owners, page * PAGE_BLOCKS, Math.min(lowerEnd, upper.sizeBytes), upper.sizeBytes);
    page += STEP_PAGES;
  }
}

const LOWER = 1;
const UPPER = 2;

function mark(meta: MetaStore, layerId: number, fromPage: number, owners: Uint8Array, owner: number): void {
  const base = fromPage * PAGE_BLOCKS;
  meta.ownership.forEachBetween(layerId, fromPage, fromPage + STEP_PAGES, (firstPage, pageCount, bitmap) => {
    const first = firstPage * PAGE_BLOCKS - base;
    if (bitmap === null) {
      owners.fill(owner, Math.max(0, first), Math.max(0, Math.min(owners.length, first + pageCount * PAGE_BLOCKS)));
      return;
    }
    for (let bit = 0; bit < PAGE_BLOCKS; bit += 1) if ((bitmap[bit >> 3]! & (1 << (bit & 7))) !== 0) owners[first + bit] = owner;
  });
}

function copiesOf(owners: Uint8Array, baseBlock: number, lowerEndBytes: number, upperEndBytes: number): MergeCopy[] {
  const copies: MergeCopy[] = [];
  for (let at = 0; at < owners.length; ) {
    const owner = owners[at]!;
    let end = at + 1;
    while (end < owners.length && owners[end] === owner) end += 1;
    if (owner !== 0) {
      const offsetBytes = (baseBlock + at) * BLOCK_BYTES;
      // What lies behind the end of what could be seen reads as zeros, and stays a hole.
      const endBytes = Math.min((baseBlock + end) * BLOCK_BYTES, owner === UPPER ? upperEndBytes : lowerEndBytes);
      if (endBytes > offsetBytes) copies.push({ from: owner === UPPER ? 'upper' : 'lower', offsetBytes, lengthBytes: endBytes - offsetBytes });
    }
    at = end;
  }
  return copies;
}

/** Every block of the lower layer is hidden by one of the upper layer. */
function isCovered(meta: MetaStore, upper: LayerRow, lower: LayerRow): boolean {
  if (meta.ownership.ownedBlocks(upper.id) < meta.ownership.ownedBlocks(lower.id)) return false;
  const owners = new Uint8Array(STEP_PAGES * PAGE_BLOCKS);
  for (let page = meta.ownership.nextPage(lower.id, 0); page !== undefined; page = meta.ownership.nextPage(lower.id, page + STEP_PAGES)) {
    owners.fill(0);
    mark(meta, lower.id, page, owners, LOWER);
    mark(meta, upper.id, page, owners, UPPER);
    if (owners.includes(LOWER)) return false;
  }
  return true;
}

/**
 * Steps 2 to 4. `file`: what `merge-copy.ts` made, or null for a pair that costs nothing. `busy` when somebody came to refer to the lower layer
 * meanwhile, or one of the two is gone: nothing has changed then. Returns the layer that is in their place.
 */
export function commitMerge(parts: MergeParts, pair: MergePair, file: string | null): LayerRow {
  const { meta, files, disks } = parts;
  const merged = meta.transaction(() => {
    const now = mergePair(meta, pair.upper.id);
    if (now?.lower.id !== pair.lower.id || (file === null && now.costBytes > 0)) throw new OffshootError('busy', 'the layers are in use in another way now', { layerId: pair.upper.id });
    const { upper, lower } = now;
    const backing = { backingId: lower.backingId, backingLimitBytes: smallerLimit(upper.backingLimitBytes, lower.backingLimitBytes) };
    if (file === null) {
      meta.layers.update(upper.id, backing);
      meta.layers.remove(lower.id);
      return { ...upper, ...backing };
    }
    const layer = meta.layers.insert({ ...upper, ...backing });
    meta.ownership.unite(layer.id, upper.id, lower.id);
    files.adopt(layer.id, file);
    meta.links.replaceBacking(upper.id, layer.id);
    meta.layers.remove(upper.id);
    meta.layers.remove(lower.id);
    return layer;
  });
  const gone = file === null ? [pair.lower.id] : [pair.upper.id, pair.lower.id];
  for (const disk of new Set(gone.flatMap((layerId) => disks.standingOn(layerId)))) exchangeOrKeep(parts, disk, gone, merged);
  for (const layerId of gone) unlinkOrLeak(files, layerId);
  return merged;
}

/** The disk reads from the merged layer's file what it read from the files of the layers that are gone. */
function exchangeOrKeep({ disks, files }: MergeParts, disk: OpenDisk, gone: readonly number[], merged: LayerRow): void {
  try {
    disks.withGate(disk, () => {
      for (const [i, old] of disk.files.entries()) {
        if (!gone.includes(old.layerId)) continue;
        const file = files.openSealed(merged);
        disk.files[i] = file;
        disk.shared.setOriginFd(i + 1, file.fd);
        files.release(old);
      }
    }, EXCHANGE_WAIT_MS);
  } catch (thrown) {
    if (toOffshootError(thrown).kind === 'internal') throw thrown;
  }
}

function smallerLimit(one: number | null, other: number | null): number | null {
  if (one === null || other === null) return one ?? other;
  return Math.min(one, other);
}

/** A file that stays is a leak: it takes space, nothing refers to it, and a check finds it. */
function unlinkOrLeak(files: LayerFiles, layerId: number): void {
  try {
    files.unlink(layerId);
  } catch (thrown) {
    if (toOffshootError(thrown).kind === 'internal') throw thrown;
  }
}
