/**
 * Promote: a clone and what it was cloned from change places, and no data moves. Main thread.
 *
 * Nobody owns a sealed layer, but each says which node wrote it, and that node cannot be removed without `--keep-data` while others stand on it. Promote
 * writes the clone's name on the layers that it shares with the disk that it was cloned from: from then on that disk, and whoever else stands on those layers, counts as
 * the clone's clone. What that disk in turn was cloned from stays as it was. One transaction of rows.
 */
import { OffshootError } from './errors.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow, NodeRow } from './meta/rows.js';

export interface Promoted {
  /** The disk that the clone was cloned from. */
  readonly origin: NodeRow;
  readonly layers: number;
}

/** The node that the one with this chain was cloned from: it wrote the first sealed layer that is not the clone's own. Undefined: there is none, or it is gone. */
export function originOf(meta: MetaStore, nodeId: number, chain: readonly LayerRow[]): NodeRow | undefined {
  const layer = chain.find(({ sealed, writtenBy }) => sealed && writtenBy !== null && writtenBy !== nodeId);
  return layer === undefined || layer.writtenBy === null ? undefined : meta.nodes.byId(layer.writtenBy);
}

export function promoteNode(meta: MetaStore, nodeId: number): Promoted {
  return meta.transaction(() => {
    const layerId = meta.nodes.byId(nodeId)?.layerId ?? null;
    if (layerId === null) throw new OffshootError('is-a-directory', 'only a disk or a file that is a clone can be promoted', { nodeId });
    const chain = meta.layers.chain(layerId);
    const origin = originOf(meta, nodeId, chain);
    if (origin === undefined) {
      throw new OffshootError('invalid-argument', chain.length === 1
        ? 'it reads from no other disk, so there is nothing to promote: it can stay when any other disk is removed'
        : 'the disk that it was cloned from is gone already, so there is nothing to promote', { nodeId });
    }
    const shared = chain.filter((layer) => layer.sealed && layer.writtenBy === origin.id);
    for (const layer of shared) meta.links.setWriter(layer.id, nodeId);
    return { origin, layers: shared.length };
  });
}
