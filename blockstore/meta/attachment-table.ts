/**
 * What is attached as a block device of this host, and for what. Main thread only.
 *
 * The row is there before the device is asked for, and until it is given back: a server that died in between is followed by one that knows
 * where to look. FORMAT.md explains every column.
 */
import { OffshootError } from '../errors.js';
import { safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export type AttachmentPurpose = 'stage' | 'deploy' | 'block';

export interface AttachmentRow {
  readonly id: number;
  readonly nodeId: number;
  /** `/dev/loop7`; null while nobody wrote down which it is. */
  readonly device: string | null;
  readonly purpose: AttachmentPurpose;
  readonly jobId: number | null;
  readonly createdUs: number;
}

export type NewAttachment = Pick<AttachmentRow, 'nodeId' | 'purpose' | 'jobId'>;

interface RawAttachment {
  readonly id: number;
  readonly node_id: number;
  readonly device: string | null;
  readonly purpose: string;
  readonly job_id: number | null;
  readonly created_us: number;
}

export class AttachmentTable {
  readonly #connection: SqlConnection;
  readonly #byNode: SqlStatement<RawAttachment>;
  readonly #byJob: SqlStatement<RawAttachment>;
  readonly #all: SqlStatement<RawAttachment>;
  readonly #count: SqlStatement<{ readonly count: number }>;
  readonly #insert: SqlStatement<unknown>;
  readonly #device: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    const select = 'SELECT id, node_id, device, purpose, job_id, created_us FROM attachments';
    this.#connection = connection;
    this.#byNode = connection.prepare(`${select} WHERE node_id = ?`);
    this.#byJob = connection.prepare(`${select} WHERE job_id = ? ORDER BY id`);
    this.#all = connection.prepare(`${select} ORDER BY id`);
    this.#count = connection.prepare('SELECT count(*) AS count FROM attachments');
    this.#insert = connection.prepare('INSERT INTO attachments (node_id, device, purpose, job_id, created_us) VALUES (?, NULL, ?, ?, ?)');
    this.#device = connection.prepare('UPDATE attachments SET device = ? WHERE id = ?');
    this.#remove = connection.prepare('DELETE FROM attachments WHERE id = ?');
  }

  byNode(nodeId: number): AttachmentRow | undefined {
    const raw = this.#byNode.get(nodeId);
    return raw === undefined ? undefined : toRow(raw);
  }

  ofJob(jobId: number): AttachmentRow[] { return this.#byJob.all(jobId).map(toRow); }
  /** Oldest first. */
  all(): AttachmentRow[] { return this.#all.all().map(toRow); }
  count(): number { return this.#count.get()?.count ?? 0; }

  /** Its id. `in-use` when the file is attached, or about to be. */
  insert({ nodeId, purpose, jobId }: NewAttachment): number {
    return this.#connection.transaction(() => {
      const taken = this.byNode(nodeId);
      if (taken !== undefined) throw new OffshootError('in-use', `it is attached already${taken.device === null ? '' : ` as ${taken.device}`}: detach it first`, { nodeId });
      return this.#insert.run(nodeId, purpose, jobId, Date.now() * 1000).lastId;
    });
  }

  attached(id: number, device: string): void { this.#device.run(device, id); }

  remove(id: number): void { this.#remove.run(id); }
}

function toRow(raw: RawAttachment): AttachmentRow {
  return {
    id: safeInteger(raw.id, 'attachments.id'), nodeId: safeInteger(raw.node_id, 'attachments.node_id'), device: raw.device, purpose: raw.purpose as AttachmentPurpose,
    jobId: safeIntegerOrNull(raw.job_id, 'attachments.job_id'), createdUs: safeInteger(raw.created_us, 'attachments.created_us'),
  };
}
