/**
 * A full store, on a real small ext4 and XFS: what each operation gets, that nothing that was acknowledged is lost, that metadata
 * still commits from what was kept back, and that everything goes on when there is room again.
 *
 * First guests fill the store; then somebody else takes the rest too, to the last block; last, single system calls of the server are
 * made to fail with ENOSPC by strace, one call site after another, in a store that has room.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { constants, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf } from '../../blockstore/errors.js';
import type { DiskInfo, MetricInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { FileAgent } from '../support/model/file-agent.js';
import { mustRun } from '../support/model/command.js';
import { patternBytes } from '../support/model/pattern.js';
import { waitUntil, waitUntilGone } from '../support/processes.js';
import { makeSmallStore, type SmallStore } from '../support/small-store.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { patternRange } from './conformance-context.js';

const MIB = 1024 * 1024;
const BLOCK = 4096;
const DISK_BYTES = 192 * MIB;
const SOURCE_SEED = 91;
/** The first of it is data, the rest a hole. */
const SOURCE_DATA_BYTES = 24 * MIB;
/** A block that the filling of the store does not get to. */
const FAR = 180 * MIB;
const { O_RDWR, O_CREAT } = constants;
const PUNCH = 3;

/** What a disk must hold: written ranges over the source. */
class Model {
  readonly #writes: { readonly at: number; readonly data: Buffer }[] = [];

  wrote(at: number, data: Buffer): void {
    this.#writes.push({ at, data });
  }

  bytes(at: number, length: number): Buffer {
    const isHole = (block: number): boolean => block * BLOCK >= SOURCE_DATA_BYTES;
    const content = patternRange(SOURCE_SEED, at, length, isHole);
    for (const write of this.#writes) {
      const from = Math.max(at, write.at);
      const to = Math.min(at + length, write.at + write.data.length);
      if (from < to) write.data.copy(content, from - at, from - write.at, to - write.at);
    }
    return content;
  }
}

const needed = ['/dev/fuse', 'mkfs.ext4', 'mkfs.xfs', 'losetup', 'strace'] as const;

