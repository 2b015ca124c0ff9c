/**
 * The order law of first touches: data in full, then the journal, then the block map, then the reply. Whatever fails on the
 * way leaves the block un-owned and the journal without a record; a short write goes on where it stopped.
 */
import { afterEach, describe, expect, it, vi } from 'vitest';

import { Errno, OffshootError } from '../../blockstore/errors.js';
import { REQUEST_BYTES_MAX, enterDisk, leaveDisk } from '../../blockstore/hot/context.js';
import { IoBuffer, realDoor } from '../../blockstore/hot/door.js';
import { faultDoor, type DoorCall } from '../support/fault-door.js';
import { fillStep, newFillProgress, type FillProgress } from '../../blockstore/hot/fill-step.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { TestStore, at, everyThird, labelsOf, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';

const SIZE_BYTES = 12 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);

afterEach(() => { vi.restoreAllMocks(); });

interface Setting {
  readonly fixture: TestStore;
  readonly clone: NodeRow;
}

function openClone(options: { readonly copyOnRead?: boolean; readonly kind?: 'disk' | 'file' } = {}): Setting {
  const fixture = new TestStore();
  const base = fixture.image('base', SOURCE, { kind: options.kind ?? 'disk' });
  const clone = fixture.clone(base, 'clone', options);
  fixture.acquire(clone);
  return { fixture, clone };
}

function journalTail(fixture: TestStore): number {
  return fixture.store.context.shared.journalTail(0);
}

/** Everything that the law is about, in the order in which it happened. */
function eventsOf({ fixture, clone }: Setting, body: () => void): string[] {
  const events: string[] = [];
  const { journal } = fixture.store.context;
  const { shared } = fixture.disk(clone);
  const append = journal.append.bind(journal);
  const publish = shared.publish.bind(shared);
  vi.spyOn(journal, 'append').mockImplementation((...given) => {
    events.push('journal');
    append(...given);
  });
  vi.spyOn(shared, 'publish').mockImplementation((...given) => {
    events.push('map');
    return publish(...given);
  });
  fixture.decide = ({ label }) => {
    events.push(label);
    return { kind: 'then', run: () => events.push(`${label} done`) };
  };
  body();
  fixture.decide = undefined;
  events.push('reply');
  return events;
}

function step({ fixture, clone }: Setting, progress: FillProgress): boolean {
  const { context } = fixture.store;
  const { shared } = fixture.disk(clone);
  expect(enterDisk(context, shared)).toBe(true);
  const atEnd = fillStep(context, shared, new IoBuffer(REQUEST_BYTES_MAX), progress);
  leaveDisk(context, shared);
  return atEnd;
}

function errnoOfError(body: () => unknown): unknown {
  try {
    body();
  } catch (error) {
    if (error instanceof OffshootError) return error.context['errno'];
    throw error;
  }
  return 0;
}

