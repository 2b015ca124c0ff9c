/**
 * The end of the holder: with the connection in the service manager's store the next holder takes the living mount over, and guests wait
 * instead of failing (KERNEL.md 1.9, test d); without, what was acknowledged is in the store, and the next daemon commits it.
 */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import type { DiskInfo } from '../../daemon/control/schemas.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { FakeServiceManager } from '../support/fake-service-manager.js';
import { runFio } from '../support/fio.js';
import { makePatternImage, patternBlock } from '../support/images.js';
import { command } from '../support/model/command.js';
import { isAlive, signalProcess, waitUntil, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir, makeTmpfsDir, type Cleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const WAIT_MS = 60_000;
const MIB = 1024 ** 2;
const SEED = 11;

describe.skipIf(lacks('/dev/fuse', 'fio'))('when the holder dies', () => {
  let cleanup: Cleanup;
  let runtimeBase: string;
  beforeEach(() => {
    cleanup = createCleanup();
    runtimeBase = makeTmpfsDir('run', cleanup);
  });
  afterEach(async () => { await cleanup.run(); });

  async function makeDisk(daemon: TestDaemon): Promise<void> {
    const image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 64 * MIB, seed: SEED });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/source']);
    await daemon.json(['clone', 'vms/source', 'vms/disk']);
  }

  describe('and the service manager keeps the connection', () => {
    it.each([
      ['the holder alone, whose server makes room for the next', false],
      ['holder and server', true],
    ])('the next holder takes over the mount from %s, and guests only wait', async (_, bothDie) => {
      const daemon = await startTestDaemon({ transport: 'kernel', cleanup, start: false, environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase } });
      const manager = new FakeServiceManager(join(makeTempDir('notify', cleanup), 'notify'), cleanup);
      const start = (): ReturnType<FakeServiceManager['start']> => manager.start(process.execPath, [
        CLI_ENTRY, 'daemon', 'start', '--foreground', '--store', daemon.storeDir, '--mount', daemon.mountDir, '--socket', daemon.socketPath,
      ], { OFFSHOOT_RUNTIME_DIR: runtimeBase, OFFSHOOT_TEST_DAEMON: daemon.mountDir });
      const first = start();
      await manager.waitFor('READY=1', 1, WAIT_MS);
      expect(manager.storedNames()).toEqual([expect.stringMatching(/^offshoot-fuse-\d+$/u)]);
      await makeDisk(daemon);
      const before = await daemon.status();
      const guests = runFio({
        filename: daemon.path('vms/disk'), rw: 'randwrite', bs: '4k', direct: 1, ioengine: 'libaio', iodepth: 8, size: '32m', verify: 'crc32c',
        verify_fatal: 1, verify_backlog: 128, time_based: true, runtime: 8, thinktime: 2000, thinktime_blocks: 16,
      });
      guests.catch(() => undefined);
      await waitUntil(async () => (await daemon.json<DiskInfo>(['show', 'vms/disk'])).ownedBytes > 0, WAIT_MS);

      signalProcess(before.holderPid, 'SIGKILL');
      if (bothDie) signalProcess(before.serverPid, 'SIGKILL');
      expect(await waitUntil(() => first.exitCode !== null, WAIT_MS)).toBe(true);
      expect(first.exitCode).not.toBe(0);
      expect(await waitUntilGone(before.serverPid, WAIT_MS)).toBe(true);

      let said = '';
      const second = start();
      second.stderr?.on('data', (chunk: Buffer) => { said += chunk.toString(); });
      await manager.waitFor('READY=1', 2, WAIT_MS);
      await guests;
      const after = await daemon.status();
      expect(after.holderPid).not.toBe(before.holderPid);
      expect(after).toMatchObject({ restarts: before.restarts + 1, mountDir: before.mountDir, disksOpen: 0 });
      expect(said).toContain('took over the mount');
      // Once in orderly use, the next crash of a server is an ordinary one.
      await daemon.waitForServer(await daemon.killServer());
      // Not daemon.stop(), which wants every process gone: the command in the foreground ends a moment after the daemon.
      await daemon.json(['daemon', 'stop']);
      expect(await waitUntil(() => second.exitCode !== null, WAIT_MS)).toBe(true);
      expect(second.exitCode).toBe(0);
      expect(manager.storedNames()).toEqual([]);
      expect(manager.lines()).toContain('STOPPING=1');
    });
  });

  it('a server that is on standby ends with it', async () => {
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    const found = await waitForSpare(daemon);
    signalProcess(found.holderPid, 'SIGKILL');
    expect(await waitUntilGone(found.sparePid, WAIT_MS)).toBe(true);
    expect(isAlive(found.serverPid)).toBe(true);
  });

  it('with its server while a guest writes, the next daemon commits what was acknowledged', async () => {
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase } });
    await makeDisk(daemon);
    await waitForSpare(daemon);
    const begun = join(makeTempDir('begun', cleanup), 'begun');
    const acknowledged = writeUntilKilled(daemon.path('vms/disk'), begun);
    expect(await waitUntil(() => existsSync(begun), WAIT_MS)).toBe(true);
    const { holderPid, serverPid, sparePid } = await daemon.status();
    // Within a commit interval, so that the journal holds what the database does not.
    signalProcess(holderPid, 'SIGKILL');
    signalProcess(serverPid, 'SIGKILL');
    for (const pid of [holderPid, serverPid, sparePid ?? serverPid]) expect(await waitUntilGone(pid, WAIT_MS)).toBe(true);
    const written = await acknowledged;
    expect(written.length).toBeGreaterThan(0);

    await daemon.start();
    expect(daemon.log().some(({ text }) => text.includes('cleared the dead mount'))).toBe(true);
    expect(daemon.log().some(({ text }) => text.includes('recovered what the last server had acknowledged'))).toBe(true);
    // Read from a copy, so that a hang of the mount is a failed test and not a hung one.
    const copy = join(makeTempDir('copy', cleanup), 'disk');
    expect(await command('dd', [`if=${daemon.path('vms/disk')}`, `of=${copy}`, 'bs=1M'], { timeoutMs: WAIT_MS })).toMatchObject({ code: 0 });
    const content = readFileSync(copy);
    for (const block of written) expect(content.subarray(block * 4096, (block + 1) * 4096).equals(Buffer.alloc(4096, 0xa5)), `block ${block}`).toBe(true);
    const last = (written.at(-1) ?? 0) + 2;
    expect(content.subarray(last * 4096, (last + 1) * 4096).equals(patternBlock(SEED, last))).toBe(true);
    await daemon.stop();
  });

  async function waitForSpare(daemon: TestDaemon): Promise<{ readonly holderPid: number; readonly serverPid: number; readonly sparePid: number }> {
    await waitUntil(async () => (await daemon.status()).sparePid !== null, WAIT_MS);
    const { holderPid, serverPid, sparePid } = await daemon.status();
    if (sparePid === null) throw new Error('no spare was started');
    return { holderPid, serverPid, sparePid };
  }

  /** Writes one block after another, without a flush, until the mount dies; gives the blocks whose write was acknowledged. `begun` is made behind the first. */
  async function writeUntilKilled(file: string, begun: string): Promise<readonly number[]> {
    const script = `
      const fs = require('node:fs');
      const fd = fs.openSync(process.argv[1], fs.constants.O_RDWR | fs.constants.O_DIRECT);
      const block = Buffer.alloc(4096, 0xa5);
      for (let i = 0; i < 8192; i += 1) {
        try { fs.writeSync(fd, block, 0, 4096, i * 4096); } catch { process.exit(0); }
        fs.writeSync(1, i + '\\n');
        if (i === 0) fs.writeFileSync(process.argv[2], '');
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2);
      }`;
    const result = await command(process.execPath, ['-e', script, file, begun], { timeoutMs: WAIT_MS });
    return result.stdout.split('\n').filter((line) => line !== '').map(Number);
  }
});

