/** What is pure of container files: sizes, tables, commands, descriptions, mounts; and the view of `.block`. */
import { afterEach, describe, expect, it } from 'vitest';

import { withBlockView } from '../../daemon/filesystem/block-view.js';
import { parseDescription } from '../../daemon/vdisks/description.js';
import { mkfsCommand } from '../../daemon/vdisks/filesystem.js';
import { ALIGNMENT_BYTES, FILE_SYSTEMS, planLayout } from '../../daemon/vdisks/layout.js';
import { deviceMountedAt, mountedDevices } from '../../daemon/vdisks/mounts.js';
import { sfdiskScript } from '../../daemon/vdisks/partition.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { baseMachine, machinesOver } from '../support/machines-fixture.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();

afterEach(() => cleanup.run());

const GiB = 1024 ** 3;

describe('the layout of a container file', () => {
  it.each(FILE_SYSTEMS)('holds what is copied and a tenth more, in whole MiB, with room for the file system itself (%s)', (type) => {
    for (const fileBytes of [[], [1], [100 * GiB, 3], [5 * 1024 * GiB]]) {
      const { sizeBytes, partition } = planLayout({ fileBytes, directories: 1 }, type);
      const data = fileBytes.reduce((sum, bytes) => sum + bytes, 0);
      expect(partition.sizeBytes).toBeGreaterThanOrEqual(Math.ceil(1.1 * data) + 16 * ALIGNMENT_BYTES);
      expect(partition.sizeBytes).toBeLessThan(1.1 * data + 400 * ALIGNMENT_BYTES);
      expect([partition.offsetBytes, partition.sizeBytes % ALIGNMENT_BYTES, sizeBytes - partition.sizeBytes]).toEqual([ALIGNMENT_BYTES, 0, 2 * ALIGNMENT_BYTES]);
    }
  });

  it('is refused beyond the largest disk', () => {
    expect(() => planLayout({ fileBytes: [60 * 1024 * GiB], directories: 0 }, 'ext4')).toThrow(/container file would have/u);
  });

  it('is what sfdisk and mkfs are told', () => {
    const script = sfdiskScript({ diskGuid: 'd', partitionGuid: 'p', name: 'offshoot', window: { offsetBytes: ALIGNMENT_BYTES, sizeBytes: 4 * ALIGNMENT_BYTES } });
    expect(script.split('\n')).toEqual(['label: gpt', 'label-id: d', 'first-lba: 2048', 'unit: sectors', '', 'start=2048, size=8192, type=0fc63daf-8483-4772-8e79-3d69d8477de4, uuid=p, name="offshoot"', '']);
    const wanted = { uuid: 'u', label: 'offshoot', sizeBytes: GiB, files: 3 } as const;
    expect(mkfsCommand('/dev/loop1', { ...wanted, type: 'ext4' }).args).toEqual(expect.arrayContaining(['-U', 'u', '-m', '0', '-N', '1024', '/dev/loop1']));
    expect(mkfsCommand('/dev/loop1', { ...wanted, type: 'xfs' }).args.join(' ')).toContain('uuid=u');
  });

  it('is described in a version that others refuse', () => {
    expect(() => parseDescription({ version: 2 }, 'depot/a')).toThrow(/another version/u);
    expect(() => parseDescription(null, 'depot/a')).toThrow(/another version/u);
  });
});

describe('what is mounted', () => {
  const text = '36 27 7:3 / /run/a\\040b rw - ext4 /dev/loop3 rw\n37 27 7:4 / /run/c rw,nosuid shared:5 - xfs /dev/loop4 rw\n38 27 7:5 / /run/c rw - xfs /dev/loop5 rw\n';

  it('is found by device and by mount point, the last one where one lies over another', () => {
    expect([...mountedDevices(text)]).toEqual([['7:3', '/run/a b'], ['7:4', '/run/c'], ['7:5', '/run/c']]);
    expect([deviceMountedAt('/run/a b', text), deviceMountedAt('/run/c', text), deviceMountedAt('/run', text)]).toEqual(['7:3', '7:5', null]);
  });
});

describe('.block', () => {
  it('shows the disks of a container and of its snapshots, by numbers of its own; nothing in it can be changed', async () => {
    const test = new TestStore();
    const machines = machinesOver(test, makeTmpfsDir('view', cleanup));
    baseMachine(test, machines, patterned(1, 8192));
    const { fileSystem } = machines;
    const { meta } = test.store;
    const golden = meta.nodes.byPath('golden')?.id ?? 0;
    const disk = meta.nodes.byPath('golden/base/disk.img')!;
    meta.nodes.move(disk.id, golden, 'a.img');
    const asked: number[] = [];
    const view = withBlockView(fileSystem, { meta, device: (nodeId) => { asked.push(nodeId); return Promise.resolve('/dev/loop9'); } });
    const directory = view.lookup(golden, '.block');
    expect(directory).toMatchObject({ kind: 'directory', mode: fileSystem.getattr(golden).mode & 0o555 });
    expect(Number.isSafeInteger(directory.nodeId) && directory.nodeId > 2 ** 51).toBe(true);
    expect(view.readdir(golden, 0, 100).map(({ name }) => name)).not.toContain('.block');
    const listed = view.readdir(directory.nodeId, 0, 100);
    expect(listed.map(({ name }) => name)).toEqual(['a.img']);
    expect(view.readdir(directory.nodeId, listed[0]?.cookie ?? 0, 100)).toEqual([]);
    const link = view.lookup(directory.nodeId, 'a.img');
    expect(link).toMatchObject({ kind: 'symlink', nodeId: listed[0]?.attributes.nodeId });
    expect(view.getattr(link.nodeId)).toEqual(link);
    expect([view.lookup(directory.nodeId, '.').nodeId, view.lookup(directory.nodeId, '..').nodeId, view.parentOf(directory.nodeId)]).toEqual([directory.nodeId, golden, golden]);
    expect(asked).toEqual([]);
    expect(await view.readlink(link.nodeId)).toBe('/dev/loop9');
    expect(asked).toEqual([disk.id]);
    expect(() => view.lookup(directory.nodeId, 'base')).toThrow(/not a disk/u);
    expect(() => view.lookup(meta.nodes.byPath('golden/base')?.id ?? 0, '.block')).toThrow(/does not exist/u);
    const caller = { uid: 0, gid: 0, pid: 0 };
    for (const change of [
      () => view.mkdir(directory.nodeId, 'x', 0o755, caller), () => { view.unlink(directory.nodeId, 'a.img'); }, () => { view.rmdir(directory.nodeId, 'a.img'); },
      () => view.create(directory.nodeId, 'x', 0o644, 0, caller), () => view.symlink(directory.nodeId, 'x', 'y', caller), () => view.open(link.nodeId, 0),
      () => { view.rename(golden, 'a.img', directory.nodeId, 'x', { noReplace: false, exchange: false }); },
    ]) expect(change).toThrow(/nothing in it can be changed/u);
    await expect(view.setattr(link.nodeId, { mode: 0o600 }, caller)).rejects.toThrow(/nothing in it can be changed/u);
    view.unlink(golden, 'a.img');
    expect(() => view.getattr(link.nodeId)).toThrow(/gone|not exist/u);
  });
});
