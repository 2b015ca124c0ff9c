/**
 * Which blocks an incomplete layer owns: bitmaps for pages in part, runs for pages in full. Main thread only.
 *
 * A row is either a run of whole pages (no bitmap) or one page with the bitmap of its owned blocks. Rows of one layer
 * never overlap, and two runs never touch: neighbours are joined as they appear, so that a filled disk ends as one
 * row. Ownership only grows; it goes with its layer, or by `clear` when the layer has become complete, and for the blocks
 * that a range clone puts others in the place of, by `remove`.
 *
 * Adding sorts the runs into pages first, then costs one SELECT and one write for each page touched.
 */
import { PAGE_BITMAP_BYTES, PAGE_BLOCKS } from '../units.js';
import { countBlocks, mergeBitmap, pagesOfRuns } from './ownership-pages.js';
import type { BlockRun } from './rows.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

const BATCH_ROWS = 1024;
/** Two megabytes of bitmaps. */
const PACKED_ROWS = 8192;
const FULL_PAGE = new Uint8Array(PAGE_BITMAP_BYTES).fill(0xff);

interface RawPages {
  readonly first_page: number;
  readonly page_count: number;
  readonly bitmap: Uint8Array | null;
}

/** Numbers and bitmaps of many rows, one behind the other. */
interface RawPacked {
  readonly pages: string | null;
  readonly bitmaps: Uint8Array | null;
  readonly runs: string | null;
  readonly row_count: number;
  readonly last_page: number | null;
}

