/**
 * Failures of the operating system that a program must not answer by trying again: who hears of a failed sync, and what
 * the operations leave whose single calls fail. The matrix in test/faults looks at all call sites; here each is told by itself.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { Store } from '../../blockstore/store.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, kindOf, kindOfRejection, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';
import { BLOCK, SIZE_BYTES, committed, holdSyncs, ioError, openClones } from '../support/sync-fixture.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';

afterEach(() => { vi.restoreAllMocks(); });

describe('an error of a sync is told once', () => {
  it('and heard by everybody who waits: syncs of one file run one after another, and after a failure none', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    const held = holdSyncs();
    const flushes = [1, 2, 3].map(() => kindOfRejection(fixture.store.flush(clone.id)));
    expect(held.length).toBe(1);
    await held.shift()!.answer(ioError());
    expect(held).toEqual([]);
    expect(await Promise.all(flushes)).toEqual(['faulted', 'faulted', 'faulted']);
  });

  it('so that whoever comes while one runs shares the next, which covers what was written since', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    const held = holdSyncs();
    const ended: string[] = [];
    const flush = (name: string): Promise<unknown> => fixture.store.flush(clone.id).then(() => ended.push(name));
    const flushes = [flush('first'), flush('second'), flush('third')];
    await held.shift()!.answer();
    expect(ended).toEqual(['first']);
    expect(held.length).toBe(1);
    await held.shift()!.answer();
    await Promise.all(flushes);
    expect(ended).toEqual(['first', 'second', 'third']);
    expect(held).toEqual([]);
  });

  it('to each descriptor: what the main thread syncs at once is another one than what waits in the pool', () => {
    const { fixture, clone } = openClones();
    const { fd, syncFd } = fixture.disk(clone);
    expect(fs.readlinkSync(`/proc/self/fd/${fd}`)).toBe(fs.readlinkSync(`/proc/self/fd/${syncFd}`));
    // Two descriptors of one open file would share their offset.
    fs.readSync(syncFd, Buffer.alloc(100), 0, 100, null);
    const offset = (one: number): string => /pos:\s*(\d+)/u.exec(fs.readFileSync(`/proc/self/fdinfo/${one}`, 'utf8'))?.[1] ?? '';
    expect([offset(fd), offset(syncFd)]).toEqual(['0', '100']);
  });

  it('also when the disk was cloned meanwhile: the flush fails and the disk is faulted', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    const held = holdSyncs();
    const flush = kindOfRejection(fixture.store.flush(clone.id));
    fixture.clone(clone, 'second');
    await held.shift()!.answer(ioError());
    expect(await flush).toBe('faulted');
    expect(fixture.row(clone).fault).toContain('EIO');
    expect(kindOf(() => { fixture.write(clone, 0, BLOCK); })).toBe('io-error');
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
  });

  it('and is EIO, whatever it was: a guest that is told of a full store tries again', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    vi.spyOn(fs, 'fdatasync').mockImplementationOnce((_fd, callback) => { callback(Object.assign(ioError('ENOSPC'), { errno: -28 })); });
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
  });

  it('also for a disk that is not open, which is faulted by it', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    vi.spyOn(fs, 'fdatasyncSync').mockImplementationOnce(() => { throw ioError(); });
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
    expect(fixture.row(clone).fault).toContain('EIO');
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
    expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
  });

  it('also for the source of a clone that is not open: the clone is not made, then or later', () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    vi.spyOn(fs, 'fdatasyncSync').mockImplementationOnce(() => { throw ioError(); });
    expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
    expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
  });

  it('also while a disk grows', () => {
    const { fixture, clone } = openClones();
    const sync = vi.spyOn(fs, 'fdatasyncSync');
    // The first makes what is pending durable, the second the new size.
    sync.mockImplementationOnce(() => undefined).mockImplementationOnce(() => { throw ioError(); });
    expect(kindOf(() => { fixture.store.resize(clone.id, 2 * SIZE_BYTES); })).toBe('faulted');
    expect(fixture.row(clone).fault).toContain('EIO');
  });

  it('also while a journal is replayed: the next start does not believe the file either', () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    vi.spyOn(fs, 'fdatasyncSync').mockImplementationOnce(() => { throw ioError(); });
    fixture.kill();
    expect(fixture.row(clone).fault).toContain('EIO');
    fixture.kill();
    expect(fixture.row(clone).fault).toContain('EIO');
    expect(committed(fixture, clone)).toEqual([]);
  });

  it('also while files are written out before the replay: the replay\'s own sync would succeed', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    const { open } = fs.promises;
    vi.spyOn(fs.promises, 'open').mockImplementation(async (...args) => {
      const file = await open(...args);
      vi.spyOn(file, 'datasync').mockRejectedValue(ioError());
      return file;
    });
    await Store.prepareRecovery(fixture.storeDir, fixture.runtimeDir);
    fixture.kill();
    expect(fixture.row(clone).fault).toContain('EIO');
    expect(committed(fixture, clone)).toEqual([]);
  });
});

describe('a fault that could not be written down yet', () => {
  it('holds for a disk that is closed and opened again by the same server', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    vi.spyOn(fs, 'fdatasync').mockImplementationOnce((_fd, callback) => { callback(ioError()); });
    const { nodes } = fixture.store.meta;
    const update = nodes.update.bind(nodes);
    vi.spyOn(nodes, 'update').mockImplementation((id, changes) => {
      if (changes.fault !== undefined) throw new OffshootError('no-space', 'the store is full');
      update(id, changes);
    });
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
    expect(fixture.row(clone).fault).toBeNull();
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    expect(kindOf(() => fixture.clone(clone, 'refused'))).toBe('faulted');
    fixture.acquire(clone);
    expect(kindOf(() => { fixture.write(clone, 0, BLOCK); })).toBe('io-error');
    expect(await kindOfRejection(fixture.store.flush(clone.id))).toBe('faulted');
  });
});

describe('a shrink whose file cannot be cut', () => {
  const SMALL_BYTES = 4 * BLOCK_BYTES;

  it('is not done: the guest keeps what it wrote behind the new end, also after a restart', async () => {
    const { fixture, clone } = openClones();
    const data = patternBytes(9, 0, 8 * BLOCK_BYTES);
    fixture.write(clone, 0, data);
    await fixture.store.flush(clone.id);
    const limitBefore = fixture.layer(clone).backingLimitBytes;
    vi.spyOn(fs, 'ftruncateSync').mockImplementationOnce(() => { throw ioError(); });
    expect(kindOf(() => { fixture.store.resize(clone.id, SMALL_BYTES); })).toBe('io-error');
    expect(fixture.disk(clone).shared.sizeBytes()).toBe(SIZE_BYTES);
    fixture.write(clone, 6 * BLOCK_BYTES, BLOCK);
    await fixture.store.flush(clone.id);
    fixture.kill();
    expect(fixture.row(clone).sizeBytes).toBe(SIZE_BYTES);
    expect(fixture.layer(clone).backingLimitBytes).toBe(limitBefore);
    fixture.acquire(clone);
    expect(fixture.read(clone, 6 * BLOCK_BYTES, BLOCK_BYTES).equals(BLOCK)).toBe(true);
    expect(fixture.read(clone, 7 * BLOCK_BYTES, BLOCK_BYTES).equals(data.subarray(7 * BLOCK_BYTES))).toBe(true);
  });

  it('is done when the file was cut in spite of the error', () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    const real = fs.ftruncateSync;
    vi.spyOn(fs, 'ftruncateSync').mockImplementationOnce((fd, length) => {
      real(fd, length);
      throw ioError();
    });
    fixture.store.resize(clone.id, SMALL_BYTES);
    expect(fixture.disk(clone).shared.sizeBytes()).toBe(SMALL_BYTES);
    expect(fixture.row(clone).sizeBytes).toBe(SMALL_BYTES);
  });

  it('ends the server when the metadata cannot be brought back either', () => {
    const { fixture, clone } = openClones();
    const { meta } = fixture.store;
    const transaction = meta.transaction.bind(meta);
    vi.spyOn(fs, 'ftruncateSync').mockImplementationOnce(() => {
      vi.spyOn(meta, 'transaction').mockImplementationOnce(() => { throw new OffshootError('no-space', 'the store is full'); }).mockImplementation(transaction);
      throw ioError();
    });
    expect(kindOf(() => { fixture.store.resize(clone.id, SMALL_BYTES); })).toBe('internal');
  });
});

describe('a change of shape whose commit is in doubt', () => {
  /** As SQLite says it when the flush of its log fails. */
  function doubt(fixture: TestStore): void {
    const { meta } = fixture.store;
    const real = meta.transaction.bind(meta);
    vi.spyOn(meta, 'transaction').mockImplementationOnce((body) => {
      real(body);
      throw new OffshootError('io-error', 'the log could not be flushed', { sqliteCode: 'SQLITE_IOERR_FSYNC' });
    });
  }

  async function expectFaulted(fixture: TestStore, node: NodeRow): Promise<void> {
    expect(kindOf(() => { fixture.write(node, 0, BLOCK); })).toBe('io-error');
    expect(await kindOfRejection(fixture.store.flush(node.id))).toBe('faulted');
    fixture.kill();
    expect(fixture.row(node).fault).toContain('the log could not be flushed');
  }

  it('faults the source of a clone: a write would land in a layer that the next server knows as sealed', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    doubt(fixture);
    expect(kindOf(() => fixture.clone(clone, 'perhaps'))).toBe('io-error');
    await expectFaulted(fixture, clone);
  });

  it('faults it also when it is not open', async () => {
    const { fixture, clone } = openClones();
    fixture.write(clone, 0, BLOCK);
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    doubt(fixture);
    expect(kindOf(() => fixture.clone(clone, 'perhaps'))).toBe('io-error');
    fixture.acquire(clone);
    await expectFaulted(fixture, clone);
  });

  it('faults a disk that is cut: a write behind the new end would be acknowledged and gone', async () => {
    const { fixture, clone } = openClones();
    doubt(fixture);
    expect(kindOf(() => { fixture.store.resize(clone.id, 4 * BLOCK_BYTES); })).toBe('io-error');
    await expectFaulted(fixture, clone);
  });
});

