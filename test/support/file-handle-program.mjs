/**
 * Makes and opens file handles for a test, in a process of its own: name_to_handle_at(2), open_by_handle_at(2). Plain JavaScript, because node starts it.
 *
 *   make PATH...                 one JSON line: a list of `{ type, bytes }` (hex) or `{ errno }`
 *   open MOUNT HANDLES           HANDLES as `make` gave them; a list of `{ node, kind, head }` or `{ errno }`. `head`: the first bytes of a file
 *   hold PATH                    opens PATH, says so with a line, and keeps it open until its input ends
 */
import fs from 'node:fs';
import process from 'node:process';
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');
const nameToHandleAt = libc.func('int name_to_handle_at(int dirfd, const char *path, void *handle, void *mountId, int flags)');
const openByHandleAt = libc.func('int open_by_handle_at(int mountfd, void *handle, int flags)');
const AT_FDCWD = -100;
const O_PATH = 0o10000000;
const HANDLE_BYTES_MAX = 128;
const HEADER_BYTES = 8;
const HEAD_BYTES = 16;

function make(path) {
  const handle = Buffer.alloc(HEADER_BYTES + HANDLE_BYTES_MAX);
  handle.writeUInt32LE(HANDLE_BYTES_MAX, 0);
  if (nameToHandleAt(AT_FDCWD, path, handle, Buffer.alloc(4), 0) < 0) return { errno: koffi.errno() };
  return { type: handle.readInt32LE(4), bytes: handle.subarray(HEADER_BYTES, HEADER_BYTES + handle.readUInt32LE(0)).toString('hex') };
}

function open(mountFd, { type, bytes }) {
  const opaque = Buffer.from(bytes, 'hex');
  const handle = Buffer.alloc(HEADER_BYTES + opaque.length);
  handle.writeUInt32LE(opaque.length, 0);
  handle.writeInt32LE(type, 4);
  opaque.copy(handle, HEADER_BYTES);
  let fd = openByHandleAt(mountFd, handle, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
  // A symbolic link is not opened, only looked at.
  if (fd < 0 && koffi.errno() === 40) fd = openByHandleAt(mountFd, handle, O_PATH | fs.constants.O_NOFOLLOW);
  if (fd < 0) return { errno: koffi.errno() };
  try {
    const stat = fs.fstatSync(fd);
    const kind = stat.isDirectory() ? 'directory' : stat.isSymbolicLink() ? 'symlink' : 'file';
    const head = Buffer.alloc(HEAD_BYTES);
    return { node: stat.ino, kind, head: kind === 'file' ? head.toString('latin1', 0, fs.readSync(fd, head, 0, HEAD_BYTES, 0)) : '' };
  } catch (error) {
    return { errno: -error.errno };
  } finally {
    fs.closeSync(fd);
  }
}

const [operation, ...args] = process.argv.slice(2);
if (operation === 'make') {
  console.log(JSON.stringify(args.map(make)));
} else if (operation === 'open') {
  const mountFd = fs.openSync(args[0], fs.constants.O_RDONLY);
  console.log(JSON.stringify(JSON.parse(args[1]).map((handle) => open(mountFd, handle))));
} else {
  fs.openSync(args[0], 'r+');
  console.log('open');
  process.stdin.resume().on('end', () => { process.exit(0); });
}
