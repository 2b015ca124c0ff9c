/**
 * Content against checksums, and faults that are lifted: a block store with real hash workers, no daemon.
 *
 * The worker is the built one (`dist`), because a thread cannot be started from TypeScript.
 */
import fs from 'node:fs';
import path from 'node:path';

import Database from 'better-sqlite3';
import { afterEach, describe, expect, it } from 'vitest';

import { CHUNK_BYTES, PIECE_BYTES } from '../../blockstore/checksum-units.js';
import { chunkAt } from '../../blockstore/checksums.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { runCheck, type CheckOutcome, type CheckRequest } from '../../daemon/jobs/check-run.js';
import { readChunk } from '../../daemon/jobs/layer-data.js';
import type { Hasher as HasherType } from '../../daemon/jobs/hasher.js';
import { TestStore, everyThird, patterned } from '../support/blockstore-fixture.js';

const MIB = 1024 * 1024;
const TIB = 1024 * 1024 * MIB;
const built = path.resolve(import.meta.dirname, '../../dist/daemon/jobs');
const { Hasher } = await import(path.join(built, 'hasher.js')) as { readonly Hasher: typeof HasherType };

const hashers: HasherType[] = [];
afterEach(async () => { for (const hasher of hashers.splice(0)) await hasher.close(); });

function newHasher(): HasherType {
  const hasher = new Hasher(null);
  hashers.push(hasher);
  return hasher;
}

async function check(test: TestStore, request: Partial<CheckRequest>): Promise<CheckOutcome> {
  return await runCheck({
    meta: test.store.meta, files: test.store.files, disks: test.store.disks, databaseProblems: () => Promise.resolve(test.store.meta.audit.databaseProblems()),
    makeHasher: newHasher, lift: { prepare: async (id) => { await test.store.prepareToLift(id); }, clear: (id) => { test.store.clearFault(id); } },
  }, { target: null, data: false, repair: false, ...request }, { signal: new AbortController().signal, progress: () => undefined });
}

/** What the scrub does with a layer that was just sealed. */
async function hash(test: TestStore, layerId: number): Promise<void> {
  const hasher = newHasher();
  for (let at = 0; ; ) {
    const result = await readChunk(test.store, hasher, layerId, at, { keep: true, fromDisk: false, rateBytesPerSecond: 0 });
    if (result === null) return;
    expect(result).toMatchObject({ error: null, found: [] });
    at += result.lengthBytes;
  }
}

function backingOf(test: TestStore, node: NodeRow): number {
  const id = test.layer(node).backingId;
  if (id === null) throw new Error(`${node.name} stands on nothing`);
  return id;
}

function checksumRows(test: TestStore): number {
  const database = new Database(path.join(test.storeDir, 'offshoot.db'), { readonly: true });
  try {
    return database.prepare<[], number>('SELECT count(*) FROM checksums').pluck().get() ?? -1;
  } finally {
    database.close();
  }
}

function flip(file: string, offsetBytes: number): void {
  const fd = fs.openSync(file, 'r+');
  const byte = Buffer.alloc(1);
  fs.readSync(fd, byte, 0, 1, offsetBytes);
  byte[0] = (byte[0] ?? 0) ^ 1;
  fs.writeSync(fd, byte, 0, 1, offsetBytes);
  fs.closeSync(fd);
}

