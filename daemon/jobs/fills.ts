/**
 * Fills: background copying of what a clone does not own yet, as persisted jobs.
 *
 * Main thread. A fill's state is a row of the job table, so that it goes on after a restart; how far it is, the block map
 * says. The copying itself is the fill worker's; what it cannot read directly is fetched for it here. A source that is away, changed or
 * silent does not end a fill: it says what it waits for, and goes on when the source is back. A fill that reached the end of its disk is flushed, then the layer is
 * marked complete, and only then does the job say so: from there on the clone needs its source no more.
 */
import { Worker } from 'node:worker_threads';

import { Errno, OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { ThreadBoot } from '../../blockstore/hot/thread-context.js';
import type { DiskHandles } from '../../blockstore/hot/block-map.js';
import { HAND_OVER } from '../../blockstore/hot/context.js';
import type { JobRow, JobState, NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { unownedDataBytes } from '../../blockstore/unowned-data.js';
import type { OpenDisk } from '../../blockstore/open-disks.js';
import { inSteps } from './steps.js';
import { FILL_PAUSE, FILL_RUN, type FillOrder, type FillReport, type FillSource, type FillWorkerData } from './fill-messages.js';

/** The part of a pino logger that is used here. */
export interface JobLogger {
  info(context: object, message: string): void;
  warn(context: object, message: string): void;
}

export interface FillState {
  readonly job: JobRow;
  readonly doneBytes: number;
  readonly totalBytes: number;
  /** The limit; null: none. */
  readonly rateBytesPerSecond: number | null;
  readonly currentBytesPerSecond: number;
}

interface Progress {
  /** Source data that was owned when this server began to fill; null: the source is too fragmented to say how much there is. */
  readonly doneBeforeBytes: number | null;
  atMs: number;
  copiedBytes: number;
  bytesPerSecond: number;
  /** Times in a row that the source did not give what was asked for. */
  stalls: number;
  retry: NodeJS.Timeout | null;
}

const JOB_KIND = 'fill';
const SAMPLE_MS = 500;
/** How long a fill rests before it asks again a source that is away: doubles each time. */
const RETRY_MS_MIN = 500;
const RETRY_MS_MAX = 10_000;

export class Fills {
  private readonly store: Store;
  private readonly logger: JobLogger;
  private readonly onFatal: (error: Error) => void;
  private readonly boot: ThreadBoot;
  /** Started with the first fill, or by `prepare`: a start of the daemon does not wait for a thread that guests do not need. */
  private worker: Worker | null = null;
  /** Fills that the worker has: each holds its disk open. */
  private readonly active = new Map<number, Progress>();
  private closing = false;
  /** Bytes that fills have copied which are no longer active. */
  private copiedBeforeBytes = 0;

  constructor(options: { readonly store: Store; readonly boot: ThreadBoot; readonly logger: JobLogger; readonly onFatal: (error: Error) => void }) {
    this.store = options.store;
    this.logger = options.logger;
    this.onFatal = options.onFatal;
    this.boot = options.boot;
  }

  /** Starts the thread that fills, when there is time for it. */
  prepare(): void {
    if (!this.closing) this.thread();
  }

  /** Goes on with the fills that were running when the last server ended. */
  resumeAll(): void {
    this.beginInSteps(this.store.meta.jobs.list({ states: ['running'], kind: JOB_KIND }));
  }

  /** Starts the fills of disks that were just made. They are written down when this returns, and begin one after another. */
  startAll(nodes: readonly NodeRow[]): void {
    const nowUs = Date.now() * 1000;
    this.beginInSteps(this.store.meta.transaction(() => nodes.map((node) => this.store.meta.jobs.insert({
      kind: JOB_KIND, nodeId: node.id, state: 'running', parameters: { rateBytesPerSecond: null }, progressDone: 0, progressTotal: 0, message: null, createdUs: nowUs, updatedUs: nowUs,
    }))));
  }

  /** Each opens its disk, which takes a while when there are many: guests are served in between. */
  private beginInSteps(jobs: readonly JobRow[]): void {
    const beginIfWanted = ({ id }: JobRow): void => {
      // It may have been paused, cancelled or begun meanwhile.
      const job = this.store.meta.jobs.byId(id);
      if (job?.state !== 'running' || (job.nodeId !== null && this.active.has(job.nodeId))) return;
      const node = job.nodeId === null ? undefined : this.store.meta.nodes.byId(job.nodeId);
      if (node === undefined) this.setState(job.id, 'cancelled', 'the disk was removed');
      else this.begin(node, job);
    };
    inSteps(jobs, (batch) => { for (const job of batch) beginIfWanted(job); }, () => !this.closing)
      .catch((error: unknown) => { this.onFatal(error instanceof Error ? error : new Error(String(error))); });
  }

  /** A disk that is being filled was rebuilt: the worker needs the new handles. */
  opened(handles: DiskHandles): void {
    // The disk that has these handles takes its place among the open ones when this turn is over.
    if (this.active.has(handles.nodeId)) setImmediate(() => { this.startAgain(handles); });
  }

  /** Starts a fill, or goes on with a paused one; a running one gets the new rate. `flatten`: at its end the disk drops its backing. */
  start(node: NodeRow, rateBytesPerSecond: number | null, flatten = false): FillState {
    const latest = this.store.meta.jobs.latestFor(node.id, JOB_KIND);
    if (latest !== undefined && (latest.state === 'running' || latest.state === 'paused')) return this.resume(node, rateBytesPerSecond, flatten);
    const nowUs = Date.now() * 1000;
    const complete = this.isComplete(node);
    const job = this.store.meta.jobs.insert({
      kind: JOB_KIND, nodeId: node.id, state: complete ? 'completed' : 'running', parameters: { rateBytesPerSecond, flatten },
      progressDone: 0, progressTotal: 0, message: complete ? 'the disk owned all of its blocks already' : null,
      createdUs: nowUs, updatedUs: nowUs,
    });
    if (!complete) this.begin(node, job);
    else if (flatten) this.store.detach(node.id);
    return this.status(node);
  }

  pause(node: NodeRow): FillState {
    const job = this.require(node);
    if (job.state !== 'running' && job.state !== 'paused') throw new OffshootError('invalid-argument', `the fill is ${job.state}: there is nothing to pause`);
    if (job.state === 'running') {
      this.store.disks.get(node.id)?.shared.setFillCommand(FILL_PAUSE);
      this.store.meta.jobs.update(job.id, { progressDone: this.progress(node, job).doneBytes });
      this.setState(job.id, 'paused', null);
    }
    return this.status(node);
  }

  /** `undefined`: the rate stays as it is. */
  resume(node: NodeRow, rateBytesPerSecond: number | null | undefined, flatten = false): FillState {
    const job = this.require(node);
    if (job.state !== 'running' && job.state !== 'paused') throw new OffshootError('invalid-argument', `the fill is ${job.state}: start a new one with \`offshoot fill start\``);
    const rate = rateBytesPerSecond === undefined ? rateOf(job) : rateBytesPerSecond;
    const parameters = { rateBytesPerSecond: rate, flatten: flatten || isFlatten(job) };
    this.store.meta.jobs.update(job.id, { state: 'running', parameters, updatedUs: Date.now() * 1000 });
    const disk = this.active.has(node.id) ? this.store.disks.get(node.id) : undefined;
    if (disk === undefined) {
      this.begin(node, { ...job, parameters });
    } else {
      disk.shared.setFillRateBytes(rate ?? 0);
      disk.shared.setFillCommand(FILL_RUN);
    }
    return this.status(node);
  }

  /** `not-found` when the disk was never filled. */
  status(node: NodeRow): FillState {
    const job = this.require(node);
    return { job, ...this.progress(node, job), rateBytesPerSecond: rateOf(job), currentBytesPerSecond: job.state === 'running' ? this.sample(node.id) : 0 };
  }

  latest(node: NodeRow): FillState | null {
    return this.store.meta.jobs.latestFor(node.id, JOB_KIND) === undefined ? null : this.status(node);
  }

  /** The disk is going away, or somebody wants its fill to end. */
  cancel(nodeId: number, reason: string): void {
    const job = this.store.meta.jobs.latestFor(nodeId, JOB_KIND);
    if (job !== undefined && (job.state === 'running' || job.state === 'paused')) this.setState(job.id, 'cancelled', reason);
    this.letGo(nodeId);
  }

  /** Bytes that fills have copied since this server began. */
  copiedBytesTotal(): number {
    let sum = this.copiedBeforeBytes;
    for (const nodeId of this.active.keys()) sum += this.store.disks.get(nodeId)?.shared.fillCopiedBytes() ?? 0;
    return sum;
  }

  async close(): Promise<void> {
    this.closing = true;
    for (const nodeId of [...this.active.keys()]) this.letGo(nodeId);
    await this.worker?.terminate();
  }

  private begin(node: NodeRow, job: JobRow): void {
    let handles: DiskHandles;
    try {
      let disk = this.store.disks.acquire(node.id);
      // A file that grew may have a map that is too small for its blocks.
      if (disk.shared.sizeBytes() > disk.shared.capacityBlocks * BLOCK_BYTES) disk = this.store.disks.rebuild(disk, 2 * disk.shared.sizeBytes(), () => undefined);
      disk.shared.setFillRateBytes(rateOf(job) ?? 0);
      disk.shared.setFillCopiedBytes(0);
      disk.shared.setFillCommand(FILL_RUN);
      handles = disk.shared.handles;
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      this.markFailed(job, error);
      return;
    }
    const remainingBytes = unownedDataBytes(this.store, node);
    const totalBytes = remainingBytes === null ? 0 : Math.max(job.progressTotal, remainingBytes);
    this.store.meta.jobs.update(job.id, { progressTotal: totalBytes });
    this.active.set(node.id, {
      doneBeforeBytes: remainingBytes === null ? null : totalBytes - remainingBytes, atMs: performance.now(), copiedBytes: 0, bytesPerSecond: 0, stalls: 0, retry: null,
    });
    this.startAgain(handles);
    this.logger.info({ disk: this.store.meta.nodes.pathOf(node.id), jobId: job.id }, 'fill started');
  }

  private take(message: FillReport): void {
    if (message.type === 'commit-wanted') {
      this.store.committer.commitAll().catch((error: unknown) => {
        this.logger.warn({ error: toOffshootError(error).message }, 'a commit failed');
      });
      return;
    }
    // A report from before the disk was rebuilt or its fill was cancelled says nothing about it now.
    if (!this.active.has(message.nodeId) || this.store.disks.get(message.nodeId)?.shared.serial !== message.serial) return;
    if (message.type === 'failed' && message.errno === -HAND_OVER) {
      const disk = this.store.disks.get(message.nodeId);
      // `opened` starts the new instance.
      if (disk !== undefined) this.store.disks.rebuild(disk, 2 * disk.shared.sizeBytes(), () => undefined);
      return;
    }
    if (message.type === 'fetch') {
      void this.fetch(message);
      return;
    }
    if (message.type === 'failed' && message.errno === Errno.ESTALE) {
      this.stall(message.nodeId, message.serial, this.problemOf(message.nodeId) ?? 'its source changed while it was read');
      return;
    }
    if (message.type === 'failed') {
      const isRefused = message.errno === Errno.ENOSPC || message.errno === Errno.EDQUOT;
      const quota = isRefused && !this.store.space().isFull ? this.store.quotas.refusalOf(message.nodeId) : null;
      this.fail(message.nodeId, quota !== null
        ? new OffshootError('quota', `${quota.message}; then start the fill again`, quota.context)
        : isRefused ? new OffshootError('no-space', 'the store is full: make room and start the fill again')
        : new OffshootError('io-error', `copying failed at byte ${message.atBytes} of the disk with errno ${message.errno}`));
      return;
    }
    this.finish(message.nodeId).catch((error: unknown) => { this.onFatal(error instanceof Error ? error : new Error(String(error))); });
  }

  private startAgain(handles: DiskHandles): void {
    const disk = this.store.disks.get(handles.nodeId);
    if (this.active.has(handles.nodeId) && disk?.shared.serial === handles.serial) this.order({ type: 'start', handles, sources: sourcesOf(disk) });
  }

  /** Gets what the worker cannot read itself. Never rejects. */
  private async fetch({ nodeId, serial, origin, offsetBytes, lengthBytes }: Extract<FillReport, { type: 'fetch' }>): Promise<void> {
    const source = this.store.disks.get(nodeId)?.files[origin - 1]?.source ?? null;
    if (source === null) {
      // It was given a descriptor meanwhile, or the disk another instance.
      this.order({ type: 'fetched', nodeId, serial, origin, offsetBytes, bytes: null });
      return;
    }
    try {
      const fetched = await source.read(offsetBytes, lengthBytes, performance.now() + this.store.sourceTimeoutMs);
      if (!this.isCurrent(nodeId, serial)) return;
      this.goOn(nodeId);
      // A copy of its own: what came off the wire may share its memory with other messages.
      const bytes = Uint8Array.from(fetched);
      this.thread().postMessage({ type: 'fetched', nodeId, serial, origin, offsetBytes, bytes } satisfies FillOrder, [bytes.buffer]);
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') this.onFatal(error);
      else if (this.isCurrent(nodeId, serial)) {
        if (error.kind === 'io-error') this.fail(nodeId, error);
        else this.stall(nodeId, serial, error.message);
      }
    }
  }

  private isCurrent(nodeId: number, serial: number): boolean {
    return this.active.has(nodeId) && this.store.disks.get(nodeId)?.shared.serial === serial;
  }

  /** The source is away: says so, and has the worker try again after a while. */
  private stall(nodeId: number, serial: number, reason: string): void {
    const running = this.active.get(nodeId);
    const job = this.store.meta.jobs.latestFor(nodeId, JOB_KIND);
    if (running === undefined || job === undefined) return;
    if (running.stalls === 0) this.logger.warn({ disk: this.store.meta.nodes.pathOf(nodeId), reason }, 'fill waits for its source');
    if (job.state === 'running' && job.message !== waitingFor(reason)) this.setState(job.id, 'running', waitingFor(reason));
    const delayMs = Math.min(RETRY_MS_MAX, RETRY_MS_MIN * 2 ** Math.min(running.stalls, 10));
    running.stalls += 1;
    running.retry = setTimeout(() => {
      running.retry = null;
      if (!this.isCurrent(nodeId, serial)) return;
      // A source that is read directly says nothing when it is well again: the worker just goes on.
      if (this.problemOf(nodeId) === null && this.store.disks.get(nodeId)?.files.every((file) => file.fd >= 0) === true) this.goOn(nodeId);
      this.order({ type: 'fetched', nodeId, serial, origin: 0, offsetBytes: 0, bytes: null });
    }, delayMs);
  }

  /** The source has answered. */
  private goOn(nodeId: number): void {
    const running = this.active.get(nodeId);
    if (running === undefined || running.stalls === 0) return;
    running.stalls = 0;
    const job = this.store.meta.jobs.latestFor(nodeId, JOB_KIND);
    if (job?.state === 'running') this.setState(job.id, 'running', null);
    this.logger.info({ disk: this.store.meta.nodes.pathOf(nodeId) }, 'fill goes on: its source is back');
  }

  /** What is wrong with a source of the disk, having looked; null: nothing that is known. */
  private problemOf(nodeId: number): string | null {
    for (const { source } of this.store.disks.get(nodeId)?.files ?? []) {
      source?.look();
      const condition = source?.condition();
      if (condition?.kind === 'source-changed' || condition?.kind === 'source-unreachable') return condition.reason;
    }
    return null;
  }

  private async finish(nodeId: number): Promise<void> {
    const job = this.store.meta.jobs.latestFor(nodeId, JOB_KIND);
    if (job === undefined) return;
    const path = this.store.meta.nodes.pathOf(nodeId);
    try {
      await this.store.flush(nodeId);
      if (!this.active.has(nodeId)) return;
      this.store.markComplete(nodeId);
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      const disk = this.store.disks.get(nodeId);
      // The disk grew behind the cursor, or was sealed: go through it again.
      if (error.kind === 'busy' && disk !== undefined) this.startAgain(disk.shared.handles);
      else this.fail(nodeId, error);
      return;
    }
    const copiedBytes = this.store.disks.get(nodeId)?.shared.fillCopiedBytes() ?? 0;
    this.goOn(nodeId);
    this.store.meta.jobs.update(job.id, { progressDone: job.progressTotal });
    const now = this.store.meta.jobs.byId(job.id) ?? job;
    if (isFlatten(now)) this.store.detach(nodeId);
    this.setState(job.id, 'completed', null);
    this.letGo(nodeId);
    this.logger.info({ disk: path, jobId: job.id, copiedBytes }, 'fill completed: the disk needs its source no more');
  }

  private fail(nodeId: number, error: OffshootError): void {
    const job = this.store.meta.jobs.latestFor(nodeId, JOB_KIND);
    if (job !== undefined) this.markFailed(job, error);
    this.letGo(nodeId);
    this.logger.warn({ disk: this.store.meta.nodes.pathOf(nodeId), reason: error.message }, 'fill failed');
  }

  private letGo(nodeId: number): void {
    const running = this.active.get(nodeId);
    if (running === undefined) return;
    this.active.delete(nodeId);
    if (running.retry !== null) clearTimeout(running.retry);
    this.copiedBeforeBytes += this.store.disks.get(nodeId)?.shared.fillCopiedBytes() ?? 0;
    this.order({ type: 'forget', nodeId });
    this.store.disks.get(nodeId)?.shared.setFillCommand(0);
    this.store.disks.release(nodeId);
  }

  private markFailed(job: JobRow, error: OffshootError): void {
    this.store.meta.jobs.update(job.id, { parameters: { ...(job.parameters as object), errorKind: error.kind } });
    this.setState(job.id, 'failed', error.message);
  }

  private setState(jobId: number, state: JobState, message: string | null): void {
    this.store.meta.jobs.update(jobId, { state, message, updatedUs: Date.now() * 1000 });
  }

  private require(node: NodeRow): JobRow {
    const job = this.store.meta.jobs.latestFor(node.id, JOB_KIND);
    if (job === undefined) throw new OffshootError('not-found', 'this disk was never filled: offshoot fill start begins a fill');
    return job;
  }

  private isComplete(node: NodeRow): boolean {
    return node.layerId !== null && this.store.meta.layers.byId(node.layerId)?.complete === true;
  }

  /** In source data; where that is not known, in bytes of the disk. */
  private progress(node: NodeRow, job: JobRow): { readonly doneBytes: number; readonly totalBytes: number } {
    const running = this.active.get(node.id);
    if (job.progressTotal === 0 && running?.doneBeforeBytes === null) {
      return { doneBytes: Math.min(node.sizeBytes, this.store.ownedBlocks(node) * BLOCK_BYTES), totalBytes: node.sizeBytes };
    }
    const copiedBytes = this.store.disks.get(node.id)?.shared.fillCopiedBytes() ?? 0;
    const doneBytes = running === undefined ? job.progressDone : (running.doneBeforeBytes ?? 0) + copiedBytes;
    return { doneBytes: Math.min(job.progressTotal, doneBytes), totalBytes: job.progressTotal };
  }

  private sample(nodeId: number): number {
    const sample = this.active.get(nodeId);
    const copiedBytes = this.store.disks.get(nodeId)?.shared.fillCopiedBytes() ?? 0;
    if (sample === undefined) return 0;
    const nowMs = performance.now();
    if (nowMs - sample.atMs >= SAMPLE_MS) {
      sample.bytesPerSecond = Math.max(0, Math.round(((copiedBytes - sample.copiedBytes) * 1000) / (nowMs - sample.atMs)));
      sample.atMs = nowMs;
      sample.copiedBytes = copiedBytes;
    }
    return sample.bytesPerSecond;
  }

  private order(order: FillOrder): void {
    this.thread().postMessage(order);
  }

  private thread(): Worker {
    if (this.worker !== null) return this.worker;
    const worker = new Worker(new URL('./fill-worker.js', import.meta.url), { name: 'fill', workerData: { boot: this.boot } satisfies FillWorkerData });
    worker.on('error', (error: unknown) => { this.onFatal(error instanceof Error ? error : new Error(String(error))); });
    worker.on('exit', (code) => {
      if (!this.closing) this.onFatal(new Error(`the fill worker ended with code ${code}`));
    });
    worker.on('message', (message: FillReport) => { this.take(message); });
    this.worker = worker;
    return worker;
  }
}

function sourcesOf(disk: OpenDisk): FillSource[] {
  return disk.files.flatMap(({ source }, i) => (source === null ? [] : [{ origin: i + 1, identity: source.identity }]));
}

function waitingFor(reason: string): string {
  return `waiting for the source: ${reason}`;
}

/** Its disk is to drop its backing at the end. */
export function isFlatten(job: JobRow): boolean {
  return (job.parameters as { readonly flatten?: unknown } | null)?.flatten === true;
}

function rateOf(job: JobRow): number | null {
  const rate = (job.parameters as { readonly rateBytesPerSecond?: unknown } | null)?.rateBytesPerSecond;
  return typeof rate === 'number' && rate > 0 ? rate : null;
}
