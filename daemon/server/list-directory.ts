/**
 * What lies in a directory, as the control API shows it; ten thousand entries are no reason for guests to wait.
 *
 * Main thread. Entries are read in batches by their ids, and other work goes on in between, so a listing is no moment of the store: what
 * comes while it is made is in it or not, as with readdir. Each entry is of one moment, and what is there all the time is there once.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';

import type { Store } from '../../blockstore/store.js';
import type { NodeInfo } from '../control/schemas.js';
import type { ControlViews } from './control-views.js';

/** A few milliseconds. */
const BATCH_ENTRIES = 500;

/** In no order that means anything. `path` is the directory's; null: the root. */
export async function listDirectory(store: Store, views: ControlViews, directoryId: number, path: string | null): Promise<NodeInfo[]> {
  const prefix = path === null ? '' : `${path}/`;
  const found: NodeInfo[] = [];
  for (let lastId = 0; ; ) {
    const batch = store.meta.listing.children(directoryId, lastId, BATCH_ENTRIES);
    for (const entry of batch) found.push(views.listed(entry, `${prefix}${entry.node.name}`));
    lastId = batch.at(-1)?.node.id ?? lastId;
    if (batch.length < BATCH_ENTRIES) return found;
    await nextTurn();
  }
}
