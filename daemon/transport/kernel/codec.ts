/**
 * Requests out of bytes, replies into bytes.
 *
 * Pure functions over Uint8Array, no state, no file system, any thread. What they promise: a decoded request keeps
 * nothing of the message but its `body` (a view, valid as long as the caller's buffer is), `unique` is a copy of its 8
 * bytes and is never made a number, and a reply's length field is the number of its bytes. 64-bit fields that a double
 * cannot hold come out as Infinity or -Infinity, so that every bound check catches them and none can wrap. Nothing here
 * throws but WireError, which is an errno on its way to the kernel.
 */
import { Errno } from '../../../blockstore/errors.js';
import type { Attributes, Caller, NodeKind, RequestMark, StoreStatistics } from '../../filesystem/types.js';
import {
  Attr, AttrOut, CopyFileRangeOut, Dirent, DirentPlus, EntryOut, FileType, InHeader, LseekOut, ModeBits, NAME_BYTES_MAX, OpenOut, OutHeader,
  STATX_BASIC_STATS, StatfsOut, Statx, StatxOut, UNIQUE_BYTES, UNIQUE_TOP_BYTE, UNIQUE_TOP_RESENT, WriteOut,
} from './protocol.js';

/** An answer that is an errno and no more. */
export class WireError extends Error {
  readonly errno: number;

  constructor(errno: number, message: string) {
    super(message);
    this.name = 'WireError';
    this.errno = errno;
  }
}

/** One request, as far as every operation has it in common. */
export interface Request {
  readonly opcode: number;
  /** A copy of the 8 bytes that the reply must carry. */
  readonly unique: Uint8Array;
  /** The kernel sends it again, because a server that read it died before it replied. */
  readonly resent: boolean;
  /** Infinity when it does not fit a double: such a node cannot exist. */
  readonly nodeId: number;
  readonly caller: Caller;
  /** What follows the header, without appended extensions. Valid only while the message's buffer is. */
  readonly body: Uint8Array;
  readonly view: DataView;
}

/** A message that is not a request. `unique` is null when it is too short to hold one, so that nothing can be answered. */
export interface Malformed {
  readonly unique: Uint8Array | null;
  readonly opcode: number | null;
  readonly reason: string;
}

/** How long the kernel may believe what it was told, in milliseconds. */
export interface Validity {
  readonly entryMs: number;
  readonly attributesMs: number;
}

const TWO_TO_32 = 2 ** 32;
const textEncoder = new TextEncoder();
const textDecoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
const typeBitsOf = {
  directory: FileType.DIRECTORY,
  file: FileType.REGULAR,
  disk: FileType.REGULAR,
  symlink: FileType.SYMLINK,
} as const satisfies Record<NodeKind, number>;

export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** An unsigned 64-bit field; Infinity if a double cannot hold it exactly. */
export function uint64At(view: DataView, offset: number): number {
  const value = view.getUint32(offset + 4, true) * TWO_TO_32 + view.getUint32(offset, true);
  return Number.isSafeInteger(value) ? value : Infinity;
}

/** A signed 64-bit field; ±Infinity if a double cannot hold it exactly. */
export function int64At(view: DataView, offset: number): number {
  const high = view.getInt32(offset + 4, true);
  const value = high * TWO_TO_32 + view.getUint32(offset, true);
  if (Number.isSafeInteger(value)) return value;
  return high < 0 ? -Infinity : Infinity;
}

/** Writes a whole number, which may be negative, as 64 bits of two's complement. */
export function setInt64(view: DataView, offset: number, value: number): void {
  const high = Math.floor(value / TWO_TO_32);
  view.setUint32(offset, value - high * TWO_TO_32, true);
  view.setInt32(offset + 4, high, true);
}

export function decodeRequest(message: Uint8Array): Request | Malformed {
  if (message.byteLength < InHeader.bytes) {
    const hasUnique = message.byteLength >= InHeader.unique + UNIQUE_BYTES;
    return {
      unique: hasUnique ? copyUnique(message) : null,
      opcode: message.byteLength >= InHeader.unique ? viewOf(message).getUint32(InHeader.opcode, true) : null,
      reason: `message of ${message.byteLength} bytes is shorter than a request header`,
    };
  }
  const header = viewOf(message);
  const unique = copyUnique(message);
  const opcode = header.getUint32(InHeader.opcode, true);
  const lengthBytes = header.getUint32(InHeader.len, true);
  if (lengthBytes !== message.byteLength) {
    return { unique, opcode, reason: `header says ${lengthBytes} bytes, message has ${message.byteLength}` };
  }
  const extensionBytes = header.getUint16(InHeader.extensionUnits, true) * 8;
  if (extensionBytes > message.byteLength - InHeader.bytes) {
    return { unique, opcode, reason: `extensions of ${extensionBytes} bytes are longer than the message` };
  }
  const body = message.subarray(InHeader.bytes, message.byteLength - extensionBytes);
  return {
    opcode,
    unique,
    resent: ((unique[UNIQUE_TOP_BYTE] ?? 0) & UNIQUE_TOP_RESENT) !== 0,
    nodeId: uint64At(header, InHeader.nodeId),
    caller: {
      uid: header.getUint32(InHeader.uid, true),
      gid: header.getUint32(InHeader.gid, true),
      pid: header.getUint32(InHeader.pid, true),
    },
    body,
    view: viewOf(body),
  };
}

