/**
 * Operations on names: LOOKUP, MKDIR, MKNOD, SYMLINK, UNLINK, RMDIR, RENAME, RENAME2, LINK. Main thread.
 *
 * All but LOOKUP change something, and may be seen twice: a server made the change and died before its reply. The
 * caller still waits, and the kernel holds the directory locked for it, so nothing else can have come between; hence a
 * request that is marked as resent and finds its own result already there is answered as if it had just made it. The
 * kernel asks again for names that do not exist (no negative entry is ever given), so that a disk made through the
 * control API is seen at once.
 */
import { Errno, OffshootError } from '../../../blockstore/errors.js';
import type { Attributes, FileSystem, NodeId } from '../../filesystem/types.js';
import {
  entryReply, markOf, newReply, nameOf, permissionsFor, stringsAt, textOf, uint64At, WireError, type Request,
} from './codec.js';
import type { Answer, Operation, OperationHost } from './operation.js';
import {
  FileType, LINK_TARGET_BYTES_MAX, LinkIn, LinuxOpenFlag, MkdirIn, MknodIn, ModeBits, Opcode, Rename2In, RenameFlag, RenameIn,
} from './protocol.js';

export const nameOperations: readonly Operation[] = [
  { opcode: Opcode.LOOKUP, name: 'LOOKUP', bodyBytesMin: 1, answered: true, absent: Errno.ENOENT, run: lookup },
  { opcode: Opcode.MKDIR, name: 'MKDIR', bodyBytesMin: MkdirIn.bytes, answered: true, absent: Errno.ENOENT, run: mkdir },
  { opcode: Opcode.MKNOD, name: 'MKNOD', bodyBytesMin: MknodIn.bytes, answered: true, absent: Errno.ENOENT, run: mknod },
  { opcode: Opcode.SYMLINK, name: 'SYMLINK', bodyBytesMin: 2, answered: true, absent: Errno.ENOENT, run: symlink },
  { opcode: Opcode.UNLINK, name: 'UNLINK', bodyBytesMin: 1, answered: true, absent: Errno.ENOENT, run: unlink },
  { opcode: Opcode.RMDIR, name: 'RMDIR', bodyBytesMin: 1, answered: true, absent: Errno.ENOENT, run: rmdir },
  { opcode: Opcode.RENAME, name: 'RENAME', bodyBytesMin: RenameIn.bytes, answered: true, absent: Errno.ENOENT, run: rename },
  { opcode: Opcode.RENAME2, name: 'RENAME2', bodyBytesMin: Rename2In.bytes, answered: true, absent: Errno.ENOENT, run: rename2 },
  { opcode: Opcode.LINK, name: 'LINK', bodyBytesMin: LinkIn.bytes, answered: true, absent: Errno.ENOENT, run: link },
];

function lookup(host: OperationHost, request: Request): Answer {
  const name = soughtName(onlyName(request, 0));
  try {
    return entryReply(request.unique, host.fileSystem.lookup(request.nodeId, name), host.validity);
  } catch (thrown) {
    // No name was asked for: somebody kept the number, as NFS clients do for months, and the kernel has forgotten the node.
    if ((name === '.' || name === '..') && isKind(thrown, 'not-found')) throw new WireError(Errno.ESTALE, `node ${request.nodeId} is gone`);
    throw thrown;
  }
}

function mkdir(host: OperationHost, request: Request): Answer {
  const name = nameOf(onlyName(request, MkdirIn.bytes));
  const mode = permissionsFor('directory', request.view.getUint32(MkdirIn.mode, true));
  const attributes = makeOrFind(host.fileSystem, request, name, () => host.fileSystem.mkdir(request.nodeId, name, mode, request.caller), {
    isSame: (found) => found.kind === 'directory' && sharesMode(found, mode),
  });
  return entryReply(request.unique, attributes, host.validity);
}

function mknod(host: OperationHost, request: Request): Answer {
  const name = nameOf(onlyName(request, MknodIn.bytes));
  const mode = request.view.getUint32(MknodIn.mode, true);
  const type = mode & FileType.MASK;
  if (type !== FileType.REGULAR && type !== 0) throw new WireError(Errno.EPERM, 'only regular files can be made');
  const permissions = permissionsFor('file', mode);
  const make = (): Attributes => {
    const flags = LinuxOpenFlag.CREAT | LinuxOpenFlag.EXCL | LinuxOpenFlag.WRONLY;
    const made = host.fileSystem.create(request.nodeId, name, permissions, flags, request.caller, markOf(request));
    host.fileSystem.release(made.open.handle);
    return made.attributes;
  };
  const attributes = makeOrFind(host.fileSystem, request, name, make, { isSame: (found) => isNewFile(found, permissions) });
  // A server that died between its two calls left the handle of the first open.
  if (request.resent) host.fileSystem.release(host.fileSystem.open(attributes.nodeId, LinuxOpenFlag.WRONLY, markOf(request)).handle);
  return entryReply(request.unique, attributes, host.validity);
}

function symlink(host: OperationHost, request: Request): Answer {
  const [nameBytes, targetBytes] = stringsAt(request.body, 0, 2);
  const name = nameOf(nameBytes ?? new Uint8Array());
  if (targetBytes === undefined || targetBytes.byteLength === 0) throw new WireError(Errno.ENOENT, 'a link has no target');
  if (targetBytes.byteLength > LINK_TARGET_BYTES_MAX) throw new WireError(Errno.ENAMETOOLONG, 'a link target is longer than 4095 bytes');
  const target = textOf(targetBytes);
  const attributes = makeOrFind(host.fileSystem, request, name, () => host.fileSystem.symlink(request.nodeId, name, target, request.caller), {
    isSame: (found) => found.kind === 'symlink' && host.fileSystem.readlink(found.nodeId) === target,
  });
  return entryReply(request.unique, attributes, host.validity);
}

