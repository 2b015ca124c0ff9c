/**
 * Who reads through which layer, asked and changed for operations that give a chain another shape: merge, promote, rebase. Main thread only.
 *
 * A layer is referred to by nodes, by incomplete layers above it, and by blocks that other layers have from it (`shared_extents`).
 * What is asked here is asked again within the transaction that relies on it.
 */
import { safeInteger } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

interface RawId {
  readonly id: number;
}

export class LayerLinks {
  readonly #readers: SqlStatement<RawId>;
  readonly #nodeOf: SqlStatement<RawId>;
  readonly #sharing: SqlStatement<RawId>;
  readonly #damaged: SqlStatement<RawId>;
  readonly #deep: SqlStatement<{ readonly node_id: number; readonly depth: number }>;
  readonly #shape: SqlStatement<{ readonly newest: number | null; readonly layers: number }>;
  readonly #replaceBacking: SqlStatement<unknown>;
  readonly #setWriter: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    this.#readers = connection.prepare('SELECT id FROM layers WHERE backing_id = ? AND complete = 0 ORDER BY id LIMIT 2');
    this.#nodeOf = connection.prepare('SELECT id FROM nodes WHERE layer_id = ?');
    this.#sharing = connection.prepare(
      'SELECT layer_id AS id FROM shared_extents WHERE layer_id = ? UNION ALL SELECT layer_id AS id FROM shared_extents WHERE source_layer_id = ? LIMIT 1',
    );
    this.#damaged = connection.prepare('SELECT layer_id AS id FROM damages WHERE layer_id = ? LIMIT 1');
    this.#deep = connection.prepare(
      `WITH RECURSIVE chain(id, depth) AS (
         SELECT id, 1 FROM layers WHERE complete = 1 OR backing_id IS NULL
         UNION ALL
         SELECT layers.id, chain.depth + 1 FROM layers JOIN chain ON layers.backing_id = chain.id WHERE layers.complete = 0
       )
       SELECT nodes.id AS node_id, chain.depth FROM chain JOIN nodes ON nodes.layer_id = chain.id WHERE chain.depth > ? ORDER BY chain.depth DESC, nodes.id LIMIT ?`,
    );
    this.#shape = connection.prepare('SELECT max(id) AS newest, count(*) AS layers FROM layers');
    this.#replaceBacking = connection.prepare('UPDATE layers SET backing_id = ? WHERE backing_id = ?');
    this.#setWriter = connection.prepare('UPDATE layers SET written_by = ? WHERE id = ?');
  }

  /** The one layer that reads through this one; null when there is none, more than one, or somebody else who refers to it. */
  soleReader(layerId: number): number | null {
    const readers = this.#readers.all(layerId);
    if (readers.length !== 1 || this.#nodeOf.get(layerId) !== undefined) return null;
    return safeInteger(readers[0]?.id ?? 0, 'layers.id');
  }

  /** The layer has blocks from elsewhere than its backing, or others have blocks from it. */
  hasSharedExtents(layerId: number): boolean {
    return this.#sharing.get(layerId, layerId) !== undefined;
  }

  /** Something is known to be wrong with its content. */
  isDamaged(layerId: number): boolean {
    return this.#damaged.get(layerId) !== undefined;
  }

  /** Nodes whose chain has more than `layers` layers, the longest first. */
  nodesDeeperThan(layers: number, limit: number): { readonly nodeId: number; readonly depth: number }[] {
    return this.#deep.all(layers, limit).map((row) => ({ nodeId: row.node_id, depth: row.depth }));
  }

  /** A text that is another one when layers came or went. */
  shape(): string {
    const row = this.#shape.get();
    return `${row?.newest ?? 0}/${row?.layers ?? 0}`;
  }

  /** Whatever stands on `from` stands on `to` now. */
  replaceBacking(from: number, to: number): void {
    this.#replaceBacking.run(to, from);
  }

  /** The layer counts as written by this node: it is the source of the others that stand on it. */
  setWriter(layerId: number, nodeId: number): void {
    this.#setWriter.run(nodeId, layerId);
  }
}
