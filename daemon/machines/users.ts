/**
 * A user by name or number, with all groups, as the machine's directory services know it: getent(1) and id(1), as children without a shell.
 */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

import { OffshootError } from '../../blockstore/errors.js';
import { shown } from '../filesystem/names.js';
import type { User } from './permissions.js';

const run = promisify(execFile);
const OPTIONS = { cwd: '/', env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' }, timeout: 10_000, maxBuffer: 1024 * 1024, encoding: 'utf8' } as const;

export async function userNamed(name: string): Promise<User> {
  // A name that begins with '-' would be an option; getent takes several with blanks between them.
  if (!/^[^-\s:\p{Cc}][^\s:\p{Cc}]*$/u.test(name)) throw unknown(name);
  const line = await outputOf('getent', ['passwd', '--', name], name);
  const [, uid, gid] = /^[^:]*:[^:]*:([0-9]+):([0-9]+):/u.exec(line) ?? [];
  if (uid === undefined || gid === undefined) throw unknown(name);
  const groups = await outputOf('id', ['-G', '--', name], name);
  return { uid: Number(uid), gid: Number(gid), groups: groups.trim().split(/\s+/u).map(Number) };
}

async function outputOf(program: string, args: readonly string[], name: string): Promise<string> {
  try {
    return (await run(program, args, OPTIONS)).stdout;
  } catch (thrown) {
    const { code } = thrown as { readonly code?: unknown };
    if (code === 'ENOENT') throw new OffshootError('tool-missing', `${program}, which knows the users of this host, is not there`, {}, thrown);
    if (typeof code === 'number') throw unknown(name);
    throw new OffshootError('timed-out', `${program} did not say who ${shown(name)} is: look at the host's directory service`, {}, thrown);
  }
}

function unknown(name: string): OffshootError {
  return new OffshootError('not-found', `there is no user ${shown(name)} on this host: look at the name again`, { user: name });
}
