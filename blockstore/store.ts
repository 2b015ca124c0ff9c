/**
 * The store: layers, maps, journals and metadata behind one object. A library: it knows no FUSE, no HTTP, no hypervisor.
 *
 * Runs in the main thread, which is the only writer of the metadata. The threads that serve disks get their place in the
 * shared memory from `threadBoot` and hear of disks through the announcer. What a call did is durable when it returns,
 * except for data, which is durable after a flush.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

import { checkSteps, type CheckOptions, type CheckProgress, type CheckReport } from './check.js';
import { cloneNode, type CloneOptions, type CloneTarget } from './clone.js';
import { Committer } from './committer.js';
import { OffshootError, errnoOf, toOffshootError } from './errors.js';
import { STATE_FAULTED } from './hot/block-map.js';
import type { HotContext } from './hot/context.js';
import { realDoor, type Door } from './hot/door.js';
import { chunksFor, createSharedState } from './hot/shared-state.js';
import { createThreadContext, type ThreadBoot } from './hot/thread-context.js';
import { LayerFiles, syncDirectory } from './layer-files.js';
import { MainDataPath } from './main-data-path.js';
import { commitMerge, type MergePair } from './merge.js';
import { MetaStore } from './meta/meta-store.js';
import type { LayerRow, NodeRow } from './meta/rows.js';
import { Quotas, type QuotaChange } from './quotas.js';
import { OpenDisks, countOwned, type DiskAnnouncer, type OpenDisk } from './open-disks.js';
import { promoteNode, type Promoted } from './promote.js';
import { cloneRanges, cloneRangesToNew, type CopyRange } from './range-clone.js';
import { rebaseNode, type RebaseOutcome } from './rebase.js';
import { reclaimLayers, trimShared } from './reclaim.js';
import { createJournals, forgetFault, journalPath, noteFault, removeJournals, replayJournals, storeIdOf, syncAhead, type Replay } from './recovery.js';
import { resizeDisk } from './resize.js';
import { GroupSeals } from './seal-group.js';
import { sealNotePath } from './seal-note.js';
import { layersBelow } from './shared-origins.js';
import type { ExternalSource } from './sources/external-source.js';
import { SpaceReserve } from './space-reserve.js';
import { syncFile } from './sync-file.js';
import { BLOCK_BYTES } from './units.js';

export interface StoreOptions {
  readonly storeDir: string;
  /** On tmpfs: journals live here, exactly as long as the mount does. */
  readonly runtimeDir: string;
  /** Threads that will move blocks, the main thread among them. */
  readonly threads: number;
  readonly announcer: DiskAnnouncer;
  /** A disk was faulted. */
  readonly onFault: (nodeId: number, reason: string) => void;
  /** The limit of a container is reached, or there is room below it again. */
  readonly onQuota?: (change: QuotaChange) => void;
  /** A commit has ended, in whole or not. */
  readonly onCommit?: (durationMs: number, isWhole: boolean) => void;
  /** The store has room for metadata only, or has room again. */
  readonly onFull: (isFull: boolean, freeBytes: number) => void;
  /** How long a read may wait for a source that does not answer; a sensible time when left out. */
  readonly sourceTimeoutMs?: number;
  /** Memory for block maps, in chunks of 64 MiB of address space; by the machine's memory when left out. */
  readonly mapChunks?: number;
  /** The main thread's door; tests put a wrapper here. */
  readonly door?: Door;
}

/** Below the half minute after which guests reset a disk that does not answer: better an error for one request. */
const SOURCE_TIMEOUT_MS = 25_000;
const SOURCE_LOOK_INTERVAL_MS = 1000;
/** How often everything acknowledged is committed although nobody asked. */
const COMMIT_INTERVAL_MS = 1000;
const CHECKPOINT_INTERVAL_MS = 5000;
/** How often it is looked how much room containers have below their limits. */
const QUOTA_INTERVAL_MS = 250;

export class Store {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly disks: OpenDisks;
  readonly committer: Committer;
  readonly replay: Replay;
  readonly data: MainDataPath;
  readonly quotas: Quotas;
  readonly context: HotContext;
  readonly sourceTimeoutMs: number;
  readonly groupSeals: GroupSeals;
  private readonly options: StoreOptions;
  private readonly reserve: SpaceReserve;
  private readonly boots: readonly ThreadBoot[];
  private readonly timers: NodeJS.Timeout[] = [];
  private readonly unrecordedFaults = new Map<number, string>();

