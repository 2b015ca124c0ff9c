/**
 * Snapshots: which there are, of which container, and the directory that holds their frozen nodes. Main thread only.
 *
 * A snapshot's content is nodes like any other, so that reading, cloning, checking and counting need nothing of their own;
 * this table says only what those nodes are. FORMAT.md explains every column.
 */
import { OffshootError } from '../errors.js';
import type { Consistency, NewSnapshot, SnapshotRow } from './rows.js';
import { safeInteger } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

interface RawSnapshot {
  readonly id: number;
  readonly container_id: number;
  readonly name: string;
  readonly directory_id: number;
  readonly path: string | null;
  readonly uuid: string;
  readonly consistency: string;
  readonly message: string | null;
  readonly created_us: number;
}

function toSnapshotRow(raw: RawSnapshot): SnapshotRow {
  return {
    id: safeInteger(raw.id, 'snapshots.id'),
    containerId: safeInteger(raw.container_id, 'snapshots.container_id'),
    name: raw.name,
    directoryId: safeInteger(raw.directory_id, 'snapshots.directory_id'),
    path: raw.path,
    uuid: raw.uuid,
    consistency: raw.consistency as Consistency,
    message: raw.message,
    createdUs: safeInteger(raw.created_us, 'snapshots.created_us'),
  };
}

export class SnapshotTable {
  readonly #byName: SqlStatement<RawSnapshot>;
  readonly #byDirectory: SqlStatement<RawSnapshot>;
  readonly #byUuid: SqlStatement<RawSnapshot>;
  readonly #of: SqlStatement<RawSnapshot>;
  readonly #all: SqlStatement<RawSnapshot>;
  readonly #insert: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;
  readonly #describe: SqlStatement<unknown>;
  readonly #noteSource: SqlStatement<unknown>;
  readonly #clonesOf: SqlStatement<{ readonly node_id: number }>;
  readonly #sourceOf: SqlStatement<{ readonly source_id: number }>;

  constructor(connection: SqlConnection) {
    const select = 'SELECT id, container_id, name, directory_id, path, uuid, consistency, message, created_us FROM snapshots';
    this.#byName = connection.prepare(`${select} WHERE container_id = ? AND name = ?`);
    this.#byDirectory = connection.prepare(`${select} WHERE directory_id = ?`);
    this.#byUuid = connection.prepare(`${select} WHERE uuid = ?`);
    this.#of = connection.prepare(`${select} WHERE container_id = ? ORDER BY id`);
    this.#all = connection.prepare(`${select} ORDER BY id`);
    this.#insert = connection.prepare(
      'INSERT INTO snapshots (container_id, name, directory_id, path, uuid, consistency, message, created_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
    );
    this.#remove = connection.prepare('DELETE FROM snapshots WHERE id = ?');
    this.#noteSource = connection.prepare('INSERT OR REPLACE INTO snapshot_clones (node_id, source_id) VALUES (?, ?)');
    this.#clonesOf = connection.prepare('SELECT node_id FROM snapshot_clones WHERE source_id = ? ORDER BY node_id');
    this.#sourceOf = connection.prepare('SELECT source_id FROM snapshot_clones WHERE node_id = ?');
    this.#describe = connection.prepare('UPDATE snapshots SET consistency = ?, message = ? WHERE id = ?');
  }

  byName(containerId: number, name: string): SnapshotRow | undefined {
    return rowOrNone(this.#byName.get(containerId, name));
  }

  byDirectory(directoryId: number): SnapshotRow | undefined {
    return rowOrNone(this.#byDirectory.get(directoryId));
  }

  byUuid(uuid: string): SnapshotRow | undefined {
    return rowOrNone(this.#byUuid.get(uuid));
  }

  /** Of one container, oldest first. */
  of(containerId: number): SnapshotRow[] {
    return this.#of.all(containerId).map(toSnapshotRow);
  }

  /** All of the store, oldest first. */
  all(): SnapshotRow[] {
    return this.#all.all().map(toSnapshotRow);
  }

  insert(fields: NewSnapshot): SnapshotRow {
    if (this.byName(fields.containerId, fields.name) !== undefined) {
      throw new OffshootError('already-exists', `the snapshot "@${fields.name}" exists already: choose another name, or remove it first`, { name: fields.name });
    }
    const { lastId } = this.#insert.run(
      fields.containerId, fields.name, fields.directoryId, fields.path, fields.uuid, fields.consistency, fields.message, fields.createdUs,
    );
    return { ...fields, id: lastId };
  }

  /** Says of a snapshot what came out only after it was taken. */
  describe(id: number, consistency: Consistency, message: string | null): void {
    this.#describe.run(consistency, message, id);
  }

  /** The node is a clone of a frozen one. Forgotten when either of them goes. */
  noteSource(nodeId: number, sourceId: number): void {
    this.#noteSource.run(nodeId, sourceId);
  }

  /** Ids of the nodes that were cloned from the frozen one, and are still there. */
  clonesOf(sourceId: number): number[] {
    return this.#clonesOf.all(sourceId).map((row) => safeInteger(row.node_id, 'snapshot_clones.node_id'));
  }

  /** The frozen node that this one was cloned from, if that is still there. */
  sourceOf(nodeId: number): number | undefined {
    return this.#sourceOf.get(nodeId)?.source_id;
  }

  /** Removes the row; the nodes are the caller's. */
  remove(id: number): void {
    this.#remove.run(id);
  }
}

function rowOrNone(raw: RawSnapshot | undefined): SnapshotRow | undefined {
  return raw === undefined ? undefined : toSnapshotRow(raw);
}
