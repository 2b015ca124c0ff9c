/**
 * What must be true before a daemon may start: each check says what is wrong and what to do, and changes nothing.
 *
 * Runs once, in the holder, before anything is mounted. A mount point is never looked into before the kernel's mount table has
 * said that nothing is mounted there: another daemon may be hung behind it, and a stat would hang with it.
 * Locks, and the order in which all this is done and undone, are `start.ts`'s.
 */
import {
  accessSync,
  chmodSync,
  constants,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readlinkSync,
  realpathSync,
  statSync,
  type Stats,
} from 'node:fs';
import { connect } from 'node:net';
import { endianness, release } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { DEFAULT_SOCKET_PATH } from '../control/limits.js';
import { visible } from '../control/paths.js';
import { checkSocketPath } from '../control/socket-path.js';
import { requestTimeouts } from '../transport/kernel/mount.js';
import type { Transport } from './options.js';

/** The first kernel that resends unanswered requests to a restarted server. */
const KERNEL_MIN = { major: 6, minor: 9 } as const;
const SOCKET_ANSWER_MS_MAX = 1_000;
/** As many links as the kernel follows in one path. */
const LINKS_MAX = 40;

/** Refuses a machine that cannot run the daemon; returns what people should know about one that can. */
export function checkMachine(transport: Transport): readonly string[] {
  if (endianness() !== 'LE') {
    throw new OffshootError('not-supported', 'this machine is big-endian: offshoot runs on little-endian machines only');
  }
  if (!existsSync('/dev/fuse')) {
    throw new OffshootError('tool-missing', `there is no /dev/fuse: load the kernel's module ('modprobe fuse'), or give it to this container`);
  }
  if (transport !== 'kernel') return [];
  if (process.geteuid?.() !== 0) {
    throw new OffshootError('permission-denied', 'only root can mount with the kernel transport: run this command as root');
  }
  checkKernel(release());
  return requestTimeouts().map(
    ({ name, seconds }) =>
      `sysctl ${name} is ${seconds}: the kernel ends the mount, and every guest's disk with it, when one request waits that long; set it to 0`,
  );
}

export function checkKernel(version: string): void {
  const [, major = '0', minor = '0'] = /^(\d+)\.(\d+)/u.exec(version) ?? [];
  if (Number(major) > KERNEL_MIN.major || (Number(major) === KERNEL_MIN.major && Number(minor) >= KERNEL_MIN.minor)) return;
  throw new OffshootError(
    'not-supported',
    `kernel ${version} is too old: the kernel transport needs Linux ${KERNEL_MIN.major}.${KERNEL_MIN.minor} or newer; ` +
      `upgrade the kernel, or use --transport fuse-native`,
    { kernel: version },
  );
}

/** The store's directory without symbolic links, and whether it is there yet. */
export function checkStore(storeDir: string): { readonly path: string; readonly exists: boolean } {
  checkText(storeDir, 'the store');
  const found = statOf(storeDir);
  if (found === undefined) {
    const parent = dirname(resolve(storeDir));
    if (statOf(parent)?.isDirectory() !== true) {
      throw new OffshootError('not-found', `cannot make the store ${storeDir}: ${parent} is not a directory; make it first`, { storeDir });
    }
    checkWritable(parent, `cannot make the store in ${parent}`);
    return { path: join(realpathSync(parent), basename(resolve(storeDir))), exists: false };
  }
  if (!found.isDirectory()) {
    throw new OffshootError('not-a-directory', `the store ${storeDir} is not a directory: name a directory, or one that is to be made`, { storeDir });
  }
  checkWritable(storeDir, `the store ${storeDir} cannot be used`);
  if ((found.mode & 0o022) !== 0) {
    throw new OffshootError(
      'not-permitted',
      `the store ${storeDir} may be written to by other users (mode ${(found.mode & 0o7777).toString(8)}): ` +
        `use a directory of its own, with 'chmod 0700'`,
      { storeDir },
    );
  }
  return { path: realpathSync(storeDir), exists: true };
}

/** The mount point without symbolic links. Does not look into it: something may be mounted there. */
export function resolveMountPoint(mountDir: string, isMountPoint: (path: string) => boolean): string {
  checkText(mountDir, 'the mount point');
  let path = resolve(mountDir);
  for (let links = 0; links < LINKS_MAX; links += 1) {
    const parent = dirname(path);
    if (statOf(parent)?.isDirectory() !== true) throw mountPointMissing(mountDir);
    path = join(realpathSync(parent), basename(path));
    if (isMountPoint(path)) return path;
    const found = lstatSync(path, { throwIfNoEntry: false });
    if (found === undefined) throw mountPointMissing(mountDir);
    if (!found.isSymbolicLink()) return path;
    path = resolve(dirname(path), readlinkSync(path));
  }
  throw new OffshootError('mount-unusable', `the mount point ${mountDir} is a loop of symbolic links`, { mountDir });
}

