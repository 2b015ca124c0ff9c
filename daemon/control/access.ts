/**
 * Who may do what through the control sockets.
 *
 * Decided once for each connection, from what the kernel says of its maker and from the socket that was used, before a byte of the
 * request is looked at. Root, the user that the daemon runs as, and members of the administrators' group may do everything;
 * whoever is in that group can become root on this machine, and documents say so. Members of the read-only group may use what
 * changes nothing. On the read-only socket everybody is a reader, root too: what is given that socket cannot do harm.
 *
 * The kernel checks the sockets' modes as well (0660, and the group), so that others do not even get a connection.
 */
import type { Socket } from 'node:net';
import { OffshootError } from '../../blockstore/errors.js';
import { peerOf, type Peer } from './peer-credentials.js';
import type { DaemonPolicy } from './policy.js';

export type Access = 'none' | 'read' | 'all';

export interface Caller {
  readonly access: Access;
  readonly peer: Peer | null;
  /** The socket that it came by. */
  readonly via: 'admin' | 'read-only';
}

export type Groups = Pick<DaemonPolicy, 'adminGid' | 'readOnlyGid'>;

export function accessOf(peer: Peer | null, via: Caller['via'], groups: Groups, ownUid: number): Access {
  if (peer === null) return 'none';
  const isIn = (gid: number | null): boolean => gid !== null && (peer.gid === gid || peer.groups.includes(gid));
  const mayAll = peer.uid === 0 || peer.uid === ownUid || isIn(groups.adminGid);
  if (mayAll) return via === 'admin' ? 'all' : 'read';
  return isIn(groups.readOnlyGid) ? 'read' : 'none';
}

/** Remembers of each connection who made it. */
export class Callers {
  readonly #groups: Groups;
  readonly #known = new WeakMap<Socket, Caller>();

  constructor(groups: Groups) {
    this.#groups = groups;
  }

  /** For a connection that was just accepted. */
  admit(socket: Socket, via: Caller['via']): void {
    const peer = peerOf(socket);
    this.#known.set(socket, { access: accessOf(peer, via, this.#groups, process.geteuid?.() ?? 0), peer, via });
  }

  of(socket: Socket): Caller {
    return this.#known.get(socket) ?? { access: 'none', peer: null, via: 'admin' };
  }
}

/** Throws `permission-denied` when the caller may not use the method. Whatever is not GET changes something. */
export function assertMay(caller: Caller, method: string): void {
  if (caller.access === 'all' || (caller.access === 'read' && (method === 'GET' || method === 'HEAD'))) return;
  if (caller.access === 'read') {
    throw new OffshootError('permission-denied', caller.via === 'read-only'
      ? 'this is the read-only socket, through which nothing can be changed: use the other one, as root or as a member of the administrators\' group (offshoot daemon start --group)'
      : 'members of the read-only group can look at everything and change nothing: ask root, or a member of the administrators\' group (offshoot daemon start --group)');
  }
  throw new OffshootError('permission-denied',
    'the control socket is for root and for the groups that were named at the start (offshoot daemon start --group, --read-only-group): run this command as root, or join such a group and log in again');
}

/** For the log: who asked. */
export function whoIs({ peer }: Caller): { readonly callerUid: number | null; readonly callerGid: number | null; readonly callerPid: number | null } {
  return { callerUid: peer?.uid ?? null, callerGid: peer?.gid ?? null, callerPid: peer?.pid ?? null };
}
