/**
 * Copies with the tools that people have (cp, mv, dd, qemu-img): on stores on ext4, XFS and btrfs a copy of a large disk is a clone; and what is not a clone,
 * because a tool copies in another way or because it cannot be, has the right content all the same.
 *
 * What cp asks for depends on its version, for files that look sparse: coreutils 9.1 (Debian 12) reads and writes their data, later ones call copy_file_range for each extent of
 * data. So what the later ones do is done here by xfs_io, and cp itself has a disk without holes to show that it is a clone, whichever version it has.
 */
import fs from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import type { DiskInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makeLoopFileSystem, type LoopKind } from '../support/faults/loop-file-system.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { firstDifference, patternBytes } from '../support/model/pattern.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const GIB = 1024 * MIB;

/** Bytes that the store's data files take. */
async function spaceOf(daemon: TestDaemon): Promise<number> {
  return Number.parseInt((await mustRun('du', ['-s', '--block-size=1', join(daemon.storeDir, 'layers')])).stdout, 10);
}

/** Bytes that are taken meanwhile. */
async function taken(daemon: TestDaemon, body: () => Promise<unknown>): Promise<number> {
  const before = await spaceOf(daemon);
  await body();
  return await spaceOf(daemon) - before;
}

async function expectSame(one: string, other: string): Promise<void> {
  expect(fs.statSync(one).size).toBe(fs.statSync(other).size);
  // Holes are not read, and zeros count as holes.
  expect((await mustRun('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', one, other])).stdout).toMatch(/identical/u);
}

/** All of a file, or a part, by copy_file_range and nothing else; as often as it takes. */
async function copyRange(from: string, to: string, lengthBytes: number, fromBytes = 0, toBytes = fromBytes): Promise<void> {
  await mustRun('xfs_io', ['-f', '-c', `copy_range -s ${fromBytes} -d ${toBytes} -l ${lengthBytes} ${from}`, to]);
}

async function start(cleanup: ReturnType<typeof createCleanup>, storeDir?: string): Promise<{ daemon: TestDaemon; at: (name: string) => string; shared: (name: string) => Promise<string[]> }> {
  const daemon = await startTestDaemon({ transport: 'kernel', cleanup, ...(storeDir === undefined ? {} : { storeDir }) });
  for (const name of ['c', 'd']) await daemon.json(['container', 'create', name]);
  return {
    daemon, at: (name) => join(daemon.mountDir, name),
    shared: async (name) => (await daemon.json<DiskInfo>(['show', name])).sharedWith.map(({ disk }) => disk ?? ''),
  };
}

describe.skipIf(lacks('/dev/fuse', 'qemu-img', 'mkfs.xfs', 'mkfs.btrfs', 'losetup')).each<[LoopKind]>([['ext4'], ['xfs'], ['btrfs']])('on a store on %s', (kind) => {
  const cleanup = createCleanup();
  afterEach(() => cleanup.run());

  it('a copy of a disk of 1 GiB is a clone, as a whole, by its extents and by qemu-img; so is what cp makes of a disk without holes', async () => {
    const { directory } = await makeLoopFileSystem(kind, cleanup);
    const { daemon, at, shared } = await start(cleanup, join(directory, 'store'));
    // A real copy of all of it would not fit: the file system has 400 MiB.
    const image = join(makeTempDir('images', cleanup), 'image');
    makePatternImage(image, { sizeBytes: GIB, seed: 5, isHole: (block) => block % 65_536 >= 2048 });
    await daemon.json(['import', image, 'c/disk']);
    const clones: [string, () => Promise<unknown>][] = [
      ['d/whole', async () => { await copyRange(at('c/disk'), at('d/whole'), GIB); }],
      ['c/extents', async () => {
        await mustRun('truncate', ['-s', '1G', at('c/extents')]);
        for (let from = 0; from < GIB; from += 256 * MIB) await copyRange(at('c/disk'), at('c/extents'), 8 * MIB, from);
      }],
      ['d/convert', async () => await mustRun('qemu-img', ['convert', '-C', '-f', 'raw', '-O', 'raw', at('c/disk'), at('d/convert')], { timeoutMs: 60_000 })],
    ];
    for (const [name, copy] of clones) {
      const bytes = await taken(daemon, copy);
      expect([name, bytes < MIB]).toEqual([name, true]);
      expect([name, await shared(name)]).toEqual([name, ['c/disk']]);
      await expectSame(at(name), image);
    }
    await mustRun('cp', ['--reflink=auto', at('c/disk'), at('d/plain')], { timeoutMs: 60_000 });
    await expectSame(at('d/plain'), image);
    const dense = `${image}.dense`;
    makePatternImage(dense, { sizeBytes: 32 * MIB, seed: 8 });
    await daemon.json(['import', dense, 'c/dense']);
    for (const [name, args] of [['c/dense-2', []], ['d/dense', ['-a']], ['d/dense-2', ['--reflink=auto']]] as const) {
      const bytes = await taken(daemon, async () => await mustRun('cp', [...args, at('c/dense'), at(name)]));
      expect([name, bytes < MIB, await shared(name)]).toEqual([name, true, ['c/dense']]);
      await expectSame(at(name), dense);
    }
    // What is written to one is nobody else's.
    const fd = fs.openSync(at('c/extents'), 'r+');
    fs.writeSync(fd, patternBytes(1, 0, 100_000), 0, 100_000, 256 * MIB + 77);
    fs.closeSync(fd);
    for (const name of ['c/disk', 'd/whole', 'd/convert']) await expectSame(at(name), image);
    expect(await daemon.json<{ verdict: string }>(['check'])).toMatchObject({ verdict: 'clean' });
    await daemon.stop();
  });
});

