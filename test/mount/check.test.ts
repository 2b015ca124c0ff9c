/**
 * Check and scrub below a real mount: `offshoot check` as people type it, its exit codes, and what it says of real damage.
 */
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, readSync, readdirSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';

import Database from 'better-sqlite3';
import { afterEach, describe, expect, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import type { CheckResult, DiskInfo, ScrubInfo } from '../../daemon/control/schemas.js';
import { runFio } from '../support/fio.js';
import { CLI_ENTRY as CLI, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { runInTerminal } from '../support/terminal.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 24 * MIB;
const WAIT_MS = 60_000;
const TRIES_MAX = 50;

const cleanup = createCleanup();
afterEach(() => cleanup.run());

/** A daemon with an imported disk and a clone of it. */
async function serve(options: Partial<Parameters<typeof startTestDaemon>[0]> = {}): Promise<TestDaemon> {
  const image = join(makeTempDir('image', cleanup), 'image');
  makePatternImage(image, { sizeBytes: SIZE_BYTES, seed: 31, isHole: (block) => block % 512 < 100 });
  const daemon = await startTestDaemon({ transport: 'kernel', cleanup, ...options });
  await daemon.json(['container', 'create', 'vms']);
  await daemon.json(['import', image, 'vms/image']);
  await daemon.json(['clone', 'vms/image', 'vms/clone']);
  return daemon;
}

interface Checked {
  readonly code: number | null;
  readonly result: CheckResult;
}

async function check(daemon: TestDaemon, ...args: readonly string[]): Promise<Checked> {
  const { code, stdout, stderr } = await daemon.cli(['check', ...args, '--json']);
  if (stdout === '') throw new Error(`check said nothing but ${stderr}`);
  return { code, result: JSON.parse(stdout) as CheckResult };
}

/** All sealed layers have their checksums. */
async function waitForChecksums(daemon: TestDaemon): Promise<void> {
  expect(await waitUntil(async () => (await daemon.json<ScrubInfo>(['scrub', 'status'])).layersWithoutChecksums === 0, WAIT_MS)).toBe(true);
}

async function sealedFile(daemon: TestDaemon, disk: string): Promise<string> {
  const layer = (await daemon.json<DiskInfo>(['show', disk])).backingChain.find((one) => one.sealed);
  if (layer === undefined) throw new Error(`${disk} stands on nothing`);
  return layerFile(daemon, layer.layerId);
}

function layerFile(daemon: TestDaemon, layerId: number): string {
  return join(daemon.storeDir, 'layers', (layerId % 256).toString(16).padStart(2, '0'), `${layerId}.layer`);
}

function flip(file: string, offsetBytes: number): void {
  const fd = openSync(file, 'r+');
  try {
    const byte = Buffer.alloc(1);
    readSync(fd, byte, 0, 1, offsetBytes);
    byte[0] = (byte[0] ?? 0) ^ 0x40;
    writeSync(fd, byte, 0, 1, offsetBytes);
  } finally {
    closeSync(fd);
  }
}

/** Ctrl-C as soon as the check shows that it has begun. */
async function interrupted(daemon: TestDaemon): Promise<number> {
  const terminal = runInTerminal([process.execPath, CLI, '--socket', daemon.socketPath, 'check', '--data'], { env: {}, columns: 100, cleanup });
  await terminal.see(/check .*\d+ %/u);
  terminal.pressCtrlC();
  return await terminal.ended();
}

describe.skipIf(lacks('/dev/fuse', 'fio'))('offshoot check, of a store in use', () => {
  it('finds nothing while guests write, clone and remove', { timeout: 240_000 }, async () => {
    const daemon = await serve();
    const fio = runFio({
      filename: daemon.path('vms/clone'), rw: 'randwrite', bs: '4k', size: '16m', direct: 1, ioengine: 'libaio', iodepth: 8, fdatasync: 32, time_based: true, runtime: 8, rate: '4m',
    });
    const over = { yet: false };
    void fio.finally(() => { over.yet = true; }).catch(() => undefined);
    let checks = 0;
    for (let i = 0; !over.yet; i += 1) {
      await daemon.json(['clone', 'vms/clone', `vms/c${i}`]);
      const { code, result } = await check(daemon, '--data', '--repair');
      expect(result).toMatchObject({ verdict: 'clean', findings: [], faulted: [] });
      expect(code).toBe(0);
      checks += 1;
      if (i % 2 === 0) await daemon.json(['rm', `vms/c${i}`]);
    }
    await fio;
    expect(checks).toBeGreaterThan(0);
    await daemon.stop();
    daemon.assertQuietLog();
  });

  it('tells leaks from damage by its exit code, takes leaks away, and names the damaged extent and its disks', { timeout: 240_000 }, async () => {
    const daemon = await serve();
    await waitForChecksums(daemon);
    expect(await check(daemon, '--data')).toMatchObject({ code: 0, result: { verdict: 'clean', layersChecked: 1, layersWithoutChecksums: 0 } });

    const stray = layerFile(daemon, 4711);
    writeFileSync(stray, 'left');
    expect(await check(daemon)).toMatchObject({ code: 21, result: { verdict: 'leaks', findings: [{ kind: 'stray-layer-file', repaired: false }] } });
    expect(await check(daemon, '--repair')).toMatchObject({ code: 0, result: { verdict: 'clean', findings: [{ kind: 'stray-layer-file', repaired: true }] } });
    expect(existsSync(stray)).toBe(false);

    const file = await sealedFile(daemon, 'vms/clone');
    flip(file, 5 * MIB + 77);
    expect(await check(daemon)).toMatchObject({ code: 0 });
    const damaged = await check(daemon, 'vms/clone', '--data');
    expect(damaged).toMatchObject({
      code: 20, result: { verdict: 'corruption', findings: [{ kind: 'data-damaged', file, offsetBytes: 5 * MIB, lengthBytes: MIB, disks: ['vms/image', 'vms/clone'] }] },
    });
    const text = await daemon.cli(['check', '--data']);
    expect(text.stdout).toContain('it is read by vms/image, vms/clone');

    // The scrub finds it as well, and keeps it in mind over a restart of the server.
    await daemon.json(['scrub', 'start']);
    expect(await waitUntil(async () => (await daemon.json<ScrubInfo>(['scrub', 'status'])).state === 'completed', WAIT_MS)).toBe(true);
    await daemon.waitForServer(await daemon.killServer());
    const status = await daemon.status();
    expect(status.scrub).toMatchObject({ state: 'completed', damagedExtents: 1 });
    expect(status.scrub.lastCompletedAt).not.toBeNull();
    expect(status.warnings.join()).toContain('damaged');
    expect(await check(daemon)).toMatchObject({ code: 20, result: { findings: [{ kind: 'data-damaged', offsetBytes: 5 * MIB }] } });

    // Put right again, as from a backup, the next scrub takes it back.
    flip(file, 5 * MIB + 77);
    await daemon.json(['scrub', 'start']);
    expect(await waitUntil(async () => (await daemon.status()).scrub.damagedExtents === 0, WAIT_MS)).toBe(true);
  });

  it('ends with Ctrl-C, and leaves nothing running', { timeout: 240_000 }, async () => {
    const daemon = await serve();
    const large = join(makeTempDir('large', cleanup), 'large');
    await mustRun('dd', ['if=/dev/urandom', `of=${large}`, 'bs=1M', 'count=512', 'status=none']);
    await daemon.json(['import', large, 'vms/large']);
    await waitForChecksums(daemon);
    // It may end by itself before the key is pressed, but not each time.
    const codes: number[] = [];
    while (codes.length < TRIES_MAX && codes.at(-1) !== 130) codes.push(await interrupted(daemon));
    expect(codes.at(-1)).toBe(130);
    expect(await check(daemon)).toMatchObject({ code: 0 });
  });

  it('goes on with a scrub where it was, after a pause and a restart of the server', { timeout: 240_000 }, async () => {
    const daemon = await serve();
    await waitForChecksums(daemon);
    // 64 MiB a chunk: several layers are several chunks.
    const control = createControlClient({ socketPath: daemon.socketPath });
    for (const name of ['a', 'b']) {
      await mustRun('dd', ['if=/dev/urandom', `of=${daemon.path('vms/clone')}`, 'bs=1M', 'count=16', 'conv=notrunc,fsync', 'status=none']);
      await control.clone({ source: 'vms/clone', targets: [`vms/${name}`], fill: false, copyOnRead: false });
    }
    await waitForChecksums(daemon);
    await control.scrubStart({ rateBytesPerSecond: 4 * MIB });
    expect(await waitUntil(async () => (await control.scrubStatus()).doneBytes > 0, WAIT_MS)).toBe(true);
    const paused = await control.scrubPause();
    expect(paused).toMatchObject({ state: 'paused', rateBytesPerSecond: 4 * MIB });
    await daemon.waitForServer(await daemon.killServer());
    const after = await daemon.json<ScrubInfo>(['scrub', 'status']);
    expect(after.state).toBe('paused');
    expect(after.doneBytes).toBeGreaterThanOrEqual(paused.doneBytes);
    await daemon.json(['scrub', 'resume', '--rate', 'unlimited']);
    expect(await waitUntil(async () => (await daemon.json<ScrubInfo>(['scrub', 'status'])).state === 'completed', WAIT_MS)).toBe(true);
    expect(await daemon.json<ScrubInfo>(['scrub', 'status'])).toMatchObject({ damagedExtents: 0, message: 'nothing is damaged' });
  });
});

describe.skipIf(lacks('/dev/fuse'))('offshoot check --store', () => {
  it('refuses a store in use, and says the same as online of one that is not', { timeout: 240_000 }, async () => {
    const daemon = await serve();
    await waitForChecksums(daemon);
    const refused = await daemon.cli(['check', '--store', daemon.storeDir]);
    expect(refused.code).toBe(11);
    expect(refused.stderr).toContain('without --store');
    const file = await sealedFile(daemon, 'vms/clone');
    await daemon.stop();

    expect(await check(daemon, '--store', daemon.storeDir, '--data')).toMatchObject({ code: 0, result: { verdict: 'clean', layersChecked: 1, layersWithoutChecksums: 0 } });
    flip(file, MIB);
    expect(await check(daemon, '--store', daemon.storeDir, 'vms', '--data')).toMatchObject({ code: 20, result: { findings: [{ kind: 'data-damaged', offsetBytes: MIB }] } });
    flip(file, MIB);
    writeFileSync(layerFile(daemon, 99), 'left');
    mkdirSync(join(daemon.storeDir, 'import'), { recursive: true });
    writeFileSync(join(daemon.storeDir, 'import', '3.raw'), 'left');
    expect(await check(daemon, '--store', daemon.storeDir)).toMatchObject({ code: 21, result: { findings: [{ kind: 'stray-layer-file' }, { kind: 'stray-import' }] } });
    rmSync(file);
    expect(await check(daemon, '--store', daemon.storeDir, '--repair')).toMatchObject({ code: 20, result: { verdict: 'corruption' } });
    expect((await daemon.cli(['check', '--store', daemon.mountDir])).code).toBe(3);

    const database = join(daemon.storeDir, 'offshoot.db');
    const bytes = readFileSync(database);
    bytes.fill(0xa5, 4096, 8192);
    writeFileSync(database, bytes);
    expect(await check(daemon, '--store', daemon.storeDir)).toMatchObject({ code: 20, result: { findings: [{ kind: 'database' }] } });
  });
});

describe.skipIf(lacks('/dev/fuse'))('offshoot check --store, of a store whose daemon was killed', () => {
  it('neither loses nor calls damage what only the journal knows, and names faults that only tmpfs knows', { timeout: 120_000 }, async () => {
    const runtimeBase = makeTmpfsDir('run', cleanup);
    const daemon = await serve({ environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase } });
    const { holderPid, serverPid } = await daemon.status();
    const fd = openSync(daemon.path('vms/clone'), 'r+');
    const written = Buffer.alloc(4096, 0x5a);
    // Acknowledged, and within the second after which the server would commit by itself.
    for (let block = 0; block < 50; block += 1) writeSync(fd, written, 0, 4096, 8 * MIB + block * 8192);
    for (const pid of [holderPid, serverPid]) process.kill(pid, 'SIGKILL');
    closeSync(fd);
    await daemon.killBoth();

    expect(await check(daemon, '--store', daemon.storeDir, '--data')).toMatchObject({ code: 0, result: { verdict: 'clean', findings: [], faulted: [] } });
    expect(await check(daemon, '--store', daemon.storeDir, '--repair')).toMatchObject({ code: 0, result: { verdict: 'clean', findings: [] } });
    const [key = ''] = readdirSync(join(runtimeBase, 'offshoot'));
    const database = new Database(join(daemon.storeDir, 'offshoot.db'));
    const node = database.prepare<[], { readonly id: number; readonly root: number }>("SELECT id, (SELECT generation FROM nodes WHERE id = 1) AS root FROM nodes WHERE name = 'image'").get();
    database.close();
    const note = join(runtimeBase, 'offshoot', key, `journal-fault-${node?.root ?? 0}-${node?.id ?? 0}`);
    writeFileSync(note, 'EIO: a test');
    expect(await check(daemon, '--store', daemon.storeDir)).toMatchObject({ code: 9, result: { verdict: 'clean', faulted: [{ path: 'vms/image', reason: 'EIO: a test' }] } });
    // Lifted offline, which replays the journals of all disks.
    expect(await check(daemon, '--store', daemon.storeDir, 'vms/image', '--repair')).toMatchObject({ code: 0, result: { lifted: [{ path: 'vms/image' }], faulted: [] } });
    expect(existsSync(note)).toBe(false);

    await daemon.start();
    const content = readFileSync(daemon.path('vms/clone'));
    for (let block = 0; block < 50; block += 1) expect(content.subarray(8 * MIB + block * 8192, 8 * MIB + block * 8192 + 4096).equals(written)).toBe(true);
    expect((await daemon.json<DiskInfo>(['show', 'vms/image'])).fault).toBeNull();
    expect(await check(daemon)).toMatchObject({ code: 0, result: { verdict: 'clean', findings: [] } });
  });
});

describe.skipIf(lacks('/dev/fuse'))('a daemon that starts', () => {
  it('takes away what a crash left', { timeout: 120_000 }, async () => {
    const daemon = await serve();
    await daemon.stop();
    const stray = layerFile(daemon, 4711);
    writeFileSync(stray, 'left');
    await daemon.start();
    expect(await waitUntil(() => Promise.resolve(!existsSync(stray)), WAIT_MS)).toBe(true);
    expect(await check(daemon)).toMatchObject({ code: 0, result: { findings: [] } });
    expect(daemon.log().some((line) => line.text.includes('taken away'))).toBe(true);
  });
});

describe.skipIf(lacks('/dev/fuse'))('a faulted disk', () => {
  it('takes no writes until a check that names it lifts its fault, and only while it is closed', { timeout: 240_000 }, async () => {
    const daemon = await serve();
    const disk = daemon.path('vms/clone');
    await mustRun('dd', ['if=/dev/urandom', `of=${disk}`, 'bs=64k', 'count=16', 'conv=notrunc,fsync', 'status=none']);
    const before = readFileSync(disk);
    await daemon.stop();
    const database = new Database(join(daemon.storeDir, 'offshoot.db'));
    database.prepare("UPDATE nodes SET fault = 'fdatasync failed: EIO' WHERE name = 'clone'").run();
    database.close();
    await daemon.start();

    const write = async (): Promise<number | null> => (await command('dd', ['if=/dev/zero', `of=${disk}`, 'bs=4k', 'count=1', 'seek=9', 'conv=notrunc,fsync', 'status=none'])).code;
    expect(await write()).not.toBe(0);
    expect(await check(daemon)).toMatchObject({ code: 9, result: { verdict: 'clean', faulted: [{ path: 'vms/clone', reason: 'fdatasync failed: EIO' }], lifted: [] } });
    const fd = openSync(disk, 'r');
    expect(await check(daemon, 'vms/clone', '--repair')).toMatchObject({ code: 9, result: { lifted: [], notLifted: [{ path: 'vms/clone' }] } });
    closeSync(fd);
    expect(await waitUntil(async () => (await daemon.json<DiskInfo>(['show', 'vms/clone'])).openCount === 0, WAIT_MS)).toBe(true);
    expect(await check(daemon, '--repair')).toMatchObject({ code: 9, result: { lifted: [] } });
    expect(await check(daemon, 'vms', '--repair')).toMatchObject({ code: 0, result: { lifted: [{ path: 'vms/clone', lostBytes: 0 }], faulted: [] } });
    expect(readFileSync(disk).equals(before)).toBe(true);
    expect(await write()).toBe(0);
    await daemon.waitForServer(await daemon.killServer());
    expect((await daemon.json<DiskInfo>(['show', 'vms/clone'])).fault).toBeNull();
    expect(readdirSync(join(daemon.storeDir, 'import'))).toEqual([]);
  });
});
