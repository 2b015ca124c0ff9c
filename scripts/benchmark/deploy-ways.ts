/**
 * The two hypervisors that `scripts/bench --deploy` asks, each with a machine in its own format and with what an administrator types to have one run whose files are
 * where they are: `virsh define` and `virsh start`; or QEMU by itself. The machine boots nothing: it runs when its hypervisor says so, in both arms alike.
 */
import { execFile } from 'node:child_process';
import { randomBytes, randomUUID } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { signalProcess, waitUntilGone } from '../../test/support/processes.js';
import type { TestLibvirtd } from '../../test/support/libvirtd.js';

export interface Way {
  readonly hypervisor: 'libvirt' | 'qemu';
  /** The machine's configuration, into the directory that has its disk. */
  configure(directory: string): void;
  /** Registers and starts what lies in the directory, as an administrator does; returns when it runs. */
  start(name: string, directory: string): Promise<void>;
  isRunning(name: string): Promise<boolean>;
  /** Its power, and what the hypervisor knows of it. Nothing to do where there is none. */
  end(name: string): Promise<void>;
  /** What nobody else would find when the benchmark is ended from outside. At once. */
  kill(): void;
}

export const DISK_NAME = 'disk.img';
export const MACHINE_NAME = 'base';
const END_TIMEOUT_MS = 20_000;

const run = promisify(execFile);

export function libvirtWay(libvirtd: TestLibvirtd): Way {
  const virsh = async (...args: readonly string[]): Promise<string> => (await run('virsh', ['-q', '-c', libvirtd.uri, ...args])).stdout.trim();
  const started = new Set<string>();
  return {
    hypervisor: 'libvirt',
    configure: (directory) => { writeFileSync(join(directory, `${MACHINE_NAME}.xml`), domainXml(MACHINE_NAME, join(directory, DISK_NAME))); },
    start: async (name, directory) => {
      started.add(name);
      writeFileSync(join(directory, `${name}.xml`), domainXml(name, join(directory, DISK_NAME)));
      await virsh('define', join(directory, `${name}.xml`));
      await virsh('start', name);
    },
    isRunning: async (name) => {
      started.add(name);
      return await virsh('domstate', name) === 'running';
    },
    end: async (name) => {
      await virsh('destroy', name);
      await virsh('undefine', name);
      started.delete(name);
    },
    kill: () => {
      for (const name of started) {
        try {
          signalProcess(libvirtd.pidOf(name), 'SIGKILL');
        } catch {
          // No pid file: it does not run.
        }
      }
    },
  };
}

export function qemuWay(pidDirectory: string): Way {
  const pidFile = (name: string): string => join(pidDirectory, `${name}.pid`);
  return {
    hypervisor: 'qemu',
    configure: (directory) => {
      writeFileSync(join(directory, 'machine.json'), JSON.stringify({
        format: 'offshoot-machine/1', name: MACHINE_NAME, accelerator: 'tcg', processors: 1, memory: '256MiB', disks: [{ file: DISK_NAME }], networkInterfaces: [{ backend: { type: 'user' } }],
      }));
    },
    // With -daemonize it returns when the machine is made and runs.
    start: async (name, directory) => {
      await run('qemu-system-x86_64', [
        '-name', name, '-machine', 'q35,accel=tcg', '-m', '256', '-smp', '1', '-nodefaults', '-display', 'none', '-drive', `file=${join(directory, DISK_NAME)},if=virtio,format=raw,cache=none`,
        '-nic', 'user,model=virtio-net-pci', '-daemonize', '-pidfile', pidFile(name),
      ]);
    },
    // Of the deployed one the daemon says it.
    isRunning: async (name) => await Promise.resolve(pidOf(pidFile(name)) !== null),
    end: async (name) => {
      const pid = pidOf(pidFile(name));
      if (pid === null) return;
      signalProcess(pid, 'SIGKILL');
      await waitUntilGone(pid, END_TIMEOUT_MS);
    },
    // It carries the run's mark, and is found by it.
    kill: () => undefined,
  };
}

function pidOf(file: string): number | null {
  try {
    return Number(readFileSync(file, 'utf8'));
  } catch {
    return null;
  }
}

function domainXml(name: string, disk: string): string {
  const mac = ['52:54:00', ...[...randomBytes(3)].map((byte) => byte.toString(16).padStart(2, '0'))].join(':');
  return `<domain type='qemu'>
  <name>${name}</name>
  <uuid>${randomUUID()}</uuid>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='${disk}'/><target dev='vda' bus='virtio'/></disk>
    <interface type='user'><mac address='${mac}'/><model type='virtio'/></interface>
    <memballoon model='none'/>
  </devices>
</domain>
`;
}
