/**
 * What disks cost, proven by deleting: what `exclusive` says is, to the byte, what the layers directory loses when the disk goes.
 *
 * On a real store with real files, over random histories of writes, clones of clones, range clones, discards, fills and removals, and over each of the special
 * situations by name. The measure is a sum of the data files' allocated blocks made by the test itself.
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';

import { Account, REMOVED } from '../../blockstore/accounting.js';
import { LayerGraph, LEFT_OVER, MANY } from '../../blockstore/layer-graph.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, patterned } from '../support/blockstore-fixture.js';
import { createRandom } from '../support/model/random.js';

const BLOCKS = 64;
const SIZE = BLOCKS * BLOCK_BYTES;

/** Allocated bytes of all data files, as du counts them. */
function layersOnDisk(test: TestStore): number {
  const directory = path.join(test.storeDir, 'layers');
  return fs.readdirSync(directory).reduce((sum, shard) =>
    sum + fs.readdirSync(path.join(directory, shard)).reduce((all, name) => all + fs.statSync(path.join(directory, shard, name)).blocks * 512, 0), 0);
}

function account(test: TestStore): Account {
  return new Account(test.store.meta.space.read(), test.store.files);
}

function costOf(test: TestStore, node: NodeRow): { allocatedBytes: number; exclusiveBytes: number; sharedBytes: number } {
  const cost = account(test).costs((each) => each.id).get(node.id);
  if (cost === undefined) throw new Error(`node ${node.id} has no cost`);
  return { ...cost };
}

/** As `rm --keep-data` does: the name, then the node, then what only it read through. */
function remove(test: TestStore, node: NodeRow): void {
  const { store } = test;
  if (store.disks.isUsed(node.id)) store.disks.release(node.id);
  store.meta.nodes.orphan(node.id);
  store.discardNode(node.id);
  expect(store.meta.nodes.byId(node.id)).toBeUndefined();
}

/** Removes the disk, and gives what was said to be freed and what was freed. */
function removedAndMeasured(test: TestStore, node: NodeRow): { said: number; freed: number } {
  const said = costOf(test, node).exclusiveBytes;
  const before = layersOnDisk(test);
  remove(test, node);
  return { said, freed: before - layersOnDisk(test) };
}

function write(test: TestStore, node: NodeRow, block: number, count: number, seed: number): void {
  test.acquire(node);
  test.write(node, block * BLOCK_BYTES, patterned(seed, count * BLOCK_BYTES));
  test.store.disks.release(node.id);
}

function cloneRange(test: TestStore, source: NodeRow, target: NodeRow, from: number, to: number, count: number): void {
  test.store.cloneRanges(source.id, target.id, [{ sourceAtBytes: from * BLOCK_BYTES, targetAtBytes: to * BLOCK_BYTES, lengthBytes: count * BLOCK_BYTES }]);
}

/** The layer, its chain, and what these share extents with, each once. */
function readThrough(test: TestStore, layerId: number, seen = new Set<number>()): Set<number> {
  const { layers, sharedExtents } = test.store.meta;
  for (const layer of layers.chain(layerId)) {
    if (seen.has(layer.id)) continue;
    seen.add(layer.id);
    if (!layer.complete) for (const source of sharedExtents.sources(layer.id)) readThrough(test, source, seen);
  }
  return seen;
}

