/**
 * Operations on open files: OPEN, CREATE, RELEASE, READ, WRITE, FSYNC, FLUSH, FALLOCATE, LSEEK, COPY_FILE_RANGE. Main thread.
 *
 * READ, WRITE, FALLOCATE and LSEEK of open disks are answered by the I/O workers; what arrives here are those of small
 * files, and those that a worker handed on. The promises are the same: a READ is short only at end of file, a WRITE
 * that carries O_DSYNC or O_SYNC is durable before its reply, FSYNC gives the error of the flush and is never ENOSYS
 * (the kernel would then let every later fsync succeed without asking).
 */
import { Errno } from '../../../blockstore/errors.js';
import { DISK_BYTES_MAX } from '../../../blockstore/units.js';
import type { FallocateMode } from '../../filesystem/types.js';
import {
  copyFileRangeReply, createReply, lseekReply, markOf, nameOf, newReply, openReply, permissionsFor, shortenReply, stringsAt, uint64At, WireError, writeReply,
  type Request,
} from './codec.js';
import { openFlagsFor, type Answer, type Operation, type OperationHost } from './operation.js';
import { isKind, isNewFile } from './operations-names.js';
import {
  CopyFileRangeIn, CreateIn, FallocateFlag, FallocateIn, FlushIn, FsyncIn, LinuxOpenFlag, LseekIn, Opcode, OpenIn, OutHeader, ReadIn, ReleaseIn, Whence,
  WriteIn,
} from './protocol.js';

export const fileOperations: readonly Operation[] = [
  { opcode: Opcode.OPEN, name: 'OPEN', bodyBytesMin: OpenIn.bytes, answered: true, absent: Errno.ESTALE, run: open },
  { opcode: Opcode.CREATE, name: 'CREATE', bodyBytesMin: CreateIn.bytes, answered: true, absent: Errno.ENOENT, run: create },
  { opcode: Opcode.RELEASE, name: 'RELEASE', bodyBytesMin: ReleaseIn.bytes, answered: true, absent: Errno.ESTALE, run: release },
  { opcode: Opcode.READ, name: 'READ', bodyBytesMin: ReadIn.bytes, answered: true, absent: Errno.ESTALE, run: read },
  { opcode: Opcode.WRITE, name: 'WRITE', bodyBytesMin: WriteIn.bytes, answered: true, absent: Errno.ESTALE, run: write },
  { opcode: Opcode.FSYNC, name: 'FSYNC', bodyBytesMin: FsyncIn.bytes, answered: true, absent: Errno.ESTALE, run: fsync },
  { opcode: Opcode.FLUSH, name: 'FLUSH', bodyBytesMin: FlushIn.bytes, answered: true, absent: Errno.ESTALE, run: flush },
  { opcode: Opcode.FALLOCATE, name: 'FALLOCATE', bodyBytesMin: FallocateIn.bytes, answered: true, absent: Errno.ESTALE, run: fallocate },
  { opcode: Opcode.LSEEK, name: 'LSEEK', bodyBytesMin: LseekIn.bytes, answered: true, absent: Errno.ESTALE, run: lseek },
  { opcode: Opcode.COPY_FILE_RANGE, name: 'COPY_FILE_RANGE', bodyBytesMin: CopyFileRangeIn.bytes, answered: true, absent: Errno.ESTALE, run: copyFileRange },
  { opcode: Opcode.COPY_FILE_RANGE_64, name: 'COPY_FILE_RANGE_64', bodyBytesMin: CopyFileRangeIn.bytes, answered: true, absent: Errno.ESTALE, run: copyFileRange },
];

/** The most that the older operation can tell of, in whole blocks: its answer has 32 bits. */
const COPY_BYTES_MAX_32 = 2 ** 32 - 4096;

const fallocateModeOf = new Map<number, FallocateMode>([
  [0, 'allocate'],
  [FallocateFlag.KEEP_SIZE, 'allocate-keep-size'],
  [FallocateFlag.PUNCH_HOLE | FallocateFlag.KEEP_SIZE, 'punch-hole'],
  [FallocateFlag.ZERO_RANGE, 'zero-range'],
  [FallocateFlag.ZERO_RANGE | FallocateFlag.KEEP_SIZE, 'zero-range-keep-size'],
]);

