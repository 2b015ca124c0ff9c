/**
 * Snapshots through the real mount: what they show, that they cannot be changed, what they are good for, and that they show one instant.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, constants, existsSync, fsyncSync, mkdirSync, openSync, readFileSync, readSync, readdirSync, readlinkSync, statSync, symlinkSync, utimesSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { CloneResult, NodeInfo } from '../../daemon/control/schemas.js';
import type { SnapshotInfo, SnapshotRevertResult } from '../../daemon/control/snapshot-schemas.js';
import { startTestDaemon, type TestDaemon, type TestTransport } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const TEST_MS = 240_000;
const BLOCK_BYTES = 4096;
/** Snapshots taken while two disks are written in order. */
const GROUP_SNAPSHOTS = 20;

function errnoOf(body: () => unknown): string | undefined {
  try {
    body();
    return undefined;
  } catch (thrown) {
    return (thrown as NodeJS.ErrnoException).code;
  }
}

describe.skipIf(lacks('/dev/fuse')).each<TestTransport>(['kernel', 'fuse-native'])('snapshots, %s', (transport) => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let image: string;

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport, cleanup });
    image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 4 * MIB, seed: 5 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/a']);
    await daemon.json(['clone', 'vms/a', 'vms/b']);
    mkdirSync(daemon.path('vms/etc'));
    writeFileSync(daemon.path('vms/etc/config'), 'one\n', { mode: 0o640 });
    symlinkSync('config', daemon.path('vms/etc/link'));
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  const overwrite = (disk: string, fill: number, blocks = 4): void => {
    const fd = openSync(daemon.path(disk), 'r+');
    writeSync(fd, Buffer.alloc(blocks * BLOCK_BYTES, fill), 0, blocks * BLOCK_BYTES, 0);
    fsyncSync(fd);
    closeSync(fd);
  };

  it('show a container as it was, while its disks are open and go on changing', async () => {
    const before = readFileSync(daemon.path('vms/b'));
    const open = openSync(daemon.path('vms/b'), 'r+');
    const taken = await daemon.json<SnapshotInfo>(['snapshot', 'create', 'vms@v1']);
    expect(taken).toMatchObject({ reference: 'vms@v1', disks: 2, files: 1, path: null, consistency: 'crash', message: null, directory: 'vms/.snapshots/v1' });
    writeSync(open, Buffer.alloc(8 * BLOCK_BYTES, 7), 0, 8 * BLOCK_BYTES, 3 * BLOCK_BYTES);
    fsyncSync(open);
    closeSync(open);
    writeFileSync(daemon.path('vms/etc/config'), 'two\n');
    expect(readdirSync(daemon.path('vms'))).toContain('.snapshots');
    expect(readdirSync(daemon.path('vms/.snapshots/v1')).toSorted()).toEqual(['a', 'b', 'etc']);
    expect(readFileSync(daemon.path('vms/.snapshots/v1/b')).equals(before)).toBe(true);
    expect(readFileSync(daemon.path('vms/.snapshots/v1/a')).equals(readFileSync(image))).toBe(true);
    expect(readFileSync(daemon.path('vms/.snapshots/v1/etc/config'), 'utf8')).toBe('one\n');
    expect(readlinkSync(daemon.path('vms/.snapshots/v1/etc/link'))).toBe('config');
    expect(statSync(daemon.path('vms/.snapshots/v1/etc/config')).mode & 0o7777).toBe(0o640);
    expect(await daemon.json<SnapshotInfo[]>(['snapshot', 'ls', 'vms'])).toEqual([taken]);
    const listed = await daemon.json<NodeInfo[]>(['ls', 'vms@v1']);
    expect(listed.map((each) => each.path)).toEqual(['vms/.snapshots/v1/a', 'vms/.snapshots/v1/b', 'vms/.snapshots/v1/etc']);
  }, TEST_MS);

  it('cannot be changed under the mount, at any depth', () => {
    const at = (name: string): string => daemon.path(`vms/.snapshots/${name}`);
    const run = (...args: readonly string[]): string => {
      try {
        execFileSync(args[0]!, args.slice(1), { stdio: 'pipe' });
        return '';
      } catch (thrown) {
        return String((thrown as { stderr?: unknown }).stderr);
      }
    };
    for (const flags of [constants.O_WRONLY, constants.O_RDWR, constants.O_RDONLY | constants.O_TRUNC]) expect(errnoOf(() => openSync(at('v1/b'), flags))).toBe('EROFS');
    expect(errnoOf(() => { writeFileSync(at('v1/new'), ''); })).toBe('EROFS');
    expect(errnoOf(() => { mkdirSync(at('v2')); })).toBe('EROFS');
    expect(errnoOf(() => { mkdirSync(at('v1/etc/deep')); })).toBe('EROFS');
    for (const command of [
      ['rm', '-f', at('v1/etc/config')], ['rmdir', at('v1')], ['rmdir', at('.')], ['mv', at('v1/a'), daemon.path('vms/moved')], ['mv', daemon.path('vms/a'), at('v1/a2')], ['mv', '-T', daemon.path('vms/a'), at('v1/a')],
      ['truncate', '-s', '0', at('v1/a')], ['chmod', '777', at('v1/a')], ['chown', '1', at('v1/etc')], ['touch', at('v1')], ['ln', '-s', 'x', at('v1/x')],
    ]) expect(`${command.join(' ')}: ${run(...command)}`).toMatch(/Read-only file system|Invalid argument/u);
    expect(readFileSync(at('v1/a')).equals(readFileSync(image))).toBe(true);
    expect(existsSync(daemon.path('vms/a'))).toBe(true);
  });

  it('are refused what would change them in the control API, with the name of the snapshot', async () => {
    for (const args of [
      ['rm', 'vms/a@v1'], ['rm', '-r', 'vms@v1'], ['resize', 'vms/.snapshots/v1/a', '8M'], ['fill', 'start', 'vms/b@v1'], ['clone', 'vms/a', 'vms/.snapshots/v1/c'],
    ]) {
      const result = await daemon.cli(args);
      expect(`${args.join(' ')}: ${result.code}`).toBe(`${args.join(' ')}: 6`);
      expect(result.stderr).toContain('vms@v1');
    }
    const kept = await daemon.cli(['rm', '-r', 'vms']);
    expect(kept.code).toBe(5);
    expect(kept.stderr).toContain('vms@v1');
    expect((await daemon.cli(['snapshot', 'create', 'vms@v1'])).code).toBe(4);
    expect((await daemon.cli(['snapshot', 'create', 'vms/none@v9'])).code).toBe(3);
    expect((await daemon.cli(['snapshot', 'create', 'vms'])).code).toBe(2);
  }, TEST_MS);

  it('are what disks and containers are cloned from, many at once, and a live container too', async () => {
    const old = readFileSync(daemon.path('vms/.snapshots/v1/b'));
    const now = readFileSync(daemon.path('vms/b'));
    await daemon.json(['clone', 'vms/b@v1', 'vms/old']);
    expect(readFileSync(daemon.path('vms/old')).equals(old)).toBe(true);
    const made = await daemon.json<CloneResult>(['clone', 'vms@v1', 'web1', 'web2']);
    expect(made.clones.map((each) => each.path)).toEqual(['web1', 'web2']);
    await daemon.json(['clone', 'vms', 'web3']);
    for (const [name, content] of [['web1', old], ['web2', old], ['web3', now]] as const) {
      expect(readFileSync(daemon.path(`${name}/b`)).equals(content)).toBe(true);
      expect(readlinkSync(daemon.path(`${name}/etc/link`))).toBe('config');
      expect(statSync(daemon.path(`${name}/etc/config`)).mode & 0o7777).toBe(0o640);
      expect(readdirSync(daemon.path(name))).not.toContain('.snapshots');
    }
    overwrite('web1/b', 9);
    expect(readFileSync(daemon.path('web2/b')).equals(old)).toBe(true);
    // All or nothing: one name is taken.
    expect((await daemon.cli(['clone', 'vms@v1', 'web4', 'web1'])).code).toBe(4);
    expect(existsSync(daemon.path('web4'))).toBe(false);
  }, TEST_MS);

  it('are not removed under what stands on them, unless the data is to be kept', async () => {
    const refused = await daemon.cli(['snapshot', 'rm', 'vms@v1']);
    expect(refused.code).toBe(5);
    expect(refused.stderr).toContain('vms/old');
    expect(refused.stderr).toContain('web1/b');
    const old = readFileSync(daemon.path('vms/old'));
    await daemon.json(['snapshot', 'rm', 'vms@v1', '--keep-data']);
    expect(existsSync(daemon.path('vms/.snapshots'))).toBe(false);
    expect(readFileSync(daemon.path('vms/old')).equals(old)).toBe(true);
    expect((await daemon.json<{ verdict: string }>(['check'])).verdict).toBe('clean');
  }, TEST_MS);

  it('bring back the container, or one disk, and nothing else', async () => {
    const whole = readFileSync(daemon.path('vms/b'));
    await daemon.json(['snapshot', 'create', 'vms@good']);
    overwrite('vms/b', 1);
    overwrite('vms/old', 2);
    execFileSync('rm', ['-r', daemon.path('vms/etc')]);
    writeFileSync(daemon.path('vms/later'), 'x');
    await daemon.json(['snapshot', 'create', 'vms/b@bad']);
    expect((await daemon.cli(['snapshot', 'revert', 'vms@good'])).code).toBe(2);
    const open = openSync(daemon.path('vms/b'), 'r');
    expect((await daemon.cli(['snapshot', 'revert', 'vms@good', '--yes'])).code).toBe(5);
    closeSync(open);
    const inode = statSync(daemon.path('vms/b')).ino;
    const done = await daemon.json<SnapshotRevertResult>(['snapshot', 'revert', 'vms@good', '--yes']);
    expect(done).toMatchObject({ nodesRemoved: 1, nodesRestored: 3 });
    expect(readFileSync(daemon.path('vms/b')).equals(whole)).toBe(true);
    expect(statSync(daemon.path('vms/b')).ino).toBe(inode);
    expect(readFileSync(daemon.path('vms/etc/config'), 'utf8')).toBe('two\n');
    expect(existsSync(daemon.path('vms/later'))).toBe(false);
    expect(readdirSync(daemon.path('vms/.snapshots')).toSorted()).toEqual(['bad', 'good']);
    const others = readFileSync(daemon.path('vms/old'));
    await daemon.json(['snapshot', 'revert', 'vms/b@bad', '--yes']);
    expect(readFileSync(daemon.path('vms/b')).subarray(0, 16).equals(Buffer.alloc(16, 1))).toBe(true);
    expect(readFileSync(daemon.path('vms/old')).equals(others)).toBe(true);
    expect((await daemon.json<{ verdict: string }>(['check'])).verdict).toBe('clean');
  }, TEST_MS);

  it('bring back what a file held, whatever the kernel has of it in its cache', async () => {
    const file = daemon.path('vms/cached');
    const bytes = (fill: number): Buffer => Buffer.alloc(300_000, fill);
    writeFileSync(file, bytes(1));
    await daemon.json(['snapshot', 'create', 'vms/cached@c1']);
    const { atime, mtime } = statSync(file);
    // The kernel asks for no attributes behind its own write: it still knows the time that the snapshot has.
    writeFileSync(file, bytes(2), { flag: 'r+' });
    await daemon.json(['snapshot', 'revert', 'vms/cached@c1', '--yes']);
    expect(readFileSync(file).equals(bytes(1))).toBe(true);
    // Somebody sets the time back, and the kernel has read the file since.
    writeFileSync(file, bytes(3), { flag: 'r+' });
    utimesSync(file, atime, mtime);
    expect(readFileSync(file).equals(bytes(3))).toBe(true);
    await daemon.json(['snapshot', 'revert', 'vms/cached@c1', '--yes']);
    if (transport === 'kernel') await daemon.waitForServer(await daemon.killServer());
    expect(readFileSync(file).equals(bytes(1))).toBe(true);
    await daemon.json(['snapshot', 'rm', 'vms/cached@c1']);
    execFileSync('rm', [file]);
  }, TEST_MS);

  it('keep a container where it is: it is neither removed nor moved into another under the mount', () => {
    expect(() => execFileSync('mv', [daemon.path('vms'), daemon.path('web1/vms')], { stdio: 'pipe' })).toThrow(/busy/u);
    expect(existsSync(daemon.path('web1/vms'))).toBe(false);
    try {
      execFileSync('rm', ['-rf', daemon.path('vms/.snapshots')], { stdio: 'pipe' });
    } catch {
      // rm says that it could not.
    }
    expect(readdirSync(daemon.path('vms/.snapshots')).toSorted()).toEqual(['bad', 'good']);
    // Another name is no other place.
    execFileSync('mv', [daemon.path('vms'), daemon.path('renamed')]);
    expect(readdirSync(daemon.path('renamed/.snapshots')).toSorted()).toEqual(['bad', 'good']);
    execFileSync('mv', [daemon.path('renamed'), daemon.path('vms')]);
  });

  it('say whether those who write had put their affairs in order', async () => {
    const notes = join(makeTempDir('quiesce', cleanup), 'notes');
    const command = `echo "$1 $OFFSHOOT_SNAPSHOT" >> ${notes}`;
    const good = await daemon.json<SnapshotInfo>(['snapshot', 'create', 'vms@q1', '--quiesce-cmd', command]);
    expect(good).toMatchObject({ consistency: 'application', message: null });
    expect(readFileSync(notes, 'utf8')).toBe('freeze vms@q1\nthaw vms@q1\n');
    const failed = await daemon.json<SnapshotInfo>(['snapshot', 'create', 'vms@q2', '--quiesce-cmd', `${command}; echo no >&2; test "$1" = thaw`]);
    expect(failed.consistency).toBe('crash');
    expect(failed.message).toContain('no');
    const late = await daemon.json<SnapshotInfo>(['snapshot', 'create', 'vms@q3', '--quiesce-cmd', `${command}; test "$1" = thaw || sleep 300`, '--quiesce-timeout', '0.5']);
    expect(late.consistency).toBe('crash');
    expect(late.message).toContain('0.5 s');
    // The freeze had run out by the time of the thaw: it was none.
    const lost = await daemon.json<SnapshotInfo>(['snapshot', 'create', 'vms@q4', '--quiesce-cmd', 'test "$1" = freeze']);
    expect(lost.consistency).toBe('crash');
    expect(readFileSync(notes, 'utf8').split('\n').filter((line) => line.startsWith('thaw'))).toHaveLength(3);
    expect((await daemon.json<SnapshotInfo[]>(['snapshot', 'ls', 'vms'])).map((each) => each.consistency)).toEqual(['crash', 'crash', 'application', 'crash', 'crash', 'crash']);
  }, TEST_MS);

  it('leave a quiet log', () => { daemon.assertQuietLog([/quiesce command could not thaw/u, /killed|recovered|server (?:ended|died|was)/iu]); });
});