export class OwnershipTable {
  readonly #connection: SqlConnection;
  /** The last row that begins at or before a page. */
  readonly #atOrBefore: SqlStatement<RawPages>;
  readonly #after: SqlStatement<RawPages>;
  readonly #any: SqlStatement<{ readonly first_page: number }>;
  readonly #next: SqlStatement<{ readonly first_page: number }>;
  readonly #copy: SqlStatement<unknown>;
  readonly #sum: SqlStatement<{ readonly blocks: number | null }>;
  readonly #packed: SqlStatement<RawPacked>;
  readonly #put: SqlStatement<unknown>;
  readonly #removeBetween: SqlStatement<unknown>;
  readonly #clear: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    const select = 'SELECT first_page, page_count, bitmap FROM ownership';
    this.#connection = connection;
    this.#atOrBefore = connection.prepare(`${select} WHERE layer_id = ? AND first_page <= ? ORDER BY first_page DESC LIMIT 1`);
    this.#after = connection.prepare(`${select} WHERE layer_id = ? AND first_page > ? ORDER BY first_page LIMIT ${BATCH_ROWS}`);
    this.#any = connection.prepare('SELECT first_page FROM ownership WHERE layer_id = ? LIMIT 1');
    this.#next = connection.prepare('SELECT first_page FROM ownership WHERE layer_id = ? AND first_page > ? ORDER BY first_page LIMIT 1');
    this.#copy = connection.prepare(
      'INSERT INTO ownership (layer_id, first_page, page_count, owned_blocks, bitmap) SELECT ?, first_page, page_count, owned_blocks, bitmap FROM ownership WHERE layer_id = ?',
    );
    this.#sum = connection.prepare('SELECT sum(owned_blocks) AS blocks FROM ownership WHERE layer_id = ?');
    // Rows as objects cost some microseconds each, most of it for the bitmap's own buffer. One text and one blob for thousands do not.
    this.#packed = connection.prepare(
      `SELECT group_concat(first_page, ' ') FILTER (WHERE bitmap IS NOT NULL) AS pages, CAST(group_concat(bitmap, '') AS BLOB) AS bitmaps,
         group_concat(first_page || ' ' || page_count, ' ') FILTER (WHERE bitmap IS NULL) AS runs, count(*) AS row_count, max(first_page) AS last_page
       FROM (SELECT first_page, page_count, bitmap FROM ownership WHERE layer_id = ? AND first_page > ? ORDER BY first_page LIMIT ${PACKED_ROWS})`,
    );
    this.#put = connection.prepare(
      `INSERT INTO ownership (layer_id, first_page, page_count, owned_blocks, bitmap) VALUES (?, ?, ?, ?, ?)
       ON CONFLICT (layer_id, first_page) DO UPDATE SET owned_blocks = excluded.owned_blocks, bitmap = excluded.bitmap`,
    );
    this.#removeBetween = connection.prepare('DELETE FROM ownership WHERE layer_id = ? AND first_page >= ? AND first_page < ?');
    this.#clear = connection.prepare('DELETE FROM ownership WHERE layer_id = ?');
  }

  /** The layer owns these blocks from now on. In any order; blocks that it owns already may be among them. */
  add(layerId: number, runs: readonly BlockRun[]): void {
    if (runs.length === 0) return;
    const { whole, partial } = pagesOfRuns(runs);
    this.#connection.transaction(() => {
      // Ascending, so that neighbouring rows are found in pages of the tree that are at hand.
      for (const [page, bitmap] of [...partial].sort(([left], [right]) => left - right)) this.#addToPage(layerId, page, bitmap);
      for (const { first, end } of whole) this.#addPages(layerId, first, end);
    });
  }

  /** The layer does not own these blocks any more, whether it did or not. */
  remove(layerId: number, runs: readonly BlockRun[]): void {
    this.#connection.transaction(() => {
      for (const run of runs) this.#removeRun(layerId, run.block, run.block + run.count);
    });
  }

  /**
   * Calls `visit` for each row in ascending order of its pages; a bitmap of null means that every block of the pages
   * is owned. Reads in batches: `visit` may use the store.
   */
  forEach(layerId: number, visit: (firstPage: number, pageCount: number, bitmap: Uint8Array | null) => void): void {
    let lastPage = -1;
    for (;;) {
      const rows = this.#after.all(layerId, lastPage);
      for (const row of rows) visit(row.first_page, row.page_count, row.bitmap);
      const last = rows.at(-1);
      if (last === undefined || rows.length < BATCH_ROWS) return;
      lastPage = last.first_page;
    }
  }

  /**
   * The same for a reader that wants all of it, and quickly: `run` for pages in full, `pages` for pages in part, many in one call, their
   * bitmaps one behind the other as 64 words each. In no order. A million rows take a fifth of the time that `forEach` needs.
   */
  forEachPacked(layerId: number, visit: { run(firstPage: number, pageCount: number): void; pages(pages: readonly number[], bitmaps: Int32Array): void }): void {
    for (let lastPage = -1; ; ) {
      const packed = this.#packed.get(layerId, lastPage);
      if (packed === undefined || packed.last_page === null) return;
      const runs = numbersIn(packed.runs);
      for (let i = 0; i < runs.length; i += 2) visit.run(runs[i] ?? 0, runs[i + 1] ?? 0);
      const pages = numbersIn(packed.pages);
      const bitmaps = packed.bitmaps ?? new Uint8Array(0);
      // SQLite puts the bytes of blobs together as they are. Should a later one not, this says so before a map is wrong.
      if (bitmaps.length !== pages.length * PAGE_BITMAP_BYTES) throw new Error(`${pages.length} bitmaps of layer ${layerId} came as ${bitmaps.length} bytes`);
      if (pages.length > 0) visit.pages(pages, wordsOf(bitmaps));
      if (packed.row_count < PACKED_ROWS) return;
      lastPage = packed.last_page;
    }
  }

  /** The same for the rows that say something of the pages from `firstPage` up to, and without, `endPage`. */
  forEachBetween(layerId: number, firstPage: number, endPage: number, visit: (firstPage: number, pageCount: number, bitmap: Uint8Array | null) => void): void {
    const before = this.#atOrBefore.get(layerId, firstPage);
    if (before !== undefined && before.first_page + before.page_count > firstPage) visit(before.first_page, before.page_count, before.bitmap);
    for (let lastPage = firstPage; ; ) {
      const rows = this.#after.all(layerId, lastPage);
      for (const row of rows) {
        if (row.first_page >= endPage) return;
        visit(row.first_page, row.page_count, row.bitmap);
      }
      const last = rows.at(-1);
      if (last === undefined || rows.length < BATCH_ROWS) return;
      lastPage = last.first_page;
    }
  }

  /** True when the layer owns no block. */
  isEmpty(layerId: number): boolean {
    return this.#any.get(layerId) === undefined;
  }

  /** The first page from `page` on of which the layer owns something; undefined when there is none. */
  nextPage(layerId: number, page: number): number | undefined {
    const before = this.#atOrBefore.get(layerId, page);
    if (before !== undefined && before.first_page + before.page_count > page) return page;
    return this.#next.get(layerId, page)?.first_page;
  }

  /** `layerId`, which owns nothing yet, owns what these two own. */
  unite(layerId: number, first: number, second: number): void {
    this.#connection.transaction(() => {
      this.#copy.run(layerId, first);
      this.forEach(second, (page, count, bitmap) => {
        if (bitmap === null) this.#addPages(layerId, page, page + count);
        else this.#addToPage(layerId, page, Uint8Array.from(bitmap));
      });
    });
  }

  /** Number of blocks that the layer owns. */
  ownedBlocks(layerId: number): number {
    return this.#sum.get(layerId)?.blocks ?? 0;
  }

  clear(layerId: number): void {
    this.#clear.run(layerId);
  }

  #addToPage(layerId: number, page: number, added: Uint8Array): void {
    const row = this.#atOrBefore.get(layerId, page);
    if (row?.bitmap === null && row.first_page + row.page_count > page) return;
    const before = row?.first_page === page ? row.bitmap : null;
    if (before !== null) mergeBitmap(added, before);
    const ownedBlocks = countBlocks(added);
    if (ownedBlocks === PAGE_BLOCKS) this.#addPages(layerId, page, page + 1);
    else this.#put.run(layerId, page, 1, ownedBlocks, added);
  }

  /** Takes the rows that have something of the blocks from `first` to `end`, and puts back what of them lies outside. */
  #removeRun(layerId: number, first: number, end: number): void {
    const firstPage = Math.floor(first / PAGE_BLOCKS);
    const endPage = Math.ceil(end / PAGE_BLOCKS);
    const rows: RawPages[] = [];
    this.forEachBetween(layerId, firstPage, endPage, (page, pageCount, bitmap) => { rows.push({ first_page: page, page_count: pageCount, bitmap }); });
    for (const { first_page: page, page_count: count, bitmap } of rows) {
      this.#removeBetween.run(layerId, page, page + 1);
      this.#putRun(layerId, page, Math.min(page + count, firstPage));
      for (const each of new Set([firstPage, endPage - 1])) {
        if (each >= page && each < page + count) this.#putRest(layerId, each, bitmap ?? FULL_PAGE, first - each * PAGE_BLOCKS, end - each * PAGE_BLOCKS);
      }
      this.#putRun(layerId, Math.max(page, endPage), page + count);
    }
  }

  #putRun(layerId: number, first: number, end: number): void {
    if (end > first) this.#put.run(layerId, first, end - first, (end - first) * PAGE_BLOCKS, null);
  }

  /** A page without its blocks from `from` up to, and without, `to`. */
  #putRest(layerId: number, page: number, before: Uint8Array, from: number, to: number): void {
    const rest = Uint8Array.from(before);
    for (let bit = Math.max(0, from); bit < Math.min(PAGE_BLOCKS, to); bit += 1) rest[bit >> 3] = (rest[bit >> 3] ?? 0) & ~(1 << (bit & 7));
    const ownedBlocks = countBlocks(rest);
    if (ownedBlocks > 0) this.#put.run(layerId, page, 1, ownedBlocks, rest);
  }

  /** Replaces every row from `first` to `end` by one run, together with the runs that it touches on either side. */
  #addPages(layerId: number, first: number, end: number): void {
    let [joinedFirst, joinedEnd] = [first, end];
    const below = first === 0 ? undefined : this.#atOrBefore.get(layerId, first - 1);
    if (below?.bitmap === null && below.first_page + below.page_count >= first) {
      if (below.first_page + below.page_count >= end) return;
      joinedFirst = below.first_page;
    }
    // Of all rows that begin within or right behind the new run, only the last can reach beyond its end.
    const above = this.#atOrBefore.get(layerId, end);
    if (above?.bitmap === null) joinedEnd = Math.max(joinedEnd, above.first_page + above.page_count);
    this.#removeBetween.run(layerId, joinedFirst, joinedEnd);
    this.#put.run(layerId, joinedFirst, joinedEnd - joinedFirst, (joinedEnd - joinedFirst) * PAGE_BLOCKS, null);
  }
}

function numbersIn(text: string | null): number[] {
  return text === null ? [] : text.split(' ').map(Number);
}

function wordsOf(bytes: Uint8Array): Int32Array {
  const aligned = bytes.byteOffset % 4 === 0 ? bytes : Uint8Array.from(bytes);
  return new Int32Array(aligned.buffer, aligned.byteOffset, aligned.length / 4);
}
