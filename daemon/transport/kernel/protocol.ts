/**
 * The FUSE wire protocol as numbers: opcodes, struct sizes and field offsets, flags, notification codes, ioctls.
 *
 * Nothing but constants, so that every thread may import it (worker-safe; it imports nothing). All fields are in the
 * host's byte order, and every host that Offshoot runs on is little-endian; who reads or writes them says so with each
 * DataView call. Offsets are those of `include/uapi/linux/fuse.h` 7.45, computed with a C compiler. A table's `bytes`
 * is the size of the struct; its other fields are byte offsets within the struct.
 */

/** The one major version there is. */
export const FUSE_MAJOR = 7;
/** The newest minor version whose structs are described here. */
export const FUSE_MINOR = 45;
/** The oldest minor version that is served: RESEND, PASSTHROUGH and NO_EXPORT_SUPPORT came with it (Linux 6.9). */
export const FUSE_MINOR_MIN = 40;

/** read(2) on /dev/fuse fails with EINVAL if the buffer is smaller than this, whatever was negotiated. */
export const READ_BUFFER_BYTES_MIN = 8192;
/** Longest name of a directory entry, in bytes. */
export const NAME_BYTES_MAX = 255;
/** Longest target of a symbolic link, in bytes. */
export const LINK_TARGET_BYTES_MAX = 4095;

export const Opcode = {
  LOOKUP: 1,
  FORGET: 2,
  GETATTR: 3,
  SETATTR: 4,
  READLINK: 5,
  SYMLINK: 6,
  MKNOD: 8,
  MKDIR: 9,
  UNLINK: 10,
  RMDIR: 11,
  RENAME: 12,
  LINK: 13,
  OPEN: 14,
  READ: 15,
  WRITE: 16,
  STATFS: 17,
  RELEASE: 18,
  FSYNC: 20,
  SETXATTR: 21,
  GETXATTR: 22,
  LISTXATTR: 23,
  REMOVEXATTR: 24,
  FLUSH: 25,
  INIT: 26,
  OPENDIR: 27,
  READDIR: 28,
  RELEASEDIR: 29,
  FSYNCDIR: 30,
  GETLK: 31,
  SETLK: 32,
  SETLKW: 33,
  ACCESS: 34,
  CREATE: 35,
  INTERRUPT: 36,
  BMAP: 37,
  DESTROY: 38,
  IOCTL: 39,
  POLL: 40,
  NOTIFY_REPLY: 41,
  BATCH_FORGET: 42,
  FALLOCATE: 43,
  READDIRPLUS: 44,
  RENAME2: 45,
  LSEEK: 46,
  COPY_FILE_RANGE: 47,
  SETUPMAPPING: 48,
  REMOVEMAPPING: 49,
  SYNCFS: 50,
  TMPFILE: 51,
  STATX: 52,
  COPY_FILE_RANGE_64: 53,
} as const;

// --- Headers ---------------------------------------------------------------------------------------------------------

/** fuse_in_header: before every request. `extensionUnits` is the length of appended extensions, in units of 8 bytes. */
export const InHeader = {
  bytes: 40, len: 0, opcode: 4, unique: 8, nodeId: 16, uid: 24, gid: 28, pid: 32, extensionUnits: 36,
} as const;
/** fuse_out_header: before every reply and notification. `error` is −errno of a reply, +code of a notification. */
export const OutHeader = { bytes: 16, len: 0, error: 4, unique: 8 } as const;
/** The highest byte of `unique` (little-endian), and the bit in it that a request read a second time carries (bit 63). */
export const UNIQUE_TOP_BYTE = 7;
export const UNIQUE_TOP_RESENT = 0x80;
/** Bytes of `unique`. */
export const UNIQUE_BYTES = 8;

// --- Structs of requests ---------------------------------------------------------------------------------------------

