/**
 * A receive that has everything becomes visible: layers, names and the snapshot, in one transaction. Main thread.
 *
 *   1. everything that came is synced; the receive is looked at once more: its target, and that the base is there and nobody changed it
 *   2. in a transaction: rows of layers, nodes and the snapshot; the job is completed
 *   3. `finish` in the spool says which file becomes which layer's; the files are renamed, their directories synced
 *   4. commit                          (dies before it: the next server renames them back, and the receive is where it was)
 *   5. the spool is removed            (dies before it: the next server does, for the job has ended)
 *
 * What is received is a sealed layer for each disk and file, complete, or incomplete over what the base stands on; the disk itself and
 * its frozen node in the snapshot are empty layers above it, as if the snapshot had been taken here.
 */
import fs from 'node:fs';
import path from 'node:path';

import { isInDoubt } from '../../blockstore/doubt.js';
import { OffshootError } from '../../blockstore/errors.js';
import { syncDirectory, type LayerFiles } from '../../blockstore/layer-files.js';
import type { BlockRun, LayerRow, NodeRow, SnapshotRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import type { StreamHeader, StreamNode } from '../../blockstore/stream-format.js';
import { SNAPSHOTS_NAME, treeBelow } from '../../blockstore/trees.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import { ROOT_NODE_ID } from '../filesystem/types.js';
import { assertStandsOnBase, type Tree } from './receive-base.js';
import type { Spool } from './receive-spool.js';

export interface ReceiveParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
}

/** Where it goes, as found at this moment. */
export interface Destination {
  /** Null: the container is made. */
  readonly container: NodeRow | null;
  readonly containerName: string;
  /** Of one disk: its path in the container. */
  readonly path: string | null;
  readonly base: SnapshotRow | null;
}

export interface Received {
  readonly path: string;
  readonly snapshot: string;
  /** Whose attributes, or names in them, are other ones now. */
  readonly touched: readonly number[];
}

/** A file of the spool that becomes a layer's. Both are names within the store: it may lie elsewhere when it is next opened. */
interface Rename {
  readonly file: string;
  readonly layerId: number;
}

/** Finds where a stream goes, or throws why it cannot go there. */
export function destinationOf({ store, fileSystem }: ReceiveParts, header: StreamHeader, target: string): Destination {
  const { meta } = store;
  const known = meta.snapshots.byUuid(header.uuid);
  if (known !== undefined) {
    throw new OffshootError('already-exists', `this store has the snapshot ${header.reference} already, as ${meta.nodes.pathOf(known.containerId)}${known.path === null ? '' : `/${known.path}`}@${known.name}: clone that one`);
  }
  const base = header.baseUuid === null ? null : meta.snapshots.byUuid(header.baseUuid);
  if (base === undefined) {
    throw new OffshootError('not-found', `the stream holds only what changed since ${header.baseReference ?? header.baseUuid ?? ''}, and this store does not have that snapshot: send it first, or send without --from`);
  }
  const [containerName = '', ...rest] = target.split('/');
  const named = rest.length === 0 ? null : rest.join('/');
  if (header.kind === 'container' && named !== null) throw new OffshootError('invalid-argument', `the stream holds a whole container, and ${target} is a path in one: name a container`);
  if (base !== null) {
    const container = fileSystem.namespace.resolve(containerName);
    const place = named ?? base.path;
    if (base.containerId !== container.id || (header.kind === 'container') !== (base.path === null) || (header.kind === 'disk' && place !== base.path)) {
      throw new OffshootError('invalid-argument', `the stream goes on from ${header.baseReference ?? ''}, which this store has as ${meta.nodes.pathOf(base.containerId)}${base.path === null ? '' : `/${base.path}`}@${base.name}: receive it there`);
    }
    refuseTakenSnapshot(store, container, header);
    return { container, containerName, path: base.path, base };
  }
  if (header.kind === 'container') {
    fileSystem.namespace.resolveNew(containerName);
    return { container: null, containerName, path: null, base: null };
  }
  const container = fileSystem.namespace.resolve(containerName);
  const place = named ?? header.nodes[0]?.path ?? '';
  fileSystem.namespace.resolveNew(`${containerName}/${place}`);
  refuseTakenSnapshot(store, container, header);
  return { container, containerName, path: place, base: null };
}

function refuseTakenSnapshot(store: Store, container: NodeRow, header: StreamHeader): void {
  if (store.meta.snapshots.byName(container.id, header.name) === undefined) return;
  throw new OffshootError('already-exists', `${container.name} has another snapshot @${header.name}: remove that one, or receive into another container`);
}

