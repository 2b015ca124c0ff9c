/**
 * What a client of an export has flushed is durable: the power is cut under the store while QEMU's NBD and iSCSI clients are connected, and everything that was not
 * synced is really lost. As in shutdown.test.ts, the file system of the store (XFS on a loop device) stops as it is, all processes are killed, what is on tmpfs goes.
 */
import { readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { startTestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { makeLoopFileSystem } from '../support/faults/loop-file-system.js';
import { makePatternImage } from '../support/images.js';
import { mustRun } from '../support/model/command.js';
import { isAlive, processesNaming, signalProcess, waitUntilGone } from '../support/processes.js';
import { startQemuIo } from '../support/qemu-io.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const DISK_BYTES = 8 * 1024 ** 2;
const TEST_MS = 300_000;
const ME = 'iqn.2004-10.com.example:me';
const cleanup = createCleanup();
afterEach(() => cleanup.run());

const KINDS = [
  { kind: 'nbd', present: ['--to', '127.0.0.1'], options: ({ addresses: [uri = ''], path }: ExportInfo) => `file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port=${new URL(uri).port},file.export=${path}` },
  { kind: 'iscsi', present: ['--to', ME], options: ({ options: { listen = '' }, uuid }: ExportInfo) => `file.driver=iscsi,file.transport=tcp,file.portal=${listen},file.target=iqn.2026-11.offshoot:${uuid},file.lun=1,file.initiator-name=${ME}` },
] as const;

describe.skipIf(lacks('/dev/fuse', 'losetup', 'xfs_io', 'mkfs.xfs', 'nbdkit', 'tgtd', 'qemu-io'))('a power cut under a disk that is shown', () => {
  it.each(KINDS)('over $kind leaves what the client flushed, on a clone and on what was written before; and what it wrote with FUA', async ({ kind, present, options }) => {
    const fileSystem = await makeLoopFileSystem('xfs', cleanup);
    const runtimeDir = makeTmpfsDir('power', cleanup);
    const image = join(makeTempDir('image', cleanup), 'image');
    makePatternImage(image, { sizeBytes: DISK_BYTES, seed: 5 });
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: join(fileSystem.directory, 'store'), environment: { OFFSHOOT_RUNTIME_DIR: runtimeDir } });
    await daemon.json(['container', 'create', 'c']);
    await daemon.json(['import', image, 'c/image']);
    await daemon.json(['clone', 'c/image', 'c/disk']);
    const info = await daemon.json<ExportInfo>(['present', 'c/disk', '--as', kind, ...present, '--listen', `127.0.0.1:${await freePort()}`]);
    const client = startQemuIo(`driver=raw,${options(info)}`, cleanup);
    await client.ask('write -P 1 0 1M');
    await client.ask('write -P 2 4K 512');
    await client.ask('flush');
    // Owned by now: a flush of it is no transaction, only a sync.
    await client.ask('write -P 3 64K 64K');
    await client.ask('flush');
    await client.ask('write -f -P 4 2M 64K');
    await client.ask('write -f -P 5 128K 4K');
    // Never flushed: it may be there, or not.
    client.say('write -P 6 4M 1M');
    await fileSystem.shutDown();
    for (const pid of [...processesNaming(runtimeDir), client.pid].filter(isAlive)) signalProcess(pid, 'SIGKILL');
    await daemon.killBoth();
    for (const pid of processesNaming(runtimeDir)) await waitUntilGone(pid, 20_000);
    for (const name of readdirSync(runtimeDir)) rmSync(join(runtimeDir, name), { recursive: true });
    await fileSystem.unmount();

    await fileSystem.mount();
    await daemon.start();
    const after = join(makeTempDir('after', cleanup), 'disk');
    await mustRun('dd', [`if=${daemon.path('c/disk')}`, `of=${after}`, 'bs=64K', 'status=none'], { timeoutMs: 60_000 });
    const reads = ['read -P 1 0 4K', 'read -P 2 4K 512', 'read -P 1 4608 60928', 'read -P 3 64K 64K', 'read -P 5 128K 4K', 'read -P 1 132K 892K', 'read -P 4 2M 64K'];
    const { stdout } = await mustRun('qemu-io', ['-r', '-f', 'raw', ...reads.flatMap((each) => ['-c', each]), after]);
    expect(stdout).not.toContain('failed');
    expect(stdout.match(/^read \d+\/\d+ bytes/gmu)).toHaveLength(reads.length);
    // What was never written is the image's.
    const range = (file: string): Promise<string> => mustRun('sh', ['-c', 'dd if="$1" bs=64K skip=33 count=31 status=none | sha256sum', 'sh', file]).then((result) => result.stdout);
    expect(await range(after)).toBe(await range(image));
    expect((await daemon.json<ExportInfo[]>(['exports']))[0]).toMatchObject({ uuid: info.uuid, options: info.options });
    await daemon.json(['withdraw', 'c/disk', '--force']);
    await daemon.stop();
  }, TEST_MS);
});
