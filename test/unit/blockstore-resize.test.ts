/**
 * Sizes: what was cut off never comes back, whatever lies below; maps grow under those who use them; and nothing changes at
 * the offsets where 32-bit arithmetic, in bytes, sectors or blocks, would wrap.
 */
import fs from 'node:fs';
import { describe, expect, it } from 'vitest';

import { enterDisk, leaveDisk } from '../../blockstore/hot/context.js';
import { SharedDisk } from '../../blockstore/hot/block-map.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, DISK_BYTES_MAX, PAGE_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, kindOf, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';

const GIB = 1024 ** 3;
const TIB = 1024 ** 4;
const SIZE_BYTES = 12 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);

function shrunkAndGrown(content: Buffer, smallBytes: number, largeBytes: number): Buffer {
  return Buffer.concat([content.subarray(0, smallBytes)], largeBytes);
}

describe('a shrink and a growth', () => {
  const sizes = [0, 1, 511, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 4 * BLOCK_BYTES + 700, SIZE_BYTES - 1];

  it.each([true, false])('leave zeros where data was, of the source and of the disk itself (open: %s)', (open) => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const model = Buffer.from(SOURCE);
    const data = patternBytes(2, 0, 5000);
    data.copy(model, 3 * BLOCK_BYTES + 50);
    for (const [i, sizeBytes] of sizes.entries()) {
      const clone = fixture.clone(base, `clone-${i}`);
      fixture.acquire(clone);
      fixture.write(clone, 3 * BLOCK_BYTES + 50, data);
      if (!open) {
        fixture.store.disks.release(clone.id);
        fixture.store.disks.retireIdle(clone.id);
      }
      fixture.store.resize(clone.id, sizeBytes);
      expect(fixture.row(clone).sizeBytes).toBe(sizeBytes);
      fixture.expectContent(clone, model.subarray(0, sizeBytes));
      fixture.store.resize(clone.id, 2 * SIZE_BYTES);
      const expected = shrunkAndGrown(model, sizeBytes, 2 * SIZE_BYTES);
      fixture.expectContent(clone, expected);
      // As a clone of it sees it, and the next server.
      const second = fixture.clone(clone, `second-${i}`);
      fixture.expectContent(second, expected);
      if (i % 3 === 0) fixture.kill();
      fixture.expectContent(clone, expected);
      fixture.expectContent(second, expected);
      if (fixture.store.disks.isUsed(clone.id)) fixture.store.disks.release(clone.id);
    }
    fixture.expectContent(base, SOURCE);
  });

  it('leave a hole there, also for those who look for data', () => {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', patterned(1, SIZE_BYTES)), 'clone');
    fixture.acquire(clone);
    fixture.store.resize(clone.id, 4 * BLOCK_BYTES);
    fixture.store.resize(clone.id, SIZE_BYTES);
    expect(fixture.store.data.seek(clone.id, 0, false)).toBe(4 * BLOCK_BYTES);
    expect(fixture.store.data.seek(clone.id, 4 * BLOCK_BYTES, true)).toBe(-1);
  });

  it('of a disk do not change what was sealed under it before', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    const before = fixture.clone(disk, 'before');
    fixture.acquire(disk);
    fixture.store.resize(disk.id, 5000);
    const between = fixture.clone(disk, 'between');
    fixture.store.resize(disk.id, SIZE_BYTES);
    fixture.write(disk, 9000, Buffer.from('new'));
    fixture.expectContent(before, SOURCE);
    fixture.expectContent(between, SOURCE.subarray(0, 5000));
    const expected = shrunkAndGrown(SOURCE, 5000, SIZE_BYTES);
    expected.write('new', 9000);
    fixture.expectContent(disk, expected);
  });
});

