/** Clones of machines over a real store: identities, files, registrations, and that nothing is left of one that failed or whose server died, at any step. */
import fs from 'node:fs';
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { toOffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import { assertNoBoundMachineIn } from '../../daemon/filesystem/bound-machines.js';
import { readText } from '../../daemon/machines/machines.js';
import { kindOfRejection, patterned } from '../support/blockstore-fixture.js';
import { machineWorld, type MachineWorld as World } from '../support/machine-world.js';
import { baseMachine, machinesOver, MOUNT, writeFile, type MachinesFixture } from '../support/machines-fixture.js';
import { snapshotsOver } from '../support/snapshots-fixture.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();

afterEach(() => cleanup.run());

const CONTENT = patterned(5, 64 * 1024);
const ROOT = { uid: 0, gid: 0, groups: [] };

function world(): World {
  return machineWorld(makeTmpfsDir('hypervisor', cleanup), CONTENT);
}

/** The next server, after kill -9: recovers, which is waited for. */
async function killed(of: World): Promise<MachinesFixture> {
  of.test.kill();
  of.machines = machinesOver(of.test, of.directory);
  const running = of.test.store.meta.jobs.list({ states: ['running'] });
  for (const job of running) await of.machines.waitFor(job.id);
  return of.machines;
}

function targets(count: number): string[] {
  return Array.from({ length: count }, (_, i) => `lab/web${i + 1}`);
}

/** Nothing of the clones is there: no name, no row, no registration, no layer that nobody needs; and the source is what it was. */
function expectNothing({ test, machines }: World): void {
  const { meta } = test.store;
  expect(meta.nodes.childCount(meta.nodes.byPath('lab')?.id ?? 0)).toBe(0);
  expect(meta.machines.all()).toEqual([]);
  expect(machines.seat.registered()).toEqual([]);
  expect(meta.nodes.orphans()).toEqual([]);
  test.expectContent(meta.nodes.byPath('golden/base/disk.img')!, CONTENT);
  expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [] });
  expect(machines.fatal).toEqual([]);
}

function errorKind(job: JobRow): ErrorKind | null {
  return (job.parameters as { readonly errorKind: ErrorKind | null }).errorKind;
}

