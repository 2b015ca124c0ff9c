/**
 * Reads what fuse-native knows about a request and does not hand on: the second time of utimens, the flags of a write.
 *
 * The addon passes each handler the memory of its `fuse_thread_locals_t`. Two things in it are wanted. utimens passes
 * the access time twice and the modification time never (a slip in version 2.2.6), although both lie in the record. And
 * a write has `struct fuse_file_info`, whose flags carry O_DSYNC when the caller asked for a durable write, with the
 * file's flags or with RWF_DSYNC for this write alone: the promise of such a write could not be kept without them.
 *
 * Offsets are those of the 64-bit C ABI. They are believed only when the fields beside them say what the handler's own
 * arguments say; otherwise the answer is null, and the caller must choose what is safe.
 *
 * | offset | field of fuse_thread_locals_t | | offset | field of fuse_file_info |
 * |---|---|---|---|---|
 * | 8 | op, u32 | | 0 | flags, i32 |
 * | 48 | info, pointer | | 24 | fh, u64 |
 * | 64 | offset, i64 | | | |
 * | 72 | len, u64 | | | |
 * | 104, 112 | atime, mtime, i64 milliseconds | | | |
 */
import koffi from 'koffi';

const AT_OPERATION = 8;
const AT_INFO = 48;
const AT_OFFSET = 64;
const AT_LENGTH = 72;
const AT_ATIME = 104;
const AT_MTIME = 112;
const RECORD_BYTES_MIN = 120;
const INFO_HANDLE = 24n;

export const OPERATION_UTIMENS = 12;
export const OPERATION_WRITE = 24;

export interface WriteArguments {
  readonly fd: number;
  readonly lengthBytes: number;
  readonly offsetBytes: number;
}

/** Linux open flags that hold for this one write, or null if the record is not laid out as expected. */
export function writeFlags(record: Buffer, write: WriteArguments): number | null {
  if (record.length < RECORD_BYTES_MIN) return null;
  if (record.readUInt32LE(AT_OPERATION) !== OPERATION_WRITE) return null;
  if (Number(record.readBigInt64LE(AT_OFFSET)) !== write.offsetBytes) return null;
  if (Number(record.readBigUInt64LE(AT_LENGTH)) !== write.lengthBytes) return null;
  const info = record.readBigUInt64LE(AT_INFO);
  if (info === 0n || Number(koffi.decode.uint64(info + INFO_HANDLE)) !== write.fd) return null;
  return koffi.decode.int32(info);
}

/** The modification time in milliseconds, or null if the record is not laid out as expected. */
export function modificationTimeMs(record: Buffer, atimeLow: number, atimeHigh: number): number | null {
  if (record.length < RECORD_BYTES_MIN) return null;
  if (record.readUInt32LE(AT_OPERATION) !== OPERATION_UTIMENS) return null;
  if (record.readUInt32LE(AT_ATIME) !== atimeLow || record.readUInt32LE(AT_ATIME + 4) !== atimeHigh) return null;
  return Number(record.readBigInt64LE(AT_MTIME));
}
