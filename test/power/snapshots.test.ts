/** The power goes while snapshots of a group of disks are taken, and the disks go on being written. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('snapshots');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('leaves a snapshot of a group as of one instant if it returned, and otherwise whole or not at all, and every flush of its disks', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('snapshots');
    const result = await cutAndReport(bench, { name: 'snapshots', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
