/**
 * What copies and range clones cost under a real mount: df is exact when extents are shared (each removal is measured), a container's limit counts what is
 * written and not what is shared, and snapshots, renames and copies at a limit do what SEMANTICS says of them.
 */
import fs from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { Errno, exitCodeOf } from '../../blockstore/errors.js';
import { createControlClient, type ControlClient } from '../../daemon/control/client.js';
import type { DiskInfo, RemoveResult } from '../../daemon/control/schemas.js';
import type { QuotaInfo, SpaceReport } from '../../daemon/control/space-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { patternBytes } from '../support/model/pattern.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const DATA_BYTES = 8 * MIB;

describe.skipIf(lacks('/dev/fuse', 'xfs_io'))('shared blocks', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let image: string;
  let control: ControlClient;
  const at = (name: string): string => join(daemon.mountDir, name);

  beforeAll(async () => {
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    control = createControlClient({ socketPath: daemon.socketPath });
    for (const name of ['golden', 'vms', 'other']) await daemon.json(['container', 'create', name]);
    image = join(makeTempDir('images', cleanup), 'image');
    makePatternImage(image, { sizeBytes: 2 * DATA_BYTES, seed: 3, isHole: (block) => block * 4096 >= DATA_BYTES });
    await daemon.json(['import', image, 'golden/image']);
  });
  afterAll(() => cleanup.run());

  /** By copy_file_range and nothing else, whatever the version of cp. */
  const copy = async (from: string, to: string): Promise<void> => { await mustRun('xfs_io', ['-f', '-c', `copy_range -s 0 -d 0 -l ${2 * DATA_BYTES} ${at(from)}`, at(to)]); };
  const layersBytes = (): number => {
    const top = join(daemon.storeDir, 'layers');
    return fs.readdirSync(top).flatMap((shard) => fs.readdirSync(join(top, shard)).map((name) => fs.statSync(join(top, shard, name)).blocks * 512)).reduce((a, b) => a + b, 0);
  };
  const df = async (target: string): Promise<SpaceReport> => await control.df(target);
  const quota = async (container: string): Promise<QuotaInfo | undefined> => (await control.quotaList()).find((each) => each.container === container);
  const used = async (container: string): Promise<number> => (await quota(container))?.usedBytes ?? -1;
  const reached = async (container: string): Promise<boolean> => (await quota(container))?.isReached ?? false;

  /** What was written, until an error; its name. */
  function write(name: string, offsetBytes: number, lengthBytes: number): string {
    const fd = fs.openSync(at(name), 'r+');
    try {
      for (let done = 0; done < lengthBytes; done += 65_536) {
        const data = patternBytes(offsetBytes, done, Math.min(65_536, lengthBytes - done));
        fs.writeSync(fd, data, 0, data.length, offsetBytes + done);
      }
      fs.fsyncSync(fd);
      return 'ok';
    } catch (thrown) {
      const { code, errno } = thrown as NodeJS.ErrnoException;
      // A number that Node.js has no name for.
      return errno === -Errno.EDQUOT ? 'EDQUOT' : code ?? String(thrown);
    } finally {
      try {
        fs.closeSync(fd);
      } catch {
        // The error was told before.
      }
    }
  }

  it('are said by df to the byte: each removal frees what was said, whoever goes first', async () => {
    await daemon.json(['clone', 'golden/image', 'vms/a']);
    write('vms/a', MIB, 2 * MIB);
    await copy('vms/a', 'other/copy');
    await daemon.json(['clone', 'vms/a', 'other/new', '--range', '1M:0:1M', '--size', '4M']);
    await daemon.json(['clone', 'other/copy', 'vms/a', '--range', '0:8M:1M']);
    write('other/copy', 0, MIB);
    write('vms/a', 2 * MIB, MIB / 2);
    const all = await daemon.json<SpaceReport>(['df']);
    expect(all.store).toMatchObject({ layersBytes: layersBytes(), leftOverBytes: 0 });
    expect(all.disks.find(({ path }) => path === 'other/new')).toMatchObject({ exclusiveBytes: 0, allocatedBytes: 0, sharedBytes: DATA_BYTES + 2 * MIB, sharedWithCount: 3, sharedWith: ['golden/image', 'vms/a', 'other/copy'] });
    for (const path of ['vms/a', 'other/copy', 'golden/image', 'other/new']) {
      const said = (await df(path)).disks[0]!.exclusiveBytes;
      const before = layersBytes();
      const { freedBytes } = await daemon.json<RemoveResult>(['rm', path, '--keep-data']);
      expect([path, before - layersBytes(), freedBytes]).toEqual([path, said, said]);
    }
    expect(layersBytes()).toBe(0);
    await daemon.json(['import', image, 'golden/image']);
  });

  it('cost a container with a limit nothing until they are written; a copy that shares is let be at the limit, one that does not is EDQUOT', async () => {
    await daemon.json(['clone', 'golden/image', 'vms/a']);
    await daemon.json(['quota', 'set', 'vms', '2M']);
    await copy('golden/image', 'vms/copy');
    await daemon.json(['clone', 'golden/image', 'vms/a', '--range', '0:8M:8M']);
    expect(await used('vms')).toBe(0);
    expect(write('vms/copy', 0, MIB)).toBe('ok');
    expect(await used('vms')).toBe(MIB);
    expect(write('vms/a', 0, 2 * MIB)).toBe('ENOSPC');
    expect(write('vms/copy', 4 * MIB, MIB)).toBe('EDQUOT');
    await expect.poll(async () => await reached('vms'), { timeout: 20_000 }).toBe(true);
    expect(layersBytes()).toBeLessThanOrEqual(DATA_BYTES + 2 * MIB);
    await copy('golden/image', 'vms/late');
    await mustRun('cmp', [at('golden/image'), at('vms/late')]);
    const refused = await command('cp', ['--sparse=always', at('golden/image'), at('vms/real')]);
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringMatching(/quota/iu) as string]);
    const more = await daemon.cli(['clone', 'golden/image', 'vms/new', '--range', '0:0:1M']);
    expect([more.code, more.stderr]).toEqual([exitCodeOf.quota, expect.stringMatching(/the limit of the container vms leaves no room/u) as string]);
    await daemon.json(['clone', 'golden/image', 'vms/a', '--range', '0:0:4M']);
    expect(await used('vms')).toBeLessThanOrEqual(2 * MIB);
    for (const name of ['copy', 'late', 'real', 'a']) await daemon.json(['rm', `vms/${name}`]);
    expect(await used('vms')).toBe(0);
  });

  it('are charged to who still has them when their source goes: nothing is refused by that, but what needs room from then on', async () => {
    await daemon.json(['clone', 'golden/image', 'other/source']);
    write('other/source', 0, 4 * MIB);
    await daemon.json(['quota', 'set', 'vms', '2M']);
    await daemon.json(['quota', 'set', 'other', '64M']);
    await copy('other/source', 'vms/copy');
    expect([await used('vms'), await used('other')]).toEqual([0, 4 * MIB]);
    const before = layersBytes();
    await daemon.json(['rm', 'other/source', '--keep-data']);
    expect(layersBytes()).toBe(before);
    expect([await used('vms'), await used('other')]).toEqual([4 * MIB, 0]);
    expect((await df('vms')).containers[0]).toMatchObject({ usedBytes: 4 * MIB, exclusiveBytes: 4 * MIB, limitBytes: 2 * MIB });
    expect(fs.readFileSync(at('vms/copy')).subarray(0, 65_536).equals(patternBytes(0, 0, 65_536))).toBe(true);
    expect(write('vms/copy', 0, 4096)).toBe('EDQUOT');
    await daemon.json(['rm', 'vms/copy']);
    expect([await used('vms'), before - layersBytes()]).toEqual([0, 4 * MIB]);
  });

  it('and disks that mv brings are charged from then on, and not refused', async () => {
    await daemon.json(['clone', 'golden/image', 'other/moving']);
    write('other/moving', 0, 4 * MIB);
    await mustRun('mv', [at('other/moving'), at('vms/moved')]);
    expect([await used('vms'), await used('other')]).toEqual([4 * MIB, 0]);
    expect(write('vms/moved', 5 * MIB, 4096)).toBe('ENOSPC');
    expect(write('vms/moved', 0, 4096)).toBe('ok');
    await mustRun('mv', [at('vms/moved'), at('other/moving')]);
    expect(await used('vms')).toBe(0);
    await daemon.json(['rm', 'other/moving']);
  });

  describe('a snapshot', () => {
    it('of a container at its limit is refused with the reason; before, it makes every later write need room', async () => {
      await daemon.json(['clone', 'golden/image', 'vms/disk']);
      await daemon.json(['quota', 'set', 'vms', '4M']);
      expect(write('vms/disk', 0, 3 * MIB)).toBe('ok');
      await daemon.json(['snapshot', 'create', 'vms@before']);
      expect(await used('vms')).toBe(3 * MIB);
      // The same blocks once more: each needs a place of its own now.
      expect(write('vms/disk', 0, 3 * MIB)).toBe('ENOSPC');
      await expect.poll(async () => await reached('vms'), { timeout: 20_000 }).toBe(true);
      // What was refused early, when a look was made.
      for (let block = 0; await used('vms') < 4 * MIB; block += 1) write('vms/disk', DATA_BYTES + block * 4096, 4096);
      const refused = await daemon.cli(['snapshot', 'create', 'vms@late']);
      expect([refused.code, refused.stderr]).toEqual([exitCodeOf.quota, expect.stringMatching(/the limit of the container vms leaves no room.*raise the limit/u) as string]);
      expect((await daemon.json<{ name: string }[]>(['snapshot', 'ls'])).length).toBe(1);
      expect(fs.existsSync(at('vms/.snapshots/late'))).toBe(false);
    });

    it('at the limit can be read, cloned from elsewhere, gone back to and removed; then there is room', async () => {
      await daemon.json(['clone', 'vms/disk@before', 'other/from-snapshot']);
      expect((await daemon.cli(['clone', 'vms/disk@before', 'vms/no'])).code).toBe(exitCodeOf.quota);
      await daemon.json(['snapshot', 'revert', 'vms@before', '--yes']);
      expect(await used('vms')).toBe(3 * MIB);
      expect(fs.readFileSync(at('vms/disk')).equals(fs.readFileSync(at('vms/.snapshots/before/disk')))).toBe(true);
      expect(write('vms/disk', 0, MIB / 2)).toBe('ok');
      await daemon.json(['rm', 'other/from-snapshot']);
      await daemon.json(['snapshot', 'rm', 'vms@before']);
      await daemon.json(['quota', 'set', 'vms', '8M']);
      await daemon.json(['snapshot', 'create', 'vms@raised']);
      expect((await daemon.json<DiskInfo>(['show', 'vms/disk'])).backingChain.length).toBeGreaterThan(1);
    });
  });

  it('leave a log that says of limits what there is to say, and nothing else', async () => {
    await daemon.stop();
    await daemon.start();
    expect(await daemon.json<{ verdict: string }>(['check'])).toMatchObject({ verdict: 'clean' });
    daemon.assertQuietLog([/the limit of a container is reached/u, /there is room below the limit/u]);
  });
});
