/**
 * The new file of a merge: blocks of two sealed layers in one, holes kept, shared with the old files where the file system can.
 *
 * Asynchronous, in pieces, through the thread pool: the main thread only says what comes next. Both old files stay open all the while, so that it does not
 * matter when they lose their names. `pace` is waited for after each piece: it holds the rate, makes way for guests, and ends the copy by throwing.
 * copy_file_range shares extents on XFS and btrfs; where it is refused, the bytes are read and written.
 */
import fs from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';

import koffi from 'koffi';

import { OffshootError, toOffshootError } from './errors.js';
import { SEEK_DATA, SEEK_HOLE, addressOf, realDoor } from './hot/door.js';
import type { LayerFiles } from './layer-files.js';
import { mergeCopies, type MergePair } from './merge.js';
import type { MetaStore } from './meta/meta-store.js';

export interface MergeCopyOptions {
  readonly pace: (bytes: number) => Promise<void>;
  /** False: bytes are always read and written. */
  readonly share?: boolean;
}

const PIECE_BYTES = 1024 * 1024;

interface CopyRange {
  async(fdIn: number, offsetIn: number, fdOut: number, offsetOut: number, lengthBytes: number, flags: number, done: (error: unknown, result: number) => void): void;
}
const sysCopyFileRange = koffi.load('libc.so.6').func('int64_t copy_file_range(int in, uintptr_t inOffset, int out, uintptr_t outOffset, size_t length, unsigned int flags)') as unknown as CopyRange;

/** In the thread pool. Bytes copied, or below zero; what the error is, another thread's errno would have to say. */
async function copyFileRange(fdIn: number, offsetIn: number, fdOut: number, offsetOut: number, lengthBytes: number): Promise<number> {
  return await new Promise<number>((resolve, reject) => {
    sysCopyFileRange.async(fdIn, offsetIn, fdOut, offsetOut, lengthBytes, 0, (error, result) => {
      if (error instanceof Error) reject(error);
      else resolve(result);
    });
  });
}

/** Makes `target` hold what both layers own; durable, but for its name, when it resolves. Bytes copied. A target that is not finished is removed. */
export async function copyMerged(parts: { readonly meta: MetaStore; readonly files: LayerFiles }, pair: MergePair, target: string, options: MergeCopyOptions): Promise<number> {
  const handles: FileHandle[] = [];
  const openOne = async (file: string, flags: number): Promise<FileHandle> => {
    const handle = await open(file, flags | fs.constants.O_NOFOLLOW, 0o600);
    handles.push(handle);
    return handle;
  };
  let isDone = false;
  try {
    const out = await openOne(target, fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_EXCL);
    await out.truncate(pair.upper.sizeBytes);
    const copies = { upper: new SparseCopy(await openOne(parts.files.storePath(pair.upper.id), fs.constants.O_RDONLY), out, options),
      lower: new SparseCopy(await openOne(parts.files.storePath(pair.lower.id), fs.constants.O_RDONLY), out, options) };
    for (const step of mergeCopies(parts.meta, pair)) {
      for (const { from, offsetBytes, lengthBytes } of step) await copies[from].copy(offsetBytes, lengthBytes);
      await options.pace(0);
    }
    await out.sync();
    isDone = true;
    return copies.upper.copiedBytes + copies.lower.copiedBytes;
  } catch (thrown) {
    const error = toOffshootError(thrown);
    const isGone = error.kind === 'not-found' && parts.meta.layers.byId(pair.upper.id) === undefined;
    throw isGone ? new OffshootError('busy', 'the layers are gone: what stood on them was removed', { layerId: pair.upper.id }, thrown) : error;
  } finally {
    for (const handle of handles) await handle.close();
    if (!isDone) fs.rmSync(target, { force: true });
  }
}

/** Copies extents of one file to the same place of another; what is a hole stays one. */
class SparseCopy {
  copiedBytes = 0;
  readonly #source: FileHandle;
  readonly #target: FileHandle;
  readonly #pace: (bytes: number) => Promise<void>;
  readonly #buffer = Buffer.allocUnsafeSlow(PIECE_BYTES);
  readonly #offsets = new BigInt64Array(2);
  #share: boolean;
  /** The data that was found last: a file system that looks at every page for its next hole is asked once for each run of data. */
  #dataFrom = 0;
  #dataUntil = 0;

  constructor(source: FileHandle, target: FileHandle, options: MergeCopyOptions) {
    this.#source = source;
    this.#target = target;
    this.#pace = options.pace;
    this.#share = options.share ?? true;
  }

  async copy(offsetBytes: number, lengthBytes: number): Promise<void> {
    const end = offsetBytes + lengthBytes;
    for (let at = offsetBytes; at < end; ) {
      if (at < this.#dataFrom || at >= this.#dataUntil) this.#look(at);
      at = Math.max(at, this.#dataFrom);
      const to = Math.min(end, this.#dataUntil, at + PIECE_BYTES);
      if (to <= at) return;
      await this.#piece(at, to - at);
      this.copiedBytes += to - at;
      await this.#pace(to - at);
      at = to;
    }
  }

  /** Where the next data is. A file system that cannot tell has no holes. */
  #look(at: number): void {
    const data = realDoor.seek('merge-seek-data', this.#source.fd, at, SEEK_DATA);
    const nothingMore = data < 0 && fs.fstatSync(this.#source.fd).size <= at;
    this.#dataFrom = data >= 0 ? data : isNoData(data) || nothingMore ? Number.MAX_SAFE_INTEGER : at;
    const hole = this.#dataFrom === Number.MAX_SAFE_INTEGER ? this.#dataFrom : realDoor.seek('merge-seek-hole', this.#source.fd, this.#dataFrom, SEEK_HOLE);
    this.#dataUntil = hole < 0 ? Number.MAX_SAFE_INTEGER : hole;
  }

  async #piece(offsetBytes: number, lengthBytes: number): Promise<void> {
    let done = this.#share ? await this.#shareRange(offsetBytes, lengthBytes) : 0;
    while (done < lengthBytes) {
      const { bytesRead } = await this.#source.read(this.#buffer, 0, lengthBytes - done, offsetBytes + done);
      // Behind the end of the file there are zeros, which the target has already.
      if (bytesRead === 0) return;
      for (let put = 0; put < bytesRead; ) {
        const { bytesWritten } = await this.#target.write(this.#buffer, put, bytesRead - put, offsetBytes + done + put);
        put += bytesWritten;
      }
      done += bytesRead;
    }
  }

  /** How much was copied. What it does not do, for whatever reason, is done by reading and writing, which says what is wrong. */
  async #shareRange(offsetBytes: number, lengthBytes: number): Promise<number> {
    this.#offsets.fill(BigInt(offsetBytes));
    const address = addressOf(new Uint8Array(this.#offsets.buffer));
    const copied = await copyFileRange(this.#source.fd, address, this.#target.fd, address + 8, lengthBytes);
    if (copied <= 0) this.#share = false;
    return Math.max(0, copied);
  }
}

const ENXIO = 6;

function isNoData(result: number): boolean {
  return result === -ENXIO;
}
