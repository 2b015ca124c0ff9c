/**
 * Layers: what the chains are made of, and who depends on whom. Main thread only.
 *
 * A layer's own rules (a sealed layer stays sealed, data files, their ids as names on disk) belong to its users; the
 * table makes sure that no layer goes while a node, an incomplete layer or a shared extent still reads through it.
 */
import { OffshootError } from '../errors.js';
import { NODE_COLUMNS, toNodeRow, type RawNode } from './node-table.js';
import type { FileIdentity, LayerKind, LayerRow, LayerUpdate, NewLayer, NodeRow } from './rows.js';
import { parsedJson, safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement, SqlValue } from './sql-connection.js';

const LAYER_COLUMNS = `
  layers.id, layers.kind, layers.external_path, layers.external_identity, layers.backing_id, layers.backing_limit_bytes,
  layers.size_bytes, layers.sealed, layers.complete, layers.created_us,
  layers.written_by`;

interface RawLayer {
  readonly id: number;
  readonly kind: string;
  readonly external_path: string | null;
  readonly external_identity: string | null;
  readonly backing_id: number | null;
  readonly backing_limit_bytes: number | null;
  readonly size_bytes: number;
  readonly sealed: number;
  readonly complete: number;
  readonly created_us: number;
  readonly written_by: number | null;
}

function toLayerRow(raw: RawLayer): LayerRow {
  return {
    id: safeInteger(raw.id, 'layers.id'),
    kind: raw.kind as LayerKind,
    externalPath: raw.external_path,
    externalIdentity:
      raw.external_identity === null
        ? null
        : (parsedJson(raw.external_identity, 'layers.external_identity') as FileIdentity),
    backingId: safeIntegerOrNull(raw.backing_id, 'layers.backing_id'),
    backingLimitBytes: safeIntegerOrNull(raw.backing_limit_bytes, 'layers.backing_limit_bytes'),
    sizeBytes: safeInteger(raw.size_bytes, 'layers.size_bytes'),
    sealed: raw.sealed === 1,
    complete: raw.complete === 1,
    createdUs: safeInteger(raw.created_us, 'layers.created_us'),
    writtenBy: safeIntegerOrNull(raw.written_by, 'layers.written_by'),
  };
}

/** The values of all columns but the id, in the order of the insert and the update. */
function columnValues(fields: NewLayer): SqlValue[] {
  return [
    fields.kind,
    fields.externalPath,
    fields.externalIdentity === null ? null : JSON.stringify(fields.externalIdentity),
    fields.backingId,
    fields.backingLimitBytes,
    fields.sizeBytes,
    fields.sealed ? 1 : 0,
    fields.complete ? 1 : 0,
    fields.createdUs,
    fields.writtenBy ?? null,
  ];
}

export class LayerTable {
  /** Layers that were made for disks whose database rows will point to them soon: nothing refers to them yet, and they are not left over. */
  readonly prepared = new Set<number>();
  readonly #connection: SqlConnection;
  readonly #byId: SqlStatement<RawLayer>;
  readonly #dependants: SqlStatement<RawLayer>;
  readonly #dependantNodes: SqlStatement<RawNode>;
  readonly #unreferenced: SqlStatement<RawLayer>;
  readonly #unreferencedOne: SqlStatement<RawLayer>;
  readonly #insert: SqlStatement<unknown>;
  readonly #update: SqlStatement<unknown>;
  readonly #clearBacking: SqlStatement<unknown>;
  readonly #clearUnusedBackings: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;
  readonly #count: SqlStatement<{ readonly count: number }>;

