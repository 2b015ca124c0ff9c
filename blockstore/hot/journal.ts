/**
 * The first-touch journal: what makes a killed server lose nothing.
 *
 * When a block becomes owned, the guest's data is in the layer's file, but the fact is only in shared memory until the
 * next commit. A guest that was answered relies on it, and lives on when the server is killed. So each thread that
 * moves blocks appends a record to a ring of its own before it publishes the block. The ring is a file on tmpfs, mapped
 * shared: a store into the mapping survives a SIGKILL at the next instruction, and costs about 10 ns, where a pwrite
 * costs 850 ns. After a power loss the ring is gone together with the page cache it vouched for, so it can never be
 * believed wrongly.
 *
 * Layout: a header of 64 bytes (magic and version, capacity, head, store id), then records of 32 bytes:
 *
 *     word 0    sequence number of the record + 1, stored last: a record without it was never acknowledged
 *     word 1    operation: 1 own, 2 size
 *     words 2-3 float64: layer id (own), node id (size)
 *     words 4-5 float64: first block (own), size in bytes (size)
 *     word 6    blocks (own), 0 (size)
 *     word 7    check: a mix of the words 0 to 6
 *
 * `tail` is where the owner appends, `head` is where the first record that is not yet committed lies. Records between
 * them are replayed by the next server; replaying one twice changes nothing.
 */
import { OffshootError } from '../errors.js';
import type { SharedState } from './shared-state.js';

export const JOURNAL_OWN = 1;
export const JOURNAL_SIZE = 2;

export const JOURNAL_CAPACITY = 131072;
const HEADER_BYTES = 64;
const RECORD_BYTES = 32;
export const JOURNAL_FILE_BYTES = HEADER_BYTES + JOURNAL_CAPACITY * RECORD_BYTES;

const MAGIC = 0x4f534a31;
const HEADER_WORDS = HEADER_BYTES / 4;
const RECORD_WORDS = RECORD_BYTES / 4;
const HEADER_MAGIC = 0;
const HEADER_CAPACITY = 1;
const HEADER_HEAD = 2;
const HEADER_STORE = 3;
/** Records that a request may append between two looks at the room: a page of the map whose every other block is a hole, and more. */
const ROOM_FOR_A_REQUEST = 4096;

function mix(words: Int32Array, at: number, sequence: number): number {
  let sum = Math.imul(0x2545f491 ^ sequence, 0x9e3779b1);
  for (let i = 1; i < 7; i += 1) sum = Math.imul(sum ^ (words[at + i]!), 0x9e3779b1) ^ (sum >>> 15);
  return sum | 0;
}

/** One thread's ring, over the memory of its file. */
export class Journal {
  private readonly words: Int32Array;
  private readonly reals: Float64Array;
  private tail: number;

  /** `memory`: the whole mapped file, formatted by `formatJournal`. */
  constructor(memory: ArrayBuffer, tail: number) {
    this.words = new Int32Array(memory);
    this.reals = new Float64Array(memory);
    this.tail = tail;
  }

  /** True when a request can append what it may need without waiting for a commit. */
  hasRoom(shared: SharedState): boolean {
    return ((this.tail - shared.journalHead(shared.thread)) >>> 0) <= JOURNAL_CAPACITY - ROOM_FOR_A_REQUEST;
  }

  /** True when half of the ring waits for a commit. */
  isHalfFull(shared: SharedState): boolean {
    return ((this.tail - shared.journalHead(shared.thread)) >>> 0) > JOURNAL_CAPACITY / 2;
  }

  append(shared: SharedState, operation: number, id: number, value: number, count: number): void {
    // Overwriting a record that is not committed would lose an acknowledged write: better no server than that.
    if (((this.tail - shared.journalHead(shared.thread)) >>> 0) >= JOURNAL_CAPACITY) throw new Error('the journal is full');
    const at = HEADER_WORDS + (this.tail % JOURNAL_CAPACITY) * RECORD_WORDS;
    const words = this.words;
    const sequence = (this.tail + 1) | 0;
    // Not valid while it is being written: the sequence number that stands here belongs to an earlier lap.
    words[at + 1] = operation;
    this.reals[at / 2 + 1] = id;
    this.reals[at / 2 + 2] = value;
    words[at + 6] = count;
    words[at + 7] = mix(words, at, sequence);
    // Atomics keeps the compiler from moving the stores above behind this one; x86 and the kernel keep the order.
    Atomics.store(words, at, sequence);
    this.tail = (this.tail + 1) >>> 0;
    shared.publishJournalTail(this.tail);
  }
}

/** What a record says, as read by the main thread. */
export type JournalVisitor = (operation: number, id: number, value: number, count: number) => void;

/** The main thread's view of some thread's ring. */
export class JournalReader {
  private readonly words: Int32Array;
  private readonly reals: Float64Array;
  private next: number;

