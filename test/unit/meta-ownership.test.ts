import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { PAGE_BITMAP_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { addLayer, databasePath, openStore } from '../support/meta-store-fixture.js';

interface Row {
  readonly firstPage: number;
  readonly pageCount: number;
  readonly bitmap: Uint8Array | null;
}

function rowsOf(store: MetaStore, layerId: number): Row[] {
  const rows: Row[] = [];
  store.ownership.forEach(layerId, (firstPage, pageCount, bitmap) => { rows.push({ firstPage, pageCount, bitmap }); });
  return rows;
}

/** The rows as `first-end` for runs and `page:blocks` for bitmaps. */
function shapeOf(store: MetaStore, layerId: number): string[] {
  return rowsOf(store, layerId).map(({ firstPage, pageCount, bitmap }) =>
    bitmap === null ? `${firstPage}-${firstPage + pageCount}` : `${firstPage}:${blocksIn(firstPage, bitmap).length}`,
  );
}

function blocksIn(page: number, bitmap: Uint8Array): number[] {
  const blocks: number[] = [];
  for (let block = 0; block < PAGE_BLOCKS; block += 1) {
    if (((bitmap[Math.floor(block / 8)] ?? 0) >> (block % 8)) % 2 === 1) blocks.push(page * PAGE_BLOCKS + block);
  }
  return blocks;
}

/** Every owned block, and that the rows keep the table's own rules. */
function ownedBlocksOf(store: MetaStore, layerId: number): number[] {
  const owned: number[] = [];
  let previousEnd = -1;
  let previousIsRun = false;
  for (const { firstPage, pageCount, bitmap } of rowsOf(store, layerId)) {
    expect(firstPage).toBeGreaterThanOrEqual(previousEnd);
    if (bitmap === null) {
      if (previousIsRun) expect(firstPage).toBeGreaterThan(previousEnd);
      for (let block = firstPage * PAGE_BLOCKS; block < (firstPage + pageCount) * PAGE_BLOCKS; block += 1) owned.push(block);
    } else {
      expect(pageCount).toBe(1);
      expect(bitmap).toHaveLength(PAGE_BITMAP_BYTES);
      const blocks = blocksIn(firstPage, bitmap);
      expect(blocks.length).toBeGreaterThan(0);
      expect(blocks.length).toBeLessThan(PAGE_BLOCKS);
      owned.push(...blocks);
    }
    previousEnd = firstPage + pageCount;
    previousIsRun = bitmap === null;
  }
  return owned;
}

describe('ownership', () => {
  it('keeps single blocks, whole pages, and what lies across', () => {
    const store = openStore();
    const { id } = addLayer(store);
    expect(store.ownership.ownedBlocks(id)).toBe(0);
    store.ownership.add(id, [{ block: 5, count: 1 }]);
    store.ownership.add(id, [{ block: PAGE_BLOCKS - 1, count: 2 * PAGE_BLOCKS + 2 }]);
    expect(shapeOf(store, id)).toEqual(['0:2', '1-3', '3:1']);
    expect(store.ownership.ownedBlocks(id)).toBe(2 * PAGE_BLOCKS + 3);
    store.ownership.clear(id);
    expect(rowsOf(store, id)).toEqual([]);
  });

  it('puts block 0 in the lowest bit of byte 0', () => {
    const store = openStore();
    const { id } = addLayer(store);
    store.ownership.add(id, [{ block: 0, count: 1 }, { block: 9, count: 2 }, { block: PAGE_BLOCKS - 1, count: 1 }]);
    const [row] = rowsOf(store, id);
    expect([...(row?.bitmap ?? [])].map((byte, index) => [index, byte]).filter(([, byte]) => byte !== 0)).toEqual([[0, 1], [1, 6], [255, 128]]);
  });

  it('joins neighbours, from either side and in the middle', () => {
    const store = openStore();
    const { id } = addLayer(store);
    const page = (number: number, count = 1): void => { store.ownership.add(id, [{ block: number * PAGE_BLOCKS, count: count * PAGE_BLOCKS }]); };
    page(4);
    page(3);
    expect(shapeOf(store, id)).toEqual(['3-5']);
    page(6);
    expect(shapeOf(store, id)).toEqual(['3-5', '6-7']);
    page(5);
    expect(shapeOf(store, id)).toEqual(['3-7']);
    page(0, 2);
    page(1, 3);
    expect(shapeOf(store, id)).toEqual(['0-7']);
    page(2, 1);
    page(6, 4);
    expect(shapeOf(store, id)).toEqual(['0-10']);
  });

  it('makes a run of a page that fills up, in one call or in many', () => {
    const store = openStore();
    const { id } = addLayer(store);
    store.ownership.add(id, [{ block: 0, count: PAGE_BLOCKS }, { block: 2 * PAGE_BLOCKS, count: PAGE_BLOCKS }]);
    store.ownership.add(id, [{ block: PAGE_BLOCKS, count: 1000 }]);
    expect(shapeOf(store, id)).toEqual(['0-1', '1:1000', '2-3']);
    store.ownership.add(id, [{ block: PAGE_BLOCKS + 1000, count: PAGE_BLOCKS - 1000 }]);
    expect(shapeOf(store, id)).toEqual(['0-3']);
    store.ownership.add(id, Array.from({ length: PAGE_BLOCKS }, (_, index) => ({ block: 4 * PAGE_BLOCKS - 1 - index, count: 1 })));
    expect(shapeOf(store, id)).toEqual(['0-4']);
  });

  it('swallows bitmaps that a run covers', () => {
    const store = openStore();
    const { id } = addLayer(store);
    for (const page of [0, 2, 3, 9]) store.ownership.add(id, [{ block: page * PAGE_BLOCKS + 7, count: 3 }]);
    store.ownership.add(id, [{ block: PAGE_BLOCKS, count: 8 * PAGE_BLOCKS }]);
    expect(shapeOf(store, id)).toEqual(['0:3', '1-9', '9:3']);
  });

  it('keeps layers apart, and is there after a restart', () => {
    const path = databasePath();
    const store = openStore(path);
    const [first, second] = [addLayer(store), addLayer(store)];
    store.ownership.add(first.id, [{ block: 0, count: PAGE_BLOCKS }]);
    store.ownership.add(second.id, [{ block: PAGE_BLOCKS, count: PAGE_BLOCKS }, { block: 1, count: 1 }]);
    store.close();
    const again = openStore(path);
    expect(shapeOf(again, first.id)).toEqual(['0-1']);
    expect(shapeOf(again, second.id)).toEqual(['0:1', '1-2']);
  });

  it('reaches to the end of the largest disk and not beyond', () => {
    const store = openStore();
    const { id } = addLayer(store);
    const blocksMax = 64 * 1024 ** 4 / 4096;
    store.ownership.add(id, [{ block: 0, count: blocksMax }]);
    expect(store.ownership.ownedBlocks(id)).toBe(blocksMax);
    expect(rowsOf(store, id)).toHaveLength(1);
    for (const run of [{ block: blocksMax - 1, count: 2 }, { block: -1, count: 1 }, { block: 0, count: 0 }, { block: 0.5, count: 1 }]) {
      expect(() => { store.ownership.add(id, [run]); }).toThrow(/not a run of blocks/);
    }
  });

  it('reads more rows than a batch, while the visitor writes', () => {
    const store = openStore();
    const { id } = addLayer(store);
    store.ownership.add(id, Array.from({ length: 3000 }, (_, page) => ({ block: page * PAGE_BLOCKS + 1, count: 1 })));
    let visited = 0;
    store.transaction(() => {
      store.ownership.forEach(id, (firstPage) => {
        expect(firstPage).toBe(visited);
        visited += 1;
        store.ownership.add(id, [{ block: firstPage * PAGE_BLOCKS, count: 1 }]);
      });
    });
    expect(visited).toBe(3000);
    expect(store.ownership.ownedBlocks(id)).toBe(6000);
  });

  it('takes a hundred thousand scattered runs in one call', () => {
    const store = openStore();
    const { id } = addLayer(store);
    // Multiplying by a prime scatters the blocks over 20,000 pages.
    const runs = Array.from({ length: 100_000 }, (_, index) => ({ block: (index * 7_368_787) % (20_000 * PAGE_BLOCKS), count: 1 }));
    store.ownership.add(id, runs);
    store.ownership.add(id, runs);
    expect(store.ownership.ownedBlocks(id)).toBe(new Set(runs.map((run) => run.block)).size);
  });

  it('is the same set of blocks as a plain set, whatever is added in whatever order', () => {
    const store = openStore();
    const lastBlock = 7 * PAGE_BLOCKS;
    const run = fc
      .oneof(
        fc.record({ block: fc.nat(lastBlock - 1), count: fc.integer({ min: 1, max: 40 }) }),
        fc.record({ block: fc.nat(lastBlock - 1), count: fc.integer({ min: 1, max: 3 * PAGE_BLOCKS }) }),
        fc.record({ block: fc.nat(6).map((page) => page * PAGE_BLOCKS), count: fc.integer({ min: 1, max: 4 }).map((pages) => pages * PAGE_BLOCKS) }),
        fc.record({ block: fc.nat(6).map((page) => page * PAGE_BLOCKS), count: fc.constantFrom(1, PAGE_BLOCKS - 1, PAGE_BLOCKS / 2, PAGE_BLOCKS + 1) }),
        fc.record({ block: fc.nat(6).map((page) => page * PAGE_BLOCKS + PAGE_BLOCKS / 2), count: fc.constantFrom(1, PAGE_BLOCKS / 2, PAGE_BLOCKS / 2 + 1) }),
      )
      .map(({ block, count }) => ({ block, count: Math.min(count, lastBlock - block) }));
    fc.assert(
      fc.property(fc.array(fc.array(run, { minLength: 1, maxLength: 6 }), { minLength: 1, maxLength: 6 }), (calls) => {
        const { id } = addLayer(store);
        const model = new Set<number>();
        for (const runs of calls) {
          store.ownership.add(id, runs);
          for (const { block, count } of runs) for (let index = block; index < block + count; index += 1) model.add(index);
          expect(store.ownership.ownedBlocks(id)).toBe(model.size);
        }
        const owned = ownedBlocksOf(store, id);
        expect(owned.length).toBe(model.size);
        expect(owned.every((block) => model.has(block))).toBe(true);
      }),
      { numRuns: 150 },
    );
  });
});
