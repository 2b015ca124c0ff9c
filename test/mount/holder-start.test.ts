/** How a daemon starts on a real mount, and how a start fails: with an error that says why, and nothing changed. */
import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';

import { startDaemon, type StartDaemonOptions } from '../../daemon/control/launch.js';
import { command, mustRun } from '../support/model/command.js';
import { mountEntry } from '../support/model/mounts.js';
import { endChild, isAlive, refusal, signal, useHolderTestBed } from '../support/holder-test-bed.js';

const INIT = 26;

const bed = useHolderTestBed('holder-start');

describe('a daemon that starts', () => {
  it('mounts, answers, and ends without a trace', async () => {
    const { mountDir, store } = bed();
    const { holderPid, serverPid, notes } = await bed().start();
    expect(notes).toEqual([]);
    expect(mountEntry(mountDir)).toMatchObject({ kind: 'fuse.offshoot', options: expect.stringContaining('default_permissions') as string });
    await expect(mustRun('stat', ['-c', '%F %a', mountDir])).resolves.toMatchObject({ stdout: 'directory 755\n' });
    await expect(mustRun('ls', [mountDir])).resolves.toMatchObject({ stdout: '' });
    expect(bed().state()).toMatchObject({ holderPid, serverPid, restarts: 0, lastExit: null, lastStallMs: null, state: 'running' });

    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid, serverPid);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
    const what = bed().events().map((event) => event.what);
    expect(what).toEqual(expect.arrayContaining(['start', 'shutdown', 'unmounted', 'closed']));
    expect(bed().log()).toContain('"msg":"ready"');
    expect(statSync(join(store, 'offshoot.log')).mode & 0o777).toBe(0o600);
  });

  it('gives its server what it needs, and both a session of their own', async () => {
    const { store: storeDir, mountDir, socketPath, runtimeDir } = bed();
    const { holderPid, serverPid } = await bed().start();
    const seen = bed().events()[0];
    expect(seen?.options).toEqual({
      storeDir,
      mountDir,
      socketPath,
      runtimeDir,
      workers: 2,
      transport: 'kernel',
      logLevel: 'info',
      sourceTimeoutSeconds: 25,
      restarts: 0,
      holderPid,
      holderVersion: expect.stringMatching(/^\d+\.\d+\.\d+/u) as string,
      standby: false,
      connectionIsStored: false,
    });
    const fuseRdev = statSync('/dev/fuse').rdev;
    expect(seen?.inherited).toMatchObject({ threadPool: '16', cwd: '/', umask: '0077', lockText: `${holderPid}\n`, fuseRdev });
    for (const pid of [holderPid, serverPid]) {
      const [, , processGroup, session] = (readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ').at(-1) ?? '').split(' ').map(Number);
      expect({ processGroup, session }).toEqual({ processGroup: holderPid, session: holderPid });
    }
  });

  it('does not end by a closed terminal, a closed pipe or a limit on file sizes', async () => {
    const { holderPid, serverPid } = await bed().start();
    const [SIGHUP, SIGPIPE, SIGXFSZ] = [1, 13, 25];
    for (const [pid, signals] of [[holderPid, [SIGHUP, SIGPIPE, SIGXFSZ]], [serverPid, [SIGPIPE, SIGXFSZ]]] as const) {
      const status = readFileSync(`/proc/${pid}/status`, 'utf8');
      const mask = (name: string): bigint => BigInt(`0x${new RegExp(`${name}:\\s*(\\w+)`, 'u').exec(status)?.[1] ?? '0'}`);
      const handled = (mask('SigIgn') | mask('SigCgt')).toString(2);
      for (const number of signals) expect({ pid, number, bit: handled.at(-number) }).toEqual({ pid, number, bit: '1' });
    }
    signal(holderPid, 'SIGHUP');
    await delay(50);
    expect(isAlive(holderPid)).toBe(true);
  });

  it('makes a store that is missing, for its user alone, and takes links for what they point to', async () => {
    const { scratch, mountDir, store } = bed();
    rmSync(store, { recursive: true });
    mkdirSync(join(scratch, 'real'), { mode: 0o700 });
    symlinkSync(join(scratch, 'real'), join(scratch, 'link'));
    symlinkSync(mountDir, join(scratch, 'mount-link'));
    bed().store = join(scratch, 'real', 'store');
    await bed().start({ storeDir: join(scratch, 'link', 'store'), mountDir: join(scratch, 'mount-link') });
    expect(statSync(bed().store).mode & 0o777).toBe(0o700);
    expect(mountEntry(mountDir)).not.toBeNull();
    expect(bed().events()[0]?.options).toMatchObject({ storeDir: bed().store, mountDir });
  });

  it('keeps the journal of a daemon that was killed, and nothing else of it', async () => {
    const { runtimeDir } = bed();
    mkdirSync(runtimeDir, { recursive: true, mode: 0o700 });
    for (const name of ['journal-0', 'session.json', 'handles.log', 'exchange-7']) writeFileSync(join(runtimeDir, name), 'old');
    await bed().start();
    expect(readdirSync(runtimeDir).sort()).toEqual(['holder.json', 'journal-0']);
  });
});