  constructor(memory: ArrayBuffer, position: number) {
    this.words = new Int32Array(memory);
    this.reals = new Float64Array(memory);
    this.next = position;
  }

  /** The first record that was not drained yet. */
  position(): number {
    return this.next;
  }

  /** Visits the records up to `tail` that were not visited yet; returns the position reached. */
  drain(tail: number, visit: JournalVisitor): number {
    while (this.next !== tail) {
      const at = HEADER_WORDS + (this.next % JOURNAL_CAPACITY) * RECORD_WORDS;
      visit(
        this.words[at + 1]!,
        this.reals[at / 2 + 1]!,
        this.reals[at / 2 + 2]!,
        this.words[at + 6]!,
      );
      this.next = (this.next + 1) >>> 0;
    }
    return this.next;
  }

  /** Everything before `head` is committed. */
  commit(head: number): void {
    Atomics.store(this.words, HEADER_HEAD, head | 0);
  }
}

/** Writes the header of an empty ring that begins at `position`; `storeId` says which store's blocks it speaks of. */
export function formatJournal(memory: ArrayBuffer, position: number, storeId: number): void {
  const words = new Int32Array(memory);
  words[HEADER_STORE] = storeId | 0;
  words[HEADER_CAPACITY] = JOURNAL_CAPACITY;
  words[HEADER_HEAD] = position | 0;
  Atomics.store(words, HEADER_MAGIC, MAGIC);
}

/** The store that a journal's records belong to. */
export function journalStoreId(memory: ArrayBuffer): number {
  return (new Int32Array(memory)[HEADER_STORE] ?? 0) >>> 0;
}

/**
 * Visits the records that a dead server left uncommitted, oldest first; returns how many there were. A journal of another
 * store (one that was deleted and made anew, or restored, at the same path) is not this one's business. `store-damaged` when
 * the file is not a journal of this version, or was damaged: a record that was never finished is the last one there is, so that what
 * lies behind it is as the lap before left it. Anything else says that acknowledged writes would be dropped without a word.
 */
export function replayJournal(memory: ArrayBuffer, storeId: number, visit: JournalVisitor): number {
  const words = new Int32Array(memory);
  const reals = new Float64Array(memory);
  // A server that died before it finished the header had acknowledged nothing.
  if (words[HEADER_MAGIC] === 0) return 0;
  if (words[HEADER_MAGIC] !== MAGIC || words[HEADER_CAPACITY] !== JOURNAL_CAPACITY) {
    throw damaged('it is not one of this version');
  }
  if (words[HEADER_STORE] !== (storeId | 0)) return 0;
  let position = (words[HEADER_HEAD]!) >>> 0;
  let count = 0;
  while (count < JOURNAL_CAPACITY) {
    if (!isWhole(words, position)) break;
    const at = HEADER_WORDS + (position % JOURNAL_CAPACITY) * RECORD_WORDS;
    visit(words[at + 1]!, reals[at / 2 + 1]!, reals[at / 2 + 2]!, words[at + 6]!);
    position = (position + 1) >>> 0;
    count += 1;
  }
  if (count < JOURNAL_CAPACITY && !isOldBehind(words, position)) throw damaged(`record ${position} of it does not read as it was written`);
  if (count === 0 && !isWhole(words, (position - 1) >>> 0) && holdsAny(words)) throw damaged('what its header says lies behind its records');
  return count;
}

function isWhole(words: Int32Array, position: number): boolean {
  const at = HEADER_WORDS + (position % JOURNAL_CAPACITY) * RECORD_WORDS;
  const sequence = (position + 1) | 0;
  return words[at] === sequence && words[at + 7] === mix(words, at, sequence);
}

/** True when every place but that of `position` holds the record of the lap before it, or nothing yet. */
function isOldBehind(words: Int32Array, position: number): boolean {
  for (let ahead = 1; ahead < JOURNAL_CAPACITY; ahead += 1) {
    if (!isWhole(words, (position + ahead - JOURNAL_CAPACITY) >>> 0) && !isEmpty(words, position + ahead)) return false;
  }
  return true;
}

function isEmpty(words: Int32Array, position: number): boolean {
  const at = HEADER_WORDS + ((position >>> 0) % JOURNAL_CAPACITY) * RECORD_WORDS;
  for (let i = 0; i < RECORD_WORDS; i += 1) if (words[at + i] !== 0) return false;
  return true;
}

function holdsAny(words: Int32Array): boolean {
  for (let place = 0; place < JOURNAL_CAPACITY; place += 1) {
    const sequence = words[HEADER_WORDS + place * RECORD_WORDS]!;
    if (sequence !== 0 && isWhole(words, (sequence - 1) >>> 0)) return true;
  }
  return false;
}

function damaged(how: string): OffshootError {
  return new OffshootError('store-damaged',
    `the first-touch journal in the run-time directory is damaged (${how}): it holds writes that were acknowledged and not committed. ` +
    'Move the files journal-* of that directory away to start without them, and check the file systems of disks that were written to lately');
}
