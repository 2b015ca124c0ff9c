/**
 * A block store on tmpfs for one test: real files, real SQLite, no daemon.
 *
 * Opens a `Store` in directories of its own, makes images and clones in it with content that is known, lets it die as by
 * kill -9, and takes everything away after the test. No space is kept back for metadata. Content comes from `patterned`:
 * words that are never zero in data blocks, holes elsewhere, so that a block in a wrong place, a lost hole or an invented
 * zero never looks right.
 */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, expect } from 'vitest';

import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { DiskHandles } from '../../blockstore/hot/block-map.js';
import type { HotContext } from '../../blockstore/hot/context.js';
import { realDoor } from '../../blockstore/hot/door.js';
import { faultDoor, type Decide, type DoorCall, type Fault } from './fault-door.js';
import { createThreadContext } from '../../blockstore/hot/thread-context.js';
import { ROOT_ID, type LayerRow, type NodeKind, type NodeRow } from '../../blockstore/meta/rows.js';
import type { OpenDisk } from '../../blockstore/open-disks.js';
import type { QuotaChange } from '../../blockstore/quotas.js';
import { identityOf } from '../../blockstore/sources/identity.js';
import { Store } from '../../blockstore/store.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from '../../blockstore/units.js';
import { firstDifference, patternBytes } from './model/pattern.js';
import { createCleanup, makeTmpfsDir } from './temp.js';
import { withoutReserve } from './without-reserve.js';

const REQUESTS_MS_MAX = 10_000;

const cleanup = createCleanup();

afterEach(async () => { await cleanup.run(); });

export interface TestStoreOptions {
  /** Threads that may touch blocks, the main one among them; two when left out. */
  readonly threads?: number;
  /** Of a store that was closed, to open it again. */
  readonly storeDir?: string;
}

export interface ImageOptions {
  readonly kind?: Extract<NodeKind, 'disk' | 'file'>;
  readonly copyOnRead?: boolean;
}

export class TestStore {
  readonly storeDir: string;
  readonly runtimeDir: string;
  /** The server's store; another one after `kill` and `restart`. */
  store: Store;
  /** What is to become of the main thread's system calls; tests set and unset it. */
  decide: Decide | undefined;
  readonly faults: { readonly nodeId: number; readonly reason: string }[] = [];
  readonly quotaChanges: QuotaChange[] = [];
  /** Instances of disks that were announced to other threads and not withdrawn, by their serial. */
  readonly announced = new Map<number, DiskHandles>();
  private readonly threads: number;
  private readonly dead: Store[] = [];
  private closed = false;

  constructor(options: TestStoreOptions = {}) {
    this.threads = options.threads ?? 2;
    this.storeDir = options.storeDir ?? makeTmpfsDir('blockstore', cleanup);
    this.runtimeDir = makeTmpfsDir('blockstore-run', cleanup);
    this.store = this.open();
    cleanup.add(async () => {
      if (!this.closed) await this.store.close();
      for (const store of this.dead) store.meta.close();
    });
  }

  /** What the next server finds after kill -9 of this one: nothing is committed, closed or deleted. */
  kill(): Store {
    this.dead.push(this.store);
    this.announced.clear();
    this.store = this.open();
    return this.store;
  }

  /** Stops in an orderly way and starts again. */
  async restart(): Promise<Store> {
    await this.store.close();
    this.store = this.open();
    return this.store;
  }

  async close(): Promise<void> {
    this.closed = true;
    await this.store.close();
  }

  /** A disk or file that owns all of `content`; its blocks of zeros are holes. */
  image(name: string, content: Buffer, options: ImageOptions = {}): NodeRow {
    const { meta, files } = this.store;
    return meta.transaction(() => {
      const layer = meta.layers.insert(layerFields({ sizeBytes: content.length, complete: true }));
      files.create(layer.id, content.length);
      writeSparse(files.storePath(layer.id), content);
      return this.addNode(name, layer, content.length, options);
    });
  }

  /** A disk of any size without content. */
  emptyImage(name: string, sizeBytes: number, options: ImageOptions = {}): NodeRow {
    const { meta, files } = this.store;
    return meta.transaction(() => {
      const layer = meta.layers.insert(layerFields({ sizeBytes, complete: true }));
      files.create(layer.id, sizeBytes);
      return this.addNode(name, layer, sizeBytes, options);
    });
  }

