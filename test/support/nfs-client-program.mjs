/**
 * An NFS client for tests: libnfs, in a process of its own, one request per line and one answer per line. Plain JavaScript, because node starts it.
 *
 *   { op: 'mount', server, path, version, port, mountPort }      connects; what comes after is relative to `path`
 *   { op: 'open', name, flags, mode }     -> handle number        { op: 'close', handle }
 *   { op: 'write', handle, offset, length, seed }                { op: 'fsync', handle }
 *   { op: 'check', handle, offset, length, seed }                reads, and compares with what `write` with this seed wrote
 *   { op: 'unlink', name }                                       { op: 'mkdir', name }
 *
 * Answers: { ok: true, value } or { ok: false, error }. Writes go in pieces that libnfs 4.0 can encode for version 4: it fails over more than 4 KiB.
 */
import { createHash } from 'node:crypto';
import process from 'node:process';
import { createInterface } from 'node:readline';
import koffi from 'koffi';

const lib = koffi.load('libnfs.so.13');
const nfs = {
  init: lib.func('void *nfs_init_context()'),
  setVersion: lib.func('int nfs_set_version(void *nfs, int version)'),
  parseUrl: lib.func('void *nfs_parse_url_dir(void *nfs, const char *url)'),
  mount: lib.func('int nfs_mount(void *nfs, const char *server, const char *path)'),
  open: lib.func('int nfs_open2(void *nfs, const char *path, int flags, int mode, _Out_ void **handle)'),
  close: lib.func('int nfs_close(void *nfs, void *handle)'),
  pread: lib.func('int nfs_pread(void *nfs, void *handle, uint64_t offset, uint64_t count, void *buffer)'),
  pwrite: lib.func('int nfs_pwrite(void *nfs, void *handle, uint64_t offset, uint64_t count, const void *buffer)'),
  fsync: lib.func('int nfs_fsync(void *nfs, void *handle)'),
  unlink: lib.func('int nfs_unlink(void *nfs, const char *path)'),
  mkdir: lib.func('int nfs_mkdir(void *nfs, const char *path)'),
  error: lib.func('const char *nfs_get_error(void *nfs)'),
};
const PIECE_BYTES = { 3: 64 * 1024, 4: 3 * 1024 };
const BLOCK_BYTES = 1024;

let context = null;
let version = 4;
let last = 0;
const handles = new Map();

function must(result) {
  if (result < 0) throw new Error(nfs.error(context) ?? `error ${result}`);
  return result;
}

/** The same bytes at the same place, whichever request wrote them. */
function pattern(seed, offset, length) {
  const first = Math.floor(offset / BLOCK_BYTES);
  const blocks = [];
  for (let block = first; block * BLOCK_BYTES < offset + length; block += 1) {
    blocks.push(Buffer.alloc(BLOCK_BYTES, createHash('sha256').update(`${seed}.${block}`).digest()));
  }
  return Buffer.concat(blocks).subarray(offset - first * BLOCK_BYTES, offset - first * BLOCK_BYTES + length);
}

const operations = {
  mount({ server, path, version: wanted, port, mountPort }) {
    version = wanted;
    context = nfs.init();
    const ports = port === undefined ? '' : `&nfsport=${port}${mountPort === undefined ? '' : `&mountport=${mountPort}`}`;
    if (nfs.parseUrl(context, `nfs://${server}${path}?version=${version}${ports}`) === null) throw new Error(nfs.error(context));
    must(nfs.mount(context, server, path));
  },
  open({ name, flags, mode = 0o644 }) {
    const out = [null];
    must(nfs.open(context, name, flags, mode, out));
    last += 1;
    handles.set(last, out[0]);
    return last;
  },
  close({ handle }) {
    must(nfs.close(context, handles.get(handle)));
    handles.delete(handle);
  },
  write({ handle, offset, length, seed }) {
    const bytes = pattern(seed, offset, length);
    for (let done = 0; done < length;) {
      const piece = bytes.subarray(done, Math.min(length, done + PIECE_BYTES[version]));
      done += must(nfs.pwrite(context, handles.get(handle), offset + done, piece.length, piece));
    }
  },
  check({ handle, offset, length, seed }) {
    const expected = pattern(seed, offset, length);
    for (let done = 0; done < length;) {
      const piece = Buffer.alloc(Math.min(length - done, 64 * 1024));
      const got = must(nfs.pread(context, handles.get(handle), offset + done, piece.length, piece));
      if (got === 0) throw new Error(`the file ends at ${offset + done}`);
      if (piece.compare(expected, done, done + got, 0, got) !== 0) throw new Error(`wrong data between ${offset + done} and ${offset + done + got}`);
      done += got;
    }
  },
  fsync({ handle }) { must(nfs.fsync(context, handles.get(handle))); },
  unlink({ name }) { must(nfs.unlink(context, name)); },
  mkdir({ name }) { must(nfs.mkdir(context, name)); },
};

createInterface(process.stdin).on('line', (line) => {
  const request = JSON.parse(line);
  try {
    const value = operations[request.op](request);
    console.log(JSON.stringify({ ok: true, value: value ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ ok: false, error: error.message }));
  }
}).on('close', () => { process.exit(0); });
