/**
 * COPY_FILE_RANGE (47) and COPY_FILE_RANGE_64 (53), as bytes: a dispatcher over the real file system and a real store, without a kernel.
 *
 * The kernel keeps much of this from happening (it refuses an overlap, clips at the source's end, opens nothing in a snapshot for writing); a server
 * that relied on it would be one bug of a kernel away from a wrong disk. The last part asks while an I/O worker's writes are under way.
 */
import fs from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { Errno } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { StoreFileSystem } from '../../daemon/filesystem/store-file-system.js';
import { KernelDispatcher } from '../../daemon/transport/kernel/dispatch.js';
import { HandleTable } from '../../daemon/transport/kernel/handles.js';
import { TestStore, everyThird, patterned } from '../support/blockstore-fixture.js';
import { compilePrograms } from '../support/compiled-program.js';
import { mustRun } from '../support/model/command.js';
import { RESENT, parseReply, request, struct, type Reply } from './messages.js';

const MIB = 1024 * 1024;
const GIB = 1024 * MIB;
const OLD = 47;
const NEW = 53;
const PROGRAM = 'test/support/copies-under-writes-program.ts';
const programs = compilePrograms('copies-under-writes', [PROGRAM, 'daemon/transport/kernel/io-worker.ts']);

afterAll(() => { programs.remove(); });

interface Copy {
  readonly from?: bigint | number;
  readonly to?: bigint | number;
  readonly length: bigint | number;
  readonly flags?: bigint;
}

const NOTHING_MOVES: readonly (readonly [string, Copy, number])[] = [
  ['places that lie differently in their blocks', { from: 512, to: 0, length: MIB }, Errno.EOPNOTSUPP],
  ['fewer bytes than are worth sharing', { from: 0, to: 0, length: 65_535 }, Errno.EOPNOTSUPP],
  ['fewer whole blocks than are worth sharing', { from: 100, to: 100, length: 65_536 }, Errno.EOPNOTSUPP],
  ['no bytes', { from: 0, to: 0, length: 0 }, 0],
  ['a start at the source\'s end', { from: 2 * MIB, to: 0, length: MIB }, 0],
  ['a start behind everything that can be', { from: (1n << 63n) - 4096n, to: 0, length: 4096 }, 0],
  ['a start that no number of ours holds', { from: (1n << 64n) - 1n, to: 0, length: 4096 }, 0],
  ['a target\'s start at its end', { from: 0, to: 2 * MIB, length: MIB }, Errno.EFBIG],
  ['a target\'s start behind everything', { from: 0, to: (1n << 63n) - 4096n, length: MIB }, Errno.EFBIG],
  ['a flag that is not known', { from: 0, to: 0, length: MIB, flags: 1n }, Errno.EINVAL],
  ['a flag among the upper bits', { from: 0, to: 0, length: MIB, flags: 1n << 63n }, Errno.EINVAL],
];

/** A container with two disks of 2 MiB (the second a clone), a file, all open. */
class CopyBench {
  readonly test = new TestStore();
  readonly fileSystem: StoreFileSystem;
  readonly content = patterned(1, 2 * MIB, everyThird);
  readonly before = patterned(2, 2 * MIB);
  readonly fileContent = patterned(3, 700_001);
  readonly source: NodeRow;
  readonly target: NodeRow;
  readonly file: NodeRow;
  readonly #replies: Uint8Array[] = [];
  readonly #dispatcher: KernelDispatcher;
  #unique = 0n;

