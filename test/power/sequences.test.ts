/** The power goes in every sequence of three operations on one disk. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('sequences');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('in any sequence of three operations on a new clone leaves every block right', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('sequences');
    const result = await cutAndReport(bench, { name: 'sequences of three', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
