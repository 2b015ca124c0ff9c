/**
 * Translates fuse-native's path-based callbacks into calls of FileSystem, and errors into negative errnos.
 *
 * Main thread only, as the package calls back there. It keeps the promises of FileSystem where libfuse 2 blurs them:
 * a write that must be durable (O_SYNC, O_DSYNC, RWF_DSYNC) is flushed before its reply, an unlinked open file is really
 * unlinked (see `paths.ts`), and both times of utimens arrive. What libfuse 2 or the package cannot carry at all is in
 * `abilities.ts`. The kernel has checked permissions before a request comes here (default_permissions), and nobody says
 * who the caller was: a new node belongs to the owner of its directory.
 */
import { constants } from 'node:fs';

import { Errno, OffshootError, errnoOf, toOffshootError } from '../../../blockstore/errors.js';
import { SECTOR_BYTES } from '../../../blockstore/units.js';
import type { AttributeChanges, Attributes, Caller, FileSystem, NodeId, NodeKind } from '../../filesystem/types.js';
import type { FuseOperations, Reply, StatfsReply, StatReply } from './binding.js';
import { Paths } from './paths.js';
import type { Place } from './paths.js';

/** What a programmer error does; it must end the process. */
export type Crash = (thrown: unknown) => void;

export interface OperationsOptions {
  readonly fileSystem: FileSystem;
  /** Flags of the write that is being handed over at this moment, null when they cannot be seen. */
  readonly currentWriteFlags: () => number | null;
  readonly crash: Crash;
}

export interface Translator {
  readonly operations: FuseOperations;
  /** Releases what is still open: after the unmount no RELEASE comes any more. */
  releaseAll(): void;
}

interface OpenFile {
  readonly node: NodeId;
  readonly handle: number;
  /** Opened with O_DIRECT: requests must be whole sectors, which is how QEMU finds out that it may write sectors. */
  readonly direct: boolean;
}

const TYPE_BITS = { directory: 0o040000, file: 0o100000, disk: 0o100000, symlink: 0o120000 } as const satisfies Record<NodeKind, number>;
const TYPE_MASK = 0o170000;
const REGULAR = 0o100000;
const PERMISSION_MASK = 0o7777;
const O_RDWR_CREAT_EXCL = 0o302;
/** O_DSYNC; O_SYNC contains it. */
const O_DSYNC = 0o10000;
const UNCHANGED_ID = 0xffffffff;
const FD_MAX = 0x7fffffff;
const READDIR_BATCH = 1000;
const UINT32_SPAN = 2 ** 32;
const PREFERRED_IO_BYTES = 4096;

/** The kernel has checked the permissions; what is left is done as the superuser. */
const SUPERUSER: Caller = { uid: 0, gid: 0, pid: 0 };

