/**
 * Going back to a snapshot: the container, or the one disk, is what it was, in one transaction. Main thread.
 *
 * What is there under the same name and of the same kind stays the same node, with other content and attributes; what came since goes; what went comes back.
 * The snapshot itself, and others, older or newer, stay as they are. Nothing of it may be open: a guest would find another disk under its feet.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { listedNames } from '../../blockstore/listed-names.js';
import { ROOT_ID, type NodeRow, type SnapshotRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { byPath, frozenTree, insertCopy, insertLayerOver, listTree, type TreeNode } from '../../blockstore/trees.js';
import { assertNotExported } from '../filesystem/bound-exports.js';
import { assertNoBoundMachine } from '../filesystem/bound-machines.js';
import { assertContainerFileStays, assertNoBoundVdisk, assertNothingDeployedFrom } from '../filesystem/bound-vdisks.js';
import { hasData } from '../filesystem/node-attributes.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';

export interface RevertParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly beforeDiscard: (nodeId: number) => void;
}

export interface RevertResult {
  readonly reverted: number;
  readonly removed: number;
  readonly restored: number;
  /** Nodes that the kernel may know something old of. */
  readonly touched: readonly number[];
}

export function revertTree(parts: RevertParts, snapshot: SnapshotRow): RevertResult {
  const { store } = parts;
  const { meta } = store;
  const container = meta.nodes.byId(snapshot.containerId);
  const root = meta.nodes.byId(snapshot.directoryId);
  if (container?.parentId !== ROOT_ID || root === undefined) throw new Error(`snapshot ${snapshot.id} has lost its container or its directory`);
  const frozen = byPath(frozenTree(meta, listTree(meta, root)), ({ node }) => node, root);
  const present = byPath(listTree(meta, container), (node) => node, container);
  const wanted = snapshot.path === null ? frozen : onlyOn(frozen, snapshot.path);
  const going = snapshot.path === null ? present : onlyOn(present, snapshot.path);
  const concerned = [...going.values()].filter((node) => node.layerId !== null);
  // Also of what keeps its name: between two steps of a staging nobody has the file open.
  for (const node of concerned) assertNoBoundVdisk(meta, node);
  assertIdle(parts, concerned);
  for (const node of concerned) store.disks.retireIdle(node.id);
  for (const [path, node] of going) {
    const before = wanted.get(path)?.node;
    if (before !== undefined) assertContainerFileStays(meta, node, before);
    else if (snapshot.path === null) assertNothingDeployedFrom(meta, [node], null);
  }
  return meta.transaction(() => {
    const change = new Change(parts, snapshot, container.id);
    // From the end: what is in a directory goes before it.
    for (const [path, node] of [...going].toReversed()) {
      const before = wanted.get(path);
      if (before === undefined ? snapshot.path === null : before.node.kind !== node.kind || before.node.linkTarget !== node.linkTarget) change.remove(node);
    }
    for (const [path, { node, foundation }] of wanted) change.bringBack(path, { node, foundation }, going.get(path));
    return change.end();
  });
}

class Change {
  readonly #parts: RevertParts;
  readonly #snapshot: SnapshotRow;
  readonly #ids: Map<string, number>;
  readonly #gone = new Set<number>();
  readonly #layers: number[] = [];
  readonly #touched: number[] = [];
  readonly #nowUs = Date.now() * 1000;
  #reverted = 0;
  #restored = 0;

  constructor(parts: RevertParts, snapshot: SnapshotRow, containerId: number) {
    this.#parts = parts;
    this.#snapshot = snapshot;
    this.#ids = new Map([['', containerId]]);
  }

  remove(node: NodeRow): void {
    const { store, beforeDiscard } = this.#parts;
    assertNoBoundMachine(store.meta, node);
    assertNotExported(store.meta, node);
    assertNoBoundVdisk(store.meta, node);
    beforeDiscard(node.id);
    store.meta.nodes.remove(node.id);
    this.#gone.add(node.id);
    this.#touched.push(node.id);
    if (node.layerId !== null) this.#layers.push(node.layerId);
  }

  bringBack(path: string, before: TreeNode, present: NodeRow | undefined): void {
    const { meta } = this.#parts.store;
    const { node, foundation } = before;
    const isAbove = this.#snapshot.path !== null && node.kind === 'directory';
    if (present !== undefined && !this.#gone.has(present.id)) {
      this.#ids.set(path, present.id);
      // The directories above the one disk are no part of what is gone back to.
      if (isAbove) return;
      const layerId = foundation === null ? null : insertLayerOver(meta, foundation, node.sizeBytes, this.#nowUs);
      meta.nodes.update(present.id, {
        mode: node.mode, uid: node.uid, gid: node.gid, sizeBytes: node.sizeBytes, atimeUs: node.atimeUs, mtimeUs: node.mtimeUs, ctimeUs: this.#nowUs,
        ...(layerId === null ? {} : { layerId }),
      });
      if (present.layerId !== null) this.#layers.push(present.layerId);
      if (layerId !== null) this.#reverted += 1;
      this.#touched.push(present.id);
      return;
    }
    const at = path.lastIndexOf('/');
    const parentId = this.#ids.get(at < 0 ? '' : path.slice(0, at));
    if (parentId === undefined) throw new Error(`${path} comes before its directory`);
    const copy = insertCopy(meta, node, foundation, { parentId, name: path.slice(at + 1) }, { frozen: false, copyOnRead: false, timeUs: this.#nowUs });
    this.#ids.set(path, copy.id);
    this.#restored += 1;
    this.#touched.push(parentId);
    if (this.#snapshot.path !== null) meta.nodes.update(parentId, { mtimeUs: this.#nowUs, ctimeUs: this.#nowUs });
  }

  end(): RevertResult {
    this.#parts.store.reclaim(this.#layers);
    return { reverted: this.#reverted, removed: this.#gone.size, restored: this.#restored, touched: [...new Set(this.#touched)] };
  }
}

/** The node at `path`, and the directories that it lies in. */
function onlyOn<T>(nodes: ReadonlyMap<string, T>, path: string): Map<string, T> {
  return new Map([...nodes].filter(([each]) => each === '' || each === path || path.startsWith(`${each}/`)));
}

function assertIdle({ store, fileSystem }: RevertParts, nodes: readonly NodeRow[]): void {
  const open = nodes.filter((node) => hasData(node) && (fileSystem.openCount(node.id) > 0 || store.disks.isUsed(node.id)));
  if (open.length > 0) {
    const names = listedNames(open, (node) => store.meta.nodes.pathOf(node.id));
    throw new OffshootError('in-use', `${names} ${open.length === 1 ? 'is' : 'are'} in use: stop what uses ${open.length === 1 ? 'it' : 'them'} (a fill, too) before you go back to a snapshot`);
  }
  const faulted = nodes.find((node) => store.disks.faultOf(node) !== null);
  if (faulted === undefined) return;
  throw new OffshootError('faulted', `${store.meta.nodes.pathOf(faulted.id)} is faulted: lift its fault first (offshoot check TARGET --repair), or remove it`, { nodeId: faulted.id });
}
