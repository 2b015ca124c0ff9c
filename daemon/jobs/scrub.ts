/**
 * The scrub: reads sealed layers in the background, so that damage is found before it is needed.
 *
 * Main thread; the reading is a hash worker's, which makes way for guests. Two things are done, one chunk of 64 MiB after another: a
 * layer that was just sealed, or imported in place, gets its checksums; and a scrub, started by somebody or by the clock, reads
 * all sealed layers from the disk, in the order of their ids, and compares. A scrub is a row of the job table that says which
 * chunk is next, so that it goes on after a restart. What it finds is kept until a later look finds it right again.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import { CHECKSUM_ALGORITHM, PIECE_BYTES } from '../../blockstore/checksum-units.js';
import { isOperatingError, OffshootError } from '../../blockstore/errors.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import type { JobLogger } from './fills.js';
import { Hasher } from './hasher.js';
import { readChunk, type ChunkResult } from './layer-data.js';

export interface ScrubState {
  /** Null: there was never one. */
  readonly job: JobRow | null;
  readonly doneBytes: number;
  readonly totalBytes: number;
  readonly rateBytesPerSecond: number | null;
  readonly damagedExtents: number;
  readonly layersWithoutChecksums: number;
  /** When the last scrub came to its end. */
  readonly lastCompletedUs: number | null;
}

export interface ScrubOptions {
  readonly store: Store;
  readonly logger: JobLogger & { error(context: object, message: string): void };
  readonly onFatal: (error: Error) => void;
  /** Limit of what is read in the background; null: no scrub by the clock, and no limit where nobody gives one. */
  readonly rateBytesPerSecond: number | null;
}

interface Position {
  readonly rateBytesPerSecond: number | null;
  /** The layer that is being read, or the last one that was. */
  readonly layerId: number;
  /** The next chunk of it. */
  readonly offsetBytes: number;
  readonly automatic: boolean;
  /** Layers that could not be read at all. */
  readonly unreadLayers: number;
}

const JOB_KIND = 'scrub';
const LOOK_MS = 2000;
const PERIOD_US = 30 * 24 * 3600 * 1_000_000;
/** A layer that could not be read is not tried again by itself before this. */
const RETRY_MS = 10 * 60 * 1000;

export class Scrub {
  readonly #options: ScrubOptions;
  readonly #store: Store;
  readonly #hasher: Hasher;
  readonly #unreadableUntilMs = new Map<number, number>();
  #wake = new AbortController();
  #closing = false;
  #ended: Promise<void> = Promise.resolve();

  constructor(options: ScrubOptions) {
    this.#options = options;
    this.#store = options.store;
    this.#hasher = new Hasher(options.store.context.shared.handles);
  }

  /** Starts the thread that reads, when there is time for it. */
  prepare(): void {
    this.#hasher.prepare();
  }

