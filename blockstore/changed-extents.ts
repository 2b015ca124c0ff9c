/**
 * Which extents of a disk differ between two of its states, found out from the metadata: no content is read.
 *
 * A state is an active layer and a size: that of a snapshot's frozen node, or of a disk as it is now (whose pending first touches the
 * caller has committed). Each block resolves to the layer that holds it, and where in it. A block that both states have from the same
 * place is the same, for layers never change once they are sealed; any other counts as changed, though its content may be the
 * same: whoever minds reads and compares. Blocks that read as zeros in both, by the map or by a hole of the file behind it,
 * are the same too. Without a state to compare with, everything that is data counts.
 *
 * Works window by window, each from one moment of the metadata, so that the caller can let others go on in between. Main thread.
 */
import fs from 'node:fs';

import { SEEK_DATA, SEEK_HOLE, realDoor } from './hot/door.js';
import { Errno } from './errors.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow } from './meta/rows.js';
import { layersBelow, sharesOf, type Shares } from './shared-origins.js';
import { placeOf } from './sources/place.js';
import { BLOCK_BYTES, PAGE_BLOCKS } from './units.js';

export interface DiskState {
  /** The active layer. */
  readonly layerId: number;
  readonly sizeBytes: number;
}

export type ChangeType = 'data' | 'zero';

export interface ChangedExtent {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** What the later state holds there: data, or nothing but zeros. */
  readonly type: ChangeType;
}

export interface ChangedPage {
  readonly extents: readonly ChangedExtent[];
  /** Where to go on; null: that was all. */
  readonly nextOffsetBytes: number | null;
}

export interface ChangeParts {
  readonly meta: MetaStore;
  readonly files: { pathOf(layer: LayerRow): string };
}

/** 1 GiB of disk: what one look at the ownership tables covers; up to 16 times as much as long as there is little in it. */
const WINDOW_BLOCKS = 128 * PAGE_BLOCKS;
const WINDOW_BLOCKS_MAX = 16 * WINDOW_BLOCKS;
/** Runs of a window that are little. */
const SPARSE_RUNS = 64;
const EXTENTS_MAX = 4096;
/** How long one call may hold up the main thread, roughly. */
const TIME_MS_MAX = 20;
/** Each bit of a byte of a bitmap. */
const BITS = [1, 2, 4, 8, 16, 32, 64, 128] as const;

/** Blocks of a disk that come from one place; a `layer` of -1: they read as zeros. */
interface Run {
  readonly first: number;
  readonly end: number;
  /** Index into the chain, and behind its end into what its layers share extents with. */
  readonly layer: number;
  /** Block of the layer that `first` is. */
  readonly source: number;
  /** Bytes of the layer that may be seen; what lies behind them reads as zeros. */
  readonly limitBytes: number;
}

interface OwnedRun {
  readonly first: number;
  readonly end: number;
}

/** The changed extents from `offsetBytes` on, as many as can be found quickly. `before` null: everything in `after` that is data. */
export function changedExtents(parts: ChangeParts, before: DiskState | null, after: DiskState, offsetBytes: number): ChangedPage {
  const files = new HoleFinder(parts);
  try {
    const later = new ResolvedChain(parts.meta, after);
    const earlier = before === null ? null : new ResolvedChain(parts.meta, before);
    const collected = new Extents(after.sizeBytes);
    const endBlock = Math.ceil(after.sizeBytes / BLOCK_BYTES);
    const deadlineMs = performance.now() + TIME_MS_MAX;
    let block = Math.floor(offsetBytes / BLOCK_BYTES);
    let windowBlocks = WINDOW_BLOCKS;
    while (block < endBlock) {
      const window = { first: block, end: Math.min(endBlock, (Math.floor(block / PAGE_BLOCKS) * PAGE_BLOCKS) + windowBlocks) };
      const laterRuns = later.runs(window.first, window.end);
      block = compareWindow(collected, files, earlier, later, laterRuns, window);
      windowBlocks = laterRuns.length > SPARSE_RUNS ? WINDOW_BLOCKS : Math.min(2 * windowBlocks, WINDOW_BLOCKS_MAX);
      if (collected.list.length >= EXTENTS_MAX || performance.now() > deadlineMs) break;
    }
    return { extents: collected.list, nextOffsetBytes: block >= endBlock ? null : block * BLOCK_BYTES };
  } finally {
    files.close();
  }
}

