/** Whole commands, from arguments to output and exit code, against a control server on a real socket. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Command } from 'commander';
import { createProgram } from '../../cli/program.js';
import { startFixture, type Fixture } from '../support/control-fixture.js';
import { createWorld, run, type CliRun, type CliWorldOptions } from '../support/cli-fixture.js';

const GIB = 1024 ** 3;

let fixture: Fixture;
beforeEach(async () => { fixture = await startFixture({ jobStep: 0.25 }); });
afterEach(async () => { await fixture.end(); });

async function offshoot(args: readonly string[], options: Omit<CliWorldOptions, 'socketPath'> = {}): Promise<CliRun> {
  return await run(args, { sleepStepMs: 200, ...options, socketPath: fixture.socketPath });
}

async function ok(...args: string[]): Promise<string> {
  const { code, out, err } = await offshoot(args);
  expect([code, err]).toEqual([0, '']);
  return out;
}

/** A container with a base image and clones of it. */
async function prepare(...clones: string[]): Promise<void> {
  await ok('container', 'create', 'vms');
  await ok('import', 'debian.raw', 'vms/base.img', '--in-place');
  if (clones.length > 0) await ok('clone', 'vms/base.img', ...clones);
}

describe('for people', () => {
  it('makes, lists, clones, shows, resizes and removes', async () => {
    expect(await ok('container', 'ls')).toBe('no containers yet: offshoot container create NAME makes one\n');
    expect(await ok('container', 'create', 'vms', '--mode', '0770')).toBe('made the container vms\n');
    expect(fixture.service.containers.get('vms')).toEqual({ mode: 0o770 });
    expect(await ok('ls', 'vms')).toBe('vms is empty\n');
    expect(await ok('import', 'debian.raw', 'vms/base.img', '--in-place')).toMatch(/^imported vms\/base\.img: 10 GiB in [\d.]+ m?s; takes 10 GiB in the store\nseen at \/mnt\/offshoot\/vms\/base\.img\n$/u);
    expect(await ok('clone', 'vms/base.img', 'vms/a.img', '--fill', '--copy-on-read')).toBe('/mnt/offshoot/vms/a.img\n1 clone of vms/base.img, 10 GiB, made in 12 ms; 1 fill started\n');
    expect(await ok('ls')).toMatch(/^NAME {2}KIND {7}SIZE {2}OWNED {2}OPEN {2}FILL {2}MODIFIED\nvms\/ {2}container +- +- +- {2}- +2026/u);
    expect(await ok('ls', 'vms')).toMatch(/^NAME .*\nvms\/base\.img {2}disk {2}10 GiB {2}10 GiB +0 {2}- .*\nvms\/a\.img {5}disk {2}10 GiB {5}0 B +0 {2}running {2}2026.*\n$/u);
    expect(await ok('container', 'ls')).toMatch(/^NAME {2}DISKS {2}FILES {2}SNAPSHOTS +SIZE +TAKES {2}CREATED\nvms +2 +0 +1 {2}20 GiB {2}10 GiB {2}2026.*\n$/u);
    const shown = await ok('show', 'vms/a.img');
    expect(shown).toContain('\n  Un-owned       10 GiB, of which 2.5 GiB is data\n');
    expect(shown).toContain('\n                 └ layer 1: sealed, complete, 10 GiB, the file /images/debian.raw\n');
    expect(shown).toContain('\n  Fill           running, 0 %, 0 B of 2 GiB, 500 MiB/s, 5 s left\n');
    expect(shown).toContain('\n  Copy-on-read   yes\n');
    expect(await ok('resize', 'vms/a.img', '20G')).toBe('vms/a.img has 20 GiB (21,474,836,480 bytes) now\n');
    expect(await ok('rm', 'vms/base.img', '--keep-data')).toBe('removed vms/base.img, 0 B freed; 1 layer kept for clones\n');
    expect(await ok('rm', '-r', 'vms')).toBe('removed vms and 1 other name, 0 B freed\n');
  });

  it('lists a few clones and sums up many', async () => {
    await prepare();
    const many = Array.from({ length: 100 }, (_each, index) => `vms/vm${String(index + 1).padStart(3, '0')}.img`);
    expect(await ok('clone', 'vms/base.img', ...many)).toBe([
      '/mnt/offshoot/vms/vm001.img', '/mnt/offshoot/vms/vm002.img', '/mnt/offshoot/vms/vm003.img', '… 96 more', '/mnt/offshoot/vms/vm100.img',
      '100 clones of vms/base.img, 10 GiB each, made in 12 ms', '',
    ].join('\n'));
    expect(fixture.service.disks.size).toBe(101);
    expect((await ok('clone', 'vms/base.img', ...many.slice(0, 10).map((name) => `${name}.x`))).split('\n')).toHaveLength(12);
  });

  it('follows an import and says what the daemon had to say of it', async () => {
    await ok('container', 'create', 'vms');
    const { code, out, err } = await offshoot(['import', 'debian.qcow2', 'vms/base.img', '--format', 'qcow2'], { sleepStepMs: 5000 });
    expect(code).toBe(0);
    expect(out).toMatch(/^imported vms\/base\.img: 10 GiB in 20 s; /u);
    expect(err).toMatch(/^import vms\/base\.img: 25 %, 1 of 4 GiB, 2\d\d MiB\/s, \d+ s left\n.*\n.*\nimport vms\/base\.img: 100 %, 4 of 4 GiB, .*\nnote: qcow2\n$/u);
  });

  it('starts, pauses, resumes, looks at and waits for a fill', async () => {
    await prepare('vms/a.img');
    expect(await ok('fill', 'start', 'vms/a.img', '--rate', '100M')).toBe('filling vms/a.img: 0 B of 2 GiB done, at most 100 MiB/s\nwatch it with: offshoot fill wait vms/a.img\n');
    expect(await ok('fill', 'pause', 'vms/a.img')).toBe('the fill of vms/a.img is paused, 0 % (0 B of 2 GiB) done\n');
    const paused = await offshoot(['fill', 'wait', 'vms/a.img']);
    expect([paused.code, paused.err]).toEqual([5, 'offshoot: the fill of vms/a.img is paused, 0 % (0 B of 2 GiB) done, and will not end so: offshoot fill resume vms/a.img lets it go on\n']);
    expect(await ok('fill', 'resume', 'vms/a.img')).toContain('is running, 0 % (0 B of 2 GiB) done, at most 100 MiB/s\n');
    expect(await ok('fill', 'resume', 'vms/a.img', '--rate', 'unlimited')).toContain('no limit');
    expect(await ok('fill', 'status', 'vms/a.img')).toMatch(/^vms\/a\.img\n {2}Fill +running\n {2}Done +512 MiB of 2 GiB \(25 %\)\n {2}Speed +500 MiB\/s\n {2}Time left +4 s at this speed\n {2}Limit +none\n/u);
    const { code, out } = await offshoot(['fill', 'wait', 'vms/a.img']);
    expect([code, out]).toEqual([0, expect.stringMatching(/^vms\/a\.img is filled, it needs its source no more \(waited \d+ ms\)\n$/u)]);
  });

  it('says what things cost, sets limits, and lists operations', async () => {
    await ok('container', 'create', 'vms');
    expect((await offshoot(['import', 'debian.raw', 'vms/base.img', '--json'])).code).toBe(0);
    await ok('clone', 'vms/base.img', 'vms/a.img', 'vms/b.img', 'vms/c.img');
    expect(await ok('quota', 'ls')).toBe('no container has a limit: offshoot quota set CONTAINER SIZE gives it one\n');
    expect(await ok('quota', 'set', 'vms', '4G')).toBe('vms may take 4 GiB; 1 GiB are used\n');
    expect(await ok('quota', 'set', 'vms', '1G')).toBe('vms may take 1 GiB; 1 GiB are used: the limit is reached\n');
    expect((await ok('quota', 'ls')).split('\n')).toEqual(['CONTAINER  LIMIT   USED  FREE         STATE', 'vms        1 GiB  1 GiB   0 B  100 %  reached', '']);
    expect((await ok('df')).split('\n')).toEqual([
      'DISK            SIZE   TAKES  EXCLUSIVE  SHARED  WITH',
      'vms/base.img  10 GiB  10 GiB     10 GiB     0 B  vms/a.img, vms/b.img and 1 more',
      'vms/a.img     10 GiB     0 B        0 B   2 GiB  vms/base.img, vms/b.img and 1 more',
      'vms/b.img     10 GiB     0 B        0 B   2 GiB  vms/base.img, vms/a.img and 1 more',
      'vms/c.img     10 GiB     0 B        0 B   2 GiB  vms/base.img, vms/a.img and 1 more',
      '',
      'SNAPSHOT  DISKS  TAKES  EXCLUSIVE  SHARED',
      'vms@v1        1    0 B      1 MiB   1 GiB',
      '',
      'CONTAINER  DISKS  SNAPSHOTS   TAKES  EXCLUSIVE  SHARED    USED  LIMIT',
      'vms            4          1  10 GiB     10 GiB     0 B  10 GiB  1 GiB  100 %',
      '',
      'Store',
      '  Layers               10 GiB (10,737,418,240 bytes)',
      '    needed by nothing  1 MiB',
      '  Metadata             1 MiB',
      '  Imports under way    0 B',
      '  Kept back            64 MiB',
      '  Log                  4 KiB',
      '  Together             10.1 GiB (10,805,579,776 bytes)',
      '  Free                 42 of 100 GiB',
      '',
    ]);
    expect(await ok('df', 'vms/a.img')).toBe('DISK         SIZE  TAKES  EXCLUSIVE  SHARED  WITH\nvms/a.img  10 GiB    0 B        0 B   2 GiB  vms/base.img, vms/b.img and 1 more\n');
    expect(await ok('quota', 'rm', 'vms')).toBe('vms has no limit any more; it was 1 GiB (1,073,741,824 bytes)\n');
    expect(JSON.parse((await offshoot(['jobs', '--json'])).out)).toMatchObject([{ kind: 'import', state: 'completed' }]);
    expect(await ok('jobs')).toMatch(/^ID +KIND +STATE +DONE +TARGET +STARTED +LAST CHANGE +REASON\n *\d+ +import +completed +100 % +vms\/base\.img +2026-/u);
    expect(await ok('jobs', '--state', 'failed')).toBe('no operations are remembered\n');
    expect((await offshoot(['jobs', '--state', 'odd'])).code).toBe(2);
    expect((await offshoot(['jobs', '777'])).code).toBe(3);
    expect((await offshoot(['quota', 'set', 'vms', '1 elephant'])).code).toBe(2);
    expect((await offshoot(['quota', 'rm', 'vms'])).code).toBe(3);
  });

  it('says how a fill failed, with the kind of its job', async () => {
    await prepare('vms/a.img');
    await ok('fill', 'start', 'vms/a.img');
    const fill = fixture.service.fills.get('vms/a.img')!;
    fill.state = 'failed';
    fixture.service.jobRows.set(fill.jobId, {
      id: fill.jobId, kind: 'fill', state: 'failed', path: 'vms/a.img', progressDoneBytes: 0, progressTotalBytes: 1, message: null,
      error: { kind: 'no-space', message: 'the store is full: free some space, then resume the fill' }, createdAt: fill.startedAt, updatedAt: fill.startedAt,
    });
    const { code, err } = await offshoot(['fill', 'wait', 'vms/a.img']);
    expect([code, err]).toEqual([7, expect.stringMatching(/^offshoot: the store is full: free some space, then resume the fill\n {2}\(.*\)\n$/u)]);
    expect(await ok('job', 'show', String(fill.jobId))).toContain('\n  Error        the store is full: free some space, then resume the fill (no-space)\n');
  });

  it('starts a daemon with absolute paths, and tells how to reach it', async () => {
    const { code, out, world } = await offshoot(['daemon', 'start', '--store', 's', '--mount', '/m', '--workers', '4', '--log-level', 'debug', '--socket', 'x.sock']);
    expect(code).toBe(0);
    expect(world.started).toEqual([{ storeDir: '/work/here/s', mountDir: '/m', socketPath: '/work/here/x.sock', workers: 4, transport: 'kernel', logLevel: 'debug', sourceTimeoutSeconds: 25, foreground: false, spare: true }]);
    expect(out).toContain('\n  Log        /work/here/s/offshoot.log\nOther commands find it with: export OFFSHOOT_SOCKET=/work/here/x.sock\n');
    const hypervisors = await offshoot(['daemon', 'start', '--store', 's', '--mount', '/m', '--libvirt', 'qemu:///session', '--vsphere', 'vsphere.json']);
    expect(hypervisors.world.started[0]).toMatchObject({ hypervisors: { libvirtUri: 'qemu:///session', vsphereSettings: '/work/here/vsphere.json' } });
    const foreground = await offshoot(['daemon', 'start', '--store', 's', '--mount', '/m', '--foreground', '--transport', 'fuse-native']);
    expect(foreground.world.started[0]).toMatchObject({ foreground: true, transport: 'fuse-native', workers: undefined, logLevel: 'info', socketPath: fixture.socketPath });
    expect(foreground.out).toMatch(/^offshoot is running; Ctrl-C ends it\n/u);
  });

  it('says of its help to which hypervisors machines can go', async () => {
    const help = await ok('daemon', 'start', '--help');
    for (const text of ['--libvirt <uri>', 'qemu:///system', '--vsphere <file>', 'VSPHERE.md']) expect(help).toContain(text);
  });

  it('looks at a daemon, and waits until one that it stops is gone', async () => {
    const status = await ok('daemon', 'status');
    expect(status).toContain('\n  Serving since  ');
    expect(status).toContain(', restarted 2 times, the last time within 98 ms\n');
    expect(status).toContain('\n  Warnings       the store has less than 50 GiB free\n');
    const lives = [true, true, false];
    const seen: number[] = [];
    const { code, out, world } = await offshoot(['daemon', 'stop', '--force'], { processLives: (pid) => { seen.push(pid); return lives.shift() ?? false; } });
    expect([code, out]).toEqual([0, 'offshoot has stopped; /mnt/offshoot is unmounted\n']);
    expect([seen, fixture.service.stopped, world.listeners()]).toEqual([[4_000_001, 4_000_001, 4_000_001], { force: true }, 0]);
    const stuck = await offshoot(['daemon', 'stop'], { processLives: () => true, sleepStepMs: 31_000 });
    expect([stuck.code, stuck.err]).toEqual([16, expect.stringContaining('(process 4000001) has not ended after 1 min 0 s: look at /srv/offshoot/offshoot.log')]);
  });
});

