/**
 * Every call that an operation on machines makes to the store or to a hypervisor, one after the other: each fails once, and at each the server dies
 * once. The calls are recorded from an operation that succeeds, so that a step that is added is tried without anybody adding it here; the
 * table says which kinds of call there are, so that one that is no longer made, or a new kind, is seen.
 */
import fs from 'node:fs';
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { checkStore } from '../../blockstore/check.js';
import { OffshootError } from '../../blockstore/errors.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import { patterned } from '../support/blockstore-fixture.js';
import { machineWorld, type MachineWorld as World } from '../support/machine-world.js';
import { machinesOver } from '../support/machines-fixture.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';

const cleanup = createCleanup();

afterEach(() => cleanup.run());

const CONTENT = patterned(5, 64 * 1024);
const ROOT = { uid: 0, gid: 0, groups: [] };

/** Who is asked for what, in the order of the steps. */
const CALLS = {
  'jobs.insert': 'the operation begins', 'hypervisor.probe': 'step 1', 'jobs.update': 'each step says that it begins', 'seal': 'step 2', 'machines.insert': 'step 2', 'layers.insert': 'step 3',
  'files.createAll': 'step 3', 'nodes.update': 'step 3', 'machines.asked': 'step 4', 'hypervisor.register': 'step 4', 'machines.registered': 'step 4', 'machines.ready': 'step 5',
} as const;
type CallName = keyof typeof CALLS;
type Verdict = 'go on' | 'fail' | 'die before' | 'die after';

class Dead extends Error {}

function world(): World {
  return machineWorld(makeTmpfsDir('hypervisor', cleanup), CONTENT);
}

type AnyCall = (...args: unknown[]) => unknown;

/** Asks `judge` at each call. A server that died makes none any more, and nothing of it is ever answered. */
function watch({ test, machines }: World, judge: (name: CallName) => Verdict): { readonly died: Promise<void> } {
  let isDead = false;
  let tell: () => void = () => undefined;
  const died = new Promise<void>((resolve) => { tell = resolve; });
  const wrap = (owner: object, method: string, name: CallName): void => {
    const record = owner as Record<string, AnyCall>;
    const original = record[method]?.bind(owner);
    if (original === undefined) throw new Error(`${name} is not there`);
    const isPromised = name === 'seal' || name === 'files.createAll' || name.startsWith('hypervisor.');
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
  };
  const { meta, files, groupSeals } = test.store;
  wrap(meta.jobs, 'insert', 'jobs.insert');
  wrap(meta.jobs, 'update', 'jobs.update');
  wrap(groupSeals, 'seal', 'seal');
  wrap(meta.machines, 'insert', 'machines.insert');
  wrap(meta.layers, 'insert', 'layers.insert');
  wrap(files, 'createAll', 'files.createAll');
  wrap(meta.nodes, 'update', 'nodes.update');
  wrap(meta.machines, 'asked', 'machines.asked');
  wrap(meta.machines, 'registered', 'machines.registered');
  wrap(meta.machines, 'ready', 'machines.ready');
  wrap(machines.hypervisor, 'probe', 'hypervisor.probe');
  wrap(machines.hypervisor, 'register', 'hypervisor.register');
  return { died };
}

function expectNothing({ test, machines }: World): void {
  const { meta } = test.store;
  expect(meta.nodes.childCount(meta.nodes.byPath('lab')?.id ?? 0)).toBe(0);
  expect(meta.machines.all()).toEqual([]);
  expect(machines.seat.registered()).toEqual([]);
  expect(meta.nodes.orphans()).toEqual([]);
  test.expectContent(meta.nodes.byPath('golden/base/disk.img')!, CONTENT);
  expect(checkStore(test.store)).toMatchObject({ verdict: 'clean', findings: [] });
}

const REQUEST = { source: 'golden/base', targets: ['lab/a', 'lab/b'], register: true };

