/**
 * Arguments that a machine's description may add to QEMU's command line.
 *
 * Every option must be one of the known ones: QEMU takes whatever stands alone on its command line for a disk, and looks into it for a
 * format; only who knows which options take a value knows what stands alone. Options that would give a machine disks, monitors or a
 * life of their own are refused with the reason, since the daemon gives those. This is no wall against a hostile description:
 * machines run as their owner, and that is the wall.
 */
import { invalid, shown } from './values.js';

const DISKS = 'disks are given in "disks", always as raw';
const MONITOR = 'the machine is spoken to by the daemon alone';
const LIFE = 'the daemon starts and ends the machine';
const FIELD = 'the description has a field for it';
const NETWORK = 'network interfaces are given in "networkInterfaces"';
const HOST = 'it opens or changes what is not the machine\'s';

/** Without their hyphens. */
export const REFUSED_OPTIONS: Readonly<Record<string, string>> = {
  drive: DISKS, blockdev: DISKS, hda: DISKS, hdb: DISKS, hdc: DISKS, hdd: DISKS, cdrom: DISKS, fda: DISKS, fdb: DISKS, mtdblock: DISKS, sd: DISKS,
  pflash: DISKS, snapshot: DISKS,
  qmp: MONITOR, 'qmp-pretty': MONITOR, mon: MONITOR, monitor: MONITOR, chardev: MONITOR, gdb: MONITOR, s: MONITOR, qtest: MONITOR, 'qtest-log': MONITOR,
  daemonize: LIFE, pidfile: LIFE, S: LIFE, incoming: LIFE, loadvm: LIFE, preconfig: LIFE, 'run-with': LIFE, runas: LIFE, chroot: LIFE, 'async-teardown': LIFE,
  readconfig: LIFE, writeconfig: LIFE, nodefaults: LIFE, 'no-user-config': LIFE, sandbox: LIFE,
  name: FIELD, uuid: FIELD, machine: FIELD, M: FIELD, accel: FIELD, 'enable-kvm': FIELD, cpu: FIELD, smp: FIELD, m: FIELD, kernel: FIELD, initrd: FIELD,
  append: FIELD, bios: FIELD, L: FIELD, dtb: FIELD, serial: FIELD, nographic: FIELD,
  net: NETWORK, netdev: NETWORK, nic: NETWORK,
  virtfs: HOST, fsdev: HOST, 'add-fd': HOST, set: HOST, D: HOST, d: HOST, trace: HOST, plugin: HOST, 'dump-vmstate': HOST, 'mem-path': HOST, parallel: HOST, iscsi: HOST,
};

/** Options that take a value. */
const WITH_VALUE = new Set([
  'device', 'object', 'global', 'rtc', 'boot', 'vga', 'display', 'vnc', 'spice', 'k', 'audio', 'audiodev', 'smbios', 'acpitable', 'fw_cfg', 'numa',
  'overcommit', 'action', 'watchdog-action', 'msg', 'icount', 'tpmdev', 'compat',
]);
/** Options that take none. */
const ALONE = new Set(['no-reboot', 'no-shutdown', 'usb', 'no-hpet', 'no-acpi', 'no-fd-bootchk', 'mem-prealloc', 'only-migratable']);

export function checkExtraArguments(list: readonly string[]): void {
  for (let index = 0; index < list.length; index += 1) {
    const argument = list[index]!;
    const path = `extraArguments.${index}`;
    const option = /^--?([A-Za-z].*)$/s.exec(argument)?.[1];
    if (option === undefined) throw invalid(`${path}: ${shown(argument)} follows no option that takes a value: QEMU would open it as a disk`, { path });
    const reason = Object.hasOwn(REFUSED_OPTIONS, option) ? REFUSED_OPTIONS[option]! : undefined;
    if (reason !== undefined) throw invalid(`${path}: -${option} is refused: ${reason}`, { path });
    if (ALONE.has(option)) continue;
    if (!WITH_VALUE.has(option)) throw invalid(`${path}: ${shown(argument)} is none of the options that a machine may add (see MACHINES.md)`, { path });
    index += 1;
    const value = list[index];
    if (value === undefined || value.startsWith('-')) throw invalid(`${path}: -${option} needs a value, as the next argument`, { path });
  }
}
