/**
 * Range clones: what the two disks hold afterwards, what is referred to, what survives a kill, and what is refused.
 *
 * That they agree with arrays of bytes in any order of operations is the model test's; here are the facts behind that.
 */
import fs from 'node:fs';
import { describe, expect, it } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { enterDisk, leaveDisk, REQUEST_BYTES_MAX } from '../../blockstore/hot/context.js';
import { IoBuffer } from '../../blockstore/hot/door.js';
import { fillStep, newFillProgress } from '../../blockstore/hot/fill-step.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, kindOf, patterned } from '../support/blockstore-fixture.js';

const MIB = 1024 * 1024;
const NEW = { parentId: ROOT_ID, mode: 0o600, uid: 0, gid: 0, copyOnRead: false };
const STEPS_MAX = 10_000;

function range(source: number, target: number, blocks: number): { sourceAtBytes: number; targetAtBytes: number; lengthBytes: number } {
  return { sourceAtBytes: source * BLOCK_BYTES, targetAtBytes: target * BLOCK_BYTES, lengthBytes: blocks * BLOCK_BYTES };
}

/** Does to a copy in memory what a range clone does. */
function put(target: Buffer, source: Buffer, ...ranges: readonly ReturnType<typeof range>[]): Buffer {
  const result = Buffer.from(target);
  const before = Buffer.from(source);
  for (const { sourceAtBytes, targetAtBytes, lengthBytes } of ranges) before.copy(result, targetAtBytes, sourceAtBytes, sourceAtBytes + lengthBytes);
  return result;
}

function extentsOf(fixture: TestStore, node: NodeRow): (number | null)[][] {
  return fixture.store.meta.sharedExtents.of(fixture.layer(node).id).map(({ block, count, sourceLayerId, sourceBlock }) => [block, count, sourceLayerId, sourceBlock]);
}

function allocatedBytes(fixture: TestStore): number {
  let sum = 0;
  for (const name of fs.readdirSync(fixture.store.files.directory, { recursive: true, encoding: 'utf8' })) {
    const stat = fs.statSync(`${fixture.store.files.directory}/${name}`);
    if (stat.isFile()) sum += stat.blocks * 512;
  }
  return sum;
}

function fill(fixture: TestStore, node: NodeRow, stepsMax = STEPS_MAX): void {
  const { context } = fixture.store;
  const { shared } = fixture.disk(node);
  const buffer = new IoBuffer(REQUEST_BYTES_MAX);
  const progress = newFillProgress();
  expect(enterDisk(context, shared)).toBe(true);
  for (let step = 0; step < stepsMax && !fillStep(context, shared, buffer, progress); step += 1) expect(progress.failed).toBe(0);
  leaveDisk(context, shared);
}

async function complete(fixture: TestStore, node: NodeRow): Promise<void> {
  fill(fixture, node);
  await fixture.store.flush(node.id);
  fixture.store.markComplete(node.id);
}

function expectClean(fixture: TestStore): void {
  expect(checkStore(fixture.store).findings).toEqual([]);
}