  constructor() {
    const { test } = this;
    this.fileSystem = new StoreFileSystem({
      store: test.store, storeDir: test.storeDir, handles: HandleTable.load(test.runtimeDir), beforeDiscard: () => undefined, onWarning: () => undefined,
    });
    this.#dispatcher = new KernelDispatcher({
      fileSystem: this.fileSystem, reply: (message) => this.#replies.push(Uint8Array.from(message)), onFatal: (error) => { throw error; },
      logger: { debug: () => undefined, warn: () => undefined }, onSession: () => undefined,
    });
    this.source = test.image('source', this.content);
    this.target = test.clone(test.image('base', this.before), 'target');
    this.file = test.image('file', this.fileContent, { kind: 'file' });
    for (const node of [this.source, this.target, this.file]) this.open(node);
  }

  open(node: NodeRow): void {
    this.fileSystem.open(node.id, fs.constants.O_RDONLY);
  }

  async ask(opcode: number, source: number | bigint, target: number | bigint, { from = 0, to = 0, length, flags = 0n }: Copy, mark = 0n): Promise<Reply> {
    this.#unique += 2n;
    const count = this.#replies.length;
    const body = struct(7n, BigInt(from), BigInt(target), 8n, BigInt(to), BigInt(length), flags);
    this.#dispatcher.handle(request({ opcode, nodeId: BigInt(source), unique: this.#unique | mark, body }));
    for (let turn = 0; this.#replies.length === count && turn < 1000; turn += 1) await new Promise(setImmediate);
    const reply = parseReply(this.#replies.at(-1)!);
    expect([this.#replies.length - count, reply.unique, reply.lengthField]).toEqual([1, this.#unique | mark, 16 + reply.payload.length]);
    if (reply.errno !== 0) expect(reply.payload.length).toBe(0);
    return reply;
  }

  /** The count that is answered; the errno, negative. */
  async count(opcode: number, source: NodeRow, target: NodeRow, copy: Copy): Promise<number> {
    const { errno, payload } = await this.ask(opcode, source.id, target.id, copy);
    if (errno !== 0) return -errno;
    expect(payload.length).toBe(8);
    // The older one has 32 bits of count and 32 of padding.
    if (opcode === OLD) expect(payload.readUInt32LE(4)).toBe(0);
    return Number(payload.readBigUInt64LE(0));
  }

  extents(node: NodeRow): number {
    return this.test.store.meta.sharedExtents.count(this.test.layer(node).id);
  }

  /** The target as it is when `copied` of the source's bytes came. */
  expected(from: number, to: number, copied: number): Buffer {
    const content = Buffer.from(this.before);
    this.content.copy(content, to, from, from + copied);
    return content;
  }

  expectNothingChanged(): void {
    this.test.expectContent(this.source, this.content);
    this.test.expectContent(this.target, this.before);
    this.test.expectContent(this.file, this.fileContent);
    for (const node of [this.source, this.target, this.file]) expect(this.extents(node)).toBe(0);
  }
}

describe.each([['COPY_FILE_RANGE', OLD], ['COPY_FILE_RANGE_64', NEW]])('%s', (_name, opcode) => {
  it('shares blocks, and answers how many bytes', async () => {
    const bench = new CopyBench();
    expect(await bench.count(opcode, bench.source, bench.target, { from: 8192, to: MIB, length: 512 * 1024 })).toBe(512 * 1024);
    expect(bench.extents(bench.target)).toBeGreaterThan(0);
    bench.test.expectContent(bench.target, bench.expected(8192, MIB, 512 * 1024));
    expect(checkStore(bench.test.store).findings).toEqual([]);
  });

  it('shares what lies between two odd ends, if both places lie alike in their blocks', async () => {
    const bench = new CopyBench();
    expect(await bench.count(opcode, bench.source, bench.target, { from: 1000, to: MIB + 1000, length: 300_001 })).toBe(300_001);
    expect(bench.extents(bench.target)).toBeGreaterThan(0);
    bench.test.expectContent(bench.target, bench.expected(1000, MIB + 1000, 300_001));
  });

  it('answers what moves no byte, and changes nothing', async () => {
    const bench = new CopyBench();
    for (const [what, copy, errno] of NOTHING_MOVES) {
      expect([what, await bench.count(opcode, bench.source, bench.target, copy)]).toEqual([what, 0 - errno]);
      bench.expectNothingChanged();
    }
  });

  it('ends where the source ends, and where a disk ends; a file becomes longer', async () => {
    const bench = new CopyBench();
    expect(await bench.count(opcode, bench.source, bench.target, { from: MIB, to: 0, length: (1n << 63n) - 1n })).toBe(MIB);
    bench.test.expectContent(bench.target, bench.expected(MIB, 0, MIB));
    expect(await bench.count(opcode, bench.source, bench.target, { from: 0, to: MIB + 512 * 1024, length: 2 * MIB })).toBe(512 * 1024);
    const both = bench.expected(MIB, 0, MIB);
    bench.content.copy(both, MIB + 512 * 1024, 0, 512 * 1024);
    bench.test.expectContent(bench.target, both);
    expect(await bench.count(opcode, bench.source, bench.file, { from: 0, to: 512 * 1024, length: (1n << 64n) - 1n })).toBe(2 * MIB);
    bench.test.expectContent(bench.file, Buffer.concat([bench.fileContent.subarray(0, 512 * 1024), bench.content]));
    // What ends within a block is shared when both end there.
    const odd = bench.test.image('odd', bench.fileContent, { kind: 'file' });
    const empty = bench.test.image('empty', Buffer.alloc(0), { kind: 'file' });
    for (const node of [odd, empty]) bench.open(node);
    expect(await bench.count(opcode, odd, empty, { length: GIB })).toBe(700_001);
    bench.test.expectContent(empty, bench.fileContent);
    expect(await bench.count(opcode, odd, bench.target, { length: GIB })).toBe(700_001);
    bench.fileContent.copy(both, 0);
    bench.test.expectContent(bench.target, both);
  });

  it('within one file refuses what overlaps, and changes nothing', async () => {
    const bench = new CopyBench();
    // Whole blocks, odd places, all of it onto itself.
    for (const [from, to, length] of [[0, 65_536, 131_072], [100, 612, 131_072], [0, 0, MIB]] as const) {
      expect(await bench.count(opcode, bench.target, bench.target, { from, to, length })).toBe(-Errno.EINVAL);
      expect(await bench.count(opcode, bench.target, bench.target, { from: to, to: from, length })).toBe(-Errno.EINVAL);
      bench.expectNothingChanged();
    }
  });

  it('within one file copies what only touches', async () => {
    const bench = new CopyBench();
    expect(await bench.count(opcode, bench.target, bench.target, { from: 131_072, to: 0, length: 131_072 })).toBe(131_072);
    const expected = Buffer.from(bench.before);
    bench.before.copy(expected, 0, 131_072, 262_144);
    bench.test.expectContent(bench.target, expected);
  });

  it('goes between disks and files, either way', async () => {
    const bench = new CopyBench();
    const cut = Math.floor(700_001 / BLOCK_BYTES) * BLOCK_BYTES;
    expect(await bench.count(opcode, bench.file, bench.target, { length: cut })).toBe(cut);
    expect(await bench.count(opcode, bench.target, bench.file, { from: MIB, length: 131_072 })).toBe(131_072);
    const disk = Buffer.from(bench.before);
    bench.fileContent.copy(disk, 0, 0, cut);
    bench.test.expectContent(bench.target, disk);
    const file = Buffer.from(bench.fileContent);
    bench.before.copy(file, 0, MIB, MIB + 131_072);
    bench.test.expectContent(bench.file, file);
  });

  it('reads what is part of a snapshot, and never writes to it, not even at an odd end', async () => {
    const bench = new CopyBench();
    const { meta } = bench.test.store;
    const { id, ...row } = bench.test.row(bench.test.clone(bench.target, 'thawed'));
    meta.nodes.orphan(id);
    const layer = meta.layers.insert({ ...bench.test.layer(bench.target), writtenBy: null });
    const frozen = meta.nodes.insert({ ...row, name: 'frozen', layerId: layer.id, frozen: true });
    bench.open(frozen);
    for (const copy of [{ length: MIB }, { from: 100, to: 100, length: MIB }, { from: 1, to: 0, length: MIB }, { length: 4096 }]) {
      expect(await bench.count(opcode, bench.source, frozen, copy)).toBe(-Errno.EROFS);
    }
    bench.test.expectContent(frozen, bench.before);
    expect(await bench.count(opcode, frozen, bench.file, { length: 131_072 })).toBe(131_072);
    expect(bench.test.content(bench.file).subarray(0, 131_072).equals(bench.before.subarray(0, 131_072))).toBe(true);
  });

  it('refuses what has no content, what is not there, and what nobody has open', async () => {
    const bench = new CopyBench();
    const { meta } = bench.test.store;
    const fields = { parentId: ROOT_ID, mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: null, copyOnRead: false, fault: null };
    const directory = meta.nodes.insert({ ...fields, name: 'directory', kind: 'directory', linkTarget: null });
    const link = meta.nodes.insert({ ...fields, name: 'link', kind: 'symlink', linkTarget: 'source', sizeBytes: 6 });
    const closed = bench.test.image('closed', bench.content);
    const errnoOf = async (source: bigint | number, target: bigint | number): Promise<number> => (await bench.ask(opcode, source, target, { length: MIB })).errno;
    for (const [node, errno] of [[directory.id, Errno.EISDIR], [link.id, Errno.EINVAL], [closed.id, Errno.EBADF], [99_999, Errno.ESTALE], [(1n << 64n) - 1n, Errno.ESTALE]] as const) {
      expect([node, await errnoOf(node, bench.target.id)]).toEqual([node, errno]);
      expect([node, await errnoOf(bench.source.id, node)]).toEqual([node, errno]);
    }
    bench.expectNothingChanged();
    bench.test.expectContent(closed, bench.content);
  });

  it('on a faulted disk is EIO', async () => {
    const bench = new CopyBench();
    bench.test.store.faultNode(bench.target.id, 'a test');
    expect(await bench.count(opcode, bench.source, bench.target, { length: MIB })).toBe(-Errno.EIO);
    expect(await bench.count(opcode, bench.target, bench.source, { length: MIB })).toBe(-Errno.EIO);
    bench.expectNothingChanged();
  });

  it('whose last bytes cannot be written says how far it came, one whose first cannot is an error', async () => {
    const bench = new CopyBench();
    bench.test.decide = (call) => (call.operation === 'pwrite' ? { kind: 'fail', errno: Errno.ENOSPC } : undefined);
    expect(await bench.count(opcode, bench.source, bench.target, { from: 4096, to: 4096, length: MIB + 10 })).toBe(MIB);
    bench.test.expectContent(bench.target, bench.expected(4096, 4096, MIB));
    expect(await bench.count(opcode, bench.source, bench.target, { from: 100, to: 100, length: MIB })).toBe(-Errno.ENOSPC);
    bench.test.decide = undefined;
    bench.test.expectContent(bench.target, bench.expected(4096, 4096, MIB));
  });

  it('that comes for the second time leads to the same', async () => {
    const bench = new CopyBench();
    const copy = { from: 1000, to: MIB + 1000, length: 500_000 };
    for (const mark of [0n, RESENT, RESENT]) {
      const reply = await bench.ask(opcode, bench.source.id, bench.target.id, copy, mark);
      expect([reply.errno, Number(reply.payload.readBigUInt64LE(0))]).toEqual([0, 500_000]);
    }
    bench.test.expectContent(bench.target, bench.expected(1000, MIB + 1000, 500_000));
  });
});

describe('a copy of more than 4 GiB', () => {
  it('is answered in 64 bits by the newer operation; the older one says what 32 bits hold, in whole blocks', async () => {
    const bench = new CopyBench();
    const source = bench.test.emptyImage('large', 5 * GIB);
    const target = bench.test.emptyImage('larger', 6 * GIB);
    for (const node of [source, target]) bench.open(node);
    const mark = patterned(9, BLOCK_BYTES);
    bench.test.write(source, 5 * GIB - BLOCK_BYTES, mark);
    const reply = await bench.ask(NEW, source.id, target.id, { to: GIB, length: 5 * GIB });
    expect([reply.errno, reply.payload.length, reply.payload.readBigUInt64LE(0)]).toEqual([0, 8, BigInt(5 * GIB)]);
    expect(bench.test.read(target, 6 * GIB - BLOCK_BYTES, BLOCK_BYTES).equals(mark)).toBe(true);
    expect(await bench.count(OLD, source, target, { length: 5 * GIB })).toBe(2 ** 32 - 4096);
    expect(await bench.count(OLD, source, target, { from: 2 ** 32 - 4096, to: 2 ** 32 - 4096, length: (1n << 64n) - 1n })).toBe(GIB + 4096);
    expect(bench.test.read(target, 5 * GIB - BLOCK_BYTES, BLOCK_BYTES).equals(mark)).toBe(true);
  });
});

describe('a copy while writes are under way', () => {
  it('that would have to wait for one for long is not shared, and changes nothing', async () => {
    const bench = new CopyBench();
    for (const node of [bench.source, bench.target]) {
      const worker = bench.test.actor(1);
      worker.shared.enter(bench.test.disk(node).shared.serial);
      expect(await bench.count(NEW, bench.source, bench.target, { length: MIB })).toBe(-Errno.EOPNOTSUPP);
      worker.shared.leave(true);
      bench.expectNothingChanged();
      // Nobody is kept out by it.
      bench.test.write(node, 0, bench.test.read(node, 0, BLOCK_BYTES));
    }
    // The next one finds nobody inside.
    expect(await bench.count(NEW, bench.source, bench.target, { length: MIB })).toBe(MIB);
  });

  it('has each block as it was before or after them, all that was acknowledged before it, and nothing that came later', async () => {
    const { stdout } = await mustRun(process.execPath, [programs.pathOf(PROGRAM)], { timeoutMs: 60_000 });
    const { copies, shared, wrong } = JSON.parse(stdout) as { copies: number; shared: number; wrong: string[] };
    expect(wrong).toEqual([]);
    expect(copies).toBeGreaterThan(50);
    expect(shared).toBeGreaterThan(copies / 2);
  });
});
