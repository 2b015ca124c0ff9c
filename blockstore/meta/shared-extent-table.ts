/**
 * Shared extents: runs of blocks that a layer has from another place than its own file and its backing, which is what a range
 * clone and a copy under the mount make. Main thread only.
 *
 * A row says: these blocks of this layer are those blocks of that sealed layer, which owns them; or they are zeros (no source).
 * Ownership comes first: where the layer owns a block, what a row says of it is dead, until `trim` takes it away. Rows of one layer
 * never overlap. `limitBytes` ends an extent within its last block, behind which there are zeros: at the odd end of a file, or of
 * what may be seen of a source. A layer that a row names is never removed.
 */
import { BLOCK_BYTES } from '../units.js';
import type { BlockRun } from './rows.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';
import { safeInteger, safeIntegerOrNull } from './sql-values.js';

export interface SharedExtent {
  readonly block: number;
  readonly count: number;
  /** Null: zeros. */
  readonly sourceLayerId: number | null;
  readonly sourceBlock: number;
  /** Bytes from the extent's begin that may be seen, when its last block is seen in part. */
  readonly limitBytes: number | null;
}

interface RawExtent {
  readonly first_block: number;
  readonly block_count: number;
  readonly source_layer_id: number | null;
  readonly source_block: number;
  readonly limit_bytes: number | null;
}

/** Larger than any block number: SQLite's integers and JavaScript's agree on it. */
const BEHIND_ALL = Number.MAX_SAFE_INTEGER;

export class SharedExtentTable {
  readonly #connection: SqlConnection;
  readonly #overlapping: SqlStatement<RawExtent>;
  readonly #count: SqlStatement<{ readonly count: number }>;
  readonly #any: SqlStatement<unknown>;
  readonly #bytes: SqlStatement<{ readonly blocks: number | null }>;
  readonly #sources: SqlStatement<{ readonly id: number }>;
  readonly #bySource: SqlStatement<{ readonly id: number; readonly blocks: number }>;
  readonly #sharing: SqlStatement<{ readonly id: number }>;
  readonly #put: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;
  readonly #clear: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    this.#connection = connection;
    // Rows do not overlap, so of those that begin before the range only the last can reach into it.
    this.#overlapping = connection.prepare(
      `SELECT first_block, block_count, source_layer_id, source_block, limit_bytes FROM shared_extents
       WHERE layer_id = ? AND first_block < ?
         AND first_block >= coalesce((SELECT max(first_block) FROM shared_extents WHERE layer_id = ? AND first_block <= ?), 0)
         AND first_block + block_count > ?
       ORDER BY first_block`,
    );
    this.#count = connection.prepare('SELECT count(*) AS count FROM shared_extents WHERE layer_id = ?');
    this.#any = connection.prepare('SELECT 1 FROM shared_extents WHERE layer_id = ? LIMIT 1');
    this.#bytes = connection.prepare('SELECT sum(block_count) AS blocks FROM shared_extents WHERE layer_id = ? AND source_layer_id IS NOT NULL');
    this.#sources = connection.prepare('SELECT DISTINCT source_layer_id AS id FROM shared_extents WHERE layer_id = ? AND source_layer_id IS NOT NULL ORDER BY id');
    this.#bySource = connection.prepare(
      'SELECT source_layer_id AS id, sum(block_count) AS blocks FROM shared_extents WHERE layer_id = ? AND source_layer_id IS NOT NULL GROUP BY source_layer_id ORDER BY id',
    );
    this.#sharing = connection.prepare('SELECT DISTINCT layer_id AS id FROM shared_extents ORDER BY id');
    this.#put = connection.prepare(
      'INSERT INTO shared_extents (layer_id, first_block, block_count, source_layer_id, source_block, limit_bytes) VALUES (?, ?, ?, ?, ?, ?)',
    );
    this.#remove = connection.prepare('DELETE FROM shared_extents WHERE layer_id = ? AND first_block = ?');
    this.#clear = connection.prepare('DELETE FROM shared_extents WHERE layer_id = ?');
  }

  /** All of a layer's, ascending. */
  of(layerId: number): SharedExtent[] {
    return this.between(layerId, 0, BEHIND_ALL);
  }

  /** Those that have something of the blocks from `first` up to, and without, `end`. */
  between(layerId: number, first: number, end: number): SharedExtent[] {
    return this.#overlapping.all(layerId, end, layerId, first, first).map(toExtent);
  }

  count(layerId: number): number {
    return this.#count.get(layerId)?.count ?? 0;
  }

  isEmpty(layerId: number): boolean {
    return this.#any.get(layerId) === undefined;
  }

  /** Bytes that the layer has from others. */
  sharedBytes(layerId: number): number {
    return (this.#bytes.get(layerId)?.blocks ?? 0) * BLOCK_BYTES;
  }

  /** The layers that it has them from. */
  sources(layerId: number): number[] {
    return this.#sources.all(layerId).map(({ id }) => id);
  }

  /** The same with how much it has from each. */
  bytesBySource(layerId: number): { readonly layerId: number; readonly bytes: number }[] {
    return this.#bySource.all(layerId).map(({ id, blocks }) => ({ layerId: id, bytes: blocks * BLOCK_BYTES }));
  }

  /** Layers that have shared extents. */
  sharingLayers(): number[] {
    return this.#sharing.all().map(({ id }) => id);
  }

  /** The layer has these from now on; what its rows said of the same blocks is forgotten. In any order, not overlapping. */
  put(layerId: number, extents: readonly SharedExtent[]): void {
    this.#connection.transaction(() => {
      for (const extent of [...extents].sort((a, b) => a.block - b.block)) {
        this.cut(layerId, extent.block, extent.block + extent.count);
        this.#append(layerId, extent);
      }
    });
  }

  /** Forgets what is said of the blocks from `first` up to, and without, `end`. */
  cut(layerId: number, first: number, end = BEHIND_ALL): void {
    this.#connection.transaction(() => {
      for (const extent of this.between(layerId, first, end)) {
        this.#remove.run(layerId, extent.block);
        if (extent.block < first) this.#insert(layerId, partOf(extent, extent.block, first));
        if (extent.block + extent.count > end) this.#insert(layerId, partOf(extent, end, extent.block + extent.count));
      }
    });
  }

  /** Nothing behind `sizeBytes` comes back when the disk grows again. */
  cutBehind(layerId: number, sizeBytes: number): void {
    this.#connection.transaction(() => {
      const end = Math.ceil(sizeBytes / BLOCK_BYTES);
      this.cut(layerId, end);
      const rest = sizeBytes % BLOCK_BYTES;
      const [last] = rest === 0 ? [] : this.between(layerId, end - 1, end);
      if (last === undefined || last.sourceLayerId === null) return;
      const limitBytes = sizeBytes - last.block * BLOCK_BYTES;
      if (last.limitBytes !== null && last.limitBytes <= limitBytes) return;
      this.#remove.run(layerId, last.block);
      this.#insert(layerId, { ...last, limitBytes });
    });
  }

  /** Takes away what is dead at either end of an extent: blocks for which `isOwned`. What is dead in the middle stays, for rows are to be few. */
  trim(layerId: number, isOwned: (block: number) => boolean): void {
    this.#connection.transaction(() => {
      for (const { block, count } of this.of(layerId)) {
        let first = block;
        let end = block + count;
        while (first < end && isOwned(first)) first += 1;
        while (end > first && isOwned(end - 1)) end -= 1;
        if (first > block) this.cut(layerId, block, first);
        if (end < block + count) this.cut(layerId, end, block + count);
      }
    });
  }

  /** Puts `extents` in the place of all that there are. */
  replaceAll(layerId: number, extents: readonly SharedExtent[]): void {
    this.#connection.transaction(() => {
      this.clear(layerId);
      for (const extent of extents) this.#insert(layerId, extent);
    });
  }

  clear(layerId: number): void {
    this.#clear.run(layerId);
  }

  /** Joins what goes on where the row before it ends, so that a file copied in pieces is one row. */
  #append(layerId: number, extent: SharedExtent): void {
    const [before] = extent.block === 0 ? [] : this.between(layerId, extent.block - 1, extent.block);
    if (before === undefined || !goesOn(before, extent)) {
      this.#insert(layerId, extent);
      return;
    }
    this.#remove.run(layerId, before.block);
    const limitBytes = extent.limitBytes === null ? null : extent.limitBytes + before.count * BLOCK_BYTES;
    this.#insert(layerId, { ...before, count: before.count + extent.count, limitBytes });
  }

  #insert(layerId: number, extent: SharedExtent): void {
    this.#put.run(layerId, extent.block, extent.count, extent.sourceLayerId, extent.sourceBlock, extent.limitBytes);
  }
}