function open(host: OperationHost, request: Request): Answer {
  // The kernel truncates by SETATTR before OPEN (ATOMIC_O_TRUNC is off), so the flag has nothing left to say.
  const flags = request.view.getUint32(OpenIn.flags, true) & ~LinuxOpenFlag.TRUNC;
  const opened = host.fileSystem.open(request.nodeId, flags, markOf(request));
  return openReply(request.unique, opened.handle, openFlagsFor(opened));
}

/**
 * Always makes the file, never opens one that is there. The kernel sends CREATE when it believes that the name is free, and
 * checks no permission of a file that it believes is new; nor would it honour O_TRUNC. If the name was taken meanwhile,
 * through the control API, ESTALE makes it walk the path again, find the file, and open it with all checks.
 */
function create(host: OperationHost, request: Request): Answer {
  const name = nameOf(stringsAt(request.body, CreateIn.bytes, 1)[0] ?? new Uint8Array());
  const flags = request.view.getUint32(CreateIn.flags, true);
  const permissions = permissionsFor('file', request.view.getUint32(CreateIn.mode, true));
  const { fileSystem } = host;
  try {
    const made = fileSystem.create(request.nodeId, name, permissions, flags | LinuxOpenFlag.CREAT | LinuxOpenFlag.EXCL, request.caller, markOf(request));
    return createReply(request.unique, made.attributes, host.validity, made.open.handle, openFlagsFor(made.open));
  } catch (thrown) {
    if (!isKind(thrown, 'already-exists')) throw thrown;
    if (request.resent) {
      const found = fileSystem.lookup(request.nodeId, name);
      if (isNewFile(found, permissions)) {
        const opened = fileSystem.open(found.nodeId, flags & ~(LinuxOpenFlag.CREAT | LinuxOpenFlag.EXCL | LinuxOpenFlag.TRUNC), markOf(request));
        return createReply(request.unique, found, host.validity, opened.handle, openFlagsFor(opened));
      }
    }
    if ((flags & LinuxOpenFlag.EXCL) !== 0) throw thrown;
    throw new WireError(Errno.ESTALE, 'the name was taken since the kernel asked');
  }
}

function release(host: OperationHost, request: Request): Answer {
  const handle = uint64At(request.view, ReleaseIn.handle);
  if (Number.isSafeInteger(handle)) host.fileSystem.release(handle);
  return newReply(request.unique, 0);
}

function read(host: OperationHost, request: Request): Answer {
  const offsetBytes = uint64At(request.view, ReadIn.offset);
  const sizeBytes = request.view.getUint32(ReadIn.size, true);
  if (sizeBytes > host.limits.readBytesMax) throw new WireError(Errno.EINVAL, 'a read is larger than was agreed');
  if (offsetBytes >= DISK_BYTES_MAX) return newReply(request.unique, 0);
  const message = newReply(request.unique, sizeBytes);
  const answer = (readBytes: number): Uint8Array => {
    assertCount(readBytes, sizeBytes, 'read');
    return shortenReply(message, readBytes);
  };
  const read = host.fileSystem.read(request.nodeId, offsetBytes, message.subarray(OutHeader.bytes));
  return typeof read === 'number' ? answer(read) : read.then(answer);
}

function write(host: OperationHost, request: Request): Answer {
  const offsetBytes = uint64At(request.view, WriteIn.offset);
  const sizeBytes = request.view.getUint32(WriteIn.size, true);
  if (sizeBytes > host.limits.writeBytesMax) throw new WireError(Errno.EINVAL, 'a write is larger than was agreed');
  if (sizeBytes !== request.body.byteLength - WriteIn.bytes) throw new WireError(Errno.EINVAL, 'a write has fewer or more bytes than it says');
  if (offsetBytes + sizeBytes > DISK_BYTES_MAX) throw new WireError(Errno.EFBIG, 'a write ends beyond the largest file');
  const { unique, nodeId } = request;
  const flags = request.view.getUint32(WriteIn.flags, true);
  const { fileSystem } = host;
  const answer = (writtenBytes: number): Uint8Array | Promise<Uint8Array> => {
    assertCount(writtenBytes, sizeBytes, 'write');
    if (!mustBeDurable(flags)) return writeReply(unique, writtenBytes);
    return fileSystem.flush(nodeId).then(() => writeReply(unique, writtenBytes));
  };
  const written = fileSystem.write(nodeId, offsetBytes, request.body.subarray(WriteIn.bytes));
  return typeof written === 'number' ? answer(written) : written.then(answer);
}

