/**
 * The committer: makes acknowledged writes durable, and the facts about them.
 *
 * Runs in the main thread; waits for the disk in libuv's thread pool. The journals of all threads are the set of first
 * touches that are not committed yet. A commit has two phases, and its order is law:
 *
 *   1. freeze: drain the journals; what was drained for the layers concerned is the frozen set
 *   2. fdatasync the file of every layer in it. A failure faults the disk: its set is not committed, and the sync is
 *      never tried again as if nothing had happened
 *   3. one transaction writes exactly the frozen set. What was drained since belongs to the next commit: its data may not
 *      be on the disk yet
 *   4. when everything that was drained is committed, the journals' heads move on
 *   5. replies
 *
 * An error of fdatasync is told once, to whoever asks first. So the syncs of one file run one after another, and those who ask
 * while one runs share the next; what fails faults the disk before anybody hears of a success; and this thread, which cannot
 * wait for the pool, syncs through a descriptor of its own.
 *
 * Flushes of several disks that wait at the same time share one transaction. A flush of a disk with nothing newly owned is
 * one fdatasync and no SQLite at all. Between flushes a timer commits everything about once a second, because the host's
 * own sync never reaches this file system.
 */
import fs from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';

import { OffshootError, toOffshootError } from './errors.js';
import { JOURNAL_CAPACITY, JOURNAL_OWN, type JournalReader } from './hot/journal.js';
import type { SharedState } from './hot/shared-state.js';
import type { MetaStore } from './meta/meta-store.js';
import type { BlockRun } from './meta/rows.js';

/** What the committer must know of a layer that is being written. */
export interface ActiveLayer {
  readonly nodeId: number;
  readonly layerId: number;
  /** For syncs in this thread. */
  readonly fd: number;
  /** The same file, opened for itself: for syncs in the thread pool. */
  readonly syncFd: number;
  /** Keeps both open until its result is called. */
  hold(): () => void;
  /** The disk's last modification, to be kept with the commit; milliseconds. */
  mtimeMs(): number;
}

export interface CommitterOptions {
  readonly meta: MetaStore;
  readonly shared: SharedState;
  /** The thread that each reader belongs to. */
  readonly journals: ReadonlyMap<number, JournalReader>;
  /** An fdatasync or commit for the layer failed: its disk takes no more writes. */
  readonly onFault: (layer: ActiveLayer, reason: string) => void;
  /** A round has ended; `isWhole`: everything in it was committed. */
  readonly onCommit?: (durationMs: number, isWhole: boolean) => void;
}

const BUSY_RETRY_MS = 50;

/**
 * Layers that were sealed at one instant, whose seal no commit has written yet (`seal-group.ts`). Until then nothing of these disks is
 * committed, or said to be durable, by anybody else: the database still has them on the layer below.
 */
export interface PendingSeal {
  /** Resolves when it is committed; rejects with why it cannot be now, and is asked again. */
  settle(): Promise<void>;
  /** The same before it returns, for who cannot wait. */
  settleNow(): void;
}

interface Waiting {
  readonly layer: ActiveLayer;
  readonly resolve: () => void;
  readonly reject: (reason: OffshootError) => void;
}

interface Frozen {
  readonly layer: ActiveLayer;
  readonly runs: readonly BlockRun[];
  readonly sizeBytes: number | undefined;
  /** Somebody who could not wait has synced and written this set meanwhile. */
  written: boolean;
}

/** An fdatasync in the thread pool, and the one that begins when it has ended. */
interface Sync {
  readonly result: Promise<OffshootError | null>;
  next: Promise<OffshootError | null> | null;
}

export class Committer {
  private readonly options: CommitterOptions;
  private readonly active = new Map<number, ActiveLayer>();
  private readonly activeByNode = new Map<number, ActiveLayer>();
  private readonly pendingRuns = new Map<number, BlockRun[]>();
  private readonly pendingSizes = new Map<number, number>();
  private readonly inFlight = new Map<number, Frozen>();
  private readonly syncs = new Map<ActiveLayer, Sync>();
  /** By node: a fault outlives the layer that it happened to. */
  private readonly faulted = new Set<number>();
  /** By node. */
  private readonly seals = new Map<number, PendingSeal>();
  private readonly unsettled = new Set<PendingSeal>();
  private waiting: Waiting[] = [];
  private waitingForAll: { resolve: () => void; reject: (reason: OffshootError) => void }[] = [];
  private isRunning = false;
  private drainedSinceHead = false;