/** The calls of an operation that succeeds. */
async function recorded(): Promise<CallName[]> {
  const of = world();
  const calls: CallName[] = [];
  watch(of, (name) => { calls.push(name); return 'go on'; });
  expect((await of.machines.clone(REQUEST)).state).toBe('completed');
  return calls;
}

describe('at every call of a clone of machines', () => {
  it('there is one of each kind that the table names, and of no other', async () => {
    const calls = await recorded();
    expect(new Set(calls)).toEqual(new Set(Object.keys(CALLS)));
    // A seal creates files, too; the last are those of the configurations.
    expect(calls.lastIndexOf('machines.insert')).toBeLessThan(calls.lastIndexOf('files.createAll'));
    expect(calls.lastIndexOf('files.createAll')).toBeLessThan(calls.indexOf('hypervisor.register'));
    expect(calls.slice(-2)).toEqual(['machines.ready', 'jobs.update']);
  });

  it('a failure leaves nothing, and says what failed', { timeout: 300_000 }, async () => {
    const calls = await recorded();
    for (let at = 0; at < calls.length; at += 1) {
      const of = world();
      let seen = -1;
      watch(of, (name) => { seen += 1; if (seen === at) expect(name).toBe(calls[at]); return seen === at ? 'fail' : 'go on'; });
      const where = `call ${at}, ${calls[at] ?? ''}`;
      let job: JobRow | null = null;
      try {
        job = await of.machines.clone(REQUEST);
      } catch (thrown) {
        expect(at, where).toBe(0);
        expect(thrown, where).toMatchObject({ kind: 'no-space' });
      }
      if (job !== null) expect([where, job.state, job.message]).toEqual([where, 'failed', `${calls[at] ?? ''} was told to fail`]);
      expectNothing(of);
      expect((await of.machines.clone(REQUEST)).state, where).toBe('completed');
    }
  });

  it.each(['die before', 'die after'] as const)('the next server leaves nothing of one whose server did "%s"', { timeout: 300_000 }, async (verdict) => {
    const calls = await recorded();
    for (let at = 1; at < calls.length; at += 1) {
      const where = `call ${at}, ${calls[at] ?? ''}`;
      const of = world();
      let seen = -1;
      const { died } = watch(of, () => { seen += 1; return seen === at ? verdict : 'go on'; });
      of.machines.service.clone(REQUEST, ROOT).catch(() => undefined);
      await died;
      of.test.kill();
      of.machines = machinesOver(of.test, of.directory);
      const { meta } = of.test.store;
      for (const job of meta.jobs.list({ states: ['running'] })) await of.machines.waitFor(job.id);
      expect(meta.jobs.list({ kind: 'machine-clone' })[0], where).toMatchObject({ state: 'failed', message: expect.stringContaining('restarted') as string });
      expectNothing(of);
    }
  });
});

describe('at every call of an import of a machine', () => {
  const watched = (of: World, directory: string): number => of.machines.service.startImport({ directory, target: 'lab/in' }).id;
  const source = (): string => {
    const directory = makeTempDir('machine', cleanup);
    fs.writeFileSync(path.join(directory, 'machine.json'), JSON.stringify({ name: 'in', uuid: 'x', macs: ['52:54:00:00:00:01'], memory: 9, disks: {} }));
    return directory;
  };

  it('a failure leaves nothing', { timeout: 300_000 }, async () => {
    const first = world();
    const calls: CallName[] = [];
    watch(first, (name) => { calls.push(name); return 'go on'; });
    const done = await first.machines.waitFor(watched(first, source()));
    expect(done.state, done.message ?? '').toBe('completed');
    // What an import of a disk does by itself has tests of its own (mount/machines.test.ts has one that fails there).
    for (const name of ['machines.insert', 'files.createAll', 'machines.ready'] as const) {
      expect(calls, name).toContain(name);
      const of = world();
      watch(of, (each) => (each === name ? 'fail' : 'go on'));
      const job = await of.machines.waitFor(watched(of, source()));
      expect([name, job.state, job.message]).toEqual([name, 'failed', `${name} was told to fail`]);
      expectNothing(of);
    }
  });
});