  constructor(connection: SqlConnection) {
    const select = `SELECT ${LAYER_COLUMNS} FROM layers`;
    this.#connection = connection;
    this.#byId = connection.prepare(`${select} WHERE id = ?`);
    this.#dependants = connection.prepare(`${select} WHERE backing_id = ? AND complete = 0 ORDER BY id`);
    this.#dependantNodes = connection.prepare(
      `WITH RECURSIVE above(layer_id) AS (
         SELECT ?
         UNION
         SELECT shared_extents.layer_id FROM shared_extents WHERE shared_extents.source_layer_id = ?
         UNION
         SELECT layers.id FROM layers JOIN above ON layers.backing_id = above.layer_id WHERE layers.complete = 0
       )
       SELECT ${NODE_COLUMNS} FROM nodes JOIN above ON nodes.layer_id = above.layer_id ORDER BY nodes.id`,
    );
    const isUnreferenced = `NOT EXISTS (SELECT 1 FROM nodes WHERE nodes.layer_id = layers.id)
         AND NOT EXISTS (SELECT 1 FROM layers AS upper WHERE upper.backing_id = layers.id AND upper.complete = 0)
         AND NOT EXISTS (SELECT 1 FROM shared_extents WHERE shared_extents.source_layer_id = layers.id)`;
    this.#unreferenced = connection.prepare(`${select} WHERE ${isUnreferenced} ORDER BY id`);
    this.#unreferencedOne = connection.prepare(`${select} WHERE id = ? AND ${isUnreferenced}`);
    this.#insert = connection.prepare(
      `INSERT INTO layers (kind, external_path, external_identity, backing_id, backing_limit_bytes, size_bytes, sealed, complete, created_us, written_by)
       VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
    );
    this.#update = connection.prepare(
      `UPDATE layers SET kind = ?, external_path = ?, external_identity = ?, backing_id = ?, backing_limit_bytes = ?, size_bytes = ?, sealed = ?, complete = ?, created_us = ?, written_by = ?
       WHERE id = ?`,
    );
    this.#clearBacking = connection.prepare('UPDATE layers SET backing_id = NULL, backing_limit_bytes = NULL WHERE id = ?');
    this.#clearUnusedBackings = connection.prepare(
      'UPDATE layers SET backing_id = NULL, backing_limit_bytes = NULL WHERE backing_id = ? AND complete = 1',
    );
    this.#remove = connection.prepare('DELETE FROM layers WHERE id = ?');
    this.#count = connection.prepare('SELECT count(*) AS count FROM layers');
  }

  byId(id: number): LayerRow | undefined {
    const raw = this.#byId.get(id);
    return raw === undefined ? undefined : toLayerRow(raw);
  }

  insert(fields: NewLayer): LayerRow {
    const { lastId } = this.#insert.run(...columnValues(fields));
    return { ...fields, id: lastId, writtenBy: fields.writtenBy ?? null };
  }

  /** Changes what is given and leaves the rest. A layer that is gone is `not-found`. */
  update(id: number, changes: LayerUpdate): void {
    this.#connection.transaction(() => {
      this.#update.run(...columnValues({ ...this.#existing(id), ...changes }), id);
    });
  }

  /**
   * Removes the row and what it says of owned blocks. A layer that a node or an incomplete layer still reads through
   * is `in-use`; complete layers that only noted it as their backing forget it. The data file is unlinked by the
   * caller, after the commit.
   */
  remove(id: number): void {
    this.#connection.transaction(() => {
      this.#clearUnusedBackings.run(id);
      try {
        this.#remove.run(id);
      } catch (thrown) {
        if ((thrown as { readonly code?: unknown }).code !== 'SQLITE_CONSTRAINT_FOREIGNKEY') throw thrown;
        throw new OffshootError('in-use', `layer ${id} is still read by a disk or another layer, or shares extents with one: fill or remove that one first`, { layerId: id }, thrown);
      }
    });
  }

  /** The layer and its backing chain, down to the first complete layer. */
  chain(id: number): LayerRow[] {
    const layers = [this.#existing(id)];
    const seen = new Set([id]);
    for (let layer = layers[0]; layer !== undefined && !layer.complete && layer.backingId !== null; layer = layers.at(-1)) {
      if (seen.has(layer.backingId)) {
        throw new OffshootError('store-damaged', `the backing chain of layer ${id} runs in a circle: restore the store's database from a backup`, { layerId: id });
      }
      seen.add(layer.backingId);
      layers.push(this.#existing(layer.backingId));
    }
    return layers;
  }

  /** The layers that read through this one directly. */
  dependants(id: number): LayerRow[] {
    return this.#dependants.all(id).map(toLayerRow);
  }

  /** The nodes, orphans among them, that read what this layer holds: whose chain it is in, or shares extents with it. */
  dependantNodes(id: number): NodeRow[] {
    return this.#dependantNodes.all(id, id).map(toNodeRow);
  }

  /** The layers that nothing reads through. Removing them may leave further ones. */
  unreferenced(): LayerRow[] {
    return this.#unreferenced.all().map(toLayerRow).filter((layer) => !this.prepared.has(layer.id));
  }

  /** The layer, if nothing reads through it. */
  ifUnreferenced(id: number): LayerRow | undefined {
    const raw = this.prepared.has(id) ? undefined : this.#unreferencedOne.get(id);
    return raw === undefined ? undefined : toLayerRow(raw);
  }

  /** Layers in the store. */
  count(): number {
    return this.#count.get()?.count ?? 0;
  }

  clearBacking(id: number): void {
    this.#clearBacking.run(id);
  }

  #existing(id: number): LayerRow {
    const row = this.byId(id);
    if (row === undefined) throw new OffshootError('not-found', `layer ${id} does not exist any more`, { layerId: id });
    return row;
  }
}
