/**
 * Memory shared by all threads of the server that is not about one disk: who is in which disk, the claims on blocks,
 * the arena of block map pages, journal positions.
 *
 * Made by the main thread, handed to each worker as it starts. Every word has a name and is touched only through
 * Atomics. A thread that dies while it holds a lock takes the whole process with it (the server is crash-only), so no
 * lock is ever held by the dead.
 */

/** Threads that may touch blocks: the main thread is 0. */
export const THREADS_MAX = 64;
/** One cache line a thread, so that two threads never write to the same one. */
const LINE_WORDS = 16;

/** Words of the first cache lines. */
const WORD_ARENA_NEXT = 0;
const WORD_ARENA_LOCK = 1;
const WORD_ARENA_FREE_COUNT = 2;
/** Bumped by the main thread whenever a message waits in the workers' ports. */
const WORD_GENERATION = 16;
/** 1 while only the space kept back for metadata is left. */
const WORD_STORE_FULL = 17;

const THREAD_BASE = 32;
/** Serial of the disk whose gate the thread has passed, 0 outside. */
const THREAD_BUSY = 0;
/** Counts requests; the arena's grace period looks at it. */
const THREAD_SEQUENCE = 1;
/** Journal records appended and journal records that may be overwritten again; both wrap at 2^32. */
const THREAD_TAIL = 2;
const THREAD_HEAD = 3;
/** Containers with a limit; their room, a cache line each. Slot 0 stands for no limit. */
export const QUOTAS_MAX = 256;
const ROOM_BASE = THREAD_BASE + THREADS_MAX * LINE_WORDS;
/** Blocks that may still be allocated, and requests that were refused for want of them (wraps). */
const ROOM_BLOCKS = 0;
const ROOM_REFUSALS = 1;
const CONTROL_WORDS = ROOM_BASE + (QUOTAS_MAX + 1) * LINE_WORDS;

/** Blocks that share one claim: 64 KiB. Claims of neighbouring units are neighbours in the table. */
export const CLAIM_BLOCKS = 16;
const CLAIM_WORDS = 8192;

/** Block map pages a chunk of the arena: 16,384 pages of 2,048 two-byte entries, 64 MiB of address space. */
const CHUNK_PAGES = 16384;
const PAGE_ENTRIES = 2048;
/**
 * At most so many chunks: 4 GiB of address space, enough for 8 TiB of disk in pages that are neither wholly owned nor
 * untouched. Fewer where there is less memory, because a fork (to run qemu-img) is refused when it might need more than there is.
 */
const CHUNKS_MAX = 64;
const CHUNKS_MIN = 4;
const CHUNK_BYTES = CHUNK_PAGES * PAGE_ENTRIES * 2;

/** What is handed to a worker. Memory that nobody touched takes no room. */
export interface SharedStateHandles {
  readonly control: SharedArrayBuffer;
  readonly claims: SharedArrayBuffer;
  readonly freeList: SharedArrayBuffer;
  readonly chunks: readonly SharedArrayBuffer[];
}

/** Chunks for a machine with this much memory: an eighth of it at most. */
export function chunksFor(memoryBytes: number): number {
  return Math.min(CHUNKS_MAX, Math.max(CHUNKS_MIN, Math.floor(memoryBytes / 8 / CHUNK_BYTES)));
}

export function createSharedState(chunks: number): SharedStateHandles {
  return {
    control: new SharedArrayBuffer(CONTROL_WORDS * 4),
    claims: new SharedArrayBuffer(CLAIM_WORDS * 4),
    freeList: new SharedArrayBuffer(chunks * CHUNK_PAGES * 4),
    chunks: Array.from({ length: chunks }, () => new SharedArrayBuffer(CHUNK_BYTES)),
  };
}

/** A mutex in one word: 0 free, 1 held, 2 held and waited for (Drepper, "Futexes Are Tricky"). */
function lockWord(words: Int32Array, index: number): void {
  for (let spin = 0; spin < 60; spin += 1) {
    if (Atomics.compareExchange(words, index, 0, 1) === 0) return;
  }
  while (Atomics.exchange(words, index, 2) !== 0) {
    if (Atomics.wait(words, index, 2, 60_000) === 'timed-out') throw new Error(`a lock was held for a minute (word ${index})`);
  }
}

function unlockWord(words: Int32Array, index: number): void {
  if (Atomics.exchange(words, index, 0) === 2) Atomics.notify(words, index, 1);
}

/** One thread's view of the shared memory. */
export class SharedState {
  readonly handles: SharedStateHandles;
  readonly thread: number;
  readonly control: Int32Array<SharedArrayBuffer>;
  readonly chunks: readonly Uint16Array<SharedArrayBuffer>[];
  private readonly claims: Int32Array<SharedArrayBuffer>;
  private readonly freeList: Int32Array<SharedArrayBuffer>;
  private readonly line: number;

