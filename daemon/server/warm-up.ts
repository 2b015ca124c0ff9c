/**
 * What the first answer does not need, and a later one might: loaded once the server is ready, a piece at a time.
 *
 * Main thread. Loading holds the thread up for some milliseconds a piece, so guests' requests come first: between two pieces the thread is
 * free for a while. Without this the first call that needs a piece would wait for all of it, and whoever opens a disk meanwhile with it. A
 * server on standby has nobody to wait for and loads them at once. Everything of ours is loaded in the end, also what is hardly ever asked for: a
 * server that runs for months must not load a part of itself from a later build that was installed in its place.
 */
import { setTimeout as pause } from 'node:timers/promises';

import { preloadCompilers } from '../control/lazy-schemas.js';
import { loadReceiveHeader } from './transfers.js';

export type Piece = () => unknown;

/** In the order in which they are likely to be wanted. */
export const LATE_PIECES: readonly Piece[] = [
  ...preloadCompilers,
  () => import('./metrics.js'),
  loadReceiveHeader,
  () => import('../control/openapi.js'),
];

/** The command that started the daemon is about to end, and others may follow it at once: they come first, too. */
const FIRST_PAUSE_MS = 250;
const PAUSE_MS = 50;

/** Loads one after another; resolves when all are there, or `signal` was aborted. */
export async function warmUp(pieces: readonly Piece[], signal: AbortSignal): Promise<void> {
  let pauseMs = FIRST_PAUSE_MS;
  for (const piece of pieces) {
    try {
      await pause(pauseMs, undefined, { signal, ref: false });
    } catch (error) {
      if (signal.aborted) return;
      throw error;
    }
    await piece();
    pauseMs = PAUSE_MS;
  }
}
