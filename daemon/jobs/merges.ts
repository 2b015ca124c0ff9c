/**
 * Merges: keeps chains short, in the background, so that nobody ever has to know how many times a disk was snapshotted or cloned.
 *
 * Main thread; the copying goes through the thread pool (`blockstore/merge-copy.ts`). Now and then the disks with long chains are looked for; of a chain that is too long the
 * pair of adjacent sealed layers that is the least work is merged, then the next one. Before their content is copied both layers are read and compared with
 * their checksums: damage that is not known yet must not get new checksums that agree with it. So a layer waits until it has its checksums, unless its chain is
 * about to become too long to be used. A merge is a job; one that is interrupted leaves nothing, and is begun anew by whoever looks next.
 */
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import { copyMerged } from '../../blockstore/merge-copy.js';
import { cheapestPair, type MergePair } from '../../blockstore/merge.js';
import type { JobRow, LayerRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import type { JobLogger } from './fills.js';
import { Hasher } from './hasher.js';
import { readChunk } from './layer-data.js';

export interface MergeState {
  readonly jobId: number;
  /** A disk whose chain is made shorter. */
  readonly path: string;
  readonly doneBytes: number;
  readonly totalBytes: number;
}

export interface MergesOptions {
  readonly store: Store;
  readonly logger: JobLogger;
  readonly onFatal: (error: Error) => void;
  /** Limit of what is read and copied; 0: none. */
  readonly rateBytesPerSecond?: number;
  /** After something that another try at once would meet again; half a minute unless told otherwise. */
  readonly restMs?: number;
}

const JOB_KIND = 'merge';
/** Chains up to this long are left as they are. */
const CHAIN_LAYERS_WANTED = 8;
/** From here on nothing is waited for: neither checksums nor the rate. Half of what a chain can have. */
const CHAIN_LAYERS_URGENT = 256;
const RATE_BYTES_DEFAULT = 128 * 1024 * 1024;
const LOOK_MS = 3000;
/** After something that another try at once would meet again. */
const REST_MS = 30_000;
/** Chains looked at in one go. */
const NODES_LOOKED_AT = 32;
/** What a limited copy may make up for when it was kept from its rate. */
const CATCH_UP_MS = 200;

interface Choice {
  readonly pair: MergePair;
  readonly nodeId: number;
  readonly isUrgent: boolean;
}

export class Merges {
  readonly #options: MergesOptions;
  readonly #store: Store;
  #hasher: Hasher | null = null;
  #current: { readonly jobId: number; readonly path: string; readonly totalBytes: number; doneBytes: number } | null = null;
  /** Layers as they were when no chain was too long. */
  #shapeAtRest = '';
  /** There was no room for the last one, and that was said. */
  #lacksRoom = false;
  #wake = new AbortController();
  #closing = false;
  #notBeforeMs = 0;
  #ended: Promise<void> = Promise.resolve();

  constructor(options: MergesOptions) {
    this.#options = options;
    this.#store = options.store;
  }

  run(): void {
    this.#ended = this.#loop().catch((error: unknown) => {
      this.#options.onFatal(error instanceof Error ? error : new Error(String(error)));
    });
  }

  async close(): Promise<void> {
    this.#closing = true;
    this.#wake.abort();
    await this.#hasher?.close();
    await this.#ended;
  }

  /** The merge that runs now; null when none does. */
  status(): MergeState | null {
    return this.#current === null ? null : { ...this.#current };
  }

  /** How far a merge's job is; null when it is not the one that runs. */
  progress(job: JobRow): MergeState | null {
    return this.#current?.jobId === job.id ? this.status() : null;
  }

  async #loop(): Promise<void> {
    this.#endInterrupted();
    while (!this.#isClosing()) {
      let restMs = LOOK_MS;
      try {
        const choice = this.#choose();
        if (choice !== null) {
          await this.#merge(choice);
          this.#lacksRoom = false;
          restMs = 0;
        }
      } catch (thrown) {
        if (this.#isClosing()) break;
        if (!isOperatingError(thrown)) throw thrown;
        // Somebody began to use the layers in another way, which is no news; the rest is, and may well be met again at once.
        if (thrown.kind !== 'busy') {
          const isKnown = this.#lacksRoom && thrown.kind === 'no-space';
          this.#lacksRoom = thrown.kind === 'no-space';
          if (!isKnown) this.#options.logger.warn({ reason: thrown.message }, 'layers could not be merged');
          restMs = this.#options.restMs ?? REST_MS;
        }
      }
      // Also between two merges: whoever waits for this thread comes first.
      this.#wake = new AbortController();
      await sleep(restMs, undefined, { signal: this.#wake.signal, ref: false }).catch(() => undefined);
    }
  }

  /** The least work on the longest chain that has any; null: there is nothing to do. */
  #choose(): Choice | null {
    const { meta } = this.#store;
    const shape = meta.links.shape();
    if (shape === this.#shapeAtRest || this.#store.space().isFull) return null;
    const deep = meta.links.nodesDeeperThan(CHAIN_LAYERS_WANTED, NODES_LOOKED_AT);
    if (deep.length === 0) this.#shapeAtRest = shape;
    for (const { nodeId, depth } of deep) {
      const isUrgent = depth > CHAIN_LAYERS_URGENT;
      const layerId = meta.nodes.byId(nodeId)?.layerId ?? null;
      const pair = layerId === null ? null : cheapestPair(meta, layerId, (layer) => isUrgent || this.#hasChecksums(layer));
      if (pair !== null) return { pair, nodeId, isUrgent };
    }
    return null;
  }

  async #merge({ pair, nodeId, isUrgent }: Choice): Promise<void> {
    const { meta } = this.#store;
    if (pair.costBytes === 0) {
      this.#store.merge(pair, null);
      return;
    }
    // Before there is a job: a store that stays full would have one more that failed each time that this is looked at.
    await this.#assertRoom(pair);
    const { upper, lower } = pair;
    const target = meta.nodes.pathOf(nodeId);
    const nowUs = Date.now() * 1000;
    const job = meta.jobs.insert({
      kind: JOB_KIND, nodeId: null, state: 'running', parameters: { target, layers: [upper.id, lower.id] }, progressDone: 0, progressTotal: pair.costBytes, message: null, createdUs: nowUs, updatedUs: nowUs,
    });
    this.#current = { jobId: job.id, path: target, totalBytes: pair.costBytes, doneBytes: 0 };
    try {
      for (const layer of [upper, lower]) if (this.#hasChecksums(layer)) await this.#assertSound(layer, isUrgent);
      // The number of the running job says whose it is: a check takes it for no leftover.
      const file = path.join(this.#store.files.storeDir, 'import', `${job.id}.merge`);
      const copiedBytes = await copyMerged(this.#store, pair, file, { pace: async (bytes) => { await this.#pace(bytes, isUrgent); } });
      const merged = this.#commit(pair, file);
      meta.jobs.update(job.id, { state: 'completed', progressDone: pair.costBytes, message: null, updatedUs: Date.now() * 1000 });
      this.#options.logger.info({ disk: target, jobId: job.id, layers: [upper.id, lower.id], layerId: merged.id, copiedBytes }, 'two layers were merged');
    } catch (thrown) {
      if (isOperatingError(thrown)) meta.jobs.update(job.id, { state: this.#isClosing() || thrown.kind === 'busy' ? 'cancelled' : 'failed', message: thrown.message, updatedUs: Date.now() * 1000 });
      throw thrown;
    } finally {
      this.#current = null;
    }
  }

  #commit(pair: MergePair, file: string): LayerRow {
    try {
      return this.#store.merge(pair, file);
    } catch (thrown) {
      // It has not taken its place, or nobody knows: then there is no file of this name any more.
      fs.rmSync(file, { force: true });
      throw thrown;
    }
  }

  /** A merge takes room before it gives any back. */
  async #assertRoom({ costBytes }: MergePair): Promise<void> {
    const { bavail, bsize } = await fs.promises.statfs(this.#store.files.storeDir);
    if (costBytes <= (bavail * bsize) / 4) return;
    throw new OffshootError('no-space', `layers are not merged: ${costBytes} bytes would be copied, and the store has ${bavail * bsize} left`);
  }

  /** Reads all of it. What is found wrong is kept, so that the layer is left alone from now on. */
  async #assertSound(layer: LayerRow, isUrgent: boolean): Promise<void> {
    this.#hasher ??= new Hasher(this.#store.context.shared.handles);
    for (let offsetBytes = 0; ; ) {
      const result = await readChunk(this.#store, this.#hasher, layer.id, offsetBytes, { keep: false, fromDisk: true, rateBytesPerSecond: isUrgent ? 0 : this.#rate() });
      if (this.#isClosing()) throw ended();
      if (result === null) return;
      if (result.error !== null) throw result.error;
      if (result.found.length > 0) {
        this.#store.meta.checksums.found(layer.id, offsetBytes, result.lengthBytes, result.found);
        throw new OffshootError('io-error', `layer ${layer.id} is damaged at byte ${result.found[0]?.offsetBytes ?? offsetBytes}, and is left alone: offshoot check --data says what stands on it`, { layerId: layer.id });
      }
      offsetBytes += result.lengthBytes;
    }
  }

  /** Holds the rate; guests that were active meanwhile have as much time again. */
  async #pace(bytes: number, isUrgent: boolean): Promise<void> {
    if (this.#isClosing()) throw ended();
    if (this.#current !== null) this.#current.doneBytes = Math.min(this.#current.totalBytes, this.#current.doneBytes + bytes);
    const rate = this.#rate();
    if (bytes === 0 || isUrgent || rate === 0) return;
    const nowMs = performance.now();
    this.#notBeforeMs = Math.max(nowMs - CATCH_UP_MS, this.#notBeforeMs) + (bytes * 1000) / rate;
    while (performance.now() < this.#notBeforeMs && !this.#isClosing()) await sleep(Math.max(1, Math.min(200, this.#notBeforeMs - performance.now())));
  }

  #rate(): number {
    return this.#options.rateBytesPerSecond ?? RATE_BYTES_DEFAULT;
  }

  #hasChecksums(layer: LayerRow): boolean {
    return this.#store.meta.checksums.of(layer.id)?.complete === true;
  }

  /** Jobs of a server that died: what they made is gone from `import/`. */
  #endInterrupted(): void {
    for (const job of this.#store.meta.jobs.list({ states: ['running'], kind: JOB_KIND })) {
      this.#store.meta.jobs.update(job.id, { state: 'cancelled', message: 'the server ended; what is left to merge is begun anew', updatedUs: Date.now() * 1000 });
    }
  }

  #isClosing(): boolean {
    return this.#closing;
  }
}

function ended(): OffshootError {
  return new OffshootError('cancelled', 'the server ended; what is left to merge is begun anew');
}
