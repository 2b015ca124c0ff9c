/**
 * Machines of QEMU by itself, end to end: the real daemon and its command line, real QEMU, a Debian guest that boots on a clone while the daemon is
 * killed and upgraded under it; what a machine may open, whose it is, and what is left of it when it is gone or was never made whole.
 */
import { closeSync, cpSync, copyFileSync, existsSync, mkdirSync, openSync, readFileSync, readdirSync, rmSync, statSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { createControlClient, type ControlClient } from '../../daemon/control/client.js';
import type { MachineInfo } from '../../daemon/control/machine-schemas.js';
import { askGuestAgent } from '../../daemon/hypervisor/qemu/guest-agent.js';
import { withQmp } from '../../daemon/hypervisor/qemu/qmp.js';
import { inScope, machineScope } from '../../daemon/programs/scope.js';
import { compilePrograms } from '../support/compiled-program.js';
import { startTestDaemon } from '../support/daemon.js';
import { GUEST_READY_LINE, guestImage } from '../support/guest-image.js';
import { GUEST_LISTENS_LINE, KERNEL_ARGUMENTS, listenToPowerButton, readOrEmpty } from '../support/hypervisor-guest.js';
import { command, mustRun } from '../support/model/command.js';
import { makeBuild } from '../support/other-build.js';
import { isAlive, processesNaming, waitUntil } from '../support/processes.js';
import { letAllRead, openFilesOf, readArguments, registrationsIn, smallMachine, startQemuMachines, USER, type QemuMachines } from '../support/qemu-machines.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const TIMEOUT_MS = 300_000;
const RESTART_MS = 60_000;
const EXIT = { invalidArgument: 2, inUse: 5, permissionDenied: 6, mountUnusable: 14 } as const;
const OTHER_BYTES_MAX = 64 * 1024 * 1024;
const FILES_MAX = 1000;

describe.skipIf(lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'debugfs', 'dumpe2fs', 'e2fsck'))('machines of QEMU by itself', () => {
  describe('a Debian machine', () => {
    const cleanup = createCleanup();
    let machines: QemuMachines;
    let a: MachineInfo;
    beforeAll(async () => {
      const image = await guestImage();
      const source = join(makeTempDir('debian', cleanup), 'debian');
      mkdirSync(source);
      await mustRun('cp', ['--sparse=always', image.disk, join(source, 'disk.img')]);
      await mustRun('chmod', ['0600', join(source, 'disk.img')]);
      await listenToPowerButton(join(source, 'disk.img'), cleanup);
      copyFileSync(image.kernel, join(source, 'vmlinuz'));
      copyFileSync(image.initrd, join(source, 'initrd'));
      writeFileSync(join(source, 'machine.json'), JSON.stringify({
        format: 'offshoot-machine/1', name: 'debian', accelerator: 'tcg', cpu: 'qemu64', processors: 2, memory: '512MiB', disks: [{ file: 'disk.img' }],
        networkInterfaces: [{ backend: { type: 'user', restrict: true } }], kernel: 'vmlinuz', initrd: 'initrd', append: KERNEL_ARGUMENTS,
        consoleLog: 'console.log', guestAgent: true, annotations: { madeBy: 'a test' },
      }, null, 4));
      machines = await startQemuMachines(cleanup);
      const { daemon } = machines;
      await daemon.json(['vm', 'import', source, 'golden/debian']);
      letAllRead(daemon.path('golden/debian'));
      const made = await daemon.json<{ readonly machines: readonly MachineInfo[] }>(['vm', 'clone', 'golden/debian', 'lab/a', 'lab/b', '--register', '--as', USER.name]);
      a = made.machines[0]!;
    }, TIMEOUT_MS);
    afterAll(() => cleanup.run(), TIMEOUT_MS);

    it('runs as its owner, with its own disk and nothing else of the store, and is who it was cloned to be', async () => {
      const { daemon, vm, pidOf, paths, call } = machines;
      const b = await vm('show', 'lab/b');
      expect(new Set([a.name, b.name, 'debian']).size).toBe(3);
      expect(new Set([a.uuid, b.uuid, ...a.macs, ...b.macs]).size).toBe(4);
      expect(await vm('start', 'lab/a')).toMatchObject({ power: 'running', hypervisor: 'qemu', registration: 'registered' });
      expect(await vm('start', 'lab/b')).toMatchObject({ power: 'running' });
      for (const info of [a, b]) {
        const pid = pidOf(info);
        const status = readFileSync(`/proc/${pid}/status`, 'utf8');
        expect(status).toMatch(new RegExp(`^Uid:(\\s${USER.uid}){4}\\nGid:(\\s${USER.gid}){4}$`, 'mu'));
        expect(status).toMatch(/^Groups:\s*$/mu);
        expect(status).toMatch(/^CapEff:\s0+$/mu);
        expect(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8')).toBe('0\n');
        const own = daemon.path(info.path);
        const open = openFilesOf(pid);
        // Its kernel and initrd were read at the start.
        expect(open.filter((name) => name.startsWith(daemon.mountDir))).toEqual([join(own, 'console.log'), join(own, 'disk.img')]);
        expect(open.filter((name) => name.startsWith(daemon.storeDir) || name === '/dev/fuse')).toEqual([]);
        expect(statSync(join(own, 'console.log')).uid).toBe(USER.uid);
        await withQmp(call(paths(info).qmpSocket), async (qmp) => {
          expect(await qmp.execute('query-uuid')).toEqual({ UUID: info.uuid });
          expect(await qmp.execute('query-name')).toEqual({ name: info.name });
        });
      }
      expect(await vm('stop', 'lab/b', '--force')).toMatchObject({ power: 'shut-off' });
    }, TIMEOUT_MS);

    it('boots to multi-user over a kill of the server and an upgrade; the daemon that should stop meanwhile says whose disk is open', async () => {
      const { daemon, vm, pidOf, paths, call } = machines;
      const pid = pidOf(a);
      await daemon.waitForServer(await daemon.killServer(), RESTART_MS);
      expect(await vm('status', 'lab/a')).toMatchObject({ power: 'running', registration: 'registered' });
      const { cliEntry } = makeBuild('9.6.0', cleanup);
      const upgrade = await command(process.execPath, [cliEntry, 'daemon', 'upgrade', '--json', '--socket', daemon.socketPath], { timeoutMs: TIMEOUT_MS });
      expect(upgrade).toMatchObject({ code: 0 });
      expect(await vm('status', 'lab/a')).toMatchObject({ power: 'running' });
      const refused = await daemon.cli(['daemon', 'stop']);
      expect([refused.code === 0, refused.stderr]).toEqual([false, expect.stringContaining(`machine '${a.name ?? ''}' (qemu-system-x86, pid ${pid})`)]);

      const console = (): string => readOrEmpty(daemon.path('lab/a/console.log'));
      expect(await waitUntil(() => console().includes(GUEST_READY_LINE) && console().includes(GUEST_LISTENS_LINE), TIMEOUT_MS)).toBe(true);
      const agent = call(paths(a).agentSocket);
      await askGuestAgent(agent, 'guest-ping');
      const interfaces = await askGuestAgent(agent, 'guest-network-get-interfaces') as readonly { readonly 'hardware-address'?: string }[];
      expect(interfaces.map((each) => each['hardware-address'])).toContain(a.macs[0]);
      expect(pidOf(a)).toBe(pid);
    }, 2 * TIMEOUT_MS);

    it('would outlive the service that started it: a real systemd, that of the guest, leaves its scope alone when the service is stopped', async () => {
      const unit = readFileSync(join(import.meta.dirname, '../../scripts/host/offshoot.service'), 'utf8').split('\n');
      const settings = unit.filter((line) => /^(?:KillMode|CapabilityBoundingSet|NoNewPrivileges)=/u.test(line));
      expect(settings).toHaveLength(3);
      const { program, arguments: args } = inScope('systemd-run', { program: 'sleep', arguments: ['1000'], user: USER }, machineScope({ name: 'a b', uuid: '5' }), 'offshoot-test.service');
      const quoted = (words: readonly string[]): string => words.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(' ');
      const script = `
        printf '%s\\n' "sleep 1002 & echo \\$! > /run/plain" ${quoted([`${quoted([program, ...args])} &`])} 'exec sleep 1001' > /run/service
        systemd-run --quiet --unit=offshoot-test ${quoted(settings.map((line) => `--property=${line}`))} -- sh /run/service || exit 1
        pid=''; i=0
        until test -n "$pid" && grep -q sleep "/proc/$pid/comm"; do
          i=$((i + 1)); test "$i" -lt 300 || { systemctl status offshoot-test; exit 1; }; sleep 0.2
          pid=$(cat /sys/fs/cgroup/machine.slice/offshoot-5-*.scope/cgroup.procs 2>/dev/null | head -n 1)
        done
        grep -E '^(Uid|Gid|Groups):' "/proc/$pid/status" | tr -s '\\t ' ' '
        systemctl show -p After 'offshoot-5-*.scope' | grep -o offshoot-test.service
        test -d "/proc/$(cat /run/plain)" && echo both live
        systemctl stop offshoot-test
        test -d "/proc/$(cat /run/plain)" || test ! -d "/proc/$pid" || echo the machine alone lives
        kill "$pid"`;
      const { stdout, stderr } = await inGuest(machines.call(machines.paths(a).agentSocket), script);
      expect([stdout.trim().split('\n').map((line) => line.trim()), stderr]).toEqual([[
        `Uid:${` ${USER.uid}`.repeat(4)}`, `Gid:${` ${USER.gid}`.repeat(4)}`, 'Groups:', 'offshoot-test.service', 'both live', 'the machine alone lives',
      ], '']);
    }, TIMEOUT_MS);

    it('shuts down by asking, in order and with a clean file system; then the daemon stops, and knows it again when it starts', async () => {
      const { daemon, vm, pidOf } = machines;
      const pid = pidOf(a);
      expect((await daemon.cli(['vm', 'unregister', 'lab/a'])).code).toBe(EXIT.inUse);
      expect((await daemon.cli(['vm', 'rm', 'lab/a'])).code).toBe(EXIT.inUse);
      expect(JSON.parse((await daemon.cli(['vm', 'stop', 'lab/a', '--timeout', '240', '--json'], { timeoutMs: TIMEOUT_MS })).stdout)).toMatchObject({ power: 'shut-off' });
      expect(isAlive(pid)).toBe(false);
      const disk = daemon.path('lab/a/disk.img');
      const { stdout } = await command('dumpe2fs', ['-h', disk], { timeoutMs: TIMEOUT_MS });
      expect(stdout).toMatch(/^Filesystem state:\s+clean$/mu);
      expect(stdout).not.toContain('needs_recovery');
      expect(await command('e2fsck', ['-f', '-n', disk], { timeoutMs: TIMEOUT_MS })).toMatchObject({ code: 0 });
      await daemon.stop();
      await daemon.start();
      for (const each of ['a', 'b']) expect(await vm('status', `lab/${each}`)).toMatchObject({ power: 'shut-off', registration: 'registered' });
      await daemon.json(['vm', 'rm', 'lab/a']);
      await daemon.json(['vm', 'rm', 'lab/b']);
      expect([machines.registrations(), existsSync(machines.runtimeDir), readdirSync(daemon.path('lab'))]).toEqual([[], false, []]);
      await daemon.stop();
    }, TIMEOUT_MS);
  });

  describe('small machines', () => {
    const cleanup = createCleanup();
    let machines: QemuMachines;
    beforeAll(async () => {
      machines = await startQemuMachines(cleanup);
      await machines.daemon.json(['vm', 'import', smallMachine(cleanup), 'golden/small']);
      letAllRead(machines.daemon.path('golden/small'));
    }, TIMEOUT_MS);
    afterAll(() => cleanup.run(), TIMEOUT_MS);

    const clone = async (...names: readonly string[]): Promise<readonly MachineInfo[]> =>
      (await machines.daemon.json<{ readonly machines: readonly MachineInfo[] }>(['vm', 'clone', 'golden/small', ...names, '--register', '--as', USER.name])).machines;

    it.each<readonly [string, number, string, (directory: string) => void]>([
      ['a disk outside of the directory', EXIT.permissionDenied, '--allow /etc/shadow', (directory) => { describeDisk(directory, '/etc/shadow'); }],
      ['a disk outside of the directory by ..', EXIT.permissionDenied, '--allow ../../shadow', (directory) => { describeDisk(directory, '../../shadow'); }],
      ['a kernel outside of the directory', EXIT.permissionDenied, '--allow /boot/vmlinuz', (directory) => { writeMachine(directory, { kernel: '/boot/vmlinuz' }); }],
      ['a file that is too large beside the disks', EXIT.invalidArgument, 'initrd', (directory) => { writeFileSync(join(directory, 'initrd'), ''); truncateSync(join(directory, 'initrd'), OTHER_BYTES_MAX + 1); }],
      ['too many files', EXIT.invalidArgument, `more than ${FILES_MAX} files`, (directory) => { for (let i = 0; i < FILES_MAX; i += 1) writeFileSync(join(directory, `f${i}`), ''); }],
      ['a symbolic link in the place of a disk', EXIT.invalidArgument, 'symbolic link', (directory) => { rmSync(join(directory, 'disk.img')); symlinkSync('/etc/shadow', join(directory, 'disk.img')); }],
    ])('are not imported with %s', async (_what, code, says, spoil) => {
      const directory = smallMachine(cleanup);
      spoil(directory);
      const refused = await machines.daemon.cli(['vm', 'import', directory, 'lab/refused']);
      expect(refused).toMatchObject({ code, stderr: expect.stringContaining(says) as string });
      expect(readdirSync(machines.daemon.path('lab'))).toEqual([]);
    }, TIMEOUT_MS);

    it.each<readonly [string, (daemon: QemuMachines['daemon']) => string]>([
      ["another's disk", (daemon) => daemon.path('golden/small/disk.img')],
      ['a file of root', () => '/etc/shadow'],
    ])('whose disk leads to %s do not start', async (_what, fileOf) => {
      const { daemon, vm, runtimeDir } = machines;
      await clone('lab/thief');
      const file = fileOf(daemon);
      expect(await daemon.cli(['vm', 'set', 'lab/thief', `disks.0.file=${file}`])).toMatchObject({ code: EXIT.invalidArgument, stderr: expect.stringContaining('outside') as string });
      // Its owner may write what he likes into his own file, and is not registered with it.
      await vm('unregister', 'lab/thief');
      describeDisk(daemon.path('lab/thief'), file);
      expect(await daemon.cli(['vm', 'register', 'lab/thief'])).toMatchObject({ code: EXIT.invalidArgument, stderr: expect.stringContaining('outside') as string });
      const disk = daemon.path('lab/thief/disk.img');
      describeDisk(daemon.path('lab/thief'), disk);
      const { externalId } = await vm('register', 'lab/thief');
      // What lies where his disk was when it was registered, he can exchange; QEMU opens only what he may.
      rmSync(disk);
      symlinkSync(file, disk);
      expect(await daemon.cli(['vm', 'start', 'lab/thief'])).toMatchObject({ code: EXIT.permissionDenied, stderr: expect.stringMatching(new RegExp(`'${disk}'.*: Permission denied`, 'u')) as string });
      expect(await vm('status', 'lab/thief')).toMatchObject({ power: 'shut-off' });
      expect(processesNaming(join(runtimeDir, externalId ?? 'none'))).toEqual([]);
      await daemon.json(['vm', 'rm', 'lab/thief']);
    }, TIMEOUT_MS);

    it('outlive the whole daemon, which then finds them; their run-time directory goes with the last of them, and not before', async () => {
      const { daemon, vm, pidOf, runtimeDir } = machines;
      const [one, two] = await clone('lab/one', 'lab/two');
      await vm('start', 'lab/one');
      await vm('start', 'lab/two');
      await vm('stop', 'lab/two', '--force');
      await daemon.json(['vm', 'rm', 'lab/two']);
      expect(readdirSync(runtimeDir)).toEqual([one!.externalId]);
      expect(machines.registrations().join()).not.toContain(two!.uuid);
      const pid = pidOf(one!);
      await machines.killDaemon();
      expect(isAlive(pid)).toBe(true);

      // Its disk is lost; the next daemon must say who is in the way.
      const refused = await daemon.cli(['daemon', 'start', '--store', daemon.storeDir, '--mount', daemon.mountDir]);
      expect(refused).toMatchObject({ code: EXIT.mountUnusable, stderr: expect.stringContaining(`machine '${one!.name ?? ''}' (qemu-system-x86, pid ${pid})`) as string });
      await mustRun('umount', ['-l', daemon.mountDir]);
      await daemon.start();
      expect(await vm('status', 'lab/one')).toMatchObject({ power: 'running' });
      expect((await daemon.cli(['vm', 'rm', 'lab/one'])).code).toBe(EXIT.inUse);
      expect(await vm('stop', 'lab/one', '--force')).toMatchObject({ power: 'shut-off' });
      expect(isAlive(pid)).toBe(false);
      await vm('start', 'lab/one');
      const again = pidOf(one!);
      expect(readArguments(again)).toContain(one!.name === null ? '' : `guest=${one!.name},debug-threads=on`);
      expect(openFilesOf(again)).toContain(daemon.path('lab/one/disk.img'));
      await daemon.json(['vm', 'rm', 'lab/one', '--force']);
      expect([isAlive(again), existsSync(runtimeDir), machines.registrations(), readdirSync(daemon.path('lab'))]).toEqual([false, false, [], []]);
    }, TIMEOUT_MS);

    it('are not even forgotten when somebody else has a file of them open', async () => {
      const { daemon, vm } = machines;
      await clone('lab/open');
      const fd = openSync(daemon.path('lab/open/disk.img'), 'r');
      try {
        expect(await daemon.cli(['vm', 'rm', 'lab/open', '--force'])).toMatchObject({ code: EXIT.inUse, stderr: expect.stringContaining('lab/open/disk.img is open') as string });
        expect(await vm('status', 'lab/open')).toMatchObject({ registration: 'registered' });
      } finally {
        closeSync(fd);
      }
      await daemon.json(['vm', 'rm', 'lab/open']);
    }, TIMEOUT_MS);

    it('come along with a copy of the store, off; the check knows what is kept of them', async () => {
      const { daemon, vm } = machines;
      await clone('lab/kept');
      await vm('start', 'lab/kept');
      expect(await daemon.json(['check'])).toMatchObject({ verdict: 'clean', findings: [] });
      await vm('stop', 'lab/kept', '--force');
      await daemon.stop();
      const copy = join(makeTempDir('copy', cleanup), 'store');
      cpSync(daemon.storeDir, copy, { recursive: true, verbatimSymlinks: true });
      const other = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: copy });
      expect(await other.json(['vm', 'status', 'lab/kept'])).toMatchObject({ power: 'shut-off', registration: 'registered' });
      await other.json(['vm', 'rm', 'lab/kept']);
      await other.stop();
      expect(registrationsIn(copy)).toEqual([]);
      expect(await daemon.json(['check', '--store', copy])).toMatchObject({ verdict: 'clean', findings: [] });
      await daemon.start();
      await vm('start', 'lab/kept');
      await daemon.json(['vm', 'rm', 'lab/kept', '--force']);
    }, TIMEOUT_MS);
  });

  describe('small machines whose server is killed', () => {
    const PROGRAM = 'test/support/registration-steps-program.ts';
    const cleanup = createCleanup();
    const programs = compilePrograms('machines-qemu', [PROGRAM]);
    let machines: QemuMachines;
    let seat: string;
    beforeAll(async () => {
      seat = makeTempDir('steps', cleanup);
      const storeDir = join(makeTempDir('store', cleanup), 'store');
      machines = await startQemuMachines(cleanup, {
        storeDir, environment: { NODE_OPTIONS: `--import=file://${programs.pathOf(PROGRAM)}`, OFFSHOOT_TEST_WATCHED: join(storeDir, 'qemu'), OFFSHOOT_TEST_STEPS: seat },
      });
      await machines.daemon.json(['vm', 'import', smallMachine(cleanup), 'golden/small']);
    }, TIMEOUT_MS);
    afterAll(async () => {
      await cleanup.run();
      programs.remove();
    }, TIMEOUT_MS);

    const order = (kill: string): void => {
      rmSync(join(seat, 'steps'), { force: true });
      writeFileSync(join(seat, 'kill'), kill);
    };
    const steps = (): string[] => readOrEmpty(join(seat, 'steps')).split('\n').slice(0, -1);
    // By the API: commands would take most of the time.
    const client = (): ControlClient => createControlClient({ socketPath: machines.daemon.socketPath, patienceMs: RESTART_MS });
    const isIdle = async (): Promise<boolean> => (await client().jobs('running')).length === 0;

    /** The steps of what `body` does when it is left alone, and then `body` killed before each of them and after the last. */
    async function atEachStep(body: () => Promise<boolean>, undo: () => Promise<void>, afterKill: () => Promise<void>): Promise<void> {
      order('');
      expect(await body()).toBe(true);
      const all = steps();
      expect(all).toContain('fsyncSync');
      await undo();
      for (let at = 1; at <= all.length + 1; at += 1) {
        const { serverPid } = await client().status();
        order(at <= all.length ? `before ${at}` : `after ${all.length}`);
        const asked = body();
        expect(await waitUntil(() => !isAlive(serverPid), RESTART_MS)).toBe(true);
        order('');
        expect(await asked, `${at} of ${all.join(', ')}`).toBe(false);
        expect(await waitUntil(isIdle, RESTART_MS)).toBe(true);
        await afterKill();
      }
    }

    const expectNothing = async (): Promise<void> => {
      expect(machines.registrations()).toEqual([]);
      expect((await client().machines.list({})).map(({ path }) => path)).toEqual(['golden/small']);
      expect(readdirSync(machines.daemon.path('lab'))).toEqual([]);
      expect(existsSync(machines.runtimeDir)).toBe(false);
    };
    const clone = async (): Promise<boolean> => await didIt(async () => {
      const { id } = await client().machines.clone({ source: 'golden/small', targets: ['lab/x'], register: true });
      await waitUntil(async () => (await client().job(id)).state !== 'running', RESTART_MS);
      expect((await client().job(id)).state).toBe('completed');
    });
    const remove = async (): Promise<boolean> => await didIt(async () => { await client().machines.remove('lab/x', { force: false }); });

    it('while the adapter notes a clone leave nothing', async () => {
      await atEachStep(clone, async () => { expect(await remove()).toBe(true); }, expectNothing);
      expect(await machines.daemon.json(['check'])).toMatchObject({ verdict: 'clean', findings: [] });
    }, 2 * TIMEOUT_MS);

    it('while the adapter forgets one are removed by the next attempt, with nothing left', async () => {
      await clone();
      await atEachStep(remove, async () => { expect(await clone()).toBe(true); }, async () => {
        expect(await remove()).toBe(true);
        await expectNothing();
        expect(await clone()).toBe(true);
      });
      await remove();
      await expectNothing();
    }, 2 * TIMEOUT_MS);
  });
});

async function inGuest(agent: Parameters<typeof askGuestAgent>[0], script: string): Promise<{ readonly stdout: string; readonly stderr: string }> {
  const { pid } = await askGuestAgent(agent, 'guest-exec', { path: '/bin/sh', arg: ['-c', script], 'capture-output': true }) as { readonly pid: number };
  let seen: { readonly exited: boolean; readonly 'out-data'?: string; readonly 'err-data'?: string } = { exited: false };
  await waitUntil(async () => {
    seen = await askGuestAgent(agent, 'guest-exec-status', { pid }) as typeof seen;
    return seen.exited;
  }, TIMEOUT_MS);
  const text = (data = ''): string => Buffer.from(data, 'base64').toString();
  return { stdout: text(seen['out-data']), stderr: text(seen['err-data']) };
}

async function didIt(body: () => Promise<void>): Promise<boolean> {
  try {
    await body();
    return true;
  } catch {
    return false;
  }
}

function describeDisk(directory: string, file: string): void {
  writeMachine(directory, { disks: [{ file }] });
}

function writeMachine(directory: string, changes: object): void {
  const path = join(directory, 'machine.json');
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')) as object, ...changes }, null, 2));
}