/** The blocks of extents, as runs. */
export function runsOf(extents: readonly SharedExtent[]): BlockRun[] {
  return extents.map(({ block, count }) => ({ block, count }));
}

function goesOn(before: SharedExtent, extent: SharedExtent): boolean {
  if (before.limitBytes !== null || before.sourceLayerId !== extent.sourceLayerId) return false;
  return extent.sourceLayerId === null || before.sourceBlock + before.count === extent.sourceBlock;
}

/** The blocks of an extent from `first` up to, and without, `end`. */
function partOf(extent: SharedExtent, first: number, end: number): SharedExtent {
  const skipped = first - extent.block;
  const isTail = end === extent.block + extent.count;
  return {
    block: first, count: end - first, sourceLayerId: extent.sourceLayerId, sourceBlock: extent.sourceLayerId === null ? 0 : extent.sourceBlock + skipped,
    limitBytes: extent.limitBytes === null || !isTail ? null : extent.limitBytes - skipped * BLOCK_BYTES,
  };
}

function toExtent(raw: RawExtent): SharedExtent {
  return {
    block: safeInteger(raw.first_block, 'shared_extents.first_block'),
    count: safeInteger(raw.block_count, 'shared_extents.block_count'),
    sourceLayerId: safeIntegerOrNull(raw.source_layer_id, 'shared_extents.source_layer_id'),
    sourceBlock: safeInteger(raw.source_block, 'shared_extents.source_block'),
    limitBytes: safeIntegerOrNull(raw.limit_bytes, 'shared_extents.limit_bytes'),
  };
}
