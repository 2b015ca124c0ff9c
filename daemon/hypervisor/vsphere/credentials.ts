/**
 * Who we are at a vSphere: a user's name and a password, in a file that nobody else may read.
 *
 * The file is read for each login, so that a changed password needs no restart, and nothing keeps what it held. It is opened without
 * following a link and looked at through its descriptor: what was checked is what is read. The password goes nowhere but into
 * the login; `redact` takes it out of whatever the server says back.
 */
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';

export interface Credentials {
  readonly user: string;
  readonly password: string;
}

const FILE_BYTES_MAX = 4096;
const OTHERS_MASK = 0o077;
const MODE_MASK = 0o7777;

export function readCredentials(file: string): Credentials {
  let descriptor: number;
  try {
    descriptor = openSync(file, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    const { kind, message } = toOffshootError(error);
    throw new OffshootError(kind, `the credentials file for vSphere cannot be opened: ${message}`, { path: file }, error);
  }
  try {
    const stat = fstatSync(descriptor);
    if (!stat.isFile()) throw refused(file, 'it is no regular file');
    if ((stat.mode & OTHERS_MASK) !== 0) {
      throw refused(file, `its mode is ${(stat.mode & MODE_MASK).toString(8)}, so that others may reach it: chmod 600 it, and change the password`);
    }
    const mine = process.geteuid?.() ?? 0;
    if (stat.uid !== mine && stat.uid !== 0) throw refused(file, `it belongs to user ${stat.uid}, and not to root or to user ${mine}`);
    if (stat.size > FILE_BYTES_MAX) throw refused(file, `it has more than ${FILE_BYTES_MAX} bytes`);
    const bytes = Buffer.alloc(FILE_BYTES_MAX);
    const length = readSync(descriptor, bytes, 0, FILE_BYTES_MAX, 0);
    const [user = '', password = '', ...rest] = bytes.subarray(0, length).toString('utf8').split(/\r?\n/u);
    bytes.fill(0);
    if (user === '' || password === '' || rest.some((line) => line !== '')) {
      throw refused(file, 'it must hold two lines: the user, and the password');
    }
    return { user, password };
  } finally {
    closeSync(descriptor);
  }
}

/** A text of the server without the password, however it came to be in it. */
export function redact(text: string, { password }: Credentials): string {
  return text.replaceAll(password, '(redacted)').replaceAll(encodeURIComponent(password), '(redacted)');
}

function refused(file: string, reason: string): OffshootError {
  return new OffshootError('permission-denied', `the credentials file for vSphere, ${file}, is not used: ${reason}`, { path: file });
}
