/**
 * The open handle table: which file handles the kernel holds, kept over the death of a server.
 *
 * Main thread only. A handle is a number that is never used again in the life of a mount, so that one from before a crash
 * still means what it meant. The table is a log in the runtime directory on tmpfs, which goes when the mount goes; a record
 * is in it, by one plain write, before `add` returns and so before the kernel learns the handle. Nothing is synced: a
 * power loss takes the mount with it.
 *
 * Layout of handles.log: records of 32 bytes, little-endian, the first being the header.
 *
 *     header   magic "OFFHANDL" @0, version u32 @8, record bytes u32 @12, next handle u64 @16, CRC-32 of bytes 0-23 u32 @24
 *     record   kind u8 @0 (1 open, 2 release), mode u8 @1 (0 direct, 1 cached), request u16 @2 (bits 32-47 of it), flags u32 @4,
 *              handle u64 @8, node id u64 @16, CRC-32 of bytes 0-23 u32 @24, request u32 @28 (bits 0-31; 0 with 0 @2: none)
 *
 * The request is the one that was answered with the handle. If its server died before it answered, it comes again, and must not be
 * given a second handle: nobody would ever release the first.
 *
 * Compaction writes the header and the open records to handles.log.new and renames it over the log; a crash before the
 * rename leaves the old log whole, and a leftover .new is overwritten by the next. A last record that is cut short or does
 * not match its checksum was never told to the kernel and is dropped; one in the middle is damage and is refused.
 */
