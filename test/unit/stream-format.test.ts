/** Streams: what was put in comes out, in whatever pieces it arrives; whatever is changed about it is noticed, and where. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import {
  decodeRecords, decodeToken, encodeHeader, encodeRecord, encodeToken, StreamReader, type RecordHead, type StreamHeader,
} from '../../blockstore/stream-format.js';
import { kindOf, kindOfRejection } from '../support/blockstore-fixture.js';

const HEADER: StreamHeader = {
  reference: 'golden@v1', baseReference: null, kind: 'disk', uuid: '00000000-0000-8000-8000-000000000001', name: 'v1', consistency: 'crash', message: null, createdUs: 1,
  baseUuid: null, resume: null,
  nodes: [{ path: 'a.img', kind: 'disk', mode: 0o600, uid: 0, gid: 0, mtimeUs: 0, sizeBytes: 1 << 30, linkTarget: null, delta: false }],
};

interface Item {
  readonly head: RecordHead;
  readonly data: Buffer | null;
}

const offsets = fc.integer({ min: 0, max: 2 ** 46 });
const items: fc.Arbitrary<Item[]> = fc.array(fc.oneof(
  fc.record({ node: fc.nat(1000), offsetBytes: offsets, data: fc.uint8Array({ minLength: 1, maxLength: 9000 }) })
    .map(({ node, offsetBytes, data }): Item => ({ head: { type: 'data', node, offsetBytes, lengthBytes: data.length }, data: Buffer.from(data) })),
  fc.record({ node: fc.nat(1000), offsetBytes: offsets, lengthBytes: fc.integer({ min: 1, max: 2 ** 46 }) })
    .map(({ node, offsetBytes, lengthBytes }): Item => ({ head: { type: 'zero', node, offsetBytes, lengthBytes }, data: null })),
), { maxLength: 12 });

function streamOf(list: readonly Item[]): { readonly bytes: Buffer; readonly recordAt: number } {
  const { bytes, check } = encodeHeader(HEADER);
  const parts: Uint8Array[] = [bytes];
  let before: Uint8Array = check;
  for (const { head, data } of [...list, { head: { type: 'end', node: 0, offsetBytes: list.length, lengthBytes: 0 } as const, data: null }]) {
    const record = encodeRecord(before, head, data);
    before = record.check;
    parts.push(...record.pieces);
  }
  return { bytes: Buffer.concat(parts), recordAt: bytes.length };
}

async function* inPieces(bytes: Buffer, pieceBytes: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += pieceBytes) {
    await Promise.resolve();
    yield bytes.subarray(at, at + pieceBytes);
  }
}

/** Reads a stream to its end as a receiver does; throws what is wrong with it. */
async function readAll(bytes: Buffer, pieceBytes = 65_536): Promise<Item[]> {
  const reader = new StreamReader(inPieces(bytes, pieceBytes));
  const { header } = await reader.readHeader();
  expect(header).toEqual(HEADER);
  let { check }: { check: Uint8Array } = encodeHeader(header);
  const found: Item[] = [];
  for (;;) {
    const record = await reader.readRecord();
    if (record === null) throw new Error('cut short');
    for (const decoded of decodeRecords(record.bytes, check, found.length)) {
      ({ check } = decoded);
      if (decoded.head.type === 'end') {
        await reader.assertEnd();
        return found;
      }
      found.push({ head: decoded.head, data: decoded.head.type === 'data' ? Buffer.from(decoded.data) : null });
    }
  }
}

describe('a stream', () => {
  it('gives what was put in, in whatever pieces it comes', async () => {
    await fc.assert(fc.asyncProperty(items, fc.integer({ min: 1, max: 5000 }), async (list, pieceBytes) => {
      expect(await readAll(streamOf(list).bytes, pieceBytes)).toEqual(list);
    }), { numRuns: 60 });
  });

  it('is refused with any bit of it turned over, wherever that is', async () => {
    await fc.assert(fc.asyncProperty(items, fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }), fc.integer({ min: 0, max: 7 }), async (list, share, bit) => {
      const { bytes } = streamOf(list);
      const at = Math.floor(share * bytes.length);
      bytes[at] = (bytes[at] ?? 0) ^ (2 ** bit);
      await expect(readAll(bytes)).rejects.toThrow(/damaged|cut short|no stream|version/u);
    }), { numRuns: 150 });
  });

  it('is refused when it ends early, goes on behind its end, or has records left out, doubled or exchanged', async () => {
    await fc.assert(fc.asyncProperty(items, fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }), async (list, share) => {
      const { bytes } = streamOf(list);
      await expect(readAll(bytes.subarray(0, Math.floor(share * bytes.length)))).rejects.toThrow();
      await expect(readAll(Buffer.concat([bytes, Buffer.from([0])]))).rejects.toThrow(/follows its end/u);
    }), { numRuns: 40 });
    const parts = (order: readonly number[]): Buffer => {
      const { bytes, check } = encodeHeader(HEADER);
      let before: Uint8Array = check;
      const records = [1, 2, 3].map((n) => {
        const record = encodeRecord(before, { type: 'data', node: 0, offsetBytes: n * 4096, lengthBytes: 4096 }, Buffer.alloc(4096, n));
        before = record.check;
        return Buffer.concat(record.pieces);
      });
      records.push(Buffer.concat(encodeRecord(before, { type: 'end', node: 0, offsetBytes: 3, lengthBytes: 0 }, null).pieces));
      return Buffer.concat([bytes, ...order.map((n) => records[n]!)]);
    };
    expect(await readAll(parts([0, 1, 2, 3]))).toHaveLength(3);
    for (const order of [[0, 2, 3], [0, 1, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3], [3]]) await expect(readAll(parts(order))).rejects.toThrow(/not what was sent, or not in its place/u);
  });

  it('of another version, or that is none, says so', async () => {
    const { bytes } = streamOf([]);
    bytes.writeUInt32LE(2, 8);
    await expect(readAll(bytes)).rejects.toThrow(/version 2, and this offshoot knows version 1/u);
    await expect(readAll(Buffer.from('ssh: connect to host: no route to host\n'))).rejects.toThrow(/no stream of offshoot send/u);
    await expect(readAll(Buffer.alloc(0))).rejects.toThrow(/nothing came/u);
    const long = streamOf([]).bytes;
    long.writeUInt32LE(0xffff_ffff, 12);
    expect(await kindOfRejection(readAll(long))).toBe('foreign-format');
  });
});

describe('a resume token', () => {
  it('comes back as it was, and what is none is refused', () => {
    const token = { receiveId: 7, reference: 'golden@v2', baseReference: '@v1', uuid: 'u', baseUuid: null, records: 12, check: 'ab'.repeat(32), node: 3, offsetBytes: 2 ** 45 };
    expect(decodeToken(encodeToken(token))).toEqual(token);
    for (const text of ['', 'golden@v2', encodeToken(token).slice(0, -5), Buffer.from('{"reference":"x"}').toString('base64url')]) {
      expect(kindOf(() => decodeToken(text))).toBe('invalid-argument');
    }
  });
});
