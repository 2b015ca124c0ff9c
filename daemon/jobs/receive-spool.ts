/**
 * What a receive under way has so far, in a directory of its own below `STORE/receive`: content that no name and no row leads to.
 *
 * | file | holds |
 * |---|---|
 * | `header` | the stream's header, as it was sent |
 * | `N.data` | content of node N of the header: sparse, block B at B × 4096, as in a layer's file |
 * | `extents` | 24 bytes for each record of a node that only differs from its base: node, first block, number of blocks, as float64 |
 * | `state` | how far it has come: what this says is durable, data behind it means nothing |
 * | `finish` | while it becomes visible: which layer each `N.data` is renamed to (`receive-finish.ts`) |
 *
 * Records come in batches. A batch is compared with its check values, judged, and written; from time to time, and whenever the receive
 * is left alone, all of it is synced and then noted in `state`. A server that dies leaves the last state; what came behind it is sent again.
 * The same record written twice changes nothing. Main thread; files are written in the thread pool.
 */
import { existsSync } from 'node:fs';
import fs from 'node:fs/promises';
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import { syncDirectory } from '../../blockstore/layer-files.js';
import type { BlockRun } from '../../blockstore/meta/rows.js';
import { damaged, decodeRecords, headerCheck, type DecodedRecord, type StreamHeader, type StreamNode } from '../../blockstore/stream-format.js';
import { BLOCK_BYTES, blocksFor } from '../../blockstore/units.js';

export interface SpoolState {
  /** Records that are there, and the check value of the last. */
  readonly records: number;
  readonly check: string;
  /** Nothing before this byte of this node is still to come. */
  readonly node: number;
  readonly offsetBytes: number;
  readonly extentsBytes: number;
  /** Content that came, for people. */
  readonly dataBytes: number;
  /** The end was there. */
  readonly ended: boolean;
}

const EXTENT_BYTES = 24;
/** What may be lost when a server dies, and must be sent again. */
const SYNC_BYTES = 32 * 1024 * 1024;

export class Spool {
  readonly directory: string;
  readonly header: StreamHeader;
  private state: SpoolState;
  private durable: SpoolState;
  /** Nodes whose file was written to since the last sync. */
  private readonly dirty = new Set<number>();
  private open: { readonly node: number; readonly handle: fs.FileHandle } | null = null;
  private extents: fs.FileHandle | null = null;
  private unsyncedBytes = 0;
  /** One call at a time. */
  private tail: Promise<unknown> = Promise.resolve();

  private constructor(directory: string, header: StreamHeader, state: SpoolState) {
    this.directory = directory;
    this.header = header;
    this.state = state;
    this.durable = state;
  }

  /** A new one; durable, with nothing in it. `json` is the header as it came. */
  static async create(directory: string, header: StreamHeader, json: string): Promise<Spool> {
    await fs.mkdir(path.dirname(directory), { recursive: true, mode: 0o700 });
    await fs.rm(directory, { recursive: true, force: true });
    await fs.mkdir(directory, { mode: 0o700 });
    await writeDurably(path.join(directory, 'header'), json);
    const spool = new Spool(directory, header, {
      records: 0, check: headerCheck(Buffer.from(json)).toString('hex'), node: 0, offsetBytes: 0, extentsBytes: 0, dataBytes: 0, ended: false,
    });
    await spool.writeState();
    // The first receive of a store makes the directory above, too.
    for (const above of [path.dirname(directory), path.dirname(path.dirname(directory))]) syncDirectory(above);
    return spool;
  }

  /** False when a server died before it was whole. */
  static isThere(directory: string): boolean {
    return existsSync(path.join(directory, 'header')) && existsSync(path.join(directory, 'state'));
  }

  /** The one that a server before left; null when it has no state. */
  static async load(directory: string, parse: (json: string) => Promise<StreamHeader>): Promise<Spool | null> {
    try {
      const header = await parse(await fs.readFile(path.join(directory, 'header'), 'utf8'));
      const state = JSON.parse(await fs.readFile(path.join(directory, 'state'), 'utf8')) as SpoolState;
      return new Spool(directory, header, state);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
      throw error;
    }
  }

