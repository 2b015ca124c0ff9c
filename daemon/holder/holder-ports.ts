/** What the holder's conduct stands on: everything that touches the system, so that each of its paths is tested without a mount. */
import type { OffshootError } from '../../blockstore/errors.js';
import type { HolderLog } from './holder-log.js';
import type { HolderState } from './holder-state.js';
import type { HolderMessage, ServerMessage } from './ipc.js';

/** How a server ended. Neither code nor signal: it could not be started at all, and `error` says why. */
export interface ServerExit {
  readonly code: number | null;
  readonly signal: string | null;
  readonly error?: string;
}

export interface ServerProcess {
  /** 0 when it could not be started; `gone` follows. */
  readonly pid: number;
  send(message: HolderMessage): void;
  kill(): void;
}

export interface ServerEvents {
  message(message: ServerMessage): void;
  /** Once, when the process and all its threads are gone and all its messages have been delivered. */
  gone(exit: ServerExit): void;
}

export type UnmountOutcome = { readonly unmounted: true } | { readonly unmounted: false; readonly message: string };

export interface ServerStart {
  readonly restarts: number;
  /** Load, say hello, and wait for `go`. */
  readonly standby: boolean;
  /** Another build's program; null: the server that this holder was started with. */
  readonly entry: string | null;
}

export interface HolderPorts {
  /** Of this process. */
  readonly version: string;
  /** Whether a spare is kept: not where the mount dies with its server, or memory matters more than the stall. */
  readonly keepsSpare: boolean;
  /** False where the server mounts for itself: then the mount dies with it. */
  readonly keepsTheMount: boolean;
  /** For a mount that was taken over from a holder that died: the number of its last server. Null for a new mount. */
  readonly takenOverAfter: number | null;
  readonly spawnServer: (start: ServerStart, events: ServerEvents) => ServerProcess;
  /** Throws when the program may not be run as a server. */
  readonly checkServerEntry: (entry: string) => void;
  readonly processState: (pid: number) => string;
  readonly unmount: (force: boolean) => UnmountOutcome;
  readonly isMounted: () => boolean;
  readonly publish: (state: HolderState) => void;
  log: HolderLog;
  /** A clock that never goes backwards. */
  readonly nowMs: () => number;
  readonly wallClock: () => string;
  /** Returns what cancels it. */
  readonly schedule: (delayMs: number, body: () => void) => () => void;
  /** The first server is ready; called once. */
  readonly ready: (serverPid: number) => void;
  /** Called once; nothing is done after it. */
  readonly ended: (end: HolderEnd) => void;
}

export type HolderEnd =
  /** The mount is gone and the store is closed: nothing of the run-time state is needed any more. */
  | { readonly kind: 'finished' }
  /** The mount is gone, but no server could close the store: the journal must be kept for the next daemon. */
  | { readonly kind: 'abandoned' }
  /** The first server never became ready. */
  | { readonly kind: 'not-started'; readonly error: OffshootError };

export function describeExit(exit: ServerExit): string {
  if (exit.error !== undefined) return `could not be started (${exit.error})`;
  return exit.signal === null ? `ended with code ${exit.code ?? 'unknown'}` : `was killed by ${exit.signal}`;
}
