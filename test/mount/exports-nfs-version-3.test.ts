/**
 * NFS version 3, in a network of the test's own: it needs rpcbind, which has one port and one place. Its clients keep nothing but handles, so that they
 * show whether handles last; and QEMU's nfs: driver speaks nothing else.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { constants, existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ExportProcess } from '../../daemon/presenter/export-process.js';
import type { Export } from '../../daemon/presenter/presenter.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { presenterPlace } from '../support/exports-fixture.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { mountEntry } from '../support/model/mounts.js';
import { NfsClient } from '../support/nfs-client.js';
import { isAlive, signalProcess, waitUntil, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const PROGRAM = resolve(import.meta.dirname, '../support/nfs-presenter-program.mjs');
const TEST_MS = 240_000;
const MIB = 1024 ** 2;
const RPCBIND_SOCKET = '/run/rpcbind.sock';
const PORTS = { port: 2049, mountPort: 20048 };

/** A host that runs rpcbind has its socket, and a second one would take it away. */
async function rpcbindRuns(): Promise<boolean> {
  return existsSync(RPCBIND_SOCKET) && (await command('rpcinfo', ['-p'])).code === 0;
}

describe.skipIf(lacks('/dev/fuse', 'ganesha.nfsd', 'nfs-cp', 'rpcbind', 'nsenter', 'ip', 'qemu-img') || await rpcbindRuns())('NFS version 3', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let scratch: string;
  let directory: string;
  let prefix: readonly string[];
  let server: ExportProcess;

  const inside = async (program: string, ...args: readonly string[]): Promise<CommandResult> => await command(prefix[0]!, [...prefix.slice(1), program, ...args], { timeoutMs: 60_000 });
  const mustInside = async (program: string, ...args: readonly string[]): Promise<CommandResult> => await mustRun(prefix[0]!, [...prefix.slice(1), program, ...args], { timeoutMs: 60_000 });
  const apply = async (exports: readonly Export[]): Promise<CommandResult> => await inside(process.execPath, PROGRAM, JSON.stringify({
    place: { directory, address: '192.0.2.1', nfs: true }, settings: { graceSeconds: 2 }, exports,
  }));
  const exported = (): Export => ({
    id: 1, uuid: '0b5e8f5e-0000-4000-8000-000000000001', path: 'vms', mountPath: daemon.path('vms'), kind: 'directory', sizeBytes: null, clients: ['192.0.2.0/24'], readOnly: false,
    options: { squash: 'none', versions: '3,4' },
  });
  const url = (path: string): string => `nfs://192.0.2.1/vms/${path}`;
  const sum = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, startArguments: () => ['--nfs'] });
    await daemon.json(['container', 'create', 'vms']);
    scratch = makeTempDir('nfs', cleanup);
    ({ directory } = presenterPlace('nfs', daemon, cleanup));
    server = new ExportProcess({ directory, name: 'ganesha' });
    const network = spawn('unshare', ['-n', 'sh', '-c', 'ip link set lo up && ip addr add 192.0.2.1/32 dev lo && echo up && exec rpcbind -f'], { stdio: ['ignore', 'pipe', 'inherit'] });
    const { pid = 0 } = network;
    cleanup.add(async () => {
      if (isAlive(pid)) signalProcess(pid, 'SIGKILL');
      await waitUntilGone(pid, 10_000);
      rmSync(RPCBIND_SOCKET, { force: true });
      rmSync('/run/rpcbind.lock', { force: true });
    });
    prefix = ['nsenter', '-t', String(pid), '-n'];
    await new Promise((done) => { network.stdout.once('data', done); });
    expect(await waitUntil(async () => (await inside('rpcinfo', '-p', '127.0.0.1')).code === 0, 20_000)).toBe(true);
    cleanup.add(async () => { await server.end(); });
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('is not shown at all addresses when one was asked for: a server that would do that is ended', async () => {
    const refused = await apply([exported()]);
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringMatching(/listens at .* instead of 192\.0\.2\.1, and was ended/u)]);
    expect(server.state().kind).toBe('off');
    // What it needs for that.
    await mustInside('ip', 'addr', 'add', 'fd00:2::1/128', 'dev', 'lo', 'nodad');
    const shown = await apply([exported()]);
    expect([shown.code, shown.stdout.trim(), shown.stderr]).toEqual([0, JSON.stringify([{ id: 1, addresses: ['nfs://192.0.2.1:2049/vms'] }]), '']);
  }, TEST_MS);

  it('copies large files in and out', async () => {
    const file = join(scratch, 'large');
    writeFileSync(file, Buffer.alloc(8 * MIB, 'what a machine has on its disk '));
    await mustInside('nfs-cp', file, url('large'));
    expect(sum(readFileSync(daemon.path('vms/large')))).toBe(sum(readFileSync(file)));
    await mustInside('nfs-cp', url('large'), join(scratch, 'back'));
    expect(sum(readFileSync(join(scratch, 'back')))).toBe(sum(readFileSync(file)));
  }, TEST_MS);

  it('serves a disk to QEMU: read, written, flushed and compared', async () => {
    const image = join(scratch, 'image.raw');
    makePatternImage(image, { sizeBytes: 4 * MIB, seed: 3 });
    await daemon.json(['import', image, 'vms/disk.img']);
    await daemon.json(['clone', 'vms/disk.img', 'vms/clone.img']);
    await mustInside('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', image, url('clone.img'));
    await mustInside('qemu-io', '-f', 'raw', '-c', 'write -P 0x5a 1M 64k', '-c', 'flush', '-c', 'read -P 0x5a 1M 64k', url('clone.img'));
    expect(readFileSync(daemon.path('vms/clone.img')).subarray(MIB, MIB + 65_536).every((byte) => byte === 0x5a)).toBe(true);
    expect((await inside('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', image, url('clone.img'))).code).toBe(1);
    await mustInside('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', image, url('disk.img'));
  }, TEST_MS);

  it('lets a client go on with its handle when servers are killed, and when the daemon was stopped and started', async () => {
    const client = new NfsClient(cleanup, prefix);
    await client.mount({ server: '192.0.2.1', path: '/vms', version: 3, ...PORTS });
    const handle = await client.open('/lasting', constants.O_CREAT | constants.O_RDWR);
    await client.write({ handle, offset: 0, length: MIB, seed: 'lasting' });
    await client.fsync(handle);
    await daemon.waitForServer(await daemon.killServer(), TEST_MS);
    await client.check({ handle, offset: 0, length: MIB, seed: 'lasting' });

    const state = server.state();
    if (state.kind !== 'running') throw new Error('it does not run');
    signalProcess(state.pid, 'SIGKILL');
    await waitUntilGone(state.pid, 10_000);
    expect((await apply([exported()])).stderr).toBe('');
    await client.write({ handle, offset: MIB, length: MIB, seed: 'lasting' });
    await client.fsync(handle);

    const before = mountEntry(daemon.mountDir)?.minor;
    await server.end();
    await daemon.stop();
    // Takes the lowest number that is free.
    const other = makeTempDir('other', cleanup);
    await mustRun('mount', ['-t', 'ramfs', 'none', other]);
    cleanup.add(async () => { await mustRun('umount', [other]); });
    await daemon.start();
    expect(mountEntry(daemon.mountDir)?.minor).toBe(before);
    expect((await apply([exported()])).stderr).toBe('');
    await client.check({ handle, offset: 0, length: 2 * MIB, seed: 'lasting' });
    const again = new NfsClient(cleanup, prefix);
    await again.mount({ server: '192.0.2.1', path: '/vms', version: 3, ...PORTS });
    await again.check({ handle: await again.open('/lasting', constants.O_RDONLY), offset: 0, length: 2 * MIB, seed: 'lasting' });
  }, TEST_MS);

  it('ends with the last export, and nothing keeps the mount', async () => {
    expect((await apply([])).code).toBe(0);
    expect(server.state().kind).toBe('off');
    await daemon.stop();
  }, TEST_MS);
});
