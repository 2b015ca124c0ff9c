/**
 * The smallest FileSystem: everything in memory. It stands for the real one where a transport alone is tested.
 *
 * It also counts flushes, because a transport's promise about durable writes can only be seen from this side of it.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type {
  AttributeChanges, Attributes, Caller, DirectoryEntry, FallocateMode, FileSystem, NodeId, NodeKind, OpenResult, RenameFlags, StoreStatistics,
} from '../../../daemon/filesystem/types.js';
import { ROOT_NODE_ID } from '../../../daemon/filesystem/types.js';

interface Node {
  readonly id: NodeId;
  readonly kind: NodeKind;
  readonly target: string;
  /** Directories only, in the order in which the entries were made. */
  readonly entries: Map<string, NodeId>;
  parent: NodeId;
  linked: boolean;
  data: Buffer;
  mode: number;
  uid: number;
  gid: number;
  atimeUs: number;
  mtimeUs: number;
  ctimeUs: number;
}

export class MemoryFileSystem implements FileSystem {
  /** Nodes in the order in which they were flushed. */
  readonly flushed: NodeId[] = [];
  readonly statistics: StoreStatistics;
  readonly #nodes = new Map<NodeId, Node>();
  readonly #handles = new Map<number, NodeId>();
  #lastHandle = 0;

  constructor(statistics: Partial<StoreStatistics> = {}) {
    this.statistics = {
      blockBytes: 4096, blocksTotal: 1000, blocksFree: 600, blocksAvailable: 500, nodesTotal: 100, nodesFree: 50, nameBytesMax: 255, ...statistics,
    };
    this.#nodes.set(ROOT_NODE_ID, this.#make(ROOT_NODE_ID, ROOT_NODE_ID, 'directory', 0o755, { uid: 0, gid: 0, pid: 0 }, ''));
  }

  get openHandles(): number {
    return this.#handles.size;
  }

  get nodeCount(): number {
    return this.#nodes.size;
  }