describe('exclusive bytes are what a removal frees', () => {
  it('of an image with clones: nothing but its own new layer, until the last of them goes', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE, everyThird));
    const [one, two] = [test.clone(image, 'one'), test.clone(image, 'two')];
    write(test, one, 0, 5, 2);
    write(test, image, 3, 2, 3);
    expect(removedAndMeasured(test, image)).toEqual({ said: 2 * BLOCK_BYTES, freed: 2 * BLOCK_BYTES });
    expect(costOf(test, one)).toMatchObject({ allocatedBytes: 5 * BLOCK_BYTES, exclusiveBytes: 5 * BLOCK_BYTES });
    expect(removedAndMeasured(test, one)).toEqual({ said: 5 * BLOCK_BYTES, freed: 5 * BLOCK_BYTES });
    const last = removedAndMeasured(test, two);
    expect(last.freed).toBeGreaterThan(40 * BLOCK_BYTES);
    expect(last.said).toBe(last.freed);
    expect(layersOnDisk(test)).toBe(0);
  });

  it('of a clone of a clone, whose middle is gone: all sealed layers down to what others need', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE));
    const middle = test.clone(image, 'middle');
    write(test, middle, 0, 7, 2);
    const leaf = test.clone(middle, 'leaf');
    write(test, leaf, 10, 3, 3);
    remove(test, middle);
    expect(costOf(test, leaf)).toEqual({ allocatedBytes: 3 * BLOCK_BYTES, exclusiveBytes: 10 * BLOCK_BYTES, sharedBytes: SIZE });
    expect(removedAndMeasured(test, leaf)).toEqual({ said: 10 * BLOCK_BYTES, freed: 10 * BLOCK_BYTES });
  });

  it('of a disk over a file that lies elsewhere: its own layer; the file counts as nothing', () => {
    const test = new TestStore();
    const { node } = test.inPlace('in-place', patterned(1, SIZE));
    const clone = test.clone(node, 'clone');
    write(test, clone, 0, 4, 2);
    expect(costOf(test, clone)).toEqual({ allocatedBytes: 4 * BLOCK_BYTES, exclusiveBytes: 4 * BLOCK_BYTES, sharedBytes: 0 });
    expect(removedAndMeasured(test, clone)).toEqual({ said: 4 * BLOCK_BYTES, freed: 4 * BLOCK_BYTES });
  });

  it('of a clone that owns everything: all of it; its source is not held by it', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE));
    const clone = test.clone(image, 'clone');
    test.acquire(clone);
    test.write(clone, 0, patterned(2, SIZE));
    test.store.committer.commitAllNow();
    test.store.markComplete(clone.id);
    test.store.disks.release(clone.id);
    expect(costOf(test, clone)).toEqual({ allocatedBytes: SIZE, exclusiveBytes: SIZE, sharedBytes: 0 });
    expect(costOf(test, image)).toMatchObject({ exclusiveBytes: SIZE, sharedBytes: 0 });
    expect(removedAndMeasured(test, image)).toEqual({ said: SIZE, freed: SIZE });
  });

  it('of a disk that discarded: what is left of it', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE));
    const clone = test.clone(image, 'clone');
    write(test, clone, 0, 8, 2);
    test.acquire(clone);
    test.store.data.discard(clone.id, 0, 6 * BLOCK_BYTES);
    test.store.disks.release(clone.id);
    expect(removedAndMeasured(test, clone)).toEqual({ said: 2 * BLOCK_BYTES, freed: 2 * BLOCK_BYTES });
  });

  it('of a disk with blocks of another by a range clone: the other\'s layer, in whole, once nobody else needs it', () => {
    const test = new TestStore();
    const source = test.image('source', patterned(1, SIZE));
    const target = test.unbackedImage('target', SIZE);
    cloneRange(test, source, target, 0, 10, 20);
    expect(costOf(test, target)).toEqual({ allocatedBytes: 0, exclusiveBytes: 0, sharedBytes: SIZE });
    expect(costOf(test, source)).toEqual({ allocatedBytes: 0, exclusiveBytes: 0, sharedBytes: SIZE });
    // Written over, the blocks are the target's own; the row that is dead now goes with the next start, or a fill.
    write(test, target, 10, 4, 2);
    expect(costOf(test, target)).toEqual({ allocatedBytes: 4 * BLOCK_BYTES, exclusiveBytes: 4 * BLOCK_BYTES, sharedBytes: SIZE });
    expect(removedAndMeasured(test, source)).toEqual({ said: 0, freed: 0 });
    expect(costOf(test, target)).toEqual({ allocatedBytes: 4 * BLOCK_BYTES, exclusiveBytes: SIZE + 4 * BLOCK_BYTES, sharedBytes: 0 });
    expect(removedAndMeasured(test, target)).toEqual({ said: SIZE + 4 * BLOCK_BYTES, freed: SIZE + 4 * BLOCK_BYTES });
  });

  it('of a source whose blocks several have, through each other: nothing, until the last of them goes', () => {
    const test = new TestStore();
    const source = test.image('source', patterned(1, SIZE));
    const [one, two] = [test.unbackedImage('one', SIZE), test.clone(test.image('base', patterned(2, SIZE)), 'two')];
    cloneRange(test, source, one, 0, 0, 30);
    cloneRange(test, one, two, 5, 40, 20);
    const three = test.clone(two, 'three');
    expect(removedAndMeasured(test, source)).toEqual({ said: 0, freed: 0 });
    expect(removedAndMeasured(test, one)).toEqual({ said: 0, freed: 0 });
    expect(removedAndMeasured(test, two)).toEqual({ said: 0, freed: 0 });
    expect(costOf(test, three)).toEqual({ allocatedBytes: 0, exclusiveBytes: SIZE, sharedBytes: SIZE });
    // The base's blocks take the place of all that came from the source.
    cloneRange(test, { name: 'base', id: test.store.meta.nodes.child(1, 'base')!.id } as NodeRow, three, 0, 0, BLOCKS);
    expect(costOf(test, three)).toEqual({ allocatedBytes: 0, exclusiveBytes: SIZE, sharedBytes: SIZE });
    expect(removedAndMeasured(test, three)).toEqual({ said: SIZE, freed: SIZE });
  });

  it('of any disk, whatever was done before (12 random histories)', () => {
    for (let seed = 1; seed <= 12; seed += 1) randomHistory(seed);
  });
});

