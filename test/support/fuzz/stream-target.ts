/**
 * The receive, against streams that were damaged, cut, put together anew, or made by somebody who knows the format; through the reader of the command
 * line and past it.
 *
 * What must hold of each: it ends, in bounded time, having read no more than a header or a record further than what is wrong; it is refused with an
 * error of its kind that says something, or what is there afterwards is, byte for byte, what the stream says. What is refused leaves nothing that
 * anybody can see: only what a resume may go on with, which a resume then does, if the header was sound, and which a drop takes away to the last file.
 */
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';

import { checkStore } from '../../../blockstore/check.js';
import { OffshootError, toOffshootError, type ErrorKind } from '../../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../../blockstore/meta/rows.js';
import { Store } from '../../../blockstore/store.js';
import { RECORD_BYTES_MAX, STREAM_HEADER_BYTES_MAX, StreamReader, decodeToken } from '../../../blockstore/stream-format.js';
import { SNAPSHOTS_NAME } from '../../../blockstore/trees.js';
import { removeNode } from '../../../daemon/server/remove-node.js';
import { controlParts, type ControlParts } from '../control-parts.js';
import { patternBytes } from '../model/pattern.js';
import { withoutReserve } from '../without-reserve.js';
import { fuzzCases, makeFuzzDirectory, type FuzzOptions, type FuzzTarget } from './fuzz-target.js';
import { changed, damagedBytes, encode, soundStream, streamCases, type RawStream, type StreamCase } from './stream-cases.js';

const REFUSALS: readonly ErrorKind[] = [
  'foreign-format', 'invalid-argument', 'invalid-name', 'already-exists', 'not-found', 'not-permitted', 'busy', 'too-large', 'name-too-long', 'not-a-directory', 'is-a-directory',
];
const UUID = '00000000-0000-8000-8000-000000000001';
const BASE_UUID = '00000000-0000-8000-8000-0000000000ba';
const CASE_MS_MAX = 30_000;
const GROWTH_BYTES_MAX = 768 * 1024 * 1024;
const COMPARED_BYTES_MAX = 1024 * 1024;
const ZERO = 2;

/** A store that streams are received into, and how it is when nothing has come. */
export class StreamBed {
  readonly store: Store;
  readonly #top: string;
  readonly #storeDir: string;
  readonly #parts: ControlParts;
  #files = 0;

