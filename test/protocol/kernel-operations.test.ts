/** Each operation: the bytes that the kernel sends, the call that the file system gets, the bytes that go back. */
import { describe, expect, it } from 'vitest';

import { Errno, OffshootError } from '../../blockstore/errors.js';
import { int64At, setInt64, uint64At, viewOf } from '../../daemon/transport/kernel/codec.js';
import { DispatchBench } from './dispatch-bench.js';
import { body, names, parseAttributes, parseDirents, request, struct, type RequestFields } from './messages.js';

const TiB = 1024n ** 4n;
const SETATTR = 4;

function getattr(nodeId: bigint): RequestFields {
  return { opcode: 3, nodeId, body: struct(0, 0, 0n) };
}

/** fuse_setattr_in with the given fields, in the order of the struct. */
function setattrBody(valid: number, fields: { size?: bigint; atime?: bigint; mtime?: bigint; atimeNs?: number; mtimeNs?: number; mode?: number; uid?: number; gid?: number }): Buffer {
  return struct(
    valid, 0, 0n, fields.size ?? 0n, 0n, fields.atime ?? 0n, fields.mtime ?? 0n, 0n,
    fields.atimeNs ?? 0, fields.mtimeNs ?? 0, 0, fields.mode ?? 0, 0, fields.uid ?? 0, fields.gid ?? 0, 0,
  );
}

function readBody(offset: bigint, size: number): Buffer {
  return struct(7n, offset, size, 0, 0n, 0, 0);
}

function writeBody(offset: bigint, data: string, flags = 0, size = Buffer.byteLength(data)): Buffer {
  return body(struct(7n, offset, size, 0, 0n, flags, 0), Buffer.from(data));
}