  constructor(handles: SharedStateHandles, thread: number) {
    this.handles = handles;
    this.thread = thread;
    this.control = new Int32Array(handles.control);
    this.claims = new Int32Array(handles.claims);
    this.freeList = new Int32Array(handles.freeList);
    this.chunks = handles.chunks.map((chunk) => new Uint16Array(chunk));
    this.line = THREAD_BASE + thread * LINE_WORDS;
  }

  /** Says that this thread is about to use the disk; the caller must look at the disk's gate after this. */
  enter(serial: number): void {
    Atomics.add(this.control, this.line + THREAD_SEQUENCE, 1);
    Atomics.store(this.control, this.line + THREAD_BUSY, serial);
  }

  /** Says that this thread is done with the disk. `someoneWaits`: the gate was seen closed. */
  leave(someoneWaits: boolean): void {
    Atomics.store(this.control, this.line + THREAD_BUSY, 0);
    if (someoneWaits) Atomics.notify(this.control, this.line + THREAD_BUSY);
  }

  /** Waits until no other thread is inside the disk, whose gate must be closed already; false when that takes too long. */
  waitUntilNobodyIn(serial: number, timeoutMs: number): boolean {
    const deadlineMs = performance.now() + timeoutMs;
    for (let thread = 0; thread < THREADS_MAX; thread += 1) {
      const word = THREAD_BASE + thread * LINE_WORDS + THREAD_BUSY;
      while (Atomics.load(this.control, word) === serial) {
        // The time-out covers a thread that left between our look and its look at the gate.
        Atomics.wait(this.control, word, serial, 1);
        if (performance.now() > deadlineMs) return false;
      }
    }
    return true;
  }

  /** What every thread is doing now: the start of a grace period. */
  sequences(): Int32Array {
    const seen = new Int32Array(THREADS_MAX * 2);
    for (let thread = 0; thread < THREADS_MAX; thread += 1) {
      seen[thread * 2] = Atomics.load(this.control, THREAD_BASE + thread * LINE_WORDS + THREAD_BUSY);
      seen[thread * 2 + 1] = Atomics.load(this.control, THREAD_BASE + thread * LINE_WORDS + THREAD_SEQUENCE);
    }
    return seen;
  }

  /** True when every thread that was inside some disk at `seen` has left it since. */
  gracePeriodOver(seen: Int32Array): boolean {
    for (let thread = 0; thread < THREADS_MAX; thread += 1) {
      if (seen[thread * 2] === 0) continue;
      const base = THREAD_BASE + thread * LINE_WORDS;
      const busy = Atomics.load(this.control, base + THREAD_BUSY);
      if (busy !== 0 && Atomics.load(this.control, base + THREAD_SEQUENCE) === seen[thread * 2 + 1]) return false;
    }
    return true;
  }

  /** A number that changes with every request that another thread serves. */
  requestsOfOthers(): number {
    let sum = 0;
    for (let thread = 0; thread < THREADS_MAX; thread += 1) {
      if (thread !== this.thread) sum += Atomics.load(this.control, THREAD_BASE + thread * LINE_WORDS + THREAD_SEQUENCE);
    }
    return sum;
  }

  /** True while nothing new may be allocated in the store: see space-reserve.ts. */
  isStoreFull(): boolean {
    return Atomics.load(this.control, WORD_STORE_FULL) !== 0;
  }

  setStoreFull(isFull: boolean): void {
    Atomics.store(this.control, WORD_STORE_FULL, isFull ? 1 : 0);
  }

  /** Blocks that the container of this slot has room for: see quotas.ts. */
  room(slot: number): number {
    return Atomics.load(this.control, ROOM_BASE + slot * LINE_WORDS + ROOM_BLOCKS);
  }

  /** Adds, so that what other threads take meanwhile stays taken. */
  addRoom(slot: number, blocks: number): void {
    Atomics.add(this.control, ROOM_BASE + slot * LINE_WORDS + ROOM_BLOCKS, blocks);
  }

  /** Takes room for blocks that are about to be allocated; false, and nothing taken, when there is not enough. */
  takeRoom(slot: number, blocks: number): boolean {
    const word = ROOM_BASE + slot * LINE_WORDS;
    if (Atomics.sub(this.control, word + ROOM_BLOCKS, blocks) >= blocks) return true;
    Atomics.add(this.control, word + ROOM_BLOCKS, blocks);
    Atomics.add(this.control, word + ROOM_REFUSALS, 1);
    return false;
  }

  /** A number that changes with every refusal. */
  roomRefusals(slot: number): number {
    return Atomics.load(this.control, ROOM_BASE + slot * LINE_WORDS + ROOM_REFUSALS);
  }

