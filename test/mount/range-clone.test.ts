/**
 * Copies and range clones under a real mount: cp shares, xfs_io's copies end where they should, the server is killed meanwhile, and random copies
 * among files and disks agree with buffers in memory.
 */
import { execFile } from 'node:child_process';
import fs from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, describe, expect, it } from 'vitest';

import { createControlClient } from '../../daemon/control/client.js';
import type { CloneRangesResult, DiskInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { firstDifference, patternBytes } from '../support/model/pattern.js';
import { createRandom, seedFromEnvironment } from '../support/model/random.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { importFile, patternRange } from './conformance-context.js';

const run = promisify(execFile);
const MIB = 1024 * 1024;
const cleanup = createCleanup();

afterEach(() => cleanup.run());

/** Bytes that the store's data files take. */
async function spaceOf(daemon: TestDaemon): Promise<number> {
  const { stdout } = await run('du', ['-s', '--block-size=1', join(daemon.storeDir, 'layers')]);
  return Number.parseInt(stdout, 10);
}

async function start(sizeBytes: number, isHole: (block: number) => boolean = () => false): Promise<{ daemon: TestDaemon; at: (name: string) => string; content: Buffer }> {
  const daemon = await startTestDaemon({ transport: 'kernel', cleanup });
  const control = createControlClient({ socketPath: daemon.socketPath });
  await control.createContainer('c', {});
  const file = join(makeTempDir('images', cleanup), 'source.raw');
  makePatternImage(file, { sizeBytes, seed: 21, isHole });
  await importFile(control, file, 'c/source.img', false);
  return { daemon, at: (name) => join(daemon.mountDir, 'c', name), content: patternRange(21, 0, sizeBytes, isHole) };
}

async function expectContent(file: string, expected: Buffer): Promise<void> {
  expect(firstDifference(expected, await fs.promises.readFile(file), 0)).toBeNull();
}

async function clean(daemon: TestDaemon): Promise<void> {
  await daemon.stop();
  await daemon.start();
  expect(await daemon.json<{ verdict: string }>(['check'])).toMatchObject({ verdict: 'clean' });
}

describe.skipIf(lacks('/dev/fuse'))('under the mount', () => {
  it('cp takes no space, and afterwards either side goes its way', { timeout: 120_000 }, async () => {
    const { daemon, at, content } = await start(64 * MIB + 1024);
    const before = await spaceOf(daemon);
    await run('cp', ['--reflink=auto', '--sparse=never', at('source.img'), at('copy.img')]);
    await run('cp', ['--reflink=auto', at('copy.img'), at('copy-2.img')]);
    expect(await spaceOf(daemon) - before).toBeLessThan(2 * MIB);
    await expectContent(at('copy.img'), content);
    await expectContent(at('copy-2.img'), content);
    expect((await daemon.json<DiskInfo>(['show', 'c/copy-2.img'])).sharedWith).toMatchObject([{ disk: 'c/source.img' }]);
    const [one, two] = [Buffer.alloc(70_000, 1), Buffer.alloc(70_000, 2)];
    const source = await fs.promises.open(at('source.img'), 'r+');
    await source.write(one, 0, one.length, 5 * MIB + 11);
    await source.close();
    const copy = await fs.promises.open(at('copy.img'), 'r+');
    await copy.write(two, 0, two.length, 64 * MIB - 500);
    await copy.close();
    await expectContent(at('copy-2.img'), content);
    const changed = Buffer.concat([content], Math.max(content.length, 64 * MIB - 500 + two.length));
    two.copy(changed, 64 * MIB - 500);
    await expectContent(at('copy.img'), changed);
    one.copy(content, 5 * MIB + 11);
    await expectContent(at('source.img'), content);
    await clean(daemon);
    await expectContent(at('copy.img'), changed);
  });

  it('copies of odd places and sizes end where they should, in a disk and within one file', { timeout: 120_000 }, async () => {
    const { daemon, at, content } = await start(4 * MIB, (block) => block % 5 === 2);
    await daemon.json(['clone', 'c/source.img', 'c/target.img']);
    const expected = Buffer.from(content);
    for (const [from, to, length] of [[0, 2 * MIB, MIB], [1000, MIB + 1000, 300_000], [5000, 100, 80_000], [4 * MIB - 100_000, 0, 100_000], [0, 4 * MIB - 90_112, 90_112]] as const) {
      await run('xfs_io', ['-c', `copy_range -s ${from} -d ${to} -l ${length} ${at('source.img')}`, at('target.img')]);
      content.copy(expected, to, from, from + length);
      await expectContent(at('target.img'), expected);
    }
    await run('cp', [at('source.img'), at('file')]);
    await run('xfs_io', ['-c', `copy_range -s 4096 -d ${6 * MIB} -l ${MIB + 77} ${at('file')}`, at('file')]);
    const grown = Buffer.concat([content], 7 * MIB + 77);
    content.copy(grown, 6 * MIB, 4096, 4096 + MIB + 77);
    await expectContent(at('file'), grown);
    await clean(daemon);
    await expectContent(at('file'), grown);
  });

  it('offshoot clone --range shares blocks, in a disk that is there and in a new one', { timeout: 120_000 }, async () => {
    const { daemon, at, content } = await start(8 * MIB);
    await daemon.json(['clone', 'c/source.img', 'c/target.img']);
    const open = await fs.promises.open(at('target.img'), 'r');
    const before = await spaceOf(daemon);
    const done = await daemon.json<CloneRangesResult>(['clone', 'c/source.img', 'c/target.img', '--range', '0:4M:1M', '--range', '6M:0:64K']);
    expect(done).toMatchObject({ created: false, ranges: 2, sharedBytes: MIB + 65_536, sizeBytes: 8 * MIB });
    const made = await daemon.json<CloneRangesResult>(['clone', 'c/source.img', 'c/new.img', '--range', '1M:2M:3M', '--size', '16M']);
    expect(made).toMatchObject({ created: true, sizeBytes: 16 * MIB });
    expect(await spaceOf(daemon) - before).toBeLessThan(MIB);
    const expected = Buffer.from(content);
    content.copy(expected, 4 * MIB, 0, MIB);
    content.copy(expected, 0, 6 * MIB, 6 * MIB + 65_536);
    await expectContent(at('target.img'), expected);
    const fresh = Buffer.alloc(16 * MIB);
    content.copy(fresh, 2 * MIB, MIB, 4 * MIB);
    await expectContent(at('new.img'), fresh);
    await open.close();
    await expect(daemon.cli(['clone', 'c/source.img', 'c/target.img', '--range', '100:0:4K'])).resolves.toMatchObject({ code: 2, stderr: expect.stringMatching(/whole blocks/u) as string });
    await expect(daemon.cli(['rm', 'c/source.img'])).resolves.toMatchObject({ code: 5, stderr: expect.stringMatching(/stand/u) as string });
    await clean(daemon);
  });

  it('a server that is killed during copies leaves each of them whole', { timeout: 120_000 }, async () => {
    const { daemon, at, content } = await start(16 * MIB);
    for (let i = 0; i < 4; i += 1) {
      const copying = run('cp', ['--sparse=never', at('source.img'), at(`copy-${i}`)]);
      await new Promise((resolve) => setTimeout(resolve, 5 * i));
      const killed = await daemon.killServer();
      await copying;
      await daemon.waitForServer(killed);
      await expectContent(at(`copy-${i}`), content);
    }
    await clean(daemon);
    for (let i = 0; i < 4; i += 1) await expectContent(at(`copy-${i}`), content);
  });

  it('random copies, writes and cuts among files and disks agree with buffers', { timeout: 180_000 }, async () => {
    const random = createRandom(seedFromEnvironment());
    process.stdout.write(`range clones under the mount: OFFSHOOT_SEED=${random.seed}\n`);
    const { daemon, at, content } = await start(2 * MIB, (block) => block % 7 === 3);
    await daemon.json(['clone', 'c/source.img', 'c/disk.img']);
    await fs.promises.writeFile(at('file'), patternBytes(5, 0, 700_001));
    const models = new Map([['source.img', content], ['disk.img', Buffer.from(content)], ['file', Buffer.from(patternBytes(5, 0, 700_001))]]);
    const names = [...models.keys()];
    for (let step = 0; step < 120; step += 1) {
      const [fromName, toName] = [names[random.below(3)] ?? '', names[random.below(3)] ?? ''];
      const [from, to] = [models.get(fromName) ?? Buffer.alloc(0), models.get(toName) ?? Buffer.alloc(0)];
      if (random.below(3) === 0) {
        const where = random.below(to.length - 5000);
        const data = patternBytes(step + 100, where, 1 + random.below(5000));
        const handle = await fs.promises.open(at(toName), 'r+');
        await handle.write(data, 0, data.length, where);
        await handle.close();
        data.copy(to, where);
        continue;
      }
      const unit = random.below(4) === 0 ? 1 : 4096;
      const source = Math.floor(random.below(from.length) / unit) * unit;
      const target = Math.floor(random.below(to.length) / unit) * unit;
      const length = Math.min(random.below(500_000), from.length - source, toName === 'file' ? 500_000 : to.length - target);
      if (length === 0 || (fromName === toName && Math.abs(source - target) < length)) continue;
      await run('xfs_io', ['-c', `copy_range -s ${source} -d ${target} -l ${length} ${at(fromName)}`, at(toName)]);
      const after = Buffer.concat([to], Math.max(to.length, target + length));
      from.copy(after, target, source, source + length);
      models.set(toName, after);
      if (step % 40 === 39) await daemon.waitForServer(await daemon.killServer());
      const shown = Buffer.alloc(length + 8192);
      const handle = await fs.promises.open(at(toName), 'r');
      const { bytesRead } = await handle.read(shown, 0, shown.length, Math.max(0, target - 4096));
      await handle.close();
      const base = Math.max(0, target - 4096);
      expect(firstDifference(after.subarray(base, base + shown.length), shown.subarray(0, bytesRead), base)).toBeNull();
    }
    for (const [name, model] of models) await expectContent(at(name), model);
    await clean(daemon);
    for (const [name, model] of models) await expectContent(at(name), model);
  });
});
