/**
 * What a check asks of the database: rows as they lie there, without the conclusions that the tables' own classes draw.
 *
 * A check must be able to look at rows that nothing else would accept, so values come back raw. Everything is read in
 * batches, because a check of a store in use lets other work in between two of them. Main thread only; writes nothing.
 */
import type { SqlConnection, SqlStatement } from './sql-connection.js';

/** A layer's row with the node that has it as its active layer, if one has. */
export interface AuditLayer {
  readonly id: number;
  readonly kind: string;
  readonly external_path: string | null;
  readonly external_identity: string | null;
  readonly backing_id: number | null;
  readonly size_bytes: number;
  readonly sealed: number;
  readonly complete: number;
  readonly node_id: number | null;
  readonly node_size_bytes: number | null;
  readonly backing_sealed: number | null;
}

export interface AuditPages {
  readonly first_page: number;
  readonly page_count: number;
  readonly owned_blocks: number;
  readonly bitmap: Uint8Array | null;
}

export interface AuditExtent {
  readonly first_block: number;
  readonly block_count: number;
  readonly source_layer_id: number | null;
  readonly source_block: number;
  readonly limit_bytes: number | null;
}

export interface AuditNode {
  readonly id: number;
  readonly name: string;
  readonly parent_id: number | null;
  readonly parent_kind: string | null;
  readonly is_reached: number;
  readonly fault: string | null;
}

/** A machine that is not as one is: what lies at its place, and the job that makes it. */
export interface AuditMachine {
  readonly id: number;
  readonly name: string;
  readonly node_kind: string | null;
  readonly frozen: number | null;
  readonly state: string;
  readonly job_id: number | null;
  readonly job_state: string | null;
}

/** Rows that one statement returns: small enough that a flush does not wait for them. */
const BATCH_ROWS = 1024;
const PROBLEMS_MAX = 100;

export class Audit {
  readonly #integrity: SqlStatement<{ readonly integrity_check: string }>;
  readonly #dangling: SqlStatement<{ readonly table: string; readonly rowid: number | null; readonly parent: string }>;
  readonly #layers: SqlStatement<AuditLayer>;
  readonly #pages: SqlStatement<AuditPages>;
  readonly #extents: SqlStatement<AuditExtent>;
  readonly #nodes: SqlStatement<AuditNode>;
  readonly #backings: SqlStatement<{ readonly id: number; readonly backing_id: number }>;
  readonly #machines: SqlStatement<AuditMachine>;

  constructor(connection: SqlConnection) {
    this.#integrity = connection.prepare(`PRAGMA integrity_check(${PROBLEMS_MAX})`);
    this.#dangling = connection.prepare('PRAGMA foreign_key_check');
    this.#layers = connection.prepare(
      `SELECT layers.id, layers.kind, layers.external_path, layers.external_identity, layers.backing_id, layers.size_bytes, layers.sealed, layers.complete,
         nodes.id AS node_id, nodes.size_bytes AS node_size_bytes, backing.sealed AS backing_sealed
       FROM layers LEFT JOIN nodes ON nodes.layer_id = layers.id LEFT JOIN layers AS backing ON backing.id = layers.backing_id
       WHERE layers.id > ? ORDER BY layers.id LIMIT ?`,
    );
    this.#pages = connection.prepare(
      `SELECT first_page, page_count, owned_blocks, bitmap FROM ownership WHERE layer_id = ? AND first_page > ? ORDER BY first_page LIMIT ${BATCH_ROWS}`,
    );
    this.#extents = connection.prepare('SELECT first_block, block_count, source_layer_id, source_block, limit_bytes FROM shared_extents WHERE layer_id = ? ORDER BY first_block');
    // What hangs from the root or from an orphan is reached; what is left runs in a circle.
    this.#nodes = connection.prepare(
      `WITH RECURSIVE reached(id) AS (
         SELECT id FROM nodes WHERE parent_id IS NULL
         UNION
         SELECT nodes.id FROM nodes JOIN reached ON nodes.parent_id = reached.id
       )
       SELECT nodes.id, nodes.name, nodes.parent_id, parent.kind AS parent_kind, nodes.id IN (SELECT id FROM reached) AS is_reached, nodes.fault
       FROM nodes LEFT JOIN nodes AS parent ON parent.id = nodes.parent_id
       WHERE nodes.fault IS NOT NULL OR (nodes.parent_id IS NULL AND nodes.id <> 1)
         OR (nodes.parent_id IS NOT NULL AND (parent.kind IS NOT 'directory' OR nodes.id NOT IN (SELECT id FROM reached)))
       ORDER BY nodes.id`,
    );
    this.#backings = connection.prepare('SELECT id, backing_id FROM layers WHERE backing_id IS NOT NULL AND complete = 0');
    this.#machines = connection.prepare(
      `SELECT machines.id, machines.name, nodes.kind AS node_kind, nodes.frozen, machines.state, machines.job_id, jobs.state AS job_state
       FROM machines LEFT JOIN nodes ON nodes.id = machines.node_id LEFT JOIN jobs ON jobs.id = machines.job_id
       WHERE nodes.kind IS NOT 'directory' OR nodes.frozen IS NOT 0 OR (machines.state = 'making' AND jobs.state IS NOT 'running')
       ORDER BY machines.id`,
    );
  }

  /** Machines in a place where none can be, and those that nobody makes any more. */
  unusualMachines(): AuditMachine[] {
    return this.#machines.all();
  }

  /** What SQLite finds wrong with its own file; each a sentence. Reads all of it, and takes its time. */
  databaseProblems(): string[] {
    const problems = this.#integrity.all().map((row) => row.integrity_check).filter((text) => text !== 'ok');
    for (const row of this.#dangling.all().slice(0, PROBLEMS_MAX)) {
      problems.push(`row ${row.rowid ?? 'without a number'} of table ${row.table} refers to a row of ${row.parent} that does not exist`);
    }
    return problems;
  }

  /** The next layers by their ids. */
  layersAfter(id: number, limit: number): AuditLayer[] {
    return this.#layers.all(id, limit);
  }

  /** The next rows of what a layer owns. */
  pagesAfter(layerId: number, firstPage: number): AuditPages[] {
    return this.#pages.all(layerId, firstPage);
  }

  /** What a layer has from others. A layer has no more rows than one step can look at. */
  extentsOf(layerId: number): AuditExtent[] {
    return this.#extents.all(layerId);
  }

  /** The nodes that a check has something to say about: faulted, orphans, in a wrong place. */
  unusualNodes(): AuditNode[] {
    return this.#nodes.all();
  }

  /** Which layer reads through which. */
  backings(): Map<number, number> {
    return new Map(this.#backings.all().map((row) => [row.id, row.backing_id]));
  }
}
