/** The block map against an array, and the shared memory around it: claims, the gate's counters, pages that are given back. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { SharedDisk, createDiskHandles } from '../../blockstore/hot/block-map.js';
import { CLAIM_BLOCKS, SharedState, chunksFor, createSharedState } from '../../blockstore/hot/shared-state.js';
import { PAGE_BLOCKS, PAGE_BYTES } from '../../blockstore/units.js';
import { seedFromEnvironment } from '../support/model/random.js';

const SEED = seedFromEnvironment();
const PAGES = 4;
/** Of one chunk. */
const ARENA_PAGES = 16_384;
const BLOCKS = PAGES * PAGE_BLOCKS;
const CHUNKS = 1;
const handles = createSharedState(CHUNKS);
const shared = new SharedState(handles, 0);

/** Near the boundaries of pages, because a whole page is a case of its own. */
const block = fc.oneof(
  fc.nat(BLOCKS - 1),
  fc.tuple(fc.nat(PAGES), fc.integer({ min: -2, max: 2 })).map(([page, delta]) => Math.min(Math.max(page * PAGE_BLOCKS + delta, 0), BLOCKS - 1)),
);
const run = fc.record({ from: block, to: block, origin: fc.integer({ min: 0, max: 1023 }) });

function newDisk(serial = 1): SharedDisk {
  return new SharedDisk(createDiskHandles(7, serial, PAGES * PAGE_BYTES));
}

describe('the block map', () => {
  it(`agrees with an array after every publication (seed ${SEED})`, () => {
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 3 }), fc.array(run, { maxLength: 12 }), block, (defaultOrigin, runs, looked) => {
        const disk = newDisk();
        disk.setDefaultOrigin(defaultOrigin);
        const model = new Uint16Array(BLOCKS).fill(defaultOrigin);
        const before = shared.pagesInUse();
        for (const { from, to, origin } of runs) {
          const [first, last] = [Math.min(from, to), Math.max(from, to)];
          if (!disk.publish(shared, first, last, origin)) throw new Error('no page is left');
          model.fill(origin, first, last + 1);
          // Around what changed, and anywhere else.
          for (const at of [first - 1, first, last, last + 1, looked]) {
            if (at < 0 || at >= BLOCKS) continue;
            expect(disk.originOf(shared, at)).toBe(model[at]);
            const end = model.findIndex((other, i) => i > at && other !== model[at]);
            expect(disk.runEnd(shared, at, BLOCKS, model[at]!)).toBe(end < 0 ? BLOCKS : end);
          }
          expect(disk.isUniform(shared, first, last, origin)).toBe(true);
        }
        const counted = Math.floor(BLOCKS / 3);
        expect(disk.countBlocks(shared, counted, defaultOrigin)).toBe(model.subarray(0, counted).filter((origin) => origin === defaultOrigin).length);
        expect(shared.pagesInUse() - before).toBeLessThanOrEqual(PAGES);
        for (const page of disk.clear()) shared.freePage(page);
        expect(shared.pagesInUse()).toBe(before);
        expect(disk.runEnd(shared, 0, BLOCKS, defaultOrigin)).toBe(BLOCKS);
      }),
      { seed: SEED, numRuns: 60 },
    );
  });

  it('takes no memory for pages of one origin, and one page for each that is mixed', () => {
    const disk = newDisk();
    const before = shared.pagesInUse();
    disk.publish(shared, 0, BLOCKS - 1, 5);
    expect(shared.pagesInUse()).toBe(before);
    disk.publish(shared, PAGE_BLOCKS + 3, PAGE_BLOCKS + 3, 6);
    expect(shared.pagesInUse()).toBe(before + 1);
    expect([PAGE_BLOCKS + 2, PAGE_BLOCKS + 3, PAGE_BLOCKS + 4].map((at) => disk.originOf(shared, at))).toEqual([5, 6, 5]);
    for (const page of disk.clear()) shared.freePage(page);
  });

  it('says that blocks behind it have the default origin, and refuses to own them', () => {
    const disk = newDisk();
    disk.setDefaultOrigin(2);
    disk.publish(shared, BLOCKS - 1, BLOCKS - 1, 3);
    expect(disk.originOf(shared, BLOCKS)).toBe(2);
    expect(disk.originOf(shared, 2 ** 33)).toBe(2);
    expect(disk.runEnd(shared, BLOCKS, 2 ** 33, 2)).toBe(2 ** 33);
    expect(disk.runEnd(shared, 0, 2 ** 33, 2)).toBe(BLOCKS - 1);
    expect(() => disk.publish(shared, BLOCKS - 1, BLOCKS, 3)).toThrow('behind its map');
    for (const page of disk.clear()) shared.freePage(page);
  });

  it('fills a page that was used before with its own origin', () => {
    const disk = newDisk();
    disk.publish(shared, 0, 9, 5);
    for (const page of disk.clear()) shared.freePage(page);
    const next = newDisk(2);
    next.setDefaultOrigin(1);
    next.publish(shared, 4, 4, 7);
    expect([3, 4, 5].map((at) => next.originOf(shared, at))).toEqual([1, 7, 1]);
    for (const page of next.clear()) shared.freePage(page);
  });
});