/** What the file system needs to know a request again: the kernel's counter, as far as it will ever count. */
export function markOf({ unique, resent }: Request): RequestMark {
  const view = viewOf(unique);
  return { key: view.getUint16(4, true) * TWO_TO_32 + view.getUint32(0, true), isSecond: resent };
}

export function isMalformed(decoded: Request | Malformed): decoded is Malformed {
  return 'reason' in decoded;
}

/** `count` NUL-terminated strings that begin at `offset` and end exactly where the body ends, as bytes without NUL. */
export function stringsAt(body: Uint8Array, offset: number, count: number): Uint8Array[] {
  const strings: Uint8Array[] = [];
  let start = offset;
  for (let index = 0; index < count; index++) {
    const end = start > body.byteLength ? -1 : body.indexOf(0, start);
    if (end < 0) throw new WireError(Errno.EINVAL, 'a name has no NUL at its end');
    strings.push(body.subarray(start, end));
    start = end + 1;
  }
  if (start !== body.byteLength) throw new WireError(Errno.EINVAL, 'bytes follow the last name');
  return strings;
}

/** A directory entry's name. Its bytes must be UTF-8, because names are text in the store. */
export function nameOf(bytes: Uint8Array): string {
  if (bytes.byteLength === 0) throw new WireError(Errno.EINVAL, 'a name is empty');
  if (bytes.byteLength > NAME_BYTES_MAX) throw new WireError(Errno.ENAMETOOLONG, 'a name is longer than 255 bytes');
  if (bytes.includes(0x2f)) throw new WireError(Errno.EINVAL, 'a name holds a slash');
  return textOf(bytes);
}

/** Text out of bytes; EILSEQ when they are not UTF-8. */
export function textOf(bytes: Uint8Array): string {
  try {
    // A copy, because TextDecoder refuses views of shared memory.
    return textDecoder.decode(Uint8Array.from(bytes));
  } catch (thrown) {
    if (thrown instanceof TypeError) throw new WireError(Errno.EILSEQ, 'a name is not UTF-8');
    throw thrown;
  }
}

export function bytesOf(text: string): Uint8Array {
  return textEncoder.encode(text);
}

// --- Replies -----------------------------------------------------------------------------------------------------------

/** A successful reply of `payloadBytes` zero bytes after its header, to be filled from `OutHeader.bytes` on. */
export function newReply(unique: Uint8Array, payloadBytes: number): Uint8Array {
  const message = new Uint8Array(OutHeader.bytes + payloadBytes);
  viewOf(message).setUint32(OutHeader.len, message.byteLength, true);
  message.set(unique, OutHeader.unique);
  return message;
}

/** The first `payloadBytes` of a reply that was made for more. */
export function shortenReply(message: Uint8Array, payloadBytes: number): Uint8Array {
  const shorter = message.subarray(0, OutHeader.bytes + payloadBytes);
  viewOf(shorter).setUint32(OutHeader.len, shorter.byteLength, true);
  return shorter;
}

/** An error reply: 16 bytes, whatever the operation. `errno` is positive. */
export function errorReply(unique: Uint8Array, errno: number): Uint8Array {
  const message = newReply(unique, 0);
  viewOf(message).setInt32(OutHeader.error, -errno, true);
  return message;
}

/** The view of a reply's payload. */
export function payloadOf(message: Uint8Array): DataView {
  return viewOf(message.subarray(OutHeader.bytes));
}

export function dataReply(unique: Uint8Array, data: Uint8Array): Uint8Array {
  const message = newReply(unique, data.byteLength);
  message.set(data, OutHeader.bytes);
  return message;
}

export function attributesReply(unique: Uint8Array, attributes: Attributes, validity: Validity): Uint8Array {
  const message = newReply(unique, AttrOut.bytes);
  const view = payloadOf(message);
  setValidity(view, AttrOut.attrValid, AttrOut.attrValidNs, validity.attributesMs);
  setAttributes(view, AttrOut.attr, attributes);
  return message;
}

