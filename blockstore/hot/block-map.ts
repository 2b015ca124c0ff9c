/**
 * The block map of one open disk, in shared memory: for each 4 KiB block, which origin holds it.
 *
 * An *origin* is a data file seen through this disk: origin 0 reads as zeros, the others are layers of the backing
 * chain, and one of them is the active layer, the only one that is written. A block is *owned* when its origin is the
 * active layer. A *delta* other than 0 says that the blocks of an origin lie elsewhere in its file than on the disk: extents
 * that are shared with other places, one origin for each layer and delta. The map is two levels deep: a directory of one word a page (2,048 blocks), which says "all blocks of
 * this page have origin N" or names a page of two-byte entries in the arena. An untouched directory word means the
 * default origin, so a clone that owns nothing takes no memory, however large it is.
 *
 * Sealing a layer only changes which origin is active: entries keep their meaning. This file alone touches the shared
 * map, through Atomics, and is the only one of the data path that may shift bits (page numbers, all below 2^31).
 */
import { BLOCK_BYTES, PAGE_BLOCKS, pagesFor } from '../units.js';
import type { SharedState } from './shared-state.js';

/** What a thread needs to use a disk; posted to workers when the disk is opened, grown or given another origin table. */
export interface DiskHandles {
  readonly nodeId: number;
  readonly serial: number;
  readonly control: SharedArrayBuffer;
  readonly directory: SharedArrayBuffer;
}

/** Origins a disk can have while it is open: its chain and its shared extents when it was opened, and one for each seal since. */
const ORIGINS_MIN = 1024;
/** Map entries are two bytes. */
export const ORIGINS_MAX = 65_534;

/** Int32 words of the control block. */
const WORD_STATE = 0;
const WORD_ACTIVE = 1;
const WORD_DEFAULT = 2;
const WORD_FLAGS = 3;
const WORD_ORIGIN_COUNT = 4;
const WORD_FILL = 5;
const WORD_QUOTA = 6;
const WORD_ORIGIN_FD = 64;

/** Float64 words, behind the Int32 words. */
const REAL_SIZE = 0;
const REAL_MTIME = 1;
const REAL_LAYER = 2;
const REAL_FILL_RATE = 3;
const REAL_FILL_COPIED = 4;
const REAL_FILL_CURSOR = 5;
/** One limit for each origin, and behind them one delta for each. */
const REAL_ORIGIN_LIMIT = 16;
const CONTROL_FIXED_BYTES = WORD_ORIGIN_FD * 4 + REAL_ORIGIN_LIMIT * 8;
const CONTROL_ORIGIN_BYTES = 4 + 2 * 8;

export const STATE_GATE_CLOSED = 1;
export const STATE_FAULTED = 2;
/** The disk was closed: a thread that meets this drops its view and asks the main thread. */
export const STATE_RETIRED = 4;

/** Reads keep what they had to fetch. */
export const FLAG_COPY_ON_READ = 1;
/** The active layer owns every block, whatever the map says: no backing is ever consulted. */
export const FLAG_COMPLETE = 2;
/** A write past the end makes the file longer (ordinary files); otherwise the size is fixed (disks). */
export const FLAG_GROWABLE = 4;

export const ORIGIN_ZERO = 0;

const CHUNK_PAGE_BITS = 14;
const CHUNK_PAGE_MASK = (1 << CHUNK_PAGE_BITS) - 1;
const PAGE_ENTRY_BITS = 11;
/** Words of 32 bits that say something of each block of a page. */
const PAGE_WORDS = PAGE_BLOCKS / 32;

/** `originsMin`: origins that there must be room for. */
export function createDiskHandles(nodeId: number, serial: number, capacityBytes: number, originsMin = 0): DiskHandles {
  // An even number, so that the words of eight bytes are aligned.
  const origins = Math.min(ORIGINS_MAX, 2 * Math.ceil(Math.max(ORIGINS_MIN, originsMin) / 2));
  return {
    nodeId,
    serial,
    control: new SharedArrayBuffer(CONTROL_FIXED_BYTES + origins * CONTROL_ORIGIN_BYTES),
    directory: new SharedArrayBuffer(Math.max(1, pagesFor(capacityBytes)) * 4),
  };
}

