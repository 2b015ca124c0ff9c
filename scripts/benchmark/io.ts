/**
 * I/O: candidates side by side on one source file, in interleaved rounds, so that what else the machine does meets all
 * of them alike. Started by `scripts/bench --io`, which builds, makes the directory and takes away whatever a run leaves.
 *
 * No figure is compared with a stored one.
 */
import { join } from 'node:path';

import { fioArguments, runFio, type FioOptions } from '../../test/support/fio.js';
import { mustRun } from '../../test/support/model/command.js';
import { createCleanup } from '../../test/support/temp.js';
import { candidateIds, startCandidate, type Candidate, type CandidateId } from './candidates.js';
import { machine, machineLine } from './machine.js';
import { printResult, progress, readOptions, runBenchmark, sizeOption, wholeNumber, type BenchOptions } from './program.js';
import { buildReport, renderTable } from './report.js';
import { commonOptions, ownOptions, workloads, type Scale, type Workload } from './workloads.js';

interface Options extends Scale, BenchOptions {
  readonly rounds: number;
  readonly workers: number | null;
  readonly candidates: readonly CandidateId[];
}

const FIO_TIMEOUT_MS = 300_000;

function readIoOptions(): Options {
  const { common, values } = readOptions(['size', 'rounds', 'seconds', 'workers', 'candidates']);
  const { quick } = common;
  return {
    ...common,
    sizeBytes: sizeOption(values.size ?? (quick ? '512M' : '1G')),
    rounds: wholeNumber(values.rounds ?? (quick ? '3' : '5'), 'rounds'),
    secondsPerJob: wholeNumber(values.seconds ?? (quick ? '1' : '3'), 'seconds'),
    workers: values.workers === undefined ? null : wholeNumber(values.workers, 'workers'),
    candidates: values.candidates === undefined ? candidateIds : values.candidates.split(',').map(parseCandidate),
  };
}

function parseCandidate(text: string): CandidateId {
  const found = candidateIds.find((id) => id === text);
  if (found === undefined) throw new Error(`--candidates: there is no '${text}', only ${candidateIds.join(', ')}`);
  return found;
}

async function fio(file: string, options: FioOptions): Promise<ReturnType<typeof runFio>> {
  return await runFio({ filename: file, ...commonOptions, ...options }, FIO_TIMEOUT_MS);
}

/** One round of one candidate: all workloads, in order, on disks that are fresh where they must be. */
async function runRound(candidate: Candidate, options: Options, round: number, record: (workload: Workload, figure: number) => void): Promise<void> {
  const seed = { randseed: round * 7919 };
  const shared = await candidate.makeDisk();
  for (const workload of workloads.filter((each) => each.state === 'un-owned')) {
    record(workload, workload.figure(await fio(shared.readFile, { ...workload.options(options), ...seed })));
  }
  await fio(shared.writeFile, ownOptions(options));
  for (const workload of workloads.filter((each) => each.state === 'owned')) {
    record(workload, workload.figure(await fio(shared.writeFile, { ...workload.options(options), ...seed })));
  }
  await shared.remove();
  for (const workload of workloads.filter((each) => each.state === 'first-touch')) {
    const fresh = await candidate.makeDisk();
    record(workload, workload.figure(await fio(fresh.writeFile, { ...workload.options(options), ...seed })));
    await fresh.remove();
  }
}

async function run(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const source = join(options.directory, 'source.img');
    progress(`source: ${source}, ${options.sizeBytes / 1024 ** 2} MiB`);
    await mustRun('fio', ['--name=source', ...fioArguments({ filename: source, rw: 'write', bs: '1m', size: options.sizeBytes, end_fsync: 1, refill_buffers: true })], { timeoutMs: FIO_TIMEOUT_MS });

    const candidates: Candidate[] = [];
    const bench = { directory: options.directory, source, cliEntry: options.cliEntry, workers: options.workers, cleanup };
    for (const id of options.candidates) candidates.push(await startCandidate(id, bench));
    const rounds = new Map(candidates.map(({ id }) => [id, new Map<string, number[]>(workloads.map((workload) => [workload.id, []]))]));
    for (let round = 1; round <= options.rounds; round += 1) {
      for (const candidate of candidates) {
        progress(`round ${round} of ${options.rounds}: ${candidate.id}`);
        await runRound(candidate, options, round, (workload, figure) => rounds.get(candidate.id)?.get(workload.id)?.push(figure));
      }
    }

    const rows = buildReport(workloads, rounds);
    const about = machine(options.directory);
    if (options.json) {
      printResult([JSON.stringify({ sizeBytes: options.sizeBytes, secondsPerJob: options.secondsPerJob, rounds: options.rounds, machine: about, results: rows })]);
      return;
    }
    printResult([
      '', renderTable(workloads, rows, options.candidates), '',
      `Medians of ${options.rounds} rounds; in brackets the ratio to qemu-storage-daemon's overlay. Source: ${options.sizeBytes / 1024 ** 2} MiB.`, machineLine(about),
    ]);
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readIoOptions, run);
