/**
 * Ways in which acknowledged data was once lost, or a disk or the server was, each as a test of its own.
 *
 * What they have in common: two things that are right by themselves meet at a bad moment (a flush and a clone, growth and a
 * kill, a huge discard and a journal that is finite), or the world refuses something (a lock, no room, a limit of the file
 * system) where only success was thought of.
 */
import fs from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { OffshootError, isOperatingError, toOffshootError, type ErrorKind } from '../../blockstore/errors.js';
import { REQUEST_BYTES_MAX, enterDisk, leaveDisk, type HotContext } from '../../blockstore/hot/context.js';
import { readDisk } from '../../blockstore/hot/data-path.js';
import { IoBuffer } from '../../blockstore/hot/door.js';
import { fillStep, newFillProgress } from '../../blockstore/hot/fill-step.js';
import { JOURNAL_CAPACITY } from '../../blockstore/hot/journal.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { TestStore, at, everyThird, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';

const MIB = 1024 * 1024;
const TIB = 1024 ** 4;
const SIZE_BYTES = 12 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);
/** Layers on which a disk may stand and still be cloned. */
const CHAIN_LAYERS_MAX = 512;
/** What an earlier use left in a buffer. */
const STALE = 0x5e;

const connections: Database.Database[] = [];

afterEach(() => {
  vi.restoreAllMocks();
  for (const connection of connections.splice(0)) connection.close();
});

/** `content` with `data` at `offsetBytes`. */
function overwritten(content: Buffer, offsetBytes: number, data: Buffer): Buffer {
  const copy = Buffer.from(content);
  data.copy(copy, offsetBytes);
  return copy;
}

/** Another program takes the database's write lock, and keeps it until it is told. */
function lockDatabase({ storeDir }: TestStore): { release(): void } {
  const connection = new Database(path.join(storeDir, 'offshoot.db'));
  connections.push(connection);
  connection.exec('BEGIN IMMEDIATE');
  return { release: () => { connection.exec('ROLLBACK'); } };
}

function kindOf(body: () => unknown): ErrorKind | null {
  try {
    body();
  } catch (error) {
    if (error instanceof OffshootError) return error.kind;
    throw error;
  }
  return null;
}

/** What node:fs throws when a system call fails. */
function systemError(code: string, errno: number, syscall: string): NodeJS.ErrnoException {
  return Object.assign(new Error(`${code}: made by the test, ${syscall}`), { code, errno: -errno, syscall });
}

function expectHealthy(fixture: TestStore, ...nodes: readonly NodeRow[]): void {
  expect(fixture.faults).toEqual([]);
  for (const node of nodes) expect(fixture.row(node).fault).toBeNull();
}

describe('a flush', () => {
  it('that waits for a round while its disk is cloned live is neither failed nor faults the disk', async () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const [a, b] = [fixture.clone(base, 'a'), fixture.clone(base, 'b')];
    fixture.acquire(a);
    fixture.acquire(b);
    const data = patternBytes(2, 0, BLOCK_BYTES);
    fixture.write(b, 0, data);
    fixture.write(a, 0, data);
    const { layerId } = fixture.disk(a);
    // The round has begun with the first; the second waits for the next round, and its layer is exchanged meanwhile.
    const flushes = [fixture.store.flush(b.id), fixture.store.flush(a.id)];
    const second = fixture.clone(a, 'a2');
    expect(fixture.disk(a).layerId).not.toBe(layerId);
    await Promise.all(flushes);
    expect(fixture.committedBlocks(layerId)).toEqual([0]);
    expectHealthy(fixture, a, b);
    fixture.write(a, 2 * BLOCK_BYTES, data);
    await fixture.store.flush(a.id);
    fixture.kill();
    fixture.expectContent(a, overwritten(overwritten(SOURCE, 0, data), 2 * BLOCK_BYTES, data));
    fixture.expectContent(second, overwritten(SOURCE, 0, data));
    expectHealthy(fixture, a, b, second);
  });

  it('waits for whoever has locked the database longer than the busy time-out, and faults nothing', async () => {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', SOURCE), 'clone');
    fixture.acquire(clone);
    const data = patternBytes(2, 0, BLOCK_BYTES);
    fixture.write(clone, 0, data);
    const { layerId } = fixture.disk(clone);
    const transaction = vi.spyOn(fixture.store.meta, 'transaction');
    const lock = lockDatabase(fixture);
    // Waiting for the lock holds this thread: the timer runs as soon as the first attempt has been given up.
    setTimeout(() => { lock.release(); }, 100);
    await fixture.store.flush(clone.id);
    expect(transaction.mock.results.map(({ type }) => type)).toEqual(['throw', 'return']);
    expect(transaction.mock.results[0]?.value).toMatchObject({ kind: 'busy' });
    expect(fixture.committedBlocks(layerId)).toEqual([0]);
    expectHealthy(fixture, clone);
    fixture.write(clone, BLOCK_BYTES, data);
    fixture.expectContent(clone, overwritten(overwritten(SOURCE, 0, data), BLOCK_BYTES, data));
  });
});

