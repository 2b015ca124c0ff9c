/**
 * `offshoot daemon upgrade` on a real daemon: from this build to copies of it with another version, under fio with verification.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import type { DaemonStatus, FillInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { runFio } from '../support/fio.js';
import { makePatternImage } from '../support/images.js';
import { command, type CommandResult } from '../support/model/command.js';
import { makeBuild, type OtherBuild } from '../support/other-build.js';
import { isAlive } from '../support/processes.js';
import { createCleanup, makeTempDir, type Cleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

interface Upgraded {
  readonly upgraded: true;
  readonly fromVersion: string;
  readonly toVersion: string;
  readonly fromServerPid: number;
  readonly serverPid: number;
  readonly holderPid: number;
  readonly holderVersion: string;
  readonly stallMs: number;
}

const OWN_VERSION = (JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as { version: string }).version;
const UPGRADE_MS_MAX = 100_000;
const MIB = 1024 ** 2;

describe.skipIf(lacks('/dev/fuse', 'fio'))('an upgrade', () => {
  let cleanup: Cleanup;
  let daemon: TestDaemon;
  beforeEach(async () => {
    cleanup = createCleanup();
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'vms']);
    const image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 96 * MIB, seed: 3 });
    await daemon.json(['import', image, 'vms/source']);
    await daemon.json(['clone', 'vms/source', 'vms/disk']);
  });
  afterEach(async () => { await cleanup.run(); });

  const upgrade = async (build: OtherBuild): Promise<CommandResult> =>
    await command(process.execPath, [build.cliEntry, 'daemon', 'upgrade', '--json', '--socket', daemon.socketPath], { timeoutMs: UPGRADE_MS_MAX });
  const load = async (seconds: number): ReturnType<typeof runFio> => await runFio({
    filename: daemon.path('vms/disk'), rw: 'randwrite', bs: '4k', direct: 1, ioengine: 'libaio', iodepth: 16, size: '64m', verify: 'crc32c',
    verify_fatal: 1, verify_backlog: 256, time_based: true, runtime: seconds, thinktime: 2000, thinktime_blocks: 16,
  });

  it('lets another build serve while guests write, twice in a row, and the holder stays', async () => {
    await daemon.json(['fill', 'start', 'vms/disk', '--rate', '2M']);
    const before = await daemon.status();
    expect(before).toMatchObject({ version: OWN_VERSION, holderVersion: OWN_VERSION, upgrade: null });
    const guests = load(12);
    const first = await upgrade(makeBuild('9.1.0', cleanup));
    expect(first).toMatchObject({ code: 0, stderr: '' });
    const done = JSON.parse(first.stdout) as Upgraded;
    expect(done).toMatchObject({
      upgraded: true, fromVersion: OWN_VERSION, toVersion: '9.1.0', fromServerPid: before.serverPid, holderPid: before.holderPid, holderVersion: OWN_VERSION,
    });
    expect(done.stallMs).toBeGreaterThan(0);
    expect(isAlive(before.serverPid)).toBe(false);
    const second = await upgrade(makeBuild('9.2.0', cleanup));
    expect(JSON.parse(second.stdout)).toMatchObject({ fromVersion: '9.1.0', toVersion: '9.2.0', fromServerPid: done.serverPid });
    // A crash after an upgrade is followed by the new build, not by the holder's own.
    const dead = await daemon.killServer();
    await daemon.waitForServer(dead);
    await guests;
    const after = await daemon.status();
    expect(after).toMatchObject({ version: '9.2.0', holderVersion: OWN_VERSION, restarts: 3, upgrade: { id: 2, state: 'done' } });
    expect((await daemon.json<FillInfo>(['fill', 'status', 'vms/disk'])).state).toMatch(/^(running|completed)$/u);
    daemon.assertQuietLog([/was killed by SIGKILL/u, /recovered what the last server/u]);
    await daemon.stop();
  });

  it.each<[string, Readonly<Record<string, readonly [string, string]>>, RegExp]>([
    ['dies as it starts to serve', { 'daemon/server/server.js': ['this.#fileSystem.restore();', 'process.kill(process.pid, "SIGKILL");'] }, /was killed by SIGKILL before it was ready/u],
    ['says that it cannot start', { 'daemon/server/server.js': ['this.#fileSystem.restore();', "throw new OffshootError('store-damaged', 'not with me');"] }, /not with me/u],
  ])('is taken back when the new build %s, and guests notice nothing', async (_, changes, reason) => {
    const guests = load(6);
    const before = await daemon.status();
    const result = await upgrade(makeBuild('9.9.9', cleanup, changes));
    expect(result.code).not.toBe(0);
    const { error } = JSON.parse(result.stdout === '' ? result.stderr : result.stdout) as { error: { message: string } };
    expect(error.message).toMatch(reason);
    expect(error.message).toContain(`9.9.9 did not become ready, and ${OWN_VERSION} serves again`);
    await guests;
    const after = await daemon.status();
    expect(after).toMatchObject({ version: OWN_VERSION, holderPid: before.holderPid, upgrade: { state: 'rolled-back', toVersion: '9.9.9', serverPid: after.serverPid } });
    await daemon.stop();
  });

  it('is refused before anything is stopped when the new build does not load, or does not fit', async () => {
    const before = await daemon.status();
    const same = async (): Promise<void> => { expect(await daemon.status()).toMatchObject({ serverPid: before.serverPid, restarts: 0, upgrade: null } satisfies Partial<DaemonStatus>); };
    const broken = await upgrade(makeBuild('9.9.9', cleanup, { 'daemon/server/main.js': ['import ', 'import nothing from "./nowhere.js";\nimport '] }));
    expect(broken.code).not.toBe(0);
    expect(broken.stdout + broken.stderr).toContain('the new build does not start');
    await same();
    const newer = await upgrade(makeBuild('9.9.9', cleanup, { 'daemon/server/build-identity.js': ['storeSchema: SCHEMA_VERSION', 'storeSchema: SCHEMA_VERSION + 1'] }));
    expect(newer.code).not.toBe(0);
    expect(newer.stdout + newer.stderr).toMatch(/9\.9\.9 cannot follow .*the store has schema \d+, the new build makes it \d+/u);
    await same();
  });
});
