/**
 * Independence under guests' eyes: chains are made shorter, disks flattened, promoted and rebased while fio writes with verification, and
 * no byte is another one; what clones stand on is never lost by a removal, through the API or through the mount.
 */
import { readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';

import { createControlClient, type ControlClient } from '../../daemon/control/client.js';
import type { DiskInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { runFio, type FioOptions } from '../support/fio.js';
import { makePatternImage, sha256Of } from '../support/images.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { importFile } from './conformance-context.js';

const MIB = 1024 * 1024;
const BLOCK = 4096;
const SIZE_BYTES = 32 * MIB;
const TIMEOUT_MS = 120_000;
/** As long as chains may stay. */
const WANTED_LAYERS = 8;
/** What a test makes of it. */
const SEALS = 14;

interface Bed {
  readonly daemon: TestDaemon;
  readonly control: ControlClient;
  readonly images: string;
  readonly source: string;
}

describe.skipIf(lacks('/dev/fuse', 'fio'))('independence', () => {
  const cleanup = createCleanup();

  afterEach(() => cleanup.run());

  async function bed(): Promise<Bed> {
    const images = makeTempDir('images', cleanup);
    const source = join(images, 'source');
    makePatternImage(source, { sizeBytes: SIZE_BYTES, seed: 5, isHole: (block) => block % 100 < 20 });
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    const control = createControlClient({ socketPath: daemon.socketPath });
    await control.createContainer('c', {});
    await importFile(control, source, 'c/image', false);
    return { daemon, control, images, source };
  }

  async function clone(control: ControlClient, source: string, ...targets: string[]): Promise<void> {
    await control.clone({ source, targets, fill: false, copyOnRead: false });
  }

  async function until(what: string, isSo: () => Promise<boolean>): Promise<void> {
    const deadline = Date.now() + TIMEOUT_MS;
    while (!await isSo()) {
      if (Date.now() > deadline) throw new Error(`not within ${TIMEOUT_MS} ms: ${what}`);
      await sleep(100);
    }
  }

  it('merges layers of a disk that fio writes to with verification, and no read fails', { timeout: 300_000 }, async () => {
    const { daemon, control } = await bed();
    await clone(control, 'c/image', 'c/disk');
    const disk = daemon.path('c/disk');
    const fio: FioOptions = { filename: disk, size: 24 * MIB, verify: 'crc32c', verify_fatal: 1, verify_state_save: 0, randrepeat: 1, randseed: 17, bs: '4k', direct: 1, ioengine: 'libaio', iodepth: 16 };
    const writing = runFio({ ...fio, rw: 'randwrite', rate: '3m' }, TIMEOUT_MS);
    const state = { ended: false };
    void writing.finally(() => { state.ended = true; }).catch(() => undefined);
    let longest = 0;
    for (let seal = 0; seal < SEALS || !state.ended; seal += 1) {
      if (seal < SEALS) {
        await clone(control, 'c/disk', 'c/seal');
        await control.remove('c/seal', { keepData: true, recursive: false });
      }
      longest = Math.max(longest, (await control.show('c/disk')).backingChain.length);
      await sleep(200);
    }
    await writing;
    expect(longest).toBeGreaterThan(WANTED_LAYERS);
    await until('the chain is short', async () => (await control.show('c/disk')).backingChain.length <= WANTED_LAYERS);
    const reading = { ...fio, rw: 'randwrite', verify_only: 1 };
    await runFio(reading, TIMEOUT_MS);
    const server = await daemon.killServer();
    await daemon.waitForServer(server);
    await runFio(reading, TIMEOUT_MS);
    const check = await daemon.cli(['check', '--data']);
    expect(check.stdout).toContain('nothing is damaged');
    expect(check.code).toBe(0);
    daemon.assertQuietLog([/recovered what the last server/u, /server/u]);
  });

  it('flattens a disk in use, and what it stood on can go', { timeout: 300_000 }, async () => {
    const { daemon, control, source } = await bed();
    await clone(control, 'c/image', 'c/a', 'c/b');
    const refused = await daemon.cli(['rm', 'c/image']);
    expect(refused).toMatchObject({ code: 5 });
    expect(refused.stderr).toContain('c/a, c/b');
    const flat = await daemon.json<{ readonly flatten: boolean; readonly state: string }[]>(['flatten', 'c/a', 'c/b']);
    expect(flat).toMatchObject([{ path: 'c/a', state: 'completed', flatten: true }, { path: 'c/b', state: 'completed' }]);
    expect((await control.show('c/a')).backingChain).toHaveLength(1);
    expect(await control.remove('c/image', { keepData: false, recursive: false })).toMatchObject({ layersKept: 0 });
    expect(await sha256Of(daemon.path('c/a'))).toBe(await sha256Of(source));
    // Nothing of the image is left.
    expect((await daemon.status()).layersTotal).toBe(2);
    const again = await daemon.cli(['flatten', 'c/a']);
    expect(again).toMatchObject({ code: 0 });
    expect(again.stdout).toContain('c/a is independent');
  });

  it('promotes: the original can be removed then, and the clone is what the others stand on', { timeout: 300_000 }, async () => {
    const { daemon, control, source } = await bed();
    await clone(control, 'c/image', 'c/new', 'c/sibling');
    expect((await control.show('c/new')).cloneOf).toBe('c/image');
    expect(await daemon.json(['promote', 'c/new'])).toMatchObject({ path: 'c/new', origin: 'c/image' });
    const origins = await Promise.all(['c/image', 'c/new', 'c/sibling'].map(async (path): Promise<DiskInfo> => await control.show(path)));
    expect(origins.map((info) => info.cloneOf)).toEqual(['c/new', null, 'c/new']);
    const refused = await daemon.cli(['rm', 'c/new']);
    expect(refused).toMatchObject({ code: 5 });
    expect(refused.stderr).toContain('c/image, c/sibling');
    expect(await daemon.cli(['rm', 'c/image'])).toMatchObject({ code: 0 });
    const sum = await sha256Of(source);
    for (const name of ['c/new', 'c/sibling']) expect(await sha256Of(daemon.path(name))).toBe(sum);
    expect((await daemon.cli(['promote', 'c/new'])).code).toBe(2);
  });

  it('rebases a closed clone, or lists what is in the way', { timeout: 300_000 }, async () => {
    const { daemon, control, images, source } = await bed();
    const content = readFileSync(source);
    const next = Buffer.from(content);
    next.fill(0x51, 10 * BLOCK, 11 * BLOCK);
    next.fill(0x52, 30 * BLOCK, 32 * BLOCK);
    writeFileSync(join(images, 'next'), next);
    await importFile(control, join(images, 'next'), 'c/next', true);
    await clone(control, 'c/image', 'c/ok', 'c/not');
    const mine = Buffer.alloc(BLOCK, 0x77);
    const put = async (name: string, block: number): Promise<void> => {
      const { open } = await import('node:fs/promises');
      const file = await open(daemon.path(name), 'r+');
      await file.write(mine, 0, BLOCK, block * BLOCK);
      await file.close();
    };
    await put('c/ok', 12);
    await put('c/not', 31);
    expect(await daemon.json(['rebase', 'c/ok', 'c/next'])).toMatchObject({ path: 'c/ok', image: 'c/next', forced: false });
    mine.copy(next, 12 * BLOCK);
    expect(Buffer.compare(readFileSync(daemon.path('c/ok')), next)).toBe(0);
    const refused = await daemon.cli(['rebase', 'c/not', 'c/next', '--json']);
    expect(refused).toMatchObject({ code: 17, stdout: '' });
    expect(JSON.parse(refused.stderr)).toMatchObject({ error: { kind: 'conflict', context: { conflictsTotal: 1, conflictBytes: BLOCK, conflicts: [{ offsetBytes: 31 * BLOCK, lengthBytes: BLOCK }] } } });
    mine.copy(content, 31 * BLOCK);
    expect(Buffer.compare(readFileSync(daemon.path('c/not')), content)).toBe(0);
    const said = await daemon.cli(['rebase', 'c/not', 'c/next']);
    expect(said.stderr).toContain(`${BLOCK} bytes at ${31 * BLOCK}`);
    expect((await daemon.cli(['rebase', 'c/not', 'c/next', '--force'])).code).toBe(0);
    next.set(mine, 31 * BLOCK);
    content.copy(next, 12 * BLOCK, 12 * BLOCK, 13 * BLOCK);
    expect(Buffer.compare(readFileSync(daemon.path('c/not')), next)).toBe(0);
  });

  it('a name that goes takes no data of others with it: disk, file, image in place, container, through the mount', { timeout: 300_000 }, async () => {
    const { daemon, control, images, source } = await bed();
    const sum = await sha256Of(source);
    await importFile(control, source, 'c/in-place', true);
    await control.createContainer('d', {});
    await control.createContainer('e', {});
    writeFileSync(daemon.path('d/file'), 'twelve bytes');
    await clone(control, 'c/in-place', 'e/of-in-place');
    await clone(control, 'c/image', 'd/disk', 'e/of-image');
    await clone(control, 'd/file', 'e/of-file');
    const refusal = async (...args: string[]): Promise<string> => {
      const result = await daemon.cli(['rm', ...args]);
      expect(result.code).toBe(5);
      return result.stderr;
    };
    expect(await refusal('c/in-place')).toContain('e/of-in-place');
    expect(await refusal('d/file')).toContain('e/of-file');
    expect(await refusal('c', '-r')).toMatch(/d\/disk.*e\/of-i/u);
    expect(await refusal('d', '-r')).toContain('e/of-file');
    // Through the mount a name goes at once, as with --keep-data: rm(1) has nobody to ask.
    rmSync(daemon.path('c/image'));
    expect((await control.remove('d/file', { keepData: true, recursive: false })).layersKept).toBe(1);
    expect((await control.remove('d', { keepData: false, recursive: true })).nodesRemoved).toBe(2);
    expect((await control.remove('c', { keepData: true, recursive: true })).layersKept).toBe(1);
    expect(await sha256Of(daemon.path('e/of-in-place'))).toBe(sum);
    expect(await sha256Of(daemon.path('e/of-image'))).toBe(sum);
    expect(readFileSync(daemon.path('e/of-file'), 'utf8')).toBe('twelve bytes');
    expect((await control.show('e/of-image')).cloneOf).toBeNull();
    await control.remove('e', { keepData: false, recursive: true });
    expect((await daemon.status()).layersTotal).toBe(0);
    truncateSync(join(images, 'source'), SIZE_BYTES);
    expect(await sha256Of(source)).toBe(sum);
  });
});