  position(): SpoolState { return this.state; }
  durablePosition(): SpoolState { return this.durable; }

  dataFile(node: number): string { return path.join(this.directory, `${node}.data`); }

  /** Takes a batch of whole records, the first of which has number `first`. What comes before a wrong one is kept. */
  async add(bytes: Buffer, first: number): Promise<void> {
    await this.alone(async () => {
      if (first !== this.state.records) {
        throw new OffshootError('busy', `record ${first} came where record ${this.state.records} was expected: somebody else sends to this receive as well`, { records: this.state.records });
      }
      const runs: Buffer[] = [];
      try {
        for (const record of decodeRecords(bytes, Buffer.from(this.state.check, 'hex'), first)) await this.apply(record, runs);
      } finally {
        await this.appendExtents(runs);
      }
      if (this.unsyncedBytes >= SYNC_BYTES || this.state.ended) await this.sync();
    });
  }

  /** Makes all that came durable. */
  async checkpoint(): Promise<void> {
    await this.alone(async () => { await this.sync(); });
  }

  async close(): Promise<void> {
    await this.alone(async () => {
      await this.closeFiles();
    });
  }

  async remove(): Promise<void> {
    await this.close();
    await fs.rm(this.directory, { recursive: true, force: true });
  }

  /** What the content takes on the store's file system. */
  async allocatedBytes(): Promise<number> {
    let bytes = 0;
    for (const name of await fs.readdir(this.directory)) if (name.endsWith('.data')) bytes += (await fs.stat(path.join(this.directory, name))).blocks * 512;
    return bytes;
  }

  /** Blocks that came for nodes that only differ from their base. */
  async runsByNode(): Promise<Map<number, BlockRun[]>> {
    const runs = new Map<number, BlockRun[]>();
    let bytes: Buffer;
    try {
      bytes = await fs.readFile(path.join(this.directory, 'extents'));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      return runs;
    }
    for (let at = 0; at + EXTENT_BYTES <= this.durable.extentsBytes; at += EXTENT_BYTES) {
      const node = bytes.readDoubleLE(at);
      const list = runs.get(node) ?? [];
      list.push({ block: bytes.readDoubleLE(at + 8), count: bytes.readDoubleLE(at + 16) });
      runs.set(node, list);
    }
    return runs;
  }

  private async alone<T>(body: () => Promise<T>): Promise<T> {
    const run = this.tail.then(body);
    this.tail = run.catch(() => undefined);
    return await run;
  }

  private async apply({ head, data, check }: DecodedRecord, runs: Buffer[]): Promise<void> {
    const { state } = this;
    const records = state.records + 1;
    // One that had ended and could not be finished is gone on with like any other: then its end comes once more.
    if (state.ended && head.type !== 'end') throw damaged('something follows its end');
    if (head.type === 'end') {
      if (head.offsetBytes !== state.records) throw damaged(`its end counts ${head.offsetBytes} records, and ${state.records} came`);
      this.state = { ...state, records, check: check.toString('hex'), ended: true };
      return;
    }
    const node = this.header.nodes[head.node];
    const endBytes = assertPossible(node, head.offsetBytes, head.lengthBytes, head.type === 'zero');
    if (head.node < state.node || (head.node === state.node && head.offsetBytes < state.offsetBytes)) throw damaged(`record ${state.records} comes too late`);
    if (head.type === 'data') {
      const handle = await this.fileOf(head.node);
      for (let done = 0; done < data.length; ) {
        const { bytesWritten } = await handle.write(data, done, data.length - done, head.offsetBytes + done);
        done += bytesWritten;
      }
      this.dirty.add(head.node);
      this.unsyncedBytes += data.length;
    }
    if (node?.delta === true) runs.push(extentOf(head.node, head.offsetBytes / BLOCK_BYTES, blocksFor(head.lengthBytes)));
    this.state = {
      ...state, records, check: check.toString('hex'), node: head.node, offsetBytes: endBytes, dataBytes: state.dataBytes + data.length,
      extentsBytes: state.extentsBytes + (node?.delta === true ? EXTENT_BYTES : 0),
    };
  }

