/**
 * A thread that does what guests and jobs do to a disk, one step at a time: `new Worker(actor.js, { workerData: ActorData })`.
 *
 * Runs the same functions as the I/O workers and the fill worker, over a door that stops where it is told to: there the
 * actor sleeps until it is sent on. So a test decides in which order the steps of several actors happen, although each of
 * them is a thread of its own. Orders come through shared memory (see blockstore-actor-orders.ts), because a thread that sleeps in the
 * middle of a system call takes no messages. What it cannot do it throws, which ends the thread and fails the test. Which disk it acts
 * on may change between two orders: that comes as a message, and is taken before an order is begun.
 */
import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads';

import { SharedDisk, type DiskHandles } from '../../blockstore/hot/block-map.js';
import { REQUEST_BYTES_MAX, enterDisk, leaveDisk, type HotContext } from '../../blockstore/hot/context.js';
import { readDisk, writeDisk } from '../../blockstore/hot/data-path.js';
import { discardDisk } from '../../blockstore/hot/discard.js';
import { IoBuffer, realDoor } from '../../blockstore/hot/door.js';
import { faultDoor, type Fault } from './fault-door.js';
import { fillStep, newFillProgress } from '../../blockstore/hot/fill-step.js';
import { createThreadContext } from '../../blockstore/hot/thread-context.js';
import { ANSWER_AT, ANSWER_BYTES, Kind, ORDER_AT, Order, Step, Stop, type ActorData } from './blockstore-actor-orders.js';

const BEFORE: Readonly<Record<string, number>> = { 'first-touch-write': Stop.BEFORE_FIRST_TOUCH, 'keep-write': Stop.BEFORE_KEEP, punch: Stop.BEFORE_PUNCH };
const AFTER: Readonly<Record<string, number>> = {
  'origin-read': Stop.AFTER_ORIGIN_READ, 'origin-seek': Stop.AFTER_ORIGIN_SEEK, 'first-touch-write': Stop.AFTER_FIRST_TOUCH,
};
const BLOCK_BYTES = 4096;
const WAIT_MS_MAX = 60_000;
const MEETING_SPINS = 20_000;

class Actor {
  private readonly words: Int32Array;
  private readonly order: Float64Array;
  private readonly answer: Uint8Array;
  private readonly meeting: Int32Array;
  private readonly context: HotContext;
  private disk: SharedDisk;
  private readonly buffer = new IoBuffer(REQUEST_BYTES_MAX);

  constructor(data: ActorData) {
    this.words = new Int32Array(data.memory, 0, 2);
    this.order = new Float64Array(data.memory, ORDER_AT, 8);
    this.answer = new Uint8Array(data.memory, ANSWER_AT, ANSWER_BYTES);
    this.meeting = new Int32Array(data.meeting);
    this.disk = new SharedDisk(data.handles);
    const door = faultDoor(realDoor, ({ label }): Fault | undefined => {
      if (this.stopsAt(BEFORE[label])) this.pause();
      return this.stopsAt(AFTER[label]) ? { kind: 'then', run: () => { this.pause(); } } : undefined;
    });
    this.context = createThreadContext(data.boot, door, () => undefined);
  }

  run(): void {
    this.waitFor(Step.IDLE);
    while (this.words[0] !== Step.END) {
      for (let i = 0; i < Math.max(1, this.order[Order.REPEAT]!); i += 1) this.order[Order.RESULT] = this.obey();
      this.stop(Step.DONE);
    }
  }

  private obey(): number {
    this.takeDisk();
    const { disk, order } = this;
    const offsetBytes = order[Order.OFFSET]!;
    const lengthBytes = order[Order.LENGTH]!;
    switch (order[Order.KIND]) {
      case Kind.WRITE: return this.write(offsetBytes, lengthBytes, order[Order.BYTE]!);
      case Kind.DISCARD: return this.inside((context) => discardDisk(context, disk, offsetBytes, lengthBytes));
      case Kind.READ: return this.read(offsetBytes, lengthBytes);
      case Kind.FILL: return this.fill(Math.floor(offsetBytes / BLOCK_BYTES), 1);
      case Kind.FILL_ALL: return this.fill(0, Number.MAX_SAFE_INTEGER);
      case Kind.PARTS: return this.writeParts(offsetBytes, lengthBytes, order[Order.BYTE]!);
      case Kind.COUNT: return this.count(Math.floor(lengthBytes / BLOCK_BYTES));
      default: throw new Error(`there is no order of kind ${order[Order.KIND]}`);
    }
  }

