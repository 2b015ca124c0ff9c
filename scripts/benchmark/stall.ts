/**
 * How long guests wait when the server is killed: many disks open, fio writing and verifying, kill -9 again and again.
 *
 * Started by `scripts/bench --stall`. Measured where a guest stands: a thread of its own reads and writes 4 KiB of one of the open
 * disks, one request after another, and notes every pause between two that were answered; the longest one after a kill is that
 * kill's stall. What the holder measures (`lastStallMs`, from the end of the old server to the next one's first read) is shown beside it.
 * fio checks everything that it wrote: an error or a wrong block ends the run.
 */
import { closeSync, constants, openSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';

import { startTestDaemon, type TestDaemon } from '../../test/support/daemon.js';
import { runFio } from '../../test/support/fio.js';
import { signalProcess } from '../../test/support/processes.js';
import { createCleanup, type Cleanup } from '../../test/support/temp.js';
import { machine, machineLine } from './machine.js';
import { printResult, progress, readOptions, runBenchmark, verdict, wholeNumber, type BenchOptions } from './program.js';
import { PROBE_WORDS, probeSource } from './stall-probe.js';
import { percentile, summarise, type StallSummary } from './stall-report.js';

interface Options extends BenchOptions {
  readonly kills: number;
  readonly disks: number;
}

const DISK_BYTES = 64 * 1024 ** 2;
const SOURCE_BYTES = DISK_BYTES;
const TARGETS_PER_CLONE = 50;
/** fio writes and verifies within the first part of each disk; the last disk is the probe's. */
const LOAD_MIB_PER_DISK = 16;
/** Long enough for the next server, and for a spare to be warm again; kills come at random within the second after. */
const CALM_MS = 2_000;
const KILL_SPREAD_MS = 1_000;
const RESTART_MS_MAX = 30_000;
const FIO_ROUND_SECONDS = 10;
const FIO_ROUND_MS_MAX = 180_000;
/** To reach, see the README. */
const TARGET_P99_MS = 500;

function readStallOptions(): Options {
  const { common, values } = readOptions(['kills', 'disks']);
  return { ...common, kills: wholeNumber(values.kills ?? (common.quick ? '20' : '100'), 'kills'), disks: wholeNumber(values.disks ?? '100', 'disks') };
}

/** Clones, all open, each with something of its own. */
async function openDisks(daemon: TestDaemon, options: Options, cleanup: Cleanup): Promise<string[]> {
  const source = join(options.directory, 'source.img');
  writeFileSync(source, Buffer.alloc(1024 ** 2, 0x5a));
  await runFio({ filename: source, rw: 'write', bs: '1m', size: SOURCE_BYTES });
  await daemon.json(['container', 'create', 'vms']);
  await daemon.json(['import', source, 'vms/source']);
  const names = Array.from({ length: options.disks }, (_, i) => `vms/disk-${i}`);
  for (let first = 0; first < names.length; first += TARGETS_PER_CLONE) {
    await daemon.json(['clone', 'vms/source', ...names.slice(first, first + TARGETS_PER_CLONE)]);
  }
  const files = names.map((name) => daemon.path(name));
  const descriptors = files.map((file) => openSync(file, constants.O_RDWR | constants.O_DIRECT));
  cleanup.add(() => { for (const fd of descriptors) closeSync(fd); });
  return files;
}

async function waitForRestart(daemon: TestDaemon, restarts: number): Promise<{ readonly serverPid: number; readonly lastStallMs: number | null }> {
  const deadline = performance.now() + RESTART_MS_MAX;
  for (;;) {
    const result = await daemon.cli(['daemon', 'status', '--json']);
    if (result.code === 0) {
      const status = JSON.parse(result.stdout) as { serverPid: number; restarts: number; lastStallMs: number | null };
      if (status.restarts >= restarts) return status;
    }
    if (performance.now() > deadline) throw new Error(`no next server within ${RESTART_MS_MAX} ms`);
    await sleep(100);
  }
}

export async function run(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const daemon = await startTestDaemon({
      transport: 'kernel', cleanup, cliEntry: options.cliEntry, environment: { OFFSHOOT_CRASHES_MAX: String(options.kills + 100) },
    });
    progress(`${options.disks} disks, ${options.kills} kills; store on ${daemon.storeDir}`);
    const files = await openDisks(daemon, options, cleanup);
    const probed = files.at(-1) ?? '';
    const loaded = Math.max(1, files.length - 1);
    const shared = new SharedArrayBuffer(PROBE_WORDS * 8);
    const words = new Float64Array(shared);
    const probe = new Worker(probeSource, { eval: true, workerData: { file: probed, shared } });
    let probeError: unknown = null;
    probe.on('error', (error) => { probeError = error; });
    cleanup.add(async () => { await probe.terminate(); });

    let fioError: unknown = null;
    // In rounds: each one verifies to its end what it wrote, and the last one ends soon after the last kill.
    const load = (async (): Promise<void> => {
      while (!words[1]) {
        await runFio({
          directory: daemon.path('vms'), nrfiles: loaded, filename_format: 'disk-$filenum', rw: 'randrw', rwmixread: 50, bs: '4k', direct: 1,
          ioengine: 'libaio', iodepth: 16, size: `${LOAD_MIB_PER_DISK * loaded}m`, verify: 'crc32c', verify_fatal: 1, verify_backlog: 512,
          time_based: true, runtime: FIO_ROUND_SECONDS, thinktime: 1000, thinktime_blocks: 16, thread: true, randrepeat: 0,
        }, FIO_ROUND_MS_MAX);
      }
    })().catch((error: unknown) => { fioError = error; });

    const client: number[] = [];
    const held: number[] = [];
    let { serverPid } = await waitForRestart(daemon, 0);
    for (let kill = 1; kill <= options.kills; kill += 1) {
      await sleep(CALM_MS + Math.random() * KILL_SPREAD_MS);
      if (fioError !== null || probeError !== null) throw new Error(`the load ended early: ${String(fioError ?? probeError).slice(0, 2000)}`);
      words[0] = 0;
      signalProcess(serverPid, 'SIGKILL');
      const after = await waitForRestart(daemon, kill);
      serverPid = after.serverPid;
      await sleep(300);
      client.push(words[0]);
      if (after.lastStallMs !== null) held.push(after.lastStallMs);
      if (kill % 10 === 0) progress(`${kill} kills: p50 ${percentile(client, 50).toFixed(0)} ms, p99 ${percentile(client, 99).toFixed(0)} ms, max ${Math.max(...client).toFixed(0)} ms`);
    }
    words[1] = 1;
    await load;
    if (fioError !== null) throw new Error('fio found an error', { cause: fioError });
    const summary: StallSummary = summarise(client, held, TARGET_P99_MS);
    const about = machine(options.directory);
    printResult(options.json ? [JSON.stringify({ disks: options.disks, machine: about, ...summary })] : [
      '', `Stall of a guest's I/O when the server is killed, ${options.kills} kills, ${options.disks} disks open, fio with crc32c verification`,
      ...([['seen by the guest', summary.client], ['measured by the holder', summary.holder]] as const).map(([name, of]) =>
        `  ${name.padEnd(24)} p50 ${of.p50Ms.toFixed(0)} ms   p99 ${of.p99Ms.toFixed(0)} ms   max ${of.maxMs.toFixed(0)} ms`),
      `  p99 below ${TARGET_P99_MS} ms: ${verdict(summary.reached)}`, machineLine(about),
    ]);
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readStallOptions, run);
