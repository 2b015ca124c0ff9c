/**
 * The data path for the main thread: transports without I/O workers, requests that a worker handed on, jobs.
 *
 * The same functions as in the workers, and what only the main thread can do: give a map room to grow, and empty the main
 * thread's own journal, for which nobody else could wait. A request that needs a source which may not answer at once comes back as a
 * promise (`…OrLater`), and holds nothing while it waits; `sources/fetched.ts` says how. At its limit it fails, and alone.
 */
import { Errno, OffshootError } from './errors.js';
import type { SharedDisk } from './hot/block-map.js';
import { FETCH, HAND_OVER, REQUEST_BYTES_MAX, enterDisk, leaveDisk, type HotContext } from './hot/context.js';
import { readDisk, writeDisk } from './hot/data-path.js';
import { discardDisk } from './hot/discard.js';
import { IoBuffer } from './hot/door.js';
import { seekDisk } from './hot/seek.js';
import type { OpenDisk, OpenDisks } from './open-disks.js';
import { Fetched, missingForRead, missingForWrite, sourceErrorOf, type Missing } from './sources/fetched.js';

/** Which parts of sources a request still needs. */
type Plan = (disk: OpenDisk, fetched: Fetched) => Missing[];

/** A request whose needs change each time that they are met is one that runs against constant rebuilding of its disk. */
const FETCHES_MAX = 64;

export class MainDataPath {
  private readonly context: HotContext;
  private readonly disks: OpenDisks;
  private readonly sourceTimeoutMs: number;
  private readonly buffer = new IoBuffer(REQUEST_BYTES_MAX);

  constructor(context: HotContext, disks: OpenDisks, sourceTimeoutMs: number) {
    this.context = context;
    this.disks = disks;
    this.sourceTimeoutMs = sourceTimeoutMs;
  }

  /** Bytes read, fewer than asked for only at the end of the disk. Fails where a source would have to be waited for. */
  read(nodeId: number, offsetBytes: number, target: Uint8Array): number {
    const got = this.readOrLater(nodeId, offsetBytes, target, false);
    if (typeof got !== 'number') throw new Error('a read that must not wait has waited');
    return got;
  }

  /** The same; a promise when a source must be asked. */
  readOrLater(nodeId: number, offsetBytes: number, target: Uint8Array, mayWait = true): number | Promise<number> {
    let done = 0;
    while (done < target.length) {
      const got = this.readPart(nodeId, offsetBytes, target, done);
      if (got === FETCH) {
        if (mayWait) return this.readLater(nodeId, offsetBytes, target, done);
        throw this.needsSource(nodeId, readPlan(this.context, offsetBytes + done, target.length - done));
      }
      if (got < 0) throw errorOf(got, 'reading', nodeId);
      done += got;
      if (got < Math.min(REQUEST_BYTES_MAX, target.length - done + got)) break;
    }
    return done;
  }

  /** Writes all of `data`. Fails where a source would have to be waited for. */
  write(nodeId: number, offsetBytes: number, data: Uint8Array): number {
    const put = this.writeOrLater(nodeId, offsetBytes, data, false);
    if (typeof put !== 'number') throw new Error('a write that must not wait has waited');
    return put;
  }

  /** The same; a promise when the rest of a block must be fetched. `data` may be used again when this returns. */
  writeOrLater(nodeId: number, offsetBytes: number, data: Uint8Array, mayWait = true): number | Promise<number> {
    let done = 0;
    while (done < data.length) {
      const put = this.writePart(nodeId, offsetBytes, data, done);
      if (put === FETCH) {
        if (mayWait) return this.writeLater(nodeId, offsetBytes, Uint8Array.from(data), done);
        throw this.needsSource(nodeId, writePlan(this.context, offsetBytes + done, data.length - done));
      }
      if (put < 0) throw errorOf(put, 'writing', nodeId);
      done += put;
    }
    return done;
  }

  discard(nodeId: number, offsetBytes: number, lengthBytes: number): void {
    if (this.discardOrLater(nodeId, offsetBytes, lengthBytes, false) !== null) throw new Error('a discard that must not wait has waited');
  }

  /** Null when it is done; a promise when the rest of a block must be fetched. */
  discardOrLater(nodeId: number, offsetBytes: number, lengthBytes: number, mayWait = true): Promise<void> | null {
    const run = (fetched: Fetched | null): number =>
      this.growing(nodeId, 0, (disk) => discardDisk(this.context, disk, offsetBytes, lengthBytes), fetched);
    const code = run(null);
    if (code === FETCH) {
      const plan = writePlan(this.context, offsetBytes, lengthBytes);
      if (!mayWait) throw this.needsSource(nodeId, plan);
      return this.fetching(nodeId, plan, run).then((later) => { if (later < 0) throw errorOf(later, 'discarding', nodeId); });
    }
    if (code < 0) throw errorOf(code, 'discarding', nodeId);
    return null;
  }

  /** The next data or hole; -1 when there is none (ENXIO). */
  seek(nodeId: number, offsetBytes: number, wantData: boolean): number {
    const found = this.inside(nodeId, (disk) => seekDisk(this.context, disk, offsetBytes, wantData));
    if (found === -Errno.ENXIO) return -1;
    if (found < 0) throw errorOf(found, 'seeking', nodeId);
    return found;
  }

