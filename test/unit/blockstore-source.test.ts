/**
 * Sources that are not what they were. Found out when a disk is opened: refused. Found out while it is open: an error for
 * what cannot be read any more, and never zeros in its place, whether they are read, kept, filled or called a hole.
 */
import fs from 'node:fs';
import { describe, expect, it } from 'vitest';

import { Errno } from '../../blockstore/errors.js';
import { REQUEST_BYTES_MAX, enterDisk, leaveDisk } from '../../blockstore/hot/context.js';
import { IoBuffer } from '../../blockstore/hot/door.js';
import { fillStep, newFillProgress } from '../../blockstore/hot/fill-step.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, at, everyThird, kindOf, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';

const SIZE_BYTES = 30 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);
/** In whole seconds, so that it can be set again exactly. */
const RECORDED_TIME = new Date('2026-01-02T03:04:05Z');
/** Within a block that is data. */
const CUT_BYTES = 10 * BLOCK_BYTES + 1000;

function touch(file: string): void {
  const { atime, mtimeMs } = fs.statSync(file);
  fs.utimesSync(file, atime, new Date(mtimeMs + 5000));
}

describe('a source file that was', () => {
  const changes: readonly (readonly [string, 'source-changed' | 'source-unreachable', (file: string) => void])[] = [
    ['written to', 'source-changed', (file) => { fs.writeFileSync(file, 'x', { flag: 'r+' }); touch(file); }],
    ['truncated', 'source-changed', (file) => { fs.truncateSync(file, CUT_BYTES); }],
    ['made longer', 'source-changed', (file) => { fs.truncateSync(file, SIZE_BYTES + 1); }],
    ['replaced by the same content', 'source-changed', (file) => {
      const { atime, mtime } = fs.statSync(file);
      fs.copyFileSync(file, `${file}.new`);
      fs.utimesSync(`${file}.new`, atime, mtime);
      fs.renameSync(`${file}.new`, file);
    }],
    ['removed', 'source-unreachable', (file) => { fs.renameSync(file, `${file}.away`); }],
  ];

  it.each(changes)('%s gives no byte to disks over it; what they own is as before', (_name, kind, change) => {
    const fixture = new TestStore();
    const { node, file } = fixture.inPlace('disk', SOURCE);
    const clone = fixture.clone(node, 'clone');
    const unrelated = fixture.image('unrelated', SOURCE);
    const owned = patternBytes(4, 0, 2 * BLOCK_BYTES);
    for (const each of [node, clone]) {
      fixture.acquire(each);
      fixture.write(each, BLOCK_BYTES, owned);
      fixture.store.disks.release(each.id);
      fixture.store.disks.retireIdle(each.id);
    }
    change(file);
    for (const each of [node, clone]) {
      fixture.acquire(each);
      expect(fixture.read(each, BLOCK_BYTES, owned.length).equals(owned)).toBe(true);
      for (const at of [0, 3 * BLOCK_BYTES, SIZE_BYTES - 1]) expect(kindOf(() => fixture.read(each, at, 1))).toBe(kind);
      expect(kindOf(() => { fixture.write(each, 3 * BLOCK_BYTES + 1, Buffer.from('part')); })).toBe(kind);
      fixture.write(each, 4 * BLOCK_BYTES, owned.subarray(0, BLOCK_BYTES));
      expect(fixture.ownedBlocks(each)).toEqual([1, 2, 4]);
      expect(kindOf(() => { fixture.store.assertSourcesUsable(each.id); })).toBe(kind);
    }
    expect(fixture.store.files.sourceConditions()).toMatchObject([{ kind, file, reason: expect.stringContaining(file) as string }]);
    fixture.expectContent(unrelated, SOURCE);
  });

  it('moved away is taken again when it is back, by disks that are open', () => {
    const fixture = new TestStore();
    const { node, file } = fixture.inPlace('disk', SOURCE);
    fs.renameSync(file, `${file}.away`);
    fixture.acquire(node);
    expect(kindOf(() => fixture.read(node, 0, 1))).toBe('source-unreachable');
    fs.renameSync(`${file}.away`, file);
    fixture.store.files.lookAtSources();
    fixture.expectContent(node, SOURCE);
    expect(fixture.store.files.sourceConditions()).toMatchObject([{ kind: 'ok', reason: null }]);
  });

  it('written to while a disk is open is refused from the next look on, and taken again when it is as it was', () => {
    const fixture = new TestStore();
    const { node, file } = fixture.inPlace('disk', SOURCE, { mtime: RECORDED_TIME });
    fixture.acquire(node);
    const descriptor = fixture.disk(node).shared.originFd(1);
    fs.writeFileSync(file, SOURCE.subarray(0, 10), { flag: 'r+' });
    touch(file);
    fixture.store.files.lookAtSources();
    expect(kindOf(() => fixture.read(node, 0, 1))).toBe('source-changed');
    // Another thread may be reading from it at this moment.
    expect(fs.fstatSync(descriptor).size).toBe(SIZE_BYTES);
    fs.utimesSync(file, RECORDED_TIME, RECORDED_TIME);
    fixture.store.files.lookAtSources();
    fixture.expectContent(node, SOURCE);
  });

  it('linked, or given to somebody else to read, is still the same', () => {
    const fixture = new TestStore();
    const { node, file } = fixture.inPlace('disk', SOURCE);
    fs.linkSync(file, `${file}.link`);
    fs.chmodSync(file, 0o640);
    fixture.expectContent(node, SOURCE);
  });

  it('replaced while a disk is open does not reach that disk, which says so, and nobody clones it', () => {
    const fixture = new TestStore();
    const { node, file } = fixture.inPlace('disk', SOURCE);
    const clone = fixture.clone(node, 'clone');
    fixture.acquire(node);
    fs.renameSync(file, `${file}.away`);
    fs.writeFileSync(file, patternBytes(9, 0, SIZE_BYTES));
    fixture.store.files.lookAtSources();
    fixture.expectContent(node, SOURCE);
    // The descriptor is shared: it still is the file that was taken in.
    fixture.expectContent(clone, SOURCE);
    expect(fixture.store.files.sourceConditions()).toMatchObject([{ kind: 'moved', file }]);
    expect(kindOf(() => { fixture.store.assertSourcesUsable(node.id); })).toBe('source-changed');
  });
});

