/**
 * The format of a stream that `send` writes and `receive` reads: header, records, end. STREAM.md explains it.
 *
 * Each record ends with a check value, the SHA-256 of the check value before it and of the record itself. So one comparison
 * tells damage, loss, repetition and wrong order, wherever they begin, and 32 bytes are all that has to be kept to go on with a stream that was
 * interrupted. Pure functions and a reader of byte streams; both ends use them. Whether what a record says is possible for the
 * disk it speaks of is the receiver's to judge.
 */
import { createHash } from 'node:crypto';

import { OffshootError } from './errors.js';
import type { NodeKind } from './meta/rows.js';

export const STREAM_MAGIC = 'OFFSHOOT';
export const STREAM_VERSION = 1;
/** Longest header: some 30,000 names. It is one request of the control API, which has a limit of its own. */
export const STREAM_HEADER_BYTES_MAX = 6 * 1024 * 1024;
/** Longest data of one record. */
export const RECORD_DATA_BYTES_MAX = 1024 * 1024;
export const RECORD_HEAD_BYTES = 24;
export const CHECK_BYTES = 32;
/** Longest record, check value included. */
export const RECORD_BYTES_MAX = RECORD_HEAD_BYTES + RECORD_DATA_BYTES_MAX + CHECK_BYTES;

const PREAMBLE_BYTES = 16;

/** What a stream carries besides content. Exactly one JSON object. */
export interface StreamHeader {
  /** What it was sent as, for people and for going on. */
  readonly reference: string;
  readonly baseReference: string | null;
  /** `container`: all of one. `disk`: one disk or file, whose node comes last. */
  readonly kind: 'container' | 'disk';
  readonly uuid: string;
  readonly name: string;
  readonly consistency: 'crash' | 'application';
  readonly message: string | null;
  readonly createdUs: number;
  /** The snapshot that the receiver must have; null: the stream holds everything. */
  readonly baseUuid: string | null;
  /** Parents before what is in them; what is in the base and not here is gone. */
  readonly nodes: readonly StreamNode[];
  /** Goes on behind so many records, the last of which had this check value. */
  readonly resume: { readonly records: number; readonly check: string } | null;
}

export interface StreamNode {
  /** In the container; of a disk its name. */
  readonly path: string;
  readonly kind: NodeKind;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeUs: number;
  readonly sizeBytes: number;
  readonly linkTarget: string | null;
  /** Only what differs from the base's node of this path is sent; else all that is not zero. */
  readonly delta: boolean;
}

export type RecordType = 'data' | 'zero' | 'end';

export interface RecordHead {
  readonly type: RecordType;
  /** Index into the header's nodes; 0 of the end. */
  readonly node: number;
  /** Of the end: the number of records before it. */
  readonly offsetBytes: number;
  /** 0 of the end. */
  readonly lengthBytes: number;
}

const TYPES: readonly RecordType[] = ['data', 'zero', 'end'];

/** Where somebody who was interrupted goes on; travels from the receiver to the sender as one word. */
export interface ResumeToken {
  readonly receiveId: number;
  readonly reference: string;
  readonly baseReference: string | null;
  readonly uuid: string;
  readonly baseUuid: string | null;
  readonly records: number;
  readonly check: string;
  /** Everything before this node, and before this byte of it, is there. */
  readonly node: number;
  readonly offsetBytes: number;
}

export function damaged(message: string): OffshootError {
  return new OffshootError('foreign-format', `the stream is damaged: ${message}`);
}

/** The first bytes of a stream, and the check value that the first record builds upon. */
export function encodeHeader(header: StreamHeader): { readonly bytes: Buffer; readonly check: Buffer } {
  const text = Buffer.from(JSON.stringify(header));
  if (text.length > STREAM_HEADER_BYTES_MAX) {
    throw new OffshootError('too-large', `the names of ${header.nodes.length} files and directories are more than one stream can hold (${STREAM_HEADER_BYTES_MAX} bytes): send the disks one by one`);
  }
  const check = headerCheck(text);
  return { bytes: Buffer.concat([preamble(text.length), text, check]), check: header.resume === null ? check : Buffer.from(header.resume.check, 'hex') };
}

