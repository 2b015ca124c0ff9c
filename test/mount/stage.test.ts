/**
 * Container files with the real daemon and the host's own programs: staged on ext4 and on xfs, deployed, decommissioned, each interrupted at every program that
 * it runs; the limit; deployed machines over a kill, a stop and a start; and block devices by `.block`. The format and the hypervisor are those of
 * test-machines.ts; a machine that boots is in vm/stage-deploy.test.ts.
 */
import { spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, readdirSync, readlinkSync, statSync, symlinkSync, writeFileSync, writeSync } from 'node:fs';
import { join, resolve } from 'node:path';

import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import { exitCodeOf } from '../../blockstore/errors.js';
import { createControlClient } from '../../daemon/control/client.js';
import type { JobInfo } from '../../daemon/control/schemas.js';
import type { AttachedInfo, DeployedInfo, StagedInfo } from '../../daemon/control/vdisk-schemas.js';
import { compilePrograms } from '../support/compiled-program.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { command, mustRun } from '../support/model/command.js';
import { patternBytes } from '../support/model/pattern.js';
import { waitUntil, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { TestHypervisorSeat } from '../support/test-machines.js';
import { lacks } from '../support/tools.js';
import { ProgramSeat, cleanVdisks, loopDevicesOf, mountsBelow } from '../support/vdisk-programs.js';

const PROGRAMS = ['test/support/test-machines-program.ts', 'test/support/vdisk-programs-program.ts'] as const;
const DISK_BYTES = 4 * 1024 * 1024;
const SPARSE_BYTES = 100 * 1024 * 1024;
const WAIT_MS = 60_000;
const LIMIT = 3;
const MACHINE_UUID = '99999999-2222-4333-8444-555555555555';

const cleanup = createCleanup();
const programs = compilePrograms('stage', [...PROGRAMS]);
let daemon: TestDaemon;
let seat: TestHypervisorSeat;
let host: ProgramSeat;
let runtimeBase: string;

describe.skipIf(lacks('/dev/fuse', 'losetup', 'sfdisk', 'mkfs.ext4', 'mkfs.xfs', 'setpriv', 'blkid'))('container files', () => {
  beforeAll(async () => {
    seat = new TestHypervisorSeat(makeTempDir('hypervisor', cleanup));
    host = new ProgramSeat(makeTempDir('programs', cleanup));
    runtimeBase = makeTmpfsDir('stage', cleanup);
    daemon = await startTestDaemon({
      transport: 'kernel', cleanup, startArguments: () => ['--attach-limit', String(LIMIT)],
      environment: {
        NODE_OPTIONS: PROGRAMS.map((each) => `--import=file://${programs.pathOf(each)}`).join(' '), OFFSHOOT_TEST_DIST: resolve(import.meta.dirname, '../../dist'),
        OFFSHOOT_TEST_HYPERVISOR: seat.directory, OFFSHOOT_TEST_PROGRAMS: host.directory, OFFSHOOT_CRASHES_MAX: '1000000', OFFSHOOT_RUNTIME_DIR: runtimeBase,
      },
    });
    cleanVdisks(cleanup, daemon, runtimeBase);
    const source = join(makeTempDir('machine', cleanup), 'debian');
    mkdirSync(source);
    writeFileSync(join(source, 'root.img'), patternBytes(3, 0, DISK_BYTES));
    writeFileSync(join(source, 'notes'), 'kept\n');
    writeFileSync(join(source, 'machine.json'), JSON.stringify({ name: 'debian', uuid: MACHINE_UUID, macs: ['52:54:00:99:88:77'], memory: 1024, disks: { vda: join(source, 'root.img') } }));
    await daemon.json(['container', 'create', 'golden']);
    await daemon.json(['container', 'create', 'depot']);
    await daemon.json(['vm', 'import', source, 'golden/debian']);
    // Large, and almost nothing in it.
    await mustRun('truncate', ['--size=100M', daemon.path('golden/debian/sparse')]);
    symlinkSync('/etc/passwd', daemon.path('golden/debian/link'));
    mkdirSync(daemon.path('golden/debian/more'));
    writeFileSync(daemon.path('golden/debian/more/inside'), 'inside\n');
  }, 120_000);

  beforeEach(() => { seat.order({}); host.forget(); });

  afterEach(async () => {
    for (const { name } of await daemon.json<DeployedInfo[]>(['deployed'])) await daemon.json(['decommission', name, '--force']);
    for (const { path } of await daemon.json<AttachedInfo[]>(['attached'])) await daemon.cli(['detach', path]);
  }, 120_000);

  afterAll(async () => {
    await cleanup.run();
    programs.remove();
  }, 120_000);

  const sum = async (path: string): Promise<string> => (await mustRun('sha256sum', [daemon.path(path)], { timeoutMs: 120_000 })).stdout.split(' ', 1)[0] ?? '';
  const stage = async (target: string, fs = 'ext4'): Promise<StagedInfo> => (await daemon.json<{ readonly staged: StagedInfo }>(['stage', 'golden/debian', target, '--fs', fs])).staged;
  const deploy = async (source: string, name: string, ...more: readonly string[]): Promise<DeployedInfo> => (await daemon.json<{ readonly deployed: DeployedInfo }>(['deploy', source, '--name', name, ...more])).deployed;

  async function expectNothingAttached(): Promise<void> {
    expect(await loopDevicesOf(daemon)).toEqual([]);
    expect(mountsBelow(runtimeBase)).toEqual([]);
    expect(await daemon.json(['attached'])).toEqual([]);
  }

  /** After a kill: the next server answers, and has brought every operation to an end. */
  async function settled(killed: number | null): Promise<JobInfo | undefined> {
    if (killed !== null) await daemon.waitForServer(killed, WAIT_MS);
    const client = createControlClient({ socketPath: daemon.socketPath, patienceMs: WAIT_MS });
    expect(await waitUntil(async () => (await client.jobs('running')).length === 0, WAIT_MS)).toBe(true);
    return (await client.jobs(null)).filter(({ kind }) => ['stage', 'deploy', 'decommission'].includes(kind)).at(-1);
  }

  describe.each(['ext4', 'xfs'] as const)('on %s', (fs) => {
    it('hold the machine whole; deployed, it is somebody else with the same disks; the file is never written, and nothing is left', async () => {
      const file = `depot/${fs}.vdisk`;
      const staged = await stage(file, fs);
      // Partitioned, formatted and copied to past the cache of the host.
      expect(host.devicesShowing(daemon.path(file)).filter(({ program }) => ['sfdisk', `mkfs.${fs}`, 'cp'].includes(program))).toEqual(
        ['sfdisk', 'sfdisk', `mkfs.${fs}`, 'cp'].map((program) => ({ program, file: daemon.path(file), directIo: true })),
      );
      expect(staged).toMatchObject({ path: file, state: 'ready', machine: 'debian', fileSystem: fs, architecture: expect.stringMatching(/^\w+$/u) as string, deployed: [] });
      expect(staged.sizeBytes).toBeGreaterThanOrEqual(Math.ceil(1.1 * (SPARSE_BYTES + DISK_BYTES)));
      await expectNothingAttached();
      // What it says of itself is so, for programs that know nothing of us.
      const table = JSON.parse((await mustRun('sfdisk', ['--json', daemon.path(file)])).stdout) as { readonly partitiontable: { readonly id: string; readonly partitions: readonly { readonly start: number; readonly size: number; readonly uuid: string }[] } };
      const [partition] = table.partitiontable.partitions;
      expect([table.partitiontable.id.toLowerCase(), partition?.uuid.toLowerCase(), (partition?.start ?? 1) % 2048, (partition?.size ?? 1) % 2048]).toEqual([staged.diskGuid, staged.partitionGuid, 0, 0]);
      const probed = await mustRun('blkid', ['--probe', '--offset', String(2048 * 512), '--output', 'export', daemon.path(file)]);
      expect(probed.stdout).toContain(`TYPE=${fs}`);
      expect(probed.stdout).toContain(`UUID=${staged.fileSystemUuid}`);
      expect(statSync(daemon.path(file)).blocks * 512).toBeLessThan(90 * 1024 * 1024);
      const before = await sum(file);

      const [a, b] = [await deploy(file, 'a'), await deploy(file, 'b', '--no-start')];
      expect(a).toMatchObject({ name: 'a', from: file, path: 'depot/a.vdisk', state: 'ready', mounted: true, power: 'running', registration: 'registered' });
      expect(b).toMatchObject({ power: 'shut-off' });
      expect(new Set([a.uuid, b.uuid, MACHINE_UUID, ...a.macs, ...b.macs, '52:54:00:99:88:77']).size).toBe(6);
      expect(await directIoOf([a.device, b.device])).toEqual([true, true]);
      for (const info of [a, b]) {
        const inside = (name: string): string => join(info.mountPoint, name);
        expect(readFileSync(inside('root.img')).equals(patternBytes(3, 0, DISK_BYTES))).toBe(true);
        expect(readFileSync(inside('notes'), 'utf8')).toBe('kept\n');
        expect(readlinkSync(inside('link'))).toBe('/etc/passwd');
        expect(readFileSync(inside('more/inside'), 'utf8')).toBe('inside\n');
        expect(statSync(inside('sparse'))).toMatchObject({ size: SPARSE_BYTES, blocks: 0 });
        const [machine] = seat.registered().filter(({ name }) => name === info.name);
        expect(machine).toMatchObject({ uuid: info.uuid, directory: info.mountPoint, text: readFileSync(inside('machine.json'), 'utf8') });
        expect(JSON.parse(machine?.text ?? '{}')).toMatchObject({ name: info.name, uuid: info.uuid, macs: info.macs, disks: { vda: inside('root.img') } });
        const own = JSON.parse(readFileSync(inside('.offshoot/vdisk.json'), 'utf8')) as { readonly fileSystem: unknown };
        expect(own.fileSystem).toMatchObject({ type: fs, uuid: staged.fileSystemUuid });
        writeFileSync(inside('root.img'), `${info.name} writes`);
      }
      expect(readFileSync('/proc/self/mountinfo', 'utf8').split('\n').filter((line) => line.includes(runtimeBase) && line.includes('/dev/loop')).every((line) => line.includes('nosuid,nodev'))).toBe(true);
      expect((await daemon.json<StagedInfo[]>(['staged'])).find(({ path }) => path === file)?.deployed).toEqual(['a', 'b']);
      expect(await daemon.json(['decommission', 'a'])).toMatchObject({ message: expect.stringContaining('decommissioned') as string });
      await daemon.json(['decommission', 'b']);
      await expectNothingAttached();
      expect(existsSync(daemon.path('depot/a.vdisk'))).toBe(false);
      expect(seat.registered()).toEqual([]);
      expect(await sum(file)).toBe(before);
      await daemon.json(['rm', file]);
      expect(readdirSync(daemon.path('depot'))).toEqual([]);
    });
  });

  it('are not made, and leave nothing, when any program of theirs fails; nor when the server is killed behind any of them', { timeout: 600_000 }, async () => {
    host.forget();
    await stage('depot/first.vdisk');
    const made = host.run();
    expect(made).toEqual(['losetup attach', 'sfdisk', 'sfdisk', 'losetup detach', 'losetup attach', 'mkfs.ext4', 'mount', 'mkdir', 'install', 'install', 'cp', 'sync', 'umount', 'rmdir', 'losetup detach']);
    await daemon.json(['rm', 'depot/first.vdisk']);
    for (const what of ['fail', 'kill'] as const) {
      for (let at = 1; at <= made.length; at += 1) {
        const where = `${what} at ${at}, ${made[at - 1] ?? ''}`;
        const { serverPid } = await daemon.status();
        host.order({ at, what });
        const result = await daemon.cli(['stage', 'golden/debian', 'depot/x.vdisk'], { timeoutMs: WAIT_MS });
        const job = await settled(what === 'kill' ? serverPid : null);
        expect([where, host.wasObeyed()]).toEqual([where, true]);
        // A detach that says that it failed, and did nothing, is made again by the undo; an unmount too.
        expect([where, result.code === 0, job?.state]).toEqual([where, false, 'failed']);
        expect([where, readdirSync(daemon.path('depot'))]).toEqual([where, []]);
        await expectNothingAttached();
      }
    }
    expect((await daemon.json<{ readonly verdict: string }>(['check'])).verdict).toBe('clean');
    await stage('depot/x.vdisk');
    await daemon.json(['rm', 'depot/x.vdisk']);
  });

  it('are deployed whole or not at all, and decommissioned to the end, wherever the server is killed', { timeout: 600_000 }, async () => {
    await stage('depot/file.vdisk');
    const before = await sum('depot/file.vdisk');
    host.forget();
    await deploy('depot/file.vdisk', 'first');
    const made = host.run();
    expect(made).toEqual(['losetup attach', 'mount', 'install', 'sync']);
    for (let at = 1; at <= made.length; at += 1) {
      const where = `kill at ${at}, ${made[at - 1] ?? ''}`;
      const { serverPid } = await daemon.status();
      host.order({ at, what: 'kill' });
      const result = await daemon.cli(['deploy', 'depot/file.vdisk', '--name', 'x'], { timeoutMs: WAIT_MS });
      const job = await settled(serverPid);
      expect([where, result.code === 0, job?.state]).toEqual([where, false, 'failed']);
      // The one that was there is there, as it was.
      expect([where, (await daemon.json<DeployedInfo[]>(['deployed'])).map(({ name, mounted, power }) => [name, mounted, power])]).toEqual([where, [['first', true, 'running']]]);
      expect(await loopDevicesOf(daemon)).toHaveLength(1);
      expect(readdirSync(daemon.path('depot')).toSorted()).toEqual(['file.vdisk', 'first.vdisk']);
    }
    for (const after of [false, true]) {
      const { serverPid } = await daemon.status();
      seat.order({ kill: { at: 'register', nth: seat.count('register', after) + 1, after } });
      const result = await daemon.cli(['deploy', 'depot/file.vdisk', '--name', 'x'], { timeoutMs: WAIT_MS });
      seat.order({});
      expect([result.code === 0, (await settled(serverPid))?.state]).toEqual([false, 'failed']);
      expect(seat.registered().map(({ name }) => name)).toEqual(['first']);
    }
    for (const at of [1, 2, 3]) {
      await deploy('depot/file.vdisk', 'y');
      const { serverPid } = await daemon.status();
      host.order({ at, what: 'kill' });
      expect((await daemon.cli(['decommission', 'y'], { timeoutMs: WAIT_MS })).code).toBe(0);
      expect(await settled(serverPid)).toMatchObject({ kind: 'decommission', state: 'completed' });
      expect((await daemon.json<DeployedInfo[]>(['deployed'])).map(({ name }) => name)).toEqual(['first']);
    }
    await daemon.json(['decommission', 'first']);
    await expectNothingAttached();
    expect(await sum('depot/file.vdisk')).toBe(before);
    await daemon.json(['rm', 'depot/file.vdisk']);
  });

  it('are attached no more than the limit says, and refused for what cannot be', async () => {
    await stage('depot/file.vdisk');
    for (const name of ['a', 'b', 'c']) await deploy('depot/file.vdisk', name, '--no-start');
    const refused = await daemon.cli(['deploy', 'depot/file.vdisk', '--name', 'd']);
    expect([refused.code, refused.stderr]).toEqual([exitCodeOf.busy, expect.stringContaining('--attach-limit')]);
    expect((await daemon.cli(['stage', 'golden/debian', 'depot/other.vdisk'])).code).toBe(exitCodeOf.busy);
    expect(readdirSync(daemon.path('depot')).toSorted()).toEqual(['a.vdisk', 'b.vdisk', 'c.vdisk', 'file.vdisk']);
    await daemon.json(['decommission', 'c']);
    const cases: readonly (readonly [readonly string[], string])[] = [
      [['deploy', 'depot/file.vdisk', '--name', 'a'], 'exists already'],
      [['deploy', 'depot/file.vdisk', '--name', 'a', '--to', 'golden'], 'deployed machine "a" already'],
      [['deploy', 'golden/debian/root.img', '--name', 'd'], 'no container file'],
      [['deploy', 'depot/a.vdisk', '--name', 'd'], 'no container file'],
      [['deploy', 'depot/file.vdisk', '--name', '../d'], 'cannot be the name'],
      [['stage', 'golden', 'depot/d.vdisk'], 'is a container'],
      [['stage', 'golden/debian', 'depot/file.vdisk'], 'exists already'],
      [['decommission', 'd'], 'no deployed machine'],
      [['detach', 'depot/a.vdisk'], 'decommission it'],
      [['attach', 'depot/file.vdisk'], 'never written'],
    ];
    for (const [args, text] of cases) {
      const result = await daemon.cli(args);
      expect([args.join(' '), result.code === 0, result.stderr]).toEqual([args.join(' '), false, expect.stringContaining(text)]);
    }
    // What lies in a snapshot is called what people call it.
    const then = 'golden/debian/root.img@then';
    await daemon.json(['snapshot', 'create', 'golden@then']);
    await daemon.json(['attach', then, '--read-only']);
    expect((await daemon.cli(['attached'])).stdout).toMatch(/^golden\/debian\/root\.img@then +\/dev\/loop\d+ +block +read-only$/mu);
    expect((await daemon.cli(['detach', then])).stdout).toContain(`${then} is not attached any more`);
    await daemon.json(['snapshot', 'rm', 'golden@then']);
    // One that is on cannot be staged.
    const fd = openSync(daemon.path('golden/debian/root.img'), 'r');
    expect((await daemon.cli(['stage', 'golden/debian', 'depot/d.vdisk'])).stderr).toContain('is open');
    closeSync(fd);
    // What a deployed machine wrote is found again by the next server, and behind a stop and a start.
    await daemon.json(['deployed', 'a', '--start']);
    const [a] = await daemon.json<DeployedInfo[]>(['deployed', 'a']);
    writeFileSync(join(a?.mountPoint ?? '', 'root.img'), 'written');
    await daemon.waitForServer(await daemon.killServer(), WAIT_MS);
    expect(await daemon.json<DeployedInfo[]>(['deployed', 'a'])).toEqual([a]);
    const stop = await daemon.cli(['daemon', 'stop']);
    expect([stop.code, stop.stderr]).toEqual([exitCodeOf['in-use'], expect.stringContaining('a is deployed and runs')]);
    expect(readFileSync(join(a?.mountPoint ?? '', 'root.img'), 'utf8')).toBe('written');
    seat.setState(a?.uuid ?? '', 'shut-off');
    await daemon.stop();
    expect([await loopDevicesOf(daemon), mountsBelow(runtimeBase)]).toEqual([[], []]);
    await daemon.start();
    expect(await daemon.json<DeployedInfo[]>(['deployed'])).toMatchObject([{ name: 'a', mounted: true, power: 'shut-off' }, { name: 'b', mounted: true }]);
    expect(readFileSync(join(a?.mountPoint ?? '', 'root.img'), 'utf8')).toBe('written');
  });

  describe('.block', () => {
    const open = (path: string): number => openSync(daemon.path(path), 'r');
    const goes = async (): Promise<boolean> => await waitUntil(async () => (await loopDevicesOf(daemon)).length === 0, WAIT_MS);

    it('lists the disks, and is in no listing; reading a link attaches the disk, for any number of openers, and the last close gives it back', async () => {
      await daemon.json(['import', await aDisk('block'), 'depot/data.img', '--format', 'raw']);
      expect(readdirSync(daemon.path('depot'))).not.toContain('.block');
      expect(readdirSync(daemon.path('depot/.block'))).toContain('data.img');
      expect(await loopDevicesOf(daemon)).toEqual([]);
      const [one, two] = [open('depot/.block/data.img'), open('depot/.block/data.img')];
      const devices = await loopDevicesOf(daemon);
      expect(devices).toEqual([expect.stringMatching(/^\/dev\/loop[0-9]+: depot\/data\.img$/u)]);
      const device = devices[0]?.split(':')[0] ?? '';
      expect(readlinkSync(daemon.path('depot/.block/data.img'))).toBe(device);
      expect([statSync(device).mode & 0o777, statSync(device).uid]).toEqual([statSync(daemon.path('depot/data.img')).mode & 0o666, statSync(daemon.path('depot/data.img')).uid]);
      await mustRun('mkfs.ext4', ['-q', '-F', daemon.path('depot/.block/data.img')]);
      expect((await mustRun('blkid', ['--probe', daemon.path('depot/.block/data.img')])).stdout).toContain('TYPE="ext4"');
      await mustRun('dd', [`of=${daemon.path('depot/.block/data.img')}`, 'if=/dev/zero', 'bs=4096', 'count=1', 'seek=100', 'conv=notrunc,fsync', 'status=none']);
      closeSync(one);
      // The one that lent it has closed it by then.
      await new Promise((done) => { setTimeout(done, 12_000); });
      expect(await loopDevicesOf(daemon)).toEqual(devices);
      await daemon.waitForServer(await daemon.killServer(), WAIT_MS);
      expect(await loopDevicesOf(daemon)).toEqual(devices);
      closeSync(two);
      expect(await goes()).toBe(true);
      expect(await waitUntil(async () => (await daemon.json<AttachedInfo[]>(['attached'])).length === 0, WAIT_MS)).toBe(true);
      expect((await command('fsck.ext4', ['-n', '-f', daemon.path('depot/data.img')], { timeoutMs: WAIT_MS })).code).toBe(0);
    });

    it('is read-only for container files and in snapshots; attach stays until detach, which says when somebody has it open; a lent one does not hold up a stop', async () => {
      await daemon.json(['snapshot', 'create', 'depot@v1']);
      for (const path of ['depot/.snapshots/v1/.block/data.img', 'depot/.block/file.vdisk']) {
        // The kernel opens a read-only device for writing, and refuses the write.
        const fd = openSync(daemon.path(path), 'r+');
        expect(() => writeSync(fd, Buffer.alloc(4096), 0, 4096, 0)).toThrow(/EPERM|EROFS/u);
        closeSync(fd);
      }
      await daemon.json(['detach', 'depot/file.vdisk']);
      expect(() => { mkdirSync(daemon.path('depot/.block/x')); }).toThrow(/EPERM/u);
      expect((await command('setpriv', ['--reuid=65534', '--regid=65534', '--clear-groups', 'readlink', daemon.path('depot/.block/data.img')], { timeoutMs: WAIT_MS })).code).not.toBe(0);
      await daemon.json(['detach', 'depot/data.img@v1']);
      await daemon.json(['snapshot', 'rm', 'depot@v1']);
      const { device } = await daemon.json<AttachedInfo>(['attach', 'depot/data.img']);
      expect(readlinkSync(daemon.path('depot/.block/data.img'))).toBe(device);
      const fd = openSync(device ?? '', 'r');
      const refused = await daemon.cli(['detach', 'depot/data.img']);
      expect([refused.code, refused.stderr]).toEqual([exitCodeOf['in-use'], expect.stringContaining('last close')]);
      closeSync(fd);
      expect(await goes()).toBe(true);
      expect(statSync(device ?? '').mode & 0o777).toBe(0o600);
      expect(readlinkSync(daemon.path('depot/.block/data.img'))).toMatch(/^\/dev\/loop/u);
      await daemon.stop();
      expect(await loopDevicesOf(daemon)).toEqual([]);
      await daemon.start();
    });
  });

  it('a signal is refused while deployed machines run, and ends a daemon in order when they are off; --force takes their power; nothing that they wrote is lost', async () => {
    await stage('depot/kept.vdisk');
    const { mountPoint, uuid } = await deploy('depot/kept.vdisk', 'ended');
    const file = join(mountPoint, 'root.img');
    const { holderPid } = await daemon.status();
    const terminate = (): void => { process.kill(holderPid, 'SIGTERM'); };
    writeFileSync(file, 'written before the signal');
    terminate();
    expect(await waitUntil(() => daemon.log().some(({ text }) => text.includes('the holder asked for the end')), WAIT_MS)).toBe(true);
    expect((await daemon.json<DeployedInfo[]>(['deployed']))[0]).toMatchObject({ mounted: true, power: 'running' });
    seat.setState(uuid, 'shut-off');
    terminate();
    expect(await waitUntil(() => !existsSync(`/proc/${holderPid}`), WAIT_MS)).toBe(true);
    expect([await loopDevicesOf(daemon), mountsBelow(runtimeBase)]).toEqual([[], []]);
    await daemon.start();
    expect(await waitUntil(async () => (await daemon.json<DeployedInfo[]>(['deployed']))[0]?.mounted === true, WAIT_MS)).toBe(true);
    expect(readFileSync(file, 'utf8')).toBe('written before the signal');
    await daemon.json(['deployed', 'ended', '--start']);
    writeFileSync(file, 'written before the force');
    await daemon.stop({ force: true });
    expect([await loopDevicesOf(daemon), mountsBelow(runtimeBase)]).toEqual([[], []]);
    await daemon.start();
    expect(await daemon.json<DeployedInfo[]>(['deployed'])).toMatchObject([{ mounted: true, power: 'shut-off' }]);
    expect(readFileSync(file, 'utf8')).toBe('written before the force');
    await daemon.json(['decommission', 'ended', '--force']);
    await daemon.json(['rm', 'depot/kept.vdisk']);
  });

  it('are decommissioned also when a mount namespace of somebody else has them mounted, and the daemon answers meanwhile', async () => {
    await stage('depot/kept.vdisk');
    const { mountPoint } = await deploy('depot/kept.vdisk', 'held');
    // Not written out: whoever ends the last mount of it does that.
    writeFileSync(join(mountPoint, 'root.img'), patternBytes(9, 0, DISK_BYTES));
    const other = spawn('unshare', ['--mount', '--propagation', 'private', 'sleep', '600'], { stdio: 'ignore' });
    const end = async (): Promise<void> => {
      other.kill('SIGKILL');
      await waitUntilGone(other.pid ?? 0, WAIT_MS);
    };
    cleanup.add(end);
    const isHeld = (): boolean => { try { return readlinkSync(`/proc/${other.pid}/ns/mnt`) !== readlinkSync('/proc/self/ns/mnt') && readFileSync(`/proc/${other.pid}/mountinfo`, 'utf8').includes(mountPoint); } catch { return false; } };
    expect(await waitUntil(isHeld, WAIT_MS)).toBe(true);
    await daemon.json(['decommission', 'held', '--force']);
    expect(readFileSync(`/proc/${other.pid}/mountinfo`, 'utf8')).not.toContain(mountPoint);
    await expectNothingAttached();
    await end();
    await daemon.json(['rm', 'depot/kept.vdisk']);
  });

  it('no disk has two writers: what is presented for writing or open is not attached for writing, what is attached is not presented; a container file is presented read-only', async () => {
    await stage('depot/kept.vdisk');
    await daemon.json(['import', await aDisk('writers'), 'depot/shared.img', '--format', 'raw']);
    const refuses = async (args: readonly string[], kind: 'in-use' | 'not-permitted', text: string): Promise<void> => {
      const result = await daemon.cli(args);
      expect([args.join(' '), result.code, result.stderr]).toEqual([args.join(' '), exitCodeOf[kind], expect.stringContaining(text)]);
    };
    await daemon.json(['present', 'depot/shared.img', '--as', 'block']);
    await refuses(['attach', 'depot/shared.img'], 'in-use', 'presented as block');
    expect(() => readlinkSync(daemon.path('depot/.block/shared.img'))).toThrow(/EBUSY/u);
    await refuses(['attach', 'depot/shared.img', '--read-only'], 'in-use', 'presented as block');
    await daemon.json(['withdraw', 'depot/shared.img']);
    await daemon.json(['present', 'depot/shared.img', '--as', 'nbd', '--to', '127.0.0.1', '--listen', `127.0.0.1:${await freePort()}`]);
    await refuses(['attach', 'depot/shared.img'], 'in-use', 'presented as nbd');
    await daemon.json(['attach', 'depot/shared.img', '--read-only']);
    await daemon.json(['detach', 'depot/shared.img']);
    await daemon.json(['withdraw', 'depot/shared.img']);

    const fd = openSync(daemon.path('depot/shared.img'), 'r+');
    await refuses(['attach', 'depot/shared.img'], 'in-use', 'is open');
    closeSync(fd);
    const { device } = await daemon.json<AttachedInfo>(['attach', 'depot/shared.img']);
    expect(await directIoOf([device])).toEqual([true]);
    await refuses(['present', 'depot/shared.img', '--as', 'block'], 'in-use', 'is attached');
    await daemon.json(['detach', 'depot/shared.img']);
    await refuses(['present', 'depot/kept.vdisk', '--as', 'block'], 'not-permitted', 'never written');
    // A machine with a disk that is attached is on, as far as anybody can tell.
    await daemon.json(['attach', 'golden/debian/root.img', '--read-only']);
    await refuses(['stage', 'golden/debian', 'depot/other.vdisk'], 'in-use', 'is open');
    await daemon.json(['detach', 'golden/debian/root.img']);
    await daemon.json(['rm', 'depot/shared.img']);
    await daemon.json(['rm', 'depot/kept.vdisk']);
    await expectNothingAttached();
  });

  /** Whether each is read and written past the cache of the host. */
  async function directIoOf(devices: readonly (string | null)[]): Promise<(boolean | undefined)[]> {
    const { loopdevices } = JSON.parse((await mustRun('losetup', ['--list', '--json', '--output', 'NAME,DIO'])).stdout) as { readonly loopdevices: readonly { readonly name: string; readonly dio: boolean }[] };
    return devices.map((device) => loopdevices.find(({ name }) => name === device)?.dio);
  }

  async function aDisk(name: string): Promise<string> {
    const file = join(makeTempDir(name, cleanup), 'disk.raw');
    await mustRun('truncate', ['--size=16M', file]);
    return file;
  }
});