/** Whether two states have a layer in common: if not, every block counts as changed, and only contents can tell. */
export function haveCommonLayer(meta: MetaStore, one: DiskState, other: DiskState): boolean {
  const layers = new Set(layersBelow(meta, one.layerId).map((layer) => layer.id));
  return layersBelow(meta, other.layerId).some((layer) => layers.has(layer.id));
}

/** Adds what changed in the blocks of the window; where it stopped, its end unless there were too many extents. */
function compareWindow(
  out: Extents, files: HoleFinder, earlier: ResolvedChain | null, later: ResolvedChain, laterRuns: readonly Run[], { first, end }: OwnedRun,
): number {
  const earlierRuns = earlier === null ? [{ first, end, layer: -1, source: 0, limitBytes: 0 }] : earlier.runs(first, end);
  let at = first;
  for (let i = 0, j = 0; at < end; ) {
    const run = laterRuns[i]!;
    const old = earlierRuns[j]!;
    const until = Math.min(run.end, old.end);
    if (earlier === null || !isSame(later, run, earlier, old, at, until)) addChanged(out, files, later, run, earlier, old, at, until);
    at = until;
    if (run.end === until) i += 1;
    if (old.end === until) j += 1;
    if (out.list.length >= EXTENTS_MAX) return at;
  }
  return end;
}

/** Both from the same blocks of the same layer, and as much of them to be seen. */
function isSame(later: ResolvedChain, run: Run, earlier: ResolvedChain, old: Run, first: number, end: number): boolean {
  if (run.layer < 0 || old.layer < 0) return run.layer < 0 && old.layer < 0;
  const source = run.source + first - run.first;
  if (later.layerAt(run.layer).id !== earlier.layerAt(old.layer).id || source !== old.source + first - old.first) return false;
  const endBytes = (source + end - first) * BLOCK_BYTES;
  return Math.min(run.limitBytes, endBytes) === Math.min(old.limitBytes, endBytes);
}

/** The blocks differ: says which of them hold data now and which nothing, and leaves out those that hold nothing in both. */
function addChanged(
  out: Extents, files: HoleFinder, later: ResolvedChain, run: Run, earlier: ResolvedChain | null, old: Run, first: number, end: number,
): void {
  const oldLayer = earlier === null || old.layer < 0 ? null : earlier.layerAt(old.layer);
  for (let at = first; at < end; ) {
    const part = pieceAt(files, run.layer < 0 ? null : later.layerAt(run.layer), run, at, end);
    if (part.isData) {
      out.add(at, part.end, 'data');
      at = part.end;
      continue;
    }
    while (at < part.end) {
      const was = pieceAt(files, oldLayer, old, at, part.end);
      if (was.isData) out.add(at, was.end, 'zero');
      at = was.end;
    }
  }
}

/** From block `at` of the disk on: how far it is all data, or all nothing. */
function pieceAt(files: HoleFinder, layer: LayerRow | null, run: Run, at: number, end: number): { readonly isData: boolean; readonly end: number } {
  if (layer === null) return { isData: false, end };
  const shift = run.source - run.first;
  const sourceEnd = Math.min(end + shift, Math.ceil(run.limitBytes / BLOCK_BYTES));
  if (at + shift >= sourceEnd) return { isData: false, end };
  const found = files.pieceAt(layer, at + shift, sourceEnd);
  const stop = found.end - shift;
  // What lies behind the limit is zeros; so is a hole, and they are one piece.
  return { isData: found.isData, end: !found.isData && found.end === sourceEnd ? end : stop };
}

/** The extents found so far, neighbours of one type joined. */
class Extents {
  readonly list: ChangedExtent[] = [];
  private readonly sizeBytes: number;

  constructor(sizeBytes: number) {
    this.sizeBytes = sizeBytes;
  }

  add(first: number, end: number, type: ChangeType): void {
    const offsetBytes = first * BLOCK_BYTES;
    const endBytes = Math.min(end * BLOCK_BYTES, this.sizeBytes);
    const last = this.list.at(-1);
    if (last?.type === type && last.offsetBytes + last.lengthBytes === offsetBytes) {
      this.list[this.list.length - 1] = { ...last, lengthBytes: endBytes - last.offsetBytes };
    } else {
      this.list.push({ offsetBytes, lengthBytes: endBytes - offsetBytes, type });
    }
  }
}

