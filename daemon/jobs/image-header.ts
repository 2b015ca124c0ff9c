/**
 * Headers of foreign images, read by ourselves before any other program sees them, for one question: does this image speak of another
 * file? A backing file, an external data file, an extent or a parent would make whoever opens the image read what its author
 * names, with the reader's rights. Such an image is refused; so is whatever of a header is not understood.
 *
 * Bounded: a few fixed reads, and at most `DESCRIPTOR_BYTES_MAX` of a descriptor. Every offset is checked against the file.
 * VHDX and VDI have no case here, on purpose: qemu-img opens neither's parent, but refuses such images itself, and what it runs as can
 * read nothing but the image (`image-format.ts`). What is inside the image stays qemu-img's to judge.
 */
import type { FileHandle } from 'node:fs/promises';

import { OffshootError } from '../../blockstore/errors.js';

const SECTOR_BYTES = 512;
const DESCRIPTOR_BYTES_MAX = 64 * 1024;

const Qcow2 = {
  headerBytes: 104, version2Bytes: 72, backingFileOffset: 8, clusterBits: 20, cryptMethod: 32, version: 4, incompatibleFeatures: 72, headerLength: 100,
  clusterBitsMin: 9, clusterBitsMax: 21,
  dirty: 1n, corrupt: 2n, externalDataFile: 4n, compressionType: 8n, extendedL2: 16n,
  endOfExtensions: 0, backingFormatExtension: 0xe2792aca, dataFileExtension: 0x44415441, extensionsMax: 64,
} as const;

const Vmdk = { capacity: 12, descriptorSector: 28, descriptorSectors: 36, headerBytes: 512 } as const;
/** One file that holds everything. */
const VMDK_SINGLE_FILE = new Set(['monolithicSparse', 'streamOptimized']);

/** Throws `foreign-format` when the image refers to another file, is encrypted, or has a header that is not understood. */
export async function assertStandsAlone(handle: FileHandle, format: string, name: string): Promise<void> {
  if (format === 'qcow2') await checkQcow2(handle, name);
  if (format === 'vmdk') await checkVmdk(handle, name);
}

async function checkQcow2(handle: FileHandle, name: string): Promise<void> {
  const header = await readAt(handle, 0, Qcow2.headerBytes);
  if (header.length < Qcow2.version2Bytes) throw damaged(name);
  const version = header.readUInt32BE(Qcow2.version);
  if (version !== 2 && version !== 3) throw new OffshootError('foreign-format', `${name} is qcow2 of version ${version}, which is not known here; convert it to version 3 first`, { path: name });
  if (header.readBigUInt64BE(Qcow2.backingFileOffset) !== 0n) throw overlay(name);
  if (header.readUInt32BE(Qcow2.cryptMethod) !== 0) throw new OffshootError('foreign-format', `${name} is encrypted; decrypt it first`, { path: name });
  const clusterBits = header.readUInt32BE(Qcow2.clusterBits);
  if (clusterBits < Qcow2.clusterBitsMin || clusterBits > Qcow2.clusterBitsMax) throw damaged(name);
  if (version === 2) {
    await checkExtensions(handle, Qcow2.version2Bytes, 2 ** clusterBits, name);
    return;
  }
  if (header.length < Qcow2.headerBytes) throw damaged(name);
  const incompatible = header.readBigUInt64BE(Qcow2.incompatibleFeatures);
  if ((incompatible & Qcow2.externalDataFile) !== 0n) throw externalData(name);
  const known = Qcow2.dirty | Qcow2.compressionType | Qcow2.extendedL2;
  if ((incompatible & Qcow2.corrupt) !== 0n) throw new OffshootError('foreign-format', `${name} is marked as corrupt; repair it first (qemu-img check -r all)`, { path: name });
  if ((incompatible & ~known) !== 0n) {
    throw new OffshootError('foreign-format', `${name} has features (${(incompatible & ~known).toString(16)}) that are not known here; convert it first`, { path: name });
  }
  const headerLength = header.readUInt32BE(Qcow2.headerLength);
  if (headerLength < Qcow2.headerBytes || headerLength > 2 ** clusterBits) throw damaged(name);
  await checkExtensions(handle, headerLength, 2 ** clusterBits, name);
}

