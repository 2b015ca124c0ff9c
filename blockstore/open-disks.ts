/**
 * The open disks: which nodes have a block map in shared memory, who uses them, and the operations that pass the gate.
 *
 * Runs in the main thread. Opening a node resolves its backing chain once: every layer becomes an origin, its ownership
 * is written into the map, so that a read costs the same at depth 1 and 64. A disk that nobody uses any more stays open
 * for a while, within a bound, because what was just closed is often opened again. Whatever changes a disk's shape
 * (seal, resize) happens behind its gate, when no thread is inside.
 */
import fs from 'node:fs';

import { LRUCache } from 'lru-cache';

import type { ActiveLayer, Committer } from './committer.js';
import { OffshootError, toOffshootError } from './errors.js';
import {
  FLAG_COMPLETE, FLAG_COPY_ON_READ, FLAG_GROWABLE, ORIGINS_MAX, ORIGIN_ZERO, STATE_FAULTED, STATE_GATE_CLOSED, STATE_RETIRED, SharedDisk,
  createDiskHandles, type DiskHandles,
} from './hot/block-map.js';
import type { SharedState } from './hot/shared-state.js';
import { ActiveFile, type LayerFile, type LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow, NodeRow } from './meta/rows.js';
import { sharesOf } from './shared-origins.js';
import { BLOCK_BYTES, PAGE_BITMAP_BYTES, PAGE_BLOCKS } from './units.js';

/** Tells the threads that serve disks what came and went; they have the news before their next request. */
export interface DiskAnnouncer {
  opened(handles: DiskHandles): void;
  closed(nodeId: number, serial: number): void;
}

export interface OpenDisksOptions {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly shared: SharedState;
  readonly committer: Committer;
  readonly announcer: DiskAnnouncer;
  /** Why a node is faulted although its row does not say so: it could not be written down yet. */
  readonly unrecordedFault: (nodeId: number) => string | undefined;
  /** Slot of the limit that the node's container has, 0: none. */
  readonly quotaSlot: (nodeId: number) => number;
}

/** Disks that stay open although nobody uses them. */
const IDLE_DISKS_MAX = 64;
const PAGE_BITMAP_WORDS = PAGE_BITMAP_BYTES / 4;
/** How long an operation on a whole disk waits for the requests inside. */
const GATE_WAIT_MS = 2000;
/** How long the end of the server waits for them: longer than a source may take, since giving up would be a crash. */
const CLOSE_WAIT_MS = 40_000;
/** Seals that there is room for while a disk stays open. */
const SEALS_MIN = 512;
/** Files may grow: their map gets room for twice their size, and for this much at least. */
const GROWABLE_CAPACITY_MIN_BYTES = 64 * 1024 * 1024;

export class OpenDisk implements ActiveLayer {
  readonly nodeId: number;
  readonly layerId: number;
  readonly shared: SharedDisk;
  /** Origin N is the file at N - 1; the last one is the active layer's. */
  readonly files: LayerFile[];
  users = 0;

  constructor(nodeId: number, layerId: number, shared: SharedDisk, files: LayerFile[]) {
    this.nodeId = nodeId;
    this.layerId = layerId;
    this.shared = shared;
    this.files = files;
  }

  get fd(): number {
    return this.activeFile().fd;
  }

  get syncFd(): number {
    return this.activeFile().syncFd;
  }

  hold(): () => void {
    return this.activeFile().hold();
  }

  activeFile(): ActiveFile {
    const file = this.files.at(-1);
    if (!(file instanceof ActiveFile)) throw new Error(`disk ${this.nodeId} has no active layer`);
    return file;
  }

  mtimeMs(): number {
    return this.shared.mtimeMs();
  }
}

export class OpenDisks {
  private readonly options: OpenDisksOptions;
  private readonly used = new Map<number, OpenDisk>();
  private readonly idle: LRUCache<number, OpenDisk>;
  private readonly watches = new Set<Set<number>>();
  /** Closed disks that are sealed by a commit which is under way; whoever opens one has it done first. */
  private readonly unsettled = new Map<number, { settleNow(): void }>();
  private nextSerial = 1;