  /** Does the slow part of a recovery beforehand, see `recovery.ts`. May be left out. */
  static async prepareRecovery(storeDir: string, runtimeDir: string): Promise<void> {
    await syncAhead(runtimeDir, new LayerFiles(storeDir, { sourceTimeoutMs: SOURCE_TIMEOUT_MS, onSourceDescriptor: () => undefined }));
  }

  static open(options: StoreOptions): Store {
    return new Store(options);
  }

  private constructor(options: StoreOptions) {
    this.options = options;
    this.meta = MetaStore.open(path.join(options.storeDir, 'offshoot.db'));
    this.emptyLog();
    this.sourceTimeoutMs = options.sourceTimeoutMs ?? SOURCE_TIMEOUT_MS;
    this.files = new LayerFiles(options.storeDir, {
      sourceTimeoutMs: this.sourceTimeoutMs, onSourceDescriptor: (layerId, fd) => { this.disks.sourceMoved(layerId, fd); },
    });
    this.files.prepare();
    this.replay = replayJournals(options.runtimeDir, this.meta, this.files);
    const journals = createJournals(options.runtimeDir, options.threads, storeIdOf(this.meta));
    const shared = createSharedState(options.mapChunks ?? chunksFor(os.totalmem()));
    this.boots = Array.from({ length: options.threads }, (_, thread) => ({ shared, thread, journalPath: journalPath(options.runtimeDir, thread) }));
    this.context = createThreadContext(this.threadBoot(0), options.door ?? realDoor, () => { this.committer.commitAllNow(); });
    this.committer = new Committer({
      meta: this.meta, shared: this.context.shared, journals,
      onFault: (layer, reason) => { this.faultNode(layer.nodeId, reason); },
      ...(options.onCommit === undefined ? {} : { onCommit: options.onCommit }),
    });
    this.disks = new OpenDisks({
      meta: this.meta, files: this.files, shared: this.context.shared, committer: this.committer, announcer: options.announcer,
      unrecordedFault: (nodeId) => this.unrecordedFaults.get(nodeId), quotaSlot: (nodeId) => this.quotas.slotOf(nodeId),
    });
    this.groupSeals = new GroupSeals({
      meta: this.meta, files: this.files, disks: this.disks, committer: this.committer, shared: this.context.shared,
      notePath: sealNotePath(options.runtimeDir, storeIdOf(this.meta)),
      syncClosed: (node) => { this.syncClosed(node); }, faultNode: (nodeId, reason) => { this.faultNode(nodeId, reason); },
    });
    this.quotas = new Quotas({ meta: this.meta, files: this.files, disks: this.disks, shared: this.context.shared, onChange: options.onQuota ?? (() => undefined) });
    this.data = new MainDataPath(this.context, this.disks, this.sourceTimeoutMs);
    this.reserve = new SpaceReserve(options.storeDir, this.context.shared, options.onFull);
    this.meta.beforeTransaction(() => { this.reserve.look(); });
    this.removeLeftovers();
  }

  /** Begins to commit and checkpoint by the clock. A failed commit was already turned into faults and errors for flushes. */
  startTimers(onError: (error: unknown) => void): void {
    this.timers.push(setInterval(() => {
      this.reserve.look();
      this.recordFaults();
      this.committer.commitAll().catch(onError);
    }, COMMIT_INTERVAL_MS));
    this.timers.push(setInterval(() => {
      try {
        this.meta.checkpoint({ idle: this.disks.count() === 0 });
      } catch (error) {
        onError(error);
      }
    }, CHECKPOINT_INTERVAL_MS));
    this.timers.push(setInterval(() => { this.quotas.look(); }, QUOTA_INTERVAL_MS));
    this.timers.push(setInterval(() => { this.files.lookAtSources(); }, SOURCE_LOOK_INTERVAL_MS));
    for (const timer of this.timers) timer.unref();
  }

  threadBoot(thread: number): ThreadBoot {
    const boot = this.boots[thread];
    if (boot === undefined) throw new Error(`the store was opened for ${this.boots.length} threads, there is no thread ${thread}`);
    return boot;
  }