export function createOperations(options: OperationsOptions): Translator {
  const { fileSystem, crash } = options;
  const paths = new Paths(fileSystem);
  const openFiles = new Map<number, OpenFile>();
  let lastFd = 0;

  /** Operating errors become a negative errno; anything else is reported as EIO and ends the process. */
  function negativeErrno(thrown: unknown): number {
    const error = toOffshootError(thrown);
    if (error.kind === 'internal') crash(thrown);
    return error.context['readOnly'] === true ? -Errno.EROFS : -errnoOf[error.kind];
  }

  /** Runs `body` and replies 0 or the error; a promise is waited for. */
  function answer(reply: Reply, body: () => unknown): void {
    let result: unknown;
    try {
      result = body();
    } catch (thrown) {
      reply(negativeErrno(thrown));
      return;
    }
    if (result instanceof Promise) {
      result.then(() => { reply(0); }, (thrown: unknown) => { reply(negativeErrno(thrown)); });
    } else {
      reply(0);
    }
  }

  function answerWith<T>(reply: (error: number, value?: T) => void, body: () => T): void {
    let value: T;
    try {
      value = body();
    } catch (thrown) {
      reply(negativeErrno(thrown));
      return;
    }
    reply(0, value);
  }

  function change(path: string, changes: AttributeChanges): Promise<Attributes> {
    return fileSystem.setattr(paths.nodeAt(path), changes, SUPERUSER);
  }

  /** The owner of the directory stands for the caller, whom libfuse's callback does not name. */
  function ownerOf(directory: NodeId): Caller {
    const { uid, gid } = fileSystem.getattr(directory);
    return { uid, gid, pid: 0 };
  }

  function openFile(fd: number): OpenFile {
    const file = openFiles.get(fd);
    if (file === undefined) throw new OffshootError('bad-handle', 'The file is not open.', { fd });
    return file;
  }

  /** The open file, if the request suits the way in which it was opened. */
  function openFileFor(fd: number, offsetBytes: number, lengthBytes: number): OpenFile {
    const file = openFile(fd);
    if (file.direct && (offsetBytes % SECTOR_BYTES !== 0 || lengthBytes % SECTOR_BYTES !== 0)) {
      throw new OffshootError('invalid-argument', 'Direct I/O is in whole sectors of 512 bytes.', { offsetBytes, lengthBytes });
    }
    return file;
  }

  function addOpenFile(file: OpenFile): number {
    do lastFd = lastFd >= FD_MAX ? 1 : lastFd + 1; while (openFiles.has(lastFd));
    openFiles.set(lastFd, file);
    return lastFd;
  }

  function isOpen(node: NodeId): boolean {
    for (const file of openFiles.values()) if (file.node === node) return true;
    return false;
  }

  /** Before a directory is removed or replaced: libfuse could not name its unlinked open files any more. */
  function assertNothingHidden(place: Place): void {
    if (!paths.hidesAny()) return;
    let node: NodeId;
    try {
      node = fileSystem.lookup(place.parent, place.name).nodeId;
    } catch (thrown) {
      if (toOffshootError(thrown).kind === 'not-found') return;
      throw thrown;
    }
    if (paths.hidesIn(node)) throw new OffshootError('not-empty', 'A file that was deleted from this directory is still open.', { name: place.name });
  }

  function rename(path: string, newPath: string): void {
    const { parent, name } = paths.placeOf(path);
    if (paths.isHiding(path, newPath)) {
      const node = fileSystem.lookup(parent, name).nodeId;
      if (isOpen(node)) {
        fileSystem.unlink(parent, name);
        paths.hide(newPath, node, parent);
        return;
      }
    }
    const target = paths.placeOf(newPath);
    assertNothingHidden(target);
    fileSystem.rename(parent, name, target.parent, target.name, { noReplace: false, exchange: false });
  }

  function listDirectory(path: string): { names: string[]; stats: StatReply[] } {
    const node = paths.nodeAt(path);
    const names = ['.', '..'];
    const stats = [statOf(fileSystem.getattr(node)), statOf(fileSystem.getattr(fileSystem.parentOf(node)))];
    for (let cookie = 0; ;) {
      const entries = fileSystem.readdir(node, cookie, READDIR_BATCH);
      for (const entry of entries) {
        names.push(entry.name);
        stats.push(statOf(entry.attributes));
        cookie = entry.cookie;
      }
      if (entries.length === 0) return { names, stats };
    }
  }

  const operations: FuseOperations = {
    getattr(path, reply) { answerWith(reply, () => statOf(fileSystem.getattr(paths.nodeAt(path)))); },
    readdir(path, reply) {
      answerWith<{ names: string[]; stats: StatReply[] }>((error, listing) => { reply(error, listing?.names, listing?.stats); }, () => listDirectory(path));
    },
    readlink(path, reply) {
      answerWith(reply, () => {
        const target = fileSystem.readlink(paths.nodeAt(path));
        if (typeof target !== 'string') throw new OffshootError('not-supported', 'this transport shows no block devices', { path });
        return target;
      });
    },
    statfs(path, reply) { answerWith(reply, () => statfsOf(fileSystem, paths.nodeAt(path))); },
    mknod(path, mode, _device, reply) {
      answer(reply, () => {
        const type = mode & TYPE_MASK;
        if (type !== REGULAR && type !== 0) {
          throw new OffshootError('not-permitted', 'Only regular files, directories and symbolic links can be made here.', { path });
        }
        const { parent, name } = paths.placeOf(path);
        const made = fileSystem.create(parent, name, mode & PERMISSION_MASK, O_RDWR_CREAT_EXCL, ownerOf(parent));
        fileSystem.release(made.open.handle);
      });
    },
    mkdir(path, mode, reply) {
      answer(reply, () => {
        const { parent, name } = paths.placeOf(path);
        fileSystem.mkdir(parent, name, mode & PERMISSION_MASK, ownerOf(parent));
      });
    },
    symlink(target, path, reply) {
      answer(reply, () => {
        const { parent, name } = paths.placeOf(path);
        fileSystem.symlink(parent, name, target, ownerOf(parent));
      });
    },
    link(_path, newPath, reply) {
      answer(reply, () => { throw new OffshootError('not-permitted', 'Hard links are not kept here.', { path: newPath }); });
    },
    unlink(path, reply) {
      answer(reply, () => {
        if (paths.forgetHidden(path)) return;
        const { parent, name } = paths.placeOf(path);
        fileSystem.unlink(parent, name);
      });
    },
    rmdir(path, reply) {
      answer(reply, () => {
        const place = paths.placeOf(path);
        assertNothingHidden(place);
        fileSystem.rmdir(place.parent, place.name);
      });
    },
    rename(path, newPath, reply) { answer(reply, () => { rename(path, newPath); }); },
    chmod(path, mode, reply) { answer(reply, () => change(path, { mode: mode & PERMISSION_MASK })); },
    chown(path, uid, gid, reply) {
      answer(reply, () => change(path, { ...(uid === UNCHANGED_ID ? {} : { uid }), ...(gid === UNCHANGED_ID ? {} : { gid }) }));
    },
    truncate(path, sizeBytes, reply) { answer(reply, () => change(path, { sizeBytes })); },
    ftruncate(_path, fd, sizeBytes, reply) { answer(reply, () => fileSystem.setattr(openFile(fd).node, { sizeBytes }, SUPERUSER)); },
    utimens(path, atimeMs, mtimeMs, reply) { answer(reply, () => change(path, { atimeUs: microseconds(atimeMs), mtimeUs: microseconds(mtimeMs) })); },
    open(path, flags, reply) {
      answerWith(reply, () => {
        const node = paths.nodeAt(path);
        return addOpenFile({ node, handle: fileSystem.open(node, flags).handle, direct: (flags & constants.O_DIRECT) !== 0 });
      });
    },
    release(_path, fd, reply) {
      answer(reply, () => {
        const file = openFiles.get(fd);
        if (file === undefined) return;
        openFiles.delete(fd);
        fileSystem.release(file.handle);
      });
    },
    read(_path, fd, buffer, length, position, reply) {
      let bytes: number | Promise<number>;
      try {
        bytes = fileSystem.read(openFileFor(fd, position, length).node, position, buffer.subarray(0, length));
      } catch (thrown) {
        bytes = negativeErrno(thrown);
      }
      if (typeof bytes === 'number') reply(bytes);
      else bytes.then(reply, (thrown: unknown) => { reply(negativeErrno(thrown)); });
    },
    write(_path, fd, buffer, length, position, reply) {
      const flags = options.currentWriteFlags();
      let written: number | Promise<number>;
      let node: NodeId;
      try {
        node = openFileFor(fd, position, length).node;
        written = fileSystem.write(node, position, buffer.subarray(0, length));
      } catch (thrown) {
        reply(negativeErrno(thrown));
        return;
      }
      const finish = (bytes: number): void => {
        if (flags !== null && (flags & O_DSYNC) === 0) {
          reply(bytes);
        } else {
          fileSystem.flush(node).then(() => { reply(bytes); }, (thrown: unknown) => { reply(negativeErrno(thrown)); });
        }
      };
      if (typeof written === 'number') finish(written);
      else written.then(finish, (thrown: unknown) => { reply(negativeErrno(thrown)); });
    },
    fsync(_path, _dataOnly, fd, reply) { answer(reply, () => fileSystem.flush(openFile(fd).node)); },
    fsyncdir(path, _dataOnly, _fd, reply) { answer(reply, () => fileSystem.flushDirectory(paths.nodeAt(path))); },
  };

  return {
    operations,
    releaseAll() {
      for (const file of openFiles.values()) fileSystem.release(file.handle);
      openFiles.clear();
    },
  };
}

