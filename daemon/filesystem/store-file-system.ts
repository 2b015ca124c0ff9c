/**
 * The file system: names from the namespace, data from the block store, open handles between them.
 *
 * Main thread only; knows no FUSE. Disks are opened `direct`: one cache, the store's, and no incoherence. Ordinary files are
 * `cached`, unless their first opener asks for O_DIRECT. One mode holds for all opens of a node until its last close. A
 * disk's size is fixed for those who write to it: only growing is allowed through the mount, because a truncation by
 * mistake (O_TRUNC) would be the end of the data.
 */
import fs from 'node:fs';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { FALLOC_FL_KEEP_SIZE } from '../../blockstore/hot/door.js';
import { timesAsWritten } from '../../blockstore/meta/node-table.js';
import type { LayerRow, NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { DISK_BYTES_MAX } from '../../blockstore/units.js';
import { assertThawed } from './frozen.js';
import { copyRange } from './copy-range.js';
import { Namespace } from './namespace.js';
import type { KnownAllocation, LiveAttributes, NodeData } from './node-data.js';
import { NAME_BYTES_MAX } from './names.js';
import type { OpenHandles } from './open-handles.js';
import type {
  AttributeChanges, Attributes, Caller, DirectoryEntry, FallocateMode, FileSystem, NodeId, OpenMode, OpenResult, RenameFlags, RequestMark, StoreStatistics,
} from './types.js';

export interface StoreFileSystemOptions {
  readonly store: Store;
  readonly storeDir: string;
  readonly handles: OpenHandles;
  /** A node is about to lose its data: whoever works on it lets go of it. */
  readonly beforeDiscard: (nodeId: NodeId) => void;
  readonly onWarning: (context: object, message: string) => void;
}

/** Longer than any chain that can be opened. */
const CHAIN_LAYERS_MAX = 4096;
/** Orphans that a start takes away before guests go on; more wait until it serves, see `jobs/leftovers.ts`. */
const ORPHANS_AT_START_MAX = 64;

/** Files of which it is known that the kernel's pages are right. One that is forgotten loses its pages at the next open, and nothing else. */
const RIGHT_PAGES_MAX = 100_000;

export class StoreFileSystem implements FileSystem {
  readonly namespace: Namespace;
  readonly #options: StoreFileSystemOptions;
  readonly #store: Store;
  readonly #modes = new Map<NodeId, OpenMode>();
  /** Cached files that this server has opened since they last got another content: not those of the server before, which may have died between the two. */
  readonly #rightPages = new Set<NodeId>();
  /** Nodes that were open when the last server ended, and that could not be opened since: their data files are not as they must be. */
  readonly #away = new Set<NodeId>();

  constructor(options: StoreFileSystemOptions) {
    this.#options = options;
    this.#store = options.store;
    this.namespace = new Namespace({ meta: options.store.meta, data: this.#nodeData() });
  }

  /** Opens what the last server had open, and takes away what lost its last name and its last user meanwhile. */
  restore(): void {
    for (const { nodeId, mode } of this.#options.handles.entries()) {
      if (this.#modes.has(nodeId)) continue;
      this.#modes.set(nodeId, mode);
      this.#away.add(nodeId);
      try {
        this.#bringBack(nodeId);
      } catch (thrown) {
        const error = toOffshootError(thrown);
        if (error.kind === 'internal') throw thrown;
        this.#options.onWarning({ nodeId, reason: error.message }, 'an open disk could not be opened again; it is tried with each request');
      }
    }
    this.discardAll(this.orphans().slice(0, ORPHANS_AT_START_MAX));
  }

  /** What has neither a name nor a user any more. */
  orphans(): readonly NodeId[] {
    return this.#store.meta.nodes.orphanIds().filter((id) => this.#options.handles.openCountOf(id) === 0);
  }

  /** Takes nodes without a name away, but those that are open, and what only they referred to. Gives the number of layers that went. */
  discardAll(nodes: readonly NodeId[]): number {
    const unused = nodes.filter((node) => this.#options.handles.openCountOf(node) === 0);
    for (const node of unused) this.#options.beforeDiscard(node);
    return this.#store.discardNodes(unused);
  }

  lookup(parent: NodeId, name: string): Attributes {
    const found = this.namespace.lookup(parent, name);
    // Without a name it is there for those who have it open, and for nobody who has only kept its number.
    if (name !== '.' || found.linkCount > 0 || this.#options.handles.openCountOf(parent) > 0) return found;
    throw new OffshootError('not-found', `node ${parent} has lost its name, and nobody has it open`, { nodeId: parent });
  }

  getattr(node: NodeId): Attributes { return this.namespace.getattr(node); }
  readdir(node: NodeId, afterCookie: number, max: number): readonly DirectoryEntry[] { return this.namespace.readdir(node, afterCookie, max); }
  parentOf(node: NodeId): NodeId { return this.namespace.parentOf(node); }
  mkdir(parent: NodeId, name: string, mode: number, caller: Caller): Attributes { return this.namespace.mkdir(parent, name, mode, caller); }
  rmdir(parent: NodeId, name: string): void { this.namespace.rmdir(parent, name); }
  symlink(parent: NodeId, name: string, target: string, caller: Caller): Attributes { return this.namespace.symlink(parent, name, target, caller); }
  readlink(node: NodeId): string { return this.namespace.readlink(node); }
  unlink(parent: NodeId, name: string): void { this.namespace.unlink(parent, name); }

  rename(parent: NodeId, name: string, newParent: NodeId, newName: string, flags: RenameFlags): void {
    this.namespace.rename(parent, name, newParent, newName, flags);
  }

  setattr(node: NodeId, changes: AttributeChanges): Promise<Attributes> {
    const { sizeBytes, ...others } = changes;
    if (sizeBytes !== undefined) this.#setSize(node, sizeBytes);
    return Promise.resolve(this.namespace.applyAttributes(node, others));
  }

  create(parent: NodeId, name: string, mode: number, flags: number, caller: Caller, mark?: RequestMark): { readonly attributes: Attributes; readonly open: OpenResult } {
    const existing = (flags & fs.constants.O_EXCL) === 0 ? this.#store.meta.nodes.child(parent, name) : undefined;
    const attributes = existing === undefined ? this.namespace.create(parent, name, mode, caller) : this.namespace.getattr(existing.id);
    return { attributes, open: this.open(attributes.nodeId, flags, mark) };
  }

  open(node: NodeId, flags: number, mark?: RequestMark): OpenResult {
    const row = this.#dataNode(node);
    if ((flags & (fs.constants.O_WRONLY | fs.constants.O_RDWR | fs.constants.O_TRUNC)) !== 0) assertThawed(this.#store.meta, row);
    const given = mark?.isSecond === true ? this.#options.handles.givenTo(mark.key, node) : undefined;
    if (given !== undefined) return this.#withPages(node, given);
    const mode = this.#modes.get(node) ?? (row.kind === 'disk' || (flags & fs.constants.O_DIRECT) !== 0 ? 'direct' : 'cached');
    this.#bringBack(node);
    this.#store.disks.acquire(node);
    try {
      const handle = this.#options.handles.add(node, flags, mode, mark?.key);
      this.#modes.set(node, mode);
      return this.#withPages(node, { handle, mode });
    } catch (thrown) {
      this.#store.disks.release(node);
      throw thrown;
    }
  }

  /**
   * The node got another content without anybody having it open. Its time of change is that content's, which may be the very one that the kernel knows:
   * it did not ask for the time that its own last write gave. So the next open makes it drop what it has.
   */
  contentReplaced(node: NodeId): void {
    this.#rightPages.delete(node);
  }

  release(handle: number): void {
    const entry = this.#options.handles.remove(handle);
    if (entry === undefined) return;
    if (!this.#away.has(entry.nodeId)) this.#store.disks.release(entry.nodeId);
    if (this.#options.handles.openCountOf(entry.nodeId) > 0) return;
    this.#away.delete(entry.nodeId);
    this.#modes.delete(entry.nodeId);
    if (this.#store.meta.nodes.byId(entry.nodeId)?.parentId === null) this.#discard(entry.nodeId);
  }

  read(node: NodeId, offsetBytes: number, target: Uint8Array): number | Promise<number> {
    this.#bringBack(node);
    return this.#store.data.readOrLater(node, offsetBytes, target);
  }

  write(node: NodeId, offsetBytes: number, data: Uint8Array): number | Promise<number> {
    this.#bringBack(node);
    return this.#store.data.writeOrLater(node, offsetBytes, data);
  }

  fallocate(node: NodeId, mode: FallocateMode, offsetBytes: number, lengthBytes: number): Promise<void> | null {
    this.#bringBack(node);
    const disk = this.#store.disks.get(node);
    if (disk === undefined) throw new OffshootError('bad-handle', `node ${node} is not open`, { nodeId: node });
    const end = offsetBytes + lengthBytes;
    const mayGrow = mode === 'allocate' || mode === 'zero-range';
    if (mayGrow && end > disk.shared.sizeBytes()) this.#assertGrowable(node, end);
    const grow = (): void => {
      const sizeBytes = this.#store.disks.get(node)?.shared.sizeBytes() ?? end;
      if (mayGrow && end > sizeBytes) this.#store.resize(node, end);
    };
    if (mode === 'punch-hole' || mode === 'zero-range' || mode === 'zero-range-keep-size') {
      const later = this.#store.data.discardOrLater(node, offsetBytes, lengthBytes);
      if (later !== null) return later.then(grow);
    } else {
      this.#store.quotas.takeRoom(node, lengthBytes);
      const failed = this.#store.context.door.fallocate('allocate', disk.fd, FALLOC_FL_KEEP_SIZE, offsetBytes, lengthBytes);
      if (failed < 0) throw new OffshootError(failed === -28 ? 'no-space' : 'io-error', `reserving ${lengthBytes} bytes failed with errno ${-failed}`, { nodeId: node });
    }
    grow();
    return null;
  }

  seek(node: NodeId, offsetBytes: number, whence: 'data' | 'hole'): number {
    this.#bringBack(node);
    const found = this.#store.data.seek(node, offsetBytes, whence === 'data');
    if (found < 0) throw new OffshootError('invalid-argument', 'there is no data behind this offset', { enxio: true });
    return found;
  }

  async copyFileRange(source: NodeId, sourceAtBytes: number, target: NodeId, targetAtBytes: number, lengthBytes: number): Promise<number> {
    for (const node of [source, target]) {
      const row = this.#dataNode(node);
      // Nothing that is part of a snapshot was ever opened for writing; here it is asked for by its number.
      if (node === target) assertThawed(this.#store.meta, row);
      this.#bringBack(node);
      if (this.#store.disks.get(node) === undefined) throw new OffshootError('bad-handle', `node ${node} is not open`, { nodeId: node });
    }
    return await copyRange(this.#store, { source, sourceAtBytes, target, targetAtBytes, lengthBytes });
  }

  async flush(node: NodeId): Promise<void> { await this.#store.flush(node); }

  /** Names are committed, durably, as they are made. */
  flushDirectory(node: NodeId): Promise<void> {
    this.namespace.getattr(node);
    return Promise.resolve();
  }

  statfs(node: NodeId): StoreStatistics {
    const { bsize, blocks, bfree, bavail, files, ffree } = fs.statfsSync(this.#options.storeDir);
    // What a full store has left is for metadata: nothing that is asked for here could be written.
    const { isFull } = this.#store.space();
    const quota = this.#store.quotas.of(node);
    // As project quotas of XFS and ext4 do: the limit is the size, what is left below it is free, if the store has as much.
    const total = quota === null ? blocks : Math.min(blocks, Math.floor(quota.limitBytes / bsize));
    const left = quota === null ? blocks : Math.max(0, Math.floor((quota.limitBytes - quota.usedBytes) / bsize));
    return {
      blockBytes: bsize, blocksTotal: total, blocksFree: isFull ? 0 : Math.min(left, bfree), blocksAvailable: isFull ? 0 : Math.min(left, bavail), nodesTotal: files,
      nodesFree: ffree, nameBytesMax: NAME_BYTES_MAX,
    };
  }

  /** Opens of the node through the mount. */
  openCount(node: NodeId): number { return this.#options.handles.openCountOf(node); }

  /** Nodes that are open through the mount. */
  openNodes(): number { return this.#modes.size; }

  /** Opens a node again that could not be opened when the server started, once for each handle that the kernel still has. */
  #bringBack(node: NodeId): void {
    if (!this.#away.has(node)) return;
    const handles = this.#options.handles.openCountOf(node);
    for (let i = 0; i < handles; i += 1) this.#store.disks.acquire(node);
    this.#away.delete(node);
  }

  #setSize(node: NodeId, sizeBytes: number): void {
    const row = this.#dataNode(node);
    assertThawed(this.#store.meta, row);
    const now = this.#store.disks.get(node)?.shared.sizeBytes() ?? row.sizeBytes;
    if (sizeBytes === now) return;
    if (row.kind === 'disk' && sizeBytes < now) {
      throw new OffshootError('not-permitted', 'a disk is not truncated through the mount; use `offshoot resize`', { nodeId: node });
    }
    if (sizeBytes > DISK_BYTES_MAX) throw new OffshootError('too-large', 'nothing is larger than 64 TiB', { nodeId: node });
    this.#store.resize(node, sizeBytes);
  }

  #assertGrowable(node: NodeId, sizeBytes: number): void {
    if (this.#dataNode(node).kind === 'disk' || sizeBytes > DISK_BYTES_MAX) {
      throw new OffshootError('too-large', 'a disk has a fixed size; use `offshoot resize`', { nodeId: node });
    }
  }

  #withPages(node: NodeId, opened: Pick<OpenResult, 'handle' | 'mode'>): OpenResult {
    const { handle, mode } = opened;
    if (mode === 'direct') return { handle, mode };
    const dropsPages = !this.#rightPages.has(node);
    if (dropsPages && this.#rightPages.size >= RIGHT_PAGES_MAX) this.#rightPages.clear();
    this.#rightPages.add(node);
    return { handle, mode, dropsPages };
  }

  #dataNode(node: NodeId): NodeRow {
    const row = this.#store.meta.nodes.byId(node);
    if (row === undefined) throw new OffshootError('not-found', `there is no node ${node}`, { nodeId: node });
    if (row.kind === 'directory') throw new OffshootError('is-a-directory', 'a directory has no data', { nodeId: node });
    if (row.layerId === null) throw new OffshootError('invalid-argument', 'only files and disks have data', { nodeId: node });
    return row;
  }

  #discard(node: NodeId): void {
    this.#options.beforeDiscard(node);
    this.#store.discardNodes([node]);
  }

  #live(node: NodeId): LiveAttributes | undefined {
    const disk = this.#store.disks.get(node);
    const row = disk === undefined ? undefined : this.#store.meta.nodes.byId(node);
    if (disk === undefined || row === undefined) return undefined;
    return { sizeBytes: disk.shared.sizeBytes(), ...timesAsWritten(row, disk.mtimeMs()), atimeUs: row.atimeUs };
  }

  /** What a chain takes, from this layer down to the first whose answer is known already. */
  #allocatedFrom(layerId: number, known: KnownAllocation): number {
    const { meta, files } = this.#store;
    const way: LayerRow[] = [];
    let sum = 0;
    for (let id: number | null = layerId; id !== null; ) {
      const below = known.get(id);
      if (below !== undefined) {
        sum = below;
        break;
      }
      const layer: LayerRow | undefined = meta.layers.byId(id);
      // A circle is a damaged database: `chain` says so.
      if (layer === undefined || way.length > CHAIN_LAYERS_MAX) return files.allocatedInChain(meta.layers.chain(layerId));
      way.push(layer);
      id = layer.complete ? null : layer.backingId;
    }
    for (const layer of way.reverse()) {
      // What is shared counts for each who shares it.
      sum += files.allocatedInChain([layer]) + (layer.complete ? 0 : meta.sharedExtents.sharedBytes(layer.id));
      // An active layer is nobody else's.
      if (layer.sealed) known.set(layer.id, sum);
    }
    return sum;
  }

  #nodeData(): NodeData {
    return {
      createEmptyLayer: () => this.#store.createEmptyLayer().id,
      liveAttributes: (node) => this.#live(node),
      allocatedBytes: (layerId, known) => (layerId === null ? 0 : this.#allocatedFrom(layerId, known ?? new Map<number, number>())),
      isOpen: (node) => this.#options.handles.openCountOf(node) > 0,
      discard: (node) => { this.#discard(node); },
      attributesChanged: (node) => {
        const row = this.#store.meta.nodes.byId(node);
        if (row !== undefined) this.#store.disks.get(node)?.shared.setMtimeMs(row.mtimeUs / 1000);
      },
    };
  }
}
