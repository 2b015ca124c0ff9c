/**
 * What is refused of container files, deployed machines and block devices, before anything is made, and what is waited for: one line of the code each. Over a test
 * store and a host on paper (vdisk-fixture.ts).
 */
import { afterEach, describe, expect, it } from 'vitest';

import type { ErrorKind } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { baseMachine, machinesOver, writeFile, type MachinesFixture } from '../support/machines-fixture.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';
import { vdisksOver, type VdisksFixture } from '../support/vdisk-fixture.js';

const cleanup = createCleanup();
const ROOT = { uid: 0, gid: 0, pid: 0 };
const DISK = 'golden/base/disk.img';

interface World {
  readonly test: TestStore;
  readonly directory: string;
  readonly machines: MachinesFixture;
  vdisks: VdisksFixture;
  /** Ids of nodes that somebody has open. */
  readonly open: Set<number>;
}

function world(limit = 16): World {
  const test = new TestStore();
  const directory = makeTmpfsDir('vdisks', cleanup);
  const machines = machinesOver(test, directory);
  baseMachine(test, machines, patterned(5, 64 * 1024));
  machines.fileSystem.namespace.mkdir(1, 'depot', 0o755, ROOT);
  const open = new Set<number>();
  machines.fileSystem.openCount = (node) => (open.has(node) ? 1 : 0);
  return { test, directory, machines, vdisks: vdisksOver(test, machines, directory, { mountDir: '/mnt/test', limit }), open };
}

function node({ test }: World, at: string): NodeRow {
  const found = test.store.meta.nodes.byPath(at);
  if (found === undefined) throw new Error(`${at} is not there`);
  return found;
}

interface Ended { readonly state: string; readonly message: string | null }
const stage = async ({ vdisks }: World): Promise<Ended> => await vdisks.waitFor(vdisks.plane.service.stage({ source: 'golden/base', target: 'depot/file' }).id);
const deploy = async ({ vdisks }: World, name = 'web'): Promise<Ended> => await vdisks.waitFor((await vdisks.plane.service.deploy({ source: 'depot/file', name })).id);
const decommission = async ({ vdisks }: World, force: boolean): Promise<Ended> => await vdisks.waitFor((await vdisks.plane.service.decommission('web', { force, timeoutMs: 1000 })).id);

async function staged(limit?: number): Promise<World> {
  const of = world(limit);
  expect(await stage(of)).toMatchObject({ state: 'completed' });
  return of;
}

async function deployed(): Promise<World> {
  const of = await staged();
  expect(await deploy(of)).toMatchObject({ state: 'completed' });
  return of;
}

function expectRefused(ended: Ended, words: string): void { expect([ended.state, ended.message]).toEqual(['failed', expect.stringContaining(words)]); }
const refusal = (kind: ErrorKind, words: string): Error => expect.objectContaining({ kind, message: expect.stringContaining(words) as string }) as Error;
const uuidOf = ({ test }: World): string => test.store.meta.deployments.byName('web')?.uuid ?? '';

afterEach(async () => { await cleanup.run(); });

describe('a machine is not staged', () => {
  it.each<[string, string, (of: World) => Promise<void> | void]>([
    ['that runs', 'only a machine that is off', async (of) => {
      await of.machines.service.register('golden/base', null);
      of.machines.seat.setState(of.machines.seat.registered()[0]?.uuid ?? '', 'running');
    }],
    ['whose disk is open', 'is open: only a machine that is off', (of) => { of.open.add(node(of, DISK).id); }],
    ['that has what is ours', "is Offshoot's own", (of) => { writeFile(of.test, of.machines.fileSystem, node(of, 'golden/base').id, '.offshoot', 'x'); }],
    ['in a file system that this kernel lacks', 'has no ext4', (of) => { of.vdisks.host.canMount = () => false; }],
  ])('%s', async (_what, words, meddle) => {
    const of = world();
    await meddle(of);
    expectRefused(await stage(of), words);
    expect(of.test.store.meta.vdisks.all()).toEqual([]);
    expect(of.vdisks.state().devices).toEqual([]);
  });

  it('whose disk somebody opened while it was copied, and has open still', { timeout: 60_000 }, async () => {
    const of = world();
    of.vdisks.host.sync = async () => { of.open.add(node(of, DISK).id); await Promise.resolve(); };
    expectRefused(await stage(of), `${DISK} is open`);
  });
});

