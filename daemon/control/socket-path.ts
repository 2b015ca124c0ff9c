/**
 * The place of a control socket: checks of its path, and putting a listening socket there.
 *
 * A socket is bound under a neighbouring name, given its mode (0600; 0660 with a group), and only then renamed to its own name. So nobody can
 * connect before the mode is right, and a stale socket of a server that died is replaced without a moment in which there
 * is none. A live one is never taken away from another daemon. `withdraw` removes the name only while it is still ours.
 */
import { chmodSync, chownSync, lstatSync, mkdirSync, renameSync, rmSync, type Stats } from 'node:fs';
import { connect } from 'node:net';
import { dirname } from 'node:path';
import { OffshootError } from '../../blockstore/errors.js';
import { SOCKET_PATH_BYTES_MAX } from './limits.js';
import { visible } from './paths.js';

const SOCKET_MODE = 0o600;
const GROUP_SOCKET_MODE = 0o660;
const DIRECTORY_MODE = 0o700;
/** A group's members must be able to pass. */
const GROUP_DIRECTORY_MODE = 0o711;
const PROBE_TIMEOUT_MS = 2000;

export interface SocketPlace {
  /** Where to bind first: in the same directory, as long as the path itself. */
  readonly bindPath: string;
  /** Call when the socket at `bindPath` listens. */
  publish(): void;
  /** Takes the published name away, if it still is this socket. */
  withdraw(): void;
}

/** Throws when the path can be no unix socket's, whatever lies there. */
export function checkSocketPath(path: string): string {
  if (path === '' || path.includes('\0')) {
    throw new OffshootError('invalid-argument', 'the path of the control socket is empty or holds a NUL byte: give another with --socket or OFFSHOOT_SOCKET');
  }
  if (path.endsWith('/')) {
    throw new OffshootError('invalid-argument', `the path of the control socket, ${visible(path)}, ends with '/': name the socket itself, not its directory`, { path });
  }
  const bytes = Buffer.byteLength(path);
  if (bytes > SOCKET_PATH_BYTES_MAX) {
    throw new OffshootError(
      'name-too-long',
      `the path of the control socket has ${bytes} bytes, ${SOCKET_PATH_BYTES_MAX} are the most that Linux allows: give a shorter one with --socket or OFFSHOOT_SOCKET (${visible(path)})`,
      { path, bytes },
    );
  }
  return path;
}

/** Where the read-only socket of a daemon lies, which has one when a read-only group was named: `offshoot-ro.sock`. */
export function readOnlySocketPath(path: string): string {
  return path.endsWith('.sock') ? `${path.slice(0, -'.sock'.length)}-ro.sock` : `${path}-ro`;
}

/** Makes the place ready: directory there, no live daemon, leftovers of dead ones gone. `gid`: the group that may connect, beside the owner. */
export async function claimSocketPath(path: string, gid: number | null = null): Promise<SocketPlace> {
  checkSocketPath(path);
  mkdirSync(dirname(path), { recursive: true, mode: gid === null ? DIRECTORY_MODE : GROUP_DIRECTORY_MODE });
  await refuseLiveSocket(path);
  const bindPath = neighbourOf(path);
  await refuseLiveSocket(bindPath);
  rmSync(bindPath, { force: true });
  let published: Stats | null = null;
  return {
    bindPath,
    publish: () => {
      // Closed first: between two calls it must not be open to a group that it is not for.
      chmodSync(bindPath, SOCKET_MODE);
      if (gid !== null) {
        chownSync(bindPath, process.geteuid?.() ?? 0, gid);
        chmodSync(bindPath, GROUP_SOCKET_MODE);
      }
      published = lstatSync(bindPath);
      renameSync(bindPath, path);
    },
    withdraw: () => {
      const there = lstatSync(path, { throwIfNoEntry: false });
      if (published !== null && there?.ino === published.ino && there.dev === published.dev) rmSync(path, { force: true });
      published = null;
    },
  };
}

/** The same path with another last character: as long as the path itself, so that it fits where that fits. */
function neighbourOf(path: string): string {
  const last = path.at(-1);
  return path.replace(/.$/su, last === '~' ? '_' : '~');
}

async function refuseLiveSocket(path: string): Promise<void> {
  const there = lstatSync(path, { throwIfNoEntry: false });
  if (there === undefined) return;
  if (!there.isSocket()) {
    throw new OffshootError('already-exists', `${visible(path)} exists and is not a socket: remove it, or give another path with --socket`, { path });
  }
  if (await somebodyAnswers(path)) {
    throw new OffshootError('in-use', `another daemon answers on ${visible(path)}: stop it (offshoot daemon stop --socket ${visible(path)}), or give another path with --socket`, { path });
  }
}

/** Connection refused means that the socket's owner is gone. Everything else is left to the reader of the message. */
async function somebodyAnswers(path: string): Promise<boolean> {
  return await new Promise((resolve, reject) => {
    const socket = connect({ path });
    const timer = setTimeout(() => { socket.destroy(); resolve(true); }, PROBE_TIMEOUT_MS);
    socket.once('connect', () => { clearTimeout(timer); socket.destroy(); resolve(true); });
    socket.once('error', (error: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      socket.destroy();
      if (error.code === 'ECONNREFUSED' || error.code === 'ENOENT') resolve(false);
      else if (error.code === 'EAGAIN') resolve(true);
      else reject(new OffshootError('io-error', `the socket ${visible(path)} cannot be looked at: ${error.message}; remove it, or give another path with --socket`, { path }, error));
    });
  });
}
