/**
 * How a thread comes to its place in the data path: what the main thread hands it, and what it makes of that.
 */
import fs from 'node:fs';

import { HotContext } from './context.js';
import { mapShared, type Door } from './door.js';
import { JOURNAL_FILE_BYTES, Journal } from './journal.js';
import { SharedState, type SharedStateHandles } from './shared-state.js';

/** Posted to a thread as it starts. */
export interface ThreadBoot {
  readonly shared: SharedStateHandles;
  /** 0 is the main thread. */
  readonly thread: number;
  /** The thread's own ring on tmpfs, formatted and allocated by the main thread. */
  readonly journalPath: string;
}

export function createThreadContext(boot: ThreadBoot, door: Door, requestCommit: () => void): HotContext {
  const shared = new SharedState(boot.shared, boot.thread);
  const fd = fs.openSync(boot.journalPath, 'r+');
  const memory = mapShared(fd, JOURNAL_FILE_BYTES);
  fs.closeSync(fd);
  return new HotContext({ shared, door, journal: new Journal(memory, shared.journalTail(boot.thread)), requestCommit });
}