describe.skipIf(lacks(...needed)).each([['ext4', 120, 0], ['xfs', 320, 170]] as const)('a full store on %s', { timeout: 240_000 }, (kind, sizeMib, ballastMib) => {
  const cleanup = createCleanup();
  const model = new Model();
  let small: SmallStore;
  let daemon: TestDaemon;
  let agent: FileAgent;
  let files: string;
  let disk = 0;
  let firstRefused = 0;

  beforeAll(async () => {
    files = makeTempDir('files', cleanup);
    small = await makeSmallStore(kind, sizeMib, ballastMib, cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: small.storeDir });
    agent = await FileAgent.start();
    cleanup.add(() => agent.stop());
    makePatternImage(join(files, 'source'), { sizeBytes: DISK_BYTES, seed: SOURCE_SEED, isHole: (block) => block * BLOCK >= SOURCE_DATA_BYTES });
    makePatternImage(join(files, 'small'), { sizeBytes: 4 * MIB, seed: 92 });
    await daemon.json(['container', 'create', 'c']);
    await daemon.json(['import', join(files, 'source'), 'c/source', '--in-place']);
    await daemon.json(['clone', 'c/source', 'c/disk', 'c/spare']);
    await daemon.json(['clone', 'c/source', 'c/reader', '--copy-on-read']);
    disk = await agent.call('open', daemon.path('c/disk'), O_RDWR, 0);
  });
  afterAll(() => cleanup.run());

  const write = async (at: number, data: Buffer): Promise<string> => {
    const outcome = await agent.outcome('pwrite', disk, data, at);
    if (outcome === 'ok') model.wrote(at, data);
    return outcome;
  };
  const exitOf = async (args: readonly string[]): Promise<number> => (await daemon.cli(args)).code;
  const level = async (): Promise<string> => (await daemon.status()).spaceLevel;
  const expectContent = async (): Promise<void> => {
    for (let at = 0; at < DISK_BYTES; at += MIB) {
      const got = await agent.call('pread', disk, MIB, at);
      if (!got.equals(model.bytes(at, MIB))) throw new Error(`the MiB at ${at / MIB} is not what was written`);
    }
  };

  it('warns before it is full, then refuses what needs room, and only that', async () => {
    expect(await level()).toBe('ok');
    const seen = new Set<string>();
    let at = 0;
    // In smaller steps towards the end, until there is no room for a single block.
    for (const step of [MIB, 16 * BLOCK, BLOCK]) {
      for (let outcome = 'ok'; outcome === 'ok';) {
        if (at % (4 * MIB) === 0) seen.add(await level());
        outcome = await write(at, patternBytes(1, at, step));
        expect(['ok', 'ENOSPC']).toContain(outcome);
        if (outcome === 'ok') at += step;
      }
    }
    firstRefused = at;
    expect(firstRefused).toBeGreaterThan(40 * MIB);
    expect([...seen].slice(0, 2)).toEqual(['ok', 'low']);
    await expect.poll(level, { timeout: 20_000 }).toBe('full');
    const status = await daemon.status();
    expect(status).toMatchObject({ storeBytesFree: 0, storeBytesReserved: 0 });
    expect(status.warnings.join()).toMatch(/the store is full: .*ENOSPC/u);
    expect(await agent.call('statfs', daemon.mountDir)).toMatchObject({ blocksFree: 0, blocksAvailable: 0 });
    const metrics = await daemon.json<MetricInfo[]>(['metrics']);
    const value = (name: string): number | undefined => metrics.find((each) => each.name === name)?.values[0]?.value;
    expect([value('offshoot_store_full'), value('offshoot_store_space_level'), value('offshoot_store_free_bytes')]).toEqual([1, 3, 0]);
    expect((await daemon.cli(['metrics'])).stdout).toMatch(/^offshoot_store_full 1$/mu);
    expect(daemon.log().filter(({ text }) => text.includes('"spaceLevel":"low"')).length).toBe(1);
  });

  it('answers each operation as its table says', async () => {
    const spare = await agent.call('open', daemon.path('c/spare'), O_RDWR, 0);
    const table: [string, string, string][] = [];
    const row = async (what: string, expected: string, outcome: Promise<string | number>): Promise<void> => { table.push([what, expected, String(await outcome)]); };
    // Takes room.
    await row('first write of a block', 'ENOSPC', write(FAR, patternBytes(2, 0, BLOCK)));
    await row('first write of a part of a block', 'ENOSPC', write(FAR + 100, patternBytes(2, 0, 100)));
    await row('first write of another disk', 'ENOSPC', agent.outcome('pwrite', spare, patternBytes(2, 0, BLOCK), 0));
    await row('import', String(exitCodeOf['no-space']), exitOf(['import', join(files, 'small'), 'c/import']));
    await row('fill', 'failed', daemon.cli(['fill', 'start', 'c/reader', '--json']).then(async () => {
      await daemon.cli(['fill', 'wait', 'c/reader']);
      return (await daemon.json<{ state: string }>(['fill', 'status', 'c/reader'])).state;
    }));
    // Takes none, or what was kept back for it.
    await row('write to owned blocks', 'ok', write(3 * MIB, patternBytes(3, 0, MIB)));
    await row('read', 'ok', agent.outcome('pread', spare, MIB, 0));
    await row('read that would keep what it fetched', 'ok', agent.outcome('readFile', daemon.path('c/reader')).then((outcome) => (outcome === 'ok' ? 'ok' : outcome)));
    await row('fsync', 'ok', agent.outcome('fsync', disk));
    await row('mkdir', 'ok', agent.outcome('mkdir', daemon.path('c/directory'), 0o755));
    await row('symlink', 'ok', agent.outcome('symlink', 'x', daemon.path('c/link')));
    await row('chmod', 'ok', agent.outcome('chmod', daemon.path('c/spare'), 0o640));
    await row('rename', 'ok', agent.outcome('rename', daemon.path('c/link'), daemon.path('c/directory/link')));
    await row('container create', '0', exitOf(['container', 'create', 'other']));
    await row('clone of a closed disk', '0', exitOf(['clone', 'c/source', 'c/another']));
    await row('resize', '0', exitOf(['resize', 'c/another', '1G']));
    await row('rm', '0', exitOf(['rm', 'c/another']));
    expect(table.map(([what, , outcome]) => `${what}: ${outcome}`)).toEqual(table.map(([what, expected]) => `${what}: ${expected}`));
    await agent.call('close', spare);
    for (const path of ['c/disk', 'c/spare', 'c/reader']) expect((await daemon.json<DiskInfo>(['show', path])).fault).toBeNull();
    expect(await level()).toBe('full');
    await expectContent();
  });

  it('is served by the next server when this one is killed, with nothing lost', async () => {
    await daemon.waitForServer(await daemon.killServer());
    await expectContent();
    expect(await write(FAR, patternBytes(2, 0, BLOCK))).toBe('ENOSPC');
    expect(await write(5 * MIB, patternBytes(4, 0, MIB))).toBe('ok');
  });

  it('survives that somebody takes the rest too, to the last block, log included', async () => {
    const { serverPid } = await daemon.status();
    await small.takeAll();
    expect(small.freeBytes()).toBeLessThan(64 * 1024);
    const outcomes = new Set<string>();
    for (let i = 0; i < 40; i += 1) {
      outcomes.add(await agent.outcome('mkdir', daemon.path(`c/directory/${i}`), 0o755));
      outcomes.add(await write(6 * MIB + i * BLOCK, patternBytes(5 + i, 0, BLOCK)));
      outcomes.add(await agent.outcome('fsync', disk));
    }
    for (const outcome of outcomes) expect(['ok', 'ENOSPC']).toContain(outcome);
    await daemon.cli(['container', 'create', 'there-is-no-room-for-this']);
    const code = await exitOf(['import', join(files, 'small'), 'c/import']);
    expect(code).toBe(exitCodeOf['no-space']);
    expect((await daemon.status()).serverPid).toBe(serverPid);
    await expectContent();
    small.giveBack();
  });

  it('goes on when there is room, with everything that was acknowledged', async () => {
    await daemon.json(['rm', 'c/spare']);
    await agent.call('fallocate', disk, PUNCH, 10 * MIB, 28 * MIB);
    model.wrote(10 * MIB, Buffer.alloc(28 * MIB));
    await expect.poll(level, { timeout: 20_000 }).not.toBe('full');
    expect(await write(FAR, patternBytes(7, 0, MIB))).toBe('ok');
    await agent.call('fsync', disk);
    expect((await daemon.status()).storeBytesReserved).toBeGreaterThan(4 * MIB);
    await daemon.json(['fill', 'start', 'c/reader']);
    expect(await exitOf(['fill', 'wait', 'c/reader'])).toBe(0);
    await expectContent();
    await agent.call('close', disk);
    await daemon.stop();
    await daemon.start();
    disk = await agent.call('open', daemon.path('c/disk'), O_RDWR, 0);
    await expectContent();
    await agent.call('close', disk);
    await daemon.stop();
  });
});

