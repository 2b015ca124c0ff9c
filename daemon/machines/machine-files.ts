/**
 * New content for many small files of the store at once: layers are made ready, their files written and synced side by side, then one transaction
 * puts them in the place of the old ones. Main thread; waiting is done in the thread pool.
 *
 *   1. rows of layers that nobody refers to           (crash: rows that the next start takes away)
 *   2. their files, written and synced                (crash: files that nobody refers to)
 *   3. one transaction: each node has its new layer   (crash: all or none)
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { Store } from '../../blockstore/store.js';

export interface NewContent {
  readonly nodeId: number;
  readonly content: Uint8Array;
}

/** `also` runs in the transaction of step 3. The nodes that have another content afterwards. */
export async function replaceContents(store: Store, wanted: readonly NewContent[], also: () => void = () => undefined): Promise<void> {
  const { meta, files } = store;
  const nowUs = Date.now() * 1000;
  const layers = meta.transaction(() => wanted.map(({ content }) => meta.layers.insert({
    kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: content.length, sealed: false, complete: true, createdUs: nowUs,
  })));
  for (const { id } of layers) meta.layers.prepared.add(id);
  try {
    await files.createAll(layers.map((layer, i) => ({ layerId: layer.id, sizeBytes: layer.sizeBytes, content: wanted[i]?.content ?? new Uint8Array() })));
    store.settleSeals();
    const old: number[] = [];
    for (const { nodeId } of wanted) store.disks.retireIdle(nodeId);
    for (const { id } of layers) meta.layers.prepared.delete(id);
    meta.transaction(() => {
      wanted.forEach(({ nodeId, content }, i) => {
        const node = meta.nodes.byId(nodeId);
        if (node?.layerId === undefined || node.layerId === null) throw new OffshootError('not-found', 'a configuration was removed while it was written: try again', { nodeId });
        if (store.disks.isUsed(nodeId)) throw new OffshootError('in-use', `${meta.nodes.pathOf(nodeId)} is open: close it, so that it can be written`, { nodeId });
        old.push(node.layerId);
        meta.nodes.update(nodeId, { layerId: layers[i]?.id ?? null, sizeBytes: content.length, mtimeUs: nowUs, ctimeUs: nowUs });
      });
      also();
      store.reclaim(old);
    });
  } catch (thrown) {
    for (const { id } of layers) meta.layers.prepared.delete(id);
    store.reclaim(layers.map(({ id }) => id));
    throw thrown;
  }
}
