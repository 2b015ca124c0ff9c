/**
 * Every call that staging, deploying and decommissioning make to the store, to the host or to a hypervisor, one after the other: each fails once, and before each the
 * server dies once, and behind the last. Nothing happens between two calls, so these are all deaths between any two steps. The calls are recorded from an operation that
 * succeeds, so that a step that is added is tried without anybody adding it here; the tables say which kinds of call there are. All of it is done to one
 * store, for each of them must leave it as it was.
 */
import fs from 'node:fs';
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { OffshootError } from '../../blockstore/errors.js';
import { Attachments } from '../../daemon/vdisks/attachments.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { baseMachine, machinesOver, type MachinesFixture } from '../support/machines-fixture.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';
import { vdisksOver, type VdisksFixture } from '../support/vdisk-fixture.js';

const cleanup = createCleanup();

afterEach(() => cleanup.run());

const CONTENT = patterned(5, 64 * 1024);
const MOUNT = '/mnt/test';

/** Who is asked for what. */
const STAGE_CALLS = [
  'jobs.insert', 'jobs.update', 'layers.insert', 'files.createAll', 'vdisks.insert', 'attachments.insert', 'devices.attach', 'attachments.attached', 'host.partition', 'devices.list', 'devices.detach',
  'attachments.remove', 'host.makeFileSystem', 'host.mount', 'host.makeDirectory', 'host.write', 'host.copy', 'host.sync', 'host.unmount', 'vdisks.ready',
] as const;
const DEPLOY_CALLS = [
  'jobs.insert', 'jobs.update', 'hypervisor.probe', 'seal', 'nodes.update', 'deployments.insert', 'attachments.insert', 'devices.attach', 'attachments.attached', 'host.mount', 'host.write', 'host.sync',
  'deployments.asked', 'hypervisor.register', 'deployments.registered', 'hypervisor.start', 'deployments.ready',
] as const;
const DECOMMISSION_CALLS = [
  'jobs.insert', 'hypervisor.status', 'hypervisor.stop', 'deployments.ending', 'jobs.update', 'hypervisor.unregister', 'deployments.unregistered', 'host.unmount', 'devices.list', 'devices.detach',
  'attachments.remove', 'deployments.remove',
] as const;
type CallName = (typeof STAGE_CALLS)[number] | (typeof DEPLOY_CALLS)[number] | (typeof DECOMMISSION_CALLS)[number];
type Verdict = 'go on' | 'fail' | 'die before' | 'die after';

class Dead extends Error {}

interface World {
  readonly test: TestStore;
  readonly directory: string;
  machines: MachinesFixture;
  vdisks: VdisksFixture;
}

function world(): World {
  const test = new TestStore();
  const directory = makeTmpfsDir('vdisks', cleanup);
  const machines = machinesOver(test, directory);
  baseMachine(test, machines, CONTENT);
  machines.fileSystem.namespace.mkdir(1, 'depot', 0o755, { uid: 0, gid: 0, pid: 0 });
  return { test, directory, machines, vdisks: vdisksOver(test, machines, directory, { mountDir: MOUNT }) };
}

/** Another server, after the one before was killed. */
function nextServer(of: World): void {
  of.test.kill();
  of.machines = machinesOver(of.test, of.directory);
  of.vdisks = vdisksOver(of.test, of.machines, of.directory, { mountDir: MOUNT });
}

type AnyCall = (...args: unknown[]) => unknown;