describe('checksums', () => {
  it('find one flipped bit, and name the extent and the disks that stand on it', async () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, 4 * MIB, everyThird));
    const clone = test.clone(image, 'clone');
    const layerId = backingOf(test, clone);
    expect(await check(test, { data: true })).toMatchObject({ verdict: 'clean', layersChecked: 1, layersWithoutChecksums: 1 });
    await hash(test, layerId);
    expect(test.store.meta.checksums.of(layerId)?.complete).toBe(true);
    expect(await check(test, { data: true })).toMatchObject({ verdict: 'clean', layersWithoutChecksums: 0 });

    flip(test.store.files.storePath(layerId), 2 * MIB + 17);
    const outcome = await check(test, { data: true });
    expect(outcome.verdict).toBe('corruption');
    expect(outcome.findings).toMatchObject([{ kind: 'data-damaged', layerId, offsetBytes: 2 * MIB, lengthBytes: PIECE_BYTES, disks: ['image', 'clone'] }]);
    flip(test.store.files.storePath(layerId), 2 * MIB + 17);
    expect(await check(test, { data: true })).toMatchObject({ verdict: 'clean' });
  });

  it('find data in what was a hole, and a hole in what was data, across chunks', async () => {
    const test = new TestStore();
    const sizeBytes = CHUNK_BYTES + 3 * MIB + 512;
    const image = test.emptyImage('image', sizeBytes);
    test.acquire(image);
    test.write(image, CHUNK_BYTES - MIB, Buffer.alloc(2 * MIB, 5));
    test.store.disks.release(image.id);
    const layerId = backingOf(test, test.clone(image, 'clone'));
    const file = test.store.files.storePath(layerId);
    await hash(test, layerId);
    expect(test.store.meta.checksums.nextPiece(layerId)).toBe(128);
    expect(await check(test, { data: true })).toMatchObject({ verdict: 'clean', layersWithoutChecksums: 0 });

    flip(file, sizeBytes - 1);
    fs.closeSync(punch(file, CHUNK_BYTES - MIB, 2 * MIB));
    expect((await check(test, { data: true })).findings).toMatchObject([
      { kind: 'data-damaged', offsetBytes: CHUNK_BYTES - MIB, lengthBytes: 2 * MIB },
      { kind: 'data-damaged', offsetBytes: CHUNK_BYTES + 3 * MIB, lengthBytes: 512 },
    ]);
  });

  it('take no room and no time for holes: 16 TiB with four blocks of data', async () => {
    const test = new TestStore();
    const sizeBytes = 16 * TIB;
    const image = test.emptyImage('image', sizeBytes);
    const places = [0, 3 * TIB + 5 * BLOCK_BYTES, 3 * TIB + CHUNK_BYTES, sizeBytes - BLOCK_BYTES];
    test.acquire(image);
    for (const place of places) test.write(image, place, Buffer.alloc(BLOCK_BYTES, 5));
    test.store.disks.release(image.id);
    const layerId = backingOf(test, test.clone(image, 'clone'));
    const file = test.store.files.storePath(layerId);
    await hash(test, layerId);
    expect(test.store.meta.checksums.of(layerId)?.complete).toBe(true);
    expect(checksumRows(test)).toBeLessThanOrEqual(2 * places.length);
    expect(await check(test, { data: true })).toMatchObject({ verdict: 'clean', layersWithoutChecksums: 0, bytesRead: 4 * PIECE_BYTES });

    // Both where there was nothing, and where there was something.
    flip(file, 9 * TIB + 3);
    flip(file, places[2] ?? 0);
    fs.closeSync(punch(file, sizeBytes - BLOCK_BYTES, BLOCK_BYTES));
    expect((await check(test, { data: true })).findings).toMatchObject([
      { kind: 'data-damaged', offsetBytes: 3 * TIB + CHUNK_BYTES, lengthBytes: PIECE_BYTES },
      { kind: 'data-damaged', offsetBytes: 9 * TIB, lengthBytes: PIECE_BYTES },
      { kind: 'data-damaged', offsetBytes: sizeBytes - PIECE_BYTES, lengthBytes: PIECE_BYTES },
    ]);
  });

  it('find that data is gone which was followed by a hole, also when the file has become a hole altogether', async () => {
    const test = new TestStore();
    const image = test.emptyImage('image', 3 * TIB);
    test.acquire(image);
    test.write(image, 2 * TIB, Buffer.alloc(BLOCK_BYTES, 5));
    test.store.disks.release(image.id);
    const layerId = backingOf(test, test.clone(image, 'clone'));
    await hash(test, layerId);
    const file = test.store.files.storePath(layerId);
    fs.truncateSync(file, 0);
    fs.truncateSync(file, 3 * TIB);
    expect((await check(test, { data: true })).findings).toMatchObject([{ kind: 'data-damaged', offsetBytes: 2 * TIB, lengthBytes: PIECE_BYTES }]);
  });

  it('do not look at what a layer does not own', async () => {
    const test = new TestStore();
    const clone = test.clone(test.image('image', patterned(1, 4 * MIB)), 'clone');
    test.acquire(clone);
    test.write(clone, 3 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 7));
    await test.store.flush(clone.id);
    test.store.disks.release(clone.id);
    const layerId = backingOf(test, test.clone(clone, 'second'));
    // Before the second clone this was the clone's own layer.
    const sealed = test.layer(clone).backingId ?? layerId;
    await hash(test, sealed);
    const file = test.store.files.storePath(sealed);
    flip(file, 9 * BLOCK_BYTES);
    expect((await check(test, { data: true })).verdict).toBe('clean');
    flip(file, 3 * BLOCK_BYTES);
    expect((await check(test, { data: true })).findings).toMatchObject([{ kind: 'data-damaged', layerId: sealed, offsetBytes: 0, disks: ['clone', 'second'] }]);
  });

  it('go with their layer', async () => {
    const test = new TestStore();
    const image = test.image('image', patterned(1, 2 * MIB));
    const clone = test.clone(image, 'clone');
    const layerId = backingOf(test, clone);
    await hash(test, layerId);
    test.store.meta.checksums.found(layerId, 0, PIECE_BYTES, [{ offsetBytes: 0, lengthBytes: 1, kind: 'damaged' }]);
    for (const node of [clone, image]) test.store.discardNode((test.store.meta.nodes.orphan(node.id), node.id));
    expect(test.store.meta.layers.byId(layerId)).toBeUndefined();
    expect(test.store.meta.checksums.of(layerId)).toBeUndefined();
    expect(test.store.meta.checksums.hashes(layerId, 0)).toBeUndefined();
    expect(test.store.meta.checksums.damages()).toEqual([]);
  });

  it('are of the blocks that a run of rows says, whatever the rows look like', () => {
    const test = new TestStore();
    const disk = test.unbackedImage('disk', 3 * CHUNK_BYTES);
    const layer = test.layer(disk);
    test.store.meta.ownership.add(layer.id, [{ block: 1, count: 2 }, { block: PAGE_BLOCKS - 1, count: 2 * PAGE_BLOCKS }, { block: 20 * PAGE_BLOCKS, count: 1 }]);
    expect(chunkAt(test.store.meta, layer, 'f', 0, 3 * CHUNK_BYTES)?.owned).toEqual([{ block: 1, count: 2 }, { block: PAGE_BLOCKS - 1, count: 2 * PAGE_BLOCKS }]);
    expect(chunkAt(test.store.meta, layer, 'f', CHUNK_BYTES, 3 * CHUNK_BYTES)?.owned).toEqual([]);
    expect(chunkAt(test.store.meta, layer, 'f', 2 * CHUNK_BYTES, 3 * CHUNK_BYTES)?.owned).toEqual([{ block: 20 * PAGE_BLOCKS, count: 1 }]);
    test.store.meta.ownership.add(layer.id, [{ block: 0, count: 17 * PAGE_BLOCKS }]);
    expect(chunkAt(test.store.meta, layer, 'f', CHUNK_BYTES, 3 * CHUNK_BYTES)?.owned).toEqual([{ block: 8 * PAGE_BLOCKS, count: 8 * PAGE_BLOCKS }]);
  });
});

