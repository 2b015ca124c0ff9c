/**
 * Operations on open directories: OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR. Main thread.
 *
 * An open directory has no state here: an entry's offset is its cookie, so that a listing goes on after a restart, and
 * after changes, where it was. Offsets 0, 1 and 2 are before, between and after `.` and `..`; an entry with cookie c is
 * followed by offset c + 2.
 */
import { Errno } from '../../../blockstore/errors.js';
import { bytesOf, direntBytes, newReply, openReply, setDirent, shortenReply, uint64At, WireError, type DirentFields, type Request } from './codec.js';
import type { Answer, Operation, OperationHost } from './operation.js';
import { FsyncIn, Opcode, OpenIn, OutHeader, ReadIn, ReleaseIn } from './protocol.js';

export const directoryOperations: readonly Operation[] = [
  { opcode: Opcode.OPENDIR, name: 'OPENDIR', bodyBytesMin: OpenIn.bytes, answered: true, absent: Errno.ESTALE, run: opendir },
  { opcode: Opcode.READDIR, name: 'READDIR', bodyBytesMin: ReadIn.bytes, answered: true, absent: Errno.ENOENT, run: (host, request) => list(host, request, false) },
  { opcode: Opcode.READDIRPLUS, name: 'READDIRPLUS', bodyBytesMin: ReadIn.bytes, answered: true, absent: Errno.ENOENT, run: (host, request) => list(host, request, true) },
  { opcode: Opcode.RELEASEDIR, name: 'RELEASEDIR', bodyBytesMin: ReleaseIn.bytes, answered: true, absent: Errno.ESTALE, run: releasedir },
  { opcode: Opcode.FSYNCDIR, name: 'FSYNCDIR', bodyBytesMin: FsyncIn.bytes, answered: true, absent: Errno.ESTALE, run: fsyncdir },
];

/** Entries asked of the file system at a time, at most; and no more than fit, for the rest would be looked up for nothing. */
const BATCH_ENTRIES_MAX = 256;
/** What is read beyond `.` and `..` begins here. */
const FIRST_ENTRY_OFFSET = 2;
/** An open directory's handle, always the same, for there is nothing to find by it. */
const DIRECTORY_HANDLE = 0;

function opendir(host: OperationHost, request: Request): Answer {
  if (host.fileSystem.getattr(request.nodeId).kind !== 'directory') throw new WireError(Errno.ENOTDIR, 'not a directory');
  return openReply(request.unique, DIRECTORY_HANDLE, 0);
}

function releasedir(_host: OperationHost, request: Request): Answer {
  return newReply(request.unique, 0);
}

function fsyncdir(host: OperationHost, request: Request): Answer {
  const { unique } = request;
  return host.fileSystem.flushDirectory(request.nodeId).then(() => newReply(unique, 0));
}

function list(host: OperationHost, request: Request, plus: boolean): Answer {
  const startOffset = uint64At(request.view, ReadIn.offset);
  const sizeBytes = request.view.getUint32(ReadIn.size, true);
  if (sizeBytes > host.limits.readBytesMax) throw new WireError(Errno.EINVAL, 'a listing is larger than was agreed');
  if (!Number.isSafeInteger(startOffset)) throw new WireError(Errno.EINVAL, 'a listing begins at an offset that was never given');
  const message = newReply(request.unique, sizeBytes);
  const payload = message.subarray(OutHeader.bytes);
  let usedBytes = 0;
  const batchEntries = Math.min(BATCH_ENTRIES_MAX, Math.floor(sizeBytes / direntBytes(1, plus)) + 1);
  for (const entry of entriesFrom(host, request.nodeId, startOffset, batchEntries)) {
    const entryBytes = direntBytes(entry.name.byteLength, plus);
    if (usedBytes + entryBytes > sizeBytes) {
      // No entry at all would read as the end of the directory.
      if (usedBytes === 0) throw new WireError(Errno.EINVAL, 'not even one entry fits in the listing asked for');
      break;
    }
    setDirent(payload, usedBytes, entry, plus, host.validity);
    usedBytes += entryBytes;
  }
  return shortenReply(message, usedBytes);
}

function* entriesFrom(host: OperationHost, nodeId: number, startOffset: number, batchEntries: number): Generator<DirentFields> {
  const { fileSystem } = host;
  const dots = [{ name: '.', nodeId }, { name: '..', nodeId: startOffset < FIRST_ENTRY_OFFSET ? fileSystem.parentOf(nodeId) : nodeId }];
  for (const [index, dot] of dots.entries()) {
    if (startOffset <= index) yield { name: bytesOf(dot.name), nodeId: dot.nodeId, kind: 'directory', nextOffset: index + 1, attributes: null };
  }
  let afterCookie = Math.max(startOffset - FIRST_ENTRY_OFFSET, 0);
  for (;;) {
    const batch = fileSystem.readdir(nodeId, afterCookie, batchEntries);
    for (const { name, cookie, attributes } of batch) {
      yield { name: bytesOf(name), nodeId: attributes.nodeId, kind: attributes.kind, nextOffset: cookie + FIRST_ENTRY_OFFSET, attributes };
      afterCookie = cookie;
    }
    if (batch.length < batchEntries) return;
  }
}
