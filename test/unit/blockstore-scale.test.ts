/**
 * Large numbers: a map of a million extents is what its rows say, block by block; a thousand clones are one transaction and take
 * little; ten thousand nodes go in steps. No times: those are `scripts/bench --clones`.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';

import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { inSteps } from '../../daemon/jobs/steps.js';
import { TestStore, kindOf, patterned } from '../support/blockstore-fixture.js';

const TIB = 1024 ** 4;
const LAYERS = 64;

/** A disk of 64 layers, in each of which `owns` says which blocks; the last layer is the active one. */
function deepDisk(fixture: TestStore, blocks: number, owns: (layer: number) => { block: number; count: number }[]): NodeRow {
  const { meta, files } = fixture.store;
  const sizeBytes = blocks * BLOCK_BYTES;
  return meta.transaction(() => {
    let backingId: number | null = null;
    for (let depth = 0; depth < LAYERS; depth += 1) {
      const layer = meta.layers.insert({
        kind: 'store', externalPath: null, externalIdentity: null, backingId, backingLimitBytes: null, sizeBytes, sealed: depth < LAYERS - 1, complete: false, createdUs: 0,
      });
      files.create(layer.id, sizeBytes);
      meta.ownership.add(layer.id, owns(depth));
      backingId = layer.id;
    }
    return meta.nodes.insert({
      parentId: ROOT_ID, name: 'deep', kind: 'disk', mode: 0o600, uid: 0, gid: 0, sizeBytes, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: backingId, linkTarget: null,
      copyOnRead: false, fault: null,
    });
  });
}

describe('a disk of 64 layers and a million extents', () => {
  it('has each block where the topmost layer that owns it says', async () => {
    const fixture = new TestStore();
    const blocks = 1024 * PAGE_BLOCKS;
    // Every second block, layer after layer; and runs of whole pages over some of them, in two layers far apart.
    const model = new Uint8Array(blocks);
    const node = deepDisk(fixture, blocks, (depth) => {
      const runs: { block: number; count: number }[] = [];
      for (let block = 2 * depth; block < blocks; block += 2 * LAYERS) runs.push({ block, count: 1 });
      if (depth === 20) runs.push({ block: 100 * PAGE_BLOCKS, count: 7 * PAGE_BLOCKS });
      if (depth === 50) runs.push({ block: 103 * PAGE_BLOCKS - 1, count: PAGE_BLOCKS + 2 }, { block: 1000 * PAGE_BLOCKS, count: 24 * PAGE_BLOCKS });
      for (const { block, count } of runs) model.fill(depth + 1, block, block + count);
      return runs;
    });
    const disk = fixture.store.disks.acquire(node.id);
    const { shared } = fixture.store.context;
    let extents = 0;
    for (let block = 0; block < blocks; block += 1) {
      const origin = disk.shared.originOf(shared, block);
      if (origin !== model[block]) expect({ block, origin }).toEqual({ block, origin: model[block] });
      if (block === 0 || origin !== model[block - 1]) extents += 1;
    }
    expect(extents).toBeGreaterThan(1_000_000);
    for (const origin of [0, 1, 21, 51, LAYERS]) {
      expect(disk.shared.countBlocks(shared, blocks, origin)).toBe(model.reduce((sum, each) => sum + (each === origin ? 1 : 0), 0));
    }
    // Up to the middle of a page, and behind the map.
    expect(disk.shared.countBlocks(shared, 3 * PAGE_BLOCKS + 5, 0)).toBe(model.subarray(0, 3 * PAGE_BLOCKS + 5).reduce((sum, each) => sum + (each === 0 ? 1 : 0), 0));
    expect(disk.shared.countBlocks(shared, disk.shared.capacityBlocks + 100, 0)).toBe(model.reduce((sum, each) => sum + (each === 0 ? 1 : 0), 0) + 100);
    fixture.store.disks.release(node.id);
    await fixture.close();
  });

  it('is read in pieces that miss no row, and none twice', () => {
    const { meta } = new TestStore().store;
    const layer = meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: 0, sealed: false, complete: false, createdUs: 0,
    });
    // More rows than one piece holds; bits in the first and the last word of a page; runs at the beginning, between and at the end.
    const pages = 20_000;
    const runs = Array.from({ length: pages }, (_, page) => ({ block: page * PAGE_BLOCKS + (page % 2 === 0 ? 0 : PAGE_BLOCKS - 33), count: 33 }));
    meta.ownership.add(layer.id, [...runs, { block: 0, count: 2 * PAGE_BLOCKS }, { block: 9000 * PAGE_BLOCKS, count: 3 * PAGE_BLOCKS }, { block: pages * PAGE_BLOCKS, count: PAGE_BLOCKS }]);
    const rowWise = new Map<number, string>();
    meta.ownership.forEach(layer.id, (firstPage, pageCount, bitmap) => { rowWise.set(firstPage, bitmap === null ? `run of ${pageCount}` : Buffer.from(bitmap).toString('hex')); });
    const packed = new Map<number, string>();
    const put = (page: number, what: string): void => {
      expect(packed.has(page)).toBe(false);
      packed.set(page, what);
    };
    meta.ownership.forEachPacked(layer.id, {
      run: (firstPage, pageCount) => { put(firstPage, `run of ${pageCount}`); },
      pages: (found, bitmaps) => {
        found.forEach((page, i) => { put(page, Buffer.from(bitmaps.buffer, bitmaps.byteOffset + i * PAGE_BLOCKS / 8, PAGE_BLOCKS / 8).toString('hex')); });
      },
    });
    expect(packed).toEqual(rowWise);
    expect(meta.ownership.isEmpty(layer.id)).toBe(false);
    expect(meta.ownership.isEmpty(layer.id + 1)).toBe(true);
  });
});