describe('names', () => {
  it('LOOKUP gives node, generation, attributes, and how long they hold', () => {
    const bench = new DispatchBench();
    const id = bench.file('disk.img', 'content');
    const reply = bench.ask({ opcode: 1, body: names('disk.img') });
    expect(reply.errno).toBe(0);
    expect(reply.payload.byteLength).toBe(128);
    expect(reply.payload.readBigUInt64LE(0)).toBe(id);
    expect(reply.payload.readBigUInt64LE(8)).toBe(1n);
    expect(reply.payload.readBigUInt64LE(16)).toBe(1n);
    expect(reply.payload.readBigUInt64LE(24)).toBe(1n);
    expect(parseAttributes(reply.payload, 40)).toMatchObject({ ino: id, size: 7n, blocks: 1n, mode: 0o100644, linkCount: 1, uid: 0, blockSize: 4096 });
  });

  it('LOOKUP of what is not there is ENOENT, of a name that is no text as well, of a long one ENAMETOOLONG', () => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 1, body: names('nothing') }).errno).toBe(Errno.ENOENT);
    expect(bench.ask({ opcode: 1, body: names(Uint8Array.of(0xff, 0xfe)) }).errno).toBe(Errno.ENOENT);
    expect(bench.ask({ opcode: 1, body: names('n'.repeat(256)) }).errno).toBe(Errno.ENAMETOOLONG);
    expect(bench.ask({ opcode: 1, body: names('n'.repeat(255)) }).errno).toBe(Errno.ENOENT);
    expect(bench.ask({ opcode: 1, body: names('é'.repeat(128)) }).errno).toBe(Errno.ENAMETOOLONG);
  });

  it('keeps a byte order mark and every other character of a name', () => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 9, body: body(struct(0o755, 0), names('\u{feff}dir\u{1f4be} ')) }).errno).toBe(0);
    expect(bench.fileSystem.readdir(1, 0, 9).map((entry) => entry.name)).toEqual(['\u{feff}dir\u{1f4be} ']);
  });

  it('MKDIR, SYMLINK, READLINK, UNLINK, RMDIR', () => {
    const bench = new DispatchBench();
    const made = bench.ask({ opcode: 9, body: body(struct(0o40750, 0o22), names('dir')) });
    expect(parseAttributes(made.payload, 40)).toMatchObject({ mode: 0o40750, uid: 1000, gid: 1001 });
    const dir = made.payload.readBigUInt64LE(0);
    const link = bench.ask({ opcode: 6, nodeId: dir, body: names('link', '../täget') });
    expect(parseAttributes(link.payload, 40).mode).toBe(0o120777);
    expect(bench.ask({ opcode: 5, nodeId: link.payload.readBigUInt64LE(0) }).payload.toString()).toBe('../täget');
    expect(bench.ask({ opcode: 11, body: names('dir') }).errno).toBe(Errno.ENOTEMPTY);
    expect(bench.ask({ opcode: 10, nodeId: dir, body: names('link') }).errno).toBe(0);
    expect(bench.ask({ opcode: 10, nodeId: dir, body: names('link') }).errno).toBe(Errno.ENOENT);
    expect(bench.ask({ opcode: 11, body: names('dir') }).errno).toBe(0);
    expect(bench.ask({ opcode: 9, body: body(struct(0o755, 0), names(Uint8Array.of(0xff))) }).errno).toBe(Errno.EILSEQ);
    expect(bench.ask({ opcode: 6, body: names('long', 'x'.repeat(4096)) }).errno).toBe(Errno.ENAMETOOLONG);
  });

  it('MKNOD makes regular files, closes them, and nothing else', () => {
    const bench = new DispatchBench();
    const made = bench.ask({ opcode: 8, body: body(struct(0o106640, 0, 0, 0), names('plain')) });
    expect(parseAttributes(made.payload, 40).mode).toBe(0o100640);
    expect(bench.fileSystem.openHandles).toBe(0);
    for (const type of [0o010000, 0o020000, 0o060000, 0o140000]) {
      expect(bench.ask({ opcode: 8, body: body(struct(type | 0o644, 5, 0, 0), names('special')) }).errno).toBe(Errno.EPERM);
    }
    expect(bench.ask({ opcode: 13, body: body(struct(2n), names('hard')) }).errno).toBe(Errno.EPERM);
  });

  it('RENAME and RENAME2, and refuses flags that it does not know', () => {
    const bench = new DispatchBench();
    const a = bench.file('a');
    const dir = bench.directory('dir');
    bench.file('b');
    const rename2 = (flags: number): number => bench.ask({ opcode: 45, body: body(struct(1n, flags, 0), names('a', 'b')) }).errno;
    expect(rename2(1)).toBe(Errno.EEXIST);
    expect(rename2(2)).toBe(Errno.EINVAL);
    expect(rename2(3)).toBe(Errno.EINVAL);
    expect(rename2(4)).toBe(Errno.EINVAL);
    expect(rename2(0)).toBe(0);
    expect(bench.ask({ opcode: 12, body: body(struct(dir), names('b', 'c')) }).errno).toBe(0);
    expect(bench.fileSystem.lookup(Number(dir), 'c').nodeId).toBe(Number(a));
    expect(bench.ask({ opcode: 12, body: body(struct(dir), names('b')) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 12, body: body(struct(dir), names('b', 'c', 'd')) }).errno).toBe(Errno.EINVAL);
  });
});

