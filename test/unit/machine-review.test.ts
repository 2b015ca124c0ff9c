/** What others do to machines and their directories meanwhile, and what whoever may write to a configuration can make of it. */
import fs from 'node:fs';
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import { assertNoBoundMachineIn } from '../../daemon/filesystem/bound-machines.js';
import { kindOf, kindOfRejection, patterned } from '../support/blockstore-fixture.js';
import { machineWorld, type MachineWorld as World } from '../support/machine-world.js';
import { MOUNT, writeFile } from '../support/machines-fixture.js';
import { snapshotsOver } from '../support/snapshots-fixture.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();

afterEach(() => cleanup.run());

const CONTENT = patterned(5, 64 * 1024);
const OWNER = { uid: 0, gid: 0, pid: 0 };
const FLAGS = { noReplace: false, exchange: false };

function world(): World {
  return machineWorld(makeTmpfsDir('hypervisor', cleanup), CONTENT);
}

function idOf({ test }: World, place: string): number {
  const node = test.store.meta.nodes.byPath(place);
  if (node === undefined) throw new Error(`there is no ${place}`);
  return node.id;
}

function errorKind(job: JobRow): ErrorKind | null {
  return (job.parameters as { readonly errorKind: ErrorKind | null }).errorKind;
}

describe('the directory of a machine that a hypervisor knows', () => {
  it('keeps its place: it is not renamed, moved, removed, replaced, nor taken away by a revert', async () => {
    const of = world();
    const { test, machines } = of;
    const { meta } = test.store;
    const { namespace } = machines.fileSystem;
    await snapshotsOver(test).create({ reference: 'lab@before', quiesce: null });
    await machines.clone({ source: 'golden/base', targets: ['lab/web1'], register: true });
    const lab = idOf(of, 'lab');
    expect(kindOf(() => { namespace.rename(lab, 'web1', lab, 'web2', FLAGS); })).toBe('in-use');
    expect(kindOf(() => { namespace.rename(lab, 'web1', idOf(of, 'golden'), 'web1', FLAGS); })).toBe('in-use');
    expect(kindOf(() => { namespace.rename(lab, 'web1', idOf(of, 'golden'), 'base', { noReplace: false, exchange: true }); })).toBe('in-use');
    expect(kindOf(() => { namespace.rename(1, 'lab', 1, 'lab2', FLAGS); })).toBe('in-use');
    expect(kindOf(() => { assertNoBoundMachineIn(meta, meta.nodes.byPath('lab')!); })).toBe('in-use');
    expect(await kindOfRejection(snapshotsOver(test).revert('lab@before'))).toBe('in-use');
    for (const name of ['disk.img', 'machine.json', 'notes']) namespace.unlink(idOf(of, 'lab/web1'), name);
    expect(kindOf(() => { namespace.rmdir(lab, 'web1'); })).toBe('in-use');
    namespace.mkdir(lab, 'empty', 0o755, OWNER);
    expect(kindOf(() => { namespace.rename(lab, 'empty', lab, 'web1', FLAGS); })).toBe('in-use');
    // Whose files are gone is removed by its own command, and only by it.
    await machines.service.remove('lab/web1', { force: false });
    expect(machines.seat.registered()).toEqual([]);
    namespace.rename(1, 'lab', 1, 'lab2', FLAGS);
  });

  it('of one that nobody knows goes where it likes, and its name stays taken by it', async () => {
    const of = world();
    await of.machines.clone({ source: 'golden/base', targets: ['lab/web1'] });
    const lab = idOf(of, 'lab');
    of.machines.fileSystem.namespace.rename(lab, 'web1', lab, 'other', FLAGS);
    expect(errorKind(await of.machines.clone({ source: 'golden/base', targets: ['lab/web1'] }))).toBe('already-exists');
    expect(await of.machines.service.show('lab/other')).toMatchObject({ name: 'web1', state: 'ready' });
  });

  it('while it is being made, too; and its name is taken then', async () => {
    const of = world();
    let resume: () => void = () => undefined;
    const { files } = of.test.store;
    const createAll = files.createAll.bind(files);
    const held = new Promise<void>((resolve) => { resume = resolve; });
    let reached: () => void = () => undefined;
    const isThere = new Promise<void>((resolve) => { reached = resolve; });
    files.createAll = async (wanted) => {
      if (of.test.store.meta.machines.byName('web1') !== undefined) { reached(); await held; }
      await createAll(wanted);
    };
    const making = of.machines.clone({ source: 'golden/base', targets: ['lab/web1'], register: true });
    await isThere;
    const lab = idOf(of, 'lab');
    expect(kindOf(() => { of.machines.fileSystem.namespace.rename(lab, 'web1', lab, 'x', FLAGS); })).toBe('in-use');
    expect(await kindOfRejection(of.machines.service.remove('lab/web1', { force: true }))).toBe('in-use');
    expect(errorKind(await of.machines.clone({ source: 'golden/base', targets: ['golden/web1'] }))).toBe('already-exists');
    resume();
    expect((await making).state).toBe('completed');
  });
});