export class SharedDisk {
  readonly handles: DiskHandles;
  readonly nodeId: number;
  readonly serial: number;
  /** Blocks that the directory can describe; those behind it have the default origin. */
  readonly capacityBlocks: number;
  /** Origins that there is room for. */
  readonly originsMax: number;
  private readonly deltaBase: number;
  private readonly words: Int32Array<SharedArrayBuffer>;
  private readonly reals: Float64Array<SharedArrayBuffer>;
  private readonly directory: Int32Array<SharedArrayBuffer>;

  constructor(handles: DiskHandles) {
    this.handles = handles;
    this.nodeId = handles.nodeId;
    this.serial = handles.serial;
    this.originsMax = (handles.control.byteLength - CONTROL_FIXED_BYTES) / CONTROL_ORIGIN_BYTES;
    this.deltaBase = REAL_ORIGIN_LIMIT + this.originsMax;
    this.words = new Int32Array(handles.control, 0, WORD_ORIGIN_FD + this.originsMax);
    // Aligned eight-byte loads and stores are single instructions on the 64-bit machines this runs on.
    this.reals = new Float64Array(handles.control, (WORD_ORIGIN_FD + this.originsMax) * 4, this.deltaBase + this.originsMax);
    this.directory = new Int32Array(handles.directory);
    this.capacityBlocks = this.directory.length * PAGE_BLOCKS;
  }

  state(): number { return Atomics.load(this.words, WORD_STATE); }
  setState(bits: number): void { Atomics.or(this.words, WORD_STATE, bits); }
  clearState(bits: number): void {
    Atomics.and(this.words, WORD_STATE, ~bits);
    Atomics.notify(this.words, WORD_STATE);
  }
  /** Sleeps while the state is `state`, a second at most. */
  waitForState(state: number): void { Atomics.wait(this.words, WORD_STATE, state, 1000); }

  flags(): number { return Atomics.load(this.words, WORD_FLAGS); }
  setFlags(flags: number): void { Atomics.store(this.words, WORD_FLAGS, flags); }
  activeOrigin(): number { return Atomics.load(this.words, WORD_ACTIVE); }
  setActiveOrigin(origin: number): void { Atomics.store(this.words, WORD_ACTIVE, origin); }
  defaultOrigin(): number { return Atomics.load(this.words, WORD_DEFAULT); }
  setDefaultOrigin(origin: number): void { Atomics.store(this.words, WORD_DEFAULT, origin); }

  /** Below zero: the origin cannot be read directly by a thread that serves requests; its bytes must be fetched (`FETCH`). */
  originFd(origin: number): number { return Atomics.load(this.words, WORD_ORIGIN_FD + origin); }
  /** Where on this disk the origin ends that may be seen; behind it lie zeros. */
  originLimitBytes(origin: number): number { return this.reals[REAL_ORIGIN_LIMIT + origin]!; }
  setOriginLimitBytes(origin: number, limitBytes: number): void { this.reals[REAL_ORIGIN_LIMIT + origin] = limitBytes; }
  /** What must be added to an offset on this disk to have the one in the origin's file; whole blocks, perhaps below zero. */
  originDeltaBytes(origin: number): number { return this.reals[this.deltaBase + origin]!; }
  originCount(): number { return Atomics.load(this.words, WORD_ORIGIN_COUNT); }
  setOrigin(origin: number, fd: number, limitBytes: number, deltaBytes = 0): void {
    Atomics.store(this.words, WORD_ORIGIN_FD + origin, fd);
    this.reals[REAL_ORIGIN_LIMIT + origin] = limitBytes;
    this.reals[this.deltaBase + origin] = deltaBytes;
    if (origin >= this.originCount()) Atomics.store(this.words, WORD_ORIGIN_COUNT, origin + 1);
  }

  /** The same origin, by another descriptor. */
  setOriginFd(origin: number, fd: number): void { Atomics.store(this.words, WORD_ORIGIN_FD + origin, fd); }

  sizeBytes(): number { return this.reals[REAL_SIZE]!; }
  setSizeBytes(sizeBytes: number): void { this.reals[REAL_SIZE] = sizeBytes; }
  mtimeMs(): number { return this.reals[REAL_MTIME]!; }
  setMtimeMs(mtimeMs: number): void { this.reals[REAL_MTIME] = mtimeMs; }
  /** Id of the active layer, for journal records. */
  layerId(): number { return this.reals[REAL_LAYER]!; }
  setLayerId(layerId: number): void { this.reals[REAL_LAYER] = layerId; }

