/**
 * The harness itself: it must find what is wrong. A recording is changed as if the store had forgotten a kind of sync, and
 * then some image must be found wrong; and a recorder that does not see something must say so.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { EventReader, type FileEvent } from '../support/power/events.js';
import { compileRecorded, createBench, cutAndReport, powerVerdict, type PowerBench } from '../support/power/power-test.js';
import { VolatileDisk } from '../support/power/volatile-disk.js';
import { WindowModel, contentOf } from '../support/power/window.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('harness');
let bench: PowerBench;

beforeAll(async () => {
  bench = createBench(programs, cleanup);
  await bench.record('control');
});

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

/** The recording without the syncs of the files that `isForgotten` names. */
function withoutSyncs(isForgotten: (path: string) => boolean): FileEvent[] {
  const disk = new VolatileDisk(bench.recorder.root);
  const forgotten = new Set<number>();
  return bench.recorder.events.filter((event, index) => {
    disk.apply(event);
    if (event.kind !== 'sync-begin' && event.kind !== 'sync-end') return true;
    if (index > bench.firstCut && event.kind === 'sync-begin' && isForgotten(disk.pathOf(event.inode) ?? '')) forgotten.add(event.sync);
    return !forgotten.has(event.sync);
  });
}

describe('the power-cut harness', () => {
  it.each([
    ['the data files', (path: string) => path.endsWith('.layer') || path.endsWith('.raw')],
    ['the write-ahead log', (path: string) => path.endsWith('-wal')],
    ['the directories of data files', (path: string) => /\/layers\/[0-9a-f]{2}$/u.test(path)],
  ])('finds a store that never syncs %s', async (what, isForgotten) => {
    const result = await cutAndReport(bench, { name: `without syncs of ${what}`, events: withoutSyncs(isForgotten), verdict: powerVerdict(bench) });
    expect(result.failures.length).toBeGreaterThan(0);
  });

  it('finds a flush that was answered before its sync had ended', async () => {
    const late: FileEvent[] = [];
    const events: FileEvent[] = [];
    for (const event of bench.recorder.events) {
      if (event.kind === 'sync-end' && event.call === 'fdatasync') late.push(event);
      else {
        events.push(event);
        if (late.length > 0 && event.kind === 'marker' && (event.marker as { op: string; phase: string }).phase === 'end') events.push(...late.splice(0));
      }
    }
    const result = await cutAndReport(bench, { name: 'answers before syncs', events, verdict: powerVerdict(bench) });
    expect(result.failures.length).toBeGreaterThan(0);
  });

  it('refuses a call that changes the store and is not known to it', () => {
    const name = [...Buffer.from('/r/s/file')].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('');
    for (const line of [`7 truncate("${name}", 5) = 0`, `7 openat(AT_FDCWD, "${name}", O_RDWR) = 9\n7 copy_file_range(9, NULL, 9, NULL, 10, 0) = 10`]) {
      const reader = new EventReader({ roots: ['/r'], markerPath: '/m' }, new Map([['/r/s/file', 3]]), 10);
      expect(() => reader.read(`${line}\n`)).toThrow('does not know');
    }
  });

  it('finds a snapshot, a revert, or a removal of which only a part is there', () => {
    const window = new WindowModel();
    const SIZE = 8192;
    for (const [disk, seed] of [['a', 1], ['b', 2]] as const) for (const phase of ['begin', 'end'] as const) window.apply({ op: 'create', phase, disk, sizeBytes: SIZE, seed, holes: 0 });
    const turn = { op: 'turn', made: [{ disk: 'c', content: { copyOf: 'a' } }], changed: [{ disk: 'b', content: { copyOf: 'a' } }], gone: ['a'] } as const;
    const judge = (isMade: boolean, isChanged: boolean, isGone: boolean): boolean => window.judge([
      ...(isMade ? [{ name: 'c', content: contentOf(SIZE, 1, 0) }] : []), ...(isGone ? [] : [{ name: 'a', content: contentOf(SIZE, 1, 0) }]),
      { name: 'b', content: contentOf(SIZE, isChanged ? 1 : 2, 0) },
    ], 'window', 512) === null;
    const all = [false, true].flatMap((made) => [false, true].flatMap((changed) => [false, true].map((gone) => [made, changed, gone] as const)));
    const right = (): string[] => all.filter((each) => judge(...each)).map((each) => each.join(' '));
    expect(right()).toEqual(['false false false']);
    window.apply({ ...turn, phase: 'begin' });
    expect(right()).toEqual(['false false false', 'true true true']);
    window.apply({ ...turn, phase: 'end' });
    expect(right()).toEqual(['true true true']);
  });

  it('finds a receive of which less is there than was kept, one that came back, and a promotion that is undone', () => {
    const window = new WindowModel();
    const stream = { uuid: 'u', name: 'v1', target: 'r', baseUuid: null, nodes: [] };
    const judge = (...records: number[]): boolean => window.judgeReceives(records.map((count) => ({ uuid: 'u', records: count })), []) === null;
    expect([judge(), judge(0)]).toEqual([true, false]);
    window.apply({ op: 'receive', phase: 'begin', stream });
    expect([judge(), judge(0)]).toEqual([true, true]);
    window.apply({ op: 'receive', phase: 'end', stream });
    window.apply({ op: 'received', phase: 'end', uuid: 'u', records: 3 });
    expect([judge(), judge(2), judge(3), judge(4)]).toEqual([false, false, true, true]);
    window.apply({ op: 'finish', phase: 'begin', uuid: 'u' });
    expect([judge(), judge(3)]).toEqual([true, true]);
    window.apply({ op: 'finish', phase: 'end', uuid: 'u' });
    expect([judge(), judge(3)]).toEqual([true, false]);

    for (const disk of ['image', 'clone']) for (const phase of ['begin', 'end'] as const) window.apply({ op: 'create', phase, disk, sizeBytes: 0, seed: 0, holes: 0 });
    window.apply({ op: 'promote', phase: 'end', disk: 'clone', origin: 'image' });
    const found = (origin: string | null): boolean => window.judge([{ name: 'image', content: Buffer.alloc(0), origin }, { name: 'clone', content: Buffer.alloc(0), origin: null }], 'window', 512) === null;
    expect([found('clone'), found(null)]).toEqual([true, false]);
  });

  it('takes away only what no sync covers', () => {
    const disk = new VolatileDisk('/r');
    const write = (offsetBytes: number, byte: number): FileEvent => ({ kind: 'write', inode: 1, offsetBytes, data: Buffer.alloc(4096, byte) });
    const events: FileEvent[] = [
      { kind: 'create', path: '/r/f', inode: 1, directory: false }, write(0, 1),
      { kind: 'sync-begin', inode: 1, sync: 1, call: 'fsync' }, write(0, 2), { kind: 'sync-end', inode: 1, sync: 1, call: 'fsync' },
    ];
    for (const event of events) disk.apply(event);
    const nothing = { unitBytes: 4096, orderedNames: false, choose: (): number => 0 };
    expect(disk.image(nothing).size, 'the name was never synced').toBe(0);
    const named = disk.image({ ...nothing, choose: ({ subject }) => (subject === 'name' ? 1 : 0) }).get('f');
    expect(named?.directory === false && named.bytes.equals(Buffer.alloc(4096, 1)), 'the first write is durable, the one during the sync is not').toBe(true);
  });
});