  private takeDisk(): void {
    if (parentPort === null) return;
    for (let news = receiveMessageOnPort(parentPort); news !== undefined; news = receiveMessageOnPort(parentPort)) {
      this.disk = new SharedDisk(news.message as DiskHandles);
    }
  }

  private inside(body: (context: HotContext) => number): number {
    if (!enterDisk(this.context, this.disk)) throw new Error('the disk was retired');
    const result = body(this.context);
    leaveDisk(this.context, this.disk);
    return result;
  }

  private write(offsetBytes: number, lengthBytes: number, byte: number): number {
    this.buffer.bytes.fill(byte, 0, lengthBytes);
    return this.inside((context) => writeDisk(context, this.disk, offsetBytes, lengthBytes, this.buffer, 0));
  }

  private read(offsetBytes: number, lengthBytes: number): number {
    this.buffer.bytes.fill(0xee, 0, lengthBytes);
    const got = this.inside((context) => readDisk(context, this.disk, offsetBytes, lengthBytes, this.buffer, 0));
    this.answer.set(this.buffer.bytes.subarray(0, Math.min(lengthBytes, ANSWER_BYTES)));
    return got;
  }

  private fill(fromBlock: number, stepsMax: number): number {
    const progress = { ...newFillProgress(), cursorBlock: fromBlock };
    this.buffer.bytes.fill(0xee);
    for (let step = 0; step < stepsMax && progress.failed === 0; step += 1) {
      const atEnd = this.inside((context) => (fillStep(context, this.disk, this.buffer, progress) ? 1 : 0));
      if (atEnd === 1) break;
    }
    return progress.failed < 0 ? progress.failed : progress.copiedBytes;
  }

  private writeParts(at: number, lengthBytes: number, byte: number): number {
    const blocks = Math.floor(this.disk.sizeBytes() / BLOCK_BYTES);
    for (let block = 0; block < blocks; block += 1) {
      Atomics.add(this.meeting, 0, 1);
      // Not for ever: on a busy machine the other one may not run at all now.
      for (let spin = 0; spin < MEETING_SPINS && Atomics.load(this.meeting, 0) < 2 * (block + 1); spin += 1);
      const result = this.write(block * BLOCK_BYTES + at, lengthBytes, byte);
      if (result < 0) return result;
    }
    return blocks;
  }

  private count(blocks: number): number {
    const counter = new Float64Array(this.buffer.bytes.buffer, this.buffer.bytes.byteOffset, BLOCK_BYTES / 8);
    for (let value = 1; ; value += 1) {
      counter.fill(value);
      for (let block = 0; block < blocks; block += 1) {
        const result = this.inside((context) => writeDisk(context, this.disk, block * BLOCK_BYTES, BLOCK_BYTES, this.buffer, 0));
        if (result < 0) return result;
        if (Atomics.load(this.words, 1) !== 0) return value;
      }
    }
  }

  private stopsAt(stop: number | undefined): boolean {
    return stop !== undefined && (this.order[Order.STOPS]! & stop) !== 0;
  }

  private pause(): void {
    const pauseMs = this.order[Order.PAUSE_MS]!;
    if (pauseMs > 0) Atomics.wait(this.words, 0, Step.GO, pauseMs);
    else this.stop(Step.STOPPED);
  }

  private stop(state: number): void {
    Atomics.store(this.words, 0, state);
    Atomics.notify(this.words, 0);
    this.waitFor(state);
  }

  private waitFor(state: number): void {
    if (Atomics.wait(this.words, 0, state, WAIT_MS_MAX) === 'timed-out') throw new Error('nobody sent the actor on');
  }
}

new Actor(workerData as ActorData).run();
