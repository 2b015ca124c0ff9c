/**
 * A running virtual machine over the end of its disk's server: killed, and replaced by another build, while the guest writes.
 *
 * The guest must not see one I/O error, its file system must be clean afterwards, and hold what it wrote.
 */
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { GUEST_READY_LINE, guestImage, type GuestImage } from '../support/guest-image.js';
import { sha256Of } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { makeBuild } from '../support/other-build.js';
import { bootGuest } from '../support/qemu.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const CLONE = 'vms/guest.img';
const TIMEOUT_MS = 120_000;

describe.skipIf(lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'e2fsck', 'debugfs'))('a virtual machine whose server dies', () => {
  const cleanup = createCleanup();
  let image: GuestImage;
  let daemon: TestDaemon;
  beforeAll(async () => {
    image = await guestImage();
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image.disk, 'vms/debian.img']);
    await daemon.json(['clone', 'vms/debian.img', CLONE]);
  });
  afterAll(async () => { await cleanup.run(); });

  it('goes on writing over a kill, an upgrade and another kill, and powers off with a clean file system', async () => {
    const guest = bootGuest({ image, disk: daemon.path(CLONE), cache: 'none', cleanup });
    await guest.waitForSerial(GUEST_READY_LINE, TIMEOUT_MS);
    const agent = await guest.agent();
    await agent.run('nohup sh -c \'i=0; while test ! -e /run/enough; do dd if=/dev/urandom of=/root/part-$((i % 8)) bs=64k count=16 conv=fsync 2>>/root/errors || echo failed >> /root/errors; i=$((i + 1)); echo $i > /root/rounds; done; touch /run/done\' >/dev/null 2>&1 &');
    await daemon.waitForServer(await daemon.killServer());
    await sleep(1000);
    const { cliEntry } = makeBuild('9.5.0', cleanup);
    const upgrade = await command(process.execPath, [cliEntry, 'daemon', 'upgrade', '--json', '--socket', daemon.socketPath], { timeoutMs: TIMEOUT_MS });
    expect(upgrade).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(upgrade.stdout)).toMatchObject({ upgraded: true, toVersion: '9.5.0' });
    await sleep(1000);
    await daemon.waitForServer(await daemon.killServer());
    await sleep(1000);

    const end = await agent.run('touch /run/enough; while test ! -e /run/done; do sleep 0.1; done; grep -c failed /root/errors; cat /root/rounds; dmesg | grep -ciE "I/O error|EXT4-fs error|Remounting filesystem read-only"; sync; cat /root/part-* | sha256sum', TIMEOUT_MS);
    const [failed, rounds, complaints, sum] = end.stdout.split('\n');
    expect([failed, complaints]).toEqual(['0', '0']);
    expect(Number(rounds)).toBeGreaterThan(1);
    const parts = Math.min(8, Number(rounds));
    await guest.powerOff(agent);
    expect(await command('e2fsck', ['-f', '-n', daemon.path(CLONE)], { timeoutMs: TIMEOUT_MS })).toMatchObject({ code: 0 });
    const directory = makeTempDir('dump', cleanup);
    for (let part = 0; part < parts; part += 1) {
      await mustRun('debugfs', ['-R', `dump /root/part-${part} ${join(directory, `part-${part}`)}`, daemon.path(CLONE)], { timeoutMs: TIMEOUT_MS });
    }
    const whole = join(directory, 'whole');
    await mustRun('sh', ['-c', 'cat "$0"/part-* > "$1"', directory, whole]);
    expect(await sha256Of(whole)).toBe(sum?.slice(0, 64));
    expect(await daemon.status()).toMatchObject({ version: '9.5.0', restarts: 3 });
    await daemon.stop();
  });
});
