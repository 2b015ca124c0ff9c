/** File handles of a mount that was made with --nfs: valid whatever happens to servers, daemon and store; ESTALE for what is gone. Without --nfs there are none. */
import { spawn } from 'node:child_process';
import { cpSync, mkdirSync, rmdirSync, symlinkSync, unlinkSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { mustRun } from '../support/model/command.js';
import { mountEntry } from '../support/model/mounts.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

interface Handle {
  readonly type?: number;
  readonly bytes?: string;
  readonly errno?: number;
}

interface Opened {
  readonly node?: number;
  readonly kind?: string;
  readonly head?: string;
  readonly errno?: number;
}

const PROGRAM = resolve(import.meta.dirname, '../support/file-handle-program.mjs');
const ESTALE = 116;
const EOPNOTSUPP = 95;
/** FILEID_INO64_GEN: node 64 bits, generation 32. */
const HANDLE_TYPE = 0x81;
const TEST_MS = 240_000;

async function handlesOf(paths: readonly string[]): Promise<Handle[]> {
  return JSON.parse((await mustRun(process.execPath, [PROGRAM, 'make', ...paths])).stdout) as Handle[];
}

async function open(mountDir: string, handles: readonly Handle[]): Promise<Opened[]> {
  return JSON.parse((await mustRun(process.execPath, [PROGRAM, 'open', mountDir, JSON.stringify(handles)])).stdout) as Opened[];
}

/** The kernel forgets all nodes that nobody uses: what comes next has to ask the server by number. */
function dropCaches(): void {
  writeFileSync('/proc/sys/vm/drop_caches', '2');
}

describe.skipIf(lacks('/dev/fuse'))('file handles', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let handles: Handle[];
  let expected: Opened[];
  let gone: Handle[];

  beforeAll(async () => {
    createRequire(import.meta.url).resolve('koffi');
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, startArguments: () => ['--nfs'] });
    const image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 1024 ** 2, seed: 7 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/disk.img']);
    mkdirSync(daemon.path('vms/etc'));
    writeFileSync(daemon.path('vms/etc/config'), 'what it was then', { mode: 0o600 });
    symlinkSync('config', daemon.path('vms/etc/link'));
    await daemon.json(['snapshot', 'create', 'vms@then']);
    writeFileSync(daemon.path('vms/etc/config'), 'what it is today');
    const paths = ['', 'vms', 'vms/etc', 'vms/etc/config', 'vms/etc/link', 'vms/disk.img', 'vms/.snapshots', 'vms/.snapshots/then', 'vms/.snapshots/then/etc/config', 'vms/.snapshots/then/disk.img'];
    handles = await handlesOf(paths.map((path) => daemon.path(path)));
    expected = await open(daemon.mountDir, handles);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('name containers, directories, files, links, disks and what is in snapshots', () => {
    expect(handles.map(({ type, bytes }) => [type, bytes?.length])).toEqual(handles.map(() => [HANDLE_TYPE, 24]));
    expect(new Set(handles.map(({ bytes }) => bytes)).size).toBe(handles.length);
    expect(expected.map(({ kind }) => kind)).toEqual(['directory', 'directory', 'directory', 'file', 'symlink', 'file', 'directory', 'directory', 'file', 'file']);
    expect([expected[3]?.head, expected[8]?.head]).toEqual(['what it is today', 'what it was then']);
    expect(new Set(expected.map(({ node }) => node)).size).toBe(expected.length);
  });

  it('are opened when the kernel has forgotten the nodes, again and again', async () => {
    for (let round = 0; round < 3; round += 1) {
      dropCaches();
      expect(await open(daemon.mountDir, handles)).toEqual(expected);
      // From the leaves up: each directory above is found by its "..".
      dropCaches();
      expect(await open(daemon.mountDir, [...handles].reverse())).toEqual([...expected].reverse());
    }
  }, TEST_MS);

  it('outlive a server that is killed, and what is renamed', async () => {
    const killed = await daemon.killServer();
    dropCaches();
    expect(await open(daemon.mountDir, handles)).toEqual(expected);
    await daemon.waitForServer(killed, TEST_MS);
    await mustRun('mv', [daemon.path('vms/etc'), daemon.path('vms/conf')]);
    dropCaches();
    expect(await open(daemon.mountDir, handles)).toEqual(expected);
    await mustRun('mv', [daemon.path('vms/conf'), daemon.path('vms/etc')]);
  }, TEST_MS);

  it('are stale for what is gone, also when its name is taken again, and in each way that it can go', async () => {
    writeFileSync(daemon.path('vms/short'), 'x');
    mkdirSync(daemon.path('vms/empty'));
    await daemon.json(['clone', 'vms/disk.img', 'vms/clone.img']);
    gone = await handlesOf(['vms/short', 'vms/empty', 'vms/clone.img'].map((path) => daemon.path(path)));
    expect((await open(daemon.mountDir, gone)).map(({ kind }) => kind)).toEqual(['file', 'directory', 'file']);
    unlinkSync(daemon.path('vms/short'));
    rmdirSync(daemon.path('vms/empty'));
    // Behind the kernel's back.
    await daemon.json(['rm', 'vms/clone.img']);
    expect(await open(daemon.mountDir, gone)).toEqual(gone.map(() => ({ errno: ESTALE })));
    writeFileSync(daemon.path('vms/short'), 'another');
    await daemon.json(['clone', 'vms/disk.img', 'vms/clone.img']);
    dropCaches();
    expect(await open(daemon.mountDir, gone)).toEqual(gone.map(() => ({ errno: ESTALE })));
    const wrongGeneration = { ...handles[3], bytes: `${handles[3]?.bytes?.slice(0, 16) ?? ''}01020304` };
    expect(await open(daemon.mountDir, [wrongGeneration, { type: HANDLE_TYPE, bytes: 'ff'.repeat(12) }])).toEqual([{ errno: ESTALE }, { errno: ESTALE }]);
  }, TEST_MS);

  it('of what has lost its name are good as long as somebody has it open, whoever serves', async () => {
    writeFileSync(daemon.path('vms/orphan'), 'nobody calls me.');
    const [handle] = await handlesOf([daemon.path('vms/orphan')]);
    const holder = spawn(process.execPath, [PROGRAM, 'hold', daemon.path('vms/orphan')], { stdio: ['pipe', 'pipe', 'inherit'] });
    const ended = new Promise((done) => { holder.once('close', done); });
    try {
      await new Promise((done) => { createInterface(holder.stdout).once('line', done); });
      unlinkSync(daemon.path('vms/orphan'));
      const killed = await daemon.killServer();
      dropCaches();
      expect((await open(daemon.mountDir, [handle!]))[0]?.head).toBe('nobody calls me.');
      await daemon.waitForServer(killed, TEST_MS);
    } finally {
      holder.stdin.end();
      await ended;
    }
    dropCaches();
    expect(await open(daemon.mountDir, [handle!])).toEqual([{ errno: ESTALE }]);
  }, TEST_MS);

  it('outlive the daemon, and go with the store to another place; the mount keeps the number of its device', async () => {
    const number = mountEntry(daemon.mountDir)?.minor;
    await daemon.stop();
    const copy = join(makeTempDir('restored', cleanup), 'store');
    cpSync(daemon.storeDir, copy, { recursive: true, preserveTimestamps: true });
    // Takes the lowest number that is free.
    const other = makeTempDir('other', cleanup);
    await mustRun('mount', ['-t', 'ramfs', 'none', other]);
    cleanup.add(async () => { await mustRun('umount', [other]); });
    await daemon.start();
    expect(mountEntry(daemon.mountDir)?.minor).toBe(number);
    expect(await open(daemon.mountDir, [...handles, ...gone])).toEqual([...expected, ...gone.map(() => ({ errno: ESTALE }))]);
    const restored = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: copy, startArguments: () => ['--nfs'] });
    expect(await open(restored.mountDir, [...handles, ...gone])).toEqual([...expected, ...gone.map(() => ({ errno: ESTALE }))]);
    expect(restored.log().filter(({ text }) => text.includes('which something else has: NFS clients have to mount again'))).toHaveLength(1);
    await restored.stop();
    daemon.assertQuietLog([/the server was killed by SIGKILL|recovered what the last server had acknowledged/u]);
  }, TEST_MS);

  it('are not made without --nfs, and none of before is opened, however often servers die', async () => {
    await daemon.stop();
    const plain = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: daemon.storeDir });
    const refused = async (): Promise<void> => {
      expect(await handlesOf([plain.path('vms/etc/config')])).toEqual([{ errno: EOPNOTSUPP }]);
      expect(await open(plain.mountDir, [handles[3]!])).toEqual([{ errno: ESTALE }]);
    };
    await refused();
    await plain.waitForServer(await plain.killServer(), TEST_MS);
    await refused();
    await plain.stop();
    expect(await daemon.cli(['daemon', 'start', '--store', daemon.storeDir, '--mount', daemon.mountDir, '--transport', 'fuse-native', '--nfs'])).toMatchObject({ code: 2 });
  }, TEST_MS);
});
