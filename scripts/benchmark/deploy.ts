/**
 * Deployment: from the command to a machine that runs, from a container file and as one does without.
 *
 * Started by `scripts/bench --deploy`. In turns, in one run, with the same hypervisor: `offshoot deploy FILE --name NAME`, the whole command, Node's own start included; and
 * an empty file of the same size, partitioned, attached, formatted and mounted, the machine's files copied onto it, the machine registered and started. Nothing of
 * the second is synchronised: its copy lies in the page cache, as does what it reads, and on a tmpfs no device takes part. What is measured is the work.
 * Each arm is undone before the next begins, which is not measured.
 */
import { chmodSync, chownSync, closeSync, ftruncateSync, mkdirSync, openSync, readdirSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';

import type { DeployedInfo, StagedInfo } from '../../daemon/control/vdisk-schemas.js';
import { startTestDaemon, type TestDaemon } from '../../test/support/daemon.js';
import { prepareLibvirtd, shareMounts } from '../../test/support/libvirtd.js';
import { mustRun } from '../../test/support/model/command.js';
import { createCleanup, removeTree, type Cleanup } from '../../test/support/temp.js';
import { findProgram } from '../../test/support/tools.js';
import { cleanVdisks, mountsBelow } from '../../test/support/vdisk-programs.js';
import { DISK_NAME, libvirtWay, qemuWay, type Way } from './deploy-ways.js';
import { machine, machineLine } from './machine.js';
import { printResult, progress, readOptions, runBenchmark, sizeOption, verdict, wholeNumber, type BenchOptions } from './program.js';
import { median } from './report.js';

interface Options extends BenchOptions {
  readonly rounds: number;
  readonly dataBytes: number;
  /** Short: sockets of machines lie far below it. */
  readonly runtimeDir: string;
}

/** Wall times, a number for each round. */
interface Rounds {
  readonly deployMs: number[];
  readonly today: Record<TodayStep, number>[];
}

const TODAY_STEPS = ['partition', 'format', 'copy', 'start'] as const;
type TodayStep = (typeof TODAY_STEPS)[number];

interface Figure {
  readonly hypervisor: Way['hypervisor'];
  readonly stageMs: number;
  readonly containerFileBytes: number;
  readonly deployMs: { readonly median: number; readonly rounds: readonly number[] };
  readonly todayMs: { readonly median: number; readonly rounds: readonly number[]; readonly medianOfSteps: Readonly<Record<TodayStep, number>> };
  readonly ratio: number;
  readonly targetRatio: number;
  readonly reached: boolean;
}

/** To reach, see the README: in a tenth of the time. */
const TARGET_RATIO = 10;
const MIB = 1024 ** 2;
const PROGRAM_TIMEOUT_MS = 600_000;
/** Of nobody; machines run as their owner. */
const OWNER = { uid: 65_534, gid: 65_534 } as const;
const NEEDED = ['losetup', 'sfdisk', 'mkfs.ext4', 'setpriv', 'qemu-system-x86_64'] as const;
const USED_BY_LIBVIRT = ['libvirtd', 'virsh', 'unshare'] as const;

function readDeployOptions(): Options {
  const { common, values } = readOptions(['rounds', 'size']);
  const { OFFSHOOT_TEST_TMPFS: runtimeDir } = process.env;
  if (runtimeDir === undefined) throw new Error('OFFSHOOT_TEST_TMPFS is not set: start this by scripts/bench');
  return { ...common, runtimeDir, rounds: wholeNumber(values.rounds ?? (common.quick ? '3' : '5'), 'rounds'), dataBytes: sizeOption(values.size ?? (common.quick ? '1G' : '2G')) };
}

async function timed(body: () => Promise<unknown>): Promise<number> {
  const begin = performance.now();
  await body();
  return performance.now() - begin;
}

/** A machine's directory: a disk that is full of what no file system can make smaller, and a configuration. */
async function makeMachine(directory: string, way: Way, dataBytes: number): Promise<void> {
  mkdirSync(directory);
  const disk = join(directory, DISK_NAME);
  await mustRun('dd', ['if=/dev/urandom', `of=${disk}`, 'bs=1M', `count=${dataBytes / MIB}`, 'status=none'], { timeoutMs: PROGRAM_TIMEOUT_MS });
  way.configure(directory);
  for (const path of [directory, ...readdirSync(directory).map((name) => join(directory, name))]) chownSync(path, OWNER.uid, OWNER.gid);
  chmodSync(directory, 0o755);
}

/** The container file; nothing of the machine but it stays in the store. */
async function stageMachine(daemon: TestDaemon, source: string, way: Way): Promise<{ readonly staged: StagedInfo; readonly stageMs: number }> {
  const path = `golden/${way.hypervisor}`;
  await mustOffshoot(daemon, ['vm', 'import', source, path]);
  await mustRun('chown', ['-R', `${OWNER.uid}:${OWNER.gid}`, daemon.path(path)]);
  let staged: StagedInfo | undefined;
  const stageMs = await timed(async () => { ({ staged } = await mustOffshoot<{ readonly staged: StagedInfo }>(daemon, ['stage', path, `${path}.vdisk`])); });
  await mustOffshoot(daemon, ['vm', 'rm', path]);
  if (staged === undefined) throw new Error('staged, and not listed');
  return { staged, stageMs };
}

async function mustOffshoot<T>(daemon: TestDaemon, args: readonly string[]): Promise<T> {
  const { code, stdout, stderr } = await daemon.cli([...args, '--json'], { timeoutMs: PROGRAM_TIMEOUT_MS });
  if (code !== 0) throw new Error(`offshoot ${args.join(' ')}: ${stderr}`);
  return JSON.parse(stdout) as T;
}

/** One command. */
async function withOffshoot(daemon: TestDaemon, way: Way, { path, sizeBytes }: StagedInfo): Promise<number> {
  const name = `deployed-${way.hypervisor}`;
  let deployed: DeployedInfo | null = null;
  const took = await timed(async () => {
    ({ deployed } = await mustOffshoot<{ readonly deployed: DeployedInfo }>(daemon, ['deploy', path, '--name', name, '--hypervisor', way.hypervisor]));
  });
  const [now] = await mustOffshoot<DeployedInfo[]>(daemon, ['deployed', name]);
  if (now?.power !== 'running' || (way.hypervisor === 'libvirt' && !(await way.isRunning(name)))) throw new Error(`${name} does not run, of ${sizeBytes} bytes: ${JSON.stringify(deployed)}`);
  await mustOffshoot(daemon, ['decommission', name, '--force']);
  return took;
}

/** What is attached and mounted is taken away, also when a step fails. */
async function asToday(directory: string, source: string, way: Way, sizeBytes: number): Promise<Record<TodayStep, number>> {
  const name = `today-${way.hypervisor}`;
  const [image, mountPoint] = [join(directory, 'disk.raw'), join(directory, 'mounted')];
  let device = '';
  mkdirSync(mountPoint);
  try {
    const partition = await timed(async () => {
      const fd = openSync(image, 'w');
      ftruncateSync(fd, sizeBytes);
      closeSync(fd);
      await mustRun('sfdisk', ['--quiet', image], { input: 'label: gpt\nstart=1MiB, type=linux\n' });
      // A window instead of --partscan: some kernels make no nodes for partitions.
      device = (await mustRun('losetup', ['--find', '--show', '--offset', String(MIB), '--sizelimit', String(sizeBytes - 2 * MIB), image])).stdout.trim();
    });
    const format = await timed(async () => { await mustRun('mkfs.ext4', ['-q', '-F', device], { timeoutMs: PROGRAM_TIMEOUT_MS }); });
    const copy = await timed(async () => {
      await mustRun('mount', [device, mountPoint]);
      await mustRun('cp', ['--archive', `${source}/.`, mountPoint], { timeoutMs: PROGRAM_TIMEOUT_MS });
    });
    const start = await timed(async () => { await way.start(name, mountPoint); });
    if (!(await way.isRunning(name))) throw new Error(`${name} does not run`);
    await way.end(name);
    return { partition, format, copy, start };
  } finally {
    for (const each of mountsBelow(directory)) await mustRun('umount', [each], { timeoutMs: PROGRAM_TIMEOUT_MS });
    if (device !== '') await mustRun('losetup', ['--detach', device]);
    rmSync(image, { force: true });
    await removeTree(mountPoint);
  }
}

async function measure(daemon: TestDaemon, way: Way, options: Options): Promise<Figure> {
  const { directory, dataBytes } = options;
  const source = join(directory, 'machine');
  progress(`${way.hypervisor}: a machine with ${dataBytes / MIB} MiB of data, staged`);
  await makeMachine(source, way, dataBytes);
  const { staged, stageMs } = await stageMachine(daemon, source, way);
  const rounds: Rounds = { deployMs: [], today: [] };
  // Not counted: libvirtd looks at what QEMU can do when it is first asked, and notes it for ever.
  await withOffshoot(daemon, way, staged);
  for (let round = 1; round <= options.rounds; round += 1) {
    progress(`${way.hypervisor}: round ${round} of ${options.rounds}`);
    rounds.deployMs.push(await withOffshoot(daemon, way, staged));
    rounds.today.push(await asToday(join(directory, 'today'), source, way, staged.sizeBytes));
  }
  await mustOffshoot(daemon, ['rm', staged.path]);
  await removeTree(source);
  const { deployMs, today } = rounds;
  const todayMs = today.map((steps) => TODAY_STEPS.reduce((sum, step) => sum + steps[step], 0));
  const medianOfSteps = Object.fromEntries(TODAY_STEPS.map((step) => [step, median(today.map((each) => each[step]))])) as Record<TodayStep, number>;
  const ratio = median(todayMs) / median(deployMs);
  return {
    hypervisor: way.hypervisor, stageMs, containerFileBytes: staged.sizeBytes, deployMs: { median: median(deployMs), rounds: deployMs }, todayMs: { median: median(todayMs), rounds: todayMs, medianOfSteps },
    ratio, targetRatio: TARGET_RATIO, reached: ratio >= TARGET_RATIO,
  };
}

function linesOf({ hypervisor, deployMs, todayMs, ratio, reached }: Figure): readonly string[] {
  return [
    `  ${hypervisor.padEnd(8)} ${'offshoot deploy'.padEnd(32)} ${shownRounds(deployMs.rounds)}`,
    `  ${''.padEnd(8)} ${'partition, format, copy, start'.padEnd(32)} ${shownRounds(todayMs.rounds)}  ${ratio.toFixed(1)} x; to reach ${TARGET_RATIO} x: ${verdict(reached)}`,
    `  ${''.padEnd(8)} of it ${TODAY_STEPS.map((step) => `${step} ${todayMs.medianOfSteps[step].toFixed(0)} ms`).join(', ')}`,
  ];
}

function shownRounds(rounds: readonly number[]): string {
  return `${median(rounds).toFixed(0).padStart(6)} ms (${Math.min(...rounds).toFixed(0)} to ${Math.max(...rounds).toFixed(0)})`.padEnd(28);
}

async function ways(cleanup: Cleanup, options: Options): Promise<{ readonly daemon: TestDaemon; readonly found: readonly Way[] }> {
  const lacking = NEEDED.filter((program) => findProgram(program) === null);
  if (lacking.length > 0) throw new Error(`${lacking.join(', ')} missing: apt-get install util-linux fdisk e2fsprogs qemu-system-x86`);
  const missing = USED_BY_LIBVIRT.filter((program) => findProgram(program) === null);
  if (missing.length > 0) progress(`${missing.join(', ')} missing: with QEMU by itself only`);
  const libvirtd = missing.length > 0 ? null : prepareLibvirtd(cleanup);
  const runtimeDir = join(options.runtimeDir, 'r');
  mkdirSync(runtimeDir);
  cleanup.add(() => removeTree(runtimeDir));
  // Machines run as their owners, who must come by.
  for (const each of [runtimeDir, dirname(runtimeDir), options.directory, dirname(options.directory)]) chmodSync(each, 0o711);
  const daemon = await startTestDaemon({
    transport: 'kernel', cleanup, cliEntry: options.cliEntry, environment: { OFFSHOOT_RUNTIME_DIR: runtimeDir }, startArguments: () => libvirtd === null ? [] : ['--libvirt', libvirtd.uri],
  });
  cleanVdisks(cleanup, daemon, runtimeDir);
  const todayDir = join(options.directory, 'today');
  mkdirSync(todayDir, { mode: 0o711 });
  for (const each of [runtimeDir, todayDir]) await shareMounts(each, cleanup);
  await libvirtd?.start();
  await daemon.json(['container', 'create', 'golden']);
  return { daemon, found: [qemuWay(runtimeDir), ...libvirtd === null ? [] : [libvirtWay(libvirtd)]] };
}

async function main(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const { daemon, found } = await ways(cleanup, options);
    process.once('SIGTERM', () => {
      for (const way of found) way.kill();
      process.exit(143);
    });
    const results: Figure[] = [];
    for (const way of found) results.push(await measure(daemon, way, options));
    const about = machine(options.directory);
    const { rounds, dataBytes } = options;
    printResult(options.json ? [JSON.stringify({ rounds, dataBytes, cache: 'warm', machine: about, reached: results.every(({ reached }) => reached), results })] : [
      '', `From the command to a running machine with ${dataBytes / MIB} MiB of data; page cache warm, nothing synchronised (median of ${rounds}, least to most)`,
      ...results.flatMap(linesOf), machineLine(about),
    ]);
    await daemon.stop();
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readDeployOptions, main);
