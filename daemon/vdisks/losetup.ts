/**
 * Block devices by losetup(8): loop devices with direct I/O. Main thread; whatever opens a file of the mount is a child.
 *
 * A partition is shown as a window of the file (`--offset`, `--sizelimit`), not as a partition node: that works where the kernel knows no
 * partition tables, where no udev makes nodes, and everywhere else too.
 *
 * The kernel takes LOOP_CLR_FD of a device that somebody has open for "with its last close", and says that it is well. So after each detach
 * the device is looked at again. Names are followed by losetup as by every program, and a user may exchange them at any moment: what was attached is
 * looked at before anybody gets it, by the number of the node that it shows.
 */
import { readFileSync, readdirSync, readlinkSync } from 'node:fs';
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import { runChild, sleepUnlessAborted } from '../programs/child.js';
import { launch } from '../programs/launch.js';
import type { AttachedDevice, AttachOptions, BlockDevices, DeviceWindow } from './block-devices.js';
import { mountedDevices } from './mounts.js';
import { PROGRAM_TIMEOUT_MS, runProgram, saidBy } from './program.js';

/** Those that others look at (udev, blkid) are open for a moment now and then. */
const DETACH_PATIENCE_MS = 3_000;
const DETACH_LOOK_MS = 50;
const LEND_START_MS = 30_000;
/** From the kernel's own files: asking devices would ask file systems of others, which may not answer. */
const LIST_COLUMNS = 'NAME,BACK-FILE,RO,AUTOCLEAR,OFFSET';

interface ListedDevice {
  readonly name: string;
  readonly 'back-file': string | null;
  readonly ro: boolean;
  readonly autoclear: boolean;
  readonly offset: number;
}

export function createLoopDevices(): BlockDevices {
  /** Process groups that hold a device open for those to whom it was lent. */
  const lenders = new Map<string, Set<number>>();
  const attached = async (directory: string, device: string | null, signal: AbortSignal): Promise<readonly AttachedDevice[]> => {
    const listed = (await loopDevices(signal)).filter((each) => (device === null || each.name === device) && isBelow(each['back-file'], directory));
    const found: AttachedDevice[] = [];
    for (const each of listed) {
      found.push({
        device: each.name, file: withoutNote(each['back-file'] ?? ''), readOnly: each.ro, offsetBytes: each.offset, isLeaving: each.autoclear, nodeId: await nodeOf(each.name, signal),
      });
    }
    return found;
  };

  const devices: BlockDevices = {
    attach: async (file, options) => {
      const { stdout } = await runProgram('losetup', attachArguments(file, options), options);
      const device = stdout.trim();
      if (!/^\/dev\/loop[0-9]+$/u.test(device)) throw new OffshootError('io-error', `losetup gave ${JSON.stringify(device)} as its device`);
      const directory = path.dirname(file);
      try {
        const nodeId = await nodeOf(device, options.signal);
        if (nodeId !== options.nodeId) throw new OffshootError('conflict', `${file} is not what it was a moment ago, and was not attached: somebody exchanged it; try again`, { file });
        return { device, file, readOnly: options.readOnly, offsetBytes: options.window?.offsetBytes ?? 0, isLeaving: false, nodeId };
      } catch (thrown) {
        // Just made, and nobody was told of it: it is ours, whatever it shows.
        await runChild('losetup', ['--detach', device], { signal: AbortSignal.timeout(PROGRAM_TIMEOUT_MS), timeoutMs: PROGRAM_TIMEOUT_MS });
        throw thrown instanceof OffshootError ? thrown : new OffshootError('io-error', `what is at ${directory} could not be looked at`, {}, thrown);
      }
    },
    list: async (directory, { signal }) => await attached(directory, null, signal),
    find: async (device, directory, { signal }) => (await attached(directory, device, signal))[0] ?? null,
    detach: async (device, { signal, directory, nodeId }) => {
      const before = await devices.find(device, directory, { signal });
      if (before === null || (before.nodeId !== null && before.nodeId !== nodeId)) return;
      const mountPoint = mountedDevices().get(numberOf(device));
      if (mountPoint !== undefined) throw new OffshootError('in-use', `${device} is mounted at ${mountPoint}: unmount it first`, { device });
      for (const pid of lenders.get(device) ?? []) endGroup(pid);
      const result = await runChild('losetup', ['--detach', device], { signal, timeoutMs: PROGRAM_TIMEOUT_MS });
      const deadline = performance.now() + DETACH_PATIENCE_MS;
      for (;;) {
        const now = await devices.find(device, directory, { signal });
        if (now?.nodeId !== nodeId) return;
        if (performance.now() >= deadline) {
          if (!now.isLeaving) throw new OffshootError('io-error', `losetup did not detach ${device}: ${saidBy(result)}`, { device });
          throw new OffshootError('in-use', `${device} is open: it goes by itself with its last close (\`fuser -v ${device}\` names who has it)`, { device });
        }
        await sleepUnlessAborted(DETACH_LOOK_MS, signal);
      }
    },
    lend: async (device, { signal, seconds }) => {
      // flock(1) opens the device and keeps it open; the lock is shared, as those take it who look at devices.
      let pid = 0;
      const result = await launch({ program: 'flock', arguments: ['--shared', device, 'sleep', String(seconds)] }, {
        signal, timeoutMs: LEND_START_MS, isUp: () => Promise.resolve(hasOpen(pid, device)), onStarted: (started) => { pid = started; },
      });
      if (result.kind === 'ended') throw new OffshootError('io-error', `${device} could not be held open: ${result.stderr.trim()}`, { device });
      const pids = lenders.get(device) ?? new Set<number>();
      lenders.set(device, pids.add(pid));
      setTimeout(() => { pids.delete(pid); }, seconds * 1000).unref();
      // Held open, it is only marked, to go with its last close.
      await runProgram('losetup', ['--detach', device], { signal });
    },
  };
  return devices;
}