  constructor(options: CommitterOptions) {
    this.options = options;
  }

  /** A disk was opened, or its active layer was exchanged. `isFaulted`: it was faulted before it was opened, and stays so. */
  register(layer: ActiveLayer, isFaulted = false): void {
    this.active.set(layer.layerId, layer);
    this.activeByNode.set(layer.nodeId, layer);
    if (isFaulted) this.faulted.add(layer.nodeId);
  }

  /** The layer takes no more writes. Its pending set must have been committed. */
  unregister(layer: ActiveLayer): void {
    if (this.activeByNode.get(layer.nodeId) === layer) {
      this.activeByNode.delete(layer.nodeId);
      this.faulted.delete(layer.nodeId);
    }
    if (this.active.get(layer.layerId) === layer) this.active.delete(layer.layerId);
  }

  /** The seal was made, and is not committed. */
  addSeal(seal: PendingSeal): void {
    this.unsettled.add(seal);
  }

  removeSeal(seal: PendingSeal): void {
    this.unsettled.delete(seal);
  }

  /** The disk writes to `next` from now on, and the database does not know it until `endSeal`. The layer before stays registered until then. */
  beginSeal(next: ActiveLayer, seal: PendingSeal): void {
    this.register(next);
    this.seals.set(next.nodeId, seal);
  }

  /** The seal of `before` is committed, or was given up with its disk. */
  endSeal(before: ActiveLayer): void {
    this.seals.delete(before.nodeId);
    this.unregister(before);
  }

  /** Seals that are not committed yet. */
  pendingSeals(): PendingSeal[] {
    return [...this.unsettled];
  }

  /** First touches of the layer that no commit has written, what a round has in flight among them. Everything was drained. */
  hasPendingRuns(layerId: number): boolean {
    return this.pendingRuns.has(layerId) || (this.inFlight.get(layerId)?.runs.length ?? 0) > 0;
  }

  /** For the seal that is about to be committed: writes what is pending of the layers, which were synced, and `also`, in one transaction. */
  commitSealed(layers: readonly ActiveLayer[], also: () => void): void {
    this.drain();
    const inFlight = layers.map((layer) => this.inFlight.get(layer.layerId)).filter((entry) => entry !== undefined && !entry.written) as Frozen[];
    const frozen = layers.map((layer): Frozen => {
      const runs = this.pendingRuns.get(layer.layerId) ?? [];
      this.pendingRuns.delete(layer.layerId);
      // The size is the seal's to say: what is pending of it may be newer.
      return { layer, runs, sizeBytes: undefined, written: false };
    });
    this.writeFrozen([...inFlight, ...frozen], also);
    for (const entry of inFlight) entry.written = true;
  }

  /** What a faulted disk had not committed is given up: its blocks are what the last commit says. The disk must be closed. */
  forget(layerId: number, nodeId: number): void {
    if (this.active.has(layerId)) throw new Error(`layer ${layerId} is open, so what it has pending cannot be given up`);
    this.drain();
    this.pendingRuns.delete(layerId);
    this.pendingSizes.delete(nodeId);
  }

  /** Takes what the journals hold into the pending set. */
  drain(): void {
    for (const [thread, reader] of this.options.journals) {
      reader.drain(this.options.shared.journalTail(thread), (operation, id, value, count) => {
        this.drainedSinceHead = true;
        if (operation === JOURNAL_OWN) {
          const runs = this.pendingRuns.get(id);
          if (runs === undefined) this.pendingRuns.set(id, [{ block: value, count }]);
          else runs.push({ block: value, count });
        } else {
          this.pendingSizes.set(id, Math.max(value, this.pendingSizes.get(id) ?? 0));
        }
      });
    }
  }

  /** True when the layer has first touches or a new size that no commit has written. */
  isPending(layer: ActiveLayer): boolean {
    this.drain();
    return this.pendingRuns.has(layer.layerId) || this.pendingSizes.has(layer.nodeId) || this.inFlight.has(layer.layerId) || this.seals.has(layer.nodeId);
  }

