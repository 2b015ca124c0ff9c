/**
 * How much of what a disk does not own is data: the rest are holes of its source, which a fill never copies. Main thread.
 */
import { dataEnd, holeEnd } from './hot/seek.js';
import type { NodeRow } from './meta/rows.js';
import type { Store } from './store.js';
import { BLOCK_BYTES } from './units.js';

/** Extents looked at before the answer becomes "not known": a question must not hold up the main thread. */
const EXTENTS_MAX = 20_000;
const TIME_MS_MAX = 50;

/** Bytes of un-owned data; null when the source is too fragmented to say quickly, or cannot be read. */
export function unownedDataBytes(store: Store, node: NodeRow): number | null {
  if (node.layerId !== null && store.meta.layers.byId(node.layerId)?.complete === true) return 0;
  const { context, disks } = store;
  let disk;
  try {
    disk = disks.acquire(node.id).shared;
  } catch {
    // A source that is gone or changed: show says so elsewhere, and everything else about the disk can still be shown.
    return null;
  }
  try {
    const sizeBytes = disk.sizeBytes();
    const endBlock = Math.ceil(sizeBytes / BLOCK_BYTES);
    const active = disk.activeOrigin();
    const deadlineMs = performance.now() + TIME_MS_MAX;
    // Where the data that was found last ends: asking for a hole may cost the file system a look at every page.
    let dataOrigin = -1;
    let dataUntilBytes = 0;
    let sum = 0;
    let extents = 0;
    for (let block = 0; block < endBlock; ) {
      const origin = disk.originOf(context.shared, block);
      const runEnd = disk.runEnd(context.shared, block + 1, endBlock, origin);
      const to = Math.min(runEnd * BLOCK_BYTES, sizeBytes);
      for (let at = block * BLOCK_BYTES; origin !== active && at < to; ) {
        extents += 1;
        if (extents > EXTENTS_MAX || performance.now() > deadlineMs) return null;
        const isKnownData = origin === dataOrigin && at < dataUntilBytes;
        const data = isKnownData ? at : holeEnd(context, disk, origin, at, to);
        if (!isKnownData && data < to) {
          dataOrigin = origin;
          dataUntilBytes = dataEnd(context, disk, origin, data, sizeBytes);
        }
        const end = data >= to ? to : Math.min(to, dataUntilBytes);
        sum += end - data;
        at = Math.max(end, data);
      }
      block = runEnd;
    }
    return sum;
  } finally {
    disks.release(node.id);
  }
}
