/**
 * The process of a machine, and the directory on tmpfs that it runs in: `pid`, `qmp`, `agent`, `console.log`.
 *
 * QEMU writes its pid file itself and takes it away when it ends in order, whatever the reason (the guest powered off, SIGTERM, an error of
 * its own); it stays when the process was killed or has crashed. So what has become of a machine can be told by whoever comes later, without
 * having been there: no file: off; a file and no such process: crashed. A power loss takes the files along.
 *
 * The directory belongs to the machine's user, for QEMU never runs as anybody else. So what lies in it is not believed: a process is the
 * machine's only if it is of that user and was started with this very pid file, and files are removed by their names, never as a tree.
 */
import { chmodSync, chownSync, closeSync, constants, lstatSync, mkdirSync, openSync, readSync, readdirSync, rmdirSync, statSync, unlinkSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';

export interface RuntimePaths {
  readonly directory: string;
  readonly pidFile: string;
  readonly qmpSocket: string;
  readonly agentSocket: string;
}

export type ProcessState = { readonly kind: 'off' } | { readonly kind: 'crashed' } | { readonly kind: 'running'; readonly pid: number };

interface Owner {
  readonly uid: number;
  readonly gid: number;
}

/** Of the kernel, for the path of a unix socket. */
const SOCKET_PATH_BYTES_MAX = 107;
const PID_BYTES_MAX = 32;
/** Passable for the machines' users, who come to their own directories through it. */
const BASE_MODE = 0o711;
const MACHINE_MODE = 0o700;

export function runtimePathsOf(runtimeDir: string, externalId: string): RuntimePaths {
  const directory = join(runtimeDir, externalId);
  return {
    directory,
    pidFile: join(directory, 'pid'),
    qmpSocket: join(directory, 'qmp'),
    agentSocket: join(directory, 'agent'),
  };
}

/** Makes the machine's directory, or gives it to the user whom the machine belongs to now. */
export function prepareRuntime(runtimeDir: string, paths: RuntimePaths, owner: Owner): void {
  const longest = Math.max(Buffer.byteLength(paths.qmpSocket), Buffer.byteLength(paths.agentSocket));
  if (longest > SOCKET_PATH_BYTES_MAX) {
    throw new OffshootError('name-too-long',
      `the path of a socket in ${paths.directory} has ${longest} bytes, and the kernel takes ${SOCKET_PATH_BYTES_MAX}: use a shorter run-time directory`, { path: paths.directory });
  }
  try {
    makeDirectory(runtimeDir, BASE_MODE);
    const base = lstatSync(runtimeDir);
    if (!base.isDirectory() || base.uid !== process.geteuid?.() || (base.mode & 0o022) !== 0) {
      throw new OffshootError('not-permitted', `${runtimeDir} is not a directory that only this user may write to`, { path: runtimeDir });
    }
    // The daemon's umask has closed it to the machines' users.
    chmodSync(runtimeDir, BASE_MODE);
    makeDirectory(paths.directory, MACHINE_MODE);
    if (lstatSync(paths.directory).uid !== owner.uid) clearRuntime(paths, 'keep-directory');
    chownSync(paths.directory, owner.uid, owner.gid);
  } catch (error) {
    throw toOffshootError(error);
  }
}

/** Takes away what a machine that is off left. What else its user has put there stays. */
export function clearRuntime(paths: RuntimePaths, directory: 'keep-directory' | 'remove-directory' = 'remove-directory'): void {
  for (const path of [paths.pidFile, paths.qmpSocket, paths.agentSocket]) ignoring(['ENOENT', 'ENOTDIR', 'EISDIR', 'EPERM'], () => { unlinkSync(path); });
  if (directory === 'remove-directory') ignoring(['ENOENT', 'ENOTEMPTY'], () => { rmdirSync(paths.directory); });
}

/** Takes away the directory of all machines when it holds none any more. A start makes it again, without a moment between it and its machine's. */
export function leaveRuntime(runtimeDir: string): void {
  ignoring(['ENOENT', 'ENOTEMPTY'], () => { rmdirSync(runtimeDir); });
}

/** An orderly end leaves no pid file; this makes one of an end that was asked for. */
export function forgetProcess(paths: RuntimePaths): void {
  ignoring(['ENOENT', 'ENOTDIR'], () => { unlinkSync(paths.pidFile); });
}

export async function processState(paths: RuntimePaths, owner: Owner): Promise<ProcessState> {
  const pid = readPid(paths.pidFile);
  if (pid === null) return { kind: 'off' };
  return await isMachine(pid, paths, owner) ? { kind: 'running', pid } : { kind: 'crashed' };
}

/** SIGKILL, if it is the machine's process indeed. */
export async function killProcess(paths: RuntimePaths, owner: Owner): Promise<void> {
  const state = await processState(paths, owner);
  if (state.kind !== 'running') return;
  ignoring(['ESRCH'], () => { process.kill(state.pid, 'SIGKILL'); });
}

/** Null when there is no pid file. A file with anything else than a number gives 0, which is no process. */
function readPid(pidFile: string): number | null {
  let fd: number;
  try {
    // Neither a link nor a pipe of the user's can send us elsewhere, or hold us.
    fd = openSync(pidFile, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return null;
    if (code === 'ELOOP') return 0;
    throw toOffshootError(error);
  }
  try {
    const bytes = Buffer.alloc(PID_BYTES_MAX);
    const text = bytes.toString('latin1', 0, readSync(fd, bytes, 0, PID_BYTES_MAX, 0)).trim();
    return /^[1-9][0-9]{0,9}$/u.test(text) ? Number(text) : 0;
  } catch {
    // A pipe or a directory: not QEMU's.
    return 0;
  } finally {
    closeSync(fd);
  }
}

/**
 * A process that has ended and that nobody has waited for has an empty command line. Never read on the main thread: whoever reads it holds the
 * process's memory, and may be the one who has to take it down, which waits for what the machine has in flight on our own mount.
 */
export async function isMachine(pid: number, paths: RuntimePaths, owner: Owner): Promise<boolean> {
  if (pid <= 1) return false;
  try {
    return statSync(`/proc/${pid}`).uid === owner.uid && (await readFile(`/proc/${pid}/cmdline`, 'utf8')).split('\0').includes(paths.pidFile);
  } catch {
    // It has ended, or was never there.
    return false;
  }
}

/** Killed, and not out of the kernel yet: its first thread has ended, and another, which holds its disks open still, has not. */
export async function isDying(pid: number): Promise<boolean> {
  try {
    const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
    return stat.slice(stat.lastIndexOf(')') + 2).startsWith('Z') && readdirSync(`/proc/${pid}/task`).length > 1;
  } catch {
    return false;
  }
}

function makeDirectory(path: string, mode: number): void {
  ignoring(['EEXIST'], () => { mkdirSync(path, { mode }); });
}

function ignoring(codes: readonly string[], act: () => void): void {
  try {
    act();
  } catch (error) {
    if (!codes.includes((error as NodeJS.ErrnoException).code ?? '')) throw toOffshootError(error);
  }
}
