/**
 * The fuzzer for some seconds, as `scripts/fuzz` runs it for minutes: FUSE messages, headers of foreign images, files in the
 * run-time directory, streams for the receive, configurations of machines. The control API's share is in test/torture, for it needs a mount.
 */
import { afterAll, describe, expect, it } from 'vitest';

import { command } from '../support/model/command.js';
import { compilePrograms } from '../support/compiled-program.js';
import { seedFromEnvironment } from '../support/model/random.js';
import { lacks } from '../support/tools.js';

const PROGRAM = 'scripts/fuzzing/main.ts';
const programs = compilePrograms('fuzz', [PROGRAM, 'daemon/transport/kernel/io-worker.ts']);
const SEED_MAX = 2 ** 31;

afterAll(() => { programs.remove(); });

describe.skipIf(lacks('qemu-img'))('fuzzing finds nothing', () => {
  it.each([['protocol', 25, 'messages'], ['runtime-files', 5, 'damages'], ['image', 10, 'images'], ['stream', 8, 'streams'], ['configuration', 8, 'configurations']])('in %s, for %i s', { timeout: 180_000 }, async (target, seconds, what) => {
    const seed = seedFromEnvironment() % SEED_MAX;
    const { code, stdout, stderr } = await command(process.execPath, [programs.pathOf(PROGRAM), '--target', target, '--seconds', String(seconds), '--seed', String(seed)], { timeoutMs: 170_000 });
    process.stdout.write(stdout);
    expect(code, `${stdout}${stderr}`).toBe(0);
    expect(Number(new RegExp(`${what} (\\d+)`, 'u').exec(stdout)?.[1])).toBeGreaterThan(20);
  });
});
