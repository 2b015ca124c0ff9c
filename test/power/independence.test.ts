/** The power goes while clones are rebased and promoted, and copies go into open disks and files. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('independence');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('leaves each rebase and promote whole if it returned, and otherwise whole or not at all, and copies as writes', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('independence');
    const result = await cutAndReport(bench, { name: 'independence', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
