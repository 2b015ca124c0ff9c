/** The power goes while machines are staged, deployed and decommissioned, and while disks are presented. What the harness models and what it promises: test/support/power/. */
import path from 'node:path';

import { afterAll, describe, expect, it } from 'vitest';

import { emptyDirectory } from '../support/power/machine-workload.js';
import { compileRecorded, createBench, cutAndReport, judgeStore, STORE } from '../support/power/power-test.js';
import { judgeVdisks } from '../support/power/vdisk-workload.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('vdisks');

afterAll(async () => {
  programs.remove();
  await cleanup.run();
});

describe('a power loss', () => {
  it('while a machine is staged, deployed or decommissioned, or a disk presented, leaves all of it or nothing; what was answered is there, with its content', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('vdisks');
    const hostDir = makeTmpfsDir('host', cleanup);
    let count = 0;
    const result = await cutAndReport(bench, {
      name: 'container files, deployed machines and exports', images: 400,
      verdict: async ({ directory, window }) => {
        count += 1;
        return await judgeStore(path.join(directory, STORE), emptyDirectory(path.join(bench.workDir, 'checked-run')), () => null, count % 16 === 0, async (store, disks) => await judgeVdisks(store, disks, window.lastMarker, hostDir));
      },
    });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(300);
  });
});
