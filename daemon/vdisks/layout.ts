/**
 * How large a container file is, and what lies where in it. Pure.
 *
 * The container file must hold the *virtual* sizes of what is copied, and a tenth more: a deployed machine may write every byte of its disks, and
 * the file system below it must never be what runs full. What was never written takes no room: the copy keeps holes, the container file is a
 * disk of the store, which is sparse, and its clones own what they write. So a disk of 100 GiB with 1 GiB in it makes a container file of 110 GiB
 * that takes 1 GiB.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { DISK_BYTES_MAX } from '../../blockstore/units.js';
import type { DeviceWindow } from './block-devices.js';

export const FILE_SYSTEMS = ['ext4', 'xfs'] as const;
export type FileSystemType = (typeof FILE_SYSTEMS)[number];

/** Start and end of the partition lie on these. */
export const ALIGNMENT_BYTES = 1024 * 1024;
const BLOCK = 4096;

/** What a file system takes for itself whatever its size: journal, tables; and the smallest that its mkfs makes. */
const OWN_NEEDS: Readonly<Record<FileSystemType, { readonly bytes: number; readonly least: number }>> = {
  ext4: { bytes: 16 * ALIGNMENT_BYTES, least: 16 * ALIGNMENT_BYTES },
  xfs: { bytes: 96 * ALIGNMENT_BYTES, least: 304 * ALIGNMENT_BYTES },
};

export interface DataSizes {
  /** Of each file, as it says. */
  readonly fileBytes: readonly number[];
  readonly directories: number;
}

export interface VdiskLayout {
  readonly sizeBytes: number;
  readonly partition: DeviceWindow;
}

/** Whole blocks of all that is copied. */
export function dataBytesOf({ fileBytes, directories }: DataSizes): number {
  return fileBytes.reduce((sum, bytes) => sum + roundUp(bytes, BLOCK), 0) + directories * BLOCK;
}

export function planLayout(sizes: DataSizes, fileSystem: FileSystemType): VdiskLayout {
  const needs = OWN_NEEDS[fileSystem];
  const dataBytes = dataBytesOf(sizes);
  const partitionBytes = roundUp(Math.max(dataBytes + Math.ceil(dataBytes / 10) + needs.bytes, needs.least), ALIGNMENT_BYTES);
  // One step before it for the table, one behind it for the table's copy.
  const sizeBytes = partitionBytes + 2 * ALIGNMENT_BYTES;
  if (sizeBytes > DISK_BYTES_MAX) {
    throw new OffshootError('too-large', `the machine's files have ${dataBytes} bytes: the container file would have ${sizeBytes}, and no disk has more than ${DISK_BYTES_MAX}`, { sizeBytes });
  }
  return { sizeBytes, partition: { offsetBytes: ALIGNMENT_BYTES, sizeBytes: partitionBytes } };
}

/** Nodes for all that is copied, with many to spare: a deployed machine makes files of its own. */
export function inodesFor(files: number, partitionBytes: number): number {
  return Math.max(1024, files * 2, Math.ceil(partitionBytes / ALIGNMENT_BYTES));
}

function roundUp(bytes: number, step: number): number {
  return Math.ceil(bytes / step) * step;
}
