/**
 * Where run-time state lies: what must outlive a server but not the machine's power.
 *
 * The first-touch journal, the negotiated INIT, the open handles and the holder's own report live on tmpfs. That is the
 * promise this file keeps: after a power loss they are gone together with the page cache that they speak of, and can
 * never be believed wrongly. A base that is not tmpfs is therefore refused, never merely warned about.
 *
 * The directory is named after the store, so that a daemon started after its whole predecessor was killed finds the
 * journal of writes that were acknowledged and not yet committed. `/dev/shm` is writable by everybody: each directory is
 * checked to be our own and closed to others before anything in it is trusted. Runs in the holder; the server is told
 * the path. What the files hold is not known here.
 */
import { createHash } from 'node:crypto';
import { lstatSync, mkdirSync, readdirSync, realpathSync, rmSync, rmdirSync, statfsSync } from 'node:fs';
import { isAbsolute, join } from 'node:path';

import { OffshootError, toOffshootError } from '../blockstore/errors.js';

const TMPFS_MAGIC = 0x01021994;
const BASE_VARIABLE = 'OFFSHOOT_RUNTIME_DIR';
const DEFAULT_BASES = ['/run', '/dev/shm'] as const;
/** What the store's first-touch journal is kept in: the only files that mean anything to the next mount. */
const JOURNAL_PREFIX = 'journal-';

type Environment = Readonly<Record<string, string | undefined>>;

/** The run-time directory of the store, which must exist. Makes nothing. */
export function runtimeDirectoryFor(storeDir: string, environment: Environment = process.env): string {
  const key = createHash('sha256').update(realpathSync(storeDir)).digest('hex').slice(0, 16);
  return join(runtimeBase(environment), 'offshoot', key);
}

/** Makes the run-time directory, or takes over the one that an earlier daemon of this store left. */
export function createRuntimeDirectory(storeDir: string, environment: Environment = process.env): string {
  const directory = runtimeDirectoryFor(storeDir, environment);
  // The parent may also hold the control socket, whose clients must be able to pass.
  makeOwnDirectory(join(directory, '..'), 0o755);
  makeOwnDirectory(directory, 0o700);
  return directory;
}

/**
 * Forgets what belonged to a mount that is gone: handles, the negotiated INIT and the numbers of requests begin anew with each
 * mount. Keeps the journal, which speaks of the store.
 */
export function discardSession(runtimeDir: string): void {
  for (const name of readdirSync(runtimeDir)) {
    if (!name.startsWith(JOURNAL_PREFIX)) rmSync(join(runtimeDir, name), { force: true, recursive: true });
  }
}

/** Forgets everything. Only after a server that committed and closed the store in an orderly way. */
export function removeRuntimeDirectory(runtimeDir: string): void {
  rmSync(runtimeDir, { recursive: true, force: true });
}

/** Takes the directory away if nothing of worth is in it: after a start that failed. */
export function leaveRuntimeDirectory(runtimeDir: string): void {
  discardSession(runtimeDir);
  if (readdirSync(runtimeDir).length === 0) rmdirSync(runtimeDir);
}

function runtimeBase(environment: Environment): string {
  const asked = environment[BASE_VARIABLE];
  if (asked !== undefined && asked !== '') {
    if (!isAbsolute(asked)) {
      throw new OffshootError('invalid-argument', `${BASE_VARIABLE} is '${asked}': give an absolute path`, { path: asked });
    }
    if (!isTmpfs(asked)) {
      throw new OffshootError(
        'invalid-argument',
        `${BASE_VARIABLE} is ${asked}, which is not a directory on a tmpfs: run-time state must not outlive a power loss; ` +
          `mount a tmpfs there, or unset the variable`,
        { path: asked },
      );
    }
    return asked;
  }
  const base = DEFAULT_BASES.find(isTmpfs);
  if (base === undefined) {
    throw new OffshootError(
      'not-supported',
      `neither ${DEFAULT_BASES.join(' nor ')} is a tmpfs: mount one somewhere and name it in ${BASE_VARIABLE}`,
    );
  }
  return base;
}

function isTmpfs(directory: string): boolean {
  try {
    return statfsSync(directory).type === TMPFS_MAGIC;
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'ENOTDIR') return false;
    throw toOffshootError(error);
  }
}

function makeOwnDirectory(path: string, mode: number): void {
  try {
    mkdirSync(path, { mode });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') {
      const kind = toOffshootError(error).kind;
      throw new OffshootError(
        kind,
        `cannot make the run-time directory ${path}: ${(error as Error).message}; ` +
          `run as root, or name a tmpfs of your own in ${BASE_VARIABLE}`,
        { path },
        error,
      );
    }
  }
  const found = lstatSync(path);
  if (!found.isDirectory() || found.uid !== process.geteuid?.() || (found.mode & 0o022) !== 0) {
    throw new OffshootError(
      'not-permitted',
      `the run-time directory ${path} is not a directory of this user that only this user may write to: ` +
        `name a tmpfs of your own in ${BASE_VARIABLE}, or remove it if it should not be there`,
      { path },
    );
  }
}