/** Asks `judge` at each call. A server that died makes none any more, and nothing of it is ever answered. */
function watch({ test, machines, vdisks }: World, names: readonly CallName[], judge: (name: CallName) => Verdict): { readonly died: Promise<void>; readonly stop: () => void } {
  let isDead = false;
  const undo: (() => void)[] = [];
  let tell: () => void = () => undefined;
  const died = new Promise<void>((resolve) => { tell = resolve; });
  const { meta, files, groupSeals } = test.store;
  const owners: Readonly<Record<string, object>> = {
    jobs: meta.jobs, layers: meta.layers, nodes: meta.nodes, files, vdisks: meta.vdisks, attachments: meta.attachments, deployments: meta.deployments,
    devices: vdisks.host.devices, host: vdisks.host, hypervisor: machines.hypervisor,
  };
  for (const name of names) {
    const [owner = '', method = ''] = name === 'seal' ? ['', 'seal'] : name.split('.');
    const record = (name === 'seal' ? groupSeals : owners[owner]) as Record<string, AnyCall>;
    const before = record[method];
    const original = before?.bind(record);
    if (before === undefined || original === undefined) throw new Error(`${name} is not there`);
    undo.push(() => { record[method] = before; });
    const isPromised = name === 'seal' || name === 'files.createAll' || ['devices', 'host', 'hypervisor'].includes(owner);
    const die = (): never | Promise<never> => {
      isDead = true;
      tell();
      if (isPromised) return new Promise<never>(() => undefined);
      throw new Dead();
    };
    record[method] = (...args) => {
      if (isDead) return die();
      const verdict = judge(name);
      if (verdict === 'die before') return die();
      if (verdict === 'fail') {
        const error = new OffshootError('no-space', `${name} was told to fail`);
        if (isPromised) return Promise.reject(error);
        throw error;
      }
      const result = original(...args);
      if (verdict !== 'die after') return result;
      return isPromised ? (result as Promise<unknown>).then(() => die()) : die();
    };
  }
  return { died, stop: () => { for (const each of undo) each(); } };
}

const stage = (of: World): number => of.vdisks.plane.service.stage({ source: 'golden/base', target: 'depot/file' }).id;
const deploy = async (of: World): Promise<number> => (await of.vdisks.plane.service.deploy({ source: 'depot/file', name: 'web' })).id;
const decommission = async (of: World): Promise<number> => (await of.vdisks.plane.service.decommission('web', { force: true, timeoutMs: 1000 })).id;

interface Case {
  readonly what: string;
  readonly names: readonly CallName[];
  /** Nothing to do where it is so already. */
  readonly before: (of: World) => Promise<void>;
  /** What only the first of its kind does to a store (it seals the container file, once) is done before, but for the recording. */
  readonly warm: (of: World) => Promise<void>;
  readonly begin: (of: World) => number | Promise<number>;
  readonly nothing: (of: World) => void;
  /** From this call on there is only forward. */
  readonly forwardFrom: CallName | null;
}

function expectStore({ test }: World): void {
  const { meta } = test.store;
  expect(meta.nodes.orphans()).toEqual([]);
  test.expectContent(meta.nodes.byPath('golden/base/disk.img')!, CONTENT);
  expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [] });
}

function names(of: World): string[] {
  const { meta } = of.test.store;
  return meta.nodes.children(meta.nodes.byPath('depot')?.id ?? 0, 0, 100).map(({ name }) => name);
}

function expectHost(of: World, mounts: number): void {
  const { meta } = of.test.store;
  const { devices, mounts: mounted } = of.vdisks.state();
  expect([devices.length, Object.keys(mounted).length, meta.attachments.count()]).toEqual([mounts, mounts, mounts]);
}

async function staged(of: World): Promise<void> {
  if (of.test.store.meta.vdisks.all().length === 0) expect((await of.vdisks.waitFor(stage(of))).message).toContain('is staged');
}

async function deployed(of: World): Promise<void> {
  await staged(of);
  if (of.test.store.meta.deployments.all().length === 0) expect((await of.vdisks.waitFor(await deploy(of))).message).toContain('is deployed');
  const [machine] = await of.vdisks.plane.service.deployed({ name: null, agent: true });
  if (machine?.power !== 'running') await of.vdisks.plane.service.start('web');
}

function notStaged(of: World): void {
  expect(names(of)).toEqual([]);
  expect(of.test.store.meta.vdisks.all()).toEqual([]);
  expectHost(of, 0);
  expectStore(of);
}

function notDeployed(of: World): void {
  expect(names(of)).toEqual(['file']);
  expect(of.test.store.meta.vdisks.all()).toMatchObject([{ state: 'ready' }]);
  expect(of.test.store.meta.deployments.all()).toEqual([]);
  expect(of.machines.seat.registered()).toEqual([]);
  expectHost(of, 0);
  expectStore(of);
}

function stillDeployed(of: World): void {
  expect(of.test.store.meta.deployments.all()).toMatchObject([{ name: 'web', state: 'ready', registration: 'registered' }]);
  expect(names(of)).toEqual(['file', 'web.vdisk']);
  expectHost(of, 1);
}

async function deployedOnce(of: World): Promise<void> {
  await deployed(of);
  expect(await of.vdisks.waitFor(await decommission(of))).toMatchObject({ state: 'completed' });
}

