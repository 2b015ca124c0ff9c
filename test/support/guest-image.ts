/**
 * A real Debian system as a raw disk, for tests that boot it: made once with mmdebstrap, kept between runs.
 *
 * It lies in a cache under a name that is a hash of its recipe, so that a changed recipe makes a new one. It is made in a
 * neighbouring directory that is renamed when everything in it is complete: a run that is interrupted leaves nothing that
 * a later one could take for an image, and of two runs at once the second keeps what the first has made.
 *
 * The disk is an ext4 file system without a partition table; kernel and initrd lie beside it, as QEMU loads them itself.
 * The guest says GUEST_READY_LINE on its serial line when it is up, and runs the QEMU guest agent.
 */
import { createHash } from 'node:crypto';
import { chmodSync, copyFileSync, existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

import { mustRun } from './model/command.js';
import { removeTree } from './temp.js';

export const GUEST_READY_LINE = 'OFFSHOOT-GUEST-READY';

export interface GuestImage {
  readonly disk: string;
  readonly kernel: string;
  readonly initrd: string;
}

const PACKAGES = [
  'systemd-sysv', 'udev', 'qemu-guest-agent', 'iproute2', 'e2fsprogs', 'linux-image-cloud-amd64', 'initramfs-tools', 'fio',
];

const READY_UNIT = `[Unit]
Description=Tell the test that the guest is up
After=multi-user.target qemu-guest-agent.service

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo ${GUEST_READY_LINE} > /dev/ttyS0'

[Install]
WantedBy=multi-user.target
`;

const RECIPE = {
  version: 1,
  suite: 'bookworm',
  packages: PACKAGES,
  diskSize: '2G',
  files: {
    'etc/hostname': 'guest\n',
    'etc/fstab': '/dev/vda / ext4 defaults 0 1\n',
    'etc/systemd/system/offshoot-ready.service': READY_UNIT,
  },
  /** Wants of multi-user.target, as `systemctl enable` would make them. */
  enabled: ['offshoot-ready.service'],
  /** Started by nothing: they only make the boot longer. */
  masked: ['apt-daily.timer', 'apt-daily-upgrade.timer', 'dpkg-db-backup.timer', 'e2scrub_all.timer', 'fstrim.timer', 'e2scrub_reap.service'],
} as const;

const MAKE_TIMEOUT_MS = 8 * 60_000;
const STEP_TIMEOUT_MS = 2 * 60_000;

/** Makes the image when the cache has none; takes a minute or two then. */
export async function guestImage(): Promise<GuestImage> {
  const directory = join(cacheDirectory(), `debian-${recipeHash()}`);
  if (!existsSync(directory)) await makeImage(directory);
  return { disk: join(directory, 'disk.img'), kernel: join(directory, 'vmlinuz'), initrd: join(directory, 'initrd') };
}

export function cacheDirectory(): string {
  const given = process.env['XDG_CACHE_HOME'];
  return join(given === undefined || given === '' ? '/var/cache' : given, 'offshoot-test');
}

function recipeHash(): string {
  return createHash('sha256').update(JSON.stringify(RECIPE)).digest('hex').slice(0, 16);
}

async function makeImage(directory: string): Promise<void> {
  mkdirSync(dirname(directory), { recursive: true });
  process.stderr.write(`making a Debian guest image in ${directory} (once; a minute or two)\n`);
  const work = mkdtempSync(`${directory}.making-`);
  try {
    const root = join(work, 'root');
    const archive = join(work, 'root.tar');
    await mustRun('mmdebstrap', ['--quiet', '--variant=minbase', `--include=${PACKAGES.join(',')}`, RECIPE.suite, archive], { timeoutMs: MAKE_TIMEOUT_MS });
    mkdirSync(root);
    await mustRun('tar', ['-xf', archive, '-C', root, '--numeric-owner', '--exclude=./dev/*'], { timeoutMs: STEP_TIMEOUT_MS });
    customise(root);

    const made = join(work, 'made');
    mkdirSync(made);
    const boot = readdirSync(join(root, 'boot'));
    copyFileSync(join(root, 'boot', only(boot, 'vmlinuz-')), join(made, 'vmlinuz'));
    copyFileSync(join(root, 'boot', only(boot, 'initrd.img-')), join(made, 'initrd'));
    const disk = join(made, 'disk.img');
    await mustRun('truncate', ['-s', RECIPE.diskSize, disk]);
    await mustRun('mke2fs', ['-q', '-t', 'ext4', '-d', root, disk], { timeoutMs: STEP_TIMEOUT_MS });
    await mustRun('sync', ['-f', disk]);
    chmodSync(disk, 0o444);
    publish(made, directory);
  } finally {
    await removeTree(work);
  }
}

function customise(root: string): void {
  for (const [file, content] of Object.entries(RECIPE.files)) writeFileSync(join(root, file), content);
  const system = join(root, 'etc/systemd/system');
  mkdirSync(join(system, 'multi-user.target.wants'), { recursive: true });
  for (const unit of RECIPE.enabled) symlinkSync(`../${unit}`, join(system, 'multi-user.target.wants', unit));
  for (const unit of RECIPE.masked) symlinkSync('/dev/null', join(system, unit));
}

function only(names: readonly string[], prefix: string): string {
  const found = names.filter((name) => name.startsWith(prefix));
  if (found.length !== 1) throw new Error(`the guest's /boot should hold one ${prefix}*, not ${found.length}`);
  return found[0]!;
}

function publish(made: string, directory: string): void {
  try {
    renameSync(made, directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== 'ENOTEMPTY' && code !== 'EEXIST') throw error;
    // Another run was quicker; what it has made is just as good.
  }
}
