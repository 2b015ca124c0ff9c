/**
 * Who refers to what, all of the store at once: for accounting, which looks at thousands of disks in one go. Main thread only.
 *
 * Three statements, whatever the number of disks; narrow rows, because there are many of them. What is exclusive to a disk cannot be
 * said by asking for that disk alone, so everything is read, and the rest is arithmetic on a graph (`layer-graph.ts`): a recursive
 * query would give one row for each pair of a disk and a layer below it, 5 million for 10,000 disks on chains of 500.
 */
import type { NodeKind } from './rows.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export interface SpaceLayer {
  readonly id: number;
  /** What is read through it: null when it is complete, or stands on nothing. */
  readonly backing_id: number | null;
  /** 1: its data file is one of the store's. */
  readonly stored: number;
  readonly sealed: number;
  readonly written_by: number | null;
}

export interface SpaceNode {
  readonly id: number;
  readonly parent_id: number | null;
  readonly name: string;
  readonly kind: NodeKind;
  readonly size_bytes: number;
  readonly layer_id: number | null;
  readonly frozen: number;
}

/** Some block of `layer_id` comes from `source_layer_id`. */
export interface SpaceShare {
  readonly layer_id: number;
  readonly source_layer_id: number;
}

export interface SpaceRows {
  readonly layers: readonly SpaceLayer[];
  readonly nodes: readonly SpaceNode[];
  readonly shares: readonly SpaceShare[];
}

export class SpaceReader {
  readonly #layers: SqlStatement<SpaceLayer>;
  readonly #nodes: SqlStatement<SpaceNode>;
  readonly #shares: SqlStatement<SpaceShare>;

  constructor(connection: SqlConnection) {
    this.#layers = connection.prepare(
      `SELECT id, CASE complete WHEN 0 THEN backing_id END AS backing_id, kind = 'store' AS stored, sealed, written_by FROM layers`,
    );
    this.#nodes = connection.prepare('SELECT id, parent_id, name, kind, size_bytes, layer_id, frozen FROM nodes');
    this.#shares = connection.prepare('SELECT DISTINCT layer_id, source_layer_id FROM shared_extents WHERE source_layer_id IS NOT NULL');
  }

  /** One moment of the store: nobody else writes, and nothing comes between statements of one turn. */
  read(): SpaceRows {
    return { layers: this.#layers.all(), nodes: this.#nodes.all(), shares: this.#shares.all() };
  }
}
