/** The power goes while machines are cloned and registered, and while that is undone. What the harness models and what it promises: test/support/power/. */
import path from 'node:path';

import { afterAll, describe, expect, it } from 'vitest';

import { emptyDirectory, judgeMachines } from '../support/power/machine-workload.js';
import { compileRecorded, createBench, cutAndReport, judgeStore, STORE } from '../support/power/power-test.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('machines');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('in an operation on machines leaves all of it or nothing, and the hypervisor with what is there and no more', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('machines');
    const hypervisorDir = makeTmpfsDir('hypervisor', cleanup);
    let count = 0;
    const result = await cutAndReport(bench, {
      name: 'machines',
      verdict: async ({ directory, window }) => {
        count += 1;
        return await judgeStore(path.join(directory, STORE), emptyDirectory(path.join(bench.workDir, 'checked-run')), () => null, count % 16 === 0, async (store, disks) => await judgeMachines(store, disks, window.lastMarker, hypervisorDir));
      },
    });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});