describe('data, journal, map, reply', () => {
  it('holds for a write of whole blocks', () => {
    const setting = openClone();
    const events = eventsOf(setting, () => { setting.fixture.write(setting.clone, 0, patternBytes(2, 0, 2 * BLOCK_BYTES)); });
    expect(events).toEqual(['first-touch-write', 'first-touch-write done', 'journal', 'map', 'reply']);
  });

  it('holds for a write of parts of blocks, whose rest is read before', () => {
    const setting = openClone();
    const events = eventsOf(setting, () => { setting.fixture.write(setting.clone, 100, patternBytes(2, 0, BLOCK_BYTES)); });
    const read = ['origin-read', 'origin-read done'];
    expect(events).toEqual([...read, ...read, 'first-touch-write', 'first-touch-write done', 'journal', 'map', 'reply']);
  });

  it('holds for a discard', () => {
    const setting = openClone();
    const events = eventsOf(setting, () => { setting.fixture.store.data.discard(setting.clone.id, BLOCK_BYTES, BLOCK_BYTES); });
    expect(events).toEqual(['punch', 'punch done', 'journal', 'map', 'reply']);
  });

  it('holds for copy-on-read', () => {
    const setting = openClone({ copyOnRead: true });
    const events = eventsOf(setting, () => { setting.fixture.read(setting.clone, 0, BLOCK_BYTES); });
    expect(events).toEqual(['origin-read', 'origin-read done', 'keep-write', 'keep-write done', 'journal', 'map', 'reply']);
  });

  it('holds for a fill, for data and for holes', () => {
    const setting = openClone();
    const progress = newFillProgress();
    const events = eventsOf(setting, () => {
      for (let i = 0; i < 3; i += 1) expect(step(setting, progress)).toBe(false);
    }).filter((event) => !event.startsWith('origin-seek') && !event.startsWith('origin-end'));
    const copied = ['origin-read', 'origin-read done', 'keep-write', 'keep-write done', 'journal', 'map'];
    expect(events).toEqual([...copied, 'punch', 'punch done', 'journal', 'map', ...copied, 'reply']);
  });

  it('lets the size of a file follow its data', () => {
    const setting = openClone({ kind: 'file' });
    const { fixture, clone } = setting;
    const sizes: number[] = [];
    const look = (): void => { sizes.push(fixture.disk(clone).shared.sizeBytes()); };
    fixture.decide = () => {
      look();
      return { kind: 'then', run: look };
    };
    fixture.write(clone, 20 * BLOCK_BYTES, patternBytes(2, 0, 10));
    fixture.decide = undefined;
    expect(new Set(sizes)).toEqual(new Set([SIZE_BYTES]));
    expect(fixture.disk(clone).shared.sizeBytes()).toBe(20 * BLOCK_BYTES + 10);
    expect(eventsOf(setting, () => { fixture.write(clone, 30 * BLOCK_BYTES, patternBytes(2, 0, BLOCK_BYTES)); }))
      .toEqual(['first-touch-write', 'first-touch-write done', 'journal', 'map', 'journal', 'reply']);
  });

  it('needs neither journal nor map for what is owned', () => {
    const setting = openClone();
    setting.fixture.write(setting.clone, 0, patternBytes(2, 0, 2 * BLOCK_BYTES));
    expect(eventsOf(setting, () => { setting.fixture.write(setting.clone, 10, patternBytes(3, 0, BLOCK_BYTES)); }))
      .toEqual(['owned-write', 'owned-write done', 'reply']);
  });

  it('reads runs of one origin with one call each', () => {
    const { fixture, clone } = openClone();
    fixture.write(clone, 4 * BLOCK_BYTES, patternBytes(2, 0, BLOCK_BYTES));
    expect(labelsOf(fixture, () => { fixture.read(clone, 0, SIZE_BYTES); })).toEqual(['origin-read', 'origin-read', 'origin-read']);
  });
});

