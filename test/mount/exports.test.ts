/**
 * What is presented, by a real daemon to real clients that are none of ours: nbdinfo, nbdcopy, qemu-img and qemu-io over NBD, mkfs and mount on block devices. Everything listens on
 * loopback; another client is another loopback address.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { command } from '../support/model/command.js';
import { isAlive, processesNaming, signalProcess, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const MIB = 1024 * 1024;
const SIZE = 8 * MIB;
const LOOSE = { timeout: 240_000 };
/** What the test does to the daemon, and the daemon rightly says. */
const EXPECTED = [/starting the next/u, /recovered what the last server/u, /killed/u, /what shows exports is lost/u, /gave back/u, /in use/u, /took over/u];
const cleanup = createCleanup();

interface Run { readonly code: number | null; readonly stdout: string; readonly stderr: string }

async function run(program: string, args: readonly string[]): Promise<Run> { return await command(program, args, { timeoutMs: 120_000 }); }

async function must(program: string, args: readonly string[]): Promise<string> {
  const result = await run(program, args);
  if (result.code !== 0) throw new Error(`${program} ${args.join(' ')}: ${result.code}\n${result.stdout}${result.stderr}`);
  return result.stdout;
}

function pattern(seed: number): Buffer {
  const content = Buffer.alloc(SIZE);
  for (let block = 0; block < SIZE / 4096; block += 1) if (block % 5 !== 4) content.fill(`${seed}, block ${block}. `, block * 4096, (block + 1) * 4096);
  return content;
}

function sha(content: Buffer): string { return createHash('sha256').update(content).digest('hex'); }

function linkTo(info: ExportInfo): string {
  const [address] = info.addresses;
  if (address === undefined) throw new Error(`${info.path} has no address`);
  return address;
}

function portOf(info: ExportInfo): number { return Number(new URL(linkTo(info)).port); }

/** A TCP client from an address of this host; what the server said first, or null when it was shut out. */
async function greeting(port: number, from: string): Promise<{ readonly said: string | null; readonly socket: net.Socket }> {
  return await new Promise((resolve, reject) => {
    const socket = net.connect({ host: '127.0.0.1', port, localAddress: from });
    socket.once('data', (bytes) => { resolve({ said: bytes.toString('latin1'), socket }); });
    socket.once('close', () => { resolve({ said: null, socket }); });
    socket.once('error', (error: NodeJS.ErrnoException) => { if (error.code === 'ECONNRESET') resolve({ said: null, socket }); else reject(error); });
  });
}

async function present(daemon: TestDaemon, ...args: readonly string[]): Promise<ExportInfo> { return await daemon.json<ExportInfo>(['present', ...args]); }
async function shown(daemon: TestDaemon): Promise<ExportInfo[]> { return await daemon.json<ExportInfo[]>(['exports']); }

async function newDaemon(start: readonly string[] = []): Promise<TestDaemon> {
  const daemon = await startTestDaemon({ transport: 'kernel', cleanup, startArguments: () => start });
  const source = path.join(makeTempDir('exports', cleanup), 'a.raw');
  fs.writeFileSync(source, pattern(1));
  await daemon.json(['container', 'create', 'vms']);
  await daemon.json(['import', source, 'vms/a.img']);
  return daemon;
}

/** The door of the NBD exports, by its command line. */
function nbdServers(daemon: TestDaemon): number[] {
  return processesNaming(daemon.mountDir).filter((pid) => isAlive(pid) && fs.readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('/nbd/nbd.conf'));
}

