/**
 * Limits of containers: how many bytes their layers may take. Main thread only.
 *
 * A row goes with its container. What counts against a limit, and what happens at it, is the business of `quotas.ts`.
 */
import { safeInteger } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export interface QuotaRow {
  readonly nodeId: number;
  readonly limitBytes: number;
}

interface RawQuota {
  readonly node_id: number;
  readonly limit_bytes: number;
}

export class QuotaTable {
  readonly #all: SqlStatement<RawQuota>;
  readonly #set: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    this.#all = connection.prepare('SELECT node_id, limit_bytes FROM quotas ORDER BY node_id');
    this.#set = connection.prepare(
      'INSERT INTO quotas (node_id, limit_bytes) VALUES (?, ?) ON CONFLICT (node_id) DO UPDATE SET limit_bytes = excluded.limit_bytes',
    );
    this.#remove = connection.prepare('DELETE FROM quotas WHERE node_id = ?');
  }

  all(): QuotaRow[] {
    return this.#all.all().map((raw) => ({
      nodeId: safeInteger(raw.node_id, 'quotas.node_id'), limitBytes: safeInteger(raw.limit_bytes, 'quotas.limit_bytes'),
    }));
  }

  set(nodeId: number, limitBytes: number): void {
    this.#set.run(nodeId, limitBytes);
  }

  /** False when there was none. */
  remove(nodeId: number): boolean {
    return this.#remove.run(nodeId).changes > 0;
  }
}
