/**
 * The fuse-native transport alone, on a real mount, over a file system in memory.
 *
 * What it proves: the translation of paths, errors, times, sizes and flags, and that a durable write is flushed before
 * its reply. This process is the server, so every access to the mount is made by another process.
 */
import { chmodSync, constants, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { fuseNativeAbilities } from '../../daemon/transport/abilities.js';
import { loadFuseNative } from '../../daemon/transport/fuse-native/binding.js';
import { mountFuseNative } from '../../daemon/transport/fuse-native/mount.js';
import type { FuseNativeMount } from '../../daemon/transport/fuse-native/mount.js';
import { createOperations } from '../../daemon/transport/fuse-native/operations.js';
import { command, mustRun } from '../support/model/command.js';
import { FileAgent } from '../support/model/file-agent.js';
import { MemoryFileSystem } from '../support/model/memory-file-system.js';
import { abortMount, mountEntry, removeMount } from '../support/model/mounts.js';

const { O_RDWR, O_CREAT, O_DIRECT, O_EXCL, O_TRUNC, O_APPEND, O_DSYNC, O_RDONLY, O_WRONLY } = constants;
const RWF_DSYNC = 2;
const NOBODY = 65534;
const logger = pino({ level: 'silent' });

const scratch = mkdtempSync(join(tmpdir(), 'offshoot-fuse-native-'));
chmodSync(scratch, 0o755);
let mountCount = 0;

function newMountDir(): string {
  mountCount += 1;
  const dir = join(scratch, `mount-${mountCount}`);
  mkdirSync(dir);
  return dir;
}

afterAll(async () => {
  for (let number = 1; number <= mountCount; number += 1) await removeMount(join(scratch, `mount-${number}`));
  rmSync(scratch, { recursive: true, force: true });
});

describe('a fuse-native mount', { timeout: 60_000 }, () => {
  const fileSystem = new MemoryFileSystem({ blocksTotal: 2 ** 33, blocksFree: 2 ** 32, blocksAvailable: 2 ** 31 });
  let mountDir: string;
  let mount: FuseNativeMount;
  let agent: FileAgent;
  const at = (path: string): string => join(mountDir, path);

  beforeAll(async () => {
    mountDir = newMountDir();
    mount = await mountFuseNative({ fileSystem, mountDir, logger });
    agent = await FileAgent.start();
  });

  afterAll(async () => {
    await agent.stop();
    await removeMount(mountDir);
  });

  async function create(path: string, flags = O_RDWR | O_CREAT): Promise<number> {
    return agent.call('open', at(path), flags, 0o644);
  }

  it('is mounted for all users, with the kernel checking permissions, and without set-user-id', () => {
    const options = mountEntry(mountDir)?.options.split(',') ?? [];
    expect(options).toEqual(expect.arrayContaining(['allow_other', 'default_permissions', 'nosuid', 'nodev', 'noexec']));
  });

  it('reads back what was written, at odd offsets and over several requests', async () => {
    const fd = await create('data');
    const bytes = Buffer.from(Array.from({ length: 1024 * 1024 + 7 }, (_, index) => (index * 7 + (index >> 8)) & 255));
    expect(await agent.call('pwrite', fd, bytes, 4097)).toBe(bytes.length);
    expect((await agent.call('pread', fd, bytes.length, 4097)).equals(bytes)).toBe(true);
    expect((await agent.call('pread', fd, 100, 4097 + bytes.length - 10)).equals(bytes.subarray(-10))).toBe(true);
    expect((await agent.call('pread', fd, 4097, 0)).equals(Buffer.alloc(4097))).toBe(true);
    expect((await agent.call('fstat', fd)).sizeBytes).toBe(4097 + bytes.length);
    await agent.call('close', fd);
  });

  it('cuts large calls into requests of the size that its abilities name', async () => {
    const sizes: number[] = [];
    const write = fileSystem.write.bind(fileSystem);
    fileSystem.write = (node, offsetBytes, data) => { sizes.push(data.length); return write(node, offsetBytes, data); };
    const fd = await create('large');
    await agent.call('pwrite', fd, Buffer.alloc(1024 * 1024, 1), 0);
    fileSystem.write = write;
    await agent.call('close', fd);
    expect(sizes).toEqual(Array<number>(8).fill(fuseNativeAbilities.requestBytesMax));
  });

  it('flushes before the reply to a write that must be durable, and only then', async () => {
    const plain = await create('durable');
    const node = (await agent.call('fstat', plain)).inode;
    const flushes = (): number => fileSystem.flushed.filter((flushed) => flushed === node).length;
    await agent.call('pwrite', plain, Buffer.from('a'), 0);
    expect(flushes()).toBe(0);
    await agent.call('pwriteWithFlags', plain, Buffer.from('b'), 0, RWF_DSYNC);
    expect(flushes()).toBe(1);
    await agent.call('pwrite', plain, Buffer.from('c'), 0);
    expect(flushes()).toBe(1);
    await agent.call('fdatasync', plain);
    expect(flushes()).toBe(2);
    const durable = await agent.call('open', at('durable'), O_WRONLY | O_DSYNC, 0);
    await agent.call('pwrite', durable, Buffer.from('d'), 0);
    expect(flushes()).toBe(3);
    const madeDurable = await create('durable-at-once', O_RDWR | O_CREAT | O_DSYNC);
    await agent.call('pwrite', madeDurable, Buffer.from('e'), 0);
    expect(fileSystem.flushed.at(-1)).toBe((await agent.call('fstat', madeDurable)).inode);
    for (const fd of [plain, durable, madeDurable]) await agent.call('close', fd);
  });

  it('reports a flush that failed to the write and to fsync', async () => {
    const fd = await create('failing');
    const flush = fileSystem.flush.bind(fileSystem);
    fileSystem.flush = () => Promise.reject(new OffshootError('io-error', 'The disk is gone.'));
    expect(await agent.outcome('pwriteWithFlags', fd, Buffer.from('b'), 0, RWF_DSYNC)).toBe('EIO');
    expect(await agent.outcome('fsync', fd)).toBe('EIO');
    fileSystem.flush = flush;
    expect(await agent.outcome('fsync', fd)).toBe('ok');
    await agent.call('close', fd);
  });

  it('turns each kind of error into its errno', async () => {
    const fd = await create('errors');
    const write = fileSystem.write.bind(fileSystem);
    fileSystem.write = () => { throw new OffshootError('no-space', 'The store is full.'); };
    expect(await agent.outcome('pwrite', fd, Buffer.from('b'), 0)).toBe('ENOSPC');
    fileSystem.write = write;
    expect(await agent.outcome('open', at('missing'), O_RDONLY, 0)).toBe('ENOENT');
    expect(await agent.outcome('open', at('errors'), O_RDWR | O_CREAT | O_EXCL, 0o600)).toBe('EEXIST');
    expect(await agent.outcome('link', at('errors'), at('hard'))).toBe('EPERM');
    expect(await agent.outcome('fallocate', fd, 3, 0, 4096)).toBe('EOPNOTSUPP');
    expect(await agent.outcome('renameWithFlags', at('errors'), at('other'), 1)).toBe('EINVAL');
    expect(await agent.outcome('mapShared', fd, 4096)).toBe('ENODEV');
    await agent.call('close', fd);
  });

  it('takes direct I/O in whole sectors only', async () => {
    const fd = await create('direct', O_RDWR | O_CREAT | O_DIRECT);
    expect(await agent.outcome('pwrite', fd, Buffer.alloc(100), 0)).toBe('EINVAL');
    expect(await agent.outcome('pread', fd, 512, 1)).toBe('EINVAL');
    expect(await agent.outcome('pwrite', fd, Buffer.alloc(1024, 1), 512)).toBe('ok');
    expect(await agent.call('pread', fd, 2048, 0)).toHaveLength(1536);
    await agent.call('close', fd);
  });

  it('truncates, appends, and empties a file that is opened with O_TRUNC', async () => {
    const fd = await create('sizes');
    await agent.call('pwrite', fd, Buffer.from('hello world'), 0);
    await agent.call('ftruncate', fd, 5);
    await agent.call('truncate', at('sizes'), 6);
    const appending = await agent.call('open', at('sizes'), O_WRONLY | O_APPEND, 0);
    await agent.call('pwrite', appending, Buffer.from('!'), 0);
    expect(await agent.call('readFile', at('sizes'))).toEqual(Buffer.from('hello\0!'));
    await agent.call('close', await agent.call('open', at('sizes'), O_WRONLY | O_TRUNC, 0));
    expect((await agent.call('stat', at('sizes'))).sizeBytes).toBe(0);
    for (const open of [fd, appending]) await agent.call('close', open);
  });

  it('keeps directories, symbolic links, renames and entry types', async () => {
    await agent.call('mkdir', at('dir'), 0o750);
    await agent.call('mkdir', at('dir/sub'), 0o700);
    await agent.call('symlink', '../data', at('dir/link'));
    await agent.call('close', await create('dir/file'));
    expect(await agent.call('readlink', at('dir/link'))).toBe('../data');
    expect(await agent.call('readdirTypes', at('dir'))).toEqual([['file', 'file'], ['link', 'symlink'], ['sub', 'directory']]);
    await agent.call('rename', at('dir/file'), at('moved'));
    expect(await agent.call('readdir', at('dir'))).toEqual(['link', 'sub']);
    expect(await agent.outcome('rmdir', at('dir'))).toBe('ENOTEMPTY');
    await agent.call('rmdir', at('dir/sub'));
    expect((await agent.call('stat', at('dir'))).mode & 0o7777).toBe(0o750);
  });

  it('lists a directory of 1,000 entries', async () => {
    await agent.call('mkdir', at('many'), 0o755);
    const many = fileSystem.lookup(1, 'many').nodeId;
    const names = Array.from({ length: 1000 }, (_, index) => `entry-${String(index).padStart(4, '0')}`);
    for (const name of names) fileSystem.mkdir(many, name, 0o755, { uid: 0, gid: 0, pid: 0 });
    expect(await agent.call('readdir', at('many'))).toEqual(names);
  });

  it('sets both times apart, to the millisecond, and shows the node id as the inode', async () => {
    await agent.call('close', await create('times'));
    await agent.call('setTimes', at('times'), 1_234_567_890_123_000_000n, 987_654_321_987_000_000n);
    const stat = await agent.call('stat', at('times'));
    expect([stat.atimeNs, stat.mtimeNs]).toEqual([1_234_567_890_123_000_000n, 987_654_321_987_000_000n]);
    expect(stat.inode).toBe(fileSystem.lookup(1, 'times').nodeId);
    await agent.call('setTimes', at('times'), -5_000_000_000n, -7_000_000_000n);
    expect((await agent.call('stat', at('times'))).mtimeNs).toBe(0n);
    expect(fuseNativeAbilities.timesBefore1970).toBe(false);
  });

  it('keeps an unlinked open file without a name, and drops it at its last close', async () => {
    await agent.call('mkdir', at('gone'), 0o755);
    const first = await create('gone/file');
    const second = await agent.call('open', at('gone/file'), O_RDWR, 0);
    const nodes = fileSystem.nodeCount;
    await agent.call('unlink', at('gone/file'));
    expect(await agent.call('readdir', at('gone'))).toEqual([]);
    expect(await agent.outcome('rmdir', at('gone'))).toBe('ENOTEMPTY');
    await agent.call('rename', at('gone'), at('renamed'));
    await agent.call('pwrite', first, Buffer.from('still here'), 0);
    expect(await agent.call('pread', second, 100, 0)).toEqual(Buffer.from('still here'));
    expect(await agent.call('fstat', first)).toMatchObject({ links: 0, sizeBytes: 10 });
    await agent.call('ftruncate', first, 5);
    await agent.call('close', first);
    expect(await agent.call('pread', second, 100, 0)).toEqual(Buffer.from('still'));
    await agent.call('close', second);
    await expect.poll(() => fileSystem.nodeCount).toBe(nodes - 1);
    await agent.call('rmdir', at('renamed'));
  });

  it('keeps an open file that a rename replaced', async () => {
    const replaced = await create('target');
    await agent.call('pwrite', replaced, Buffer.from('old'), 0);
    await agent.call('writeFile', at('replacement'), 'new');
    await agent.call('rename', at('replacement'), at('target'));
    expect(await agent.call('pread', replaced, 10, 0)).toEqual(Buffer.from('old'));
    expect((await agent.call('readFile', at('target'))).toString()).toBe('new');
    await agent.call('close', replaced);
    expect((await agent.call('readFile', at('target'))).toString()).toBe('new');
  });

  it('takes a rename to the hidden name for a rename when the file is not open', async () => {
    await agent.call('writeFile', at('visible'), 'kept');
    await agent.call('rename', at('visible'), at('.fuse_hidden0000000000000001'));
    expect((await agent.call('readFile', at('.fuse_hidden0000000000000001'))).toString()).toBe('kept');
    await agent.call('unlink', at('.fuse_hidden0000000000000001'));
  });

  it('enforces modes and owners, and gives new nodes the owner of their directory', async () => {
    const nobody = await FileAgent.start({ uid: NOBODY });
    try {
      await agent.call('writeFile', at('secret'), 'x');
      await agent.call('chmod', at('secret'), 0o600);
      await agent.call('mkdir', at('theirs'), 0o755);
      expect(await nobody.outcome('open', at('secret'), O_RDONLY, 0)).toBe('EACCES');
      expect(await nobody.outcome('open', at('theirs/file'), O_RDWR | O_CREAT, 0o600)).toBe('EACCES');
      expect(await nobody.outcome('chmod', at('secret'), 0o644)).toBe('EPERM');
      await agent.call('chown', at('theirs'), NOBODY, NOBODY);
      await nobody.call('close', await nobody.call('open', at('theirs/file'), O_RDWR | O_CREAT, 0o600));
      await nobody.call('mkdir', at('theirs/dir'), 0o700);
      expect(await nobody.call('stat', at('theirs/file'))).toMatchObject({ uid: NOBODY, gid: NOBODY });
      expect(await nobody.call('stat', at('theirs/dir'))).toMatchObject({ uid: NOBODY, gid: NOBODY });
    } finally {
      await nobody.stop();
    }
  });

  it('refuses names that are not UTF-8, and devices', async () => {
    const raw = await command('sh', ['-c', `printf x > "$(printf '${mountDir}/bad\\377name')"`]);
    expect(raw.stderr).toContain('Invalid argument');
    expect((await command('mkfifo', [at('fifo')])).stderr).toContain('not permitted');
  });

  it('tells the size of a store of more than 16 TiB', async () => {
    const statfs = await agent.call('statfs', mountDir);
    expect(statfs.blocksTotal * statfs.blockBytes).toBe(2 ** 33 * 4096);
    expect(statfs.blocksFree * statfs.blockBytes).toBe(2 ** 32 * 4096);
  });

  it('serves many processes at once', async () => {
    const results = await Promise.all(Array.from({ length: 6 }, async (_, index) => {
      const path = at(`parallel-${index}`);
      await mustRun('dd', ['if=/dev/urandom', `of=${path}`, 'bs=64k', 'count=32']);
      return (await mustRun('cmp', [path, path])).code;
    }));
    expect(results).toEqual([0, 0, 0, 0, 0, 0]);
  });

  it('says busy while a file is open, and unmounts when none is', async () => {
    const fd = await create('held');
    expect(await mount.unmount()).toBe('busy');
    expect(mountEntry(mountDir)).not.toBeNull();
    await agent.call('close', fd);
    expect(await mount.unmount()).toBe('unmounted');
    expect(mountEntry(mountDir)).toBeNull();
    expect(fileSystem.openHandles).toBe(0);
  });
});

describe('what stands in the way of mounting', { timeout: 30_000 }, () => {
  const environment = { require: (): unknown => { throw new Error('not reached'); }, findProgram: (): string | null => '/usr/bin/fusermount' };
  const fails = (body: () => unknown): { kind: string; message: string } => {
    try {
      body();
    } catch (thrown) {
      const { kind, message } = thrown as OffshootError;
      return { kind, message };
    }
    throw new Error('It did not fail.');
  };

  it('names the Debian packages when fusermount, libfuse 2 or the npm package is missing', () => {
    const noFusermount = fails(() => loadFuseNative({ ...environment, findProgram: () => null }));
    expect(noFusermount.kind).toBe('tool-missing');
    expect(noFusermount.message).toContain('fusermount is not installed: apt-get install libfuse2 fuse');
    const noLibrary = fails(() => loadFuseNative({
      ...environment, require: () => { throw new Error('libfuse.so.2: cannot open shared object file: No such file or directory'); },
    }));
    expect(noLibrary).toMatchObject({ kind: 'tool-missing', message: expect.stringContaining('libfuse 2 is not installed: apt-get install libfuse2 fuse') as string });
    const noPackage = fails(() => loadFuseNative({
      ...environment, require: (id) => { throw Object.assign(new Error(`Cannot find module '${id}'`), { code: 'MODULE_NOT_FOUND' }); },
    }));
    expect(noPackage).toMatchObject({ kind: 'tool-missing', message: expect.stringContaining('npm install --include=optional') as string });
    const otherVersion = fails(() => loadFuseNative({ ...environment, require: () => ({ version: '3.0.0' }) }));
    expect(otherVersion.message).toContain('2.2.6');
  });

  const mountAt = (mountDir: string): Promise<unknown> => mountFuseNative({ fileSystem: new MemoryFileSystem(), mountDir, logger });

  it('refuses a mount point that is missing, a file, not empty, or mounted already', async () => {
    const missing = join(scratch, 'missing');
    await expect(mountAt(missing)).rejects.toMatchObject({ kind: 'mount-unusable', message: expect.stringContaining('does not exist') as string });
    const file = join(scratch, 'file');
    writeFileSync(file, 'x');
    await expect(mountAt(file)).rejects.toMatchObject({ kind: 'mount-unusable', message: expect.stringContaining('not a directory') as string });
    await expect(mountAt(scratch)).rejects.toMatchObject({ kind: 'mount-unusable', message: expect.stringContaining('not empty') as string });
    const mountDir = newMountDir();
    const first = await mountFuseNative({ fileSystem: new MemoryFileSystem(), mountDir, logger });
    await expect(mountAt(mountDir)).rejects.toMatchObject({ kind: 'mount-unusable', message: expect.stringContaining('mounted there already') as string });
    expect(await first.unmount()).toBe('unmounted');
  });

  it('unmounts by force although a file is open', async () => {
    const mountDir = newMountDir();
    const fileSystem = new MemoryFileSystem();
    const mount = await mountFuseNative({ fileSystem, mountDir, logger });
    const agent = await FileAgent.start();
    try {
      await agent.call('open', join(mountDir, 'held'), O_RDWR | O_CREAT, 0o600);
      expect(await mount.unmount()).toBe('busy');
      expect(await mount.unmount({ force: true })).toBe('unmounted');
      expect(mountEntry(mountDir)).toBeNull();
      expect(fileSystem.openHandles).toBe(0);
    } finally {
      await agent.stop();
    }
  });

  it('counts a mount that somebody else has detached as unmounted', async () => {
    const mountDir = newMountDir();
    const mount = await mountFuseNative({ fileSystem: new MemoryFileSystem(), mountDir, logger });
    await mustRun('umount', ['-l', mountDir]);
    expect(await mount.unmount()).toBe('unmounted');
  });

  it('replaces the dead mount of a server that was killed', async () => {
    const mountDir = newMountDir();
    const first = await mountFuseNative({ fileSystem: new MemoryFileSystem(), mountDir, logger });
    await abortMount(mountDir);
    expect((await command('stat', [mountDir])).stderr).toContain('not connected');
    const second = await mountFuseNative({ fileSystem: new MemoryFileSystem(), mountDir, logger });
    expect((await mustRun('stat', ['-c', '%i', mountDir])).stdout.trim()).toBe('1');
    expect(await second.unmount()).toBe('unmounted');
    expect(await first.unmount()).toBe('unmounted');
  });

  it('flushes every write when the flags of a write cannot be seen, and crashes on a programmer error', async () => {
    const fileSystem = new MemoryFileSystem();
    const crashes: unknown[] = [];
    const { operations } = createOperations({ fileSystem, currentWriteFlags: () => null, crash: (thrown) => { crashes.push(thrown); } });
    const reply = <T>(call: (reply: (result: number, value?: T) => void) => void): Promise<number | T> =>
      new Promise((resolve) => { call((result, value) => { resolve(value ?? result); }); });
    expect(await reply((done) => { operations.mknod('/file', 0o100644, 0, done); })).toBe(0);
    const fd = await reply<number>((done) => { operations.open('/file', O_RDWR, done); });
    expect(await reply((done) => { operations.write('/file', fd, Buffer.from('abc'), 3, 0, done); })).toBe(3);
    expect(fileSystem.flushed).toEqual([2]);
    expect(crashes).toEqual([]);
    fileSystem.read = () => { throw new TypeError('a slip'); };
    expect(await reply((done) => { operations.read('/file', fd, Buffer.alloc(3), 3, 0, done); })).toBe(-5);
    expect(crashes).toHaveLength(1);
  });
});