  lookup(parent: NodeId, name: string): Attributes {
    return this.getattr(this.#child(parent, name).id);
  }

  getattr(id: NodeId): Attributes {
    const node = this.#node(id);
    const { kind, mode, uid, gid, atimeUs, mtimeUs, ctimeUs } = node;
    return {
      nodeId: id, generation: 1, kind, mode, uid, gid, atimeUs, mtimeUs, ctimeUs, linkCount: node.linked ? (kind === 'directory' ? 2 : 1) : 0,
      sizeBytes: kind === 'directory' ? 4096 : node.data.length, allocatedBytes: node.data.length,
    };
  }

  setattr(id: NodeId, changes: AttributeChanges): Promise<Attributes> {
    const node = this.#node(id);
    const nowUs = Date.now() * 1000;
    if (changes.mode !== undefined) node.mode = changes.mode;
    if (changes.uid !== undefined) node.uid = changes.uid;
    if (changes.gid !== undefined) node.gid = changes.gid;
    if (changes.sizeBytes !== undefined) {
      const data = Buffer.alloc(changes.sizeBytes);
      node.data.copy(data);
      node.data = data;
      node.mtimeUs = nowUs;
    }
    if (changes.atimeUs !== undefined) node.atimeUs = changes.atimeUs === 'now' ? nowUs : changes.atimeUs;
    if (changes.mtimeUs !== undefined) node.mtimeUs = changes.mtimeUs === 'now' ? nowUs : changes.mtimeUs;
    node.ctimeUs = nowUs;
    return Promise.resolve(this.getattr(id));
  }

  readdir(id: NodeId, afterCookie: number, max: number): readonly DirectoryEntry[] {
    return [...this.#node(id).entries].filter(([, child]) => child > afterCookie).sort((a, b) => a[1] - b[1]).slice(0, max)
      .map(([name, child]) => ({ name, cookie: child, attributes: this.getattr(child) }));
  }

  parentOf(id: NodeId): NodeId {
    return this.#node(id).parent;
  }

  mkdir(parent: NodeId, name: string, mode: number, caller: Caller): Attributes {
    return this.getattr(this.#add(parent, name, 'directory', mode, caller, '').id);
  }

  rmdir(parent: NodeId, name: string): void {
    const node = this.#child(parent, name);
    if (node.kind !== 'directory') throw new OffshootError('not-a-directory', name);
    if (node.entries.size > 0) throw new OffshootError('not-empty', name);
    this.#unlink(parent, name);
  }

  create(parent: NodeId, name: string, mode: number, flags: number, caller: Caller): { readonly attributes: Attributes; readonly open: OpenResult } {
    const node = this.#add(parent, name, 'file', mode, caller, '');
    return { attributes: this.getattr(node.id), open: this.open(node.id, flags) };
  }

  symlink(parent: NodeId, name: string, target: string, caller: Caller): Attributes {
    return this.getattr(this.#add(parent, name, 'symlink', 0o777, caller, target).id);
  }

  readlink(id: NodeId): string {
    return this.#node(id).target;
  }

  unlink(parent: NodeId, name: string): void {
    if (this.#child(parent, name).kind === 'directory') throw new OffshootError('is-a-directory', name);
    this.#unlink(parent, name);
  }

  rename(parent: NodeId, name: string, newParent: NodeId, newName: string, flags: RenameFlags): void {
    const node = this.#child(parent, name);
    const target = this.#node(newParent).entries.get(newName);
    if (target !== undefined && flags.noReplace) throw new OffshootError('already-exists', newName);
    if (target !== undefined) this.#unlink(newParent, newName);
    this.#node(parent).entries.delete(name);
    this.#node(newParent).entries.set(newName, node.id);
    node.parent = newParent;
  }

  open(id: NodeId, _flags: number): OpenResult {
    this.#node(id);
    this.#lastHandle += 1;
    this.#handles.set(this.#lastHandle, id);
    return { handle: this.#lastHandle, mode: 'direct' };
  }

  release(handle: number): void {
    const id = this.#handles.get(handle);
    this.#handles.delete(handle);
    if (id !== undefined) this.#dropIfUnused(id);
  }

  read(id: NodeId, offsetBytes: number, target: Uint8Array): number {
    const data = this.#node(id).data.subarray(offsetBytes, offsetBytes + target.length);
    target.set(data);
    return data.length;
  }

  write(id: NodeId, offsetBytes: number, data: Uint8Array): number {
    const node = this.#node(id);
    if (offsetBytes + data.length > node.data.length) node.data = Buffer.concat([node.data, Buffer.alloc(offsetBytes + data.length - node.data.length)]);
    node.data.set(data, offsetBytes);
    node.mtimeUs = Date.now() * 1000;
    return data.length;
  }

  fallocate(_id: NodeId, mode: FallocateMode): null {
    throw new OffshootError('not-supported', `No ${mode} in memory.`);
  }

  copyFileRange(): Promise<number> {
    return Promise.reject(new OffshootError('not-supported', 'nothing is shared here'));
  }

  seek(_id: NodeId, offsetBytes: number, whence: 'data' | 'hole'): number {
    throw new OffshootError('not-supported', `No ${whence} after ${offsetBytes} in memory.`);
  }

  flush(id: NodeId): Promise<void> {
    this.flushed.push(id);
    return Promise.resolve();
  }

  flushDirectory(id: NodeId): Promise<void> {
    return this.flush(id);
  }

  statfs(): StoreStatistics {
    return this.statistics;
  }

  #node(id: NodeId): Node {
    const node = this.#nodes.get(id);
    if (node === undefined) throw new OffshootError('not-found', `No node ${id}.`);
    return node;
  }

  #child(parent: NodeId, name: string): Node {
    const id = this.#node(parent).entries.get(name);
    if (id === undefined) throw new OffshootError('not-found', `No ${name}.`);
    return this.#node(id);
  }

  #add(parent: NodeId, name: string, kind: NodeKind, mode: number, caller: Caller, target: string): Node {
    const { entries } = this.#node(parent);
    if (entries.has(name)) throw new OffshootError('already-exists', name);
    const node = this.#make(Math.max(...this.#nodes.keys()) + 1, parent, kind, mode, caller, target);
    this.#nodes.set(node.id, node);
    entries.set(name, node.id);
    return node;
  }

  #make(id: NodeId, parent: NodeId, kind: NodeKind, mode: number, caller: Caller, target: string): Node {
    const nowUs = Date.now() * 1000;
    return {
      id, parent, kind, mode, target, uid: caller.uid, gid: caller.gid, linked: true, entries: new Map(), data: Buffer.from(target),
      atimeUs: nowUs, mtimeUs: nowUs, ctimeUs: nowUs,
    };
  }

  #unlink(parent: NodeId, name: string): void {
    const node = this.#child(parent, name);
    this.#node(parent).entries.delete(name);
    node.linked = false;
    this.#dropIfUnused(node.id);
  }

  #dropIfUnused(id: NodeId): void {
    const node = this.#nodes.get(id);
    if (node === undefined || node.linked || [...this.#handles.values()].includes(id)) return;
    this.#nodes.delete(id);
  }
}