describe('what the scrub found', () => {
  it('is corruption for every check, until it is found right again', () => {
    const test = new TestStore();
    const clone = test.clone(test.image('image', patterned(1, 2 * MIB)), 'clone');
    const layerId = backingOf(test, clone);
    const { checksums } = test.store.meta;
    checksums.found(layerId, 0, CHUNK_BYTES, [{ offsetBytes: MIB, lengthBytes: MIB, kind: 'unreadable' }]);
    const steps = test.store.checkSteps({});
    let report = steps.next();
    while (report.done !== true) report = steps.next();
    expect(report.value).toMatchObject({ verdict: 'corruption', findings: [{ kind: 'data-unreadable', layerId, offsetBytes: MIB, disks: ['image', 'clone'] }] });
    checksums.found(layerId, 0, CHUNK_BYTES, []);
    expect(checksums.damages()).toEqual([]);
  });
});

describe('what the scrub found in one disk', () => {
  it('is said by a check of the content of another, and not by one that reads it anew', async () => {
    const test = new TestStore();
    const one = test.clone(test.image('one', patterned(1, 2 * MIB)), 'clone-of-one');
    const other = test.clone(test.image('other', patterned(2, 2 * MIB)), 'clone-of-other');
    const layerId = backingOf(test, one);
    await hash(test, layerId);
    test.store.meta.checksums.found(layerId, 0, CHUNK_BYTES, [{ offsetBytes: MIB, lengthBytes: MIB, kind: 'damaged' }]);
    expect(await check(test, { data: true, target: other })).toMatchObject({ verdict: 'corruption', findings: [{ kind: 'data-damaged', layerId, offsetBytes: MIB }] });
    expect(await check(test, { data: true, target: one })).toMatchObject({ verdict: 'clean', findings: [] });
    expect(await check(test, { data: true })).toMatchObject({ verdict: 'clean', findings: [] });
  });
});

