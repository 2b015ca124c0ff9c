/**
 * Disks of a real mount, shown by a real tgtd of ours and used by real clients: iscsi-ls, iscsi-inq and iscsi-readcapacity16 of libiscsi, QEMU's
 * iscsi driver. On loopback alone.
 */
import { spawn } from 'node:child_process';
import { chmodSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { exportProcessesIn } from '../../daemon/presenter/export-process.js';
import { createIscsiPresenter, targetName } from '../../daemon/presenter/iscsi/iscsi.js';
import type { PresenterPlace } from '../../daemon/presenter/place.js';
import type { Export, Presenter } from '../../daemon/presenter/presenter.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { allocatedBytes, exportOf, freePort, presenterPlace, sha256Of, started } from '../support/exports-fixture.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const DISK_BYTES = 8 * MIB;
const TEST_MS = 120_000;
const [ME, OTHER] = ['iqn.2004-10.com.example:me', 'iqn.2004-10.com.example:other'];
const signal = new AbortController().signal;

describe.skipIf(lacks('/dev/fuse', 'tgtd', 'tgtadm', 'iscsi-ls', 'iscsi-inq', 'qemu-img', 'qemu-io'))('disks shown by iSCSI', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let place: PresenterPlace;
  let presenter: Presenter;
  let image: string;
  let listen: string;
  let number = 0;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    place = presenterPlace('iscsi', daemon, cleanup);
    presenter = started(createIscsiPresenter(place), cleanup);
    image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: DISK_BYTES, seed: 6 });
    listen = `127.0.0.1:${await freePort()}`;
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/base.img']);
  }, TEST_MS);
  afterEach(async () => { await presenter.apply([], { signal }); });
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  /** A clone of the image, of its own. */
  async function diskExport(given: Partial<Export> = {}): Promise<Export> {
    number += 1;
    const name = `vms/d${number}, bstype=null %u.img`;
    await daemon.json(['clone', 'vms/base.img', name]);
    return exportOf(daemon, name, { clients: [ME], sizeBytes: DISK_BYTES, options: { listen }, ...given });
  }

  const show = async (...wanted: Export[]): Promise<readonly string[]> => (await presenter.apply(wanted, { signal })).flatMap(({ addresses }) => addresses);
  const portal = (): string => `iscsi://${listen}/`;
  const targetOf = (shown: Export, initiator = ME, more = ''): string =>
    `driver=raw,file.driver=iscsi,file.transport=tcp,file.portal=${listen},file.target=${targetName(shown)},file.lun=1,file.initiator-name=${initiator}${more}`;
  const qemuIo = async (shown: Export, commands: readonly string[], initiator = ME): Promise<CommandResult> =>
    await command('qemu-io', ['-t', 'none', '-d', 'unmap', '--image-opts', targetOf(shown, initiator), ...commands.flatMap((each) => ['-c', each])]);
  const identity = async (shown: Export): Promise<string> => (await Promise.all([[], ['-e', '1', '-c', '128'], ['-e', '1', '-c', '131']].map(async (page) =>
    (await mustRun('iscsi-inq', ['-i', ME, ...page, `${portal()}${targetName(shown)}/1`])).stdout))).join('\n');

  it('are found, have their size, and an identity that stays over a restart of tgtd', { timeout: TEST_MS }, async () => {
    const [first, second] = [await diskExport(), await diskExport()];
    expect(await show(first, second)).toEqual([first, second].map((each) => `iscsi://${listen}/${targetName(each)}/1`));
    const found = await mustRun('iscsi-ls', ['-s', '-i', ME, portal()]);
    for (const each of [first, second]) expect(found.stdout).toContain(`Target:${targetName(each)} Portal:${listen},1\nLun:0`);
    expect((await mustRun('iscsi-readcapacity16', ['-i', ME, `${portal()}${targetName(first)}/1`])).stdout).toMatch(new RegExp(`LENGTH IN BYTES:512\\n[^]*Total size:${DISK_BYTES}\\n`, 'u'));
    const before = await Promise.all([first, second].map(identity));
    expect(before[0]).toContain(first.uuid);
    expect(before[0]).toContain('OFFSHOOT');
    expect(new Set(before).size).toBe(2);
    for (const server of exportProcessesIn(place.directory)) await server.end({ termMs: 0 });
    expect(await presenter.lost?.([first], { signal })).toContain(listen);
    // In another order, and by a presenter that has never seen the first.
    await createIscsiPresenter(place).apply([second, first], { signal });
    expect(await presenter.lost?.([first], { signal })).toBeNull();
    expect(await Promise.all([first, second].map(identity))).toEqual(before);
  });

  it('hold what QEMU writes over a kill of the server, and then of tgtd, byte for byte', { timeout: TEST_MS }, async () => {
    const shown = await diskExport();
    await show(shown);
    const fresh = join(makeTempDir('image', cleanup), 'fresh.img');
    makePatternImage(fresh, { sizeBytes: DISK_BYTES, seed: 7 });
    const compare = async (): Promise<void> => { expect(await command('qemu-img', ['compare', '--image-opts', `driver=raw,file.filename=${fresh}`, targetOf(shown)])).toMatchObject({ code: 0 }); };
    expect(await command('qemu-img', ['compare', '--image-opts', `driver=raw,file.filename=${image}`, targetOf(shown)])).toMatchObject({ code: 0 });
    await mustRun('qemu-img', ['convert', '-n', '-t', 'none', '-f', 'raw', fresh, '--target-image-opts', targetOf(shown)]);
    await daemon.waitForServer(await daemon.killServer());
    await compare();
    for (const server of exportProcessesIn(place.directory)) await server.end({ termMs: 0 });
    await show(shown);
    await compare();
    expect(await sha256Of(shown.mountPath)).toBe(await sha256Of(fresh));
    expect(await sha256Of(daemon.path('vms/base.img'))).toBe(await sha256Of(image));
  });

  it('let in who is on the list, and nobody else, who finds nothing either', { timeout: TEST_MS }, async () => {
    const [mine, his] = [await diskExport(), await diskExport({ clients: [OTHER] })];
    await show(mine, his);
    const found = await mustRun('iscsi-ls', ['-i', OTHER, portal()]);
    expect(found.stdout).toContain(targetName(his));
    expect(found.stdout).not.toContain(targetName(mine));
    expect(await qemuIo(mine, ['read 0 4k'])).toMatchObject({ code: 0, stdout: expect.stringContaining('read 4096/4096') as string });
    for (const stranger of [OTHER, ME.toUpperCase(), `${ME}2`]) {
      expect(await qemuIo(mine, ['read 0 4k'], stranger)).toMatchObject({ code: 1, stderr: expect.stringMatching(/not found|Failed to log/iu) as string });
    }
  });

  it('are not written to when they are read-only, and the disk is as before', { timeout: TEST_MS }, async () => {
    const shown = await diskExport({ readOnly: true });
    await show(shown);
    const { code, stdout, stderr } = await qemuIo(shown, ['write 0 4k', 'flush']);
    expect([code, `${stdout}${stderr}`]).toEqual([1, expect.stringMatching(/read.only|protected/iu)]);
    expect(await command('qemu-img', ['compare', '--image-opts', `driver=raw,file.filename=${image}`, `${targetOf(shown)},read-only=on`])).toMatchObject({ code: 0 });
    // The same export, from then on written to.
    await show({ ...shown, readOnly: false });
    expect(await qemuIo(shown, ['write -P 1 0 4k', 'flush'])).toMatchObject({ code: 0 });
  });

  it('give back what a client unmaps, as holes of the disk; and read zeros there', { timeout: TEST_MS }, async () => {
    const shown = await diskExport();
    await show(shown);
    expect(await qemuIo(shown, ['write -P 7 0 8M', 'flush'])).toMatchObject({ code: 0 });
    const full = await allocatedBytes(shown.mountPath);
    expect(full).toBeGreaterThanOrEqual(DISK_BYTES);
    expect(await qemuIo(shown, ['discard 0 4M', 'flush', 'read -P 0 0 4M', 'read -P 7 4M 4M'])).toMatchObject({ code: 0 });
    expect(await allocatedBytes(shown.mountPath)).toBe(full - 4 * MIB);
    expect(await qemuIo(shown, ['write -z -u 4M 2M', 'flush', 'read -P 0 0 6M', 'read -P 7 6M 2M'])).toMatchObject({ code: 0 });
    expect(await allocatedBytes(shown.mountPath)).toBe(full - 6 * MIB);
  });

  it('ask for the password where there is one; a new one counts at once, and none of them is ever shown to others', { timeout: TEST_MS }, async () => {
    const passwordFile = join(makeTempDir('secret', cleanup), 'password');
    const secrets = ['first,secret=%s"x', 'second-secret-of-all'] as const;
    writeFileSync(passwordFile, `${secrets[0]}\n`, { mode: 0o600 });
    const options = { listen, account: 'alice', 'password-file': passwordFile };
    const [shown, neighbour] = [await diskExport({ options }), await diskExport({ options })];
    await show(shown, neighbour);
    const without = async (which: Export): Promise<number> => (await qemuIo(which, ['read 0 4k'])).code;
    const withSecret = async (which: Export, password: string): Promise<number> => (await command('qemu-io', [
      '--object', `secret,id=s,data=${password.replaceAll(',', ',,')}`, '--image-opts', targetOf(which, ME, ',file.user=alice,file.password-secret=s'), '-c', 'read 0 4k',
    ])).code;
    expect(await withSecret(shown, secrets[0])).toBe(0);
    expect(await withSecret(shown, secrets[1])).toBe(1);
    expect(await without(shown)).toBe(1);

    writeFileSync(passwordFile, `${secrets[1]}\n`);
    await show(shown, neighbour);
    for (const each of [shown, neighbour]) expect([await withSecret(each, secrets[0]), await withSecret(each, secrets[1]), await without(each)]).toEqual([1, 0, 1]);
    // The account stays with one when the other goes.
    await show(neighbour);
    expect([await withSecret(neighbour, secrets[1]), await without(neighbour)]).toEqual([0, 1]);
    chmodSync(passwordFile, 0o640);
    await expect(show(neighbour)).rejects.toMatchObject({ kind: 'not-permitted', message: expect.stringContaining('chmod 0600') as string });
    expect([await withSecret(neighbour, secrets[1]), await without(neighbour)]).toEqual([0, 1]);
  });

  it('are not disturbed by what happens to others; who comes off the list is sent away', { timeout: TEST_MS }, async () => {
    const [open, other] = [await diskExport({ clients: [ME, OTHER] }), await diskExport()];
    await show(open);
    const client = spawn('qemu-io', ['-t', 'none', '--image-opts', targetOf(open)], { stdio: ['pipe', 'pipe', 'inherit'] });
    cleanup.add(() => { client.kill('SIGKILL'); });
    let said = '';
    client.stdout.on('data', (chunk: Buffer) => { said += chunk.toString(); });
    const ask = async (text: string, answer: string): Promise<void> => {
      client.stdin.write(`${text}\n`);
      expect(await waitUntil(() => said.includes(answer), 30_000), said).toBe(true);
    };
    await ask('write -P 1 0 4k', 'wrote 4096/4096 bytes at offset 0');
    const sessions = async (): Promise<string> => (await mustRun('env', [`TGT_IPC_SOCKET=${join(place.directory, `tgtd-${listen.split(':')[1] ?? ''}`)}`, 'tgtadm', '--lld', 'iscsi', '--op', 'show', '--mode', 'conn', '--tid', String(open.id)])).stdout;
    const before = await sessions();
    expect(await presenter.clientsOf(open, { signal })).toEqual([`${ME} (127.0.0.1)`]);
    await show(other, open);
    await show({ ...open, clients: [ME] });
    await ask('write -P 2 4096 4k', 'wrote 4096/4096 bytes at offset 4096');
    expect(await sessions()).toBe(before);
    await show({ ...open, clients: [OTHER] });
    expect(await presenter.clientsOf(open, { signal })).toEqual([]);
    expect(await qemuIo(open, ['read -P 1 0 4k', 'read -P 2 4k 4k'], OTHER)).toMatchObject({ code: 0 });
  });

  it('are refused as a whole where the port is taken, or the disk is not there, and what was shown is as before', { timeout: TEST_MS }, async () => {
    const shown = await diskExport();
    const taken = createServer();
    await new Promise<void>((resolve) => { taken.listen({ host: '127.0.0.1', port: 0 }, resolve); });
    const { port } = taken.address() as { port: number };
    await show(shown);
    await expect(show(shown, { ...await diskExport(), options: { listen: `127.0.0.1:${port}` } })).rejects.toMatchObject({ kind: 'in-use' });
    taken.close();
    await expect(show(shown, exportOf(daemon, 'vms/none.img', { clients: [ME], options: { listen } }))).rejects.toThrow('cannot be shown');
    expect((await mustRun('iscsi-ls', ['-i', ME, portal()])).stdout.match(/^Target:/gmu)).toHaveLength(1);
    expect(await qemuIo(shown, ['read 0 4k'])).toMatchObject({ code: 0 });
    await presenter.apply([], { signal });
    expect(exportProcessesIn(place.directory)).toEqual([]);
  });

  it('are presented, kept over a kill of the server, an orderly stop and a start, and withdrawn by command', { timeout: TEST_MS }, async () => {
    const other = await startTestDaemon({ transport: 'kernel', cleanup });
    await other.json(['container', 'create', 'vms']);
    await other.json(['import', image, 'vms/a.img']);
    const at = `127.0.0.1:${await freePort()}`;
    const info = await other.json<{ id: number; uuid: string; addresses: string[] }>(['present', 'vms/a.img', '--as', 'iscsi', '--to', ME, '--listen', at]);
    const [url = ''] = info.addresses;
    expect(url).toMatch(new RegExp(`^iscsi://${at}/iqn\\.2026-11\\.offshoot:[0-9a-f-]{36}/1$`, 'u'));
    const inquire = async (): Promise<string> => (await mustRun('iscsi-inq', ['-i', ME, '-e', '1', '-c', '128', url])).stdout;
    const before = await inquire();
    await other.waitForServer(await other.killServer());
    expect(await inquire()).toBe(before);
    await other.stop();
    await other.start();
    expect(await waitUntil(async () => (await command('iscsi-inq', ['-i', ME, url])).code === 0, 30_000)).toBe(true);
    expect(await inquire()).toBe(before);
    expect(await other.json(['exports'])).toMatchObject([{ id: info.id, kind: 'iscsi', clients: [ME], addresses: [url] }]);
    expect((await other.cli(['present', 'vms', '--as', 'iscsi', '--to', ME])).code).not.toBe(0);
    await other.json(['withdraw', 'vms/a.img', '--as', 'iscsi']);
    expect((await command('iscsi-inq', ['-i', ME, url])).code).not.toBe(0);
    await other.stop();
  });
});
