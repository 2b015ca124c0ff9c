/**
 * How a command fails: one line on standard error (with --json one object), perhaps a hint, and an exit code that scripts
 * can rely on. Further lines of a message, such as the last words of a process that died, follow indented.
 *
 * The exit code is the error kind's, from the one table that there is. 2 is also any wrong use of the command line. An
 * error that is the program's own fault is shown with its stack, for whoever has to report it.
 */
import { OffshootError, exitCodeOf, toOffshootError, type ErrorKind } from '../blockstore/errors.js';
import { visible } from '../daemon/control/paths.js';
import { hasColours, type CliIo } from './io.js';

/** What can be added to every message of a kind. Messages themselves already say what to do in the case at hand. */
const hints: Partial<Record<ErrorKind, string>> = {
  'permission-denied': 'offshoot needs root for the daemon, its socket and its store',
  'no-space': "offshoot daemon status shows what is free; offshoot rm frees what clones do not need",
  quota: 'offshoot quota ls shows the limits, offshoot df what takes the room',
  faulted: "offshoot show says why; reads of the disk go on",
  'store-damaged': 'nothing was changed; copy the store before you try anything with it',
  internal: 'this is a fault of offshoot, not yours: please report it with the lines above and the log of the daemon',
};

/** The verdicts of `check`; a faulted disk has the code of its kind. */
export const checkExitCodes = { corruption: 20, leaks: 21, incomplete: 22, faulted: exitCodeOf.faulted } as const;

/** A command that has said what it found, and whose exit code is the verdict; or an error with a code of its own. */
export class CheckExit extends Error {
  readonly code: number;
  readonly error: OffshootError | null;

  constructor(code: number, error: OffshootError | null = null) {
    super(`exit code ${code}`);
    this.code = code;
    this.error = error;
  }
}

/** The exit codes, as `offshoot --help` and API.md list them. */
export const exitCodeTable: readonly (readonly [number, string])[] = [
  [0, 'done'],
  [2, 'wrong usage, or a name, path or size that cannot be'],
  [3, 'not found'],
  [4, 'exists already'],
  [5, 'its state does not allow it (in use, not empty, a directory)'],
  [6, 'no permission'],
  [7, "no space in the store, or a container's limit is reached"],
  [8, 'not supported'],
  [9, 'I/O error, faulted disk, changed or unreachable source'],
  [10, 'the file is in another format than said'],
  [11, 'the store is in use by another daemon'],
  [12, 'the store is damaged or of a newer version'],
  [13, 'the daemon is not running'],
  [14, 'the mount point cannot be used'],
  [15, 'a program or library that is needed is missing'],
  [16, 'timed out'],
  [17, 'rebase: the disk has written where the new image differs from the old one'],
  [20, 'check: content is damaged'],
  [21, 'check: nothing is damaged, space is wasted'],
  [22, 'check: it could not be completed'],
  [70, 'a fault of offshoot'],
  [130, 'cancelled'],
];

/** Prints the error and gives the exit code. */
export function reportError(io: CliIo, json: boolean, thrown: unknown): number {
  if (thrown instanceof CheckExit && thrown.error === null) return thrown.code;
  const error = toOffshootError(thrown instanceof CheckExit ? thrown.error : thrown);
  const exitCode = thrown instanceof CheckExit ? thrown.code : exitCodeOf[error.kind];
  // Of what an operation says the daemon was reached.
  const hint = error.context['operationId'] === undefined ? hints[error.kind] ?? null : null;
  if (json) {
    io.stderr.write(`${JSON.stringify({ error: { kind: error.kind, message: error.message, exitCode, hint, context: error.context } })}\n`);
    return exitCode;
  }
  const name = hasColours(io, io.stderr) ? '\u001b[31moffshoot:\u001b[39m' : 'offshoot:';
  const [first = '', ...more] = error.message.split('\n');
  io.stderr.write(`${name} ${visible(first)}\n`);
  for (const line of more) io.stderr.write(`  ${visible(line)}\n`);
  if (error.kind === 'internal' && thrown instanceof Error && !(thrown instanceof OffshootError)) io.stderr.write(`${thrown.stack ?? ''}\n`);
  if (hint !== null) io.stderr.write(`  (${hint})\n`);
  return exitCode;
}
