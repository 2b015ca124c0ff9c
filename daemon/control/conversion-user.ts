/**
 * The user that qemu-img runs as, whether the daemon converts what is imported or the command line what is exported: one that owns nothing
 * on this machine but what it is handed.
 */
import { readFileSync } from 'node:fs';

/** A number that neither Debian nor systemd gives to anybody; where it does not exist (a container), the one that owns nothing. */
const CHILD_UID = 300_017;
const NOBODY_UID = 65_534;

/** What qemu-img is to read and write must be this user's. */
export function conversionUid(): number {
  const isMapped = (line: string): boolean => {
    const [first = 0, , count = 0] = line.trim().split(/\s+/u).map(Number);
    return CHILD_UID >= first && CHILD_UID < first + count;
  };
  return readFileSync('/proc/self/uid_map', 'utf8').split('\n').some(isMapped) ? CHILD_UID : NOBODY_UID;
}