describe.skipIf(lacks('/dev/fuse', 'qemu-img', 'xfs_io'))('copies by', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let at: (name: string) => string;
  let shared: (name: string) => Promise<string[]>;
  let image: string;

  beforeAll(async () => {
    ({ daemon, at, shared } = await start(cleanup));
    image = join(makeTempDir('images', cleanup), 'image');
    makePatternImage(image, { sizeBytes: 24 * MIB, seed: 6, isHole: (block) => block % 1024 >= 700 });
    await daemon.json(['import', image, 'c/disk']);
  });
  afterAll(() => cleanup.run());

  it('dd and cp --sparse=always have the content, without sharing; cat too, sharing or not', async () => {
    await mustRun('dd', [`if=${at('c/disk')}`, `of=${at('d/dd')}`, 'bs=1M', 'status=none']);
    await mustRun('dd', [`if=${at('c/disk')}`, `of=${at('d/dd-direct')}`, 'bs=1M', 'iflag=direct', 'oflag=direct', 'status=none']);
    await mustRun('cp', ['--sparse=always', at('c/disk'), at('d/sparse')]);
    await mustRun('sh', ['-c', `cat ${at('c/disk')} > ${at('d/cat')}`]);
    for (const name of ['d/dd', 'd/dd-direct', 'd/sparse', 'd/cat']) {
      await expectSame(at(name), image);
      if (name !== 'd/cat') expect(await shared(name)).toEqual([]);
    }
    expect(fs.statSync(at('d/sparse')).blocks * 512).toBeLessThan(18 * MIB);
  });

  it('cp onto a disk that is there are refused, for a disk is not cut through the mount; without cutting it they work', async () => {
    await daemon.json(['clone', 'c/disk', 'c/target']);
    const other = patternBytes(8, 0, 3 * MIB + 100);
    fs.writeFileSync(at('c/file'), other);
    expect((await command('cp', [at('c/file'), at('c/target')])).code).toBe(1);
    await expectSame(at('c/target'), image);
    expect((await command('cp', [at('c/disk'), at('c/disk')])).stderr).toMatch(/are the same file/u);
    await mustRun('dd', [`if=${at('c/file')}`, `of=${at('c/target')}`, 'bs=64k', 'conv=notrunc', 'status=none']);
    await mustRun('qemu-img', ['convert', '-C', '-n', '-f', 'raw', '-O', 'raw', at('c/disk'), at('c/target')]);
    await expectSame(at('c/target'), image);
    await copyRange(at('c/file'), at('c/target'), other.length, 0, 4096);
    const expected = fs.readFileSync(image);
    other.copy(expected, 4096);
    expect(firstDifference(expected, fs.readFileSync(at('c/target')), 0)).toBeNull();
    expect((await shared('c/target')).sort()).toEqual(['c/disk', 'c/file']);
  });

  it('cp -a of a directory have modes, times, links and content, large files shared and small ones copied', async () => {
    fs.mkdirSync(at('c/dir/deep'), { recursive: true });
    await copyRange(at('c/disk'), at('c/dir/deep/large'), 24 * MIB);
    for (const size of [0, 1, 4095, 4096, 65_535, 65_536, 200_001]) fs.writeFileSync(at(`c/dir/${size}`), patternBytes(size, 0, size));
    fs.chmodSync(at('c/dir/4096'), 0o640);
    fs.utimesSync(at('c/dir/65536'), 1_000_000, 2_000_000);
    fs.symlinkSync('deep/large', at('c/dir/link'));
    await mustRun('cp', ['-a', at('c/dir'), at('d/dir')]);
    await mustRun('diff', ['-r', '--no-dereference', at('c/dir'), at('d/dir')]);
    const listing = async (directory: string): Promise<string> => (await mustRun('find', [directory, '-printf', '%P %m %s %y %T@ %l\\n'])).stdout.split('\n').sort().join('\n');
    expect(await listing(at('d/dir'))).toBe(await listing(at('c/dir')));
    expect(await shared('d/dir/200001')).toEqual(['c/dir/200001']);
    expect(await shared('d/dir/65535')).toEqual([]);
  });

  it('cp of what has an extent at every other block have the content, shared or not', async () => {
    const fine = join(dirname(image), 'fine');
    makePatternImage(fine, { sizeBytes: 4 * MIB + 1536, seed: 7, isHole: (block) => block % 2 === 1 || block % 64 === 8 });
    await daemon.json(['import', fine, 'c/fine']);
    await mustRun('cp', [at('c/fine'), at('d/fine')]);
    await copyRange(at('c/fine'), at('d/fine-whole'), 4 * MIB + 1536);
    for (const name of ['d/fine', 'd/fine-whole']) expect(firstDifference(fs.readFileSync(fine), fs.readFileSync(at(name)), 0)).toBeNull();
    expect(await shared('d/fine-whole')).toEqual(['c/fine']);
  });

  it('cp of a file that grows have a part of it from its begin on, and nothing else', async () => {
    const whole = patternBytes(9, 0, 8 * MIB);
    fs.writeFileSync(at('c/growing'), whole.subarray(0, MIB));
    const file = await fs.promises.open(at('c/growing'), 'a');
    const growth = { isOver: false };
    const growing = (async () => {
      for (let from = MIB; from < whole.length && !growth.isOver; from += 30_001) await file.appendFile(whole.subarray(from, Math.min(whole.length, from + 30_001)));
    })();
    for (let i = 0; i < 6; i += 1) {
      const atLeast = fs.statSync(at('c/growing')).size;
      await mustRun('cp', [...(i % 2 === 0 ? [] : ['--sparse=never']), at('c/growing'), at(`d/grown-${i}`)]);
      const copy = fs.readFileSync(at(`d/grown-${i}`));
      expect(copy.length).toBeGreaterThanOrEqual(atLeast);
      expect(firstDifference(whole.subarray(0, copy.length), copy, 0)).toBeNull();
    }
    growth.isOver = true;
    await growing;
    await file.close();
  });

  it('mv to another container are a change of names: the same node, with what it shares', async () => {
    await copyRange(at('c/disk'), at('c/moving'), 24 * MIB);
    const { ino } = fs.statSync(at('c/moving'));
    expect(await taken(daemon, async () => { await mustRun('mv', [at('c/moving'), at('d/moved')]); })).toBe(0);
    expect(fs.statSync(at('d/moved')).ino).toBe(ino);
    expect(await shared('d/moved')).toContain('c/disk');
    await expectSame(at('d/moved'), image);
  });

  it('any of them leave a store that is sound', async () => {
    await daemon.stop();
    await daemon.start();
    expect(await daemon.json<{ verdict: string }>(['check'])).toMatchObject({ verdict: 'clean' });
    await expectSame(at('d/moved'), image);
    daemon.assertQuietLog();
  });
});