export function entryReply(unique: Uint8Array, attributes: Attributes, validity: Validity): Uint8Array {
  const message = newReply(unique, EntryOut.bytes);
  setEntry(payloadOf(message), 0, attributes, validity);
  return message;
}

export function openReply(unique: Uint8Array, handle: number, openFlags: number): Uint8Array {
  const message = newReply(unique, OpenOut.bytes);
  setOpen(payloadOf(message), 0, handle, openFlags);
  return message;
}

export function createReply(unique: Uint8Array, attributes: Attributes, validity: Validity, handle: number, openFlags: number): Uint8Array {
  const message = newReply(unique, EntryOut.bytes + OpenOut.bytes);
  const view = payloadOf(message);
  setEntry(view, 0, attributes, validity);
  setOpen(view, EntryOut.bytes, handle, openFlags);
  return message;
}

export function writeReply(unique: Uint8Array, sizeBytes: number): Uint8Array {
  const message = newReply(unique, WriteOut.bytes);
  payloadOf(message).setUint32(WriteOut.size, sizeBytes, true);
  return message;
}

export function lseekReply(unique: Uint8Array, offsetBytes: number): Uint8Array {
  const message = newReply(unique, LseekOut.bytes);
  setInt64(payloadOf(message), LseekOut.offset, offsetBytes);
  return message;
}

export function copyFileRangeReply(unique: Uint8Array, copiedBytes: number): Uint8Array {
  const message = newReply(unique, CopyFileRangeOut.bytes);
  setInt64(payloadOf(message), CopyFileRangeOut.copied, copiedBytes);
  return message;
}

export function statfsReply(unique: Uint8Array, statistics: StoreStatistics): Uint8Array {
  const message = newReply(unique, StatfsOut.bytes);
  const view = payloadOf(message);
  setInt64(view, StatfsOut.blocks, statistics.blocksTotal);
  setInt64(view, StatfsOut.blocksFree, statistics.blocksFree);
  setInt64(view, StatfsOut.blocksAvailable, statistics.blocksAvailable);
  setInt64(view, StatfsOut.files, statistics.nodesTotal);
  setInt64(view, StatfsOut.filesFree, statistics.nodesFree);
  view.setUint32(StatfsOut.blockSize, statistics.blockBytes, true);
  view.setUint32(StatfsOut.nameBytesMax, statistics.nameBytesMax, true);
  view.setUint32(StatfsOut.fragmentSize, statistics.blockBytes, true);
  return message;
}

export function statxReply(unique: Uint8Array, attributes: Attributes, validity: Validity): Uint8Array {
  const message = newReply(unique, StatxOut.bytes);
  const view = payloadOf(message);
  setValidity(view, StatxOut.attrValid, StatxOut.attrValidNs, validity.attributesMs);
  const at = StatxOut.stat;
  view.setUint32(at + Statx.mask, STATX_BASIC_STATS, true);
  view.setUint32(at + Statx.blockSize, PREFERRED_IO_BYTES, true);
  view.setUint32(at + Statx.linkCount, attributes.linkCount, true);
  view.setUint32(at + Statx.uid, attributes.uid, true);
  view.setUint32(at + Statx.gid, attributes.gid, true);
  view.setUint16(at + Statx.mode, modeOf(attributes), true);
  setInt64(view, at + Statx.ino, attributes.nodeId);
  setInt64(view, at + Statx.size, attributes.sizeBytes);
  setInt64(view, at + Statx.blocks, Math.ceil(attributes.allocatedBytes / 512));
  for (const [offset, timeUs] of [[Statx.atime, attributes.atimeUs], [Statx.ctime, attributes.ctimeUs], [Statx.mtime, attributes.mtimeUs]] as const) {
    setInt64(view, at + offset, Math.floor(timeUs / 1_000_000));
    view.setUint32(at + offset + 8, nanosecondsOf(timeUs), true);
  }
  return message;
}

// --- Directories -------------------------------------------------------------------------------------------------------

/** Bytes that an entry takes in a READDIR or READDIRPLUS reply. */
export function direntBytes(nameBytes: number, plus: boolean): number {
  const unpadded = (plus ? DirentPlus.bytes : Dirent.bytes) + nameBytes;
  return Math.ceil(unpadded / Dirent.alignment) * Dirent.alignment;
}

export interface DirentFields {
  readonly name: Uint8Array;
  readonly nodeId: number;
  readonly kind: NodeKind;
  /** What the kernel passes to read on after this entry. */
  readonly nextOffset: number;
  /** Given with READDIRPLUS, except for `.` and `..`: without them the kernel makes no node of the entry. */
  readonly attributes: Attributes | null;
}

