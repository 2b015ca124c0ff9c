/**
 * Operations that take a while and change more than the store (machines, hypervisors, block devices, mounts): one row in the table of jobs each, in
 * numbered steps that are noted before they are made, done or undone as a whole, cancelled, and undone by the next server when this one died. Main thread.
 *
 * What an operation of each kind made, and how it is taken away, is its owner's to say: an undo that begins again from its beginning at any time.
 * An outside world that does not answer is asked again until it does: till then the job runs, and its message says what it waits for.
 */
import { setMaxListeners } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';

import { isInDoubt } from '../../blockstore/doubt.js';
import { OffshootError, isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import type { JobRow, JobState } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';

/** How an operation that is undone ends. */
export interface OperationEnd {
  readonly state: JobState;
  readonly message: string;
  readonly errorKind: string | null;
}

/** Takes away all that the operation made, and ends its job; throws what is to be tried again. */
export type Undo = (jobId: number, end: OperationEnd, signal: AbortSignal) => Promise<void>;

export interface OperationKind {
  readonly undo: Undo;
  /** For the log, when it was done and when it was not: `machines made`. */
  readonly done: string;
  readonly undone: string;
}

export interface OperationParts {
  readonly store: Store;
  readonly logger: { info(context: object, message: string): void; warn(context: object, message: string): void };
  readonly onFatal: (error: Error) => void;
  /** First wait before an undo is tried again; it doubles. */
  readonly retryMs?: number;
}

interface Running {
  readonly abort: AbortController;
  ended: Promise<void>;
}

const RETRY_MS = 1000;
const RETRY_MS_MAX = 60_000;

export class Operations {
  readonly #parts: OperationParts;
  readonly #running = new Map<number, Running>();
  readonly #kinds: ReadonlyMap<string, OperationKind>;
  readonly #closing = new AbortController();

  constructor(parts: OperationParts, kinds: ReadonlyMap<string, OperationKind>) {
    this.#parts = parts;
    this.#kinds = kinds;
    setMaxListeners(0, this.#closing.signal);
  }

  /** Aborted when nothing may be begun any more. */
  get closing(): AbortSignal { return this.#closing.signal; }

  /** `steps` do all of it, and end the job in the transaction of the last one. */
  begin(kind: string, message: string, parameters: Readonly<Record<string, unknown>>, steps: (jobId: number, signal: AbortSignal) => Promise<void>): JobRow {
    const nowUs = Date.now() * 1000;
    const job = this.#parts.store.meta.jobs.insert({ kind, nodeId: null, state: 'running', progressDone: 0, progressTotal: 0, createdUs: nowUs, updatedUs: nowUs, message, parameters });
    this.#follow(job.id, async (signal) => { await this.#run(job, steps, signal); });
    return job;
  }

  /** What the last server did not bring to its end is undone. */
  recover(): void {
    for (const kind of this.#kinds.keys()) {
      for (const job of this.#parts.store.meta.jobs.list({ states: ['running'], kind })) {
        this.#follow(job.id, async () => {
          await this.#undo(job, 'failed', new OffshootError('cancelled', 'the server was restarted during the operation; all that it had made was taken away: begin it again'));
        });
      }
    }
  }

  /** Ends it, with nothing left of it, unless it has ended. */
  async cancel(jobId: number): Promise<void> {
    const running = this.#running.get(jobId);
    running?.abort.abort();
    await running?.ended;
  }

  isBusy(): boolean { return this.#running.size > 0; }

  async ended(jobId: number): Promise<void> { await this.#running.get(jobId)?.ended; }

  /** Nothing goes on when this resolves; what did is the next server's to undo. */
  async close(): Promise<void> {
    this.#closing.abort();
    for (const { abort } of this.#running.values()) abort.abort();
    await Promise.all([...this.#running.values()].map(async ({ ended }) => { await ended; }));
  }

  say(jobId: number, message: string): void {
    this.#parts.store.meta.jobs.update(jobId, { message, updatedUs: Date.now() * 1000 });
  }

  /** A store that is full must not keep an undo from being tried again. */
  #sayIfPossible(jobId: number, message: string): void {
    try {
      this.say(jobId, message);
    } catch (thrown) {
      if (isInDoubt(thrown) || !isOperatingError(thrown)) throw thrown;
    }
  }

  #isClosing(): boolean { return this.#closing.signal.aborted; }

  #follow(jobId: number, body: (signal: AbortSignal) => Promise<void>): void {
    const running: Running = { abort: new AbortController(), ended: Promise.resolve() };
    // Each of the calls that are made at a time listens.
    setMaxListeners(0, running.abort.signal);
    this.#running.set(jobId, running);
    running.ended = body(running.abort.signal)
      .catch((error: unknown) => { if (!this.#closing.signal.aborted) this.#parts.onFatal(error instanceof Error ? error : new Error(String(error))); })
      .finally(() => { this.#running.delete(jobId); });
  }

  async #run(job: JobRow, steps: (jobId: number, signal: AbortSignal) => Promise<void>, signal: AbortSignal): Promise<void> {
    const beganMs = performance.now();
    const { logger } = this.#parts;
    const { id, kind } = job;
    const { done, undone } = this.#kind(kind);
    try {
      await steps(id, signal);
      logger.info({ jobId: id, kind, durationMs: Math.round(performance.now() - beganMs) }, done);
    } catch (thrown) {
      if (this.#closing.signal.aborted) return;
      // The database takes no more changes: the next server sees how far it came.
      if (isInDoubt(thrown)) throw thrown;
      const error = signal.aborted ? new OffshootError('cancelled', 'cancelled; all that was made was taken away', {}, thrown) : thrown;
      if (!isOperatingError(error)) throw error;
      await this.#undo(job, signal.aborted ? 'cancelled' : 'failed', error);
      logger.warn({ jobId: id, kind, reason: error.message }, undone);
    }
  }

  #kind(kind: string): OperationKind {
    const found = this.#kinds.get(kind);
    if (found === undefined) throw new Error(`operations of the kind ${kind} are not known here`);
    return found;
  }

  /** Until it is done, or this server ends. */
  async #undo({ id: jobId, kind }: JobRow, state: JobState, reason: OffshootError): Promise<void> {
    const { undo } = this.#kind(kind);
    let waitMs = this.#parts.retryMs ?? RETRY_MS;
    while (!this.#isClosing()) {
      try {
        await undo(jobId, { state, message: reason.message, errorKind: reason.kind }, this.#closing.signal);
        return;
      } catch (thrown) {
        if (this.#isClosing()) return;
        if (isInDoubt(thrown) || !isOperatingError(thrown)) throw thrown;
        this.#sayIfPossible(jobId, `undoing: ${reason.message}; it is tried again, because ${toOffshootError(thrown).message}`);
        this.#parts.logger.warn({ jobId, reason: thrown.message }, 'what an operation had made could not be taken away yet; it is tried again');
      }
      await delay(waitMs, undefined, { signal: this.#closing.signal }).catch(() => undefined);
      waitMs = Math.min(2 * waitMs, RETRY_MS_MAX);
    }
  }
}
