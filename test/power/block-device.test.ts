/**
 * The power goes below a real file system: a recorder beneath its loop device drops, tears and reorders what no flush covers, the file system's
 * own journal too. A few points; `scripts/power-cut --block-device` tries as many as are wanted.
 */
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { compilePrograms, type CompiledPrograms } from '../support/compiled-program.js';
import { seedFromEnvironment } from '../support/model/random.js';
import { cutBlockDevice, type BlockResult } from '../support/power/block-cuts.js';
import { ACTOR_PROGRAM, RECORDER_PROGRAM, type BlockFileSystem } from '../support/power/block-device.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const POINTS = 15;
const cleanup = createCleanup();
let programs: CompiledPrograms;
beforeAll(() => { programs = compilePrograms('power-block-device', [RECORDER_PROGRAM, ACTOR_PROGRAM]); });
afterAll(() => { programs.remove(); });
afterEach(() => cleanup.run());

async function cut(fileSystem: BlockFileSystem, isLying: boolean): Promise<BlockResult> {
  const seed = seedFromEnvironment();
  const memoryDir = makeTmpfsDir('block', cleanup);
  const workDir = makeTempDir('block', cleanup);
  const result = await cutBlockDevice({
    fileSystem, isLying, seed, points: POINTS, workloads: ['control', 'writes'], workDir, memoryDir, cleanup, onProgress: () => undefined,
    programs: { recorder: programs.pathOf(RECORDER_PROGRAM), actor: programs.pathOf(ACTOR_PROGRAM) },
  });
  process.stdout.write(`power: below ${fileSystem}${isLying ? ', on a disk that lies' : ''}: ${result.points} points of ${result.writes} writes and ${result.flushes} flushes, ${result.failures.length} wrong (OFFSHOOT_SEED=${seed})\n`);
  return result;
}

describe.skipIf(lacks('/dev/fuse', '/dev/loop-control', 'losetup', 'mkfs.ext4', 'mkfs.xfs'))('a power loss below a real file system', () => {
  it.each(['ext4', 'xfs'] as const)('that reorders the writes of %s itself leaves every block between its last flush and its newest write', async (fileSystem) => {
    const result = await cut(fileSystem, false);
    expect(result.failures).toEqual([]);
    expect(result.points).toBe(POINTS);
    expect(result.flushes).toBeGreaterThan(100);
    expect(result.dropped).toBeGreaterThan(0);
  });

  it('is found to lose data when the disk forgets its flushes', async () => {
    const result = await cut('ext4', true);
    expect(result.failures.length).toBeGreaterThan(0);
  });
});