describe('a clone of a machine', () => {
  it('has its files, an identity of its own, and is registered', async () => {
    const { test, machines } = world();
    const { meta } = test.store;
    const job = await machines.clone({ source: 'golden/base', targets: targets(3), register: true, settings: [{ key: 'memory', value: '2048' }] });
    expect(job).toMatchObject({ state: 'completed', message: '3 machines of golden/base, registered with qemu' });
    const rows = meta.machines.ofJob(job.id);
    expect(rows.map((row) => [row.name, row.state, row.registration, row.hypervisor])).toEqual(['web1', 'web2', 'web3'].map((name) => [name, 'ready', 'registered', 'qemu']));
    const macs = rows.flatMap((row) => row.macs);
    expect(new Set([...macs, '52:54:00:11:22:33', '52:54:00:11:22:34']).size).toBe(8);
    for (const row of rows) {
      const place = `lab/${row.name}`;
      expect(meta.nodes.children(row.nodeId, 0, 10).map((node) => node.name).toSorted()).toEqual(['disk.img', 'machine.json', 'notes']);
      test.expectContent(meta.nodes.byPath(`${place}/disk.img`)!, CONTENT);
      const text = await readText(test.store, meta.nodes.byPath(`${place}/machine.json`)!);
      expect(JSON.parse(text)).toMatchObject({
        name: row.name, uuid: row.uuid, macs: row.macs, memory: 2048, disks: { vda: `${MOUNT}/${place}/disk.img` }, nvram: `${MOUNT}/${place}/vars.nvram`,
      });
      expect(machines.seat.registered().find(({ uuid }) => uuid === row.uuid)).toMatchObject({ name: row.name, directory: `${MOUNT}/${place}`, configuration: 'machine.json', text });
    }
    expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [] });
  });

  it('is the same machine again with the same seed, on another store', async () => {
    const [one, other] = [world(), world()];
    for (const { machines } of [one, other]) expect(await machines.clone({ source: 'golden/base', targets: targets(4), seed: 'x' })).toMatchObject({ state: 'completed' });
    const known = one.test.store.meta.machines.all().map(({ name, uuid, macs }) => ({ name, uuid, macs }));
    expect(other.test.store.meta.machines.all().map(({ name, uuid, macs }) => ({ name, uuid, macs }))).toEqual(known);
    expect(new Set(known.map(({ uuid }) => uuid)).size).toBe(4);
  });

  it('of a snapshot is as the machine was then, and names its own files', async () => {
    const { test, machines } = world();
    await snapshotsOver(test).create({ reference: 'golden@v1', quiesce: null });
    const disk = test.store.meta.nodes.byPath('golden/base/disk.img')!;
    test.store.disks.acquire(disk.id);
    test.store.data.write(disk.id, 0, Buffer.alloc(4096, 9));
    test.store.disks.release(disk.id);
    expect(await machines.clone({ source: 'golden/base@v1', targets: ['lab/old'], register: true })).toMatchObject({ state: 'completed' });
    test.expectContent(test.store.meta.nodes.byPath('lab/old/disk.img')!, CONTENT);
    expect(machines.seat.registered()[0]?.text).toContain(`"${MOUNT}/lab/old/disk.img"`);
  });

  it('of a container has all machines in it, each with an identity of its own', async () => {
    const { test, machines } = world();
    baseMachine(test, machines, CONTENT, 'other');
    const job = await machines.clone({ source: 'golden', targets: ['lab7', 'lab8'], register: true });
    expect(job.state, job.message ?? '').toBe('completed');
    expect(machines.seat.registered().map(({ name }) => name).toSorted()).toEqual(['lab7-base', 'lab7-other', 'lab8-base', 'lab8-other']);
    const { meta } = test.store;
    expect(new Set(meta.machines.all().flatMap((row) => row.macs)).size).toBe(8);
    expect(await readText(test.store, meta.nodes.byPath('lab8/other/machine.json')!)).toContain(`"${MOUNT}/lab8/other/disk.img"`);
  });

  it('of one that runs says that it is crash-consistent; with --wait it is made quiet by its agent, or refused when nothing helps', async () => {
    const { test, machines } = world();
    const base = await machines.service.register('golden/base', null);
    machines.seat.setState(base.uuid ?? '', 'running');
    expect((await machines.clone({ source: 'golden/base', targets: ['lab/a'] })).message).toMatch(/crash-consistent/u);
    const refused = await machines.clone({ source: 'golden/base', targets: ['lab/b'], waitSeconds: 0.1 });
    expect([refused.state, errorKind(refused)]).toEqual(['failed', 'timed-out']);
    expect(test.store.meta.nodes.byPath('lab/b')).toBeUndefined();
    machines.seat.order({ agent: true });
    expect((await machines.clone({ source: 'golden/base', targets: ['lab/c'], waitSeconds: 10 })).message).toMatch(/were quiet/u);
    expect(machines.seat.calls().filter((line) => /^(?:freeze|thaw)/u.test(line))).toEqual([`freeze ${base.uuid}`, `thaw ${base.uuid}`]);
    machines.seat.setState(base.uuid ?? '', 'shut-off');
    expect((await machines.clone({ source: 'golden/base', targets: ['lab/d'], waitSeconds: 10 })).message).toBe('1 machine of golden/base');
  });

  it('is for those who may read all of it, and belongs to whoever asked', async () => {
    const { test, machines } = world();
    const { meta } = test.store;
    const alice = { uid: 1000, gid: 1000, groups: [4], pid: 1 };
    const disk = meta.nodes.byPath('golden/base/disk.img')!;
    meta.nodes.update(meta.nodes.byPath('lab')!.id, { uid: 1000, mode: 0o700 });
    const refused = await machines.clone({ source: 'golden/base', targets: ['lab/a'] }, alice);
    expect([errorKind(refused), refused.message]).toEqual(['permission-denied', expect.stringContaining('golden/base/disk.img')]);
    meta.nodes.update(disk.id, { gid: 4, mode: 0o640 });
    expect((await machines.clone({ source: 'golden/base', targets: ['lab/a'] }, alice)).state).toBe('completed');
    for (const name of ['', '/disk.img', '/machine.json']) expect(meta.nodes.byPath(`lab/a${name}`)).toMatchObject({ uid: 1000, gid: 1000 });
    expect(errorKind(await machines.clone({ source: 'golden/base', targets: ['golden/b'] }, alice))).toBe('permission-denied');
    expect(await kindOfRejection(machines.service.clone({ source: 'golden/base', targets: ['lab/c'], user: 'root' }, alice))).toBe('permission-denied');
  });

  it.each<readonly [string, ErrorKind, (of: World) => Promise<JobRow> | JobRow]>([
    ['whose source is not there', 'not-found', ({ machines }) => machines.clone({ source: 'golden/none', targets: targets(1) })],
    ['whose source is no machine', 'not-found', ({ machines }) => machines.clone({ source: 'lab', targets: ['lab9'] })],
    ['whose target is there', 'already-exists', async ({ test, machines }) => {
      machines.fileSystem.namespace.mkdir(test.store.meta.nodes.byPath('golden')!.id, 'x', 0o755, { uid: 0, gid: 0, pid: 0 });
      return await machines.clone({ source: 'golden/base', targets: ['lab/y', 'golden/x'] });
    }],
    ['whose two targets have one name', 'already-exists', ({ machines }) => machines.clone({ source: 'golden/base', targets: ['lab/same', 'golden/same'] })],
    ['that is given another name by --set', 'invalid-argument', ({ machines }) => machines.clone({ source: 'golden/base', targets: targets(1), settings: [{ key: 'name', value: 'x' }] })],
    ['that is given a disk of the host by --set', 'invalid-argument', ({ machines }) => machines.clone({ source: 'golden/base', targets: targets(1), settings: [{ key: 'vda', value: '/etc/shadow' }] })],
    ['that is given what its format does not know', 'invalid-argument', ({ machines }) => machines.clone({ source: 'golden/base', targets: targets(1), settings: [{ key: 'colour', value: 'red' }] })],
    ['whose hypervisor cannot be used', 'not-supported', ({ machines }) => { machines.seat.order({ unusable: true }); return machines.clone({ source: 'golden/base', targets: targets(1), register: true }); }],
    ['whose hypervisor is not there', 'not-supported', ({ machines }) => machines.clone({ source: 'golden/base', targets: targets(1), register: true, hypervisor: 'libvirt' })],
  ])('%s is refused, and nothing is made', async (_what, kind, ask) => {
    const of = world();
    const job = await ask(of);
    expect([job.state, errorKind(job)]).toEqual(['failed', kind]);
    expectNothing(of);
  });

  it.each<readonly [string, ErrorKind, object]>([
    ['shares a disk outside of its directory', 'invalid-argument', { disks: { vda: '/srv/other.img' } }],
    ['reaches above its directory', 'invalid-argument', { disks: { vda: '../other/disk.img' } }],
    ['has a disk that is not given as raw', 'foreign-format', { formats: { vda: 'qcow2' } }],
    ['names a disk that is not there', 'not-found', { disks: { vda: 'gone.img' } }],
  ])('of one that %s is refused', async (_what, kind, change) => {
    const of = world();
    const { test, machines } = of;
    const directory = machines.fileSystem.namespace.mkdir(test.store.meta.nodes.byPath('golden')!.id, 'odd', 0o755, { uid: 0, gid: 0, pid: 0 }).nodeId;
    test.store.meta.nodes.move(test.image('odd', CONTENT).id, directory, 'disk.img');
    writeFile(test, machines.fileSystem, directory, 'machine.json', JSON.stringify({ name: 'odd', uuid: 'x', macs: [], memory: 1, disks: { vda: 'disk.img' }, ...change }));
    const job = await machines.clone({ source: 'golden/odd', targets: ['lab/a'] });
    expect([job.state, errorKind(job)]).toEqual(['failed', kind]);
    expectNothing(of);
  });
});

