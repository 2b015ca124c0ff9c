/**
 * Quiesce: a command that lets those who write put their affairs in order before a snapshot, and go on after it. Main thread.
 *
 * It is run twice by a shell, `sh -c COMMAND offshoot freeze` and then `… thaw`, so that it finds the verb in `$1`; both runs are bounded by the time-out.
 * The snapshot is application-consistent if and only if the first run ended with 0 in time and the thaw did, too: a freeze that ran out by itself
 * while the snapshot was taken shows in the thaw. The thaw is always run, whatever happened before it. Only root may name a command: it runs as the daemon does.
 */
import { execFile } from 'node:child_process';

import { splitReference } from '../filesystem/references.js';
import type { Consistency } from '../../blockstore/meta/rows.js';

export interface QuiesceOptions {
  readonly command: string;
  readonly timeoutMs: number;
}

export interface QuiesceState {
  readonly consistency: Consistency;
  readonly message: string | null;
}

export interface QuiesceContext {
  readonly reference: string;
  readonly logger: { warn(context: object, message: string): void };
}

const OUTPUT_BYTES_MAX = 64 * 1024;
const SHOWN_CHARACTERS_MAX = 400;
const CRASH: QuiesceState = { consistency: 'crash', message: null };

/** Runs `take` between freeze and thaw; `describe` is told when the thaw shows that it was not what the freeze had said. */
export async function quiesced<T>(
  options: QuiesceOptions | null, context: QuiesceContext, take: (state: QuiesceState) => Promise<T>, describe: (value: T, state: QuiesceState) => void,
): Promise<{ readonly value: T } & QuiesceState> {
  if (options === null) return { value: await take(CRASH), ...CRASH };
  const frozen = await runVerb(options, context, 'freeze');
  let state: QuiesceState = frozen.failure === null ? { consistency: 'application', message: frozen.output } : { consistency: 'crash', message: frozen.failure };
  let value: T;
  try {
    value = await take(state);
  } finally {
    const thawed = await runVerb(options, context, 'thaw');
    if (thawed.failure !== null) {
      context.logger.warn({ snapshot: context.reference, reason: thawed.failure }, 'the quiesce command could not thaw: look at those who write');
      state = { consistency: 'crash', message: state.consistency === 'crash' ? state.message : thawed.failure };
    }
  }
  describe(value, state);
  return { value, ...state };
}

/** What it printed, and why it failed. */
async function runVerb({ command, timeoutMs }: QuiesceOptions, { reference }: QuiesceContext, verb: 'freeze' | 'thaw'): Promise<{ readonly failure: string | null; readonly output: string | null }> {
  const parts = splitReference(reference);
  return await new Promise((resolve) => {
    // A group of its own, so that what the command started ends with it.
    const child = execFile('/bin/sh', ['-c', command, 'offshoot', verb], {
      timeout: 0, maxBuffer: OUTPUT_BYTES_MAX, cwd: '/', encoding: 'utf8',
      env: { PATH: process.env['PATH'] ?? '/usr/sbin:/usr/bin:/sbin:/bin', OFFSHOOT_VERB: verb, OFFSHOOT_SNAPSHOT: reference, OFFSHOOT_TARGET: parts?.path ?? '', OFFSHOOT_NAME: parts?.snapshot ?? '' },
    }, (error, stdout, stderr) => {
      clearTimeout(timer);
      const output = shownOutput(stderr.trim() === '' ? stdout : stderr);
      if (error === null) resolve({ failure: null, output });
      else resolve({ failure: `${verb}: ${isLate ? `did not end within ${timeoutMs / 1000} s` : reasonOf(error)}${output === null ? '' : `: ${output}`}`, output });
    });
    let isLate = false;
    const timer = setTimeout(() => {
      isLate = true;
      child.kill('SIGKILL');
      // Whoever inherited its output would keep us waiting.
      child.stdout?.destroy();
      child.stderr?.destroy();
    }, timeoutMs);
  });
}

function reasonOf(error: Error & { readonly code?: unknown; readonly signal?: unknown }): string {
  if (typeof error.code === 'number') return `exit status ${error.code}`;
  return typeof error.signal === 'string' ? `ended by ${error.signal}` : error.message;
}

function shownOutput(text: string): string | null {
  const line = text.trim().replace(/[\p{Cc}\s]+/gu, ' ');
  if (line === '') return null;
  return line.length > SHOWN_CHARACTERS_MAX ? `${line.slice(0, SHOWN_CHARACTERS_MAX)}…` : line;
}
