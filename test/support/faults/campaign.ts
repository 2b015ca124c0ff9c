/**
 * Many runs of the actor, each on a new store: compiled once, a few at a time, everything taken away after each.
 */
import os from 'node:os';

import { compilePrograms } from '../compiled-program.js';
import { createCleanup, makeTmpfsDir } from '../temp.js';
import { runActor, type ActorRun, type Injection } from './injector.js';
import { judge, type Verdict } from './verdict.js';

const ACTOR = 'test/support/faults/actor.ts';

export interface Judged {
  readonly run: ActorRun;
  readonly verdict: Verdict;
}

export class Campaign {
  private readonly programs;

  /** `folder` is the test file's own: see `compilePrograms`. */
  constructor(folder: string) {
    this.programs = compilePrograms(folder, [ACTOR]);
  }

  remove(): void {
    this.programs.remove();
  }

  async run(injections: readonly Injection[], options: { readonly counting?: boolean; readonly killAfter?: string } = {}): Promise<Judged> {
    const cleanup = createCleanup();
    try {
      const place = {
        program: this.programs.pathOf(ACTOR), storeDir: makeTmpfsDir('faults', cleanup), runtimeDir: makeTmpfsDir('faults-run', cleanup),
        ...(options.killAfter === undefined ? {} : { killAfter: options.killAfter }),
      };
      const run = await runActor(place, injections, options.counting === true);
      return { run, verdict: await judge(place.storeDir, place.runtimeDir, run) };
    } finally {
      await cleanup.run();
    }
  }

  /** `body` for each item, as many at a time as there are processors; results in the order of the items. */
  async forEach<Item, Result>(items: readonly Item[], body: (item: Item) => Promise<Result>): Promise<Result[]> {
    const results: Result[] = [];
    let next = 0;
    await Promise.all(Array.from({ length: Math.max(2, os.availableParallelism()) }, async () => {
      for (let index = next++; index < items.length; index = next++) results[index] = await body(items[index]!);
    }));
    return results;
  }
}