describe('for programs (--json)', () => {
  const parsed = async (...args: string[]): Promise<unknown> => JSON.parse(await ok(...args, '--json'));

  it('prints one object or array for every command', async () => {
    expect(await parsed('container', 'create', 'vms')).toEqual(fixture.service.listContainers()[0]);
    expect(await parsed('import', 'debian.raw', 'vms/base.img')).toMatchObject({ kind: 'import', state: 'completed', path: 'vms/base.img' });
    expect(await parsed('clone', 'vms/base.img', 'vms/a.img', 'vms/b.img')).toMatchObject({ operationId: 'op-1', clones: [{ path: 'vms/a.img', sizeBytes: 10 * GIB, mountPath: '/mnt/offshoot/vms/a.img' }, { path: 'vms/b.img' }] });
    expect(await parsed('container', 'ls')).toEqual(fixture.service.listContainers());
    expect(await parsed('ls')).toEqual(fixture.service.list(null));
    expect(await parsed('ls', 'vms')).toEqual(fixture.service.list('vms'));
    expect(await parsed('show', 'vms/a.img')).toEqual(fixture.service.show('vms/a.img'));
    expect(await parsed('resize', 'vms/a.img', '1G')).toMatchObject({ path: 'vms/a.img', sizeBytes: GIB });
    expect(await parsed('fill', 'start', 'vms/a.img')).toMatchObject({ path: 'vms/a.img', state: 'running', rateBytesPerSecond: null });
    expect(await parsed('fill', 'pause', 'vms/a.img')).toMatchObject({ state: 'paused' });
    expect(await parsed('fill', 'resume', 'vms/a.img', '--rate', '1M')).toMatchObject({ state: 'running', rateBytesPerSecond: 1024 ** 2 });
    expect(await parsed('fill', 'status', 'vms/a.img')).toMatchObject({ state: 'running', doneBytes: GIB / 2 });
    expect(await parsed('fill', 'wait', 'vms/a.img')).toMatchObject({ state: 'completed', doneBytes: 2 * GIB });
    expect(await parsed('job', 'show', '2')).toMatchObject({ id: 2, kind: 'import', state: 'completed' });
    expect(await parsed('job', 'cancel', '2')).toMatchObject({ id: 2, state: 'completed' });
    expect(await parsed('rm', 'vms/a.img')).toMatchObject({ path: 'vms/a.img', nodesRemoved: 1 });
    expect(await parsed('daemon', 'status')).toEqual(fixture.service.status());
    expect(await parsed('daemon', 'stop')).toEqual({ stopped: true, holderPid: 4_000_001, storeDir: '/srv/offshoot', mountDir: '/mnt/offshoot' });
    expect(await parsed('daemon', 'start', '--store', '/s', '--mount', '/m')).toEqual({ holderPid: 11, serverPid: 12, socketPath: fixture.socketPath, storeDir: '/s', mountDir: '/m', notes: [] });
  });

  it('takes the global options in front of the command too', async () => {
    const { code, out } = await run(['--json', '--socket', fixture.socketPath, 'ls'], { socketPath: '/nowhere' });
    expect([code, out]).toEqual([0, '[]\n']);
  });

  it.each<[string[], number, string, RegExp]>([
    [['show', 'vms/none.img'], 3, 'not-found', /there is no vms\/none\.img/u],
    [['show', '/vms/none.img'], 2, 'invalid-name', /begins with/u],
    [['resize', 'vms/a.img', '10GB'], 2, 'invalid-argument', /powers of 1000/u],
    [['clone', 'vms/a.img'], 2, 'invalid-argument', /missing required argument 'target'/u],
    [['ls', '--bogus'], 2, 'invalid-argument', /unknown option '--bogus'/u],
    [['frobnicate'], 2, 'invalid-argument', /unknown command 'frobnicate'/u],
    [['daemon', 'start', '--store', 'x'], 2, 'invalid-argument', /required option '--mount <dir>' not specified/u],
    [['daemon', 'start', '--store', 'x', '--mount', 'y', '--workers', '0'], 2, 'invalid-argument', /^--workers cannot be '0': it must be a number from 1 to 64/u],
    [['fill'], 2, 'invalid-argument', /a command is missing/u],
    [['import', 'http://x/y.raw', 'vms/a.img'], 8, 'not-supported', /is a URL/u],
  ])('%j fails as one object on standard error', async (args, exitCode, kind, message) => {
    const { code, out, err } = await offshoot([...args, '--json']);
    expect([code, out, err.split('\n')]).toEqual([exitCode, '', [expect.any(String), '']]);
    const { error } = JSON.parse(err) as { error: { kind: string; message: string; exitCode: number; hint: string | null; context: object } };
    expect([error.kind, error.exitCode, Object.keys(error)]).toEqual([kind, exitCode, ['kind', 'message', 'exitCode', 'hint', 'context']]);
    expect(error.message).toMatch(message);
  });
});