describe('a call that fails', () => {
  const write = ({ fixture, clone }: Setting): void => { fixture.write(clone, 2 * BLOCK_BYTES + 10, patternBytes(2, 0, 2 * BLOCK_BYTES)); };
  const discard = ({ fixture, clone }: Setting): void => { fixture.store.data.discard(clone.id, BLOCK_BYTES, 3 * BLOCK_BYTES); };
  const cases = [
    { what: 'write', label: 'first-touch-write', body: write },
    { what: 'write', label: 'origin-read', body: write },
    { what: 'discard', label: 'punch', body: discard },
  ] as const;

  for (const { what, label, body } of cases) {
    for (const [name, errno] of [['EIO', Errno.EIO], ['ENOSPC', Errno.ENOSPC], ['EDQUOT', Errno.EDQUOT]] as const) {
      it(`${label} with ${name}: the ${what} fails, nothing is owned, the journal is empty`, () => {
        const setting = openClone();
        const { fixture, clone } = setting;
        fixture.decide = at(label, () => ({ kind: 'fail', errno }));
        expect(errnoOfError(() => { body(setting); })).toBe(errno);
        fixture.decide = undefined;
        expect(fixture.ownedBlocks(clone)).toEqual([]);
        expect(journalTail(fixture)).toBe(0);
        fixture.expectContent(clone, SOURCE);
        body(setting);
        expect(fixture.ownedBlocks(clone).length).toBe(3);
      });
    }
  }

  it('leaves a block un-owned when only the rest of its data could not be written', () => {
    const { fixture, clone } = openClone();
    let calls = 0;
    fixture.decide = at('first-touch-write', () => {
      calls += 1;
      return calls === 1 ? { kind: 'shorten', lengthBytes: 5000 } : { kind: 'fail', errno: Errno.ENOSPC };
    });
    expect(errnoOfError(() => { fixture.write(clone, 0, patternBytes(2, 0, 2 * BLOCK_BYTES)); })).toBe(Errno.ENOSPC);
    fixture.decide = undefined;
    expect(calls).toBe(2);
    expect(journalTail(fixture)).toBe(0);
    expect(fixture.ownedBlocks(clone)).toEqual([]);
    fixture.expectContent(clone, SOURCE);
    // A hole of the source does not show what was left there either.
    fixture.store.data.discard(clone.id, 0, BLOCK_BYTES);
    expect(fixture.read(clone, 0, BLOCK_BYTES).every((byte) => byte === 0)).toBe(true);
  });

  it('is not a write of nothing: a store that takes no byte fails it', () => {
    const { fixture, clone } = openClone();
    fixture.decide = at('first-touch-write', () => ({ kind: 'shorten', lengthBytes: 0 }));
    expect(errnoOfError(() => { fixture.write(clone, 0, patternBytes(2, 0, 100)); })).toBe(Errno.EIO);
    expect(fixture.ownedBlocks(clone)).toEqual([]);
  });

  it('does not fail the read whose blocks could not be kept', () => {
    const { fixture, clone } = openClone({ copyOnRead: true });
    fixture.decide = at('keep-write', () => ({ kind: 'fail', errno: Errno.ENOSPC }));
    expect(fixture.read(clone, 0, SIZE_BYTES).equals(SOURCE)).toBe(true);
    fixture.decide = undefined;
    expect(fixture.ownedBlocks(clone)).toEqual([]);
    expect(journalTail(fixture)).toBe(0);
  });

  it('stops a fill, which owns nothing by it and can go on later', () => {
    const setting = openClone();
    const { fixture, clone } = setting;
    const progress = newFillProgress();
    for (const label of ['origin-read', 'keep-write']) {
      fixture.decide = at(label, () => ({ kind: 'fail', errno: Errno.EIO }));
      expect(step(setting, progress)).toBe(false);
      expect(progress).toMatchObject({ cursorBlock: 0, copiedBytes: 0, failed: -Errno.EIO });
      expect(fixture.ownedBlocks(clone)).toEqual([]);
    }
    fixture.decide = undefined;
    while (!step(setting, progress)) expect(progress.failed).toBe(0);
    expect(fixture.ownedBlocks(clone).length).toBe(13);
    fixture.expectContent(clone, SOURCE);
  });

  it('leaves the size of a file alone', () => {
    const { fixture, clone } = openClone({ kind: 'file' });
    fixture.decide = at('first-touch-write', () => ({ kind: 'fail', errno: Errno.ENOSPC }));
    expect(errnoOfError(() => { fixture.write(clone, SIZE_BYTES, patternBytes(2, 0, 3 * BLOCK_BYTES)); })).toBe(Errno.ENOSPC);
    fixture.decide = undefined;
    expect(fixture.disk(clone).shared.sizeBytes()).toBe(SIZE_BYTES);
    fixture.expectContent(clone, SOURCE);
  });
});