describe('a range clone', () => {
  it('takes no space, and afterwards neither disk sees what is written to the other', () => {
    const fixture = new TestStore();
    const content = patterned(1, 4 * MIB, everyThird);
    const source = fixture.image('source', content);
    const before = patterned(2, 4 * MIB);
    const target = fixture.clone(fixture.image('base', before), 'target');
    for (const node of [source, target]) fixture.acquire(node);
    const space = allocatedBytes(fixture);
    const ranges = [range(0, 600, 300), range(700, 10, 100)];
    fixture.store.cloneRanges(source.id, target.id, ranges);
    const expected = put(before, content, ...ranges);
    fixture.expectContent(target, expected);
    expect(allocatedBytes(fixture)).toBe(space);
    const marks = Buffer.alloc(5000, 0x5a);
    fixture.write(source, 3000, marks);
    fixture.write(target, 601 * BLOCK_BYTES + 7, marks);
    marks.copy(expected, 601 * BLOCK_BYTES + 7);
    fixture.expectContent(target, expected);
    const own = Buffer.from(content);
    marks.copy(own, 3000);
    fixture.expectContent(source, own);
  });

  it('refers to whoever owns the blocks, through any number of range clones', () => {
    const fixture = new TestStore();
    const content = patterned(1, MIB);
    const first = fixture.image('first', content);
    const second = fixture.emptyImage('second', MIB);
    const third = fixture.emptyImage('third', MIB);
    fixture.store.cloneRanges(first.id, second.id, [range(10, 50, 100)]);
    const owner = fixture.layer(first).backingId ?? 0;
    fixture.store.cloneRanges(second.id, third.id, [range(60, 0, 20)]);
    // Nothing of the second disk's own was copied, so it was not sealed either.
    expect(fixture.store.meta.layers.chain(fixture.layer(second).id)).toHaveLength(1);
    expect(extentsOf(fixture, third)).toEqual([[0, 20, owner, 20]]);
    fixture.expectContent(third, put(Buffer.alloc(MIB), content, range(20, 0, 20)));
    expectClean(fixture);
  });

  it('is undone by nothing that was written before, also when the server is killed at once', () => {
    const fixture = new TestStore();
    const content = patterned(1, MIB);
    const source = fixture.image('source', content);
    const target = fixture.clone(fixture.image('base', patterned(2, MIB)), 'target');
    fixture.acquire(target);
    fixture.write(target, 0, patterned(3, MIB));
    fixture.store.cloneRanges(source.id, target.id, [range(0, 0, 128)]);
    const expected = put(patterned(3, MIB), content, range(0, 0, 128));
    fixture.kill();
    fixture.acquire(target);
    // A journal's record of the first write would make stale blocks owned again.
    fixture.expectContent(target, expected);
    fixture.write(target, 5 * BLOCK_BYTES, Buffer.alloc(100, 9));
    expected.fill(9, 5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 100);
    fixture.kill();
    fixture.expectContent(target, expected);
  });

  it('into a filled file that was cut to nothing believes no record of before', async () => {
    const fixture = new TestStore();
    const source = fixture.image('source', patterned(1, MIB));
    const target = fixture.clone(fixture.image('base', patterned(2, MIB), { kind: 'file' }), 'target');
    fixture.acquire(target);
    await complete(fixture, target);
    fixture.store.resize(target.id, 0);
    fixture.store.cloneRanges(source.id, target.id, [range(4, 8, 16)]);
    const expected = put(Buffer.alloc(24 * BLOCK_BYTES), patterned(1, MIB), range(4, 8, 16));
    fixture.expectContent(target, expected);
    fixture.kill();
    fixture.expectContent(target, expected);
  });

  it('gives the space back that the target had there', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', patterned(1, MIB));
    const target = fixture.image('target', patterned(2, MIB));
    const before = fixture.store.files.allocatedBytes(fixture.layer(target).id);
    fixture.store.cloneRanges(source.id, target.id, [range(0, 64, 128)]);
    expect(fixture.store.files.allocatedBytes(fixture.layer(target).id)).toBe(before - 128 * BLOCK_BYTES);
    expect(fixture.layer(target)).toMatchObject({ complete: false, backingId: null });
    fixture.expectContent(target, put(patterned(2, MIB), patterned(1, MIB), range(0, 64, 128)));
  });

  it('is found again by clones of the target, in the chain that they share', () => {
    const fixture = new TestStore();
    const content = patterned(1, MIB);
    const source = fixture.image('source', content);
    const target = fixture.clone(fixture.image('base', patterned(2, MIB)), 'target');
    fixture.store.cloneRanges(source.id, target.id, [range(1, 2, 40)]);
    // Nothing is owned, and yet there is something to seal.
    const upper = fixture.clone(target, 'upper');
    const expected = put(patterned(2, MIB), content, range(1, 2, 40));
    fixture.expectContent(upper, expected);
    fixture.acquire(upper);
    fixture.write(upper, 10 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 1));
    fixture.expectContent(target, expected);
    expected.fill(1, 10 * BLOCK_BYTES, 11 * BLOCK_BYTES);
    fixture.expectContent(fixture.clone(upper, 'top'), expected);
    expectClean(fixture);
  });

  it('keeps what it refers to for as long as it does, and no longer', async () => {
    const fixture = new TestStore();
    const { meta } = fixture.store;
    const content = patterned(1, MIB);
    const source = fixture.image('source', content);
    const target = fixture.clone(fixture.image('base', patterned(2, MIB)), 'target');
    fixture.store.cloneRanges(source.id, target.id, [range(0, 0, 200)]);
    const owner = fixture.layer(source).backingId ?? 0;
    expect(meta.layers.dependantNodes(owner).map((node) => node.name).sort()).toEqual(['source', 'target']);
    fixture.store.discardNode(source.id);
    expect(meta.layers.byId(owner)).toBeDefined();
    expect(kindOf(() => { meta.layers.remove(owner); })).toBe('in-use');
    fixture.acquire(target);
    await complete(fixture, target);
    expect(meta.layers.byId(owner)).toBeUndefined();
    expect(fixture.store.files.exists(owner)).toBe(false);
    expect(extentsOf(fixture, target)).toEqual([]);
    fixture.expectContent(target, put(patterned(2, MIB), content, range(0, 0, 200)));
    expectClean(fixture);
  });

  it('gives back what was replaced, cut off, overwritten, or removed with the disk', async () => {
    const fixture = new TestStore();
    const sources = [1, 2, 3, 4].map((seed) => fixture.image(`source-${seed}`, patterned(seed, MIB)));
    const target = fixture.emptyImage('target', MIB);
    for (const [i, source] of sources.entries()) fixture.store.cloneRanges(source.id, target.id, [range(0, 64 * i, 64)]);
    const owners = sources.map((source) => fixture.layer(source).backingId ?? 0);
    for (const source of sources) fixture.store.discardNode(source.id);
    const left = (): boolean[] => owners.map((id) => fixture.store.meta.layers.byId(id) !== undefined);
    expect(left()).toEqual([true, true, true, true]);
    fixture.store.cloneRanges(fixture.image('other', patterned(9, MIB)).id, target.id, [range(0, 0, 64)]);
    expect(left()).toEqual([false, true, true, true]);
    fixture.store.resize(target.id, 192 * BLOCK_BYTES - 1000);
    expect(left()).toEqual([false, true, true, false]);
    fixture.store.resize(target.id, MIB);
    expect(fixture.content(target).subarray(192 * BLOCK_BYTES - 1000).every((byte) => byte === 0)).toBe(true);
    // Overwritten by a guest: dead, and gone with the next start.
    fixture.acquire(target);
    fixture.write(target, 64 * BLOCK_BYTES, patterned(8, 64 * BLOCK_BYTES));
    fixture.store.disks.release(target.id);
    await fixture.restart();
    expect(left()).toEqual([false, false, true, false]);
    fixture.store.discardNode(target.id);
    expect(left()).toEqual([false, false, false, false]);
    expectClean(fixture);
  });

  it('makes a new disk, of which the rest is zeros', () => {
    const fixture = new TestStore();
    const content = patterned(1, MIB, everyThird);
    const source = fixture.image('source', content);
    const ranges = [range(3, 2000, 100), range(0, 0, 4)];
    const made = fixture.store.cloneRangesToNew(source.id, { ...NEW, name: 'made' }, PAGE_BYTES + MIB, ranges);
    fixture.expectContent(made, put(Buffer.alloc(PAGE_BYTES + MIB), content, ...ranges));
    expectClean(fixture);
  });

  it('within one disk takes what was there before, also where the ranges overlap or change places', () => {
    const fixture = new TestStore();
    const content = patterned(1, MIB);
    const disk = fixture.clone(fixture.image('base', content), 'disk');
    fixture.acquire(disk);
    fixture.write(disk, 20 * BLOCK_BYTES, patterned(2, 10 * BLOCK_BYTES));
    const now = put(content, patterned(2, 10 * BLOCK_BYTES), range(0, 20, 10));
    const ranges = [range(10, 15, 30), range(100, 200, 20), range(200, 100, 20)];
    fixture.store.cloneRanges(disk.id, disk.id, ranges);
    fixture.expectContent(disk, put(now, now, ...ranges));
  });

  it('works with a source that stays where it is, and cuts it where it ends', () => {
    const fixture = new TestStore();
    const content = patterned(1, MIB - 1000);
    const { node: source } = fixture.inPlace('source', content, { sizeBytes: MIB });
    const target = fixture.emptyImage('target', 2 * MIB);
    fixture.store.cloneRanges(source.id, target.id, [range(100, 300, 156)]);
    const expected = put(Buffer.alloc(2 * MIB), Buffer.concat([content], MIB), range(100, 300, 156));
    fixture.expectContent(target, expected);
    expect(fixture.store.meta.sharedExtents.of(fixture.layer(target).id)[0]?.limitBytes).toBe(156 * BLOCK_BYTES - 1000);
    const next = fixture.emptyImage('next', 2 * MIB);
    fixture.store.cloneRanges(target.id, next.id, [range(450, 8, 40)]);
    fixture.expectContent(next, put(Buffer.alloc(2 * MIB), expected, range(450, 8, 40)));
  });

  it('is all or nothing when its transaction fails', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', patterned(1, MIB));
    const before = patterned(2, MIB);
    const target = fixture.image('target', before);
    fixture.acquire(target);
    const { meta } = fixture.store;
    const trim = meta.sharedExtents.trim.bind(meta.sharedExtents);
    const transaction = meta.sharedExtents.put.bind(meta.sharedExtents);
    meta.sharedExtents.put = (...of) => { transaction(...of); throw new Error('within the transaction'); };
    expect(() => { fixture.store.cloneRanges(source.id, target.id, [range(0, 10, 20), range(50, 100, 20)]); }).toThrow('within the transaction');
    meta.sharedExtents.put = transaction;
    meta.sharedExtents.trim = trim;
    fixture.expectContent(target, before);
    fixture.write(target, 10 * BLOCK_BYTES, Buffer.alloc(10, 1));
    before.fill(1, 10 * BLOCK_BYTES, 10 * BLOCK_BYTES + 10);
    fixture.kill();
    fixture.expectContent(target, before);
  });

  it('makes a fill that is under way begin again, which ends with the right content', async () => {
    const fixture = new TestStore();
    const content = patterned(1, 2 * MIB, everyThird);
    const source = fixture.image('source', content);
    const target = fixture.clone(fixture.image('base', patterned(2, 2 * MIB)), 'target');
    fixture.acquire(target);
    let expected = patterned(2, 2 * MIB);
    for (const [i, each] of [range(0, 0, 100), range(200, 300, 100), range(7, 40, 300)].entries()) {
      fill(fixture, target);
      await fixture.store.flush(target.id);
      fixture.store.cloneRanges(source.id, target.id, [each]);
      expected = put(expected, content, each);
      fixture.write(target, i * 5000 + 10, Buffer.alloc(600, i + 1));
      expected.fill(i + 1, i * 5000 + 10, i * 5000 + 610);
      expect(kindOf(() => { fixture.store.markComplete(target.id); })).toBe('busy');
    }
    await complete(fixture, target);
    fixture.expectContent(target, expected);
    expectClean(fixture);
  });

  it.each<[string, (fixture: TestStore, source: NodeRow, target: NodeRow) => void, string]>([
    ['a start within a block', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [{ sourceAtBytes: 512, targetAtBytes: 0, lengthBytes: BLOCK_BYTES }]); }, 'invalid-argument'],
    ['a length within a block', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [{ sourceAtBytes: 0, targetAtBytes: 0, lengthBytes: 5000 }]); }, 'invalid-argument'],
    ['no length', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [range(0, 0, 0)]); }, 'invalid-argument'],
    ['an odd end within a block of the target', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [{ sourceAtBytes: 0, targetAtBytes: 0, lengthBytes: MIB + 100 }]); }, 'invalid-argument'],
    ['ranges that overlap in the target', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [range(0, 0, 10), range(100, 9, 1)]); }, 'invalid-argument'],
    ['a range behind the end of the source', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [range(250, 0, 10)]); }, 'invalid-argument'],
    ['a range behind the end of the target', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [range(0, 511, 2)]); }, 'too-large'],
    ['a negative offset', (f, s, t) => { f.store.cloneRanges(s.id, t.id, [range(0, -1, 2)]); }, 'invalid-argument'],
    ['a faulted target', (f, s, t) => { f.store.faultNode(t.id, 'test'); f.store.cloneRanges(s.id, t.id, [range(0, 0, 1)]); }, 'faulted'],
    ['a faulted source', (f, s, t) => { f.store.faultNode(s.id, 'test'); f.store.cloneRanges(s.id, t.id, [range(0, 0, 1)]); }, 'faulted'],
    ['a target that is a directory', (f, s) => { f.store.cloneRanges(s.id, ROOT_ID, [range(0, 0, 1)]); }, 'is-a-directory'],
    ['a target that is no more', (f, s) => { f.store.cloneRanges(s.id, 999, [range(0, 0, 1)]); }, 'not-found'],
  ])('refuses %s, and changes nothing', (_what, act, kind) => {
    const fixture = new TestStore();
    const source = fixture.image('source', patterned(1, MIB + 100));
    const target = fixture.image('target', patterned(2, 2 * MIB));
    expect(kindOf(() => { act(fixture, source, target); })).toBe(kind);
    fixture.expectContent(target, patterned(2, 2 * MIB));
    expect(extentsOf(fixture, target)).toEqual([]);
  });

  it('joins what is copied in pieces to one extent', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', patterned(1, MIB));
    const target = fixture.emptyImage('target', MIB);
    for (let at = 0; at < 256; at += 32) fixture.store.cloneRanges(source.id, target.id, [range(at, at, 32)]);
    expect(extentsOf(fixture, target)).toEqual([[0, 256, fixture.layer(source).backingId, 0]]);
    fixture.expectContent(target, patterned(1, MIB));
  });
});
