/** The power goes while reads keep what they fetched. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('copy-on-read');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('while reads keep what they fetched leaves every block right', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('copy-on-read');
    const result = await cutAndReport(bench, { name: 'copy-on-read', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
