/**
 * Many clones: how fast they are made, what they take, and how commands answer in a store that is full of them.
 *
 * Started by `scripts/bench --clones`. Times are wall times of whole commands, Node's own start included, as a user at a shell has them.
 * Beside the clones stand qcow2 overlays, made as a user makes them: one `qemu-img create -b` for each, on the same file system. What
 * is kept from a guest meanwhile is measured where a guest stands: a thread opens and closes a file under the mount all the time.
 */
import { execFile } from 'node:child_process';
import { mkdirSync, openSync, closeSync, ftruncateSync, readdirSync, rmSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { startTestDaemon, type TestDaemon } from '../../test/support/daemon.js';
import { mustRun } from '../../test/support/model/command.js';
import { createCleanup } from '../../test/support/temp.js';
import { machine, machineLine } from './machine.js';
import { startOpenProbe } from './open-probe.js';
import { printResult, progress, readOptions, runBenchmark, verdict, wholeNumber, type BenchOptions } from './program.js';
import { median } from './report.js';

interface Options extends BenchOptions {
  readonly clones: number;
  readonly total: number;
  readonly rounds: number;
}

interface Figure {
  readonly what: string;
  readonly milliseconds: number;
  /** Longest wait of a guest's open meanwhile; null: nobody was there. */
  readonly openWaitMs: number | null;
}

const TIB = 1024 ** 4;
const COMMAND_TIMEOUT_MS = 300_000;
/** To reach, see the README. */
const TARGET_MS = 1000;
const TARGET_BYTES = 4096;

const run = promisify(execFile);

function readCloneOptions(): Options {
  const { common, values } = readOptions(['count', 'total', 'rounds']);
  const { quick } = common;
  return {
    ...common, clones: wholeNumber(values.count ?? (quick ? '200' : '1000'), 'count'), total: wholeNumber(values.total ?? (quick ? '2000' : '10000'), 'total'),
    rounds: wholeNumber(values.rounds ?? (quick ? '1' : '3'), 'rounds'),
  };
}

async function timed(body: () => Promise<unknown>): Promise<number> {
  const begin = performance.now();
  await body();
  return performance.now() - begin;
}

/** Blocks and inodes of a directory and all that is in it, as du counts them. */
function spaceOf(directory: string): { readonly bytes: number; readonly inodes: number } {
  let bytes = 0;
  let inodes = 0;
  const add = (path: string): void => {
    bytes += statSync(path).blocks * 512;
    inodes += 1;
  };
  add(directory);
  for (const name of readdirSync(directory, { recursive: true, encoding: 'utf8' })) add(join(directory, name));
  return { bytes, inodes };
}

function makeImage(file: string): void {
  const fd = openSync(file, 'w');
  writeSync(fd, Buffer.alloc(1024 ** 2, 0x5a), 0, 1024 ** 2, 0);
  writeSync(fd, Buffer.alloc(1024 ** 2, 0x5b), 0, 1024 ** 2, TIB / 2);
  ftruncateSync(fd, TIB);
  closeSync(fd);
}

function names(container: string, count: number): string[] {
  return Array.from({ length: count }, (_, i) => `${container}/vm${String(i).padStart(5, '0')}.img`);
}

/** Stopped, everything is in the files that stay. */
async function storeSpace(daemon: TestDaemon): Promise<{ readonly bytes: number; readonly inodes: number }> {
  await daemon.stop();
  const space = spaceOf(daemon.storeDir);
  await daemon.start();
  return space;
}

interface Rates {
  readonly clones: number;
  readonly offshootMs: number;
  readonly qemuMs: number;
  readonly bytesPerClone: number;
  readonly inodesPerClone: number;
  readonly qemuBytesPerOverlay: number;
}

/** Clones beside overlays, in turns. */
async function measureRates(daemon: TestDaemon, image: string, options: Options): Promise<Rates> {
  const offshootMs: number[] = [];
  const qemuMs: number[] = [];
  let before = { bytes: 0, inodes: 0 };
  let after = before;
  let overlayBytes = 0;
  for (let round = 1; round <= options.rounds; round += 1) {
    progress(`round ${round} of ${options.rounds}: ${options.clones} clones in one command, and as many overlays`);
    await daemon.json(['container', 'create', `round${round}`]);
    if (round === 1) before = await storeSpace(daemon);
    offshootMs.push(await timed(async () => await daemon.json(['clone', 'vms/image', ...names(`round${round}`, options.clones)])));
    if (round === 1) after = await storeSpace(daemon);
    const overlays = join(options.directory, 'overlays');
    mkdirSync(overlays);
    qemuMs.push(await timed(async () => {
      for (let i = 0; i < options.clones; i += 1) {
        await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', image, join(overlays, `vm${i}.qcow2`)]);
      }
    }));
    overlayBytes = spaceOf(overlays).bytes / options.clones;
    rmSync(overlays, { recursive: true });
    await daemon.json(['rm', '-r', `round${round}`]);
  }
  return {
    clones: options.clones, offshootMs: median(offshootMs), qemuMs: median(qemuMs), bytesPerClone: (after.bytes - before.bytes) / options.clones,
    inodesPerClone: (after.inodes - before.inodes) / options.clones, qemuBytesPerOverlay: overlayBytes,
  };
}

/** Commands in a store that holds very many clones. */
async function measureFullStore(daemon: TestDaemon, options: Options): Promise<Figure[]> {
  const figures: Figure[] = [];
  const probed = daemon.path('probe/disk');
  await daemon.json(['container', 'create', 'probe']);
  await daemon.json(['clone', 'vms/image', 'probe/disk']);
  let probe: ReturnType<typeof startOpenProbe> | null = null;
  const record = async (what: string, body: () => Promise<unknown>): Promise<void> => {
    progress(what);
    let milliseconds = 0;
    const time = async (): Promise<void> => { milliseconds = await timed(body); };
    if (probe === null) await time();
    const openWaitMs = probe === null ? null : await probe.longestDuring(time);
    figures.push({ what, milliseconds, openWaitMs });
  };
  const cli = async (args: readonly string[]): Promise<void> => {
    const result = await daemon.cli(args, { timeoutMs: COMMAND_TIMEOUT_MS });
    if (result.code !== 0) throw new Error(`offshoot ${args[0] ?? ''}: ${result.stderr}`);
  };
  await daemon.json(['container', 'create', 'many']);
  const all = names('many', options.total);
  probe = startOpenProbe(probed);
  for (let first = 0; first < all.length; first += options.clones) {
    const targets = all.slice(first, first + options.clones);
    if (first === 0) await record(`clone to ${targets.length} targets`, async () => { await cli(['clone', 'vms/image', ...targets]); });
    else await cli(['clone', 'vms/image', ...targets]);
  }
  const last = all.at(-1) ?? '';
  await record('clone, one more', async () => { await cli(['clone', 'vms/image', 'many/more']); });
  await record(`ls, ${options.total} entries`, async () => { await cli(['ls', 'many']); });
  await record(`ls --json, ${options.total} entries`, async () => { await cli(['ls', 'many', '--json']); });
  await record('ls, the containers', async () => { await cli(['ls']); });
  await record('container ls', async () => { await cli(['container', 'ls']); });
  await record('show, a clone that was never opened', async () => { await cli(['show', last]); });
  await record('show, the image', async () => { await cli(['show', 'vms/image']); });
  await record('daemon status', async () => { await cli(['daemon', 'status']); });
  await record(`ls -lU of the directory under the mount`, async () => { await mustRun('ls', ['-lU', daemon.path('many')], { timeoutMs: COMMAND_TIMEOUT_MS }); });
  await probe.end();
  probe = null;
  await record('daemon stop', async () => { await daemon.stop(); });
  await record('daemon start', async () => { await daemon.start(); });
  probe = startOpenProbe(probed);
  await daemon.json(['container', 'create', 'thousand']);
  await daemon.json(['clone', 'vms/image', ...names('thousand', options.clones)]);
  await record(`rm -r, ${options.clones} disks`, async () => { await cli(['rm', '-r', 'thousand']); });
  await record(`rm -r, ${options.total + 1} disks`, async () => { await cli(['rm', '-r', 'many']); });
  await probe.end();
  return figures;
}

function report(rates: Rates, figures: readonly Figure[], about: Record<string, string | number>): string[] {
  const lines = [
    '',
    `${rates.clones} clones of a 1 TiB image, one command       ${rates.offshootMs.toFixed(0)} ms (${(rates.qemuMs / rates.offshootMs).toFixed(0)} x as fast; to reach: ${TARGET_MS} ms, ${verdict(rates.offshootMs <= TARGET_MS)})`,
    `${rates.clones} times qemu-img create -b, a process each   ${rates.qemuMs.toFixed(0)} ms`,
    `store for each clone: ${rates.bytesPerClone.toFixed(0)} bytes, ${rates.inodesPerClone.toFixed(2)} files (to reach: ${TARGET_BYTES} bytes, ${verdict(rates.bytesPerClone < TARGET_BYTES)}); for each overlay: ${rates.qemuBytesPerOverlay.toFixed(0)} bytes, 1 file`,
    '',
    'in a full store                                     whole command   longest open of a guest',
  ];
  for (const { what, milliseconds, openWaitMs } of figures) {
    lines.push(`${what.padEnd(52)}${`${milliseconds.toFixed(0)} ms`.padStart(13)}   ${openWaitMs === null ? '' : `${openWaitMs.toFixed(0)} ms`.padStart(23)}`.trimEnd());
  }
  lines.push('', machineLine(about));
  return lines;
}

async function main(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const image = join(options.directory, 'image.raw');
    makeImage(image);
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, cliEntry: options.cliEntry });
    await daemon.json(['container', 'create', 'vms']);
    await daemon.json(['import', image, 'vms/image']);
    const rates = await measureRates(daemon, image, options);
    const figures = await measureFullStore(daemon, options);
    const about = machine(options.directory);
    printResult(options.json ? [JSON.stringify({ rounds: options.rounds, machine: about, rates, total: options.total, commands: figures })] : report(rates, figures, about));
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readCloneOptions, main);