describe('errors for people', () => {
  it.each<[string[], number, RegExp]>([
    [['show', 'vms/none.img'], 3, /^offshoot: there is no vms\/none\.img: offshoot ls lists what there is\n$/u],
    [['container', 'create', 'a\u001b[2Jb'], 2, /^offshoot: 'a\\x1b\[2Jb' holds a control character/u],
    [['container', 'create', 'vms', '--mode', '999'], 2, /^offshoot: --mode cannot be '999': it must be three or four octal digits/u],
    [['clone', 'vms/base.img', 'vms/base.img/'], 2, /^offshoot: 'vms\/base\.img\/' ends with '\/'/u],
    [['rm', 'vms', 'more'], 2, /^offshoot: too many arguments for 'rm'.*\n\(offshoot rm --help shows the usage\)\n$/su],
    [['import', 'x.raw', 'vms/a.img', '--format', 'vhs'], 2, /^offshoot: --format cannot be 'vhs': it must be one of raw, qcow2, vmdk, vhdx, vdi/u],
    [['daemon', 'status', '--socket', `/${'s'.repeat(107)}`], 2, /^offshoot: the path of the control socket has 108 bytes, 107 are the most/u],
    [['daemon', 'status', '--socket', '/nowhere/o.sock'], 13, /^offshoot: no daemon answers on \/nowhere\/o\.sock \(there is no such socket\): start one with 'offshoot daemon start/u],
    [['job', 'show', 'x'], 2, /^offshoot: 'x' cannot be the argument 'id': it must be the number of a job/u],
    [['import', 'evil\u001b[2J', 'vms/a.img'], 3, /^offshoot: there is no file \/work\/here\/evil\\x1b\[2J: check its name\n$/u],
    [['evil\u001b[2J'], 2, /^offshoot: unknown command 'evil\\x1b\[2J'\n/u],
  ])('%j', async (args, exitCode, message) => {
    const { code, out, err } = await offshoot(args);
    expect([code, out]).toEqual([exitCode, '']);
    expect(err).toMatch(message);
  });

  it('asks to report what is a fault of the daemon', async () => {
    fixture.service.broken = new Error('x');
    const { code, err } = await offshoot(['daemon', 'status']);
    expect([code, err]).toEqual([70, expect.stringMatching(/its log has the details.*\n {2}\(this is a fault of offshoot, not yours/u)]);
  });

  it('refuses more targets than one request can hold before it asks', async () => {
    const { code, err } = await offshoot(['clone', 'vms/base.img', ...Array.from({ length: 10_001 }, (_each, index) => `vms/${index}`)]);
    expect([code, err]).toEqual([2, 'offshoot: 10,001 targets are more than one request can hold (10,000): use several\n']);
  });
});

describe('Ctrl-C', () => {
  it('cancels an import and waits until nothing is left of it', async () => {
    await ok('container', 'create', 'vms');
    fixture.service.jobStep = 0.01;
    const { code, out, err, world } = await offshoot(['import', 'debian.raw', 'vms/base.img'], { onSleep: (each, sleeps) => { if (sleeps === 3) each.interrupt(); } });
    expect([code, out]).toEqual([130, '']);
    expect(err).toMatch(/^cancelling the import; Ctrl-C again does not wait for it\noffshoot: the import of vms\/base\.img was cancelled: nothing of it is left\n$/u);
    expect([[...fixture.service.jobRows.values()].map((job) => job.state), fixture.service.disks.size, world.listeners()]).toEqual([['cancelled'], 0, 0]);
  });

  it('that comes after the end of an import does not lie about it', async () => {
    await ok('container', 'create', 'vms');
    const { code, out } = await offshoot(['import', 'debian.raw', 'vms/base.img'], { onSleep: (each, sleeps) => {
      if (sleeps !== 3) return;
      fixture.service.jobStep = 1;
      fixture.service.job(2);
      each.interrupt();
    } });
    expect([code, out]).toEqual([0, expect.stringMatching(/^imported vms\/base\.img/u)]);
  });

  it('twice ends the command on the spot, and says what goes on', async () => {
    await ok('container', 'create', 'vms');
    fixture.service.jobStep = 0.01;
    const { err, world } = await offshoot(['import', 'debian.raw', 'vms/base.img'], { onSleep: (each) => { each.interrupt(); each.interrupt(); } });
    expect(world.exits).toEqual([130]);
    expect(err).toContain('not waiting any longer; offshoot job show 2 says how job 2 ends\n');
  });

  it('ends the waiting for a fill and leaves the fill alone', async () => {
    await prepare('vms/a.img');
    fixture.service.jobStep = 0.01;
    await ok('fill', 'start', 'vms/a.img');
    const { code, out, err, world } = await offshoot(['fill', 'wait', 'vms/a.img'], { onSleep: (each, sleeps) => { if (sleeps === 4) each.interrupt(); } });
    expect([code, out]).toEqual([130, '']);
    expect(err).toMatch(/offshoot: stopped waiting; the fill of vms\/a\.img goes on in the daemon, 4 % \(.* of 2 GiB\) done\n$/u);
    expect([fixture.service.fills.get('vms/a.img')?.state, world.listeners()]).toEqual(['running', 0]);
  });
});

describe('help', () => {
  const commands = [
    'daemon start', 'daemon status', 'daemon stop', 'daemon upgrade', 'container create', 'container ls', 'import', 'clone', 'fill start', 'fill pause', 'fill resume', 'fill status', 'fill wait',
    'ls', 'show', 'rm', 'resize', 'df', 'quota set', 'quota rm', 'quota ls', 'jobs', 'job show', 'job cancel',
    'snapshot create', 'snapshot ls', 'snapshot rm', 'snapshot revert', 'snapshot diff', 'flatten', 'promote', 'rebase', 'export', 'send', 'receive', 'check', 'metrics',
    'scrub start', 'scrub pause', 'scrub resume', 'scrub status',
    'present', 'withdraw', 'exports', 'discover', 'stage', 'staged', 'deploy', 'deployed', 'decommission', 'attach', 'attached', 'detach',
    'vm import', 'vm ls', 'vm show', 'vm clone', 'vm get', 'vm set', 'vm register', 'vm unregister', 'vm start', 'vm stop', 'vm status', 'vm rm',
  ];
  it('is looked at here for every command', async () => {
    const names = (command: Command, path: readonly string[]): string[] =>
      command.commands.length === 0 ? [path.join(' ')] : command.commands.flatMap((child) => names(child, [...path, child.name()]));
    expect(names(await createProgram(createWorld({ socketPath: '/x' }).io, [], false), []).toSorted()).toEqual([...commands, 'help'].toSorted());
  });

  it('of a command of a group comes with its name behind help, and a wrong name is refused', async () => {
    expect(await ok('help', 'snapshot', 'create')).toBe(await ok('snapshot', 'create', '--help'));
    expect(await ok('help', 'snapshot')).toBe(await ok('snapshot', '--help'));
    expect(await ok('help')).toBe(await ok('--help'));
    const { code, out, err } = await offshoot(['help', 'snapshot', 'nope']);
    expect([code, out, err]).toEqual([2, '', "offshoot: unknown command 'nope'\n(offshoot snapshot --help shows the usage)\n"]);
  });

  it.each(commands)('of %s has a usage line, examples that begin with it, and fits 100 columns', async (command) => {
    const out = await ok(...command.split(' '), '--help');
    expect(out).toMatch(new RegExp(`^Usage: offshoot ${command} `, 'u'));
    expect(out).toMatch(new RegExp(`\\nExamples?:\\n(?:  .*\\n)*  offshoot ${command}`, 'u'));
    expect(out.split('\n').filter((line) => line.length > 100)).toEqual([]);
    expect(out).toContain('--json');
    expect(out).toContain('--socket <path>');
  });

  it('of the program lists every command, the exit codes, and a first disk', async () => {
    const out = await ok('--help');
    for (const command of commands) expect(out).toMatch(new RegExp(`\\n  ${command.split(' ')[0] ?? ''} `, 'u'));
    expect(out).toContain('\n   13  the daemon is not running\n');
    expect(await ok('help', 'clone')).toBe(await ok('clone', '--help'));
  });

  it('goes to standard error, with exit code 2, when a command is missing', async () => {
    const { code, out, err } = await offshoot([]);
    expect([code, out]).toEqual([2, '']);
    expect(err).toMatch(/^Usage: offshoot COMMAND/u);
  });

  it('says the version of the package', async () => {
    expect(await ok('--version')).toMatch(/^\d+\.\d+\.\d+\n$/u);
  });
});

it('waits through a restart of the server while it follows a fill', async () => {
  await prepare('vms/a.img');
  fixture.service.jobStep = 0.2;
  await ok('fill', 'start', 'vms/a.img');
  const { startControlServer } = await import('../../daemon/control/server.js');
  const { socketPath, service } = fixture;
  let restarted: Awaited<ReturnType<typeof startControlServer>> | null = null;
  try {
    const { code, out } = await offshoot(['fill', 'wait', 'vms/a.img'], { onSleep: async (_world, sleeps) => {
      if (sleeps === 1) await fixture.server.close();
      if (sleeps === 3) {
        const silent = (): void => undefined;
        restarted = await startControlServer({ service, socketPath, version: '1', logger: { debug: silent, info: silent, warn: silent, error: silent }, onInternalError: silent });
      }
    } });
    expect([code, out]).toEqual([0, expect.stringMatching(/^vms\/a\.img is filled/u)]);
  } finally {
    await (restarted as Awaited<ReturnType<typeof startControlServer>> | null)?.close();
  }
});