  constructor(options: OpenDisksOptions) {
    this.options = options;
    this.idle = new LRUCache({
      // Its own limit is never reached: `release` retires the oldest first, where a failure can be borne.
      max: 16 * IDLE_DISKS_MAX,
      dispose: (disk, _nodeId, reason) => {
        // 'delete' means that somebody took it out to use or retire it.
        if (reason !== 'delete') this.shutDown(disk);
      },
    });
  }

  /** The node's disk when it is open, used or idle. */
  get(nodeId: number): OpenDisk | undefined {
    return this.used.get(nodeId) ?? this.idle.get(nodeId);
  }

  /** A source has another descriptor, or none: all open disks that stand on it read there from now on. */
  sourceMoved(layerId: number, fd: number): void {
    for (const disk of this.standingOn(layerId)) disk.files.forEach((file, i) => { if (file.layerId === layerId) disk.shared.setOriginFd(i + 1, fd); });
  }

  /** Open disks whose chain has this layer. */
  standingOn(layerId: number): OpenDisk[] {
    return this.all().filter((disk) => disk.files.some((file) => file.layerId === layerId));
  }

  /** All that are open, used or idle. */
  all(): OpenDisk[] {
    return [...this.used.values(), ...this.idle.values()];
  }

  isUsed(nodeId: number): boolean {
    return this.used.has(nodeId);
  }

  count(): number {
    return this.used.size;
  }

  /** Why the node's disk is faulted; null when it is not. */
  faultOf(node: NodeRow): string | null {
    return this.options.unrecordedFault(node.id) ?? node.fault;
  }

  /** Opens the node's disk for one more user. */
  acquire(nodeId: number): OpenDisk {
    let disk = this.used.get(nodeId);
    if (disk === undefined) {
      disk = this.idle.get(nodeId);
      if (disk === undefined) disk = this.build(this.nodeOf(nodeId), 0);
      else this.idle.delete(nodeId);
      this.used.set(nodeId, disk);
    }
    disk.users += 1;
    return disk;
  }

  /** One user less. */
  release(nodeId: number): void {
    const disk = this.used.get(nodeId);
    if (disk === undefined) throw new Error(`node ${nodeId} is released without being open`);
    disk.users -= 1;
    if (disk.users > 0) return;
    this.used.delete(nodeId);
    this.idle.set(nodeId, disk);
    this.retireOldest();
  }

  /** Keeps the idle disks within their bound. One that cannot be retired now (its commit failed) stays as it is. */
  private retireOldest(): void {
    for (const nodeId of [...this.idle.rkeys()]) {
      if (this.idle.size <= IDLE_DISKS_MAX) return;
      try {
        this.retireIdle(nodeId);
      } catch (thrown) {
        if (toOffshootError(thrown).kind === 'internal') throw thrown;
      }
    }
  }

  /** Closes the node's disk if it is open and nobody uses it. */
  retireIdle(nodeId: number): void {
    const disk = this.idle.get(nodeId);
    if (disk === undefined) return;
    // First, because it may fail: then the disk must still be there, with what it has not committed.
    this.shutDown(disk);
    this.idle.delete(nodeId);
  }

  /** Runs `body` while no thread is inside the disk and none can enter. */
  withGate<T>(disk: OpenDisk, body: () => T, waitMs = GATE_WAIT_MS): T {
    disk.shared.setState(STATE_GATE_CLOSED);
    try {
      this.waitUntilNobodyIn(disk, waitMs);
      return body();
    } finally {
      disk.shared.clearState(STATE_GATE_CLOSED);
    }
  }

