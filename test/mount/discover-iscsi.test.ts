/**
 * `offshoot discover --iscsi` with the real iscsiadm of open-iscsi, against targets of a real tgtd. Where the kernel has no iSCSI driver the program is called all the same, and
 * what it refuses is said with what to do; where it has one, the targets are found.
 */
import { existsSync } from 'node:fs';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DiscoverResult, ExportInfo } from '../../daemon/control/export-schemas.js';
import { targetsIn } from '../../daemon/presenter/iscsi/initiator.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { command, mustRun } from '../support/model/command.js';
import { createCleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const TEST_MS = 120_000;
/** open-iscsi's own name, which the discovery says. */
const NAMES = '/etc/iscsi/initiatorname.iscsi';

describe.skipIf(lacks('/dev/fuse', 'iscsiadm', 'tgtd', 'iscsi-ls', NAMES))('this host\'s initiator, told to look again', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let listen: string;
  let target: string;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'vms']);
    await mustRun('truncate', ['-s', '8M', '--', daemon.path('vms/a.img')]);
    listen = `127.0.0.1:${await freePort()}`;
    const me = /^InitiatorName=(.*)$/mu.exec((await mustRun('cat', [NAMES])).stdout)?.[1] ?? '';
    const { uuid } = await daemon.json<ExportInfo>(['present', 'vms/a.img', '--as', 'iscsi', '--to', me, '--listen', listen]);
    target = `iqn.2026-11.offshoot:${uuid}`;
    // Whoever looks with that name finds it, by a client that needs no kernel.
    expect((await mustRun('iscsi-ls', ['-i', me, `iscsi://${listen}/`])).stdout).toContain(target);
  }, TEST_MS);
  afterAll(async () => {
    // What shows exports outlives a daemon that is killed.
    for (const { id } of await daemon.json<ExportInfo[]>(['exports'])) await daemon.json(['withdraw', String(id), '--force']);
    await cleanup.run();
  }, TEST_MS);

  it('finds the targets, or says what it lacks and what to do', async () => {
    const loaded = await command('modprobe', ['iscsi_tcp']);
    const result = await daemon.cli(['discover', '--iscsi', listen, '--json'], { timeoutMs: TEST_MS });
    if (loaded.code === 0 || existsSync('/sys/class/iscsi_transport/tcp')) {
      if (result.code === 0) expect((JSON.parse(result.stdout) as DiscoverResult).found).toEqual([target]);
      else expect(result.stderr).toContain('iscsid does not run');
      return;
    }
    expect([result.code, JSON.parse(result.stderr)]).toEqual([8, { error: expect.objectContaining({ kind: 'not-supported', message: expect.stringMatching(/no iSCSI driver \(modprobe iscsi_tcp\).*iscsiadm: .*driver not found/u) as string }) as object }]);
    expect((await daemon.json<ExportInfo[]>(['exports']))[0]).toMatchObject({ state: 'shown' });
  }, TEST_MS);

  it('is not given what it would take for an option, or for a line of its own', async () => {
    for (const portal of ['--help', '-d8', '127.0.0.1\n--op=delete', '']) {
      const { code, stderr } = await daemon.cli(['discover', `--iscsi=${portal}`, '--json']);
      expect([code, stderr], portal).toEqual([2, expect.stringContaining('portal')]);
    }
  }, TEST_MS);

  it('is understood in what it prints, each target once', () => {
    expect(targetsIn(`192.0.2.1:3260,1 ${target}\n[2001:db8::1]:3260,1 ${target}\n192.0.2.1:3260,1 iqn.2004-10.com.example:b\niscsiadm: a warning\n`)).toEqual([target, 'iqn.2004-10.com.example:b']);
    expect(targetsIn('')).toEqual([]);
  });
});
