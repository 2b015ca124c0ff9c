/**
 * A real Debian guest boots to multi-user from a clone that is presented by iSCSI, and one from a clone that is presented by NBD, both at once; what they write is in
 * their clones, and not in the image, although Offshoot's server is killed in between.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort, sha256Of } from '../support/exports-fixture.js';
import { guestImage, GUEST_READY_LINE, type GuestImage } from '../support/guest-image.js';
import { command } from '../support/model/command.js';
import { bootGuest, type Guest } from '../support/qemu.js';
import { createCleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const BOOT_MS = 240_000;
const TEST_MS = 480_000;
const LONG = { timeoutMs: 120_000 };
const ME = 'iqn.2004-10.com.example:guest';
const NAMES = ['iscsi', 'nbd'] as const;
/** What a guest writes besides its mark: more than the journal of its file system would hold. */
const MIB_WRITTEN = 24;

describe.skipIf(lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'tgtd', 'nbdkit', 'debugfs', 'e2fsck'))('machines boot from', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let image: GuestImage;
  let imageSum: string;

  beforeAll(async () => {
    image = await guestImage();
    imageSum = await sha256Of(image.disk);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image.disk, 'vms/base.img', '--in-place']);
    await daemon.json(['clone', 'vms/base.img', 'vms/iscsi.img', 'vms/nbd.img']);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('a LUN of iSCSI and an export of NBD, at once, to multi-user; and keep what they write', { timeout: TEST_MS }, async () => {
    const listen = `127.0.0.1:${await freePort()}`;
    const [lun, nbd] = [
      await daemon.json<ExportInfo>(['present', 'vms/iscsi.img', '--as', 'iscsi', '--to', ME, '--listen', listen]),
      await daemon.json<ExportInfo>(['present', 'vms/nbd.img', '--as', 'nbd', '--to', '127.0.0.1']),
    ];
    const guests: readonly (readonly [(typeof NAMES)[number], Guest])[] = [
      ['iscsi', bootGuest({ image, cleanup, disk: { driver: 'iscsi', transport: 'tcp', portal: listen, target: `iqn.2026-11.offshoot:${lun.uuid}`, lun: 1, 'initiator-name': ME } })],
      ['nbd', bootGuest({ image, cleanup, disk: { driver: 'nbd', 'server.type': 'inet', 'server.host': '127.0.0.1', 'server.port': new URL(nbd.addresses[0] ?? '').port, export: nbd.path } })],
    ];
    const agents = await Promise.all(guests.map(async ([, guest]) => {
      await guest.waitForSerial(GUEST_READY_LINE, BOOT_MS);
      return await guest.agent();
    }));
    const sums = await Promise.all(guests.map(async ([name], index) => {
      const agent = agents[index]!;
      expect(await agent.run(`systemctl is-active multi-user.target && echo from-${name} >/root/mark && sync`)).toMatchObject({ code: 0, stdout: 'active\n' });
      return await agent.run(`dd if=/dev/urandom of=/root/data bs=1M count=${MIB_WRITTEN} status=none && sync && sha256sum </root/data`);
    }));
    expect((await daemon.json<ExportInfo[]>(['exports'])).map(({ connected }) => connected)).toEqual([[`${ME} (127.0.0.1)`], ['127.0.0.1']]);
    expect((await daemon.cli(['withdraw', 'vms/nbd.img', '--json'])).stderr).toContain('127.0.0.1');
    await daemon.waitForServer(await daemon.killServer(), BOOT_MS);
    await Promise.all(guests.map(async ([name, guest], index) => {
      const agent = agents[index]!;
      // Back from the disk, and not from the guest's memory.
      expect(await agent.run('echo 3 >/proc/sys/vm/drop_caches && cat /root/mark && sha256sum </root/data')).toMatchObject({ code: 0, stdout: `from-${name}\n${sums[index]?.stdout ?? ''}` });
      await guest.powerOff(agent);
    }));
    for (const { id } of await daemon.json<ExportInfo[]>(['exports'])) await daemon.json(['withdraw', String(id), '--force']);

    for (const [index, name] of NAMES.entries()) {
      const disk = daemon.path(`vms/${name}.img`);
      expect(await command('e2fsck', ['-f', '-n', disk], LONG), name).toMatchObject({ code: 0 });
      expect(await inGuest(disk, '/root/mark')).toBe(`from-${name}\n`);
      expect(await command('sh', ['-c', 'debugfs -R "cat /root/data" "$1" 2>/dev/null | sha256sum', 'sh', disk], LONG)).toMatchObject({ code: 0, stdout: sums[index]?.stdout });
    }
    expect(await inGuest(daemon.path('vms/base.img'), '/root/mark')).toBe('');
    expect(await sha256Of(image.disk)).toBe(imageSum);
    await daemon.stop();
  });

  /** A file of the guest's, from its disk alone: nothing is mounted. */
  async function inGuest(disk: string, file: string): Promise<string> { return (await command('debugfs', ['-R', `cat ${file}`, disk], LONG)).stdout; }
});

