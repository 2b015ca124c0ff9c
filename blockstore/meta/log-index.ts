/**
 * Room for the index of SQLite's log (`offshoot.db-shm`), before anything is committed. Main thread only.
 *
 * SQLite lengthens that file while it commits, after the log itself is flushed. On a full file system such a commit is left in
 * doubt, and nothing more may be written by this process; with its room there, a full file system is met in the log, where a
 * commit fails whole. SQLite keeps the length for as long as anybody has the database open.
 */
import { closeSync, constants, openSync } from 'node:fs';

import { realDoor } from '../hot/door.js';

/** Enough for a log of 512 MiB: 32 KiB for each 4096 frames of a page. */
const INDEX_BYTES = 1024 * 1024;

/**
 * Returns what ends the reservation, to be called when the connection is closed and not before: locks of POSIX go with the
 * first descriptor of a file that a process closes, and SQLite's are on this one.
 */
export function reserveLogIndex(databasePath: string): () => void {
  let descriptor: number;
  try {
    descriptor = openSync(`${databasePath}-shm`, constants.O_RDWR | constants.O_NOFOLLOW);
  } catch {
    // Without it the store is as good as any other of SQLite's.
    return () => undefined;
  }
  // Full already: what is there is of use all the same.
  realDoor.fallocate('log-index-allocate', descriptor, 0, 0, INDEX_BYTES);
  return () => { closeSync(descriptor); };
}
