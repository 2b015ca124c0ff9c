/**
 * The fuzzer: malformed input for each part that takes input from outside, for a time, with a seed that repeats it.
 *
 * Started by `scripts/fuzz`, which builds, and by the tests, each for some seconds. Random cases come from fast-check, which
 * makes a failing case small. A coverage-guided fuzzer (jazzer.js) was looked at: its instrumentation does not reach worker
 * threads and modules as this program has them, and what it would find by coverage are the branches on opcodes and fields,
 * which the cases here know by themselves.
 */
import { parseArgs } from 'node:util';

import { exitNow } from '../../blockstore/hot/door.js';
import type { FuzzTarget } from '../../test/support/fuzz/fuzz-target.js';
import { configurationTarget } from '../../test/support/fuzz/configuration-target.js';
import { controlTarget } from '../../test/support/fuzz/control-target.js';
import { imageTarget } from '../../test/support/fuzz/image-target.js';
import { protocolTarget } from '../../test/support/fuzz/protocol-target.js';
import { runtimeFilesTarget } from '../../test/support/fuzz/runtime-files-target.js';
import { streamTarget } from '../../test/support/fuzz/stream-target.js';

const targets: readonly FuzzTarget[] = [protocolTarget, controlTarget, imageTarget, runtimeFilesTarget, streamTarget, configurationTarget];
const SEED_MAX = 2 ** 31 - 1;

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '10' }, seconds: { type: 'string' }, seed: { type: 'string' }, path: { type: 'string' },
    target: { type: 'string', multiple: true, default: [] }, 'cli-entry': { type: 'string', default: 'dist/cli/main.js' },
  },
});

function numberOf(text: string, name: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value < 0) throw new Error(`--${name} must be a number, not '${text}'`);
  return value;
}

function chosenTargets(): readonly FuzzTarget[] {
  if (values.target.length === 0) return targets;
  return values.target.map((name) => {
    const found = targets.find((target) => target.name === name);
    if (found === undefined) throw new Error(`--target: there is no '${name}', only ${targets.map((target) => target.name).join(', ')}`);
    return found;
  });
}

const seed = values.seed === undefined ? Math.floor(Math.random() * SEED_MAX) : numberOf(values.seed, 'seed');
const seconds = values.seconds === undefined ? numberOf(values.minutes, 'minutes') * 60 : numberOf(values.seconds, 'seconds');
const chosen = chosenTargets();
process.stdout.write(`fuzz: --seed ${seed}, ${seconds} s for ${chosen.map((target) => target.name).join(', ')}\n`);
let failed = 0;
for (const target of chosen) {
  try {
    const counts = await target.run({
      seed, milliseconds: (seconds * 1000) / chosen.length, cliEntry: values['cli-entry'], ...(values.path === undefined ? {} : { path: values.path }),
    });
    process.stdout.write(`${target.name}: passed (${Object.entries(counts).map(([what, count]) => `${what} ${count}`).join(', ')})\n`);
  } catch (thrown) {
    failed += 1;
    process.stdout.write(`${target.name}: FAILED (${target.summary}; again: ./scripts/fuzz --target ${target.name} --seed ${seed} --path PATH)\n`);
    const told: string[] = [];
    for (let error: unknown = thrown; error !== undefined && error !== null; error = (error as { cause?: unknown }).cause) {
      told.push(error instanceof Error ? (error.stack ?? error.message) : JSON.stringify(error));
    }
    // What was broken before what broke it, which may be long.
    process.stdout.write(`${told.toReversed().join('\n')}\n`);
  }
}
process.stdout.write(failed === 0 ? 'fuzz: nothing found\n' : `fuzz: ${failed} of ${chosen.length} targets failed\n`);
// Not process.exit(): it waits for each thread, and a worker that a failure left waiting for its next message waits for ever.
exitNow(failed === 0 ? 0 : 1);
