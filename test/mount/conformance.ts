/**
 * The conformance suite: what every transport must carry, run on a started daemon.
 *
 * A transport that cannot carry something says so in its abilities, and the suite then expects the refusal that belongs
 * to the missing ability; nothing is left out. Every access to the mount is made by another process with a time-out.
 */
import { chmodSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import type { TransportAbilities } from '../../daemon/transport/abilities.js';
import type { TestDaemon } from '../support/daemon.js';
import { makePatternImage, sha256Of } from '../support/images.js';
import { mustRun } from '../support/model/command.js';
import { FileAgent } from '../support/model/file-agent.js';
import { IMAGE_BYTES, IMAGE_SEED, REFUSED_ON_SOME_KERNELS, imageBytes, importFile, isImageHole } from './conformance-context.js';
import type { Conformance } from './conformance-context.js';
import { conformanceOfData } from './conformance-data.js';
import { conformanceOfNames } from './conformance-names.js';
import { conformanceOfSizes } from './conformance-sizes.js';
import { conformanceOfTools } from './conformance-tools.js';

export interface ConformanceSubject {
  readonly daemon: TestDaemon;
  readonly abilities: TransportAbilities;
  /** An ordinary directory outside mount and store, on a file system that takes files of 16 TiB and more. */
  readonly scratchDir: string;
}

const CONTAINER = 'conformance';
const PARTS = { names: conformanceOfNames, data: conformanceOfData, sizes: conformanceOfSizes, tools: conformanceOfTools };

/** All of it, or the parts that are named: for what lies below the transport. */
export function conformance(subject: () => ConformanceSubject, parts: readonly (keyof typeof PARTS)[] = ['names', 'data', 'sizes', 'tools']): void {
  let started: Conformance | undefined;
  const context = (): Conformance => {
    if (started === undefined) throw new Error('the suite has not begun');
    return started;
  };

  beforeAll(async () => {
    const { daemon, abilities, scratchDir } = subject();
    // An ordinary user must be able to reach the mount.
    chmodSync(dirname(daemon.mountDir), 0o711);
    const control = createControlClient({ socketPath: daemon.socketPath });
    await control.createContainer(CONTAINER, {});
    const imageFile = join(scratchDir, 'image');
    makePatternImage(imageFile, { sizeBytes: IMAGE_BYTES, seed: IMAGE_SEED, isHole: isImageHole });
    const image = `${CONTAINER}/image.img`;
    await importFile(control, imageFile, image, true);
    let names = 0;
    const fresh = (prefix: string): string => `${prefix}-${(names += 1)}`;
    started = {
      abilities, daemon, control, scratchDir, imageFile, fresh,
      container: CONTAINER,
      agent: await FileAgent.start({ timeoutMs: 60_000 }),
      at: (name) => daemon.path(`${CONTAINER}/${name}`),
      async cloneOfImage({ copyOnRead = false } = {}) {
        const name = fresh('clone');
        await control.clone({ source: image, targets: [`${CONTAINER}/${name}`], fill: false, copyOnRead });
        return name;
      },
    };
  });

  afterAll(async () => {
    await started?.agent.stop();
  });

  for (const part of parts) describe(part, () => { PARTS[part](context); });

  describe('over a restart of the daemon', () => {
    it('keeps everything: names, content, modes, owners, times, links', async () => {
      const { agent, at, daemon, cloneOfImage, imageFile } = context();
      const name = await cloneOfImage();
      await agent.call('mkdir', at('kept'), 0o750);
      await agent.call('writeFile', at('kept/file'), 'content');
      await agent.call('chown', at('kept/file'), 1234, 5678);
      await agent.call('chmod', at('kept/file'), 0o604);
      await agent.call('setTimes', at('kept/file'), 1_234_567_890_123_000_000n, 987_654_321_987_000_000n);
      await agent.call('symlink', 'file', at('kept/link'));
      const fd = await agent.call('open', at(name), 2, 0);
      await agent.call('pwrite', fd, Buffer.from('written before the restart'), 4090);
      await agent.call('close', fd);
      const before = await agent.call('stat', at('kept/file'));
      const entries = await agent.call('readdir', at('.'));

      await daemon.stop();
      await daemon.start();

      expect(await agent.call('readdir', at('.'))).toEqual(entries);
      expect(await agent.call('stat', at('kept/file'))).toEqual(before);
      expect((await agent.call('readFile', at('kept/file'))).toString()).toBe('content');
      expect((await agent.call('stat', at('kept'))).mode & 0o7777).toBe(0o750);
      expect(await agent.call('readlink', at('kept/link'))).toBe('file');
      const again = await agent.call('open', at(name), 0, 0);
      const expected = imageBytes(0, 1024 * 1024);
      expected.write('written before the restart', 4090);
      expect((await agent.call('pread', again, expected.length, 0)).equals(expected)).toBe(true);
      await agent.call('close', again);
      expect((await mustRun('sha256sum', [at('image.img')])).stdout.slice(0, 64)).toBe(await sha256Of(imageFile));
    });

    it('has written no warning to its log', () => {
      context().daemon.assertQuietLog([REFUSED_ON_SOME_KERNELS]);
    });
  });
}
