/**
 * The failing system calls of a whole daemon, seen by a guest through the mount: faulted disks, a full store, threads that die.
 *
 * strace is attached to the server, all its threads, and lets calls on the files of one disk or of the database fail, or ends the
 * process in the middle of one. The guest is dd(1); it knows nothing of this.
 */
import type { ChildProcess } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import Database from 'better-sqlite3';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { DaemonStatus, DiskInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { attach, exited } from '../support/faults/injector.js';
import { makePatternImage, patternBlock } from '../support/images.js';
import { command, type CommandResult } from '../support/model/command.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const BLOCKS = 64;
const IMAGE_SEED = 71;
const WRITTEN_SEED = 72;
const GUEST_MS_MAX = 60_000;
const EIO = /Input\/output error/u;
const ENOSPC = /No space left on device/u;

const cleanup = createCleanup();
let daemon: TestDaemon;
let scratch: string;

beforeEach(async () => {
  scratch = makeTempDir('guest', cleanup);
  makePatternImage(join(scratch, 'image'), { sizeBytes: BLOCKS * BLOCK_BYTES, seed: IMAGE_SEED });
  writeFileSync(join(scratch, 'data'), Buffer.concat(Array.from({ length: BLOCKS }, (_, block) => patternBlock(WRITTEN_SEED, block))));
  daemon = await startTestDaemon({ transport: 'kernel', cleanup });
  await daemon.json(['container', 'create', 'c']);
  await daemon.json(['import', join(scratch, 'image'), 'c/image']);
  for (const name of ['disk', 'other']) await daemon.json(['clone', 'c/image', `c/${name}`]);
  // Their files are made when they are first opened.
  for (const name of ['disk', 'other']) expect((await write(name, 0, true)).stderr).toBe('');
});

afterEach(() => cleanup.run());

/** One block, from a guest that writes it and, if told so, flushes. */
async function write(disk: string, block: number, flush: boolean): Promise<CommandResult> {
  const args = [`if=${join(scratch, 'data')}`, `of=${daemon.path(`c/${disk}`)}`, `bs=${BLOCK_BYTES}`, `skip=${block}`, `seek=${block}`, 'count=1', 'status=none'];
  return await command('dd', [...args, `conv=notrunc${flush ? ',fsync' : ''}`], { timeoutMs: GUEST_MS_MAX });
}

async function read(disk: string, block: number): Promise<Buffer> {
  const copy = join(scratch, 'copy');
  const { stderr } = await command('dd', [`if=${daemon.path(`c/${disk}`)}`, `of=${copy}`, `bs=${BLOCK_BYTES}`, `skip=${block}`, 'count=1', 'status=none'], { timeoutMs: GUEST_MS_MAX });
  expect(stderr).toBe('');
  return readFileSync(copy);
}

async function expectWritten(disk: string, block: number): Promise<void> {
  expect((await read(disk, block)).equals(patternBlock(WRITTEN_SEED, block)), `block ${block} of ${disk}`).toBe(true);
}

/** The data file of a disk's active layer. */
function dataFile(disk: string): string {
  const database = new Database(join(daemon.storeDir, 'offshoot.db'), { readonly: true });
  try {
    const id = database.prepare<[string], number>('SELECT layer_id FROM nodes WHERE name = ?').pluck().get(disk);
    return join(daemon.storeDir, 'layers', (id! % 256).toString(16).padStart(2, '0'), `${id!}.layer`);
  } finally {
    database.close();
  }
}

function databaseLog(): string {
  return join(daemon.storeDir, 'offshoot.db-wal');
}

/** Lets calls on a file fail while `body` runs; every thread of the server is watched. */
async function during<T>(injection: string, file: string, body: () => Promise<T>): Promise<T> {
  const [call = ''] = injection.split(':');
  const { serverPid } = await daemon.status();
  const tracer: ChildProcess = await attach(['-f', '-p', String(serverPid), '-e', `trace=${call}`, '-e', `inject=${injection}`, '-P', file, '-o', '/dev/null']);
  try {
    return await body();
  } finally {
    // It lets the server go on its own.
    tracer.kill('SIGINT');
    await exited(tracer);
  }
}

async function expectFaulted(disk: string): Promise<void> {
  const { fault } = await daemon.json<DiskInfo>(['show', `c/${disk}`]);
  expect(fault).not.toBeNull();
  expect((await daemon.json<DaemonStatus>(['daemon', 'status'])).warnings.join()).toContain(`c/${disk} is faulted`);
  for (const flush of [false, true]) {
    const refused = await write(disk, 1, flush);
    expect(refused.stderr).toMatch(EIO);
    expect(refused.code).not.toBe(0);
  }
  // Where nobody wrote since the last flush, it reads as it was.
  await expectWritten(disk, 0);
  expect((await read(disk, 9)).equals(patternBlock(IMAGE_SEED, 9))).toBe(true);
}

async function expectWell(disk: string, block: number): Promise<void> {
  expect((await daemon.json<DiskInfo>(['show', `c/${disk}`])).fault).toBeNull();
  const { code, stderr } = await write(disk, block, true);
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  await expectWritten(disk, block);
}

const NEEDED = ['/dev/fuse', 'strace', 'dd'] as const;

describe.skipIf(lacks(...NEEDED))('a disk whose data cannot be made durable', () => {
  it('is faulted: the flush and later writes say EIO, reads go on, other disks too, and a restart changes nothing', async () => {
    await during('fdatasync:error=EIO', dataFile('disk'), async () => {
      const failed = await write('disk', 2, true);
      expect(failed.stderr).toMatch(EIO);
      expect(failed.code).not.toBe(0);
    });
    // The device works again, and nobody is told that it did.
    await expectFaulted('disk');
    await expectWell('other', 3);
    await daemon.stop();
    await daemon.start();
    await expectFaulted('disk');
    await expectWell('other', 4);
    const before = await daemon.killServer();
    await daemon.waitForServer(before);
    await expectFaulted('disk');
    daemon.assertQuietLog([/faulted/u, /recovered/u, /server/u, /commit/u]);
  });
});

describe.skipIf(lacks(...NEEDED))('a database whose log cannot be made durable', () => {
  it('faults the disk that waited for it, changes nothing any more, and is sound for the next server', async () => {
    await during('fsync:error=EIO', databaseLog(), async () => { expect((await write('disk', 2, true)).stderr).toMatch(EIO); });
    expect((await daemon.cli(['container', 'create', 'd'])).stderr).toMatch(/no more changes|could not be read or written/u);
    await expectWritten('disk', 0);
    const before = await daemon.killServer();
    await daemon.waitForServer(before);
    await expectFaulted('disk');
    await expectWell('other', 3);
    await daemon.json(['container', 'create', 'd']);
  });
});

describe.skipIf(lacks(...NEEDED))('a store without room', () => {
  it('tells the guest ENOSPC, and the disk is as it was', async () => {
    await during('pwrite64:error=ENOSPC', dataFile('disk'), async () => { expect((await write('disk', 2, false)).stderr).toMatch(ENOSPC); });
    expect((await read('disk', 2)).equals(patternBlock(IMAGE_SEED, 2))).toBe(true);
    await during('pwrite64:error=ENOSPC', databaseLog(), async () => { expect((await write('disk', 2, true)).stderr).toMatch(ENOSPC); });
    await expectWell('disk', 2);
    await expectWell('disk', 5);
  });
});

describe.skipIf(lacks(...NEEDED))('a server that ends in the middle of a system call', () => {
  const ends: readonly (readonly [name: string, injection: string, file: () => string])[] = [
    ['killed while a worker writes a block that it has claimed', 'pwrite64:signal=KILL:when=1', () => dataFile('disk')],
    ['of a wrong address in a native call of a worker that has claimed a block', 'pwrite64:signal=SEGV:when=1', () => dataFile('disk')],
    ['killed while it makes data durable', 'fdatasync:signal=KILL:when=1', () => dataFile('disk')],
    ['killed while it commits', 'pwrite64:signal=KILL:when=1', databaseLog],
    ['killed while it makes a commit durable', 'fsync:signal=KILL:when=1', databaseLog],
    ['of an exception in a worker', 'read:error=EIO:when=1', () => '/dev/fuse'],
  ];
  for (const [name, injection, file] of ends) {
    it(`${name}: the guest waits for the next one and sees no error`, async () => {
      const { serverPid } = await daemon.status();
      await during(injection, file(), async () => {
        const { code, stderr } = await write('disk', 2, true);
        expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
      });
      expect(await daemon.waitForServer(serverPid)).not.toBe(serverPid);
      await expectWritten('disk', 2);
      await expectWell('disk', 2);
      await expectWell('disk', 3);
      await expectWell('other', 2);
    });
  }
});
