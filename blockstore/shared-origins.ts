/**
 * Which origins the shared extents of a chain need: one for each layer, delta and limit. Main thread, when a disk is opened.
 *
 * Extents of one copy have one delta, so that a disk needs few of them, however its extents lie. What may be seen of a
 * layer's extents is what may be seen of the layer itself in this chain.
 */
import { OffshootError } from './errors.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow } from './meta/rows.js';
import { BLOCK_BYTES } from './units.js';

export interface SharedOrigin {
  readonly layer: LayerRow;
  readonly deltaBytes: number;
  /** As an offset on the disk. */
  readonly limitBytes: number;
}

/** Blocks that read from `origins[share]`; below zero: that read as zeros. */
export interface SharedRun {
  readonly block: number;
  readonly count: number;
  readonly share: number;
}

export interface Shares {
  readonly origins: readonly SharedOrigin[];
  /** By the place of the layer in the chain, the active one first. */
  readonly ofLayer: readonly (readonly SharedRun[])[];
}

/** `limits`: how far on the disk each layer of the chain may be seen. */
export function sharesOf(meta: MetaStore, chain: readonly LayerRow[], limits: readonly number[]): Shares {
  const origins: SharedOrigin[] = [];
  const known = new Map<string, number>();
  const layers = new Map<number, LayerRow>();
  const ofLayer = chain.map((layer, i) => (layer.complete ? [] : meta.sharedExtents.of(layer.id)).map((extent): SharedRun => {
    const { block, count } = extent;
    if (extent.sourceLayerId === null) return { block, count, share: -1 };
    const source = layers.get(extent.sourceLayerId) ?? meta.layers.byId(extent.sourceLayerId);
    if (source === undefined) throw new OffshootError('store-damaged', `layer ${extent.sourceLayerId} is missing, with which layer ${layer.id} shares extents: restore the store's database from a backup`, { layerId: layer.id });
    layers.set(source.id, source);
    const deltaBytes = (extent.sourceBlock - block) * BLOCK_BYTES;
    const ends = [limits[i] ?? 0, source.sizeBytes - deltaBytes, ...(extent.limitBytes === null ? [] : [block * BLOCK_BYTES + extent.limitBytes])];
    const limitBytes = Math.max(0, Math.min(...ends));
    const key = `${source.id} ${deltaBytes} ${limitBytes}`;
    const share = known.get(key) ?? origins.push({ layer: source, deltaBytes, limitBytes }) - 1;
    known.set(key, share);
    return { block, count, share };
  }));
  return { origins, ofLayer };
}

/** The layers that a disk reads from: its chain, and those that the chain shares extents with, each once. */
export function layersBelow(meta: MetaStore, layerId: number): LayerRow[] {
  const layers = new Map<number, LayerRow>();
  const chain = meta.layers.chain(layerId);
  for (const layer of chain) layers.set(layer.id, layer);
  for (const layer of chain) {
    if (layer.complete) continue;
    for (const id of meta.sharedExtents.sources(layer.id)) {
      const source = layers.get(id) ?? meta.layers.byId(id);
      if (source !== undefined) layers.set(id, source);
    }
  }
  return [...layers.values()];
}