/** Makes everything visible, or nothing. */
export function makeVisible(parts: ReceiveParts, spool: Spool, runs: ReadonlyMap<number, readonly BlockRun[]>, target: string, complete: () => void): Received {
  const { meta } = parts.store;
  const destination = destinationOf(parts, spool.header, target);
  const base = destination.base === null ? null : assertStandsOnBase(parts, destination.base);
  const renames: Rename[] = [];
  const created: number[] = [];
  try {
    return meta.transaction(() => {
      // An earlier attempt may have failed so badly that it could not be undone: without its file a disk would be zeros.
      undoHalfFinished(parts.store.files, spool.directory, false);
      const received = new Arrival(parts, spool, runs, destination, base, { renames, created }).run();
      complete();
      rename(parts.store.files, spool, renames);
      return received;
    });
  } catch (thrown) {
    // In doubt the next server sees whether the job is completed, and undoes it if it is not; this one changes nothing any more.
    if (isInDoubt(thrown)) throw thrown;
    renameBack(parts.store.files, spool.directory, renames);
    fs.rmSync(path.join(spool.directory, 'finish'), { force: true });
    for (const layerId of created) parts.store.files.unlink(layerId);
    throw thrown;
  }
}

/** A death, or a failure, between the renames and the commit is undone; before anything else of a server. `isEnded`: it was after the commit. */
export function undoHalfFinished(files: LayerFiles, directory: string, isEnded: boolean): void {
  let renames: Rename[];
  try {
    renames = JSON.parse(fs.readFileSync(path.join(directory, 'finish'), 'utf8')) as Rename[];
  } catch (thrown) {
    // None, or one that was not whole yet when the server died: then nothing was renamed.
    if (thrown instanceof SyntaxError || (thrown as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw thrown;
  }
  if (!isEnded) renameBack(files, directory, renames);
  fs.rmSync(path.join(directory, 'finish'), { force: true });
}

function rename(files: LayerFiles, spool: Spool, renames: readonly Rename[]): void {
  const note = path.join(spool.directory, 'finish');
  const fd = fs.openSync(note, 'w', 0o600);
  try {
    fs.writeFileSync(fd, JSON.stringify(renames));
    fs.fsyncSync(fd);
  } finally {
    fs.closeSync(fd);
  }
  syncDirectory(spool.directory);
  for (const { file, layerId } of renames) fs.renameSync(path.join(spool.directory, file), files.storePath(layerId));
  for (const directory of new Set(renames.map(({ layerId }) => path.dirname(files.storePath(layerId))))) syncDirectory(directory);
}

function renameBack(files: LayerFiles, directory: string, renames: readonly Rename[]): void {
  for (const { file, layerId } of renames) {
    const [from, to] = [path.join(directory, file), files.storePath(layerId)];
    if (!fs.existsSync(from) && fs.existsSync(to)) fs.renameSync(to, from);
  }
  if (renames.length > 0) syncDirectory(directory);
}

/** The rows of one receive. Inside the transaction. */
class Arrival {
  private readonly store: Store;
  private readonly fileSystem: StoreFileSystem;
  private readonly spool: Spool;
  private readonly runs: ReadonlyMap<number, readonly BlockRun[]>;
  private readonly destination: Destination;
  /** The tree of the base's snapshot. */
  private readonly base: Tree | null;
  private readonly renames: Rename[];
  /** Layers whose files were made. */
  private readonly created: number[];
  private readonly nowUs = Date.now() * 1000;
  private readonly touched = new Set<number>();

  constructor(
    { store, fileSystem }: ReceiveParts, spool: Spool, runs: ReadonlyMap<number, readonly BlockRun[]>, destination: Destination, base: Tree | null,
    { renames, created }: { readonly renames: Rename[]; readonly created: number[] },
  ) {
    this.store = store;
    this.fileSystem = fileSystem;
    this.spool = spool;
    this.runs = runs;
    this.destination = destination;
    this.base = base;
    this.renames = renames;
    this.created = created;
  }

  run(): Received {
    const { meta } = this.store;
    const { header } = this.spool;
    const { containerName, path: diskPath } = this.destination;
    const container = this.destination.container ?? this.addNode(ROOT_NODE_ID, containerName, { kind: 'directory', mode: 0o755, uid: 0, gid: 0 });
    const top = meta.nodes.child(container.id, SNAPSHOTS_NAME) ?? this.addNode(container.id, SNAPSHOTS_NAME, { kind: 'directory', mode: 0o755, uid: 0, gid: 0 }, true);
    const frozenTop = this.addNode(top.id, header.name, { kind: 'directory', mode: container.mode & 0o1777, uid: container.uid, gid: container.gid }, true);
    const live: Tree = diskPath === null ? treeBelow(meta, container) : this.liveDisk(container, diskPath);
    const nodes = diskPath === null ? header.nodes : header.nodes.map((node) => ({ ...node, path: diskPath }));
    this.removeGone(live, nodes);
    const liveParents = new Map<string, number>([['', container.id]]);
    const frozenParents = new Map<string, number>([['', frozenTop.id]]);
    if (diskPath !== null) this.addParents(container, diskPath, liveParents, frozenParents);
    nodes.forEach((node, index) => {
      const at = node.path.lastIndexOf('/');
      const [parent, name] = at < 0 ? ['', node.path] : [node.path.slice(0, at), node.path.slice(at + 1)];
      const [liveParent, frozenParent] = [liveParents.get(parent), frozenParents.get(parent)];
      if (liveParent === undefined || frozenParent === undefined) throw new Error('the header was looked at before: parents come first');
      const found = live.get(node.path);
      if (node.kind === 'directory' || node.kind === 'symlink') {
        liveParents.set(node.path, this.keepOrAdd(found, liveParent, name, node));
        frozenParents.set(node.path, this.addNode(frozenParent, name, node, true).id);
        return;
      }
      const foundation = this.foundationOf(node, index);
      const layerId = this.pristine(foundation, node.sizeBytes);
      const liveId = found === undefined ? this.addNode(liveParent, name, { ...node, layerId }).id : this.replace(found, node, layerId, foundation);
      if (foundation.made !== null) meta.layers.update(foundation.made, { writtenBy: liveId });
      this.addNode(frozenParent, name, { ...node, layerId: this.pristine(foundation, node.sizeBytes) }, true);
    });
    meta.snapshots.insert({
      containerId: container.id, name: header.name, directoryId: frozenTop.id, path: diskPath, uuid: header.uuid, consistency: header.consistency, message: header.message,
      createdUs: header.createdUs,
    });
    return { path: diskPath === null ? containerName : `${containerName}/${diskPath}`, snapshot: header.name, touched: [...this.touched] };
  }

  private liveDisk(container: NodeRow, diskPath: string): Tree {
    const node = this.store.meta.nodes.byPath(`${container.name}/${diskPath}`);
    const tree: Tree = new Map();
    if (node !== undefined) tree.set(diskPath, node);
    return tree;
  }

  /** Directories above a single disk: there, or it would not have been begun; made anew in the snapshot. */
  private addParents(container: NodeRow, diskPath: string, liveParents: Map<string, number>, frozenParents: Map<string, number>): void {
    const names = diskPath.split('/').slice(0, -1);
    let frozen = frozenParents.get('')!;
    names.forEach((name, i) => {
      const parent = names.slice(0, i + 1).join('/');
      const row = this.fileSystem.namespace.resolve(`${container.name}/${parent}`);
      frozen = this.addNode(frozen, name, { kind: 'directory', mode: row.mode & 0o1777, uid: row.uid, gid: row.gid }, true).id;
      liveParents.set(parent, row.id);
      frozenParents.set(parent, frozen);
    });
  }

  /** What the base had and the stream has not, or has as something else, goes; the deepest first. */
  private removeGone(live: Tree, nodes: readonly StreamNode[]): void {
    const wanted = new Map(nodes.map((node, index) => [node.path, { node, index }]));
    for (const [name, row] of [...live].reverse()) {
      const want = wanted.get(name);
      // A file's pages may be in the kernel's cache: one with other content is another node.
      const stays = want?.node.kind === row.kind && want.node.linkTarget === row.linkTarget && (row.kind !== 'file' || this.isUnchanged(want.node, want.index));
      if (stays) continue;
      live.delete(name);
      const parentId = row.parentId ?? ROOT_NODE_ID;
      if (row.kind === 'directory') this.fileSystem.namespace.rmdir(parentId, row.name);
      else this.fileSystem.namespace.unlink(parentId, row.name);
      this.touched.add(parentId);
      this.touched.add(row.id);
    }
  }

  private isUnchanged(node: StreamNode, index: number): boolean {
    return node.delta && !fs.existsSync(this.spool.dataFile(index)) && (this.runs.get(index)?.length ?? 0) === 0 && this.baseOf(node).row.sizeBytes === node.sizeBytes;
  }

  private baseOf(node: StreamNode): { readonly row: NodeRow; readonly layer: LayerRow } {
    const row = this.base?.get(node.path);
    const layer = this.store.meta.layers.byId(row?.layerId ?? 0);
    if (row === undefined || layer === undefined) throw new OffshootError('foreign-format', `the stream changes ${node.path}, which is not in the snapshot that it goes on from`);
    return { row, layer };
  }

  /** What the disk and its frozen node stand on: what was received, or the base's own when nothing was. */
  private foundationOf(node: StreamNode, index: number): { readonly backingId: number; readonly backingLimitBytes: number | null; readonly made: number | null } {
    const { meta, files } = this.store;
    const below = node.delta ? this.baseOf(node) : null;
    const unchanged = below !== null && this.isUnchanged(node, index) ? below.layer : null;
    if (unchanged !== null && unchanged.backingId !== null) {
      return { backingId: unchanged.backingId, backingLimitBytes: unchanged.backingLimitBytes, made: null };
    }
    const layer = meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: below?.layer.backingId ?? null,
      backingLimitBytes: below === null ? null : Math.min(below.layer.backingLimitBytes ?? Number.MAX_SAFE_INTEGER, below.row.sizeBytes, node.sizeBytes),
      sizeBytes: node.sizeBytes, sealed: true, complete: below === null, createdUs: this.nowUs,
    });
    const runs = this.runs.get(index) ?? [];
    if (below !== null) meta.ownership.add(layer.id, runs);
    const file = this.spool.dataFile(index);
    if (fs.existsSync(file)) {
      const fd = fs.openSync(file, 'r+');
      try {
        fs.ftruncateSync(fd, node.sizeBytes);
        fs.fsyncSync(fd);
      } finally {
        fs.closeSync(fd);
      }
      this.renames.push({ file: path.basename(file), layerId: layer.id });
    } else {
      this.created.push(layer.id);
      files.create(layer.id, node.sizeBytes);
    }
    return { backingId: layer.id, backingLimitBytes: null, made: layer.id };
  }

  private pristine(foundation: { readonly backingId: number; readonly backingLimitBytes: number | null }, sizeBytes: number): number {
    return this.store.meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: foundation.backingId, backingLimitBytes: foundation.backingLimitBytes, sizeBytes, sealed: false,
      complete: false, createdUs: this.nowUs,
    }).id;
  }

  private keepOrAdd(found: NodeRow | undefined, parentId: number, name: string, node: StreamNode): number {
    if (found === undefined) return this.addNode(parentId, name, node).id;
    this.store.meta.nodes.update(found.id, { mode: node.mode, uid: node.uid, gid: node.gid, mtimeUs: node.mtimeUs, ctimeUs: this.nowUs });
    this.touched.add(found.id);
    return found.id;
  }

  /** The disk stays the same node, over other layers; nobody has it open. */
  private replace(found: NodeRow, node: StreamNode, layerId: number, foundation: { readonly made: number | null }): number {
    const { meta } = this.store;
    const before = found.layerId;
    meta.nodes.update(found.id, {
      layerId, sizeBytes: node.sizeBytes, mode: modeOf(node), uid: node.uid, gid: node.gid, mtimeUs: node.mtimeUs, ctimeUs: this.nowUs,
    });
    if (before !== null) this.store.reclaim([before]);
    this.touched.add(found.id);
    if (foundation.made !== null && found.kind === 'file') throw new Error('a file with other content is another node');
    return found.id;
  }

  private addNode(
    parentId: number, name: string,
    fields: Pick<NodeRow, 'kind' | 'mode' | 'uid' | 'gid'> & Partial<Pick<StreamNode, 'mtimeUs' | 'sizeBytes' | 'linkTarget'>> & { readonly layerId?: number }, frozen = false,
  ): NodeRow {
    this.touched.add(parentId);
    const mtimeUs = fields.mtimeUs ?? this.nowUs;
    return this.store.meta.nodes.insert({
      parentId, name, kind: fields.kind, mode: modeOf(fields), uid: fields.uid, gid: fields.gid, sizeBytes: fields.kind === 'directory' ? 0 : fields.sizeBytes ?? 0,
      atimeUs: mtimeUs, mtimeUs, ctimeUs: this.nowUs, layerId: fields.layerId ?? null, linkTarget: fields.linkTarget ?? null, copyOnRead: false, fault: null, frozen,
    });
  }
}

/** Files carry no set-user-id and no set-group-id here, whatever they did elsewhere. */
function modeOf({ kind, mode }: Pick<NodeRow, 'kind' | 'mode'>): number {
  return kind === 'directory' ? mode & 0o7777 : mode & 0o1777;
}