/** Writes one entry at `offset` of a zeroed payload that has room for it. */
export function setDirent(payload: Uint8Array, offset: number, entry: DirentFields, plus: boolean, validity: Validity): void {
  const view = viewOf(payload);
  if (plus && entry.attributes !== null) setEntry(view, offset + DirentPlus.entry, entry.attributes, validity);
  const at = offset + (plus ? DirentPlus.dirent : 0);
  setInt64(view, at + Dirent.ino, entry.nodeId);
  setInt64(view, at + Dirent.offset, entry.nextOffset);
  view.setUint32(at + Dirent.nameLength, entry.name.byteLength, true);
  view.setUint32(at + Dirent.type, typeBitsOf[entry.kind] / 0o10000, true);
  payload.set(entry.name, at + Dirent.bytes);
}

// --- Parts -------------------------------------------------------------------------------------------------------------

/** st_blksize: one block, the unit in which writes cost least. */
const PREFERRED_IO_BYTES = 4096;

/**
 * Type and permission bits. Files never show set-user-id or set-group-id: the mount is nosuid, so that they mean
 * nothing, and a file that cannot carry them needs nothing done when a write has to take them away
 * (HANDLE_KILLPRIV_V2), on the hot path least of all.
 */
export function modeOf(attributes: Attributes): number {
  return typeBitsOf[attributes.kind] | permissionsFor(attributes.kind, attributes.mode);
}

/** The permission bits of `mode` that a node of this kind may carry. */
export function permissionsFor(kind: NodeKind, mode: number): number {
  const permissions = mode & ModeBits.PERMISSIONS;
  return kind === 'directory' ? permissions : permissions & ~(ModeBits.SETUID | ModeBits.SETGID);
}

function setEntry(view: DataView, offset: number, attributes: Attributes, validity: Validity): void {
  setInt64(view, offset + EntryOut.nodeId, attributes.nodeId);
  setInt64(view, offset + EntryOut.generation, attributes.generation);
  setValidity(view, offset + EntryOut.entryValid, offset + EntryOut.entryValidNs, validity.entryMs);
  setValidity(view, offset + EntryOut.attrValid, offset + EntryOut.attrValidNs, validity.attributesMs);
  setAttributes(view, offset + EntryOut.attr, attributes);
}

function setOpen(view: DataView, offset: number, handle: number, openFlags: number): void {
  setInt64(view, offset + OpenOut.handle, handle);
  view.setUint32(offset + OpenOut.openFlags, openFlags, true);
}

function setAttributes(view: DataView, at: number, attributes: Attributes): void {
  setInt64(view, at + Attr.ino, attributes.nodeId);
  setInt64(view, at + Attr.size, attributes.sizeBytes);
  setInt64(view, at + Attr.blocks, Math.ceil(attributes.allocatedBytes / 512));
  setInt64(view, at + Attr.atime, Math.floor(attributes.atimeUs / 1_000_000));
  setInt64(view, at + Attr.mtime, Math.floor(attributes.mtimeUs / 1_000_000));
  setInt64(view, at + Attr.ctime, Math.floor(attributes.ctimeUs / 1_000_000));
  view.setUint32(at + Attr.atimeNs, nanosecondsOf(attributes.atimeUs), true);
  view.setUint32(at + Attr.mtimeNs, nanosecondsOf(attributes.mtimeUs), true);
  view.setUint32(at + Attr.ctimeNs, nanosecondsOf(attributes.ctimeUs), true);
  view.setUint32(at + Attr.mode, modeOf(attributes), true);
  view.setUint32(at + Attr.linkCount, attributes.linkCount, true);
  view.setUint32(at + Attr.uid, attributes.uid, true);
  view.setUint32(at + Attr.gid, attributes.gid, true);
  view.setUint32(at + Attr.blockSize, PREFERRED_IO_BYTES, true);
}

/** The part of a time below the second, which is positive before 1970 too. */
function nanosecondsOf(timeUs: number): number {
  return (timeUs - Math.floor(timeUs / 1_000_000) * 1_000_000) * 1000;
}

function setValidity(view: DataView, secondsOffset: number, nanosecondsOffset: number, validMs: number): void {
  setInt64(view, secondsOffset, Math.floor(validMs / 1000));
  view.setUint32(nanosecondsOffset, (validMs % 1000) * 1_000_000, true);
}

function copyUnique(message: Uint8Array): Uint8Array {
  // Not slice(): that of a Buffer is a view, and the caller may reuse the message while a reply is still to come.
  return Uint8Array.from(message.subarray(InHeader.unique, InHeader.unique + UNIQUE_BYTES));
}