export const InitIn = { bytes: 64, bytesBeforeMinor36: 16, major: 0, minor: 4, maxReadahead: 8, flags: 12, flags2: 16 } as const;
export const GetattrIn = { bytes: 16, getattrFlags: 0, handle: 8 } as const;
export const StatxIn = { bytes: 24, getattrFlags: 0, handle: 8, statxFlags: 16, statxMask: 20 } as const;
export const SetattrIn = {
  bytes: 88, valid: 0, handle: 8, size: 16, lockOwner: 24, atime: 32, mtime: 40, ctime: 48,
  atimeNs: 56, mtimeNs: 60, ctimeNs: 64, mode: 68, uid: 76, gid: 80,
} as const;
export const MknodIn = { bytes: 16, mode: 0, rdev: 4, umask: 8 } as const;
export const MkdirIn = { bytes: 8, mode: 0, umask: 4 } as const;
export const RenameIn = { bytes: 8, newParent: 0 } as const;
export const Rename2In = { bytes: 16, newParent: 0, flags: 8 } as const;
export const LinkIn = { bytes: 8, oldNodeId: 0 } as const;
export const OpenIn = { bytes: 8, flags: 0, openFlags: 4 } as const;
export const CreateIn = { bytes: 16, flags: 0, mode: 4, umask: 8, openFlags: 12 } as const;
export const ReleaseIn = { bytes: 24, handle: 0, flags: 8, releaseFlags: 12, lockOwner: 16 } as const;
export const FlushIn = { bytes: 24, handle: 0, lockOwner: 16 } as const;
export const ReadIn = { bytes: 40, handle: 0, offset: 8, size: 16, readFlags: 20, lockOwner: 24, flags: 32 } as const;
export const WriteIn = { bytes: 40, handle: 0, offset: 8, size: 16, writeFlags: 20, lockOwner: 24, flags: 32 } as const;
export const FsyncIn = { bytes: 16, handle: 0, fsyncFlags: 8 } as const;
export const FallocateIn = { bytes: 32, handle: 0, offset: 8, length: 16, mode: 24 } as const;
export const LseekIn = { bytes: 24, handle: 0, offset: 8, whence: 16 } as const;
export const CopyFileRangeIn = {
  bytes: 56, handleIn: 0, offsetIn: 8, nodeIdOut: 16, handleOut: 24, offsetOut: 32, length: 40, flags: 48,
} as const;
export const ForgetIn = { bytes: 8 } as const;
export const BatchForgetIn = { bytes: 8, count: 0 } as const;
export const InterruptIn = { bytes: 8, unique: 0 } as const;
export const AccessIn = { bytes: 8, mask: 0 } as const;
export const GetxattrIn = { bytes: 8, size: 0 } as const;
/** SETXATTR_EXT is never negotiated, so the short form is what arrives. */
export const SetxattrIn = { bytes: 8, size: 0, flags: 4 } as const;
export const SyncfsIn = { bytes: 8 } as const;
export const PollIn = { bytes: 24 } as const;
export const IoctlIn = { bytes: 32 } as const;

// --- Structs of replies ----------------------------------------------------------------------------------------------

export const InitOut = {
  bytes: 64, major: 0, minor: 4, maxReadahead: 8, flags: 12, maxBackground: 16, congestionThreshold: 18, maxWrite: 20,
  timeGranularity: 24, maxPages: 28, mapAlignment: 30, flags2: 32, maxStackDepth: 36, requestTimeout: 40,
} as const;
/** fuse_attr: inside EntryOut and AttrOut. */
export const Attr = {
  bytes: 88, ino: 0, size: 8, blocks: 16, atime: 24, mtime: 32, ctime: 40, atimeNs: 48, mtimeNs: 52, ctimeNs: 56,
  mode: 60, linkCount: 64, uid: 68, gid: 72, rdev: 76, blockSize: 80, flags: 84,
} as const;
export const EntryOut = {
  bytes: 128, nodeId: 0, generation: 8, entryValid: 16, attrValid: 24, entryValidNs: 32, attrValidNs: 36, attr: 40,
} as const;
export const AttrOut = { bytes: 104, attrValid: 0, attrValidNs: 8, attr: 16 } as const;
export const StatxOut = { bytes: 288, attrValid: 0, attrValidNs: 8, flags: 12, stat: 32 } as const;
/** fuse_statx: inside StatxOut. Times are a signed 64-bit second and a 32-bit nanosecond. */
export const Statx = {
  bytes: 256, mask: 0, blockSize: 4, attributes: 8, linkCount: 16, uid: 20, gid: 24, mode: 28, ino: 32, size: 40,
  blocks: 48, attributesMask: 56, atime: 64, btime: 80, ctime: 96, mtime: 112,
} as const;
export const OpenOut = { bytes: 16, handle: 0, openFlags: 8, backingId: 12 } as const;
export const WriteOut = { bytes: 8, size: 0 } as const;
/** The answer to COPY_FILE_RANGE_64; the older operation answers a WriteOut. */
export const CopyFileRangeOut = { bytes: 8, copied: 0 } as const;
export const LseekOut = { bytes: 8, offset: 0 } as const;
export const StatfsOut = {
  bytes: 80, blocks: 0, blocksFree: 8, blocksAvailable: 16, files: 24, filesFree: 32, blockSize: 40, nameBytesMax: 44,
  fragmentSize: 48,
} as const;
/** fuse_dirent: the name follows, and the whole is padded to `alignment`. */
export const Dirent = { bytes: 24, ino: 0, offset: 8, nameLength: 16, type: 20, alignment: 8 } as const;
/** fuse_direntplus: an EntryOut and a Dirent; the name follows, padded alike. */
export const DirentPlus = { bytes: 152, entry: 0, dirent: 128 } as const;

// --- Notifications (a reply header with unique 0 and a positive code in `error`) -----------------------------------------

