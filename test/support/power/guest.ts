/**
 * What guests, jobs and operators do in the recorded process, on a real store.
 *
 * Says before and after each operation what it is (see `Marker`), with one write(2) each, so that it lies in the recording
 * where it happened. Guests' operations run in the main thread, through the same functions as in the I/O workers; a flush runs
 * in the thread pool meanwhile. Imports end here as `daemon/jobs/imports.ts` ends them: a synced file is adopted. A disk is named by its path.
 */
import fs from 'node:fs';
import path from 'node:path';

import { enterDisk, leaveDisk, REQUEST_BYTES_MAX } from '../../../blockstore/hot/context.js';
import { IoBuffer, realDoor } from '../../../blockstore/hot/door.js';
import { fillStep, newFillProgress, type FillProgress } from '../../../blockstore/hot/fill-step.js';
import { copyMerged } from '../../../blockstore/merge-copy.js';
import { cheapestPair } from '../../../blockstore/merge.js';
import { ROOT_ID, type LayerRow, type NodeKind } from '../../../blockstore/meta/rows.js';
import { Store } from '../../../blockstore/store.js';
import { insertCopy } from '../../../blockstore/trees.js';
import { createRandom, type Random } from '../model/random.js';
import { patternBytes } from '../model/pattern.js';
import { contentOf, type MarkedRange, type Marker } from './window.js';

const NODE = { mode: 0o600, uid: 0, gid: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, linkTarget: null, fault: null };
const LAYER: Omit<LayerRow, 'id' | 'writtenBy' | 'sizeBytes' | 'complete'> = {
  kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sealed: false, createdUs: 0,
};

export type Begun = Marker extends infer M ? (M extends Marker ? Omit<M, 'phase'> : never) : never;

export interface GuestOptions {
  readonly markerFile: string;
  /** The store is `store` in it. */
  readonly root: string;
  readonly runtimeDir: string;
  readonly seed: number;
}

/** The operations of workloads, each between its two markers. */
export class Guest {
  readonly store: Store;
  readonly root: string;
  readonly random: Random;
  private readonly markers: number;
  private readonly fills = new Map<string, FillProgress>();
  private readonly buffer = new IoBuffer(REQUEST_BYTES_MAX);
  private contents = 1;
  private flushes = 0;

  constructor({ markerFile, root, runtimeDir, seed }: GuestOptions) {
    this.root = root;
    this.random = createRandom(seed);
    this.markers = fs.openSync(markerFile, 'w');
    // Its 64 MiB would be allocated in memory for each recording; its content means nothing.
    const fallocate = realDoor.fallocate.bind(realDoor);
    realDoor.fallocate = (label, ...call) => (label === 'reserve-allocate' ? 0 : fallocate(label, ...call));
    this.store = Store.open({
      storeDir: path.join(root, 'store'), runtimeDir, threads: 1, mapChunks: 1,
      announcer: { opened: () => undefined, closed: () => undefined },
      onFault: (nodeId, reason) => { throw new Error(`disk ${nodeId} was faulted: ${reason}`); }, onFull: () => undefined,
    });
  }

  /** A disk that owns all of its content; every `holes`-th block of it is a hole. */
  create(disk: string, sizeBytes: number, holes = 0): void {
    const content = this.next();
    this.marked({ op: 'create', disk, sizeBytes, seed: content, holes }, () => {
      const temporary = path.join(this.root, 'store', 'import', `${disk.replaceAll('/', '_')}.raw`);
      const fd = fs.openSync(temporary, 'w', 0o600);
      fs.ftruncateSync(fd, sizeBytes);
      const bytes = contentOf(sizeBytes, content, holes);
      for (let at = 0; at < sizeBytes; at += 4096) {
        const block = bytes.subarray(at, at + 4096);
        if (block.some((byte) => byte !== 0)) fs.writeSync(fd, block, 0, block.length, at);
      }
      fs.fsyncSync(fd);
      fs.closeSync(fd);
      const { meta, files } = this.store;
      meta.transaction(() => {
        const layer = meta.layers.insert({ ...LAYER, sizeBytes, complete: true });
        this.addNode(disk, 'disk', sizeBytes, layer.id);
        files.adopt(layer.id, temporary);
      });
    });
  }

  /** An empty file that grows as it is written, as one that a guest's host makes. */
  createFile(disk: string): void {
    this.marked({ op: 'create', disk, sizeBytes: 0, seed: 0, holes: 0 }, () => {
      this.store.meta.transaction(() => { this.addNode(disk, 'file', 0, this.store.createEmptyLayer().id); });
    });
  }

  open(disk: string): void {
    this.store.disks.acquire(this.idOf(disk));
  }

  close(disk: string): void {
    this.store.disks.release(this.idOf(disk));
  }

  write(disk: string, at: number, length: number): void {
    const content = this.next();
    this.marked({ op: 'write', disk, at, length, seed: content }, () => { this.store.data.write(this.idOf(disk), at, patternBytes(content, at, length)); });
  }

  discard(disk: string, at: number, length: number): void {
    this.marked({ op: 'discard', disk, at, length }, () => { this.store.data.discard(this.idOf(disk), at, length); });
  }

  read(disk: string, at: number, length: number): void {
    this.store.data.read(this.idOf(disk), at, Buffer.alloc(length));
  }

