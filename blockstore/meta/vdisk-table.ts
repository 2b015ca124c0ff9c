/**
 * Container files of staged machines: which files are virtual disks of ours with a machine in them, and what they are made of. Main thread only.
 *
 * A row goes with its file. Only what has a row here may ever be mounted. FORMAT.md explains every column.
 */
import { safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export type VdiskState = 'making' | 'ready';

export interface VdiskRow {
  readonly id: number;
  readonly uuid: string;
  /** The container file. */
  readonly nodeId: number;
  /** Of the machine in it: its format, the name of its configuration's file, and its name. */
  readonly format: string;
  readonly configuration: string;
  readonly name: string;
  /** Partition table, file system, GUIDs, sizes, what hosts can use it; its shape is that of whoever stages. */
  readonly description: unknown;
  readonly state: VdiskState;
  /** The operation that made it. May be gone. */
  readonly jobId: number | null;
  readonly createdUs: number;
}

export type NewVdisk = Omit<VdiskRow, 'id' | 'createdUs'>;

interface RawVdisk {
  readonly id: number;
  readonly uuid: string;
  readonly node_id: number;
  readonly format: string;
  readonly configuration: string;
  readonly name: string;
  readonly description: string;
  readonly state: string;
  readonly job_id: number | null;
  readonly created_us: number;
}

export class VdiskTable {
  readonly #byId: SqlStatement<RawVdisk>;
  readonly #byNode: SqlStatement<RawVdisk>;
  readonly #byJob: SqlStatement<RawVdisk>;
  readonly #all: SqlStatement<RawVdisk>;
  readonly #insert: SqlStatement<unknown>;
  readonly #describe: SqlStatement<unknown>;
  readonly #ready: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    const select = 'SELECT id, uuid, node_id, format, configuration, name, description, state, job_id, created_us FROM vdisks';
    this.#byId = connection.prepare(`${select} WHERE id = ?`);
    this.#byNode = connection.prepare(`${select} WHERE node_id = ?`);
    this.#byJob = connection.prepare(`${select} WHERE job_id = ? ORDER BY id`);
    this.#all = connection.prepare(`${select} ORDER BY id`);
    this.#insert = connection.prepare(
      'INSERT INTO vdisks (uuid, node_id, format, configuration, name, description, state, job_id, created_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)',
    );
    this.#describe = connection.prepare('UPDATE vdisks SET description = ? WHERE id = ?');
    this.#ready = connection.prepare("UPDATE vdisks SET state = 'ready' WHERE id = ?");
    this.#remove = connection.prepare('DELETE FROM vdisks WHERE id = ?');
  }

  byId(id: number): VdiskRow | undefined { return rowOrNone(this.#byId.get(id)); }
  byNode(nodeId: number): VdiskRow | undefined { return rowOrNone(this.#byNode.get(nodeId)); }
  ofJob(jobId: number): VdiskRow[] { return this.#byJob.all(jobId).map(toRow); }
  /** Oldest first. */
  all(): VdiskRow[] { return this.#all.all().map(toRow); }

  /** Its id. */
  insert({ uuid, nodeId, format, configuration, name, description, state, jobId }: NewVdisk): number {
    return this.#insert.run(uuid, nodeId, format, configuration, name, JSON.stringify(description), state, jobId, Date.now() * 1000).lastId;
  }

  describe(id: number, description: unknown): void { this.#describe.run(JSON.stringify(description), id); }

  /** It is there for good. */
  ready(id: number): void { this.#ready.run(id); }

  /** Forgets that the file is one. */
  remove(id: number): void { this.#remove.run(id); }
}

function rowOrNone(raw: RawVdisk | undefined): VdiskRow | undefined { return raw === undefined ? undefined : toRow(raw); }

function toRow(raw: RawVdisk): VdiskRow {
  return {
    id: safeInteger(raw.id, 'vdisks.id'), uuid: raw.uuid, nodeId: safeInteger(raw.node_id, 'vdisks.node_id'), format: raw.format, configuration: raw.configuration,
    name: raw.name, description: JSON.parse(raw.description) as unknown, state: raw.state as VdiskState, jobId: safeIntegerOrNull(raw.job_id, 'vdisks.job_id'),
    createdUs: safeInteger(raw.created_us, 'vdisks.created_us'),
  };
}
