/**
 * Exports: what is shown to others, as what, and for whom. Main thread only.
 *
 * A node is shown once in each way. Kinds, clients and options are checked by whoever inserts; the row keeps them as they were written.
 * FORMAT.md explains every column.
 */
import { OffshootError } from '../errors.js';
import { safeInteger } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export type ExportRowKind = 'nfs' | 'smb' | 'iscsi' | 'nbd' | 'block';

export interface ExportRow {
  readonly id: number;
  readonly uuid: string;
  readonly nodeId: number;
  readonly kind: ExportRowKind;
  readonly clients: readonly string[];
  readonly readOnly: boolean;
  readonly options: Readonly<Record<string, string>>;
  readonly createdUs: number;
}

export type NewExport = Pick<ExportRow, 'uuid' | 'nodeId' | 'kind' | 'clients' | 'readOnly' | 'options'>;

interface RawExport {
  readonly id: number;
  readonly uuid: string;
  readonly node_id: number;
  readonly kind: string;
  readonly clients: string;
  readonly read_only: number;
  readonly options: string;
  readonly created_us: number;
}

export class ExportTable {
  readonly #connection: SqlConnection;
  readonly #byId: SqlStatement<RawExport>;
  readonly #byNode: SqlStatement<RawExport>;
  readonly #byKind: SqlStatement<RawExport>;
  readonly #all: SqlStatement<RawExport>;
  readonly #insert: SqlStatement<unknown>;
  readonly #restore: SqlStatement<unknown>;
  readonly #options: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    const columns = 'id, uuid, node_id, kind, clients, read_only, options, created_us';
    const select = `SELECT ${columns} FROM exports`;
    this.#connection = connection;
    this.#byId = connection.prepare(`${select} WHERE id = ?`);
    this.#byNode = connection.prepare(`${select} WHERE node_id = ? ORDER BY kind`);
    this.#byKind = connection.prepare(`${select} WHERE kind = ? ORDER BY id`);
    this.#all = connection.prepare(`${select} ORDER BY id`);
    this.#insert = connection.prepare('INSERT INTO exports (uuid, node_id, kind, clients, read_only, options, created_us) VALUES (?, ?, ?, ?, ?, ?, ?)');
    this.#restore = connection.prepare(`INSERT INTO exports (${columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`);
    this.#options = connection.prepare('UPDATE exports SET options = ? WHERE id = ?');
    this.#remove = connection.prepare('DELETE FROM exports WHERE id = ?');
  }

  byId(id: number): ExportRow | undefined {
    const raw = this.#byId.get(id);
    return raw === undefined ? undefined : toRow(raw);
  }

  ofNode(nodeId: number): ExportRow[] { return this.#byNode.all(nodeId).map(toRow); }
  ofKind(kind: ExportRowKind): ExportRow[] { return this.#byKind.all(kind).map(toRow); }
  /** Oldest first. */
  all(): ExportRow[] { return this.#all.all().map(toRow); }

  /** `already-exists` when the node is shown in this way already. */
  insert({ uuid, nodeId, kind, clients, readOnly, options }: NewExport): ExportRow {
    return this.#connection.transaction(() => {
      if (this.ofNode(nodeId).some((row) => row.kind === kind)) {
        throw new OffshootError('already-exists', `it is presented as ${kind} already: withdraw that first, or see it with offshoot exports`, { kind });
      }
      const { lastId } = this.#insert.run(uuid, nodeId, kind, JSON.stringify(clients), readOnly ? 1 : 0, JSON.stringify(options), Date.now() * 1000);
      const row = this.byId(lastId);
      if (row === undefined) throw new Error('an export that was written is not there');
      return row;
    });
  }

  /** The row as it was, id and all: a withdrawal that could not be done. */
  restore({ id, uuid, nodeId, kind, clients, readOnly, options, createdUs }: ExportRow): void {
    this.#restore.run(id, uuid, nodeId, kind, JSON.stringify(clients), readOnly ? 1 : 0, JSON.stringify(options), createdUs);
  }

  /** What was settled when it was shown first (a port, say) is kept, so that it is the same ever after. */
  setOptions(id: number, options: Readonly<Record<string, string>>): void { this.#options.run(JSON.stringify(options), id); }

  remove(id: number): void { this.#remove.run(id); }
}

function toRow(raw: RawExport): ExportRow {
  return {
    id: safeInteger(raw.id, 'exports.id'), uuid: raw.uuid, nodeId: safeInteger(raw.node_id, 'exports.node_id'), kind: raw.kind as ExportRowKind,
    clients: JSON.parse(raw.clients) as string[], readOnly: raw.read_only === 1, options: JSON.parse(raw.options) as Record<string, string>,
    createdUs: safeInteger(raw.created_us, 'exports.created_us'),
  };
}