describe('nothing is left of clones of machines', () => {
  it('when the 57th of a hundred registrations is refused', async () => {
    const of = world();
    of.machines.seat.order({ refuse: 57 });
    const job = await of.machines.clone({ source: 'golden/base', targets: targets(100), register: true });
    expect([job.state, errorKind(job)]).toEqual(['failed', 'io-error']);
    expect(of.machines.seat.calls().filter((line) => line.startsWith('unregister')).length).toBeGreaterThanOrEqual(55);
    expectNothing(of);
    of.machines.seat.order({});
    expect((await of.machines.clone({ source: 'golden/base', targets: targets(100), register: true })).state).toBe('completed');
  });

  it('when a name is taken with the hypervisor, whose own machine stays', async () => {
    const of = world();
    const { seat } = of.machines;
    const stranger = { name: 'web2', uuid: 'strange', directory: '/elsewhere', configuration: 'x', text: '', owner: { uid: 0, gid: 0 }, state: 'running' };
    fs.writeFileSync(seat.fileOf('strange'), JSON.stringify(stranger));
    const job = await of.machines.clone({ source: 'golden/base', targets: targets(3), register: true });
    expect([job.state, errorKind(job)]).toEqual(['failed', 'already-exists']);
    expect(seat.registered()).toEqual([stranger]);
    fs.rmSync(seat.fileOf('strange'));
    expectNothing(of);
  });

  it('when the hypervisor never takes one, however often it is asked', async () => {
    const of = world();
    of.machines.seat.order({ forbid: 'web2' });
    const job = await of.machines.clone({ source: 'golden/base', targets: targets(3), register: true });
    expect([job.state, errorKind(job)]).toEqual(['failed', 'not-permitted']);
    expect(of.machines.seat.calls().filter((line) => line.includes('register web2'))).toHaveLength(1);
    expectNothing(of);
  });

  it('when it is cancelled in the middle', async () => {
    const of = world();
    const { id } = await of.machines.service.clone({ source: 'golden/base', targets: targets(50), register: true }, { uid: 0, gid: 0, groups: [] });
    while (of.machines.seat.registered().length < 10) await new Promise((resolve) => { setTimeout(resolve, 1); });
    await of.machines.service.cancel(id);
    expect(of.test.store.meta.jobs.byId(id)?.state).toBe('cancelled');
    expectNothing(of);
  });

  it('when the files of the configurations cannot be written', async () => {
    const of = world();
    of.test.store.files.createAll = () => Promise.reject(toOffshootError(Object.assign(new Error('full'), { code: 'ENOSPC', errno: -28 })));
    const job = await of.machines.clone({ source: 'golden/base', targets: targets(3), register: true });
    expect([job.state, errorKind(job)]).toEqual(['failed', 'no-space']);
    expectNothing(of);
  });

  it('once the hypervisor answers again, when it does not while it is undone; till then it says so', async () => {
    const of = world();
    of.machines.seat.order({ refuse: 3, unregisterFails: true });
    const { id } = await of.machines.service.clone({ source: 'golden/base', targets: targets(4), register: true }, { uid: 0, gid: 0, groups: [] });
    const { meta } = of.test.store;
    while (!(meta.jobs.byId(id)?.message ?? '').startsWith('undoing')) await new Promise((resolve) => { setTimeout(resolve, 1); });
    expect(meta.jobs.byId(id)).toMatchObject({ state: 'running', message: expect.stringContaining('does not answer') as string });
    expect(meta.nodes.byPath('lab/web1')).toBeDefined();
    // Also when that is another server's.
    const next = machinesAfterKill(of);
    await new Promise((resolve) => { setTimeout(resolve, 20); });
    expect(of.test.store.meta.jobs.byId(id)?.state).toBe('running');
    next.seat.order({});
    expect((await next.waitFor(id)).state).toBe('failed');
    expectNothing(of);
  });

  // The server dies where the store or the hypervisor is called for what the step does; what it awaits never comes.
  it.each<readonly [string, (of: World) => Promise<void>]>([
    ['before step 2, with nothing made', (of) => stopAt(of, (go) => { of.test.store.groupSeals.seal = (async () => { go(); return await never(); }); })],
    ['between steps 2 and 3', (of) => stopAt(of, (go) => { of.test.store.files.createAll = async () => { go(); return await never(); }; })],
    ['in step 3, with the files written and not in place', (of) => stopAt(of, (go) => {
      const { files } = of.test.store;
      const createAll = files.createAll.bind(files);
      files.createAll = async (wanted) => { await createAll(wanted); go(); return await never(); };
    })],
    ['between steps 3 and 4', (of) => stopAt(of, (go) => { of.test.store.meta.machines.asked = () => { go(); throw new Stopped(); }; })],
    ['in step 4, asked and not heard', (of) => stopAtRegister(of, 1, false)],
    ['in step 4, heard and not written down', (of) => stopAtRegister(of, 1, true)],
    ['in step 4, at the tenth', (of) => stopAtRegister(of, 10, true)],
    ['between steps 4 and 5', (of) => stopAt(of, (go) => { of.test.store.meta.machines.ready = () => { go(); throw new Stopped(); }; })],
  ])('when the server dies %s', async (_where, stop) => {
    const of = world();
    await stop(of);
    await killed(of);
    const [job] = of.test.store.meta.jobs.list({ kind: 'machine-clone' });
    expect(job).toMatchObject({ state: 'failed', message: expect.stringContaining('restarted') as string });
    expectNothing(of);
    expect((await of.machines.clone({ source: 'golden/base', targets: targets(12), register: true })).state).toBe('completed');
  });
});