  /** Slot of the limit that the disk's container has, 0: none. */
  quotaSlot(): number { return Atomics.load(this.words, WORD_QUOTA); }
  setQuotaSlot(slot: number): void { Atomics.store(this.words, WORD_QUOTA, slot); }

  /** What the fill worker is to do with this disk: see `daemon/jobs/fill-messages.ts`. */
  fillCommand(): number { return Atomics.load(this.words, WORD_FILL); }
  setFillCommand(command: number): void { Atomics.store(this.words, WORD_FILL, command); }
  fillRateBytes(): number { return this.reals[REAL_FILL_RATE]!; }
  setFillRateBytes(rate: number): void { this.reals[REAL_FILL_RATE] = rate; }
  fillCopiedBytes(): number { return this.reals[REAL_FILL_COPIED]!; }
  setFillCopiedBytes(bytes: number): void { this.reals[REAL_FILL_COPIED] = bytes; }
  fillCursorBytes(): number { return this.reals[REAL_FILL_CURSOR]!; }
  setFillCursorBytes(bytes: number): void { this.reals[REAL_FILL_CURSOR] = bytes; }

  /** The origin that holds `block`. */
  originOf(shared: SharedState, block: number): number {
    const page = Math.floor(block / PAGE_BLOCKS);
    if (page >= this.directory.length) return this.defaultOrigin();
    const word = Atomics.load(this.directory, page);
    if (word >= 0) return word === 0 ? this.defaultOrigin() : word - 1;
    const arenaPage = ~word;
    const chunk = shared.chunks[arenaPage >> CHUNK_PAGE_BITS]!;
    return Atomics.load(chunk, ((arenaPage & CHUNK_PAGE_MASK) << PAGE_ENTRY_BITS) + (block - page * PAGE_BLOCKS));
  }

  /** The first block after `block`, at most `limitBlock`, that has another origin than `origin`. */
  runEnd(shared: SharedState, block: number, limitBlock: number, origin: number): number {
    let at = block;
    while (at < limitBlock) {
      const page = Math.floor(at / PAGE_BLOCKS);
      if (page >= this.directory.length) return this.defaultOrigin() === origin ? limitBlock : at;
      const pageEnd = Math.min(limitBlock, (page + 1) * PAGE_BLOCKS);
      const word = Atomics.load(this.directory, page);
      if (word >= 0) {
        if ((word === 0 ? this.defaultOrigin() : word - 1) !== origin) return at;
        at = pageEnd;
        continue;
      }
      const arenaPage = ~word;
      const chunk = shared.chunks[arenaPage >> CHUNK_PAGE_BITS]!;
      const base = ((arenaPage & CHUNK_PAGE_MASK) << PAGE_ENTRY_BITS) - page * PAGE_BLOCKS;
      while (at < pageEnd) {
        if (Atomics.load(chunk, base + at) !== origin) return at;
        at += 1;
      }
    }
    return limitBlock;
  }

  /** True when every block from `first` to `last` has this origin. */
  isUniform(shared: SharedState, first: number, last: number, origin: number): boolean {
    return this.runEnd(shared, first, last + 1, origin) > last;
  }

  /**
   * Gives the blocks `first` to `last` to `origin`. Claims on them are held by the caller (or nobody else sees the disk
   * yet). Pages needed are taken from the arena; false when it has none left, and then nothing was changed for the
   * blocks from the failing page on.
   */
  publish(shared: SharedState, first: number, last: number, origin: number): boolean {
    let at = first;
    while (at <= last) {
      const page = Math.floor(at / PAGE_BLOCKS);
      if (page >= this.directory.length) throw new Error(`block ${at} of node ${this.nodeId} lies behind its map`);
      const pageFirst = page * PAGE_BLOCKS;
      const end = Math.min(last + 1, pageFirst + PAGE_BLOCKS);
      if (at === pageFirst && end === pageFirst + PAGE_BLOCKS && this.publishWholePage(page, origin)) {
        at = end;
        continue;
      }
      const arenaPage = this.materialise(shared, page);
      if (arenaPage < 0) return false;
      const chunk = shared.chunks[arenaPage >> CHUNK_PAGE_BITS]!;
      const base = ((arenaPage & CHUNK_PAGE_MASK) << PAGE_ENTRY_BITS) - pageFirst;
      for (; at < end; at += 1) Atomics.store(chunk, base + at, origin);
    }
    return true;
  }

