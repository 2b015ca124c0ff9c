/**
 * The fill worker: copies un-owned blocks of filling disks in the background, one short step of one disk after another.
 *
 * A thread of its own. Between steps it takes its messages, obeys each disk's command and rate (words in the disk's shared
 * control block, so that a pause holds at the next step), and makes way for guests: when they were active during a step, it
 * rests for as long as the step took. Where a fill stands is not written down: the block map is, and a fill that begins
 * again skips what is owned. A source that may not answer is never waited for here: the main thread is asked for the bytes, the
 * disk rests until they come, and the others go on. Behind each batch that was read from a file outside of the store, that file
 * must still be what it was, or nothing of the batch is kept.
 */
import fs from 'node:fs';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { parentPort, workerData } from 'node:worker_threads';

import { Errno } from '../../blockstore/errors.js';
import { SharedDisk } from '../../blockstore/hot/block-map.js';
import { FETCH, REQUEST_BYTES_MAX, enterDisk, leaveDisk } from '../../blockstore/hot/context.js';
import { IoBuffer, becomeIoFlusher, realDoor } from '../../blockstore/hot/door.js';
import { fillStep, newFillProgress, type FillProgress, type VerifyOrigin } from '../../blockstore/hot/fill-step.js';
import { createThreadContext } from '../../blockstore/hot/thread-context.js';
import { differenceOf, identityOf } from '../../blockstore/sources/identity.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { FILL_RUN, type FillOrder, type FillReport, type FillSource, type FillWorkerData } from './fill-messages.js';

interface Filling {
  readonly disk: SharedDisk;
  readonly progress: FillProgress;
  /** No step before this time, so that the rate holds. */
  notBeforeMs: number;
  /** Bytes were asked for and have not come. */
  waiting: boolean;
  readonly verify: VerifyOrigin;
}

const IDLE_MS = 20;
/** A step ends after this time, or after the largest request's worth of bytes. */
const STEP_MS = 2;
/** What a fill may make up for when it was kept from its rate. */
const CATCH_UP_MS = 100;

const port = parentPort;
if (port === null) throw new Error('the fill worker is started as a thread');
const { boot } = workerData as FillWorkerData;
becomeIoFlusher();
const context = createThreadContext(boot, realDoor, () => { report({ type: 'commit-wanted' }); });
const buffer = new IoBuffer(REQUEST_BYTES_MAX);
const fillings = new Map<number, Filling>();
let wake: (() => void) | null = null;

function report(message: FillReport): void {
  port?.postMessage(message);
}

port.on('message', (order: FillOrder) => {
  if (order.type === 'start') {
    // Of a disk that was rebuilt while it is filled: what was copied before counts.
    const disk = new SharedDisk(order.handles);
    fillings.set(disk.nodeId, { disk, progress: { ...newFillProgress(), copiedBytes: disk.fillCopiedBytes() }, notBeforeMs: 0, waiting: false, verify: verifierOf(disk, order.sources) });
    wake?.();
  } else if (order.type === 'fetched') {
    const filling = fillings.get(order.nodeId);
    if (filling?.disk.serial !== order.serial) return;
    filling.waiting = false;
    if (order.bytes === null) return;
    filling.progress.fetched = Buffer.from(order.bytes.buffer, order.bytes.byteOffset, order.bytes.byteLength);
    filling.progress.fetchedOrigin = order.origin;
    filling.progress.fetchedAtBytes = order.offsetBytes;
  } else {
    fillings.delete(order.nodeId);
  }
});

function verifierOf(disk: SharedDisk, sources: readonly FillSource[]): VerifyOrigin {
  const identities = new Map(sources.map(({ origin, identity }) => [origin, identity]));
  return (origin) => {
    const identity = identities.get(origin);
    const fd = disk.originFd(origin);
    if (identity === undefined || fd < 0) return 0;
    return differenceOf(identity, identityOf(fs.fstatSync(fd, { bigint: true })), 'local') === null ? 0 : -Errno.ESTALE;
  };
}

/** Takes one step of one disk; true when it did something. */
function step(filling: Filling): boolean {
  const { disk, progress } = filling;
  if (filling.waiting || disk.fillCommand() !== FILL_RUN || performance.now() < filling.notBeforeMs) return false;
  const copiedBefore = progress.copiedBytes;
  const deadlineMs = performance.now() + STEP_MS;
  let atEnd = false;
  // Where guests have written here and there, one run is a few blocks: many of them make a step.
  do {
    // A retired disk was rebuilt or closed: the main thread sends its new handles, or an order to forget it.
    if (!enterDisk(context, disk)) return false;
    atEnd = fillStep(context, disk, buffer, progress, filling.verify);
    leaveDisk(context, disk);
  } while (!atEnd && progress.failed === 0 && progress.copiedBytes - copiedBefore < REQUEST_BYTES_MAX && performance.now() < deadlineMs);
  disk.setFillCopiedBytes(progress.copiedBytes);
  disk.setFillCursorBytes(progress.cursorBlock * BLOCK_BYTES);
  const rate = disk.fillRateBytes();
  const copied = progress.copiedBytes - copiedBefore;
  if (rate > 0 && copied > 0) filling.notBeforeMs = Math.max(performance.now() - CATCH_UP_MS, filling.notBeforeMs) + (copied * 1000) / rate;
  if (progress.failed === FETCH) {
    filling.waiting = true;
    progress.fetched = null;
    report({ type: 'fetch', nodeId: disk.nodeId, serial: disk.serial, origin: progress.wantedOrigin, offsetBytes: progress.wantedAtBytes, lengthBytes: progress.wantedBytes });
  } else if (progress.failed === -Errno.ESTALE) {
    // Whether it comes back is the main thread's to find out.
    filling.waiting = true;
    report({ type: 'failed', nodeId: disk.nodeId, serial: disk.serial, errno: Errno.ESTALE, atBytes: progress.failedAtBytes });
  } else if (atEnd || progress.failed < 0) {
    fillings.delete(disk.nodeId);
    if (progress.failed < 0) report({ type: 'failed', nodeId: disk.nodeId, serial: disk.serial, errno: -progress.failed, atBytes: progress.failedAtBytes });
    else report({ type: 'reached-end', nodeId: disk.nodeId, serial: disk.serial });
  }
  return true;
}

/** When the next step of a fill that is held back by its rate is due; far away when there is none. */
function soonestMs(): number {
  let soonest = Number.MAX_SAFE_INTEGER;
  for (const { disk, notBeforeMs } of fillings.values()) if (disk.fillCommand() === FILL_RUN) soonest = Math.min(soonest, notBeforeMs);
  return soonest;
}

async function serve(): Promise<never> {
  for (;;) {
    let worked = false;
    for (const filling of [...fillings.values()]) {
      const guestsBefore = context.shared.requestsOfOthers();
      const startedMs = performance.now();
      if (!step(filling)) continue;
      worked = true;
      const tookMs = performance.now() - startedMs;
      if (context.shared.requestsOfOthers() !== guestsBefore) await sleep(Math.max(1, tookMs));
      else await nextTurn();
    }
    if (fillings.size === 0) {
      await new Promise<void>((resolve) => { wake = resolve; });
      wake = null;
    } else if (!worked) {
      await sleep(Math.max(1, Math.min(IDLE_MS, soonestMs() - performance.now())));
    }
  }
}

await serve();