describe('a size', () => {
  it('has bounds', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    for (const sizeBytes of [-1, 1.5, Number.NaN, DISK_BYTES_MAX + 1, Number.MAX_SAFE_INTEGER + 1, Infinity]) {
      expect(kindOf(() => { fixture.store.resize(disk.id, sizeBytes); }), String(sizeBytes)).toBe('invalid-argument');
    }
    expect(kindOf(() => { fixture.store.resize(999, 1); })).toBe('not-found');
    expect(fixture.row(disk).sizeBytes).toBe(SIZE_BYTES);
    fixture.acquire(disk);
    expect(kindOf(() => { fixture.write(disk, SIZE_BYTES - 1, Buffer.from('ab')); })).toBe('too-large');
    fixture.expectContent(disk, SOURCE);
  });

  it('of a file ends at the largest disk\'s, whether it owns everything or not', () => {
    const fixture = new TestStore();
    const file = fixture.emptyImage('file', 10, { kind: 'file' });
    const clone = fixture.clone(file, 'clone');
    for (const node of [file, clone]) {
      fixture.acquire(node);
      for (const offset of [DISK_BYTES_MAX, DISK_BYTES_MAX - 1, 2 ** 50, 2 ** 53 - 10]) {
        expect(kindOf(() => { fixture.write(node, offset, Buffer.from('ab')); }), String(offset)).toBe('too-large');
      }
      expect(fixture.disk(node).shared.sizeBytes()).toBe(10);
    }
  });

  it('that does not change is nothing to do', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    const before = fixture.row(disk);
    fixture.store.resize(disk.id, SIZE_BYTES);
    expect(fixture.row(disk)).toEqual(before);
  });
});

describe('growth beyond the map', () => {
  it('of an open disk puts a larger instance in its place, with everything that it had', () => {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', SOURCE), 'clone');
    const old = fixture.acquire(clone);
    fixture.write(clone, 100, Buffer.from('before'));
    const actor = fixture.actor(1);
    const shared = new SharedDisk(old.shared.handles);
    expect(enterDisk(actor, shared)).toBe(true);
    leaveDisk(actor, shared);
    const largeBytes = 5 * PAGE_BYTES + 300;
    fixture.store.resize(clone.id, largeBytes);
    // Whoever has the old one is sent away, and has been told of the new one.
    expect(enterDisk(actor, shared)).toBe(false);
    expect([...fixture.announced.values()].map(({ nodeId, serial }) => [nodeId, serial])).toEqual([[clone.id, fixture.disk(clone).shared.serial]]);
    expect(fixture.disk(clone).shared.serial).not.toBe(shared.serial);
    expect(fixture.disk(clone).users).toBe(1);
    fixture.write(clone, largeBytes - 5, Buffer.from('after'));
    const expected = Buffer.concat([SOURCE], largeBytes);
    expected.write('before', 100);
    expected.write('after', largeBytes - 5);
    fixture.expectContent(clone, expected);
    fixture.kill();
    fixture.expectContent(clone, expected);
  });

  it('of an open file happens as it is written to, owned or not', () => {
    const fixture = new TestStore();
    const file = fixture.image('file', SOURCE, { kind: 'file' });
    const clone = fixture.clone(file, 'clone');
    const far = 70 * 1024 * 1024 + 5;
    for (const node of [file, clone]) {
      fixture.acquire(node);
      fixture.write(node, far, Buffer.from('far'));
      fixture.store.data.discard(node.id, 0, 10);
      const expected = Buffer.concat([SOURCE], far + 3);
      expected.fill(0, 0, 10);
      expected.write('far', far);
      fixture.expectContent(node, expected);
    }
    // Sealing a file that grew while it owned everything, and touching its end then.
    const second = fixture.clone(file, 'second');
    fixture.write(file, far - 1, Buffer.from('again'));
    expect(fixture.read(file, far - 1, 10).toString()).toBe('again');
    fixture.acquire(second);
    expect(fixture.read(second, far - 1, 10).toString()).toBe('\0far');
  });
});