function endGroup(pid: number): void {
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // It has just ended.
  }
}

function attachArguments(file: string, { readOnly, window }: AttachOptions): string[] {
  return [
    '--direct-io=on', '--find', '--show', ...(readOnly ? ['--read-only'] : []),
    ...(window === undefined ? [] : windowArguments(window)), '--', file,
  ];
}

function windowArguments({ offsetBytes, sizeBytes }: DeviceWindow): string[] {
  return ['--offset', String(offsetBytes), '--sizelimit', String(sizeBytes)];
}

async function loopDevices(signal: AbortSignal): Promise<readonly ListedDevice[]> {
  const { stdout } = await runProgram('losetup', ['--list', '--json', '--output', LIST_COLUMNS], { signal });
  if (stdout.trim() === '') return [];
  const { loopdevices } = JSON.parse(stdout) as { readonly loopdevices?: readonly ListedDevice[] };
  return loopdevices ?? [];
}

/** The inode behind a device: the node of the store. */
async function nodeOf(device: string, signal: AbortSignal): Promise<number | null> {
  const result = await runChild('losetup', ['--list', '--json', '--output', 'NAME,BACK-INO', device], { signal, timeoutMs: PROGRAM_TIMEOUT_MS });
  if (result.code !== 0 || result.stdout.trim() === '') return null;
  const { loopdevices } = JSON.parse(result.stdout) as { readonly loopdevices?: readonly { readonly 'back-ino': number | null }[] };
  return loopdevices?.[0]?.['back-ino'] ?? null;
}

function isBelow(file: string | null, directory: string): boolean {
  return file?.startsWith(directory.endsWith('/') ? directory : `${directory}/`) ?? false;
}

/** What the kernel adds to the path of a file without a name. */
function withoutNote(file: string): string {
  return file.replace(/ \(deleted\)$/u, '');
}

/** `7:3`, as in mountinfo. */
export function numberOf(device: string): string {
  try {
    return readFileSync(`/sys/class/block/${path.basename(device)}/dev`, 'utf8').trim();
  } catch {
    return '';
  }
}

/** Bytes that were written to it since it was attached, or earlier. The kernel's count: asks nobody. */
export function writtenBytes(device: string): number {
  try {
    return Number(readFileSync(`/sys/class/block/${path.basename(device)}/stat`, 'utf8').trim().split(/\s+/u)[6] ?? 0) * 512;
  } catch {
    return 0;
  }
}

function hasOpen(pid: number, device: string): boolean {
  if (pid === 0) return false;
  try {
    return readdirSync(`/proc/${pid}/fd`).some((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`) === device);
  } catch {
    return false;
  }
}
