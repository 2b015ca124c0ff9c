/**
 * The committer: freeze, sync, commit the frozen set, and what a failure at each of these does. fdatasync is held here, so that
 * a test says what happens meanwhile.
 */
import fs from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { TestStore} from '../support/blockstore-fixture.js';
import { kindOf, kindOfRejection } from '../support/blockstore-fixture.js';
import { BLOCK, SIZE_BYTES, SOURCE, committed, failSyncsOnce, holdSyncs, ioError, openClones, type Setting } from '../support/sync-fixture.js';

afterEach(() => { vi.restoreAllMocks(); });

/** Everything that was appended may be overwritten again. */
function expectEmptyJournals({ store }: TestStore): void {
  const { shared } = store.context;
  for (const thread of [0, 1, 2, 3]) expect(shared.journalHead(thread)).toBe(shared.journalTail(thread));
}

describe('a flush', () => {
  it('commits what was touched before it, and not what is touched while it syncs', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    const held = holdSyncs();
    const first = fixture.store.flush(clone.id);
    fixture.write(clone, BLOCK_BYTES, BLOCK);
    // Also when somebody looks at the journals in between.
    fixture.store.committer.drain();
    expect(committed(fixture, clone)).toEqual([]);
    await held.shift()!.answer();
    await first;
    expect(committed(fixture, clone)).toEqual([0]);
    const second = fixture.store.flush(clone.id);
    await held.shift()!.answer();
    await second;
    expect(committed(fixture, clone)).toEqual([0, 1]);
    expect(held).toEqual([]);
  });

  it('syncs each disk before the transaction, which is one for all that wait', async () => {
    const { fixture, clone, other } = openClones();
    for (const node of [clone, other]) fixture.write(node, 0, BLOCK);
    const held = holdSyncs();
    const transaction = vi.spyOn(fixture.store.meta, 'transaction');
    // The first takes the round to itself; the other two share the next.
    const ahead = fixture.store.flush(clone.id);
    fixture.write(clone, BLOCK_BYTES, BLOCK);
    const flushes = [fixture.store.flush(clone.id), fixture.store.flush(other.id)];
    await held.shift()!.answer();
    await ahead;
    expect(transaction).toHaveBeenCalledTimes(1);
    expect(held.map(({ fd }) => fd)).toEqual([fixture.disk(clone).syncFd, fixture.disk(other).syncFd]);
    await held[0]!.answer();
    expect(transaction).toHaveBeenCalledTimes(1);
    await held[1]!.answer();
    await Promise.all(flushes);
    expect(transaction).toHaveBeenCalledTimes(2);
    expect(committed(fixture, clone)).toEqual([0, 1]);
    expect(committed(fixture, other)).toEqual([0]);
  });

  it('of a disk with nothing newly owned is one sync and no transaction', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    fixture.write(clone, 100, Buffer.from('again'));
    const sync = vi.spyOn(fs, 'fdatasync');
    const transaction = vi.spyOn(fixture.store.meta, 'transaction');
    await fixture.store.flush(clone.id);
    expect(sync).toHaveBeenCalledTimes(1);
    expect(sync.mock.calls[0]![0]).toBe(fixture.disk(clone).syncFd);
    expect(transaction).not.toHaveBeenCalled();
  });

  it('does not commit the other disks, whose data nobody has synced', async () => {
    const { fixture, clone, other } = openClones();
    for (const node of [clone, other]) fixture.write(node, 0, BLOCK);
    await fixture.store.flush(clone.id);
    expect(committed(fixture, clone)).toEqual([0]);
    expect(committed(fixture, other)).toEqual([]);
  });

  it('that is asked for in the moment in which the last one is answered is not forgotten', async () => {
    const { fixture, clone } = openClones();
    const { committer } = fixture.store;
    const disk = fixture.disk(clone);
    const write = (block: number): void => { fixture.write(clone, block * BLOCK_BYTES, BLOCK); };
    write(0);
    // Not through `await` and functions of the test, which would give the committer more turns.
    let chain = committer.flush(disk);
    for (const block of [1, 2, 3]) chain = chain.then(() => { write(block); return committer.flush(disk); });
    await Promise.race([chain, new Promise((_resolve, reject) => { setTimeout(() => { reject(new Error('a flush was forgotten')); }, 2000).unref(); })]);
    expect(committed(fixture, clone)).toEqual([0, 1, 2, 3]);
  });
});

