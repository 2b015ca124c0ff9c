/**
 * Streams for the receive, sound ones and what can be made of them: bytes that were changed on the way, and streams that are wrong and have the right
 * check values all the same, as somebody writes them who knows the format.
 */
import { createHash } from 'node:crypto';
import * as fc from 'fast-check';

import { headerCheck, STREAM_MAGIC, STREAM_VERSION } from '../../../blockstore/stream-format.js';
import { patternBytes } from '../model/pattern.js';

export const BLOCK_BYTES = 4096;
const HEAD_BYTES = 24;
const TYPE_DATA = 1;
const TYPE_ZERO = 2;
const TYPE_END = 3;

/** A record as it is to be written, right or wrong. */
export interface RawRecord {
  readonly type: number;
  readonly node: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** Bytes that follow the head. */
  readonly dataBytes: number;
  readonly seed: number;
}

export interface RawStream {
  /** As JSON, after the changes to it. */
  readonly header: string;
  readonly records: readonly RawRecord[];
}

/** What is changed about a sound header: a value in it, or in one of its nodes. */
export interface HeaderChange {
  readonly node: number | null;
  readonly key: string;
  readonly value: unknown;
}

export type ByteChange =
  | { readonly kind: 'flip'; readonly at: number; readonly mask: number }
  | { readonly kind: 'cut'; readonly at: number }
  | { readonly kind: 'insert'; readonly at: number; readonly bytes: Uint8Array }
  | { readonly kind: 'drop' | 'double' | 'swap' | 'splice'; readonly record: number };

export interface StreamCase {
  readonly seed: number;
  readonly nodes: readonly { readonly blocks: number; readonly file: boolean; readonly tail: number }[];
  readonly isDelta: boolean;
  readonly target: string;
  readonly headerChanges: readonly HeaderChange[];
  readonly records: readonly { readonly at: number; readonly how: 'replace' | 'insert' | 'remove'; readonly record: RawRecord }[];
  readonly byteChanges: readonly ByteChange[];
  readonly pieceBytes: number;
  readonly batchRecords: number;
  /** The stream goes on for ever with this byte. */
  readonly junk: number | null;
  /** The batches are handed over unread, as another program than ours would. */
  readonly isUnread: boolean;
}

const HEADER_KEYS = ['reference', 'baseReference', 'kind', 'uuid', 'name', 'consistency', 'message', 'createdUs', 'baseUuid', 'nodes', 'resume', 'extra', '__proto__'];
const NODE_KEYS = ['path', 'kind', 'mode', 'uid', 'gid', 'mtimeUs', 'sizeBytes', 'linkTarget', 'delta', 'extra', 'constructor'];
const VALUES: readonly unknown[] = [
  null, true, false, -1, 0, 1, 0.5, 511, 512, 4096, 2 ** 32, 2 ** 46, 2 ** 53, -(2 ** 53), 1e300, '', '.', '..', '../x', '/etc/passwd', 'a/b', 'a/../b', '.snapshots', '.offshoot-instant-0', 'etc', 'etc/x',
  'a@b', '@', 'a\0b', 'a\nb', '\u{1b}[2J', '\ud800', 'x'.repeat(255), 'x'.repeat(300), 'x/'.repeat(2000), 'y'.repeat(70_000), 'disk', 'container', 'symlink', 'directory', 'file', {}, [], [null], [[]],
  { records: 0, check: '0'.repeat(64) }, { records: 2 ** 53, check: 'f'.repeat(64) }, { records: -1, check: '' }, '00000000-0000-8000-8000-0000000000ff',
];
const LENGTHS = [0, 1, 511, 4095, 4096, 4097, 8192, 65_536, 1024 * 1024, 1024 * 1024 + 1, 2 ** 31, 2 ** 32, 2 ** 44, 2 ** 48 - 1];

/** Such that the stream may be received with them, all the same. */
const NAMES = ['a@b', '@', 'v', '-x', '.x', 'x y', 'é', '\u202e', '%00', '~', '\\', 'CON', '.snapshots', 'r', 'base', 'x'.repeat(255), 'd0', 'd1', 'd0/x'];
const SIZES = [0, 512, 1024, 4096, 4608, 2 ** 31, 2 ** 32 + 512, 2 ** 44, 2 ** 46, 2 ** 46 + 512, 2 ** 52];

