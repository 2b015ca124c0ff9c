/** The times of a node that is open, and of the same node when it is not: those who compare them (make, rsync, a copy that asks whether its source changed) see no difference. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import type { NodeRow } from '../../blockstore/meta/rows.js';
import type { Attributes } from '../../daemon/filesystem/types.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { fileSystemOver } from '../support/snapshots-fixture.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const BEGIN_MS = Date.UTC(2026, 0, 1);

beforeEach(() => { vi.useFakeTimers({ toFake: ['Date'], now: BEGIN_MS }); });

afterEach(async () => {
  vi.useRealTimers();
  await cleanup.run();
});

const timesOf = ({ mtimeUs, ctimeUs }: Pick<Attributes, 'mtimeUs' | 'ctimeUs'>): number[] => [mtimeUs, ctimeUs];

describe('the times of a disk', () => {
  const seen = (test: TestStore, disk: NodeRow): number[] => timesOf(fileSystemOver(test).getattr(disk.id));
  const later = (): number => {
    vi.setSystemTime(Date.now() + 60_000);
    return Date.now() * 1000;
  };
  const written = (test: TestStore, disk: NodeRow, offsetBytes: number): number => {
    const nowUs = later();
    test.write(disk, offsetBytes, patterned(3, 4096));
    return nowUs;
  };

  it('are of its last write, open, closed, opened again by another server, and after a kill', async () => {
    const test = new TestStore();
    const disk = test.image('disk', patterned(1, 64 * 1024));
    test.acquire(disk);
    const first = written(test, disk, 0);
    expect(seen(test, disk)).toEqual([first, first]);
    await test.restart();
    expect(seen(test, disk)).toEqual([first, first]);
    later();
    test.acquire(disk);
    expect(seen(test, disk)).toEqual([first, first]);

    const base = test.clone(disk, 'clone');
    test.acquire(base);
    const second = written(test, base, 4096);
    await test.store.committer.flush(test.disk(base));
    test.kill();
    expect(seen(test, base)).toEqual([second, second]);
    later();
    test.acquire(base);
    expect(seen(test, base)).toEqual([second, second]);
    // A read moves none of them.
    test.read(base, 0, 4096);
    test.kill();
    expect(seen(test, base)).toEqual([second, second]);
  });

  it.each([
    ['in the past', Date.UTC(1999, 5, 1) * 1000 + 7],
    ['in the year 2200, to the microsecond', Date.UTC(2200, 5, 1) * 1000 + 123_457],
  ])('that were given %s change the time of the change, and stay as they were given', async (_when, mtimeUs) => {
    const test = new TestStore();
    const disk = test.image('disk', patterned(1, 64 * 1024));
    test.acquire(disk);
    written(test, disk, 0);
    const changedUs = later();
    await fileSystemOver(test).setattr(disk.id, { mtimeUs });
    expect(seen(test, disk)).toEqual([mtimeUs, changedUs]);
    await test.restart();
    expect(seen(test, disk)).toEqual([mtimeUs, changedUs]);
    later();
    test.acquire(disk);
    expect(seen(test, disk)).toEqual([mtimeUs, changedUs]);
    const writtenUs = written(test, disk, 0);
    expect(seen(test, disk)).toEqual([writtenUs, writtenUs]);
  });
});