describe('a file', () => {
  it('that grew, was closed and cloned does not keep the next server from starting after a kill', () => {
    const fixture = new TestStore();
    const file = fixture.emptyImage('file', 0, { kind: 'file' });
    const content = patternBytes(3, 0, BLOCK_BYTES + 904);
    fixture.acquire(file);
    fixture.write(file, 0, content);
    fixture.store.disks.release(file.id);
    const clone = fixture.clone(file, 'clone');
    // The journal knows that the file grew, and its layer is one that nobody has opened yet.
    expect(fixture.store.files.exists(fixture.layer(file).id)).toBe(false);
    expect(fixture.kill().replay.records).toBeGreaterThan(0);
    fixture.expectContent(file, content);
    fixture.expectContent(clone, content);
  });

  for (const kind of ['image', 'clone'] as const) {
    it(`that is longer than its disk (${kind}) is cut when it is opened: what was cut off does not come back`, async () => {
      const fixture = new TestStore();
      const image = fixture.image('image', patterned(4, MIB));
      const node = kind === 'image' ? image : fixture.clone(image, 'clone');
      fixture.acquire(node);
      const content = patternBytes(5, 0, MIB);
      fixture.write(node, 0, content);
      await fixture.store.flush(node.id);
      // The server dies between the metadata and the file.
      const truncate = vi.spyOn(fs, 'ftruncateSync').mockImplementation(() => undefined);
      fixture.store.resize(node.id, BLOCK_BYTES + 10);
      truncate.mockRestore();
      const file = fixture.store.files.storePath(fixture.layer(node).id);
      fixture.kill();
      expect(fixture.row(node).sizeBytes).toBe(BLOCK_BYTES + 10);
      expect(fs.statSync(file).size).toBe(MIB);
      fixture.acquire(node);
      expect(fs.statSync(file).size).toBe(BLOCK_BYTES + 10);
      fixture.store.resize(node.id, MIB);
      const expected = Buffer.alloc(MIB);
      content.copy(expected, 0, 0, BLOCK_BYTES + 10);
      fixture.expectContent(node, expected);
    });
  }
});

describe('a discard', () => {
  it('of 2 TiB does not overrun the journal: what was written and flushed before is there after a restart', async () => {
    const pages = 2 * TIB / (PAGE_BLOCKS * BLOCK_BYTES);
    // Each page is one record, so that the ring goes round.
    expect(pages).toBeGreaterThan(JOURNAL_CAPACITY);
    const fixture = new TestStore();
    const base = fixture.emptyImage('base', 2 * TIB);
    fixture.acquire(base);
    const [old, data] = [patternBytes(6, 0, 2 * BLOCK_BYTES), patternBytes(7, 0, BLOCK_BYTES)];
    fixture.write(base, 0, old);
    fixture.write(base, TIB, old);
    fixture.store.disks.release(base.id);
    const clone = fixture.clone(base, 'clone');
    fixture.acquire(clone);
    fixture.write(clone, BLOCK_BYTES, data);
    const from = PAGE_BLOCKS * BLOCK_BYTES;
    fixture.store.data.discard(clone.id, from, 2 * TIB - from);
    await fixture.store.flush(clone.id);
    await fixture.restart();
    fixture.acquire(clone);
    expect(fixture.read(clone, 0, BLOCK_BYTES).equals(old.subarray(0, BLOCK_BYTES))).toBe(true);
    expect(fixture.read(clone, BLOCK_BYTES, BLOCK_BYTES).equals(data)).toBe(true);
    expect(fixture.read(clone, TIB, BLOCK_BYTES).equals(Buffer.alloc(BLOCK_BYTES))).toBe(true);
    expect(fixture.store.ownedBlocks(fixture.row(clone))).toBe(1 + (pages - 1) * PAGE_BLOCKS);
    expectHealthy(fixture, clone);
  });
});

