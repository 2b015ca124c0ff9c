/**
 * Receives and rebases on a store that fills up, at whatever call that is noticed, and on one whose calls fail: what failed says why, leaves nothing
 * behind, and can be done again when there is room.
 */
import fs from 'node:fs';
import fsPromises from 'node:fs/promises';
import path from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { realDoor } from '../../blockstore/hot/door.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { decodeToken } from '../../blockstore/stream-format.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { controlParts, type ControlParts } from '../support/control-parts.js';
import { encodeStream, uuidOf, type StreamSpec } from '../support/power/streams.js';
import { writtenBytes } from '../support/power/window.js';
import { SmallDisk } from '../support/small-disk.js';
import { createCleanup } from '../support/temp.js';

const BLOCK = 4096;
const PAGES_MAX = 400;
/** A store that was full is so until there is twice as much as the 8 MiB that it would keep back. */
const DISK_MIB = 40;
const cleanup = createCleanup();

afterEach(async () => {
  vi.restoreAllMocks();
  await cleanup.run();
});

const content = (blocks: number, seed: number): StreamSpec['nodes'][number]['content'] => ({ sizeBytes: blocks * BLOCK, seed, holes: 5, writes: [] });
const FULL: StreamSpec = { uuid: uuidOf(1), name: 'v1', target: 'r', baseUuid: null, nodes: [
  { path: 'a.img', kind: 'disk', content: content(12, 3), delta: false }, { path: 'empty.img', kind: 'disk', content: { ...content(2, 1), holes: 1 }, delta: false },
] };
const LATER: StreamSpec = { uuid: uuidOf(2), name: 'v2', target: 'r', baseUuid: FULL.uuid, nodes: [
  { ...FULL.nodes[0]!, delta: true, content: { ...content(12, 3), writes: [{ at: BLOCK, length: 2 * BLOCK, seed: 8 }, { at: 5 * BLOCK, length: BLOCK, seed: 0 }, { at: 8 * BLOCK, length: BLOCK, seed: 9 }] } },
  { ...FULL.nodes[1]!, delta: true },
] };

/** Nothing is kept back, and nothing refused because there is little: so that it is the calls themselves that find no room. */
function noticeNothing(test: TestStore): void {
  const fallocate = realDoor.fallocate.bind(realDoor);
  vi.spyOn(realDoor, 'fallocate').mockImplementation((label, ...call) => (label === 'reserve-allocate' ? 0 : fallocate(label, ...call)));
  vi.spyOn(test.store, 'space').mockReturnValue({ isFull: false, reservedBytes: 0 });
}

/** The store has seen it, as it does at its next commit. */
function makeRoom(test: TestStore, disk: SmallDisk): void {
  disk.free();
  test.store.meta.transaction(() => undefined);
}

async function kindOf(body: () => Promise<unknown>): Promise<string | null> {
  try {
    await body();
    return null;
  } catch (thrown) {
    return toOffshootError(thrown).kind;
  }
}

/** As somebody does who has the whole stream: begins, or goes on where what is kept ends. */
async function receive({ receives }: ControlParts, stream: StreamSpec): Promise<void> {
  const kept = (await receives.list()).find(({ uuid }) => uuid === stream.uuid);
  if (kept?.state === 'running') await receives.pause(kept.receiveId);
  const token = kept === undefined ? null : decodeToken((await receives.info(kept.receiveId)).token);
  let first = kept?.records ?? 0;
  const resume = token === null ? null : { records: token.records, check: token.check };
  const { json, records } = encodeStream(stream, resume);
  const { receiveId, records: have } = await receives.begin(stream.target, json);
  for (first = have; first < records.length; first += 1) await receives.add(receiveId, first, records[first]!);
  await receives.finish(receiveId);
}

function expectWhole(test: TestStore, stream: StreamSpec): void {
  for (const { path: name, content: wanted } of stream.nodes) {
    for (const each of [`r/${name}`, `r/.snapshots/${stream.name}/${name}`]) {
      const node = test.store.meta.nodes.byPath(each);
      expect(node, each).toBeDefined();
      test.expectContent(node!, writtenBytes(wanted));
    }
  }
}

function expectClean(test: TestStore): void {
  const { verdict, findings } = checkStore(test.store);
  expect({ verdict, findings }).toEqual({ verdict: 'clean', findings: [] });
}

