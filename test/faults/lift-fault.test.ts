/**
 * Lifting a fault where page cache and device disagree, as after an fdatasync that failed: the kernel has marked the pages clean, reads
 * give what the device never got, and the next fdatasync succeeds.
 *
 * A block store on a real ext4 or XFS on a loop device. The device's content is changed below the file system, in the loop
 * device's own file, while the pages stay in the cache; a part of the device that gives EIO is one that the loop device's file does not have.
 */
import { closeSync, fsyncSync, openSync, readFileSync, statSync, truncateSync, writeSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { PIECE_BYTES } from '../../blockstore/checksum-units.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { runCheck, type CheckOutcome, type CheckRequest } from '../../daemon/jobs/check-run.js';
import type { Hasher as HasherType } from '../../daemon/jobs/hasher.js';
import { TestStore } from '../support/blockstore-fixture.js';
import { mustRun } from '../support/model/command.js';
import { makeSmallStore, type SmallFileSystem } from '../support/small-store.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
/** What a small ext4 allocates. */
const UNIT_BYTES = 1024;
const TIB = 1024 * 1024 * MIB;
const FILE_SYSTEMS: readonly (readonly [SmallFileSystem, number])[] = [['ext4', 128], ['xfs', 320]];
// A thread cannot be started from TypeScript.
const { Hasher } = await import(resolve(import.meta.dirname, '../../dist/daemon/jobs/hasher.js')) as { readonly Hasher: typeof HasherType };

const cleanup = createCleanup();
const stores: TestStore[] = [];
afterEach(async () => {
  // Before the file system below goes.
  for (const store of stores.splice(0)) await store.close();
  await cleanup.run();
});

interface Bed {
  readonly test: TestStore;
  /** The device: the loop device's file. */
  readonly device: string;
}

async function makeBed(kind: SmallFileSystem, mib: number): Promise<Bed> {
  const small = await makeSmallStore(kind, mib, 0, cleanup);
  await mustRun('mkdir', [small.storeDir]);
  const test = new TestStore({ storeDir: small.storeDir });
  stores.push(test);
  return { test, device: join(dirname(dirname(small.storeDir)), 'image') };
}

/** Where a byte of a file lies on the device. */
async function placeOnDevice(file: string, offsetBytes: number): Promise<number> {
  const { stdout } = await mustRun('filefrag', [`-b${UNIT_BYTES}`, '-v', file]);
  const unit = Math.floor(offsetBytes / UNIT_BYTES);
  for (const line of stdout.split('\n')) {
    const [, first, last, physical] = /^\s*\d+:\s*(\d+)\.\.\s*(\d+):\s*(\d+)\.\./u.exec(line) ?? [];
    if (physical !== undefined && unit >= Number(first) && unit <= Number(last)) return (Number(physical) + unit - Number(first)) * UNIT_BYTES;
  }
  throw new Error(`byte ${offsetBytes} of ${file} lies nowhere:\n${stdout}`);
}

/** The device has this, whatever the page cache says. */
async function putOnDevice({ device }: Bed, file: string, offsetBytes: number, content: Buffer): Promise<void> {
  const fd = openSync(device, 'r+');
  writeSync(fd, content, 0, content.length, await placeOnDevice(file, offsetBytes));
  fsyncSync(fd);
  closeSync(fd);
}

async function check({ test }: Bed, request: Partial<CheckRequest>): Promise<CheckOutcome> {
  return await runCheck({
    meta: test.store.meta, files: test.store.files, disks: test.store.disks, databaseProblems: () => Promise.resolve(test.store.meta.audit.databaseProblems()),
    makeHasher: () => new Hasher(null), lift: { prepare: async (id) => { await test.store.prepareToLift(id); }, clear: (id) => { test.store.clearFault(id); } },
  }, { target: null, data: false, repair: false, ...request }, { signal: new AbortController().signal, progress: () => undefined });
}

/** The disk fails as by an fdatasync that failed, and is closed. */
async function fault({ test }: Bed, disk: NodeRow): Promise<void> {
  const store = test.store as unknown as { readonly committer: { readonly fault: (layer: unknown, failure: Error) => void } };
  store.committer.fault(test.disk(disk), new Error('EIO: a test'));
  await expect(test.store.flush(disk.id)).rejects.toMatchObject({ kind: 'faulted' });
  test.store.disks.release(disk.id);
}

function fileOf({ test }: Bed, disk: NodeRow): string {
  return test.store.files.storePath(test.layer(disk).id);
}

describe.skipIf(lacks('filefrag', 'mkfs.ext4', 'mkfs.xfs')).each(FILE_SYSTEMS)('a fault that is lifted on %s', (kind, mib) => {
  it('leaves no page that the device does not have, and says how much was lost', async () => {
    const bed = await makeBed(kind, mib);
    const { test } = bed;
    const clone = test.clone(test.emptyImage('image', 2 * MIB), 'clone');
    test.acquire(clone);
    test.write(clone, 0, Buffer.alloc(6 * BLOCK_BYTES, 7));
    test.write(clone, MIB + BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 7));
    await test.store.flush(clone.id);
    const expected = test.read(clone, 0, 2 * MIB);
    const file = fileOf(bed, clone);
    // Written over, acknowledged, and lost by the device: two blocks as they were before, one as a torn write leaves it.
    const before = Buffer.alloc(BLOCK_BYTES, 3);
    const torn = Buffer.concat([Buffer.alloc(512, 3), Buffer.alloc(BLOCK_BYTES - 512, 7)]);
    for (const [offsetBytes, content] of [[BLOCK_BYTES, before], [4 * BLOCK_BYTES, torn], [MIB + BLOCK_BYTES, before]] as const) {
      await putOnDevice(bed, file, offsetBytes, content);
      content.copy(expected, offsetBytes);
    }
    expect(test.read(clone, 0, 2 * MIB).equals(expected), 'the page cache must still say otherwise').toBe(false);
    await fault(bed, clone);

    expect(await check(bed, { repair: true, target: clone })).toMatchObject({ verdict: 'clean', lifted: [{ path: 'clone', lostBytes: 3 * BLOCK_BYTES }], notLifted: [] });
    test.expectContent(clone, expected);
    await mustRun('sh', ['-c', 'sync; echo 3 > /proc/sys/vm/drop_caches']);
    test.store.disks.retireIdle(clone.id);
    test.expectContent(clone, expected);
  }, 60_000);

  it('keeps the length of a disk that ends within a block, and lets it be written again', async () => {
    const bed = await makeBed(kind, mib);
    const { test } = bed;
    const sizeBytes = 2 * MIB + 512;
    const disk = test.emptyImage('disk', sizeBytes);
    test.acquire(disk);
    test.write(disk, 0, Buffer.alloc(sizeBytes, 7));
    await test.store.flush(disk.id);
    const file = fileOf(bed, disk);
    await putOnDevice(bed, file, 2 * MIB, Buffer.alloc(512, 3));
    await fault(bed, disk);
    expect(await check(bed, { repair: true, target: disk })).toMatchObject({ lifted: [{ path: 'disk', lostBytes: 512 }] });
    test.expectContent(disk, Buffer.concat([Buffer.alloc(2 * MIB, 7), Buffer.alloc(512, 3)]));
    expect(statSync(file).size).toBe(sizeBytes);
    test.acquire(disk);
    test.write(disk, 512, Buffer.alloc(512, 9));
    await test.store.flush(disk.id);
    expect(readFileSync(file).subarray(512, 1024).equals(Buffer.alloc(512, 9))).toBe(true);
    test.store.disks.release(disk.id);
  }, 60_000);

  it('passes over what is a hole: a disk of 1 TiB with one block of data', async () => {
    const bed = await makeBed(kind, mib);
    const { test } = bed;
    const clone = test.clone(test.emptyImage('image', TIB), 'clone');
    test.acquire(clone);
    test.write(clone, 0, Buffer.alloc(BLOCK_BYTES, 7));
    test.store.data.discard(clone.id, MIB, TIB - MIB);
    await test.store.flush(clone.id);
    await fault(bed, clone);
    expect(await check(bed, { repair: true, target: clone })).toMatchObject({ lifted: [{ path: 'clone', lostBytes: 0 }] });
    test.acquire(clone);
    expect(test.read(clone, 0, BLOCK_BYTES).equals(Buffer.alloc(BLOCK_BYTES, 7))).toBe(true);
    test.store.disks.release(clone.id);
  }, 60_000);
});

