/** NFS exports of a real mount by NFS-Ganesha, used by clients that are not ours: nfs-ls, nfs-cp, nfs-cat, and libnfs itself. */
import { createHash } from 'node:crypto';
import { constants, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ExportProcess } from '../../daemon/presenter/export-process.js';
import { createNfsPresenter } from '../../daemon/presenter/nfs/nfs.js';
import type { Export, Presenter } from '../../daemon/presenter/presenter.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort, presenterPlace } from '../support/exports-fixture.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { NfsClient } from '../support/nfs-client.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const TEST_MS = 240_000;
const KIB = 1024;
const { O_CREAT, O_RDONLY, O_RDWR, O_SYNC } = constants;
const call = { signal: new AbortController().signal };

function checksum(bytes: Uint8Array | string): string {
  return createHash('sha256').update(bytes).digest('hex');
}

describe.skipIf(lacks('/dev/fuse', 'ganesha.nfsd', 'nfs-ls', 'strace'))('NFS exports', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let presenter: Presenter;
  let port: number;
  let server: ExportProcess;
  let scratch: string;
  const warnings: string[] = [];

  const exported = (id: number, path: string, more: Partial<Export> = {}): Export => ({
    id, uuid: `0b5e8f5e-0000-4000-8000-${String(id).padStart(12, '0')}`, path, mountPath: daemon.path(path), kind: 'directory', sizeBytes: null, clients: ['127.0.0.1'], readOnly: false,
    options: { squash: 'none' }, ...more,
  });
  const url = (path: string): string => `nfs://127.0.0.1/${path}?version=4&nfsport=${port}`;
  const list = async (path: string): Promise<CommandResult> => await command('nfs-ls', [url(path)]);
  const namesIn = async (path: string): Promise<string[]> => (await mustRun('nfs-ls', [url(path)])).stdout.split('\n').flatMap((line) => line.split(/\s+/u).at(-1) ?? []).filter((name) => name !== '').sort();
  const pid = (): number => {
    const state = server.state();
    if (state.kind !== 'running') throw new Error(`the NFS server does not run: ${server.lastWords()}`);
    return state.pid;
  };
  const client = async (path: string): Promise<NfsClient> => {
    const made = new NfsClient(cleanup);
    await made.mount({ path, port });
    return made;
  };

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, startArguments: () => ['--nfs'] });
    scratch = makeTempDir('nfs', cleanup);
    const { directory } = presenterPlace('nfs', daemon, cleanup);
    port = await freePort();
    presenter = createNfsPresenter(
      { directory, address: '127.0.0.1', nfs: true, logger: { warn: (context, message) => { warnings.push(`${message} ${JSON.stringify(context)}`); } } },
      // libnfs does not renew its lease by itself; after a restart nobody waits for clients of before.
      { port, leaseSeconds: 120, graceSeconds: 2 },
    );
    server = new ExportProcess({ directory, name: 'ganesha' });
    cleanup.add(async () => { await presenter.end(call); });
    for (const container of ['vms', 'iso', 'late']) await daemon.json(['container', 'create', container]);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('are shown to clients, which list, copy in and copy out', async () => {
    expect(await presenter.probe(call)).toMatchObject({ usable: true });
    writeFileSync(daemon.path('iso/readme'), 'look and do not touch');
    expect(await presenter.apply([exported(1, 'vms'), exported(2, 'iso', { readOnly: true })], call)).toEqual([
      { id: 1, addresses: [`nfs://127.0.0.1:${port}/vms`] }, { id: 2, addresses: [`nfs://127.0.0.1:${port}/iso`] },
    ]);
    expect([await namesIn(''), await namesIn('iso')]).toEqual([['iso', 'vms'], ['readme']]);
    const file = join(scratch, 'small');
    // Of version 4, nfs-cp of libnfs 4.0 can write no more than this.
    writeFileSync(file, Buffer.alloc(3000, 'small content '));
    await mustRun('nfs-cp', [file, url('vms/small')]);
    expect(checksum(readFileSync(daemon.path('vms/small')))).toBe(checksum(readFileSync(file)));
    writeFileSync(daemon.path('vms/large'), Buffer.alloc(3_000_000, 'large content of a machine '));
    expect(checksum((await mustRun('nfs-cat', [url('vms/large')])).stdout)).toBe(checksum(readFileSync(daemon.path('vms/large'))));
  }, TEST_MS);

  it('shown again change nothing', async () => {
    const before = [pid(), readFileSync(server.configFile, 'utf8'), readFileSync(server.logFile, 'utf8').includes('SIGHUP')];
    await presenter.apply([exported(2, 'iso', { readOnly: true }), exported(1, 'vms')], call);
    expect([pid(), readFileSync(server.configFile, 'utf8'), readFileSync(server.logFile, 'utf8').includes('SIGHUP')]).toEqual(before);
    expect(before[2]).toBe(false);
  }, TEST_MS);

  it('that are read-only take no writes', async () => {
    const file = join(scratch, 'refused');
    writeFileSync(file, 'x');
    const refused = await command('nfs-cp', [file, url('iso/refused')]);
    expect([refused.code !== 0, refused.stderr]).toEqual([true, expect.stringContaining('ROFS')]);
    const reader = await client('/iso');
    await expect(reader.open('/readme', O_RDWR)).rejects.toThrow('ROFS');
    await expect(reader.unlink('/readme')).rejects.toThrow('ROFS');
    expect(readFileSync(daemon.path('iso/readme'), 'utf8')).toBe('look and do not touch');
  }, TEST_MS);

  it('are added, changed and taken back while others are in use, by the same server', async () => {
    const before = pid();
    const user = await client('/vms');
    const handle = await user.open('/kept', O_CREAT | O_RDWR);
    await user.write({ handle, offset: 0, length: 64 * KIB, seed: 'kept' });
    expect(await presenter.clientsOf(exported(1, 'vms'), call)).toEqual(['127.0.0.1']);
    expect(await presenter.clientsOf(exported(1, 'vms', { clients: ['192.0.2.0/24'] }), call)).toEqual([]);
    await presenter.apply([exported(1, 'vms'), exported(3, 'late')], call);
    expect([await namesIn(''), pid()]).toEqual([['late', 'vms'], before]);
    expect((await list('iso')).code).not.toBe(0);
    await user.check({ handle, offset: 0, length: 64 * KIB, seed: 'kept' });
    await user.write({ handle, offset: 64 * KIB, length: 8 * KIB, seed: 'kept' });
    await user.fsync(handle);
    expect(pid()).toBe(before);
  }, TEST_MS);

  it('are refused to clients that are not on the list, and open to them once they are', async () => {
    for (const others of [['127.0.0.2'], ['192.0.2.0/24', '2001:db8::7']]) {
      await presenter.apply([exported(1, 'vms', { clients: others }), exported(3, 'late')], call);
      expect((await list('vms')).code).not.toBe(0);
      expect((await list('late')).code).toBe(0);
    }
    await presenter.apply([exported(1, 'vms', { clients: ['127.0.0.0/8'] }), exported(3, 'late')], call);
    expect(await namesIn('vms')).toContain('large');
    await presenter.apply([exported(1, 'vms', { clients: ['0.0.0.0/0', '::/0'] }), exported(3, 'late')], call);
    expect(await namesIn('vms')).toContain('large');
  }, TEST_MS);

  it('give root of a client the rights of nobody, unless they say otherwise', async () => {
    mkdirSync(daemon.path('late/private'), { mode: 0o700 });
    writeFileSync(daemon.path('late/private/key'), 'secret');
    expect(await namesIn('late/private')).toEqual(['key']);
    await presenter.apply([exported(1, 'vms'), exported(3, 'late', { options: {} })], call);
    expect((await list('late/private')).code).not.toBe(0);
    const guest = await client('/late');
    await expect(guest.open('/mine', O_CREAT | O_RDWR)).rejects.toThrow('ACCES');
    await presenter.apply([exported(1, 'vms'), exported(3, 'late')], call);
  }, TEST_MS);

  it('sync what must be stable before they answer', async () => {
    const user = await client('/vms');
    const handle = await user.open('/stable', O_CREAT | O_RDWR | O_SYNC);
    const trace = join(scratch, 'trace');
    const tracing = command('strace', ['-f', '-p', String(pid()), '-e', 'trace=pwrite64,pwritev,pwritev2,fsync,fdatasync,sendmsg,writev', '-o', trace], { timeoutMs: TEST_MS });
    for (let tries = 0; tries < 200 && !/TracerPid:\s*[1-9]/u.test(readFileSync(`/proc/${pid()}/status`, 'utf8')); tries += 1) await new Promise((done) => { setTimeout(done, 25); });
    await user.write({ handle, offset: 0, length: 3 * KIB, seed: 'stable' });
    const tracer = /TracerPid:\s*([0-9]+)/u.exec(readFileSync(`/proc/${pid()}/status`, 'utf8'))?.[1];
    process.kill(Number(tracer), 'SIGINT');
    await tracing;
    const calls = readFileSync(trace, 'utf8').split('\n').flatMap((line) => /^\d+ +(\w+)\(/u.exec(line)?.[1] ?? []);
    const written = calls.findIndex((name) => name.startsWith('pwrite'));
    const after = calls.slice(written + 1);
    expect(written).toBeGreaterThanOrEqual(0);
    expect(after.findIndex((name) => name === 'fsync' || name === 'fdatasync')).toBe(0);
    expect(after.length).toBeGreaterThan(1);
  }, TEST_MS);

  it('go on when the server of the mount is killed under load: who waits is answered, and nothing is lost', async () => {
    const user = await client('/vms');
    const handle = await user.open('/loaded', O_CREAT | O_RDWR);
    const end = new AbortController();
    const load = (async () => {
      let piece = 0;
      for (; !end.signal.aborted; piece += 1) {
        await user.write({ handle, offset: piece * 48 * KIB, length: 48 * KIB, seed: 'loaded' });
        if (piece % 8 === 7) await user.fsync(handle);
      }
      return piece;
    })();
    load.catch(() => undefined);
    for (let kills = 0; kills < 2; kills += 1) await daemon.waitForServer(await daemon.killServer(), TEST_MS);
    end.abort();
    const pieces = await load;
    await user.fsync(handle);
    expect(pieces).toBeGreaterThan(3);
    await user.check({ handle, offset: 0, length: pieces * 48 * KIB, seed: 'loaded' });
    const again = await client('/vms');
    await again.check({ handle: await again.open('/loaded', O_RDONLY), offset: 0, length: pieces * 48 * KIB, seed: 'loaded' });
  }, TEST_MS);

  it('that the server refuses leave those of before shown', async () => {
    const before = pid();
    const missing = exported(4, 'late', { path: 'nowhere', mountPath: daemon.path('nowhere') });
    await expect(presenter.apply([exported(1, 'vms'), exported(3, 'late'), missing], call)).rejects.toThrow(/nowhere/u);
    expect([await namesIn(''), pid()]).toEqual([['late', 'vms'], before]);
    await expect(presenter.apply([exported(1, 'vms', { options: { port: '1' } }), exported(3, 'late', { options: { port: '2' } })], call)).rejects.toThrow('one port');
    expect((await list('vms')).code).toBe(0);
    expect(warnings).toEqual([]);
  }, TEST_MS);

  it('are lost and found when the NFS server is killed', async () => {
    const shown = [exported(1, 'vms'), exported(3, 'late')];
    expect(await presenter.lost?.(shown, call)).toBeNull();
    const killed = pid();
    process.kill(killed, 'SIGKILL');
    for (let tries = 0; tries < 200 && server.state().kind === 'running'; tries += 1) await new Promise((done) => { setTimeout(done, 25); });
    expect(await presenter.lost?.(shown, call)).toContain('ended');
    await presenter.apply(shown, call);
    expect(pid()).not.toBe(killed);
    expect(await namesIn('vms')).toContain('loaded');
  }, TEST_MS);

  it('are there again after a stop and a start, with all that was written', async () => {
    await presenter.end(call);
    await daemon.stop();
    await daemon.start();
    await presenter.apply([exported(1, 'vms'), exported(3, 'late')], call);
    const user = await client('/vms');
    await user.check({ handle: await user.open('/kept', O_RDONLY), offset: 0, length: 72 * KIB, seed: 'kept' });
    await user.check({ handle: await user.open('/stable', O_RDONLY), offset: 0, length: 3 * KIB, seed: 'stable' });
    expect(checksum((await mustRun('nfs-cat', [url('vms/large')])).stdout)).toBe(checksum(readFileSync(daemon.path('vms/large'))));
  }, TEST_MS);

  it('end with the last of them, and nothing keeps the mount', async () => {
    const before = pid();
    expect(await presenter.apply([], call)).toEqual([]);
    expect([server.state(), (await list('')).code !== 0]).toEqual([{ kind: 'off' }, true]);
    expect(() => process.kill(before, 0)).toThrow();
    await daemon.stop();
    daemon.assertQuietLog([/the server was killed by SIGKILL|recovered what the last server had acknowledged/u]);
  }, TEST_MS);
});