describe('a receive', { timeout: 120_000 }, () => {
  it('on a store that fills up at any page says so, leaves nothing that is seen, and goes on when there is room', async () => {
    const disk = new SmallDisk(DISK_MIB, cleanup);
    const test = new TestStore({ storeDir: disk.storeDir });
    noticeNothing(test);
    let refused = 0;
    let isRoomy = false;
    for (let pages = 0; pages < PAGES_MAX && !isRoomy; pages += 1) {
      const parts = controlParts(test.store);
      disk.leave(pages);
      const kind = await kindOf(async () => { await receive(parts, FULL); await receive(parts, LATER); });
      if (kind === null) isRoomy = true;
      else {
        refused += 1;
        expect(kind).toBe('no-space');
        const seen = test.store.meta.snapshots.all().map(({ name }) => name);
        expect([[], ['v1']]).toContainEqual(seen);
        expectClean(test);
        makeRoom(test, disk);
        for (const stream of seen.length === 0 ? [FULL, LATER] : [LATER]) await receive(parts, stream);
      }
      makeRoom(test, disk);
      expectWhole(test, LATER);
      expectClean(test);
      await removeAll(test, parts);
      test.store.meta.checkpoint({ idle: true });
    }
    expect(isRoomy, `${refused} refused`).toBe(true);
    expect(refused).toBeGreaterThan(20);
  });

  it('whose calls fail, each in its turn, leaves nothing that is seen, and goes on with what is kept', async () => {
    const test = new TestStore();
    const counting = failCall(-1, 'EIO');
    const first = controlParts(test.store);
    await receive(first, FULL);
    await receive(first, LATER);
    vi.restoreAllMocks();
    await removeAll(test, first);
    let calls = counting.calls();
    for (let failing = 0; failing < calls; failing += 1) {
      for (const code of ['EIO', 'ENOSPC'] as const) {
        const parts = controlParts(test.store);
        const door = failCall(failing, code);
        const kind = await kindOf(async () => { await receive(parts, FULL); await receive(parts, LATER); });
        calls = Math.max(calls, door.calls());
        vi.restoreAllMocks();
        if (kind !== null) {
          expect(kind, `call ${failing}: ${door.failed()}`).toBe(code === 'EIO' ? 'io-error' : 'no-space');
          expect([[], ['v1'], ['v1', 'v2']]).toContainEqual(test.store.meta.snapshots.all().map(({ name }) => name));
          expectClean(test);
        }
        const seen = test.store.meta.snapshots.all().map(({ name }) => name);
        for (const stream of [FULL, LATER]) if (!seen.includes(stream.name)) await receive(parts, stream);
        expectWhole(test, LATER);
        expectClean(test);
        await removeAll(test, parts);
      }
    }
    expect(calls).toBeGreaterThan(60);
  });

  it.each(['is there', 'is not there'])('whose commit is in doubt and %s leaves both to the next server', async (which) => {
    const test = new TestStore();
    const parts = controlParts(test.store);
    await receive(parts, FULL);
    const { json, records } = encodeStream(LATER);
    const { receiveId } = await parts.receives.begin('r', json);
    await parts.receives.add(receiveId, 0, Buffer.concat(records));
    const { meta } = test.store;
    const doubt = new OffshootError('io-error', 'the log could not be synced', { sqliteCode: 'SQLITE_IOERR_FSYNC' });
    const transaction = meta.transaction.bind(meta);
    let isInside = false;
    const spy = vi.spyOn(meta, 'transaction').mockImplementation(<T>(body: () => T): T => {
      if (isInside) return transaction(body);
      isInside = true;
      if (which === 'is there') transaction(body);
      else transaction(() => { body(); throw doubt; });
      throw doubt;
    });
    expect(await kindOf(async () => await parts.receives.finish(receiveId))).toBe('io-error');
    spy.mockRestore();
    test.kill();
    const next = controlParts(test.store);
    expect(test.store.meta.snapshots.all().map(({ name }) => name)).toEqual(which === 'is there' ? ['v1', 'v2'] : ['v1']);
    if (which === 'is not there') await receive(next, LATER);
    expectWhole(test, LATER);
    expectClean(test);
  });
});