describe.skipIf(lacks('filefrag', 'mkfs.ext4'))('a fault of a disk on a device that cannot be read in one place', () => {
  it('is not lifted, although the page cache has it all; it is when the device can be read again', async () => {
    const test = new TestStore();
    stores.push(test);
    // A device for the first layer's data alone: what the database writes must not make the loop device's file longer again.
    const device = join(makeTempDir('device', cleanup), 'image');
    await mustRun('truncate', ['-s', '32M', device]);
    await mustRun('mkfs.ext4', ['-q', '-F', '-O', '^has_journal', '-E', 'lazy_itable_init=0', device]);
    const directory = join(test.storeDir, 'layers', '01');
    await mustRun('mount', ['-o', 'loop', device, directory]);
    cleanup.add(async () => { await mustRun('umount', [directory]); });
    await mustRun('rmdir', [join(directory, 'lost+found')]);
    const disk = test.emptyImage('disk', 4 * MIB);
    const bed = { test, device };
    const file = fileOf(bed, disk);
    expect(dirname(file)).toBe(directory);
    test.acquire(disk);
    test.write(disk, 0, Buffer.alloc(4 * MIB, 7));
    await test.store.flush(disk.id);
    await mustRun('sync', ['-f', file]);
    await fault(bed, disk);

    const deviceBytes = statSync(device).size;
    const fromBytes = await placeOnDevice(file, 2 * MIB);
    const copy = readFileSync(device).subarray(fromBytes);
    truncateSync(device, fromBytes);
    const refused = await check(bed, { repair: true, target: disk });
    const fd = openSync(device, 'r+');
    writeSync(fd, copy, 0, copy.length, fromBytes);
    closeSync(fd);
    truncateSync(device, deviceBytes);
    expect(refused).toMatchObject({ verdict: 'corruption', lifted: [], notLifted: [{ path: 'disk' }] });
    expect(refused.findings.map(({ kind, offsetBytes, lengthBytes, disks }) => [kind, offsetBytes, lengthBytes, disks])).toEqual([
      ['data-unreadable', 2 * MIB, PIECE_BYTES, ['disk']], ['data-unreadable', 3 * MIB, PIECE_BYTES, ['disk']],
    ]);
    expect(test.row(disk).fault).toContain('EIO');
    expect(await check(bed, { repair: true, target: disk })).toMatchObject({ verdict: 'clean', lifted: [{ path: 'disk', lostBytes: 0 }] });
    test.expectContent(disk, Buffer.alloc(4 * MIB, 7));
  }, 60_000);
});