describe('attributes', () => {
  it('GETATTR and STATX agree; a birth time is not claimed', () => {
    const bench = new DispatchBench();
    const id = bench.file('f', 'x'.repeat(513));
    const plain = bench.ask(getattr(id));
    expect(plain.payload.byteLength).toBe(104);
    expect(parseAttributes(plain.payload, 16)).toMatchObject({ ino: id, size: 513n, blocks: 2n, mode: 0o100644 });
    const extended = bench.ask({ opcode: 52, nodeId: id, body: struct(0, 0, 0n, 0, 0xfff) }).payload;
    expect(extended.byteLength).toBe(288);
    expect(extended.readUInt32LE(32)).toBe(0x7ff);
    expect(extended.readUInt16LE(32 + 28)).toBe(0o100644);
    expect(extended.readBigUInt64LE(32 + 32)).toBe(id);
    expect(extended.readBigUInt64LE(32 + 40)).toBe(513n);
    expect(extended.readBigUInt64LE(32 + 48)).toBe(2n);
  });

  it('a node that is gone is ESTALE, so that the kernel asks for its name again', () => {
    const bench = new DispatchBench();
    expect(bench.ask(getattr(99n)).errno).toBe(Errno.ESTALE);
    expect(bench.ask({ opcode: 14, nodeId: 99n, body: struct(0, 0) }).errno).toBe(Errno.ESTALE);
    expect(bench.ask({ opcode: 27, nodeId: 99n, body: struct(0, 0) }).errno).toBe(Errno.ESTALE);
    expect(bench.ask(getattr((1n << 63n) + 1n)).errno).toBe(Errno.ESTALE);
  });

  it('SETATTR passes on what its bits say, and nothing else', async () => {
    const bench = new DispatchBench();
    const id = bench.file('f');
    const reply = await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(1 | 2 | 8 | 16 | 32, {
      mode: 0o100600, uid: 7, gid: 8, size: 5000n, atime: 3n, atimeNs: 4000, mtime: -2n, mtimeNs: 500_000_000,
    }) });
    expect(bench.fileSystem.changes).toEqual([{ mode: 0o600, uid: 7, sizeBytes: 5000, atimeUs: 3_000_004, mtimeUs: -1_500_000 }]);
    expect(parseAttributes(reply.payload, 16)).toMatchObject({ size: 5000n, mode: 0o100600, uid: 7, gid: 0, mtime: -2n, mtimeNs: 500_000_000 });
    await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(4 | 16 | 32 | 128 | 256, { gid: 9, atime: 1n }) });
    expect(bench.fileSystem.changes[1]).toEqual({ gid: 9, atimeUs: 'now', mtimeUs: 'now' });
    await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(64 | 512 | 2048, {}) });
    expect(bench.fileSystem.changes).toHaveLength(2);
    await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(16, { atime: 1n << 62n }) });
    expect(bench.fileSystem.changes[2]).toEqual({ atimeUs: Number.MAX_SAFE_INTEGER });
  });

  it('files carry no set-user-id or set-group-id, so that no write has to take it away; directories keep theirs', async () => {
    const bench = new DispatchBench();
    const id = bench.file('f');
    const changed = await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(1, { mode: 0o106755 }) });
    expect(parseAttributes(changed.payload, 16).mode).toBe(0o100755);
    await bench.fileSystem.setattr(Number(id), { mode: 0o6711 });
    expect(parseAttributes(bench.ask(getattr(id)).payload, 16).mode).toBe(0o100711);
    const dir = await bench.askLater({ opcode: SETATTR, nodeId: bench.directory('d'), body: setattrBody(1, { mode: 0o042770 }) });
    expect(parseAttributes(dir.payload, 16).mode).toBe(0o042770);
  });

  it('SETATTR size: the largest disk is allowed, a byte more is EFBIG, as is 2^63', async () => {
    const bench = new DispatchBench();
    const id = bench.file('f');
    bench.fileSystem.failNext('setattr', new OffshootError('no-space', 'full'));
    expect((await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(8, { size: 64n * TiB }) })).errno).toBe(Errno.ENOSPC);
    expect(bench.fileSystem.changes).toEqual([{ sizeBytes: 64 * 1024 ** 4 }]);
    for (const size of [64n * TiB + 1n, 1n << 63n, (1n << 64n) - 1n]) {
      expect((await bench.askLater({ opcode: SETATTR, nodeId: id, body: setattrBody(8, { size }) })).errno).toBe(Errno.EFBIG);
    }
  });

  it('STATFS', () => {
    const bench = new DispatchBench();
    const reply = bench.ask({ opcode: 17 }).payload;
    expect(reply.byteLength).toBe(80);
    expect([0, 8, 16, 24, 32].map((at) => Number(reply.readBigUInt64LE(at)))).toEqual([1000, 600, 500, 100, 50]);
    expect([40, 44, 48].map((at) => reply.readUInt32LE(at))).toEqual([4096, 255, 4096]);
  });
});