  generation(): number {
    return Atomics.load(this.control, WORD_GENERATION);
  }

  bumpGeneration(): void {
    Atomics.add(this.control, WORD_GENERATION, 1);
  }

  journalTail(thread: number): number {
    return Atomics.load(this.control, THREAD_BASE + thread * LINE_WORDS + THREAD_TAIL) >>> 0;
  }

  journalHead(thread: number): number {
    return Atomics.load(this.control, THREAD_BASE + thread * LINE_WORDS + THREAD_HEAD) >>> 0;
  }

  publishJournalTail(tail: number): void {
    Atomics.store(this.control, this.line + THREAD_TAIL, tail | 0);
  }

  publishJournalHead(thread: number, head: number): void {
    const word = THREAD_BASE + thread * LINE_WORDS + THREAD_HEAD;
    Atomics.store(this.control, word, head | 0);
    Atomics.notify(this.control, word);
  }

  /** Sleeps until the main thread has moved this thread's journal head on from `head`, or `timeoutMs` has passed. */
  waitForJournalHead(head: number, timeoutMs: number): void {
    Atomics.wait(this.control, this.line + THREAD_HEAD, head | 0, timeoutMs);
  }

  /**
   * Claims the blocks `first` to `last` of a disk for this thread, in an order that all threads share. A claim is on
   * units of 64 KiB and may cover other disks' blocks by chance, which costs waiting and nothing else.
   */
  claim(serial: number, first: number, last: number): void {
    const base = (serial * 1571) % CLAIM_WORDS;
    const from = (base + Math.floor(first / CLAIM_BLOCKS)) % CLAIM_WORDS;
    const units = Math.floor(last / CLAIM_BLOCKS) - Math.floor(first / CLAIM_BLOCKS) + 1;
    if (units > CLAIM_WORDS) throw new Error(`a claim of ${units} units is longer than the table`);
    const to = from + units;
    // Ascending in the table, not on the disk: a claim that wraps takes its tail first.
    for (let word = 0; word < to - CLAIM_WORDS; word += 1) lockWord(this.claims, word);
    for (let word = from; word < Math.min(to, CLAIM_WORDS); word += 1) lockWord(this.claims, word);
  }

  release(serial: number, first: number, last: number): void {
    const base = (serial * 1571) % CLAIM_WORDS;
    const from = (base + Math.floor(first / CLAIM_BLOCKS)) % CLAIM_WORDS;
    const to = from + Math.floor(last / CLAIM_BLOCKS) - Math.floor(first / CLAIM_BLOCKS) + 1;
    for (let word = from; word < Math.min(to, CLAIM_WORDS); word += 1) unlockWord(this.claims, word);
    for (let word = 0; word < to - CLAIM_WORDS; word += 1) unlockWord(this.claims, word);
  }

  /** A page of the arena with every entry set to `value`; -1 when there is none left. */
  allocatePage(value: number): number {
    let page = -1;
    if (Atomics.load(this.control, WORD_ARENA_FREE_COUNT) > 0) {
      lockWord(this.control, WORD_ARENA_LOCK);
      const count = Atomics.load(this.control, WORD_ARENA_FREE_COUNT);
      if (count > 0) {
        page = Atomics.load(this.freeList, count - 1);
        Atomics.store(this.control, WORD_ARENA_FREE_COUNT, count - 1);
      }
      unlockWord(this.control, WORD_ARENA_LOCK);
    }
    if (page < 0) {
      page = Atomics.add(this.control, WORD_ARENA_NEXT, 1);
      if (page >= this.chunks.length * CHUNK_PAGES) {
        Atomics.sub(this.control, WORD_ARENA_NEXT, 1);
        return -1;
      }
    }
    const chunk = this.chunks[Math.floor(page / CHUNK_PAGES)];
    if (chunk === undefined) throw new Error(`page ${page} lies outside the arena`);
    const start = (page % CHUNK_PAGES) * PAGE_ENTRIES;
    chunk.fill(value, start, start + PAGE_ENTRIES);
    return page;
  }

  /** Gives a page back. Nobody may still be looking at it: see `gracePeriodOver`. */
  freePage(page: number): void {
    lockWord(this.control, WORD_ARENA_LOCK);
    const count = Atomics.load(this.control, WORD_ARENA_FREE_COUNT);
    Atomics.store(this.freeList, count, page);
    Atomics.store(this.control, WORD_ARENA_FREE_COUNT, count + 1);
    unlockWord(this.control, WORD_ARENA_LOCK);
  }

  /** Pages of the arena in use. */
  pagesInUse(): number {
    return Atomics.load(this.control, WORD_ARENA_NEXT) - Atomics.load(this.control, WORD_ARENA_FREE_COUNT);
  }
}
