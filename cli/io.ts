/**
 * The outside world of the command line, as one value: streams, environment, clock, signals, and the launcher of the
 * daemon. Commands touch the process only through it, so that tests run whole commands without one.
 *
 * A reader that goes away early (`offshoot ls | head`) ends the command quietly.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { CheckProgramOptions, OfflineCheckHooks } from '../daemon/control/offline-check.js';
import type { LaunchHooks, StartDaemonOptions, StartDaemonResult } from '../daemon/control/launch.js';
import type { CheckResult } from '../daemon/control/schemas.js';

export type CliStream = NodeJS.WritableStream & {
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
};

export interface CliIo {
  readonly stdout: CliStream;
  readonly stderr: CliStream;
  /** What comes in, piece by piece. Not touched before somebody asks. */
  readonly stdin: () => AsyncIterable<Uint8Array>;
  /** Nobody pipes anything in. */
  readonly stdinIsTerminal: () => boolean;
  /** From now on a reader of standard output who goes away early is an error. */
  readonly requireWholeOutput: () => void;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly cwd: () => string;
  /** Milliseconds of a clock that never goes back. */
  readonly nowMs: () => number;
  /** Resolves early, without error, when the signal is aborted. */
  readonly sleep: (durationMs: number, signal: AbortSignal) => Promise<void>;
  /** Calls the listener at each Ctrl-C (and SIGTERM, SIGHUP); gives what takes it away again. */
  readonly onInterrupt: (listener: () => void) => () => void;
  /** Ends the process at once. */
  readonly exit: (code: number) => void;
  /** True while a process with this id lives (a zombie does not). */
  readonly processLives: (pid: number) => boolean;
  readonly startDaemon: (options: StartDaemonOptions, hooks: Pick<LaunchHooks, 'onReady'>) => Promise<StartDaemonResult>;
  /** Checks a store that no daemon serves. */
  readonly checkOffline: (options: Omit<CheckProgramOptions, 'mode'>, hooks: OfflineCheckHooks) => Promise<CheckResult>;
}

export async function sleepMs(durationMs: number, signal: AbortSignal): Promise<void> {
  try {
    await delay(durationMs, undefined, { signal });
  } catch (error) {
    if (!signal.aborted) throw error;
  }
}

/** Whether a stream's reader sees colours and a cursor that moves. */
export function isTerminal(io: CliIo, stream: CliStream): boolean {
  return stream.isTTY === true && io.env['TERM'] !== 'dumb';
}

export function hasColours(io: CliIo, stream: CliStream): boolean {
  return isTerminal(io, stream) && (io.env['NO_COLOR'] ?? '') === '';
}
