/** The torture run for two minutes, and the fuzzing of the control API, which needs a daemon of its own as well. */
import { resolve } from 'node:path';
import { describe, expect, it } from 'vitest';

import { CLI_ENTRY } from '../support/daemon.js';
import { controlTarget } from '../support/fuzz/control-target.js';
import { seedFromEnvironment } from '../support/model/random.js';
import { lacks } from '../support/tools.js';
import { summaryOf, torture } from '../support/torture/torture-run.js';

const MINUTE_MS = 60_000;
const TORTURE_MS = Number(process.env['OFFSHOOT_TORTURE_SECONDS'] ?? 120) * 1000;
const FUZZ_MS = 20_000;
const SEED_MAX = 2 ** 31;

describe.skipIf(lacks('/dev/fuse', '/dev/loop-control', 'mkfs.ext4', 'fio'))('everything at once', () => {
  it('loses nothing, for two minutes', { timeout: TORTURE_MS + 3 * MINUTE_MS }, async () => {
    const seed = seedFromEnvironment() % SEED_MAX;
    process.stdout.write(`torture: OFFSHOOT_SEED=${seed}\n`);
    const { counts, failure, artefactsDir, said } = await torture({ seed, milliseconds: TORTURE_MS, storeFileSystem: 'ext4', cliEntry: CLI_ENTRY });
    process.stdout.write(`torture: ${summaryOf(counts)}\n`);
    if (failure !== null) throw new Error(`OFFSHOOT_SEED=${seed}, kept in ${artefactsDir ?? 'nothing'}: ${failure.message}\n${said}`, { cause: failure });
    for (const what of ['steps', 'kill', 'killEverything', 'fillStore', 'writes refused for space', 'fio runs']) expect(counts.get(what) ?? 0, what).toBeGreaterThan(0);
  });
});

describe.skipIf(lacks('/dev/fuse', 'mkfifo'))('fuzzing finds nothing', () => {
  it('in the control API', { timeout: 3 * MINUTE_MS }, async () => {
    const seed = seedFromEnvironment() % SEED_MAX;
    process.stdout.write(`fuzz: OFFSHOOT_SEED=${seed}\n`);
    const counts = await controlTarget.run({ seed, milliseconds: FUZZ_MS, cliEntry: resolve(CLI_ENTRY) });
    process.stdout.write(`control: ${Object.entries(counts).map(([what, count]) => `${what} ${count}`).join(', ')}\n`);
    expect(Object.values(counts).reduce((sum, count) => sum + count, 0)).toBeGreaterThan(20);
  });
});
