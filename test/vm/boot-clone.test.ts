/**
 * The main job, with a real virtual machine: a Debian image is imported and cloned, and the clone boots at once, while it
 * owns nothing; it fills itself while the guest runs, writes, syncs and powers off.
 *
 * What must hold afterwards: the guest's file system is clean, what the guest wrote is there, as seen from outside, and neither
 * the file that was imported nor the disk that was cloned has changed.
 */
import { statSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { CloneResult, DiskInfo, FillInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { GUEST_READY_LINE, guestImage, type GuestImage } from '../support/guest-image.js';
import { sha256Of } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { bootGuest, type Guest } from '../support/qemu.js';
import type { GuestAgent } from '../support/guest-agent.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const SOURCE = 'vms/debian.img';
const CLONE = 'vms/guest.img';
const BOOT_TIMEOUT_MS = 120_000;
const FSCK_TIMEOUT_MS = 120_000;
const FILL_TIMEOUT_MS = 180_000;
/** Slow enough for the fill to be at work from before the guest's boot to after its writes. */
const FILL_RATE_WHILE_BOOTING = '8M';
const WRITTEN_MIB = 24;

describe.skipIf(lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'e2fsck', 'debugfs'))('a virtual machine on a clone', () => {
  const cleanup = createCleanup();
  let image: GuestImage;
  let daemon: TestDaemon;
  let sourceSum: string;
  let guest: Guest;
  let agent: GuestAgent;
  /** Of the file that the guest writes, as the guest sums it up. */
  let writtenSum: string;

  beforeAll(async () => {
    image = await guestImage();
    sourceSum = await sha256Of(image.disk);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'vms']);
  });
  afterAll(async () => { await cleanup.run(); });

  const show = async (path: string): Promise<DiskInfo> => await daemon.json<DiskInfo>(['show', path]);

  it('is imported and cloned, and the clone owns nothing', async () => {
    await daemon.json(['import', image.disk, SOURCE]);
    const { clones } = await daemon.json<CloneResult>(['clone', SOURCE, CLONE]);
    const sizeBytes = statSync(image.disk).size;
    expect(clones).toEqual([{ path: CLONE, sizeBytes, mountPath: daemon.path(CLONE) }]);
    expect(await show(CLONE)).toMatchObject({ sizeBytes, ownedBytes: 0, unownedBytes: sizeBytes, fill: null, openCount: 0 });
  });

  it('boots at once from the clone, which fills at the same time', async () => {
    await daemon.json(['fill', 'start', CLONE, '--rate', FILL_RATE_WHILE_BOOTING]);
    guest = bootGuest({ image, disk: daemon.path(CLONE), cache: 'none', cleanup });
    await guest.waitForSerial(GUEST_READY_LINE, BOOT_TIMEOUT_MS);
    agent = await guest.agent();
    const state = await show(CLONE);
    expect(state.openCount).toBeGreaterThan(0);
    expect(state.fill?.state).toBe('running');
    expect(state.ownedBytes).toBeGreaterThan(0);
    expect(state.unownedDataBytes).toBeGreaterThan(0);
  });

  it('keeps what the guest writes while the fill goes on to its end', async () => {
    const write = await agent.run(`dd if=/dev/urandom of=/root/written bs=1M count=${WRITTEN_MIB} && sync && sha256sum < /root/written`);
    expect(write).toMatchObject({ code: 0 });
    writtenSum = write.stdout.slice(0, 64);
    expect(writtenSum).toMatch(/^[0-9a-f]{64}$/u);
    expect((await daemon.json<FillInfo>(['fill', 'status', CLONE])).state).toBe('running');

    await daemon.json(['fill', 'resume', CLONE, '--rate', 'unlimited']);
    const wait = await daemon.cli(['fill', 'wait', CLONE, '--json'], { timeoutMs: FILL_TIMEOUT_MS });
    expect(wait).toMatchObject({ code: 0 });
    expect(JSON.parse(wait.stdout)).toMatchObject({ path: CLONE, state: 'completed' });
    expect(await show(CLONE)).toMatchObject({ unownedDataBytes: 0 });

    // Caches dropped, so that the guest reads what the clone has, and the packages' own sums prove what the fill has copied.
    const reread = await agent.run('echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/written; cd / && md5sum --quiet -c /var/lib/dpkg/info/libc-bin.md5sums');
    expect(reread).toMatchObject({ code: 0 });
    expect(reread.stdout.slice(0, 64)).toBe(writtenSum);
  });

  it('leaves a clean file system, with what was written, when it has powered off', async () => {
    await guest.powerOff(agent);
    const check = await command('e2fsck', ['-f', '-n', daemon.path(CLONE)], { timeoutMs: FSCK_TIMEOUT_MS });
    expect(check).toMatchObject({ code: 0 });
    const copy = join(makeTempDir('dump', cleanup), 'written');
    await mustRun('debugfs', ['-R', `dump /root/written ${copy}`, daemon.path(CLONE)], { timeoutMs: FSCK_TIMEOUT_MS });
    expect(await sha256Of(copy)).toBe(writtenSum);
    expect(await show(CLONE)).toMatchObject({ openCount: 0, fault: null });
  });

  it('has changed neither the file that was imported nor the disk that was cloned', async () => {
    expect(await sha256Of(image.disk)).toBe(sourceSum);
    expect(await sha256Of(daemon.path(SOURCE))).toBe(sourceSum);
  });

  it('stops in order, without a warning in the log', async () => {
    await daemon.stop();
    daemon.assertQuietLog();
  });
});