  /** Everything acknowledged on this disk before the call is durable when the promise resolves. */
  async flush(layer: ActiveLayer): Promise<void> {
    if (this.faulted.has(layer.nodeId)) throw faultError(layer);
    if (!this.isPending(layer)) {
      const failure = await this.sync(layer);
      if (failure !== null) throw failure;
      return;
    }
    await new Promise<void>((resolve, reject) => {
      this.waiting.push({ layer, resolve, reject });
      this.kick();
    });
  }

  /** Commits everything; used by the timer, when a journal fills up, and before the server ends. */
  async commitAll(): Promise<void> {
    // Without seals in the turn of the call: what comes after it belongs to the next commit.
    if (this.unsettled.size > 0) await Promise.all(this.pendingSeals().map(async (seal) => { await seal.settle(); }));
    this.drain();
    if (!this.drainedSinceHead) return;
    await new Promise<void>((resolve, reject) => {
      this.waitingForAll.push({ resolve, reject });
      this.kick();
    });
  }

  /**
   * Commits one layer's pending set before it returns: for operations behind a closed gate. What a round has in flight
   * for the layer is committed with it, because the caller cannot wait for the round.
   */
  commitLayerNow(layer: ActiveLayer): void {
    this.seals.get(layer.nodeId)?.settleNow();
    this.drain();
    if (this.faulted.has(layer.nodeId)) throw faultError(layer);
    const inFlight = this.inFlight.get(layer.layerId);
    const frozen = this.freeze([layer]);
    if (inFlight !== undefined && !inFlight.written) frozen.unshift(inFlight);
    this.syncNow(layer);
    this.writeFrozen(frozen);
    if (inFlight !== undefined) inFlight.written = true;
  }

  /** The file is durable when this returns; an error faults the disk. For operations behind a closed gate. */
  syncNow(layer: ActiveLayer): void {
    try {
      fs.fdatasyncSync(layer.fd);
    } catch (error) {
      const failure = toOffshootError(error);
      this.fault(layer, failure);
      throw faultError(layer, failure);
    }
  }

  /** The same for everything; the main thread's own journal may be full, and nobody else can empty it. */
  commitAllNow(): void {
    for (const seal of this.pendingSeals()) seal.settleNow();
    this.drain();
    const heads = this.positions();
    const pending = [...this.active.values()].filter((layer) =>
      !this.faulted.has(layer.nodeId) && (this.pendingRuns.has(layer.layerId) || this.pendingSizes.has(layer.nodeId)));
    // What a round has in flight is done here as well: the round cannot go on before this thread does.
    const frozen = [...[...this.inFlight.values()].filter((entry) => !entry.written && !this.faulted.has(entry.layer.nodeId)), ...this.freeze(pending)];
    const healthy = frozen.filter((entry) => {
      try {
        this.syncNow(entry.layer);
        return true;
      } catch {
        // Its disk is faulted, and says so to whoever asks.
        return false;
      }
    });
    this.writeFrozen(healthy);
    for (const entry of healthy) entry.written = true;
    this.moveHeads(heads);
  }

  private kick(): void {
    if (this.isRunning) return;
    this.isRunning = true;
    // Every round handles its own errors; what gets here is a programmer error, and the process must end with it.
    this.rounds().catch((error: unknown) => {
      queueMicrotask(() => {
        throw error;
      });
    });
  }

  private async rounds(): Promise<void> {
    while (this.waiting.length > 0 || this.waitingForAll.length > 0) {
      const waiting = this.waiting;
      const all = this.waitingForAll;
      this.waiting = [];
      this.waitingForAll = [];
      await this.round(waiting, all);
    }
    // In the same turn as the look above: whoever comes to wait later must begin a round of its own.
    this.isRunning = false;
  }

