/** SEEK_DATA and SEEK_HOLE: exactly what the layers' files have, each through the map of the disk, and data in doubt. */
import { describe, expect, it } from 'vitest';

import { Errno } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { unownedDataBytes } from '../../blockstore/unowned-data.js';
import { BLOCK_BYTES, PAGE_BYTES } from '../../blockstore/units.js';
import { TestStore, at, kindOf, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';

const BLOCKS = 16;
const SIZE_BYTES = BLOCKS * BLOCK_BYTES + 100;
/** Blocks 4 to 7 and 12 are holes; block 16 is the partial one. */
const isHole = (block: number): boolean => (block >= 4 && block < 8) || block === 12;
const SOURCE = patterned(1, SIZE_BYTES, isHole);

/** The runs of data, in blocks, as those who follow data and holes find them. */
function dataRuns({ store }: TestStore, node: NodeRow, sizeBytes: number): [number, number][] {
  const runs: [number, number][] = [];
  for (let offset = 0; offset < sizeBytes; ) {
    const data = store.data.seek(node.id, offset, true);
    if (data < 0) break;
    const hole = store.data.seek(node.id, data, false);
    runs.push([data / BLOCK_BYTES, hole / BLOCK_BYTES]);
    offset = hole;
  }
  return runs;
}

function openClone(): { readonly fixture: TestStore; readonly clone: NodeRow } {
  const fixture = new TestStore();
  const clone = fixture.clone(fixture.image('base', SOURCE), 'clone');
  fixture.acquire(clone);
  return { fixture, clone };
}

describe('data and holes', () => {
  it('of a clone that owns nothing are those of its source', () => {
    const { fixture, clone } = openClone();
    expect(dataRuns(fixture, clone, SIZE_BYTES)).toEqual([[0, 4], [8, 12], [13, SIZE_BYTES / BLOCK_BYTES]]);
  });

  it('of what a clone owns are its own', () => {
    const { fixture, clone } = openClone();
    fixture.write(clone, 5 * BLOCK_BYTES, patternBytes(2, 0, BLOCK_BYTES));
    fixture.store.data.discard(clone.id, BLOCK_BYTES, BLOCK_BYTES);
    fixture.store.data.discard(clone.id, 14 * BLOCK_BYTES, SIZE_BYTES);
    expect(dataRuns(fixture, clone, SIZE_BYTES)).toEqual([[0, 1], [2, 4], [5, 6], [8, 12], [13, 14]]);
    fixture.kill();
    fixture.acquire(clone);
    expect(dataRuns(fixture, clone, SIZE_BYTES)).toEqual([[0, 1], [2, 4], [5, 6], [8, 12], [13, 14]]);
    // Of a clone of it as well, through two layers.
    const second = fixture.clone(clone, 'second');
    fixture.acquire(second);
    fixture.write(second, 3 * BLOCK_BYTES + 10, Buffer.from('x'));
    expect(dataRuns(fixture, second, SIZE_BYTES)).toEqual([[0, 1], [2, 4], [5, 6], [8, 12], [13, 14]]);
  });

  it('of a disk that owns everything are those of its file', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    fixture.acquire(disk);
    expect(dataRuns(fixture, disk, SIZE_BYTES)).toEqual([[0, 4], [8, 12], [13, SIZE_BYTES / BLOCK_BYTES]]);
    fixture.store.data.discard(disk.id, 0, 2 * BLOCK_BYTES);
    expect(dataRuns(fixture, disk, SIZE_BYTES)).toEqual([[2, 4], [8, 12], [13, SIZE_BYTES / BLOCK_BYTES]]);
  });

  it('of a disk that stands on nothing are what it owns', () => {
    const fixture = new TestStore();
    const disk = fixture.unbackedImage('disk', SIZE_BYTES);
    fixture.acquire(disk);
    expect(dataRuns(fixture, disk, SIZE_BYTES)).toEqual([]);
    expect(fixture.store.data.seek(disk.id, 5, false)).toBe(5);
    fixture.write(disk, 3 * BLOCK_BYTES + 5, Buffer.from('x'));
    expect(dataRuns(fixture, disk, SIZE_BYTES)).toEqual([[3, 4]]);
    const expected = Buffer.alloc(SIZE_BYTES);
    expected.write('x', 3 * BLOCK_BYTES + 5);
    fixture.expectContent(disk, expected);
    fixture.expectContent(fixture.clone(disk, 'clone'), expected);
  });

  it('begin in the middle of a block where somebody asks in the middle of one', () => {
    const { fixture, clone } = openClone();
    const { data } = fixture.store;
    for (const delta of [0, 1, 511, 4095]) {
      expect(data.seek(clone.id, BLOCK_BYTES + delta, true)).toBe(BLOCK_BYTES + delta);
      expect(data.seek(clone.id, BLOCK_BYTES + delta, false)).toBe(4 * BLOCK_BYTES);
      expect(data.seek(clone.id, 4 * BLOCK_BYTES + delta, false)).toBe(4 * BLOCK_BYTES + delta);
      expect(data.seek(clone.id, 4 * BLOCK_BYTES + delta, true)).toBe(8 * BLOCK_BYTES);
    }
    expect(data.seek(clone.id, SIZE_BYTES - 1, true)).toBe(SIZE_BYTES - 1);
    expect(data.seek(clone.id, SIZE_BYTES - 1, false)).toBe(SIZE_BYTES);
  });

  it('end with the disk', () => {
    const { fixture, clone } = openClone();
    for (const offset of [SIZE_BYTES, SIZE_BYTES + 1, 2 ** 50]) {
      for (const wantData of [true, false]) expect(fixture.store.data.seek(clone.id, offset, wantData)).toBe(-1);
    }
    const empty = fixture.emptyImage('empty', 0, { kind: 'file' });
    fixture.acquire(empty);
    for (const wantData of [true, false]) expect(fixture.store.data.seek(empty.id, 0, wantData)).toBe(-1);
  });

  it('go over the pages of the map', () => {
    const fixture = new TestStore();
    const sizeBytes = 4 * PAGE_BYTES;
    const clone = fixture.clone(fixture.emptyImage('base', sizeBytes), 'clone');
    fixture.acquire(clone);
    const { data } = fixture.store;
    expect(data.seek(clone.id, 0, true)).toBe(-1);
    fixture.write(clone, 2 * PAGE_BYTES - BLOCK_BYTES, patternBytes(2, 0, 2 * BLOCK_BYTES));
    expect(data.seek(clone.id, 0, true)).toBe(2 * PAGE_BYTES - BLOCK_BYTES);
    expect(data.seek(clone.id, 2 * PAGE_BYTES, false)).toBe(2 * PAGE_BYTES + BLOCK_BYTES);
    expect(data.seek(clone.id, 2 * PAGE_BYTES + BLOCK_BYTES, true)).toBe(-1);
  });

  it('are all data where the file system cannot tell', () => {
    const { fixture, clone } = openClone();
    fixture.decide = at('origin-seek', () => ({ kind: 'fail', errno: Errno.EINVAL }));
    for (const offset of [0, 5 * BLOCK_BYTES, SIZE_BYTES - 1]) {
      expect(fixture.store.data.seek(clone.id, offset, true)).toBe(offset);
      expect(fixture.store.data.seek(clone.id, offset, false)).toBe(SIZE_BYTES);
    }
  });

  it('are asked of an open disk only', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    expect(kindOf(() => fixture.store.data.seek(disk.id, 0, true))).toBe('bad-handle');
  });
});

describe('how much un-owned data there is', () => {
  it('is exact, and does not count holes', () => {
    const { fixture, clone } = openClone();
    const data = (4 + 4 + 3) * BLOCK_BYTES + 100;
    expect(unownedDataBytes(fixture.store, clone)).toBe(data);
    fixture.write(clone, 0, patternBytes(2, 0, 2 * BLOCK_BYTES));
    fixture.store.data.discard(clone.id, 5 * BLOCK_BYTES, 4 * BLOCK_BYTES);
    expect(unownedDataBytes(fixture.store, clone)).toBe(data - 3 * BLOCK_BYTES);
    fixture.store.data.discard(clone.id, 0, SIZE_BYTES);
    expect(unownedDataBytes(fixture.store, clone)).toBe(0);
    expect(fixture.disk(clone).users).toBe(1);
  });

  it('is nothing for a disk that owns everything', () => {
    const fixture = new TestStore();
    expect(unownedDataBytes(fixture.store, fixture.image('disk', SOURCE))).toBe(0);
  });
});
