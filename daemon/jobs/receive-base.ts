/**
 * Whether the target of an incremental receive still is what its base snapshot says: the same names, attributes and content. What somebody
 * changed since would be lost, so it is refused and not merged. Main thread.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { NodeRow, SnapshotRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { treeBelow } from '../../blockstore/trees.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';

/** What lies below a directory, by path, parents first. */
export type Tree = Map<string, NodeRow>;

/** The base's tree. Throws when what stands in its place is not the same any more, or is open. */
export function assertStandsOnBase({ store, fileSystem }: { readonly store: Store; readonly fileSystem: StoreFileSystem }, base: SnapshotRow): Tree {
  const { meta } = store;
  const containerName = meta.nodes.pathOf(base.containerId);
  const frozen = treeBelow(meta, requireNode(meta, base.directoryId));
  const whole = treeBelow(meta, requireNode(meta, base.containerId));
  const live: Tree = base.path === null ? whole : new Map([...whole].filter(([name]) => name === base.path));
  const wanted: Tree = base.path === null ? frozen : new Map([...frozen].filter(([name]) => name === base.path));
  const refuse = (name: string, how: string): never => {
    const reference = base.path === null ? `${containerName}@${base.name}` : `${containerName}/${base.path}@${base.name}`;
    throw new OffshootError('not-permitted',
      `${containerName}/${name} ${how} since ${reference}, and what the stream holds goes on from there: offshoot snapshot revert ${reference} --yes gives up the changes, or receive everything under another name`,
      { path: `${containerName}/${name}` });
  };
  for (const [name, found] of live) {
    if (fileSystem.openCount(found.id) > 0 || store.disks.isUsed(found.id)) {
      throw new OffshootError('in-use', `${containerName}/${name} is open: stop what uses it before you receive into it`, { path: `${containerName}/${name}` });
    }
    // What it has not committed yet is committed now, and its row says so.
    store.disks.retireIdle(found.id);
    const row = meta.nodes.byId(found.id) ?? found;
    const was = wanted.get(name);
    if (was === undefined) return refuse(name, 'was made');
    if (was.kind !== row.kind || was.linkTarget !== row.linkTarget) refuse(name, 'was replaced');
    if (row.kind !== 'directory' && was.sizeBytes !== row.sizeBytes) refuse(name, 'was made larger or smaller');
    if (row.layerId === null || was.layerId === null) continue;
    if (!standsOnTheSame(store, row.layerId, was.layerId)) refuse(name, 'was written to');
  }
  for (const name of wanted.keys()) if (!live.has(name)) refuse(name, 'was removed');
  return wanted;
}

function requireNode(meta: MetaStore, id: number): NodeRow {
  const node = meta.nodes.byId(id);
  if (node === undefined) throw new Error(`node ${id} belongs to a snapshot, and is gone`);
  return node;
}

/** The disk owns nothing, and reads what the frozen node reads. */
function standsOnTheSame({ meta }: Store, layerId: number, frozenLayerId: number): boolean {
  const layer = meta.layers.byId(layerId);
  const frozen = meta.layers.byId(frozenLayerId);
  return layer !== undefined && frozen !== undefined && !layer.complete && layer.backingId !== null && meta.ownership.ownedBlocks(layer.id) === 0
    && layer.backingId === frozen.backingId && layer.backingLimitBytes === frozen.backingLimitBytes;
}
