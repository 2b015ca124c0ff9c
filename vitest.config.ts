/**
 * The tiers of tests, one vitest project each: `vitest run --project unit`, and so on. `./scripts/test` runs them all.
 *
 * Unit, protocol and power tests have no mount of ours below them and run side by side. Fault tests count system calls, of which a busy
 * machine needs other ones. Mount tests wait for processes most of their time: one more of them at once than there are processors, each file with a
 * daemon and a mount of its own. Virtual machines boot on one processor each, and tests wait for them.
 */
import { availableParallelism } from 'node:os';

import { defineConfig } from 'vitest/config';

const SECOND_MS = 1000;
const MINUTE_MS = 60 * SECOND_MS;

export default defineConfig({
  test: {
    pool: 'forks',
    // One for each processor: these tests wait for nothing but themselves, and the default leaves one processor idle.
    maxWorkers: availableParallelism(),
    // A test that nobody waited for, or an unhandled rejection, fails the run.
    dangerouslyIgnoreUnhandledErrors: false,
    allowOnly: false,
    projects: [
      {
        extends: true,
        test: { name: 'unit', include: ['test/unit/**/*.test.ts'], testTimeout: 30 * SECOND_MS, hookTimeout: 30 * SECOND_MS },
      },
      {
        extends: true,
        test: { name: 'protocol', include: ['test/protocol/**/*.test.ts'], testTimeout: 30 * SECOND_MS, hookTimeout: 30 * SECOND_MS },
      },
      {
        extends: true,
        test: { name: 'power', include: ['test/power/**/*.test.ts'], testTimeout: 8 * MINUTE_MS, hookTimeout: 2 * MINUTE_MS },
      },
      {
        extends: true,
        test: { name: 'faults', include: ['test/faults/**/*.test.ts'], testTimeout: 8 * MINUTE_MS, hookTimeout: 2 * MINUTE_MS, fileParallelism: false },
      },
      {
        extends: true,
        test: { name: 'torture', include: ['test/torture/**/*.test.ts'], testTimeout: 5 * MINUTE_MS, hookTimeout: MINUTE_MS, fileParallelism: false },
      },
      {
        extends: true,
        test: {
          name: 'mount',
          maxWorkers: availableParallelism() + 1,
          include: ['test/mount/**/*.test.ts'],
          testTimeout: 4 * MINUTE_MS,
          hookTimeout: 2 * MINUTE_MS,
        },
      },
      {
        extends: true,
        test: {
          name: 'vm',
          include: ['test/vm/**/*.test.ts'],
          testTimeout: 5 * MINUTE_MS,
          // Making the guest image takes a minute or two on a new machine.
          hookTimeout: 8 * MINUTE_MS,
        },
      },
    ],
  },
});
