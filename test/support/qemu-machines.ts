/** A daemon for machines of QEMU by itself, and what a test sees of them from outside: their processes, their sockets, what the adapter keeps. */
import { chmodSync, existsSync, mkdirSync, readFileSync, readdirSync, readlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

import type { MachineInfo } from '../../daemon/control/machine-schemas.js';
import { runtimePathsOf, type RuntimePaths } from '../../daemon/hypervisor/qemu/machine-process.js';
import { runtimeDirectoryFor } from '../../daemon/runtime-directory.js';
import { machinesRuntimeDir } from '../../daemon/server/hypervisors.js';
import { startTestDaemon, type TestDaemon, type TestDaemonOptions } from './daemon.js';
import { processesNaming, signalProcess, waitUntilGone } from './processes.js';
import { makeShortTmpfsDir, makeTempDir, type Cleanup } from './temp.js';

/** There on every Debian; the machines run as this user. */
export const USER = { name: 'nobody', uid: 65_534, gid: 65_534 } as const;

const SMALL_DISK_BYTES = 1024 * 1024;

export interface QemuMachines {
  readonly daemon: TestDaemon;
  /** Of all machines. */
  readonly runtimeDir: string;
  readonly paths: (info: Pick<MachineInfo, 'externalId'>) => RuntimePaths;
  readonly pidOf: (info: Pick<MachineInfo, 'externalId'>) => number;
  /** For `withQmp` and `askGuestAgent`. */
  readonly call: (socketPath: string) => { readonly socketPath: string; readonly ownerUid: number; readonly timeoutMs: number; readonly signal: AbortSignal };
  /** Everything that the adapter keeps on disk, without the directory of names. */
  readonly registrations: () => string[];
  readonly vm: (...args: readonly string[]) => Promise<MachineInfo>;
  /** Kills holder, servers and whoever waits to be one, at once, and nothing else. */
  readonly killDaemon: () => Promise<void>;
}

/** With the containers `golden`, for everybody to read, and `lab`, for everybody to write. */
export async function startQemuMachines(cleanup: Cleanup, { storeDir, environment = {}, startArguments }: Pick<TestDaemonOptions, 'storeDir' | 'environment' | 'startArguments'> = {}): Promise<QemuMachines> {
  const runtimeBase = makeShortTmpfsDir(cleanup);
  chmodSync(runtimeBase, 0o711);
  const daemon = await startTestDaemon({
    transport: 'kernel', cleanup, ...(storeDir === undefined ? {} : { storeDir }), ...(startArguments === undefined ? {} : { startArguments }), environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase, OFFSHOOT_CRASHES_MAX: '1000000', ...environment },
  });
  chmodSync(dirname(daemon.mountDir), 0o711);
  const runtimeDir = machinesRuntimeDir(runtimeDirectoryFor(daemon.storeDir, { OFFSHOOT_RUNTIME_DIR: runtimeBase }));
  const isMachine = (pid: number): boolean => readArguments(pid)[0]?.startsWith('qemu-system') ?? false;
  const paths: QemuMachines['paths'] = ({ externalId }) => runtimePathsOf(runtimeDir, externalId ?? '');
  for (const container of storeDir !== undefined && existsSync(daemon.path('golden')) ? [] : ['golden', 'lab']) {
    await daemon.json(['container', 'create', container]);
    chmodSync(daemon.path(container), container === 'lab' ? 0o777 : 0o755);
  }
  return {
    daemon, runtimeDir, paths,
    pidOf: (info) => Number(readFileSync(paths(info).pidFile, 'utf8')),
    call: (socketPath) => ({ socketPath, ownerUid: USER.uid, timeoutMs: 60_000, signal: new AbortController().signal }),
    registrations: () => registrationsIn(daemon.storeDir),
    vm: async (...args) => await daemon.json<MachineInfo>(['vm', ...args]),
    killDaemon: async () => {
      const pids = processesNaming(daemon.mountDir).filter((pid) => !isMachine(pid));
      for (const pid of pids) signalProcess(pid, 'SIGKILL');
      for (const pid of pids) await waitUntilGone(pid, 20_000);
    },
  };
}

export function registrationsIn(storeDir: string): string[] {
  const directory = join(storeDir, 'qemu');
  return existsSync(directory) ? readdirSync(directory, { recursive: true }).map(String).filter((name) => name !== 'by-name').toSorted() : [];
}

/** A directory that `vm import` takes: a machine that boots nothing. */
export function smallMachine(cleanup: Cleanup, more: object = {}): string {
  const directory = join(makeTempDir('small', cleanup), 'small');
  mkdirSync(directory);
  writeFileSync(join(directory, 'disk.img'), '');
  truncateSync(join(directory, 'disk.img'), SMALL_DISK_BYTES);
  writeFileSync(join(directory, 'machine.json'), JSON.stringify({
    format: 'offshoot-machine/1', name: 'small', accelerator: 'tcg', processors: 1, memory: '64MiB', disks: [{ file: 'disk.img' }], ...more,
  }, null, 2));
  return directory;
}

/** So that an ordinary user may clone it. */
export function letAllRead(directory: string): void {
  for (const name of readdirSync(directory)) chmodSync(join(directory, name), 0o644);
}

/** What a process has open, by name: files, and devices but the harmless ones. */
export function openFilesOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`)).filter((name) => name.startsWith('/') && name !== '/dev/null' && name !== '/dev/urandom').toSorted();
}

export function readArguments(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
  } catch {
    // It has ended.
    return [];
  }
}
