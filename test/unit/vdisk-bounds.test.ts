/**
 * What a container file, a deployed machine, an attached disk and an export keep from each other, and from those whose files they hold. Over a test store and a
 * host on paper (vdisk-fixture.ts); what the kernel has to do with it is in mount/stage-hostile.test.ts.
 */
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import type { NodeRow } from '../../blockstore/meta/rows.js';
import { Exports } from '../../daemon/presenter/exports.js';
import type { Export, Presenter } from '../../daemon/presenter/presenter.js';
import { removeNode } from '../../daemon/server/remove-node.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { controlParts } from '../support/control-parts.js';
import { baseMachine, machinesOver, writeFile, type MachinesFixture } from '../support/machines-fixture.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';
import { snapshotsOver } from '../support/snapshots-fixture.js';
import { vdisksOver, type VdisksFixture } from '../support/vdisk-fixture.js';

const cleanup = createCleanup();
const MOUNT = '/mnt/test';
const DISK = 'golden/base/disk.img';
const ROOT = { uid: 0, gid: 0, pid: 0 };
const NO_FLAGS = { noReplace: false, exchange: false };

interface World {
  readonly test: TestStore;
  readonly machines: MachinesFixture;
  readonly vdisks: VdisksFixture;
  readonly exports: Exports;
}

/** Shows whatever it is told. */
const presenterOf = (id: 'block' | 'nbd'): Presenter => ({
  id,
  abilities: { directories: false, disks: true, clients: 'host', encryption: null, knowsClients: true },
  probe: () => Promise.resolve({ usable: true, version: '1' }),
  check: () => undefined,
  apply: (wanted: readonly Export[]) => Promise.resolve(wanted.map(({ id }) => ({ id, addresses: ['test:'] }))),
  clientsOf: () => Promise.resolve([]),
  end: () => Promise.resolve(),
});

function world(): World {
  const test = new TestStore();
  const directory = makeTmpfsDir('vdisks', cleanup);
  const machines = machinesOver(test, directory);
  baseMachine(test, machines, patterned(5, 64 * 1024));
  machines.fileSystem.namespace.mkdir(1, 'depot', 0o755, ROOT);
  const exports = new Exports({
    meta: test.store.meta, references: controlParts(test.store).references, presenters: [presenterOf('block'), presenterOf('nbd')], mountDir: MOUNT, lookMs: 60_000, onFatal: (error) => { throw error; },
    logger: { info: () => undefined, warn: () => undefined },
  });
  cleanup.add(async () => { await exports.close({ mountIsGone: false }); });
  return { test, machines, vdisks: vdisksOver(test, machines, directory, { mountDir: MOUNT }), exports };
}

function node({ test }: World, at: string): NodeRow {
  const found = test.store.meta.nodes.byPath(at);
  if (found === undefined) throw new Error(`${at} is not there`);
  return found;
}

const present = async ({ exports }: World, at: string, readOnly = false, kind: 'block' | 'nbd' = 'nbd'): Promise<unknown> => await exports.present({ path: at, kind, clients: [], readOnly, options: {} });
const stage = async ({ vdisks }: World, source = 'golden/base'): Promise<string> => (await vdisks.waitFor(vdisks.plane.service.stage({ source, target: 'depot/file' }).id)).message ?? '';
const deploy = async ({ vdisks }: World): Promise<string> => (await vdisks.waitFor((await vdisks.plane.service.deploy({ source: 'depot/file', name: 'web' })).id)).message ?? '';

afterEach(async () => { await cleanup.run(); });