  private readPart(nodeId: number, offsetBytes: number, target: Uint8Array, done: number, fetched: Fetched | null = null): number {
    const lengthBytes = Math.min(REQUEST_BYTES_MAX, target.length - done);
    const got = this.inside(nodeId, (disk) => readDisk(this.context, disk, offsetBytes + done, lengthBytes, this.buffer, 0), fetched);
    if (got > 0) target.set(this.buffer.bytes.subarray(0, got), done);
    return got;
  }

  private async readLater(nodeId: number, offsetBytes: number, target: Uint8Array, doneBefore: number): Promise<number> {
    const deadlineMs = performance.now() + this.sourceTimeoutMs;
    let done = doneBefore;
    while (done < target.length) {
      const at = done;
      const lengthBytes = Math.min(REQUEST_BYTES_MAX, target.length - at);
      const got = await this.fetching(
        nodeId, readPlan(this.context, offsetBytes + at, lengthBytes), (fetched) => this.readPart(nodeId, offsetBytes, target, at, fetched), deadlineMs,
      );
      if (got < 0) throw errorOf(got, 'reading', nodeId);
      done += got;
      if (got < lengthBytes) break;
    }
    return done;
  }

  private writePart(nodeId: number, offsetBytes: number, data: Uint8Array, done: number, fetched: Fetched | null = null): number {
    const lengthBytes = Math.min(REQUEST_BYTES_MAX, data.length - done);
    const at = offsetBytes + done;
    this.buffer.bytes.set(data.subarray(done, done + lengthBytes));
    return this.growing(nodeId, at + lengthBytes, (disk) => writeDisk(this.context, disk, at, lengthBytes, this.buffer, 0), fetched);
  }

  private async writeLater(nodeId: number, offsetBytes: number, data: Uint8Array, doneBefore: number): Promise<number> {
    const deadlineMs = performance.now() + this.sourceTimeoutMs;
    let done = doneBefore;
    while (done < data.length) {
      const at = done;
      const lengthBytes = Math.min(REQUEST_BYTES_MAX, data.length - at);
      const put = await this.fetching(
        nodeId, writePlan(this.context, offsetBytes + at, lengthBytes), (fetched) => this.writePart(nodeId, offsetBytes, data, at, fetched), deadlineMs,
      );
      if (put < 0) throw errorOf(put, 'writing', nodeId);
      done += put;
    }
    return done;
  }

  /** Runs a request until it needs no more of a source; its result. Nothing is held while the source is waited for. */
  private async fetching(
    nodeId: number, plan: Plan, run: (fetched: Fetched) => number, deadlineMs = performance.now() + this.sourceTimeoutMs,
  ): Promise<number> {
    const fetched = new Fetched();
    for (let fetches = 0; fetches < FETCHES_MAX; fetches += 1) {
      await fetched.fetch(plan(this.diskOf(nodeId), fetched), deadlineMs);
      const code = run(fetched);
      if (code !== FETCH) return code;
    }
    throw new OffshootError('io-error', `what a request on node ${nodeId} needs of its source changed ${FETCHES_MAX} times`, { nodeId });
  }

  private needsSource(nodeId: number, plan: Plan): OffshootError {
    return sourceErrorOf(plan(this.diskOf(nodeId), new Fetched()), nodeId);
  }

  private growing(nodeId: number, endBytes: number, body: (disk: SharedDisk) => number, fetched: Fetched | null): number {
    const code = this.inside(nodeId, body, fetched);
    if (code !== HAND_OVER) return code;
    const disk = this.diskOf(nodeId);
    this.disks.rebuild(disk, 2 * Math.max(endBytes, disk.shared.sizeBytes()), () => undefined);
    return this.inside(nodeId, body, fetched);
  }

  private inside(nodeId: number, body: (disk: SharedDisk) => number, fetched: Fetched | null = null): number {
    const open = this.diskOf(nodeId);
    const disk = open.shared;
    if (!enterDisk(this.context, disk)) throw new Error(`node ${nodeId} is retired although it is in use`);
    this.context.fetched = fetched?.of(open) ?? null;
    try {
      return body(disk);
    } finally {
      this.context.fetched = null;
      leaveDisk(this.context, disk);
    }
  }

  private diskOf(nodeId: number): OpenDisk {
    const disk = this.disks.get(nodeId);
    if (disk === undefined) throw new OffshootError('bad-handle', `node ${nodeId} is not open`, { nodeId });
    return disk;
  }
}

function readPlan(context: HotContext, offsetBytes: number, lengthBytes: number): Plan {
  return (disk, fetched) => missingForRead(context, disk, offsetBytes, lengthBytes, fetched);
}

function writePlan(context: HotContext, offsetBytes: number, lengthBytes: number): Plan {
  return (disk, fetched) => missingForWrite(context, disk, offsetBytes, lengthBytes, fetched);
}

function errorOf(code: number, what: string, nodeId: number): OffshootError {
  const errno = -code;
  if (errno === Errno.EDQUOT) return new OffshootError('quota', `${what} node ${nodeId} failed: the limit of its container is reached`, { nodeId, errno });
  if (errno === Errno.ENOSPC) return new OffshootError('no-space', `${what} node ${nodeId} failed: the store is full, or the limit of the container is reached`, { nodeId, errno });
  if (errno === Errno.EFBIG) return new OffshootError('too-large', `${what} node ${nodeId} failed: a disk has a fixed size`, { nodeId, errno });
  return new OffshootError('io-error', `${what} node ${nodeId} failed with errno ${errno}`, { nodeId, errno });
}
