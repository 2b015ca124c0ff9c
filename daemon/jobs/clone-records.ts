/**
 * Clone operations in the history of jobs: one row for each request, however many clones it makes. Main thread.
 *
 * A clone is over before its request is answered, so its row is never seen running. The row of one that was made is written in the transaction that
 * makes the clones: it says `completed` exactly if they are there, also when the server dies before it answers. One that was refused
 * is written down as `failed`, as well as that can be done: what keeps it from being written is the error that the user hears of anyway.
 */
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { JobTable } from '../../blockstore/meta/job-table.js';
import type { JobState } from '../../blockstore/meta/rows.js';

export const CLONE_JOB = 'clone';

export interface CloneRequestSummary {
  readonly source: string;
  readonly targets: readonly string[];
  /** Only so many ranges of the source, in one target. */
  readonly ranges?: number;
}

export class CloneRecords {
  readonly #jobs: JobTable;

  constructor(jobs: JobTable) {
    this.#jobs = jobs;
  }

  /** Inside the transaction that makes the clones; the id of the operation. */
  made(request: CloneRequestSummary, sourceId: number): number {
    return this.#insert(request, sourceId, 'completed', null, null);
  }

  /** Runs what makes clones; what it refuses is written down. */
  recording<T>(request: CloneRequestSummary, make: () => T): T {
    try {
      return make();
    } catch (thrown) {
      throw this.failed(request, thrown);
    }
  }

  async recordingLater<T>(request: CloneRequestSummary, make: () => Promise<T>): Promise<T> {
    try {
      return await make();
    } catch (thrown) {
      throw this.failed(request, thrown);
    }
  }

  /** The same error, with the id of the operation in its context. */
  failed(request: CloneRequestSummary, thrown: unknown): unknown {
    const error = toOffshootError(thrown);
    if (error.kind === 'internal') return thrown;
    try {
      const jobId = this.#insert(request, null, 'failed', error.message, error.kind);
      return new OffshootError(error.kind, error.message, { ...error.context, operationId: String(jobId) }, error.cause);
    } catch (another) {
      if (toOffshootError(another).kind === 'internal') throw another;
      return thrown;
    }
  }

  #insert({ source, targets, ranges }: CloneRequestSummary, nodeId: number | null, state: JobState, message: string | null, errorKind: string | null): number {
    const nowUs = Date.now() * 1000;
    return this.#jobs.insert({
      kind: CLONE_JOB, nodeId, state, parameters: { target: targets[0] ?? null, source, clones: targets.length, errorKind }, progressDone: 0, progressTotal: 0,
      message: message ?? (ranges !== undefined ? `${ranges} ${ranges === 1 ? 'range' : 'ranges'} of ${source}` : targets.length === 1 ? `of ${source}` : `${targets.length} clones of ${source}`), createdUs: nowUs, updatedUs: nowUs,
    }).id;
  }
}
