/**
 * `offshoot discover --libvirt`, with a real libvirtd whose storage pool is a container of the mount: what was made behind its back is there when it has looked again, and what was
 * removed is not.
 *
 * libvirtd is started after the daemon, whose mount it would not see otherwise.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DiscoverResult } from '../../daemon/control/export-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { prepareLibvirtd, type TestLibvirtd } from '../support/libvirtd.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const SIZE = 8 * 1024 * 1024;
const TEST_MS = 240_000;

describe.skipIf(lacks('/dev/fuse', 'libvirtd', 'virsh', 'unshare'))('discover with a storage pool of libvirt', () => {
  const cleanup = createCleanup();
  let libvirtd: TestLibvirtd;
  let daemon: TestDaemon;

  const virsh = async (...args: readonly string[]): Promise<string> => {
    const { code, stdout, stderr } = await libvirtd.virsh(args);
    if (code !== 0) throw new Error(`virsh ${args.join(' ')}: ${stderr}`);
    return stdout;
  };
  /** As libvirt has them now, by their paths. */
  const volumes = async (): Promise<string[]> => (await virsh('vol-list', 'pool')).split('\n').flatMap((line) => /\s(\/.*?)\s*$/u.exec(line)?.[1] ?? []).sort();
  const pathsOf = (...names: readonly string[]): string[] => names.map((name) => daemon.path(`vms/${name}`));

  beforeAll(async () => {
    libvirtd = prepareLibvirtd(cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, startArguments: () => ['--libvirt', libvirtd.uri] });
    await libvirtd.start();
    const image = join(makeTempDir('discover', cleanup), 'image.raw');
    writeFileSync(image, Buffer.alloc(SIZE, 'a disk of a machine '));
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/base.img']);
    await virsh('pool-define-as', 'pool', 'dir', '--target', daemon.path('vms'));
    await virsh('pool-start', 'pool');
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('has libvirt show the volumes that there are, with their sizes, and those alone', async () => {
    expect(await volumes()).toEqual(pathsOf('base.img'));
    await daemon.json(['clone', 'vms/base.img', 'vms/web001.img', 'vms/two words.img']);
    expect(await volumes(), 'libvirt has not looked yet').toEqual(pathsOf('base.img'));
    const found = await daemon.json<DiscoverResult>(['discover', '--libvirt', 'pool']);
    expect({ ...found, found: [...found.found].sort() }).toEqual({ with: 'libvirt', message: 'libvirt has looked at the pool pool again', found: ['base.img', 'two words.img', 'web001.img'] });
    expect(await volumes()).toEqual(pathsOf('base.img', 'two words.img', 'web001.img'));
    const volume = await virsh('vol-dumpxml', '--pool', 'pool', 'web001.img');
    expect(volume).toContain(`<capacity unit='bytes'>${SIZE}</capacity>`);
    expect(volume).toContain(`<format type='raw'/>`);
    await daemon.json(['rm', 'vms/web001.img']);
    expect((await daemon.cli(['discover', '--libvirt', 'pool'])).stdout).toBe('libvirt has looked at the pool pool again\n  base.img\n  two words.img\n');
    expect(await volumes()).toEqual(pathsOf('base.img', 'two words.img'));
  }, TEST_MS);

  it('says what is wrong: no such pool, one that is off, no pool\'s name, no libvirt', async () => {
    const failing = async (pool: string): Promise<{ readonly code: number | null; readonly stderr: string }> => await daemon.cli(['discover', `--libvirt=${pool}`]);
    expect(await failing('nowhere')).toMatchObject({ code: 3, stderr: expect.stringMatching(/libvirt: pool-refresh: .*nowhere/u) as string });
    expect(await failing('--all')).toMatchObject({ code: 2, stderr: expect.stringContaining("'--all' is no pool") as string });
    await virsh('pool-destroy', 'pool');
    expect((await failing('pool')).stderr).toMatch(/libvirt: pool-refresh: .*not active/u);
    await libvirtd.stop();
    expect((await failing('pool')).stderr).toMatch(/is libvirtd running, and .* its address/u);
    daemon.assertQuietLog();
  }, TEST_MS);
});