function statOf(attributes: Attributes): StatReply {
  return {
    mode: TYPE_BITS[attributes.kind] + attributes.mode,
    uid: attributes.uid,
    gid: attributes.gid,
    size: attributes.sizeBytes,
    blocks: Math.ceil(attributes.allocatedBytes / SECTOR_BYTES),
    blksize: PREFERRED_IO_BYTES,
    ino: attributes.nodeId % UINT32_SPAN,
    nlink: attributes.linkCount,
    atime: milliseconds(attributes.atimeUs),
    mtime: milliseconds(attributes.mtimeUs),
    ctime: milliseconds(attributes.ctimeUs),
  };
}

/** The package carries unsigned milliseconds. */
function milliseconds(us: number): number {
  return Math.max(0, Math.floor(us / 1000));
}

function microseconds(ms: number): number {
  return Math.max(0, ms) * 1000;
}

/** Counts travel in 32 bits, so a store of 16 TiB and more is told in larger units. */
function statfsOf(fileSystem: FileSystem, node: NodeId): StatfsReply {
  const statistics = fileSystem.statfs(node);
  let scale = 1;
  while (statistics.blocksTotal / scale >= UINT32_SPAN) scale *= 2;
  const scaled = (blocks: number): number => Math.floor(blocks / scale);
  const capped = (count: number): number => Math.min(count, UINT32_SPAN - 1);
  return {
    bsize: statistics.blockBytes * scale,
    frsize: statistics.blockBytes * scale,
    blocks: scaled(statistics.blocksTotal),
    bfree: scaled(statistics.blocksFree),
    bavail: scaled(statistics.blocksAvailable),
    files: capped(statistics.nodesTotal),
    ffree: capped(statistics.nodesFree),
    favail: capped(statistics.nodesFree),
    namemax: statistics.nameBytesMax,
  };
}
