/**
 * Conformance: the programs that people and hypervisors really run on the mount.
 */
import { statSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';

import { sha256Of } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { IMAGE_BYTES } from './conformance-context.js';
import type { Conformance } from './conformance-context.js';

const MIB = 1024 * 1024;
const LONG_MS = 60_000;

export function conformanceOfTools(context: () => Conformance): void {
  it('carries an ext4 file system on a loop device with direct I/O: make, mount, write, trim, check', async () => {
    const { at, scratchDir, abilities, control, container, cloneOfImage } = context();
    const name = await cloneOfImage();
    await control.resize(join(container, name), 64 * MIB);
    const mountPoint = join(scratchDir, 'loop');
    await mustRun('mkdir', ['-p', mountPoint]);
    const device = (await mustRun('losetup', ['--find', '--show', '--direct-io=on', at(name)])).stdout.trim();
    try {
      expect((await mustRun('losetup', ['-l', '-n', '-O', 'DIO', device])).stdout.trim()).toBe('1');
      await mustRun('mkfs.ext4', ['-q', '-F', device], { timeoutMs: LONG_MS });
      await mustRun('mount', [device, mountPoint]);
      try {
        await mustRun('dd', ['if=/dev/urandom', `of=${join(mountPoint, 'data')}`, 'bs=1M', 'count=16', 'conv=fsync'], { timeoutMs: LONG_MS });
        await mustRun('cp', [join(mountPoint, 'data'), join(mountPoint, 'copy')]);
        await mustRun('rm', [join(mountPoint, 'data')]);
        await mustRun('sync', ['-f', mountPoint], { timeoutMs: LONG_MS });
        const trimmed = await command('fstrim', ['-v', mountPoint], { timeoutMs: LONG_MS });
        if (abilities.fallocate) expect(trimmed).toMatchObject({ code: 0 });
        await mustRun('sha256sum', [join(mountPoint, 'copy')]);
      } finally {
        await mustRun('umount', [mountPoint], { timeoutMs: LONG_MS });
      }
      await mustRun('e2fsck', ['-f', '-n', device], { timeoutMs: LONG_MS });
    } finally {
      await mustRun('losetup', ['-d', device]);
    }
    await mustRun('e2fsck', ['-f', '-n', at(name)], { timeoutMs: LONG_MS });
  });

  it('serves qemu-img: info, compare, convert in both directions', async () => {
    const { at, imageFile, fresh, scratchDir, cloneOfImage } = context();
    const name = await cloneOfImage();
    const info = JSON.parse((await mustRun('qemu-img', ['info', '-f', 'raw', '--output=json', at(name)])).stdout) as { 'virtual-size': number };
    expect(info['virtual-size']).toBe(IMAGE_BYTES);
    expect((await mustRun('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', at(name), imageFile], { timeoutMs: LONG_MS })).stdout).toContain('identical');
    const qcow2 = join(scratchDir, 'converted.qcow2');
    await mustRun('qemu-img', ['convert', '-t', 'none', '-T', 'none', '-f', 'raw', '-O', 'qcow2', at(name), qcow2], { timeoutMs: LONG_MS });
    await mustRun('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', imageFile, qcow2], { timeoutMs: LONG_MS });
    const back = at(fresh('converted'));
    await mustRun('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', qcow2, back], { timeoutMs: LONG_MS });
    await mustRun('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', back, imageFile], { timeoutMs: LONG_MS });
    await mustRun('qemu-img', ['convert', '-n', '-f', 'qcow2', '-O', 'raw', qcow2, at(name)], { timeoutMs: LONG_MS });
    await mustRun('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', at(name), imageFile], { timeoutMs: LONG_MS });
  });

  it('serves qemu-io without a cache: write, write zeroes, discard, read back', async () => {
    const { at, cloneOfImage } = context();
    const name = await cloneOfImage();
    const commands = [
      'write -P 0xa1 512 1536', 'write -P 0xa2 1M 1M', 'write -z 1536k 64k', 'write -z -u 1600k 4k', 'discard 1792k 128k', 'flush', 'write -f -P 0xa3 3M 4k',
      'read -P 0xa1 512 1536', 'read -P 0xa2 1M 512k', 'read -P 0 1536k 64k', 'read -P 0 1600k 4k', 'read -P 0xa3 3M 4k', 'read -P 0xa2 1920k 128k',
      'aio_write -P 0xa4 5M 64k', 'aio_write -P 0xa5 6M 64k', 'aio_flush', 'read -P 0xa4 5M 64k', 'read -P 0xa5 6M 64k',
    ];
    for (const aio of ['threads', 'native']) {
      const args = ['-t', 'none', '-i', aio, '-d', 'unmap', '-f', 'raw', ...commands.flatMap((each) => ['-c', each]), at(name)];
      const { stdout } = await mustRun('qemu-io', args, { timeoutMs: LONG_MS });
      expect(stdout).not.toMatch(/verification failed|error|failed/i);
    }
  });

  it('serves xfs_io: durable writes, punches, zeroes, seeks', async () => {
    const { at, abilities, cloneOfImage } = context();
    const name = await cloneOfImage();
    await mustRun('xfs_io', ['-d', '-c', 'pwrite -S 0xb1 0 64k', '-c', 'pwrite -D -V 1 -S 0xb2 8k 4k', '-c', 'fdatasync', at(name)]);
    const dump = await mustRun('xfs_io', ['-r', '-c', 'pread -v 12280 16', at(name)]);
    expect(dump.stdout).toMatch(/b2 b2 b2 b2 b2 b2 b2 b2 b1 b1 b1 b1 b1 b1 b1 b1/);
    for (const action of ['fpunch 1000 9000', 'fzero 100000 5000', 'fzero -k 200000 5000', 'falloc -k 0 1m']) {
      const result = await command('xfs_io', ['-c', action, at(name)]);
      if (abilities.fallocate) expect(result).toMatchObject({ code: 0, stderr: '' });
      else expect(result.stderr).toMatch(/not supported/);
    }
    if (abilities.fallocate) {
      expect((await mustRun('xfs_io', ['-r', '-c', 'pread -v 9992 16', at(name)])).stdout).toMatch(/00 00 00 00 00 00 00 00 b2 b2 b2 b2 b2 b2 b2 b2/);
    }
    expect((await mustRun('xfs_io', ['-r', '-c', 'seek -a 0', at(name)])).stdout).toContain('DATA\t0');
  });

  it('serves cp, dd, cmp, tar, truncate', async () => {
    const { at, agent, imageFile, scratchDir, cloneOfImage, fresh } = context();
    const name = await cloneOfImage();
    const expected = await sha256Of(imageFile);
    const sumOf = async (path: string): Promise<string> => (await mustRun('sha256sum', [path], { timeoutMs: LONG_MS })).stdout.slice(0, 64);
    expect(await sumOf(at(name))).toBe(expected);
    const out = join(scratchDir, 'copied-out');
    await mustRun('cp', ['--sparse=always', at(name), out], { timeoutMs: LONG_MS });
    expect(await sha256Of(out)).toBe(expected);
    expect(statSync(out).blocks * 512).toBeLessThan(IMAGE_BYTES);
    const inside = at(fresh('copied-in'));
    await mustRun('cp', ['--preserve=mode,timestamps', imageFile, inside], { timeoutMs: LONG_MS });
    expect(await sumOf(inside)).toBe(expected);
    const within = at(fresh('copied-within'));
    await mustRun('cp', [at(name), within], { timeoutMs: LONG_MS });
    expect(await sumOf(within)).toBe(expected);
    const direct = at(fresh('direct'));
    await mustRun('dd', [`if=${at(name)}`, `of=${direct}`, 'bs=64k', 'iflag=direct', 'oflag=direct', 'conv=fsync'], { timeoutMs: LONG_MS });
    expect(await sumOf(direct)).toBe(expected);
    const odd = at(fresh('odd'));
    await mustRun('dd', [`if=${at(name)}`, `of=${odd}`, 'bs=12345', 'conv=fdatasync'], { timeoutMs: LONG_MS });
    await mustRun('cmp', [odd, imageFile], { timeoutMs: LONG_MS });
    await agent.call('mkdir', at('tree'), 0o755);
    await agent.call('writeFile', at('tree/config.json'), '{}');
    await agent.call('symlink', 'config.json', at('tree/link'));
    await mustRun('tar', ['-C', at('.'), '-cSf', join(scratchDir, 'tree.tar'), 'tree', name], { timeoutMs: LONG_MS });
    await agent.call('mkdir', at('untarred'), 0o755);
    await mustRun('tar', ['-C', at('untarred'), '-xf', join(scratchDir, 'tree.tar')], { timeoutMs: LONG_MS });
    expect(await sumOf(at(`untarred/${name}`))).toBe(expected);
    expect(await agent.call('readlink', at('untarred/tree/link'))).toBe('config.json');
    await mustRun('truncate', ['-s', '100M', at('untarred/tree/config.json')]);
    expect((await agent.call('stat', at('untarred/tree/config.json'))).sizeBytes).toBe(100 * MIB);
  });
}
