/**
 * One workload under the power-cut harness, from its recording to the verdict; shared by the tests in test/power.
 */
import fs from 'node:fs';
import path from 'node:path';

import type { Store } from '../../../blockstore/store.js';
import { seedFromEnvironment } from '../model/random.js';
import { compilePrograms, type CompiledPrograms } from '../compiled-program.js';
import { makeTmpfsDir, type Cleanup } from '../temp.js';
import { tryCuts, type CutImage, type CutResult, type CutRun } from './cuts.js';
import { Recorder } from './recorder.js';
import { closeImage, damageOf, integrityOf, openImage, readDisks, verdictOfCheck } from './store-image.js';
import type { FoundDisk, WindowModel } from './window.js';

const PROGRAM = 'test/support/power/recorded-program.ts';
/** Every so many images the recovered store is closed and opened once more: recovering twice must change nothing. */
const REOPEN_EVERY = 8;

export const STORE = 'store';
export const RUNTIME = 'run';

export interface PowerBench {
  readonly seed: number;
  readonly workDir: string;
  readonly recorder: Recorder;
  /** Before it, the store directory is not there. */
  readonly firstCut: number;
  /** Runs a workload of the recorded program under the recorder. */
  record(workload: string, options?: { readonly isKilled?: boolean }): Promise<void>;
}

export function compileRecorded(testFile: string): CompiledPrograms {
  return compilePrograms(`power-${testFile}`, [PROGRAM]);
}

/** A bench with an empty store, and a seed that is printed; one of its own for each round of a test. */
export function createBench(programs: CompiledPrograms, cleanup: Cleanup, round = 0): PowerBench {
  const seed = seedFromEnvironment() + round;
  const workDir = makeTmpfsDir('power', cleanup);
  const root = path.join(workDir, 'recorded');
  const logDir = path.join(workDir, 'logs');
  for (const directory of [root, logDir]) fs.mkdirSync(directory);
  const recorder = new Recorder(root, logDir);
  // The store directory is there before the first event: the daemon's start makes it. The other lies on tmpfs.
  recorder.givenDirectories([STORE, RUNTIME]);
  return {
    seed, workDir, recorder, firstCut: recorder.events.length - 1,
    record: async (workload, options = {}) => {
      await recorder.run({ program: programs.pathOf(PROGRAM), args: [root, workload, String(seed)], ...options });
    },
  };
}

function storeOf(image: CutImage): string {
  return path.join(image.directory, STORE);
}

/** The power is gone: an empty run-time directory, recovery, then everything against the window; and `more`, when that is right. */
export function powerVerdict(bench: PowerBench, more?: (window: WindowModel) => More): (image: CutImage) => Promise<string | null> {
  const runtimeDir = path.join(bench.workDir, 'checked-run');
  let count = 0;
  return async (image) => {
    count += 1;
    fs.rmSync(runtimeDir, { recursive: true, force: true });
    fs.mkdirSync(runtimeDir);
    return judgeStore(storeOf(image), runtimeDir, (disks) => image.window.judge(disks, 'window', image.tornBytes), count % REOPEN_EVERY === 0, more?.(image.window));
  };
}

/** The process alone is gone: journals and page cache are there, and everything that was answered must be, too. */
export function killVerdict(): (image: CutImage) => Promise<string | null> {
  return async (image) => judgeStore(storeOf(image), path.join(image.directory, RUNTIME), (disks) => image.window.judge(disks, 'answered', image.tornBytes), false);
}

/** Looks at a store further, and may go on with what it finds in it. */
export type More = (store: Store, disks: readonly FoundDisk[]) => Promise<string | null>;

/** Opens a store that a loss has left, asks it everything, closes it; `again`: and once more. Null when nothing is wrong. */
export async function judgeStore(
  storeDir: string, runtimeDir: string, judge: (disks: FoundDisk[]) => string | null, again: boolean, more?: More,
): Promise<string | null> {
  const first = openImage(storeDir, runtimeDir);
  let wrong: string | null;
  let disks: FoundDisk[] = [];
  try {
    wrong = damageOf(first) ?? verdictOfCheck(first);
    if (wrong === null) {
      disks = readDisks(first);
      wrong = judge(disks);
      if (wrong === null && more !== undefined) {
        wrong = await more(first, disks);
        disks = readDisks(first);
      }
    }
  } finally {
    await closeImage(first, runtimeDir);
  }
  wrong ??= integrityOf(storeDir);
  if (wrong !== null || !again) return wrong;
  const second = openImage(storeDir, runtimeDir);
  try {
    const later = new Map(readDisks(second).map((disk) => [disk.name, disk.content]));
    const changed = disks.find((disk) => later.get(disk.name)?.equals(disk.content) !== true);
    return changed === undefined && later.size === disks.length ? null : `the second recovery finds another content of ${changed?.name ?? 'the store'} than the first`;
  } finally {
    await closeImage(second, runtimeDir);
  }
}

/** Tries the recording; prints how much was tried, with the seed. */
export async function cutAndReport(bench: PowerBench, run: Pick<CutRun, 'name' | 'verdict'> & Partial<CutRun>): Promise<CutResult> {
  const beganMs = performance.now();
  const result = await tryCuts({ firstCut: bench.firstCut, root: bench.recorder.root, events: bench.recorder.events, seed: bench.seed, workDir: bench.workDir, without: [RUNTIME], ...run });
  const seconds = ((performance.now() - beganMs) / 1000).toFixed(1);
  process.stdout.write(`power: ${run.name}: ${result.images} images at ${result.cuts} cut points of ${bench.recorder.events.length} events, ${result.failures.length} wrong, ${seconds} s (OFFSHOOT_SEED=${bench.seed})\n`);
  return result;
}
