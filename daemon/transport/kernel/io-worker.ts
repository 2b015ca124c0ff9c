/**
 * An I/O worker: reads /dev/fuse and answers what concerns the data of open disks, one request after another.
 *
 * A thread of its own, with nothing but blocking system calls: no event loop, no promise, no callback, nothing allocated
 * between a request and its answer. READ, WRITE, LSEEK and FALLOCATE of disks whose map it knows are answered here;
 * everything else, and what only the main thread can do (a map that must grow, a flush before the answer, a source that must be asked), goes to it as
 * bytes, and is answered from there. A worker that sleeps in read(2) gets no messages, so it looks at a generation word
 * after each read, and takes its messages before it serves the request: news of a disk comes before the reply to its OPEN,
 * hence before the first request for it.
 *
 * An exception ends the thread, and with it the server: the holder starts the next one, which gets this request again.
 */
import { parentPort, receiveMessageOnPort, type MessagePort } from 'node:worker_threads';

import { Errno } from '../../../blockstore/errors.js';
import { SharedDisk, type DiskHandles } from '../../../blockstore/hot/block-map.js';
import { FETCH, HAND_OVER, REQUEST_BYTES_MAX, enterDisk, leaveDisk, type HotContext } from '../../../blockstore/hot/context.js';
import { readDisk, writeDisk } from '../../../blockstore/hot/data-path.js';
import { discardDisk } from '../../../blockstore/hot/discard.js';
import { IoBuffer, becomeIoFlusher, keepPages, realDoor } from '../../../blockstore/hot/door.js';
import { seekDisk } from '../../../blockstore/hot/seek.js';
import { createThreadContext, type ThreadBoot } from '../../../blockstore/hot/thread-context.js';
import {
  FallocateFlag, FallocateIn, InHeader, LinuxOpenFlag, LseekIn, LseekOut, Opcode, OutHeader, ReadIn, Whence, WriteIn, WriteOut,
} from './protocol.js';

/** What the worker is told, once, when it shall serve: it is started before, and loads itself meanwhile. */
export interface IoWorkerData {
  readonly boot: ThreadBoot;
  readonly fuseFd: number;
  /** Carries requests to the main thread and news of disks to this one. */
  readonly port: MessagePort;
  /** O_DIRECT of this machine; it differs between architectures. */
  readonly directFlag: number;
}

/** To the worker. */
export type WorkerNews =
  | { readonly type: 'opened'; readonly handles: DiskHandles }
  | { readonly type: 'closed'; readonly nodeId: number; readonly serial: number };

/** From the worker. */
export type WorkerMessage =
  | { readonly type: 'request'; readonly message: Uint8Array }
  /** The write is in the store's cache; make it durable, then send the reply. */
  | { readonly type: 'flush-reply'; readonly nodeId: number; readonly reply: Uint8Array }
  | { readonly type: 'commit-wanted' }
  /** The mount is gone. */
  | { readonly type: 'ended'; readonly errno: number };

const PAGE = 4096;
/** The payload of a WRITE, and of a reply to READ, lies on a page of its own. */
const PAYLOAD_AT = PAGE;
const REQUEST_AT = PAYLOAD_AT - InHeader.bytes - WriteIn.bytes;
const REPLY_AT = PAYLOAD_AT - OutHeader.bytes;
const WORDS_2_32 = 4294967296;
/** QEMU and others find a disk's alignment by trying what is refused. */
const DIRECT_ALIGNMENT_BYTES = 512;
const DURABLE_FLAGS = LinuxOpenFlag.DSYNC | LinuxOpenFlag.SYNC_ONLY;

class IoWorker {
  private readonly data: IoWorkerData;
  private readonly context: HotContext;
  private readonly request = new IoBuffer(PAYLOAD_AT + REQUEST_BYTES_MAX + PAGE);
  private readonly reply = new IoBuffer(PAYLOAD_AT + REQUEST_BYTES_MAX);
  private readonly requestWords: Uint32Array;
  private readonly replyWords: Uint32Array;
  private readonly replySigned: Int32Array;
  private readonly disks = new Map<number, SharedDisk>();
  private generation = -1;
  private commitWanted = false;

  constructor(data: IoWorkerData) {
    this.data = data;
    this.context = createThreadContext(data.boot, realDoor, () => { this.wantCommit(); });
    this.requestWords = wordsOf(this.request);
    this.replyWords = wordsOf(this.reply);
    this.replySigned = new Int32Array(this.replyWords.buffer, this.replyWords.byteOffset, this.replyWords.length);
    // The kernel takes a request off its list, then copies it here. When it must fault a page in for that, and we are killed at that very moment, it gives
    // up and answers EIO for us: no next server gets that request. A RELEASE that is lost so leaves its file open for ever.
    if (!keepPages(this.request)) throw new Error('the kernel refused to keep the pages of a request buffer from children');
  }

