/**
 * Virtual machines: how long one command takes that clones and customises 1 and 100 of them, and registers them with libvirt.
 *
 * Started by `scripts/bench --machines`. Beside it, in turns, what one does without: for each machine `qemu-img create -b`, the XML with another name, UUID, MAC and disk, and
 * `virsh define`, as a loop in a shell would. Times are wall times of whole commands, Node's own start included. libvirtd is the test's own, with nothing else in it;
 * where there is none, machines are only cloned. Nothing is booted: what is measured is the way to machines that can be.
 */
import { execFile } from 'node:child_process';
import { randomBytes, randomUUID } from 'node:crypto';
import { closeSync, ftruncateSync, mkdirSync, openSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { createControlClient } from '../../daemon/control/client.js';
import { startTestDaemon, type TestDaemon } from '../../test/support/daemon.js';
import { prepareLibvirtd, type TestLibvirtd } from '../../test/support/libvirtd.js';
import { createCleanup } from '../../test/support/temp.js';
import { findProgram } from '../../test/support/tools.js';
import { machine, machineLine } from './machine.js';
import { printResult, progress, readOptions, runBenchmark, verdict, wholeNumber, type BenchOptions } from './program.js';
import { median } from './report.js';

interface Options extends BenchOptions {
  readonly count: number;
  readonly rounds: number;
}

interface Figure {
  readonly machines: number;
  readonly isRegistered: boolean;
  readonly offshootMs: number;
  readonly todayMs: number;
  /** To reach, see the README; null: nothing was promised. */
  readonly targetMs: number | null;
}

const DISK_BYTES = 10 * 1024 ** 3;
const COMMAND_TIMEOUT_MS = 300_000;
/** To reach with registration, see the README. */
const TARGET_ONE_MS = 1000;
const TARGET_HUNDRED_MS = 10_000;
const USED_BY_LIBVIRT = ['libvirtd', 'virsh', 'unshare', 'qemu-system-x86_64'] as const;

const run = promisify(execFile);

function readMachineOptions(): Options {
  const { common, values } = readOptions(['count', 'rounds']);
  return { ...common, count: wholeNumber(values.count ?? '100', 'count'), rounds: wholeNumber(values.rounds ?? (common.quick ? '1' : '3'), 'rounds') };
}

function domainXml(name: string, disk: string, type: 'raw' | 'qcow2'): string {
  const mac = ['52:54:00', ...[...randomBytes(3)].map((byte) => byte.toString(16).padStart(2, '0'))].join(':');
  return `<domain type='qemu'>
  <name>${name}</name>
  <uuid>${randomUUID()}</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='${type}'/><source file='${disk}'/><target dev='vda' bus='virtio'/></disk>
    <interface type='user'><mac address='${mac}'/><model type='virtio'/></interface>
  </devices>
</domain>
`;
}

function makeBase(directory: string): string {
  mkdirSync(directory);
  const disk = join(directory, 'disk.img');
  const fd = openSync(disk, 'w');
  writeSync(fd, Buffer.alloc(1024 ** 2, 0x5a), 0, 1024 ** 2, 0);
  ftruncateSync(fd, DISK_BYTES);
  closeSync(fd);
  writeFileSync(join(directory, 'base.xml'), domainXml('base', disk, 'raw'));
  return disk;
}

async function timed(body: () => Promise<unknown>): Promise<number> {
  const begin = performance.now();
  await body();
  return performance.now() - begin;
}

/** One command. */
async function withOffshoot(daemon: TestDaemon, count: number, isRegistered: boolean): Promise<number> {
  const targets = Array.from({ length: count }, (_, i) => `lab/vm${String(i).padStart(4, '0')}`);
  const took = await timed(async () => {
    const { code, stderr } = await daemon.cli(['vm', 'clone', 'golden/base', ...targets, ...(isRegistered ? ['--register'] : [])], { timeoutMs: COMMAND_TIMEOUT_MS });
    if (code !== 0) throw new Error(`offshoot vm clone: ${stderr}`);
  });
  const { machines } = createControlClient({ socketPath: daemon.socketPath });
  for (const path of targets) await machines.remove(path, { force: true });
  return took;
}

/** Two programs and a file for each machine. */
async function asToday(options: Options, base: string, libvirtd: TestLibvirtd | null, count: number): Promise<number> {
  const top = join(options.directory, 'today');
  mkdirSync(top);
  const names = Array.from({ length: count }, (_, i) => `today${String(i).padStart(4, '0')}`);
  const took = await timed(async () => {
    for (const name of names) {
      const disk = join(top, `${name}.qcow2`);
      await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', base, disk]);
      writeFileSync(join(top, `${name}.xml`), domainXml(name, disk, 'qcow2'));
      if (libvirtd !== null) await run('virsh', ['-q', '-c', libvirtd.uri, 'define', join(top, `${name}.xml`)]);
    }
  });
  if (libvirtd !== null) for (const name of names) await run('virsh', ['-q', '-c', libvirtd.uri, 'undefine', name]);
  rmSync(top, { recursive: true });
  return took;
}

function targetOf(count: number, isRegistered: boolean): number | null {
  if (!isRegistered) return null;
  if (count === 1) return TARGET_ONE_MS;
  return count === 100 ? TARGET_HUNDRED_MS : null;
}

async function measure(daemon: TestDaemon, libvirtd: TestLibvirtd | null, base: string, options: Options): Promise<Figure[]> {
  const figures: Figure[] = [];
  for (const isRegistered of libvirtd === null ? [false] : [false, true]) {
    for (const count of [1, options.count]) {
      const offshoot: number[] = [];
      const today: number[] = [];
      for (let round = 1; round <= options.rounds; round += 1) {
        progress(`${count} ${count === 1 ? 'machine' : 'machines'}${isRegistered ? ', registered' : ''}: round ${round} of ${options.rounds}`);
        offshoot.push(await withOffshoot(daemon, count, isRegistered));
        today.push(await asToday(options, base, isRegistered ? libvirtd : null, count));
      }
      figures.push({ machines: count, isRegistered, offshootMs: median(offshoot), todayMs: median(today), targetMs: targetOf(count, isRegistered) });
    }
  }
  return figures;
}

async function main(options: Options): Promise<void> {
  const cleanup = createCleanup();
  try {
    const missing = USED_BY_LIBVIRT.filter((program) => findProgram(program) === null);
    if (missing.length > 0) progress(`${missing.join(', ')} missing: machines are cloned, and not registered`);
    const libvirtd = missing.length > 0 ? null : prepareLibvirtd(cleanup);
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, cliEntry: options.cliEntry, startArguments: () => libvirtd === null ? [] : ['--libvirt', libvirtd.uri] });
    await libvirtd?.start();
    const base = makeBase(join(options.directory, 'base'));
    for (const name of ['golden', 'lab']) await daemon.json(['container', 'create', name]);
    await daemon.json(['vm', 'import', join(options.directory, 'base'), 'golden/base']);
    // The first definition makes libvirtd look at what QEMU can do, which it notes for ever.
    if (libvirtd !== null) await asToday(options, base, libvirtd, 1);
    const figures = await measure(daemon, libvirtd, base, options);
    const about = machine(options.directory);
    const results = figures.map((figure) => ({
      ...figure, ratio: figure.todayMs / figure.offshootMs, reached: figure.targetMs === null ? null : figure.offshootMs <= figure.targetMs,
    }));
    printResult(options.json ? [JSON.stringify({ rounds: options.rounds, machine: about, reached: results.every(({ reached }) => reached !== false), results })] : [
      '', `Machines of a base with a disk of 10 GiB, beside qemu-img create -b and virsh define for each (median of ${options.rounds})`,
      `  ${''.padEnd(24)} ${'one command'.padStart(12)} ${'as today'.padStart(10)} ${'ratio'.padStart(8)}  to reach`,
      ...results.map(({ machines, isRegistered, offshootMs, todayMs, ratio, targetMs, reached }) => {
        const what = `${machines} ${machines === 1 ? 'machine' : 'machines'}${isRegistered ? ', registered' : ''}`;
        const target = targetMs === null || reached === null ? '' : `  ${targetMs} ms: ${verdict(reached)}`;
        return `  ${what.padEnd(24)} ${`${offshootMs.toFixed(0)} ms`.padStart(12)} ${`${todayMs.toFixed(0)} ms`.padStart(10)} ${`${ratio.toFixed(1)} x`.padStart(8)}${target}`;
      }),
      machineLine(about),
    ]);
  } finally {
    await cleanup.run();
  }
}

await runBenchmark(readMachineOptions, main);
