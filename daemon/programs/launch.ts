/**
 * Starts a process that is to outlive us, and waits until it is up or has ended.
 *
 * It gets a session of its own, and the caller says when it is up. What it says until then is kept for the error; afterwards nobody listens, unless
 * it was given a file to say it to. Not by QEMU's own -daemonize: a machine's sandbox forbids it to make processes, and that ends QEMU in
 * the middle of it (7.2: SIGSYS).
 */
import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';

import { OffshootError } from '../../blockstore/errors.js';
import { cancelled, childEnvironment, notStarted } from './child.js';

export interface Command {
  readonly program: string;
  readonly arguments: readonly string[];
  /** To start it as; ourselves when left out. */
  readonly user?: { readonly uid: number; readonly gid: number };
}

export interface LaunchOptions {
  readonly signal: AbortSignal;
  readonly timeoutMs: number;
  /** Asked again and again, never twice at once. */
  readonly isUp: () => Promise<boolean>;
  /** A descriptor for all that it ever says; without one its errors are kept until it is up. */
  readonly output?: number;
  /** In the turn in which it was started. */
  readonly onStarted?: (pid: number) => void;
}

export type LaunchResult =
  | { readonly kind: 'up' }
  | { readonly kind: 'ended'; readonly endedBy: NodeJS.Signals | null; readonly stderr: string };

const POLL_MS = 10;
const OUTPUT_BYTES_MAX = 64 * 1024;

/** Throws `cancelled` or `timed-out` when it was ended for that, and what the start itself failed with. */
export async function launch({ program, arguments: args, user }: Command, { signal, timeoutMs, isUp, output, onStarted }: LaunchOptions): Promise<LaunchResult> {
  const child = spawn(program, args, { cwd: '/', env: childEnvironment(), detached: true, stdio: ['ignore', output ?? 'ignore', output ?? 'pipe'], ...user });
  if (child.pid !== undefined) {
    onStarted?.(child.pid);
    asKillableAsOthers(child.pid);
  }
  let stderr = '';
  const ending = new Promise<LaunchResult>((resolve, reject) => {
    child.once('error', (error) => { reject(notStarted(program, error)); });
    child.once('close', (_code, endedBy) => { resolve({ kind: 'ended', endedBy, stderr }); });
  });
  child.stderr?.on('data', (chunk: Buffer) => { if (stderr.length < OUTPUT_BYTES_MAX) stderr += chunk.toString(); });

  const deadline = performance.now() + timeoutMs;
  const pause = async (): Promise<null> => await new Promise((resolve) => { setTimeout(() => { resolve(null); }, POLL_MS); });
  try {
    for (;;) {
      const ended = await Promise.race([ending, pause()]);
      if (ended !== null) return ended;
      if (await isUp()) return { kind: 'up' };
      if (signal.aborted) throw cancelled();
      if (performance.now() > deadline) throw new OffshootError('timed-out', `${program} was not up after ${timeoutMs} ms`, { program, timeoutMs });
    }
  } catch (error) {
    child.kill('SIGKILL');
    ending.catch(() => undefined);
    throw error;
  } finally {
    child.stderr?.destroy();
    child.unref();
  }
}

/** Our own server is spared under memory pressure, because every guest needs it; one guest is not needed by all. */
function asKillableAsOthers(pid: number): void {
  try {
    writeFileSync(`/proc/${pid}/oom_score_adj`, '0');
  } catch {
    // It has ended, or the kernel refuses: as hard to kill as we are.
  }
}