  private async round(asked: readonly Waiting[], all: readonly { resolve: () => void; reject: (reason: OffshootError) => void }[]): Promise<void> {
    const startedMs = performance.now();
    // Step 1.
    this.drain();
    const heads = this.positions();
    const waiting = this.withoutSealing(asked);
    // A disk whose active layer was exchanged while its flush waited was synced and committed by whoever exchanged it; its
    // descriptor is closed.
    const current = waiting.filter((entry) => this.active.get(entry.layer.layerId) === entry.layer);
    const layers = new Set(current.map((entry) => entry.layer));
    if (all.length > 0) {
      for (const layer of this.active.values()) {
        if (this.seals.has(layer.nodeId)) continue;
        if (this.pendingRuns.has(layer.layerId) || this.pendingSizes.has(layer.nodeId)) layers.add(layer);
      }
    }
    const frozen = this.freeze([...layers]);
    for (const entry of frozen) this.inFlight.set(entry.layer.layerId, entry);
    // Step 2.
    const failures = new Map<ActiveLayer, OffshootError>();
    await Promise.all(frozen.map(async (entry) => {
      const failure = await this.sync(entry.layer);
      if (failure !== null) failures.set(entry.layer, failure);
    }));
    // Step 3.
    const healthy = frozen.filter((entry) => !failures.has(entry.layer) && !entry.written);
    let commitFailure: OffshootError | null = null;
    try {
      this.writeFrozen(healthy);
    } catch (error) {
      commitFailure = toOffshootError(error);
      if (commitFailure.kind === 'internal') throw error;
      if (!isPassing(commitFailure)) {
        for (const entry of healthy) this.fault(entry.layer, commitFailure);
      }
    }
    for (const entry of frozen) this.inFlight.delete(entry.layer.layerId);
    // Step 4.
    if (all.length > 0 && commitFailure === null) this.moveHeads(heads);
    this.options.onCommit?.(performance.now() - startedMs, commitFailure === null && failures.size === 0);
    // Step 5.
    for (const entry of waiting) {
      const failed = failures.get(entry.layer);
      if (failed !== undefined) entry.reject(failed);
      else if (commitFailure === null || !current.includes(entry)) entry.resolve();
      else if (commitFailure.kind === 'busy') this.waiting.push(entry);
      else entry.reject(commitFailure.kind === 'no-space' ? commitFailure : faultError(entry.layer, commitFailure));
    }
    for (const entry of all) {
      if (commitFailure === null) entry.resolve();
      else entry.reject(commitFailure);
    }
    // Somebody else has the database: a flush waits for it, as long as it takes.
    if (commitFailure?.kind === 'busy') await delay(BUSY_RETRY_MS);
  }

  /** Those who wait for a disk whose seal is not committed yet wait for that first, and come back then. */
  private withoutSealing(waiting: readonly Waiting[]): Waiting[] {
    return waiting.filter((entry) => {
      const seal = this.seals.get(entry.layer.nodeId);
      if (seal === undefined) return true;
      seal.settle().then(() => {
        this.waiting.push(entry);
        this.kick();
      }, (thrown: unknown) => { entry.reject(toOffshootError(thrown)); });
      return false;
    });
  }

  /**
   * Null when everything that was written to the layer's file before this call is on the disk and the disk is not faulted;
   * `faulted` otherwise. A sync that runs already may have begun before the last of those writes, so the next one counts.
   */
  async sync(layer: ActiveLayer): Promise<OffshootError | null> {
    if (this.faulted.has(layer.nodeId)) return faultError(layer);
    const running = this.syncs.get(layer);
    if (running === undefined) return await this.beginSync(layer);
    running.next ??= running.result.then(async (failure) => failure ?? await this.beginSync(layer));
    return await running.next;
  }

  private async beginSync(layer: ActiveLayer): Promise<OffshootError | null> {
    const letGo = layer.hold();
    const sync: Sync = {
      result: fdatasync(layer.syncFd).then((failure) => {
        letGo();
        if (failure !== null) this.fault(layer, failure);
        if (this.syncs.get(layer) === sync && (sync.next === null || failure !== null)) this.syncs.delete(layer);
        if (failure !== null) return faultError(layer, failure);
        // Through the other descriptor somebody may have heard of an error meanwhile.
        return this.faulted.has(layer.nodeId) ? faultError(layer) : null;
      }),
      next: null,
    };
    this.syncs.set(layer, sync);
    return await sync.result;
  }