/** O_SYNC is O_DSYNC and one bit more; either asks for durability before the reply. No FSYNC follows such a write. */
export function mustBeDurable(openFlags: number): boolean {
  return (openFlags & (LinuxOpenFlag.DSYNC | LinuxOpenFlag.SYNC_ONLY)) !== 0;
}

function fsync(host: OperationHost, request: Request): Answer {
  // fsync and fdatasync are one: size and ownership, without which data cannot be found, go with the data.
  const { unique } = request;
  return host.fileSystem.flush(request.nodeId).then(() => newReply(unique, 0));
}

/** A close of one descriptor of many; it promises nothing. Comes only for opens that did not say NOFLUSH. */
function flush(_host: OperationHost, request: Request): Answer {
  return newReply(request.unique, 0);
}

function fallocate(host: OperationHost, request: Request): Answer {
  const offsetBytes = uint64At(request.view, FallocateIn.offset);
  const lengthBytes = uint64At(request.view, FallocateIn.length);
  const mode = fallocateModeOf.get(request.view.getUint32(FallocateIn.mode, true));
  if (mode === undefined) throw new WireError(Errno.EOPNOTSUPP, 'a fallocate mode that is not known');
  if (lengthBytes === 0) throw new WireError(Errno.EINVAL, 'a fallocate of no bytes');
  if (offsetBytes + lengthBytes > DISK_BYTES_MAX) throw new WireError(Errno.EFBIG, 'a fallocate ends beyond the largest file');
  const { unique } = request;
  const later = host.fileSystem.fallocate(request.nodeId, mode, offsetBytes, lengthBytes);
  return later === null ? newReply(unique, 0) : later.then(() => newReply(unique, 0));
}

function lseek(host: OperationHost, request: Request): Answer {
  const offsetBytes = uint64At(request.view, LseekIn.offset);
  const whence = request.view.getUint32(LseekIn.whence, true);
  if (whence !== Whence.DATA && whence !== Whence.HOLE) throw new WireError(Errno.EINVAL, 'the kernel seeks by itself but for data and holes');
  if (offsetBytes >= DISK_BYTES_MAX) throw new WireError(Errno.ENXIO, 'a seek begins beyond the largest file');
  return lseekReply(request.unique, host.fileSystem.seek(request.nodeId, offsetBytes, whence === Whence.DATA ? 'data' : 'hole'));
}

/**
 * EOPNOTSUPP is the answer for what cannot be shared: the kernel then copies the bytes of this one request, and asks again with the next. ENOSYS would
 * be for ever.
 */
function copyFileRange(host: OperationHost, request: Request): Answer {
  const { unique, nodeId, opcode, view } = request;
  const sourceAtBytes = uint64At(view, CopyFileRangeIn.offsetIn);
  const target = uint64At(view, CopyFileRangeIn.nodeIdOut);
  const targetAtBytes = uint64At(view, CopyFileRangeIn.offsetOut);
  const isShort = opcode === Opcode.COPY_FILE_RANGE;
  const asked = uint64At(view, CopyFileRangeIn.length);
  // A length that no file has is as good as the longest file: the source ends before.
  const lengthBytes = Math.min(asked, isShort ? COPY_BYTES_MAX_32 : DISK_BYTES_MAX);
  if (uint64At(view, CopyFileRangeIn.flags) !== 0) throw new WireError(Errno.EINVAL, 'a copy with flags that are not known');
  if (!Number.isSafeInteger(target)) throw new WireError(Errno.ESTALE, 'the node cannot exist');
  if (sourceAtBytes >= DISK_BYTES_MAX) return isShort ? writeReply(unique, 0) : copyFileRangeReply(unique, 0);
  if (targetAtBytes >= DISK_BYTES_MAX) throw new WireError(Errno.EFBIG, 'a copy begins beyond the largest file');
  return host.fileSystem.copyFileRange(nodeId, sourceAtBytes, target, targetAtBytes, lengthBytes).then((copiedBytes) => {
    assertCount(copiedBytes, lengthBytes, 'copy');
    return isShort ? writeReply(unique, copiedBytes) : copyFileRangeReply(unique, copiedBytes);
  });
}

/** A count that the file system may not give: to pass it on could tell the kernel of bytes that are not there. */
function assertCount(count: number, countMax: number, operation: string): void {
  if (!Number.isInteger(count) || count < 0 || count > countMax) throw new Error(`${operation} of ${countMax} bytes gave ${count}`);
}
