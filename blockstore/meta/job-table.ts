/**
 * Jobs: long work that survives a restart (import, fill), with its progress. Main thread only.
 *
 * The table knows nothing of what a job does. Rows outlive the nodes they were about, as history, which is bounded: of the jobs
 * that have ended, the last thousand are kept, and the youngest of each kind for each node that is there.
 */
import { OffshootError } from '../errors.js';
import type { JobFilter, JobRow, JobState, JobUpdate, NewJob } from './rows.js';
import { parsedJson, safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

interface RawJob {
  readonly id: number;
  readonly kind: string;
  readonly node_id: number | null;
  readonly state: string;
  readonly parameters: string;
  readonly progress_done: number;
  readonly progress_total: number;
  readonly message: string | null;
  readonly created_us: number;
  readonly updated_us: number;
}

function toJobRow(raw: RawJob): JobRow {
  return {
    id: safeInteger(raw.id, 'jobs.id'),
    kind: raw.kind,
    nodeId: safeIntegerOrNull(raw.node_id, 'jobs.node_id'),
    state: raw.state as JobState,
    parameters: parsedJson(raw.parameters, 'jobs.parameters'),
    progressDone: safeInteger(raw.progress_done, 'jobs.progress_done'),
    progressTotal: safeInteger(raw.progress_total, 'jobs.progress_total'),
    message: raw.message,
    createdUs: safeInteger(raw.created_us, 'jobs.created_us'),
    updatedUs: safeInteger(raw.updated_us, 'jobs.updated_us'),
  };
}

/** Jobs that have ended and are kept as history. */
export const ENDED_JOBS_MAX = 1000;
/** How many jobs are made between two looks at what is too old. */
const TRIM_EVERY = 100;

export class JobTable {
  readonly #connection: SqlConnection;
  readonly #byId: SqlStatement<RawJob>;
  readonly #latestFor: SqlStatement<RawJob>;
  readonly #list: SqlStatement<RawJob>;
  readonly #insert: SqlStatement<unknown>;
  readonly #update: SqlStatement<unknown>;
  readonly #trim: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    this.#connection = connection;
    this.#byId = connection.prepare('SELECT * FROM jobs WHERE id = ?');
    this.#latestFor = connection.prepare('SELECT * FROM jobs WHERE node_id = ? AND kind = ? ORDER BY id DESC LIMIT 1');
    this.#list = connection.prepare(
      `WITH wanted(states, kind, node_id) AS (VALUES (?, ?, ?))
       SELECT jobs.* FROM jobs, wanted
       WHERE (wanted.states IS NULL OR jobs.state IN (SELECT value FROM json_each(wanted.states)))
         AND (wanted.kind IS NULL OR jobs.kind = wanted.kind)
         AND (wanted.node_id IS NULL OR jobs.node_id = wanted.node_id)
       ORDER BY jobs.id`,
    );
    this.#insert = connection.prepare(
      `INSERT INTO jobs (kind, node_id, state, parameters, progress_done, progress_total, message, created_us, updated_us)
       VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
    );
    this.#update = connection.prepare(
      `UPDATE jobs SET node_id = ?, state = ?, parameters = ?, progress_done = ?, progress_total = ?, message = ?, updated_us = ? WHERE id = ?`,
    );
    this.#trim = connection.prepare(
      `DELETE FROM jobs
       WHERE state IN ('completed', 'failed', 'cancelled')
         AND id <= (SELECT id FROM jobs WHERE state IN ('completed', 'failed', 'cancelled') ORDER BY id DESC LIMIT 1 OFFSET ?)
         AND id NOT IN (SELECT max(jobs.id) FROM jobs JOIN nodes ON nodes.id = jobs.node_id GROUP BY jobs.node_id, jobs.kind)`,
    );
  }

  insert(fields: NewJob): JobRow {
    const { lastId } = this.#insert.run(
      fields.kind,
      fields.nodeId,
      fields.state,
      JSON.stringify(fields.parameters ?? null),
      fields.progressDone,
      fields.progressTotal,
      fields.message,
      fields.createdUs,
      fields.updatedUs,
    );
    if (lastId % TRIM_EVERY === 0) this.trim();
    return { ...fields, id: lastId };
  }

  /** Forgets the oldest of the jobs that have ended. */
  trim(): void {
    this.#trim.run(ENDED_JOBS_MAX);
  }

  byId(id: number): JobRow | undefined {
    const raw = this.#byId.get(id);
    return raw === undefined ? undefined : toJobRow(raw);
  }

  /** Changes what is given and leaves the rest. A job that is gone is `not-found`. */
  update(id: number, changes: JobUpdate): void {
    this.#connection.transaction(() => {
      const before = this.byId(id);
      if (before === undefined) throw new OffshootError('not-found', `there is no job ${id}`, { jobId: id });
      const after = { ...before, ...changes };
      this.#update.run(
        after.nodeId,
        after.state,
        JSON.stringify(after.parameters ?? null),
        after.progressDone,
        after.progressTotal,
        after.message,
        after.updatedUs,
        id,
      );
    });
  }

  /** The jobs that match every given part of the filter, oldest first. */
  list(filter: JobFilter = {}): JobRow[] {
    const states = filter.states === undefined ? null : JSON.stringify(filter.states);
    return this.#list.all(states, filter.kind ?? null, filter.nodeId ?? null).map(toJobRow);
  }

  /** The youngest job of this kind for this node. */
  latestFor(nodeId: number, kind: string): JobRow | undefined {
    const raw = this.#latestFor.get(nodeId, kind);
    return raw === undefined ? undefined : toJobRow(raw);
  }
}