import { closeSync, openSync, readFileSync, renameSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import type { NodeId, OpenMode } from '../../filesystem/types.js';
import { setInt64, uint64At, viewOf } from './codec.js';

export interface HandleEntry {
  readonly handle: number;
  readonly nodeId: NodeId;
  /** Linux open flags as the kernel gave them. */
  readonly flags: number;
  readonly mode: OpenMode;
  /** Of the request that opened it; 0: not known. */
  readonly requestKey: number;
}

const FILE_NAME = 'handles.log';
const MAGIC = Buffer.from('OFFHANDL', 'latin1');
const VERSION = 1;
const RECORD = { bytes: 32, kind: 0, mode: 1, flags: 4, handle: 8, nodeId: 16, checksum: 24, requestHigh: 2, requestLow: 28 } as const;
const TWO_TO_32 = 2 ** 32;
const HEADER = { magic: 0, version: 8, recordBytes: 12, nextHandle: 16 } as const;
const KIND = { open: 1, release: 2 } as const;
const MODES: readonly OpenMode[] = ['direct', 'cached'];
/** The log is compacted while in use once it has this many records and four times as many as handles are open. */
const COMPACTION_RECORDS_MIN = 4096;

export class HandleTable {
  readonly #path: string;
  readonly #entries: Map<number, HandleEntry>;
  readonly #openCounts = new Map<NodeId, number>();
  #nextHandle: number;
  #descriptor: number | null = null;
  #logRecords = 0;

  private constructor(path: string, entries: Map<number, HandleEntry>, nextHandle: number) {
    this.#path = path;
    this.#entries = entries;
    this.#nextHandle = nextHandle;
    for (const { nodeId } of entries.values()) this.#count(nodeId, 1);
  }

  /** Reads the table of `runtimeDir`, or begins one, and compacts it. */
  static load(runtimeDir: string): HandleTable {
    const path = join(runtimeDir, FILE_NAME);
    const { entries, nextHandle } = replay(path);
    const table = new HandleTable(path, entries, nextHandle);
    table.#compact();
    return table;
  }

  /** A new handle, recorded before this returns. */
  add(nodeId: NodeId, flags: number, mode: OpenMode, requestKey = 0): number {
    if (this.#logRecords > COMPACTION_RECORDS_MIN && this.#logRecords > 4 * this.#entries.size) this.#compact();
    const entry: HandleEntry = { handle: this.#nextHandle, nodeId, flags, mode, requestKey };
    this.#append(recordOf(KIND.open, entry));
    this.#nextHandle++;
    this.#entries.set(entry.handle, entry);
    this.#count(nodeId, 1);
    return entry.handle;
  }

  /** What the handle was, or undefined if it is not open: a RELEASE may be seen twice. */
  remove(handle: number): HandleEntry | undefined {
    const entry = this.#entries.get(handle);
    if (entry === undefined) return undefined;
    // Closed for this server even if the record fails: the kernel does not ask again.
    this.#entries.delete(handle);
    this.#count(entry.nodeId, -1);
    this.#append(recordOf(KIND.release, entry));
    return entry;
  }

  /** The open handle of the node that this request was given by a server that died before it could say so. */
  givenTo(requestKey: number, nodeId: NodeId): HandleEntry | undefined {
    if (requestKey === 0) return undefined;
    for (const entry of this.#entries.values()) if (entry.requestKey === requestKey && entry.nodeId === nodeId) return entry;
    return undefined;
  }

  get(handle: number): HandleEntry | undefined {
    return this.#entries.get(handle);
  }

  openCountOf(nodeId: NodeId): number {
    return this.#openCounts.get(nodeId) ?? 0;
  }

  /** All that is open, in the order of opening. */
  entries(): readonly HandleEntry[] {
    return [...this.#entries.values()];
  }

  close(): void {
    if (this.#descriptor !== null) closeSync(this.#descriptor);
    this.#descriptor = null;
  }

  #count(nodeId: NodeId, change: 1 | -1): void {
    const count = this.openCountOf(nodeId) + change;
    if (count === 0) this.#openCounts.delete(nodeId);
    else this.#openCounts.set(nodeId, count);
  }

  /** Writes behind the last whole record, over what a write that failed may have left there. */
  #append(record: Uint8Array): void {
    if (this.#descriptor === null) throw new Error('the handle table is closed');
    try {
      const writtenBytes = writeSync(this.#descriptor, record, 0, record.byteLength, this.#logRecords * RECORD.bytes);
      if (writtenBytes !== record.byteLength) {
        throw new OffshootError('no-space', `only ${writtenBytes} of ${record.byteLength} bytes fit`);
      }
    } catch (thrown) {
      throw this.#failure('written to', thrown);
    }
    this.#logRecords++;
  }

  #compact(): void {
    try {
      const records = [headerOf(this.#nextHandle), ...this.entries().map((entry) => recordOf(KIND.open, entry))];
      writeFileSync(`${this.#path}.new`, Buffer.concat(records), { mode: 0o600 });
      const descriptor = openSync(`${this.#path}.new`, 'r+');
      renameSync(`${this.#path}.new`, this.#path);
      this.close();
      this.#descriptor = descriptor;
      this.#logRecords = records.length;
    } catch (thrown) {
      throw this.#failure('rewritten at', thrown);
    }
  }

  #failure(verb: string, thrown: unknown): OffshootError {
    const cause = toOffshootError(thrown);
    return new OffshootError(cause.kind, `The open handle table could not be ${verb} ${this.#path}: ${cause.message}. Make room in the runtime directory.`, { path: this.#path }, thrown);
  }
}

function replay(path: string): { readonly entries: Map<number, HandleEntry>; readonly nextHandle: number } {
  const entries = new Map<number, HandleEntry>();
  const log = readLog(path);
  if (log === null) return { entries, nextHandle: 1 };
  const header = log.subarray(0, RECORD.bytes);
  const headerView = viewOf(header);
  if (
    !isIntact(header) || !header.subarray(HEADER.magic, MAGIC.byteLength).equals(MAGIC) ||
    headerView.getUint32(HEADER.version, true) !== VERSION || headerView.getUint32(HEADER.recordBytes, true) !== RECORD.bytes
  ) {
    throw damaged(path, 0);
  }
  let nextHandle = uint64At(headerView, HEADER.nextHandle);
  const records = Math.floor(log.byteLength / RECORD.bytes);
  for (let index = 1; index < records; index++) {
    const record = log.subarray(index * RECORD.bytes, (index + 1) * RECORD.bytes);
    const view = viewOf(record);
    const mode = MODES[record[RECORD.mode] ?? MODES.length];
    const kind = record[RECORD.kind];
    if (!isIntact(record) || mode === undefined || (kind !== KIND.open && kind !== KIND.release)) {
      if (index === records - 1) break;
      throw damaged(path, index);
    }
    const handle = uint64At(view, RECORD.handle);
    if (kind === KIND.release) entries.delete(handle);
    else {
      const requestKey = view.getUint16(RECORD.requestHigh, true) * TWO_TO_32 + view.getUint32(RECORD.requestLow, true);
      entries.set(handle, { handle, nodeId: uint64At(view, RECORD.nodeId), flags: view.getUint32(RECORD.flags, true), mode, requestKey });
    }
    nextHandle = Math.max(nextHandle, handle + 1);
  }
  return { entries, nextHandle };
}

function readLog(path: string): Buffer | null {
  try {
    return readFileSync(path);
  } catch (thrown) {
    const cause = toOffshootError(thrown);
    if (cause.kind === 'not-found') return null;
    throw new OffshootError(cause.kind, `The open handle table could not be read from ${path}: ${cause.message}.`, { path }, thrown);
  }
}

function damaged(path: string, record: number): OffshootError {
  return new OffshootError(
    'store-damaged',
    `The open handle table ${path} is damaged at record ${record}. Close what is open under the mount, unmount, and start the daemon again; the store itself is not concerned.`,
    { path, record },
  );
}

function headerOf(nextHandle: number): Uint8Array {
  const header = new Uint8Array(RECORD.bytes);
  const view = viewOf(header);
  header.set(MAGIC, HEADER.magic);
  view.setUint32(HEADER.version, VERSION, true);
  view.setUint32(HEADER.recordBytes, RECORD.bytes, true);
  setInt64(view, HEADER.nextHandle, nextHandle);
  return sealed(header);
}

function recordOf(kind: number, entry: HandleEntry): Uint8Array {
  const record = new Uint8Array(RECORD.bytes);
  const view = viewOf(record);
  record[RECORD.kind] = kind;
  record[RECORD.mode] = MODES.indexOf(entry.mode);
  view.setUint32(RECORD.flags, entry.flags, true);
  setInt64(view, RECORD.handle, entry.handle);
  setInt64(view, RECORD.nodeId, entry.nodeId);
  view.setUint16(RECORD.requestHigh, Math.floor(entry.requestKey / TWO_TO_32), true);
  view.setUint32(RECORD.requestLow, entry.requestKey % TWO_TO_32, true);
  return sealed(record);
}

function sealed(record: Uint8Array): Uint8Array {
  viewOf(record).setUint32(RECORD.checksum, crc32(record.subarray(0, RECORD.checksum)), true);
  return record;
}

function isIntact(record: Uint8Array): boolean {
  return record.byteLength === RECORD.bytes && viewOf(record).getUint32(RECORD.checksum, true) === crc32(record.subarray(0, RECORD.checksum));
}
