/**
 * Runs the check's program on a store that no daemon serves, from the command that asks for it.
 *
 * The program is a process of its own, so that the command line needs neither SQLite nor native code. It speaks in JSON lines;
 * an abort asks it to end, and it ends between two steps.
 */
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { CheckInfo, CheckResult } from './schemas.js';

/** `database`: SQLite's check alone, beside the server that writes to it. `offline`: everything, with the store's lock. */
export interface CheckProgramOptions {
  readonly mode: 'offline' | 'database';
  readonly storeDir: string;
  readonly target: string | null;
  readonly data: boolean;
  readonly repair: boolean;
}

export type CheckProgramMessage =
  | { readonly type: 'progress'; readonly phase: CheckInfo['phase']; readonly doneBytes: number; readonly totalBytes: number }
  | { readonly type: 'result'; readonly outcome: CheckResult }
  | { readonly type: 'error'; readonly error: { readonly kind: ErrorKind; readonly message: string } };

export interface OfflineCheckHooks {
  readonly signal: AbortSignal;
  readonly progress: (phase: CheckInfo['phase'], doneBytes: number, totalBytes: number) => void;
}

const PROGRAM = fileURLToPath(new URL('../check/main.js', import.meta.url));

/** The program's one argument. */
export function parseCheckProgramOptions(json: string | undefined): CheckProgramOptions {
  const fields = JSON.parse(json ?? '{}') as Partial<CheckProgramOptions>;
  if ((fields.mode !== 'offline' && fields.mode !== 'database') || typeof fields.storeDir !== 'string') {
    throw new OffshootError('invalid-argument', "the check's program is started by 'offshoot check --store DIR', not by hand");
  }
  return { mode: fields.mode, storeDir: fields.storeDir, target: fields.target ?? null, data: fields.data === true, repair: fields.repair === true };
}

export async function checkOffline(options: Omit<CheckProgramOptions, 'mode'>, hooks: OfflineCheckHooks): Promise<CheckResult> {
  // A process group of its own: Ctrl-C on the terminal is this command's to pass on.
  const child = spawn(process.execPath, [PROGRAM, JSON.stringify({ ...options, mode: 'offline' } satisfies CheckProgramOptions)], {
    cwd: '/', detached: true, stdio: ['ignore', 'pipe', 'inherit'],
  });
  const stop = (): void => { child.kill('SIGTERM'); };
  hooks.signal.addEventListener('abort', stop, { once: true });
  try {
    const ended = new Promise<string>((resolve) => {
      child.once('error', (error) => { resolve(error.message); });
      child.once('exit', (code, signal) => { resolve(signal === null ? `it ended with code ${code ?? 'unknown'}` : `it was ended by ${signal}`); });
    });
    let last: CheckProgramMessage | null = null;
    for await (const line of createInterface({ input: child.stdout })) {
      const message = JSON.parse(line) as CheckProgramMessage;
      if (message.type === 'progress') hooks.progress(message.phase, message.doneBytes, message.totalBytes);
      else last = message;
    }
    const how = await ended;
    if (last?.type === 'result') return last.outcome;
    if (last?.type === 'error') throw new OffshootError(last.error.kind, last.error.message);
    throw new OffshootError('internal', `the check's program gave no answer: ${how}`);
  } finally {
    hooks.signal.removeEventListener('abort', stop);
  }
}
