/**
 * Takes the power from a recorded block device at random points: the real file system recovers from what is left, then the real store does.
 *
 * At a point the disk has all that was written before the last flush, and of what came later any part: see `CHOICES`. A write is there or not, as
 * a whole, in the order of writing where two overlap; the last one that is there may end in the midst, at any sector of 512 bytes. The image is mounted, which replays the
 * file system's journal, and the store in it is held against the window model as in the other power-cut tests.
 */
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';

import { mustRun } from '../model/command.js';
import { mountEntry } from '../model/mounts.js';
import { createRandom, type Random } from '../model/random.js';
import type { Cleanup } from '../temp.js';
import { recordBlockDevice, type BlockFileSystem, type BlockPrograms, type BlockRecording } from './block-device.js';
import { DeviceFile, type DeviceChange, type DeviceEvent } from './block-log.js';
import { STORE, judgeStore } from './power-test.js';
import { PAGE_BYTES, SECTOR_BYTES } from './volatile-disk.js';
import { WindowModel } from './window.js';

/** What of the unflushed writes is on the disk, from the kindest to the strangest; each point takes one. */
export const CHOICES = ['any', 'nothing', 'everything', 'prefix', 'mostly-old', 'mostly-new', 'suffix', 'last-only', 'without-first'] as const;
export type ChoiceName = (typeof CHOICES)[number];
export const BLOCK_WORKLOADS = ['writes', 'control', 'discard', 'fill', 'copy-on-read'] as const;

/** So many points follow an answered operation at once, where most was promised and least is on the disk by accident. */
const ANSWERED_SHARE = 0.4;
const TORN_SHARE = 0.4;
/** Of so many events the one with most unflushed writes becomes a point. */
const CANDIDATES = 8;
const REOPEN_EVERY = 8;
const FAILURES_MAX = 3;
const LONG_MS = 120_000;

export interface BlockRun {
  readonly fileSystem: BlockFileSystem;
  readonly points: number;
  readonly seed: number;
  readonly isLying: boolean;
  readonly workloads: readonly string[];
  readonly programs: BlockPrograms;
  readonly workDir: string;
  readonly memoryDir: string;
  readonly cleanup: Cleanup;
  readonly onProgress: (line: string) => void;
}

export interface BlockResult {
  readonly points: number;
  readonly writes: number;
  readonly discards: number;
  readonly flushes: number;
  /** Writes that no flush covered at the points, all together. */
  readonly unflushed: number;
  /** Those of them that the images left out. */
  readonly dropped: number;
  readonly torn: number;
  readonly failures: readonly string[];
}

export async function cutBlockDevice(run: BlockRun): Promise<BlockResult> {
  const total = { points: 0, writes: 0, discards: 0, flushes: 0, unflushed: 0, dropped: 0, torn: 0, failures: [] as string[] };
  for (const [index, workload] of run.workloads.entries()) {
    run.onProgress(`${run.fileSystem}: recording ${workload}`);
    const recording = await recordBlockDevice({ ...run, workload });
    const events = recording.events.slice(recording.firstCut, recording.lastCut);
    total.writes += events.filter(({ kind }) => kind === 'write').length;
    total.discards += events.filter(({ kind }) => kind === 'zero').length;
    total.flushes += events.filter(({ kind }) => kind === 'flush').length;
    const share = Math.floor((run.points * (index + 1)) / run.workloads.length) - Math.floor((run.points * index) / run.workloads.length);
    await tryPoints(run, workload, recording, share, total);
    if (total.failures.length >= FAILURES_MAX) break;
  }
  return total;
}

type Totals = { -readonly [K in keyof BlockResult]: BlockResult[K] extends readonly string[] ? string[] : BlockResult[K] };

async function tryPoints(run: BlockRun, workload: string, recording: BlockRecording, count: number, total: Totals): Promise<void> {
  const random = createRandom(run.seed + workload.length);
  const points = choosePoints(recording, count, random);
  const baseFile = path.join(run.memoryDir, 'base');
  const base = new DeviceFile(baseFile, recording.sizeBytes);
  const window = new WindowModel();
  let pending: DeviceChange[] = [];
  let turn = random.below(CHOICES.length);
  try {
    for (const [index, event] of recording.events.entries()) {
      if (event.kind === 'marker') window.apply(event.marker);
      else if (event.kind !== 'flush') pending.push(event);
      if (event.kind === 'flush' || index === recording.firstCut) {
        for (const change of pending) base.apply(change);
        pending = [];
      }
      for (let times = points.get(index) ?? 0; times > 0; times -= 1) {
        const name = CHOICES[turn % CHOICES.length]!;
        turn += 1;
        const left = leftOf(pending, name, random);
        total.points += 1;
        total.unflushed += pending.length;
        total.dropped += pending.length - left.changes.length;
        if (left.tornBytes === SECTOR_BYTES) total.torn += 1;
        const image = makeImage(run, recording, baseFile, left.changes);
        const wrong = await judgeImage(run, image, window, left.tornBytes, total.points);
        run.onProgress(`${run.fileSystem}, ${workload}: ${total.points} of ${run.points} points, ${total.failures.length} wrong`);
        if (wrong === null) continue;
        const where = `${run.fileSystem}, ${workload}, event ${index} of ${recording.events.length} (${JSON.stringify(window.lastMarker)}), ${name} of ${pending.length} unflushed writes`;
        total.failures.push(`${where}${left.tornBytes === SECTOR_BYTES ? ', the last torn' : ''}: ${wrong}\n  ${keep(run, recording, baseFile, left.changes, index, total.failures.length)}`);
        if (total.failures.length >= FAILURES_MAX) return;
      }
    }
  } finally {
    base.close();
    fs.unlinkSync(baseFile);
  }
}

