/**
 * Copies a raw file into the store: a thread of its own, holes kept, shared with the source where the file system can.
 *
 * Steps of 16 MiB, each reported, so that the main thread can show progress and end the thread between two of them.
 * The source is a descriptor, not a path: it was looked at, and must not become another file. FICLONE first: on XFS and btrfs the whole copy is then one metadata operation.
 */
import fs from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';

import koffi from 'koffi';

import { Errno } from '../../blockstore/errors.js';
import { IoBuffer, SEEK_DATA, SEEK_HOLE, realDoor } from '../../blockstore/hot/door.js';

export interface CopyWorkerData {
  /** The main thread's descriptor, which it keeps open until this thread has ended. */
  readonly sourceFd: number;
  readonly target: string;
  /** Bytes to copy: the source's size when it was looked at. */
  readonly sizeBytes: number;
}

export type CopyReport =
  | { readonly type: 'progress'; readonly doneBytes: number }
  | { readonly type: 'done'; readonly sharedExtents: boolean }
  | { readonly type: 'failed'; readonly errno: number; readonly what: string };

const FICLONE = 0x40049409;
const STEP_BYTES = 16 * 1024 * 1024;

const libc = koffi.load('libc.so.6');
const sysIoctl = libc.func('int ioctl(int fd, unsigned long request, int argument)') as unknown as (fd: number, request: number, argument: number) => number;

class CopyFailure extends Error {
  readonly errno: number;

  constructor(what: string, code: number) {
    super(what);
    this.errno = -code;
  }
}

function copy({ sourceFd, target, sizeBytes }: CopyWorkerData, onProgress: (doneBytes: number) => void): boolean {
  const targetFd = fs.openSync(target, fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_EXCL, 0o600);
  try {
    const shared = sysIoctl(targetFd, FICLONE, sourceFd) === 0;
    if (!shared) copyData(sourceFd, targetFd, sizeBytes, onProgress);
    fs.ftruncateSync(targetFd, sizeBytes);
    fs.fsyncSync(targetFd);
    return shared;
  } finally {
    fs.closeSync(targetFd);
  }
}

function copyData(sourceFd: number, targetFd: number, sizeBytes: number, onProgress: (doneBytes: number) => void): void {
  const buffer = new IoBuffer(STEP_BYTES);
  let at = 0;
  while (at < sizeBytes) {
    const data = seekData(sourceFd, at, sizeBytes);
    if (data >= sizeBytes) break;
    const hole = realDoor.seek('import-seek-hole', sourceFd, data, SEEK_HOLE);
    const dataEnd = hole < 0 ? sizeBytes : Math.min(hole, sizeBytes);
    for (at = data; at < dataEnd; ) {
      const got = realDoor.pread('import-read', sourceFd, buffer.address, Math.min(STEP_BYTES, dataEnd - at), at);
      if (got < 0) throw new CopyFailure('reading the source', got);
      if (got === 0) throw new CopyFailure('reading the source, which became shorter,', -Errno.EIO);
      for (let put = 0; put < got; ) {
        const wrote = realDoor.pwrite('import-write', targetFd, buffer.address + put, got - put, at + put);
        if (wrote < 0) throw new CopyFailure('writing to the store', wrote);
        put += wrote;
      }
      at += got;
      onProgress(at);
    }
  }
  onProgress(sizeBytes);
}

function seekData(fd: number, at: number, sizeBytes: number): number {
  const data = realDoor.seek('import-seek-data', fd, at, SEEK_DATA);
  if (data === -Errno.ENXIO) return sizeBytes;
  // A file system that cannot tell has no holes.
  return data < 0 ? at : data;
}

function main(): void {
  const report = (message: CopyReport): void => { parentPort?.postMessage(message); };
  try {
    const sharedExtents = copy(workerData as CopyWorkerData, (doneBytes) => { report({ type: 'progress', doneBytes }); });
    report({ type: 'done', sharedExtents });
  } catch (error) {
    if (error instanceof CopyFailure) report({ type: 'failed', errno: error.errno, what: error.message });
    else if (typeof (error as NodeJS.ErrnoException).errno === 'number') {
      report({ type: 'failed', errno: -((error as NodeJS.ErrnoException).errno ?? 0), what: `opening or syncing (${(error as Error).message})` });
    } else throw error;
  }
}

main();
