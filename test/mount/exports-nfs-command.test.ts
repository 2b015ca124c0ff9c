/** NFS exports by the command line, from end to end: presented, kept over the death of the server and a restart of the daemon, withdrawn. */
import { constants, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { command } from '../support/model/command.js';
import { NfsClient } from '../support/nfs-client.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const TEST_MS = 240_000;
const KIB = 1024;

interface Shown {
  readonly id: number;
  readonly path: string;
  readonly kind: string;
  readonly addresses: readonly string[];
}

describe.skipIf(lacks('/dev/fuse', 'ganesha.nfsd', 'nfs-ls'))('offshoot present --as nfs', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let port: number;
  let user: NfsClient;
  const list = async (path: string): Promise<string> => {
    const { code, stdout, stderr } = await command('nfs-ls', [`nfs://127.0.0.1/${path}?version=4&nfsport=${port}`]);
    return code === 0 ? stdout.split('\n').flatMap((line) => line.split(/\s+/u).at(-1) ?? []).filter((name) => name !== '').sort().join() : `refused: ${stderr}`;
  };

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, startArguments: () => ['--nfs'] });
    port = await freePort();
    for (const container of ['vms', 'iso']) await daemon.json(['container', 'create', container]);
    writeFileSync(daemon.path('iso/debian.iso'), 'an image');
    mkdirSync(daemon.path('iso/empty'));
    const image = join(makeTempDir('image', cleanup), 'image.raw');
    writeFileSync(image, Buffer.alloc(64 * KIB, 7));
    await daemon.json(['import', image, 'vms/disk.img']);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  it('shows what it was told, at the address that it says', async () => {
    const vms = await daemon.json<Shown>(['present', 'vms', '--as', 'nfs', '--to', '127.0.0.1', '--option', 'squash=none', '--option', `port=${port}`]);
    expect(vms).toMatchObject({ path: 'vms', kind: 'nfs', addresses: [`nfs://127.0.0.1:${port}/vms`] });
    await daemon.json(['present', 'iso', '--as', 'nfs', '--to', '127.0.0.1', '--read-only']);
    expect([await list(''), await list('vms'), await list('iso')]).toEqual(['iso,vms', 'disk.img', 'debian.iso,empty']);
    user = new NfsClient(cleanup);
    await user.mount({ path: '/vms', port });
    const handle = await user.open('/written', constants.O_CREAT | constants.O_RDWR);
    await user.write({ handle, offset: 0, length: 32 * KIB, seed: 'command' });
    await user.fsync(handle);
    await daemon.waitForServer(await daemon.killServer(), TEST_MS);
    await user.check({ handle, offset: 0, length: 32 * KIB, seed: 'command' });
    expect(readFileSync(daemon.path('vms/written'))).toHaveLength(32 * KIB);
  }, TEST_MS);

  it('refuses what NFS cannot show, with what to do', async () => {
    const disk = await daemon.cli(['present', 'vms/disk.img', '--as', 'nfs', '--to', '127.0.0.1']);
    expect([disk.code, disk.stderr]).toEqual([8, expect.stringContaining('nfs shows directories, and no single disks')]);
    const option = await daemon.cli(['present', 'iso/empty', '--as', 'nfs', '--to', '127.0.0.1', '--option', 'async=yes']);
    expect([option.code, option.stderr]).toEqual([2, expect.stringContaining('NFS has no option async')]);
  }, TEST_MS);

  it('is there again after a stop and a start', async () => {
    const busy = await daemon.cli(['daemon', 'stop']);
    expect([busy.code, busy.stderr]).toEqual([5, expect.stringContaining('is in use as nfs by 127.0.0.1')]);
    await user.end();
    await daemon.stop();
    expect(await list('vms')).toContain('refused');
    await daemon.start();
    expect(await waitUntil(async () => (await list('')) === 'iso,vms', 60_000)).toBe(true);
    expect(await list('vms')).toBe('disk.img,written');
  }, TEST_MS);

  it('shows no longer what is withdrawn, and the rest goes on', async () => {
    const gone = await daemon.cli(['withdraw', 'iso', '--as', 'nfs', '--force']);
    expect([gone.code, gone.stderr]).toEqual([0, '']);
    expect([await list(''), await list('vms')]).toEqual(['vms', 'disk.img,written']);
    expect((await daemon.json<Shown[]>(['exports'])).map(({ path, kind }) => [path, kind])).toEqual([['vms', 'nfs']]);
    expect((await daemon.cli(['withdraw', 'vms', '--as', 'nfs', '--force'])).code).toBe(0);
    expect(await list('')).toContain('refused');
    await daemon.stop();
  }, TEST_MS);

  it('is refused by a daemon without --nfs, which says how to start it', async () => {
    const plain = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: daemon.storeDir });
    const refused = await plain.cli(['present', 'vms', '--as', 'nfs', '--to', '127.0.0.1']);
    expect([refused.code !== 0, refused.stderr]).toEqual([true, expect.stringContaining('start it with --nfs')]);
    await plain.stop();
  }, TEST_MS);
});