interface Setting {
  readonly fixture: TestStore;
  readonly node: NodeRow;
}

/** A disk whose source loses its end while the disk is open: a file outside of the store, or a sealed layer's. */
function openThenCut(kind: string, copyOnRead = false): Setting {
  const fixture = new TestStore();
  let node: NodeRow;
  let file: string;
  if (kind === 'file outside') {
    ({ node, file } = fixture.inPlace('disk', SOURCE, { copyOnRead }));
  } else {
    const base = fixture.image('base', SOURCE);
    file = fixture.store.files.storePath(fixture.layer(base).id);
    node = fixture.clone(base, 'disk', { copyOnRead });
  }
  fixture.acquire(node);
  fixture.write(node, 20 * BLOCK_BYTES, patternBytes(2, 0, BLOCK_BYTES));
  fs.truncateSync(file, CUT_BYTES);
  return { fixture, node };
}

describe.each(['file outside', 'sealed layer'])('a source (%s) that was cut while its disk is open', (kind) => {
  it('is readable up to the cut; behind it is an error', () => {
    const { fixture, node } = openThenCut(kind);
    expect(fixture.read(node, 0, CUT_BYTES).equals(SOURCE.subarray(0, CUT_BYTES))).toBe(true);
    expect(fixture.read(node, 20 * BLOCK_BYTES, BLOCK_BYTES).equals(patternBytes(2, 0, BLOCK_BYTES))).toBe(true);
    for (const [from, length] of [[CUT_BYTES - 1, 2], [CUT_BYTES, 1], [CUT_BYTES + BLOCK_BYTES, BLOCK_BYTES], [SIZE_BYTES - 1, 1], [0, SIZE_BYTES]] as const) {
      expect(kindOf(() => fixture.read(node, from, length)), `${length} bytes at ${from}`).toBe('io-error');
    }
  });

  it('keeps nothing by copy-on-read', () => {
    const { fixture, node } = openThenCut(kind, true);
    expect(kindOf(() => fixture.read(node, 0, SIZE_BYTES))).toBe('io-error');
    for (const block of fixture.ownedBlocks(node).filter((owned) => owned !== 20)) expect(block).toBeLessThan(10);
  });

  it('fails a write that needs the rest of a block, and takes one that does not', () => {
    const { fixture, node } = openThenCut(kind);
    expect(kindOf(() => { fixture.write(node, 15 * BLOCK_BYTES + 5, Buffer.from('part')); })).toBe('io-error');
    expect(fixture.ownedBlocks(node)).toEqual([20]);
    fixture.write(node, 15 * BLOCK_BYTES, patternBytes(3, 0, BLOCK_BYTES));
    expect(fixture.read(node, 15 * BLOCK_BYTES, BLOCK_BYTES).equals(patternBytes(3, 0, BLOCK_BYTES))).toBe(true);
    expect(fixture.ownedBlocks(node)).toEqual([15, 20]);
  });

  it('stops a fill at the cut, and makes no zeros of what is behind', () => {
    const { fixture, node } = openThenCut(kind);
    const { context } = fixture.store;
    const { shared } = fixture.disk(node);
    const buffer = new IoBuffer(REQUEST_BYTES_MAX);
    // Also a fill that begins behind the cut, as one that went on after a pause.
    for (const fromBlock of [0, 10, 11, 12, 21, 30]) {
      const progress = { ...newFillProgress(), cursorBlock: fromBlock };
      for (let step = 0; step < 100 && progress.failed === 0; step += 1) {
        expect(enterDisk(context, shared)).toBe(true);
        const atEnd = fillStep(context, shared, buffer, progress);
        leaveDisk(context, shared);
        expect(atEnd).toBe(false);
      }
      expect(progress.failed).toBe(-Errno.EIO);
    }
    const owned = fixture.ownedBlocks(node);
    expect(owned.slice(0, 9)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8]);
    expect(owned.filter((block) => block >= 10)).toEqual([20]);
  });

  it('is no hole behind the cut', () => {
    const { fixture, node } = openThenCut(kind);
    const { data } = fixture.store;
    for (const from of [CUT_BYTES, 11 * BLOCK_BYTES, 12 * BLOCK_BYTES, 29 * BLOCK_BYTES, SIZE_BYTES - 1]) expect(data.seek(node.id, from, true)).toBe(from);
    for (const from of [9 * BLOCK_BYTES, CUT_BYTES, 19 * BLOCK_BYTES, SIZE_BYTES - 1]) expect(data.seek(node.id, from, false)).toBe(SIZE_BYTES);
    // The hole before it is one as before.
    expect(data.seek(node.id, 8 * BLOCK_BYTES, true)).toBe(9 * BLOCK_BYTES);
    expect(data.seek(node.id, 6 * BLOCK_BYTES, false)).toBe(8 * BLOCK_BYTES);
  });
});