describe('what is presented', () => {
  it('is not attached, neither asked for nor by .block, where it has a device or a writer of its own; and is when it is withdrawn', async () => {
    const of = world();
    const { id } = node(of, DISK);
    await present(of, DISK, true, 'block');
    // The export's own.
    const foreign = await of.vdisks.host.devices.attach(path.join(MOUNT, DISK), { nodeId: id, readOnly: true, signal: new AbortController().signal });
    await expect(of.vdisks.plane.service.attach(DISK, false)).rejects.toMatchObject({ kind: 'in-use', message: expect.stringContaining('offshoot withdraw golden/base/disk.img --as block') as string });
    await expect(of.vdisks.plane.blocks.device(id, ROOT)).rejects.toMatchObject({ kind: 'in-use' });
    expect(of.test.store.meta.attachments.count()).toBe(0);
    expect(of.vdisks.state().devices).toEqual([foreign]);
    await of.vdisks.host.devices.detach(foreign.device, { directory: MOUNT, nodeId: id, signal: new AbortController().signal });
    await of.exports.withdraw({ path: DISK, kind: 'block' }, { force: false });
    await present(of, DISK);
    await expect(of.vdisks.plane.service.attach(DISK, false)).rejects.toMatchObject({ kind: 'in-use' });
    await of.exports.withdraw({ path: DISK, kind: 'nbd' }, { force: false });
    expect((await of.vdisks.plane.service.attach(DISK, false)).device).toContain('paper0');
  });

  it('is no container file that could be written, none that is being made, and no deployed machine', async () => {
    const of = world();
    const copy = of.vdisks.host.copy.bind(of.vdisks.host);
    const during: unknown[] = [];
    Object.assign(of.vdisks.host, {
      copy: async (...args: Parameters<typeof copy>) => {
        // As between two attachments of its making.
        const row = of.test.store.meta.attachments.byNode(node(of, 'depot/file').id);
        of.test.store.meta.attachments.remove(row?.id ?? 0);
        during.push(await present(of, 'depot/file', true).catch((thrown: unknown) => thrown));
        of.test.store.meta.attachments.insert({ nodeId: row?.nodeId ?? 0, purpose: 'stage', jobId: row?.jobId ?? null });
        await copy(...args);
      },
    });
    expect(await stage(of)).toContain('is staged');
    expect(during).toEqual([expect.objectContaining({ kind: 'in-use', message: expect.stringContaining('is being staged by operation') as string })]);
    await expect(present(of, 'depot/file')).rejects.toMatchObject({ kind: 'not-permitted', message: expect.stringContaining('never written') as string });
    expect(await present(of, 'depot/file', true)).toMatchObject({ path: 'depot/file' });
    expect(await deploy(of)).toContain('is deployed');
    // Also one that could not be attached again.
    of.test.store.meta.attachments.remove(of.test.store.meta.attachments.byNode(node(of, 'depot/web.vdisk').id)?.id ?? 0);
    await expect(present(of, 'depot/web.vdisk', true)).rejects.toMatchObject({ kind: 'in-use', message: expect.stringContaining('offshoot decommission web') as string });
  });
});

describe('a deployed machine', () => {
  it('keeps its clone, also one that could not be attached: not unlinked, not replaced, not removed with its container, before it is decommissioned', async () => {
    const of = world();
    await stage(of);
    await deploy(of);
    const { namespace } = of.machines.fileSystem;
    const depot = node(of, 'depot').id;
    const refused = expect.objectContaining({ kind: 'in-use', message: expect.stringContaining('offshoot decommission web') as string }) as Error;
    expect(() => { namespace.unlink(depot, 'web.vdisk'); }).toThrow(refused);
    expect(() => { namespace.rename(depot, 'file', depot, 'web.vdisk', NO_FLAGS); }).toThrow(refused);
    const parts = { store: of.test.store, fileSystem: of.machines.fileSystem };
    for (const at of ['depot/web.vdisk', 'depot']) {
      await expect(removeNode(parts, node(of, at), at, { recursive: true, keepData: true })).rejects.toThrow(refused);
    }
    expect(of.machines.seat.registered().map(({ name }) => name)).toEqual(['web']);
    expect((await of.vdisks.waitFor((await of.vdisks.plane.service.decommission('web', { force: true, timeoutMs: 1000 })).id)).state).toBe('completed');
    expect(of.machines.seat.registered()).toEqual([]);
    namespace.unlink(depot, 'file');
  });

  it("has a clone that is root's alone, as its container file is, whosever the machine was", async () => {
    const of = world();
    for (const each of [node(of, 'golden/base'), node(of, DISK)]) of.test.store.meta.nodes.update(each.id, { uid: 1000, gid: 1000 });
    await stage(of);
    await deploy(of);
    for (const at of ['depot/file', 'depot/web.vdisk']) expect([at, node(of, at)]).toMatchObject([at, { uid: 0, gid: 0, mode: 0o600 }]);
  });
});