/** A backing chain whose blocks are looked up window by window. */
class ResolvedChain {
  private readonly meta: MetaStore;
  private readonly chain: readonly LayerRow[];
  private readonly limits: readonly number[];
  private readonly shares: Shares;
  private readonly endBlock: number;

  constructor(meta: MetaStore, state: DiskState) {
    this.meta = meta;
    this.chain = meta.layers.chain(state.layerId);
    this.endBlock = Math.ceil(state.sizeBytes / BLOCK_BYTES);
    // As a disk that is opened counts them.
    let limitBytes = Number.MAX_SAFE_INTEGER;
    this.limits = this.chain.map((layer, i) => {
      const limit = i === 0 ? Number.MAX_SAFE_INTEGER : Math.min(limitBytes, layer.sizeBytes);
      limitBytes = Math.min(limitBytes, layer.backingLimitBytes ?? Number.MAX_SAFE_INTEGER);
      return limit;
    });
    this.shares = sharesOf(meta, this.chain, this.limits);
  }

  layerAt(index: number): LayerRow {
    return this.chain[index] ?? this.shares.origins[index - this.chain.length]!.layer;
  }

  /** Where each block of the window comes from, ascending and without gaps. */
  runs(first: number, end: number): Run[] {
    const found: Run[] = [];
    const stop = Math.min(end, Math.max(first, this.endBlock));
    const owned = new Map<number, OwnedRun[]>();
    if (first < stop) this.resolve(0, first, stop, { first, end: stop }, owned, found);
    if (stop < end) found.push({ first: stop, end, layer: -1, source: 0, limitBytes: 0 });
    return found;
  }

  /** Blocks that layers above `index` do not own. Calls for one layer come in ascending order, so its list is used up from the front. */
  private resolve(index: number, first: number, end: number, window: OwnedRun, owned: Map<number, OwnedRun[]>, found: Run[]): void {
    const layer = this.chain[index];
    if (layer === undefined) {
      found.push({ first, end, layer: -1, source: 0, limitBytes: 0 });
      return;
    }
    if (layer.complete) {
      this.pushSeen(found, index, first, end);
      return;
    }
    let list = owned.get(index);
    if (list === undefined) {
      list = this.ownedRuns(layer.id, window);
      owned.set(index, list);
    }
    let at = first;
    while (at < end) {
      const next = list.at(-1);
      if (next === undefined || next.first >= end) {
        this.resolveBelow(index, at, end, window, owned, found);
        return;
      }
      if (next.end <= at) {
        list.pop();
        continue;
      }
      if (next.first > at) {
        this.resolveBelow(index, at, next.first, window, owned, found);
        at = next.first;
      }
      const stop = Math.min(next.end, end);
      this.pushSeen(found, index, at, stop);
      at = stop;
    }
  }

  /** Blocks that the layer at `index` does not own: it may share them with another layer; if not, they are its backing's. */
  private resolveBelow(index: number, first: number, end: number, window: OwnedRun, owned: Map<number, OwnedRun[]>, found: Run[]): void {
    let at = first;
    for (const { block, count, share } of this.shares.ofLayer[index]!) {
      if (block >= end) break;
      const [from, to] = [Math.max(block, at), Math.min(block + count, end)];
      if (from >= to) continue;
      if (at < from) this.resolve(index + 1, at, from, window, owned, found);
      if (share < 0) found.push({ first: from, end: to, layer: -1, source: 0, limitBytes: 0 });
      else this.pushShared(found, share, from, to);
      at = to;
    }
    if (at < end) this.resolve(index + 1, at, end, window, owned, found);
  }

  private pushShared(found: Run[], share: number, first: number, end: number): void {
    const { deltaBytes, limitBytes } = this.shares.origins[share]!;
    const seenEnd = Math.max(first, Math.min(end, Math.ceil(limitBytes / BLOCK_BYTES)));
    const layer = this.chain.length + share;
    if (first < seenEnd) found.push({ first, end: seenEnd, layer, source: first + deltaBytes / BLOCK_BYTES, limitBytes: limitBytes + deltaBytes });
    if (seenEnd < end) found.push({ first: seenEnd, end, layer: -1, source: 0, limitBytes: 0 });
  }

