/**
 * Disks shown over NBD to real clients that are none of ours: who is refused, by address and by certificate; that TLS is on the wire and nothing goes beside it; and
 * that a client goes on when what it is connected to is killed. What a client reads and writes otherwise is in exports.test.ts.
 */
import { writeFileSync } from 'node:fs';
import { createServer, connect } from 'node:net';
import { join } from 'node:path';

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { sha256Of } from '../support/exports-fixture.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { argumentsOf, isAlive, processesNaming, signalProcess, waitUntil, waitUntilGone } from '../support/processes.js';
import { startQemuIo } from '../support/qemu-io.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { makeAuthority, type Authority } from '../support/tls-fixture.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const DISK_BYTES = 8 * MIB;
const TEST_MS = 200_000;
const LONG = { timeoutMs: 120_000 };
/** On the disk, and searched for on the wire. */
const SECRET = 'what the disk holds and the wire must not show';

describe.skipIf(lacks('/dev/fuse', 'nbdkit', 'nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io', 'openssl'))('disks shown over NBD', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let work: string;
  let image: string;
  let ours: Authority;
  let others: Authority;
  let number = 0;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    work = makeTempDir('nbd', cleanup);
    image = join(work, 'source.img');
    makePatternImage(image, { sizeBytes: DISK_BYTES, seed: 3 });
    await mustRun('dd', [`of=${image}`, 'conv=notrunc', 'status=none'], { input: SECRET.repeat(200) });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/base.img']);
    [ours, others] = [await makeAuthority('ours', cleanup), await makeAuthority('others', cleanup)];
  }, TEST_MS);
  afterEach(async () => { for (const { id } of await daemon.json<ExportInfo[]>(['exports'])) await daemon.json(['withdraw', String(id), '--force']); });
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  interface Shown { readonly disk: string; readonly path: string; readonly uri: string; readonly port: number }

  /** A clone of the image, of its own. */
  async function present(...args: readonly string[]): Promise<Shown> {
    number += 1;
    const disk = `vms/d${number}.img`;
    await daemon.json(['clone', 'vms/base.img', disk]);
    const { addresses: [uri = ''] } = await daemon.json<ExportInfo>(['present', disk, '--as', 'nbd', ...args]);
    return { disk, path: daemon.path(disk), uri, port: Number(new URL(uri).port) };
  }

  const secured = (shown: Shown, certificates: string): string => `${shown.uri.replace('127.0.0.1', 'localhost')}?tls-certificates=${certificates}`;
  /** QEMU's client; without certificates it says everything in the clear. */
  const qemu = (shown: Shown, certificates?: string): { readonly more: readonly string[]; readonly options: string } => ({
    more: certificates === undefined ? [] : ['--object', `tls-creds-x509,id=tls0,endpoint=client,verify-peer=yes,dir=${certificates}`],
    options: `driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=localhost,file.server.port=${shown.port},file.export=${shown.disk}${certificates === undefined ? '' : ',file.tls-creds=tls0'}`,
  });
  async function qemuInfo(shown: Shown, certificates?: string): Promise<CommandResult> {
    const { more, options } = qemu(shown, certificates);
    return await command('qemu-img', ['info', ...more, '--image-opts', options], LONG);
  }
  async function qemuIo(shown: Shown, commands: readonly string[], certificates?: string): Promise<CommandResult> {
    const { more, options } = qemu(shown, certificates);
    return await command('qemu-io', [...more, '--image-opts', options, ...commands.flatMap((each) => ['-c', each])], LONG);
  }

  it('are refused to every client whose address is not on the list, and given to it once it is', async () => {
    const shown = await present('--to', '127.0.0.2,127.0.0.64/26');
    const refusedTo: readonly (readonly [string, readonly string[]])[] = [
      ['nbdinfo', [shown.uri]], ['nbdinfo', ['--list', shown.uri]], ['nbdcopy', [shown.uri, join(work, 'stolen')]], ['qemu-img', ['info', '-f', 'raw', shown.uri]],
      ['qemu-io', ['-f', 'raw', '-c', 'write -P 9 0 4k', shown.uri]],
    ];
    for (const [program, args] of refusedTo) expect((await command(program, args, LONG)).code, program).not.toBe(0);
    expect(await sha256Of(shown.path)).toBe(await sha256Of(image));
    await daemon.json(['withdraw', shown.disk]);
    const { addresses: [uri = ''] } = await daemon.json<ExportInfo>(['present', shown.disk, '--as', 'nbd', '--to', '127.0.0.1']);
    for (const [program, args] of refusedTo) expect((await command(program, args.map((each) => (each === shown.uri ? uri : each)), LONG)).code, program).toBe(0);
    expect(await sha256Of(join(work, 'stolen'))).toBe(await sha256Of(image));
    expect(await sha256Of(shown.path)).not.toBe(await sha256Of(image));
  }, TEST_MS);

  it('with TLS are shown to nobody in the clear, and to whoever knows the authority: by nbdinfo, nbdcopy and QEMU, byte for byte', async () => {
    const shown = await present('--to', '127.0.0.1', '--option', `tls=${ours.server}`);
    expect(shown.uri).toMatch(/^nbds:\/\//u);
    const clear = await command('nbdinfo', [shown.uri.replace('nbds:', 'nbd:')], LONG);
    expect([clear.code, clear.stderr]).toEqual([1, expect.stringMatching(/TLS|not supported/iu)]);
    expect(await qemuInfo(shown)).toMatchObject({ code: 1, stderr: expect.stringMatching(/TLS/u) as string });
    expect(await qemuIo(shown, ['write -P 9 0 4k'])).toMatchObject({ code: 1 });
    expect(await sha256Of(shown.path)).toBe(await sha256Of(image));
    // Who trusts another authority does not take this server for the one he meant.
    expect((await command('nbdinfo', [secured(shown, others.stranger)], LONG)).code).not.toBe(0);

    const copy = join(work, 'secured');
    expect(await command('nbdinfo', ['--size', secured(shown, ours.stranger)], LONG)).toMatchObject({ code: 0, stdout: `${DISK_BYTES}\n` });
    await mustRun('nbdcopy', [secured(shown, ours.stranger), copy], LONG);
    expect(await sha256Of(copy)).toBe(await sha256Of(image));
    expect(await qemuInfo(shown, ours.stranger)).toMatchObject({ code: 0 });
    expect(await qemuIo(shown, ['write -P 7 1M 64k', 'flush', 'read -P 7 1M 64k'], ours.stranger)).toMatchObject({ code: 0 });
    await mustRun('qemu-io', ['-f', 'raw', '-c', 'write -P 7 1M 64k', copy]);
    expect(await sha256Of(shown.path)).toBe(await sha256Of(copy));
  }, TEST_MS);

  it('with TLS are not to be read off the wire, as they are without it', async () => {
    const [clear, hidden] = [await present('--to', '127.0.0.1'), await present('--to', '127.0.0.1', '--option', `tls=${ours.server}`)];
    const wire = async (shown: Shown, query: string): Promise<string> => {
      const tap = await listen(shown.port);
      const uri = new URL(shown.uri);
      await mustRun('nbdcopy', [`${uri.protocol}//localhost:${tap.port}${uri.pathname}${query}`, join(work, 'tapped')], LONG);
      expect(await sha256Of(join(work, 'tapped'))).toBe(await sha256Of(image));
      return tap.heard();
    };
    expect(await wire(clear, '')).toContain(SECRET);
    const heard = await wire(hidden, `?tls-certificates=${ours.stranger}`);
    expect(heard.length).toBeGreaterThan(DISK_BYTES);
    expect(heard).not.toContain(SECRET);
  }, TEST_MS);

  it('with verify are shown to who has a certificate of the authority, and to nobody without one, or with another\'s', async () => {
    const shown = await present('--to', '127.0.0.1', '--option', `tls=${ours.server}`, '--option', 'verify=yes');
    // What is asked is answered only behind the handshake: the client hears of it with what it asks first.
    const impostor = makeTempDir('impostor', cleanup);
    await mustRun('cp', [join(ours.stranger, 'ca-cert.pem'), join(others.client, 'client-cert.pem'), join(others.client, 'client-key.pem'), impostor]);
    for (const certificates of [ours.stranger, impostor]) {
      expect((await command('nbdinfo', ['--size', secured(shown, certificates)], LONG)).code).not.toBe(0);
      expect((await command('nbdcopy', [secured(shown, certificates), join(work, 'none')], LONG)).code).not.toBe(0);
      expect((await qemuInfo(shown, certificates)).code).not.toBe(0);
      expect((await qemuIo(shown, ['write -P 9 0 4k'], certificates)).code).not.toBe(0);
    }
    expect(await sha256Of(shown.path)).toBe(await sha256Of(image));
    expect(await command('nbdinfo', ['--size', secured(shown, ours.client)], LONG)).toMatchObject({ code: 0, stdout: `${DISK_BYTES}\n` });
    expect(await qemuInfo(shown, ours.client)).toMatchObject({ code: 0 });
    expect(await qemuIo(shown, ['write -P 9 0 4k', 'read -P 9 0 4k'], ours.client)).toMatchObject({ code: 0 });
  }, TEST_MS);

  it('are converted into and compared by QEMU, and read-only ones take no write, discard or zeroes', async () => {
    const shown = await present('--to', '127.0.0.1');
    const fresh = join(work, 'fresh.qcow2');
    const raw = join(work, 'fresh.raw');
    makePatternImage(raw, { sizeBytes: DISK_BYTES, seed: 4 });
    await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, fresh], LONG);
    await mustRun('qemu-img', ['convert', '-n', '-f', 'qcow2', '-O', 'raw', fresh, shown.uri], LONG);
    expect(await command('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', fresh, shown.uri], LONG)).toMatchObject({ code: 0 });
    expect(await sha256Of(shown.path)).toBe(await sha256Of(raw));
    await daemon.json(['withdraw', shown.disk]);
    // A disk is raw whatever it holds: a header of another format in it is no more than bytes.
    const { addresses: [uri = ''] } = await daemon.json<ExportInfo>(['present', shown.disk, '--as', 'nbd', '--to', '127.0.0.1', '--read-only']);
    const about = JSON.parse((await mustRun('nbdinfo', ['--json', uri], LONG)).stdout) as { readonly exports: readonly Record<string, unknown>[] };
    expect(about.exports).toMatchObject([{ is_read_only: true, can_trim: false, can_zero: false, 'export-size': DISK_BYTES }]);
    for (const each of ['write -P 1 0 4k', 'write -z 0 4k', 'discard 0 4k']) expect((await command('qemu-io', ['-f', 'raw', '-c', each, uri], LONG)).code, each).not.toBe(0);
    expect((await command('nbdcopy', [image, uri], LONG)).code).not.toBe(0);
    expect(await sha256Of(shown.path)).toBe(await sha256Of(raw));
  }, TEST_MS);

  it('serve a client on after a kill of Offshoot\'s server, and of the nbdkit that it is connected to: nothing that it wrote is lost', async () => {
    const shown = await present('--to', '127.0.0.1');
    const client = startQemuIo(`${qemu(shown).options.replace('localhost', '127.0.0.1')},file.reconnect-delay=120`, cleanup);
    await client.ask('write -P 1 0 1M');
    await daemon.waitForServer(await daemon.killServer(), TEST_MS);
    await client.ask('write -P 2 1M 1M');
    await client.ask('write -P 3 2M 1M');
    for (const pid of processesNaming(daemon.mountDir).filter((each) => isAlive(each) && argumentsOf(each).includes('exportname='))) signalProcess(pid, 'SIGKILL');
    await client.ask('write -P 4 3M 1M');
    for (const [at, what] of [['0', 1], ['1M', 2], ['2M', 3], ['3M', 4]] as const) await client.ask(`read -P ${what} ${at} 1M`);
    await client.kill();
    const wanted = join(work, 'wanted');
    await mustRun('cp', ['--', image, wanted]);
    await mustRun('qemu-io', ['-f', 'raw', '-c', 'write -P 1 0 1M', '-c', 'write -P 2 1M 1M', '-c', 'write -P 3 2M 1M', '-c', 'write -P 4 3M 1M', wanted]);
    expect(await sha256Of(shown.path)).toBe(await sha256Of(wanted));
    expect((await daemon.json<ExportInfo[]>(['exports']))[0]).toMatchObject({ state: 'shown', addresses: [shown.uri], losses: 0 });
  }, TEST_MS);

  it('serve a client on after the door itself is killed: it notices nothing, is counted by the next door, and withdrawing ends it only with --force', async () => {
    const shown = await present('--to', '127.0.0.1');
    const client = startQemuIo(qemu(shown).options.replace('localhost', '127.0.0.1'), cleanup);
    await client.ask('write -P 1 0 1M');
    const [guest, ...more] = nbdkits();
    expect([guest, more]).toEqual([expect.any(Number), []]);
    await killDoor();
    await client.ask('write -P 2 1M 1M');
    await client.ask('flush');
    await waitUntilShown(shown);
    for (const [at, what] of [['0', 1], ['1M', 2]] as const) await client.ask(`read -P ${what} ${at} 1M`);
    // The next door lets others in, beside the one that it never saw.
    expect(await command('nbdinfo', ['--size', shown.uri], LONG)).toMatchObject({ code: 0, stdout: `${DISK_BYTES}\n` });
    await client.ask('write -P 3 2M 1M');
    expect(nbdkits()).toEqual([guest]);
    const wanted = join(work, 'wanted-door');
    await mustRun('cp', ['--', image, wanted]);
    await mustRun('qemu-io', ['-f', 'raw', '-c', 'write -P 1 0 1M', '-c', 'write -P 2 1M 1M', '-c', 'write -P 3 2M 1M', wanted]);
    expect(await sha256Of(shown.path)).toBe(await sha256Of(wanted));

    // Another export goes and comes meanwhile: what does not concern it does not end it.
    const other = await present('--to', '127.0.0.1');
    await daemon.json(['withdraw', other.disk]);
    expect(nbdkits()).toEqual([guest]);
    const refusal = await daemon.cli(['withdraw', shown.disk, '--json']);
    expect([refusal.code === 0, refusal.stderr]).toEqual([false, expect.stringMatching(/in use as nbd by 127\.0\.0\.1.*--force/u)]);
    const another = await present('--to', '127.0.0.1');
    expect(nbdkits()).toEqual([guest]);
    await daemon.json(['withdraw', shown.disk, '--force']);
    expect(await waitUntil(() => nbdkits().length === 0, TEST_MS)).toBe(true);
    await expect(client.ask('read 0 4k')).rejects.toThrow(/error|failed/iu);
    await client.kill();

    // With nothing shown there is no door that could end it.
    const last = startQemuIo(qemu(another).options.replace('localhost', '127.0.0.1'), cleanup);
    await last.ask('write -P 4 0 4k');
    await killDoor();
    await daemon.json(['withdraw', another.disk, '--force']);
    expect(nbdkits()).toEqual([]);
    await last.kill();
  }, TEST_MS);

  it('are copied whole by a client whose door is killed in the middle', async () => {
    const shown = await present('--to', '127.0.0.1');
    const copy = join(work, 'copied');
    // The copy is held up at its output until the door is dead.
    await mustRun('mkfifo', [join(work, 'gate')]);
    const copying = command('bash', ['-c', 'nbdcopy "$1" - | { read -r _ < "$2"; cat > "$3"; }; exit $PIPESTATUS', 'bash', shown.uri, join(work, 'gate'), copy], LONG);
    expect(await waitUntil(() => nbdkits().length > 0, TEST_MS)).toBe(true);
    await killDoor();
    await mustRun('bash', ['-c', 'echo > "$1"', 'bash', join(work, 'gate')], LONG);
    expect(await copying).toMatchObject({ code: 0 });
    expect(await sha256Of(copy)).toBe(await sha256Of(image));
    await waitUntilShown(shown);
  }, TEST_MS);

  it('are ended by a stop, with the nbdkits of a door that was killed', async () => {
    const own = await startTestDaemon({ transport: 'kernel', cleanup });
    await own.json(['container', 'create', 'vms']);
    await own.json(['import', image, 'vms/base.img']);
    const { addresses: [uri = ''] } = await own.json<ExportInfo>(['present', 'vms/base.img', '--as', 'nbd', '--to', '127.0.0.1']);
    const client = startQemuIo(`driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port=${new URL(uri).port},file.export=vms/base.img`, cleanup);
    await client.ask('write -P 1 0 1M');
    expect(nbdkits(own)).toHaveLength(1);
    await killDoor(own);
    const refusal = await own.cli(['daemon', 'stop', '--json']);
    expect([refusal.code === 0, refusal.stderr]).toEqual([false, expect.stringContaining('127.0.0.1')]);
    await client.ask('read -P 1 0 1M');
    await own.json(['daemon', 'stop', '--force']);
    expect(nbdkits(own)).toEqual([]);
    await client.kill();
  }, TEST_MS);

  it('with a name of any kind are shown under it and under no other, and a name that is none is refused', async () => {
    const name = 'a b/ü?#%20"\'=;$(x) --help';
    const shown = await present('--to', '127.0.0.1', '--option', `name=${name}`);
    expect(decodeURIComponent(new URL(shown.uri).pathname)).toBe(`/${name}`);
    expect(await command('nbdinfo', ['--size', shown.uri], LONG)).toMatchObject({ code: 0, stdout: `${DISK_BYTES}\n` });
    for (const other of ['', 'a%20b', shown.disk]) expect((await command('nbdinfo', ['--size', `nbd://127.0.0.1:${shown.port}/${other}`], LONG)).code, other).not.toBe(0);
    for (const bad of ['', 'x\ny', 'x\u001b[0m', 'x'.repeat(256)]) {
      const refusal = await daemon.cli(['present', 'vms/base.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', `name=${bad}`, '--json']);
      expect([refusal.code, refusal.stderr], JSON.stringify(bad)).toEqual([2, expect.stringContaining('name')]);
    }
  }, TEST_MS);

  it('are refused with certificates that are no files, lie under the mount, or are not whole', async () => {
    const half = makeTempDir('half', cleanup);
    writeFileSync(join(half, 'ca-cert.pem'), 'x');
    for (const [directory, words] of [['relative', 'absolute path'], [daemon.path('vms'), 'under the mount'], [half, 'server-cert.pem'], [`${work}/../x`, 'absolute path']] as const) {
      const refusal = await daemon.cli(['present', 'vms/base.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', `tls=${directory}`, '--json']);
      expect([refusal.code, refusal.stderr], directory).toEqual([2, expect.stringContaining(words)]);
    }
    const refusal = await daemon.cli(['present', 'vms/base.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', 'verify=yes', '--json']);
    expect([refusal.code, refusal.stderr]).toEqual([2, expect.stringContaining('needs the option tls')]);
  }, TEST_MS);

  function nbdkits(of: TestDaemon = daemon): number[] {
    return processesNaming(of.mountDir).filter((pid) => isAlive(pid) && argumentsOf(pid).includes('exportname='));
  }

  async function killDoor(of: TestDaemon = daemon): Promise<void> {
    const [door, ...more] = processesNaming(of.mountDir).filter((pid) => isAlive(pid) && argumentsOf(pid).includes('/nbd/main.js'));
    if (door === undefined || more.length > 0) throw new Error(`${more.length + (door === undefined ? 0 : 1)} doors run`);
    signalProcess(door, 'SIGKILL');
    expect(await waitUntilGone(door, TEST_MS)).toBe(true);
  }

  /** By another door than the one that was killed. */
  async function waitUntilShown(shown: Shown): Promise<void> {
    const isShown = async (): Promise<boolean> => (await daemon.json<ExportInfo[]>(['exports'])).some(({ addresses, state, losses }) => addresses.includes(shown.uri) && state === 'shown' && losses > 0);
    expect(await waitUntil(async () => (await isShown()) && (await command('nbdinfo', ['--size', shown.uri], LONG)).code === 0, TEST_MS)).toBe(true);
  }

  /** Stands between a client and the server, and hears what the server says. */
  async function listen(port: number): Promise<{ readonly port: number; heard(): string }> {
    const chunks: Buffer[] = [];
    const server = createServer((client) => {
      const far = connect({ host: '127.0.0.1', port });
      far.on('data', (chunk: Buffer) => { chunks.push(chunk); });
      for (const socket of [client, far]) socket.on('error', () => { client.destroy(); far.destroy(); });
      client.pipe(far).pipe(client);
    });
    cleanup.add(() => { server.close(); });
    await new Promise<void>((resolve) => { server.listen({ host: '127.0.0.1', port: 0 }, resolve); });
    return { port: (server.address() as { port: number }).port, heard: () => Buffer.concat(chunks).toString('latin1') };
  }
});