describe('a container file is not deployed', () => {
  it.each<[string, string, (of: World) => void]>([
    ['on another architecture', 'was staged on x86_64', (of) => { of.vdisks.host.architecture = () => 'aarch64'; }],
    ['where the kernel lacks its file system', 'holds ext4', (of) => { of.vdisks.host.canMount = () => false; }],
    ['for hosts that do not see its mount', 'looks at files of other hosts', (of) => { Object.assign(of.machines.hypervisor.abilities, { isRemote: true }); }],
    ['over what is mounted there', 'something is mounted at', (of) => { of.vdisks.host.isMounted = () => true; }],
    ['that is not ready', 'is being staged', (of) => { Object.assign(of.test.store.meta.vdisks, { byNode: makingOnly(of) }); }],
    ['by another version', 'by another version of Offshoot', (of) => { const { vdisks } = of.test.store.meta; const row = vdisks.all()[0]; vdisks.describe(row?.id ?? 0, { ...row?.description as object, version: 2 }); }],
  ])('%s', async (_what, words, meddle) => {
    const of = await staged();
    meddle(of);
    expectRefused(await deploy(of), words);
    expect(of.test.store.meta.deployments.all()).toEqual([]);
    expect(of.machines.seat.registered()).toEqual([]);
  });

  it('when there are as many attached as there may be; one less may', async () => {
    const of = await staged(1);
    expect(await deploy(of)).toMatchObject({ state: 'completed' });
    expectRefused(await deploy(of, 'other'), '1 virtual disks are attached, which is the limit');
    await decommission(of, true);
    expect(await deploy(of, 'other')).toMatchObject({ state: 'completed' });
  });

  it('that its hypervisor refuses, whose machine of that name stays', async () => {
    const of = await staged();
    of.machines.seat.order({ forbid: 'web' });
    expectRefused(await deploy(of), 'never takes web');
    expect(of.machines.seat.count('register')).toBe(1);
  });
});

/** The row as between two steps of a staging. */
function makingOnly({ test }: World): (nodeId: number) => object | undefined {
  const row = test.store.meta.vdisks.all()[0];
  return (nodeId) => (nodeId === row?.nodeId ? { ...row, state: 'making', jobId: 1 } : undefined);
}

describe('a deployed machine', () => {
  it('is shut down before it is decommissioned, unless its power is to be taken, and not when it cannot be told', async () => {
    const of = await deployed();
    of.machines.seat.setState(uuidOf(of), 'running');
    Object.assign(of.machines.hypervisor.abilities, { shutdown: false });
    expectRefused(await decommission(of, false), 'add --force to take its power');
    expect(of.test.store.meta.deployments.byName('web')).toMatchObject({ state: 'ready', registration: 'registered' });
    const forced: boolean[] = [];
    const stop = of.machines.hypervisor.stop.bind(of.machines.hypervisor);
    of.machines.hypervisor.stop = async (id, options) => { forced.push(options.force); await stop(id, options); };
    Object.assign(of.machines.hypervisor.abilities, { shutdown: true });
    expect(await decommission(of, false)).toMatchObject({ state: 'completed' });
    expect(forced).toEqual([false]);
  });

  it('holds up a stop while it runs; a stop that is refused leaves it mounted', async () => {
    const of = await deployed();
    of.machines.seat.setState(uuidOf(of), 'running');
    const unmounts: string[] = [];
    const unmount = (): Promise<void> => { unmounts.push('unmount'); return Promise.reject(new Error('busy')); };
    await expect(of.vdisks.plane.around(false, unmount)).rejects.toThrow(refusal('in-use', 'web is deployed and runs'));
    expect(unmounts).toEqual([]);
    of.machines.seat.setState(uuidOf(of), 'shut-off');
    await expect(of.vdisks.plane.around(false, unmount)).rejects.toThrow('busy');
    expect([unmounts.length, of.vdisks.state().devices.length, Object.keys(of.vdisks.state().mounts).length]).toEqual([1, 1, 1]);
  });

  it('is not there for those who detach, or read links', async () => {
    const of = await deployed();
    await expect(of.vdisks.plane.service.detach('depot/web.vdisk')).rejects.toThrow(refusal('in-use', 'offshoot decommission web'));
    await expect(of.vdisks.plane.blocks.device(node(of, 'depot/web.vdisk').id, ROOT)).rejects.toThrow(refusal('in-use', 'is a deployed machine'));
  });
});

describe('a disk', () => {
  it('is attached for those alone who may read it', async () => {
    const of = world();
    of.test.store.meta.nodes.update(node(of, DISK).id, { mode: 0o600, uid: 1000, gid: 1000 });
    await expect(of.vdisks.plane.blocks.device(node(of, DISK).id, { uid: 1001, gid: 1001, pid: 1 })).rejects.toThrow(refusal('permission-denied', 'may not read'));
    expect(of.test.store.meta.attachments.count()).toBe(0);
  });

  it('that is a container file is attached read-only', async () => {
    const of = await staged();
    await expect(of.vdisks.plane.service.attach('depot/file', false)).rejects.toThrow(refusal('not-permitted', 'never written'));
    expect(await of.vdisks.plane.blocks.device(node(of, 'depot/file').id, ROOT)).toContain('paper0');
    expect(of.vdisks.state().devices).toMatchObject([{ readOnly: true }]);
  });

  it('is given back when nobody has it open, and not before', { timeout: 60_000 }, async () => {
    const of = world();
    const { id } = node(of, DISK);
    of.test.store.meta.attachments.insert({ nodeId: id, purpose: 'block', jobId: null });
    of.open.add(id);
    setTimeout(() => { of.open.delete(id); }, 200);
    const row = of.vdisks.plane.service.detach(DISK);
    await new Promise((resolve) => { setTimeout(resolve, 50); });
    expect(of.test.store.meta.attachments.count()).toBe(1);
    await row;
    expect(of.test.store.meta.attachments.count()).toBe(0);
  });
});
