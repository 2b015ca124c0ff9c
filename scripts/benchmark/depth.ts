/**
 * What the depth of a backing chain costs: random reads of a disk whose data lie in 1, 8 and 64 layers, beside a qcow2 chain of as many
 * files that was made the same way.
 *
 * Started by `scripts/bench --depth`. Chunk after chunk of a disk belongs to one layer after the other, so that every read may meet every
 * layer. Here a layer is what lies between two snapshots, which are kept, so that nothing can be merged; there it is a file made by
 * `qemu-img create -b`. Rounds are interleaved, and what counts is each system's ratio to its own depth 1 in the same round: the median of
 * these. A second part opens a disk with 64 layers and a million extents after the daemon was started, when nothing of it is in memory.
 */
import { closeSync, constants, openSync, readSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { randomFillSync } from 'node:crypto';
import { join } from 'node:path';

import { createControlClient } from '../../daemon/control/client.js';
import { startTestDaemon, type TestDaemon } from '../../test/support/daemon.js';
import { fioArguments, runFio, type FioOptions } from '../../test/support/fio.js';
import { mustRun } from '../../test/support/model/command.js';
import { createCleanup, type Cleanup } from '../../test/support/temp.js';
import { exportImage } from './candidates.js';
import { machine, machineLine } from './machine.js';
import { printResult, progress, readOptions, runBenchmark, verdict, wholeNumber, type BenchOptions } from './program.js';
import { median } from './report.js';
import { commonOptions } from './workloads.js';

interface Options extends BenchOptions {
  readonly rounds: number;
  readonly seconds: number;
}

type System = 'offshoot' | 'qcow2';

interface Subject {
  readonly system: System;
  readonly layers: number;
  readonly file: string;
  /** Gives back what it takes. */
  readonly remove: () => Promise<void>;
}

interface Result {
  readonly system: System;
  readonly layers: number;
  readonly iodepth: number;
  readonly iops: number;
  /** Of the same system's one layer. */
  readonly ratio: number;
}

const MIB = 1024 ** 2;
const DISK_BYTES = 512 * MIB;
const LAYERS = [1, 8, 64] as const;
const IODEPTHS = [1, 16] as const;
/** A cluster of qcow2, so that neither system has to bring partial ones together. */
const CHUNK_BYTES = 64 * 1024;
const FIO_TIMEOUT_MS = 600_000;
/** To reach, see the README. */
const TARGET_RATIO = 0.95;
const TARGET_OPEN_MS = 1000;
/** A million extents in 64 layers: single blocks, no two of one layer beside each other. */
const EXTENTS_A_LAYER = 16_384;
const EXTENT_STRIDE_BYTES = 512 * 1024;
const BLOCK_BYTES = 4096;

function readDepthOptions(): Options {
  const { common, values } = readOptions(['rounds', 'seconds']);
  const { quick } = common;
  return { ...common, rounds: wholeNumber(values.rounds ?? (quick ? '3' : '7'), 'rounds'), seconds: wholeNumber(values.seconds ?? (quick ? '1' : '2'), 'seconds') };
}

function* chunksOf(layer: number, layers: number): Generator<number> {
  for (let offset = layer * CHUNK_BYTES; offset < DISK_BYTES; offset += layers * CHUNK_BYTES) yield offset;
}

/** What is kept apart by snapshots cannot be merged. Their names are the container's: no two disks have the same. */
async function takeSnapshot(daemon: TestDaemon, disk: string, number: number): Promise<void> {
  await createControlClient({ socketPath: daemon.socketPath }).createSnapshot(`${disk}@${disk.replace('/', '-')}-${number}`, { quiesce: null });
}

async function makeDisk(daemon: TestDaemon, source: string, layers: number): Promise<Subject> {
  const name = `disk-${layers}`;
  await daemon.json(['clone', source, `depth/${name}`]);
  const file = daemon.path(`depth/${name}`);
  const fd = openSync(file, constants.O_RDWR | constants.O_DIRECT);
  try {
    const chunk = randomFillSync(Buffer.alloc(CHUNK_BYTES));
    for (let layer = 0; layer < layers; layer += 1) {
      if (layer > 0) await takeSnapshot(daemon, `depth/${name}`, layer);
      for (const offset of chunksOf(layer, layers)) writeSync(fd, chunk, 0, chunk.length, offset);
    }
  } finally {
    closeSync(fd);
  }
  const remove = async (): Promise<void> => {
    const control = createControlClient({ socketPath: daemon.socketPath });
    for (const { reference } of await control.listSnapshots('depth')) {
      if (reference.startsWith(`depth/${name}@`)) await control.removeSnapshot(reference, { keepData: false });
    }
    await daemon.json(['rm', `depth/${name}`]);
  };
  return { system: 'offshoot', layers, file, remove };
}

async function makeChain(directory: string, source: string, layers: number, cleanup: Cleanup): Promise<Subject> {
  const files: string[] = [];
  let below = { file: source, format: 'raw' };
  for (let layer = 0; layer < layers; layer += 1) {
    const file = join(directory, `chain-${layers}-${layer}.qcow2`);
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', below.file, '-F', below.format, file]);
    const script = join(directory, 'chunks');
    writeFileSync(script, [...chunksOf(layer, layers)].map((offset) => `write -q -P ${1 + (layer % 255)} ${offset} ${CHUNK_BYTES}\n`).join(''));
    await mustRun('sh', ['-c', `qemu-io -t writeback -f qcow2 "$1" <"$2" >/dev/null`, 'sh', file, script], { timeoutMs: FIO_TIMEOUT_MS });
    below = { file, format: 'qcow2' };
    files.push(file);
  }
  const file = join(directory, `chain-${layers}.img`);
  const end = await exportImage(below.file, file, { writable: false, cleanup });
  const remove = async (): Promise<void> => {
    await end();
    for (const each of files) rmSync(each);
  };
  return { system: 'qcow2', layers, file, remove };
}

async function fio(options: FioOptions): Promise<number> {
  return (await runFio({ ...commonOptions, ...options }, FIO_TIMEOUT_MS)).read.iops;
}

async function measureReads(subjects: readonly Subject[], { rounds, seconds }: Options): Promise<Result[]> {
  const figures = new Map<string, number[]>();
  const key = ({ system, layers }: Pick<Subject, 'system' | 'layers'>, iodepth: number): string => `${system} ${layers} ${iodepth}`;
  for (let round = 1; round <= rounds; round += 1) {
    progress(`round ${round} of ${rounds}`);
    // Forwards and backwards in turn: a machine that grows slower during a round favours nobody in the end.
    for (const subject of round % 2 === 0 ? [...subjects].reverse() : subjects) {
      for (const iodepth of IODEPTHS) {
        const iops = await fio({ filename: subject.file, rw: 'randread', bs: '4k', iodepth, size: DISK_BYTES, readonly: true, time_based: true, runtime: `${seconds}s`, ramp_time: '0.3s', randseed: round * 7919 });
        figures.set(key(subject, iodepth), [...figures.get(key(subject, iodepth)) ?? [], iops]);
      }
    }
  }
  return IODEPTHS.flatMap((iodepth) => subjects.map(({ system, layers }) => {
    const own = figures.get(key({ system, layers }, iodepth)) ?? [];
    const one = figures.get(key({ system, layers: 1 }, iodepth)) ?? [];
    return { system, layers, iodepth, iops: median(own), ratio: median(own.map((iops, round) => iops / one[round]!)) };
  }));
}

interface Opening {
  readonly layers: number;
  readonly extents: number;
  readonly milliseconds: number;
}

async function measureOpening(daemon: TestDaemon, directory: string): Promise<Opening> {
  const layers = Math.max(...LAYERS);
  const source = join(directory, 'empty.img');
  await mustRun('truncate', ['-s', String(EXTENTS_A_LAYER * EXTENT_STRIDE_BYTES), source]);
  await daemon.json(['import', source, 'depth/empty', '--in-place', '--format', 'raw']);
  await daemon.json(['clone', 'depth/empty', 'depth/crumbs']);
  const file = daemon.path('depth/crumbs');
  for (let layer = 0; layer < layers; layer += 1) {
    process.stderr.write(`layer ${layer + 1} of ${layers}: ${EXTENTS_A_LAYER} extents\r`);
    if (layer > 0) await takeSnapshot(daemon, 'depth/crumbs', layer);
    await mustRun('fio', ['--name=crumbs', ...fioArguments({
      ...commonOptions, filename: file, rw: `write:${EXTENT_STRIDE_BYTES - BLOCK_BYTES}`, bs: BLOCK_BYTES, iodepth: 16, offset: 2 * layer * BLOCK_BYTES,
      size: EXTENTS_A_LAYER * EXTENT_STRIDE_BYTES - 2 * layer * BLOCK_BYTES, io_size: EXTENTS_A_LAYER * BLOCK_BYTES, number_ios: EXTENTS_A_LAYER,
    })], { timeoutMs: FIO_TIMEOUT_MS });
  }
  process.stderr.write('\n');
  await daemon.stop();
  await daemon.start();
  const began = performance.now();
  const fd = openSync(file, 'r');
  readSync(fd, Buffer.alloc(BLOCK_BYTES), 0, BLOCK_BYTES, 0);
  const milliseconds = performance.now() - began;
  closeSync(fd);
  return { layers, extents: layers * EXTENTS_A_LAYER, milliseconds };
}

function report(results: readonly Result[], opening: Opening, { rounds }: Options): string[] {
  const lines = ['', `4 KiB random reads of a disk in layers, and the ratio to one layer (medians of ${rounds} rounds)`];
  for (const iodepth of IODEPTHS) {
    for (const system of ['offshoot', 'qcow2'] as const) {
      const figures = results.filter((result) => result.system === system && result.iodepth === iodepth);
      lines.push(`  ${`${system}, depth ${iodepth}`.padEnd(20)}${figures.map(({ layers, iops, ratio }) => `${layers}: ${(iops / 1000).toFixed(1)} k (${ratio.toFixed(2)})`.padStart(22)).join('')}`);
    }
  }
  const readsReached = results.every(isReached);
  return [
    ...lines, `  offshoot's ratios at least ${TARGET_RATIO}: ${verdict(readsReached)}`,
    `  open a disk of ${opening.layers} layers and ${opening.extents} extents after a start: ${opening.milliseconds.toFixed(0)} ms (to reach: below ${TARGET_OPEN_MS} ms, ${verdict(opening.milliseconds < TARGET_OPEN_MS)})`,
  ];
}

function isReached({ system, ratio }: Result): boolean {
  return system === 'qcow2' || ratio >= TARGET_RATIO;
}

async function run(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const { directory } = options;
    const source = join(directory, 'source.img');
    await mustRun('truncate', ['-s', String(DISK_BYTES), source]);
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, cliEntry: options.cliEntry });
    await daemon.json(['container', 'create', 'depth']);
    await daemon.json(['import', source, 'depth/source', '--in-place', '--format', 'raw']);
    const subjects: Subject[] = [];
    for (const layers of LAYERS) {
      progress(`${layers === 1 ? '1 layer' : `${layers} layers`} of ${DISK_BYTES / layers / MIB} MiB`);
      subjects.push(await makeDisk(daemon, 'depth/source', layers), await makeChain(directory, source, layers, cleanup));
    }
    const results = await measureReads(subjects, options);
    // Room for the second part.
    for (const subject of subjects) await subject.remove();
    const opening = await measureOpening(daemon, directory);
    const about = machine(directory);
    const reached = results.every(isReached) && opening.milliseconds < TARGET_OPEN_MS;
    printResult(options.json
      ? [JSON.stringify({ rounds: options.rounds, machine: about, targetRatio: TARGET_RATIO, targetOpenMs: TARGET_OPEN_MS, reached, results, opening })]
      : [...report(results, opening, options), machineLine(about)]);
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readDepthOptions, run);