class Stopped extends Error {}

async function never(): Promise<never> {
  return await new Promise<never>(() => undefined);
}

/** Begins twelve clones on a server that comes as far as `arm` lets it. */
async function stopAt(of: World, arm: (go: () => void) => void): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    arm(resolve);
    of.machines.service.clone({ source: 'golden/base', targets: targets(12), register: true }, { uid: 0, gid: 0, groups: [] }).catch(reject);
  });
}

async function stopAtRegister(of: World, nth: number, after: boolean): Promise<void> {
  await stopAt(of, (go) => {
    const { seat } = of.machines;
    const note = seat.note.bind(seat);
    let seen = 0;
    seat.note = (what, isAfter) => {
      const result = note(what, isAfter);
      if (what.startsWith('register') && (isAfter ?? false) === after) {
        seen += 1;
        if (seen >= nth) {
          go();
          throw new Stopped();
        }
      }
      return result;
    };
  });
}

function machinesAfterKill(of: World): MachinesFixture {
  of.test.kill();
  of.machines = machinesOver(of.test, of.directory);
  return of.machines;
}

describe('a machine', () => {
  it('is changed while it is off, and its hypervisor is told; its identity stays unique', async () => {
    const { test, machines } = world();
    await machines.clone({ source: 'golden/base', targets: targets(2), register: true });
    const { service, seat } = machines;
    await service.set('lab/web1', [{ key: 'memory', value: '4096' }]);
    expect(await service.get('lab/web1', 'memory', ROOT)).toEqual([{ key: 'memory', value: '4096' }]);
    const known = test.store.meta.machines.byName('web1')!;
    expect(seat.registered().find(({ uuid }) => uuid === known.uuid)?.text).toContain('"memory": 4096');
    expect(await kindOfRejection(service.set('lab/web1', [{ key: 'name', value: 'web2' }]))).toBe('already-exists');
    expect(await kindOfRejection(service.set('lab/web1', [{ key: 'vda', value: '/etc/shadow' }]))).toBe('invalid-argument');
    expect(await service.show('lab/web1')).toMatchObject({ name: 'web1', registration: 'registered', power: 'shut-off' });
    await service.start('lab/web1');
    expect(await kindOfRejection(service.set('lab/web1', [{ key: 'memory', value: '1' }]))).toBe('in-use');
    expect(await kindOfRejection(service.unregister('lab/web1'))).toBe('in-use');
    expect(await kindOfRejection(service.remove('lab/web1', { force: false }))).toBe('in-use');
    await service.remove('lab/web1', { force: true });
    expect(seat.registered().map(({ name }) => name)).toEqual(['web2']);
    expect(test.store.meta.nodes.byPath('lab/web1')).toBeUndefined();
    expect(await service.unregister('lab/web2')).toMatchObject({ registration: 'none', hypervisor: null, power: null });
    await service.remove('lab/web2', { force: false });
    expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [] });
  });

  it('that a hypervisor knows is not removed behind its back', async () => {
    const { test, machines } = world();
    await machines.clone({ source: 'golden/base', targets: targets(1), register: true });
    const lab = test.store.meta.nodes.byPath('lab')!;
    expect(() => { assertNoBoundMachineIn(test.store.meta, lab); }).toThrow(/offshoot vm rm lab\/web1/u);
    await machines.service.unregister('lab/web1');
    assertNoBoundMachineIn(test.store.meta, lab);
  });

  it.each<readonly [string, ErrorKind, object, readonly string[]]>([
    ['a firmware of the host', 'permission-denied', { firmware: '/usr/share/code.fd' }, []],
    ['a disk above the directory', 'permission-denied', { disks: { vda: '../../../../etc/passwd' } }, []],
    ['another disk than the one that was allowed', 'permission-denied', { disks: { vda: '/etc/shadow' } }, ['/etc/passwd']],
    ['what is a symbolic link in the directory', 'invalid-argument', { link: '/etc/passwd' }, []],
    ['a disk in a format that nobody converts', 'foreign-format', { formats: { vda: 'qed' } }, []],
  ])('is not imported when its configuration names %s', async (_what, kind, { link, ...change }: { readonly link?: string }, allow) => {
    const of = world();
    const directory = makeTmpfsDir('machine', cleanup);
    fs.writeFileSync(path.join(directory, 'root.img'), CONTENT);
    fs.writeFileSync(path.join(directory, 'machine.json'), JSON.stringify({ name: 'foreign', uuid: 'x', macs: [], memory: 9, disks: { vda: 'root.img' }, ...change }));
    if (link !== undefined) fs.symlinkSync(link, path.join(directory, 'link'));
    const job = await of.machines.waitFor(of.machines.service.startImport({ directory, target: 'lab/in', allow: [...allow] }).id);
    expect([job.state, errorKind(job)]).toEqual(['failed', kind]);
    expectNothing(of);
  });
});