describe('a start that fails', () => {
  it('reports what the server reports, and undoes everything', async () => {
    bed().conduct({ fail: { kind: 'store-version', message: 'the store is of a newer format' } });
    await expect(bed().start()).rejects.toEqual(refusal('store-version', '^the store is of a newer format$'));
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [], store: ['offshoot.log'] });
    bed().conduct({});
    await bed().start();
  });

  it('takes away the store that it made, and tells the last words of the server', async () => {
    const { store, scratch, entries } = bed();
    rmSync(store, { recursive: true });
    const program = join(scratch, 'dies.mjs');
    writeFileSync(program, 'process.stderr.write("no such library\\n"); process.exit(3);\n');
    await expect(startDaemon(bed().options(), { ...entries, serverEntry: program })).rejects.toEqual(
      refusal('internal', 'ended with code 3 before it was ready', 'no such library'),
    );
    expect(bed().traces()).toMatchObject({ mount: null, store: null, runtime: [] });
  });

  it('tells the last words of a holder that died', async () => {
    const program = join(bed().scratch, 'dies.mjs');
    writeFileSync(program, 'process.stderr.write("no such library\\n"); process.exit(7);\n');
    await expect(startDaemon(bed().options(), { holderEntry: program })).rejects.toEqual(refusal('internal', 'ended with code 7', 'no such library'));
    await expect(startDaemon(bed().options(), { holderEntry: `${program}.not` })).rejects.toEqual(refusal('internal', 'dies.mjs.not'));
  });

  it('is given up when whoever started it goes away', async () => {
    bed().conduct({ neverReady: true });
    const launcher = bed().launch();
    const serverPid = await bed().until('the server', () => bed().events().find(({ opcode }) => opcode === INIT)?.pid);
    await endChild(launcher);
    await bed().until('the end', () => mountEntry(bed().mountDir) === null && !isAlive(serverPid) && !existsSync(bed().runtimeDir));
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
  });
});

describe('a start that is refused changes nothing', () => {
  async function refused(changes: Partial<StartDaemonOptions>, kind: string, ...words: readonly string[]): Promise<void> {
    const before = bed().traces();
    await expect(bed().start(changes)).rejects.toEqual(refusal(kind, ...words));
    expect(bed().traces()).toEqual(before);
  }

  it('when the store is no directory, or cannot be made', async () => {
    const { scratch } = bed();
    writeFileSync(join(scratch, 'file'), '');
    await refused({ storeDir: join(scratch, 'file') }, 'not-a-directory', 'is not a directory');
    await refused({ storeDir: join(scratch, 'a', 'b') }, 'not-found', 'make it first');
    await refused({ storeDir: '' }, 'invalid-argument', 'empty');
  });

  it('when the store is on a read-only file system', async () => {
    const { store } = bed();
    await mustRun('mount', ['-t', 'tmpfs', '-o', 'ro,mode=700', 'none', store]);
    try {
      await refused({}, 'permission-denied', 'read-only');
    } finally {
      await mustRun('umount', [store]);
    }
  });

  it('when the mount point is missing, a file, or not empty', async () => {
    const { scratch, mountDir } = bed();
    await refused({ mountDir: join(scratch, 'missing') }, 'mount-unusable', 'mkdir -p');
    writeFileSync(join(mountDir, 'file'), '');
    await refused({ mountDir: join(mountDir, 'file') }, 'mount-unusable', 'not a directory');
    await refused({}, 'mount-unusable', 'not empty');
  });

  it('when something is mounted there, saying what', async () => {
    const { mountDir } = bed();
    await mustRun('mount', ['-t', 'tmpfs', 'some-source', mountDir]);
    try {
      await refused({}, 'mount-unusable', 'some-source', 'tmpfs');
    } finally {
      await mustRun('umount', [mountDir]);
    }
  });

  it('when store and mount lie in each other', async () => {
    const { store, mountDir } = bed();
    mkdirSync(join(store, 'mount'));
    await refused({ mountDir: join(store, 'mount') }, 'invalid-argument', 'inside the store');
    rmSync(join(store, 'mount'), { recursive: true });
    await refused({ storeDir: join(mountDir, 'store') }, 'invalid-argument', 'inside the mount point');
    await refused({ storeDir: mountDir }, 'invalid-argument', 'same directory');
    await refused({ socketPath: join(mountDir, 's') }, 'invalid-argument', 'control socket');
  });

  it('when the socket is impossible or taken', async () => {
    const { scratch, socketPath } = bed();
    await refused({ socketPath: join(scratch, 'x'.repeat(108)) }, 'name-too-long', '107');
    await refused({ socketPath: join(scratch, 'missing', 's') }, 'not-found', 'is missing');
    const other = createServer();
    await new Promise<void>((settle) => other.listen(socketPath, settle));
    try {
      await refused({}, 'in-use', 'another daemon answers');
    } finally {
      await new Promise((settle) => other.close(settle));
    }
  });

  it('when a daemon has the store or the mount point already', async () => {
    const { scratch } = bed();
    const { holderPid } = await bed().start();
    const other = join(scratch, 'other');
    mkdirSync(other);
    await refused({}, 'store-locked', `pid ${holderPid}`);
    await refused({ mountDir: other }, 'store-locked', `pid ${holderPid}`);
    await refused({ storeDir: other }, 'mount-unusable', 'already the mount of an offshoot daemon');
    await refused({ storeDir: join(scratch, 'new') }, 'mount-unusable', 'already the mount of an offshoot daemon');
    expect(existsSync(join(scratch, 'new'))).toBe(false);
    expect(readdirSync(other)).toEqual([]);
  });

  it('when the options make no sense', async () => {
    await refused({ workers: 0 }, 'invalid-argument', 'workers');
  });

  it('when it is not root that asks', async () => {
    const { scratch, entries } = bed();
    // Everything else is as it should be: it is the user alone that is refused.
    const owned = ['store', 'mount'].map((name) => join(scratch, name));
    await mustRun('chown', ['65534', scratch, ...owned]);
    const options = JSON.stringify({ ...bed().options(), foreground: true, reportFd: null, serverEntry: null, spare: true, stored: [] });
    const asNobody = ['--reuid=65534', '--clear-groups', process.execPath, entries.holderEntry, options];
    await expect(command('setpriv', asNobody)).resolves.toMatchObject({ code: 6, stderr: expect.stringContaining('run this command as root') as string });
    expect(bed().traces()).toMatchObject({ mount: null, store: [], runtime: [] });
  });
});

