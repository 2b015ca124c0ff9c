/**
 * Streams of `offshoot send` as a sender would write them, made of a few numbers: what a receive is fed with, in the recorded process and again
 * by whoever goes on with it after a loss.
 *
 * A node that is sent as a difference is sent as its writes, which are whole blocks in ascending order; any other as all of it that is not zero.
 */
import { encodeHeader, encodeRecord, type RecordHead, type StreamHeader } from '../../../blockstore/stream-format.js';
import { BLOCK_BYTES } from './window-states.js';
import { writtenBytes, type Written } from './window.js';

/** Blocks in one record. */
const RECORD_BLOCKS = 3;

export interface StreamSpec {
  readonly uuid: string;
  /** Of the snapshot. */
  readonly name: string;
  /** A container; the stream is of all of one. */
  readonly target: string;
  readonly baseUuid: string | null;
  readonly nodes: readonly StreamSpecNode[];
}

export interface StreamSpecNode {
  readonly path: string;
  readonly kind: 'disk' | 'file' | 'directory';
  /** All of it, also of a difference. Of a directory nothing. */
  readonly content: Written;
  readonly delta: boolean;
}

export interface EncodedStream {
  /** The header, as the receiver is given it. */
  readonly json: string;
  /** The end is the last. */
  readonly records: readonly Buffer[];
}

export function uuidOf(number: number): string {
  return `00000000-0000-8000-8000-${number.toString(16).padStart(12, '0')}`;
}

/** `resume`: as a sender writes it that goes on; its records are still all of them. */
export function encodeStream(spec: StreamSpec, resume: StreamHeader['resume'] = null): EncodedStream {
  const header: StreamHeader = {
    reference: `sent@${spec.name}`, baseReference: spec.baseUuid === null ? null : 'sent@base', kind: 'container', uuid: spec.uuid, name: spec.name, consistency: 'crash',
    message: null, createdUs: 1, baseUuid: spec.baseUuid, resume: null,
    nodes: spec.nodes.map(({ path, kind, content, delta }) => ({
      path, kind, mode: kind === 'directory' ? 0o755 : 0o600, uid: 0, gid: 0, mtimeUs: 1, sizeBytes: kind === 'directory' ? 0 : content.sizeBytes, linkTarget: null, delta,
    })),
  };
  const records: Buffer[] = [];
  let { check }: { check: Uint8Array } = encodeHeader(header);
  const add = (head: RecordHead, data: Buffer | null): void => {
    const record = encodeRecord(check, head, data);
    ({ check } = record);
    records.push(Buffer.concat(record.pieces));
  };
  spec.nodes.forEach((node, index) => { for (const { head, data } of recordsOf(node, index)) add(head, data); });
  add({ type: 'end', node: 0, offsetBytes: records.length, lengthBytes: 0 }, null);
  return { json: JSON.stringify({ ...header, resume }), records };
}

function* recordsOf({ kind, content, delta }: StreamSpecNode, node: number): Generator<{ readonly head: RecordHead; readonly data: Buffer | null }> {
  if (kind === 'directory') return;
  const bytes = writtenBytes(content);
  if (delta) {
    for (const { at, length, seed } of content.writes) {
      const isZero = seed === 0;
      yield { head: { type: isZero ? 'zero' : 'data', node, offsetBytes: at, lengthBytes: length }, data: isZero ? null : bytes.subarray(at, at + length) };
    }
    return;
  }
  const isZero = (at: number): boolean => bytes.subarray(at, at + BLOCK_BYTES).every((byte) => byte === 0);
  for (let at = 0; at < bytes.length; ) {
    let end = at;
    while (end < bytes.length && end - at < RECORD_BLOCKS * BLOCK_BYTES && !isZero(end)) end = Math.min(bytes.length, end + BLOCK_BYTES);
    if (end > at) yield { head: { type: 'data', node, offsetBytes: at, lengthBytes: end - at }, data: bytes.subarray(at, end) };
    at = end > at ? end : at + BLOCK_BYTES;
  }
}
