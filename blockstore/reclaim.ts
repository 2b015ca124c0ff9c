/**
 * Reclaim: deletes the layers that nothing refers to, and their files.
 *
 * The metadata goes first, in one transaction, and the files after it: a crash in between leaves files that no layer
 * refers to: space lost, and nothing else. A complete layer does not consult its backing any more, so
 * it gives up its reference when the backing would otherwise be kept for it alone. A layer that others share extents with is
 * needed for as long as one of them does. Main thread.
 */
import { toOffshootError } from './errors.js';
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import { PAGE_BLOCKS } from './units.js';

export interface ReclaimParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
}

/**
 * Layers deleted. Deleting one may leave the one below it without a reference, so this goes down until one is needed. `from` names the
 * layers that may have lost a reference, so that the cost does not grow with the store; without it all are looked at.
 */
export function reclaimLayers(parts: ReclaimParts, from?: readonly number[]): number {
  const { meta, files } = parts;
  const gone: { readonly id: number; readonly stored: boolean }[] = [];
  meta.transaction(() => {
    const candidates = [...(from ?? meta.layers.unreferenced().map((layer) => layer.id))];
    for (let id = candidates.pop(); id !== undefined; id = candidates.pop()) {
      const layer = meta.layers.ifUnreferenced(id);
      if (layer === undefined) continue;
      // Its shared extents go with it, and with them a reference to each of these.
      candidates.push(...meta.sharedExtents.sources(id));
      meta.layers.remove(id);
      gone.push({ id, stored: layer.kind === 'store' });
      if (layer.backingId !== null) candidates.push(layer.backingId);
    }
  });
  meta.afterCommit(() => {
    for (const { id, stored } of gone) {
      if (stored) unlinkOrLeak(files, id);
      else files.forgetIdle(id);
    }
  });
  return gone.length;
}

/** The removal is committed and cannot fail any more. A file that stays is a leak: it takes space, nothing refers to it, and a check finds it. */
function unlinkOrLeak(files: LayerFiles, layerId: number): void {
  try {
    files.unlink(layerId);
  } catch (thrown) {
    if (toOffshootError(thrown).kind === 'internal') throw thrown;
  }
}

/**
 * Takes away the ends of an active layer's shared extents that it owns by now. Those that are owned in the middle stay, since cutting them
 * would make many rows of few. The layers that may have lost a reference.
 */
export function trimShared(meta: MetaStore, layerId: number): number[] {
  const extents = meta.sharedExtents.of(layerId);
  if (extents.length === 0) return [];
  const before = meta.sharedExtents.sources(layerId);
  const pages = new Map<number, Uint8Array | null>();
  for (const { block, count } of extents) {
    const firstPage = Math.floor(block / PAGE_BLOCKS);
    const endPage = Math.ceil((block + count) / PAGE_BLOCKS);
    meta.ownership.forEachBetween(layerId, firstPage, endPage, (page, pageCount, bitmap) => {
      for (let each = Math.max(page, firstPage); each < Math.min(page + pageCount, endPage); each += 1) pages.set(each, bitmap);
    });
  }
  if (pages.size === 0) return [];
  meta.sharedExtents.trim(layerId, (block) => {
    const bitmap = pages.get(Math.floor(block / PAGE_BLOCKS));
    if (bitmap === undefined || bitmap === null) return bitmap === null;
    const bit = block % PAGE_BLOCKS;
    return Math.floor((bitmap[Math.floor(bit / 8)] ?? 0) / 2 ** (bit % 8)) % 2 === 1;
  });
  const after = new Set(meta.sharedExtents.sources(layerId));
  return before.filter((id) => !after.has(id));
}
