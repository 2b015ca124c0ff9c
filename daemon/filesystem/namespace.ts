/**
 * Names and attributes: the half of the file system that needs no data file. Main thread only.
 *
 * Promises: every change of names is one transaction, durable when the call returns, and never half done; a name is
 * taken once; directories form a tree; the times of a directory follow every change of the names in it. At the top
 * there are containers, which are directories, and nothing else. What loses its last name while it is open stays, as
 * an orphan, until its last close; what is not open goes after the commit (`NodeData.discard`; a process that dies
 * before it leaves an orphan, which the next one finds in `nodes.orphans()`).
 *
 * A request may be seen twice, when the server that did it died before it could answer. Done again, it fails with
 * `already-exists` or `not-found` and changes nothing, and the transport tells from `lookup` that the wanted state is
 * reached; `exchange` alone would undo itself, so the transport keeps a record of those.
 *
 * Left out: permissions. The mount has default_permissions: the kernel has checked them, and the rules of sticky
 * directories, before it asks.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { NewNode, NodeRow } from '../../blockstore/meta/rows.js';
import { assertNotExported, assertNothingExportedIn } from './bound-exports.js';
import { assertNoBoundMachine, assertNoBoundMachineIn } from './bound-machines.js';
import { assertNoBoundVdisk } from './bound-vdisks.js';
import { assertThawed, snapshotsDirectory } from './frozen.js';
import { assertLinkTarget, assertNameLength, assertNewName, RESERVED_NAMES, shown, type Place } from './names.js';
import { attributesOf, hasData, MODE_MASK, SET_GID, timesOf, updateFor } from './node-attributes.js';
import type { KnownAllocation, NodeData } from './node-data.js';
import { ROOT_NODE_ID, type AttributeChanges, type Attributes, type Caller, type DirectoryEntry, type NodeId, type RenameFlags } from './types.js';

/** What a new node's maker decides; the rest follows from the directory and the clock. */
type NewNodeFields = Pick<NewNode, 'kind' | 'mode' | 'uid' | 'gid'> & Partial<Pick<NewNode, 'sizeBytes' | 'linkTarget' | 'copyOnRead'>>;

/** A disk that a clone or an import puts under a name. */
export type NewDisk = Pick<NewNode, 'mode' | 'uid' | 'gid' | 'sizeBytes' | 'copyOnRead'> & { readonly layerId: number };

export interface NamespaceOptions {
  readonly meta: MetaStore;
  readonly data: NodeData;
  /** Microseconds since the epoch; for tests. */
  readonly nowUs?: () => number;
}

export class Namespace {
  readonly #meta: MetaStore;
  readonly #data: NodeData;
  readonly #nowUs: () => number;

  constructor(options: NamespaceOptions) {
    this.#meta = options.meta;
    this.#data = options.data;
    this.#nowUs = options.nowUs ?? ((): number => Date.now() * 1000);
  }

  lookup(parent: NodeId, name: string): Attributes {
    if (name === '.') return this.getattr(parent);
    if (name === '..') return this.getattr(this.parentOf(parent));
    assertNameLength(name);
    return this.#attributes(this.#child(parent, name));
  }

  getattr(node: NodeId): Attributes {
    return this.#attributes(this.#row(node));
  }

  readdir(node: NodeId, afterCookie: number, max: number): readonly DirectoryEntry[] {
    this.#directory(node);
    // Entries of one directory mostly stand on the same layers, which are asked once.
    const known: KnownAllocation = new Map();
    return this.#meta.nodes
      .children(node, afterCookie, max)
      .map((row) => ({ name: row.name, cookie: row.id, attributes: attributesOf(row, this.#meta.nodes, this.#data, known) }));
  }

  parentOf(node: NodeId): NodeId {
    if (node === ROOT_NODE_ID) return ROOT_NODE_ID;
    const { parentId } = this.#row(node);
    if (parentId === null) throw noSuchNode(node);
    return parentId;
  }

  mkdir(parent: NodeId, name: string, mode: number, caller: Caller): Attributes {
    const row = this.#meta.transaction(() =>
      this.#add(parent, name, { kind: 'directory', mode, uid: caller.uid, gid: caller.gid }, () => null),
    );
    return this.#attributes(row);
  }

  /** A new, empty file. A name that is taken is `already-exists`, whatever has it. */
  create(parent: NodeId, name: string, mode: number, caller: Caller): Attributes {
    const row = this.#meta.transaction(() =>
      this.#add(parent, name, { kind: 'file', mode, uid: caller.uid, gid: caller.gid }, () => this.#data.createEmptyLayer()),
    );
    return this.#attributes(row);
  }

  symlink(parent: NodeId, name: string, target: string, caller: Caller): Attributes {
    assertLinkTarget(target);
    const row = this.#meta.transaction(() =>
      this.#add(
        parent,
        name,
        { kind: 'symlink', mode: 0o777, uid: caller.uid, gid: caller.gid, sizeBytes: Buffer.byteLength(target), linkTarget: target },
        () => null,
      ),
    );
    return this.#attributes(row);
  }