const CASES: readonly Case[] = [
  { what: 'stage', names: STAGE_CALLS, before: async () => { await Promise.resolve(); }, warm: async () => { await Promise.resolve(); }, begin: stage, nothing: notStaged, forwardFrom: null },
  { what: 'deploy', names: DEPLOY_CALLS, before: staged, warm: deployedOnce, begin: deploy, nothing: notDeployed, forwardFrom: null },
  { what: 'decommission', names: DECOMMISSION_CALLS, before: deployed, warm: deployedOnce, begin: decommission, nothing: stillDeployed, forwardFrom: 'deployments.ending' },
];

describe.each(CASES)('at every call of $what', ({ names: kinds, before, warm, begin, nothing, forwardFrom }) => {
  const recorded = async (isFirst: boolean): Promise<CallName[]> => {
    const of = world();
    if (!isFirst) await warm(of);
    await before(of);
    const calls: CallName[] = [];
    watch(of, kinds, (name) => { calls.push(name); return 'go on'; });
    expect(await of.vdisks.waitFor(await begin(of))).toMatchObject({ state: 'completed' });
    return calls;
  };
  // The job's row is written in the same transaction.
  const isForward = (calls: readonly CallName[], at: number): boolean => forwardFrom !== null && at > calls.indexOf(forwardFrom) + 1;

  it('there is one of each kind that the table names', async () => {
    expect(new Set(await recorded(true))).toEqual(new Set(kinds));
  });

  it('a failure leaves nothing of it, or is overcome when there is no way back; then it is made', { timeout: 300_000 }, async () => {
    const calls = await recorded(false);
    const of = world();
    await warm(of);
    for (let at = 0; at < calls.length; at += 1) {
      const where = `call ${at}, ${calls[at] ?? ''}`;
      await before(of);
      let seen = -1;
      const { stop } = watch(of, kinds, (name) => { seen += 1; if (seen === at) expect(name).toBe(calls[at]); return seen === at ? 'fail' : 'go on'; });
      let job = null;
      try {
        job = await of.vdisks.waitFor(await begin(of));
      } catch (thrown) {
        expect(thrown, where).toMatchObject({ kind: 'no-space' });
      }
      stop();
      expect([where, seen >= at]).toEqual([where, true]);
      if (isForward(calls, at)) {
        expect([where, job?.state]).toEqual([where, 'completed']);
        notDeployed(of);
        continue;
      }
      if (job !== null) expect([where, job.state, job.message]).toEqual([where, 'failed', `${calls[at] ?? ''} was told to fail`]);
      nothing(of);
    }
    await before(of);
    expect(await of.vdisks.waitFor(await begin(of))).toMatchObject({ state: 'completed' });
  });

  it('the next server leaves nothing of one whose server died there, or brings it to its end', { timeout: 300_000 }, async () => {
    const calls = await recorded(false);
    const of = world();
    await warm(of);
    for (let at = 1; at <= calls.length; at += 1) {
      // Behind the last one its answer alone is lost.
      const isBehind = at === calls.length;
      const where = isBehind ? 'behind the last call' : `call ${at}, ${calls[at] ?? ''}`;
      await before(of);
      let seen = -1;
      const { died } = watch(of, kinds, (name) => {
        seen += 1;
        if (seen === at && !isBehind) expect(name).toBe(calls[at]);
        if (isBehind) return seen === at - 1 ? 'die after' : 'go on';
        return seen === at ? 'die before' : 'go on';
      });
      const finished = (async () => {
        const job = await of.vdisks.waitFor(await begin(of));
        throw new Error(`${where} was never made: ${job.message ?? ''}`);
      })();
      // One that throws because its server died waits for nothing any more.
      await Promise.race([died, finished.catch(async (thrown: unknown) => { if (thrown instanceof Dead) await died; else throw thrown; })]);
      nextServer(of);
      const { meta } = of.test.store;
      for (const job of meta.jobs.list({ states: ['running'] })) await of.vdisks.waitFor(job.id);
      await of.vdisks.plane.service.deployed({ name: null, agent: false });
      const job = meta.jobs.list().at(-1);
      if (isForward(calls, at)) {
        expect([where, job?.state]).toEqual([where, 'completed']);
        notDeployed(of);
      } else {
        // The transaction of the last step is open when its last call is over: it is undone like any other.
        expect([where, job?.state]).toEqual([where, 'failed']);
        nothing(of);
      }
    }
    await before(of);
    expect(await of.vdisks.waitFor(await begin(of))).toMatchObject({ state: 'completed' });
  });
});