describe('files', () => {
  it('OPEN answers a disk with direct I/O, parallel writes and no FLUSH, a cached file with its cache kept', () => {
    const bench = new DispatchBench();
    const id = bench.file('f');
    const direct = bench.ask({ opcode: 14, nodeId: id, body: struct(0o101002, 0) });
    expect(direct.payload.byteLength).toBe(16);
    expect(direct.payload.readBigUInt64LE(0)).toBe(2n);
    expect(direct.payload.readUInt32LE(8)).toBe(1 | 64 | 32);
    expect(direct.payload.readInt32LE(12)).toBe(0);
    bench.fileSystem.mode = 'cached';
    expect(bench.ask({ opcode: 14, nodeId: id, body: struct(0, 0) }).payload.readUInt32LE(8)).toBe(2 | 32);
    expect(bench.fileSystem.openFlags).toEqual([0o100002, 0]);
  });

  it('CREATE makes a file and opens it', () => {
    const bench = new DispatchBench();
    const reply = bench.ask({ opcode: 35, body: body(struct(0o100102, 0o104640, 0o22, 0), names('new')) });
    expect(reply.payload.byteLength).toBe(144);
    expect(parseAttributes(reply.payload, 40).mode).toBe(0o100640);
    expect(reply.payload.readBigUInt64LE(128)).toBe(1n);
    expect(reply.payload.readUInt32LE(136)).toBe(1 | 64 | 32);
    expect(bench.fileSystem.openHandles).toBe(1);
  });

  it('CREATE never opens what is there already: EEXIST if exclusive, otherwise ESTALE, which makes the kernel look again', () => {
    const bench = new DispatchBench();
    bench.file('taken', 'content');
    const create = (flags: number): number => bench.ask({ opcode: 35, body: body(struct(flags, 0o100644, 0, 0), names('taken')) }).errno;
    expect(create(0o100102)).toBe(Errno.ESTALE);
    expect(create(0o101102)).toBe(Errno.ESTALE);
    expect(create(0o100302)).toBe(Errno.EEXIST);
    expect(bench.fileSystem.openHandles).toBe(0);
  });

  it('RELEASE passes the handle on, also one that is not known', () => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 18, nodeId: 5n, body: struct(77n, 0, 0, 0n) }).errno).toBe(0);
    expect(bench.ask({ opcode: 18, nodeId: 5n, body: struct(1n << 63n, 0, 0, 0n) }).errno).toBe(0);
    expect(bench.fileSystem.released).toEqual([77]);
  });

  it('READ gives exactly the bytes read, fewer only at the end of the file', () => {
    const bench = new DispatchBench();
    const nodeId = bench.file('f', 'hello, disk');
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(7n, 4) }).payload.toString()).toBe('disk');
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(7n, 1048576) }).payload.toString()).toBe('disk');
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(11n, 10) }).payload.byteLength).toBe(0);
    expect(bench.ask({ opcode: 15, nodeId, body: readBody((1n << 63n) - 1n, 10) }).payload.byteLength).toBe(0);
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(0n, 1048577) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(0n, 0xffffffff) }).errno).toBe(Errno.EINVAL);
    bench.fileSystem.failNext('read', new OffshootError('source-unreachable', 'the source is away'));
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(0n, 4) }).errno).toBe(Errno.EIO);
    expect(bench.warnings).toContain('READ failed');
  });

  it('WRITE answers the count, and refuses a size that is not that of its data', () => {
    const bench = new DispatchBench();
    const nodeId = bench.file('f', 'hello');
    const reply = bench.ask({ opcode: 16, nodeId, body: writeBody(5n, ', disk') });
    expect(reply.payload.byteLength).toBe(8);
    expect(reply.payload.readUInt32LE(0)).toBe(6);
    expect(bench.ask({ opcode: 15, nodeId, body: readBody(0n, 100) }).payload.toString()).toBe('hello, disk');
    expect(bench.ask({ opcode: 16, nodeId, body: writeBody(0n, 'abc', 0, 4) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 16, nodeId, body: writeBody(0n, 'abc', 0, 2) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 16, nodeId, body: writeBody(64n * TiB - 2n, 'abc') }).errno).toBe(Errno.EFBIG);
    expect(bench.ask({ opcode: 16, nodeId, body: writeBody((1n << 64n) - 1n, 'abc') }).errno).toBe(Errno.EFBIG);
    bench.fileSystem.failNext('write', new OffshootError('no-space', 'full'));
    expect(bench.ask({ opcode: 16, nodeId, body: writeBody(0n, 'abc') }).errno).toBe(Errno.ENOSPC);
    expect(bench.fileSystem.flushed).toEqual([]);
  });

  it.each([['O_DSYNC', 0o10000], ['O_SYNC', 0o4010000]])('WRITE with %s is flushed before its reply, and says when that failed', async (_, flags) => {
    const bench = new DispatchBench();
    const nodeId = bench.file('f');
    const release = bench.fileSystem.holdFlushes();
    const message = request({ opcode: 16, nodeId, body: writeBody(0n, 'durable', flags) });
    bench.dispatcher.handle(message);
    // The buffer that the request came in is used again at once.
    message.fill(0xff);
    await new Promise(setImmediate);
    expect(bench.replies).toHaveLength(0);
    release();
    await new Promise(setImmediate);
    expect(bench.fileSystem.flushed).toEqual([Number(nodeId)]);
    expect(bench.lastReply()).toMatchObject({ errno: 0, unique: 0x1234_5678_9abcn });
    expect(bench.lastReply().payload.readUInt32LE(0)).toBe(7);
    bench.fileSystem.failNext('flush', new OffshootError('faulted', 'the disk is faulted'));
    expect((await bench.askLater({ opcode: 16, nodeId, body: writeBody(0n, 'x', flags) })).errno).toBe(Errno.EIO);
  });

  it('FSYNC waits for the flush and gives its error; never ENOSYS', async () => {
    const bench = new DispatchBench();
    const nodeId = bench.file('f');
    expect((await bench.askLater({ opcode: 20, nodeId, body: struct(7n, 1, 0) })).errno).toBe(0);
    expect(bench.fileSystem.flushed).toEqual([Number(nodeId)]);
    bench.fileSystem.failNext('flush', new OffshootError('no-space', 'full'));
    expect((await bench.askLater({ opcode: 20, nodeId, body: struct(7n, 0, 0) })).errno).toBe(Errno.ENOSPC);
    bench.fileSystem.failNext('flush', new OffshootError('not-supported', 'no'));
    expect((await bench.askLater({ opcode: 20, nodeId, body: struct(7n, 0, 0) })).errno).toBe(Errno.EOPNOTSUPP);
    expect(bench.ask({ opcode: 25, nodeId, body: struct(7n, 0, 0, 0n) }).errno).toBe(0);
  });

  it('FALLOCATE knows five modes', () => {
    const bench = new DispatchBench();
    const fallocate = (mode: number, offset = 281600n, length = 3072n): number => bench.ask({ opcode: 43, nodeId: 9n, body: struct(7n, offset, length, mode, 0) }).errno;
    expect([0, 1, 3, 0x10, 0x11].map((mode) => fallocate(mode))).toEqual([0, 0, 0, 0, 0]);
    expect(bench.fileSystem.fallocations).toEqual(
      ['allocate', 'allocate-keep-size', 'punch-hole', 'zero-range', 'zero-range-keep-size'].map((mode) => [9, mode, 281600, 3072]),
    );
    expect([2, 4, 8, 0x20, 0x40, 0x13].map((mode) => fallocate(mode))).toEqual(new Array(6).fill(Errno.EOPNOTSUPP));
    expect(fallocate(3, 0n, 0n)).toBe(Errno.EINVAL);
    expect(fallocate(3, 64n * TiB, 1n)).toBe(Errno.EFBIG);
    expect(fallocate(3, 0n, 1n << 63n)).toBe(Errno.EFBIG);
    expect(fallocate(3, (1n << 63n) - 1n, (1n << 63n) - 1n)).toBe(Errno.EFBIG);
    expect(bench.fileSystem.fallocations).toHaveLength(5);
  });

  it('LSEEK finds data and holes; past the last data is ENXIO', () => {
    const bench = new DispatchBench();
    const lseek = (offset: bigint, whence: number): ReturnType<typeof bench.ask> => bench.ask({ opcode: 46, nodeId: 9n, body: struct(7n, offset, whence, 0) });
    bench.fileSystem.seekAnswer = 2 ** 33 + 4096;
    expect(lseek(2n ** 33n, 3).payload.readBigUInt64LE(0)).toBe(2n ** 33n + 4096n);
    expect(lseek(5n, 4).errno).toBe(0);
    expect(bench.fileSystem.seeks).toEqual([[9, 2 ** 33, 'data'], [9, 5, 'hole']]);
    bench.fileSystem.seekAnswer = 'past-the-end';
    expect(lseek(0n, 3).errno).toBe(Errno.ENXIO);
    expect(lseek((1n << 63n) - 1n, 3).errno).toBe(Errno.ENXIO);
    expect(lseek(0n, 2).errno).toBe(Errno.EINVAL);
  });
});