  /** Makes everything acknowledged on the node durable. A closed one has nothing pending, but its last writes may be in the page cache. */
  async flush(nodeId: number): Promise<void> {
    const disk = this.disks.get(nodeId);
    if (disk !== undefined) {
      await this.committer.flush(disk);
      return;
    }
    const node = this.meta.nodes.byId(nodeId);
    if (node !== undefined) this.syncClosed(node);
  }

  /** fdatasync by the file's path. An error faults the disk, as it does when it is open: the next fdatasync would call lost pages durable. */
  syncClosed(node: NodeRow): void {
    const fault = this.disks.faultOf(node);
    if (fault !== null) throw new OffshootError('faulted', `the disk is faulted: ${fault}`, { nodeId: node.id });
    if (node.layerId === null) return;
    const failure = syncFile(this.files.storePath(node.layerId));
    if (failure === null) return;
    this.faultNode(node.id, failure.message);
    throw new OffshootError('faulted', `the disk is faulted now: ${failure.message}`, { nodeId: node.id }, failure);
  }

  /** Finishes at once what group seals have yet to commit: for whoever is about to change a disk or its layers, and cannot wait. */
  settleSeals(): void {
    for (const seal of this.committer.pendingSeals()) seal.settleNow();
  }

  clone(sourceId: number, targets: readonly CloneTarget[], options: CloneOptions): NodeRow[] {
    this.settleSeals();
    this.quotas.assertRoom(targets.map(({ parentId }) => parentId));
    return cloneNode(this, sourceId, targets, options);
  }

  /** Blocks of one disk become blocks of another, without data that moves: see range-clone.ts. */
  cloneRanges(sourceId: number, targetId: number, ranges: readonly CopyRange[], also?: () => void): void {
    this.settleSeals();
    cloneRanges(this, sourceId, targetId, ranges, also);
  }

  cloneRangesToNew(sourceId: number, node: Parameters<typeof cloneRangesToNew>[2], sizeBytes: number, ranges: readonly CopyRange[], also?: () => void): NodeRow {
    this.settleSeals();
    // A new name needs room, like any clone; blocks that come into a disk that is there take none.
    if (node.parentId !== null) this.quotas.assertRoom([node.parentId]);
    return cloneRangesToNew(this, sourceId, node, sizeBytes, ranges, also);
  }

  /** Changes the virtual size; see resize.ts for what a shrink means. */
  resize(nodeId: number, sizeBytes: number): void {
    this.settleSeals();
    const sources = this.sharedSources(nodeId);
    resizeDisk(this, nodeId, sizeBytes);
    const left = new Set(this.sharedSources(nodeId));
    const lost = sources.filter((id) => !left.has(id));
    if (lost.length === 0) return;
    // The open map still has their files.
    const disk = this.disks.get(nodeId);
    if (disk !== undefined) this.disks.rebuild(disk, 0, () => undefined);
    this.reclaim(lost);
  }

  /** Layers that the node's active layer shares extents with. */
  private sharedSources(nodeId: number): number[] {
    const layerId = this.meta.nodes.byId(nodeId)?.layerId ?? null;
    return layerId === null ? [] : this.meta.sharedExtents.sources(layerId);
  }

