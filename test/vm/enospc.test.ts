/**
 * A store that fills up under a running virtual machine: QEMU gets ENOSPC, pauses the guest and says so; when there is room again the
 * guest goes on as if nothing had been, and what it wrote is right.
 *
 * QEMU runs as an ordinary user that owns the guest's disk and nothing else under the mount.
 */
import { chmodSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DiskInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import type { GuestAgent } from '../support/guest-agent.js';
import { GUEST_READY_LINE, guestImage } from '../support/guest-image.js';
import { makePatternImage, sha256Of } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { bootGuest, type Guest } from '../support/qemu.js';
import { connectQmp, type Qmp } from '../support/qmp.js';
import { makeSmallStore, type SmallStore } from '../support/small-store.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const GUEST_UID = 73_100;
const DISK = 'vms/guest.img';
const STORE_MIB = 200;
const BALLAST_MIB = 120;
const WRITTEN_MIB = 96;
const BOOT_TIMEOUT_MS = 120_000;
const PAUSE_TIMEOUT_MS = 90_000;
const WRITE_TIMEOUT_MS = 120_000;

describe.skipIf(lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'e2fsck', 'debugfs', 'mkfs.ext4', 'setpriv'))('a virtual machine whose store fills up', () => {
  const cleanup = createCleanup();
  let small: SmallStore;
  let daemon: TestDaemon;
  let guest: Guest;
  let agent: GuestAgent;
  let qmp: Qmp;
  let writing: ReturnType<GuestAgent['run']>;

  beforeAll(async () => {
    const image = await guestImage();
    small = await makeSmallStore('ext4', STORE_MIB, 0, cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: small.storeDir });
    chmodSync(dirname(daemon.mountDir), 0o711);
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image.disk, 'vms/debian.img', '--in-place']);
    await daemon.json(['clone', 'vms/debian.img', DISK, 'vms/foreign.img']);
    const ballast = join(makeTempDir('ballast', cleanup), 'ballast');
    makePatternImage(ballast, { sizeBytes: BALLAST_MIB * MIB, seed: 5 });
    await daemon.json(['import', ballast, 'vms/ballast.img']);
    await mustRun('chown', [`${GUEST_UID}:${GUEST_UID}`, daemon.path(DISK)]);
    guest = bootGuest({ image, disk: daemon.path(DISK), cache: 'none', cleanup, onWriteError: 'enospc', uid: GUEST_UID });
    await guest.waitForSerial(GUEST_READY_LINE, BOOT_TIMEOUT_MS);
    agent = await guest.agent();
    qmp = await connectQmp(guest.qmpSocket);
    cleanup.add(() => { qmp.close(); });
  });
  afterAll(() => cleanup.run());

  const status = async (): Promise<string> => (await qmp.execute<{ readonly status: string }>('query-status')).status;

  it('runs as a user that can open its own disk, and no other', async () => {
    expect(statSync(daemon.path(DISK))).toMatchObject({ uid: GUEST_UID });
    expect(statSync(daemon.path(DISK)).mode & 0o777).toBe(0o600);
    const other = await command('setpriv', [
      `--reuid=${GUEST_UID}`, `--regid=${GUEST_UID}`, '--clear-groups', 'qemu-system-x86_64', '-nodefaults', '-machine', 'none', '-display', 'none',
      '-drive', `file=${daemon.path('vms/foreign.img')},if=none,format=raw,cache=none`,
    ]);
    expect(other.code).not.toBe(0);
    expect(other.stderr).toMatch(/Permission denied/u);
    expect(await status()).toBe('running');
  });

  it('is paused when there is no room for what it writes, and QEMU says why', async () => {
    writing = agent.run(`dd if=/dev/zero bs=1M count=${WRITTEN_MIB} 2>/dev/null | tr '\\0' 'x' > /root/written && sync && sha256sum < /root/written`, WRITE_TIMEOUT_MS + PAUSE_TIMEOUT_MS);
    // Whoever waits for it is told when it is awaited.
    writing.catch(() => undefined);
    expect((await qmp.waitForEvent('BLOCK_IO_ERROR', PAUSE_TIMEOUT_MS)).data).toMatchObject({ operation: 'write', action: 'stop', nospace: true });
    await qmp.waitForEvent('STOP', PAUSE_TIMEOUT_MS);
    expect(await status()).toBe('io-error');
    await expect.poll(async () => (await daemon.status()).spaceLevel, { timeout: 20_000 }).toBe('full');
    expect((await daemon.status()).warnings.join()).toMatch(/virsh resume, or cont/u);
    expect((await daemon.json<DiskInfo>(['show', DISK])).fault).toBeNull();
  });

  it('is paused again when it goes on and there is still no room', async () => {
    const before = qmp.events.filter(({ event }) => event === 'STOP').length;
    await qmp.execute('cont');
    await qmp.waitForEvent('STOP', PAUSE_TIMEOUT_MS, before + 1);
    expect(await status()).toBe('io-error');
  });

  it('goes on when room was made, and has lost nothing', async () => {
    await daemon.json(['rm', 'vms/ballast.img']);
    await expect.poll(async () => (await daemon.status()).spaceLevel, { timeout: 20_000 }).not.toBe('full');
    await qmp.execute('cont');
    const written = await writing;
    expect(written).toMatchObject({ code: 0 });
    expect(written.stdout.slice(0, 64)).toBe((await mustRun('sh', ['-c', `dd if=/dev/zero bs=1M count=${WRITTEN_MIB} 2>/dev/null | tr '\\0' x | sha256sum`])).stdout.slice(0, 64));
    expect(await status()).toBe('running');
    expect(await agent.run('dmesg | grep -ciE "i/o error|ext4-fs error|remounting" || true')).toMatchObject({ stdout: '0\n' });
    await guest.powerOff(agent);
    expect(await command('e2fsck', ['-f', '-n', daemon.path(DISK)], { timeoutMs: 120_000 })).toMatchObject({ code: 0 });
    const copy = join(makeTempDir('dump', cleanup), 'written');
    await mustRun('debugfs', ['-R', `dump /root/written ${copy}`, daemon.path(DISK)], { timeoutMs: 120_000 });
    expect(await sha256Of(copy)).toBe(written.stdout.slice(0, 64));
  });

  it('has met no other error', async () => {
    await daemon.stop();
    // The database's own file grows at a checkpoint, for which there may be no room for a while: that one is tried again.
    daemon.assertQuietLog([/a commit failed; it is tried again/u, /"spaceLevel":/u, /the store is full/u, /the store has room again/u]);
  });
});