describe('a thousand clones', () => {
  const names = Array.from({ length: 1000 }, (_, i) => `clone-${i}`);
  const children = (fixture: TestStore): string[] => fixture.store.meta.nodes.children(ROOT_ID, 0, 1_000_000).map((node) => node.name);

  it('of 1 TiB take less than 4 KiB of the store each, and no file before they are opened', async () => {
    const fixture = new TestStore();
    const image = fixture.emptyImage('image', TIB);
    fixture.clone(image, 'first');
    fixture.store.meta.checkpoint({ idle: true });
    const space = (): { bytes: number; files: number } => {
      const entries = fs.readdirSync(fixture.storeDir, { recursive: true, encoding: 'utf8' });
      return { bytes: entries.reduce((sum, name) => sum + fs.statSync(path.join(fixture.storeDir, name)).blocks * 512, 0), files: entries.length };
    };
    const before = space();
    fixture.store.clone(image.id, names.map((name) => ({ parentId: ROOT_ID, name })), { copyOnRead: false });
    fixture.store.meta.checkpoint({ idle: true });
    const after = space();
    expect((after.bytes - before.bytes) / names.length).toBeLessThan(4096);
    expect(after.files).toBe(before.files);
    expect(children(fixture)).toHaveLength(names.length + 2);
    await fixture.close();
  });

  it('are all made or none: the last name that is taken undoes the others', () => {
    const fixture = new TestStore();
    const image = fixture.image('image', patterned(7, 16 * BLOCK_BYTES));
    fixture.clone(image, 'clone-999');
    const before = children(fixture);
    const layers = fixture.store.meta.layers.count();
    expect(kindOf(() => fixture.store.clone(image.id, names.map((name) => ({ parentId: ROOT_ID, name })), { copyOnRead: false }))).toBe('already-exists');
    expect(children(fixture)).toEqual(before);
    expect(fixture.store.meta.layers.count()).toBe(layers);
  });

  it('go many in one transaction, but those that somebody has open; what they stood on stays for those', () => {
    const fixture = new TestStore();
    const image = fixture.image('image', patterned(7, 16 * BLOCK_BYTES));
    const made = fixture.store.clone(image.id, names.map((name) => ({ parentId: ROOT_ID, name })), { copyOnRead: false });
    const { meta, disks } = fixture.store;
    const layersBefore = meta.layers.count();
    const open = made[500]!;
    disks.acquire(open.id);
    // Closed, and kept open for whoever comes next.
    disks.acquire(made[501]!.id);
    disks.release(made[501]!.id);
    meta.nodes.orphanAll(made.map((node) => node.id), 5);
    let transactions = 0;
    meta.beforeTransaction(() => { transactions += 1; });
    expect(fixture.store.discardNodes(made.map((node) => node.id))).toBe(names.length - 1);
    // One for the disk that was kept open, which notes its time.
    expect(transactions).toBeLessThanOrEqual(2);
    expect(meta.nodes.orphanIds()).toEqual([open.id]);
    expect(meta.layers.count()).toBe(layersBefore - names.length + 1);
    disks.release(open.id);
    expect(fixture.store.discardNodes([open.id])).toBe(1);
    expect(meta.layers.count()).toBe(layersBefore - names.length);
  });
});

describe('work in steps', () => {
  it('does each item once, in order, and lets others have their turn in between', async () => {
    const done: number[] = [];
    let turns = 0;
    let ended = false;
    const others = (): void => {
      turns += 1;
      if (!ended) setImmediate(others);
    };
    setImmediate(others);
    const items = Array.from({ length: 2000 }, (_, i) => i);
    await inSteps(items, (batch) => { done.push(...batch); });
    ended = true;
    expect(done).toEqual(items);
    expect(turns).toBeGreaterThan(3);
  });

  it('ends between two steps when it is told to, and travels with an error', async () => {
    const done: number[] = [];
    await inSteps([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], (batch) => { done.push(...batch); }, () => done.length === 0);
    expect(done.length).toBeGreaterThan(0);
    expect(done.length).toBeLessThan(10);
    await expect(inSteps([1], () => { throw new Error('of a step'); })).rejects.toThrow('of a step');
  });
});
