/**
 * The one door to the operating system for the data path: system calls by number, with memory given as addresses.
 *
 * Runs in every thread that moves blocks. Calls go through koffi straight into libc: on this path they cost about 0.1 µs
 * over the bare system call, a quarter of what node:fs adds, and they return an errno instead of throwing. The first
 * argument of every call is a label that names the call site, so that a wrapper around the door can fail, delay or
 * count exactly one of them. A result below zero is a negative errno, as in the kernel.
 *
 * Addresses come from `IoBuffer`, which keeps its memory alive and knows its length; nothing else makes them.
 */
import koffi from 'koffi';

import { Errno } from '../errors.js';

export interface Door {
  /** Reads once; may be short. */
  pread(label: string, fd: number, address: number, lengthBytes: number, offsetBytes: number): number;
  /** Writes once; may be short. */
  pwrite(label: string, fd: number, address: number, lengthBytes: number, offsetBytes: number): number;
  read(label: string, fd: number, address: number, lengthBytes: number): number;
  write(label: string, fd: number, address: number, lengthBytes: number): number;
  fallocate(label: string, fd: number, mode: number, offsetBytes: number, lengthBytes: number): number;
  seek(label: string, fd: number, offsetBytes: number, whence: number): number;
  fdatasync(label: string, fd: number): number;
}

export const FALLOC_FL_KEEP_SIZE = 1;
export const FALLOC_FL_PUNCH_HOLE = 2;
export const FALLOC_FL_ZERO_RANGE = 0x10;
export const SEEK_END = 2;
export const SEEK_DATA = 3;
export const SEEK_HOLE = 4;

const PROT_READ_WRITE = 3;
const MAP_SHARED = 1;

const libc = koffi.load('libc.so.6');
type Call = (...args: readonly number[]) => number;
const sysPread = libc.func('int64_t pread(int fd, uintptr_t buf, size_t n, int64_t off)') as unknown as Call;
const sysPwrite = libc.func('int64_t pwrite(int fd, uintptr_t buf, size_t n, int64_t off)') as unknown as Call;
const sysRead = libc.func('int64_t read(int fd, uintptr_t buf, size_t n)') as unknown as Call;
const sysWrite = libc.func('int64_t write(int fd, uintptr_t buf, size_t n)') as unknown as Call;
const sysFallocate = libc.func('int fallocate(int fd, int mode, int64_t off, int64_t len)') as unknown as Call;
const sysLseek = libc.func('int64_t lseek(int fd, int64_t off, int whence)') as unknown as Call;
const sysFdatasync = libc.func('int fdatasync(int fd)') as unknown as Call;
const sysMmap = libc.func('void *mmap(uintptr_t addr, size_t len, int prot, int flags, int fd, int64_t off)') as unknown as (
  ...args: readonly number[]
) => unknown;
const sysMadvise = libc.func('int madvise(uintptr_t addr, size_t len, int advice)') as unknown as Call;
const sysPrctl = libc.func('int prctl(int option, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d)') as unknown as Call;
const sysExit = libc.func('void _exit(int status)') as unknown as (status: number) => void;

/** The errno of the call that just failed, negative. 0 would read as success, so an unknown one becomes EIO. */
function failure(): number {
  const code = koffi.errno();
  return code > 0 ? -code : -Errno.EIO;
}

export const realDoor: Door = {
  pread(_label, fd, address, lengthBytes, offsetBytes) {
    for (;;) {
      const got = sysPread(fd, address, lengthBytes, offsetBytes);
      if (got >= 0) return got;
      const code = failure();
      if (code !== -Errno.EINTR) return code;
    }
  },
  pwrite(_label, fd, address, lengthBytes, offsetBytes) {
    for (;;) {
      const put = sysPwrite(fd, address, lengthBytes, offsetBytes);
      if (put >= 0) return put;
      const code = failure();
      if (code !== -Errno.EINTR) return code;
    }
  },
  read(_label, fd, address, lengthBytes) {
    const got = sysRead(fd, address, lengthBytes);
    return got >= 0 ? got : failure();
  },
  write(_label, fd, address, lengthBytes) {
    const put = sysWrite(fd, address, lengthBytes);
    return put >= 0 ? put : failure();
  },
  fallocate(_label, fd, mode, offsetBytes, lengthBytes) {
    for (;;) {
      if (sysFallocate(fd, mode, offsetBytes, lengthBytes) === 0) return 0;
      const code = failure();
      if (code !== -Errno.EINTR) return code;
    }
  },
  seek(_label, fd, offsetBytes, whence) {
    const at = sysLseek(fd, offsetBytes, whence);
    return at >= 0 ? at : failure();
  },
  fdatasync(_label, fd) {
    return sysFdatasync(fd) === 0 ? 0 : failure();
  },
};

/** Memory for system calls: the bytes, and where they lie. The bytes never move while this object lives. */
export class IoBuffer {
  readonly bytes: Buffer;
  readonly address: number;
  readonly lengthBytes: number;

  constructor(lengthBytes: number) {
    // Page-aligned, so that a store opened with O_DIRECT could be given the same memory.
    const raw = new ArrayBuffer(lengthBytes + 4096);
    const base = Number(koffi.address(new Uint8Array(raw)));
    const skip = (4096 - (base % 4096)) % 4096;
    this.bytes = Buffer.from(raw, skip, lengthBytes);
    this.address = base + skip;
    this.lengthBytes = lengthBytes;
  }
}

/** Address of memory that the caller keeps alive for as long as the address is used. */
export function addressOf(bytes: Uint8Array): number {
  return Number(koffi.address(bytes));
}

/**
 * Maps `lengthBytes` of a file shared and writable. The mapping lives as long as the process: what was stored in it
 * before a SIGKILL is in the file afterwards, which is what the journal is built on.
 */
export function mapShared(fd: number, lengthBytes: number): ArrayBuffer {
  const pointer = sysMmap(0, lengthBytes, PROT_READ_WRITE, MAP_SHARED, fd, 0) as bigint;
  const address = Number(pointer);
  // MAP_FAILED is -1; no address of a process lies so high.
  if (address < 0 || address >= Number.MAX_SAFE_INTEGER) {
    throw new Error(`mmap of ${lengthBytes} bytes failed with errno ${koffi.errno()}`);
  }
  return koffi.view(pointer, lengthBytes);
}

const MADV_DONTFORK = 10;

/**
 * Has the pages of a buffer there, and keeps them so: a child process is not given them, for a fork would make them read-only until the next
 * write. False when the kernel refuses.
 */
export function keepPages(buffer: IoBuffer): boolean {
  buffer.bytes.fill(0);
  return sysMadvise(buffer.address, buffer.lengthBytes - (buffer.lengthBytes % 4096), MADV_DONTFORK) === 0;
}

const PR_SET_IO_FLUSHER = 57;

/**
 * Tells the kernel that this thread serves I/O, so that memory reclaim inside it never waits for a file system that
 * waits for us. Per thread, inherited by threads made later. False when the kernel refuses (CAP_SYS_RESOURCE missing).
 */
export function becomeIoFlusher(): boolean {
  return sysPrctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) === 0;
}

const PR_SET_PDEATHSIG = 1;
const SIGKILL = 9;

/** Has the kernel kill this process when the thread that started it ends. */
export function dieWithParent(): boolean {
  return sysPrctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) === 0;
}

/** Ends the process at once, all threads, without waiting for those that are blocked in a system call. */
export function exitNow(status: number): never {
  sysExit(status);
  throw new Error('_exit returned');
}