describe('devices', () => {
  it('are given back that a killed server attached and wrote down nothing of', async () => {
    const of = world();
    const nodeId = of.test.store.meta.nodes.byPath('golden/base/disk.img')?.id ?? 0;
    of.test.store.meta.attachments.insert({ nodeId, purpose: 'block', jobId: null });
    await of.vdisks.host.devices.attach(path.join(MOUNT, 'golden/base/disk.img'), { nodeId, readOnly: false, signal: new AbortController().signal });
    nextServer(of);
    await of.vdisks.plane.service.deployed({ name: null, agent: false });
    expect(of.vdisks.state().devices).toEqual([]);
    expect(of.test.store.meta.attachments.count()).toBe(0);
  });

  it('keep the owner of the disk that they show now, when the one before went in the same moment', async () => {
    const { test, directory, vdisks } = world();
    const { meta } = test.store;
    const device = path.join(directory, 'loop');
    fs.writeFileSync(device, '', { mode: 0o666 });
    const nodes = ['before', 'now'].map((name) => test.image(name, CONTENT).id);
    for (const nodeId of nodes) meta.nodes.update(nodeId, { mode: 0o640 });
    const attach = (nodeId = 0): void => { meta.attachments.attached(meta.attachments.insert({ nodeId, purpose: 'block', jobId: null }), device); };
    const attachments = new Attachments({
      store: test.store, mountDir: MOUNT, limit: 9, openCount: () => 0, logger: { info: () => undefined, warn: () => undefined },
      // The first one goes, and its number comes to the second, while it is looked for.
      devices: { ...vdisks.host.devices, list: () => { give(); return Promise.resolve([]); } },
    });
    let give = (): void => { attach(nodes[1]); attachments.openToOwner(nodes[1] ?? 0, device); };
    attach(nodes[0]);
    await attachments.settle(new AbortController().signal);
    expect(meta.attachments.all().map(({ nodeId }) => nodeId)).toEqual([nodes[1]]);
    expect(fs.statSync(device).mode & 0o777).toBe(0o640);
    give = () => undefined;
    await attachments.settle(new AbortController().signal);
    expect(fs.statSync(device).mode & 0o777).toBe(0o600);
  });

  it('of others are left alone', async () => {
    const of = world();
    await staged(of);
    await of.vdisks.host.devices.attach(path.join(MOUNT, 'golden/base/disk.img'), { nodeId: 4711, readOnly: false, signal: new AbortController().signal });
    nextServer(of);
    await of.vdisks.waitFor(await deploy(of));
    nextServer(of);
    await of.vdisks.plane.service.deployed({ name: null, agent: false });
    expect(of.vdisks.state().devices.map(({ nodeId }) => nodeId)).toContain(4711);
    expect(fs.existsSync(path.join(of.directory, 'host.json'))).toBe(true);
  });
});

describe('a container file', () => {
  it('is refused, with nothing made, by a host that cannot use it: another architecture, no such file system, a hypervisor elsewhere', async () => {
    const of = world();
    await staged(of);
    const { host } = of.vdisks;
    const refused = async (what: RegExp): Promise<void> => {
      expect(await of.vdisks.waitFor(await deploy(of))).toMatchObject({ state: 'failed', message: expect.stringMatching(what) as string });
      notDeployed(of);
    };
    const usual = { ...host };
    host.architecture = () => 'riscv64';
    await refused(/staged on x86_64, and this host is riscv64/u);
    host.architecture = () => usual.architecture();
    host.canMount = () => false;
    await refused(/holds ext4, which the kernel of this host does not have/u);
    expect(await of.vdisks.waitFor(of.vdisks.plane.service.stage({ source: 'golden/base', target: 'depot/other' }).id)).toMatchObject({ state: 'failed', message: expect.stringContaining('no ext4') as string });
    host.canMount = (type) => usual.canMount(type);
    const hypervisor = of.machines.hypervisor as { abilities: object };
    const { abilities } = hypervisor;
    hypervisor.abilities = { ...abilities, isRemote: true };
    await refused(/files of other hosts/u);
    hypervisor.abilities = abilities;
    expect(await of.vdisks.waitFor(await deploy(of))).toMatchObject({ state: 'completed' });
  });
});
