/**
 * Whether a user may clone a machine: by owner, group and mode, as the kernel would decide if the user copied the files. Pure.
 *
 * Root may everything. Others must be able to read every file, to read and enter every directory on the way, and to make names where the
 * clones go. Access control lists are not looked at: the store has none.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';

export interface User {
  readonly uid: number;
  /** The primary group. */
  readonly gid: number;
  readonly groups: readonly number[];
}

const READ = 4;
const WRITE = 2;
const ENTER = 1;

export function may(user: User, node: Pick<NodeRow, 'uid' | 'gid' | 'mode'>, wanted: number): boolean {
  if (user.uid === 0) return true;
  // The first class that fits decides, also where a later one allows more.
  const shift = node.uid === user.uid ? 6 : node.gid === user.gid || user.groups.includes(node.gid) ? 3 : 0;
  return ((node.mode >> shift) & wanted) === wanted;
}

/** `nodes`: the source, its root first. Throws `permission-denied` with the first that the user may not read. */
export function assertMayRead(meta: MetaStore, user: User, nodes: readonly NodeRow[]): void {
  const [root] = nodes;
  if (root !== undefined) assertMayReach(meta, user, root);
  for (const node of nodes) {
    if (node.kind === 'symlink') continue;
    if (!may(user, node, node.kind === 'directory' ? READ | ENTER : READ)) throw denied(meta, user, node, 'read');
  }
}

/** Every directory on the way to the node can be entered. */
function assertMayReach(meta: MetaStore, user: User, node: NodeRow): void {
  for (let at = meta.nodes.byId(node.parentId ?? 0); at !== undefined && at.id !== ROOT_ID; at = meta.nodes.byId(at.parentId ?? 0)) {
    if (!may(user, at, ENTER)) throw denied(meta, user, at, 'enter');
  }
}

/** The user may make names in the directory. */
export function assertMayAdd(meta: MetaStore, user: User, directoryId: number): void {
  const node = meta.nodes.byId(directoryId);
  if (node !== undefined) assertMayReach(meta, user, node);
  if (node === undefined || may(user, node, WRITE | ENTER)) return;
  throw denied(meta, user, node, 'add names to');
}

function denied(meta: MetaStore, user: User, node: NodeRow, what: string): OffshootError {
  const path = meta.nodes.pathOf(node.id);
  return new OffshootError('permission-denied',
    `user ${user.uid} may not ${what} ${path === '' ? 'the top of the store' : path} (owner ${node.uid}:${node.gid}, mode ${node.mode.toString(8).padStart(4, '0')}): change its mode or owner, or ask somebody who may`, { path, uid: user.uid });
}
