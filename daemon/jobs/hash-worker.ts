/**
 * The hash worker: reads chunks of layers' files and hashes them piece by piece, or settles them.
 *
 * A thread of its own, which a check or the scrub has for itself. It is the lowest of all: idle class for its disk accesses,
 * the weakest share of the processor, and when guests were active while it read a piece it rests for as long as that took. Files
 * are opened read-only for hashing and read with O_DIRECT, because a page cache would answer for a disk that has forgotten; where a
 * file system does not know that (some tmpfs), what is cached is dropped first.
 *
 * Settling is for a file whose fdatasync failed: the kernel marks pages clean that it could not write, so that reads give
 * what the disk does not have. Each block is read from the disk and, where pages of it are cached, through the cache; where the two differ,
 * what the disk has is written back with O_DIRECT, which also throws the wrong page away. Then the pages are dropped. A hole without a
 * page in the cache is passed over, so that a large sparse file takes as long as what it holds.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { parentPort, workerData } from 'node:worker_threads';

import koffi from 'koffi';

import { HASH_BYTES, PIECE_BYTES, type LayerChunk } from '../../blockstore/checksum-units.js';
import { Errno } from '../../blockstore/errors.js';
import { IoBuffer, SEEK_DATA, becomeIoFlusher, realDoor } from '../../blockstore/hot/door.js';
import { SharedState } from '../../blockstore/hot/shared-state.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { HashOrder, HashReport, HashWorkerData, UnreadableExtent } from './hash-messages.js';

const POSIX_FADV_DONTNEED = 4;
const PRIO_PROCESS = 0;
const NICE_WEAKEST = 19;
const SYS_IOPRIO_SET = process.arch === 'arm64' ? 30 : 251;
/** The same for all processors; from kernel 6.5 on. */
const SYS_CACHESTAT = 451;
const IOPRIO_WHO_PROCESS = 1;
const IOPRIO_IDLE = 3 * 8192;
/** What a limited read may make up for when it was kept from its rate. */
const CATCH_UP_MS = 200;

const libc = koffi.load('libc.so.6');
const sysFadvise = libc.func('int posix_fadvise(int fd, int64_t off, int64_t len, int advice)') as unknown as (...args: readonly number[]) => number;
const sysSetPriority = libc.func('int setpriority(int which, uint32_t who, int value)') as unknown as (...args: readonly number[]) => number;
const sysCall = libc.func('long syscall(long number, long a, long b, long c, long d)') as unknown as (...args: readonly number[]) => number;

const port = parentPort;
if (port === null) throw new Error('the hash worker is started as a thread');
const { shared: handles } = workerData as HashWorkerData;
becomeIoFlusher();
// Both concern this thread alone, and neither is needed: a kernel that refuses leaves the rests below.
sysSetPriority(PRIO_PROCESS, 0, NICE_WEAKEST);
sysCall(SYS_IOPRIO_SET, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE, 0);
const shared = handles === null ? null : new SharedState(handles, 0);
const buffer = new IoBuffer(PIECE_BYTES);
const cached = new IoBuffer(PIECE_BYTES);
/** Two words of a range, then five of what the cache has of it. */
const cacheWords = new IoBuffer(64);
let notBeforeMs = 0;

/** The file opened past the page cache, and whether it is. */
function openDirect(file: string, flags: number): { readonly fd: number; readonly isDirect: boolean } {
  try {
    return { fd: fs.openSync(file, flags | fs.constants.O_DIRECT | fs.constants.O_NOFOLLOW), isDirect: true };
  } catch (thrown) {
    if ((thrown as NodeJS.ErrnoException).code !== 'EINVAL') throw thrown;
    return { fd: fs.openSync(file, flags | fs.constants.O_NOFOLLOW), isDirect: false };
  }
}

/** Reads up to the end of the piece or of the file, whichever comes first; what is behind the file's end is zero. Negative errno. */
function readPiece(fd: number, into: IoBuffer, offsetBytes: number, lengthBytes: number): number {
  let got = 0;
  while (got < lengthBytes) {
    // O_DIRECT wants whole blocks, and gives fewer at the end of the file. An end within a block ends the file.
    const wanted = Math.ceil((lengthBytes - got) / BLOCK_BYTES) * BLOCK_BYTES;
    const count = realDoor.pread('hash-read', fd, into.address + got, wanted, offsetBytes + got);
    if (count < 0) return count;
    got += count;
    if (count === 0 || got % BLOCK_BYTES !== 0) break;
  }
  const read = Math.min(got, lengthBytes);
  into.bytes.fill(0, read, Math.ceil(lengthBytes / BLOCK_BYTES) * BLOCK_BYTES);
  return read;
}