describe('over NBD', () => {
  let daemon: TestDaemon;

  beforeAll(async () => { daemon = await newDaemon(); }, 120_000);
  afterEach(async () => { for (const { id } of await shown(daemon)) await daemon.json(['withdraw', String(id), '--force']); });
  afterAll(async () => { await cleanup.run(); });

  it('a disk is read and written by nbdcopy and QEMU, with what disks need, and is afterwards what they wrote', async () => {
    await daemon.json(['clone', 'vms/a.img', 'vms/written.img']);
    const info = await present(daemon, 'vms/written.img', '--as', 'nbd', '--to', '127.0.0.1');
    const uri = linkTo(info);
    expect(uri).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+\/vms\/written\.img$/u);
    const about = JSON.parse(await must('nbdinfo', ['--json', uri])) as { exports: Record<string, unknown>[] };
    expect(about.exports[0]).toMatchObject({
      'export-size': SIZE, is_read_only: false, can_flush: true, can_fua: true, can_trim: true, can_zero: true, can_multi_conn: true,
    });
    const copy = path.join(makeTempDir('exports-copy', cleanup), 'copy.raw');
    await must('nbdcopy', [uri, copy]);
    expect(sha(fs.readFileSync(copy))).toBe(sha(pattern(1)));
    const other = `${copy}.other`;
    fs.writeFileSync(other, pattern(2));
    await must('nbdcopy', ['--flush', other, uri]);
    expect(await must('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', other, uri])).toContain('identical');
    await must('qemu-io', ['-f', 'raw', '-c', 'write -P 0xab 1M 64k', '-c', 'flush', '-c', 'discard 2M 64k', uri]);
    await daemon.json(['withdraw', 'vms/written.img']);
    const wanted = pattern(2);
    wanted.fill(0xab, MIB, MIB + 65_536);
    wanted.fill(0, 2 * MIB, 2 * MIB + 65_536);
    expect(sha(fs.readFileSync(daemon.path('vms/written.img')))).toBe(sha(wanted));
    expect(sha(fs.readFileSync(daemon.path('vms/a.img')))).toBe(sha(pattern(1)));
  }, LOOSE.timeout);

  it('nobody is let in but who is on the list, and no other name is answered', async () => {
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.2');
    const allowed = await greeting(portOf(info), '127.0.0.2');
    expect(allowed.said).toMatch(/^NBDMAGIC/u);
    allowed.socket.destroy();
    expect((await greeting(portOf(info), '127.0.0.1')).said).toBeNull();
    expect((await run('nbdinfo', [linkTo(info)])).code).not.toBe(0);
    await daemon.json(['withdraw', 'vms/a.img', '--force']);
    const wide = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.0/8');
    await must('nbdinfo', [linkTo(wide)]);
    expect((await run('nbdinfo', [linkTo(wide).replace('a.img', 'b.img')])).code).not.toBe(0);
    expect((await run('nbdinfo', [linkTo(wide).replace('/vms/a.img', '/')])).code).not.toBe(0);
  }, LOOSE.timeout);

  it('a snapshot is shown read-only and not otherwise, and refuses writes', async () => {
    await daemon.json(['snapshot', 'create', 'vms@v1']);
    const refusal = await daemon.cli(['present', 'vms/a.img@v1', '--as', 'nbd', '--to', '127.0.0.1', '--json']);
    expect(refusal.code).not.toBe(0);
    expect(refusal.stderr).toContain('--read-only');
    const info = await present(daemon, 'vms/a.img@v1', '--as', 'nbd', '--to', '127.0.0.1', '--read-only');
    expect(JSON.parse(await must('nbdinfo', ['--json', linkTo(info)]))).toMatchObject({ exports: [{ is_read_only: true }] });
    expect((await run('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', linkTo(info)])).code).not.toBe(0);
    const taken = await daemon.cli(['snapshot', 'rm', 'vms@v1', '--json']);
    expect(taken.stderr).toContain('offshoot withdraw');
  }, LOOSE.timeout);

  it('what is presented keeps its name: not removed, not renamed, nor what it lies in, also through the mount', async () => {
    await daemon.json(['container', 'create', 'own']);
    for (const name of ['a.img', 'kept.img']) await daemon.json(['clone', 'vms/a.img', `own/${name}`]);
    await present(daemon, 'own/kept.img', '--as', 'nbd', '--to', '127.0.0.1');
    for (const args of [['rm', 'own/kept.img'], ['rm', '-r', 'own']]) {
      const refusal = await daemon.cli([...args, '--json']);
      expect(refusal.stderr).toContain('"in-use"');
      expect(refusal.stderr).toContain('offshoot withdraw own/kept.img --as nbd');
    }
    for (const [program, args] of [['rm', [daemon.path('own/kept.img')]], ['mv', [daemon.path('own/kept.img'), daemon.path('own/other.img')]], ['mv', [daemon.path('own'), daemon.path('own2')]],
      ['mv', [daemon.path('own/a.img'), daemon.path('own/kept.img')]]] as const) {
      expect((await run(program, args)).stderr).toContain('busy');
    }
    await daemon.json(['withdraw', 'own/kept.img', '--as', 'nbd']);
    await must('mv', [daemon.path('own/kept.img'), daemon.path('own/other.img')]);
  }, LOOSE.timeout);

  it('what is presented is not taken away by a revert', async () => {
    await daemon.json(['container', 'create', 'back']);
    await daemon.json(['snapshot', 'create', 'back@before']);
    await daemon.json(['clone', 'vms/a.img', 'back/new.img']);
    await present(daemon, 'back/new.img', '--as', 'nbd', '--to', '127.0.0.1');
    const refusal = await daemon.cli(['snapshot', 'revert', 'back@before', '--yes', '--json']);
    expect(refusal.stderr).toContain('"in-use"');
    expect(refusal.stderr).toContain('offshoot withdraw back/new.img --as nbd');
    await daemon.json(['withdraw', 'back/new.img', '--as', 'nbd']);
    expect(await daemon.json(['snapshot', 'revert', 'back@before', '--yes'])).toMatchObject({ nodesRemoved: 1 });
  }, LOOSE.timeout);

  it('withdrawing what is in use is refused, names the client, and with --force cuts it off', async () => {
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.0/8');
    const { said, socket } = await greeting(portOf(info), '127.0.0.3');
    expect(said).not.toBeNull();
    expect(await shown(daemon)).toMatchObject([{ path: 'vms/a.img', connected: ['127.0.0.3'], state: 'shown', losses: 0 }]);
    const refusal = await daemon.cli(['withdraw', 'vms/a.img', '--json']);
    expect(refusal.stderr).toContain('127.0.0.3');
    expect(await shown(daemon)).toHaveLength(1);
    const closed = new Promise<void>((resolve) => { socket.once('close', () => { resolve(); }); });
    await daemon.json(['withdraw', 'vms/a.img', '--force']);
    await closed;
    expect(await shown(daemon)).toEqual([]);
    expect(nbdServers(daemon)).toEqual([]);
  }, LOOSE.timeout);

  it('what cannot be meant is refused before anything is done, with what to do', async () => {
    const cases: readonly (readonly [readonly string[], RegExp])[] = [
      [['vms/a.img', '--as', 'nbd'], /say for whom/u],
      [['vms/a.img', '--as', 'nbd', '--to', '*'], /0\.0\.0\.0\/0/u],
      [['vms/a.img', '--as', 'nbd', '--to', '192.0.2.1/24'], /192\.0\.2\.0\/24 for the network/u],
      [['vms/a.img', '--as', 'nbd', '--to', '192.0.2.1'], /--export-address/u],
      [['vms', '--as', 'nbd', '--to', '127.0.0.1'], /shows disks/u],
      [['vms/a.img', '--as', 'block', '--to', '127.0.0.1'], /leave --to out/u],
      [['vms/a.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', 'colour=red'], /no option colour/u],
      [['vms/a.img', '--as', 'nbd', '--to', '127.0.0.1', '--listen', 'localhost'], /no address/u],
      [['vms/a.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', 'tls=/nowhere'], /ca-cert\.pem/u],
      [['vms/none.img', '--as', 'nbd', '--to', '127.0.0.1'], /none\.img/u],
    ];
    for (const [args, words] of cases) {
      const refusal = await daemon.cli(['present', ...args, '--json']);
      expect(refusal.code, args.join(' ')).not.toBe(0);
      expect(refusal.stderr).toMatch(words);
    }
    const blocked = net.createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => { blocked.once('listening', resolve); });
    const { port } = blocked.address() as net.AddressInfo;
    const refusal = await daemon.cli(['present', 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.1', '--listen', `127.0.0.1:${port}`, '--json']);
    blocked.close();
    expect(refusal.code).not.toBe(0);
    expect(refusal.stderr).toMatch(/EADDRINUSE/u);
    expect(await shown(daemon)).toEqual([]);
    expect(nbdServers(daemon)).toEqual([]);
  }, LOOSE.timeout);

  it('a server that was killed is started again, on its port, and that is said', async () => {
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.1');
    const [pid] = nbdServers(daemon);
    signalProcess(pid ?? 0, 'SIGKILL');
    await expect.poll(async () => (await run('nbdinfo', [linkTo(info)])).code, { timeout: 60_000, interval: 500 }).toBe(0);
    expect(await shown(daemon)).toMatchObject([{ addresses: info.addresses, state: 'shown', losses: 1 }]);
    expect(daemon.log().some(({ msg }) => msg.includes('what shows exports is lost'))).toBe(true);
  }, LOOSE.timeout);

  it('with TLS nothing is said without it', async () => {
    const certificates = makeTempDir('exports-tls', cleanup);
    const at = (name: string): string => path.join(certificates, name);
    await must('openssl', ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=CA', '-keyout', at('ca-key.pem'), '-out', at('ca-cert.pem')]);
    await must('openssl', ['req', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1,DNS:localhost', '-keyout', at('server-key.pem'), '-out', at('request.pem')]);
    await must('openssl', ['x509', '-req', '-in', at('request.pem'), '-CA', at('ca-cert.pem'), '-CAkey', at('ca-key.pem'), '-CAcreateserial', '-days', '2', '-copy_extensions', 'copy', '-out', at('server-cert.pem')]);
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', `tls=${certificates}`);
    expect(linkTo(info)).toMatch(/^nbds:/u);
    const secured = await run('nbdinfo', ['--size', `${linkTo(info).replace('127.0.0.1', 'localhost')}?tls-certificates=${certificates}`]);
    expect(secured).toMatchObject({ code: 0, stdout: `${SIZE}\n` });
    expect((await run('nbdinfo', [linkTo(info).replace('nbds:', 'nbd:')])).code).not.toBe(0);
  }, LOOSE.timeout);
});

/** What a loop device shows now; its number may be another test's in the next moment. */
function backingOf(device: string): string {
  try {
    return fs.readFileSync(`/sys/block/${path.basename(device)}/loop/backing_file`, 'utf8');
  } catch {
    return '';
  }
}

describe('as a block device', () => {
  it('holds a file system that is there again in the disk, is its user\'s, is not withdrawn while it is mounted, and leaves nothing', async () => {
    const daemon = await newDaemon();
    try {
      await daemon.json(['clone', 'vms/a.img', 'vms/fs.img']);
      await daemon.json(['resize', 'vms/fs.img', '64M']);
      const info = await present(daemon, 'vms/fs.img', '--as', 'block', '--option', 'user=nobody');
      const device = linkTo(info);
      expect(device).toMatch(/^\/dev\/loop\d+$/u);
      expect(fs.readFileSync(`/sys/block/${path.basename(device)}/loop/dio`, 'utf8').trim()).toBe('1');
      expect(fs.statSync(device)).toMatchObject({ uid: 65_534, mode: 0o60600 });
      await must('mkfs.ext4', ['-q', device]);
      const mounted = makeTempDir('exports-fs', cleanup);
      await must('mount', [device, mounted]);
      cleanup.add(async () => { await run('umount', [mounted]); });
      fs.writeFileSync(path.join(mounted, 'content'), pattern(3));
      expect((await shown(daemon))[0]?.connected).toContain(`mounted at ${mounted}`);
      const refusal = await daemon.cli(['withdraw', 'vms/fs.img', '--json']);
      expect(refusal.stderr).toContain(mounted);
      expect((await daemon.cli(['daemon', 'stop', '--json'])).stderr).toContain(mounted);
      await must('umount', [mounted]);
      await daemon.json(['withdraw', 'vms/fs.img']);
      expect(backingOf(device)).not.toMatch(/vms\/fs\.img/u);
      const again = await present(daemon, 'vms/fs.img', '--as', 'block', '--read-only');
      expect((await run('dd', ['if=/dev/zero', `of=${linkTo(again)}`, 'bs=4k', 'count=1', 'oflag=direct'])).code).not.toBe(0);
      await must('mount', ['-o', 'ro,noload', linkTo(again), mounted]);
      expect(sha(fs.readFileSync(path.join(mounted, 'content')))).toBe(sha(pattern(3)));
      await must('umount', [mounted]);
      await daemon.stop();
      expect(backingOf(linkTo(again))).not.toMatch(/vms\/fs\.img/u);
    } finally {
      await cleanup.run();
    }
  }, LOOSE.timeout);
});

describe('a daemon with exports', () => {
  afterEach(async () => { await cleanup.run(); });

  it('is killed, and upgraded, without a client noticing', async () => {
    const daemon = await newDaemon();
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.1');
    const { socket } = await greeting(portOf(info), '127.0.0.1');
    let isClosed = false;
    socket.once('close', () => { isClosed = true; });
    const before = nbdServers(daemon);
    const killed = await daemon.killServer();
    await daemon.waitForServer(killed, 60_000);
    await expect.poll(async () => (await shown(daemon))[0], { timeout: 60_000 }).toMatchObject({ addresses: info.addresses, connected: ['127.0.0.1'], state: 'shown', losses: 0 });
    const { serverPid } = await daemon.status();
    await daemon.json(['daemon', 'upgrade']);
    await daemon.waitForServer(serverPid, 60_000);
    await expect.poll(async () => (await shown(daemon))[0], { timeout: 60_000 }).toMatchObject({ addresses: info.addresses, state: 'shown' });
    expect(nbdServers(daemon)).toEqual(before);
    expect(isClosed).toBe(false);
    await must('nbdinfo', [linkTo(info)]);
    socket.destroy();
  }, LOOSE.timeout);

  it('is not stopped while a client is connected; stopped and started it shows the same at the same address', async () => {
    const daemon = await newDaemon();
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.1');
    const block = await present(daemon, 'vms/a.img', '--as', 'block', '--read-only');
    const { socket } = await greeting(portOf(info), '127.0.0.1');
    const refusal = await daemon.cli(['daemon', 'stop', '--json']);
    expect(refusal.stderr).toContain('vms/a.img is in use as nbd by 127.0.0.1');
    await must('nbdinfo', [linkTo(info)]);
    socket.destroy();
    await expect.poll(async () => (await shown(daemon))[0]?.connected, { timeout: 60_000 }).toEqual([]);
    await daemon.stop();
    expect(nbdServers(daemon)).toEqual([]);
    await daemon.start();
    await expect.poll(async () => (await shown(daemon)).map(({ state, addresses }) => [state, addresses.length]), { timeout: 60_000 }).toEqual([['shown', 1], ['shown', 1]]);
    expect((await shown(daemon))[0]).toMatchObject({ id: info.id, uuid: info.uuid, addresses: info.addresses });
    await must('nbdinfo', [linkTo(info)]);
    expect(await must('blockdev', ['--getsize64', linkTo((await shown(daemon))[1] ?? block)])).toBe(`${SIZE}\n`);
    // Somebody else is in the way of the unmount: what was ended for it is there again.
    const held = fs.openSync(daemon.path('vms/a.img'), 'r');
    const busy = await daemon.cli(['daemon', 'stop', '--json']);
    fs.closeSync(held);
    expect(busy.stderr).toContain('is in use');
    await must('nbdinfo', [linkTo(info)]);
    await daemon.stop();
  }, LOOSE.timeout);

  it('that was killed with its holder is followed by one that clears what its own exports hold, and shows them again', async () => {
    const daemon = await newDaemon();
    const info = await present(daemon, 'vms/a.img', '--as', 'nbd', '--to', '127.0.0.1');
    const block = await present(daemon, 'vms/a.img', '--as', 'block', '--read-only');
    // Has the disk open, through nbdkit.
    const holding = command('qemu-io', ['-r', '-f', 'raw', '-c', 'read 0 4k', '-c', 'sleep 20000', linkTo(info)], { timeoutMs: 60_000 });
    await expect.poll(async () => (await shown(daemon))[0]?.connected, { timeout: 60_000 }).toEqual(['127.0.0.1']);
    const { holderPid, serverPid, ...status } = await daemon.status();
    const sparePid = (status as { sparePid?: number | null }).sparePid ?? 0;
    for (const pid of [holderPid, serverPid, sparePid]) if (pid > 0) signalProcess(pid, 'SIGKILL');
    for (const pid of [holderPid, serverPid, sparePid]) if (pid > 0) await waitUntilGone(pid, 20_000);
    expect(nbdServers(daemon)).toHaveLength(1);
    await daemon.start();
    await holding;
    await expect.poll(async () => (await shown(daemon)).map(({ state, addresses }) => [state, addresses.length]), { timeout: 60_000 }).toEqual([['shown', 1], ['shown', 1]]);
    await must('nbdinfo', [linkTo(info)]);
    expect(daemon.log().some(({ msg }) => msg.includes('ended the export server nbd/nbd'))).toBe(true);
    expect(daemon.log().some(({ msg }) => msg.includes(`gave back ${linkTo(block)}`))).toBe(true);
    daemon.assertQuietLog([...EXPECTED, /the holder is gone/u]);
  }, LOOSE.timeout);
});
