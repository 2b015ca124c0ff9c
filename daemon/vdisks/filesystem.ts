/**
 * File systems in container files: made, mounted, written to, unmounted, each by a program of the host. Main thread; it never looks at anything below a mount point.
 *
 * They hold a few large files, and lie on what is all zeros: no reserve for root, one inode for each MiB, nothing discarded and no tables
 * written that are zeros anyway. What they hold came from users: nothing in them has rights or is a device (nosuid, nodev), no link in them leads anybody
 * anywhere (nosymfollow; root writes there), and one that is damaged is read-only rather than the end of the host, whatever it says of itself.
 */
import { lstatSync, readFileSync } from 'node:fs';
import os from 'node:os';

import { OffshootError } from '../../blockstore/errors.js';
import { deviceMountedAt } from './mounts.js';
import { inodesFor, type FileSystemType } from './layout.js';
import { numberOf } from './losetup.js';
import { PROGRAM_TIMEOUT_MS, runProgram } from './program.js';

export interface NewFileSystem {
  readonly type: FileSystemType;
  readonly uuid: string;
  /** At most 12 characters, which is what xfs has. */
  readonly label: string;
  readonly sizeBytes: number;
  readonly files: number;
}

const MOUNT_OPTIONS: Readonly<Record<FileSystemType, readonly string[]>> = {
  ext4: ['errors=remount-ro'],
  // Clones of one container file have the UUID of its file system.
  xfs: ['nouuid'],
};

export function mkfsCommand(device: string, { type, uuid, label, sizeBytes, files }: NewFileSystem): { readonly program: string; readonly args: readonly string[] } {
  if (type === 'ext4') {
    const inodes = inodesFor(files, sizeBytes);
    return {
      program: 'mkfs.ext4',
      args: ['-q', '-F', '-b', '4096', '-m', '0', '-N', String(inodes), '-U', uuid, '-L', label, '-E', 'nodiscard,assume_storage_prezeroed=1,root_owner=0:0', device],
    };
  }
  return { program: 'mkfs.xfs', args: ['-q', '-K', '-b', 'size=4096', '-m', `reflink=1,uuid=${uuid}`, '-L', label, device] };
}

export async function makeFileSystem(device: string, wanted: NewFileSystem, signal: AbortSignal): Promise<void> {
  const { program, args } = mkfsCommand(device, wanted);
  await runProgram(program, args, { signal });
}

/** Nothing to do when it is mounted there; `in-use` when something else is. */
export async function mountFileSystem(device: string, directory: string, type: FileSystemType, signal: AbortSignal): Promise<void> {
  const mounted = deviceMountedAt(directory);
  if (mounted === numberOf(device)) return;
  if (mounted !== null) throw new OffshootError('in-use', `something else is mounted at ${directory} (device ${mounted}): unmount it first`, { directory });
  await runProgram('mount', ['-i', '--types', type, '--options', ['nosuid', 'nodev', 'nosymfollow', ...MOUNT_OPTIONS[type]].join(','), '--source', device, '--target', directory], { signal });
}

/** `in-use` while somebody is in it. Nothing to do when nothing is mounted there. */
export async function unmountFileSystem(directory: string, signal: AbortSignal): Promise<void> {
  while (deviceMountedAt(directory) !== null) {
    try {
      await runProgram('umount', ['--no-canonicalize', directory], { signal });
    } catch (thrown) {
      if (thrown instanceof OffshootError && thrown.message.includes('busy')) {
        throw new OffshootError('in-use', `${directory} is in use: close what is open in it (\`fuser -vm ${directory}\` names who has it)`, { directory }, thrown);
      }
      throw thrown;
    }
  }
}

/**
 * The directory that something was mounted at. A mount namespace of somebody else's (a container's, a hypervisor's) may have the file system mounted there still:
 * the kernel ends that with the directory, and whoever removes it then writes the file system out, onto our own mount. So a program does, and never this process.
 */
export async function removeMountPoint(directory: string, signal: AbortSignal): Promise<void> {
  if (lstatSync(directory, { throwIfNoEntry: false }) === undefined) return;
  await runProgram('rmdir', ['--', directory], { signal });
}

export interface FileToWrite {
  readonly path: string;
  readonly text: string;
  readonly uid: number;
  readonly gid: number;
  readonly mode: number;
}

/** Over what has the name, which is never followed; its directory must be there. */
export async function writeFileInside({ path, text, uid, gid, mode }: FileToWrite, signal: AbortSignal): Promise<void> {
  await runProgram('install', ['--no-target-directory', `--owner=${uid}`, `--group=${gid}`, `--mode=${mode.toString(8)}`, '/dev/stdin', path], { signal, input: text });
}

export async function makeDirectoryInside(path: string, signal: AbortSignal): Promise<void> {
  await runProgram('mkdir', ['--mode=700', path], { signal });
}

/** What was written below the directory is on the device. */
export async function syncFileSystem(directory: string, signal: AbortSignal): Promise<void> {
  await runProgram('sync', ['--file-system', directory], { signal, timeoutMs: 10 * PROGRAM_TIMEOUT_MS });
}

/** Whether this kernel has the file system, or a module of it that a mount would load. */
export function kernelCanMount(type: FileSystemType): boolean {
  if (readOr('/proc/filesystems').split('\n').some((line) => line.trim().split(/\s+/u).at(-1) === type)) return true;
  const modules = `/lib/modules/${os.release()}`;
  return ['modules.dep', 'modules.builtin'].some((file) => new RegExp(`/${type}\\.ko`, 'u').test(readOr(`${modules}/${file}`)));
}

/** As the kernel calls it: `x86_64`, `aarch64`. */
export function hostArchitecture(): string {
  return os.machine();
}

function readOr(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return '';
  }
}