/** The check value behind a header. */
export function headerCheck(text: Uint8Array): Buffer {
  return createHash('sha256').update(preamble(text.length)).update(text).digest();
}

function preamble(headerBytes: number): Buffer {
  const bytes = Buffer.alloc(PREAMBLE_BYTES);
  bytes.write(STREAM_MAGIC, 0, 'latin1');
  bytes.writeUInt32LE(STREAM_VERSION, 8);
  bytes.writeUInt32LE(headerBytes, 12);
  return bytes;
}

/** One record in its pieces, and its check value, which is the last of them. */
export function encodeRecord(before: Uint8Array, head: RecordHead, data: Uint8Array | null): { readonly pieces: readonly Uint8Array[]; readonly check: Buffer } {
  if ((data?.length ?? 0) !== (head.type === 'data' ? head.lengthBytes : 0)) throw new Error('a record of data has as many bytes as it says, any other has none');
  const bytes = Buffer.alloc(RECORD_HEAD_BYTES);
  bytes.writeUInt32LE(TYPES.indexOf(head.type) + 1, 0);
  bytes.writeUInt32LE(head.node, 4);
  bytes.writeUIntLE(head.offsetBytes, 8, 6);
  bytes.writeUIntLE(head.lengthBytes, 16, 6);
  const check = checkOf(before, data === null ? [bytes] : [bytes, data]);
  return { pieces: data === null ? [bytes, check] : [bytes, data, check], check };
}

function checkOf(before: Uint8Array, parts: readonly Uint8Array[]): Buffer {
  const hash = createHash('sha256').update(before);
  for (const part of parts) hash.update(part);
  return hash.digest();
}

/** Reads a record's head. Only what tells how long the record is can be refused here: the rest is the check value's to say. */
export function decodeHead(bytes: Buffer): RecordHead {
  const type = TYPES[bytes.readUInt32LE(0) - 1];
  const lengthBytes = bytes.readUIntLE(16, 6);
  if (type === undefined || bytes.readUInt16LE(14) !== 0 || bytes.readUInt16LE(22) !== 0) throw damaged('something that is no record follows');
  if (type === 'data' && (lengthBytes === 0 || lengthBytes > RECORD_DATA_BYTES_MAX)) throw damaged(`a record of ${lengthBytes} bytes of data, which none has`);
  return { type, node: bytes.readUInt32LE(4), offsetBytes: bytes.readUIntLE(8, 6), lengthBytes };
}

/** Length of the whole record, check value included. */
export function recordBytes(head: RecordHead): number {
  return RECORD_HEAD_BYTES + (head.type === 'data' ? head.lengthBytes : 0) + CHECK_BYTES;
}

export interface DecodedRecord {
  readonly head: RecordHead;
  readonly data: Buffer;
  readonly check: Buffer;
}

/** The records that `bytes` consists of, each compared with its check value. `first` is the number of the first, for messages. */
export function* decodeRecords(bytes: Buffer, before: Uint8Array, first: number): Generator<DecodedRecord, void, undefined> {
  let check = before;
  let number = first;
  for (let at = 0; at < bytes.length; ) {
    if (bytes.length - at < RECORD_HEAD_BYTES) throw damaged(`record ${number} is cut short`);
    const head = decodeHead(bytes.subarray(at, at + RECORD_HEAD_BYTES));
    const end = at + recordBytes(head);
    if (end > bytes.length) throw damaged(`record ${number} is cut short`);
    const body = bytes.subarray(at, end - CHECK_BYTES);
    const found = bytes.subarray(end - CHECK_BYTES, end);
    if (!checkOf(check, [body]).equals(found)) {
      throw damaged(`record ${number} is not what was sent, or not in its place; what came before it is right`);
    }
    yield { head, data: body.subarray(RECORD_HEAD_BYTES), check: Buffer.from(found) };
    check = found;
    number += 1;
    at = end;
  }
}

export interface ReadHeader {
  readonly header: StreamHeader;
  /** Exactly as it was sent: the check values build upon it. */
  readonly text: string;
}

/** Takes a stream of bytes apart. Every method gives what is wrong with the stream as an error that says so. */
export class StreamReader {
  private readonly source: AsyncIterator<Uint8Array>;
  private readonly parts: Buffer[] = [];
  private bufferedBytes = 0;
  private hasEnded = false;