describe('a commit of everything', () => {
  it('gives the journals\' room back', async () => {
    const { fixture, clone, other } = openClones();
    for (const node of [clone, other]) fixture.write(node, 0, BLOCK);
    await fixture.store.committer.commitAll();
    expectEmptyJournals(fixture);
    expect(fixture.kill().replay.records).toBe(0);
    expect(committed(fixture, clone)).toEqual([0]);
    expect(committed(fixture, other)).toEqual([0]);
  });

  it('does not give back the room of what came during its sync', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    const held = holdSyncs();
    const all = fixture.store.committer.commitAll();
    fixture.write(clone, BLOCK_BYTES, BLOCK);
    await held.shift()!.answer();
    await all;
    expect(committed(fixture, clone)).toEqual([0]);
    expect(fixture.kill().replay.records).toBe(1);
    expect(committed(fixture, clone)).toEqual([0, 1]);
  });

  it('gives back the room of what others committed during its sync', async () => {
    const { fixture, clone, other } = openClones();
    fixture.write(clone, 0, BLOCK);
    const held = holdSyncs();
    const all = fixture.store.committer.commitAll();
    fixture.write(other, 0, BLOCK);
    fixture.clone(other, 'of other');
    await held.shift()!.answer();
    await all;
    await fixture.store.committer.commitAll();
    expectEmptyJournals(fixture);
  });

  it('at once, during the sync of another, commits that one\'s set as well', async () => {
    const { fixture, clone, other } = openClones();
    fixture.write(clone, 0, BLOCK);
    const held = holdSyncs();
    const flush = fixture.store.flush(clone.id);
    fixture.write(other, 0, BLOCK);
    fixture.write(clone, BLOCK_BYTES, BLOCK);
    fixture.store.committer.commitAllNow();
    expect(committed(fixture, clone)).toEqual([0, 1]);
    expect(committed(fixture, other)).toEqual([0]);
    expectEmptyJournals(fixture);
    await held.shift()!.answer();
    await flush;
    expect(committed(fixture, clone)).toEqual([0, 1]);
  });

  it('at once, during the sync of another, keeps the room that it gave back', async () => {
    const { fixture, clone, other } = openClones();
    fixture.write(clone, 0, BLOCK);
    const held = holdSyncs();
    const all = fixture.store.committer.commitAll();
    fixture.write(other, 0, BLOCK);
    fixture.store.committer.commitAllNow();
    expectEmptyJournals(fixture);
    await held.shift()!.answer();
    await all;
    // What lies behind these heads may be overwritten by now, and a replay that begins there would find nothing.
    expectEmptyJournals(fixture);
    fixture.write(other, BLOCK_BYTES, BLOCK);
    expect(fixture.kill().replay.records).toBe(1);
    expect(committed(fixture, other)).toEqual([0, 1]);
  });

  it('needs no sync when nothing happened', async () => {
    const { fixture } = openClones();
    const sync = vi.spyOn(fs, 'fdatasync');
    await fixture.store.committer.commitAll();
    expect(sync).not.toHaveBeenCalled();
  });
});

describe('a clone during a flush', () => {
  it('takes what the flush has in flight, which still ends well', async () => {
    const { fixture, clone } = openClones();
    const { layerId } = fixture.disk(clone);
    fixture.write(clone, 0, BLOCK);
    const held = holdSyncs();
    const flush = fixture.store.flush(clone.id);
    fixture.write(clone, BLOCK_BYTES, BLOCK);
    fixture.clone(clone, 'second');
    expect(fixture.committedBlocks(layerId)).toEqual([0, 1]);
    fixture.write(clone, 2 * BLOCK_BYTES, BLOCK);
    // The file was exchanged, but the number that this sync was given must not be another file's yet.
    const sync = held.shift()!;
    expect(fs.readlinkSync(`/proc/self/fd/${sync.fd}`)).toBe(fixture.store.files.storePath(layerId));
    await sync.answer();
    expect(() => fs.fstatSync(sync.fd)).toThrow('EBADF');
    await flush;
    expect(fixture.faults).toEqual([]);
    expect(fixture.committedBlocks(layerId)).toEqual([0, 1]);
    expect(committed(fixture, clone)).toEqual([]);
  });
});

