/** The power goes while streams are received. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { resumeReceives } from '../support/power/resume-receives.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('receives');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('keeps what a receive said that it keeps, which can be gone on with to its end, and all of one that returned', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('receives');
    const result = await cutAndReport(bench, { name: 'receives', verdict: powerVerdict(bench, resumeReceives) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