describe('the arena', () => {
  it('has as many pages as it was made for, and says when there is none left', () => {
    const own = new SharedState(createSharedState(CHUNKS), 0);
    const pages: number[] = [];
    for (let page = own.allocatePage(3); page >= 0; page = own.allocatePage(3)) pages.push(page);
    expect(pages.length).toBe(ARENA_PAGES);
    expect(own.allocatePage(3)).toBe(-1);
    expect(own.pagesInUse()).toBe(ARENA_PAGES);
    const disk = newDisk();
    expect(disk.publish(own, 5, 6, 1)).toBe(false);
    expect(disk.publish(own, 0, PAGE_BLOCKS - 1, 1)).toBe(true);
    expect(disk.originOf(own, 5)).toBe(1);
    own.freePage(pages[77]!);
    expect(disk.publish(own, PAGE_BLOCKS, PAGE_BLOCKS, 2)).toBe(true);
    expect(disk.publish(own, 5, 6, 2)).toBe(false);
    expect(disk.clear()).toEqual([77]);
  });

  it('is smaller where there is less memory', () => {
    expect([0, 2 ** 31, 2 ** 33, 2 ** 36, 2 ** 40].map(chunksFor)).toEqual([4, 4, 16, 64, 64]);
  });
});

describe('claims', () => {
  it('are released as they were taken, wherever they lie in the table', () => {
    const claims = new Int32Array(handles.claims);
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 100_000 }), fc.oneof(fc.nat(2 ** 31 - 1), fc.nat(1000).map((n) => 2 ** 34 - 5000 + n)), fc.nat(CLAIM_BLOCKS * 200), (serial, first, count) => {
        shared.claim(serial, first, first + count);
        const units = Math.floor((first + count) / CLAIM_BLOCKS) - Math.floor(first / CLAIM_BLOCKS) + 1;
        expect(claims.reduce((sum, word) => sum + word, 0)).toBe(units);
        shared.release(serial, first, first + count);
        expect(claims.every((word) => word === 0)).toBe(true);
      }),
      { seed: SEED, numRuns: 60 },
    );
  });

  it('longer than the table are refused', () => {
    expect(() => { shared.claim(1, 0, 8192 * CLAIM_BLOCKS); }).toThrow('longer than the table');
  });
});

describe('who is inside', () => {
  it('is known to whoever closes the gate', () => {
    const other = new SharedState(handles, 5);
    expect(shared.waitUntilNobodyIn(9, 1)).toBe(true);
    other.enter(9);
    expect(shared.waitUntilNobodyIn(8, 1)).toBe(true);
    expect(shared.waitUntilNobodyIn(9, 1)).toBe(false);
    other.leave(true);
    expect(shared.waitUntilNobodyIn(9, 1)).toBe(true);
  });
});
