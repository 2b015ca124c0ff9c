/**
 * Exports of one daemon over iSCSI and SMB, with clients that are in the middle of something: Offshoot's server, tgtd and smbd are killed, what is in use is withdrawn. NBD is
 * in exports-nbd.test.ts, NFS in exports-nfs.test.ts.
 */
import { spawn } from 'node:child_process';
import { chmodSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort, sha256Of } from '../support/exports-fixture.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { argumentsOf, isAlive, processesNaming, signalProcess, waitUntil, waitUntilGone } from '../support/processes.js';
import { startQemuIo, type QemuIo } from '../support/qemu-io.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const DISK_BYTES = 16 * MIB;
const PIECE_BYTES = 128 * 1024;
const TEST_MS = 230_000;
const LONG = { timeoutMs: 120_000 };
const [ME, OTHER] = ['iqn.2004-10.com.example:me', 'iqn.2004-10.com.example:other'];
/** Of Debian's base. */
const USER = 'games';

describe.skipIf(lacks('/dev/fuse', 'tgtd', 'iscsi-ls', 'qemu-io', 'smbd', 'smbclient'))('exports in use', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let runtimeDir: string;
  let work: string;
  let image: string;
  let passwordFile: string;
  let number = 0;

  beforeAll(async () => {
    runtimeDir = makeTmpfsDir('kept', cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_RUNTIME_DIR: runtimeDir } });
    // Users have to get through to the mount.
    chmodSync(dirname(daemon.mountDir), 0o711);
    work = makeTempDir('kept', cleanup);
    image = join(work, 'source.img');
    makePatternImage(image, { sizeBytes: DISK_BYTES, seed: 12 });
    passwordFile = join(work, 'passwords');
    writeFileSync(passwordFile, `${USER}:a-password\n`, { mode: 0o600 });
    writeFileSync(join(work, 'auth'), `username=${USER}\npassword=a-password\n`, { mode: 0o600 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/base.img']);
  }, TEST_MS);
  afterEach(async () => { for (const { id } of await exports()) await daemon.json(['withdraw', String(id), '--force']); });
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  const exports = async (): Promise<readonly ExportInfo[]> => await daemon.json<ExportInfo[]>(['exports']);
  /** Of the program that shows it, the parent of all that serve clients. */
  const serverOf = (text: string): number => {
    const [found, ...more] = processesNaming(runtimeDir).filter((pid) => isAlive(pid) && argumentsOf(pid).includes(text) && readFileSync(`/proc/${pid}/stat`, 'utf8').split(' ')[5] === String(pid));
    if (found === undefined || more.length > 0) throw new Error(`${more.length + (found === undefined ? 0 : 1)} processes are called ${text}`);
    return found;
  };

  interface Lun { readonly info: ExportInfo; readonly disk: string; readonly at: string; readonly options: (initiator?: string) => string }

  async function presentLun(disk = `vms/lun${(number += 1)}.img`, at?: string): Promise<Lun> {
    if ((await daemon.cli(['show', disk])).code !== 0) await daemon.json(['clone', 'vms/base.img', disk]);
    const listen = at ?? `127.0.0.1:${await freePort()}`;
    const info = await daemon.json<ExportInfo>(['present', disk, '--as', 'iscsi', '--to', ME, '--listen', listen]);
    const options = (initiator = ME): string =>
      `driver=raw,file.driver=iscsi,file.transport=tcp,file.portal=${listen},file.target=iqn.2026-11.offshoot:${info.uuid},file.lun=1,file.initiator-name=${initiator}`;
    return { info, disk, at: listen, options };
  }

  interface Share { readonly info: ExportInfo; readonly container: string; readonly port: number; readonly name: string }

  async function presentShare(): Promise<Share> {
    number += 1;
    const container = `share${number}`;
    await daemon.json(['container', 'create', container]);
    await mustRun('chown', [USER, '--', daemon.path(container)]);
    const port = await freePort();
    const info = await daemon.json<ExportInfo>(['present', container, '--as', 'smb', '--to', USER, '--listen', `127.0.0.1:${port}`, '--option', `password-file=${passwordFile}`]);
    return { info, container, port, name: container };
  }

  const smbArguments = ({ port, name }: Share): readonly string[] => ['-s', '/dev/null', '-A', join(work, 'auth'), '-p', String(port), `//127.0.0.1/${name}`];
  const smb = async (share: Share, commands: string): Promise<CommandResult> => await command('smbclient', [...smbArguments(share), '-c', commands], { ...LONG, cwd: work });

  /** Writes one piece after the other till it is told to stop; gives how many. */
  function writing(client: QemuIo): { stop(): Promise<number> } {
    const asked = new AbortController();
    const done = (async () => {
      let piece = 0;
      for (; !asked.signal.aborted && piece < DISK_BYTES / PIECE_BYTES; piece += 1) {
        await client.ask(`write -P ${piece % 250 + 1} ${piece * PIECE_BYTES} ${PIECE_BYTES}`);
        if (piece % 8 === 7) await client.ask('flush');
      }
      return piece;
    })();
    done.catch(() => undefined);
    return { stop: async () => { asked.abort(); return await done; } };
  }

  it('a LUN is written on while Offshoot\'s server is killed, and then tgtd: the client goes on, and nothing that it wrote is lost', async () => {
    const lun = await presentLun();
    const client = startQemuIo(lun.options(), cleanup);
    const load = writing(client);
    for (let kills = 0; kills < 2; kills += 1) await daemon.waitForServer(await daemon.killServer(), TEST_MS);
    // What dies before the new server has found it again is shown again, and is no loss that it saw.
    expect(await waitUntil(async () => (await exports())[0]?.state === 'shown', 60_000)).toBe(true);
    const tgtd = serverOf('tgtd --foreground');
    signalProcess(tgtd, 'SIGKILL');
    expect(await waitUntilGone(tgtd, 20_000)).toBe(true);
    expect(await waitUntil(async () => (await exports())[0]?.losses === 1, 60_000)).toBe(true);
    const pieces = await load.stop();
    expect(pieces).toBeGreaterThan(3);
    await client.ask('flush');
    for (let piece = 0; piece < pieces; piece += 1) await client.ask(`read -P ${piece % 250 + 1} ${piece * PIECE_BYTES} ${PIECE_BYTES}`);
    await client.kill();
    const wanted = join(work, 'wanted');
    await mustRun('cp', ['--', image, wanted]);
    const local = startQemuIo(`driver=raw,file.driver=file,file.filename=${wanted}`, cleanup);
    for (let piece = 0; piece < pieces; piece += 1) await local.ask(`write -P ${piece % 250 + 1} ${piece * PIECE_BYTES} ${PIECE_BYTES}`);
    await local.ask('flush');
    expect(await sha256Of(daemon.path(lun.disk))).toBe(await sha256Of(wanted));
    expect((await exports())[0]).toMatchObject({ state: 'shown', uuid: lun.info.uuid, addresses: lun.info.addresses, losses: 1 });
  }, TEST_MS);

  it('a LUN that a client has is neither withdrawn nor ended by a stop, which name the client, and with --force he is cut off; another of the same server goes on', async () => {
    const [lun, other] = [await presentLun(), await presentLun()];
    const shared = await presentLun(undefined, other.at);
    const [client, neighbour] = [startQemuIo(lun.options(), cleanup), startQemuIo(other.options(), cleanup)];
    for (const each of [client, neighbour]) await each.ask('write -P 1 0 4k');
    const refusal = await daemon.cli(['withdraw', lun.disk, '--json']);
    expect([refusal.code, refusal.stderr]).toEqual([expect.any(Number), expect.stringContaining(`${ME} (127.0.0.1)`)]);
    expect(refusal.code).not.toBe(0);
    expect((await daemon.cli(['daemon', 'stop', '--json'])).stderr).toContain(ME);
    await client.ask('write -P 2 0 4k');
    // One disk is one target with one LUN: its neighbour goes without it noticing.
    await daemon.json(['withdraw', shared.disk]);
    expect((await mustRun('iscsi-ls', ['-s', '-i', ME, `iscsi://${other.at}/`])).stdout.match(/^(?:Target|Lun):/gmu)).toEqual(['Target:', 'Lun:', 'Lun:']);
    await daemon.json(['withdraw', lun.disk, '--force']);
    expect((await command('qemu-io', ['--image-opts', lun.options(), '-c', 'read 0 4k'], LONG)).code).not.toBe(0);
    await neighbour.ask('write -P 3 0 4k');
    expect((await exports()).map(({ path }) => path)).toEqual([other.disk]);
    expect((await command('qemu-io', ['--image-opts', other.options(OTHER), '-c', 'read 0 4k'], LONG)).code).not.toBe(0);
    await Promise.all([client.kill(), neighbour.kill()]);
    await mustRun('qemu-io', ['-f', 'raw', '-r', '-c', 'read -P 2 0 4k', daemon.path(lun.disk)]);
  }, TEST_MS);

  it('a share whose smbd was killed, with a client connected, is there again at its address; files are what they were, and what the client had open is let go', async () => {
    const share = await presentShare();
    expect(await smb(share, 'put source.img a.img')).toMatchObject({ code: 0 });
    const shell = spawn('smbclient', smbArguments(share), { stdio: ['pipe', 'ignore', 'ignore'], cwd: work });
    cleanup.add(() => { shell.kill('SIGKILL'); });
    expect(await waitUntil(async () => (await exports())[0]?.connected?.length === 1, 60_000)).toBe(true);
    const smbd = serverOf('smbd --foreground');
    signalProcess(smbd, 'SIGKILL');
    expect(await waitUntil(async () => (await exports())[0]?.losses === 1 && (await smb(share, 'ls')).code === 0, 60_000)).toBe(true);
    expect(await smb(share, 'get a.img back.img; rename a.img b.img')).toMatchObject({ code: 0 });
    expect(await sha256Of(join(work, 'back.img'))).toBe(await sha256Of(image));
    expect(await sha256Of(daemon.path(`${share.container}/b.img`))).toBe(await sha256Of(image));
    expect((await exports())[0]).toMatchObject({ state: 'shown', addresses: share.info.addresses });
    shell.kill('SIGKILL');
  }, TEST_MS);

  it('a share that a client has is neither withdrawn nor ended by a stop, which name the client, and with --force he is cut off', async () => {
    const share = await presentShare();
    const shell = spawn('smbclient', smbArguments(share), { stdio: ['pipe', 'pipe', 'pipe'], cwd: work });
    cleanup.add(() => { shell.kill('SIGKILL'); });
    let said = '';
    for (const stream of [shell.stdout, shell.stderr]) stream.on('data', (chunk: Buffer) => { said += chunk.toString(); });
    shell.stdin.write('put source.img one.img\n');
    expect(await waitUntil(() => said.includes('putting file'), 60_000), said).toBe(true);
    const refusal = await daemon.cli(['withdraw', share.container, '--json']);
    expect(refusal.code).not.toBe(0);
    expect(refusal.stderr).toContain('127.0.0.1');
    expect((await daemon.cli(['daemon', 'stop', '--json'])).stderr).toContain(`${share.container} is in use as smb by 127.0.0.1`);
    said = '';
    shell.stdin.write('put source.img two.img\n');
    expect(await waitUntil(() => said.includes('putting file'), 60_000), said).toBe(true);
    await daemon.json(['withdraw', share.container, '--force']);
    expect(await smb(share, 'ls')).toMatchObject({ code: 1 });
    said = '';
    shell.stdin.write('put source.img three.img\n');
    expect(await waitUntil(() => /NT_STATUS|disconnect|error/iu.test(said) || shell.exitCode !== null, 60_000), said).toBe(true);
    expect((await mustRun('ls', ['--', daemon.path(share.container)])).stdout).toBe('one.img\ntwo.img\n');
  }, TEST_MS);
});