  /** Puts a disk over a layer that exists already under a name; within the caller's transaction, if there is one. */
  addDisk(parent: NodeId, name: string, disk: NewDisk): NodeRow {
    return this.#meta.transaction(() => this.#add(parent, name, { ...disk, kind: 'disk' }, () => disk.layerId));
  }

  readlink(node: NodeId): string {
    const { linkTarget } = this.#row(node);
    if (linkTarget === null) throw new OffshootError('invalid-argument', `node ${node} is not a symlink: read it as what it is`, { nodeId: node });
    return linkTarget;
  }

  unlink(parent: NodeId, name: string): void {
    this.#meta.transaction(() => {
      const row = this.#child(parent, name);
      if (row.kind === 'directory') throw isADirectory(name);
      assertThawed(this.#meta, row);
      assertNotExported(this.#meta, row);
      assertNoBoundVdisk(this.#meta, row);
      const nowUs = this.#nowUs();
      this.#takeName(row, nowUs);
      this.#touchDirectory(parent, nowUs);
    });
  }

  rmdir(parent: NodeId, name: string): void {
    this.#meta.transaction(() => {
      const row = this.#child(parent, name);
      if (row.kind !== 'directory') throw notADirectory(name);
      assertThawed(this.#meta, row);
      this.#assertEmpty(row);
      assertNoBoundMachine(this.#meta, row);
      assertNotExported(this.#meta, row);
      const nowUs = this.#nowUs();
      this.#takeName(row, nowUs);
      this.#touchDirectory(parent, nowUs);
    });
  }

  /**
   * Takes the names of a node and of everything below it, in one transaction. `nodes` are all of these, a directory behind what is in
   * it, none of them open, as they are at this moment. What has data is an orphan from then on, and the caller's to discard: in steps, for they may be many.
   */
  removeAll(top: NodeRow, nodes: readonly NodeRow[]): void {
    this.#meta.transaction(() => {
      const nowUs = this.#nowUs();
      this.#meta.nodes.orphanAll(nodes.filter(hasData).map((row) => row.id), nowUs);
      for (const row of nodes) if (!hasData(row)) this.#meta.nodes.remove(row.id);
      if (top.parentId !== null) this.#touchDirectory(top.parentId, nowUs);
    });
  }

  rename(parent: NodeId, name: string, newParent: NodeId, newName: string, flags: RenameFlags): void {
    if (flags.noReplace && flags.exchange) {
      throw new OffshootError('invalid-argument', 'a rename cannot both exchange two names and refuse to replace one: ask for one of them');
    }
    this.#meta.transaction(() => {
      this.#directory(newParent);
      const moved = this.#child(parent, name);
      assertThawed(this.#meta, moved);
      assertThawed(this.#meta, this.#row(newParent));
      const replaced = this.#meta.nodes.child(newParent, newName);
      if (flags.exchange) this.#exchange(moved, replaced ?? missing(newName));
      else this.#moveOver(moved, replaced, newParent, newName, flags.noReplace);
    });
  }