/** Some 40 operations, then everything is removed in a random order, each removal measured. */
function randomHistory(seed: number): void {
  const random = createRandom(seed);
  const test = new TestStore();
  const disks = [test.image('image-0', patterned(seed, SIZE, everyThird)), test.unbackedImage('bare', SIZE)];
  let made = 0;
  const pick = (): NodeRow => random.pick(disks);
  for (let step = 0; step < 40; step += 1) {
    const kind = random.below(100);
    const disk = pick();
    const block = random.below(BLOCKS - 8);
    if (kind < 35) write(test, disk, block, random.between(1, 8), seed * 100 + step);
    else if (kind < 60) disks.push(test.clone(test.row(disk), `clone-${made++}`));
    else if (kind < 75) {
      const count = random.between(1, 16);
      cloneRange(test, disk, pick(), random.below(BLOCKS - count), random.below(BLOCKS - count), count);
    }
    else if (kind < 85) {
      test.acquire(disk);
      test.store.data.discard(disk.id, block * BLOCK_BYTES, 4 * BLOCK_BYTES);
      test.store.disks.release(disk.id);
    } else if (disks.length > 2) {
      disks.splice(disks.indexOf(disk), 1);
      const { said, freed } = removedAndMeasured(test, disk);
      expect(said, `seed ${seed}, step ${step}`).toBe(freed);
    }
  }
  const everything = account(test);
  expect(everything.layersBytes(), `seed ${seed}`).toBe(layersOnDisk(test));
  // What a disk reads through is either its own or shared.
  for (const [id, cost] of everything.costs((node) => node.id)) {
    const all = [...readThrough(test, test.row({ id } as NodeRow).layerId!)].reduce((sum, layer) => sum + test.store.files.allocatedBytes(layer), 0);
    expect(cost.exclusiveBytes + cost.sharedBytes, `seed ${seed}`).toBe(all);
  }
  while (disks.length > 0) {
    const [disk] = disks.splice(random.below(disks.length), 1);
    const { said, freed } = removedAndMeasured(test, disk!);
    expect(said, `seed ${seed}`).toBe(freed);
  }
  expect(layersOnDisk(test)).toBe(0);
}