const headerChange: fc.Arbitrary<HeaderChange> = fc.oneof(
  fc.record({ node: fc.constant(null), key: fc.constantFrom('name', 'reference', 'message'), value: fc.constantFrom(...NAMES) }),
  fc.record({ node: fc.nat(3), key: fc.constant('path'), value: fc.constantFrom(...NAMES) }),
  fc.record({ node: fc.nat(3), key: fc.constant('sizeBytes'), value: fc.constantFrom(...SIZES) }),
  fc.record({ node: fc.nat(3), key: fc.constantFrom('mode', 'uid', 'gid', 'mtimeUs'), value: fc.constantFrom(0, 1, 0o7777, 0o4755, 2 ** 31, 2 ** 32 - 2, 2 ** 32 - 1, -(2 ** 53) + 1, 2 ** 53 - 1) }),
  fc.record({ node: fc.constant(null), key: fc.constantFrom(...HEADER_KEYS), value: fc.constantFrom(...VALUES) }),
  fc.record({ node: fc.nat(3), key: fc.constantFrom(...NODE_KEYS), value: fc.constantFrom(...VALUES) }),
);
const rawRecord: fc.Arbitrary<RawRecord> = fc.record({
  type: fc.constantFrom(TYPE_DATA, TYPE_DATA, TYPE_DATA, TYPE_ZERO, TYPE_ZERO, TYPE_END, 0, 4, 2 ** 32 - 1), node: fc.oneof({ weight: 5, arbitrary: fc.nat(4) }, { weight: 1, arbitrary: fc.constantFrom(2 ** 31, 2 ** 32 - 1) }),
  offsetBytes: fc.oneof(fc.nat(12).map((block) => block * BLOCK_BYTES), fc.constantFrom(...LENGTHS)), lengthBytes: fc.oneof(fc.integer({ min: 1, max: 4 }).map((block) => block * BLOCK_BYTES), fc.constantFrom(...LENGTHS)),
  dataBytes: fc.oneof({ weight: 6, arbitrary: fc.constant(-1) }, { weight: 1, arbitrary: fc.nat(10_000) }), seed: fc.integer({ min: 1, max: 1000 }),
});
const fraction = fc.double({ min: 0, max: 1, noNaN: true });
const byteChange: fc.Arbitrary<ByteChange> = fc.oneof(
  fc.record({ kind: fc.constant('flip' as const), at: fraction, mask: fc.integer({ min: 1, max: 255 }) }),
  fc.record({ kind: fc.constant('flip' as const), at: fc.constant(0).chain(() => fc.double({ min: 0, max: 0.02, noNaN: true })), mask: fc.integer({ min: 1, max: 255 }) }),
  fc.record({ kind: fc.constant('cut' as const), at: fraction }),
  fc.record({ kind: fc.constant('insert' as const), at: fraction, bytes: fc.uint8Array({ minLength: 1, maxLength: 40 }) }),
  fc.record({ kind: fc.constantFrom('drop' as const, 'double' as const, 'swap' as const, 'splice' as const), record: fc.nat(12) }),
);

/** One kind of thing is wrong with most of them, with some everything, and with some nothing. */
export const streamCases: fc.Arbitrary<StreamCase> = fc.tuple(fc.constantFrom('none', 'header', 'header', 'records', 'bytes', 'all'), fc.record({
  seed: fc.integer({ min: 1, max: 1_000_000 }),
  nodes: fc.array(fc.record({ blocks: fc.integer({ min: 0, max: 9 }), file: fc.boolean(), tail: fc.nat(BLOCK_BYTES - 1) }), { minLength: 1, maxLength: 3 }),
  isDelta: fc.boolean(), target: fc.oneof({ weight: 9, arbitrary: fc.constant('') }, { weight: 1, arbitrary: fc.constantFrom('r/x', '../x', '.', '/', 'a//b', 'base', 'base/d0', 'x'.repeat(300), 'a\nb') }),
  headerChanges: fc.array(headerChange, { minLength: 1, maxLength: 2 }),
  records: fc.array(fc.record({ at: fc.nat(12), how: fc.constantFrom('replace' as const, 'insert' as const, 'remove' as const), record: rawRecord }), { minLength: 1, maxLength: 3 }),
  byteChanges: fc.array(byteChange, { minLength: 1, maxLength: 2 }),
  pieceBytes: fc.constantFrom(1, 7, 100, 4096, 65_536, 1024 * 1024), batchRecords: fc.integer({ min: 1, max: 8 }), junk: fc.oneof({ weight: 4, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: fc.constantFrom(0, 1, 3, 255) }),
  isUnread: fc.boolean(),
})).map(([wrong, { headerChanges, records, byteChanges, junk, target, ...rest }]) => ({
  ...rest,
  headerChanges: wrong === 'header' || wrong === 'all' ? headerChanges : [], records: wrong === 'records' || wrong === 'all' ? records : [],
  byteChanges: wrong === 'bytes' || wrong === 'all' ? byteChanges : [], junk: wrong === 'bytes' || wrong === 'all' ? junk : null, target: wrong === 'all' || wrong === 'bytes' ? target : '',
}));

