/**
 * A process that makes system calls for a test, one per message, and says what came back.
 *
 * Everything that a test does to a file under the mount happens here: if the server hangs, only this process does.
 * Plain JavaScript, because it is started by node itself and not through vitest. Started by `file-agent.ts`, which also
 * describes the operations.
 */
import fs from 'node:fs';
import process from 'node:process';
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');
const native = {
  open: libc.func('int open(const char *path, int flags, unsigned int mode)'),
  close: libc.func('int close(int fd)'),
  pread: libc.func('int64_t pread(int fd, uintptr_t buf, size_t n, int64_t off)'),
  pwrite: libc.func('int64_t pwrite(int fd, uintptr_t buf, size_t n, int64_t off)'),
  pwritev2: libc.func('int64_t pwritev2(int fd, const void *iov, int count, int64_t off, int flags)'),
  fallocate: libc.func('int fallocate(int fd, int mode, int64_t off, int64_t len)'),
  lseek: libc.func('int64_t lseek(int fd, int64_t off, int whence)'),
  fcntl: libc.func('int fcntl(int fd, int command, void *lock)'),
  ftruncate: libc.func('int ftruncate(int fd, int64_t size)'),
  truncate: libc.func('int truncate(const char *path, int64_t size)'),
  copyFileRange: libc.func('int64_t copy_file_range(int from, void *fromAt, int to, void *toAt, size_t n, unsigned int flags)'),
  fsync: libc.func('int fsync(int fd)'),
  fdatasync: libc.func('int fdatasync(int fd)'),
  renameat2: libc.func('int renameat2(int from, const char *path, int to, const char *newPath, unsigned int flags)'),
  utimensat: libc.func('int utimensat(int dir, const char *path, const void *times, int flags)'),
  mmap: libc.func('int64_t mmap(uintptr_t address, size_t length, int protection, int flags, int fd, int64_t offset)'),
  munmap: libc.func('int munmap(uintptr_t address, size_t length)'),
};

const AT_FDCWD = -100;
const F_OFD_SETLK = 37;
const LOCK_TYPES = { read: 0, write: 1, unlock: 2 };
const ALIGNMENT = 4096;
const PROT_READ_WRITE = 3;
const MAP_SHARED = 1;
const UTIME_OMIT = 0x3ffffffe;

function check(result) {
  if (Number(result) >= 0) return Number(result);
  const errno = koffi.errno();
  throw Object.assign(new Error(`errno ${errno}`), { errno: -errno });
}

/** Memory for direct I/O: its address is a multiple of 4096 plus `skew`. */
function aligned(length, skew = 0) {
  const memory = Buffer.alloc(length + 2 * ALIGNMENT);
  const start = Number(koffi.address(memory) % BigInt(ALIGNMENT));
  const begin = (ALIGNMENT - start) % ALIGNMENT + skew;
  return memory.subarray(begin, begin + length);
}

function addressOf(buffer) {
  return koffi.address(buffer);
}

function statOf(stat) {
  return {
    sizeBytes: Number(stat.size), mode: Number(stat.mode), uid: Number(stat.uid), gid: Number(stat.gid), inode: Number(stat.ino),
    links: Number(stat.nlink), allocatedBytes: Number(stat.blocks) * 512, mtimeNs: stat.mtimeNs, atimeNs: stat.atimeNs, ctimeNs: stat.ctimeNs,
  };
}

