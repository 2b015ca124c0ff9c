/**
 * What a fuzz target is, and how its random cases are run: fast-check, for a time instead of a number of cases.
 *
 * Every case can be made again from the seed, and from the path that a failure names; a failing case is made smaller before
 * it is shown.
 */
import { mkdtempSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';

export interface FuzzOptions {
  readonly seed: number;
  /** Of a failure that was printed: runs that one case and nothing else. */
  readonly path?: string;
  readonly milliseconds: number;
  /** The built command line, for targets that need a whole daemon. */
  readonly cliEntry: string;
}

export interface FuzzTarget {
  readonly name: string;
  /** What it throws malformed things at, for people. */
  readonly summary: string;
  /** Counts of what was done; throws when a promise was broken. */
  run(options: FuzzOptions): Promise<Readonly<Record<string, number>>>;
}

/** Longest time for making a failing case smaller. */
const SHRINK_MS_MAX = 60_000;

/** Runs `check` on cases of `arbitrary` until the time is over. */
export async function fuzzCases<T>(options: FuzzOptions, arbitrary: fc.Arbitrary<T>, check: (value: T) => Promise<void>): Promise<void> {
  const deadline = performance.now() + options.milliseconds;
  let failing = false;
  let underWay: Promise<void> = Promise.resolve();
  const property = fc.asyncProperty(arbitrary, async (value) => {
    if (failing && performance.now() > deadline + SHRINK_MS_MAX) return;
    underWay = check(value);
    try {
      await underWay;
    } catch (thrown) {
      failing = true;
      throw thrown;
    }
  });
  const result = await fc.check(property, {
    seed: options.seed,
    numRuns: Number.MAX_SAFE_INTEGER,
    ...(options.path === undefined ? { interruptAfterTimeLimit: options.milliseconds } : { path: options.path, numRuns: 1 }),
    markInterruptAsFailure: false,
  });
  if (!result.failed) {
    // When the time is over, the case of that moment is left alone by fast-check: it still runs, with a store and a worker of its own.
    await underWay;
    return;
  }
  throw new Error(`seed ${options.seed}, path ${result.counterexamplePath ?? '?'}, made smaller ${result.numShrinks} times\n` +
    fc.stringify(result.counterexample), { cause: result.errorInstance });
}

/** On a tmpfs: nothing here is about disks. Whoever makes one takes it away. */
export function makeFuzzDirectory(): string {
  const given = process.env['OFFSHOOT_TEST_TMPFS'];
  return mkdtempSync(join(given === undefined || given === '' ? '/dev/shm' : given, 'offshoot-fuzz-'));
}