describe('live clones', () => {
  it('that would make a chain too long to be opened are refused before anything changed', () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    fixture.acquire(base);
    const block = (seed: number): Buffer => patternBytes(seed, 0, BLOCK_BYTES);
    for (let layers = 1; layers < CHAIN_LAYERS_MAX; layers += 1) {
      fixture.write(base, 0, block(layers));
      fixture.clone(base, `clone-${layers}`);
    }
    const last = CHAIN_LAYERS_MAX;
    fixture.write(base, 0, block(last));
    const before = { layer: fixture.layer(base), open: fixture.disk(base) };
    expect(kindOf(() => fixture.clone(base, 'refused'))).toBe('not-supported');
    expect(fixture.store.meta.nodes.child(ROOT_ID, 'refused')).toBeUndefined();
    expect(fixture.layer(base)).toEqual(before.layer);
    expect(fixture.store.meta.layers.unreferenced()).toEqual([]);
    expect(fixture.disk(base)).toBe(before.open);
    fixture.write(base, BLOCK_BYTES, block(last));
    const expected = overwritten(overwritten(SOURCE, 0, block(last)), BLOCK_BYTES, block(last));
    fixture.expectContent(base, expected);
    fixture.kill();
    fixture.expectContent(base, expected);
    const deepest = fixture.store.meta.nodes.child(ROOT_ID, `clone-${last - 1}`);
    if (deepest === undefined) throw new Error('the last clone is gone');
    fixture.expectContent(deepest, overwritten(SOURCE, 0, block(last - 1)));
    // Also for a disk that nobody has open.
    fixture.write(base, 0, block(1));
    expect(kindOf(() => fixture.clone(base, 'refused'))).toBe('not-supported');
    expectHealthy(fixture, base);
  });
});

describe('an idle disk whose commit fails', () => {
  const reasons = [
    new OffshootError('no-space', 'the store is full'),
    new OffshootError('busy', 'another program has locked the database'),
  ];
  for (const reason of reasons) {
    it(`keeps what it acknowledged: ${reason.kind}`, async () => {
      const fixture = new TestStore();
      const clone = fixture.clone(fixture.image('base', SOURCE), 'clone');
      const data = patternBytes(2, 0, BLOCK_BYTES);
      fixture.acquire(clone);
      fixture.write(clone, 0, data);
      fixture.store.disks.release(clone.id);
      // To be cloned, an idle disk is closed first; so it is when it is idle for long.
      const transaction = vi.spyOn(fixture.store.meta, 'transaction').mockImplementationOnce(() => { throw reason; });
      expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe(reason.kind);
      transaction.mockRestore();
      expect(fixture.store.meta.nodes.child(ROOT_ID, 'refused')).toBeUndefined();
      fixture.expectContent(clone, overwritten(SOURCE, 0, data));
      fixture.acquire(clone);
      fixture.write(clone, 100, Buffer.from('x'));
      await fixture.store.flush(clone.id);
      expectHealthy(fixture, clone);
      fixture.kill();
      fixture.expectContent(clone, overwritten(overwritten(SOURCE, 0, data), 100, Buffer.from('x')));
    });
  }
});