describe('a configuration that somebody else may write to', () => {
  it.each<readonly [string, ErrorKind, object]>([
    ['names a disk of the host', 'invalid-argument', { disks: { vda: '/etc/shadow' } }],
    ['names the disk of another machine', 'invalid-argument', { disks: { vda: `${MOUNT}/golden/base/disk.img` } }],
    ['gives its disk as qcow2', 'foreign-format', { formats: { vda: 'qcow2' } }],
    ['names a link to a disk', 'invalid-argument', { disks: { vda: 'link.img' } }],
  ])('is not registered when it %s', async (_what, kind, change) => {
    const of = world();
    const directory = of.machines.fileSystem.namespace.mkdir(idOf(of, 'lab'), 'odd', 0o755, OWNER).nodeId;
    of.test.store.meta.nodes.move(of.test.image('odd', CONTENT).id, directory, 'disk.img');
    of.machines.fileSystem.namespace.symlink(directory, 'link.img', 'disk.img', OWNER);
    writeFile(of.test, of.machines.fileSystem, directory, 'machine.json', JSON.stringify({ name: 'odd', uuid: '22222222-2222-4333-8444-555555555555', macs: [], memory: 1, disks: { vda: 'disk.img' }, ...change }));
    expect(await kindOfRejection(of.machines.service.register('lab/odd', null))).toBe(kind);
    expect(of.machines.seat.registered()).toEqual([]);
    expect(of.test.store.meta.machines.all()).toEqual([]);
  });

  it('and is written to between the checks of a clone and its instant: what counts is what was cloned', async () => {
    const of = world();
    const { groupSeals } = of.test.store;
    const seal = groupSeals.seal.bind(groupSeals);
    groupSeals.seal = async (wanted) => {
      const file = idOf(of, 'golden/base/machine.json');
      of.test.store.disks.acquire(file);
      const text = JSON.stringify({ name: 'base', uuid: 'x', macs: ['52:54:00:11:22:33', '52:54:00:11:22:34'], memory: 512, disks: { vda: '/etc/shadow' } });
      of.test.store.data.write(file, 0, Buffer.from(text.padEnd(of.test.store.disks.get(file)?.shared.sizeBytes() ?? 0)));
      of.test.store.disks.release(file);
      return await seal(wanted);
    };
    const job = await of.machines.clone({ source: 'golden/base', targets: ['lab/a'], register: true });
    expect([job.state, errorKind(job)]).toEqual(['failed', 'invalid-argument']);
    expect(of.test.store.meta.nodes.byPath('lab/a')).toBeUndefined();
    expect(of.machines.seat.registered()).toEqual([]);
  });

  it('is read through the API by those who may read the file', async () => {
    const of = world();
    const { meta } = of.test.store;
    meta.nodes.update(idOf(of, 'golden/base/machine.json'), { mode: 0o640, gid: 4 });
    const alice = { uid: 1000, gid: 1000, groups: [7, 4] };
    expect(await of.machines.service.get('golden/base', 'memory', alice)).toEqual([{ key: 'memory', value: '512' }]);
    expect(await kindOfRejection(of.machines.service.get('golden/base', 'memory', { ...alice, groups: [7] }))).toBe('permission-denied');
  });
});

describe('who may clone', () => {
  const alice = { uid: 1000, gid: 1000, groups: [4], pid: 1 };

  it.each<readonly [string, (of: World) => void, string | null]>([
    ['a source that the supplementary group may read', () => undefined, null],
    ['a source with one file that she may not read', (of) => { of.test.store.meta.nodes.update(idOf(of, 'golden/base/notes'), { mode: 0o600 }); }, 'may not read golden/base/notes'],
    ['a source in a directory that she may not enter', (of) => { of.test.store.meta.nodes.update(idOf(of, 'golden'), { mode: 0o744 }); }, 'may not enter golden'],
    ['a source whose directory she may read and not enter', (of) => { of.test.store.meta.nodes.update(idOf(of, 'golden/base'), { mode: 0o744 }); }, 'may not read golden/base'],
    ['into a container that she may not write to', (of) => { of.test.store.meta.nodes.update(idOf(of, 'lab'), { mode: 0o755, gid: 0 }); }, 'may not add names to lab/in'],
    ['into a directory below one that she may not enter', (of) => { of.test.store.meta.nodes.update(idOf(of, 'lab'), { mode: 0o700 }); }, 'may not enter lab'],
  ])('%s', async (_what, change, refusal) => {
    const of = world();
    const { meta } = of.test.store;
    meta.nodes.update(idOf(of, 'golden/base/disk.img'), { mode: 0o640, gid: 4 });
    of.machines.fileSystem.namespace.mkdir(idOf(of, 'lab'), 'in', refusal?.includes('lab/in') === true ? 0o755 : 0o777, OWNER);
    change(of);
    const job = await of.machines.clone({ source: 'golden/base', targets: ['lab/in/a'] }, alice);
    expect([job.state, job.message]).toEqual(refusal === null ? ['completed', '1 machine of golden/base'] : ['failed', expect.stringContaining(refusal)]);
    expect(errorKind(job)).toBe(refusal === null ? null : 'permission-denied');
  });
});