/** Zeros what the layer does not own. */
function maskUnowned(chunk: LayerChunk, offsetBytes: number, lengthBytes: number): void {
  if (chunk.owned === null) return;
  let at = 0;
  for (const { block, count } of chunk.owned) {
    const from = Math.max(0, block * BLOCK_BYTES - offsetBytes);
    const to = Math.min(lengthBytes, (block + count) * BLOCK_BYTES - offsetBytes);
    if (to <= 0) continue;
    if (from >= lengthBytes) break;
    buffer.bytes.fill(0, at, from);
    at = to;
  }
  buffer.bytes.fill(0, at, lengthBytes);
}

function ownsAny(chunk: LayerChunk, offsetBytes: number, lengthBytes: number): boolean {
  return chunk.owned === null || chunk.owned.some(({ block, count }) => block * BLOCK_BYTES < offsetBytes + lengthBytes && (block + count) * BLOCK_BYTES > offsetBytes);
}

/** False when the file system says that the piece is a hole. One that cannot tell has none. */
function hasData(fd: number, offsetBytes: number, lengthBytes: number): boolean {
  const data = realDoor.seek('hash-seek', fd, offsetBytes, SEEK_DATA);
  return data === -Errno.ENXIO ? false : data < 0 || data < offsetBytes + lengthBytes;
}

/** Where the file may hold something again, from `offsetBytes` on. */
function dataFrom(fd: number, offsetBytes: number): number {
  const data = realDoor.seek('hash-seek', fd, offsetBytes, SEEK_DATA);
  return data === -Errno.ENXIO ? Number.MAX_SAFE_INTEGER : data < 0 ? offsetBytes : data;
}

/** False when the page cache has no page of it. A kernel that cannot say may have some. */
function isCached(fd: number, offsetBytes: number, lengthBytes: number): boolean {
  cacheWords.bytes.writeBigUInt64LE(BigInt(offsetBytes), 0);
  cacheWords.bytes.writeBigUInt64LE(BigInt(lengthBytes), 8);
  return sysCall(SYS_CACHESTAT, fd, cacheWords.address, cacheWords.address + 16, 0) !== 0 || cacheWords.bytes.readBigUInt64LE(16) > 0n;
}

async function work(order: HashOrder): Promise<HashReport> {
  const { chunk, ticket } = order;
  const isSettling = order.type === 'settle';
  const opened = order.fromDisk || isSettling ? openDirect(chunk.file, isSettling ? fs.constants.O_RDWR : fs.constants.O_RDONLY)
    : { fd: fs.openSync(chunk.file, fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW), isDirect: false };
  const cachedFd = isSettling ? fs.openSync(chunk.file, fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW) : -1;
  const unreadable: UnreadableExtent[] = [];
  const hashes = new Uint8Array(Math.ceil(chunk.lengthBytes / PIECE_BYTES) * HASH_BYTES);
  let readBytes = 0;
  let differentBytes = 0;
  try {
    if (order.fromDisk && !opened.isDirect && !isSettling) sysFadvise(opened.fd, chunk.offsetBytes, chunk.lengthBytes, POSIX_FADV_DONTNEED);
    const isPassedOver = isSettling && !hasData(opened.fd, chunk.offsetBytes, chunk.lengthBytes) && !isCached(cachedFd, chunk.offsetBytes, chunk.lengthBytes);
    for (let at = 0; at < chunk.lengthBytes && !isPassedOver; at += PIECE_BYTES) {
      const offsetBytes = chunk.offsetBytes + at;
      const lengthBytes = Math.min(PIECE_BYTES, chunk.lengthBytes - at);
      if (!ownsAny(chunk, offsetBytes, lengthBytes)) continue;
      // A page that the disk never got may lie over a hole.
      const mayBeStale = isSettling && isCached(cachedFd, offsetBytes, lengthBytes);
      if (!mayBeStale && !hasData(opened.fd, offsetBytes, lengthBytes)) continue;
      const guestsBefore = shared?.requestsOfOthers() ?? 0;
      const startedMs = performance.now();
      const got = readPiece(opened.fd, buffer, offsetBytes, lengthBytes);
      if (got < 0) unreadable.push({ offsetBytes, lengthBytes, errno: -got });
      else {
        readBytes += got;
        if (mayBeStale && opened.isDirect) differentBytes += settle(opened.fd, cachedFd, chunk, offsetBytes, got);
        if (!isSettling) {
          maskUnowned(chunk, offsetBytes, lengthBytes);
          hashes.set(hashOf(lengthBytes), (at / PIECE_BYTES) * HASH_BYTES);
        }
      }
      if (isSettling) sysFadvise(cachedFd, offsetBytes, lengthBytes, POSIX_FADV_DONTNEED);
      await makeWay(order, lengthBytes, startedMs, (shared?.requestsOfOthers() ?? 0) !== guestsBefore);
    }
    const endBytes = chunk.offsetBytes + chunk.lengthBytes;
    const nextBytes = readBytes === 0 && unreadable.length === 0 ? dataFrom(opened.fd, endBytes) : endBytes;
    return { type: 'done', ticket, hashes, unreadable, readBytes, differentBytes, nextBytes };
  } finally {
    fs.closeSync(opened.fd);
    if (cachedFd >= 0) fs.closeSync(cachedFd);
  }
}