/** Writes a counter to the first disk, then to the second, in order, for as long as it is let. */
const COUNTER = `
const fs = require('node:fs');
const { workerData, parentPort } = require('node:worker_threads');
const { files, stop, blockBytes } = workerData;
// O_DIRECT through FUSE asks for no alignment of memory.
const aligned = (bytes) => Buffer.alloc(bytes);
const state = new Int32Array(stop);
const { O_RDWR, O_DIRECT } = fs.constants;
const fds = files.map((file) => fs.openSync(file, O_RDWR | O_DIRECT));
const block = aligned(blockBytes);
for (let i = 1; Atomics.load(state, 0) === 0; i += 1) {
  // A block of its own each time: nearly every write is a first touch after a snapshot.
  block.writeUInt32LE(i, 0);
  for (const fd of fds) {
    fs.writeSync(fd, block, 0, blockBytes, 0);
    fs.writeSync(fd, block, 0, blockBytes, (1 + i % 200) * blockBytes);
  }
  Atomics.store(state, 1, i);
}
for (const fd of fds) fs.closeSync(fd);
parentPort.postMessage('done');
`;

describe.skipIf(lacks('/dev/fuse'))('a consistency group', () => {
  const cleanup = createCleanup();
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('never shows the second disk ahead of the first, with the server killed in between as well', async () => {
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_CRASHES_MAX: '1000000' } });
    const image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: MIB, seed: 6 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/first']);
    await daemon.json(['clone', 'vms/first', 'vms/second']);
    const stop = new SharedArrayBuffer(8);
    const state = new Int32Array(stop);
    const worker = new Worker(COUNTER, { eval: true, workerData: { files: ['vms/first', 'vms/second'].map((disk) => daemon.path(disk)), stop, blockBytes: BLOCK_BYTES } });
    const ended = new Promise((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
    ended.catch(() => undefined);
    let taken = 0;
    try {
      for (let i = 0; i < GROUP_SNAPSHOTS; i += 1) {
        const isKilled = i % 5 === 4;
        const making = daemon.cli(['snapshot', 'create', `vms@s${i}`]);
        if (isKilled) {
          const old = await daemon.killServer();
          await making;
          await daemon.waitForServer(old);
        } else expect((await making).code).toBe(0);
        for (const name of existsSync(daemon.path('vms/.snapshots')) ? readdirSync(daemon.path('vms/.snapshots')) : []) {
          const [first, second] = ['first', 'second'].map((disk) => counterOf(daemon.path(`vms/.snapshots/${name}/${disk}`))) as [number, number];
          expect(`${name}: ${second <= first && first <= second + 1}`).toBe(`${name}: true`);
          taken += 1;
        }
      }
    } finally {
      Atomics.store(state, 0, 1);
      await ended;
    }
    expect(Atomics.load(state, 1)).toBeGreaterThan(GROUP_SNAPSHOTS);
    expect(taken).toBeGreaterThan(GROUP_SNAPSHOTS);
    for (const disk of ['first', 'second']) expect(counterOf(daemon.path(`vms/${disk}`))).toBe(Atomics.load(state, 1));
    expect((await daemon.json<{ verdict: string }>(['check'])).verdict).toBe('clean');
  }, TEST_MS);
});

function counterOf(file: string): number {
  const fd = openSync(file, 'r');
  try {
    const bytes = Buffer.alloc(4);
    readSync(fd, bytes, 0, 4, 0);
    return bytes.readUInt32LE(0);
  } finally {
    closeSync(fd);
  }
}
