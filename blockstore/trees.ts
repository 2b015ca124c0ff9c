/**
 * Trees of nodes: listed in an order in which they can be made again, and made again elsewhere as clones: rows, no data. Main thread.
 *
 * What a snapshot and a clone of a container have in common. A copy has the same names, modes, owners and times of change as what it was
 * copied from; its disks and files stand on what theirs stand on.
 */
import { OffshootError } from './errors.js';
import type { Foundation } from './clone.js';
import type { MetaStore } from './meta/meta-store.js';
import { ROOT_ID, type NodeRow } from './meta/rows.js';

/** The directory at the top of a container that holds its snapshots. */
export const SNAPSHOTS_NAME = '.snapshots';
/** Beside it, for a moment, clones that hold a disk still while somebody opens it. They are no part of the container. */
export const INSTANT_PREFIX = '.offshoot-instant-';

/** A node, and what a copy of it stands on; null for what has no data. */
export interface TreeNode {
  readonly node: NodeRow;
  readonly foundation: Foundation | null;
}

export interface TreeTarget {
  readonly parentId: number;
  readonly name: string;
}

export interface TreeOptions {
  /** The copies are part of a snapshot. */
  readonly frozen: boolean;
  readonly copyOnRead: boolean;
  readonly timeUs: number;
}

/** The node and all below it, each directory before what is in it. The snapshots of a container, and instants, are not part of it. */
export function listTree(meta: MetaStore, root: NodeRow): NodeRow[] {
  const found = [root];
  // Grows while it is walked.
  for (const directory of found) {
    if (directory.kind !== 'directory') continue;
    for (const child of meta.nodes.children(directory.id, 0, Number.MAX_SAFE_INTEGER)) {
      if (directory.parentId === ROOT_ID && (child.name === SNAPSHOTS_NAME || child.name.startsWith(INSTANT_PREFIX))) continue;
      found.push(child);
    }
  }
  return found;
}

/** What lies below a directory by its path from there, each directory before what is in it. The snapshots of a container are not part of it. */
export function treeBelow(meta: MetaStore, root: NodeRow): Map<string, NodeRow> {
  const tree = byPath(listTree(meta, root), (node) => node, root);
  tree.delete('');
  return tree;
}

/** What `listTree` gave, or something for each of it, by path; the root at the empty path. */
export function byPath<T>(nodes: readonly T[], nodeOf: (each: T) => NodeRow, root: NodeRow): Map<string, T> {
  const paths = new Map<number, string>();
  const found = new Map<string, T>();
  for (const each of nodes) {
    const node = nodeOf(each);
    const above = node.id === root.id ? undefined : paths.get(node.parentId ?? 0);
    const path = node.id === root.id ? '' : above === undefined || above === '' ? node.name : `${above}/${node.name}`;
    paths.set(node.id, path);
    found.set(path, each);
  }
  return found;
}

/** What copies of these nodes stand on: they are frozen, so that their own layers hold nothing. */
export function frozenTree(meta: MetaStore, nodes: readonly NodeRow[]): TreeNode[] {
  return nodes.map((node) => {
    if (node.layerId === null) return { node, foundation: null };
    const layer = meta.layers.byId(node.layerId);
    if (layer?.backingId === null || layer === undefined) {
      throw new OffshootError('store-damaged', `the layer of ${meta.nodes.pathOf(node.id)} is not that of a snapshot: offshoot check says more`, { nodeId: node.id });
    }
    return { node, foundation: { backingId: layer.backingId, backingLimitBytes: layer.backingLimitBytes } };
  });
}

/** Copies a tree, its root first, to `target`; the new root is the first of the result. Inside a transaction. */
export function insertTree(meta: MetaStore, nodes: readonly TreeNode[], target: TreeTarget, options: TreeOptions): NodeRow[] {
  const copies = new Map<number, number>();
  return nodes.map(({ node, foundation }, i) => {
    const parentId = i === 0 ? target.parentId : copies.get(node.parentId ?? 0);
    if (parentId === undefined) throw new Error(`node ${node.id} comes before the directory that it lies in`);
    const copy = insertCopy(meta, node, foundation, { parentId, name: i === 0 ? target.name : node.name }, options);
    copies.set(node.id, copy.id);
    return copy;
  });
}

/** One node of it. */
export function insertCopy(meta: MetaStore, node: NodeRow, foundation: Foundation | null, target: TreeTarget, options: TreeOptions): NodeRow {
  const layerId = foundation === null ? null : insertLayerOver(meta, foundation, node.sizeBytes, options.timeUs);
  const copy = meta.nodes.insert({
    parentId: target.parentId, name: target.name, kind: node.kind, mode: node.mode, uid: node.uid, gid: node.gid, sizeBytes: node.sizeBytes,
    atimeUs: node.atimeUs, mtimeUs: node.mtimeUs, ctimeUs: options.timeUs, layerId, linkTarget: node.linkTarget,
    copyOnRead: options.copyOnRead && layerId !== null, fault: null, frozen: options.frozen,
  });
  if (node.frozen && !options.frozen && layerId !== null) meta.snapshots.noteSource(copy.id, node.id);
  return copy;
}

/** An empty layer. */
export function insertLayerOver(meta: MetaStore, foundation: Foundation, sizeBytes: number, timeUs: number): number {
  return meta.layers.insert({
    kind: 'store', externalPath: null, externalIdentity: null, backingId: foundation.backingId, backingLimitBytes: foundation.backingLimitBytes, sizeBytes,
    sealed: false, complete: false, createdUs: timeUs,
  }).id;
}
