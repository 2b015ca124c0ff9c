/**
 * Stores on the file systems that FORMAT.md names, each on a loop device of its own: what data does, and random operations against a model.
 *
 * The other tests run on whatever lies below TMPDIR and on tmpfs. File systems differ in what their holes, their SEEK_HOLE, their
 * punching and their copy-on-write make of the same calls; so the parts of the suites that look at these are run on each of them.
 * OFFSHOOT_MODEL_SECONDS makes the model run longer.
 */
import { join } from 'node:path';
import { afterAll, beforeAll, describe, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import { kernelAbilities } from '../../daemon/transport/abilities.js';
import { conformance } from '../mount/conformance.js';
import { REFUSED_ON_SOME_KERNELS, importFile, patternRange } from '../mount/conformance-context.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makeLoopFileSystem, type LoopFileSystem } from '../support/faults/loop-file-system.js';
import { makePatternImage } from '../support/images.js';
import { ModelRun } from '../support/model/model-run.js';
import { createRandom, seedFromEnvironment } from '../support/model/random.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const SECOND_MS = 1000;
const MODEL_SECONDS = Number(process.env['OFFSHOOT_MODEL_SECONDS'] ?? 5);
const ENDING_MS = 240 * SECOND_MS;
const CONTAINER = 'model';
const SOURCE = { name: 'odd.img', sizeBytes: 2 * 1024 * 1024 + 3 * 512, seed: 12, isHole: (block: number) => block % 7 === 3 };


for (const kind of ['xfs', 'btrfs'] as const) {
  describe.skipIf(lacks('/dev/fuse', 'losetup', `mkfs.${kind}`, 'xfs_io', 'setpriv'))(`a store on ${kind}`, () => {
    const cleanup = createCleanup();
    let daemon: TestDaemon;
    let fileSystem: LoopFileSystem;
    let scratchDir: string;

    beforeAll(async () => {
      scratchDir = makeTmpfsDir('scratch', cleanup);
      fileSystem = await makeLoopFileSystem(kind, cleanup);
      daemon = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: join(fileSystem.directory, 'store') });
    });

    afterAll(() => cleanup.run());

    conformance(() => ({ daemon, abilities: kernelAbilities, scratchDir }), ['data']);

    it('does to random operations what a copy in memory does', { timeout: MODEL_SECONDS * SECOND_MS + ENDING_MS }, async () => {
      const random = createRandom(seedFromEnvironment());
      const control = createControlClient({ socketPath: daemon.socketPath });
      const image = join(makeTempDir('images', cleanup), SOURCE.name);
      makePatternImage(image, SOURCE);
      await control.createContainer(CONTAINER, {});
      let killed = 0;
      const model = new ModelRun({
        abilities: kernelAbilities, random, container: CONTAINER,
        daemon: {
          mountDir: daemon.mountDir, control, cliEntry: CLI_ENTRY, socketPath: daemon.socketPath, stop: () => daemon.stop(), start: () => daemon.start(),
          async killServer() { killed = await daemon.killServer(); },
          async waitUntilServing() { await daemon.waitForServer(killed); },
        },
      });
      await importFile(control, image, `${CONTAINER}/${SOURCE.name}`, false);
      model.adopt(`${CONTAINER}/${SOURCE.name}`, patternRange(SOURCE.seed, 0, SOURCE.sizeBytes, SOURCE.isHole));
      await model.begin();
      try {
        const deadlineMs = performance.now() + MODEL_SECONDS * SECOND_MS;
        while (performance.now() < deadlineMs) await model.step();
        await model.compareAll();
        await model.fillAll();
        await model.compareAll();
      } catch (thrown) {
        throw new Error(`OFFSHOOT_SEED=${random.seed} (${kind}), step ${model.steps}:\n${model.recent()}`, { cause: thrown });
      } finally {
        await model.end();
      }
      process.stdout.write(`store on ${kind}: ${model.steps} steps, OFFSHOOT_SEED=${random.seed}\n`);
      daemon.assertQuietLog([REFUSED_ON_SOME_KERNELS, /killed|restart|journal|recover|server (?:ended|died|was)/i]);
    });
  });
}
