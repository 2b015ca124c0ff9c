/** The power goes while operators clone, import, resize and remove. What the harness models and what it promises: test/support/power/. */
import { afterAll, describe, expect, it } from 'vitest';

import { compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('control');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('leaves clone, import, resize and removal whole if they returned, and otherwise whole or not at all', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('control');
    const result = await cutAndReport(bench, { name: 'control', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