describe('a short call', () => {
  const cases = [{ label: 'first-touch-write', owned: false }, { label: 'owned-write', owned: true }] as const;
  for (const { label, owned } of cases) {
    it(`of ${label} goes on where it stopped`, () => {
      const { fixture, clone } = openClone();
      const expected = Buffer.from(SOURCE);
      if (owned) fixture.write(clone, 0, SOURCE);
      const calls: number[] = [];
      fixture.decide = at(label, (call) => {
        calls.push(call.lengthBytes);
        return { kind: 'shorten', lengthBytes: 1000 };
      });
      const data = patternBytes(2, 0, 6000);
      fixture.write(clone, 100, data);
      fixture.decide = undefined;
      data.copy(expected, 100);
      expect(calls.length).toBeGreaterThanOrEqual(6);
      fixture.expectContent(clone, expected);
    });
  }

  it('of a read goes on where it stopped', () => {
    const { fixture, clone } = openClone();
    fixture.decide = at('origin-read', () => ({ kind: 'shorten', lengthBytes: 777 }));
    expect(fixture.read(clone, 5, SIZE_BYTES).equals(SOURCE.subarray(5))).toBe(true);
  });
});

describe('a store that cannot punch holes', () => {
  it('gets zeros instead, on clones and on complete disks', () => {
    const { fixture, clone } = openClone();
    fixture.decide = at('punch', () => ({ kind: 'fail', errno: Errno.EOPNOTSUPP }));
    fixture.store.data.discard(clone.id, 100, 3 * BLOCK_BYTES);
    const expected = Buffer.from(SOURCE).fill(0, 100, 100 + 3 * BLOCK_BYTES);
    fixture.expectContent(clone, expected);
    const whole = fixture.image('whole', SOURCE);
    fixture.acquire(whole);
    fixture.store.data.discard(whole.id, 100, 3 * BLOCK_BYTES);
    fixture.expectContent(whole, expected);
  });
});

describe('whole pages of the map', () => {
  it('are given away with a word, in the same order', () => {
    const fixture = new TestStore();
    const base = fixture.emptyImage('base', 3 * PAGE_BLOCKS * BLOCK_BYTES);
    const clone = fixture.clone(base, 'clone');
    fixture.acquire(clone);
    const setting = { fixture, clone };
    const before = fixture.store.context.shared.pagesInUse();
    expect(eventsOf(setting, () => { fixture.store.data.discard(clone.id, 0, 2 * PAGE_BLOCKS * BLOCK_BYTES); }))
      .toEqual(['punch', 'punch done', 'journal', 'map', 'punch', 'punch done', 'journal', 'map', 'reply']);
    expect(fixture.store.context.shared.pagesInUse()).toBe(before);
    expect(fixture.ownedBlocks(clone).length).toBe(2 * PAGE_BLOCKS);
  });
});

describe('the fault door', () => {
  it('names every operation to the decision, and passes through what nobody minds', () => {
    const seen: DoorCall[] = [];
    const results: string[] = [];
    const inner = new Proxy(realDoor, { get: (_door, name) => (label: string) => { results.push(`${String(name)} ${label}`); return 7; } });
    const door = faultDoor(inner, (call) => { seen.push(call); return undefined; });
    expect([
      door.pread('a', 1, 2, 3, 4), door.pwrite('b', 1, 2, 3, 4), door.read('c', 1, 2, 3), door.write('d', 1, 2, 3),
      door.fallocate('e', 1, 2, 3, 4), door.seek('f', 1, 2, 3), door.fdatasync('g', 1),
    ]).toEqual([7, 7, 7, 7, 7, 7, 7]);
    expect(results).toEqual(['pread a', 'pwrite b', 'read c', 'write d', 'fallocate e', 'seek f', 'fdatasync g']);
    expect(seen.map((call) => `${call.operation} ${call.label} ${call.offsetBytes}+${call.lengthBytes}`)).toEqual([
      'pread a 4+3', 'pwrite b 4+3', 'read c 0+3', 'write d 0+3', 'fallocate e 3+4', 'seek f 2+0', 'fdatasync g 0+0',
    ]);
    expect(faultDoor(inner, () => ({ kind: 'fail', errno: Errno.EIO })).fdatasync('x', 1)).toBe(-Errno.EIO);
  });
});