  /** A disk that owns nothing and stands on nothing: zeros all over. */
  unbackedImage(name: string, sizeBytes: number, options: ImageOptions = {}): NodeRow {
    const { meta } = this.store;
    return meta.transaction(() => this.addNode(name, meta.layers.insert(layerFields({ sizeBytes, complete: false })), sizeBytes, options));
  }

  /** A disk over a file that stays where it is, as an import in place makes it. The disk may be longer than the file. */
  inPlace(name: string, content: Buffer, options: ImageOptions & { readonly sizeBytes?: number; readonly mtime?: Date } = {}): { readonly node: NodeRow; readonly file: string } {
    const { meta } = this.store;
    const file = path.join(this.runtimeDir, `${name}.raw`);
    fs.writeFileSync(file, '');
    fs.truncateSync(file, content.length);
    writeSparse(file, content);
    if (options.mtime !== undefined) fs.utimesSync(file, options.mtime, options.mtime);
    const sizeBytes = options.sizeBytes ?? content.length;
    const node = meta.transaction(() => {
      const base = meta.layers.insert({
        ...layerFields({ sizeBytes: content.length, complete: true }), kind: 'external', externalPath: file,
        externalIdentity: identityOf(fs.statSync(file, { bigint: true })), sealed: true,
      });
      const active = meta.layers.insert({ ...layerFields({ sizeBytes, complete: false }), backingId: base.id });
      return this.addNode(name, active, sizeBytes, options);
    });
    return { node, file };
  }

  clone(source: NodeRow, name: string, options: { readonly copyOnRead?: boolean } = {}): NodeRow {
    const [node] = this.store.clone(source.id, [{ parentId: ROOT_ID, name }], { copyOnRead: options.copyOnRead ?? false });
    if (node === undefined) throw new Error('no clone was made');
    return node;
  }

  /** Opens the disk for one user; the test ends with the store, and the disk with it. */
  acquire(node: NodeRow): OpenDisk {
    return this.store.disks.acquire(node.id);
  }

  /** The disk as it is now: sealing and growing put others in its place. */
  disk(node: NodeRow): OpenDisk {
    const disk = this.store.disks.get(node.id);
    if (disk === undefined) throw new Error(`${node.name} is not open`);
    return disk;
  }

  read(node: NodeRow, offsetBytes: number, lengthBytes: number): Buffer {
    // Not zeros: what the read does not write must be seen.
    const target = Buffer.alloc(lengthBytes, 0xee);
    return target.subarray(0, this.store.data.read(node.id, offsetBytes, target));
  }

  /** All of an open disk, or of one that is opened for this. */
  content(node: NodeRow): Buffer {
    const disk = this.acquire(node);
    try {
      return this.read(node, 0, disk.shared.sizeBytes());
    } finally {
      this.store.disks.release(node.id);
    }
  }

  write(node: NodeRow, offsetBytes: number, data: Uint8Array): void {
    expect(this.store.data.write(node.id, offsetBytes, data)).toBe(data.length);
  }

  expectContent(node: NodeRow, expected: Buffer): void {
    expect(firstDifference(expected, this.content(node), 0)).toBeNull();
  }

  row(node: NodeRow): NodeRow {
    const row = this.store.meta.nodes.byId(node.id);
    if (row === undefined) throw new Error(`${node.name} is gone`);
    return row;
  }

  /** The active layer's row. */
  layer(node: NodeRow): LayerRow {
    const layer = this.store.meta.layers.byId(this.row(node).layerId ?? 0);
    if (layer === undefined) throw new Error(`${node.name} has no layer`);
    return layer;
  }

  /** Blocks that the database says the layer owns: what a power loss leaves. */
  committedBlocks(layerId: number): number[] {
    const blocks: number[] = [];
    this.store.meta.ownership.forEach(layerId, (firstPage, pageCount, bitmap) => {
      for (let i = 0; i < pageCount * PAGE_BLOCKS; i += 1) {
        if (bitmap === null || (bitmap[Math.floor(i / 8)]! & (1 << (i % 8))) !== 0) blocks.push(firstPage * PAGE_BLOCKS + i);
      }
    });
    return blocks;
  }

  /** Blocks below the disk's end that its active layer owns, as the open map says. */
  ownedBlocks(node: NodeRow): number[] {
    const { shared } = this.disk(node);
    const blocks: number[] = [];
    for (let block = 0; block * BLOCK_BYTES < shared.sizeBytes(); block += 1) {
      if (shared.originOf(this.store.context.shared, block) === shared.activeOrigin()) blocks.push(block);
    }
    return blocks;
  }

