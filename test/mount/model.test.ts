/**
 * The model test: random operations on several disks under a mount, compared after each step with a plain copy in memory.
 *
 * Reads, writes of any offset and length, punches, zeroes, flushes, clones of clones and of live disks, fills, resizes,
 * removals; snapshots of one disk and of the container, read, cloned, gone back to, removed; clones of the container; range clones,
 * copy_file_range and cp; rebase, promotion, merges; send and receive, full and of changes; kills of the server in the middle of
 * writes, restarts of the daemon. The seed is printed; OFFSHOOT_SEED repeats
 * it, OFFSHOOT_MODEL_SECONDS makes it longer. The sources have holes, and one of them ends in the middle of a block.
 */
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import { transportAbilities } from '../../daemon/transport/abilities.js';
import type { TransportName } from '../../daemon/transport/abilities.js';
import { CLI_ENTRY, startTestDaemon } from '../support/daemon.js';
import type { TestDaemon } from '../support/daemon.js';
import { makePatternImage, sha256Of } from '../support/images.js';
import { ModelRun } from '../support/model/model-run.js';
import type { ModelDaemon } from '../support/model/model-parts.js';
import { createRandom, seedFromEnvironment } from '../support/model/random.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { REFUSED_ON_SOME_KERNELS, importFile, patternRange } from './conformance-context.js';

const MIB = 1024 * 1024;
const SECONDS = Number(process.env['OFFSHOOT_MODEL_SECONDS'] ?? 60);
const CONTAINER = 'model';
/** Time for the whole compare at the end, and for what is slow on a busy machine. */
const ENDING_MS = 180_000;
/** On a machine so busy that the time is over before each operation came up once. */
const LATER_MS_MAX = 60_000;

interface Source {
  readonly name: string;
  readonly sizeBytes: number;
  readonly seed: number;
  readonly inPlace: boolean;
  readonly isHole: (block: number) => boolean;
}

const SOURCES: readonly Source[] = [
  { name: 'even.img', sizeBytes: 3 * MIB, seed: 11, inPlace: true, isHole: (block) => block >= 200 && block < 330 },
  { name: 'odd.img', sizeBytes: 2 * MIB + 3 * 512, seed: 12, inPlace: false, isHole: (block) => block % 7 === 3 },
];

/** The daemon as the model drives it. A killed server is waited for by its successor's id. */
function modelDaemon(daemon: TestDaemon): ModelDaemon {
  let killed = 0;
  return {
    mountDir: daemon.mountDir,
    control: createControlClient({ socketPath: daemon.socketPath }),
    cliEntry: CLI_ENTRY,
    socketPath: daemon.socketPath,
    async killServer() { killed = await daemon.killServer(); },
    async waitUntilServing() { await daemon.waitForServer(killed); },
    stop: () => daemon.stop(),
    start: () => daemon.start(),
  };
}

describe.skipIf(lacks('/dev/fuse'))('random operations against a model', () => {
  const cleanup = createCleanup();

  afterEach(() => cleanup.run());

  async function run(transport: TransportName, seconds: number): Promise<void> {
    const random = createRandom(seedFromEnvironment());
    process.stdout.write(`model test, ${transport}: OFFSHOOT_SEED=${random.seed}, ${seconds} s\n`);
    const images = makeTempDir('images', cleanup);
    const daemon = await startTestDaemon({ transport, cleanup });
    const control = createControlClient({ socketPath: daemon.socketPath });
    await control.createContainer(CONTAINER, {});
    const model = new ModelRun({ daemon: modelDaemon(daemon), abilities: transportAbilities[transport], random, container: CONTAINER });
    const sums = new Map<string, string>();
    for (const source of SOURCES) {
      const file = join(images, source.name);
      makePatternImage(file, source);
      sums.set(file, await sha256Of(file));
      await importFile(control, file, `${CONTAINER}/${source.name}`, source.inPlace);
      model.adopt(`${CONTAINER}/${source.name}`, patternRange(source.seed, 0, source.sizeBytes, source.isHole));
    }
    await model.begin();
    try {
      await model.compareAll();
      const deadline = Date.now() + seconds * 1000;
      // Whatever the machine's pace, each operation comes up at least once.
      while (Date.now() < deadline || (model.steps < model.roundSteps && Date.now() < deadline + LATER_MS_MAX)) await model.step();
      await model.compareAll();
      await model.fillAll();
      await model.compareAll();
      await model.end();
      await daemon.stop();
      await daemon.start();
      await model.begin();
      await model.compareAll();
    } catch (thrown) {
      const text = thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown);
      throw new Error(`OFFSHOOT_SEED=${random.seed} (${transport}), step ${model.steps}: ${text}\nthe last steps:\n${model.recent()}`, { cause: thrown });
    } finally {
      await model.end();
    }
    process.stdout.write(`model test, ${transport}: ${model.steps} steps (${model.summary()})\n`);
    if (model.steps >= model.roundSteps) expect(model.missing, 'operations that never came up').toEqual([]);
    for (const [file, sum] of sums) expect(await sha256Of(file), `${file} must never change`).toBe(sum);
    daemon.assertQuietLog([REFUSED_ON_SOME_KERNELS, /killed|restart|journal|recover|server (?:ended|died|was)/i]);
  }

  it('agree on the kernel transport', { timeout: SECONDS * 1000 + ENDING_MS }, () => run('kernel', SECONDS * 0.75));

  it('agree on the fuse-native transport', { timeout: SECONDS * 1000 + ENDING_MS }, () => run('fuse-native', SECONDS * 0.25));
});