  /**
   * Puts a new instance of the disk, built from the metadata, in the place of the open one: after its chain changed, or
   * its map must grow. The gate is closed meanwhile; threads that wait at it find the old instance retired and ask for
   * the new one. `change` runs with nobody inside and the disk's pending set committed. `isChanged`: what the open map says is
   * wrong from now on, so that nobody may be let in when no new one can be made.
   */
  rebuild(disk: OpenDisk, capacityBytesMin: number, change: () => void, isChanged: () => boolean = () => false): OpenDisk {
    const { committer, announcer } = this.options;
    let fresh: OpenDisk;
    disk.shared.setState(STATE_GATE_CLOSED);
    try {
      this.waitUntilNobodyIn(disk);
      committer.commitLayerNow(disk);
      change();
      fresh = this.build(this.nodeOf(disk.nodeId), capacityBytesMin);
    } catch (error) {
      // The metadata says one thing and the map another: only a new server can bring them together.
      if (isChanged()) throw new Error(`the map of node ${disk.nodeId} could not follow a change of its layer`, { cause: error });
      disk.shared.clearState(STATE_GATE_CLOSED);
      throw error;
    }
    fresh.users = disk.users;
    fresh.shared.setMtimeMs(disk.shared.mtimeMs());
    fresh.shared.setFillRateBytes(disk.shared.fillRateBytes());
    fresh.shared.setFillCommand(disk.shared.fillCommand());
    fresh.shared.setFillCopiedBytes(disk.shared.fillCopiedBytes());
    if (this.used.has(disk.nodeId)) this.used.set(disk.nodeId, fresh);
    else {
      this.idle.delete(disk.nodeId);
      this.idle.set(disk.nodeId, fresh);
    }
    disk.shared.setState(STATE_RETIRED);
    disk.shared.clearState(STATE_GATE_CLOSED);
    announcer.closed(disk.nodeId, disk.shared.serial);
    this.letGo(disk);
    // `build` registered the fresh instance before the old one was let go.
    committer.register(fresh);
    return fresh;
  }

  /** Makes one more origin the active one: the old active layer stays readable, sealed, up to `sealedBytes`. Behind the gate. */
  replaceActive(disk: OpenDisk, sealed: LayerRow, active: LayerRow): OpenDisk {
    const { committer, files } = this.options;
    if (disk.shared.originCount() >= disk.shared.originsMax) throw new OffshootError('busy', 'the disk was sealed too often while it was open; close it once', { nodeId: disk.nodeId });
    const oldFile = disk.activeFile();
    const next = this.exchangeActive(disk, files.openSealed(sealed), files.openActive(active), sealed.sizeBytes);
    committer.unregister(disk);
    committer.register(next);
    files.release(oldFile);
    return next;
  }

  /**
   * The part of it that must happen behind the gate: opens nothing, and waits for nothing. The file of the layer before is the caller's
   * to release, and the committer's registers are the caller's to change.
   */
  exchangeActive(disk: OpenDisk, sealedFile: LayerFile, activeFile: ActiveFile, sealedBytes: number): OpenDisk {
    const { shared } = disk;
    const origin = shared.originCount();
    const oldOrigin = shared.activeOrigin();
    shared.setOrigin(oldOrigin, sealedFile.fd, sealedBytes);
    shared.setOrigin(origin, activeFile.fd, Number.MAX_SAFE_INTEGER);
    if ((shared.flags() & FLAG_COMPLETE) !== 0) {
      // A complete layer has nothing in its map.
      shared.setDefaultOrigin(oldOrigin);
      shared.setFlags(shared.flags() & ~FLAG_COMPLETE);
    }
    shared.setActiveOrigin(origin);
    shared.setLayerId(activeFile.layerId);
    const next = new OpenDisk(disk.nodeId, activeFile.layerId, shared, [...disk.files.slice(0, -1), sealedFile, activeFile]);
    next.users = disk.users;
    if (this.used.has(disk.nodeId)) this.used.set(disk.nodeId, next);
    else {
      this.idle.delete(disk.nodeId);
      this.idle.set(disk.nodeId, next);
    }
    return next;
  }

  /** Gives `nodes` the id of every node that is opened from now on, until the result is called. */
  watchOpened(nodes: Set<number>): () => void {
    this.watches.add(nodes);
    return () => { this.watches.delete(nodes); };
  }

  /** Closes everything; used at the end of the server. */
  closeAll(): void {
    for (const nodeId of [...this.idle.keys()]) this.retireIdle(nodeId);
    for (const disk of this.used.values()) this.shutDown(disk, CLOSE_WAIT_MS);
    this.used.clear();
  }

  /** The closed disk is not opened before `seal` is committed. */
  settleBeforeOpening(nodeId: number, seal: { settleNow(): void }): void {
    this.unsettled.set(nodeId, seal);
  }

  settled(nodeId: number): void {
    this.unsettled.delete(nodeId);
  }

  private nodeOf(nodeId: number): NodeRow {
    this.unsettled.get(nodeId)?.settleNow();
    const node = this.options.meta.nodes.byId(nodeId);
    if (node === undefined) throw new OffshootError('not-found', `there is no node ${nodeId}`, { nodeId });
    return node;
  }

