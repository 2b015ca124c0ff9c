/**
 * Runs the actor below strace, with the real kernel: counts its system calls, makes chosen ones fail, kills it at one.
 *
 * strace is attached to one thread of the actor, so a count is that thread's own, sees only the files that are named to
 * it, and comes when an operation begins. What an operation does is the same each time, hence its call N in the run that
 * counts is its call N in every run. The journals lie elsewhere, on tmpfs, and are left alone.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

import { signalProcess } from '../processes.js';
import { WORKLOAD, type Outcome } from './workload.js';

/** Everything that changes a file or a name, or makes it durable. */
export const CALLS = ['pwrite64', 'write', 'fdatasync', 'fsync', 'ftruncate', 'fallocate', 'openat', 'mkdir', 'rename', 'unlink'] as const;
const RUN_MS_MAX = 60_000;

export type ThreadName = 'main' | 'pool';

/** One system call of the counting run. */
export interface Call {
  readonly thread: ThreadName;
  readonly call: string;
  /** Below the store's directory; empty: the directory itself. */
  readonly file: string;
  /** Operation under way, as an index into the workload. */
  readonly operation: number;
}

export interface Injection {
  readonly thread: ThreadName;
  readonly call: string;
  /** The tracer comes when this operation begins. All injections of a run have the same. */
  readonly operation: number;
  /** Of the thread's calls of this kind on `files` since then, counted from 1. */
  readonly number: number;
  /** Every later one as well. */
  readonly always: boolean;
  /** An errno by name, or KILL. */
  readonly effect: 'EIO' | 'ENOSPC' | 'KILL';
  /** Below the store's directory. */
  readonly files: readonly string[];
}

export interface ActorRun {
  readonly outcomes: readonly Outcome[];
  /** Of `read` operations, by their index. */
  readonly reads: ReadonlyMap<number, string>;
  readonly faulted: readonly string[];
  /** What it said before it ended itself for an error that is none of operation; null: it came to its end or was killed. */
  readonly crash: string | null;
  readonly calls: readonly Call[];
}

export interface ActorPlace {
  readonly program: string;
  readonly storeDir: string;
  readonly runtimeDir: string;
  readonly killAfter?: string;
}

export async function runActor(place: ActorPlace, injections: readonly Injection[], counting = false): Promise<ActorRun> {
  const actor = spawn(process.execPath, [place.program, place.storeDir, place.runtimeDir], {
    stdio: ['pipe', 'pipe', 'inherit'],
    env: { ...process.env, UV_THREADPOOL_SIZE: '1', PAUSE_AT: String(injections[0]?.operation ?? 0), ...(place.killAfter === undefined ? {} : { KILL_AFTER: place.killAfter }) },
  });
  const tracers: ChildProcess[] = [];
  const timer = setTimeout(() => { actor.kill('SIGKILL'); }, RUN_MS_MAX);
  const log = path.join(place.runtimeDir, 'strace.log');
  try {
    const output = new Lines(actor);
    const ended = new Promise<void>((resolve) => { actor.on('close', () => { resolve(); }); });
    const [main, pool] = (await output.line('ready')).split(' ').slice(1).map(Number);
    await output.line('paused');
    const threadIds = { main: main!, pool: pool! };
    if (counting) tracers.push(await attach([...threadArguments(Object.values(threadIds)), '-y', '-e', `trace=${CALLS.join(',')}`, '-o', log]));
    for (const thread of ['main', 'pool'] as const) {
      const own = injections.filter((injection) => injection.thread === thread);
      if (own.length === 0) continue;
      tracers.push(await attach([
        ...threadArguments([threadIds[thread]]), '-e', `trace=${own.map(({ call }) => call).join(',')}`, '-o', '/dev/null',
        ...own.flatMap((injection) => ['-e', expressionOf(injection)]),
        ...[...new Set(own.flatMap(({ files }) => files))].flatMap((file) => ['-P', path.join(place.storeDir, file)]),
      ]));
    }
    actor.stdin.end('go\n');
    await ended;
    await Promise.all(tracers.map(exited));
    const run = parseOutput(output.all);
    return { ...run, calls: counting ? parseCalls(fs.readFileSync(log, 'utf8'), place.storeDir, threadIds) : [] };
  } finally {
    clearTimeout(timer);
    if (actor.pid !== undefined) signalProcess(actor.pid, 'SIGKILL');
    for (const tracer of tracers) if (tracer.exitCode === null && tracer.pid !== undefined) signalProcess(tracer.pid, 'SIGKILL');
    fs.rmSync(log, { force: true });
  }
}