describe('who shares with whom', () => {
  it('names every other disk on the same layers, and no other', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE));
    const clones = [0, 1, 2].map((n) => test.clone(image, `clone-${n}`));
    const grandchild = test.clone(clones[0]!, 'grandchild');
    const apart = test.image('apart', patterned(2, SIZE));
    const of = (node: NodeRow): { count: number; paths: string[] } => {
      const all = account(test);
      const { count, first } = all.sharedWith(all.nodes.get(node.id)!);
      return { count, paths: first(3).map((id) => all.pathOf(id)) };
    };
    expect(of(grandchild)).toEqual({ count: 4, paths: ['image', 'clone-0', 'clone-1'] });
    expect(of(image)).toEqual({ count: 4, paths: ['clone-0', 'clone-1', 'clone-2'] });
    expect(of(apart)).toEqual({ count: 0, paths: [] });
  });

  it('counts a group once, however many of it read a layer', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE));
    const [one, two, other] = ['one', 'two', 'other'].map((name) => test.clone(image, name)) as [NodeRow, NodeRow, NodeRow];
    const pair = new Set([one.id, two.id, image.id]);
    const costs = (all: Account) => all.costs((node) => (pair.has(node.id) ? 7 : null)).get(7);
    expect(costs(account(test))).toEqual({ allocatedBytes: 0, exclusiveBytes: 0, sharedBytes: SIZE });
    remove(test, other);
    expect(costs(account(test))).toEqual({ allocatedBytes: 0, exclusiveBytes: SIZE, sharedBytes: 0 });
  });

  it('says what a removed disk still takes that somebody has open', () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, SIZE));
    test.acquire(image);
    test.store.meta.nodes.orphan(image.id);
    const all = account(test);
    expect(all.containerOf(image.id)).toBe(REMOVED);
    expect(all.costs((node) => all.containerOf(node.id)).get(REMOVED)?.exclusiveBytes).toBe(SIZE);
    expect(all.leftOverBytes()).toBe(0);
    test.store.disks.release(image.id);
  });
});

describe('the graph of layers', () => {
  const layer = (id: number, backing: number | null = null): { id: number; backing_id: number | null } => ({ id, backing_id: backing });

  it('follows shared extents as it follows backings, and counts what is met twice once', () => {
    // 1 is read through 2 and, by extents, through 3; 4 stands on 2 and 3 (a diamond).
    const graph = new LayerGraph([layer(1), layer(2, 1), layer(3), layer(4, 2), layer(5)], [{ layer_id: 3, source_layer_id: 1 }, { layer_id: 4, source_layer_id: 3 }]);
    const at = (id: number): number => graph.indexOf(id)!;
    const total = graph.totals((each) => 10 ** (graph.idAt(each) - 1));
    expect([4, 3, 2, 1].map((id) => total(at(id)))).toEqual([1111, 101, 11, 1]);
    expect(graph.bottoms(at(4)).map((each) => graph.idAt(each))).toEqual([1]);
    const owners = (readers: [number, number][]): number[] => [...graph.owners(new Map(readers.map(([id, reader]) => [at(id), reader])))];
    expect(owners([[4, 9], [5, 8]])).toEqual([9, 9, 9, 9, 8]);
    expect(owners([[4, 9], [5, 8], [2, 7]])).toEqual([MANY, MANY, 9, 9, 8]);
    expect(owners([[2, 9], [5, 8]])).toEqual([MANY, MANY, LEFT_OVER, LEFT_OVER, 8]);
  });

  it('ends on a store whose backings run in a circle', () => {
    const graph = new LayerGraph([layer(1, 2), layer(2, 1), layer(3, 2)], []);
    const total = graph.totals(() => 1);
    expect(total(graph.indexOf(3)!)).toBe(3);
    expect(graph.bottoms(graph.indexOf(3)!)).toEqual([]);
    expect(graph.owners(new Map([[graph.indexOf(3)!, 5]])).length).toBe(3);
  });

  it('knows chains of any length, and thousands of disks on one image', () => {
    const length = 20_000;
    const chain = new LayerGraph(Array.from({ length }, (_, i) => layer(i + 1, i === 0 ? null : i)), []);
    expect(chain.totals(() => 1)(length - 1)).toBe(length);
    const wide = new LayerGraph([layer(1), ...Array.from({ length }, (_, i) => layer(i + 2, 1))], []);
    const readers = new Map(Array.from({ length }, (_, i) => [wide.indexOf(i + 2)!, i + 2]));
    expect(wide.owners(readers)[0]).toBe(MANY);
    expect(wide.reachUp([0]).length).toBe(length + 1);
  });
});