  constructor() {
    this.#top = makeFuzzDirectory();
    this.#storeDir = join(this.#top, 'store');
    const runtimeDir = join(this.#top, 'run');
    for (const directory of [this.#storeDir, runtimeDir]) mkdirSync(directory, { mode: 0o700 });
    this.store = withoutReserve(() => Store.open({
      storeDir: this.#storeDir, runtimeDir, threads: 1, mapChunks: 1, announcer: { opened: () => undefined, closed: () => undefined },
      onFault: (nodeId, reason) => { throw new Error(`disk ${nodeId} was faulted: ${reason}`); }, onFull: () => undefined,
    }));
    this.#parts = controlParts(this.store);
  }

  async close(): Promise<void> {
    await this.#parts.receives.close();
    await this.store.close();
    rmSync(this.#top, { recursive: true, force: true });
  }

  /** Runs a case; `refused` or `received`, and throws when a promise was broken. */
  async run(each: StreamCase): Promise<'refused' | 'received'> {
    if (each.isDelta) await this.#bringBase(each);
    this.#files = this.#countFiles();
    const sound = soundStream(each, UUID, BASE_UUID);
    const raw = changed(sound, each);
    const other = encode(soundStream({ ...each, seed: each.seed + 7 }, UUID, BASE_UUID));
    const encoded = encode(raw);
    const bytes = damagedBytes(encoded, each.byteChanges, other);
    const target = each.target === '' ? each.isDelta ? 'base' : 'r' : each.target;
    let outcome: 'refused' | 'received';
    try {
      await (each.isUnread ? this.#giveUnread(raw, bytes.subarray(encoded.start.length), target, each) : this.#giveRead(bytes, target, each));
      if (!each.isUnread && !bytes.equals(Buffer.concat([encoded.start, ...encoded.records]))) throw new Error('a stream was received that is not what was sent');
      if (!each.isUnread && each.junk !== null) throw new Error('a stream was received that goes on behind its end');
      this.#compare(raw, target, each);
      outcome = 'received';
    } catch (thrown) {
      if (!(thrown instanceof OffshootError) || !REFUSALS.includes(thrown.kind) || thrown.message.length < 10) throw thrown;
      outcome = 'refused';
      if (await this.#goOn(sound, raw, target, each)) {
        await this.#clear(false);
        return outcome;
      }
    }
    await this.#clear(outcome === 'refused');
    return outcome;
  }

  /** As `offshoot receive` does. */
  async #giveRead(bytes: Buffer, target: string, { pieceBytes, batchRecords, junk }: StreamCase): Promise<void> {
    let pulledBytes = 0;
    const source = async function* (): AsyncGenerator<Uint8Array> {
      for (let at = 0; at < bytes.length; at += pieceBytes) {
        await Promise.resolve();
        yield bytes.subarray(at, at + pieceBytes);
      }
      if (junk === null) return;
      for (const piece = Buffer.alloc(64 * 1024, junk); ; pulledBytes += piece.length) {
        if (pulledBytes > STREAM_HEADER_BYTES_MAX + RECORD_BYTES_MAX + piece.length) throw new Error(`${pulledBytes} bytes were read behind the end of a stream`);
        yield piece;
      }
    };
    const reader = new StreamReader(source());
    const { text } = await reader.readHeader();
    const { receives } = this.#parts;
    const { receiveId, records } = await receives.begin(target, text);
    let [first, batch, isEnd] = [records, [] as Buffer[], false];
    try {
      while (!isEnd) {
        const record = await reader.readRecord();
        if (record === null) throw new OffshootError('foreign-format', 'the stream broke off before its end');
        batch.push(record.bytes);
        isEnd = record.head.type === 'end';
        if (!isEnd && batch.length < batchRecords) continue;
        ({ records: first } = await receives.add(receiveId, first, Buffer.concat(batch)));
        batch = [];
      }
      await reader.assertEnd();
    } catch (thrown) {
      await receives.pause(receiveId);
      throw thrown;
    }
    await receives.finish(receiveId);
  }

  /** Header and records handed over as they are, in pieces that need not be whole. */
  async #giveUnread(raw: RawStream, bytes: Buffer, target: string, { pieceBytes }: StreamCase): Promise<void> {
    const { receives } = this.#parts;
    const { receiveId, records } = await receives.begin(target, raw.header);
    let first = records;
    const length = pieceBytes < 1000 ? Math.max(1, bytes.length) : pieceBytes;
    for (let at = 0; at < bytes.length; at += length) ({ records: first } = await receives.add(receiveId, first, bytes.subarray(at, at + length)));
    await receives.finish(receiveId);
  }

  /** What is there is what the records say, of nodes that are not too large to look at. */
  #compare({ header, records }: RawStream, target: string, { isDelta }: StreamCase): void {
    const { name, nodes } = JSON.parse(header) as { name: string; nodes: { path: string; kind: string; sizeBytes: number; delta: boolean }[] };
    const { meta } = this.store;
    for (const [index, { path, kind, sizeBytes, delta }] of nodes.entries()) {
      const live = meta.nodes.byPath(`${target}/${path}`);
      const frozen = meta.nodes.byPath(`${target}/${SNAPSHOTS_NAME}/${name}/${path}`);
      if (live === undefined || frozen === undefined) throw new Error(`${path} was received and is not there`);
      if ((kind !== 'disk' && kind !== 'file') || sizeBytes > COMPARED_BYTES_MAX) continue;
      const expected = Buffer.alloc(sizeBytes);
      if (delta && isDelta) {
        const base = meta.nodes.byPath(`base/${SNAPSHOTS_NAME}/base/${path}`);
        if (base !== undefined) this.#content(base).copy(expected);
      }
      for (const { type, node, offsetBytes, lengthBytes, seed } of records) {
        if (node !== index || offsetBytes + lengthBytes > sizeBytes || type > ZERO) continue;
        if (type === ZERO) expected.fill(0, offsetBytes, offsetBytes + lengthBytes);
        else patternBytes(seed, 0, lengthBytes).copy(expected, offsetBytes);
      }
      for (const node of [live, frozen]) if (!this.#content(node).equals(expected)) throw new Error(`${path} was received and is not what was sent`);
    }
  }

  #content({ id, sizeBytes }: NodeRow): Buffer {
    this.store.disks.acquire(id);
    try {
      const content = Buffer.alloc(sizeBytes, 0xee);
      if (this.store.data.read(id, 0, content) !== sizeBytes) throw new Error('a disk gives fewer bytes than it has');
      return content;
    } finally {
      this.store.disks.release(id);
    }
  }

  /** What is kept of a sound stream is gone on with by who has all of it; false when nothing was, or it is not sound. */
  async #goOn(sound: RawStream, raw: RawStream, target: string, each: StreamCase): Promise<boolean> {
    const { receives } = this.#parts;
    const kept = (await receives.list()).find(({ uuid }) => uuid === UUID);
    if (kept === undefined || raw.header !== sound.header || each.records.length > 0) return false;
    // As the server that follows finds it.
    await receives.pause(kept.receiveId);
    const { records, check } = decodeToken((await receives.info(kept.receiveId)).token);
    const encoded = encode(sound);
    if (records > encoded.records.length) throw new Error(`${records} records are kept of a stream that has ${encoded.records.length}`);
    await receives.begin(target, JSON.stringify({ ...JSON.parse(sound.header) as object, resume: { records, check } }));
    if (records < encoded.records.length) await receives.add(kept.receiveId, records, Buffer.concat(encoded.records.slice(records)));
    await receives.finish(kept.receiveId);
    this.#compare(sound, target, each);
    return true;
  }

  /** A container that differences go on from: the same nodes, other content. */
  async #bringBase(each: StreamCase): Promise<void> {
    const { receives } = this.#parts;
    const stream = soundStream({ ...each, seed: each.seed + 3, isDelta: false }, BASE_UUID, BASE_UUID);
    const header = JSON.stringify({ ...JSON.parse(stream.header) as object, name: 'base' });
    const { receiveId } = await receives.begin('base', header);
    await receives.add(receiveId, 0, Buffer.concat(encode({ ...stream, header }).records));
    await receives.finish(receiveId);
  }

