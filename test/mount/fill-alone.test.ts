/**
 * What a fill promises beside the content: holes take no space, a rate and a pause hold, and a restart is no end. Each by itself, with amounts and
 * not with times, except where a busy machine can only make them longer.
 */
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DiskInfo, FillInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage, sha256Of } from '../support/images.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const SIZE_BYTES = 48 * MIB;
const TEST_MS = 300_000;
/** Every fourth MiB is data. */
const isHole = (block: number): boolean => Math.floor(block / 256) % 4 !== 0;
const DATA_BYTES = SIZE_BYTES / 4;

describe.skipIf(lacks('/dev/fuse'))('a fill', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let sum: string;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    const image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: SIZE_BYTES, seed: 5, isHole });
    sum = await sha256Of(image);
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/image', '--in-place']);
    await daemon.json(['clone', 'vms/image', 'vms/holes', 'vms/rate', 'vms/pause', 'vms/restart']);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  const status = async (disk: string): Promise<FillInfo> => await daemon.json<FillInfo>(['fill', 'status', disk]);
  const show = async (disk: string): Promise<DiskInfo> => await daemon.json<DiskInfo>(['show', disk]);

  it('copies the data of a source and none of its holes', { timeout: TEST_MS }, async () => {
    await daemon.json(['fill', 'start', 'vms/holes']);
    expect(await daemon.json<FillInfo>(['fill', 'wait', 'vms/holes'])).toMatchObject({ state: 'completed', totalBytes: DATA_BYTES, doneBytes: DATA_BYTES });
    const { ownedBytes, unownedBytes, allocatedBytes } = await show('vms/holes');
    expect([ownedBytes, unownedBytes]).toEqual([SIZE_BYTES, 0]);
    expect(allocatedBytes).toBeGreaterThanOrEqual(DATA_BYTES);
    // A file system's own blocks for the map of the file.
    expect(allocatedBytes).toBeLessThan(DATA_BYTES + DATA_BYTES / 10);
    expect(await sha256Of(daemon.path('vms/holes'))).toBe(sum);
  });

  it('is not faster than its rate, and follows another one at once', { timeout: TEST_MS }, async () => {
    const rate = MIB;
    const beganMs = performance.now();
    await daemon.json(['fill', 'start', 'vms/rate', '--rate', String(rate)]);
    let last = await status('vms/rate');
    for (let look = 0; look < 8; look += 1) {
      last = await status('vms/rate');
      // A step is 1 MiB, and what it was kept from for a moment it may make up for.
      expect(last.doneBytes).toBeLessThanOrEqual(rate * ((performance.now() - beganMs) / 1000) + 2 * MIB);
      await sleep(100);
    }
    // A machine that took all that time for it has nothing more to show.
    if (last.state === 'running') await daemon.json(['fill', 'resume', 'vms/rate', '--rate', 'unlimited']);
    expect(await daemon.json<FillInfo>(['fill', 'wait', 'vms/rate'])).toMatchObject({ state: 'completed' });
  });

  it('that is paused copies nothing until it is resumed', { timeout: TEST_MS }, async () => {
    await daemon.json(['fill', 'start', 'vms/pause', '--rate', '512K']);
    const paused = await daemon.json<FillInfo>(['fill', 'pause', 'vms/pause']);
    const { ownedBytes } = await show('vms/pause');
    await sleep(1500);
    expect(await status('vms/pause')).toMatchObject({ state: 'paused', doneBytes: paused.doneBytes });
    expect((await show('vms/pause')).ownedBytes).toBe(ownedBytes);
    expect(ownedBytes).toBeLessThan(SIZE_BYTES);
    await daemon.json(['fill', 'resume', 'vms/pause', '--rate', 'unlimited']);
    await daemon.json(['fill', 'wait', 'vms/pause']);
    expect(await sha256Of(daemon.path('vms/pause'))).toBe(sum);
  });

  it('goes on after a stop and a start, and after a kill, from where it was and under its id', { timeout: TEST_MS }, async () => {
    const { jobId } = await daemon.json<FillInfo>(['fill', 'start', 'vms/restart', '--rate', '512K']);
    while ((await status('vms/restart')).doneBytes < MIB) await sleep(50);
    await daemon.stop();
    await daemon.start();
    const before = await status('vms/restart');
    expect(before).toMatchObject({ jobId, state: 'running', rateBytesPerSecond: MIB / 2 });
    expect(before.doneBytes).toBeGreaterThanOrEqual(MIB);
    await daemon.waitForServer(await daemon.killServer());
    expect(await status('vms/restart')).toMatchObject({ jobId, state: 'running' });
    await daemon.json(['fill', 'resume', 'vms/restart', '--rate', 'unlimited']);
    expect(await daemon.json<FillInfo>(['fill', 'wait', 'vms/restart'])).toMatchObject({ jobId, state: 'completed' });
    expect(await sha256Of(daemon.path('vms/restart'))).toBe(sum);
  });
});