const operations = {
  open: (path, flags, mode) => check(native.open(path, flags, mode)),
  close: (fd) => check(native.close(fd)),
  pread(fd, length, offset) {
    const memory = aligned(length);
    const count = check(native.pread(fd, addressOf(memory), length, offset));
    return Buffer.from(memory.subarray(0, count));
  },
  pwrite(fd, data, offset) {
    const memory = aligned(data.length);
    memory.set(data);
    return check(native.pwrite(fd, addressOf(memory), data.length, offset));
  },
  pwriteWithFlags(fd, data, offset, flags) {
    const memory = aligned(data.length);
    memory.set(data);
    const vector = Buffer.alloc(16);
    vector.writeBigUInt64LE(koffi.address(memory), 0);
    vector.writeBigUInt64LE(BigInt(data.length), 8);
    return check(native.pwritev2(fd, vector, 1, offset, flags));
  },
  fallocate: (fd, mode, offset, length) => check(native.fallocate(fd, mode, offset, length)),
  seek: (fd, offset, whence) => check(native.lseek(fd, offset, whence)),
  /** As often as it takes; the bytes that were copied. */
  copyFileRange(from, fromAt, to, toAt, length) {
    const places = Buffer.alloc(16);
    let done = 0;
    while (done < length) {
      places.writeBigInt64LE(BigInt(fromAt + done), 0);
      places.writeBigInt64LE(BigInt(toAt + done), 8);
      const count = check(native.copyFileRange(from, places.subarray(0, 8), to, places.subarray(8), length - done, 0));
      if (count === 0) break;
      done += count;
    }
    return done;
  },
  lock(fd, type, start, length) {
    const lock = Buffer.alloc(32);
    lock.writeInt16LE(LOCK_TYPES[type], 0);
    lock.writeBigInt64LE(BigInt(start), 8);
    lock.writeBigInt64LE(BigInt(length), 16);
    return check(native.fcntl(fd, F_OFD_SETLK, lock));
  },
  ftruncate: (fd, size) => check(native.ftruncate(fd, size)),
  truncate: (path, size) => check(native.truncate(path, size)),
  fsync: (fd) => check(native.fsync(fd)),
  fdatasync: (fd) => check(native.fdatasync(fd)),
  renameWithFlags: (path, newPath, flags) => check(native.renameat2(AT_FDCWD, path, AT_FDCWD, newPath, flags)),
  /** Times in nanoseconds, or null to leave one as it is. */
  setTimes(path, atimeNs, mtimeNs) {
    const times = Buffer.alloc(32);
    [atimeNs, mtimeNs].forEach((time, index) => {
      const seconds = time === null ? 0n : time / 1_000_000_000n;
      times.writeBigInt64LE(seconds, index * 16);
      times.writeBigInt64LE(time === null ? BigInt(UTIME_OMIT) : time - seconds * 1_000_000_000n, index * 16 + 8);
    });
    return check(native.utimensat(AT_FDCWD, path, times, 0));
  },
  mapShared(fd, length) {
    const address = native.mmap(0, length, PROT_READ_WRITE, MAP_SHARED, fd, 0);
    check(address);
    return check(native.munmap(address, length));
  },
  stat: (path) => statOf(fs.statSync(path, { bigint: true })),
  lstat: (path) => statOf(fs.lstatSync(path, { bigint: true })),
  fstat: (fd) => statOf(fs.fstatSync(fd, { bigint: true })),
  statfs(path) {
    const statfs = fs.statfsSync(path);
    return { blockBytes: statfs.bsize, blocksTotal: statfs.blocks, blocksFree: statfs.bfree, blocksAvailable: statfs.bavail };
  },
  mkdir: (path, mode) => { fs.mkdirSync(path, { mode }); },
  rmdir: (path) => { fs.rmdirSync(path); },
  unlink: (path) => { fs.unlinkSync(path); },
  rename: (path, newPath) => { fs.renameSync(path, newPath); },
  symlink: (target, path) => { fs.symlinkSync(target, path); },
  readlink: (path) => fs.readlinkSync(path),
  link: (path, newPath) => { fs.linkSync(path, newPath); },
  readdir: (path) => fs.readdirSync(path).sort(),
  readdirTypes: (path) => fs.readdirSync(path, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1)).map((entry) => [entry.name, entry.isDirectory() ? 'directory' : entry.isSymbolicLink() ? 'symlink' : entry.isFile() ? 'file' : 'other']),
  chmod: (path, mode) => { fs.chmodSync(path, mode); },
  chown: (path, uid, gid) => { fs.chownSync(path, uid, gid); },
  readFile: (path) => fs.readFileSync(path),
  writeFile: (path, data) => { fs.writeFileSync(path, data); },
};

process.on('message', ({ id, operation, args }) => {
  let answer;
  try {
    answer = { id, result: operations[operation](...args) ?? null };
  } catch (thrown) {
    answer = { id, errno: Math.abs(thrown.errno ?? 0), message: String(thrown.message) };
  }
  process.send(answer);
});
process.on('disconnect', () => process.exit(0));
process.send({ id: 0, result: 'ready' });
