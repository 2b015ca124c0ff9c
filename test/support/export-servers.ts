/**
 * What shows a test's exports, and outlives its daemon by design: servers, with whatever they have started, and loop devices. Here it is ended, for every
 * test, however it went; each thing is found by the directory that is the test's own. Neither asks the server of ours, nor touches the mount. Does not
 * import vitest.
 */
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';

import { command } from './model/command.js';
import { isAlive, signalProcess, waitUntil } from './processes.js';

const END_MS = 20_000;
const COMMAND_MS = 30_000;
const ROUNDS_MAX = 20;

/** Servers with a file below `directory` among their arguments, and all processes of their sessions, which may have given themselves other titles. What it ended. */
export async function endServersIn(directory: string): Promise<readonly string[]> {
  const ended: string[] = [];
  const mark = `${directory}/`;
  for (let round = 0; round < ROUNDS_MAX; round += 1) {
    const servers = processIds().filter((pid) => argumentsOf(pid).some((argument) => argument.includes(mark)));
    // One that was not started in a session of its own is of the test's: only itself.
    const sessions = new Set(servers.filter((pid) => sessionOf(pid) === pid));
    const pids = processIds().filter((pid) => servers.includes(pid) || sessions.has(sessionOf(pid))).filter(isAlive);
    if (pids.length === 0) return ended;
    ended.push(...pids.map((pid) => `process ${pid}: ${argumentsOf(pid).join(' ').slice(0, 120)}`));
    for (const pid of pids) signalProcess(pid, 'SIGKILL');
    if (!(await waitUntil(() => !pids.some(isAlive), END_MS))) throw new Error(`${pids.filter(isAlive).join(', ')} with files in ${directory} could not be ended`);
  }
  throw new Error(`new processes with files in ${directory} come as often as they are ended`);
}

export interface LoopDevice {
  readonly device: string;
  /** Another one each time that it is attached. */
  readonly sequence: string;
}

/** Of files below `directory`. To be asked before a mount there goes: the kernel forgets the names of its files with it. */
export function loopsBelow(directory: string): readonly LoopDevice[] {
  return readdirSync('/sys/block').filter((name) => /^loop\d+$/u.test(name) && read(`/sys/block/${name}/loop/backing_file`).startsWith(`${directory}/`))
    .map((name) => ({ device: `/dev/${name}`, sequence: sequenceOf(name) }));
}

/** Gives them back, with what is mounted of them; not those that were attached anew since. */
export async function releaseLoops(loops: readonly LoopDevice[]): Promise<void> {
  const isThere = ({ device, sequence }: LoopDevice): boolean => existsSync(`/sys/block/${basename(device)}/loop`) && sequenceOf(basename(device)) === sequence;
  for (const { device } of loops.filter(isThere)) {
    for (const point of mountsOf(device)) await command('umount', ['-l', '--no-canonicalize', '--', point], { timeoutMs: COMMAND_MS });
    await command('losetup', ['--detach', device], { timeoutMs: COMMAND_MS });
  }
  // The kernel may be a moment behind.
  if (!(await waitUntil(() => !loops.some(isThere), END_MS))) throw new Error(`${loops.filter(isThere).map(({ device }) => device).join(', ')} could not be given back`);
}

function sequenceOf(name: string): string { return read(`/sys/block/${name}/diskseq`).trim(); }

/** The last one first: it may lie on the others. */
function mountsOf(device: string): readonly string[] {
  const name = basename(device);
  const parts = existsSync(`/sys/block/${name}`) ? readdirSync(`/sys/block/${name}`).filter((entry) => entry.startsWith(`${name}p`)) : [];
  const numbers = new Set([`/sys/block/${name}`, ...parts.map((part) => join('/sys/block', name, part))].map((each) => read(join(each, 'dev')).trim()));
  return read('/proc/self/mountinfo').split('\n').flatMap((line) => {
    const [, , number = '', , point = ''] = line.split(' ');
    return numbers.has(number) ? [point] : [];
  }).reverse();
}

function processIds(): number[] { return readdirSync('/proc').filter((name) => /^[0-9]+$/u.test(name)).map(Number).filter((pid) => pid !== process.pid); }
function argumentsOf(pid: number): readonly string[] { return read(`/proc/${pid}/cmdline`).split('\0'); }

/** 0: it has ended. */
function sessionOf(pid: number): number {
  const stat = read(`/proc/${pid}/stat`);
  return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[3] ?? 0);
}

function read(file: string): string {
  try {
    return readFileSync(file, 'latin1');
  } catch {
    // It has just gone.
    return '';
  }
}