describe('a clone', () => {
  it('of a machine whose disk is open says that it is crash-consistent, whoever runs it; with --wait it waits for the end of that', async () => {
    const of = world();
    const disk = idOf(of, 'golden/base/disk.img');
    let isOpen = true;
    of.machines.fileSystem.openCount = (id) => (id === disk && isOpen ? 1 : 0);
    expect((await of.machines.clone({ source: 'golden/base', targets: ['lab/a'] })).message).toMatch(/crash-consistent, as after a power cut, for the source was in use/u);
    expect(errorKind(await of.machines.clone({ source: 'golden/base', targets: ['lab/b'], waitSeconds: 0 }))).toBe('timed-out');
    const waiting = of.machines.clone({ source: 'golden/base', targets: ['lab/c'], waitSeconds: 600 });
    isOpen = false;
    expect((await waiting).message).toBe('1 machine of golden/base');
  });

  it('of a machine that is started between the checks and the instant says so, too', async () => {
    const of = world();
    const disk = idOf(of, 'golden/base/disk.img');
    let isOpen = false;
    of.machines.fileSystem.openCount = (id) => (id === disk && isOpen ? 1 : 0);
    const { groupSeals } = of.test.store;
    const seal = groupSeals.seal.bind(groupSeals);
    groupSeals.seal = async (wanted) => { isOpen = true; return await seal(wanted); };
    expect((await of.machines.clone({ source: 'golden/base', targets: ['lab/a'] })).message).toMatch(/crash-consistent/u);
  });

  it('beyond the quota of its container is refused, and nothing is left', async () => {
    const of = world();
    of.test.store.quotas.set(idOf(of, 'lab'), 4096);
    const file = of.machines.fileSystem.namespace.create(idOf(of, 'lab'), 'filled', 0o644, OWNER).nodeId;
    of.test.store.disks.acquire(file);
    of.test.store.data.write(file, 0, Buffer.alloc(4096, 1));
    of.test.store.disks.release(file);
    const full = await of.machines.clone({ source: 'golden/base', targets: ['lab/c'], register: true });
    expect([full.state, errorKind(full)]).toEqual(['failed', 'quota']);
    expect(of.test.store.meta.nodes.byPath('lab/c')).toBeUndefined();
  });
});

describe('an import', () => {
  it('keeps from others what was kept from them, and takes no directory for a file', async () => {
    const of = world();
    const directory = makeTempDir('machine', cleanup);
    fs.writeFileSync(path.join(directory, 'key'), 'secret', { mode: 0o600 });
    fs.writeFileSync(path.join(directory, 'machine.json'), JSON.stringify({ name: 'in', uuid: 'x', macs: [], memory: 9, disks: {} }), { mode: 0o640 });
    fs.mkdirSync(path.join(directory, 'more'));
    const refused = await of.machines.waitFor(of.machines.service.startImport({ directory, target: 'lab/in' }).id);
    expect([errorKind(refused), refused.message]).toEqual(['invalid-argument', expect.stringContaining('the directory "more"')]);
    fs.rmdirSync(path.join(directory, 'more'));
    const done = await of.machines.waitFor(of.machines.service.startImport({ directory, target: 'lab/in' }).id);
    expect(done.state, done.message ?? '').toBe('completed');
    const { meta } = of.test.store;
    expect(['key', 'machine.json'].map((name) => meta.nodes.byPath(`lab/in/${name}`)?.mode)).toEqual([0o600, 0o640]);
  });
});

describe('a hypervisor that does not answer', () => {
  it('hides nothing else of its machines', async () => {
    const of = world();
    await of.machines.clone({ source: 'golden/base', targets: ['lab/a'], register: true });
    const status = of.machines.hypervisor.status.bind(of.machines.hypervisor);
    of.machines.hypervisor.status = () => Promise.reject(new OffshootError('source-unreachable', 'it is away'));
    expect(await of.machines.service.show('lab/a')).toMatchObject({ name: 'a', power: 'unknown', powerError: 'it is away', agent: null });
    expect(await of.machines.service.list({ container: null, operationId: null, power: true })).toMatchObject([{ power: 'unknown', powerError: 'it is away' }]);
    // Who is about to change it must not go on then.
    expect(await kindOfRejection(of.machines.service.set('lab/a', [{ key: 'memory', value: '1' }]))).toBe('source-unreachable');
    of.machines.hypervisor.status = status;
    expect(await of.machines.service.show('lab/a')).toMatchObject({ power: 'shut-off', powerError: null, agent: null });
  });
});
