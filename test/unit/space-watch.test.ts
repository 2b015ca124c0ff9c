/** When little room is said to be little: thresholds in bytes and percent, once for each crossing, and what an administrator reads. */
import { describe, expect, it } from 'vitest';
import type { Store } from '../../blockstore/store.js';
import { DEFAULT_POLICY, type DaemonPolicy } from '../../daemon/control/policy.js';
import { SpaceWatch } from '../../daemon/server/space-watch.js';
import { recordingLogger, type LogLine } from '../support/control-fixture.js';

const GIB = 1024 ** 3;
const TOTAL = 100 * GIB;

function fixture(changes: Partial<DaemonPolicy> = {}) {
  const now = { freeBytes: TOTAL, isFull: false };
  const log: LogLine[] = [];
  const watch = new SpaceWatch({
    store: {
      space: () => ({ isFull: now.isFull, reservedBytes: now.isFull ? 0 : 64 }),
      meta: { nodes: { virtualBytes: () => 7 * TOTAL } },
    } as unknown as Pick<Store, 'space' | 'meta'>,
    storeDir: '/nowhere', policy: { ...DEFAULT_POLICY, ...changes }, logger: recordingLogger(log), measure: () => ({ totalBytes: TOTAL, freeBytes: now.freeBytes }),
  });
  return {
    watch, log, now,
    at: (freeGib: number, isFull = false) => {
      now.freeBytes = freeGib * GIB;
      now.isFull = isFull;
      return watch.look().level;
    },
  };
}

describe('the room in the store', () => {
  it('is said to be little once for each threshold that is crossed, more urgently each time', () => {
    const { at, log } = fixture();
    expect([50, 11, 10, 9.9, 5, 9.9, 2.9, 1, 0.1].map((free) => at(free))).toEqual(['ok', 'ok', 'ok', 'low', 'low', 'low', 'critical', 'critical', 'critical']);
    expect(at(0.05, true)).toBe('full');
    expect(log.map(({ level, fields }) => [level, fields['spaceLevel'], fields['before']])).toEqual([['warn', 'low', 'ok'], ['error', 'critical', 'low'], ['error', 'full', 'critical']]);
  });

  it('is enough again only when there is clearly more than the threshold, so that hovering there says nothing', () => {
    const { at, log } = fixture();
    expect([9.9, 10.1, 9.9, 10.9, 9.9].map((free) => at(free))).toEqual(['low', 'low', 'low', 'low', 'low']);
    expect(log).toHaveLength(1);
    expect(at(11.1)).toBe('ok');
    expect(at(10.1)).toBe('ok');
    expect(log.map(({ level }) => level)).toEqual(['warn', 'warn']);
    expect(log[1]?.message).toBe('the store has room enough again');
    expect([2.9, 3.1, 3.4].map((free) => at(free))).toEqual(['critical', 'critical', 'low']);
  });

  it('is measured in bytes when bytes were given', () => {
    const { at } = fixture({ spaceWarning: { unit: 'bytes', value: 30 * GIB }, spaceCritical: { unit: 'bytes', value: 20 * GIB } });
    expect([31, 29, 19].map((free) => at(free))).toEqual(['ok', 'low', 'critical']);
  });

  it('is never said to be little when nobody wants to hear it', () => {
    const { at, log } = fixture({ spaceWarning: { unit: 'bytes', value: 0 }, spaceCritical: { unit: 'bytes', value: 0 } });
    expect([1, 0].map((free) => at(free))).toEqual(['ok', 'ok']);
    expect(at(0, true)).toBe('full');
    expect(log).toHaveLength(1);
  });

  it('is none for guests while the store is full, although metadata has some', () => {
    const { at, watch } = fixture();
    at(0.06, true);
    expect(watch.look()).toMatchObject({ level: 'full', freeBytes: 0, reservedBytes: 0, virtualBytes: 7 * TOTAL });
  });

  it('comes with what to do', () => {
    const { at, watch } = fixture();
    at(50);
    expect(watch.advice(watch.look())).toBeNull();
    at(8.25);
    expect(watch.advice(watch.look())).toBe('the store\'s file system has 8.3 % (8448 MiB) left, less than the 10 % of --space-warning: writes of guests will fail when it is full; remove what is not needed (offshoot rm), or make its file system larger');
    at(1);
    expect(watch.advice(watch.look())).toMatch(/less than the 3 % of --space-critical.* now$/u);
    at(0, true);
    expect(watch.advice(watch.look())).toMatch(/^the store is full: .*ENOSPC.*virsh resume/u);
  });
});
