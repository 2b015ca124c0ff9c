/**
 * Exports as block devices of this host: loop devices with direct I/O, so that nothing is cached twice and a flush is a flush of the disk.
 *
 * losetup(8) opens the file in a process of its own; what is attached is read from sysfs. Who may use a device is said by its node: root and the group
 * that the host gives it, or with `user` that user alone. A device that somebody has open is only marked by a detach, and goes with its last user: with
 * --force that is what happens, without it the withdrawal is refused. What writes on a device is not told from outside that the disk is also open elsewhere: one
 * writer at a time is the caller's to see to, as with any disk.
 */
import { chmodSync, chownSync, readlinkSync, statSync } from 'node:fs';
import path from 'node:path';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import { userNamed } from '../../machines/users.js';
import { runChild } from '../../programs/child.js';
import type { PresenterPlace } from '../place.js';
import type { Export, ExportAddress, Presenter, PresenterAbilities, PresenterCall } from '../presenter.js';
import { listed, loopDevices, losetup, read, recordFiles, recordedFiles, releaseLoops, type LoopDevice } from './loop-record.js';

const PROBE_TIMEOUT_MS = 10_000;
const SETTLE_TIMEOUT_MS = 15_000;
const USERS_MAX = 8;

export function createBlockPresenter({ directory }: PresenterPlace): Presenter { return new BlockPresenter(directory); }

class BlockPresenter implements Presenter {
  readonly id = 'block';
  readonly abilities: PresenterAbilities = { directories: false, disks: true, clients: 'host', encryption: null, knowsClients: true };
  readonly #directory: string;

  constructor(directory: string) { this.#directory = directory; }

  async probe({ signal }: PresenterCall): ReturnType<Presenter['probe']> {
    try {
      const { code, stdout, stderr } = await runChild('losetup', ['--version'], { signal, timeoutMs: PROBE_TIMEOUT_MS });
      if (code !== 0) return { usable: false, reason: `losetup does not work: ${stderr.trim()}` };
      statSync('/dev/loop-control');
      return { usable: true, version: stdout.trim() };
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'cancelled') throw thrown;
      return { usable: false, reason: error.kind === 'not-found' ? 'the kernel has no loop devices: modprobe loop' : error.message };
    }
  }

  check({ options, sizeBytes }: Export): void {
    for (const name of Object.keys(options)) if (name !== 'user') throw new OffshootError('invalid-argument', `block has no option ${name}, only user: leave it out`);
    if (sizeBytes === null || sizeBytes < 512) throw new OffshootError('invalid-argument', 'a block device has a sector at least, 512 bytes: this is too small');
  }

  async apply(wanted: readonly Export[], { signal }: PresenterCall): Promise<readonly ExportAddress[]> {
    const files = new Set(wanted.map(({ mountPath }) => mountPath));
    const ours = recordedFiles(this.#directory);
    for (const { device, file } of loopDevices()) if (ours.includes(file) && !files.has(file)) await losetup(['--detach', device], signal);
    if (ours.length === 0 && files.size === 0) return [];
    recordFiles(this.#directory, [...files]);
    const addresses: ExportAddress[] = [];
    let failure: OffshootError | null = null;
    for (const each of wanted) {
      try {
        addresses.push({ id: each.id, addresses: [(await this.#attach(each, signal)).device] });
      } catch (thrown) {
        failure ??= toOffshootError(thrown);
      }
    }
    if (failure !== null) throw failure;
    return addresses;
  }

  async clientsOf({ mountPath }: Export): Promise<readonly string[]> {
    const found = deviceOf(mountPath);
    return await Promise.resolve(found === undefined ? [] : usersOf(found.device));
  }

  async lost(shown: readonly Export[]): Promise<string | null> {
    const files = new Set(loopDevices().map(({ file }) => file));
    const gone = shown.find(({ mountPath }) => !files.has(mountPath));
    return await Promise.resolve(gone === undefined ? null : `the block device of ${gone.path} was detached by somebody else`);
  }

  async end(): Promise<void> { await releaseLoops(this.#directory); }

  async #attach({ mountPath, readOnly, options }: Export, signal: AbortSignal): Promise<LoopDevice> {
    const present = deviceOf(mountPath);
    if (present?.readOnly === readOnly) return present;
    // Of somebody before us, and open for writing, or not: it is not ours to judge, but it is not what was asked for.
    if (present !== undefined) await losetup(['--detach', present.device], signal);
    const owner = options['user'] === undefined ? null : await userNamed(options['user']);
    const device = await losetup(['--find', '--show', '--direct-io=on', '--partscan', ...(readOnly ? ['--read-only'] : []), '--', mountPath], signal);
    try {
      const made = deviceOf(mountPath);
      if (made?.device !== device) throw new OffshootError('io-error', `losetup says ${device}, and the kernel does not: detach what is attached of ${mountPath}, and try again`);
      await settled(signal);
      if (owner !== null) {
        chownSync(device, owner.uid, owner.gid);
        chmodSync(device, 0o600);
      } else restoreNode(device);
      return made;
    } catch (thrown) {
      await losetup(['--detach', device], new AbortController().signal).catch(() => undefined);
      throw thrown;
    }
  }
}

function deviceOf(file: string): LoopDevice | undefined { return loopDevices().find((each) => each.file === file); }

/** udev gives a device that has changed its usual owner; ours comes after it. */
async function settled(signal: AbortSignal): Promise<void> {
  try {
    statSync('/run/udev/control');
  } catch {
    return;
  }
  await runChild('udevadm', ['settle', '--timeout=10'], { signal, timeoutMs: SETTLE_TIMEOUT_MS }).catch(() => undefined);
}

/** The node may still belong to the user of an earlier export: as the loop devices' control is, so are they. */
function restoreNode(device: string): void {
  const { uid, gid } = statSync('/dev/loop-control');
  chownSync(device, uid, gid);
  chmodSync(device, 0o660);
}

/** Mounts, devices above it, processes that have it or one of its partitions open: all from names that the kernel remembers. */
function usersOf(device: string): readonly string[] {
  const name = path.basename(device);
  const nodes = [name, ...listed(`/sys/block/${name}`).filter((entry) => entry.startsWith(`${name}p`))];
  const users: string[] = [];
  for (const node of nodes) {
    const number = read(node === name ? `/sys/block/${name}/dev` : `/sys/block/${name}/${node}/dev`);
    for (const line of (read('/proc/self/mountinfo') ?? '').split('\n')) {
      const fields = line.split(' ');
      if (number !== null && (fields[2] === number || fields[fields.indexOf('-') + 2] === `/dev/${node}`)) users.push(`mounted at ${fields[4] ?? ''}`);
    }
    for (const holder of listed(node === name ? `/sys/block/${name}/holders` : `/sys/block/${name}/${node}/holders`)) users.push(`/dev/${holder}`);
  }
  const paths = new Set(nodes.map((node) => `/dev/${node}`));
  for (const pid of listed('/proc')) {
    if (!/^\d+$/u.test(pid) || Number(pid) === process.pid || users.length >= USERS_MAX) continue;
    if (listed(`/proc/${pid}/fd`).some((fd) => paths.has(linkOf(`/proc/${pid}/fd/${fd}`)))) users.push(`${read(`/proc/${pid}/comm`) ?? 'a process'} (pid ${pid})`);
  }
  return users.slice(0, USERS_MAX);
}

function linkOf(link: string): string {
  try {
    return readlinkSync(link);
  } catch {
    return '';
  }
}