  private freeze(layers: readonly ActiveLayer[]): Frozen[] {
    return layers.map((layer) => {
      const runs = this.pendingRuns.get(layer.layerId) ?? [];
      const sizeBytes = this.pendingSizes.get(layer.nodeId);
      this.pendingRuns.delete(layer.layerId);
      this.pendingSizes.delete(layer.nodeId);
      return { layer, runs, sizeBytes, written: false };
    });
  }

  /** Writes a frozen set whose data is on the disk. When that fails the set is pending again. */
  private writeFrozen(frozen: readonly Frozen[], also?: () => void): void {
    const { meta } = this.options;
    const changed = frozen.filter((entry) => entry.runs.length > 0 || entry.sizeBytes !== undefined);
    if (changed.length === 0 && also === undefined) return;
    try {
      meta.transaction(() => {
        for (const { layer, runs, sizeBytes } of changed) {
          if (runs.length > 0) meta.ownership.add(layer.layerId, runs);
          if (meta.nodes.byId(layer.nodeId) === undefined) continue;
          meta.nodes.written(layer.nodeId, layer.mtimeMs(), sizeBytes);
        }
        also?.();
      });
    } catch (error) {
      for (const { layer, runs, sizeBytes } of changed) {
        if (runs.length > 0) this.pendingRuns.set(layer.layerId, [...runs, ...(this.pendingRuns.get(layer.layerId) ?? [])]);
        if (sizeBytes !== undefined) this.pendingSizes.set(layer.nodeId, Math.max(sizeBytes, this.pendingSizes.get(layer.nodeId) ?? 0));
      }
      throw error;
    }
  }

  private positions(): Map<number, number> {
    const positions = new Map<number, number>();
    for (const [thread, reader] of this.options.journals) positions.set(thread, reader.position());
    return positions;
  }

  /** Everything up to these positions is committed, or belongs to disks that are faulted or gone. */
  private moveHeads(positions: ReadonlyMap<number, number>): void {
    // What a seal has yet to commit is behind some of these positions.
    if (this.seals.size > 0) return;
    // Records of layers that nobody has open any more have no disk to wait for.
    for (const layerId of [...this.pendingRuns.keys()]) {
      if (!this.active.has(layerId)) this.pendingRuns.delete(layerId);
    }
    for (const nodeId of [...this.pendingSizes.keys()]) {
      if (!this.activeByNode.has(nodeId)) this.pendingSizes.delete(nodeId);
    }
    const { journals, shared } = this.options;
    for (const [thread, position] of positions) {
      // Never back: whoever could not wait for a round may have moved the head on since the round began, and what lies before
      // it may be overwritten by now.
      if (((position - shared.journalHead(thread)) >>> 0) > JOURNAL_CAPACITY) continue;
      journals.get(thread)?.commit(position);
      shared.publishJournalHead(thread, position);
    }
    this.drain();
    // Not only what is pending: what others committed meanwhile takes room in the rings until the heads move again.
    this.drainedSinceHead = [...journals].some(([thread, reader]) => reader.position() !== shared.journalHead(thread));
  }

  /** From now on it takes no writes and no flush. */
  fault(layer: ActiveLayer, failure: OffshootError): void {
    if (this.faulted.has(layer.nodeId)) return;
    // Of a disk that is closed by now nothing is kept here, but it is written down.
    if (this.activeByNode.has(layer.nodeId)) this.faulted.add(layer.nodeId);
    this.options.onFault(layer, failure.message);
  }
}

/** True for failures that pass by themselves: nothing is lost, what was frozen is pending again. */
function isPassing(error: OffshootError): boolean {
  return error.kind === 'no-space' || error.kind === 'busy';
}

function faultError(layer: ActiveLayer, cause?: OffshootError): OffshootError {
  return new OffshootError('faulted', 'the disk is faulted: making its data durable failed; see `offshoot show` for the reason',
    { nodeId: layer.nodeId, layerId: layer.layerId }, cause);
}

/** Null when everything written to the file is on the disk. */
async function fdatasync(fd: number): Promise<OffshootError | null> {
  return new Promise((resolve) => {
    fs.fdatasync(fd, (error) => {
      resolve(error === null ? null : toOffshootError(error));
    });
  });
}