  /**
   * Gives those blocks of a page to `origin` whose bits are set in the words from `firstWord` on, the lowest bit of the first word being the
   * first block: as ownership is stored. For a disk that nobody else sees yet. False when the arena has no page left. A page behind the map is nobody's.
   */
  publishBits(shared: SharedState, page: number, words: Int32Array, firstWord: number, origin: number): boolean {
    if (page >= this.directory.length) return true;
    const arenaPage = this.materialise(shared, page);
    if (arenaPage < 0) return false;
    const chunk = shared.chunks[arenaPage >> CHUNK_PAGE_BITS]!;
    let base = (arenaPage & CHUNK_PAGE_MASK) << PAGE_ENTRY_BITS;
    for (let index = firstWord; index < firstWord + PAGE_WORDS; index += 1, base += 32) {
      // From one set bit to the next: most pages of a deep chain have few bits of each layer.
      for (let rest = words[index]!; rest !== 0; rest &= rest - 1) Atomics.store(chunk, base + 31 - Math.clz32(rest & -rest), origin);
    }
    return true;
  }

  /** A page that has no entries of its own needs none when all its blocks get one origin. */
  private publishWholePage(page: number, origin: number): boolean {
    const word = Atomics.load(this.directory, page);
    return word >= 0 && Atomics.compareExchange(this.directory, page, word, origin + 1) === word;
  }

  /** The arena page behind a directory word, made from its uniform value when there is none; -1: the arena is full. */
  private materialise(shared: SharedState, page: number): number {
    for (;;) {
      const word = Atomics.load(this.directory, page);
      if (word < 0) return ~word;
      const fresh = shared.allocatePage(word === 0 ? this.defaultOrigin() : word - 1);
      if (fresh < 0) return -1;
      const seen = Atomics.compareExchange(this.directory, page, word, ~fresh);
      if (seen === word) return fresh;
      // Nobody has seen the fresh page, so it needs no grace period.
      shared.freePage(fresh);
    }
  }

  /** Forgets the whole map (the default origin holds everything again); returns the arena pages it had. */
  clear(): number[] {
    const pages: number[] = [];
    for (let page = 0; page < this.directory.length; page += 1) {
      if (Atomics.load(this.directory, page) === 0) continue;
      const word = Atomics.exchange(this.directory, page, 0);
      if (word < 0) pages.push(~word);
    }
    return pages;
  }

  /** Copies the directory of a smaller map into this one, which nobody else sees yet. */
  adoptDirectory(smaller: SharedDisk): void {
    this.directory.set(smaller.directory.subarray(0, Math.min(smaller.directory.length, this.directory.length)));
  }

  /** Blocks of the disk whose origin is `origin`, counted up to `endBlock`. */
  countBlocks(shared: SharedState, endBlock: number, origin: number): number {
    const defaultOrigin = this.defaultOrigin();
    const mapEnd = Math.min(endBlock, this.capacityBlocks);
    let count = defaultOrigin === origin ? endBlock - mapEnd : 0;
    for (let page = 0, first = 0; first < mapEnd; page += 1, first += PAGE_BLOCKS) {
      const blocks = Math.min(PAGE_BLOCKS, mapEnd - first);
      const word = Atomics.load(this.directory, page);
      if (word >= 0) {
        if ((word === 0 ? defaultOrigin : word - 1) === origin) count += blocks;
        continue;
      }
      const arenaPage = ~word;
      const chunk = shared.chunks[arenaPage >> CHUNK_PAGE_BITS]!;
      const base = (arenaPage & CHUNK_PAGE_MASK) << PAGE_ENTRY_BITS;
      for (let entry = base; entry < base + blocks; entry += 1) {
        if (Atomics.load(chunk, entry) === origin) count += 1;
      }
    }
    return count;
  }
}

/** Bytes of `block` that lie within a disk of `sizeBytes`; the last block may be partial. */
export function blockBytesWithin(block: number, sizeBytes: number): number {
  return Math.min(BLOCK_BYTES, sizeBytes - block * BLOCK_BYTES);
}
