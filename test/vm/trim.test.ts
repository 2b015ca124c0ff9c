/**
 * TRIM and limits with a real virtual machine: what fstrim in the guest gives up, the store's file system has back when fstrim returns; a guest whose
 * container reaches its limit is paused by QEMU as on a full store, while others write on, and goes on when the limit was raised.
 */
import { constants, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DiskInfo } from '../../daemon/control/schemas.js';
import type { QuotaInfo } from '../../daemon/control/space-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import type { GuestAgent } from '../support/guest-agent.js';
import { GUEST_READY_LINE, guestImage } from '../support/guest-image.js';
import { command } from '../support/model/command.js';
import { FileAgent } from '../support/model/file-agent.js';
import { patternBytes } from '../support/model/pattern.js';
import { bootGuest, type Guest } from '../support/qemu.js';
import { connectQmp, type Qmp } from '../support/qmp.js';
import { createCleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const DISK = 'vms/guest.img';
const WRITTEN_MIB = 96;
const LONG_MS = 120_000;

describe.skipIf(lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'e2fsck'))('a virtual machine', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let guest: Guest;
  let agent: GuestAgent;
  let qmp: Qmp;
  let layers: string;

  beforeAll(async () => {
    const image = await guestImage();
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    layers = join((await daemon.status()).storeDir, 'layers');
    for (const name of ['vms', 'other']) await daemon.json(['container', 'create', name]);
    await daemon.json(['import', image.disk, 'vms/debian.img', '--in-place']);
    await daemon.json(['clone', 'vms/debian.img', DISK, 'other/neighbour.img']);
    guest = bootGuest({ image, disk: daemon.path(DISK), cache: 'none', discard: 'unmap', cleanup, onWriteError: 'enospc' });
    await guest.waitForSerial(GUEST_READY_LINE, LONG_MS);
    agent = await guest.agent();
    qmp = await connectQmp(guest.qmpSocket);
    cleanup.add(() => { qmp.close(); });
  });
  afterAll(() => cleanup.run());

  /** What du says of the data file of the guest's layer. */
  const du = async (): Promise<number> => {
    const id = (await daemon.json<DiskInfo>(['show', DISK])).backingChain[0]!.layerId;
    return statSync(join(layers, (id % 256).toString(16).padStart(2, '0'), `${id}.layer`)).blocks * 512;
  };
  const inGuest = async (shell: string): Promise<string> => {
    const result = await agent.run(shell, LONG_MS);
    expect(result).toMatchObject({ code: 0 });
    return result.stdout;
  };

  it('gives space back to the store with fstrim, by the time that fstrim returns', async () => {
    // What was never written is trimmed first, so that only the file's blocks are in question.
    await inGuest('fstrim /');
    const before = await du();
    await inGuest(`dd if=/dev/urandom of=/root/written bs=1M count=${WRITTEN_MIB} 2>/dev/null && sync`);
    const full = await du();
    expect(full - before).toBeGreaterThan((WRITTEN_MIB - 1) * MIB);
    await inGuest('rm /root/written && sync && fstrim -v /');
    const after = await du();
    expect(full - after).toBeGreaterThan((WRITTEN_MIB - 8) * MIB);
    process.stdout.write(`du of the layer: ${before} before, ${full} with the file, ${after} after fstrim\n`);
  });

  it('is paused at the limit of its container, while others write, and goes on when it is raised', async () => {
    const used = (await daemon.json<QuotaInfo>(['quota', 'set', 'vms', '1T'])).usedBytes;
    await daemon.json(['quota', 'set', 'vms', String(used + 24 * MIB)]);
    const writing = agent.run('dd if=/dev/urandom of=/root/more bs=1M count=64 2>/dev/null && sync && sha256sum < /root/more', 2 * LONG_MS);
    writing.catch(() => undefined);
    expect((await qmp.waitForEvent('BLOCK_IO_ERROR', LONG_MS)).data).toMatchObject({ operation: 'write', action: 'stop', nospace: true });
    await qmp.waitForEvent('STOP', LONG_MS);
    expect(await du()).toBeLessThanOrEqual(used + 24 * MIB);
    await expect.poll(async () => (await daemon.json<QuotaInfo[]>(['quota', 'ls']))[0]?.isReached, { timeout: 20_000 }).toBe(true);
    const files = await FileAgent.start();
    const neighbour = await files.call('open', daemon.path('other/neighbour.img'), constants.O_RDWR, 0);
    for (let n = 0; n < 32; n += 1) await files.call('pwrite', neighbour, patternBytes(1, n, MIB), n * MIB);
    await files.call('close', neighbour);
    await files.stop();

    await daemon.json(['quota', 'set', 'vms', String(used + 512 * MIB)]);
    await qmp.execute('cont');
    const written = await writing;
    expect(written).toMatchObject({ code: 0 });
    expect(await inGuest('echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/more')).toBe(written.stdout);
    expect(await agent.run('dmesg | grep -ciE "i/o error|ext4-fs error|remounting" || true')).toMatchObject({ stdout: '0\n' });
  });

  it('leaves a clean file system, and a quiet log', async () => {
    await guest.powerOff(agent);
    expect(await command('e2fsck', ['-f', '-n', daemon.path(DISK)], { timeoutMs: LONG_MS })).toMatchObject({ code: 0 });
    await daemon.stop();
    daemon.assertQuietLog([/the limit of a container is reached/u, /there is room below the limit/u]);
  });
});