  /** Always in step with the state: records that were taken are in the list, whatever became of the one behind them; or they were not taken. */
  private async appendExtents(runs: readonly Buffer[]): Promise<void> {
    if (runs.length === 0) return;
    try {
      await this.writeExtents(runs);
    } catch (error) {
      this.forgetUnsynced();
      throw error;
    }
  }

  private async writeExtents(runs: readonly Buffer[]): Promise<void> {
    this.extents ??= await fs.open(path.join(this.directory, 'extents'), 'a+', 0o600);
    const bytes = Buffer.concat(runs);
    // A list that is longer than the state says was written by a server that died: what comes now is the same again.
    await this.extents.truncate(this.state.extentsBytes - bytes.length);
    await this.extents.appendFile(bytes);
  }

  private async fileOf(node: number): Promise<fs.FileHandle> {
    if (this.open?.node === node) return this.open.handle;
    await this.open?.handle.close();
    this.open = null;
    const handle = await fs.open(this.dataFile(node), 'a', 0o600).then(async (made) => { await made.close(); return await fs.open(this.dataFile(node), 'r+'); });
    this.open = { node, handle };
    return handle;
  }

  /** After a failure nobody knows what of it is on the disk: it counts as not received, and is written anew. */
  private async sync(): Promise<void> {
    try {
      await this.syncAll();
    } catch (error) {
      this.forgetUnsynced();
      throw error;
    }
  }

  private forgetUnsynced(): void {
    this.state = this.durable;
    this.dirty.clear();
  }

  private async syncAll(): Promise<void> {
    for (const node of this.dirty) {
      const handle = await fs.open(this.dataFile(node), 'r+');
      try {
        await handle.sync();
      } finally {
        await handle.close();
      }
    }
    if (this.extents !== null) await this.extents.sync();
    syncDirectory(this.directory);
    await this.writeState();
    this.dirty.clear();
    this.unsyncedBytes = 0;
  }

  private async writeState(): Promise<void> {
    const { state } = this;
    await writeDurably(path.join(this.directory, 'state.new'), JSON.stringify(state));
    await fs.rename(path.join(this.directory, 'state.new'), path.join(this.directory, 'state'));
    syncDirectory(this.directory);
    this.durable = state;
  }

  private async closeFiles(): Promise<void> {
    await this.open?.handle.close();
    await this.extents?.close();
    this.open = null;
    this.extents = null;
  }
}

/** Where the record ends. Throws when its node cannot have such a part. */
function assertPossible(node: StreamNode | undefined, offsetBytes: number, lengthBytes: number, isZero: boolean): number {
  if (node === undefined || (node.kind !== 'disk' && node.kind !== 'file')) throw damaged('a record speaks of something that has no content');
  const endBytes = offsetBytes + lengthBytes;
  if (lengthBytes === 0 || endBytes > node.sizeBytes) throw damaged('a record goes beyond the end of its disk');
  if (offsetBytes % BLOCK_BYTES !== 0 || (endBytes % BLOCK_BYTES !== 0 && endBytes !== node.sizeBytes)) throw damaged('a record does not hold whole blocks');
  if (isZero && !node.delta) throw damaged('zeros come for a disk that has nothing else');
  return endBytes;
}

function extentOf(node: number, block: number, count: number): Buffer {
  const bytes = Buffer.alloc(EXTENT_BYTES);
  bytes.writeDoubleLE(node, 0);
  bytes.writeDoubleLE(block, 8);
  bytes.writeDoubleLE(count, 16);
  return bytes;
}

async function writeDurably(file: string, content: string): Promise<void> {
  const handle = await fs.open(file, 'w', 0o600);
  try {
    await handle.writeFile(content);
    await handle.sync();
  } finally {
    await handle.close();
  }
}