  /** Everything of a setattr but the size. */
  applyAttributes(node: NodeId, changes: Omit<AttributeChanges, 'sizeBytes'>): Attributes {
    const row = this.#meta.transaction(() => {
      const before = this.#row(node);
      assertThawed(this.#meta, before);
      const update = updateFor(before, timesOf(before, this.#data), changes, this.#nowUs());
      if (update === undefined) return before;
      this.#meta.nodes.update(node, update);
      this.#tellOpenNode(before);
      return { ...before, ...update };
    });
    return this.#attributes(row);
  }

  /** The row at a path as the control API writes it: `CONTAINER` or `CONTAINER/PATH`. Symlinks are not followed. */
  resolve(path: string): NodeRow {
    let row = this.#row(ROOT_NODE_ID);
    for (const name of namesOf(path)) {
      if (row.kind !== 'directory') throw new OffshootError('not-a-directory', `${shown(path)} leads through ${shown(row.name)}, which is not a directory: look at the path again`, { path });
      row = this.#meta.nodes.child(row.id, name) ?? missing(path);
    }
    return row;
  }

  /**
   * Where something new would go: its directory, which exists, and its name, which is valid there and free. Alone at
   * the top only a container can be made.
   */
  resolveNew(path: string): { readonly parent: NodeRow; readonly name: string } {
    const names = namesOf(path);
    const name = names.at(-1) ?? '';
    const parent = names.length === 1 ? this.#row(ROOT_NODE_ID) : this.resolve(names.slice(0, -1).join('/'));
    if (parent.kind !== 'directory') throw notADirectory(parent.name);
    assertThawed(this.#meta, parent);
    assertNewName(name, placeIn(parent));
    if (this.#meta.nodes.child(parent.id, name) !== undefined) throw alreadyExists(path);
    return { parent, name };
  }

  #moveOver(moved: NodeRow, replaced: NodeRow | undefined, newParent: NodeId, newName: string, noReplace: boolean): void {
    if (replaced !== undefined && noReplace) throw alreadyExists(newName);
    if (replaced?.id === moved.id) return;
    const target = this.#directory(newParent);
    this.#assertMayMove(moved, target, newName);
    const nowUs = this.#nowUs();
    if (replaced !== undefined) {
      if (replaced.kind === 'directory' && moved.kind !== 'directory') throw isADirectory(newName);
      if (replaced.kind !== 'directory' && moved.kind === 'directory') throw notADirectory(newName);
      this.#assertEmpty(replaced);
      assertNoBoundMachine(this.#meta, replaced);
      assertNotExported(this.#meta, replaced);
      assertNoBoundVdisk(this.#meta, replaced);
      this.#takeName(replaced, nowUs);
    }
    this.#meta.nodes.move(moved.id, newParent, newName);
    this.#touchNode(moved, nowUs);
    this.#touchDirectory(newParent, nowUs);
    if (moved.parentId !== null && moved.parentId !== newParent) this.#touchDirectory(moved.parentId, nowUs);
  }

  #exchange(one: NodeRow, other: NodeRow): void {
    if (one.id === other.id) return;
    const oneParent = this.#directory(one.parentId ?? ROOT_NODE_ID);
    const otherParent = this.#directory(other.parentId ?? ROOT_NODE_ID);
    this.#assertMayMove(one, otherParent, other.name);
    this.#assertMayMove(other, oneParent, one.name);
    const nowUs = this.#nowUs();
    this.#meta.nodes.orphan(one.id);
    this.#meta.nodes.move(other.id, oneParent.id, one.name);
    this.#meta.nodes.move(one.id, otherParent.id, other.name);
    for (const row of [one, other]) this.#touchNode(row, nowUs);
    for (const parent of new Set([oneParent.id, otherParent.id])) this.#touchDirectory(parent, nowUs);
  }

  /** Whether a node may be called `newName` in `parent`, whatever has that name now. */
  #assertMayMove(row: NodeRow, parent: NodeRow, newName: string): void {
    assertNewName(newName, placeIn(parent));
    if (parent.id === ROOT_NODE_ID) this.#assertMayBeContainer(row, newName);
    else if (row.parentId === ROOT_NODE_ID) this.#assertNoSnapshots(row);
    assertNothingExportedIn(this.#meta, row);
    if (row.kind !== 'directory') return;
    assertNoBoundMachineIn(this.#meta, row);
    for (let id = parent.id; id !== ROOT_NODE_ID; id = this.parentOf(id)) {
      if (id !== row.id) continue;
      throw new OffshootError('invalid-argument', `${shown(row.name)} cannot be moved into itself, nor below itself: choose another place`);
    }
  }

  #assertMayBeContainer(row: NodeRow, name: string): void {
    if (row.kind !== 'directory') throw onlyContainers(name);
    if (row.parentId === ROOT_NODE_ID) return;
    for (const reserved of RESERVED_NAMES) {
      if (this.#meta.nodes.child(row.id, reserved) === undefined) continue;
      throw new OffshootError('invalid-name', `${shown(row.name)} holds ${shown(reserved)}, which is kept back for Offshoot at the top of a container: rename that first`);
    }
  }

  /** Snapshots are those of a container: one that has some stays one. */
  #assertNoSnapshots(row: NodeRow): void {
    if (snapshotsDirectory(this.#meta, row.id) === undefined) return;
    throw new OffshootError('in-use', `the container ${shown(row.name)} has snapshots, so that it cannot be moved into another one: remove them first (offshoot snapshot ls ${row.name})`, { nodeId: row.id });
  }

  /** Inserts a node under a free name. `layerOf` is asked last, when nothing else can be wrong. */
  #add(parent: NodeId, name: string, fields: NewNodeFields, layerOf: () => number | null): NodeRow {
    const directory = this.#directory(parent);
    assertThawed(this.#meta, directory);
    assertNewName(name, placeIn(directory));
    if (this.#meta.nodes.child(parent, name) !== undefined) throw alreadyExists(name);
    if (parent === ROOT_NODE_ID && fields.kind !== 'directory') throw onlyContainers(name);
    const nowUs = this.#nowUs();
    // A set-group-id directory hands its group on, and to directories the bit as well.
    const handsGroupOn = (directory.mode & SET_GID) !== 0;
    const inherited = handsGroupOn && fields.kind === 'directory' ? SET_GID : 0;
    const row = this.#meta.nodes.insert({
      parentId: parent,
      name,
      kind: fields.kind,
      mode: (fields.mode & MODE_MASK) | inherited,
      uid: fields.uid,
      gid: handsGroupOn ? directory.gid : fields.gid,
      sizeBytes: fields.sizeBytes ?? 0,
      atimeUs: nowUs,
      mtimeUs: nowUs,
      ctimeUs: nowUs,
      layerId: layerOf(),
      linkTarget: fields.linkTarget ?? null,
      copyOnRead: fields.copyOnRead ?? false,
      fault: null,
    });
    this.#touchDirectory(parent, nowUs);
    return row;
  }

  /** Takes a node's name away, which is its only one. */
  #takeName(row: NodeRow, nowUs: number): void {
    if (!hasData(row)) {
      this.#meta.nodes.remove(row.id);
      return;
    }
    this.#meta.nodes.orphan(row.id);
    this.#touchNode(row, nowUs);
    this.#meta.afterCommit(() => {
      if (!this.#data.isOpen(row.id)) this.#data.discard(row.id);
    });
  }

  #touchDirectory(id: NodeId, nowUs: number): void {
    this.#meta.nodes.update(id, { mtimeUs: nowUs, ctimeUs: nowUs });
  }

  #touchNode(row: NodeRow, nowUs: number): void {
    this.#meta.nodes.update(row.id, { ...timesOf(row, this.#data), ctimeUs: nowUs });
    this.#tellOpenNode(row);
  }

  #tellOpenNode(row: NodeRow): void {
    if (!hasData(row)) return;
    // Also when nobody has it open: its live state is kept for a while, and would win over the row.
    this.#meta.afterCommit(() => { this.#data.attributesChanged(row.id); });
  }