describe('a rebase', { timeout: 120_000 }, () => {
  function twoVersions(test: TestStore): { readonly image: NodeRow; readonly fresh: NodeRow; readonly clone: NodeRow; readonly expected: Buffer } {
    const image = test.image('image', patterned(1, 16 * BLOCK));
    const clone = test.clone(image, 'clone');
    const fresh = test.clone(image, 'fresh');
    const expected = patterned(1, 16 * BLOCK);
    for (const [node, at, seed] of [[clone, 2, 7], [fresh, 9, 8]] as const) {
      test.acquire(node);
      test.write(node, at * BLOCK, patterned(seed, BLOCK));
      test.store.disks.release(node.id);
      patterned(seed, BLOCK).copy(expected, at * BLOCK);
    }
    return { image, fresh, clone, expected };
  }

  it('on a store that fills up at any page says so, changes nothing, and is done when there is room', async () => {
    const disk = new SmallDisk(DISK_MIB, cleanup);
    const test = new TestStore({ storeDir: disk.storeDir });
    noticeNothing(test);
    let refused = 0;
    let isRoomy = false;
    for (let pages = 0; pages < PAGES_MAX && !isRoomy; pages += 1) {
      makeRoom(test, disk);
      const { image, fresh, clone, expected } = twoVersions(test);
      const before = test.content(clone);
      disk.leave(pages);
      const kind = await kindOf(async () => await test.store.rebase(clone.id, fresh.id, false));
      if (kind === null) isRoomy = true;
      else {
        refused += 1;
        expect(kind).toBe('no-space');
        makeRoom(test, disk);
        test.expectContent(clone, before);
        expectClean(test);
        expect(await test.store.rebase(clone.id, fresh.id, false)).toMatchObject({ rebased: true });
      }
      makeRoom(test, disk);
      test.expectContent(clone, expected);
      for (const node of [clone, fresh, image]) test.store.discardNode(node.id);
      expectClean(test);
      test.store.meta.checkpoint({ idle: true });
    }
    expect(isRoomy).toBe(true);
    expect(refused).toBeGreaterThan(0);
  });

  it('that cannot read what it has to compare changes nothing', async () => {
    const test = new TestStore();
    const { image, fresh, clone } = twoVersions(test);
    // The clone's block is one that differs between the versions: both are read.
    test.acquire(fresh);
    test.write(fresh, 2 * BLOCK, patterned(9, BLOCK));
    test.store.disks.release(fresh.id);
    const before = test.content(clone);
    test.store.disks.closeAll();
    test.store.files.closeAll();
    const file = test.store.files.storePath(test.layer(image).backingId ?? 0);
    // Reading a directory is an error like that of a bad sector.
    fs.renameSync(file, `${file}.away`);
    fs.mkdirSync(file);
    expect(await kindOf(async () => await test.store.rebase(clone.id, fresh.id, false))).not.toBeNull();
    fs.rmdirSync(file);
    fs.renameSync(`${file}.away`, file);
    test.store.disks.closeAll();
    test.store.files.closeAll();
    test.expectContent(clone, before);
    expectClean(test);
    expect(await test.store.rebase(clone.id, fresh.id, false)).toMatchObject({ rebased: false, conflictsTotal: 1 });
    expect(await test.store.rebase(clone.id, fresh.id, true)).toMatchObject({ rebased: true });
  });
});

/** Takes away what was received. */
async function removeAll(test: TestStore, { receives, snapshots, fileSystem }: ControlParts): Promise<void> {
  for (const { receiveId } of await receives.list()) await receives.abort(receiveId);
  for (const { name } of test.store.meta.snapshots.all()) await snapshots.remove(`r@${name}`, { keepData: true });
  const container = test.store.meta.nodes.child(ROOT_ID, 'r');
  if (container !== undefined) {
    for (const { name } of test.store.meta.nodes.children(container.id, 0, 100)) fileSystem.unlink(container.id, name);
    fileSystem.rmdir(ROOT_ID, 'r');
  }
  expect(fs.readdirSync(path.join(test.storeDir, 'layers'), { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile())).toEqual([]);
}

const SYNC_CALLS = ['openSync', 'ftruncateSync', 'fsyncSync', 'fdatasyncSync', 'writeSync', 'renameSync', 'mkdirSync', 'writeFileSync', 'readFileSync'] as const;
const FILE_CALLS = ['write', 'writeFile', 'appendFile', 'truncate', 'sync'] as const;

/** Of all calls that a receive makes by `node:fs`, in their order, the one with this number fails. */
function failCall(failing: number, code: 'EIO' | 'ENOSPC'): { readonly calls: () => number; readonly failed: () => string } {
  let count = 0;
  let failed = 'none';
  const isFailing = (name: string): boolean => {
    count += 1;
    if (count - 1 !== failing) return false;
    failed = name;
    return true;
  };
  const failure = (name: string): Error => Object.assign(new Error(`${code}: made to fail, ${name}`), { code, errno: code === 'EIO' ? -5 : -28, syscall: name });
  const wrap = (object: object, name: string, isAsync: boolean): void => {
    const target = object as Record<string, (...args: unknown[]) => unknown>;
    const real = target[name]!.bind(object);
    vi.spyOn(target, name).mockImplementation((...args: unknown[]) => {
      if (isFailing(name)) {
        if (isAsync) return Promise.reject(failure(name));
        throw failure(name);
      }
      return real(...args);
    });
  };
  for (const name of SYNC_CALLS) wrap(fs, name, false);
  for (const name of ['mkdir', 'rename', 'rm', 'readFile']) wrap(fsPromises, name, true);
  const open = fsPromises.open.bind(fsPromises);
  vi.spyOn(fsPromises, 'open').mockImplementation(async (...args) => {
    if (isFailing('open')) throw failure('open');
    const handle = await open(...args);
    for (const name of FILE_CALLS) wrap(handle, name, true);
    return handle;
  });
  return { calls: () => count, failed: () => failed };
}
