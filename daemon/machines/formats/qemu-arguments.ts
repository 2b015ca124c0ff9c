/**
 * From a machine's description to QEMU's arguments. A vector, never a line for a shell; paths absolute; disks always by `-blockdev` with
 * the raw driver, so that nobody looks into a disk for its format; devices in QEMU's JSON syntax, in which a comma in a path is a comma.
 * Needs QEMU 6.2 or later. It starts no process: who does says where the sockets are.
 */
import { isAbsolute, join } from 'node:path';

import type { QemuMachine } from './qemu-schema.js';
import { assertPath, invalid, parseMac, parseMemory } from './values.js';

export interface QemuArgumentOptions {
  /** The machine's directory; relative paths of the description are meant from there. */
  readonly directory: string;
  readonly qmpSocket: string;
  /** Where the agent's channel of a machine with `guestAgent` is; null for none. */
  readonly agentSocket: string | null;
}

export interface QemuCommand {
  /** `qemu-system-x86_64`: to be looked for on the PATH. */
  readonly program: string;
  readonly arguments: readonly string[];
}

type Json = Readonly<Record<string, unknown>>;

const DEFAULT_MACHINE_TYPES = { x86_64: 'q35', aarch64: 'virt' } as const;
const NETWORK_MODELS = { virtio: 'virtio-net-pci', e1000: 'e1000', e1000e: 'e1000e', rtl8139: 'rtl8139', vmxnet3: 'vmxnet3' } as const;
const MIB = 1024 ** 2;

/** As QEMU's own words for `cache=` mean it: past the host's cache or not, and whether the guest sees a write cache. */
const CACHES = {
  none: { direct: true, writeCache: 'on' },
  directsync: { direct: true, writeCache: 'off' },
  writeback: { direct: false, writeCache: 'on' },
  writethrough: { direct: false, writeCache: 'off' },
} as const;

export function qemuCommand(machine: QemuMachine, options: QemuArgumentOptions): QemuCommand {
  const { architecture = 'x86_64' } = machine;
  assertAbsolute('directory', options.directory);
  const absolute = (file: string): string => isAbsolute(file) ? file : join(options.directory, file);
  const list: string[] = [
    '-nodefaults', '-no-user-config', '-display', 'none',
    '-name', `guest=${escapeCommas(machine.name)},debug-threads=on`,
    ...(machine.uuid === undefined ? [] : ['-uuid', machine.uuid]),
    '-machine', machineArgument(machine, architecture),
    ...accelerators(machine.accelerator ?? 'auto'),
    '-cpu', machine.cpu ?? (machine.accelerator === 'kvm' ? 'host' : 'max'),
    '-smp', String(machine.processors),
    '-m', `size=${memoryMib(machine)}M`,
    ...sandbox(machine),
    ...firmwareArguments(machine, absolute),
    // A controller comes before what hangs on it.
    ...(machine.disks.some((disk) => disk.interface === 'scsi') ? device({ driver: 'virtio-scsi-pci', id: 'scsi0' }) : []),
    ...machine.disks.flatMap((disk, index) => diskArguments(disk, index, absolute(disk.file), machine)),
  ];
  (machine.networkInterfaces ?? []).forEach((networkInterface, index) => {
    list.push('-netdev', netdev(networkInterface.backend, index));
    list.push(...device({
      driver: NETWORK_MODELS[networkInterface.model ?? 'virtio'], id: `net${index}`, netdev: `netdev${index}`,
      ...(networkInterface.mac === undefined ? {} : { mac: parseMac(`networkInterfaces.${index}.mac`, networkInterface.mac) }),
    }));
  });
  if (machine.kernel !== undefined) list.push('-kernel', absolute(machine.kernel));
  if (machine.initrd !== undefined) list.push('-initrd', absolute(machine.initrd));
  if (machine.append !== undefined) list.push('-append', machine.append);
  if (machine.consoleLog !== undefined) {
    list.push('-chardev', `file,id=console,path=${escapeCommas(absolute(machine.consoleLog))},append=on`, '-serial', 'chardev:console');
  }
  list.push('-chardev', `socket,id=qmp,path=${socketPath('qmpSocket', options.qmpSocket)},server=on,wait=off`, '-mon', 'chardev=qmp,mode=control');
  if (machine.guestAgent === true && options.agentSocket !== null) {
    list.push(...device({ driver: 'virtio-serial-pci', id: 'serial0' }));
    list.push('-chardev', `socket,id=agent,path=${socketPath('agentSocket', options.agentSocket)},server=on,wait=off`);
    list.push(...device({ driver: 'virtserialport', chardev: 'agent', name: 'org.qemu.guest_agent.0' }));
  }
  list.push(...(machine.extraArguments ?? []));
  return { program: `qemu-system-${architecture}`, arguments: list };
}

