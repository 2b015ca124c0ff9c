/** The power goes while operators take snapshots of containers, go back to them, remove them and clone containers. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('containers');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('leaves each snapshot, revert, removal of a snapshot and clone of a container whole if it returned, and otherwise whole or not at all', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('containers');
    const result = await cutAndReport(bench, { name: 'containers', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