describe('directories', () => {
  it('OPENDIR is for directories, RELEASEDIR and FSYNCDIR for all', async () => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 27, body: struct(0, 0) }).payload.byteLength).toBe(16);
    expect(bench.ask({ opcode: 27, nodeId: bench.file('f'), body: struct(0, 0) }).errno).toBe(Errno.ENOTDIR);
    expect(bench.ask({ opcode: 29, body: struct(0n, 0, 0, 0n) }).errno).toBe(0);
    expect((await bench.askLater({ opcode: 30, body: struct(0n, 0, 0) })).errno).toBe(0);
    expect(bench.fileSystem.flushed).toEqual([1]);
  });

  it.each([[28, false, 200], [44, true, 700], [28, false, 4096], [44, true, 4096], [28, false, 65536], [44, true, 65536]])('operation %i lists all entries once, whatever the buffer (plus %s, %i bytes)', (opcode, plus, size) => {
    const bench = new DispatchBench();
    const dir = bench.directory('dir');
    const made = Array.from({ length: 150 }, (_, index) => `entry-${'n'.repeat(index)}`);
    for (const name of made) bench.directory(name, Number(dir));
    const listed: ReturnType<typeof parseDirents> = [];
    for (let offset = 0n; ;) {
      const reply = bench.ask({ opcode, nodeId: dir, body: readBody(offset, size) });
      expect(reply.errno).toBe(0);
      const part = parseDirents(reply.payload, plus);
      if (part.length === 0) break;
      listed.push(...part);
      offset = part.at(-1)?.offset ?? 0n;
    }
    expect(listed.map((entry) => entry.name)).toEqual(['.', '..', ...made]);
    expect(listed.slice(0, 2).map((entry) => entry.ino)).toEqual([dir, 1n]);
    expect(listed.every((entry) => entry.type === 4)).toBe(true);
    if (plus) expect(listed.map((entry) => entry.nodeId)).toEqual([0n, 0n, ...listed.slice(2).map((entry) => entry.ino)]);
  });

  it('an entry that does not fit is an error, not the end; so is an offset that was never given', () => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 28, body: readBody(0n, 31) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 28, body: readBody(0n, 0xffff_ffff) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 28, body: readBody(1n << 63n, 4096) }).errno).toBe(Errno.EINVAL);
    expect(bench.ask({ opcode: 28, body: readBody(1000n, 4096) }).payload.byteLength).toBe(0);
    expect(bench.ask({ opcode: 28, nodeId: 99n, body: readBody(0n, 4096) }).errno).toBe(Errno.ENOENT);
  });

  it('says the type of each entry', () => {
    const bench = new DispatchBench();
    bench.file('f');
    bench.directory('d');
    bench.fileSystem.symlink(1, 's', 'f', { uid: 0, gid: 0, pid: 0 });
    const entries = parseDirents(bench.ask({ opcode: 28, body: readBody(2n, 4096) }).payload, false);
    expect(entries.map((entry) => [entry.name, entry.type])).toEqual([['f', 8], ['d', 4], ['s', 10]]);
  });
});