  /** Resolves the chain and makes the shared block map. */
  private build(node: NodeRow, capacityBytesMin: number): OpenDisk {
    const { meta, files, shared, committer, announcer } = this.options;
    for (const watch of this.watches) watch.add(node.id);
    if (node.layerId === null) throw new OffshootError('is-a-directory', `node ${node.id} has no data`, { nodeId: node.id });
    const chain = meta.layers.chain(node.layerId);
    const [active] = chain;
    if (active === undefined) throw new OffshootError('store-damaged', `the active layer of node ${node.id} is missing`, { nodeId: node.id });
    const growable = node.kind === 'file';
    const capacityBytes = Math.max(node.sizeBytes, capacityBytesMin, growable && !active.complete ? Math.max(2 * node.sizeBytes, GROWABLE_CAPACITY_MIN_BYTES) : 0);
    let limitBytes = Number.MAX_SAFE_INTEGER;
    const limits: number[] = [];
    for (const layer of chain) {
      limits.push(layer === active ? Number.MAX_SAFE_INTEGER : Math.min(limitBytes, layer.sizeBytes));
      limitBytes = Math.min(limitBytes, layer.backingLimitBytes ?? Number.MAX_SAFE_INTEGER);
    }
    const shares = sharesOf(meta, chain, limits);
    const originCount = chain.length + shares.origins.length + 1;
    if (originCount >= ORIGINS_MAX) throw new OffshootError('not-supported', `a disk that reads from ${originCount} places is too much: fill it`, { nodeId: node.id });
    // Room for seals while it is open.
    const disk = new SharedDisk(createDiskHandles(node.id, this.nextSerial, capacityBytes, originCount + SEALS_MIN));
    this.nextSerial += 1;

    const opened: LayerFile[] = [];
    try {
      // Bottom first: origin 1 is the base image; what extents are shared with comes behind the chain, and last the active layer.
      const originOfLayer = (index: number): number => (index === 0 ? originCount - 1 : chain.length - index);
      const add = (file: LayerFile, limit: number, deltaBytes: number): void => {
        opened.push(file);
        disk.setOrigin(opened.length, file.fd, limit, deltaBytes);
      };
      for (let i = chain.length - 1; i > 0; i -= 1) add(files.openSealed(chain[i]!), limits[i]!, 0);
      for (const share of shares.origins) add(files.openSealed(share.layer), share.limitBytes, share.deltaBytes);
      add(this.openActiveFile(active, node), Number.MAX_SAFE_INTEGER, 0);
      const bottom = chain.at(-1)!;
      disk.setActiveOrigin(originOfLayer(0));
      disk.setDefaultOrigin(bottom.complete ? originOfLayer(chain.length - 1) : ORIGIN_ZERO);
      disk.setLayerId(active.id);
      disk.setQuotaSlot(this.options.quotaSlot(node.id));
      disk.setSizeBytes(node.sizeBytes);
      disk.setMtimeMs(node.mtimeUs / 1000);
      disk.setFlags((active.complete ? FLAG_COMPLETE : 0) | (node.copyOnRead ? FLAG_COPY_ON_READ : 0) | (growable ? FLAG_GROWABLE : 0));
      if (this.faultOf(node) !== null) disk.setState(STATE_FAULTED);
      for (let i = chain.length - 1; i >= 0; i -= 1) {
        const layer = chain[i]!;
        if (layer.complete) continue;
        for (const { block, count, share } of shares.ofLayer[i] ?? []) this.publishLoaded(disk, block, block + count - 1, share < 0 ? ORIGIN_ZERO : chain.length + share);
        // What the layer owns comes before what it shares.
        this.loadOwnership(disk, layer.id, originOfLayer(i));
      }
    } catch (error) {
      for (const file of opened) files.release(file);
      for (const page of disk.clear()) shared.freePage(page);
      throw error;
    }
    const open = new OpenDisk(node.id, active.id, disk, opened);
    committer.register(open, this.faultOf(node) !== null);
    announcer.opened(disk.handles);
    return open;
  }