export const NotifyCode = { POLL: 1, INVAL_INODE: 2, INVAL_ENTRY: 3, STORE: 4, RETRIEVE: 5, DELETE: 6, RESEND: 7, INC_EPOCH: 8, PRUNE: 9 } as const;
export const InvalInodeOut = { bytes: 24, ino: 0, offset: 8, length: 16 } as const;

// --- Flags -----------------------------------------------------------------------------------------------------------

/** Bit numbers of the 64 flag bits of INIT: 0 to 31 lie in `flags`, 32 to 63 in `flags2`. */
export const InitBit = {
  ASYNC_READ: 0, POSIX_LOCKS: 1, FILE_OPS: 2, ATOMIC_O_TRUNC: 3, EXPORT_SUPPORT: 4, BIG_WRITES: 5, DONT_MASK: 6,
  SPLICE_WRITE: 7, SPLICE_MOVE: 8, SPLICE_READ: 9, FLOCK_LOCKS: 10, HAS_IOCTL_DIR: 11, AUTO_INVAL_DATA: 12,
  DO_READDIRPLUS: 13, READDIRPLUS_AUTO: 14, ASYNC_DIO: 15, WRITEBACK_CACHE: 16, NO_OPEN_SUPPORT: 17,
  PARALLEL_DIROPS: 18, HANDLE_KILLPRIV: 19, POSIX_ACL: 20, ABORT_ERROR: 21, MAX_PAGES: 22, CACHE_SYMLINKS: 23,
  NO_OPENDIR_SUPPORT: 24, EXPLICIT_INVAL_DATA: 25, MAP_ALIGNMENT: 26, SUBMOUNTS: 27, HANDLE_KILLPRIV_V2: 28,
  SETXATTR_EXT: 29, INIT_EXT: 30, SECURITY_CTX: 32, HAS_INODE_DAX: 33, CREATE_SUPP_GROUP: 34, HAS_EXPIRE_ONLY: 35,
  DIRECT_IO_ALLOW_MMAP: 36, PASSTHROUGH: 37, NO_EXPORT_SUPPORT: 38, HAS_RESEND: 39, ALLOW_IDMAP: 40,
  OVER_IO_URING: 41, REQUEST_TIMEOUT: 42,
} as const;

/** FOPEN_*: answered in OpenOut.openFlags. */
export const OpenFlag = {
  DIRECT_IO: 1, KEEP_CACHE: 2, NONSEEKABLE: 4, CACHE_DIR: 8, STREAM: 16, NOFLUSH: 32, PARALLEL_DIRECT_WRITES: 64,
  PASSTHROUGH: 128,
} as const;

/** FATTR_*: which fields of SetattrIn count. */
export const SetattrValid = {
  MODE: 1, UID: 2, GID: 4, SIZE: 8, ATIME: 16, MTIME: 32, FH: 64, ATIME_NOW: 128, MTIME_NOW: 256, LOCKOWNER: 512,
  CTIME: 1024, KILL_SUIDGID: 2048,
} as const;

export const WriteFlag = { CACHE: 1, LOCKOWNER: 2, KILL_SUIDGID: 4 } as const;
export const FsyncFlag = { DATA_ONLY: 1 } as const;

/** Open flags of Linux: those on whose numbers x86-64 and arm64 agree. */
export const LinuxOpenFlag = {
  ACCESS_MASK: 0o3, WRONLY: 0o1, RDWR: 0o2, CREAT: 0o100, EXCL: 0o200, TRUNC: 0o1000, APPEND: 0o2000, DSYNC: 0o10000,
  /** The bit that O_SYNC has beside O_DSYNC. */
  SYNC_ONLY: 0o4000000,
} as const;

export const FileType = { MASK: 0o170000, DIRECTORY: 0o040000, REGULAR: 0o100000, SYMLINK: 0o120000 } as const;
export const ModeBits = { PERMISSIONS: 0o7777, SETUID: 0o4000, SETGID: 0o2000 } as const;
export const RenameFlag = { NOREPLACE: 1, EXCHANGE: 2, WHITEOUT: 4 } as const;
export const FallocateFlag = { KEEP_SIZE: 0x01, PUNCH_HOLE: 0x02, ZERO_RANGE: 0x10 } as const;
export const Whence = { DATA: 3, HOLE: 4 } as const;
/** STATX_BASIC_STATS: everything that stat(2) gives; no birth time. */
export const STATX_BASIC_STATS = 0x7ff;

// --- ioctls of /dev/fuse ---------------------------------------------------------------------------------------------

export const DeviceIoctl = { CLONE: 0x8004e500, BACKING_OPEN: 0x4010e501, BACKING_CLOSE: 0x4004e502, SYNC_INIT: 0xe503 } as const;
export const BackingMap = { bytes: 16, descriptor: 0, flags: 4, padding: 8 } as const;
