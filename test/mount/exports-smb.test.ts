/**
 * Directories of a real mount, shown by a real smbd of ours and used by a real client, smbclient. On loopback alone, as users that every Debian has.
 */
import { spawn } from 'node:child_process';
import { chmodSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { dirname, join } from 'node:path';

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { exportProcessesIn } from '../../daemon/presenter/export-process.js';
import type { PresenterPlace } from '../../daemon/presenter/place.js';
import type { Export, Presenter } from '../../daemon/presenter/presenter.js';
import { createSmbPresenter } from '../../daemon/presenter/smb/smb.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { exportOf, freePort, presenterPlace, sha256Of, started } from '../support/exports-fixture.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { processesNaming, waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const TEST_MS = 120_000;
/** Of Debian's base, with nothing of their own. */
const [ALICE, BOB] = ['games', 'backup'];
const PASSWORDS: Readonly<Record<string, string>> = { [ALICE]: 'alice: "secret" %u', [BOB]: 'bob-has-another' };
const signal = new AbortController().signal;

describe.skipIf(lacks('/dev/fuse', 'smbd', 'testparm', 'smbpasswd', 'smbcontrol', 'smbclient', 'smbtorture', 'strace'))('directories shown by SMB', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let place: PresenterPlace;
  let presenter: Presenter;
  let image: string;
  let passwordFile: string;
  let work: string;
  let port: number;
  let number = 0;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    // Users have to get through to the mount.
    chmodSync(dirname(daemon.mountDir), 0o711);
    place = presenterPlace('smb', daemon, cleanup);
    presenter = started(createSmbPresenter(place), cleanup);
    work = makeTempDir('smb', cleanup);
    image = join(work, 'source.img');
    makePatternImage(image, { sizeBytes: 4 * MIB, seed: 8 });
    passwordFile = join(work, 'passwords');
    writePasswords(PASSWORDS);
    port = await freePort();
  }, TEST_MS);
  afterEach(async () => { await presenter.apply([], { signal }); });
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  function writePasswords(passwords: Readonly<Record<string, string>>): void {
    writeFileSync(passwordFile, Object.entries(passwords).map(([user, password]) => `${user}:${password}\n`).join(''), { mode: 0o600 });
    for (const [user, password] of Object.entries(passwords)) writeFileSync(join(work, `auth-${user}`), `username=${user}\npassword=${password}\n`, { mode: 0o600 });
  }

  /** A container that belongs to Alice. */
  async function directoryExport(given: Partial<Export> = {}): Promise<Export> {
    number += 1;
    const name = `c${number} [global], x`;
    await daemon.json(['container', 'create', name]);
    await mustRun('chown', [ALICE, '--', daemon.path(name)]);
    const { options, ...rest } = given;
    const wanted = exportOf(daemon, name, { kind: 'directory', sizeBytes: null, clients: [ALICE], options: { listen: `127.0.0.1:${port}`, 'password-file': passwordFile, ...options }, ...rest });
    presenter.check(wanted);
    return { ...wanted, options: await presenter.settle?.(wanted, [], { signal }) ?? {} };
  }

  const show = async (...wanted: Export[]): Promise<readonly string[]> => (await presenter.apply(wanted, { signal })).flatMap(({ addresses }) => addresses);
  const argumentsFor = (shown: Export, user: string, more: readonly string[] = []): readonly string[] =>
    ['-s', '/dev/null', '-A', join(work, `auth-${user}`), '-p', String(port), ...more, `//127.0.0.1/${shown.options['share'] ?? ''}`];
  const client = async (shown: Export, commands: string, { user = ALICE, more = [] }: { readonly user?: string; readonly more?: readonly string[] } = {}): Promise<CommandResult> =>
    await command('smbclient', [...argumentsFor(shown, user, more), '-c', commands], { cwd: work });

  it('take and give files byte for byte, also after a kill of the server and of smbd', { timeout: TEST_MS }, async () => {
    const shown = await directoryExport();
    expect(await show(shown)).toEqual([`smb://127.0.0.1:${port}/${shown.options['share'] ?? ''}`]);
    expect(await client(shown, 'mkdir sub; cd sub; put source.img a.img; ls')).toMatchObject({ code: 0, stdout: expect.stringMatching(/a\.img +[AN]+ +4194304 /u) as string });
    await daemon.waitForServer(await daemon.killServer());
    expect(await client(shown, 'get sub/a.img back-1.img')).toMatchObject({ code: 0 });
    for (const server of exportProcessesIn(place.directory)) await server.end({ termMs: 0 });
    expect(await presenter.lost?.([shown], { signal })).toContain(String(port));
    await createSmbPresenter(place).apply([shown], { signal });
    expect(await presenter.lost?.([shown], { signal })).toBeNull();
    expect(await client(shown, 'get sub/a.img back-2.img; rename sub/a.img sub/b.img; ls sub/*')).toMatchObject({ code: 0, stdout: expect.stringContaining('b.img') as string });
    const wanted = await sha256Of(image);
    for (const file of ['back-1.img', 'back-2.img']) expect(await sha256Of(join(work, file))).toBe(wanted);
    expect(await sha256Of(join(shown.mountPath, 'sub/b.img'))).toBe(wanted);
    expect((await mustRun('stat', ['-c', '%U %a', '--', join(shown.mountPath, 'sub/b.img')])).stdout).toBe(`${ALICE} 600\n`);
  });

  it('let in their users with their passwords, from their addresses, by SMB 3, encrypted; and nobody else', { timeout: TEST_MS }, async () => {
    const [mine, his] = [await directoryExport(), await directoryExport({ clients: [BOB] })];
    const far = await directoryExport({ options: { hosts: '192.0.2.0/24,2001:db8::/32' } });
    const near = await directoryExport({ options: { hosts: '192.0.2.0/24,127.0.0.0/8' } });
    await show(mine, his, far, near);
    writeFileSync(join(work, 'auth-wrong'), `username=${ALICE}\npassword=wrong-password\n`);
    writeFileSync(join(work, 'auth-root'), 'username=root\npassword=x\n');
    expect(await client(mine, 'ls')).toMatchObject({ code: 0 });
    expect(await client(near, 'ls')).toMatchObject({ code: 0 });
    expect(await client(his, 'ls', { user: BOB })).toMatchObject({ code: 0 });
    const refusals = [
      [mine, { user: BOB }, 'ACCESS_DENIED'], [his, {}, 'ACCESS_DENIED'], [far, {}, 'ACCESS_DENIED'],
      [mine, { user: 'wrong' }, 'LOGON_FAILURE'], [mine, { user: 'root' }, 'LOGON_FAILURE'], [mine, { more: ['-N', '-U', '%'] }, 'ACCESS_DENIED'],
      [mine, { more: ['-m', 'SMB2'] }, 'NOT_SUPPORTED|INVALID_NETWORK_RESPONSE|CONNECTION_'],
    ] as const;
    for (const [shown, how, why] of refusals) {
      const { code, stdout, stderr } = await client(shown, 'ls', how);
      expect([code, `${stdout}${stderr}`], JSON.stringify(how)).toEqual([1, expect.stringMatching(why)]);
    }
  });

  it('open what their user may, follow no link, and write nothing where they are read-only', { timeout: TEST_MS }, async () => {
    const shown = await directoryExport();
    await mustRun('sh', ['-c', 'cd -- "$1" && echo secret >root && chmod 600 root && ln -s /etc/passwd leak && ln -s / out && echo mine >mine && chown "$2" mine', 'sh', shown.mountPath, ALICE]);
    await show(shown);
    for (const file of ['root', 'leak', 'out/etc/passwd']) {
      expect(await client(shown, `get ${file} stolen`), file).toMatchObject({ code: 1, stdout: expect.stringMatching(/ACCESS_DENIED|NOT_FOUND|STOPPED_ON_SYMLINK/u) as string });
    }
    expect(await client(shown, 'get mine')).toMatchObject({ code: 0 });
    expect(readFileSync(join(work, 'mine'), 'utf8')).toBe('mine\n');
    await show({ ...shown, readOnly: true });
    for (const commands of ['put source.img mine', 'put source.img new', 'rm mine', 'mkdir x']) {
      expect((await client(shown, commands)).stdout, commands).toMatch(/ACCESS_DENIED|MEDIA_WRITE_PROTECTED/u);
    }
    expect((await mustRun('ls', ['-A', '--', shown.mountPath])).stdout).toBe('leak\nmine\nout\nroot\n');
    expect(await client(shown, 'get mine')).toMatchObject({ code: 0 });
  });

  it('sync to the disk what a client flushes, before it is answered', { timeout: TEST_MS }, async () => {
    const shown = await directoryExport();
    await show(shown);
    const [server] = exportProcessesIn(place.directory);
    const state = server?.state();
    if (state?.kind !== 'running') throw new Error('smbd does not run');
    const trace = join(work, 'trace');
    const tracer = spawn('strace', ['-f', '-p', String(state.pid), '-e', 'trace=fsync,fdatasync', '-o', trace], { stdio: 'ignore' });
    cleanup.add(() => { tracer.kill('SIGKILL'); });
    expect(await waitUntil(() => /TracerPid:\s*[1-9]/u.test(readFileSync(`/proc/${state.pid}/status`, 'utf8')), 30_000)).toBe(true);
    // Creates a file, and asks for FLUSH and CLOSE in one compound; fails unless both are answered well.
    const flushed = await command('smbtorture', [
      '-s', '/dev/null', '-A', join(work, `auth-${ALICE}`), '-p', String(port), '--client-protection=encrypt', '--format=subunit', `//127.0.0.1/${shown.options['share'] ?? ''}`, 'smb2.compound_async.flush_close',
    ], { cwd: work, timeoutMs: 60_000 });
    expect(flushed.code, `${flushed.stdout}${flushed.stderr}`).toBe(0);
    expect(flushed.stdout).toMatch(/^success: .*flush_close/mu);
    expect(await waitUntil(() => /(?:fsync|fdatasync)\(\d+\) += 0|resumed>.*= 0/u.test(readFileSync(trace, 'latin1')), 10_000), readFileSync(trace, 'latin1')).toBe(true);
    tracer.kill('SIGINT');
  });

  it('are not disturbed by what happens to others; who is taken off is sent away, and a new password counts', { timeout: TEST_MS }, async () => {
    const [open, other] = [await directoryExport({ clients: [ALICE, BOB] }), await directoryExport()];
    await show(open);
    const shell = spawn('smbclient', argumentsFor(open, ALICE, ['--client-protection=off']), { stdio: ['pipe', 'pipe', 'pipe'], cwd: work });
    cleanup.add(() => { shell.kill('SIGKILL'); });
    let said = '';
    for (const stream of [shell.stdout, shell.stderr]) stream.on('data', (chunk: Buffer) => { said += chunk.toString(); });
    const ask = async (text: string, answer: RegExp): Promise<void> => {
      said = '';
      shell.stdin.write(`${text}\n`);
      expect(await waitUntil(() => answer.test(said), 30_000), said).toBe(true);
    };
    await ask('put source.img one.img', /putting file/u);
    expect(await presenter.clientsOf(open, { signal })).toEqual(['127.0.0.1']);
    // The server's to say, whatever the client asks for.
    expect((await mustRun('smbstatus', ['-s', join(place.directory, `smbd-${port}.conf`), '-S'])).stdout).toMatch(new RegExp(`^${open.options['share'] ?? ''} +[0-9]+ .* AES-`, 'mu'));
    await show(other, open);
    await show({ ...open, clients: [ALICE] });
    expect(await client(open, 'ls', { user: BOB })).toMatchObject({ code: 1 });
    await ask('put source.img two.img', /putting file/u);
    await show({ ...open, clients: [BOB] });
    expect(await waitUntil(async () => (await presenter.clientsOf(open, { signal })).length === 0, 30_000)).toBe(true);
    expect(await client(open, 'ls')).toMatchObject({ code: 1 });
    expect((await mustRun('ls', ['-A', '--', open.mountPath])).stdout).toBe('one.img\ntwo.img\n');

    writePasswords({ ...PASSWORDS, [BOB]: 'bob-has-a-new-one' });
    await show({ ...open, clients: [BOB] });
    expect(await client(open, 'ls', { user: BOB })).toMatchObject({ code: 0 });
    writeFileSync(join(work, `auth-${BOB}`), `username=${BOB}\npassword=${PASSWORDS[BOB] ?? ''}\n`);
    expect(await client(open, 'ls', { user: BOB })).toMatchObject({ code: 1 });
    writePasswords(PASSWORDS);
  });

  it('are refused as a whole where the port is taken or the user is nobody, what was shown is as before, and nothing is left at the end', { timeout: TEST_MS }, async () => {
    const shown = await directoryExport();
    const taken = createServer();
    await new Promise<void>((resolve) => { taken.listen({ host: '127.0.0.1', port: 0 }, resolve); });
    const { port: takenPort } = taken.address() as { port: number };
    await show(shown);
    await expect(show(shown, await directoryExport({ options: { listen: `127.0.0.1:${takenPort}` } }))).rejects.toMatchObject({ kind: 'in-use' });
    taken.close();
    writePasswords({ ...PASSWORDS, nobodyatall: 'some-password' });
    await expect(show(shown, await directoryExport({ clients: ['nobodyatall'] }))).rejects.toThrow('there is no user nobodyatall');
    expect(await client(shown, 'ls')).toMatchObject({ code: 0 });
    const processes = processesNaming(place.directory);
    expect(processes.length).toBeGreaterThan(0);
    await presenter.apply([], { signal });
    expect(processesNaming(place.directory)).toEqual([]);
    expect((await mustRun('ls', ['-A', '--', place.directory])).stdout).toBe('');
  });

  it('are presented, kept over a kill of the server, an orderly stop and a start, and withdrawn by command', { timeout: TEST_MS }, async () => {
    const other = await startTestDaemon({ transport: 'kernel', cleanup });
    chmodSync(dirname(other.mountDir), 0o711);
    await other.json(['container', 'create', 'vms']);
    await mustRun('chown', [ALICE, '--', other.path('vms')]);
    port = await freePort();
    const info = await other.json<{ id: number; addresses: string[] }>(['present', 'vms', '--as', 'smb', '--to', ALICE, '--listen', `127.0.0.1:${port}`, '--option', `password-file=${passwordFile}`]);
    expect(info.addresses).toEqual([`smb://127.0.0.1:${port}/vms`]);
    const shown = exportOf(other, 'vms', { options: { share: 'vms' } });
    expect(await client(shown, 'put source.img a.img')).toMatchObject({ code: 0 });
    await other.waitForServer(await other.killServer());
    expect(await client(shown, 'get a.img back-3.img')).toMatchObject({ code: 0 });
    await other.stop();
    await other.start();
    expect(await waitUntil(async () => (await client(shown, 'get a.img back-4.img')).code === 0, 30_000)).toBe(true);
    for (const file of ['back-3.img', 'back-4.img']) expect(await sha256Of(join(work, file))).toBe(await sha256Of(image));
    expect(await other.json(['exports'])).toMatchObject([{ id: info.id, kind: 'smb', clients: [ALICE], addresses: info.addresses }]);
    await other.json(['withdraw', 'vms', '--as', 'smb']);
    expect(await client(shown, 'ls')).toMatchObject({ code: 1 });
    await other.stop();
  });
});
