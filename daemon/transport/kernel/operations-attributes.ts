/**
 * Operations on attributes: GETATTR, STATX, SETATTR, READLINK, STATFS, and the extended attributes that there are not.
 * Main thread.
 *
 * Access is checked by the kernel (default_permissions) from the attributes given here, so ACCESS never comes and is
 * ENOSYS. Extended attributes are ENOSYS as well: the kernel asks once a connection, then says EOPNOTSUPP by itself.
 */
import { Errno } from '../../../blockstore/errors.js';
import { DISK_BYTES_MAX } from '../../../blockstore/units.js';
import type { AttributeChanges } from '../../filesystem/types.js';
import {
  attributesReply, bytesOf, dataReply, int64At, permissionsFor, statfsReply, statxReply, uint64At, WireError, type Request,
} from './codec.js';
import type { Answer, Operation, OperationHost } from './operation.js';
import { FileType, GetattrIn, ModeBits, Opcode, SetattrIn, SetattrValid, StatxIn } from './protocol.js';

export const attributeOperations: readonly Operation[] = [
  { opcode: Opcode.GETATTR, name: 'GETATTR', bodyBytesMin: GetattrIn.bytes, answered: true, absent: Errno.ESTALE, run: getattr },
  { opcode: Opcode.STATX, name: 'STATX', bodyBytesMin: StatxIn.bytes, answered: true, absent: Errno.ESTALE, run: statx },
  { opcode: Opcode.SETATTR, name: 'SETATTR', bodyBytesMin: SetattrIn.bytes, answered: true, absent: Errno.ESTALE, run: setattr },
  { opcode: Opcode.READLINK, name: 'READLINK', bodyBytesMin: 0, answered: true, absent: Errno.ESTALE, run: readlink },
  { opcode: Opcode.STATFS, name: 'STATFS', bodyBytesMin: 0, answered: true, absent: Errno.ESTALE, run: statfs },
];

function getattr(host: OperationHost, request: Request): Answer {
  return attributesReply(request.unique, host.fileSystem.getattr(request.nodeId), host.validity);
}

/** Asked when a caller wants the birth time, which is not kept: the reply's mask says so. */
function statx(host: OperationHost, request: Request): Answer {
  return statxReply(request.unique, host.fileSystem.getattr(request.nodeId), host.validity);
}

function setattr(host: OperationHost, request: Request): Answer {
  const { unique } = request;
  const changes = changesOf(request.view);
  if (Object.keys(changes).length === 0) return getattr(host, request);
  return host.fileSystem
    .setattr(request.nodeId, changes, request.caller)
    .then((attributes) => attributesReply(unique, attributes, host.validity));
}

function readlink(host: OperationHost, request: Request): Answer {
  const { unique } = request;
  const target = host.fileSystem.readlink(request.nodeId, request.caller);
  return typeof target === 'string' ? dataReply(unique, bytesOf(target)) : target.then((text) => dataReply(unique, bytesOf(text)));
}

function statfs(host: OperationHost, request: Request): Answer {
  return statfsReply(request.unique, host.fileSystem.statfs(request.nodeId));
}

/**
 * KILL_SUIDGID needs nothing done: files cannot carry those bits here (see modeOf). The handle and the lock owner do not
 * matter, because a node has one size whoever asks.
 */
function changesOf(view: DataView): AttributeChanges {
  const valid = view.getUint32(SetattrIn.valid, true);
  const has = (bit: number): boolean => (valid & bit) !== 0;
  const sizeBytes = uint64At(view, SetattrIn.size);
  if (has(SetattrValid.SIZE) && sizeBytes > DISK_BYTES_MAX) throw new WireError(Errno.EFBIG, 'a size beyond the largest file');
  return {
    ...(has(SetattrValid.MODE) && { mode: settableMode(view.getUint32(SetattrIn.mode, true)) }),
    ...(has(SetattrValid.UID) && { uid: view.getUint32(SetattrIn.uid, true) }),
    ...(has(SetattrValid.GID) && { gid: view.getUint32(SetattrIn.gid, true) }),
    ...(has(SetattrValid.SIZE) && { sizeBytes }),
    ...(has(SetattrValid.ATIME) && { atimeUs: has(SetattrValid.ATIME_NOW) ? 'now' as const : timeUsAt(view, SetattrIn.atime, SetattrIn.atimeNs) }),
    ...(has(SetattrValid.MTIME) && { mtimeUs: has(SetattrValid.MTIME_NOW) ? 'now' as const : timeUsAt(view, SetattrIn.mtime, SetattrIn.mtimeNs) }),
    ...(has(SetattrValid.CTIME) && { ctimeUs: timeUsAt(view, SetattrIn.ctime, SetattrIn.ctimeNs) }),
  };
}

/** The kernel gives the type bits along with the permissions. */
function settableMode(mode: number): number {
  const type = mode & FileType.MASK;
  return type === FileType.REGULAR || type === FileType.SYMLINK ? permissionsFor('file', mode) : mode & ModeBits.PERMISSIONS;
}

/** Microseconds; a time that they cannot hold becomes the nearest that they can, as Linux does with its own limits. */
function timeUsAt(view: DataView, secondsOffset: number, nanosecondsOffset: number): number {
  const timeUs = int64At(view, secondsOffset) * 1_000_000 + Math.floor(view.getUint32(nanosecondsOffset, true) / 1000);
  return Math.min(Math.max(timeUs, Number.MIN_SAFE_INTEGER), Number.MAX_SAFE_INTEGER);
}
