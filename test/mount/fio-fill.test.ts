/**
 * fio with crc32c verification on a clone while it fills, on both transports.
 *
 * Then: what fio did not write is still the source's content, the source itself has not changed, and the filled clone
 * works without it: the source is moved away, the daemon restarted, and everything is read once more.
 */
import { renameSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import type { FillInfo } from '../../daemon/control/schemas.js';
import { runFio } from '../support/fio.js';
import type { FioOptions } from '../support/fio.js';
import { startTestDaemon } from '../support/daemon.js';
import type { TestTransport } from '../support/daemon.js';
import { makePatternImage, sha256Of } from '../support/images.js';
import { mustRun } from '../support/model/command.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { REFUSED_ON_SOME_KERNELS, importFile } from './conformance-context.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 160 * MIB;
/** fio works on two regions; the rest stays as the source is. */
const REGIONS = [{ offset: 8 * MIB, length: 32 * MIB }, { offset: 44 * MIB, length: 32 * MIB }] as const;
const FIO_TIMEOUT_MS = 120_000;
const FILL_TIMEOUT_MS = 120_000;

function verifying(file: string, region: { readonly offset: number; readonly length: number }, more: FioOptions): FioOptions {
  return {
    filename: file, offset: region.offset, size: region.length, verify: 'crc32c', verify_fatal: 1, verify_state_save: 0, randrepeat: 1, randseed: 4711,
    bssplit: '512/10:2k/10:4k/50:12k/10:64k/20', blockalign: 512, ...more,
  };
}

/** The parts that fio leaves alone, compared byte by byte with the source. */
async function compareUntouched(disk: string, source: string): Promise<void> {
  let begin = 0;
  for (const end of [...REGIONS.map((region) => region.offset), SIZE_BYTES]) {
    await mustRun('cmp', [`--ignore-initial=${begin}`, `--bytes=${end - begin}`, disk, source], { timeoutMs: FIO_TIMEOUT_MS });
    begin = end + (REGIONS.find((region) => region.offset === end)?.length ?? 0);
  }
}

describe.skipIf(lacks('/dev/fuse', 'fio'))('fio with verification while a clone fills', () => {
  const cleanup = createCleanup();

  afterEach(() => cleanup.run());

  async function run(transport: TestTransport): Promise<void> {
    const images = makeTempDir('images', cleanup);
    const source = join(images, 'source');
    makePatternImage(source, { sizeBytes: SIZE_BYTES, seed: 21, isHole: (block) => block % 1000 < 150 });
    const copy = join(images, 'copy');
    await mustRun('cp', ['--sparse=always', source, copy]);
    const sum = await sha256Of(source);
    const daemon = await startTestDaemon({ transport, cleanup });
    const control = createControlClient({ socketPath: daemon.socketPath });
    await control.createContainer('fio', {});
    await importFile(control, source, 'fio/image', true);
    await control.clone({ source: 'fio/image', targets: ['fio/disk'], fill: false, copyOnRead: false });
    const disk = daemon.path('fio/disk');

    // The fill passes through both regions while fio writes there, at a pace that lasts for some seconds.
    await control.fillStart('fio/disk', { rateBytesPerSecond: 16 * MIB });
    const pace = { rw: 'randwrite', rate: '7m' };
    const first = verifying(disk, REGIONS[0], { ...pace, direct: 1, ioengine: 'libaio', iodepth: 16 });
    const second = verifying(disk, REGIONS[1], { ...pace, ioengine: 'psync', fdatasync: 64 });
    await Promise.all([runFio(first, FIO_TIMEOUT_MS), runFio(second, FIO_TIMEOUT_MS)]);
    const during = await control.fillStatus('fio/disk');
    expect(during.doneBytes).toBeGreaterThan(0);
    await compareUntouched(disk, copy);
    await unthrottle();
    await runFio({ ...first, rw: 'randrw' }, FIO_TIMEOUT_MS);
    expect((await filled()).message).toBeNull();

    const info = await control.show('fio/disk');
    expect(info).toMatchObject({ unownedBytes: 0, unownedDataBytes: 0, fault: null });
    expect(info.backingChain.filter((layer) => layer.kind === 'external')).toEqual([]);
    expect(await sha256Of(source)).toBe(sum);
    daemon.assertQuietLog([REFUSED_ON_SOME_KERNELS]);
    renameSync(source, join(images, 'moved-away'));
    await daemon.stop();
    await daemon.start();
    await compareUntouched(disk, copy);
    await runFio({ ...second, verify_only: 1 }, FIO_TIMEOUT_MS);
    await runFio(verifying(disk, REGIONS[0], { rw: 'randrw' }), FIO_TIMEOUT_MS);

    /** Takes the rate away, if the fill has not come to its end meanwhile: that it may do at any moment, also between two requests. */
    async function unthrottle(): Promise<void> {
      try {
        await control.fillResume('fio/disk', { rateBytesPerSecond: null });
      } catch (error) {
        const state = await control.fillStatus('fio/disk');
        if (state.state !== 'completed') throw error;
      }
    }

    async function filled(): Promise<FillInfo> {
      const deadline = Date.now() + FILL_TIMEOUT_MS;
      for (;;) {
        const state = await control.fillStatus('fio/disk');
        if (state.state === 'completed') return state;
        if (state.state !== 'running' || Date.now() > deadline) throw new Error(`the fill did not complete: ${JSON.stringify(state)}`);
        await sleep(100);
      }
    }
  }

  it('is right on the kernel transport', { timeout: 300_000 }, () => run('kernel'));

  it('is right on the fuse-native transport', { timeout: 300_000 }, () => run('fuse-native'));
});