describe('a faulted disk', () => {
  /** Two blocks flushed, a third written and lost with the fault. */
  async function faulted(): Promise<{ readonly test: TestStore; readonly clone: NodeRow; readonly before: Buffer }> {
    const test = new TestStore();
    const image = test.image('image', patterned(1, 2 * MIB));
    const clone = test.clone(image, 'clone');
    test.acquire(clone);
    test.write(clone, 0, Buffer.alloc(2 * BLOCK_BYTES, 7));
    await test.store.flush(clone.id);
    const before = test.read(clone, 0, 2 * MIB);
    test.write(clone, 5 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 8));
    // As an fdatasync that failed leaves it.
    const store = test.store as unknown as { readonly fault: (layer: unknown, reason: string) => void; readonly committer: { readonly fault: (layer: unknown, failure: Error) => void } };
    store.committer.fault(test.disk(clone), new Error('EIO: a test'));
    await expect(test.store.flush(clone.id)).rejects.toMatchObject({ kind: 'faulted' });
    expect(test.row(clone).fault).toContain('EIO');
    return { test, clone, before };
  }

  it('is left as it is while somebody has it open, and by a check that does not name it', async () => {
    const { test, clone } = await faulted();
    expect(await check(test, { repair: true })).toMatchObject({ faulted: [{ path: 'clone' }], lifted: [] });
    expect(await check(test, { repair: true, target: clone })).toMatchObject({ faulted: [{ path: 'clone' }], lifted: [], notLifted: [{ path: 'clone' }] });
    expect(test.row(clone).fault).not.toBeNull();
    test.store.disks.release(clone.id);
  });

  it('takes writes again, with the content of its last completed flush, whatever kills the server then', async () => {
    const { test, clone, before } = await faulted();
    test.store.disks.release(clone.id);
    expect(await check(test, { repair: true, target: clone })).toMatchObject({ verdict: 'clean', faulted: [], lifted: [{ path: 'clone', lostBytes: 0 }], notLifted: [] });
    expect(test.row(clone).fault).toBeNull();
    expect(fs.readdirSync(test.runtimeDir).filter((name) => name.startsWith('journal-fault'))).toEqual([]);
    test.expectContent(clone, before);
    // The journals held the write that was lost: the next server must not believe them.
    test.kill();
    test.expectContent(clone, before);
    test.acquire(clone);
    test.write(clone, 9 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 9));
    await test.store.flush(clone.id);
    test.store.disks.release(clone.id);
    expect(test.row(clone).fault).toBeNull();
  });
});

describe('a faulted disk whose data file is damaged', () => {
  it.each([
    ['is missing', (file: string): void => { fs.rmSync(file); }],
    ['ends before what it owns', (file: string): void => { fs.truncateSync(file, BLOCK_BYTES); }],
  ] as const)('stays faulted: the file %s', async (_what, damage) => {
    const test = new TestStore();
    const clone = test.clone(test.image('image', patterned(1, 2 * MIB)), 'clone');
    test.acquire(clone);
    test.write(clone, 0, Buffer.alloc(2 * BLOCK_BYTES, 7));
    await test.store.flush(clone.id);
    test.store.disks.release(clone.id);
    test.store.disks.retireIdle(clone.id);
    test.store.meta.nodes.update(clone.id, { fault: 'a test' });
    damage(test.store.files.storePath(test.layer(clone).id));
    expect(await check(test, { repair: true, target: clone })).toMatchObject({ verdict: 'corruption', lifted: [], notLifted: [{ path: 'clone' }] });
    expect(test.row(clone).fault).toBe('a test');
  });
});

function punch(file: string, offsetBytes: number, lengthBytes: number): number {
  const fd = fs.openSync(file, 'r+');
  // Written zeros read like a hole, and are one to a checksum.
  fs.writeSync(fd, Buffer.alloc(lengthBytes), 0, lengthBytes, offsetBytes);
  return fd;
}