  /** The block that the limit cuts is a run of its own, and what lies behind it reads as zeros. */
  private pushSeen(found: Run[], index: number, first: number, end: number): void {
    const limitBytes = this.limits[index]!;
    const seenEnd = Math.max(first, Math.min(end, Math.ceil(limitBytes / BLOCK_BYTES)));
    if (first < seenEnd) found.push({ first, end: seenEnd, layer: index, source: first, limitBytes });
    if (seenEnd < end) found.push({ first: seenEnd, end, layer: -1, source: 0, limitBytes: 0 });
  }

  /** What the layer owns within the window, the last run first. */
  private ownedRuns(layerId: number, window: OwnedRun): OwnedRun[] {
    const runs: { first: number; end: number }[] = [];
    const add = (first: number, end: number): void => {
      const [from, to] = [Math.max(first, window.first), Math.min(end, window.end)];
      if (from >= to) return;
      const last = runs.at(-1);
      if (last?.end === from) last.end = to;
      else runs.push({ first: from, end: to });
    };
    this.meta.ownership.forEachBetween(layerId, Math.floor(window.first / PAGE_BLOCKS), Math.ceil(window.end / PAGE_BLOCKS), (firstPage, pageCount, bitmap) => {
      const firstBlock = firstPage * PAGE_BLOCKS;
      if (bitmap === null) add(firstBlock, firstBlock + pageCount * PAGE_BLOCKS);
      else forEachRun(bitmap, (from, to) => { add(firstBlock + from, firstBlock + to); });
    });
    return runs.reverse();
  }
}

function forEachRun(bitmap: Uint8Array, visit: (first: number, end: number) => void): void {
  let start = -1;
  for (let bit = 0; bit <= PAGE_BLOCKS; bit += 1) {
    const isSet = bit < PAGE_BLOCKS && (bitmap[Math.floor(bit / 8)]! & BITS[bit % 8]!) !== 0;
    if (isSet && start < 0) start = bit;
    if (!isSet && start >= 0) {
      visit(start, bit);
      start = -1;
    }
  }
}

/** Data and holes of the layers' files. A file that somebody else answers for is not asked: all of it counts as data. */
class HoleFinder {
  private readonly parts: ChangeParts;
  private readonly descriptors = new Map<number, number | null>();

  constructor(parts: ChangeParts) {
    this.parts = parts;
  }

  pieceAt(layer: LayerRow, first: number, end: number): { readonly isData: boolean; readonly end: number } {
    const fd = this.descriptorOf(layer);
    if (fd === null) return { isData: true, end };
    const [fromBytes, endBytes] = [first * BLOCK_BYTES, end * BLOCK_BYTES];
    const data = realDoor.seek('changed-data', fd, fromBytes, SEEK_DATA);
    // The end of a sealed file that was cut behind our back is no hole: reading it says so.
    if (data === -Errno.ENXIO) return { isData: layer.sealed && fs.fstatSync(fd).size < layer.sizeBytes, end };
    if (data < 0) return { isData: true, end };
    const dataBlock = Math.floor(data / BLOCK_BYTES);
    if (dataBlock > first) return { isData: false, end: Math.min(end, dataBlock) };
    const hole = realDoor.seek('changed-hole', fd, fromBytes, SEEK_HOLE);
    if (hole < 0 || hole >= endBytes) return { isData: true, end };
    return { isData: true, end: Math.min(end, Math.max(first + 1, Math.ceil(hole / BLOCK_BYTES))) };
  }

  close(): void {
    for (const fd of this.descriptors.values()) if (fd !== null) fs.closeSync(fd);
    this.descriptors.clear();
  }

  private descriptorOf(layer: LayerRow): number | null {
    const known = this.descriptors.get(layer.id);
    if (known !== undefined) return known;
    const file = this.parts.files.pathOf(layer);
    const isRemote = layer.kind === 'external' && placeOf(file).isRemote;
    let fd: number | null = null;
    try {
      fd = isRemote ? null : fs.openSync(file, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK | (layer.kind === 'store' ? fs.constants.O_NOFOLLOW : 0));
    } catch {
      // In doubt it is data: whoever reads it is told what is wrong.
    }
    this.descriptors.set(layer.id, fd);
    return fd;
  }
}