describe.skipIf(lacks(...needed))('ENOSPC of one system call', { timeout: 240_000 }, () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let agent: FileAgent;
  let files: string;
  let serverPid = 0;

  beforeAll(async () => {
    files = makeTempDir('files', cleanup);
    makePatternImage(join(files, 'image'), { sizeBytes: 8 * MIB, seed: 93 });
    await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', join(files, 'image'), join(files, 'image.qcow2')]);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    agent = await FileAgent.start();
    cleanup.add(() => agent.stop());
    await daemon.json(['container', 'create', 'c']);
    await daemon.json(['import', join(files, 'image'), 'c/image']);
    ({ serverPid } = await daemon.status());
  });
  afterAll(() => cleanup.run());

  /** Every such call of the server fails with ENOSPC while `body` runs. `paths`: only on these files. */
  async function withNoSpace<T>(calls: string, paths: readonly string[], body: () => Promise<T>): Promise<T> {
    const tracer: ChildProcess = spawn('strace', [
      '-f', '-qq', '-o', '/dev/null', '-p', String(serverPid), '-e', `trace=${calls}`, '-e', `inject=${calls}:error=ENOSPC`, ...paths.flatMap((path) => ['-P', path]),
    ], { stdio: 'ignore' });
    const tracerPid = tracer.pid ?? 0;
    try {
      if (!(await waitUntil(() => /^TracerPid:\t[1-9]/mu.test(readFileSync(`/proc/${serverPid}/status`, 'utf8')), 20_000))) throw new Error('strace did not attach');
      return await body();
    } finally {
      tracer.kill('SIGTERM');
      await waitUntilGone(tracerPid, 20_000);
    }
  }

  let disks = 0;
  const newDisk = async (): Promise<{ readonly name: string; readonly layer: string }> => {
    const name = `c/disk-${(disks += 1)}`;
    await daemon.json(['clone', 'c/image', name]);
    const { backingChain } = await daemon.json<DiskInfo>(['show', name]);
    const id = backingChain[0]?.layerId ?? 0;
    return { name, layer: join(daemon.storeDir, 'layers', (id % 256).toString(16).padStart(2, '0'), `${id}.layer`) };
  };
  const exitOf = async (args: readonly string[]): Promise<number> => (await daemon.cli(args)).code;

  it.each(['pwrite64', 'pwrite64,fallocate'])('of %s on a disk\'s file is the writer\'s error alone', async (calls) => {
    const { name, layer } = await newDisk();
    const fd = await agent.call('open', daemon.path(name), O_RDWR, 0);
    const data = patternBytes(9, 0, 4 * BLOCK);
    await agent.call('pwrite', fd, data, 0);
    const outcomes = await withNoSpace(calls, [layer], async () => [
      await agent.outcome('pwrite', fd, patternBytes(10, 0, BLOCK), BLOCK),
      await agent.outcome('pwrite', fd, patternBytes(10, 0, BLOCK), MIB),
      await agent.outcome('pwrite', fd, patternBytes(10, 0, 100), 2 * MIB + 50),
      ...(calls === 'pwrite64' ? [] : [await agent.outcome('fallocate', fd, PUNCH, 3 * MIB, MIB)]),
      await agent.outcome('fsync', fd),
    ]);
    expect(outcomes).toEqual(['ENOSPC', 'ENOSPC', 'ENOSPC', ...(calls === 'pwrite64' ? [] : ['ENOSPC']), 'ok']);
    expect((await daemon.json<DiskInfo>(['show', name])).fault).toBeNull();
    const expected = patternRange(93, 0, 8 * MIB);
    data.copy(expected, 0);
    expect((await agent.call('pread', fd, MIB, 0)).equals(expected.subarray(0, MIB))).toBe(true);
    for (const at of [1, 2, 3]) expect((await agent.call('pread', fd, MIB, at * MIB)).equals(expected.subarray(at * MIB, (at + 1) * MIB)), `MiB ${at}`).toBe(true);
    expect(await agent.outcome('pwrite', fd, patternBytes(10, 0, BLOCK), MIB)).toBe('ok');
    expect(await agent.outcome('fsync', fd)).toBe('ok');
    await agent.call('close', fd);
  });

  it('of the database\'s log fails the change whole, faults nothing, and is over when it is over', async () => {
    const { name } = await newDisk();
    const fd = await agent.call('open', daemon.path(name), O_RDWR, 0);
    const wal = join(daemon.storeDir, 'offshoot.db-wal');
    const outcomes = await withNoSpace('pwrite64,fallocate,ftruncate', [wal, join(daemon.storeDir, 'offshoot.db')], async () => [
      await agent.outcome('pwrite', fd, patternBytes(11, 0, BLOCK), 0),
      await agent.outcome('fsync', fd),
      await agent.outcome('mkdir', daemon.path('c/made'), 0o755),
      await exitOf(['container', 'create', 'made']),
      await exitOf(['clone', 'c/image', 'c/made']),
      await exitOf(['rm', name.replace(/\d+$/u, '1')]),
    ]);
    expect(outcomes).toEqual(['ok', 'ENOSPC', 'ENOSPC', exitCodeOf['no-space'], exitCodeOf['no-space'], exitCodeOf['no-space']]);
    expect((await agent.call('readdir', daemon.path('c'))).includes('made')).toBe(false);
    expect(await agent.outcome('fsync', fd)).toBe('ok');
    expect((await agent.call('pread', fd, BLOCK, 0)).equals(patternBytes(11, 0, BLOCK))).toBe(true);
    expect((await daemon.json<DiskInfo>(['show', name])).fault).toBeNull();
    expect(await agent.outcome('mkdir', daemon.path('c/made'), 0o755)).toBe('ok');
    await agent.call('rmdir', daemon.path('c/made'));
    await agent.call('close', fd);
  });

  it('of making, lengthening and moving files fails what wanted it, and leaves nothing', async () => {
    const { name } = await newDisk();
    const table: [string, string | number, string | number][] = [];
    await withNoSpace('ftruncate', [], async () => {
      table.push(['resize', exitCodeOf['no-space'], await exitOf(['resize', name, '64M'])]);
      table.push(['create of a file', 'ENOSPC', await agent.outcome('open', daemon.path('c/file'), O_RDWR | O_CREAT, 0o600)]);
      table.push(['import, the copy', exitCodeOf['no-space'], await exitOf(['import', join(files, 'image'), 'c/import'])]);
    });
    await withNoSpace('pwrite64,ioctl', [], async () => { table.push(['import, its data', exitCodeOf['no-space'], await exitOf(['import', join(files, 'image'), 'c/import'])]); });
    await withNoSpace('rename,renameat,renameat2', [], async () => { table.push(['import, its name', exitCodeOf['no-space'], await exitOf(['import', join(files, 'image.qcow2'), 'c/import', '--format', 'qcow2'])]); });
    expect(table.map(([what, , got]) => `${what}: ${got}`)).toEqual(table.map(([what, expected]) => `${what}: ${expected}`));
    expect(await agent.call('readdir', join(daemon.storeDir, 'import'))).toEqual([]);
    expect((await agent.call('readdir', daemon.path('c'))).filter((each) => each === 'file' || each === 'import')).toEqual([]);
    expect(await exitOf(['import', join(files, 'image'), 'c/import'])).toBe(0);
    expect(await exitOf(['resize', name, '64M'])).toBe(0);
    const fd = await agent.call('open', daemon.path(name), O_RDWR, 0);
    expect((await agent.call('pread', fd, MIB, 0)).equals(patternRange(93, 0, MIB))).toBe(true);
    await agent.call('close', fd);
  });

  it('of cutting the database\'s log, which a checkpoint does by the clock, ends nothing', async () => {
    const tried = (): number => daemon.log().filter(({ text }) => text.includes('SQLITE_IOERR_TRUNCATE')).length;
    const before = tried();
    let made = 0;
    await withNoSpace('ftruncate', [join(daemon.storeDir, 'offshoot.db-wal')], async () => {
      expect(await waitUntil(async () => {
        expect(await exitOf(['container', 'create', `uncut-${(made += 1)}`])).toBe(0);
        return tried() > before + 1;
      }, 60_000)).toBe(true);
    });
    expect(await exitOf(['container', 'create', 'cut'])).toBe(0);
  });

  it('of the log ends nothing', async () => {
    await withNoSpace('write,writev', [join(daemon.storeDir, 'offshoot.log')], async () => {
      for (let i = 0; i < 5; i += 1) expect(await exitOf(['container', 'create', `unlogged-${i}`])).toBe(0);
    });
    expect(await exitOf(['container', 'create', 'logged'])).toBe(0);
    expect(daemon.log().some(({ text }) => text.includes('"path":"logged"'))).toBe(true);
  });

  it('has cost no server', async () => {
    expect((await daemon.status()).serverPid).toBe(serverPid);
    await daemon.stop();
  });
});