  /** Serves until the mount is gone; the errno that said so. */
  run(): number {
    const { door } = this.context;
    const address = this.request.address + REQUEST_AT;
    const capacity = this.request.lengthBytes - REQUEST_AT;
    for (;;) {
      const got = door.read('fuse-read', this.data.fuseFd, address, capacity);
      if (got < 0) {
        if (got === -Errno.ENODEV || got === -Errno.ECONNABORTED) return -got;
        // EINTR, EAGAIN: nothing happened. ENOENT: the request was withdrawn while it was copied.
        if (got === -Errno.EINTR || got === -Errno.EAGAIN || got === -Errno.ENOENT) continue;
        throw new Error(`reading /dev/fuse failed with errno ${-got}`);
      }
      // No device of the kernel does that: whatever this is, it would be read again and again.
      if (got === 0) throw new Error('/dev/fuse gave a message of no bytes');
      if (this.context.shared.generation() !== this.generation) this.takeNews();
      this.serve(got);
    }
  }

  private serve(lengthBytes: number): void {
    const words = this.requestWords;
    const opcode = words[(REQUEST_AT + InHeader.opcode) / 4]!;
    if (opcode !== Opcode.READ && opcode !== Opcode.WRITE && opcode !== Opcode.LSEEK && opcode !== Opcode.FALLOCATE) {
      this.handOn(lengthBytes);
      return;
    }
    const nodeId = this.u64(REQUEST_AT + InHeader.nodeId);
    const disk = this.disks.get(nodeId);
    // A body that is too short would be read on into what the request before it left behind.
    if (disk === undefined || lengthBytes < InHeader.bytes + bodyBytesOf(opcode) || !enterDisk(this.context, disk)) {
      this.handOn(lengthBytes);
      return;
    }
    let handled: boolean;
    switch (opcode) {
      case Opcode.READ: handled = this.serveRead(disk); break;
      case Opcode.WRITE: handled = this.serveWrite(disk, lengthBytes); break;
      case Opcode.LSEEK: handled = this.serveSeek(disk); break;
      default: handled = this.serveFallocate(disk); break;
    }
    leaveDisk(this.context, disk);
    this.commitWanted = false;
    if (!handled) this.handOn(lengthBytes);
  }

  private serveRead(disk: SharedDisk): boolean {
    const words = this.requestWords;
    const body = REQUEST_AT + InHeader.bytes;
    const offsetBytes = this.u64(body + ReadIn.offset);
    const sizeBytes = words[(body + ReadIn.size) / 4]!;
    if (sizeBytes > REQUEST_BYTES_MAX || !Number.isSafeInteger(offsetBytes)) return false;
    if (this.isMisaligned(words[(body + ReadIn.flags) / 4]!, offsetBytes, sizeBytes)) {
      this.answer(-Errno.EINVAL, 0);
      return true;
    }
    const got = readDisk(this.context, disk, offsetBytes, sizeBytes, this.reply, PAYLOAD_AT);
    if (got === FETCH) return false;
    this.answer(got < 0 ? got : 0, Math.max(0, got));
    return true;
  }

  private serveWrite(disk: SharedDisk, lengthBytes: number): boolean {
    const words = this.requestWords;
    const body = REQUEST_AT + InHeader.bytes;
    const offsetBytes = this.u64(body + WriteIn.offset);
    const sizeBytes = words[(body + WriteIn.size) / 4]!;
    const flags = words[(body + WriteIn.flags) / 4]!;
    if (sizeBytes !== lengthBytes - InHeader.bytes - WriteIn.bytes || !Number.isSafeInteger(offsetBytes + sizeBytes)) return false;
    if (this.isMisaligned(flags, offsetBytes, sizeBytes)) {
      this.answer(-Errno.EINVAL, 0);
      return true;
    }
    const put = writeDisk(this.context, disk, offsetBytes, sizeBytes, this.request, PAYLOAD_AT);
    if (put === HAND_OVER || put === FETCH) return false;
    if (put < 0) {
      this.answer(put, 0);
      return true;
    }
    this.replyWords[PAYLOAD_AT / 4] = put;
    this.replyWords[PAYLOAD_AT / 4 + 1] = 0;
    if ((flags & DURABLE_FLAGS) !== 0) this.flushThenAnswer(disk.nodeId);
    else this.answer(0, WriteOut.bytes);
    return true;
  }

  private serveSeek(disk: SharedDisk): boolean {
    const body = REQUEST_AT + InHeader.bytes;
    const offsetBytes = this.u64(body + LseekIn.offset);
    const whence = this.requestWords[(body + LseekIn.whence) / 4]!;
    if ((whence !== Whence.DATA && whence !== Whence.HOLE) || !Number.isSafeInteger(offsetBytes)) return false;
    const found = seekDisk(this.context, disk, offsetBytes, whence === Whence.DATA);
    if (found < 0) {
      this.answer(found, 0);
      return true;
    }
    this.replyWords[PAYLOAD_AT / 4] = found % WORDS_2_32;
    this.replyWords[PAYLOAD_AT / 4 + 1] = Math.floor(found / WORDS_2_32);
    this.answer(0, LseekOut.bytes);
    return true;
  }

