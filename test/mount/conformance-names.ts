/**
 * Conformance: names, directories, owners, times. What a hypervisor keeps beside its disks, and what coreutils do.
 */
import { constants } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, it } from 'vitest';

import { command, mustRun } from '../support/model/command.js';
import { FileAgent } from '../support/model/file-agent.js';
import type { Conformance } from './conformance-context.js';

const { O_RDONLY, O_RDWR, O_WRONLY, O_CREAT, O_EXCL, O_TRUNC, O_APPEND } = constants;
const NOBODY = 65534;
const RENAME_NOREPLACE = 1;
const RENAME_EXCHANGE = 2;
const MANY = 1000;
const MS_IN_NS = 1_000_000n;

export function conformanceOfNames(context: () => Conformance): void {
  it('creates, writes, appends to, truncates, renames and unlinks files', async () => {
    const { agent, at } = context();
    const path = at('lifecycle');
    const fd = await agent.call('open', path, O_RDWR | O_CREAT | O_EXCL, 0o640);
    await agent.call('pwrite', fd, Buffer.from('hello world'), 0);
    expect(await agent.call('fstat', fd)).toMatchObject({ sizeBytes: 11, links: 1, uid: 0, gid: 0 });
    expect((await agent.call('fstat', fd)).mode & 0o7777).toBe(0o640);
    const appending = await agent.call('open', path, O_WRONLY | O_APPEND, 0);
    await agent.call('pwrite', appending, Buffer.from('!'), 0);
    expect((await agent.call('readFile', path)).toString()).toBe('hello world!');
    await agent.call('ftruncate', fd, 5);
    await agent.call('truncate', path, 8);
    expect(await agent.call('readFile', path)).toEqual(Buffer.from('hello\0\0\0'));
    expect(await agent.outcome('open', path, O_RDWR | O_CREAT | O_EXCL, 0o640)).toBe('EEXIST');
    await agent.call('close', await agent.call('open', path, O_WRONLY | O_TRUNC, 0));
    expect((await agent.call('stat', path)).sizeBytes).toBe(0);
    await agent.call('rename', path, at('lifecycle-2'));
    expect(await agent.outcome('stat', path)).toBe('ENOENT');
    for (const open of [fd, appending]) await agent.call('close', open);
    await agent.call('unlink', at('lifecycle-2'));
    expect(await agent.outcome('stat', at('lifecycle-2'))).toBe('ENOENT');
  });

  it('answers wrong uses with the errno that Linux gives', async () => {
    const { agent, at } = context();
    await agent.call('mkdir', at('wrong'), 0o755);
    await agent.call('writeFile', at('wrong/file'), 'x');
    expect(await agent.outcome('mkdir', at('wrong'), 0o755)).toBe('EEXIST');
    expect(await agent.outcome('open', at('wrong/missing'), O_RDONLY, 0)).toBe('ENOENT');
    expect(await agent.outcome('open', at('wrong'), O_WRONLY, 0)).toBe('EISDIR');
    expect(await agent.outcome('stat', at('wrong/file/below'))).toBe('ENOTDIR');
    expect(await agent.outcome('rmdir', at('wrong'))).toBe('ENOTEMPTY');
    expect(await agent.outcome('rmdir', at('wrong/file'))).toBe('ENOTDIR');
    expect(await agent.outcome('unlink', at('wrong'))).toBe('EISDIR');
    expect(await agent.outcome('rename', at('wrong'), at('wrong/inside'))).toBe('EINVAL');
    expect(await agent.outcome('rename', at('wrong/file'), at('wrong'))).toMatch(/^(EISDIR|ENOTEMPTY|EEXIST)$/);
    expect(await agent.outcome('rename', at('wrong'), at('wrong/file'))).toMatch(/^(ENOTDIR|EINVAL)$/);
    expect(await agent.outcome('link', at('wrong/file'), at('wrong/hard'))).toBe('EPERM');
    expect((await command('mkfifo', [at('wrong/fifo')])).code).not.toBe(0);
    expect(await agent.call('readdir', at('wrong'))).toEqual(['file']);
  });

  it('takes names of up to 255 bytes, in UTF-8, and refuses longer ones and control characters', async () => {
    const { agent, at } = context();
    const names = ['a'.repeat(255), 'ä'.repeat(127), 'with blanks', '-rf', "quo'te\"s", '日本語', '...', 'ünï.img'];
    await agent.call('mkdir', at('spellings'), 0o755);
    for (const name of names) await agent.call('writeFile', join(at('spellings'), name), name);
    expect(await agent.call('readdir', at('spellings'))).toEqual([...names].sort());
    for (const name of names) expect((await agent.call('readFile', join(at('spellings'), name))).toString()).toBe(name);
    expect(await agent.outcome('mkdir', join(at('spellings'), 'a'.repeat(256)), 0o755)).toBe('ENAMETOOLONG');
    expect(await agent.outcome('mkdir', join(at('spellings'), 'ä'.repeat(128)), 0o755)).toBe('ENAMETOOLONG');
    expect(await agent.outcome('mkdir', join(at('spellings'), 'new\nline'), 0o755)).toBe('EINVAL');
    const raw = await command('sh', ['-c', `printf x > "$(printf '${at('spellings')}/bad\\377name')"`]);
    expect(raw.code).not.toBe(0);
    expect(await agent.call('readdir', at('spellings'))).toEqual([...names].sort());
  });

  it('keeps a directory of 1,000 entries, and lists it while it changes', async () => {
    const { agent, at } = context();
    await agent.call('mkdir', at('many'), 0o755);
    const names = Array.from({ length: MANY }, (_, index) => `entry-${String(index).padStart(4, '0')}`);
    for (const name of names) await agent.call('writeFile', join(at('many'), name), name);
    expect(await agent.call('readdir', at('many'))).toEqual(names);
    expect((await mustRun('find', [at('many'), '-type', 'f'])).stdout.split('\n').filter(Boolean)).toHaveLength(MANY);
    await mustRun('find', [at('many'), '-name', '*[02468]', '-delete']);
    expect(await agent.call('readdir', at('many'))).toEqual(names.filter((_, index) => index % 2 === 1));
    await mustRun('rm', ['-r', at('many')]);
  });

  it('shows types in directories, and links of directories', async () => {
    const { agent, at } = context();
    await agent.call('mkdir', at('types'), 0o755);
    await agent.call('mkdir', at('types/dir'), 0o755);
    await agent.call('symlink', 'dir', at('types/link'));
    await agent.call('writeFile', at('types/file'), '');
    expect(await agent.call('readdirTypes', at('types'))).toEqual([['dir', 'directory'], ['file', 'file'], ['link', 'symlink']]);
    expect((await agent.call('stat', at('types'))).links).toBe(3);
    expect((await agent.call('stat', at('types/link'))).inode).toBe((await agent.call('stat', at('types/dir'))).inode);
  });

  it('keeps symbolic links of any length, and never follows them itself', async () => {
    const { agent, at } = context();
    const long = 'x/'.repeat(1000);
    await agent.call('symlink', long, at('long-link'));
    expect(await agent.call('readlink', at('long-link'))).toBe(long);
    await agent.call('symlink', '/etc/hostname', at('absolute-link'));
    expect((await agent.call('readFile', at('absolute-link'))).length).toBeGreaterThan(0);
    expect((await agent.call('lstat', at('absolute-link'))).sizeBytes).toBe('/etc/hostname'.length);
    await agent.call('unlink', at('absolute-link'));
    await agent.call('unlink', at('long-link'));
  });

  it('replaces files and empty directories by rename, and keeps what was open', async () => {
    const { agent, at } = context();
    await agent.call('writeFile', at('old'), 'old');
    const fd = await agent.call('open', at('old'), O_RDWR, 0);
    await agent.call('writeFile', at('new'), 'new');
    await agent.call('rename', at('new'), at('old'));
    expect(await agent.call('pread', fd, 10, 0)).toEqual(Buffer.from('old'));
    expect((await agent.call('readFile', at('old'))).toString()).toBe('new');
    await agent.call('close', fd);
    await agent.call('mkdir', at('dir-a'), 0o755);
    await agent.call('mkdir', at('dir-b'), 0o755);
    await agent.call('writeFile', at('dir-a/inside'), 'x');
    await agent.call('rename', at('dir-a'), at('dir-b'));
    expect(await agent.call('readdir', at('dir-b'))).toEqual(['inside']);
    await agent.call('rename', at('old'), at('dir-b/moved'));
    expect((await agent.call('readFile', at('dir-b/moved'))).toString()).toBe('new');
  });

  it('renames without replacing, and exchanges, if the transport can', async () => {
    const { agent, at, abilities } = context();
    await agent.call('writeFile', at('one'), '1');
    await agent.call('writeFile', at('two'), '2');
    expect(await agent.outcome('renameWithFlags', at('one'), at('two'), RENAME_NOREPLACE)).toBe('EEXIST');
    expect(await agent.outcome('renameWithFlags', at('two'), at('three'), RENAME_NOREPLACE)).toBe(abilities.renameFlags ? 'ok' : 'EINVAL');
    await agent.call('rename', at(abilities.renameFlags ? 'three' : 'two'), at('two'));
    expect(await agent.outcome('renameWithFlags', at('one'), at('two'), RENAME_EXCHANGE)).toBe(abilities.renameFlags ? 'ok' : 'EINVAL');
    expect((await agent.call('readFile', at('one'))).toString()).toBe(abilities.renameFlags ? '2' : '1');
  });

  it('keeps an unlinked open file until its last close', async () => {
    const { agent, at, abilities } = context();
    await agent.call('mkdir', at('unlinked'), 0o755);
    const path = at('unlinked/file');
    const fd = await agent.call('open', path, O_RDWR | O_CREAT, 0o600);
    const other = await agent.call('open', path, O_RDWR, 0);
    await agent.call('unlink', path);
    expect(await agent.call('readdir', at('unlinked'))).toEqual([]);
    await agent.call('writeFile', path, 'another one');
    await agent.call('pwrite', fd, Buffer.from('still here'), 0);
    expect(await agent.call('pread', other, 20, 0)).toEqual(Buffer.from('still here'));
    expect(await agent.call('fstat', fd)).toMatchObject({ links: 0, sizeBytes: 10 });
    await agent.call('unlink', path);
    expect(await agent.outcome('rmdir', at('unlinked'))).toBe(abilities.removesDirectoryOfOpenFiles ? 'ok' : 'ENOTEMPTY');
    await agent.call('close', fd);
    expect(await agent.call('pread', other, 5, 6)).toEqual(Buffer.from('here'));
    await agent.call('close', other);
  });

  it('enforces modes and owners for an ordinary user', async () => {
    const { agent, at, abilities } = context();
    const nobody = await FileAgent.start({ uid: NOBODY });
    try {
      await agent.call('writeFile', at('secret'), 'x');
      await agent.call('chmod', at('secret'), 0o600);
      await agent.call('mkdir', at('closed'), 0o700);
      await agent.call('mkdir', at('roots'), 0o755);
      await agent.call('writeFile', at('roots/file'), 'x');
      expect(await nobody.outcome('open', at('secret'), O_RDONLY, 0)).toBe('EACCES');
      expect(await nobody.outcome('readdir', at('closed'))).toBe('EACCES');
      expect(await nobody.outcome('open', at('roots/new'), O_RDWR | O_CREAT, 0o600)).toBe('EACCES');
      expect(await nobody.outcome('unlink', at('roots/file'))).toBe('EACCES');
      expect(await nobody.outcome('open', at('roots/file'), O_WRONLY, 0)).toBe('EACCES');
      expect(await nobody.outcome('chmod', at('roots/file'), 0o666)).toBe('EPERM');
      expect(await nobody.outcome('chown', at('roots/file'), NOBODY, NOBODY)).toBe('EPERM');
      await agent.call('mkdir', at('theirs'), 0o755);
      await agent.call('chown', at('theirs'), NOBODY, NOBODY);
      await nobody.call('writeFile', at('theirs/file'), 'mine');
      await nobody.call('mkdir', at('theirs/dir'), 0o700);
      for (const name of ['theirs/file', 'theirs/dir']) expect(await nobody.call('stat', at(name))).toMatchObject({ uid: NOBODY, gid: NOBODY });
      await agent.call('mkdir', at('shared'), 0o755);
      await agent.call('chmod', at('shared'), 0o1777);
      await agent.call('writeFile', at('shared/of-root'), 'x');
      await nobody.call('mkdir', at('shared/of-nobody'), 0o755);
      expect((await nobody.call('stat', at('shared/of-nobody'))).uid).toBe(abilities.callerIdentity ? NOBODY : 0);
      expect(await nobody.outcome('unlink', at('shared/of-root'))).toBe('EPERM');
      expect((await agent.call('stat', at('shared'))).mode & 0o7777).toBe(0o1777);
    } finally {
      await nobody.stop();
    }
  });

  it('changes mode and owner one at a time', async () => {
    const { agent, at } = context();
    await agent.call('writeFile', at('owned'), 'x');
    await agent.call('chmod', at('owned'), 0o640);
    await agent.call('chown', at('owned'), 1234, 5678);
    await agent.call('chown', at('owned'), 4321, -1);
    expect(await agent.call('stat', at('owned'))).toMatchObject({ uid: 4321, gid: 5678 });
    expect((await agent.call('stat', at('owned'))).mode & 0o7777).toBe(0o640);
  });

  it('sets times, and moves them when content or attributes change', async () => {
    const { agent, at, abilities } = context();
    await agent.call('writeFile', at('times'), 'x');
    const stepNs = BigInt(abilities.timeStepUs) * 1000n;
    const [atimeNs, mtimeNs] = [1_234_567_890_123_456_789n, 987_654_321_987_654_321n];
    const stepped = (time: bigint): bigint => time - time % stepNs;
    await agent.call('setTimes', at('times'), atimeNs, mtimeNs);
    expect(await agent.call('stat', at('times'))).toMatchObject({ atimeNs: stepped(atimeNs), mtimeNs: stepped(mtimeNs) });
    const other = 1_700_000_000_000_000_000n;
    await agent.call('setTimes', at('times'), null, other);
    expect(await agent.call('stat', at('times'))).toMatchObject({ atimeNs: stepped(atimeNs), mtimeNs: abilities.setOneTime ? other : stepped(mtimeNs) });
    await agent.call('setTimes', at('times'), -5_000_000_000n, -7_000_000_000n);
    expect((await agent.call('stat', at('times'))).mtimeNs).toBe(abilities.timesBefore1970 ? -7_000_000_000n : 0n);

    const before = BigInt(Date.now()) * MS_IN_NS - 1000n * MS_IN_NS;
    const fd = await agent.call('open', at('times'), O_RDWR, 0);
    await agent.call('pwrite', fd, Buffer.from('y'), 0);
    const written = await agent.call('fstat', fd);
    expect(written.mtimeNs).toBeGreaterThan(before);
    await agent.call('close', fd);
    await sleep(20);
    expect((await agent.call('stat', at('times'))).mtimeNs).toBeGreaterThan(before);
    await agent.call('chmod', at('times'), 0o600);
    const changed = await agent.call('stat', at('times'));
    expect(changed.ctimeNs).toBeGreaterThan(written.ctimeNs);
    const dirBefore = (await agent.call('stat', at('.'))).mtimeNs;
    await sleep(20);
    await agent.call('writeFile', at('times-neighbour'), '');
    expect((await agent.call('stat', at('.'))).mtimeNs).toBeGreaterThan(dirBefore);
  });

  it('tells the store\'s size and free space', async () => {
    const { agent, daemon } = context();
    const statfs = await agent.call('statfs', daemon.mountDir);
    expect(statfs.blocksTotal).toBeGreaterThan(0);
    expect(statfs.blocksFree).toBeLessThanOrEqual(statfs.blocksTotal);
    expect(statfs.blocksAvailable).toBeGreaterThan(0);
    const { stdout } = await mustRun('df', ['--output=size', '-B1', daemon.mountDir]);
    expect(Number(stdout.split('\n')[1])).toBe(statfs.blocksTotal * statfs.blockBytes);
  });

  it('has only containers at the top', async () => {
    const { agent, daemon, control } = context();
    expect(await agent.outcome('writeFile', join(daemon.mountDir, 'file-at-the-top'), 'x')).toBe('EPERM');
    await agent.call('mkdir', join(daemon.mountDir, 'made-under-the-mount'), 0o755);
    expect((await control.listContainers()).map((container) => container.name)).toContain('made-under-the-mount');
    await agent.call('rmdir', join(daemon.mountDir, 'made-under-the-mount'));
    expect((await control.listContainers()).map((container) => container.name)).not.toContain('made-under-the-mount');
  });

  it('shows at once what the control API changes', async () => {
    const { agent, at, control, container, cloneOfImage } = context();
    const name = await cloneOfImage();
    const path = join(container, name);
    expect(await agent.call('readdir', at('.'))).toContain(name);
    expect((await agent.call('stat', at(name))).sizeBytes).toBe((await control.show(path)).sizeBytes);
    await control.resize(path, 40 * 1024 * 1024);
    expect((await agent.call('stat', at(name))).sizeBytes).toBe(40 * 1024 * 1024);
    await control.remove(path, { keepData: false, recursive: false });
    expect(await agent.outcome('stat', at(name))).toBe('ENOENT');
  });
}