  async flush(disk: string): Promise<void> {
    this.flushes += 1;
    const marker = { op: 'flush', id: this.flushes, disks: [disk] } as const;
    this.say({ ...marker, phase: 'begin' });
    await this.store.flush(this.idOf(disk));
    this.say({ ...marker, phase: 'end' });
  }

  /** What the clock does each second. It promises nothing. */
  async commitAll(): Promise<void> {
    await this.store.committer.commitAll();
  }

  clone(source: string, targets: readonly string[], copyOnRead = false): void {
    this.marked({ op: 'clone', source, targets }, () => {
      this.store.clone(this.idOf(source), targets.map((target) => this.placeOf(target)), { copyOnRead });
    });
  }

  /** Frozen copies of several disks as of one instant; the program goes on meanwhile. The last `begin` before the end is the instant's. */
  async snapshot(disks: readonly string[], targets: readonly string[]): Promise<void> {
    const marker = { op: 'snapshot', disks, targets } as const;
    await this.store.groupSeals.seal({
      list: () => {
        this.say({ ...marker, phase: 'begin' });
        return disks.map((disk) => this.store.meta.nodes.byId(this.idOf(disk))!);
      },
      commit: (nodes, timeUs) => {
        for (const [i, { node, foundation }] of nodes.entries()) {
          insertCopy(this.store.meta, node, foundation, this.placeOf(targets[i] ?? ''), { frozen: true, copyOnRead: false, timeUs });
        }
      },
    });
    this.say({ ...marker, phase: 'end' });
  }

  cloneRanges(source: string, disk: string, ranges: readonly MarkedRange[]): void {
    this.marked({ op: 'range', source, disk, ranges }, () => {
      this.store.cloneRanges(this.idOf(source), this.idOf(disk), ranges.map(({ from, to, length }) => ({ sourceAtBytes: from, targetAtBytes: to, lengthBytes: length })));
    });
  }

  resize(disk: string, sizeBytes: number): void {
    this.marked({ op: 'resize', disk, sizeBytes }, () => { this.store.resize(this.idOf(disk), sizeBytes); });
  }

  /** One transaction takes the name, the next the data; both are done when it is answered. */
  remove(disk: string): void {
    const id = this.idOf(disk);
    this.marked({ op: 'remove', disk }, () => {
      this.store.meta.transaction(() => {
        this.store.meta.nodes.orphan(id);
        this.store.meta.afterCommit(() => { this.store.discardNode(id); });
      });
    });
    this.fills.delete(disk);
  }

  /** One step of the disk's fill; true at its end. */
  fillStep(disk: string): boolean {
    const open = this.store.disks.get(this.idOf(disk));
    if (open === undefined) throw new Error(`${disk} is not open`);
    const progress = this.fills.get(disk) ?? newFillProgress();
    this.fills.set(disk, progress);
    if (!enterDisk(this.store.context, open.shared)) throw new Error(`${disk} was retired`);
    const atEnd = fillStep(this.store.context, open.shared, this.buffer, progress);
    leaveDisk(this.store.context, open.shared);
    if (progress.failed < 0) throw new Error(`the fill of ${disk} failed with ${progress.failed}`);
    return atEnd;
  }

  /** The end of a fill as the fill job makes it. */
  async completeFill(disk: string): Promise<void> {
    await this.flush(disk);
    this.store.markComplete(this.idOf(disk));
  }

  /** All that can be merged below the disk, one pair after the other. Promises nothing, and must change nothing. */
  async merge(disk: string): Promise<void> {
    const { meta, files } = this.store;
    for (;;) {
      const pair = cheapestPair(meta, meta.nodes.byId(this.idOf(disk))?.layerId ?? 0);
      if (pair === null) return;
      const file = path.join(files.storeDir, 'import', `${this.next()}.merge`);
      // Bytes are written, for the recorder does not know of shared extents.
      if (pair.costBytes > 0) await copyMerged(this.store, pair, file, { share: false, pace: async () => { await Promise.resolve(); } });
      this.store.merge(pair, pair.costBytes > 0 ? file : null);
    }
  }

  checkpoint(idle: boolean): void {
    this.store.meta.checkpoint({ idle });
  }

  sizeOf(disk: string): number {
    return this.store.disks.get(this.idOf(disk))?.shared.sizeBytes() ?? this.store.meta.nodes.byId(this.idOf(disk))!.sizeBytes;
  }

  note(text: string): void {
    this.say({ op: 'note', text, phase: 'begin' });
  }

  idOf(disk: string): number {
    const node = this.store.meta.nodes.byPath(disk);
    if (node === undefined) throw new Error(`there is no ${disk}`);
    return node.id;
  }

  private addNode(disk: string, kind: NodeKind, sizeBytes: number, layerId: number): void {
    this.store.meta.nodes.insert({ ...NODE, ...this.placeOf(disk), kind, sizeBytes, layerId, copyOnRead: false });
  }

  private placeOf(disk: string): { readonly parentId: number; readonly name: string } {
    const at = disk.lastIndexOf('/');
    return { parentId: at < 0 ? ROOT_ID : this.idOf(disk.slice(0, at)), name: disk.slice(at + 1) };
  }

  /** A seed for content that nothing else has. */
  next(): number {
    this.contents += 1;
    return this.contents;
  }

  marked(marker: Begun, body: () => void): void {
    this.say({ ...marker, phase: 'begin' });
    body();
    this.say({ ...marker, phase: 'end' });
  }

  say(marker: Marker): void {
    fs.writeSync(this.markers, JSON.stringify(marker));
  }
}