describe('a sync that fails', () => {
  async function faulted(): Promise<Setting> {
    const setting = openClones();
    setting.fixture.write(setting.clone, 0, BLOCK);
    setting.fixture.write(setting.other, 0, BLOCK);
    failSyncsOnce();
    expect(await kindOfRejection(setting.fixture.store.flush(setting.clone.id))).toBe('faulted');
    return setting;
  }

  async function expectFaulted(fixture: TestStore, node: NodeRow): Promise<void> {
    expect(fixture.row(node).fault).toContain('EIO');
    expect(kindOf(() => { fixture.write(node, 0, BLOCK); })).toBe('io-error');
    expect(kindOf(() => { fixture.write(node, 2 * BLOCK_BYTES, BLOCK); })).toBe('io-error');
    expect(kindOf(() => { fixture.store.data.discard(node.id, 0, SIZE_BYTES); })).toBe('io-error');
    const sync = vi.spyOn(fs, 'fdatasync').mockClear();
    expect(await kindOfRejection(fixture.store.flush(node.id))).toBe('faulted');
    // A failed sync is never tried again: the kernel would call it a success.
    expect(sync).not.toHaveBeenCalled();
    sync.mockRestore();
  }

  it('faults the disk: reads go on, writes, discards and flushes do not', async () => {
    const { fixture, clone } = await faulted();
    expect(fixture.faults.map(({ nodeId }) => nodeId)).toEqual([clone.id]);
    await expectFaulted(fixture, clone);
    expect(fixture.read(clone, 0, BLOCK_BYTES).equals(BLOCK)).toBe(true);
    expect(fixture.read(clone, BLOCK_BYTES, SIZE_BYTES).equals(SOURCE.subarray(BLOCK_BYTES))).toBe(true);
    expect(committed(fixture, clone)).toEqual([]);
  });

  it('concerns no other disk', async () => {
    const { fixture, other } = await faulted();
    fixture.write(other, BLOCK_BYTES, BLOCK);
    await fixture.store.flush(other.id);
    expect(committed(fixture, other)).toEqual([0, 1]);
    expect(fixture.row(other).fault).toBeNull();
  });

  it('is remembered when the disk is closed and opened, by this server and the next ones', async () => {
    const { fixture, clone } = await faulted();
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    fixture.acquire(clone);
    await expectFaulted(fixture, clone);
    fixture.kill();
    fixture.acquire(clone);
    await expectFaulted(fixture, clone);
    await fixture.restart();
    fixture.acquire(clone);
    await expectFaulted(fixture, clone);
    expect(committed(fixture, clone)).toEqual([]);
  });

  it('keeps the disk from being cloned and resized, which would spread the damage', async () => {
    const { fixture, clone } = await faulted();
    const layers = fixture.store.meta.layers.count();
    for (let opened = 0; opened < 2; opened += 1) {
      expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
      expect(kindOf(() => { fixture.store.resize(clone.id, BLOCK_BYTES); })).toBe('faulted');
      expect(kindOf(() => { fixture.store.resize(clone.id, 2 * SIZE_BYTES); })).toBe('faulted');
      fixture.store.disks.release(clone.id);
      fixture.store.disks.retireIdle(clone.id);
      expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
      fixture.acquire(clone);
    }
    expect(fixture.store.meta.layers.count()).toBe(layers);
  });

  it('also counts when nothing is newly owned', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    fixture.write(clone, 0, BLOCK);
    failSyncsOnce();
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
    await expectFaulted(fixture, clone);
    // What was committed before stays.
    expect(committed(fixture, clone)).toEqual([0]);
  });

  it('also counts when the clock asked for it, and the commit goes on with the other disks', async () => {
    const { fixture, clone, other } = openClones();
    for (const node of [clone, other]) fixture.write(node, 0, BLOCK);
    failSyncsOnce();
    await fixture.store.committer.commitAll();
    await expectFaulted(fixture, clone);
    expect(committed(fixture, other)).toEqual([0]);
    expectEmptyJournals(fixture);
  });

  it('also counts for an operation behind the gate, which is not done then', () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    vi.spyOn(fs, 'fdatasyncSync').mockImplementationOnce(() => { throw ioError(); });
    expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
    expect(fixture.faults.length).toBe(1);
    expect(committed(fixture, clone)).toEqual([]);
  });

  it('fails every flush that waited for it, and lets those of other disks succeed', async () => {
    const { fixture, clone, other } = openClones();
    for (const node of [clone, other]) fixture.write(node, 0, BLOCK);
    const held = holdSyncs();
    const ahead = fixture.store.flush(other.id);
    const flushes = [clone, clone, other].map((node) => kindOfRejection(fixture.store.flush(node.id)));
    fixture.write(other, BLOCK_BYTES, BLOCK);
    await held.shift()!.answer();
    await ahead;
    for (const sync of held.splice(0)) await sync.answer(sync.fd === fixture.disk(clone).syncFd ? ioError() : undefined);
    expect(await Promise.all(flushes)).toEqual(['faulted', 'faulted', undefined]);
  });
});

describe('a transaction that fails', () => {
  function failOnce(fixture: TestStore, error: Error): void {
    vi.spyOn(fixture.store.meta, 'transaction').mockImplementationOnce(() => { throw error; });
  }

  it('for want of room fails the flush, and the next one makes up for it', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    failOnce(fixture, new OffshootError('no-space', 'the store is full'));
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('no-space');
    fixture.write(clone, BLOCK_BYTES, BLOCK);
    expect(committed(fixture, clone)).toEqual([]);
    await fixture.store.flush(clone.id);
    expect(committed(fixture, clone)).toEqual([0, 1]);
    expect(fixture.faults).toEqual([]);
  });

  it('for want of room keeps the journals', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    failOnce(fixture, new OffshootError('no-space', 'the store is full'));
    expect(await kindOfRejection(fixture.store.committer.commitAll())).toBe('no-space');
    expect(fixture.kill().replay.records).toBe(1);
    expect(committed(fixture, clone)).toEqual([0]);
  });

  it('because the database is damaged faults the disks concerned', async () => {
    const { fixture, clone, other } = openClones();
    fixture.write(clone, 0, BLOCK);
    failOnce(fixture, new OffshootError('io-error', 'the disk is on fire'));
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
    expect(fixture.faults).toEqual([{ nodeId: clone.id, reason: 'the disk is on fire' }]);
    fixture.write(other, 0, BLOCK);
  });
});

describe('the time of the last write', () => {
  it('is committed with the blocks', async () => {
    const { fixture, clone } = openClones();
    const before = Date.now() * 1000;
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    expect(fixture.row(clone).mtimeUs).toBeGreaterThanOrEqual(before);
  });
});
