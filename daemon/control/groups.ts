/**
 * Names of groups into numbers, by getent(1): whatever the machine's directory services know, not only /etc/group.
 *
 * Runs in the command that starts a daemon. A number is taken as it is, whether a group has it or not.
 */
import { spawnSync } from 'node:child_process';
import { OffshootError } from '../../blockstore/errors.js';
import { visible } from './paths.js';

const GETENT_TIMEOUT_MS = 10_000;
const GID_MAX = 0xffff_fffe;

export function groupId(nameOrNumber: string): number {
  if (/^[0-9]+$/u.test(nameOrNumber)) {
    const gid = Number(nameOrNumber);
    if (gid <= GID_MAX) return gid;
    throw new OffshootError('invalid-argument', `${nameOrNumber} is too large for a group number: give the name or number of a group`);
  }
  // A name that begins with '-' would be taken for an option.
  const isName = nameOrNumber !== '' && !nameOrNumber.startsWith('-') && !/[\0:\n]/u.test(nameOrNumber);
  const found = isName ? spawnSync('getent', ['group', nameOrNumber], { encoding: 'utf8', timeout: GETENT_TIMEOUT_MS, maxBuffer: 16 * 1024 * 1024 }) : undefined;
  if (found?.error !== undefined) {
    throw new OffshootError('tool-missing', `getent, which knows the numbers of groups, cannot be run: ${found.error.message}; give the group's number`, {}, found.error);
  }
  const gid = /^[^:]*:[^:]*:([0-9]+):/u.exec(found?.stdout ?? '')?.[1];
  if (found?.status !== 0 || gid === undefined) {
    throw new OffshootError('not-found', `there is no group ${visible(nameOrNumber)}: make it (groupadd --system ${visible(nameOrNumber)}), or give another`, { group: nameOrNumber });
  }
  return Number(gid);
}