/** For a mount point that nothing is mounted on. */
export function checkMountPoint(mountDir: string): void {
  const found = statOf(mountDir);
  if (found === undefined) throw mountPointMissing(mountDir);
  if (!found.isDirectory()) {
    throw new OffshootError('mount-unusable', `the mount point ${mountDir} is not a directory: name an empty directory`, { mountDir });
  }
  const entries = readdirSync(mountDir).length;
  if (entries > 0) {
    throw new OffshootError(
      'mount-unusable',
      `the mount point ${mountDir} is not empty (${entries} ${entries === 1 ? 'entry' : 'entries'}): the mount would hide what is in it; name an empty directory`,
      { mountDir },
    );
  }
}

/** Store and mount must not lie in each other, nor the socket in the mount: the daemon would wait for itself. */
export function checkApart(storeDir: string, mountDir: string, socketPath: string): void {
  if (isWithin(storeDir, mountDir)) {
    throw new OffshootError(
      'invalid-argument',
      storeDir === mountDir
        ? `the store and the mount point are the same directory, ${storeDir}: name two`
        : `the store ${storeDir} lies inside the mount point ${mountDir}, which would hide it: name directories that lie apart`,
      { storeDir, mountDir },
    );
  }
  if (isWithin(mountDir, storeDir)) {
    throw new OffshootError(
      'invalid-argument',
      `the mount point ${mountDir} lies inside the store ${storeDir}, which belongs to the daemon alone: name directories that lie apart`,
      { storeDir, mountDir },
    );
  }
  if (isWithin(socketPath, mountDir)) {
    throw new OffshootError(
      'invalid-argument',
      `the control socket ${socketPath} lies inside the mount point ${mountDir}, which would hide it: name another with --socket`,
      { socketPath, mountDir },
    );
  }
}

/** The socket's path without symbolic links in its directory; nobody listens there. */
export async function checkSocket(socketPath: string): Promise<string> {
  checkText(socketPath, 'the control socket');
  checkSocketPath(socketPath);
  const directory = dirname(socketPath);
  if (statOf(directory) === undefined && directory === dirname(DEFAULT_SOCKET_PATH)) return socketPath;
  if (statOf(directory)?.isDirectory() !== true) {
    throw new OffshootError('not-found', `the directory of the control socket, ${directory}, is missing: make it, or name another socket with --socket`, {
      socketPath,
    });
  }
  checkWritable(directory, `cannot make the control socket in ${directory}`);
  const found = lstatSync(socketPath, { throwIfNoEntry: false });
  if (found?.isSocket() === false) {
    throw new OffshootError('already-exists', `${socketPath} is there and is not a socket: remove it, or name another with --socket`, { socketPath });
  }
  if (found !== undefined && (await isAnswered(socketPath))) {
    throw new OffshootError(
      'in-use',
      `another daemon answers on ${socketPath}: stop it ('offshoot --socket ${socketPath} daemon stop'), or name another socket with --socket`,
      { socketPath },
    );
  }
  return join(realpathSync(directory), basename(socketPath));
}

/** The default socket's directory is made when it is missing; any other is the administrator's to make. */
export function makeDefaultSocketDirectory(socketPath: string): void {
  const directory = dirname(socketPath);
  if (directory !== dirname(DEFAULT_SOCKET_PATH) || existsSync(directory)) return;
  mkdirSync(directory);
  chmodSync(directory, 0o755);
}

function isAnswered(socketPath: string): Promise<boolean> {
  return new Promise((settle) => {
    const socket = connect(socketPath);
    const done = (answered: boolean) => {
      socket.destroy();
      settle(answered);
    };
    socket.setTimeout(SOCKET_ANSWER_MS_MAX, () => {
      done(true);
    });
    socket.once('connect', () => {
      done(true);
    });
    // A socket file that its listener left behind refuses; anything else (a full queue) is a listener.
    socket.once('error', (error: NodeJS.ErrnoException) => {
      done(error.code !== 'ECONNREFUSED' && error.code !== 'ENOENT');
    });
  });
}

function checkText(path: string, what: string): void {
  // Mount tables, logs and messages are lines: a path with a newline in it can be mistaken in all of them.
  if (visible(path) === path) return;
  throw new OffshootError('invalid-argument', `the path of ${what}, '${visible(path)}', holds a control character: choose a path without`);
}

function checkWritable(directory: string, complaint: string): void {
  try {
    accessSync(directory, constants.R_OK | constants.W_OK | constants.X_OK);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code === 'EROFS' ? 'its file system is mounted read-only' : 'no permission to read and write it';
    throw new OffshootError('permission-denied', `${complaint}: ${reason}`, { path: directory }, error);
  }
}

function mountPointMissing(mountDir: string): OffshootError {
  return new OffshootError('mount-unusable', `the mount point ${mountDir} does not exist: make it first ('mkdir -p ${mountDir}')`, { mountDir });
}

function statOf(path: string): Stats | undefined {
  try {
    return statSync(path);
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    const kind = code === 'ELOOP' ? 'invalid-argument' : toOffshootError(error).kind;
    throw new OffshootError(kind, `cannot look at ${path}: ${(error as Error).message}`, { path }, error);
  }
}

function isWithin(path: string, directory: string): boolean {
  return path === directory || path.startsWith(directory === '/' ? '/' : `${directory}/`);
}