describe('going back to a snapshot', () => {
  const revert = async ({ test }: World): Promise<unknown> => await snapshotsOver(test).revert('depot@then');
  const refused = (words: string): object => ({ kind: 'in-use', message: expect.stringContaining(words) as string });
  /** As the copy of a machine does. */
  function writeTo(of: World, text: string): void {
    const { id } = node(of, 'depot/file');
    of.test.store.disks.acquire(id);
    of.test.store.data.write(id, 0, Buffer.from(text, 'utf8'));
    of.test.store.disks.release(id);
  }

  it('of what was being staged then is refused, while it is and when it is not, and changes nothing; the file can be removed first, and is a disk like another then', async () => {
    const of = world();
    const copy = of.vdisks.host.copy.bind(of.vdisks.host);
    const during: unknown[] = [];
    Object.assign(of.vdisks.host, {
      copy: async (...args: Parameters<typeof copy>) => {
        writeTo(of, 'half');
        await snapshotsOver(of.test).create({ reference: 'depot@then', quiesce: null });
        // Nobody has it open: as between two attachments of its making.
        during.push(await revert(of).catch((thrown: unknown) => thrown));
        // Times of change are whole milliseconds.
        await new Promise((resolve) => { setTimeout(resolve, 5); });
        writeTo(of, 'whole');
        await copy(...args);
      },
    });
    expect(await stage(of)).toContain('is staged');
    expect(during).toEqual([expect.objectContaining(refused('is being staged by operation'))]);
    const before = node(of, 'depot/file');
    await expect(revert(of)).rejects.toMatchObject(refused('offshoot rm depot/file'));
    const { layerId, sizeBytes, mode } = before;
    expect(node(of, 'depot/file')).toMatchObject({ layerId, sizeBytes, mode });
    expect(of.test.store.meta.vdisks.all()).toMatchObject([{ nodeId: before.id, state: 'ready' }]);
    await removeNode({ store: of.test.store, fileSystem: of.machines.fileSystem }, before, 'depot/file', { recursive: false, keepData: false });
    expect(await revert(of)).toMatchObject({ nodesRestored: 1 });
    expect(of.test.store.meta.vdisks.all()).toEqual([]);
    expect(await deploy(of)).toContain('is no container file');
  });

  it('of another file of that name is refused; of the same one it changes nothing, again and again, and machines are deployed of it', async () => {
    const of = world();
    await stage(of);
    writeTo(of, 'the first');
    await snapshotsOver(of.test).create({ reference: 'depot@then', quiesce: null });
    for (let n = 0; n < 2; n += 1) expect(await revert(of)).toMatchObject({ nodesReverted: 1 });
    expect(await deploy(of)).toContain('is deployed');
    expect((await of.vdisks.waitFor((await of.vdisks.plane.service.decommission('web', { force: true, timeoutMs: 1000 })).id)).state).toBe('completed');
    await removeNode({ store: of.test.store, fileSystem: of.machines.fileSystem }, node(of, 'depot/file'), 'depot/file', { recursive: false, keepData: false });
    await stage(of);
    writeTo(of, 'the other');
    await expect(revert(of)).rejects.toMatchObject(refused('offshoot rm depot/file'));
  });

  it('is refused while a machine lives in what would go, or in what would be another', async () => {
    const of = world();
    await snapshotsOver(of.test).create({ reference: 'depot@then', quiesce: null });
    await stage(of);
    of.machines.fileSystem.namespace.mkdir(1, 'lab', 0o755, ROOT);
    await of.vdisks.waitFor((await of.vdisks.plane.service.deploy({ source: 'depot/file', name: 'web', container: 'lab' })).id);
    await expect(revert(of)).rejects.toMatchObject(refused('offshoot decommission web'));
    await snapshotsOver(of.test).create({ reference: 'lab@then', quiesce: null });
    await expect(snapshotsOver(of.test).revert('lab@then')).rejects.toMatchObject(refused('offshoot decommission web'));
    expect(of.test.store.meta.deployments.byName('web')).toMatchObject({ vdiskId: of.test.store.meta.vdisks.all()[0]?.id });
  });
});