function unlink(host: OperationHost, request: Request): Answer {
  const name = soughtName(onlyName(request, 0));
  return removed(request, () => { host.fileSystem.unlink(request.nodeId, name); });
}

function rmdir(host: OperationHost, request: Request): Answer {
  const name = soughtName(onlyName(request, 0));
  return removed(request, () => { host.fileSystem.rmdir(request.nodeId, name); });
}

function rename(host: OperationHost, request: Request): Answer {
  return renameNames(host, request, RenameIn.bytes, 0);
}

function rename2(host: OperationHost, request: Request): Answer {
  return renameNames(host, request, Rename2In.bytes, request.view.getUint32(Rename2In.flags, true));
}

/** One name for one node is what makes snapshots of a container cheap to reason about: there are no hard links. */
function link(): Answer {
  throw new WireError(Errno.EPERM, 'hard links are not made');
}

function renameNames(host: OperationHost, request: Request, namesOffset: number, flags: number): Answer {
  const newParent = uint64At(request.view, RenameIn.newParent);
  if (!Number.isSafeInteger(newParent)) throw new WireError(Errno.ESTALE, 'the new directory cannot exist');
  const [oldBytes, newBytes] = stringsAt(request.body, namesOffset, 2);
  const name = soughtName(oldBytes ?? new Uint8Array());
  const newName = nameOf(newBytes ?? new Uint8Array());
  const noReplace = flags === RenameFlag.NOREPLACE;
  const exchange = flags === RenameFlag.EXCHANGE;
  if (flags !== 0 && !noReplace && !exchange) throw new WireError(Errno.EINVAL, 'rename flags that are not known');

  const { fileSystem } = host;
  if (exchange) {
    if (isExchanged(host, request, name)) return newReply(request.unique, 0);
    fileSystem.rename(request.nodeId, name, newParent, newName, { noReplace, exchange });
    return newReply(request.unique, 0);
  }
  try {
    fileSystem.rename(request.nodeId, name, newParent, newName, { noReplace, exchange });
  } catch (thrown) {
    const isDone = request.resent && isKind(thrown, 'not-found', 'already-exists') &&
      find(fileSystem, request.nodeId, name) === null && find(fileSystem, newParent, newName) !== null;
    if (!isDone) throw thrown;
  }
  return newReply(request.unique, 0);
}

/** True if this exchange was made by a server that died; otherwise writes down that it is about to be made. */
function isExchanged(host: OperationHost, request: Request, name: string): boolean {
  if (host.exchanges === null) throw new WireError(Errno.EINVAL, 'names are not exchanged');
  const before = request.resent ? host.exchanges.recall(request.unique) : null;
  const now = host.fileSystem.lookup(request.nodeId, name).nodeId;
  if (before !== null) return before !== now;
  host.exchanges.begin(request.unique, now);
  return false;
}

// --- Requests that are seen twice ----------------------------------------------------------------------------------------

/** Makes a node; when a resent request finds its name taken by the very node that it asks for, that node is the answer. */
export function makeOrFind(
  fileSystem: FileSystem, request: Request, name: string, make: () => Attributes, expected: { readonly isSame: (found: Attributes) => boolean },
): Attributes {
  try {
    return make();
  } catch (thrown) {
    if (!request.resent || !isKind(thrown, 'already-exists')) throw thrown;
    const found = find(fileSystem, request.nodeId, name);
    if (found === null || !expected.isSame(found)) throw thrown;
    return found;
  }
}

/** An empty file with these permissions: what a CREATE or MKNOD leaves, whose caller has not been told yet. */
export function isNewFile(found: Attributes, permissions: number): boolean {
  return found.kind === 'file' && found.sizeBytes === 0 && sharesMode(found, permissions);
}

export function isKind(thrown: unknown, ...kinds: readonly OffshootError['kind'][]): boolean {
  return thrown instanceof OffshootError && kinds.includes(thrown.kind);
}

function removed(request: Request, remove: () => void): Answer {
  try {
    remove();
  } catch (thrown) {
    if (!request.resent || !isKind(thrown, 'not-found')) throw thrown;
  }
  return newReply(request.unique, 0);
}

function find(fileSystem: FileSystem, parent: NodeId, name: string): Attributes | null {
  try {
    return fileSystem.lookup(parent, name);
  } catch (thrown) {
    if (isKind(thrown, 'not-found')) return null;
    throw thrown;
  }
}

/** Set-group-id is left out of the comparison: a directory may have inherited it. */
function sharesMode(found: Attributes, mode: number): boolean {
  return ((found.mode ^ mode) & ModeBits.PERMISSIONS & ~ModeBits.SETGID) === 0;
}

// --- Names ---------------------------------------------------------------------------------------------------------------

function onlyName(request: Request, offset: number): Uint8Array {
  return stringsAt(request.body, offset, 1)[0] ?? new Uint8Array();
}

/** A name that is looked for, not made: one that is not text cannot be there. */
function soughtName(bytes: Uint8Array): string {
  try {
    return nameOf(bytes);
  } catch (thrown) {
    if (thrown instanceof WireError && thrown.errno === Errno.EILSEQ) throw new WireError(Errno.ENOENT, thrown.message);
    throw thrown;
  }
}
