/**
 * One daemon at a time: an flock on STORE/lock, held by an open descriptor that the holder keeps and every server inherits.
 *
 * The lock belongs to the open file description, so it is released exactly when the last of these processes is gone, however it
 * ended; nothing has to be cleaned up and no process id has to be believed. The id written in the file is for messages only.
 */
import { closeSync, constants, fstatSync, ftruncateSync, openSync, readFileSync, statSync, unlinkSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import koffi from 'koffi';

import { Errno, OffshootError, toOffshootError } from '../../blockstore/errors.js';

const LOCK_EX = 2;
const LOCK_NB = 4;
const FILE_NAME = 'lock';
const RETRY_MS = 100;
const DYING_TRIES = 100;

const libc = koffi.load('libc.so.6');
const sysFlock = libc.func('int flock(int fd, int operation)') as unknown as (fd: number, operation: number) => number;

export interface StoreLock {
  /** Descriptor of the locked file; closing it, and every inherited copy, releases the lock. */
  readonly fd: number;
  readonly path: string;
  /** The file was not there before. */
  readonly isNew: boolean;
}

/** Takes the lock of the store, or throws `store-locked`. */
export function lockStore(storeDir: string): StoreLock {
  const path = join(storeDir, FILE_NAME);
  for (;;) {
    const { fd, isNew } = openLockFile(path);
    try {
      if (!tryLock(fd)) throw lockedError(storeDir, path);
      if (isStillThere(fd, path)) {
        writeOwner(fd);
        return { fd, path, isNew };
      }
    } catch (error) {
      closeSync(fd);
      throw error;
    }
    // Somebody whose start failed removed the file between our open and our lock: what we hold is no longer the lock.
    closeSync(fd);
  }
}

/**
 * Takes the lock, and waits for whoever just ends: `triesMax` times for any daemon, and longer for one whose holder is dead, as its servers are then on
 * their way out: one that was being started sees it only when it is loaded. A server that goes on serving without its holder keeps the lock, and is named.
 */
export async function lockStoreSoon(storeDir: string, triesMax: number, triesMaxOfDying = DYING_TRIES): Promise<StoreLock> {
  for (let tries = 1; ; tries += 1) {
    try {
      return lockStore(storeDir);
    } catch (error) {
      if (!(error instanceof OffshootError) || error.kind !== 'store-locked') throw error;
      if (tries >= Math.max(triesMax, error.context['holderIsGone'] === true ? triesMaxOfDying : 1)) throw error;
    }
    await new Promise((settle) => setTimeout(settle, RETRY_MS));
  }
}

/** Releases the lock of a start that failed, and takes its file away if that start made it. */
export function undoStoreLock(lock: StoreLock): void {
  if (lock.isNew) unlinkSync(lock.path);
  closeSync(lock.fd);
}

/** True when the lock on an open file or directory could be had at once. */
export function tryLock(fd: number): boolean {
  if (sysFlock(fd, LOCK_EX | LOCK_NB) === 0) return true;
  const code = koffi.errno();
  if (code === Errno.EAGAIN) return false;
  throw new OffshootError('io-error', `flock failed with errno ${code}: the file system must support flock`, { errno: code });
}

function openLockFile(path: string): { readonly fd: number; readonly isNew: boolean } {
  const { O_RDWR, O_CREAT, O_EXCL, O_NOFOLLOW, O_NONBLOCK } = constants;
  try {
    return { fd: openSync(path, O_RDWR | O_CREAT | O_EXCL, 0o600), isNew: true };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw lockFileError(path, error);
  }
  try {
    return { fd: openSync(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK, 0o600), isNew: false };
  } catch (error) {
    throw lockFileError(path, error);
  }
}

function lockFileError(path: string, error: unknown): OffshootError {
  const known = toOffshootError(error);
  return new OffshootError(known.kind, `cannot open the store's lock file: ${known.message}`, { path }, error);
}

function isStillThere(fd: number, path: string): boolean {
  const held = fstatSync(fd);
  const there = statSync(path, { throwIfNoEntry: false });
  return there?.ino === held.ino && there.dev === held.dev;
}

function writeOwner(fd: number): void {
  const text = `${process.pid}\n`;
  try {
    writeSync(fd, text, 0);
    ftruncateSync(fd, text.length);
  } catch (error) {
    // A full store must still be served, if only so that something can be removed from it.
    if (toOffshootError(error).kind !== 'no-space') throw error;
  }
}

function lockedError(storeDir: string, path: string): OffshootError {
  const owner = Number.parseInt(readFileSync(path, 'utf8'), 10);
  if (!Number.isSafeInteger(owner)) {
    return new OffshootError('store-locked', `store in use by another daemon: ${storeDir}; stop that daemon first`, { storeDir });
  }
  const holderIsGone = !isAlive(owner);
  const advice = !holderIsGone
    ? `stop that daemon first ('offshoot daemon stop')`
    : `its holder has died, but a server that it started still runs; stop that server first ('fuser ${path}' names it)`;
  return new OffshootError('store-locked', `store in use by another daemon (pid ${owner}): ${storeDir}; ${advice}`, {
    storeDir,
    pid: owner,
    ...(holderIsGone ? { holderIsGone } : {}),
  });
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