function threadArguments(ids: readonly number[]): string[] {
  return ids.flatMap((id) => ['-p', String(id)]);
}

function expressionOf({ call, number, always, effect }: Injection): string {
  return `inject=${call}:${effect === 'KILL' ? 'signal=KILL' : `error=${effect}`}:when=${number}${always ? '+' : ''}`;
}

/** strace, attached: it says so on its standard error. */
export async function attach(args: readonly string[]): Promise<ChildProcess> {
  const tracer = spawn('strace', args, { stdio: ['ignore', 'ignore', 'pipe'] });
  const expected = args.filter((each) => each === '-p').length;
  await new Promise<void>((resolve, reject) => {
    let said = '';
    tracer.stderr.on('data', (chunk: Buffer) => {
      said += chunk.toString();
      if (said.split(' attached').length > expected) resolve();
    });
    tracer.on('error', reject);
    tracer.on('exit', (code) => { reject(new Error(`strace ended with ${String(code)}: ${said}`)); });
  });
  return tracer;
}

export async function exited(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  await new Promise((resolve) => { child.on('exit', resolve); });
}

class Lines {
  private text = '';
  private isClosed = false;
  private readonly changed: (() => void)[] = [];

  constructor(child: ChildProcess) {
    child.stdout?.on('data', (chunk: Buffer) => {
      this.text += chunk.toString();
      for (const wake of this.changed.splice(0)) wake();
    });
    child.on('close', () => {
      this.isClosed = true;
      for (const wake of this.changed.splice(0)) wake();
    });
  }

  get all(): string[] {
    return this.text.split('\n').slice(0, -1);
  }

  /** The line that begins with this; an error when the process ends without it. */
  async line(begin: string): Promise<string> {
    for (;;) {
      const found = this.all.find((line) => line.startsWith(begin));
      if (found !== undefined) return found;
      if (this.isClosed) throw new Error(`the actor ended before it was ${begin}: ${this.text}`);
      await new Promise<void>((resolve) => { this.changed.push(resolve); });
    }
  }
}

function parseOutput(lines: readonly string[]): Omit<ActorRun, 'calls'> {
  const outcomes: Outcome[] = WORKLOAD.map(() => 'skipped');
  const reads = new Map<number, string>();
  const faulted = new Set<string>();
  let crash: string | null = null;
  for (const line of lines) {
    const [mark, number, outcome, ...rest] = line.split(' ');
    if (mark === '>') outcomes[Number(number)] = 'unknown';
    else if (mark === '<') outcomes[Number(number)] = outcome ?? '';
    else if (mark === '!') faulted.add(number ?? '');
    else if (mark === '#') crash = line;
    if (mark === '<' && outcome === 'ok' && rest.length > 0) reads.set(Number(number), rest.join(' '));
  }
  return { outcomes, reads, faulted: [...faulted].sort(), crash };
}

/** The calls on files of the store, with the operation in which they happened: the actor says `> N` by a write of its own. */
function parseCalls(text: string, storeDir: string, threadIds: Readonly<Record<ThreadName, number>>): Call[] {
  const calls: Call[] = [];
  let operation = 0;
  for (const line of text.split('\n')) {
    const [, thread, call, rest] = /^(\d+) +(\w+)\((.*)$/u.exec(line) ?? [];
    if (call === undefined || rest === undefined) continue;
    const mark = call === 'write' ? /^1<[^>]*>, "> (\d+)\\n"/u.exec(rest) : null;
    if (mark !== null) operation = Number(mark[1]);
    const file = pathsOf(call, rest).find((each) => each === storeDir || each.startsWith(`${storeDir}/`));
    if (file === undefined) continue;
    calls.push({ thread: Number(thread) === threadIds.main ? 'main' : 'pool', call, file: path.relative(storeDir, file), operation });
  }
  return calls;
}

function pathsOf(call: string, rest: string): string[] {
  const named = [...rest.matchAll(/"(\/[^"]*)"/gu)].map((match) => match[1]!);
  if (call === 'openat' || call === 'mkdir' || call === 'rename' || call === 'unlink') return named;
  return [/^\d+<([^>]*)>/u.exec(rest)?.[1] ?? ''];
}
