/**
 * What is part of a snapshot never changes: whoever is about to change a node asks here first. Main thread.
 *
 * Through the mount the answer is EROFS, in the control API `not-permitted`, with the snapshot's name.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { SNAPSHOTS_NAME } from '../../blockstore/trees.js';

/** Throws when the node is part of a snapshot. */
export function assertThawed(meta: MetaStore, node: NodeRow): void {
  if (!node.frozen) return;
  throw frozenError(meta, node);
}

function frozenError(meta: MetaStore, node: NodeRow): OffshootError {
  const path = meta.nodes.pathOf(node.id);
  const [container = '', , name] = path.split('/');
  const what = name === undefined ? `${path} holds the snapshots of ${container}` : `${path} is part of the snapshot ${container}@${name}`;
  return new OffshootError('not-permitted', `${what}, and never changes: clone it, or remove the snapshot (offshoot snapshot rm${name === undefined ? '' : ` ${container}@${name}`})`,
    { nodeId: node.id, readOnly: true });
}

/** The directory with a container's snapshots; undefined when it has none. */
export function snapshotsDirectory(meta: MetaStore, containerId: number): NodeRow | undefined {
  const node = meta.nodes.child(containerId, SNAPSHOTS_NAME);
  return node?.frozen === true ? node : undefined;
}
