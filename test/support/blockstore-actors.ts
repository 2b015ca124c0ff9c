/** Actors on a disk, each a thread: the test's side of `blockstore-actor.ts`. */
import { Worker } from 'node:worker_threads';

import type { DiskHandles } from '../../blockstore/hot/block-map.js';
import type { ThreadBoot } from '../../blockstore/hot/thread-context.js';
import { ANSWER_AT, ANSWER_BYTES, ORDER_AT, Order, Step, type ActorData } from './blockstore-actor-orders.js';

export interface ActorOrder {
  readonly kind: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** What a write writes. */
  readonly byte?: number;
  /** Bits of `Stop`. */
  readonly stops?: number;
  readonly repeat?: number;
  /** How long it rests where it would stop; then it goes on by itself. */
  readonly pauseMs?: number;
}

/** How long a step may take. */
const STEP_MS_MAX = 20_000;
const END_MS_MAX = 2000;

export class ActorThread {
  private readonly memory = new SharedArrayBuffer(ANSWER_AT + ANSWER_BYTES);
  private readonly words = new Int32Array(this.memory, 0, 2);
  private readonly orders = new Float64Array(this.memory, ORDER_AT, 8);
  private readonly worker: Worker;
  private failure: unknown = undefined;

  /** `program`: where blockstore-actor.js lies. `meeting`: shared by actors that write their parts of a block at the same moment. */
  constructor(program: string, boot: ThreadBoot, handles: DiskHandles, meeting = new SharedArrayBuffer(8)) {
    const data: ActorData = { boot, handles, memory: this.memory, meeting };
    this.worker = new Worker(program, { workerData: data });
    this.worker.on('error', (error) => { this.failure = error; });
  }

  /** Acts on this disk from its next order on. */
  use(handles: DiskHandles): void {
    this.worker.postMessage(handles);
  }

  /** Gives an order, which does not begin before `goOn`. */
  give(order: ActorOrder): void {
    this.orders[Order.KIND] = order.kind;
    this.orders[Order.OFFSET] = order.offsetBytes;
    this.orders[Order.LENGTH] = order.lengthBytes;
    this.orders[Order.BYTE] = order.byte ?? 0;
    this.orders[Order.STOPS] = order.stops ?? 0;
    this.orders[Order.REPEAT] = order.repeat ?? 1;
    this.orders[Order.PAUSE_MS] = order.pauseMs ?? 0;
  }

  /** Sends the actor on and waits until it has stopped or is done; true when it is done. */
  step(): boolean {
    this.goOn();
    return this.waitUntilStill(STEP_MS_MAX);
  }

  /** Carries an order out from end to end. */
  do(order: ActorOrder): number {
    this.give({ ...order, stops: 0 });
    while (!this.step());
    return this.result;
  }

  goOn(): void {
    Atomics.store(this.words, 0, Step.GO);
    Atomics.notify(this.words, 0);
  }

  /** True when the actor is done, false when it stopped; an error when it is still under way then. */
  waitUntilStill(timeoutMs: number): boolean {
    if (!this.isStillAfter(timeoutMs)) throw new Error('the actor did not come to the end of its step');
    return Atomics.load(this.words, 0) === Step.DONE;
  }

  /** False when the actor is under way for all of the time: it waits for somebody else. */
  isStillAfter(timeoutMs: number): boolean {
    const deadlineMs = performance.now() + timeoutMs;
    while (Atomics.load(this.words, 0) === Step.GO) {
      const leftMs = deadlineMs - performance.now();
      if (leftMs <= 0) return false;
      Atomics.wait(this.words, 0, Step.GO, leftMs);
    }
    return true;
  }

  /** Tells an order without end to end; the actor is done soon after. */
  enough(): void {
    Atomics.store(this.words, 1, 1);
  }

  get result(): number {
    return this.orders[Order.RESULT]!;
  }

  /** The first bytes of what the last read gave. */
  answer(lengthBytes: number): Buffer {
    return Buffer.from(new Uint8Array(this.memory, ANSWER_AT, lengthBytes).slice());
  }

  /** Ends the thread. One that stopped goes on first: inside a disk it would keep the store from closing. */
  async end(): Promise<void> {
    this.orders[Order.STOPS] = 0;
    this.enough();
    if (Atomics.compareExchange(this.words, 0, Step.STOPPED, Step.GO) === Step.STOPPED) Atomics.notify(this.words, 0);
    this.isStillAfter(END_MS_MAX);
    Atomics.store(this.words, 0, Step.END);
    Atomics.notify(this.words, 0);
    await this.worker.terminate();
    if (this.failure !== undefined) throw new Error('the actor failed', { cause: this.failure });
  }
}
