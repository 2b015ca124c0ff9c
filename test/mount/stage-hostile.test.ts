/**
 * Users' files where root is at work: what a file system of a container file may do to this host, and paths of the administrator's that lead below our own mount.
 * Real file systems, and a real daemon.
 */
import { existsSync, mkdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { makeFileSystem, mountFileSystem, unmountFileSystem, writeFileInside } from '../../daemon/vdisks/filesystem.js';
import type { FileSystemType } from '../../daemon/vdisks/layout.js';
import { startTestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 ** 2;
const WAIT_MS = 60_000;
const cleanup = createCleanup();
const signal = new AbortController().signal;

describe.skipIf(lacks('losetup', 'mkfs.ext4', 'mkfs.xfs', 'install'))('a file system of a container file', () => {
  afterEach(async () => { await cleanup.run(); });

  it.each<{ type: FileSystemType; sizeBytes: number; uuid: string }>([
    { type: 'ext4', sizeBytes: 32 * MIB, uuid: '11111111-2222-4333-8444-555555555555' }, { type: 'xfs', sizeBytes: 320 * MIB, uuid: '11111111-2222-4333-8444-666666666666' },
  ])('($type) leads root nowhere by links, has no rights and no devices, and does not end the host when it is damaged', async ({ type, sizeBytes, uuid }) => {
    const directory = makeTempDir('hostile', cleanup);
    const [image, mountPoint, victim] = [join(directory, 'image'), join(directory, 'mount'), join(directory, 'victim')];
    await mustRun('truncate', ['--size', String(sizeBytes), image]);
    mkdirSync(mountPoint);
    writeFileSync(victim, 'of root', { mode: 0o600 });
    const device = (await mustRun('losetup', ['--find', '--show', image])).stdout.trim();
    cleanup.add(async () => {
      await command('umount', [mountPoint]);
      await command('losetup', ['--detach', device]);
    });
    await makeFileSystem(device, { type, uuid, label: 'offshoot', sizeBytes, files: 4 }, signal);
    // Whoever can write to it says what happens when it is damaged: the host panics.
    if (type === 'ext4') await mustRun('tune2fs', ['-e', 'panic', device]);
    await mountFileSystem(device, mountPoint, type, signal);
    const options = readFileSync('/proc/self/mountinfo', 'utf8').split('\n').find((line) => line.split(' ')[4] === mountPoint) ?? '';
    for (const option of ['nosuid', 'nodev', 'nosymfollow']) expect(options).toContain(option);
    expect(options).not.toContain('errors=panic');
    // What a user who owns the directory puts in the place of the configuration between two calls of root's program.
    symlinkSync(victim, join(mountPoint, 'machine.xml'));
    expect((await command('chmod', ['666', join(mountPoint, 'machine.xml')])).code).not.toBe(0);
    expect((await command('cat', [join(mountPoint, 'machine.xml')])).code).not.toBe(0);
    expect(statSync(victim).mode & 0o777).toBe(0o600);
    await writeFileInside({ path: join(mountPoint, 'machine.xml'), text: 'its own', uid: 1000, gid: 1000, mode: 0o640 }, signal);
    expect([readFileSync(victim, 'utf8'), readFileSync(join(mountPoint, 'machine.xml'), 'utf8'), statSync(join(mountPoint, 'machine.xml')).uid]).toEqual(['of root', 'its own', 1000]);
    await unmountFileSystem(mountPoint, signal);
  }, 4 * WAIT_MS);
});

describe.skipIf(lacks('/dev/fuse', 'tgtd', 'tgtadm', 'smbd', 'nbdkit'))('a path of the administrator that leads below the mount', () => {
  afterEach(async () => { await cleanup.run(); });

  it('by a link, to passwords or certificates of an export, does not make the server wait for itself', async () => {
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    const directory = makeTempDir('paths', cleanup);
    await daemon.json(['container', 'create', 'vms']);
    const image = join(directory, 'source.img');
    makePatternImage(image, { sizeBytes: MIB, seed: 3 });
    await daemon.json(['import', image, 'vms/a.img']);
    await mustRun('cp', [image, daemon.path('vms/secret')]);
    const link = join(directory, 'link');
    symlinkSync(daemon.path('vms'), link);
    const before = (await daemon.status()).serverPid;
    const present = async (...args: string[]): Promise<string> => (await daemon.cli(['present', ...args])).stderr;
    expect(await present('vms/a.img', '--as', 'iscsi', '--to', 'iqn.2004-10.com.example:a', '--option', 'account=a', '--option', `password-file=${link}/secret`)).toContain('password file');
    expect(await present('vms', '--as', 'smb', '--to', 'games', '--option', `password-file=${link}/secret`)).toContain('password file');
    expect(await present('vms/a.img', '--as', 'nbd', '--to', '127.0.0.1', '--option', `tls=${link}`)).toContain('cannot be read');
    // By its own name it is refused before anybody looks.
    expect(await present('vms', '--as', 'smb', '--to', 'games', '--option', `password-file=${daemon.path('vms/secret')}`)).toContain('under the mount itself');
    expect((await daemon.status()).serverPid).toBe(before);
    expect(await daemon.json(['exports'])).toEqual([]);
    expect(existsSync(daemon.path('vms/secret'))).toBe(true);
  }, 4 * WAIT_MS);
});