  /** A place in the data path for a further actor: number 1 and up, with a door of its own. */
  actor(thread: number, decide: Decide = () => undefined): HotContext {
    return createThreadContext(this.store.threadBoot(thread), faultDoor(realDoor, decide), () => undefined);
  }

  /** Waits until other threads have begun this many requests since the store was opened. */
  waitForRequests(count: number): void {
    const { shared } = this.store.context;
    const deadlineMs = performance.now() + REQUESTS_MS_MAX;
    const nobody = new Int32Array(new SharedArrayBuffer(4));
    while (shared.requestsOfOthers() < count) {
      if (performance.now() > deadlineMs) throw new Error(`other threads have begun ${shared.requestsOfOthers()} requests, not ${count}`);
      Atomics.wait(nobody, 0, 0, 1);
    }
  }

  private open(): Store {
    return withoutReserve(() => this.openStore());
  }

  private openStore(): Store {
    return Store.open({
      mapChunks: 2, sourceTimeoutMs: 2000,
      storeDir: this.storeDir, runtimeDir: this.runtimeDir, threads: this.threads,
      announcer: {
        opened: (handles) => { this.announced.set(handles.serial, handles); },
        closed: (_nodeId, serial) => { this.announced.delete(serial); },
      },
      onFault: (nodeId, reason) => { this.faults.push({ nodeId, reason }); },
      onFull: () => undefined,
      onQuota: (change) => { this.quotaChanges.push(change); },
      door: faultDoor(realDoor, (call) => this.decide?.(call)),
    });
  }

  private addNode(name: string, layer: LayerRow, sizeBytes: number, options: ImageOptions): NodeRow {
    return this.store.meta.nodes.insert({
      parentId: ROOT_ID, name, kind: options.kind ?? 'disk', mode: 0o600, uid: 0, gid: 0, sizeBytes, atimeUs: 0, mtimeUs: 0, ctimeUs: 0,
      layerId: layer.id, linkTarget: null, copyOnRead: options.copyOnRead ?? false, fault: null,
    });
  }
}

/** Content of `sizeBytes` whose blocks are data, but those that `isHole` names. */
export function patterned(seed: number, sizeBytes: number, isHole: (block: number) => boolean = () => false): Buffer {
  const content = patternBytes(seed, 0, sizeBytes);
  for (let block = 0; block * BLOCK_BYTES < sizeBytes; block += 1) {
    if (isHole(block)) content.fill(0, block * BLOCK_BYTES, Math.min(sizeBytes, (block + 1) * BLOCK_BYTES));
  }
  return content;
}

/** Every third block is a hole. */
export function everyThird(block: number): boolean {
  return block % 3 === 2;
}

/** The kind of the error that `body` throws; undefined when it throws none. */
export function kindOf(body: () => unknown): ErrorKind | undefined {
  try {
    body();
    return undefined;
  } catch (error) {
    if (error instanceof OffshootError) return error.kind;
    throw error;
  }
}

export async function kindOfRejection(promise: Promise<unknown>): Promise<ErrorKind | undefined> {
  try {
    await promise;
    return undefined;
  } catch (error) {
    if (error instanceof OffshootError) return error.kind;
    throw error;
  }
}

/** Decides for the calls of one label only. */
export function at(label: string, decide: (call: DoorCall) => Fault | undefined): Decide {
  return (call) => (call.label === label ? decide(call) : undefined);
}

/** The system calls of a body, by their labels, in their order. */
export function labelsOf(fixture: TestStore, body: () => void): string[] {
  const labels: string[] = [];
  fixture.decide = (call) => {
    labels.push(call.label);
    return undefined;
  };
  body();
  fixture.decide = undefined;
  return labels;
}

function layerFields(fields: { readonly sizeBytes: number; readonly complete: boolean }): Omit<LayerRow, 'id' | 'writtenBy'> {
  return { kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sealed: false, createdUs: 0, ...fields };
}

/** Writes the blocks that are not zeros; the file has its length already. */
function writeSparse(file: string, content: Buffer): void {
  const fd = fs.openSync(file, 'r+');
  for (let offset = 0; offset < content.length; offset += BLOCK_BYTES) {
    const block = content.subarray(offset, offset + BLOCK_BYTES);
    if (block.some((byte) => byte !== 0)) fs.writeSync(fd, block, 0, block.length, offset);
  }
  fs.closeSync(fd);
}
