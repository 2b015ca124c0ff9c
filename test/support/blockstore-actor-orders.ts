/** What an actor is started with, and how it is told what to do: the shared memory between a test and `blockstore-actor.ts`. */
import type { DiskHandles } from '../../blockstore/hot/block-map.js';
import type { ThreadBoot } from '../../blockstore/hot/thread-context.js';

export interface ActorData {
  readonly boot: ThreadBoot;
  readonly handles: DiskHandles;
  /** The words of `Step`, then eight float64 of the order, then `ANSWER_BYTES` of what was read. */
  readonly memory: SharedArrayBuffer;
  /** Word 0 counts those who came to a block, so that two can write to it at the same moment. */
  readonly meeting: SharedArrayBuffer;
}

export const ORDER_AT = 64;
export const ANSWER_AT = 128;
export const ANSWER_BYTES = 16 * 1024;

/** Word 0: where the actor is. The test sets GO and END, the actor the others. Word 1, not 0: an order without end is to end. */
export const Step = { IDLE: 0, GO: 1, STOPPED: 2, DONE: 3, END: 4 } as const;

/** Float64 words of an order, and of its result. */
export const Order = { KIND: 0, OFFSET: 1, LENGTH: 2, BYTE: 3, STOPS: 4, RESULT: 5, REPEAT: 6, PAUSE_MS: 7 } as const;

/**
 * `READ` keeps what it read when the disk says so; `FILL` is one step of a fill from the block at the offset, `FILL_ALL` all
 * of them. `PARTS` writes the same `LENGTH` bytes of every block, at `OFFSET` in it, together with one other actor; `COUNT` writes
 * 1, 2, 3 … over all whole blocks of the first `LENGTH` bytes until it is told to end.
 */
export const Kind = { WRITE: 0, DISCARD: 1, READ: 2, FILL: 3, FILL_ALL: 4, PARTS: 5, COUNT: 6 } as const;

/** Where the actor stops (or pauses, when PAUSE_MS is not 0), as bits: after what its label says was done, or before it. */
export const Stop = { AFTER_ORIGIN_READ: 1, BEFORE_FIRST_TOUCH: 2, AFTER_FIRST_TOUCH: 4, BEFORE_KEEP: 8, BEFORE_PUNCH: 16, AFTER_ORIGIN_SEEK: 32 } as const;