describe('in the foreground', () => {
  interface Foreground {
    readonly pid: number;
    readonly ended: Promise<number | null>;
    stdout: string;
    stderr: string;
  }

  function startForeground(): Foreground {
    const child = bed().launch({ foreground: true });
    const ended = new Promise<number | null>((settle) => child.once('close', settle));
    const foreground: Foreground = { pid: child.pid ?? 0, ended, stdout: '', stderr: '' };
    child.stdout?.on('data', (chunk) => (foreground.stdout += String(chunk)));
    child.stderr?.on('data', (chunk) => (foreground.stderr += String(chunk)));
    return foreground;
  }

  it.each(['SIGINT', 'SIGTERM'] as const)('%s stops it in an orderly way', async (name) => {
    const { mountDir, store } = bed();
    const foreground = startForeground();
    await bed().until('ready', () => foreground.stdout.includes('"ready"'));
    expect(foreground.stderr).toContain('"msg":"ready"');
    await expect(mustRun('ls', [mountDir])).resolves.toMatchObject({ code: 0 });
    signal(foreground.pid, name);
    await expect(foreground.ended).resolves.toBe(0);
    const said = foreground.stdout.trim().split('\n').map((line) => (JSON.parse(line) as { event: string }).event);
    expect(said).toEqual(['ready', 'ended']);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
    expect(existsSync(join(store, 'offshoot.log'))).toBe(false);
  });

  it('a stop that is refused is said, and it goes on', async () => {
    const foreground = startForeground();
    await bed().until('ready', () => foreground.stdout.includes('"ready"'));
    const busy = await bed().keepBusy();
    signal(foreground.pid, 'SIGINT');
    await bed().until('the refusal', () => foreground.stderr.includes('is in use by sleep'));
    expect(isAlive(foreground.pid)).toBe(true);
    await endChild(busy);
    signal(foreground.pid, 'SIGINT');
    await expect(foreground.ended).resolves.toBe(0);
  });

  it('a stop before it is ready gives the start up', async () => {
    bed().conduct({ neverReady: true });
    const foreground = startForeground();
    await bed().until('the server', () => bed().events().some(({ opcode }) => opcode === INIT));
    signal(foreground.pid, 'SIGINT');
    await foreground.ended;
    expect(JSON.parse(foreground.stdout)).toMatchObject({ event: 'error', kind: 'cancelled' });
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
  });

  it('a start that fails is an error, with its kind', async () => {
    bed().conduct({ fail: { kind: 'store-version', message: 'too new' } });
    const foreground = startForeground();
    await foreground.ended;
    expect(JSON.parse(foreground.stdout)).toEqual({ event: 'error', kind: 'store-version', message: 'too new' });
  });

  it('a daemon whose command was killed goes on', async () => {
    const foreground = startForeground();
    await bed().until('ready', () => foreground.stdout.includes('"ready"'));
    signal(foreground.pid, 'SIGKILL');
    await bed().untilGone(foreground.pid);
    const state = bed().state();
    signal(state?.serverPid ?? 0, 'SIGKILL');
    await bed().untilState('the next server', ({ restarts, state: phase }) => restarts === 1 && phase === 'running');
    await expect(mustRun('ls', [bed().mountDir])).resolves.toMatchObject({ code: 0 });
  });
});

describe('the holder as a program', () => {
  it('says what it is for when it is started by hand', async () => {
    const child = spawn(process.execPath, [bed().entries.holderEntry], { stdio: ['ignore', 'ignore', 'pipe'] });
    let stderr = '';
    child.stderr.on('data', (chunk) => (stderr += String(chunk)));
    await expect(new Promise((settle) => child.once('close', settle))).resolves.toBe(2);
    expect(stderr).toContain("started by 'offshoot daemon start'");
  });
});