/** The stream of a case before anything is wrong with it. Of a difference the nodes are those of `base`. */
export function soundStream({ seed, nodes, isDelta }: Pick<StreamCase, 'seed' | 'nodes' | 'isDelta'>, uuid: string, baseUuid: string): RawStream {
  const listed = nodes.map(({ blocks, file, tail }, i) => ({
    path: `d${i}`, kind: file ? 'file' : 'disk', mode: 0o600, uid: 0, gid: 0, mtimeUs: 1, sizeBytes: blocks * BLOCK_BYTES + (file ? tail : 0), linkTarget: null, delta: isDelta,
  }));
  const records: RawRecord[] = [];
  listed.forEach(({ sizeBytes }, node) => {
    for (let at = (seed % 2) * BLOCK_BYTES; at < sizeBytes; at += 3 * BLOCK_BYTES) {
      const lengthBytes = Math.min(2 * BLOCK_BYTES, sizeBytes - at);
      const isZero = isDelta && (at / BLOCK_BYTES + seed) % 5 === 0;
      records.push({ type: isZero ? TYPE_ZERO : TYPE_DATA, node, offsetBytes: at, lengthBytes, dataBytes: -1, seed: seed + at });
    }
  });
  records.push({ type: TYPE_END, node: 0, offsetBytes: records.length, lengthBytes: 0, dataBytes: -1, seed: 0 });
  const header = {
    reference: 'sent@v', baseReference: isDelta ? 'sent@base' : null, kind: 'container', uuid, name: `v${seed}`, consistency: 'crash', message: null, createdUs: 1, baseUuid: isDelta ? baseUuid : null,
    nodes: listed, resume: null,
  };
  return { header: JSON.stringify(header), records };
}

/** The changes that somebody makes who can make check values: they are right afterwards. */
export function changed(stream: RawStream, { headerChanges, records: recordChanges }: Pick<StreamCase, 'headerChanges' | 'records'>): RawStream {
  const header = JSON.parse(stream.header) as Record<string, unknown>;
  for (const { node, key, value } of headerChanges) {
    const object = node === null ? header : Array.isArray(header['nodes']) ? (header['nodes'] as unknown[])[node % Math.max(1, (header['nodes'] as unknown[]).length)] : undefined;
    if (typeof object === 'object' && object !== null) Object.defineProperty(object, key, { value, enumerable: true, configurable: true, writable: true });
  }
  const records = [...stream.records];
  for (const { at, how, record } of recordChanges) {
    const place = at % (records.length + 1);
    if (how === 'insert') records.splice(place, 0, record);
    else if (how === 'remove') records.splice(place, 1);
    else records.splice(place, 1, record);
  }
  return { header: JSON.stringify(header), records };
}

/** The bytes of a stream, and where its records begin. */
export function encode({ header, records }: RawStream): { readonly start: Buffer; readonly records: Buffer[] } {
  const text = Buffer.from(header);
  const preamble = Buffer.alloc(16);
  preamble.write(STREAM_MAGIC, 0, 'latin1');
  preamble.writeUInt32LE(STREAM_VERSION, 8);
  preamble.writeUInt32LE(text.length, 12);
  let check: Uint8Array = headerCheck(text);
  const start = Buffer.concat([preamble, text, check]);
  const encoded = records.map((record) => {
    const head = Buffer.alloc(HEAD_BYTES);
    head.writeUInt32LE(record.type, 0);
    head.writeUInt32LE(record.node, 4);
    head.writeUIntLE(record.offsetBytes, 8, 6);
    head.writeUIntLE(record.lengthBytes, 16, 6);
    const wanted = record.dataBytes >= 0 ? record.dataBytes : record.type === TYPE_DATA ? Math.min(record.lengthBytes, 1024 * 1024 + 1) : 0;
    const body = Buffer.concat([head, patternBytes(record.seed, 0, wanted)]);
    check = createHash('sha256').update(check).update(body).digest();
    return Buffer.concat([body, check]);
  });
  return { start, records: encoded };
}

/** The changes of somebody who cannot, on the way. `other` is another stream to splice records of. */
export function damagedBytes(parts: ReturnType<typeof encode>, changes: readonly ByteChange[], other: ReturnType<typeof encode>): Buffer {
  const records = [...parts.records];
  for (const change of changes) {
    if (!('record' in change) || records.length === 0) continue;
    const at = change.record % records.length;
    if (change.kind === 'drop') records.splice(at, 1);
    else if (change.kind === 'double') records.splice(at, 0, records[at]!);
    else if (change.kind === 'swap') [records[0], records[at]] = [records[at]!, records[0]!];
    else records.splice(at, 1, other.records[at % other.records.length]!);
  }
  let bytes: Buffer = Buffer.concat([parts.start, ...records]);
  for (const change of changes) {
    if ('record' in change) continue;
    const at = Math.min(bytes.length, Math.floor(change.at * bytes.length));
    if (change.kind === 'cut') bytes = bytes.subarray(0, at);
    else if (change.kind === 'insert') bytes = Buffer.concat([bytes.subarray(0, at), change.bytes, bytes.subarray(at)]);
    else if (at < bytes.length) {
      bytes = Buffer.from(bytes);
      bytes[at]! ^= change.mask;
    }
  }
  return bytes;
}
