/**
 * Disks of VMware in the store: a descriptor, which is a small file, and beside it the raw disk that it leads to. What a descriptor of
 * somebody else's may lead to, and what becomes of it when it comes into the store. No store, no process; reads files of the host for imports.
 *
 * Whoever wrote a descriptor decides about the path in it, so it is taken for nothing but a name: where it leads is checked by who asks. A
 * guest writes to the raw disk only, and cannot make a descriptor of it.
 */
import fs from 'node:fs/promises';
import path from 'node:path';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { shown } from '../filesystem/names.js';
import { parseVmdkDescriptor, vmdkDescriptor, type VmdkDescriptor } from './formats/vmdk.js';

/** What VMware writes into the descriptor of a disk that was just made. */
const FIRST_CONTENT_ID = 'fffffffe';
/** A descriptor has some hundred characters; what is larger, and is none, is not read further. */
const DESCRIPTOR_BYTES_MAX = 64 * 1024;
/** One file with everything inside, its descriptor too. */
const SPARSE_MAGIC = Buffer.from('KDMV');
/** What a snapshot wrote: the blocks that changed, on top of another file. */
const DELTA_MAGIC = Buffer.from('COWD');
/** Types of extents and of disks, and what to say of them. */
const DEVICE = /rdm|rawdevice|fulldevice|partitioneddevice|raw$/iu;

/** A disk of a .vmx on its way into the store. */
export interface VmdkDisk {
  /** The file of the host that becomes the raw disk: the flat file, or the image that is converted. */
  readonly file: string;
  /** What the raw disk is called in the store. */
  readonly name: string;
  readonly format: 'vmdk' | 'raw';
  /** Its descriptor's file on the host, where there is one. */
  readonly descriptorFile: string | null;
  /** Of the descriptor in the store; the configuration names it. */
  readonly descriptorName: string;
  /** Its text; null: made when the size of the disk is known. */
  readonly descriptorText: string | null;
  readonly adapterType: 'lsilogic' | 'ide';
}

/** The raw disk that a descriptor leads to, as it is written there, and how long the descriptor says that it is. `what` is the disk in messages. */
export function flatFileOf(text: string, what: string): { readonly fileName: string; readonly sizeBytes: number; readonly descriptor: VmdkDescriptor } {
  let descriptor: VmdkDescriptor;
  try {
    descriptor = parseVmdkDescriptor(text);
  } catch (thrown) {
    const error = toOffshootError(thrown);
    throw error.kind === 'internal' ? thrown : new OffshootError(error.kind, `${what}: ${error.message}`, error.context, error);
  }
  const [extent, ...others] = descriptor.extents;
  if (descriptor.rawFile !== null && extent !== undefined) return { fileName: descriptor.rawFile, sizeBytes: extent.sizeBytes, descriptor };
  throw new OffshootError('foreign-format', `${what} ${reasonAgainst(descriptor, text, others.length > 0)}`);
}

function reasonAgainst({ createType, extents }: VmdkDescriptor, text: string, isInPieces: boolean): string {
  const parent = /^\s*parentCID\s*=\s*([0-9a-fA-F]+)/mu.exec(text)?.[1] ?? 'ffffffff';
  if (!/^f{8}$/iu.test(parent) || /^\s*parentFileNameHint\s*=/imu.test(text) || extents.some(({ type }) => /^(?:VMFS|SE)SPARSE$/u.test(type))) {
    return 'is the delta of a snapshot, on top of another disk: delete the snapshots of the machine first, so that its disks are whole';
  }
  if (DEVICE.test(createType) || extents.some(({ type }) => DEVICE.test(type))) return `leads to a device of a host (${createType}): a clone would write to the same one; copy it into a disk first (vmkfstools -i)`;
  if (isInPieces) return `is in ${extents.length} pieces (${createType}): make one file of it first (qemu-img convert -O vmdk -o subformat=monolithicSparse, or vmkfstools -i)`;
  return `is a disk that is not known here (${createType === '' ? 'without a type' : createType}): convert it first (qemu-img convert -O vmdk -o subformat=monolithicSparse, or vmkfstools -i)`;
}

/**
 * What becomes of the file that a .vmx names as a disk. `assertAllowed` says where a path of the descriptor's really leads, or throws; a descriptor
 * that says all that the one in the store must say stays as it is, with what else VMware wrote there.
 */
export async function vmdkDiskOf(file: string, slot: string, assertAllowed: (file: string) => Promise<string>): Promise<VmdkDisk> {
  const what = `${file} (${slot})`;
  const adapterType = slot.startsWith('ide') ? 'ide' : 'lsilogic';
  const descriptorName = path.basename(file);
  const head = await readHead(file);
  if (head.subarray(0, DELTA_MAGIC.length).equals(DELTA_MAGIC)) {
    throw new OffshootError('foreign-format', `${what} holds what a snapshot wrote, on top of another disk: delete the snapshots of the machine first`, { path: file, slot });
  }
  if (head.subarray(0, SPARSE_MAGIC.length).equals(SPARSE_MAGIC)) {
    return { file, name: `${withoutSuffix(descriptorName)}-flat.vmdk`, format: 'vmdk', descriptorFile: null, descriptorName, descriptorText: null, adapterType };
  }
  const text = head.toString('utf8');
  const { fileName, sizeBytes, descriptor } = flatFileOf(text, what);
  const flat = await assertAllowed(path.resolve(path.dirname(file), fileName));
  const { size } = await fs.stat(flat).catch((thrown: unknown) => { throw toOffshootError(thrown); });
  if (size < sizeBytes) throw new OffshootError('invalid-argument', `${what} describes a disk of ${sizeBytes} bytes, and ${flat} has ${size}: it is cut off, copy it again`, { path: flat, slot });
  const name = path.basename(flat);
  const isRight = descriptor.createType === 'vmfs' && fileName === name;
  return {
    file: flat, name, format: 'raw', descriptorFile: file, descriptorName, adapterType,
    descriptorText: isRight ? text : vmdkDescriptor(sizeBytes, name, isContentId(descriptor.contentId) ? descriptor.contentId : FIRST_CONTENT_ID, { adapterType }),
  };
}

/** The descriptor of a disk that has come into the store. */
export function descriptorOf({ name, descriptorText, adapterType }: VmdkDisk, sizeBytes: number): string {
  return descriptorText ?? vmdkDescriptor(sizeBytes, name, FIRST_CONTENT_ID, { adapterType });
}

function isContentId(text: string): boolean {
  return /^[0-9a-f]{8}$/u.test(text) && text !== 'ffffffff';
}

function withoutSuffix(name: string): string {
  return name.replace(/\.vmdk$/iu, '');
}

/** All of a descriptor, or enough of something else to see that it is none. */
async function readHead(file: string): Promise<Buffer> {
  try {
    const handle = await fs.open(file, fs.constants.O_RDONLY | fs.constants.O_NOFOLLOW | fs.constants.O_NONBLOCK);
    try {
      if (!(await handle.stat()).isFile()) throw new OffshootError('invalid-argument', `${shown(file)} is no ordinary file`, { path: file });
      const bytes = Buffer.alloc(DESCRIPTOR_BYTES_MAX + 1);
      const { bytesRead } = await handle.read(bytes, 0, bytes.length, 0);
      return bytes.subarray(0, bytesRead);
    } finally {
      await handle.close();
    }
  } catch (thrown) {
    throw toOffshootError(thrown);
  }
}