describe('64-bit numbers', () => {
  it('are exact, or infinite so that every limit catches them', () => {
    const view = (value: bigint): DataView => viewOf(struct(value));
    for (const value of [0n, 1n, 0xffff_ffffn, 1n << 32n, (1n << 32n) + 1n, (1n << 53n) - 1n]) {
      expect(uint64At(view(value), 0)).toBe(Number(value));
      expect(int64At(view(value), 0)).toBe(Number(value));
      expect(int64At(view(-value), 0)).toBe(Number(-value));
    }
    for (const value of [1n << 53n, (1n << 53n) + 1n, 1n << 63n, (1n << 64n) - 1n]) expect(uint64At(view(value), 0)).toBe(Infinity);
    expect(int64At(view(1n << 62n), 0)).toBe(Infinity);
    expect(int64At(view(-(1n << 62n)), 0)).toBe(-Infinity);
    for (const value of [0, 1, -1, 2 ** 32, -(2 ** 32), 2 ** 53 - 1, -(2 ** 53) + 1, -1_500_000]) {
      const written = new DataView(new ArrayBuffer(8));
      setInt64(written, 0, value);
      expect(written.getBigInt64(0, true)).toBe(BigInt(value));
    }
  });
});

describe('what is not served', () => {
  it.each([
    ['GETXATTR', 22, Errno.ENOSYS], ['LISTXATTR', 23, Errno.ENOSYS], ['SETXATTR', 21, Errno.ENOSYS], ['REMOVEXATTR', 24, Errno.ENOSYS],
    ['ACCESS', 34, Errno.ENOSYS], ['POLL', 40, Errno.ENOSYS], ['IOCTL', 39, Errno.ENOTTY],
    ['SYNCFS', 50, Errno.ENOSYS], ['TMPFILE', 51, Errno.EOPNOTSUPP], ['SETLK', 32, Errno.ENOSYS],
    ['BMAP', 37, Errno.ENOSYS], ['an unknown one', 4711, Errno.ENOSYS], ['a byte-swapped INIT', 436207616, Errno.ENOSYS],
  ])('%s', (_, opcode, errno) => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode, body: new Uint8Array(64) })).toMatchObject({ errno, lengthField: 16 });
    expect(bench.fatal).toEqual([]);
  });

  it('FORGET and BATCH_FORGET have no reply, even when they are cut short', () => {
    const bench = new DispatchBench();
    bench.dispatcher.handle(request({ opcode: 2, nodeId: 5n, body: struct(3n) }));
    bench.dispatcher.handle(request({ opcode: 2, nodeId: 5n }));
    bench.dispatcher.handle(request({ opcode: 42, nodeId: 0n, body: struct(2, 0, 5n, 1n, 6n, 1n) }));
    bench.dispatcher.handle(request({ opcode: 42, nodeId: 0n, body: struct(0xffffffff, 0) }));
    bench.dispatcher.handle(request({ opcode: 2, nodeId: 5n, body: struct(3n) }).subarray(0, 44));
    expect(bench.replies).toEqual([]);
    expect(bench.fatal).toEqual([]);
  });

  it('INTERRUPT is answered ENOSYS under its own number, which has bit 0 set', () => {
    const bench = new DispatchBench();
    expect(bench.ask({ opcode: 36, unique: 0x8000_0000_0000_0041n, body: struct(0x8000_0000_0000_0040n) })).toMatchObject({
      errno: Errno.ENOSYS, unique: 0x8000_0000_0000_0041n, lengthField: 16,
    });
    expect(bench.ask({ opcode: 38 }).errno).toBe(0);
  });
});
