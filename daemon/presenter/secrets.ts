/**
 * Passwords of exports: in files of the administrator's, read when they are needed, never kept, never on a command line. Main thread of the server: by
 * asynchronous calls alone, for a path may lead under our own mount, and this thread would wait for itself.
 *
 * What was set with a server is noted as a keyed digest, so that a password that has changed is seen and one that has not is not set again.
 */
import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto';
import { constants, open, type FileHandle } from 'node:fs/promises';
import { isAbsolute, normalize } from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';

const BYTES_MAX = 64 * 1024;
const OTHERS = 0o077;
const SALT_BYTES = 16;

/** For `check`: the file is looked at when the export is shown. */
export function checkSecretPath(path: string, mountDir: string): void {
  if (!isAbsolute(path) || /[\0\n\r]/u.test(path)) throw new OffshootError('invalid-argument', `password-file is '${path}': give an absolute path`, { path });
  // Those who may read the store's files would have it, and it would be there only while the daemon serves.
  if (`${normalize(path)}/`.startsWith(`${mountDir}/`)) throw new OffshootError('invalid-argument', `password-file is '${path}', under the mount itself: put it elsewhere`, { path });
}

/** The lines of the file. Throws when others than its owner may read it, or when it is no small file. */
export async function readSecretLines(path: string): Promise<readonly string[]> {
  let file: FileHandle;
  try {
    file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    throw new OffshootError('invalid-argument', `the password file ${path} cannot be read (${(error as NodeJS.ErrnoException).code ?? ''}): make it, for nobody but root`, { path }, error);
  }
  try {
    const found = await file.stat();
    if (!found.isFile() || found.size > BYTES_MAX) throw new OffshootError('invalid-argument', `${path} is not a password file of at most ${BYTES_MAX} bytes`, { path });
    if (found.uid !== process.geteuid?.() || (found.mode & OTHERS) !== 0) {
      throw new OffshootError('not-permitted', `the password file ${path} is not ours alone: chown it to root, and chmod 0600`, { path });
    }
    return (await file.readFile('utf8')).split('\n').map((line) => line.replace(/\r$/u, '')).filter((line) => line !== '');
  } finally {
    await file.close();
  }
}

export function digestOf(secret: string): string {
  const salt = randomBytes(SALT_BYTES);
  return `${salt.toString('hex')}:${createHmac('sha256', salt).update(secret).digest('hex')}`;
}

export function isDigestOf(digest: string, secret: string): boolean {
  const [salt = '', sum = ''] = digest.split(':');
  const expected = createHmac('sha256', Buffer.from(salt, 'hex')).update(secret).digest();
  const given = Buffer.from(sum, 'hex');
  return given.length === expected.length && timingSafeEqual(given, expected);
}