function machineArgument(machine: QemuMachine, architecture: 'x86_64' | 'aarch64'): string {
  const pflash = machine.firmware !== undefined && machine.nvram !== undefined ? ',pflash0=firmware,pflash1=nvram' : '';
  return `type=${machine.machineType ?? DEFAULT_MACHINE_TYPES[architecture]}${pflash}`;
}

/** QEMU takes the first that works. */
function accelerators(accelerator: 'auto' | 'kvm' | 'tcg'): string[] {
  if (accelerator === 'auto') return ['-accel', 'kvm', '-accel', 'tcg,thread=multi'];
  return ['-accel', accelerator === 'tcg' ? 'tcg,thread=multi' : 'kvm'];
}

/** What libvirt uses too. A bridge's helper is a program that QEMU starts, and it gains privileges. */
function sandbox(machine: QemuMachine): string[] {
  const startsHelper = (machine.networkInterfaces ?? []).some(({ backend }) => backend.type === 'bridge');
  return ['-sandbox', startsHelper ? 'on,obsolete=deny,resourcecontrol=deny' : 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'];
}

/** Firmware with variables is flash memory, the variables writable; firmware alone is a ROM. */
function firmwareArguments(machine: QemuMachine, absolute: (file: string) => string): string[] {
  if (machine.firmware === undefined) return [];
  if (machine.nvram === undefined) return ['-bios', absolute(machine.firmware)];
  return [
    ...blockdev({ driver: 'raw', 'node-name': 'firmware', 'read-only': true, file: { driver: 'file', filename: absolute(machine.firmware), 'read-only': true } }),
    ...blockdev({ driver: 'raw', 'node-name': 'nvram', 'read-only': false, file: { driver: 'file', filename: absolute(machine.nvram) } }),
  ];
}

function diskArguments(disk: QemuMachine['disks'][number], index: number, file: string, machine: QemuMachine): string[] {
  const { direct, writeCache } = CACHES[disk.cache ?? 'none'];
  const isReadOnly = disk.readOnly === true;
  const cache = { direct, 'no-flush': false };
  const common = {
    drive: `disk${index}`, id: `device${index}`,
    ...(disk.serial === undefined ? {} : { serial: disk.serial }),
    // A kernel that is given boots by itself; otherwise disks are tried in their order.
    ...(machine.kernel === undefined ? { bootindex: index + 1 } : {}),
  };
  const drivers = {
    virtio: { driver: 'virtio-blk-pci', ...common, 'write-cache': writeCache },
    scsi: { driver: 'scsi-hd', bus: 'scsi0.0', ...common, 'write-cache': writeCache },
    ide: { driver: 'ide-hd', ...common, 'write-cache': writeCache },
    // NVMe cannot do without a serial number.
    nvme: { driver: 'nvme', ...common, 'serial': disk.serial ?? `disk${index}`, 'write-cache': writeCache },
  } as const;
  return [
    ...blockdev({
      driver: 'raw', 'node-name': `disk${index}`, 'read-only': isReadOnly, discard: 'unmap', cache,
      file: { driver: 'file', filename: file, aio: 'threads', discard: 'unmap', cache, 'read-only': isReadOnly },
    }),
    ...device(drivers[disk.interface ?? 'virtio']),
  ];
}

function netdev(backend: NonNullable<QemuMachine['networkInterfaces']>[number]['backend'], index: number): string {
  switch (backend.type) {
    case 'user': {
      const forwards = (backend.forwards ?? []).map((forward) => `,hostfwd=${forward}`).join('');
      return `user,id=netdev${index}${backend.restrict === true ? ',restrict=on' : ''}${forwards}`;
    }
    case 'bridge': return `bridge,id=netdev${index},br=${backend.bridge}`;
    // The device is there already: QEMU runs no script for it.
    case 'tap': return `tap,id=netdev${index},ifname=${backend.device},script=no,downscript=no`;
  }
}

function memoryMib(machine: QemuMachine): number {
  const bytes = parseMemory('memory', machine.memory);
  if (bytes % MIB !== 0) throw invalid('memory must be a whole number of MiB for QEMU', { path: 'memory' });
  return bytes / MIB;
}

function blockdev(node: Json): string[] {
  return ['-blockdev', JSON.stringify(node)];
}

function device(properties: Json): string[] {
  return ['-device', JSON.stringify(properties)];
}

function escapeCommas(value: string): string {
  return value.replaceAll(',', ',,');
}

function socketPath(what: string, path: string): string {
  return escapeCommas(assertAbsolute(what, path));
}

function assertAbsolute(what: string, path: string): string {
  assertPath(what, path);
  if (!isAbsolute(path)) throw invalid(`${what} must be an absolute path`);
  return path;
}
