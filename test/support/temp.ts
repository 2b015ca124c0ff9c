/**
 * Temporary directories, and the list of what a test has to take away again.
 *
 * A clean-up runs last in, first out, and goes on when one of its steps fails: a mount that could not be removed must not
 * keep a process alive. All failures are then thrown together. Nothing here follows a mount: what is deleted is what lies
 * on the file system of the directory itself.
 */
import { mkdirSync, mkdtempSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { mustRun } from './model/command.js';

export interface Cleanup {
  /** Later additions run first. */
  add(step: () => Promise<void> | void): void;
  run(): Promise<void>;
}

export function createCleanup(): Cleanup {
  const steps: (() => Promise<void> | void)[] = [];
  return {
    add: (step) => steps.push(step),
    async run() {
      const failures: unknown[] = [];
      for (let step = steps.pop(); step !== undefined; step = steps.pop()) {
        try {
          await step();
        } catch (error) {
          failures.push(error);
        }
      }
      if (failures.length === 1) throw failures[0];
      if (failures.length > 1) throw new AggregateError(failures, 'several things could not be cleaned up');
    },
  };
}

/** A new directory on disk. The name is short: sockets lie in it, and their paths may have 107 bytes. */
export function makeTempDir(name: string, cleanup: Cleanup): string {
  return makeIn(tmpdir(), name, cleanup);
}

/** A new directory on a tmpfs. */
export function makeTmpfsDir(name: string, cleanup: Cleanup): string {
  const given = process.env['OFFSHOOT_TEST_TMPFS'];
  return makeIn(given === undefined || given === '' ? '/dev/shm' : given, name, cleanup);
}

/** On a tmpfs, with the shortest path there is: paths of sockets far below it may have 107 bytes. */
export function makeShortTmpfsDir(cleanup: Cleanup): string {
  const directory = mkdtempSync('/dev/shm/o-');
  cleanup.add(() => removeTree(directory));
  return directory;
}

function makeIn(base: string, name: string, cleanup: Cleanup): string {
  mkdirSync(base, { recursive: true });
  const directory = mkdtempSync(join(base, `offshoot-${name}-`));
  cleanup.add(() => removeTree(directory));
  return directory;
}

/** rm(1), because it alone can be told to stay on one file system. */
export async function removeTree(directory: string): Promise<void> {
  await mustRun('rm', ['-rf', '--one-file-system', '--', directory]);
}
