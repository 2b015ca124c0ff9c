/**
 * A source on a file system of this machine that is taken away, truncated, written to and replaced while disks on it are open, seen from the mount:
 * what disks own is served all the while, what they need of it is an error and never zeros or a mixture, and when the file that was taken in is
 * back, the same descriptors read it again. The status names the file and the disks.
 */
import fs from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { DiskInfo, FillInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage, patternBlock } from '../support/images.js';
import { mustRun } from '../support/model/command.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 4 * MIB;
const SEED = 81;
const OWNED = Buffer.alloc(BLOCK_BYTES, 'o');
/** In whole seconds, so that it can be set again exactly. */
const TIME = new Date('2026-01-02T03:04:05Z');
const PATIENCE_MS = 20_000;

describe.skipIf(lacks('/dev/fuse'))('a local source', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let directory: string;
  let file: string;
  let round = 0;
  let disk = '';
  let fd = -1;

  beforeAll(async () => {
    directory = makeTempDir('sources', cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, sourceTimeoutSeconds: 2 });
    cleanup.add(() => { if (fd >= 0) fs.closeSync(fd); });
    await daemon.json(['container', 'create', 'c']);
  }, 60_000);

  afterAll(() => cleanup.run(), 60_000);

  /** A disk on a new source that owns its block 5, opened once. */
  beforeEach(async () => {
    if (fd >= 0) fs.closeSync(fd);
    round += 1;
    file = join(directory, `source-${round}`);
    disk = `c/disk-${round}`;
    original();
    await daemon.json(['import', file, disk, '--in-place']);
    fd = fs.openSync(daemon.path(disk), 'r+');
    fs.writeSync(fd, OWNED, 0, BLOCK_BYTES, 5 * BLOCK_BYTES);
    expect(read(0)).toBe('source');
  }, 60_000);

  function original(): void {
    makePatternImage(file, { sizeBytes: SIZE_BYTES, seed: SEED });
    fs.utimesSync(file, TIME, TIME);
  }

  /** Whose the block is that the open descriptor reads, or the error. */
  function read(block: number): string {
    const target = Buffer.alloc(BLOCK_BYTES);
    try {
      fs.readSync(fd, target, 0, BLOCK_BYTES, block * BLOCK_BYTES);
    } catch (error) {
      return (error as NodeJS.ErrnoException).code ?? 'error';
    }
    if (target.equals(OWNED)) return 'owned';
    return target.equals(patternBlock(SEED, block)) ? 'source' : 'something else';
  }

  const becomes = async (block: number, what: string): Promise<void> => {
    expect(await waitUntil(() => read(block) === what, PATIENCE_MS), `block ${block} becomes ${what}, is ${read(block)}`).toBe(true);
  };
  const warned = async (words: RegExp): Promise<boolean> =>
    await waitUntil(async () => (await daemon.status()).warnings.some((warning) => words.test(warning) && warning.includes(file) && warning.includes(disk)), PATIENCE_MS);

  /** While the source is refused: nothing of it is read, all else goes on. */
  async function expectRefused(words: RegExp, kind: string): Promise<void> {
    await becomes(20, 'EIO');
    expect(read(5)).toBe('owned');
    fs.writeSync(fd, OWNED, 0, BLOCK_BYTES, 6 * BLOCK_BYTES);
    expect(read(6)).toBe('owned');
    expect(() => { fs.writeSync(fd, Buffer.from('part'), 0, 4, 30 * BLOCK_BYTES); }).toThrow(/EIO/);
    // A new open of it is one of what it owns.
    const again = fs.openSync(daemon.path(disk), 'r');
    const target = Buffer.alloc(BLOCK_BYTES);
    fs.readSync(again, target, 0, BLOCK_BYTES, 5 * BLOCK_BYTES);
    fs.closeSync(again);
    expect(target.equals(OWNED)).toBe(true);
    expect(await warned(words)).toBe(true);
    expect((await daemon.json<DiskInfo>(['show', disk])).fault).toMatch(words);
    const clone = await daemon.cli(['clone', disk, `${disk}-clone`, '--json']);
    expect(JSON.parse(clone.stderr)).toMatchObject({ error: { kind, message: expect.stringContaining(file) as string } });
  }

  async function expectBack(): Promise<void> {
    for (const block of [0, 20, 30, 900]) await becomes(block, 'source');
    for (const block of [5, 6]) expect(read(block)).toBe('owned');
    expect(await waitUntil(async () => !(await daemon.status()).warnings.join().includes(file), PATIENCE_MS)).toBe(true);
    expect((await daemon.json<DiskInfo>(['show', disk])).fault).toBeNull();
  }

  const changes: readonly (readonly [string, RegExp, () => void])[] = [
    ['truncated', /has 1048576 bytes now/, () => { fs.truncateSync(file, MIB); }],
    ['written to', /was modified at/, () => { fs.writeFileSync(file, 'new', { flag: 'r+' }); }],
  ];

  it.each(changes)('that is %s while a disk is open is refused, and read again when it is what it was', async (_name, words, change) => {
    change();
    await expectRefused(words, 'source-changed');
    original();
    await expectBack();
  });

  it('that is moved away while a disk is open is read on, with a warning; after a restart it is refused until it is back', async () => {
    fs.renameSync(file, `${file}.away`);
    expect(await warned(/the name leads elsewhere/)).toBe(true);
    for (const block of [0, 20, 900]) expect(read(block)).toBe('source');
    await daemon.waitForServer(await daemon.killServer());
    await expectRefused(/cannot be reached/, 'source-unreachable');
    // Another file in its place is not taken for it.
    fs.writeFileSync(file, Buffer.alloc(SIZE_BYTES, 'x'));
    fs.utimesSync(file, TIME, TIME);
    await expectRefused(/another file|changed or replaced/, 'source-changed');
    fs.renameSync(`${file}.away`, file);
    await expectBack();
  });

  it('that changes under a fill holds it up, keeps nothing of the new content, and lets it go on', async () => {
    await daemon.json(['fill', 'start', disk, '--rate', '500K']);
    expect(await waitUntil(async () => (await daemon.json<FillInfo>(['fill', 'status', disk])).doneBytes > 0, PATIENCE_MS)).toBe(true);
    fs.writeFileSync(file, Buffer.alloc(SIZE_BYTES, 'n'), { flag: 'r+' });
    expect(await waitUntil(async () => {
      const fill = await daemon.json<FillInfo>(['fill', 'status', disk]);
      return fill.state === 'running' && /waiting for the source: .*was modified/.test(fill.message ?? '');
    }, PATIENCE_MS)).toBe(true);
    original();
    await daemon.json(['fill', 'resume', disk, '--rate', 'unlimited']);
    const end = await daemon.cli(['fill', 'wait', disk]);
    expect(end.code, end.stderr).toBe(0);
    fs.rmSync(file);
    for (let block = 0; block < SIZE_BYTES / BLOCK_BYTES; block += 1) expect(read(block), `block ${block}`).toBe(block === 5 ? 'owned' : 'source');
  });

  it('on a mount of another daemon is remote: refused when it changes there, and read again when it is back', async () => {
    const host = await startTestDaemon({ transport: 'kernel', cleanup });
    await host.json(['container', 'create', 'c']);
    const far = host.path('c/source');
    const put = async (): Promise<void> => {
      original();
      await mustRun('cp', [file, `${far}.new`]);
      await mustRun('touch', ['-d', TIME.toISOString(), `${far}.new`]);
      await mustRun('mv', [`${far}.new`, far]);
    };
    await put();
    await daemon.json(['import', far, `${disk}-far`, '--in-place']);
    fs.closeSync(fd);
    fd = fs.openSync(daemon.path(`${disk}-far`), 'r+');
    fs.writeSync(fd, OWNED, 0, BLOCK_BYTES, 5 * BLOCK_BYTES);
    expect(read(100)).toBe('source');
    await mustRun('truncate', ['-s', String(MIB), far]);
    await becomes(900, 'EIO');
    expect(read(0)).toBe('EIO');
    expect(read(5)).toBe('owned');
    const words = new RegExp(`${far}.*has 1048576 bytes now`);
    expect(await waitUntil(async () => (await daemon.status()).warnings.some((warning) => words.test(warning)), PATIENCE_MS)).toBe(true);
    await put();
    await becomes(900, 'source');
    // Its daemon dies: whoever asks waits for the next one, as for any guest.
    const next = host.waitForServer(await host.killServer());
    expect(read(200)).toBe('source');
    await next;
    fs.closeSync(fd);
    fd = -1;
    await daemon.stop();
  });
});
