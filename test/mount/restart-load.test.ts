/**
 * SIGKILL and SIGSTOP of the server under load, by every way that Linux has to do I/O (KERNEL.md 1.9, tests a, c and e).
 *
 * fio checks each block that it wrote; what it cannot see, metadata and copies, is looked at between the kills. For an hour:
 * OFFSHOOT_TEST_RESTART_SECONDS=3600; stopped for a minute: OFFSHOOT_TEST_STOP_SECONDS=60.
 */
import { spawn } from 'node:child_process';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { ContainerInfo, FillInfo } from '../../daemon/control/schemas.js';
import { readHolderState } from '../../daemon/holder/holder-state.js';
import { runtimeDirectoryFor } from '../../daemon/runtime-directory.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { runFio, type FioOptions } from '../support/fio.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { signalProcess, stopProcess, waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const SECONDS = Number(process.env['OFFSHOOT_TEST_RESTART_SECONDS'] ?? 12);
const STOP_SECONDS = Number(process.env['OFFSHOOT_TEST_STOP_SECONDS'] ?? 4);
const TEST_MS = (SECONDS + STOP_SECONDS) * 1000 + 240_000;
const WAIT_MS = 60_000;
const MIB = 1024 ** 2;
/** As many as one transaction makes. */
const CLONES = 40;

describe.skipIf(lacks('/dev/fuse', 'fio', 'flock'))('a server that is killed or stopped under load', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let runtimeBase: string;
  let image: string;

  beforeAll(async () => {
    runtimeBase = makeTmpfsDir('run', cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase, OFFSHOOT_CRASHES_MAX: '1000000' } });
    image = join(makeTempDir('image', cleanup), 'source.img');
    makePatternImage(image, { sizeBytes: 64 * MIB, seed: 5 });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/source']);
    await daemon.json(['clone', 'vms/source', 'vms/psync', 'vms/libaio', 'vms/io_uring', 'vms/stopped', 'vms/locked']);
  });
  afterAll(async () => { await cleanup.run(); });

  const state = (): NonNullable<ReturnType<typeof readHolderState>> => {
    const found = readHolderState(runtimeDirectoryFor(daemon.storeDir, { OFFSHOOT_RUNTIME_DIR: runtimeBase }));
    if (found === null) throw new Error('the holder has written no state');
    return found;
  };
  const untilServing = async (): Promise<void> => {
    if (!(await waitUntil(() => state().state === 'running', WAIT_MS))) throw new Error('no next server');
  };
  const kill = (): void => { signalProcess(state().serverPid, 'SIGKILL'); };
  const load = (disk: string, more: FioOptions): ReturnType<typeof runFio> => runFio({
    filename: daemon.path(`vms/${disk}`), rw: 'randrw', bs: '4k', size: '8m', verify: 'crc32c', verify_fatal: 1, verify_backlog: 128,
    time_based: true, thinktime: 1000, thinktime_blocks: 16, ...more,
  }, TEST_MS);

  it('loses nothing and fails nothing: psync, libaio and io_uring, with flushes, killed at random moments', async () => {
    const over = { yes: false };
    const loads = Promise.all([
      load('psync', { ioengine: 'psync', direct: 0, fdatasync: 256, runtime: SECONDS }),
      load('libaio', { ioengine: 'libaio', direct: 1, iodepth: 16, fdatasync: 64, runtime: SECONDS }),
      load('io_uring', { ioengine: 'io_uring', direct: 1, iodepth: 16, bsrange: '512-128k', bs_unaligned: false, blockalign: 512, runtime: SECONDS }),
    ]).finally(() => { over.yes = true; });
    loads.catch(() => undefined);
    let kills = 0;
    const endMs = performance.now() + SECONDS * 1000;
    while (!over.yes && performance.now() < endMs) {
      // Sometimes before the spare is warm, sometimes while the next one recovers.
      await sleep(100 + Math.random() * 1900);
      kill();
      kills += 1;
    }
    await loads;
    expect(kills).toBeGreaterThan(1);
    await untilServing();
    expect(state().restarts).toBeGreaterThan(1);
  }, TEST_MS);

  it('makes all clones of a request or none, whenever it dies, and fills what it has begun to fill', async () => {
    await untilServing();
    await daemon.json(['clone', 'vms/source', 'vms/filled', '--fill']);
    for (let round = 0; round < 5; round += 1) {
      const container = `round${round}`;
      await untilServing();
      await daemon.json(['container', 'create', container]);
      const targets = Array.from({ length: CLONES }, (_, i) => `${container}/disk${i}`);
      const request = daemon.cli(['clone', 'vms/libaio', ...targets, '--json']);
      // From before the request arrives to after its answer.
      await sleep(150 + Math.random() * 500);
      kill();
      const answer = await request;
      await untilServing();
      const { disks } = (await daemon.json<ContainerInfo[]>(['container', 'ls'])).find(({ name }) => name === container) ?? { disks: -1 };
      expect([0, CLONES]).toContain(disks);
      if (answer.code === 0) expect(disks).toBe(CLONES);
      if (disks === CLONES) await mustRun('cmp', [daemon.path(`${container}/disk0`), daemon.path('vms/libaio')], { timeoutMs: WAIT_MS });
    }
    await daemon.json(['fill', 'resume', 'vms/filled', '--rate', 'unlimited']).catch(() => undefined);
    const wait = await daemon.cli(['fill', 'wait', 'vms/filled', '--json'], { timeoutMs: WAIT_MS });
    expect((JSON.parse(wait.stdout) as FillInfo).state).toBe('completed');
    await mustRun('cmp', [image, daemon.path('vms/filled')], { timeoutMs: WAIT_MS });
  }, TEST_MS);

  it('stopped by SIGSTOP, lets guests wait and fails nothing; nobody kills or replaces it', async () => {
    await untilServing();
    const before = state();
    const guests = load('stopped', { ioengine: 'libaio', direct: 1, iodepth: 8, runtime: STOP_SECONDS + 3 });
    guests.catch(() => undefined);
    await sleep(1000);
    await stopProcess(before.serverPid);
    try {
      await sleep(STOP_SECONDS * 1000);
    } finally {
      signalProcess(before.serverPid, 'SIGCONT');
    }
    const { write } = await guests;
    expect(write.requests).toBeGreaterThan(0);
    expect(state()).toMatchObject({ serverPid: before.serverPid, restarts: before.restarts, state: 'running' });
  }, TEST_MS);

  it('leaves locks with whoever has them: byte ranges as QEMU takes them, and whole files', async () => {
    await untilServing();
    const file = daemon.path('vms/locked');
    const koffiPath = createRequire(import.meta.url).resolve('koffi');
    const ofdLock = (then: string): string => `
      const fs = require('node:fs');
      const fcntl = require(${JSON.stringify(koffiPath)}).load('libc.so.6').func('int fcntl(int fd, int command, void *lock)');
      const lock = Buffer.alloc(32);
      lock.writeInt16LE(1, 0); lock.writeBigInt64LE(100n, 8); lock.writeBigInt64LE(1n, 16);
      const taken = fcntl(fs.openSync(process.argv[1], 'r+'), 37, lock) === 0;
      ${then}`;
    const holding = spawn(process.execPath, ['-e', ofdLock(`process.stdout.write(String(taken)); setInterval(() => {}, 1e6);`), file], { stdio: ['ignore', 'pipe', 'inherit'] });
    const flocking = spawn('flock', ['--exclusive', file, 'sh', '-c', 'echo in; exec sleep 600'], { stdio: ['ignore', 'pipe', 'inherit'], detached: true });
    const endBoth = (): void => {
      holding.kill('SIGKILL');
      // A group of its own: the lock is its children's too.
      if (flocking.pid !== undefined) signalProcess(-flocking.pid, 'SIGKILL');
    };
    try {
      const firstWord = async (child: typeof holding): Promise<string> => await new Promise((resolve) => child.stdout.once('data', (chunk: Buffer) => { resolve(chunk.toString()); }));
      expect(await Promise.all([firstWord(holding), firstWord(flocking)])).toEqual(['true', 'in\n']);
      const others = async (): Promise<readonly number[]> => [
        (await command(process.execPath, ['-e', ofdLock('process.exit(taken ? 0 : 1)'), file], { timeoutMs: WAIT_MS })).code,
        (await command('flock', ['--exclusive', '--nonblock', file, 'true'], { timeoutMs: WAIT_MS })).code,
      ];
      const { restarts } = state();
      kill();
      if (!(await waitUntil(() => state().restarts > restarts && state().state === 'running', WAIT_MS))) throw new Error('no next server');
      expect(await others()).toEqual([1, 1]);
      endBoth();
      expect(await waitUntil(async () => (await others()).every((code) => code === 0), WAIT_MS)).toBe(true);
    } finally {
      endBoth();
    }
  }, TEST_MS);
});
