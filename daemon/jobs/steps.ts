/**
 * Much work on the main thread, in steps between which everybody else's goes on.
 *
 * Each step is one call with a batch of the items, and is not interrupted; how many a batch holds follows from how long the last one
 * took: a transaction costs a flush of the device, so batches are not small, and a guest who opens a file waits for one of them at most.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';

/** A step that took longer is followed by one of half the size. */
const STEP_MS_MAX = 20;
const BATCH_FIRST = 8;
const BATCH_MAX = 256;

/** Calls `step` with all items, a batch at a time, in their order. `goOn`: asked between two steps. */
export async function inSteps<T>(items: readonly T[], step: (batch: readonly T[]) => void, goOn: () => boolean = () => true): Promise<void> {
  let size = BATCH_FIRST;
  for (let first = 0; first < items.length && goOn(); ) {
    const batch = items.slice(first, first + size);
    const beganMs = performance.now();
    step(batch);
    const tookMs = performance.now() - beganMs;
    first += batch.length;
    if (tookMs > STEP_MS_MAX) size = Math.max(1, Math.floor(size / 2));
    else if (tookMs < STEP_MS_MAX / 3) size = Math.min(BATCH_MAX, size * 2);
    if (first < items.length) await nextTurn();
  }
}