  constructor(source: AsyncIterable<Uint8Array>) {
    this.source = source[Symbol.asyncIterator]();
  }

  async readHeader(): Promise<ReadHeader> {
    const start = await this.take(PREAMBLE_BYTES);
    if (start === null) throw new OffshootError('foreign-format', 'nothing came, or too little to be a stream: look at what the sending side said');
    if (start.toString('latin1', 0, STREAM_MAGIC.length) !== STREAM_MAGIC) {
      throw new OffshootError('foreign-format', 'what comes in is no stream of offshoot send: look at what the sending side said');
    }
    const version = start.readUInt32LE(8);
    if (version !== STREAM_VERSION) {
      throw new OffshootError('foreign-format', `the stream has version ${version}, and this offshoot knows version ${STREAM_VERSION}: use the same version on both sides`, { version });
    }
    const headerBytes = start.readUInt32LE(12);
    if (headerBytes === 0 || headerBytes > STREAM_HEADER_BYTES_MAX) throw damaged(`its header has ${headerBytes} bytes, and may have ${STREAM_HEADER_BYTES_MAX}`);
    const rest = await this.take(headerBytes + CHECK_BYTES);
    if (rest === null) throw damaged('it ends within its header');
    const text = rest.subarray(0, headerBytes);
    if (!headerCheck(text).equals(rest.subarray(headerBytes))) throw damaged('its header is not what was sent');
    try {
      return { header: JSON.parse(text.toString('utf8')) as StreamHeader, text: text.toString('utf8') };
    } catch (error) {
      throw new OffshootError('foreign-format', 'the header of the stream is no JSON: another program wrote it', {}, error);
    }
  }

  /** The next record as it came, check value included; null when the stream ends between two records. */
  async readRecord(): Promise<{ readonly head: RecordHead; readonly bytes: Buffer } | null> {
    const start = await this.take(RECORD_HEAD_BYTES);
    if (start === null) return this.endedWithin();
    const head = decodeHead(start);
    const rest = await this.take(recordBytes(head) - RECORD_HEAD_BYTES);
    if (rest === null) return this.endedWithin();
    return { head, bytes: Buffer.concat([start, rest]) };
  }

  /** Nothing may follow the end. */
  async assertEnd(): Promise<void> {
    if ((await this.take(1)) !== null) throw damaged('something follows its end');
  }

  /** What is left over of a record that was cut is of no use: the stream has ended, and whoever reads says where. */
  private endedWithin(): null {
    this.parts.length = 0;
    this.bufferedBytes = 0;
    return null;
  }

  /** Null: the stream ends before that many bytes. */
  private async take(lengthBytes: number): Promise<Buffer | null> {
    while (this.bufferedBytes < lengthBytes && !this.hasEnded) {
      const next = await this.source.next();
      if (next.done === true) this.hasEnded = true;
      else {
        this.parts.push(Buffer.from(next.value.buffer, next.value.byteOffset, next.value.byteLength));
        this.bufferedBytes += next.value.byteLength;
      }
    }
    if (this.bufferedBytes < lengthBytes) return null;
    const all = this.parts.length === 1 ? this.parts[0]! : Buffer.concat(this.parts);
    this.parts.length = 0;
    if (all.length > lengthBytes) this.parts.push(all.subarray(lengthBytes));
    this.bufferedBytes = all.length - lengthBytes;
    return all.subarray(0, lengthBytes);
  }
}

export function encodeToken(token: ResumeToken): string {
  return Buffer.from(JSON.stringify(token)).toString('base64url');
}

export function decodeToken(text: string): ResumeToken {
  try {
    const token = JSON.parse(Buffer.from(text, 'base64url').toString('utf8')) as ResumeToken;
    const isText = (value: unknown): boolean => typeof value === 'string';
    const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0;
    if (isText(token.reference) && isText(token.uuid) && /^[0-9a-f]{64}$/u.test(token.check) && [token.records, token.node, token.offsetBytes, token.receiveId].every(isCount)
      && [token.baseReference, token.baseUuid].every((each) => each === null || isText(each))) return token;
  } catch {
    // Said below.
  }
  throw new OffshootError('invalid-argument', 'this is no resume token: copy the whole word that offshoot receive --resume-token prints on the receiving side');
}