describe('a file that grows between the read of its source and the keeping', () => {
  const SMALL = patternBytes(8, 0, 100);
  const GROWN_BYTES = 5 * BLOCK_BYTES;

  /** A clone of 100 bytes that gets one more byte far behind, while `body` reads the source. */
  function growsWhile(copyOnRead: boolean, body: (context: HotContext, clone: NodeRow, fixture: TestStore, buffer: IoBuffer) => void): void {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', SMALL, { kind: 'file' }), 'clone', { copyOnRead });
    fixture.acquire(clone);
    let grown = false;
    const context = fixture.actor(1, at('origin-read', () => ({ kind: 'then', run: () => {
      if (!grown) fixture.write(clone, GROWN_BYTES - 1, Buffer.from('x'));
      grown = true;
    } })));
    const buffer = new IoBuffer(REQUEST_BYTES_MAX);
    buffer.bytes.fill(STALE);
    expect(enterDisk(context, fixture.disk(clone).shared)).toBe(true);
    body(context, clone, fixture, buffer);
    leaveDisk(context, fixture.disk(clone).shared);
    expect(grown).toBe(true);
    const expected = Buffer.alloc(GROWN_BYTES);
    SMALL.copy(expected);
    expected.write('x', GROWN_BYTES - 1);
    fixture.expectContent(clone, expected);
    fixture.kill();
    fixture.expectContent(clone, expected);
  }

  it('keeps nothing that a fill did not read', () => {
    growsWhile(false, (context, clone, fixture, buffer) => {
      const progress = newFillProgress();
      fillStep(context, fixture.disk(clone).shared, buffer, progress);
      expect(progress.failed).toBe(0);
    });
  });

  it('keeps nothing that copy-on-read did not read', () => {
    growsWhile(true, (context, clone, fixture, buffer) => {
      expect(readDisk(context, fixture.disk(clone).shared, 0, BLOCK_BYTES, buffer, 0)).toBe(SMALL.length);
    });
  });
});

describe('what a system call says', () => {
  const kinds = [
    ['EFBIG', 27, 'too-large'], ['ELOOP', 40, 'invalid-argument'], ['EINVAL', 22, 'invalid-argument'], ['EROFS', 30, 'not-permitted'],
    ['EMFILE', 24, 'busy'], ['ENOSPC', 28, 'no-space'], ['EDQUOT', 122, 'no-space'], ['ESTALE', 116, 'io-error'], ['ENOTCONN', 107, 'io-error'],
  ] as const;
  for (const [code, errno, kind] of kinds) {
    it(`is an operating error: ${code}`, () => {
      const error = toOffshootError(systemError(code, errno, 'open'));
      expect(error.kind).toBe(kind);
      expect(isOperatingError(error)).toBe(true);
    });
  }

  it('is a fault of the program where only the program can have caused it', () => {
    for (const error of [systemError('EBADF', 9, 'close'), systemError('EFAULT', 14, 'read'), new TypeError('x'), Object.assign(new TypeError('x'), { code: 'ERR_INVALID_ARG_TYPE' })]) {
      expect(isOperatingError(toOffshootError(error))).toBe(false);
    }
  });

  it('of a path that loops is an operating error', () => {
    const { runtimeDir } = new TestStore();
    const loop = path.join(runtimeDir, 'loop');
    fs.symlinkSync(loop, loop);
    let thrown: unknown;
    try {
      fs.openSync(loop, 'r');
    } catch (error) {
      thrown = error;
    }
    expect(toOffshootError(thrown).kind).toBe('invalid-argument');
  });

  for (const [code, errno, kind] of [['ENOSPC', 28, 'no-space'], ['EROFS', 30, 'not-permitted'], ['EIO', 5, 'io-error']] as const) {
    it(`about a new layer's file reaches its caller as one, and undoes the rest: ${code}`, () => {
      const { store } = new TestStore();
      const layers = store.meta.layers.unreferenced().length;
      vi.spyOn(fs, 'openSync').mockImplementationOnce(() => { throw systemError(code, errno, 'open'); });
      expect(kindOf(() => store.meta.transaction(() => store.createEmptyLayer()))).toBe(kind);
      expect(store.meta.layers.unreferenced().length).toBe(layers);
      store.meta.transaction(() => store.createEmptyLayer());
      expect(store.meta.layers.unreferenced().length).toBe(layers + 1);
    });
  }

  it('about a size that no file can have leaves the disk as it was', () => {
    const fixture = new TestStore();
    const image = fixture.image('image', SOURCE);
    vi.spyOn(fs, 'ftruncateSync').mockImplementationOnce(() => { throw systemError('EFBIG', 27, 'ftruncate'); });
    expect(kindOf(() => { fixture.store.resize(image.id, 17 * TIB); })).toBe('too-large');
    expect(fixture.row(image).sizeBytes).toBe(SIZE_BYTES);
    fixture.expectContent(image, SOURCE);
    expectHealthy(fixture, image);
  });
});
