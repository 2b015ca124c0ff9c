/** The power goes while guests write and flush. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('guest-writes');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('while guests write and flush leaves every block between its last flush and its newest write', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('writes');
    const result = await cutAndReport(bench, { name: 'guest writes', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