describe('a source', () => {
  it('that is shorter than its disk goes on with zeros', () => {
    const fixture = new TestStore();
    const { node } = fixture.inPlace('disk', SOURCE.subarray(0, CUT_BYTES), { sizeBytes: SIZE_BYTES });
    const expected = Buffer.concat([SOURCE.subarray(0, CUT_BYTES)], SIZE_BYTES);
    fixture.expectContent(node, expected);
    fixture.acquire(node);
    fixture.write(node, CUT_BYTES + 500, Buffer.from('behind'));
    expected.write('behind', CUT_BYTES + 500);
    fixture.expectContent(node, expected);
    expect(fixture.store.data.seek(node.id, 11 * BLOCK_BYTES, true)).toBe(-1);
    expect(fixture.store.data.seek(node.id, 11 * BLOCK_BYTES, false)).toBe(11 * BLOCK_BYTES);
  });

  it('that cannot be read fails the read with its errno', () => {
    const { fixture, node } = openThenCut('file outside');
    fixture.decide = at('origin-read', () => ({ kind: 'fail', errno: Errno.ESTALE }));
    expect(kindOf(() => fixture.read(node, 0, 10))).toBe('io-error');
  });

  it('with a bad block fails what needs it and nothing else, and the fill says where', () => {
    const fixture = new TestStore();
    const { node } = fixture.inPlace('disk', SOURCE, { copyOnRead: true });
    fixture.acquire(node);
    const bad = 13 * BLOCK_BYTES;
    const sourceFd = fixture.disk(node).shared.originFd(1);
    fixture.decide = at('origin-read', ({ fd, offsetBytes, lengthBytes }) =>
      (fd === sourceFd && offsetBytes < bad + BLOCK_BYTES && offsetBytes + lengthBytes > bad ? { kind: 'fail', errno: Errno.EIO } : undefined));
    expect(kindOf(() => fixture.read(node, bad + 7, 10))).toBe('io-error');
    expect(kindOf(() => { fixture.write(node, bad + 7, Buffer.from('part')); })).toBe('io-error');
    expect(fixture.ownedBlocks(node)).toEqual([]);
    expect(fixture.read(node, 12 * BLOCK_BYTES, BLOCK_BYTES).equals(SOURCE.subarray(12 * BLOCK_BYTES, 13 * BLOCK_BYTES))).toBe(true);
    const { context } = fixture.store;
    const buffer = new IoBuffer(REQUEST_BYTES_MAX);
    const progress = { ...newFillProgress(), cursorBlock: 13 };
    expect(enterDisk(context, fixture.disk(node).shared)).toBe(true);
    expect(fillStep(context, fixture.disk(node).shared, buffer, progress)).toBe(false);
    leaveDisk(context, fixture.disk(node).shared);
    expect(progress.failed).toBe(-Errno.EIO);
    expect(progress.failedAtBytes).toBe(bad);
    expect(fixture.ownedBlocks(node)).toEqual([12]);
    // A write of all of it needs nothing of the source.
    fixture.write(node, bad, patternBytes(3, 0, BLOCK_BYTES));
    expect(fixture.read(node, bad, BLOCK_BYTES).equals(patternBytes(3, 0, BLOCK_BYTES))).toBe(true);
  });

  it('that was changed while a fill read a batch of it gives nothing of that batch', () => {
    const fixture = new TestStore();
    const { node } = fixture.inPlace('disk', SOURCE);
    fixture.acquire(node);
    const { context } = fixture.store;
    const { shared } = fixture.disk(node);
    const buffer = new IoBuffer(REQUEST_BYTES_MAX);
    const progress = newFillProgress();
    const step = (verify: (origin: number) => number): void => {
      expect(enterDisk(context, shared)).toBe(true);
      fillStep(context, shared, buffer, progress, verify);
      leaveDisk(context, shared);
    };
    const asked: number[] = [];
    step((origin) => { asked.push(origin); return -Errno.ESTALE; });
    expect(asked).toEqual([1]);
    expect(progress).toMatchObject({ failed: -Errno.ESTALE, failedAtBytes: 0, cursorBlock: 0, copiedBytes: 0 });
    expect(fixture.ownedBlocks(node)).toEqual([]);
    step(() => 0);
    expect(fixture.ownedBlocks(node)).toEqual([0, 1]);
  });

  it('is never written to, whatever happens above it', () => {
    const fixture = new TestStore();
    const { node, file } = fixture.inPlace('disk', SOURCE, { copyOnRead: true });
    const before = fs.statSync(file, { bigint: true });
    fixture.acquire(node);
    fixture.read(node, 0, 9 * BLOCK_BYTES);
    fixture.write(node, 12 * BLOCK_BYTES + 7, patternBytes(2, 0, 5 * BLOCK_BYTES));
    fixture.store.data.discard(node.id, 18 * BLOCK_BYTES, 3 * BLOCK_BYTES);
    fixture.store.resize(node.id, 25 * BLOCK_BYTES);
    fixture.store.resize(node.id, 40 * BLOCK_BYTES);
    const clone = fixture.clone(node, 'clone');
    fixture.acquire(clone);
    fixture.write(clone, 0, patternBytes(3, 0, 30 * BLOCK_BYTES));
    const after = fs.statSync(file, { bigint: true });
    expect([after.size, after.mtimeNs, after.blocks]).toEqual([before.size, before.mtimeNs, before.blocks]);
    expect(fs.readFileSync(file).equals(SOURCE)).toBe(true);
    // Not by mistake either: its descriptor cannot write.
    const { shared } = fixture.disk(node);
    const buffer = new IoBuffer(10);
    expect(fixture.store.context.door.pwrite('late', shared.originFd(1), buffer.address, 10, 0)).toBe(-Errno.EBADF);
  });
});

describe('a data file of the store', () => {
  it('that is missing says that the store is damaged', () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const clone = fixture.clone(base, 'clone');
    fixture.acquire(clone);
    fixture.write(clone, 0, Buffer.from('x'));
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    fs.rmSync(fixture.store.files.storePath(fixture.layer(clone).id));
    expect(kindOf(() => fixture.acquire(clone))).toBe('store-damaged');
    expect(fixture.store.disks.get(clone.id)).toBeUndefined();
    expect(fixture.store.context.shared.pagesInUse()).toBe(0);
  });
});
