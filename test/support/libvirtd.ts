/**
 * A libvirtd of the system's kind for a test, that is nobody else's: it runs in a mount namespace in which the directories of a host's libvirt are
 * the test's own, with a socket of its own, and without cgroups, networks or a log daemon. A host's libvirtd is neither asked nor seen.
 *
 * Ended for certain: its machines are killed by the pid files that it wrote, then itself.
 */
import { spawn } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, openSync, readFileSync, readdirSync, writeFileSync, closeSync } from 'node:fs';
import { join } from 'node:path';

import { command, mustRun, type CommandResult } from './model/command.js';
import { isAlive, signalProcess, waitUntil, waitUntilGone } from './processes.js';
import { makeTempDir, type Cleanup } from './temp.js';

export interface TestLibvirtd {
  readonly uri: string;
  virsh(args: readonly string[]): Promise<CommandResult>;
  /** Of a running machine. */
  pidOf(name: string): number;
  /** Names of the machines that are defined, as they lie on disk: whatever libvirtd is doing. */
  definitions(): string[];
  /** It answers nobody from now on, until `goOn`, and keeps its connections. */
  hold(): void;
  goOn(): void;
  /** Ends libvirtd; its machines run on. */
  stop(): Promise<void>;
  start(): Promise<void>;
}

const START_TIMEOUT_MS = 60_000;
const END_TIMEOUT_MS = 30_000;
/** A host's directory, and the test's own in its place. */
const PLACES = { etc: '/etc/libvirt', lib: '/var/lib/libvirt', cache: '/var/cache/libvirt', run: '/run/libvirt', log: '/var/log/libvirt' } as const;

export async function startLibvirtd(cleanup: Cleanup): Promise<TestLibvirtd> {
  const libvirtd = prepareLibvirtd(cleanup);
  await libvirtd.start();
  return libvirtd;
}

/**
 * What is mounted below the directory from now on is seen by a libvirtd that is started later: as on a host of systemd, whose mounts are all shared. Elsewhere
 * (in a container) they may be private.
 */
export async function shareMounts(directory: string, cleanup: Cleanup): Promise<void> {
  await mustRun('mount', ['--bind', directory, directory]);
  cleanup.add(async () => { await mustRun('umount', ['--lazy', directory]); });
  await mustRun('mount', ['--make-shared', directory]);
}

/** Not started yet: it sees the mounts that are there when it is, and its address is known before. */
export function prepareLibvirtd(cleanup: Cleanup): TestLibvirtd {
  const top = makeTempDir('lv', cleanup);
  chmodSync(top, 0o711);
  for (const place of [...Object.keys(PLACES), 'sock']) mkdirSync(join(top, place), { mode: 0o711 });
  const socket = join(top, 'sock', 'libvirt-sock');
  const configuration = join(top, 'libvirtd.conf');
  const log = join(top, 'libvirtd.log');
  writeFileSync(configuration, [
    `unix_sock_dir = "${join(top, 'sock')}"`, 'auth_unix_rw = "none"', 'auth_unix_ro = "none"', 'unix_sock_rw_perms = "0700"', '',
  ].join('\n'));
  writeFileSync(join(top, 'etc', 'qemu.conf'), ['stdio_handler = "file"', 'cgroup_controllers = [ ]', 'namespaces = [ ]', 'security_driver = "none"', ''].join('\n'));
  const uri = `qemu+unix:///system?socket=${socket}&mode=legacy`;
  const script = `${Object.entries(PLACES).map(([own, host]) => `mkdir -p ${host} && mount --bind "$0/${own}" ${host}`).join(' && ')} && exec libvirtd -f "$0/libvirtd.conf" -p "$0/libvirtd.pid"`;
  let pid = 0;

  const virsh = (args: readonly string[]): Promise<CommandResult> => command('virsh', ['-q', '-c', uri, ...args]);
  const start = async (): Promise<void> => {
    const output = openSync(log, 'a');
    // Mounts of the test's are seen in there, as they are of a host's libvirtd; its own are not seen outside.
    const child = spawn('unshare', ['--mount', '--propagation', 'slave', 'sh', '-c', script, top], { stdio: ['ignore', output, output], detached: true, cwd: '/' });
    closeSync(output);
    child.unref();
    pid = child.pid ?? 0;
    const came = await waitUntil(async () => !isAlive(pid) || (existsSync(socket) && (await virsh(['uri'])).code === 0), START_TIMEOUT_MS);
    if (!came || !isAlive(pid)) throw new Error(`libvirtd did not start:\n${readFileSync(log, 'utf8').slice(-3000)}`);
  };
  const stop = async (): Promise<void> => {
    if (pid === 0) return;
    signalProcess(pid, 'SIGTERM');
    signalProcess(pid, 'SIGCONT');
    if (!(await waitUntilGone(pid, END_TIMEOUT_MS))) {
      signalProcess(pid, 'SIGKILL');
      if (!(await waitUntilGone(pid, END_TIMEOUT_MS))) throw new Error(`libvirtd (process ${pid}) could not be ended`);
    }
    pid = 0;
  };
  const pidFiles = join(top, 'run', 'qemu');
  const definitionsDir = join(top, 'etc', 'qemu');
  const definitions = (): string[] => (existsSync(definitionsDir) ? readdirSync(definitionsDir) : []).filter((name) => name.endsWith('.xml')).map((name) => name.slice(0, -'.xml'.length));
  const pidOf = (name: string): number => Number(readFileSync(join(pidFiles, `${name}.pid`), 'utf8'));

  cleanup.add(async () => {
    await stop();
    for (const file of existsSync(pidFiles) ? readdirSync(pidFiles).filter((name) => name.endsWith('.pid')) : []) {
      const machine = Number(readFileSync(join(pidFiles, file), 'utf8'));
      if (!isAlive(machine) || !readFileSync(`/proc/${machine}/cmdline`, 'utf8').includes('qemu')) continue;
      signalProcess(machine, 'SIGKILL');
      await waitUntilGone(machine, END_TIMEOUT_MS);
    }
  });
  return {
    uri, virsh, pidOf, definitions, stop, start,
    hold: () => { signalProcess(pid, 'SIGSTOP'); },
    goOn: () => { signalProcess(pid, 'SIGCONT'); },
  };
}
