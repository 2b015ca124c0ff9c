/**
 * Whether a program may be run as this daemon's server: an upgrade names a path, and what lies there is run with the daemon's rights.
 *
 * The control socket admits only who may do that anyway, but the file it names must not be somebody else's to exchange: the program
 * and every directory above it belong to root or to the daemon's user, and nobody else may write there.
 */
import { realpathSync, statSync, type Stats } from 'node:fs';
import { dirname } from 'node:path';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';

const STICKY = 0o1000;
const WRITABLE_BY_OTHERS = 0o022;

export function checkServerEntry(entry: string): void {
  let path: string;
  try {
    path = realpathSync(entry);
    if (!statSync(path).isFile()) throw new OffshootError('invalid-argument', `${entry} is not a file`);
  } catch (error) {
    const known = toOffshootError(error);
    throw new OffshootError(known.kind, `the new build has no server: ${known.message}`, { path: entry }, error);
  }
  for (let at = path; ; at = dirname(at)) {
    const found = statSync(at);
    if (!isTrusted(found)) {
      throw new OffshootError(
        'not-permitted',
        `the new build cannot be trusted: ${at} (owner ${found.uid}, mode ${(found.mode & 0o7777).toString(8)}) can be changed by others; ` +
          `install it where only root may write`,
        { path: at },
      );
    }
    if (at === dirname(at)) return;
  }
}

function isTrusted(found: Stats): boolean {
  if (found.uid !== 0 && found.uid !== process.geteuid?.()) return false;
  return (found.mode & WRITABLE_BY_OTHERS) === 0 || (found.isDirectory() && (found.mode & STICKY) !== 0);
}
