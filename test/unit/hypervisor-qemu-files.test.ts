/** What the QEMU adapter keeps in files, after deaths between two steps too; and programs that run too long, say too much, or are told to end. */
import { existsSync, readFileSync, readdirSync, rmSync, statSync, unlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { runChild } from '../../daemon/programs/child.js';
import type { MachineToRegister } from '../../daemon/hypervisor/hypervisor.js';
import { clearRuntime, leaveRuntime, prepareRuntime, processState, runtimePathsOf } from '../../daemon/hypervisor/qemu/machine-process.js';
import { startError } from '../../daemon/hypervisor/qemu/qemu.js';
import { Registrations } from '../../daemon/hypervisor/qemu/registrations.js';
import { inScope, machineScope, ownService } from '../../daemon/programs/scope.js';
import { isAlive, waitUntil } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const cleanup = createCleanup();
afterEach(() => cleanup.run());

const OWNER = { uid: process.geteuid!(), gid: process.getegid!() };
const uuidOf = (n: number): string => `00000000-0000-4000-8000-${String(n).padStart(12, '0')}`;
const machine = (n: number, name: string): MachineToRegister => ({
  name, uuid: uuidOf(n), directory: `/m/${n}`, configuration: 'machine.json', text: '{"disk": "a"}', owner: OWNER,
});

describe('registrations', () => {
  let directory: string;
  let registrations: Registrations;
  beforeEach(() => {
    directory = join(makeTempDir('reg', cleanup), 'r');
    registrations = new Registrations(directory);
  });

  it('are found again by another one, whole, and replaced by the same machine only', () => {
    expect(registrations.find(uuidOf(1))).toBeNull();
    expect(registrations.add(machine(1, 'a'))).toBe(uuidOf(1));
    expect(new Registrations(directory).find(uuidOf(1))).toEqual(machine(1, 'a'));
    const changed = { ...machine(1, 'a'), text: '{"disk": "b"}' };
    expect(registrations.add(changed)).toBe(uuidOf(1));
    expect(registrations.find(uuidOf(1))).toEqual(changed);
    for (const other of [machine(2, 'a'), machine(1, 'b'), { ...machine(1, 'a'), directory: '/m/9' }]) {
      expect(() => registrations.add(other)).toThrow(expect.objectContaining({ kind: 'already-exists' }));
    }
    expect(registrations.find(uuidOf(2))).toBeNull();
    expect(registrations.find(uuidOf(1))).toEqual(changed);
    registrations.remove(changed);
    registrations.remove(changed);
    expect(readdirSync(directory, { recursive: true })).toEqual(['by-name']);
  });

  it('take a name over whose machine was never written, or is no more', () => {
    registrations.add(machine(1, 'a'));
    // A death between the two steps, of registering as of forgetting.
    rmSync(join(directory, `${uuidOf(1)}.json`));
    registrations.add(machine(2, 'a'));
    expect(registrations.find(uuidOf(2))?.name).toBe('a');
    // Whoever comes late takes away no name that is another's.
    registrations.remove(machine(1, 'a'));
    expect(() => registrations.add(machine(3, 'a'))).toThrow(expect.objectContaining({ kind: 'already-exists' }));
  });

  it('are forgotten without a trace also after a death in the middle of that', () => {
    registrations.add(machine(1, 'a'));
    const [link] = readdirSync(join(directory, 'by-name'));
    unlinkSync(join(directory, 'by-name', link!));
    writeFileSync(join(directory, `${uuidOf(1)}.json.new`), '{');
    registrations.remove(machine(1, 'a'));
    expect(readdirSync(directory, { recursive: true })).toEqual(['by-name']);
  });

  it('go on after a death in the middle of a file, and refuse what is damaged or of another version', () => {
    registrations.add(machine(1, 'a'));
    const file = join(directory, `${uuidOf(1)}.json`);
    writeFileSync(`${file}.new`, '{"version"');
    registrations.add(machine(1, 'a'));
    expect(existsSync(`${file}.new`)).toBe(false);
    const text = readFileSync(file, 'utf8');
    writeFileSync(file, text.slice(0, 30));
    expect(() => registrations.find(uuidOf(1))).toThrow(expect.objectContaining({ kind: 'store-damaged' }));
    writeFileSync(file, text.replace('"version": 1', '"version": 2'));
    expect(() => registrations.find(uuidOf(1))).toThrow(expect.objectContaining({ kind: 'store-version' }));
  });

  it('know no ids but UUIDs, so that no id is a path', () => {
    for (const id of ['../../etc/passwd', '', 'a', uuidOf(1).toUpperCase().replace('4', 'A')]) {
      expect(() => registrations.find(id)).toThrow(expect.objectContaining({ kind: 'invalid-argument' }));
    }
  });
});

describe('a machine\'s run-time directory', () => {
  it('tells off from crashed by the pid file, and is taken away without what is not its own', async () => {
    const base = join(makeTempDir('run', cleanup), 'r');
    const paths = runtimePathsOf(base, uuidOf(1));
    expect(await processState(paths, OWNER)).toEqual({ kind: 'off' });
    prepareRuntime(base, paths, OWNER);
    prepareRuntime(base, paths, OWNER);
    expect(await processState(paths, OWNER)).toEqual({ kind: 'off' });
    // This process is alive and of this user, and was not started with that file.
    writeFileSync(paths.pidFile, `${process.pid}\n`);
    expect(await processState(paths, OWNER)).toEqual({ kind: 'crashed' });
    writeFileSync(join(paths.directory, 'kept'), '');
    clearRuntime(paths);
    expect(readdirSync(paths.directory)).toEqual(['kept']);
    // That of all machines goes with the last of them.
    leaveRuntime(base);
    expect(readdirSync(base)).toEqual([uuidOf(1)]);
    rmSync(join(paths.directory, 'kept'));
    clearRuntime(paths);
    leaveRuntime(base);
    leaveRuntime(base);
    expect(existsSync(base)).toBe(false);
  });

  it('is open to its owner and to nobody else, whatever the umask is; the one of all machines is passable', () => {
    const base = join(makeTempDir('run', cleanup), 'r');
    const paths = runtimePathsOf(base, uuidOf(1));
    // As the daemon's.
    const before = process.umask(0o077);
    try {
      prepareRuntime(base, paths, OWNER);
    } finally {
      process.umask(before);
    }
    expect([base, paths.directory].map((path) => statSync(path).mode & 0o777)).toEqual([0o711, 0o700]);
  });

  it('refuses a place whose sockets the kernel would not take', () => {
    const base = join(makeTempDir('run', cleanup), 'r'.repeat(80));
    expect(() => { prepareRuntime(base, runtimePathsOf(base, uuidOf(1)), OWNER); }).toThrow(expect.objectContaining({ kind: 'name-too-long' }));
  });
});

describe('what QEMU says when it does not start', () => {
  it.each([
    ['qemu-system-x86_64: -drive file=/m/a: Could not open \'/m/a\': Permission denied', 'permission-denied'],
    ['qemu-system-x86_64: -drive file=/m/a: Could not open \'/m/a\': No such file or directory', 'not-found'],
    ['qemu-system-x86_64: -device virtio-blk: Failed to get "write" lock\nIs another process using the image [/m/a]?', 'in-use'],
    ['qemu-system-x86_64: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable', 'in-use'],
    ['qemu-system-x86_64: cannot set up guest memory \'pc.ram\': Cannot allocate memory', 'no-space'],
    ['qemu-system-x86_64: -nonsense: invalid option', 'invalid-argument'],
  ] as const)('%s', (stderr, kind) => {
    expect(startError({ name: 'a', owner: OWNER }, `warning: of no interest\n${stderr}\n`, null)).toMatchObject({ kind, message: expect.stringContaining(stderr.split('\n').at(-1)!) as string });
  });

  it('keeps what QEMU said before a signal ended it, and says what to do where it was KVM', () => {
    const machine = { name: 'a', owner: OWNER };
    const assertion = "qemu-system-x86_64: ../../target/i386/kvm/kvm.c:3183: kvm_buf_set_msrs: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed.";
    const error = startError(machine, `qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\n${assertion}\n`, 'SIGABRT');
    expect(error).toMatchObject({ kind: 'not-supported', message: expect.stringMatching(/Assertion .* failed\.; ended by SIGABRT; .*"accelerator": "tcg"/u) as string });
    expect(startError(machine, '', 'SIGKILL')).toMatchObject({ kind: 'io-error', message: "QEMU did not start machine 'a': ended by SIGKILL" });
  });
});

describe('a program', () => {
  const call = { signal: new AbortController().signal, timeoutMs: 20_000 };

  it('is given its arguments as they are, its input, and nothing of our environment', async () => {
    expect(await runChild('printf', ['%s|', '$HOME', '`id`', 'a b'], call)).toEqual({ code: 0, endedBy: null, stdout: '$HOME|`id`|a b|', stderr: '' });
    expect((await runChild('cat', ['/dev/stdin'], { ...call, input: 'é\n' })).stdout).toBe('é\n');
    process.env['SECRET_OF_THE_DAEMON'] = 'x';
    const { stdout } = await runChild('env', [], call);
    delete process.env['SECRET_OF_THE_DAEMON'];
    expect(stdout).toContain('LC_ALL=C\n');
    expect(stdout).not.toContain('SECRET');
    expect((await runChild('pwd', [], call)).stdout).toBe('/\n');
  });

  it('that is missing, too slow or too loud is an error, and what it started ends with it', async () => {
    await expect(runChild('no-such-program-anywhere', [], call)).rejects.toMatchObject({ kind: 'tool-missing' });
    await expect(runChild('cat', ['/dev/zero'], call)).rejects.toMatchObject({ kind: 'too-large' });
    const file = join(makeTempDir('child', cleanup), 'pid');
    await expect(runChild('sh', ['-c', 'sleep 600 & echo $! > "$0"; wait', file], { ...call, timeoutMs: 1_000 })).rejects.toMatchObject({ kind: 'timed-out' });
    const grandchild = Number(readFileSync(file, 'utf8'));
    expect(await waitUntil(() => !isAlive(grandchild), 20_000)).toBe(true);
  });

  it('is ended by a signal, and not begun after one', async () => {
    const controller = new AbortController();
    setTimeout(() => { controller.abort(); }, 100);
    await expect(runChild('sleep', ['600'], { ...call, signal: controller.signal })).rejects.toMatchObject({ kind: 'cancelled' });
    await expect(runChild('sleep', ['600'], { ...call, signal: controller.signal })).rejects.toMatchObject({ kind: 'cancelled' });
  });
});

describe('a scope of systemd', () => {
  const bare = { program: 'qemu-system-x86_64', arguments: ['-name', 'a b'] };

  it('holds the machine and nothing else, as its user, ordered after our service', () => {
    const { program, arguments: args, user } = inScope('/usr/bin/systemd-run', { ...bare, user: { uid: 5, gid: 6 } }, machineScope(machine(1, 'a b')), 'offshoot.service');
    expect([program, user]).toEqual(['/usr/bin/systemd-run', undefined]);
    expect(args).toContain('--scope');
    expect(args).toContain('--description=Machine a b of Offshoot');
    expect(args).toContain('--property=After=offshoot.service');
    expect(args.slice(args.indexOf('--'))).toEqual(['--', 'setpriv', '--reuid=5', '--regid=6', '--clear-groups', '--', 'qemu-system-x86_64', '-name', 'a b']);
    const asRoot = inScope('systemd-run', bare, machineScope(machine(1, 'a b')), null).arguments;
    expect(asRoot.slice(asRoot.indexOf('--'))).toEqual(['--', 'qemu-system-x86_64', '-name', 'a b']);
    expect(asRoot.join(' ')).not.toContain('After=');
    // An ended one may be there for a moment.
    const unitOf = (list: readonly string[]): string | undefined => list.find((each) => each.startsWith('--unit='));
    expect(unitOf(args)).not.toBe(unitOf(asRoot));
  });

  it.each([
    ['0::/system.slice/offshoot.service\n', 'offshoot.service'],
    ['12:cpu:/a.service\n0::/system.slice/system-offshoot.slice/offshoot@lab.service/inner\n', 'offshoot@lab.service'],
    ['0::/user.slice/user-0.slice/session-3.scope\n', null],
    ['0::/system.slice/x.service --y/evil service\n', null],
    ['', null],
  ])('is ordered after the service of %j', (text, service) => { expect(ownService(text)).toBe(service); });
});
