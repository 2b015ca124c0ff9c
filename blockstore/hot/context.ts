/**
 * What a thread needs to move blocks: its view of the shared memory, its journal, its door, its scratch memory; and
 * the gate that every request passes on its way into a disk.
 */
import { Errno } from '../errors.js';
import { BLOCK_BYTES } from '../units.js';
import { STATE_GATE_CLOSED, STATE_RETIRED, type SharedDisk } from './block-map.js';
import { IoBuffer, type Door } from './door.js';
import type { Journal } from './journal.js';
import type { SharedState } from './shared-state.js';

/** Largest request in bytes: what the kernel sends at most, and the step of a fill. */
export const REQUEST_BYTES_MAX = 1024 * 1024;

/** The disk was closed, or must grow, before this thread can serve the request: the main thread is to do it. */
export const HAND_OVER = -100_000;

/**
 * The request needs bytes of an origin that cannot be read directly. Nothing was done that doing it again would not do as well: the main
 * thread fetches them, outside of the gate, and runs the request with them.
 */
export const FETCH = -100_001;

/** Bytes of origins that were fetched for the request at hand. Sealed data never changes, so they stay right. */
export interface FetchedBytes {
  /** Copies exactly this part of the origin's file; false when it is not there. */
  copy(origin: number, offsetBytes: number, lengthBytes: number, target: IoBuffer, targetOffset: number): boolean;
}

export class HotContext {
  readonly shared: SharedState;
  readonly door: Door;
  readonly journal: Journal;
  /** A whole request with a block before and a block behind it, for copy-up. */
  readonly scratch: IoBuffer;
  readonly zeros: IoBuffer;
  /** Asks for a commit, because the journal is filling up; in the main thread, makes one. Cheap to call often. */
  readonly requestCommit: () => void;
  /** Set for one request at a time, by the main thread; null in all others. */
  fetched: FetchedBytes | null = null;

  constructor(options: {
    readonly shared: SharedState;
    readonly door: Door;
    readonly journal: Journal;
    readonly requestCommit: () => void;
  }) {
    this.shared = options.shared;
    this.door = options.door;
    this.journal = options.journal;
    this.requestCommit = options.requestCommit;
    this.scratch = new IoBuffer(REQUEST_BYTES_MAX + 2 * BLOCK_BYTES);
    this.zeros = new IoBuffer(REQUEST_BYTES_MAX);
  }
}

/**
 * Passes the disk's gate, waiting while it is closed. False: the disk was retired, nothing was entered. A request that
 * may append to the journal makes sure of its room first, because the main thread may be waiting for this thread to
 * leave a disk and could not commit meanwhile.
 */
export function enterDisk(context: HotContext, disk: SharedDisk): boolean {
  if (!context.journal.hasRoom(context.shared)) waitForRoom(context);
  for (;;) {
    context.shared.enter(disk.serial);
    const state = disk.state();
    if ((state & (STATE_GATE_CLOSED | STATE_RETIRED)) === 0) return true;
    context.shared.leave(true);
    if ((state & STATE_RETIRED) !== 0) return false;
    disk.waitForState(state);
  }
}

export function leaveDisk(context: HotContext, disk: SharedDisk): void {
  context.shared.leave((disk.state() & STATE_GATE_CLOSED) !== 0);
  if (context.journal.isHalfFull(context.shared)) context.requestCommit();
}

function waitForRoom(context: HotContext): void {
  const { shared, journal } = context;
  const deadlineMs = Date.now() + 120_000;
  while (!journal.hasRoom(shared)) {
    context.requestCommit();
    shared.waitForJournalHead(shared.journalHead(shared.thread), 100);
    if (Date.now() > deadlineMs) throw new Error('the journal was not committed for two minutes');
  }
}

/** Writes all of it; 0 or a negative errno. A short write that makes no progress is EIO. */
export function pwriteAll(context: HotContext, label: string, fd: number, address: number, lengthBytes: number, offsetBytes: number): number {
  let done = 0;
  while (done < lengthBytes) {
    const put = context.door.pwrite(label, fd, address + done, lengthBytes - done, offsetBytes + done);
    if (put < 0) return put;
    if (put === 0) return -Errno.EIO;
    done += put;
  }
  return 0;
}

/** Reads until `lengthBytes` or the end of the file; bytes read or a negative errno. */
export function preadAll(context: HotContext, label: string, fd: number, address: number, lengthBytes: number, offsetBytes: number): number {
  let done = 0;
  while (done < lengthBytes) {
    const got = context.door.pread(label, fd, address + done, lengthBytes - done, offsetBytes + done);
    if (got < 0) return got;
    if (got === 0) break;
    done += got;
  }
  return done;
}
