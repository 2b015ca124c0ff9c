/**
 * Following long work in the daemon: asking again until it ends or the user interrupts.
 *
 * A server that is being restarted is no reason to give up: the work goes on when it is back. The first interrupt wakes
 * the loop at once and leaves it to the command what that means; the second ends the command on the spot.
 */
import { OffshootError, exitCodeOf } from '../blockstore/errors.js';
import type { CliIo } from './io.js';
import type { Progress, ProgressView } from './progress.js';

/** Fast enough for a bar, cheap for the daemon. */
const POLL_MS = 200;
/** How long a daemon may be away before following it is given up. */
export const AWAY_MS_MAX = 30_000;

export interface Interrupts {
  /** Aborted by the first interrupt. */
  readonly signal: AbortSignal;
  /** Gives the signals back to their default. Call it always. */
  release(): void;
}

/** `onSecond` says what is left behind and gives the terminal back, before the process ends. */
export function watchInterrupts(io: CliIo, onSecond: () => void): Interrupts {
  const controller = new AbortController();
  const release = io.onInterrupt(() => {
    if (!controller.signal.aborted) {
      controller.abort();
      return;
    }
    onSecond();
    io.exit(exitCodeOf.cancelled);
  });
  return { signal: controller.signal, release };
}

export interface FollowOptions<T> {
  readonly first: T;
  readonly ask: () => Promise<T>;
  readonly ended: (state: T) => boolean;
  readonly progress: (state: T) => Progress;
  readonly view: ProgressView;
  readonly signal: AbortSignal;
}

/** The last state seen: an end, unless the signal was aborted. */
export async function follow<T>(io: CliIo, options: FollowOptions<T>): Promise<T> {
  let state = options.first;
  let awaySinceMs: number | null = null;
  // Work that has ended at once needs no bar.
  while (!options.ended(state)) {
    options.view.update(options.progress(state));
    if (options.signal.aborted) return state;
    await io.sleep(POLL_MS, options.signal);
    if (isAborted(options.signal)) return state;
    try {
      state = await options.ask();
      awaySinceMs = null;
      if (options.ended(state)) options.view.update(options.progress(state));
    } catch (error) {
      if (!mayComeBack(error)) throw error;
      awaySinceMs ??= io.nowMs();
      if (io.nowMs() - awaySinceMs > AWAY_MS_MAX) throw error;
    }
  }
  return state;
}

function isAborted(signal: AbortSignal): boolean {
  return signal.aborted;
}

export function mayComeBack(error: unknown): boolean {
  return error instanceof OffshootError && (error.kind === 'daemon-not-running' || error.context['connectionBroken'] === true);
}