  /** Makes an empty, complete layer and its durable file. Inside the transaction that makes the node. */
  createEmptyLayer(): LayerRow {
    const layer = this.meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: 0, sealed: false,
      complete: true, createdUs: Date.now() * 1000,
    });
    this.files.create(layer.id, 0);
    return layer;
  }

  /** Takes away a node that has no name and no user, and what only it referred to. */
  discardNode(nodeId: number): void {
    this.discardNodes([nodeId]);
  }

  /** The same for several in one transaction; those that somebody uses stay. Gives the number of layers that went. */
  discardNodes(nodeIds: readonly number[]): number {
    this.settleSeals();
    for (const nodeId of nodeIds) this.disks.retireIdle(nodeId);
    const nodes = nodeIds.flatMap((nodeId) => (this.disks.isUsed(nodeId) ? [] : (this.meta.nodes.byId(nodeId) ?? [])));
    if (nodes.length === 0) return 0;
    return this.meta.transaction(() => {
      for (const node of nodes) this.meta.nodes.remove(node.id);
      return this.reclaim(nodes.flatMap((node) => node.layerId ?? []));
    });
  }

  /** Deletes layers that nothing refers to: all of them, or from those on that may have lost a reference. */
  reclaim(from?: readonly number[]): number {
    const count = reclaimLayers(this, from);
    // Whoever made room wants to write at once.
    if (count > 0) {
      this.meta.afterCommit(() => {
        this.reserve.look();
        this.quotas.lookSoon();
      });
    }
    return count;
  }

  /** A check of the metadata against the files, in steps between which other work may go on. */
  checkSteps(options: CheckOptions): Generator<CheckProgress, CheckReport, undefined> {
    return checkSteps(this, options);
  }

  /** Whether what needs room is refused, and what is kept back for metadata. */
  space(): { readonly isFull: boolean; readonly reservedBytes: number } {
    return this.reserve.state();
  }

  /**
   * A faulted disk is to be made well. What it had acknowledged and not committed is given up, in the journals too: with the
   * fault gone, a killed server's successor would believe them. `in-use` while somebody has the disk open.
   */
  async prepareToLift(nodeId: number): Promise<void> {
    this.closeFaulted(nodeId);
    const layerId = this.meta.nodes.byId(nodeId)?.layerId ?? null;
    if (layerId !== null) this.committer.forget(layerId, nodeId);
    await this.committer.commitAll();
  }

  /** The disk is well: everything that the database says of it is on the disk, which the caller has made sure of. */
  clearFault(nodeId: number): void {
    this.closeFaulted(nodeId);
    this.meta.nodes.update(nodeId, { fault: null });
    this.unrecordedFaults.delete(nodeId);
    forgetFault(this.options.runtimeDir, this.meta, nodeId);
  }

  private closeFaulted(nodeId: number): void {
    this.settleSeals();
    if (this.disks.isUsed(nodeId)) {
      throw new OffshootError('in-use', 'the disk is open: shut down what uses it first, because its content may change when its fault is lifted', { nodeId });
    }
    this.disks.retireIdle(nodeId);
  }

  /** Owned blocks of a node's active layer, exact: from the open map, or from the metadata. */
  ownedBlocks(node: NodeRow): number {
    const disk = this.disks.get(node.id);
    if (disk !== undefined) return countOwned(this.context.shared, disk);
    if (node.layerId === null) return 0;
    const layer = this.meta.layers.byId(node.layerId);
    if (layer?.complete === true) return Math.ceil(node.sizeBytes / BLOCK_BYTES);
    return Math.min(this.meta.ownership.ownedBlocks(node.layerId), Math.ceil(node.sizeBytes / BLOCK_BYTES));
  }

  /** Throws what is known to be wrong with a file that the node's chain uses where it lies. Never waits. */
  assertSourcesUsable(nodeId: number): void {
    for (const source of this.sourcesBelow(nodeId)) {
      try {
        source.assertUsable();
      } finally {
        this.files.closeSource(source);
      }
    }
  }

  private sourcesBelow(nodeId: number): ExternalSource[] {
    const layerId = this.meta.nodes.byId(nodeId)?.layerId ?? null;
    if (layerId === null) return [];
    return layersBelow(this.meta, layerId).filter((layer) => layer.kind === 'external').map((layer) => this.files.sourceOf(layer));
  }

  /**
   * The disk owns every block: notes it, so that its backing is never consulted again, forgets the map, and gives back what only it read through. Everything
   * was flushed by the caller. `busy` when some block is still un-owned.
   */
  markComplete(nodeId: number): void {
    this.settleSeals();
    const disk = this.disks.get(nodeId);
    if (disk === undefined) throw new Error(`node ${nodeId} is not open`);
    const blocks = Math.ceil(disk.shared.sizeBytes() / BLOCK_BYTES);
    const backingId = this.meta.layers.byId(disk.layerId)?.backingId ?? null;
    const needed = [...(backingId === null ? [] : [backingId]), ...this.meta.sharedExtents.sources(disk.layerId)];
    this.disks.rebuild(disk, 0, () => {
      if (countOwned(this.context.shared, disk) < blocks) throw new OffshootError('busy', 'the disk does not own all of its blocks yet', { nodeId });
      this.meta.transaction(() => {
        this.meta.layers.update(disk.layerId, { complete: true, sizeBytes: disk.shared.sizeBytes() });
        this.meta.ownership.clear(disk.layerId);
        this.meta.sharedExtents.clear(disk.layerId);
      });
    });
    // What only this disk read through. A transaction of its own, after the rebuild: the disk has let go of its chain.
    if (needed.length > 0) this.reclaim(needed);
  }

  /** The disk owns every block: what it stood on is not even noted any more. `busy` when it does not. */
  detach(nodeId: number): void {
    const layer = this.meta.layers.byId(this.meta.nodes.byId(nodeId)?.layerId ?? 0);
    if (layer?.complete !== true) throw new OffshootError('busy', 'the disk does not own all of its blocks yet', { nodeId });
    const { id, backingId } = layer;
    if (backingId === null) return;
    this.meta.transaction(() => {
      this.meta.layers.clearBacking(id);
      this.reclaim([backingId]);
    });
  }

  /** The clone becomes the source of the disk that it was cloned from, and of everybody else on the layers that they share. */
  promote(nodeId: number): Promoted {
    this.settleSeals();
    return promoteNode(this.meta, nodeId);
  }

  /** A closed clone gets another image to stand on; see rebase.ts for what a conflict is. */
  async rebase(nodeId: number, imageId: number, force: boolean): Promise<RebaseOutcome> {
    return await rebaseNode(this, nodeId, imageId, force);
  }

  /** Puts what `copyMerged` made of two sealed layers in their place; `file` is null when there was nothing to copy. */
  merge(pair: MergePair, file: string | null): LayerRow {
    // What is being sealed may stand on one of the two.
    this.settleSeals();
    const merged = commitMerge(this, pair, file);
    this.reserve.look();
    return merged;
  }

  /** Commits everything and closes; the journals go, because nothing is left in them. */
  async close(): Promise<void> {
    for (const timer of this.timers) clearInterval(timer);
    await this.committer.commitAll();
    this.disks.closeAll();
    this.files.closeAll();
    this.meta.checkpoint({ idle: true });
    this.meta.close();
    this.reserve.close();
    removeJournals(this.options.runtimeDir);
  }

  /** The node's disk takes no more writes, in this process and in the next ones. */
  faultNode(nodeId: number, reason: string): void {
    const disk: OpenDisk | undefined = this.disks.get(nodeId);
    disk?.shared.setState(STATE_FAULTED);
    this.options.onFault(nodeId, reason);
    // The database may lie on the same dying device. What is on tmpfs survives this process, and the next one heeds it
    // before it believes a journal.
    noteFault(this.options.runtimeDir, this.meta, nodeId, reason);
    this.unrecordedFaults.set(nodeId, reason);
    this.recordFaults();
  }

  /** Writes down which disks are faulted; what cannot be written now is tried again by the clock. */
  private recordFaults(): void {
    for (const [nodeId, reason] of this.unrecordedFaults) {
      try {
        if (this.meta.nodes.byId(nodeId) !== undefined) this.meta.nodes.update(nodeId, { fault: reason });
      } catch (thrown) {
        if (toOffshootError(thrown).kind === 'internal') throw thrown;
        continue;
      }
      this.unrecordedFaults.delete(nodeId);
      forgetFault(this.options.runtimeDir, this.meta, nodeId);
    }
  }

  /**
   * The last process may have ended because it could not flush its log. What recovery read of it came from the page cache, and
   * commits behind it would be lost with it: so all of it goes into the database file first. On a full store that waits.
   */
  private emptyLog(): void {
    try {
      this.meta.checkpoint({ idle: true });
    } catch (thrown) {
      if (toOffshootError(thrown).kind !== 'no-space') throw thrown;
    }
  }

  /** What a crash may have left: temporary files of imports, layers whose node is gone. */
  private removeLeftovers(): void {
    const importDir = path.join(this.options.storeDir, 'import');
    fs.rmSync(importDir, { recursive: true, force: true });
    fs.mkdirSync(importDir, { mode: 0o700 });
    syncDirectory(this.options.storeDir);
    for (const layerId of this.meta.sharedExtents.sharingLayers()) if (this.meta.layers.byId(layerId)?.sealed === false) trimShared(this.meta, layerId);
    this.reclaim();
  }
}

/** Negative errno of a data-path call as an error. */
export function dataError(code: number, what: string, context: Readonly<Record<string, string | number>>): OffshootError {
  const errno = -code;
  const kind = errno === errnoOf['no-space'] || errno === 122 ? 'no-space' : errno === errnoOf['too-large'] ? 'too-large' : 'io-error';
  return new OffshootError(kind, `${what} failed with errno ${errno}`, context);
}