/** Extensions follow the header, within the first cluster: a number, a length, and as many bytes, padded to eight. */
async function checkExtensions(handle: FileHandle, beginBytes: number, endBytes: number, name: string): Promise<void> {
  let at = beginBytes;
  for (let count = 0; at + 8 <= endBytes; count += 1) {
    const head = await readAt(handle, at, 8);
    // Reads behind the end of the file are what an image without extensions looks like.
    if (head.length < 8) return;
    const type = head.readUInt32BE(0);
    if (type === Qcow2.endOfExtensions) return;
    if (type === Qcow2.dataFileExtension) throw externalData(name);
    if (type === Qcow2.backingFormatExtension) throw overlay(name);
    const lengthBytes = head.readUInt32BE(4);
    if (count >= Qcow2.extensionsMax || lengthBytes > endBytes - at - 8) throw damaged(name);
    at += 8 + Math.ceil(lengthBytes / 8) * 8;
  }
}

async function checkVmdk(handle: FileHandle, name: string): Promise<void> {
  const header = await readAt(handle, 0, Vmdk.headerBytes);
  const magic = header.toString('latin1', 0, 4);
  // A bare descriptor, or an ESX sparse extent whose parent the header names.
  if (magic !== 'KDMV' || header.length < Vmdk.headerBytes) throw severalFiles(name, magic === 'COWD' ? 'ESX sparse extent' : 'descriptor');
  // Without a capacity the descriptor counts alone, and may name any file as an extent.
  if (header.readBigUInt64LE(Vmdk.capacity) === 0n) throw severalFiles(name, 'descriptor in a header without a size');
  const sector = header.readBigUInt64LE(Vmdk.descriptorSector);
  const sectors = header.readBigUInt64LE(Vmdk.descriptorSectors);
  if (sector === 0n) throw severalFiles(name, 'an extent without a descriptor');
  if (sectors === 0n || sectors * BigInt(SECTOR_BYTES) > BigInt(DESCRIPTOR_BYTES_MAX) || sector > BigInt(Math.floor(Number.MAX_SAFE_INTEGER / SECTOR_BYTES) - DESCRIPTOR_BYTES_MAX)) throw damaged(name);
  const raw = await readAt(handle, Number(sector) * SECTOR_BYTES, Number(sectors) * SECTOR_BYTES);
  const descriptor = raw.toString('latin1').split('\0', 1)[0] ?? '';
  const createType = /^\s*createType\s*=\s*"([^"]*)"/mu.exec(descriptor)?.[1] ?? 'unknown';
  if (!VMDK_SINGLE_FILE.has(createType)) throw severalFiles(name, createType);
  const parent = /^\s*parentCID\s*=\s*([0-9a-fA-F]+)/mu.exec(descriptor)?.[1];
  if (/^\s*parentFileNameHint\s*=/imu.test(descriptor) || (parent !== undefined && !/^f{8}$/iu.test(parent))) throw overlay(name);
  const extents = descriptor.split('\n').filter((line) => /^\s*(?:RW|RDONLY|NOACCESS)\s/u.test(line));
  if (extents.length > 1 || extents.some((line) => !/^\s*(?:RW|RDONLY)\s+[0-9]+\s+SPARSE\s/u.test(line))) throw severalFiles(name, createType);
}

async function readAt(handle: FileHandle, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
  const buffer = Buffer.alloc(lengthBytes);
  const { bytesRead } = await handle.read(buffer, 0, lengthBytes, offsetBytes);
  return buffer.subarray(0, bytesRead);
}

function overlay(name: string): OffshootError {
  return new OffshootError('foreign-format', `${name} is an overlay of another file, its backing file, which is never followed; flatten it first, with \`qemu-img convert\``, { path: name });
}

function externalData(name: string): OffshootError {
  return new OffshootError('foreign-format', `${name} keeps its data in another file, which is never followed; convert it first`, { path: name });
}

function severalFiles(name: string, what: string): OffshootError {
  return new OffshootError('foreign-format', `${name} is a VMDK (${what}) that is spread over several files, which are never followed; convert it to monolithicSparse first`, { path: name });
}

function damaged(name: string): OffshootError {
  return new OffshootError('foreign-format', `${name} has a damaged header`, { path: name });
}