  private serveFallocate(disk: SharedDisk): boolean {
    const body = REQUEST_AT + InHeader.bytes;
    const offsetBytes = this.u64(body + FallocateIn.offset);
    const lengthBytes = this.u64(body + FallocateIn.length);
    const mode = this.requestWords[(body + FallocateIn.mode) / 4]!;
    const end = offsetBytes + lengthBytes;
    if (!Number.isSafeInteger(end)) return false;
    const punches = mode === (FallocateFlag.PUNCH_HOLE | FallocateFlag.KEEP_SIZE);
    const zeroes = (mode & ~FallocateFlag.KEEP_SIZE) === FallocateFlag.ZERO_RANGE && ((mode & FallocateFlag.KEEP_SIZE) !== 0 || end <= disk.sizeBytes());
    // What makes a file longer, or only reserves room, is rare: the main thread does it.
    if (!punches && !zeroes) return false;
    const failed = discardDisk(this.context, disk, offsetBytes, lengthBytes);
    if (failed === HAND_OVER || failed === FETCH) return false;
    this.answer(failed, 0);
    return true;
  }

  private isMisaligned(flags: number, offsetBytes: number, sizeBytes: number): boolean {
    return (flags & this.data.directFlag) !== 0 && (offsetBytes % DIRECT_ALIGNMENT_BYTES !== 0 || sizeBytes % DIRECT_ALIGNMENT_BYTES !== 0);
  }

  /** Sends the reply whose payload lies at PAYLOAD_AT. */
  private answer(error: number, payloadBytes: number): void {
    const total = this.header(error, payloadBytes);
    const put = this.context.door.write('fuse-reply', this.data.fuseFd, this.reply.address + REPLY_AT, total);
    // ENOENT: the request was given up meanwhile (interrupted, or the connection aborted).
    if (put !== total && put !== -Errno.ENOENT && put !== -Errno.ENODEV && put !== -Errno.ECONNABORTED) {
      throw new Error(`a reply of ${total} bytes was refused by /dev/fuse with ${put}`);
    }
  }

  private header(error: number, payloadBytes: number): number {
    const total = OutHeader.bytes + (error === 0 ? payloadBytes : 0);
    const at = REPLY_AT / 4;
    const unique = (REQUEST_AT + InHeader.unique) / 4;
    this.replyWords[at] = total;
    this.replySigned[at + 1] = error;
    this.replyWords[at + 2] = this.requestWords[unique]!;
    this.replyWords[at + 3] = this.requestWords[unique + 1]!;
    return total;
  }

  private flushThenAnswer(nodeId: number): void {
    const total = this.header(0, WriteOut.bytes);
    this.post({ type: 'flush-reply', nodeId, reply: new Uint8Array(this.reply.bytes.subarray(REPLY_AT, REPLY_AT + total)) });
  }

  private handOn(lengthBytes: number): void {
    this.post({ type: 'request', message: new Uint8Array(this.request.bytes.subarray(REQUEST_AT, REQUEST_AT + lengthBytes)) });
  }

  private wantCommit(): void {
    if (this.commitWanted) return;
    this.commitWanted = true;
    this.post({ type: 'commit-wanted' });
  }

  private post(message: WorkerMessage): void {
    this.data.port.postMessage(message);
  }

  private takeNews(): void {
    // Read before the messages: one that comes in between is taken again, none is missed.
    this.generation = this.context.shared.generation();
    for (let received = receiveMessageOnPort(this.data.port); received !== undefined; received = receiveMessageOnPort(this.data.port)) {
      const news = received.message as WorkerNews;
      if (news.type === 'opened') this.disks.set(news.handles.nodeId, new SharedDisk(news.handles));
      else if (this.disks.get(news.nodeId)?.serial === news.serial) this.disks.delete(news.nodeId);
    }
  }

  private u64(at: number): number {
    return (this.requestWords[at / 4]!) + (this.requestWords[at / 4 + 1]!) * WORDS_2_32;
  }
}

/** Bytes that the body of what is answered here has at least. */
function bodyBytesOf(opcode: number): number {
  switch (opcode) {
    case Opcode.READ: return ReadIn.bytes;
    case Opcode.WRITE: return WriteIn.bytes;
    case Opcode.LSEEK: return LseekIn.bytes;
    default: return FallocateIn.bytes;
  }
}

function wordsOf(buffer: IoBuffer): Uint32Array {
  return new Uint32Array(buffer.bytes.buffer, buffer.bytes.byteOffset, Math.floor(buffer.lengthBytes / 4));
}

becomeIoFlusher();
parentPort?.once('message', (data: IoWorkerData) => {
  const errno = new IoWorker(data).run();
  data.port.postMessage({ type: 'ended', errno } satisfies WorkerMessage);
  // The port would keep the thread alive for messages that nobody reads.
  data.port.close();
});
