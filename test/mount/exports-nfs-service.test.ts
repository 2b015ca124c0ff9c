/**
 * NFS exports as a host has them: by the command line, with the settings that the daemon has, over the deaths, restarts and upgrades of either server; used by clients that are not
 * ours. Clients that had files open keep a restarted NFS server from new opens for its grace period of 90 seconds: the test that needs one comes late, and waits.
 */
import { constants, mkdirSync, readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { dirname, join } from 'node:path';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { tcpSocketsOf } from '../../daemon/presenter/nfs/sockets.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { NfsClient } from '../support/nfs-client.js';
import { isAlive, processesNaming, signalProcess, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const TEST_MS = 240_000;
const KIB = 1024;
const PATIENT = { timeout: 200_000, interval: 500 };
const CONTENT = Buffer.alloc(2_000_000, 'what a machine has on its disk ');
/** What the test does to the daemon, and the daemon rightly says. */
const EXPECTED = [/the server was killed by SIGKILL/u, /recovered what the last server/u, /what shows exports is lost/u, /exports cannot be shown/u, /starting the next/u,
  // Other tests mount at the same moment, and this one has no client left that would mind.
  /the mount has the device number/u];

describe.skipIf(lacks('/dev/fuse', 'ganesha.nfsd', 'nfs-ls'))('NFS exports of a daemon', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let runtimeBase: string;
  let port: number;
  let user: NfsClient;
  let handle: number;

  const url = (path: string): string => `nfs://127.0.0.1/${path}?version=4&nfsport=${port}`;
  const list = async (path: string): Promise<CommandResult> => await command('nfs-ls', [url(path)]);
  const namesIn = async (path: string): Promise<string[]> => (await mustRun('nfs-ls', [url(path)])).stdout.split('\n').flatMap((line) => line.split(/\s+/u).at(-1) ?? []).filter((name) => name !== '').sort();
  const shown = async (): Promise<ExportInfo[]> => await daemon.json<ExportInfo[]>(['exports']);
  const present = async (path: string, ...more: readonly string[]): Promise<ExportInfo> => await daemon.json<ExportInfo>(['present', path, '--as', 'nfs', ...more]);
  /** By the files that it was given: nothing of what it keeps is believed. */
  const serverPids = (): number[] => processesNaming(`${runtimeBase}/`).filter((pid) => isAlive(pid) && readFileSync(`/proc/${pid}/comm`, 'utf8').startsWith('ganesha'));
  const serverPid = (): number => {
    const [pid, ...others] = serverPids();
    if (pid === undefined || others.length > 0) throw new Error(`not one NFS server runs, but ${pid === undefined ? 'none' : others.length + 1}`);
    return pid;
  };
  const configFile = (): string => {
    const top = readdirSync(runtimeBase).find((name) => name.includes('exports'));
    return join(runtimeBase, top ?? 'none', 'nfs', 'ganesha.conf');
  };

  beforeAll(async () => {
    runtimeBase = makeTmpfsDir('run', cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase }, startArguments: () => ['--nfs'] });
    port = await freePort();
    for (const container of ['vms', 'iso', 'late']) await daemon.json(['container', 'create', container]);
    writeFileSync(daemon.path('iso/readme'), 'look and do not touch');
    writeFileSync(daemon.path('late/kept'), 'for others');
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('listen on loopback alone, at one port that stays, with a configuration that is nobody else\'s', async () => {
    const vms = await present('vms', '--to', '127.0.0.1', '--option', 'squash=none', '--option', `port=${port}`);
    const iso = await present('iso', '--to', '127.0.0.0/8', '--read-only', '--option', 'squash=none');
    expect([vms.addresses, iso.addresses]).toEqual([[`nfs://127.0.0.1:${port}/vms`], [`nfs://127.0.0.1:${port}/iso`]]);
    const listening = tcpSocketsOf(serverPid()).filter(({ isListening }) => isListening);
    expect(listening.map(({ localAddress, localPort }) => [localAddress, localPort])).toEqual([['127.0.0.1', port]]);
    expect([statSync(configFile()).mode & 0o777, statSync(configFile()).uid, statSync(dirname(configFile())).mode & 0o777]).toEqual([0o600, 0, 0o700]);
    expect(readdirSync(dirname(configFile())).filter((name) => name.endsWith('.new'))).toEqual([]);
    // Who named the port goes, and the other one is where it was.
    await daemon.json(['withdraw', 'vms', '--as', 'nfs']);
    expect((await shown()).map(({ path, addresses }) => [path, addresses])).toEqual([['iso', iso.addresses]]);
    await present('vms', '--to', '127.0.0.1', '--option', 'squash=none');
    expect(await namesIn('')).toEqual(['iso', 'vms']);
  }, TEST_MS);

  it('are refused where they could not be reached, and say what to do', async () => {
    const cases: readonly (readonly [readonly string[], RegExp])[] = [
      [['--to', '192.0.2.7'], /nobody else can come there: start the daemon with --export-address/u],
      [['--to', '127.0.0.1', '--listen', `127.0.0.1:${port}`], /leave --listen out; --option port=N/u],
      [['--to', '127.0.0.1', '--option', 'port=1'], /one server shows all NFS exports, at one port: .* says [0-9]+, late says 1/u],
      [[], /say for whom: --to/u],
    ];
    const before = serverPid();
    for (const [args, words] of cases) {
      const refused = await daemon.cli(['present', 'late', '--as', 'nfs', ...args, '--json']);
      expect([refused.code !== 0, refused.stderr], args.join(' ')).toEqual([true, expect.stringMatching(words)]);
    }
    expect([serverPid(), (await shown()).map(({ path }) => path)]).toEqual([before, ['iso', 'vms']]);
  }, TEST_MS);

  it('are for whom they name and for nobody else, and read-only ones take nothing', async () => {
    await present('late', '--to', '127.0.0.2');
    expect((await list('late')).code).not.toBe(0);
    await daemon.json(['withdraw', 'late']);
    await present('late', '--to', '127.0.0.0/8');
    expect(await namesIn('late')).toEqual(['kept']);
    await daemon.json(['withdraw', 'late', '--force']);

    const file = join(makeTempDir('nfs', cleanup), 'small');
    writeFileSync(file, Buffer.alloc(3000, 'small content '));
    expect((await command('nfs-cp', [file, url('iso/refused')])).stderr).toContain('ROFS');
    const reader = new NfsClient(cleanup);
    await reader.mount({ path: '/iso', port });
    await expect(reader.open('/readme', constants.O_RDWR)).rejects.toThrow('ROFS');
    await expect(reader.unlink('/readme')).rejects.toThrow('ROFS');
    await reader.end();
    await mustRun('nfs-cp', [file, url('vms/small')]);
    expect([readdirSync(daemon.path('iso')), readFileSync(daemon.path('vms/small'))]).toEqual([['readme'], readFileSync(file)]);
  }, TEST_MS);

  it('are neither withdrawn nor stopped while somebody is connected, who is named; with --force they are', async () => {
    user = new NfsClient(cleanup);
    await user.mount({ path: '/vms', port });
    handle = await user.open('/written', constants.O_CREAT | constants.O_RDWR);
    await user.write({ handle, offset: 0, length: 256 * KIB, seed: 'written' });
    const before = serverPid();
    for (const args of [['withdraw', 'vms', '--as', 'nfs'], ['daemon', 'stop']]) {
      const refused = await daemon.cli([...args, '--json']);
      expect([refused.code, refused.stderr], args.join(' ')).toEqual([5, expect.stringMatching(/in use as nfs by 127\.0\.0\.1: .*--force/u)]);
    }
    expect((await shown()).find(({ path }) => path === 'vms')).toMatchObject({ connected: ['127.0.0.1'], state: 'shown' });
    const forced = new NfsClient(cleanup);
    await present('late', '--to', '127.0.0.1', '--option', 'squash=none');
    await forced.mount({ path: '/late', port });
    const open = await forced.open('/cut', constants.O_CREAT | constants.O_RDWR);
    await daemon.json(['withdraw', 'late', '--force']);
    await expect(forced.write({ handle: open, offset: 0, length: KIB, seed: 'cut' })).rejects.toThrow(/STALE|BADHANDLE|EXPIRED|BAD_STATEID|ACCES/u);
    await user.check({ handle, offset: 0, length: 256 * KIB, seed: 'written' });
    expect(serverPid()).toBe(before);
  }, TEST_MS);

  it('go on under a client when our server is killed, and upgraded', async () => {
    const before = serverPid();
    const addresses = (await shown()).map((each) => each.addresses);
    await daemon.waitForServer(await daemon.killServer(), TEST_MS);
    await user.write({ handle, offset: 256 * KIB, length: 64 * KIB, seed: 'written' });
    const upgraded = (await daemon.status()).serverPid;
    await daemon.json(['daemon', 'upgrade']);
    await daemon.waitForServer(upgraded, TEST_MS);
    await user.write({ handle, offset: 320 * KIB, length: 64 * KIB, seed: 'written' });
    await user.fsync(handle);
    await user.check({ handle, offset: 0, length: 384 * KIB, seed: 'written' });
    await expect.poll(async () => (await shown()).map((each) => each.addresses), PATIENT).toEqual(addresses);
    expect(serverPid()).toBe(before);
  }, TEST_MS);

  it('are there again when both servers are killed at one moment, with the same identity', async () => {
    writeFileSync(daemon.path('vms/large'), CONTENT);
    const before = (await shown()).map(({ id, uuid, addresses }) => ({ id, uuid, addresses }));
    const nfs = serverPid();
    const { serverPid: ours } = await daemon.status();
    for (const pid of [nfs, ours]) signalProcess(pid, 'SIGKILL');
    for (const pid of [nfs, ours]) expect(await waitUntilGone(pid, 20_000)).toBe(true);
    await daemon.waitForServer(ours, TEST_MS);
    await expect.poll(async () => (await shown()).map(({ id, uuid, addresses, state }) => ({ id, uuid, addresses, state })), PATIENT).toEqual(before.map((each) => ({ ...each, state: 'shown' })));
    expect(serverPid()).not.toBe(nfs);
    expect(await namesIn('vms')).toEqual(['large', 'small', 'written']);
  }, TEST_MS);

  it('are shown again when the NFS server dies, and that is said; also that it cannot be, and when it can', async () => {
    const lossesBefore = (await shown())[0]?.losses ?? 0;
    const nfs = serverPid();
    signalProcess(nfs, 'SIGKILL');
    await expect.poll(async () => (await shown()).map(({ losses, state }) => [losses > lossesBefore, state]), PATIENT).toEqual([[true, 'shown'], [true, 'shown']]);
    expect(serverPid()).not.toBe(nfs);
    expect(await namesIn('iso')).toEqual(['readme']);
    expect(daemon.log().some(({ msg, text }) => msg.includes('what shows exports is lost') && text.includes('the NFS server has ended'))).toBe(true);

    // Somebody has its port when it is to be started again: whoever comes first has it.
    const other = net.createServer();
    const isOurs = async (): Promise<boolean> => await new Promise((resolve) => {
      other.once('error', () => { resolve(false); });
      other.listen({ host: '127.0.0.1', port }, () => { resolve(true); });
    });
    for (let tries = 0; ; tries += 1) {
      for (const pid of serverPids()) {
        signalProcess(pid, 'SIGKILL');
        await waitUntilGone(pid, 20_000);
      }
      if (await isOurs()) break;
      if (tries > 50) throw new Error('the port is never free');
    }
    await expect.poll(async () => (await shown()).map(({ state, failure, addresses }) => [state, failure?.includes('somebody else listens at') ?? false, addresses.length]), PATIENT)
      .toEqual([['failing', true, 1], ['failing', true, 1]]);
    const forPeople = await daemon.cli(['exports']);
    expect(forPeople.stdout + forPeople.stderr).toMatch(/failing[^]*failing: somebody else listens at 127\.0\.0\.1:[0-9]+, such as this host's own NFS server: end that/u);
    await new Promise<void>((resolve) => { other.close(() => { resolve(); }); });
    await expect.poll(async () => (await shown()).map(({ state }) => state), PATIENT).toEqual(['shown', 'shown']);
    expect(await namesIn('')).toEqual(['iso', 'vms']);
  }, TEST_MS);

  it('have what was written and synced over NFS before both servers were killed', async () => {
    // The grace period of the server that came last.
    await expect.poll(async () => (await command('nfs-cat', [url('vms/large')])).stdout.length, PATIENT).toBe(CONTENT.length);
    expect((await mustRun('nfs-cat', [url('vms/large')])).stdout).toBe(CONTENT.toString());
    const again = new NfsClient(cleanup);
    await again.mount({ path: '/vms', port });
    await again.check({ handle: await again.open('/written', constants.O_RDONLY), offset: 0, length: 384 * KIB, seed: 'written' });
    await again.end();
  }, TEST_MS);

  it('say nothing but names in the server\'s configuration, whatever directories are called', async () => {
    const plain = ['a;b', 'c{d}', 'Clients = *;', '}EXPORT{', '# none', '$HOME', 'h,i'];
    const refused = ['q"; Access_Type = RW; "', '%include "x"', 'b\\', "it's"];
    for (const name of [...plain, ...refused]) {
      mkdirSync(join(daemon.path('late'), name));
      writeFileSync(join(daemon.path('late'), name, 'inside'), name);
    }
    // The mount has no such names to begin with.
    expect(() => { mkdirSync(join(daemon.path('late'), 'x\nEXPORT {')); }).toThrow(/EINVAL/u);
    for (const name of refused) {
      const answer = await daemon.cli(['present', `late/${name}`, '--as', 'nfs', '--to', '127.0.0.1', '--json']);
      expect([answer.code, answer.stderr], name).toEqual([2, expect.stringContaining('has a quote or a backslash in it')]);
    }
    for (const name of plain) await present(`late/${name}`, '--to', '127.0.0.1', '--read-only', '--option', 'squash=none');
    for (const name of plain) expect(await namesIn(`late/${name}`), name).toEqual(['inside']);
    expect(readFileSync(configFile(), 'utf8').match(/^EXPORT \{$/gmu)).toHaveLength(2 + plain.length);
    // What they lie in is not shown by that.
    expect((await command('nfs-cat', [url('late/kept')])).code).not.toBe(0);
    for (const name of plain) await daemon.json(['withdraw', `late/${name}`, '--force']);
    expect(await namesIn('')).toEqual(['iso', 'vms']);
  }, TEST_MS);

  it('end before the mount does, and are back with the next daemon', async () => {
    await user.end();
    const before = (await shown()).map(({ id, uuid, addresses }) => ({ id, uuid, addresses }));
    await expect.poll(async () => (await shown()).flatMap(({ connected }) => connected), PATIENT).toEqual([]);
    const nfs = serverPid();
    await daemon.stop();
    expect([isAlive(nfs), serverPids()]).toEqual([false, []]);
    await daemon.start();
    await expect.poll(async () => (await shown()).map(({ id, uuid, addresses }) => ({ id, uuid, addresses })), PATIENT).toEqual(before);
    expect([await namesIn('iso'), await namesIn('vms')]).toEqual([['readme'], ['large', 'small', 'written']]);
    daemon.assertQuietLog(EXPECTED);
    for (const { id } of await shown()) await daemon.json(['withdraw', String(id), '--force']);
    expect(serverPids()).toEqual([]);
    await daemon.stop();
  }, TEST_MS);
});