/** 32 zero bytes for what reads as zeros: a hole and written zeros are the same content. */
function hashOf(lengthBytes: number): Uint8Array {
  const content = buffer.bytes.subarray(0, lengthBytes);
  if (isZero(content)) return new Uint8Array(HASH_BYTES);
  return createHash('sha256').update(content).digest();
}

function isZero(content: Buffer): boolean {
  // The first byte is zero, and each byte is its neighbour.
  return content[0] === 0 && content.subarray(1).equals(content.subarray(0, content.length - 1));
}

/** Bytes of owned blocks that the cache had and the disk had not; the disk's are the cache's now. */
function settle(fd: number, cachedFd: number, chunk: LayerChunk, offsetBytes: number, lengthBytes: number): number {
  const got = readPiece(cachedFd, cached, offsetBytes, lengthBytes);
  if (got < 0) throw Object.assign(new Error('reading through the page cache'), { errno: got });
  let different = 0;
  for (let at = 0; at < lengthBytes; at += BLOCK_BYTES) {
    const end = Math.min(lengthBytes, at + BLOCK_BYTES);
    if (buffer.bytes.compare(cached.bytes, at, end, at, end) === 0) continue;
    const block = (offsetBytes + at) / BLOCK_BYTES;
    if (chunk.owned?.some((run) => block >= run.block && block < run.block + run.count) === false) continue;
    different += end - at;
    // A file's last block may be shorter than what O_DIRECT can write: its length is put right by whoever opens it.
    const wrote = realDoor.pwrite('settle-write', fd, buffer.address + at, BLOCK_BYTES, offsetBytes + at);
    if (wrote !== BLOCK_BYTES) throw Object.assign(new Error('writing a block back'), { errno: wrote < 0 ? wrote : -Errno.EIO });
  }
  return different;
}

/** The rate holds, and guests come first. */
async function makeWay(order: HashOrder, bytes: number, startedMs: number, guestsWereActive: boolean): Promise<void> {
  const nowMs = performance.now();
  if (guestsWereActive) await sleep(Math.max(1, nowMs - startedMs));
  if (order.rateBytesPerSecond === 0) return;
  notBeforeMs = Math.max(nowMs - CATCH_UP_MS, notBeforeMs) + (bytes * 1000) / order.rateBytesPerSecond;
  while (performance.now() < notBeforeMs) await sleep(Math.min(1000, Math.max(1, notBeforeMs - performance.now())));
}

port.on('message', (order: HashOrder) => {
  void work(order).catch((thrown: unknown): HashReport => {
    const { errno, message } = thrown as NodeJS.ErrnoException;
    // What no system call said is a fault of the program, and ends the thread.
    if (typeof errno !== 'number') throw thrown;
    return { type: 'failed', ticket: order.ticket, errno: -errno, what: message };
  }).then((report) => { port.postMessage(report); });
});
