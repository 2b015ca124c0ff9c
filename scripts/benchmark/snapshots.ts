/**
 * How long a guest's write waits when a snapshot is taken: 1 and 100 disks in one container, of 1 GiB and of 16 TiB, all open and written.
 *
 * Started by `scripts/bench --snapshots`. One disk is written by fio at depth 16 with 4 KiB blocks, direct, every write at a new place, so that most are first touches after
 * each snapshot; every other disk gets a write between two snapshots, so that all of them have something to seal. A stall is the longest completion latency that fio saw
 * in a second: its latency log has one line for each write. Snapshots are asked for by the control API: a command that starts beside fio takes a
 * processor for a tenth of a second, which on a small machine is felt more than what it asks for. A run without snapshots is the measure of what else the machine does.
 */
import { closeSync, constants, openSync, readdirSync, readFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { createControlClient } from '../../daemon/control/client.js';
import { startTestDaemon, type TestDaemon } from '../../test/support/daemon.js';
import { fioArguments } from '../../test/support/fio.js';
import { mustRun } from '../../test/support/model/command.js';
import { createCleanup } from '../../test/support/temp.js';
import { machine, machineLine } from './machine.js';
import { printResult, progress, readOptions, runBenchmark, verdict, wholeNumber, type BenchOptions } from './program.js';
import { percentile } from './stall-report.js';

interface Options extends BenchOptions {
  readonly rounds: number;
}

interface Case {
  readonly disks: number;
  readonly sizeBytes: number;
  readonly label: string;
}

interface Result {
  readonly label: string;
  readonly disks: number;
  readonly quietMaxMs: number;
  /** The longest write of each half second in which a snapshot was taken. */
  readonly stallP50Ms: number;
  readonly stallMaxMs: number;
  /** How long gates were closed, as the daemon says. */
  readonly gateMaxMs: number;
  readonly takenMs: number;
}

const GIB = 1024 ** 3;
/** As large as a file on ext4 can be, nearly. */
const LARGE_BYTES = 16 * 1024 * GIB - 1024 ** 2;
const CASES: readonly Case[] = [
  { disks: 1, sizeBytes: GIB, label: '1 disk of 1 GiB' }, { disks: 1, sizeBytes: LARGE_BYTES, label: '1 disk of 16 TiB' },
  { disks: 100, sizeBytes: GIB, label: '100 disks of 1 GiB' }, { disks: 100, sizeBytes: LARGE_BYTES, label: '100 disks of 16 TiB' },
];
const QUIET_SECONDS = 5;
const PAUSE_MS = 500;
/** To reach, see the README. */
const TARGET_MS = 20;

function readSnapshotOptions(): Options {
  const { common, values } = readOptions(['rounds']);
  return { ...common, rounds: wholeNumber(values.rounds ?? (common.quick ? '3' : '10'), 'rounds') };
}

/** Every write that fio made: when it ended, in milliseconds since it began, and how long it took. */
function latencies(prefix: string): { readonly atMs: number; readonly ms: number }[] {
  const directory = join(prefix, '..');
  const name = readdirSync(directory).find((each) => join(directory, each).startsWith(`${prefix}_clat`));
  if (name === undefined) throw new Error('fio has written no latency log');
  return readFileSync(join(directory, name), 'utf8').trim().split('\n').map((line) => {
    const [at = '', ns = ''] = line.split(',');
    return { atMs: Number(at), ms: Number(ns) / 1e6 };
  });
}

function gateMs(daemon: TestDaemon): number[] {
  return daemon.log().filter((line) => line.msg === 'snapshot taken').map((line) => Number((JSON.parse(line.text) as { gateMs: unknown }).gateMs));
}

async function measure(daemon: TestDaemon, options: Options, each: Case, number: number): Promise<Result> {
  const container = `case${number}`;
  const control = createControlClient({ socketPath: daemon.socketPath });
  const source = join(options.directory, `source-${number}.img`);
  await mustRun('truncate', ['-s', String(each.sizeBytes), source]);
  await daemon.json(['container', 'create', container]);
  await daemon.json(['import', source, `${container}/source`, '--in-place']);
  const names = Array.from({ length: each.disks }, (_, i) => `${container}/disk-${i}`);
  await daemon.json(['clone', `${container}/source`, ...names]);
  const fds = names.map((name) => openSync(daemon.path(name), constants.O_RDWR | constants.O_DIRECT));
  const block = Buffer.alloc(4096, 1);
  const touchAll = (place: number): void => { for (const fd of fds) writeSync(fd, block, 0, block.length, place * block.length); };
  try {
    const prefix = join(options.directory, `log-${number}`);
    const beforeGates = gateMs(daemon).length;
    touchAll(0);
    const seconds = QUIET_SECONDS + Math.ceil(options.rounds * (2 * PAUSE_MS + 1500) / 1000) + 5;
    const began = Date.now();
    const load = mustRun('fio', ['--name=load', ...fioArguments({
      filename: daemon.path(names[0] ?? ''), rw: 'randwrite', bs: '4k', direct: 1, ioengine: 'libaio', iodepth: 16, size: '900m', time_based: true, runtime: seconds, norandommap: true, randrepeat: 0,
      write_lat_log: prefix, log_unix_epoch: 1,
    })], { timeoutMs: (seconds + 60) * 1000 });
    load.catch(() => undefined);
    await sleep(QUIET_SECONDS * 1000);
    const spans: { readonly from: number; readonly to: number }[] = [];
    for (let round = 1; round <= options.rounds; round += 1) {
      touchAll(round);
      await sleep(PAUSE_MS);
      const from = Date.now();
      await control.createSnapshot(`${container}@s${round}`, { quiesce: null });
      spans.push({ from, to: Date.now() + 20 });
      await sleep(PAUSE_MS);
    }
    await load;
    const all = latencies(prefix);
    const within = (from: number, to: number): number => all.reduce((max, { atMs, ms }) => (atMs >= from && atMs <= to && ms > max ? ms : max), 0);
    const stalls = spans.map(({ from, to }) => within(from, to));
    return {
      label: each.label, disks: each.disks, quietMaxMs: within(began + 1500, began + QUIET_SECONDS * 1000 - 200), stallP50Ms: percentile(stalls, 50), stallMaxMs: Math.max(...stalls),
      gateMaxMs: Math.max(...gateMs(daemon).slice(beforeGates)), takenMs: percentile(spans.map(({ from, to }) => to - from), 50),
    };
  } finally {
    for (const fd of fds) closeSync(fd);
  }
}

async function run(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, cliEntry: options.cliEntry });
    const results: Result[] = [];
    for (const [number, each] of CASES.entries()) {
      progress(`${each.label}: ${options.rounds} snapshots`);
      results.push(await measure(daemon, options, each, number));
    }
    const about = machine(options.directory);
    const reached = results.every((result) => result.stallMaxMs < TARGET_MS);
    printResult(options.json ? [JSON.stringify({ rounds: options.rounds, machine: about, targetMs: TARGET_MS, reached, results })] : [
      '', `Longest 4 KiB write of a guest at depth 16 while a snapshot is taken (fio, ${options.rounds} snapshots each)`,
      `  ${'container'.padEnd(22)} ${'no snapshot'.padStart(12)} ${'p50'.padStart(9)} ${'max'.padStart(9)} ${'gate max'.padStart(9)} ${'command'.padStart(9)}`,
      ...results.map((result) => {
        const figures = [result.stallP50Ms, result.stallMaxMs, result.gateMaxMs, result.takenMs].map((ms) => `${ms.toFixed(1)} ms`.padStart(9)).join(' ');
        return `  ${result.label.padEnd(22)} ${`${result.quietMaxMs.toFixed(1)} ms`.padStart(12)} ${figures}`;
      }),
      `  max below ${TARGET_MS} ms: ${verdict(reached)}`, machineLine(about),
    ]);
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readSnapshotOptions, run);
