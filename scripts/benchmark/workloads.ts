/**
 * What is measured: one fio job each, the same for every candidate.
 *
 * Reads and the first touches go to a fresh clone (or overlay), which owns nothing: that is the state in which a virtual machine
 * boots. Plain random writes go to a part that was written before, so that they measure writing and not owning. Every job bypasses
 * the page cache of the file that it opens, as QEMU does with cache=none.
 */
import type { FioOptions, FioResult } from '../../test/support/fio.js';

export interface Scale {
  readonly sizeBytes: number;
  /** Of each job that is measured for a time. */
  readonly secondsPerJob: number;
}

export type State = 'un-owned' | 'owned' | 'first-touch';

export interface Workload {
  readonly id: string;
  readonly title: string;
  /** What the disk must be like before. Each first-touch job gets a fresh clone of its own. */
  readonly state: State;
  readonly unit: 'IOPS' | 'B/s';
  /** Times the figure of qemu-storage-daemon's overlay that the kernel transport is to reach; null: shown only. */
  readonly targetRatio: number | null;
  options(scale: Scale): FioOptions;
  figure(result: FioResult): number;
}

const RAMP_SECONDS = 0.3;
const KIB = 1024;
const MIB = 1024 * KIB;
/** The part of a disk that plain writes go to. */
const OWNED_SHARE = 1 / 4;
/**
 * First touches go to so small a part of the disk, at random, that most of them also meet a 64 KiB cluster of a qcow2 overlay for
 * the first time (with 1 in 32 blocks, about four in five do).
 */
const FIRST_TOUCH_SHARE = 1 / 32;

/** Common to all jobs. The files exist in full size: fio must neither lay them out nor preallocate. */
export const commonOptions: FioOptions = { ioengine: 'libaio', direct: 1, fallocate: 'none', thread: true, group_reporting: true };

function ownedBytes(scale: Scale): number {
  return Math.floor((scale.sizeBytes * OWNED_SHARE) / MIB) * MIB;
}

function timed(scale: Scale): FioOptions {
  return { time_based: true, runtime: `${scale.secondsPerJob}s`, ramp_time: `${RAMP_SECONDS}s` };
}

function randomRead(depth: number, targetRatio: number): Workload {
  return {
    id: `random-read-4k-depth-${depth}`, title: `4 KiB random read, depth ${depth}`, state: 'un-owned', unit: 'IOPS', targetRatio,
    options: (scale) => ({ rw: 'randread', bs: '4k', iodepth: depth, size: scale.sizeBytes, ...timed(scale) }),
    figure: (result) => result.read.iops,
  };
}

function randomWrite(depth: number): Workload {
  return {
    id: `random-write-4k-depth-${depth}`, title: `4 KiB random write, depth ${depth}`, state: 'owned', unit: 'IOPS', targetRatio: null,
    options: (scale) => ({ rw: 'randwrite', bs: '4k', iodepth: depth, size: ownedBytes(scale), ...timed(scale) }),
    figure: (result) => result.write.iops,
  };
}

function firstTouch(depth: number): Workload {
  return {
    id: `first-touch-write-4k-depth-${depth}`, title: `4 KiB first-touch random write, depth ${depth}`, state: 'first-touch', unit: 'IOPS', targetRatio: 5,
    // With fio's random map, which is the default, no block is written twice.
    options: (scale) => ({ rw: 'randwrite', bs: '4k', iodepth: depth, size: scale.sizeBytes, io_size: Math.floor(scale.sizeBytes * FIRST_TOUCH_SHARE) }),
    figure: (result) => result.write.iops,
  };
}

function sequentialRead(depth: number): Workload {
  return {
    id: `sequential-read-1m-depth-${depth}`, title: `1 MiB sequential read, depth ${depth}`, state: 'un-owned', unit: 'B/s', targetRatio: 4,
    options: (scale) => ({ rw: 'read', bs: '1m', iodepth: depth, size: scale.sizeBytes, ...timed(scale) }),
    figure: (result) => result.read.bytesPerSecond,
  };
}

/** In the order in which they run on one clone. */
export const workloads: readonly Workload[] = [
  randomRead(1, 1.5),
  randomRead(16, 3),
  sequentialRead(4),
  randomWrite(1),
  randomWrite(16),
  firstTouch(1),
  firstTouch(16),
];

/** Makes the part that `owned` jobs write to the disk's own. Not measured. */
export function ownOptions(scale: Scale): FioOptions {
  return { rw: 'write', bs: '1m', iodepth: 4, size: ownedBytes(scale) };
}
