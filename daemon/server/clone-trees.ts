/**
 * Clones of containers and directories: every disk, file, directory and symbolic link in them, any number of times, in one transaction. Main thread.
 *
 * Of what is in a snapshot that is rows only. Of what is in use all that is in it is sealed first, at one instant, as for a snapshot.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { frozenTree, insertTree, listTree, type TreeNode } from '../../blockstore/trees.js';
import { RESERVED_NAMES, shown } from '../filesystem/names.js';
import type { Namespace } from '../filesystem/namespace.js';
import type { Resolved } from '../filesystem/references.js';

export interface TreeCloneOptions {
  readonly copyOnRead: boolean;
  /** Called inside the transaction that makes the clones. */
  readonly record: () => void;
  /** Names that the clones do not have: no directories. */
  readonly leaveOut?: (node: NodeRow) => boolean;
  /** Whom the clones belong to; whom their source belongs to when left out. */
  readonly owner?: { readonly uid: number; readonly gid: number } | null;
  /** Called inside the transaction, behind the clones. */
  readonly made?: (trees: readonly (readonly NodeRow[])[]) => void;
}

export interface TreeCloneParts {
  readonly store: Store;
  readonly namespace: Namespace;
}

/** The new nodes of each target, its root first. */
export async function cloneTree(parts: TreeCloneParts, source: Resolved, targets: readonly string[], options: TreeCloneOptions): Promise<NodeRow[][]> {
  const { store } = parts;
  const { meta } = store;
  if (source.node.id === ROOT_ID) throw new OffshootError('not-permitted', 'the root of the store cannot be cloned');
  if (source.node.frozen && source.snapshot === null) throw new OffshootError('invalid-argument', `${shown(source.path)} holds snapshots: clone one of them (CONTAINER@NAME)`, { path: source.path });
  // Before anything is sealed for it.
  store.quotas.assertRoom(targets.map((target) => resolveTarget(parts, source.node, target).parentId));
  const insert = (nodes: readonly TreeNode[], timeUs: number): NodeRow[][] => {
    options.record();
    const wanted = nodes.filter(({ node }) => options.leaveOut?.(node) !== true).map((each) => ({ ...each, node: { ...each.node, ...options.owner } }));
    const trees = targets.map((target) => makeOne(wanted, timeUs, target));
    options.made?.(trees);
    return trees;
  };
  const makeOne = (nodes: readonly TreeNode[], timeUs: number, target: string): NodeRow[] => {
    const { parentId, name } = resolveTarget(parts, source.node, target);
    const made = insertTree(meta, nodes, { parentId, name }, { frozen: false, copyOnRead: options.copyOnRead, timeUs });
    meta.nodes.update(parentId, { mtimeUs: timeUs, ctimeUs: timeUs });
    return made;
  };
  const assertSources = (nodes: readonly NodeRow[]): void => { for (const node of nodes) if (node.layerId !== null) store.assertSourcesUsable(node.id); };
  if (source.snapshot !== null) {
    const nodes = listTree(meta, source.node);
    assertSources(nodes);
    return meta.transaction(() => insert(frozenTree(meta, nodes), Date.now() * 1000));
  }
  assertSources(listTree(meta, source.node));
  const { value } = await store.groupSeals.seal({
    list: () => {
      const root = meta.nodes.byId(source.node.id);
      if (root === undefined || root.parentId === null) throw new OffshootError('not-found', `${shown(source.path)} does not exist any more`, { path: source.path });
      return listTree(meta, root);
    },
    commit: insert,
  });
  return value;
}

/** Where a copy goes: a name that is free. At the top it becomes a container, which may not hold names that are kept back there. */
function resolveTarget({ store, namespace }: TreeCloneParts, source: NodeRow, target: string): { readonly parentId: number; readonly name: string } {
  const { parent, name } = namespace.resolveNew(target);
  if (parent.id === ROOT_ID && source.parentId !== ROOT_ID) {
    const reserved = RESERVED_NAMES.find((each) => store.meta.nodes.child(source.id, each) !== undefined);
    if (reserved !== undefined) throw new OffshootError('invalid-name', `what is cloned holds ${shown(reserved)}, which is kept back for Offshoot at the top of a container: rename that first`);
  }
  return { parentId: parent.id, name };
}