  /** Takes everything away; nothing may be left of it. `isRefused`: nobody may have seen anything of it. */
  async #clear(isRefused: boolean): Promise<void> {
    const { receives, fileSystem, snapshots, references } = this.#parts;
    if (isRefused) {
      const names = this.store.meta.nodes.children(ROOT_ID, 0, 100).map(({ name }) => name);
      if (names.some((name) => name !== 'base')) throw new Error(`a refused stream has made ${names.join(', ')}`);
      const known = this.store.meta.snapshots.all().filter(({ uuid }) => uuid !== BASE_UUID);
      if (known.length > 0) throw new Error(`a refused stream has made the snapshot ${known[0]?.name ?? ''}`);
    }
    for (const { receiveId } of await receives.list()) await receives.abort(receiveId);
    if (isRefused && this.#countFiles() !== this.#files) throw new Error(`a refused stream has left ${this.#countFiles() - this.#files} files`);
    for (const row of this.store.meta.snapshots.all()) await snapshots.remove(references.nameOf(row), { keepData: true });
    for (const row of this.store.meta.nodes.children(ROOT_ID, 0, 100)) {
      await removeNode({ store: this.store, fileSystem }, row, row.name, { keepData: true, recursive: true });
    }
    const { verdict, findings } = checkStore(this.store, { database: false });
    if (verdict !== 'clean') throw new Error(`the store is not clean: ${findings.map(({ message }) => message).join('; ')}`);
    if (this.#countFiles() !== 0) throw new Error(`${this.#countFiles()} files are left when everything was removed`);
  }

  #countFiles(): number {
    const count = (directory: string): number => readdirSync(directory, { withFileTypes: true, recursive: true }).filter((entry) => entry.isFile()).length;
    const receive = readdirSync(this.#storeDir).includes('receive') ? count(join(this.#storeDir, 'receive')) : 0;
    return count(join(this.#storeDir, 'layers')) + count(join(this.#storeDir, 'import')) + receive;
  }
}

export const streamTarget: FuzzTarget = {
  name: 'stream',
  summary: 'streams for the receive that are not what a sender sends',
  async run(options: FuzzOptions) {
    const counts = { streams: 0, refused: 0, received: 0 };
    let bed = new StreamBed();
    const beganBytes = process.memoryUsage().rss;
    try {
      await fuzzCases(options, streamCases, async (each) => {
        counts.streams += 1;
        let timer: NodeJS.Timeout | undefined;
        const late = new Promise<never>((_, reject) => { timer = setTimeout(() => { reject(new Error(`it did not end within ${CASE_MS_MAX / 1000} s`)); }, CASE_MS_MAX); });
        try {
          counts[await Promise.race([bed.run(each), late])] += 1;
        } catch (thrown) {
          // What is left of it must not disturb the search for a smaller one.
          await bed.close().catch(() => undefined);
          bed = new StreamBed();
          throw thrown;
        } finally {
          clearTimeout(timer);
        }
        const grownBytes = process.memoryUsage().rss - beganBytes;
        if (grownBytes > GROWTH_BYTES_MAX) throw new Error(`the process has grown by ${grownBytes} bytes`);
      });
    } finally {
      await bed.close().catch((thrown: unknown) => { throw toOffshootError(thrown); });
    }
    return counts;
  },
};