describe('a removal whose file cannot be deleted', () => {
  it('is done all the same, and leaves a file that nothing refers to', () => {
    const { fixture, clone } = openClones();
    const { layerId } = fixture.disk(clone);
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    const file = fixture.store.files.storePath(layerId);
    vi.spyOn(fs, 'rmSync').mockImplementationOnce(() => { throw ioError(); });
    fixture.store.meta.nodes.orphan(clone.id);
    fixture.store.discardNode(clone.id);
    expect(fixture.store.meta.nodes.byId(clone.id)).toBeUndefined();
    expect(fixture.store.meta.layers.byId(layerId)).toBeUndefined();
    expect(fs.existsSync(file)).toBe(true);
  });
});

describe('a file system that does not say what is free', () => {
  it('fails no transaction and no clock by that alone', async () => {
    const { fixture, clone } = openClones();
    vi.spyOn(fs, 'statfsSync').mockImplementation(() => { throw ioError(); });
    fixture.write(clone, 0, BLOCK);
    await fixture.store.flush(clone.id);
    expect(fixture.faults).toEqual([]);
    expect(committed(fixture, clone)).toEqual([0]);
  });
});

describe('the log of a process that was killed', () => {
  const cleanup = createCleanup();
  afterEach(() => cleanup.run());

  it('is in the database file before anything else is done: what recovery read may be in the page cache only', () => {
    const fixture = new TestStore();
    fixture.image('image', patterned(1, BLOCK_BYTES));
    fixture.kill();
    // The database file alone, as if its log were lost.
    const copy = path.join(makeTmpfsDir('log', cleanup), 'offshoot.db');
    fs.copyFileSync(path.join(fixture.storeDir, 'offshoot.db'), copy);
    const meta = MetaStore.open(copy);
    expect(meta.nodes.byPath('image')?.kind).toBe('disk');
    meta.close();
  });
});
