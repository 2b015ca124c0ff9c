/**
 * Machines with the real daemon: a hundred clones in one operation, nothing left of those that fail or whose server is killed, imports, and all of
 * it from the command line. The format and the hypervisor are those of test-machines.ts; the real ones have tests of their own.
 */
import { randomFillSync } from 'node:crypto';
import { chmodSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';

import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import { exitCodeOf } from '../../blockstore/errors.js';
import { createControlClient } from '../../daemon/control/client.js';
import type { MachineInfo } from '../../daemon/control/machine-schemas.js';
import type { JobInfo } from '../../daemon/control/schemas.js';
import { compilePrograms } from '../support/compiled-program.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { patternBytes } from '../support/model/pattern.js';
import { waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { runInTerminal, type Terminal } from '../support/terminal.js';
import { TestHypervisorSeat, type Orders } from '../support/test-machines.js';

const PROGRAM = 'test/support/test-machines-program.ts';
const DISK_BYTES = 4 * 1024 * 1024;
const RESTART_MS = 30_000;

const cleanup = createCleanup();
const programs = compilePrograms('machines', [PROGRAM]);
let daemon: TestDaemon;
let seat: TestHypervisorSeat;
let source: string;

interface Cloned {
  readonly operationId: string;
  readonly message: string;
  readonly machines: readonly MachineInfo[];
}

beforeAll(async () => {
  seat = new TestHypervisorSeat(makeTempDir('hypervisor', cleanup));
  daemon = await startTestDaemon({
    transport: 'kernel', cleanup,
    environment: {
      NODE_OPTIONS: `--import=file://${programs.pathOf(PROGRAM)}`, OFFSHOOT_TEST_DIST: resolve(import.meta.dirname, '../../dist'), OFFSHOOT_TEST_HYPERVISOR: seat.directory,
      // Each test kills it once, in seconds.
      OFFSHOOT_CRASHES_MAX: '100',
    },
  });
  source = join(makeTempDir('machine', cleanup), 'debian');
  mkdirSync(source);
  writeFileSync(join(source, 'root.img'), patternBytes(3, 0, DISK_BYTES));
  writeFileSync(join(source, 'notes'), 'kept\n');
  writeFileSync(join(source, 'console.log'), 'made anew\n');
  writeFileSync(join(source, 'machine.json'), JSON.stringify({
    name: 'debian', uuid: '99999999-2222-4333-8444-555555555555', macs: ['52:54:00:99:88:77'], memory: 1024, disks: { vda: join(source, 'root.img') },
  }));
  await daemon.json(['container', 'create', 'golden']);
  await daemon.json(['container', 'create', 'lab']);
  await daemon.json(['vm', 'import', source, 'golden/debian']);
}, 120_000);

beforeEach(() => { seat.order({}); });

afterAll(async () => {
  await cleanup.run();
  programs.remove();
}, 120_000);

function targets(count: number): string[] {
  return Array.from({ length: count }, (_, i) => `lab/web${String(i + 1).padStart(3, '0')}`);
}

async function clone(count: number): Promise<Cloned> {
  return await daemon.json<Cloned>(['vm', 'clone', 'golden/debian', ...targets(count), '--register']);
}

async function expectNothing(): Promise<void> {
  expect(readdirSync(daemon.path('lab'))).toEqual([]);
  expect(seat.registered()).toEqual([]);
  // By the API: a command is a process each.
  const { machines } = createControlClient({ socketPath: daemon.socketPath });
  expect((await machines.list({})).map(({ path }) => path)).toEqual(['golden/debian']);
}

/** By the API: a command for each takes a hundred times as long. */
async function removeAll(): Promise<void> {
  const { machines } = createControlClient({ socketPath: daemon.socketPath });
  const found = await machines.list({ container: 'lab' });
  for (let first = 0; first < found.length; first += 8) await Promise.all(found.slice(first, first + 8).map(async ({ path }) => { await machines.remove(path, { force: true }); }));
}

describe('machines', () => {
  it('are imported with their disks, and their configuration names the new places', async () => {
    const info = await daemon.json<MachineInfo>(['vm', 'show', 'golden/debian']);
    expect(info).toMatchObject({ name: 'debian', uuid: '99999999-2222-4333-8444-555555555555', macs: ['52:54:00:99:88:77'], state: 'ready', registration: 'none' });
    expect(info.files).toEqual([{ slot: 'vda', role: 'disk', file: daemon.path('golden/debian/root.img'), sizeBytes: DISK_BYTES, ownedBytes: DISK_BYTES }]);
    expect(readdirSync(daemon.path('golden/debian')).toSorted()).toEqual(['machine.json', 'notes', 'root.img']);
    expect(readFileSync(daemon.path('golden/debian/root.img')).equals(patternBytes(3, 0, DISK_BYTES))).toBe(true);
    writeFileSync(join(source, 'machine.json'), JSON.stringify({ name: 'debian', uuid: 'x', macs: [], memory: 1, disks: { vda: 'gone.img' } }));
    expect((await daemon.cli(['vm', 'import', source, 'lab/gone'])).code).not.toBe(0);
    await expectNothing();
  });

  it('are cloned by the hundred in one operation: names, UUIDs and MACs all different, each with its disk, all registered', async () => {
    const made = await clone(100);
    expect(made.machines.map(({ path }) => path)).toEqual(targets(100));
    for (const key of ['name', 'uuid', 'externalId'] as const) expect(new Set(made.machines.map((each) => each[key])).size).toBe(100);
    expect(new Set(made.machines.flatMap(({ macs }) => macs)).size).toBe(100);
    expect(seat.registered()).toHaveLength(100);
    for (const machine of seat.registered()) {
      expect(machine.text).toBe(readFileSync(join(machine.directory, machine.configuration), 'utf8'));
      expect(JSON.parse(machine.text)).toMatchObject({ name: machine.name, uuid: machine.uuid, disks: { vda: join(machine.directory, 'root.img') } });
    }
    expect(readFileSync(daemon.path('lab/web077/root.img')).equals(patternBytes(3, 0, DISK_BYTES))).toBe(true);
    expect(await daemon.json<JobInfo>(['jobs', made.operationId])).toMatchObject({ kind: 'machine-clone', state: 'completed' });
    const refused = await daemon.cli(['rm', '-r', 'lab']);
    expect([refused.code === 0, refused.stderr]).toEqual([false, expect.stringContaining('offshoot vm rm')]);
    await removeAll();
    await expectNothing();
  });

  it('leave nothing when one of many registrations is refused', async () => {
    seat.order({ refuse: seat.count('register') + 11 });
    const failed = await daemon.cli(['vm', 'clone', 'golden/debian', ...targets(20), '--register']);
    expect([failed.code === 0, failed.stderr]).toEqual([false, expect.stringContaining('the test hypervisor refuses')]);
    await expectNothing();
  });

  it('are started, stopped, changed and removed by the command line', async () => {
    await clone(2);
    expect(await daemon.json(['vm', 'start', 'lab/web001'])).toMatchObject({ power: 'running' });
    expect(await daemon.json(['vm', 'status', 'lab/web001'])).toMatchObject({ power: 'running' });
    expect((await daemon.cli(['vm', 'set', 'lab/web001', 'memory=7'])).code).not.toBe(0);
    expect((await daemon.cli(['vm', 'rm', 'lab/web001'])).code).not.toBe(0);
    expect(await daemon.json(['vm', 'stop', 'lab/web001'])).toMatchObject({ power: 'shut-off' });
    // Read before and after: the kernel must not show what it remembers of the file.
    const file = daemon.path('lab/web001/machine.json');
    expect(JSON.parse(readFileSync(file, 'utf8'))).toMatchObject({ memory: 1024 });
    await daemon.json(['vm', 'set', 'lab/web001', 'memory=7']);
    expect(JSON.parse(readFileSync(file, 'utf8'))).toMatchObject({ memory: 7 });
    expect(await daemon.json(['vm', 'get', 'lab/web001', 'memory'])).toEqual([{ key: 'memory', value: '7' }]);
    expect(await daemon.json(['vm', 'unregister', 'lab/web001'])).toMatchObject({ registration: 'none' });
    expect(await daemon.json(['vm', 'register', 'lab/web001'])).toMatchObject({ registration: 'registered' });
    await removeAll();
    await expectNothing();
  });

  it('are cloned with their container by clone --register-all', async () => {
    const made = await daemon.json<Cloned>(['clone', 'golden', 'lab7', '--register-all']);
    expect(made.machines).toMatchObject([{ path: 'lab7/debian', name: 'lab7-debian', registration: 'registered' }]);
    await daemon.json(['vm', 'rm', 'lab7/debian', '--force']);
    await daemon.json(['rm', '-r', 'lab7']);
    await expectNothing();
  });

  it('are cloned as a user only by who may, and belong to that user', async () => {
    const { code, stderr } = await daemon.cli(['vm', 'clone', 'golden/debian', 'lab/a', '--as', 'nobody']);
    expect([code === 0, stderr]).toEqual([false, expect.stringContaining('may not')]);
    chmodSync(daemon.path('golden/debian/root.img'), 0o644);
    chmodSync(daemon.path('lab'), 0o777);
    await daemon.json(['vm', 'clone', 'golden/debian', 'lab/a', '--as', 'nobody']);
    expect(await daemon.json(['show', 'lab/a/root.img'])).toMatchObject({ uid: 65534 });
    await removeAll();
    await expectNothing();
  });

  it('show what they are in 80 columns, and Ctrl-C leaves nothing of a clone or an import', async () => {
    const run = (...args: readonly string[]): Terminal => runInTerminal([process.execPath, CLI_ENTRY, ...args], { env: { OFFSHOOT_SOCKET: daemon.socketPath }, columns: 80, cleanup });
    seat.order({ registerMs: 500 });
    const cloning = run('vm', 'clone', 'golden/debian', ...targets(20), '--register');
    await cloning.see(/step 4 of 5: registered \d+ of 20/u);
    cloning.pressCtrlC();
    expect(await cloning.ended()).toBe(exitCodeOf.cancelled);
    expect(cloning.shown()).toContain('cancelled; all that was made was taken away');
    await expectNothing();
    const large = join(makeTempDir('large', cleanup), 'large');
    mkdirSync(large);
    writeFileSync(join(large, 'machine.json'), JSON.stringify({ name: 'large', uuid: 'x', macs: [], memory: 1, disks: { vda: 'root.img' } }));
    writeFileSync(join(large, 'root.img'), randomFillSync(Buffer.alloc(256 * 1024 * 1024)));
    const importing = run('vm', 'import', large, 'lab/large');
    await importing.see(/step 3 of 5: importing disk 1 of 1, root\.img/u);
    importing.pressCtrlC();
    // A machine may be so fast that it is done before the key is pressed.
    if (await importing.ended() === 0) await removeAll();
    else expect(importing.shown()).toContain('cancelled; all that was made was taken away');
    await expectNothing();
    seat.order({});
    const made = run('vm', 'clone', 'golden/debian', ...targets(3), '--register');
    expect(await made.ended()).toBe(0);
    const listed = run('vm', 'ls', '--power');
    expect(await listed.ended()).toBe(0);
    for (const terminal of [made, listed]) {
      // Steps go back to the beginning of their line.
      // eslint-disable-next-line no-control-regex -- control sequences are exactly what is taken out
      const lines = terminal.shown().replaceAll(/\u001b\[[?\d;]*[a-z]/giu, '').split(/[\r\n]+/u);
      expect(lines.filter((line) => line.length > 80)).toEqual([]);
      expect(lines.filter((line) => /^lab\/web00\d {2}/u.test(line))).toHaveLength(3);
    }
    expect(made.shown()).toMatch(/3 machines of golden\/debian, registered with qemu \(operation \d+, /u);
    await removeAll();
    await expectNothing();
  });

  // The first call of `customise` is the trial of step 1.
  it.each<readonly [string, NonNullable<Orders['kill']>]>([
    ['in step 1', { at: 'probe', nth: 1 }],
    ['between steps 2 and 3', { at: 'customise', nth: 2 }],
    ['in step 3', { at: 'customise', nth: 4 }],
    ['between steps 3 and 4', { at: 'register', nth: 1 }],
    ['in step 4', { at: 'register', nth: 2, after: true }],
    ['between steps 4 and 5', { at: 'register', nth: 4, after: true }],
  ])('leave nothing when the server is killed %s', async (_where, { at, nth, after = false }) => {
    const { serverPid } = await daemon.status();
    seat.order({ kill: { at, nth: seat.count(at, after) + nth, after } });
    const client = createControlClient({ socketPath: daemon.socketPath, patienceMs: RESTART_MS });
    const asked = client.machines.clone({ source: 'golden/debian', targets: targets(4), register: true }).catch(() => null);
    await daemon.waitForServer(serverPid, RESTART_MS);
    seat.order({});
    await asked;
    const isOver = await waitUntil(async () => (await client.jobs('running')).every((job) => !job.kind.startsWith('machine-')), RESTART_MS);
    expect(isOver).toBe(true);
    const jobs = await client.jobs('failed');
    expect(jobs.at(-1)).toMatchObject({ kind: 'machine-clone', error: { kind: 'cancelled', message: expect.stringContaining('restarted') as string } });
    expect(existsSync(daemon.path('lab/web001'))).toBe(false);
    await expectNothing();
  }, 120_000);

  it('leave a store without findings behind all of that', async () => {
    expect(await daemon.json(['check'])).toMatchObject({ verdict: 'clean', findings: [] });
  });
});