describe('a container file with deployed machines', () => {
  it('is not removed before they are decommissioned, wherever their clones are, and whatever these stand on; with --keep-data it is', async () => {
    const of = world();
    of.machines.fileSystem.namespace.mkdir(1, 'lab', 0o755, ROOT);
    await stage(of);
    await of.vdisks.waitFor((await of.vdisks.plane.service.deploy({ source: 'depot/file', name: 'web', container: 'lab' })).id);
    const remove = async (keepData: boolean): Promise<unknown> => await removeNode({ store: of.test.store, fileSystem: of.machines.fileSystem }, node(of, 'depot'), 'depot', { recursive: true, keepData });
    const ways = 'a machine is deployed from depot/file: web. Decommission it first:\noffshoot decommission web\nor offshoot rm -r depot --keep-data, which removes the name';
    await expect(remove(false)).rejects.toMatchObject({ kind: 'in-use', message: expect.stringContaining(ways) as string });
    expect(node(of, 'depot/file').kind).toBe('disk');
    await remove(true);
    expect(of.test.store.meta.deployments.byName('web')).toMatchObject({ vdiskId: null });
  });
});

describe('a registered machine', () => {
  it('is not started while a disk of it is a block device that may be written to; read-only, and given back, it is', async () => {
    const of = world();
    const { service } = of.vdisks.plane;
    await of.machines.service.register('golden/base', null);
    const start = async (): Promise<unknown> => await of.machines.service.start('golden/base');
    await service.attach(DISK, false);
    await expect(start()).rejects.toMatchObject({ kind: 'in-use', message: expect.stringContaining(`offshoot detach ${DISK}`) as string });
    expect(of.machines.seat.registered()).not.toMatchObject([{ state: 'running' }]);
    await service.detach(DISK);
    await service.attach(DISK, true);
    expect(await start()).toMatchObject({ power: 'running' });
  });
});

describe('a machine that is staged', () => {
  /** While it is copied. */
  async function stagedWith(of: World, source: string, meddle: () => void): Promise<string> {
    const copy = of.vdisks.host.copy.bind(of.vdisks.host);
    Object.assign(of.vdisks.host, { copy: async (...args: Parameters<typeof copy>) => { meddle(); await copy(...args); } });
    return await stage(of, source);
  }

  it('is not when a directory above it was another for a moment, and the copy may hold what is not its own', async () => {
    const of = world();
    const { namespace } = of.machines.fileSystem;
    const golden = node(of, 'golden').id;
    const team = namespace.mkdir(golden, 'team', 0o755, ROOT).nodeId;
    namespace.rename(golden, 'base', team, 'base', NO_FLAGS);
    const moved = node(of, 'golden/team/base');
    namespace.unlink(moved.id, 'machine.json');
    writeFile(of.test, of.machines.fileSystem, moved.id, 'machine.json', JSON.stringify({
      name: 'base', uuid: '11111111-2222-4333-8444-555555555555', macs: ['52:54:00:11:22:33'], memory: 512, disks: { vda: path.join(MOUNT, 'golden/team/base/disk.img') },
    }));
    const result = await stagedWith(of, 'golden/team/base', () => {
      namespace.rename(golden, 'team', golden, 'elsewhere', NO_FLAGS);
      namespace.rename(golden, 'elsewhere', golden, 'team', NO_FLAGS);
    });
    expect(result).toContain('was changed while it was copied');
    expect(node(of, 'golden/team/base').id).toBe(moved.id);
    expect(of.test.store.meta.vdisks.all()).toEqual([]);
  });
});