  private openActiveFile(layer: LayerRow, node: NodeRow): LayerFile {
    const { files, meta } = this.options;
    if (layer.sealed) throw new OffshootError('store-damaged', `the active layer ${layer.id} of node ${node.id} is sealed`, { nodeId: node.id, layerId: layer.id });
    // A clone's file is made when it is first opened. Once it owns something the file must be there.
    if (!layer.complete && !files.exists(layer.id) && meta.ownership.isEmpty(layer.id)) files.create(layer.id, node.sizeBytes);
    const file = files.openActive(layer);
    // Longer: a shrink that died before it cut the file, or growth that a power loss took back. What lies there must not come
    // back when the disk grows again. Shorter: growth that died before the metadata, or the other way round after a power loss.
    // A faulted disk is left as it is, for whoever comes to save it.
    try {
      if (this.faultOf(node) === null && fs.fstatSync(file.fd).size !== node.sizeBytes) fs.ftruncateSync(file.fd, node.sizeBytes);
    } catch (error) {
      files.release(file);
      throw toOffshootError(error);
    }
    return file;
  }

  private publishLoaded(disk: SharedDisk, first: number, last: number, origin: number): void {
    const end = Math.min(last, disk.capacityBlocks - 1);
    if (first <= end && !disk.publish(this.options.shared, first, end, origin)) {
      throw new OffshootError('no-space', 'the memory for block maps is used up; close some disks', { nodeId: disk.nodeId });
    }
  }

  private loadOwnership(disk: SharedDisk, layerId: number, origin: number): void {
    const { meta, shared } = this.options;
    const assertPublished = (isPublished: boolean): void => {
      if (!isPublished) throw new OffshootError('no-space', 'the memory for block maps is used up; close some disks', { nodeId: disk.nodeId });
    };
    meta.ownership.forEachPacked(layerId, {
      run: (firstPage, pageCount) => {
        const endBlock = Math.min((firstPage + pageCount) * PAGE_BLOCKS, disk.capacityBlocks);
        if (firstPage * PAGE_BLOCKS < endBlock) assertPublished(disk.publish(shared, firstPage * PAGE_BLOCKS, endBlock - 1, origin));
      },
      pages: (pages, bitmaps) => { pages.forEach((page, i) => { assertPublished(disk.publishBits(shared, page, bitmaps, i * PAGE_BITMAP_WORDS, origin)); }); },
    });
  }

  /** Retires an instance that nobody uses: commits what is pending, then gives everything back. */
  private shutDown(disk: OpenDisk, waitMs = GATE_WAIT_MS): void {
    const { committer, announcer, meta } = this.options;
    disk.shared.setState(STATE_GATE_CLOSED);
    try {
      this.waitUntilNobodyIn(disk, waitMs);
      if ((disk.shared.state() & STATE_FAULTED) === 0 && committer.isPending(disk)) committer.commitLayerNow(disk);
      if (meta.nodes.byId(disk.nodeId) !== undefined) meta.nodes.written(disk.nodeId, disk.mtimeMs());
      disk.shared.setState(STATE_RETIRED);
    } finally {
      disk.shared.clearState(STATE_GATE_CLOSED);
    }
    announcer.closed(disk.nodeId, disk.shared.serial);
    this.letGo(disk);
  }

  /** The gate is closed. `busy` when a request inside does not end: it waits for a source, and everybody else would wait for it. */
  private waitUntilNobodyIn(disk: OpenDisk, waitMs = GATE_WAIT_MS): void {
    if (this.options.shared.waitUntilNobodyIn(disk.shared.serial, waitMs)) return;
    throw new OffshootError('busy', `a request on the disk takes longer than ${waitMs} ms; its source may be slow: try again`, { nodeId: disk.nodeId });
  }

  private letGo(disk: OpenDisk): void {
    const { committer, files, shared } = this.options;
    committer.unregister(disk);
    for (const file of disk.files) files.release(file);
    // Nobody is inside and nobody can enter, so no thread looks at these pages any more.
    for (const page of disk.shared.clear()) shared.freePage(page);
  }
}

/** Blocks of the node's active layer, counted in the open map. */
export function countOwned(shared: SharedState, disk: OpenDisk): number {
  const endBlock = Math.ceil(disk.shared.sizeBytes() / BLOCK_BYTES);
  if ((disk.shared.flags() & FLAG_COMPLETE) !== 0) return endBlock;
  return disk.shared.countBlocks(shared, endBlock, disk.shared.activeOrigin());
}