/** How many images are made behind each event. Events with much that is not flushed are taken more often: most flushes cover a write or two. */
function choosePoints(recording: BlockRecording, count: number, random: Random): Map<number, number> {
  const changing: number[] = [];
  const answered: number[] = [];
  const unflushed: number[] = [];
  for (let index = recording.firstCut + 1; index <= recording.lastCut; index += 1) {
    const event: DeviceEvent = recording.events[index]!;
    const before = unflushed[index - 1] ?? 0;
    unflushed[index] = event.kind === 'flush' ? 0 : event.kind === 'marker' ? before : before + 1;
    if (event.kind === 'marker' && event.marker.phase === 'end' && event.marker.op !== 'write') answered.push(index);
    if (event.kind === 'write' || event.kind === 'zero') changing.push(index);
  }
  if (changing.length === 0) throw new Error('nothing was written while it was recorded');
  const points = new Map<number, number>();
  for (let made = 0; made < count; made += 1) {
    const list = answered.length > 0 && random.chance(ANSWERED_SHARE) ? answered : changing;
    const index = Array.from({ length: CANDIDATES }, () => random.pick(list)).reduce((most, each) => (unflushed[each]! > unflushed[most]! ? each : most));
    points.set(index, (points.get(index) ?? 0) + 1);
  }
  return points;
}

/** Of the writes that no flush covers, those that are on the disk. */
function leftOf(pending: readonly DeviceChange[], name: ChoiceName, random: Random): { readonly changes: readonly DeviceChange[]; readonly tornBytes: number } {
  const changes = chosenOf(pending, name, random);
  const last = changes.at(-1);
  if (last?.kind !== 'write' || last.data.length <= SECTOR_BYTES || !random.chance(TORN_SHARE)) return { changes, tornBytes: PAGE_BYTES };
  const bytes = SECTOR_BYTES * random.between(1, last.data.length / SECTOR_BYTES - 1);
  return { changes: [...changes.slice(0, -1), { ...last, data: last.data.subarray(0, bytes) }], tornBytes: SECTOR_BYTES };
}

function chosenOf(pending: readonly DeviceChange[], name: ChoiceName, random: Random): readonly DeviceChange[] {
  switch (name) {
    case 'nothing': return [];
    case 'everything': return pending;
    case 'any': return pending.filter(() => random.chance(0.5));
    case 'mostly-old': return pending.filter(() => random.chance(0.1));
    case 'mostly-new': return pending.filter(() => random.chance(0.9));
    case 'prefix': return pending.slice(0, random.between(0, pending.length));
    case 'suffix': return pending.slice(random.between(0, pending.length));
    case 'last-only': return pending.slice(-1);
    case 'without-first': return pending.slice(1);
    default: throw new Error(`no choice is called ${String(name satisfies never)}`);
  }
}

function makeImage(run: BlockRun, recording: BlockRecording, baseFile: string, changes: readonly DeviceChange[]): string {
  const image = path.join(run.memoryDir, 'image');
  // cp(1) keeps the holes.
  execFileSync('cp', ['--sparse=auto', '--', baseFile, image]);
  const file = new DeviceFile(image, recording.sizeBytes);
  try {
    for (const change of changes) file.apply(change);
  } finally {
    file.close();
  }
  return image;
}

async function judgeImage(run: BlockRun, image: string, window: WindowModel, tornBytes: number, number: number): Promise<string | null> {
  const directory = path.join(run.workDir, 'recovered');
  const runtimeDir = path.join(run.memoryDir, 'recovered-run');
  if (!fs.existsSync(directory)) {
    fs.mkdirSync(directory);
    run.cleanup.add(async () => { if (mountEntry(directory) !== null) await mustRun('umount', ['-l', directory]); });
  }
  fs.rmSync(runtimeDir, { recursive: true, force: true });
  fs.mkdirSync(runtimeDir);
  try {
    await mustRun('mount', ['-o', 'loop', image, directory], { timeoutMs: LONG_MS });
  } catch (error) {
    return `the file system cannot be mounted: ${error instanceof Error ? error.message : String(error)}`;
  }
  let wrong: string | null;
  try {
    wrong = await judgeStore(path.join(directory, STORE), runtimeDir, (disks) => window.judge(disks, 'window', tornBytes), number % REOPEN_EVERY === 0);
  } catch (error) {
    wrong = `it cannot be used: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`;
  }
  // A store that could not be opened may have left files open: the loop device then goes with this process.
  await mustRun('umount', wrong === null ? [directory] : ['-l', directory], { timeoutMs: LONG_MS });
  fs.unlinkSync(image);
  return wrong;
}

/** Keeps a failed image, as it was before anything recovered it, where the clean-up does not come. */
function keep(run: BlockRun, recording: BlockRecording, baseFile: string, changes: readonly DeviceChange[], index: number, number: number): string {
  const directory = process.env['OFFSHOOT_POWER_KEEP'];
  if (directory === undefined || directory === '') return 'set OFFSHOOT_POWER_KEEP (--keep) to a directory to keep the image';
  const target = path.join(directory, `block-${run.fileSystem}-${number + 1}`);
  fs.mkdirSync(directory, { recursive: true });
  execFileSync('cp', ['--sparse=always', '--', makeImage(run, recording, baseFile, changes), `${target}.img`]);
  const lines = recording.events.slice(0, index + 1).map((event, at) => `${at} ${JSON.stringify({ ...event, ...(event.kind === 'write' ? { data: event.data.length } : {}) })}\n`);
  fs.writeFileSync(`${target}.events`, lines.join(''));
  return `the image lies in ${target}.img, what led to it in ${target}.events`;
}
