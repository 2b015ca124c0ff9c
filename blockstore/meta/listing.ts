/**
 * What a listing of a directory shows, in one statement for many entries: nodes, what they own, how their fills are. Main thread only.
 *
 * Asked one by one, ten thousand entries are fifty thousand questions. Everything here is found by an index; nothing is read of the store
 * but the rows of these entries. Of an open disk the map knows better, and the caller asks that.
 */
import { NODE_COLUMNS, toNodeRow, type RawNode } from './node-table.js';
import type { JobState, NodeRow } from './rows.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export interface ListedNode {
  readonly node: NodeRow;
  /** The active layer owns every block. */
  readonly isComplete: boolean;
  /** Blocks that an incomplete active layer owns, as of the last commit. */
  readonly ownedBlocks: number;
  /** Of the latest fill; null without one. */
  readonly fillState: JobState | null;
}

interface RawListed extends RawNode {
  readonly is_complete: number | null;
  readonly owned_blocks: number | null;
  readonly fill_state: string | null;
}

export class Listing {
  readonly #children: SqlStatement<RawListed>;
  readonly #one: SqlStatement<RawListed>;

  constructor(connection: SqlConnection) {
    const select = `SELECT ${NODE_COLUMNS}, layers.complete AS is_complete,
        (SELECT sum(owned_blocks) FROM ownership WHERE ownership.layer_id = nodes.layer_id) AS owned_blocks,
        (SELECT state FROM jobs WHERE jobs.node_id = nodes.id AND jobs.kind = 'fill' ORDER BY jobs.id DESC LIMIT 1) AS fill_state
      FROM nodes LEFT JOIN layers ON layers.id = nodes.layer_id`;
    this.#children = connection.prepare(`${select} WHERE nodes.parent_id = ? AND nodes.id > ? ORDER BY nodes.id LIMIT ?`);
    this.#one = connection.prepare(`${select} WHERE nodes.id = ?`);
  }

  /** At most `limit` entries of a directory with an id above `afterId`, in the order of their ids. */
  children(parentId: number, afterId: number, limit: number): ListedNode[] {
    return this.#children.all(parentId, afterId, limit).map(toListed);
  }

  one(id: number): ListedNode | undefined {
    const raw = this.#one.get(id);
    return raw === undefined ? undefined : toListed(raw);
  }
}

function toListed(raw: RawListed): ListedNode {
  return {
    node: toNodeRow(raw), isComplete: raw.is_complete === 1, ownedBlocks: raw.owned_blocks ?? 0, fillState: raw.fill_state as JobState | null,
  };
}
