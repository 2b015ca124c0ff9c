/**
 * Who is at the other end of a unix socket, as the kernel noted it when the connection was made.
 *
 * SO_PEERCRED gives user, primary group and process; SO_PEERGROUPS the supplementary groups, of the same moment. What /proc says
 * of the process is never asked: it may be another one by now, and a process may have changed its groups since. The process id
 * is for the log only; nothing is decided by it. A process that hands its connected socket to another vouches for it.
 *
 * When the kernel does not tell (no such option, no such descriptor), the answer is less rather than more: no groups, or nobody. Runs on
 * the server's main thread, once for each connection.
 */
import type { Socket } from 'node:net';
import koffi from 'koffi';

export interface Peer {
  readonly uid: number;
  readonly gid: number;
  readonly groups: readonly number[];
  readonly pid: number;
}

const SOL_SOCKET = 1;
const SO_PEERCRED = 17;
const SO_PEERGROUPS = 59;
const UCRED_WORDS = 3;
/** NGROUPS_MAX of Linux: a process cannot have more. */
const GROUPS_MAX = 65_536;
const GROUPS_USUAL = 64;
const ERANGE = 34;

const libc = koffi.load('libc.so.6');
const sysGetsockopt = libc.func('int getsockopt(int fd, int level, int option, void *value, void *length)') as unknown as (
  fd: number, level: number, option: number, value: Uint32Array, length: Uint32Array,
) => number;

/** Null when the kernel does not say. */
export function peerOf(socket: Socket): Peer | null {
  const fd = descriptorOf(socket);
  if (fd === null) return null;
  const words = new Uint32Array(UCRED_WORDS);
  const length = new Uint32Array([words.byteLength]);
  if (sysGetsockopt(fd, SOL_SOCKET, SO_PEERCRED, words, length) !== 0 || length[0] !== words.byteLength) return null;
  const [pid, uid, gid] = words;
  // (uid_t) -1: the socket is not connected, or its maker is outside of our user namespace.
  if (pid === undefined || uid === undefined || gid === undefined || uid === 0xffff_ffff) return null;
  return { uid, gid, groups: groupsOf(fd), pid };
}

function groupsOf(fd: number): readonly number[] {
  for (const room of [GROUPS_USUAL, GROUPS_MAX]) {
    const groups = new Uint32Array(room);
    const length = new Uint32Array([groups.byteLength]);
    if (sysGetsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, length) === 0) return [...groups.subarray(0, (length[0] ?? 0) / 4)];
    if (koffi.errno() !== ERANGE) return [];
  }
  return [];
}

/** Node.js has no public way to an accepted socket's descriptor; `_handle.fd` is what its own modules use. */
function descriptorOf(socket: Socket): number | null {
  const { _handle: handle } = socket as unknown as { readonly _handle?: { readonly fd?: unknown } | null };
  const fd = handle?.fd;
  return typeof fd === 'number' && fd >= 0 ? fd : null;
}
