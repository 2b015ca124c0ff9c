/**
 * Runs a program of the host: no shell, a clean environment, root directory as its own, bounded output, bounded time, and an end by signal.
 *
 * The program gets a process group of its own, so that whatever it started ends with it. A program that does not die when it is killed
 * (it waits for a mount, say) is left behind after a moment: the caller has its answer in any case. Main thread of the server.
 */
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { closeSync, openSync, unlinkSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';

export interface ChildOptions {
  readonly signal: AbortSignal;
  readonly timeoutMs: number;
  /** Written to its standard input, which is empty otherwise. */
  readonly input?: string;
  /** As whom it runs; supplementary groups are dropped then. */
  readonly user?: { readonly uid: number; readonly gid: number };
}

export interface ChildResult {
  readonly code: number | null;
  readonly endedBy: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

const OUTPUT_BYTES_MAX = 1024 * 1024;
const PATIENCE_AFTER_KILL_MS = 2_000;
const SEARCH_PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
/** Marks what belongs to one run of the tests, which look by it for what was left behind. */
const MARK_VARIABLE = 'OFFSHOOT_RUN';

/** Gives what it said, whatever its exit code. Throws `tool-missing`, `timed-out`, `cancelled`, and `too-large` when it says too much. */
export async function runChild(program: string, args: readonly string[], options: ChildOptions): Promise<ChildResult> {
  const { signal, timeoutMs, input, user } = options;
  throwIfAborted(signal);
  const inputFd = input === undefined ? null : openInput(input);
  return await new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      cwd: '/', env: childEnvironment(), detached: true, stdio: [inputFd ?? 'ignore', 'pipe', 'pipe'], ...user,
    });
    if (inputFd !== null) closeSync(inputFd);
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    let bytes = 0;
    let failure: OffshootError | null = null;
    let patience: NodeJS.Timeout | undefined;

    const end = (error: OffshootError): void => {
      if (failure !== null) return;
      failure = error;
      killGroup(child.pid);
      patience = setTimeout(() => { settle(() => { reject(error); }); }, PATIENCE_AFTER_KILL_MS);
    };
    const settle = (how: () => void): void => {
      clearTimeout(timer);
      clearTimeout(patience);
      signal.removeEventListener('abort', onAbort);
      child.stdout?.destroy();
      child.stderr?.destroy();
      child.unref();
      how();
    };
    const keep = (list: Buffer[]) => (chunk: Buffer): void => {
      bytes += chunk.length;
      if (bytes <= OUTPUT_BYTES_MAX) list.push(chunk);
      else end(new OffshootError('too-large', `${program} said more than ${OUTPUT_BYTES_MAX} bytes`, { program }));
    };
    const onAbort = (): void => { end(cancelled()); };
    const timer = setTimeout(() => {
      end(new OffshootError('timed-out', `${program} ${args[0] ?? ''} was not done after ${timeoutMs} ms`, { program, timeoutMs }));
    }, timeoutMs);

    signal.addEventListener('abort', onAbort);
    child.stdout?.on('data', keep(out));
    child.stderr?.on('data', keep(err));
    child.on('error', (error) => { settle(() => { reject(failure ?? notStarted(program, error)); }); });
    child.on('close', (code, endedBy) => {
      settle(() => {
        if (failure !== null) reject(failure);
        else resolve({ code, endedBy, stdout: Buffer.concat(out).toString(), stderr: Buffer.concat(err).toString() });
      });
    });
  });
}

/**
 * A file without a name, for a program may open `/dev/stdin`, which it cannot where that is a socket, as Node.js's pipes are.
 * Written at a place of its own, so that a program that reads on from where the descriptor stands has all of it.
 */
function openInput(input: string): number {
  const path = join(tmpdir(), `offshoot-input-${randomUUID()}`);
  const fd = openSync(path, 'wx+', 0o600);
  unlinkSync(path);
  const bytes = Buffer.from(input);
  for (let written = 0; written < bytes.length;) written += writeSync(fd, bytes, written, bytes.length - written, written);
  return fd;
}

export function throwIfAborted(signal: AbortSignal): void {
  if (signal.aborted) throw cancelled();
}

/** Sleeps; throws `cancelled` when the signal comes first. */
export async function sleepUnlessAborted(sleepMs: number, signal: AbortSignal): Promise<void> {
  throwIfAborted(signal);
  await new Promise<void>((resolve, reject) => {
    const onAbort = (): void => {
      clearTimeout(timer);
      reject(cancelled());
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', onAbort);
      resolve();
    }, sleepMs);
    signal.addEventListener('abort', onAbort, { once: true });
  });
}

export function cancelled(): OffshootError {
  return new OffshootError('cancelled', 'the call was cancelled');
}

/** Nothing of ours but what names the run of a test. */
export function childEnvironment(): NodeJS.ProcessEnv {
  const mark = process.env[MARK_VARIABLE];
  return { PATH: SEARCH_PATH, LC_ALL: 'C', LANGUAGE: 'C', HOME: '/', ...(mark === undefined ? {} : { [MARK_VARIABLE]: mark }) };
}

export function notStarted(program: string, error: NodeJS.ErrnoException): OffshootError {
  if (error.code === 'ENOENT') return new OffshootError('tool-missing', `${program} is not on this host: install its package`, { program }, error);
  if (error.code === 'EPERM') return new OffshootError('not-permitted', `${program} cannot be run as that user: the daemon does not run as root`, { program }, error);
  return new OffshootError('tool-missing', `${program} could not be started: ${error.message}`, { program }, error);
}

function killGroup(pid: number | undefined): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // It has just ended.
  }
}
