/**
 * The QEMU adapter against real QEMU: the conformance suite, with a guest on a clone of a real store; that machines outlive the daemon that started them,
 * killed as it may be; that QEMU opens what its machine's owner may open and nothing else; and that sockets and pid files that the owner has
 * put into the machine's directory lead nowhere.
 */
import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { chmodSync, chownSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { MachineToRegister } from '../../daemon/hypervisor/hypervisor.js';
import { askGuestAgent } from '../../daemon/hypervisor/qemu/guest-agent.js';
import { runtimePathsOf } from '../../daemon/hypervisor/qemu/machine-process.js';
import { createQemuHypervisor, type QemuCommandOf, type QemuOptions } from '../../daemon/hypervisor/qemu/qemu.js';
import { withQmp } from '../../daemon/hypervisor/qemu/qmp.js';
import { testHypervisor, type HypervisorTestBed } from '../support/hypervisor-conformance.js';
import { cloneGuest, emptyMachineFiles, GUEST_LISTENS_LINE, KERNEL_ARGUMENTS, MACHINE_OWNER, makeMachinesDir, readOrEmpty, type GuestFiles, type MachineFiles } from '../support/hypervisor-guest.js';
import { isAlive, processesNaming, signalProcess, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir, type Cleanup } from '../support/temp.js';
import { lacks } from '../support/tools.js';

interface Identity { readonly name: string; readonly uuid: string }
interface Description extends Identity { readonly disk: string; readonly kernel?: string; readonly initrd?: string; readonly console?: string }

const options = { signal: new AbortController().signal };

const commandOf: QemuCommandOf = (text, paths) => {
  const { name, uuid, disk, kernel, initrd, console } = JSON.parse(text) as Description;
  const isGuest = kernel !== undefined && initrd !== undefined;
  return {
    program: 'qemu-system-x86_64',
    arguments: [
      '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-name', name, '-uuid', uuid,
      // Which forbids it to make processes.
      '-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny',
      '-machine', 'pc', '-accel', 'tcg,thread=multi', '-smp', isGuest ? '2' : '1', '-m', isGuest ? '512' : '64',
      ...(isGuest ? ['-kernel', kernel, '-initrd', initrd, '-append', KERNEL_ARGUMENTS] : []),
      '-drive', `file=${disk.replaceAll(',', ',,')},if=virtio,format=raw,cache=none`,
      '-qmp', `unix:${paths.qmpSocket},server=on,wait=off`,
      ...(console === undefined ? [] : ['-chardev', `file,id=serial0,path=${console}`, '-serial', 'chardev:serial0']),
      '-device', 'virtio-serial-pci', '-chardev', `socket,id=agent0,path=${paths.agentSocket},server=on,wait=off`,
      '-device', 'virtserialport,chardev=agent0,name=org.qemu.guest_agent.0',
    ],
  };
};

interface QemuBed extends HypervisorTestBed {
  readonly options: QemuOptions;
  readonly machinesDir: string;
}

async function setUp(cleanup: Cleanup): Promise<QemuBed> {
  const machinesDir = makeMachinesDir(cleanup);
  const top = makeTempDir('qr', cleanup);
  chmodSync(top, 0o711);
  const qemuOptions: QemuOptions = { commandOf, registrationDir: join(top, 'reg'), runtimeDir: join(top, 'r') };
  cleanup.add(async () => {
    for (const pid of processesNaming(qemuOptions.runtimeDir)) {
      signalProcess(pid, 'SIGKILL');
      await waitUntilGone(pid, 20_000);
    }
  });
  const consoleLog = join(emptyMachineFiles(machinesDir, 'console').directory, 'console.log');
  let directories = 0;
  const toRegister = (identity: Identity, files: MachineFiles & Partial<GuestFiles>): MachineToRegister => ({
    ...identity, directory: files.directory, configuration: 'machine.json', owner: MACHINE_OWNER,
    text: JSON.stringify({ ...identity, disk: files.disk, ...(files.image === undefined ? {} : { kernel: files.image.kernel, initrd: files.image.initrd, console: consoleLog }) } satisfies Description),
  });
  const paths = (externalId: string) => runtimePathsOf(qemuOptions.runtimeDir, externalId);
  const call = (socketPath: string) => ({ socketPath, ownerUid: MACHINE_OWNER.uid, timeoutMs: 20_000, ...options });
  return {
    options: qemuOptions,
    machinesDir,
    hypervisor: createQemuHypervisor(qemuOptions),
    makeMachine(identity) {
      directories += 1;
      return toRegister(identity, emptyMachineFiles(machinesDir, `m${directories}`));
    },
    withoutHypervisor: () => createQemuHypervisor({
      ...qemuOptions, program: 'qemu-system-of-nobody', commandOf: (text, paths) => ({ ...commandOf(text, paths), program: 'qemu-system-of-nobody' }),
    }),
    crash: async (externalId) => { signalProcess(Number(readFileSync(paths(externalId).pidFile, 'utf8')), 'SIGKILL'); },
    pause: async (externalId) => { await withQmp(call(paths(externalId).qmpSocket), (qmp) => qmp.execute('stop')); },
    userOf: async (externalId) => statSync(`/proc/${readFileSync(paths(externalId).pidFile, 'utf8').trim()}`).uid,
    makeGuest: async (identity) => toRegister(identity, await cloneGuest(cleanup)),
    isGuestUp: async () => readOrEmpty(consoleLog).includes(GUEST_LISTENS_LINE),
    freezeState: (externalId) => askGuestAgent(call(paths(externalId).agentSocket), 'guest-fsfreeze-status'),
  };
}

const isMissing = lacks('/dev/fuse', 'qemu-system-x86_64', 'mmdebstrap', 'mke2fs', 'debugfs');

describe.skipIf(isMissing)('QEMU by itself', () => {
  testHypervisor({
    id: 'qemu',
    abilities: { formats: ['qemu'], shutdown: true, guestAgent: true, quiesce: true, isRemote: false },
    hooks: ['crash', 'pause', 'userOf', 'makeGuest'],
    setUp,
  });

  describe('without a daemon of its own', () => {
    const cleanup = createCleanup();
    let bed: QemuBed;
    beforeAll(async () => { bed = await setUp(cleanup); });
    afterAll(() => cleanup.run());

    const registered = async (name: string): Promise<string> => (await bed.hypervisor.register(bed.makeMachine({ name, uuid: randomUUID() }), options)).externalId;
    const stop = async (externalId: string): Promise<void> => { await bed.hypervisor.stop(externalId, { ...options, force: true, timeoutMs: 1000 }); };

    it('leaves nothing of a machine that was forgotten but its own files', async () => {
      const machine = bed.makeMachine({ name: 'gone', uuid: randomUUID() });
      const { externalId } = await bed.hypervisor.register(machine, options);
      await bed.hypervisor.start(externalId, options);
      await stop(externalId);
      await bed.hypervisor.unregister(externalId, options);
      expect(existsSync(bed.options.runtimeDir)).toBe(false);
      expect(readdirSync(bed.options.registrationDir, { recursive: true })).toEqual(['by-name']);
      expect(readdirSync(machine.directory)).toEqual(['disk.img']);
    });

    it('has machines that outlive the process that started them, killed as it is, and that the next finds', async () => {
      const externalId = await registered('outlives');
      const pidFile = runtimePathsOf(bed.options.runtimeDir, externalId).pidFile;
      // The adapter in a process of its own, which is killed with its whole group.
      const adapter = join(import.meta.dirname, '../../dist/daemon/hypervisor/qemu/qemu.js');
      const program = `
        import { createQemuHypervisor } from ${JSON.stringify(adapter)};
        const { command, ...options } = JSON.parse(process.argv[1]);
        const hypervisor = createQemuHypervisor({ ...options, commandOf: () => command });
        await hypervisor.start(${JSON.stringify(externalId)}, { signal: new AbortController().signal });
        process.stdout.write('started');
        setInterval(() => {}, 1000);`;
      const machine = JSON.parse(readFileSync(join(bed.options.registrationDir, `${externalId}.json`), 'utf8')) as MachineToRegister;
      const { registrationDir, runtimeDir } = bed.options;
      const given = JSON.stringify({ registrationDir, runtimeDir, command: commandOf(machine.text, { ...runtimePathsOf(runtimeDir, externalId), directory: machine.directory }) });
      const starter = spawn(process.execPath, ['--input-type=module', '-e', program, given], { stdio: ['ignore', 'pipe', 'inherit'], detached: true });
      const [said] = await once(starter.stdout, 'data') as [Buffer];
      expect(said.toString()).toBe('started');
      process.kill(-starter.pid!, 'SIGKILL');
      await once(starter, 'exit');

      const anew = createQemuHypervisor(bed.options);
      expect(await anew.status(externalId, options)).toBe('running');
      const pid = Number(readFileSync(pidFile, 'utf8'));
      await anew.stop(externalId, { ...options, force: true, timeoutMs: 1000 });
      expect(isAlive(pid)).toBe(false);
      expect(await anew.status(externalId, options)).toBe('shut-off');
      await anew.unregister(externalId, options);
    });

    it('tells an orderly end that nobody saw from a crash', async () => {
      const externalId = await registered('ends');
      await bed.hypervisor.start(externalId, options);
      const pid = Number(readFileSync(runtimePathsOf(bed.options.runtimeDir, externalId).pidFile, 'utf8'));
      // As a shutdown of the host does it.
      signalProcess(pid, 'SIGTERM');
      expect(await waitUntilGone(pid, 60_000)).toBe(true);
      expect(await bed.hypervisor.status(externalId, options)).toBe('shut-off');
      await bed.hypervisor.unregister(externalId, options);
    });

    it('opens what the machine\'s owner may open, and nothing that only root may', async () => {
      const machine = bed.makeMachine({ name: 'thief', uuid: randomUUID() });
      const foreign = join(machine.directory, 'foreign.img');
      writeFileSync(foreign, Buffer.alloc(4096), { mode: 0o600 });
      const { externalId } = await bed.hypervisor.register({ ...machine, text: JSON.stringify({ name: machine.name, uuid: machine.uuid, disk: foreign } satisfies Description) }, options);
      await expect(bed.hypervisor.start(externalId, options)).rejects.toMatchObject({ kind: 'permission-denied', message: expect.stringContaining('foreign.img') as string });
      expect(await bed.hypervisor.status(externalId, options)).toBe('shut-off');
      rmSync(foreign);
      await expect(bed.hypervisor.start(externalId, options)).rejects.toMatchObject({ kind: 'not-found' });
      await bed.hypervisor.unregister(externalId, options);
    });

    it('ends a machine that does not even answer its monitor', async () => {
      const externalId = await registered('deaf');
      await bed.hypervisor.start(externalId, options);
      const pid = Number(readFileSync(runtimePathsOf(bed.options.runtimeDir, externalId).pidFile, 'utf8'));
      signalProcess(pid, 'SIGSTOP');
      await stop(externalId);
      expect(isAlive(pid)).toBe(false);
      expect(await bed.hypervisor.status(externalId, options)).toBe('shut-off');
      await bed.hypervisor.unregister(externalId, options);
    });

    it('has machines in scopes of their own where systemd runs the host: the process is the machine\'s, of its user; what systemd-run refuses is said', async () => {
      // Stands for systemd-run, which needs systemd as the first process: notes what it is told, and becomes what it was given. setpriv and QEMU are real.
      const scopes = join(makeTempDir('scopes', cleanup), 'systemd-run');
      writeFileSync(scopes, `#!/bin/sh
        echo "$$ $@" >> ${scopes}.said
        if test -e ${scopes}.refuse; then echo 'Failed to start transient scope unit: no.' >&2; exit 1; fi
        while test "$1" != --; do shift; done; shift; exec "$@"\n`, { mode: 0o755 });
      const scoped = createQemuHypervisor({ ...bed.options, scopes });
      const { externalId } = await scoped.register(bed.makeMachine({ name: 'scoped', uuid: randomUUID() }), options);
      await scoped.start(externalId, options);
      const pid = Number(readFileSync(runtimePathsOf(bed.options.runtimeDir, externalId).pidFile, 'utf8'));
      const said = readFileSync(`${scopes}.said`, 'utf8');
      // The same process, from the one that we started on.
      expect(said).toMatch(new RegExp(`^${pid} --scope .*--slice=machine\\.slice --unit=offshoot-${externalId}-[0-9a-f]{8}\\.scope .*-- setpriv `, 'u'));
      const status = readFileSync(`/proc/${pid}/status`, 'utf8');
      expect(status).toMatch(/^Name:\tqemu-system/mu);
      expect(status).toMatch(new RegExp(`^Uid:(\\s${MACHINE_OWNER.uid}){4}\\nGid:(\\s${MACHINE_OWNER.gid}){4}$`, 'mu'));
      expect(status).toMatch(/^Groups:\s*$/mu);
      await scoped.stop(externalId, { ...options, force: true, timeoutMs: 1000 });
      writeFileSync(`${scopes}.refuse`, '');
      await expect(scoped.start(externalId, options)).rejects.toMatchObject({ message: expect.stringContaining('Failed to start transient scope unit') as string });
      expect(await scoped.status(externalId, options)).toBe('shut-off');
      await scoped.unregister(externalId, options);
    });

    it('believes neither pid file nor socket that the owner has put there', async () => {
      const [victim, attacker] = [await registered('victim'), await registered('attacker')];
      await bed.hypervisor.start(victim, options);
      const own = runtimePathsOf(bed.options.runtimeDir, attacker);
      const theirs = runtimePathsOf(bed.options.runtimeDir, victim);
      mkdirSync(own.directory, { mode: 0o700, recursive: true });
      // A process of the same user that is another machine, one of root's, a link, and what is no number.
      const victimPid = Number(readFileSync(theirs.pidFile, 'utf8'));
      const bystander = spawn('sleep', ['600'], { stdio: 'ignore' });
      cleanup.add(() => { bystander.kill('SIGKILL'); });
      for (const plant of [
        () => { writeFileSync(own.pidFile, String(victimPid)); },
        () => { writeFileSync(own.pidFile, String(bystander.pid)); },
        () => { symlinkSync(theirs.pidFile, own.pidFile); },
        () => { writeFileSync(own.pidFile, '-1'); },
      ]) {
        rmSync(own.pidFile, { force: true });
        plant();
        expect(await bed.hypervisor.status(attacker, options)).toBe('crashed');
        await stop(attacker);
      }
      expect([isAlive(victimPid), isAlive(bystander.pid!)]).toEqual([true, true]);
      chownSync(own.directory, MACHINE_OWNER.uid, MACHINE_OWNER.gid);
      expect(await bed.hypervisor.status(victim, options)).toBe('running');
      await stop(victim);
      for (const each of [victim, attacker]) await bed.hypervisor.unregister(each, options);
    });
  });
});
