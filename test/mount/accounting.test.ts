/**
 * Accounting with the real daemon: `df` against du of the store's layers directory, limits as programs under the mount meet them, TRIM through a loop device,
 * and the history of operations over restarts.
 */
import { constants, existsSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf } from '../../blockstore/errors.js';
import type { CloneResult, DiskInfo, FillInfo, JobInfo, NodeInfo, RemoveResult } from '../../daemon/control/schemas.js';
import type { SpaceReport, QuotaInfo } from '../../daemon/control/space-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { mustRun } from '../support/model/command.js';
import { FileAgent } from '../support/model/file-agent.js';
import { patternBytes } from '../support/model/pattern.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const IMAGE_BYTES = 48 * MIB;
const DATA_BYTES = 32 * MIB;
const { O_RDWR, O_CREAT } = constants;
const PUNCH = 3;

describe.skipIf(lacks('/dev/fuse', 'losetup', 'blkdiscard', 'fstrim', 'mkfs.ext4'))('accounting', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let agent: FileAgent;
  let scratch: string;
  let layers: string;

  beforeAll(async () => {
    scratch = makeTempDir('accounting', cleanup);
    makePatternImage(join(scratch, 'image'), { sizeBytes: IMAGE_BYTES, seed: 3, isHole: (block) => block * 4096 >= DATA_BYTES });
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    layers = join((await daemon.status()).storeDir, 'layers');
    agent = await FileAgent.start();
    cleanup.add(() => agent.stop());
    for (const name of ['golden', 'vms', 'other']) await daemon.json(['container', 'create', name]);
    await daemon.json(['import', join(scratch, 'image'), 'golden/image']);
    await daemon.json(['import', join(scratch, 'image'), 'golden/in-place', '--in-place']);
  });
  afterAll(() => cleanup.run());

  const allocated = (): number => {
    const visit = (directory: string): number => readdirSync(directory, { withFileTypes: true }).reduce((sum, entry) =>
      sum + (entry.isDirectory() ? visit(join(directory, entry.name)) : statSync(join(directory, entry.name)).blocks * 512), 0);
    return visit(layers);
  };
  const show = async (path: string): Promise<DiskInfo> => await daemon.json<DiskInfo>(['show', path]);
  /** Of the active layer, looked at from outside: what du says of its file. */
  const du = async (path: string): Promise<number> => {
    const id = (await show(path)).backingChain[0]!.layerId;
    const file = join(layers, (id % 256).toString(16).padStart(2, '0'), `${id}.layer`);
    return existsSync(file) ? statSync(file).blocks * 512 : 0;
  };
  const df = async (target?: string): Promise<SpaceReport> => await daemon.json<SpaceReport>(['df', ...(target === undefined ? [] : [target])]);
  const writeTo = async (path: string, at: number, data: Buffer): Promise<void> => {
    const fd = await agent.call('open', daemon.path(path), O_RDWR | O_CREAT, 0o600);
    await agent.call('pwrite', fd, data, at);
    await agent.call('fsync', fd);
    await agent.call('close', fd);
  };

  describe('df', () => {
    it('says of each disk, to the byte, what removing it frees', async () => {
      await daemon.json(['clone', 'golden/image', 'vms/a', 'vms/b']);
      await daemon.json(['clone', 'golden/in-place', 'vms/c']);
      await writeTo('vms/a', MIB, patternBytes(1, 0, 3 * MIB));
      await daemon.json(['clone', 'vms/a', 'other/a-of-a']);
      await writeTo('vms/a', 9 * MIB, patternBytes(2, 0, MIB));
      await writeTo('other/a-of-a', 0, patternBytes(3, 0, MIB / 2));
      await writeTo('vms/c', 5 * MIB, patternBytes(4, 0, 2 * MIB));
      await writeTo('vms/file', 0, patternBytes(5, 0, 100_000));
      const all = await df();
      expect(all.store).toMatchObject({ layersBytes: allocated(), leftOverBytes: 0, removedBytes: 0, importBytes: 0 });
      expect(all.store!.totalBytes).toBe(all.store!.layersBytes + all.store!.databaseBytes + all.store!.reserveBytes + all.store!.logBytes);
      expect(all.disks.map(({ path }) => path)).toEqual(['golden/image', 'golden/in-place', 'other/a-of-a', 'vms/a', 'vms/b', 'vms/c', 'vms/file']);
      expect(all.disks.find(({ path }) => path === 'vms/b')).toMatchObject({ exclusiveBytes: 0, allocatedBytes: 0, sharedWithCount: 3, sharedWith: ['golden/image', 'vms/a', 'other/a-of-a'] });
      expect(all.disks.find(({ path }) => path === 'vms/b')!.sharedBytes).toBeGreaterThanOrEqual(DATA_BYTES);
      expect(all.disks.find(({ path }) => path === 'golden/in-place')).toMatchObject({ exclusiveBytes: 0, sharedBytes: 0 });
      expect((await df('vms/a')).disks).toEqual(all.disks.filter(({ path }) => path === 'vms/a'));
      // One after another, what is said before each.
      for (const path of ['vms/a', 'vms/c', 'golden/image', 'vms/file', 'other/a-of-a', 'vms/b', 'golden/in-place']) {
        const said = (await df(path)).disks[0]!.exclusiveBytes;
        const before = allocated();
        const { freedBytes } = await daemon.json<RemoveResult>(['rm', path, '--keep-data']);
        expect([path, before - allocated(), freedBytes]).toEqual([path, said, said]);
      }
      expect(allocated()).toBe(0);
      await daemon.json(['import', join(scratch, 'image'), 'golden/image']);
    });

    it('says what a container frees, and prints a table for people', async () => {
      await daemon.json(['clone', 'golden/image', 'vms/a', 'vms/b']);
      await writeTo('vms/a', 0, patternBytes(1, 0, MIB));
      await daemon.json(['clone', 'vms/a', 'vms/d']);
      const report = await df('vms');
      expect(report.containers).toMatchObject([{ name: 'vms', disks: 3, exclusiveBytes: report.total.exclusiveBytes, limitBytes: null }]);
      expect(report.store).toBeNull();
      const { stdout } = await daemon.cli(['df', 'vms']);
      expect(stdout).toMatch(/^DISK +SIZE +TAKES +EXCLUSIVE +SHARED +WITH$/mu);
      expect(stdout).toMatch(/^vms\/b +48 MiB +0 B +0 B +32(\.\d+)? MiB +golden\/image, vms\/a and 1 more$/mu);
      expect((await daemon.cli(['df'])).stdout).toMatch(/^ {2}Layers +3[23](\.\d+)? MiB \([\d,]+ bytes\)$/mu);
      expect((await daemon.cli(['df', 'vms/none'])).code).toBe(exitCodeOf['not-found']);
      const before = allocated();
      await daemon.json(['rm', 'vms', '--recursive', '--keep-data']);
      expect(before - allocated()).toBe(report.total.exclusiveBytes);
      await daemon.json(['container', 'create', 'vms']);
    });
  });

  describe('a limit', () => {
    it('gives disks ENOSPC and files EDQUOT, leaves everybody else alone, and is what statfs says', async () => {
      await daemon.json(['clone', 'golden/image', 'vms/limited']);
      await daemon.json(['clone', 'golden/image', 'other/free']);
      expect(await daemon.json<QuotaInfo>(['quota', 'set', 'vms', '8M'])).toMatchObject({ container: 'vms', limitBytes: 8 * MIB, isReached: false });
      const disk = await agent.call('open', daemon.path('vms/limited'), O_RDWR, 0);
      const outcomes: string[] = [];
      let at = DATA_BYTES;
      for (; at < DATA_BYTES + 12 * MIB; at += MIB / 4) {
        outcomes.push(await agent.outcome('pwrite', disk, patternBytes(7, at, MIB / 4), at));
        if (outcomes.at(-1) !== 'ok') break;
      }
      expect(outcomes.at(-1)).toBe('ENOSPC');
      // Whoever counts early counts what was written while it looked.
      expect(await du('vms/limited')).toBeLessThanOrEqual(8 * MIB);
      expect(await du('vms/limited')).toBeGreaterThan(6 * MIB);
      // What is left below the limit is written by small pieces, until a look finds nothing left.
      await expect.poll(async () => {
        while (await agent.outcome('pwrite', disk, patternBytes(8, at, 4096), at) === 'ok') at += 4096;
        return (await daemon.json<QuotaInfo[]>(['quota', 'ls']))[0]?.isReached;
      }, { timeout: 20_000 }).toBe(true);
      const file = await agent.call('open', daemon.path('vms/file'), O_RDWR | O_CREAT, 0o600);
      expect(await agent.outcome('pwrite', file, patternBytes(9, 0, 65536), 0)).toBe('EDQUOT');
      expect(await agent.outcome('fallocate', file, 0, 0, MIB)).toBe('EDQUOT');
      expect(await agent.outcome('pwrite', disk, patternBytes(10, 0, MIB), DATA_BYTES)).toBe('ok');
      expect(await agent.outcome('pread', disk, MIB, 0)).toBe('ok');
      const free = await agent.call('open', daemon.path('other/free'), O_RDWR, 0);
      for (let n = 0; n < 12; n += 1) await agent.call('pwrite', free, patternBytes(11, n, MIB), n * MIB);
      expect(await du('vms/limited')).toBeLessThanOrEqual(8 * MIB);

      const within = await agent.call('statfs', daemon.path('vms'));
      expect(within.blocksTotal * within.blockBytes).toBe(8 * MIB);
      expect(within.blocksAvailable * within.blockBytes).toBeLessThan(64 * 1024);
      const outside = await agent.call('statfs', daemon.path('other'));
      expect(outside.blocksTotal).toBeGreaterThan(within.blocksTotal);

      expect((await df('vms')).containers).toMatchObject([{ name: 'vms', limitBytes: 8 * MIB }]);
      expect((await daemon.cli(['clone', 'golden/image', 'vms/more'])).code).toBe(exitCodeOf.quota);
      const refused = await daemon.cli(['import', join(scratch, 'image'), 'vms/import']);
      expect([refused.code, refused.stderr]).toEqual([exitCodeOf.quota, expect.stringMatching(/the limit of the container vms leaves no room/u)]);
      expect((await daemon.json<NodeInfo[]>(['ls', 'vms'])).map(({ path }) => path)).toEqual(['vms/file', 'vms/limited']);
      expect((await daemon.status()).warnings.join()).toMatch(/the container vms has reached its limit: .*ENOSPC/u);

      // A discard makes room for as much.
      await agent.call('fallocate', disk, PUNCH, DATA_BYTES, 2 * MIB);
      await expect.poll(async () => await agent.outcome('pwrite', file, patternBytes(9, 0, MIB), 0), { timeout: 20_000 }).toBe('ok');
      for (const fd of [disk, file, free]) await agent.call('close', fd);
    });

    it('ends a fill with the reason, and lets it go on when it was raised', async () => {
      await daemon.json(['fill', 'start', 'vms/limited']);
      await daemon.cli(['fill', 'wait', 'vms/limited']);
      const status = await daemon.json<FillInfo>(['fill', 'status', 'vms/limited']);
      expect(status).toMatchObject({ state: 'failed', message: expect.stringMatching(/the limit of the container vms leaves no room .* then start the fill again/u) as string });
      expect((await daemon.json<JobInfo>(['jobs', String(status.jobId)])).error?.kind).toBe('quota');
      await daemon.json(['quota', 'rm', 'vms']);
      await daemon.json(['fill', 'start', 'vms/limited']);
      expect((await daemon.cli(['fill', 'wait', 'vms/limited'])).code).toBe(0);
      expect((await daemon.cli(['quota', 'rm', 'vms'])).code).toBe(exitCodeOf['not-found']);
    });
  });

  describe('TRIM', () => {
    it('of a file system on a loop device gives its space back to the store at once', async () => {
      await daemon.json(['clone', 'golden/image', 'vms/loop']);
      await daemon.json(['resize', 'vms/loop', '96M']);
      const mountPoint = join(scratch, 'loop');
      await mustRun('mkdir', ['-p', mountPoint]);
      const device = (await mustRun('losetup', ['--find', '--show', '--direct-io=on', daemon.path('vms/loop')])).stdout.trim();
      try {
        await mustRun('mkfs.ext4', ['-q', '-F', device]);
        await mustRun('mount', [device, mountPoint]);
        try {
          await mustRun('dd', ['if=/dev/urandom', `of=${join(mountPoint, 'data')}`, 'bs=1M', 'count=24', 'conv=fsync']);
          const full = await du('vms/loop');
          expect(full).toBeGreaterThan(24 * MIB);
          await mustRun('rm', [join(mountPoint, 'data')]);
          await mustRun('sync', ['-f', mountPoint]);
          await mustRun('fstrim', [mountPoint]);
          // Mounting and trimming write a few blocks of their own.
          expect(full - await du('vms/loop')).toBeGreaterThan(23 * MIB);
        } finally {
          await mustRun('umount', [mountPoint]);
        }
        await mustRun('blkdiscard', [device]);
        expect(await du('vms/loop')).toBeLessThan(64 * 1024);
        expect((await mustRun('sh', ['-c', `cmp -n ${32 * MIB} ${device} /dev/zero && echo zeros`])).stdout).toBe('zeros\n');
      } finally {
        await mustRun('losetup', ['-d', device]);
      }
    });

    it('of blocks that a clone does not own keeps them out of its fill: none is copied, all read as zeros', async () => {
      await daemon.json(['clone', 'golden/image', 'vms/trimmed', 'vms/whole']);
      const device = (await mustRun('losetup', ['--find', '--show', daemon.path('vms/trimmed')])).stdout.trim();
      try {
        await mustRun('blkdiscard', ['--offset', String(4 * MIB), '--length', String(20 * MIB), device]);
      } finally {
        await mustRun('losetup', ['-d', device]);
      }
      for (const name of ['trimmed', 'whole']) {
        await daemon.json(['fill', 'start', `vms/${name}`]);
        expect((await daemon.cli(['fill', 'wait', `vms/${name}`])).code).toBe(0);
      }
      const copied = (name: string): unknown => daemon.log().filter(({ text }) => text.includes('fill completed') && text.includes(`"vms/${name}"`))
        .map(({ text }) => (JSON.parse(text) as { copiedBytes: unknown }).copiedBytes).at(-1);
      expect([copied('trimmed'), copied('whole')]).toEqual([DATA_BYTES - 20 * MIB, DATA_BYTES]);
      expect(await du('vms/trimmed')).toBeLessThan(DATA_BYTES - 19 * MIB);
      const fd = await agent.call('open', daemon.path('vms/trimmed'), O_RDWR, 0);
      for (let at = 4 * MIB; at < 24 * MIB; at += MIB) expect((await agent.call('pread', fd, MIB, at)).every((byte) => byte === 0)).toBe(true);
      await agent.call('close', fd);
    });
  });

  describe('operations', () => {
    it('are listed with their ids: clones too, those that were refused with the reason', async () => {
      const { operationId } = await daemon.json<CloneResult>(['clone', 'golden/image', 'other/j1', 'other/j2']);
      expect(await daemon.json<JobInfo>(['jobs', operationId])).toMatchObject({
        id: Number(operationId), kind: 'clone', state: 'completed', path: 'other/j1', message: '2 clones of golden/image', error: null,
      });
      const failed = await daemon.cli(['clone', 'golden/image', 'other/j1', '--json']);
      expect(failed.code).toBe(exitCodeOf['already-exists']);
      const { error } = JSON.parse(failed.stdout === '' ? failed.stderr : failed.stdout) as { error: { context: { operationId: string } } };
      expect(await daemon.json<JobInfo>(['jobs', error.context.operationId])).toMatchObject({ kind: 'clone', state: 'failed', error: { kind: 'already-exists' } });
      const all = await daemon.json<JobInfo[]>(['jobs']);
      expect(new Set(all.map(({ kind }) => kind))).toEqual(new Set(['import', 'clone', 'fill']));
      expect(all.map(({ id }) => id)).toEqual(all.map(({ id }) => id).toSorted((a, b) => a - b));
      expect((await daemon.json<JobInfo[]>(['jobs', '--state', 'failed'])).every(({ state }) => state === 'failed')).toBe(true);
      expect((await daemon.cli(['jobs'])).stdout).toMatch(new RegExp(`^ *${operationId} +clone +completed +- +other/j1 `, 'mu'));
      expect((await daemon.cli(['jobs', '999999'])).code).toBe(exitCodeOf['not-found']);
    });

    it('survive a server that is killed: what was done says so, what goes on goes on, what was interrupted says that', async () => {
      const { operationId } = await daemon.json<CloneResult>(['clone', 'golden/image', 'other/survivor']);
      const fill = await daemon.json<FillInfo>(['fill', 'start', 'other/survivor', '--rate', '64K']);
      makePatternImage(join(scratch, 'large'), { sizeBytes: 1024 * MIB, seed: 9 });
      const importing = daemon.cli(['import', join(scratch, 'large'), 'other/large', '--json'], { timeoutMs: 60_000 });
      await expect.poll(async () => (await daemon.json<JobInfo[]>(['jobs', '--state', 'running'])).filter(({ kind, progressDoneBytes }) => kind === 'import' && progressDoneBytes > 0).length, { timeout: 30_000, interval: 20 }).toBe(1);
      await daemon.waitForServer(await daemon.killServer());
      await importing;
      const jobs = await daemon.json<JobInfo[]>(['jobs']);
      const of = (id: number): JobInfo | undefined => jobs.find((job) => job.id === id);
      expect(of(Number(operationId))).toMatchObject({ kind: 'clone', state: 'completed' });
      expect(of(fill.jobId)).toMatchObject({ kind: 'fill', state: 'running' });
      expect(jobs.findLast(({ kind }) => kind === 'import')).toMatchObject({ state: 'failed', path: 'other/large', error: { message: 'the server was restarted during the import; start it again' } });
      await daemon.json(['job', 'cancel', String(fill.jobId)]);
    });
  });

  it('stops in order; the log warns of what was refused and of the death, and of nothing else', async () => {
    await daemon.stop();
    daemon.assertQuietLog([/the limit of a container is reached/u, /there is room below the limit/u, /fill failed/u, /import failed/u, /recovered what the last server/u, /server .*(ended|died|exited|killed)/iu]);
  });
});