  /** Begins to look for work; goes on with what the last server left. */
  run(): void {
    this.#ended = this.#loop().catch((error: unknown) => {
      if (!this.#closing) this.#options.onFatal(error instanceof Error ? error : new Error(String(error)));
    });
  }

  async close(): Promise<void> {
    this.#closing = true;
    this.#wake.abort();
    await this.#hasher.close();
    await this.#ended;
  }

  /** Starts a scrub; one that is under way goes on, at the rate given. */
  start(rateBytesPerSecond: number | null, automatic = false): ScrubState {
    const latest = this.#latest();
    if (latest !== null && isUnderWay(latest)) return this.resume(rateBytesPerSecond);
    const nowUs = Date.now() * 1000;
    this.#store.meta.jobs.insert({
      kind: JOB_KIND, nodeId: null, state: 'running', parameters: { rateBytesPerSecond, layerId: 0, offsetBytes: 0, automatic, unreadLayers: 0 } satisfies Position,
      progressDone: 0, progressTotal: this.#store.meta.checksums.sealedBytesAfter(0), message: null, createdUs: nowUs, updatedUs: nowUs,
    });
    this.#look();
    return this.status();
  }

  pause(): ScrubState {
    const job = this.#latest();
    if (job === null || !isUnderWay(job)) throw new OffshootError('invalid-argument', 'no scrub is under way: there is nothing to pause');
    this.#store.meta.jobs.update(job.id, { state: 'paused', updatedUs: Date.now() * 1000 });
    return this.status();
  }

  /** `undefined`: the rate stays as it is. */
  resume(rateBytesPerSecond: number | null | undefined): ScrubState {
    const job = this.#latest();
    if (job === null || !isUnderWay(job)) throw new OffshootError('invalid-argument', 'no scrub is under way: begin one with `offshoot scrub start`');
    const position = positionOf(job);
    this.#store.meta.jobs.update(job.id, {
      state: 'running', updatedUs: Date.now() * 1000,
      parameters: { ...position, rateBytesPerSecond: rateBytesPerSecond === undefined ? position.rateBytesPerSecond : rateBytesPerSecond },
    });
    this.#look();
    return this.status();
  }

  /** Ends the scrub that is under way; what it found stays. */
  cancel(): void {
    const job = this.#latest();
    if (job !== null && isUnderWay(job)) this.#store.meta.jobs.update(job.id, { state: 'cancelled', message: 'cancelled', updatedUs: Date.now() * 1000 });
  }

  status(): ScrubState {
    const { meta } = this.#store;
    const job = this.#latest();
    const completed = meta.jobs.list({ kind: JOB_KIND, states: ['completed'] }).at(-1);
    return {
      job, doneBytes: job?.progressDone ?? 0, totalBytes: job?.progressTotal ?? 0, rateBytesPerSecond: job === null ? null : positionOf(job).rateBytesPerSecond,
      damagedExtents: meta.checksums.damages().length, layersWithoutChecksums: meta.checksums.unfinished().length, lastCompletedUs: completed?.updatedUs ?? null,
    };
  }

  async #loop(): Promise<void> {
    while (!this.#isClosing()) {
      this.#wake = new AbortController();
      let worked = false;
      try {
        worked = await this.#hashOne() || await this.#scrubOne();
      } catch (thrown) {
        if (this.#isClosing()) return;
        // The metadata cannot be changed just now: the store is full, or in doubt, which others say more loudly.
        if (!isOperatingError(thrown)) throw thrown;
        this.#options.logger.warn({ reason: thrown.message }, 'the scrub rests');
      }
      if (!worked) await this.#rest();
    }
  }

  /** One chunk of a layer without checksums. */
  async #hashOne(): Promise<boolean> {
    const { meta } = this.#store;
    const nowMs = performance.now();
    const layerId = meta.checksums.unfinished().find((id) => (this.#unreadableUntilMs.get(id) ?? 0) <= nowMs);
    if (layerId === undefined) return false;
    const offsetBytes = meta.checksums.nextPiece(layerId) * PIECE_BYTES;
    // What was just written is in the page cache, and was flushed before it was sealed: from there the hash is that of what was meant.
    const isOurs = meta.layers.byId(layerId)?.kind === 'store';
    const result = await readChunk(this.#store, this.#hasher, layerId, offsetBytes, { keep: true, fromDisk: !isOurs, rateBytesPerSecond: this.#options.rateBytesPerSecond ?? 0 });
    if (result === null && meta.layers.byId(layerId)?.sizeBytes === 0) meta.checksums.finish(layerId, CHECKSUM_ALGORITHM, PIECE_BYTES);
    if (result?.isRemote === true) {
      this.#unreadableUntilMs.set(layerId, performance.now() + RETRY_MS);
    } else if (result !== null && (result.error !== null || result.found.length > 0)) {
      this.#unreadableUntilMs.set(layerId, performance.now() + RETRY_MS);
      this.#note(layerId, offsetBytes, result);
    }
    return true;
  }

  /** One chunk of the scrub that is under way, or that is due. */
  async #scrubOne(): Promise<boolean> {
    const { meta } = this.#store;
    const job = this.#latest();
    if (job?.state !== 'running') {
      if (this.#isDue(job)) this.start(this.#options.rateBytesPerSecond, true);
      return false;
    }
    const position = positionOf(job);
    const layerId = position.offsetBytes > 0 ? position.layerId : meta.checksums.sealedAfter(position.layerId);
    if (layerId === undefined) {
      this.#complete(job);
      return true;
    }
    const result = await readChunk(this.#store, this.#hasher, layerId, position.offsetBytes, { keep: true, fromDisk: true, rateBytesPerSecond: position.rateBytesPerSecond ?? 0 });
    if (result !== null) this.#note(layerId, position.offsetBytes, result);
    const sizeBytes = meta.layers.byId(layerId)?.sizeBytes ?? 0;
    const nextBytes = position.offsetBytes + (result?.lengthBytes ?? 0);
    const isUnread = result !== null && result.error !== null;
    const isAtEnd = result?.error !== null || nextBytes >= sizeBytes;
    if (isAtEnd && result?.error === null && !meta.checksums.damages().some((damage) => damage.layerId === layerId)) meta.checksums.verified(layerId);
    const now = meta.jobs.byId(job.id);
    // Cancelled meanwhile.
    if (now === undefined || !isUnderWay(now)) return true;
    const doneBytes = Math.max(0, now.progressTotal - meta.checksums.sealedBytesAfter(layerId) - (isAtEnd ? 0 : sizeBytes - nextBytes));
    meta.jobs.update(job.id, {
      parameters: { ...positionOf(now), layerId, offsetBytes: isAtEnd ? 0 : nextBytes, unreadLayers: positionOf(now).unreadLayers + (isUnread ? 1 : 0) },
      progressDone: Math.min(now.progressTotal, doneBytes), updatedUs: Date.now() * 1000,
    });
    return true;
  }

  #complete(job: JobRow): void {
    const damages = this.#store.meta.checksums.damages().length;
    const { unreadLayers } = positionOf(job);
    this.#store.meta.jobs.update(job.id, {
      state: 'completed', progressDone: job.progressTotal, updatedUs: Date.now() * 1000,
      message: damages > 0 ? `${damages} damaged extents: \`offshoot check --data\` names them` : unreadLayers === 0 ? 'nothing is damaged'
        : `nothing that could be read is damaged; ${unreadLayers} layers could not be read: \`offshoot check --data\` says why`,
    });
    if (damages === 0 && unreadLayers > 0) this.#options.logger.error({ jobId: job.id, unreadLayers }, 'scrub completed: some layers could not be read; `offshoot check --data` says why');
    else if (damages === 0) this.#options.logger.info({ jobId: job.id }, 'scrub completed: nothing is damaged');
    else this.#options.logger.error({ jobId: job.id, damages }, 'scrub completed: content is damaged; `offshoot check --data` names it');
  }

  /** Keeps what was found, and says what was not known before. */
  #note(layerId: number, offsetBytes: number, result: ChunkResult): void {
    const { meta } = this.#store;
    if (meta.layers.byId(layerId) === undefined) return;
    if (result.error !== null) {
      this.#options.logger.warn({ layerId, reason: result.error.message }, 'a layer cannot be scrubbed');
      return;
    }
    const before = new Set(meta.checksums.damages().filter((damage) => damage.layerId === layerId).map((damage) => damage.offsetBytes));
    if (before.size === 0 && result.found.length === 0) return;
    meta.checksums.found(layerId, offsetBytes, result.lengthBytes, result.found);
    const disks = meta.layers.dependantNodes(layerId).slice(0, 10).map((node) => meta.nodes.pathOf(node.id));
    for (const found of result.found) {
      if (!before.has(found.offsetBytes)) this.#options.logger.error({ layerId, ...found, disks }, 'the content of a layer is damaged');
    }
  }

  /** By the clock: so long after the last one came to its end, or after there was something to scrub. */
  #isDue(job: JobRow | null): boolean {
    if (this.#options.rateBytesPerSecond === null || job?.state === 'paused') return false;
    const { layers, checksums } = this.#store.meta;
    const oldest = checksums.sealedAfter(0);
    const sinceUs = job?.updatedUs ?? (oldest === undefined ? undefined : layers.byId(oldest)?.createdUs);
    return sinceUs !== undefined && Date.now() * 1000 - sinceUs > PERIOD_US;
  }

  #latest(): JobRow | null {
    return this.#store.meta.jobs.list({ kind: JOB_KIND }).at(-1) ?? null;
  }

  #look(): void {
    this.#wake.abort();
  }

  #isClosing(): boolean {
    return this.#closing;
  }

  async #rest(): Promise<void> {
    await sleep(LOOK_MS, undefined, { signal: this.#wake.signal, ref: false }).catch(() => undefined);
  }
}

function isUnderWay(job: JobRow): boolean {
  return job.state === 'running' || job.state === 'paused';
}

function positionOf(job: JobRow): Position {
  // A scrub that an earlier version began counted none.
  const { rateBytesPerSecond, layerId, offsetBytes, automatic, unreadLayers = 0 } = job.parameters as Omit<Position, 'unreadLayers'> & { readonly unreadLayers?: number };
  return { rateBytesPerSecond, layerId, offsetBytes, automatic, unreadLayers };
}