  #assertEmpty(row: NodeRow): void {
    if (this.#meta.nodes.children(row.id, 0, 1).length === 0) return;
    throw new OffshootError('not-empty', `the directory ${shown(row.name)} is not empty: remove what is in it first`, { nodeId: row.id });
  }

  #row(node: NodeId): NodeRow {
    return this.#meta.nodes.byId(node) ?? missingNode(node);
  }

  #directory(node: NodeId): NodeRow {
    const row = this.#row(node);
    if (row.kind !== 'directory') throw notADirectory(row.name);
    return row;
  }

  #child(parent: NodeId, name: string): NodeRow {
    const row = this.#meta.nodes.child(parent, name);
    if (row !== undefined) return row;
    this.#directory(parent);
    return missing(name);
  }

  #attributes(row: NodeRow): Attributes {
    return attributesOf(row, this.#meta.nodes, this.#data);
  }
}

function placeIn(directory: NodeRow): Place {
  if (directory.id === ROOT_NODE_ID) return 'root';
  return directory.parentId === ROOT_NODE_ID ? 'container' : 'directory';
}

/** The names in a path of the control API. What is no path at all, and cannot be one, is `invalid-name`. */
function namesOf(path: string): readonly string[] {
  const names = path.split('/');
  for (const name of names) {
    if (name === '') throw new OffshootError('invalid-name', `the path ${shown(path)} has an empty name in it: write CONTAINER/PATH, with one "/" between two names`);
    assertNewName(name, 'directory');
  }
  return names;
}

function missing(nameOrPath: string): never {
  throw new OffshootError('not-found', `${shown(nameOrPath)} does not exist: look at the name again`);
}

function missingNode(node: NodeId): never {
  throw noSuchNode(node);
}

function noSuchNode(node: NodeId): OffshootError {
  return new OffshootError('not-found', `node ${node} does not exist any more: look its name up again`, { nodeId: node });
}

function alreadyExists(nameOrPath: string): OffshootError {
  return new OffshootError('already-exists', `${shown(nameOrPath)} exists already: choose another name, or remove it first`);
}

function notADirectory(name: string): OffshootError {
  return new OffshootError('not-a-directory', `${shown(name)} is not a directory: name a directory`);
}

function isADirectory(name: string): OffshootError {
  return new OffshootError('is-a-directory', `${shown(name)} is a directory: remove it as one, or choose another name`);
}

function onlyContainers(name: string): OffshootError {
  return new OffshootError('not-permitted', `${shown(name)} cannot be at the top of the store, where only containers (directories) are: put it into a container`);
}
