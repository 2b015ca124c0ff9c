/**
 * Cuts a recording at many points, and looks at what each leaves.
 *
 * At a cut everything before it has happened, and what was not synced is torn in one of the ways of `TEARS`. Cuts are spread over
 * all events; each is given ways in turn, so that a run of N images has them all. Whether an image is right is not decided
 * here: `verdict` opens it and says what is wrong. A failure names the recording, the cut and the tear, keeps the first two in a
 * directory, and says how to try that one image again.
 */
import fs from 'node:fs';
import path from 'node:path';

import { createRandom } from '../model/random.js';
import type { FileEvent } from './events.js';
import { writeTree } from './recorder.js';
import { SECTOR_BYTES, TEARS, VolatileDisk, PAGE_BYTES, tearOf, tearsSectors, type Chooser, type Image, type TearName } from './volatile-disk.js';
import { WindowModel, type Marker } from './window.js';

/** Images a workload is tried with, if nobody wants more. */
const IMAGES_MIN = 1000;
/** How often each way to tear is tried at one cut, at most: where little is pending the images are soon the same. */
const ATTEMPTS_MAX = 12;

export interface CutImage {
  /** Where the image lies: what was below the recorded root. */
  readonly directory: string;
  readonly window: WindowModel;
  /** 512 when sectors may be torn apart, 4096 when blocks stay whole. */
  readonly tornBytes: number;
}

/** Null when the image is as it must be; a sentence otherwise. */
export type Verdict = (image: CutImage) => Promise<string | null>;

export interface CutRun {
  readonly name: string;
  readonly root: string;
  readonly events: readonly FileEvent[];
  readonly seed: number;
  /** Cuts before this event are not tried. */
  readonly firstCut?: number;
  readonly images?: number;
  readonly tears?: readonly TearName[];
  readonly workDir: string;
  /** Top directories that no image has. */
  readonly without?: readonly string[];
  readonly verdict: Verdict;
}

export interface CutResult {
  readonly cuts: number;
  readonly images: number;
  readonly failures: readonly string[];
}

export function imagesWanted(): number {
  const given = Number(process.env['OFFSHOOT_POWER_CUTS'] ?? '');
  return Number.isSafeInteger(given) && given > IMAGES_MIN ? given : IMAGES_MIN;
}

/** Tries at least as many images as are wanted; stops at the third failure. */
export async function tryCuts(run: CutRun): Promise<CutResult> {
  const wanted = run.images ?? imagesWanted();
  const firstCut = run.firstCut ?? 0;
  const isPoint = pointsOf(run);
  const points = isPoint.filter(Boolean).length;
  if (points === 0) throw new Error(`the recording of ${run.name} has no event to cut at`);
  const tears = run.tears ?? TEARS;
  const disk = new VolatileDisk(run.root);
  const window = new WindowModel();
  const failures: string[] = [];
  const cutsTried = new Set<number>();
  let images = 0;
  let pointsSeen = 0;
  let turn = 0;
  for (const [index, event] of run.events.entries()) {
    disk.apply(event);
    if (event.kind === 'marker') window.apply(event.marker as Marker);
    if (index < firstCut || isPoint[index] !== true) continue;
    pointsSeen += 1;
    const seen = new Set<string>();
    // As many here as keeps the whole run on its way to what is wanted; where little is pending, few images differ.
    for (let attempt = 0; images < Math.ceil((wanted * pointsSeen) / points) && attempt < ATTEMPTS_MAX * tears.length; attempt += 1) {
      const tear = tears[turn % tears.length]!;
      turn += 1;
      const how = tearOf(tear, createRandom(run.seed + 7919 * index + attempt));
      const choices = [how.unitBytes];
      const choose: Chooser = (what) => {
        const chosen = how.choose(what);
        choices.push(chosen);
        return chosen;
      };
      const image = disk.image({ ...how, choose, without: run.without ?? [] });
      const fingerprint = choices.some((chosen, place) => place > 0 && chosen !== 0) ? choices.join() : 'nothing';
      if (seen.has(fingerprint)) continue;
      seen.add(fingerprint);
      images += 1;
      cutsTried.add(index);
      const wrong = await judge(run, image, window, tearsSectors(tear) ? SECTOR_BYTES : PAGE_BYTES);
      if (wrong === null) continue;
      failures.push(`cut ${index} of ${run.events.length} (${describeEvent(event, disk)}; ${JSON.stringify(window.lastMarker)}), tear ${tear}, attempt ${attempt}: ${wrong}\n  ${keep(run, image, index, failures.length)}`);
      if (failures.length === 3) return { cuts: cutsTried.size, images, failures };
    }
  }
  return { cuts: cutsTried.size, images, failures };
}

async function judge(run: CutRun, image: Image, window: WindowModel, tornBytes: number): Promise<string | null> {
  const directory = path.join(run.workDir, 'image');
  fs.mkdirSync(directory, { recursive: true });
  writeTree(directory, image);
  try {
    return await run.verdict({ directory, window, tornBytes });
  } catch (error) {
    return `it cannot be used: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`;
  }
}

/** Where something changed: on the disk, in the cache, or in what was promised. */
function pointsOf(run: CutRun): boolean[] {
  return run.events.map((event, index) => index >= (run.firstCut ?? 0) && event.kind !== 'sync-begin');
}

function describeEvent(event: FileEvent, disk: VolatileDisk): string {
  if (event.kind === 'marker') return 'marker';
  return `${event.kind} ${'path' in event ? event.path : (disk.pathOf(event.inode) ?? `inode ${event.inode}`)}`;
}

/** Keeps a failed image where the clean-up does not come, for whoever wants to look at it. */
function keep(run: CutRun, image: Image, cut: number, number: number): string {
  const directory = process.env['OFFSHOOT_POWER_KEEP'];
  if (directory === undefined || directory === '') return 'set OFFSHOOT_POWER_KEEP to a directory to keep the image, and OFFSHOOT_SEED to the seed of this run';
  const target = path.join(directory, `${run.name}-${number}`);
  fs.rmSync(target, { recursive: true, force: true });
  fs.mkdirSync(target, { recursive: true });
  writeTree(target, image);
  const disk = new VolatileDisk(run.root);
  const lines = run.events.slice(0, cut + 1).map((event, index) => {
    disk.apply(event);
    return `${index} ${describeEvent(event, disk)} ${JSON.stringify({ ...event, ...('data' in event ? { data: event.data.length } : {}) })}\n`;
  });
  fs.writeFileSync(`${target}.events`, lines.join(''));
  return `the image lies in ${target}`;
}
