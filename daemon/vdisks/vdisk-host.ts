/**
 * The seam to what stage and deploy need of this host, but for block devices themselves: partition tables, file systems, mounts, copies. Each call is a
 * program of the host; each can be made again. Main thread.
 */
import { chmodSync, lstatSync, mkdirSync } from 'node:fs';
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import type { BlockDevices } from './block-devices.js';
import { copyTree, type CopyOptions } from './copy.js';
import {
  hostArchitecture, kernelCanMount, makeDirectoryInside, makeFileSystem, mountFileSystem, removeMountPoint, syncFileSystem, unmountFileSystem, writeFileInside, type FileToWrite, type NewFileSystem,
} from './filesystem.js';
import type { FileSystemType } from './layout.js';
import { createLoopDevices } from './losetup.js';
import { deviceMountedAt } from './mounts.js';
import { writePartitionTable, type PartitionTable } from './partition.js';

export interface VdiskHost {
  readonly devices: BlockDevices;
  /** Whether the kernel has the file system. */
  canMount(type: FileSystemType): boolean;
  /** As the kernel calls it: `x86_64`. */
  architecture(): string;
  partition(device: string, table: PartitionTable, signal: AbortSignal): Promise<void>;
  makeFileSystem(device: string, wanted: NewFileSystem, signal: AbortSignal): Promise<void>;
  /** On a directory that it makes. */
  mount(device: string, directory: string, type: FileSystemType, signal: AbortSignal): Promise<void>;
  /** `in-use` while somebody is in it. The directory goes, too. */
  unmount(directory: string, signal: AbortSignal): Promise<void>;
  isMounted(directory: string): boolean;
  makeDirectory(path: string, signal: AbortSignal): Promise<void>;
  copy(source: string, target: string, options: CopyOptions): Promise<void>;
  write(file: FileToWrite, signal: AbortSignal): Promise<void>;
  sync(directory: string, signal: AbortSignal): Promise<void>;
}

export function createVdiskHost(): VdiskHost {
  return {
    devices: createLoopDevices(),
    canMount: kernelCanMount,
    architecture: hostArchitecture,
    partition: writePartitionTable,
    makeFileSystem,
    mount: async (device, directory, type, signal) => {
      makeMountPoint(directory);
      await mountFileSystem(device, directory, type, signal);
    },
    unmount: async (directory, signal) => {
      await unmountFileSystem(directory, signal);
      await removeMountPoint(directory, signal);
    },
    isMounted: (directory) => deviceMountedAt(directory) !== null,
    makeDirectory: makeDirectoryInside,
    copy: copyTree,
    write: writeFileInside,
    sync: syncFileSystem,
  };
}

/** Below a directory that is ours, and that others may only pass. */
function makeMountPoint(directory: string): void {
  if (deviceMountedAt(directory) !== null) return;
  const above = path.dirname(directory);
  mkdirSync(above, { recursive: true, mode: 0o711 });
  const found = lstatSync(above);
  if (!found.isDirectory() || found.uid !== process.getuid?.() || (found.mode & 0o022) !== 0) {
    throw new OffshootError('mount-unusable', `${above} is not a directory of ours alone: remove it`, { directory: above });
  }
  // Machines run as their owners, who must come by, whatever our umask.
  chmodSync(above, 0o711);
  mkdirSync(directory, { recursive: true, mode: 0o700 });
}
