/** Makes a file's data durable by its path, for files that nobody has open. Main thread. */
import fs from 'node:fs';

import { toOffshootError, type OffshootError } from './errors.js';

/**
 * fdatasync of the file; a file that was never made has nothing to sync. Null when its data is durable, the error when the
 * sync failed; a file that cannot be opened is thrown: that says nothing of its data.
 */
export function syncFile(file: string): OffshootError | null {
  let fd: number;
  try {
    fd = fs.openSync(file, fs.constants.O_RDWR);
  } catch (error) {
    if (toOffshootError(error).kind === 'not-found') return null;
    throw toOffshootError(error);
  }
  try {
    fs.fdatasyncSync(fd);
    return null;
  } catch (error) {
    return toOffshootError(error);
  } finally {
    fs.closeSync(fd);
  }
}
