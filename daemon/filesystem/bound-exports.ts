/**
 * What is presented keeps its name and its place: servers and clients know it by its path, and would be left with a stale one. Whoever is about to
 * take a name away asks here first. Main thread.
 *
 * Through the mount, and through an export that it lies in, the answer is EBUSY. What lies in a presented directory is its users' to change.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';

/** Throws when the node itself is presented. */
export function assertNotExported(meta: MetaStore, node: NodeRow): void {
  const [row] = meta.exports.ofNode(node.id);
  if (row !== undefined) throw exportedError(meta, node.id, row.kind);
}

/** Throws when something in the node is presented, or the node is. */
export function assertNothingExportedIn(meta: MetaStore, top: NodeRow): void {
  if (top.kind !== 'directory') {
    assertNotExported(meta, top);
    return;
  }
  for (const { nodeId, kind } of meta.exports.all()) {
    for (let at: number | null | undefined = nodeId; at !== null && at !== undefined && at !== ROOT_ID; at = meta.nodes.byId(at)?.parentId) {
      if (at === top.id) throw exportedError(meta, nodeId, kind);
    }
  }
}

function exportedError(meta: MetaStore, nodeId: number, kind: string): OffshootError {
  const path = meta.nodes.pathOf(nodeId);
  return new OffshootError('in-use', `${path} is presented as ${kind}: withdraw it first (offshoot withdraw ${path} --as ${kind})`, { path });
}
