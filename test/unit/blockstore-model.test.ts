/**
 * The block store against arrays of bytes: random operations on a chain of disks and files, and on plain buffers. After
 * each operation the same bytes, at the end the same bytes on every clone and in every snapshot that was made on the way, no
 * false hole, and nothing left of layers, files and map pages.
 *
 * The seed is printed; OFFSHOOT_SEED runs it again.
 */
import fs from 'node:fs';
import path from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { BLOCK_BYTES, PAGE_BYTES } from '../../blockstore/units.js';
import { TestStore } from '../support/blockstore-fixture.js';
import { StoreRun, type Operation, type Place, type Scenario } from '../support/model/store-run.js';
import { seedFromEnvironment } from '../support/model/random.js';

const SEED = seedFromEnvironment();
const RUNS = 120;
const SIZES = [1, 511, 4095, 4096, 4097, 12_388, 65_536, 100_001];

const small = fc.oneof(fc.constantFrom(...SIZES), fc.integer({ min: 1, max: 150_000 }));
/** Behind the first page of the block map. */
const paged = fc.integer({ min: -2, max: 2 }).map((delta) => PAGE_BYTES + delta * BLOCK_BYTES + 77);
const place: fc.Arbitrary<Place> = fc.oneof(
  fc.record({ block: fc.nat(40), delta: fc.constantFrom(0, 0, 0, 1, 511, 512, -1, -512) }),
  fc.record({ block: fc.integer({ min: 2044, max: 2050 }), delta: fc.constantFrom(0, 1, -1) }),
  fc.record({ part: fc.double({ min: 0, max: 1, noNaN: true }) }),
);
const length = fc.oneof(fc.constantFrom(1, 511, 512, 4095, 4096, 4097, 8192), fc.integer({ min: 1, max: 40_000 }));
const operation: fc.Arbitrary<Operation> = fc.oneof(
  { weight: 8, arbitrary: fc.record({ type: fc.constantFrom('read' as const, 'discard' as const), at: place, lengthBytes: length }) },
  { weight: 8, arbitrary: fc.record({ type: fc.constant('write' as const), at: place, lengthBytes: length, seed: fc.integer({ min: 1, max: 1_000_000 }) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('discard' as const), at: place, lengthBytes: fc.constant(2 * PAGE_BYTES) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('resize' as const), sizeBytes: fc.oneof({ weight: 4, arbitrary: small }, { weight: 1, arbitrary: paged }) }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant('fill' as const), steps: fc.integer({ min: 1, max: 5 }) }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constantFrom('seal' as const, 'move' as const), copyOnRead: fc.boolean() }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constantFrom('flush' as const, 'commit' as const, 'close' as const, 'close' as const) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constantFrom('kill' as const, 'complete' as const) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('promote' as const) }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constant('deepen' as const), at: fc.nat(40), blocks: fc.array(fc.integer({ min: 1, max: 3 }), { minLength: 2, maxLength: 4 }), merges: fc.nat(2) }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant('snapshot' as const), ofAll: fc.boolean() }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constant('revert' as const), to: fc.nat(4), at: place, lengthBytes: length }) },
  { weight: 2, arbitrary: fc.record({ type: fc.constant('rebase' as const), own: fc.nat(6), newer: fc.nat(6) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant('copy to new' as const), from: fc.nat(4), source: fc.nat(60), blocks: fc.integer({ min: 1, max: 40 }) }) },
  {
    weight: 6,
    arbitrary: fc.record({ type: fc.constant('copy' as const), from: fc.nat(4), source: fc.nat(60), target: fc.nat(60), blocks: fc.oneof(fc.integer({ min: 1, max: 40 }), fc.constant(3000)) }),
  },
);
const scenario: fc.Arbitrary<Scenario> = fc.record({
  kind: fc.constantFrom('disk' as const, 'file' as const),
  base: fc.constantFrom('image' as const, 'in place' as const, 'in place, padded' as const),
  sizeBytes: fc.oneof({ weight: 4, arbitrary: small }, { weight: 1, arbitrary: paged }),
  holesBits: fc.nat(255),
  copyOnRead: fc.boolean(),
  operations: fc.array(operation, { minLength: 1, maxLength: 30 }),
});

function filesOf(fixture: TestStore): string[] {
  const directory = path.join(fixture.storeDir, 'layers');
  return fs.readdirSync(directory, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.layer'));
}

describe('disks and files over sources, against arrays of bytes', () => {
  it(`agrees after every operation (seed ${SEED})`, { timeout: 180_000 }, async () => {
    let fixture = new TestStore();
    let run = 0;
    const done = { merges: 0, rebases: 0, reverts: 0 };
    await fc.assert(
      fc.asyncProperty(scenario, async (data) => {
        run += 1;
        const current = new StoreRun(fixture, run, data);
        try {
          for (const operation of data.operations) await current.apply(operation);
          await current.finish();
        } catch (thrown) {
          // What it leaves would fail every smaller scenario that is tried next.
          fixture = new TestStore();
          throw thrown;
        }
        done.merges += current.merges;
        done.rebases += current.rebases;
        done.reverts += current.reverts;
        expect(fixture.store.context.shared.pagesInUse()).toBe(0);
        expect(fixture.store.meta.layers.count()).toBe(0);
        expect(filesOf(fixture)).toEqual([]);
      }),
      { seed: SEED, numRuns: RUNS, endOnFailure: false },
    );
    expect(done).toSatisfy(({ merges, rebases, reverts }: typeof done) => merges > 0 && rebases > 0 && reverts > 0);
    process.stdout.write(`blockstore model: ${JSON.stringify(done)} in ${run} runs, OFFSHOOT_SEED=${SEED}\n`);
  });
});
