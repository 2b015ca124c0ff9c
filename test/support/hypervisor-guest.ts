/**
 * What hypervisors' tests run: small machines that boot nothing, and the Debian guest on a clone of a real store, with a unit of its own that listens
 * to the power button (the guest has no logind, which does that elsewhere) and says so on the serial line.
 */
import { chmodSync, chownSync, mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

import { startTestDaemon } from './daemon.js';
import { guestImage, type GuestImage } from './guest-image.js';
import { mustRun } from './model/command.js';
import { makeTempDir, type Cleanup } from './temp.js';

/** Of nobody on this machine. */
export const MACHINE_OWNER = { uid: 73_200, gid: 73_200 } as const;
export const GUEST_LISTENS_LINE = 'OFFSHOOT-GUEST-LISTENS';
/** The check of the timer fails on a machine that is too busy for a guest under TCG. */
export const KERNEL_ARGUMENTS = 'console=ttyS0 root=/dev/vda rw quiet panic=-1 no_timer_check';

const EMPTY_DISK_BYTES = 1024 * 1024;
const STEP_TIMEOUT_MS = 60_000;

/** systemd doubles what a shell is to have once. */
const LISTEN_UNIT = `[Unit]
Description=Power off when the power button is pressed

[Service]
ExecStart=/bin/sh -c 'modprobe -a button evdev; while :; do for each in /sys/class/input/event*; do if grep -qs "Power Button" "$$each/device/name"; then echo ${GUEST_LISTENS_LINE} > /dev/ttyS0; dd if="/dev/input/$$(basename "$$each")" of=/dev/null bs=24 count=1; exec systemctl --no-block poweroff; fi; done; sleep 0.2; done'
`;

export interface MachineFiles {
  /** Of the owner, as the machine's own directory. */
  readonly directory: string;
  readonly disk: string;
}

/** A directory of its own for each machine, and an empty disk in it, all of the owner. */
export function emptyMachineFiles(base: string, name: string): MachineFiles {
  const directory = join(base, name);
  mkdirSync(directory, { recursive: true, mode: 0o755 });
  const disk = join(directory, 'disk.img');
  writeFileSync(disk, '', { mode: 0o600 });
  truncateSync(disk, EMPTY_DISK_BYTES);
  for (const path of [directory, disk]) chownSync(path, MACHINE_OWNER.uid, MACHINE_OWNER.gid);
  return { directory, disk };
}

/** Passable for the owner of machines. */
export function makeMachinesDir(cleanup: Cleanup): string {
  const directory = makeTempDir('hv', cleanup);
  chmodSync(directory, 0o711);
  return directory;
}

export interface GuestFiles extends MachineFiles {
  readonly image: GuestImage;
}

/** A clone of the Debian image, served by a real daemon. */
export async function cloneGuest(cleanup: Cleanup): Promise<GuestFiles> {
  const image = await guestImage();
  const daemon = await startTestDaemon({ transport: 'kernel', cleanup });
  chmodSync(dirname(daemon.mountDir), 0o711);
  await daemon.json(['container', 'create', 'vms']);
  await daemon.json(['import', image.disk, 'vms/debian.img', '--in-place']);
  await daemon.json(['clone', 'vms/debian.img', 'vms/guest.img']);
  const disk = daemon.path('vms/guest.img');
  await mustRun('chown', [`${MACHINE_OWNER.uid}:${MACHINE_OWNER.gid}`, disk]);
  await listenToPowerButton(disk, cleanup);
  return { directory: daemon.path('vms'), disk, image };
}

/** Puts the unit into the Debian image, or a copy of it. */
export async function listenToPowerButton(disk: string, cleanup: Cleanup): Promise<void> {
  const work = makeTempDir('unit', cleanup);
  const [unit, orders] = [join(work, 'unit'), join(work, 'orders')];
  writeFileSync(unit, LISTEN_UNIT);
  writeFileSync(orders, [
    'cd /etc/systemd/system', `write ${unit} offshoot-listen.service`,
    'cd multi-user.target.wants', 'symlink offshoot-listen.service ../offshoot-listen.service', '',
  ].join('\n'));
  await mustRun('debugfs', ['-w', '-f', orders, disk], { timeoutMs: STEP_TIMEOUT_MS });
}

export function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    // Not there yet.
    return '';
  }
}