describe.each([2 * GIB, 4 * GIB, 2 * TIB, 16 * TIB])('at %i bytes', (boundary) => {
  const sizeBytes = boundary + 2 * BLOCK_BYTES + 100;
  /** What is looked at: around the boundary, and where a wrapped offset would land. */
  const places = [0, boundary / 2 - BLOCK_BYTES, boundary - 2 * BLOCK_BYTES];
  const spanBytes = 4 * BLOCK_BYTES + 100;

  function openBase(fixture: TestStore): { readonly base: NodeRow; readonly models: Map<number, Buffer> } {
    const base = fixture.emptyImage('base', sizeBytes);
    fixture.acquire(base);
    const models = new Map(places.map((place) => [place, patternBytes(place % 1000, place, spanBytes)]));
    for (const [place, content] of models) fixture.write(base, place, content);
    return { base, models };
  }

  function expectModels(fixture: TestStore, node: NodeRow, models: ReadonlyMap<number, Buffer>): void {
    for (const [place, content] of models) expect(fixture.read(node, place, spanBytes).equals(content), `at ${place}`).toBe(true);
  }

  it('a clone reads, writes, discards and seeks across', () => {
    const fixture = new TestStore({ threads: 1 });
    const { base, models } = openBase(fixture);
    const clone = fixture.clone(base, 'clone');
    fixture.acquire(clone);
    expectModels(fixture, clone, models);
    const model = models.get(boundary - 2 * BLOCK_BYTES)!;
    const from = boundary - 2 * BLOCK_BYTES;
    for (const [i, [offset, length]] of ([[-1, 1], [0, 1], [-1, 2], [1, 1], [-1, 3], [-BLOCK_BYTES, BLOCK_BYTES], [-5000, 7000]] as const).entries()) {
      const data = patternBytes(100 + i, 0, length);
      fixture.write(clone, boundary + offset, data);
      data.copy(model, boundary + offset - from);
      expectModels(fixture, clone, models);
    }
    fixture.store.data.discard(clone.id, boundary - 1, 2);
    model.fill(0, boundary - 1 - from, boundary + 1 - from);
    expectModels(fixture, clone, models);
    fixture.store.data.discard(clone.id, boundary - BLOCK_BYTES, 2 * BLOCK_BYTES);
    model.fill(0, boundary - BLOCK_BYTES - from, boundary + BLOCK_BYTES - from);
    expectModels(fixture, clone, models);
    const { data } = fixture.store;
    expect(data.seek(clone.id, spanBytes + BLOCK_BYTES, true)).toBe(boundary / 2 - BLOCK_BYTES);
    expect(data.seek(clone.id, boundary - 2 * BLOCK_BYTES, false)).toBe(boundary - BLOCK_BYTES);
    expect(data.seek(clone.id, boundary, true)).toBe(boundary + BLOCK_BYTES);
    const owned = fixture.store.ownedBlocks(clone);
    fixture.kill();
    fixture.acquire(clone);
    expectModels(fixture, clone, models);
    expect(fixture.store.ownedBlocks(clone)).toBe(owned);
    fixture.acquire(base);
    expect(fixture.read(base, boundary - 1, 2).equals(patternBytes((boundary - 2 * BLOCK_BYTES) % 1000, boundary - 1, 2))).toBe(true);
  });

  it('a disk shrinks and grows across', () => {
    const fixture = new TestStore({ threads: 1 });
    const { base } = openBase(fixture);
    const clone = fixture.clone(base, 'clone');
    fixture.acquire(clone);
    const content = (offset: number): Buffer => patternBytes((boundary - 2 * BLOCK_BYTES) % 1000, boundary + offset, 1);
    for (const offset of [1, 0, -1]) {
      fixture.store.resize(clone.id, boundary + offset);
      expect(fixture.disk(clone).shared.sizeBytes()).toBe(boundary + offset);
      expect(fs.fstatSync(fixture.disk(clone).fd).size).toBe(boundary + offset);
      expect(fixture.read(clone, boundary + offset - 1, 10).equals(content(offset - 1))).toBe(true);
      expect(kindOf(() => { fixture.write(clone, boundary + offset, Buffer.from('x')); })).toBe('too-large');
    }
    fixture.store.resize(clone.id, boundary + 1);
    expect(fixture.read(clone, boundary - 2, 10)).toEqual(Buffer.concat([content(-2), Buffer.alloc(2)]));
    fixture.write(clone, boundary, Buffer.from('x'));
    fixture.kill();
    fixture.acquire(clone);
    expect(fixture.read(clone, boundary - 2, 10)).toEqual(Buffer.concat([content(-2), Buffer.from('\0x')]));
  });
});

describe('the largest disk', () => {
  it('is written to its last byte, and no further', () => {
    const fixture = new TestStore({ threads: 1 });
    const clone = fixture.clone(fixture.emptyImage('base', DISK_BYTES_MAX), 'clone');
    fixture.acquire(clone);
    fixture.write(clone, DISK_BYTES_MAX - 3, Buffer.from('end'));
    expect(kindOf(() => { fixture.write(clone, DISK_BYTES_MAX - 2, Buffer.from('end')); })).toBe('too-large');
    expect(fixture.read(clone, DISK_BYTES_MAX - 5, 10).toString()).toBe('\0\0end');
    expect(fixture.store.data.seek(clone.id, 0, true)).toBe(DISK_BYTES_MAX - BLOCK_BYTES);
    fixture.kill();
    fixture.acquire(clone);
    expect(fixture.read(clone, DISK_BYTES_MAX - 5, 10).toString()).toBe('\0\0end');
  });
});
