/** Programs of the host that work on block devices: bounded in time, and an error that says what they said. Main thread. */
import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import { runChild, type ChildResult } from '../programs/child.js';

/** None of them takes long unless the store does; a copy has its own time. */
export const PROGRAM_TIMEOUT_MS = 120_000;

/** Of setpriv, as of env(1). */
const NOT_FOUND = 127;

export interface ProgramOptions {
  readonly signal: AbortSignal;
  readonly input?: string;
  readonly timeoutMs?: number;
}

/** Throws `failure` when it ends with anything but 0. */
export async function runProgram(program: string, args: readonly string[], options: ProgramOptions, failure: ErrorKind = 'io-error'): Promise<ChildResult> {
  const { signal, input, timeoutMs } = options;
  // It ends with the server: what a dead one had begun must not be done behind the back of the next, which undoes it.
  const result = await runChild('setpriv', ['--pdeathsig', 'KILL', '--', program, ...args], { signal, timeoutMs: timeoutMs ?? PROGRAM_TIMEOUT_MS, ...(input === undefined ? {} : { input }) });
  if (result.code === 0) return result;
  if (result.code === NOT_FOUND) throw new OffshootError('tool-missing', `${program} is not on this host: install its package`, { program });
  throw new OffshootError(isFull(result) ? 'no-space' : failure, `${program} failed: ${saidBy(result)}`, { program, code: result.code });
}

/** What it said last, on one line. */
export function saidBy({ stderr, stdout, code, endedBy }: ChildResult): string {
  const lines = (stderr.trim() === '' ? stdout : stderr).split('\n').map((line) => line.trim()).filter((line) => line !== '');
  return lines.length === 0 ? (endedBy === null ? `exit code ${code ?? 0}` : `ended by ${endedBy}`) : lines.slice(-3).join('; ').slice(0, 500);
}

function isFull({ stderr }: ChildResult): boolean {
  return stderr.includes('No space left on device');
}
