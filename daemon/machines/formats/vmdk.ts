/**
 * The descriptor of a virtual disk of VMware: a small text beside a flat file, which is a raw disk. The store keeps raw disks, so that a
 * descriptor is all that VMware needs besides. Written for disks of the store; read to find out what a machine's disk lies in.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import { assertBytes, SECTOR_BYTES } from '../../../blockstore/units.js';
import { assertPath, invalid, lineAt, shown } from './values.js';

/** A descriptor has a few hundred characters; what is larger is a disk with its descriptor inside (sparse, stream-optimised). */
const DESCRIPTOR_CHARACTERS_MAX = 64 * 1024;
const EXTENTS_MAX = 256;
/** 64 TiB, as for every disk of the store. */
const SECTORS_MAX = 64 * 1024 ** 4 / 512;
/** Beyond what 16 bits of cylinders hold the numbers mean nothing, and VMware writes the largest. */
const CYLINDERS_MAX = 65_535;

/**
 * - `vmfs`: for ESXi, whose datastores hold no other flat disks, NFS datastores either.
 * - `monolithicFlat`: for Workstation, Player and Fusion.
 */
export type FlatDiskType = 'vmfs' | 'monolithicFlat';

export interface DescriptorOptions {
  readonly createType?: FlatDiskType;
  /** What the guest's controller is: `lsilogic` serves every SCSI one, NVMe and SATA too. */
  readonly adapterType?: 'lsilogic' | 'ide';
}

/** Text of a descriptor for the raw disk `flatFileName` beside it. `contentId` is eight hexadecimal digits that change with the content. */
export function vmdkDescriptor(sizeBytes: number, flatFileName: string, contentId: string, options: DescriptorOptions = {}): string {
  const { createType = 'vmfs', adapterType = 'lsilogic' } = options;
  assertBytes(sizeBytes, 'the size of the disk');
  if (sizeBytes === 0 || sizeBytes % SECTOR_BYTES !== 0) throw invalid(`a disk of VMware has a whole number of ${SECTOR_BYTES}-byte sectors: ${sizeBytes} bytes are none`);
  if (!/^[0-9a-f]{8}$/.test(contentId) || contentId === 'ffffffff') throw invalid(`a content id is eight hexadecimal digits in lower case, and not ffffffff: ${shown(contentId)}`);
  assertPath('the name of the flat file', flatFileName);
  if (/["/\\]/.test(flatFileName)) throw invalid(`the flat file must lie beside its descriptor, by a name without quotes: ${shown(flatFileName)}`);
  const sectors = sizeBytes / SECTOR_BYTES;
  const [heads, sectorsPerTrack] = adapterType === 'ide' ? [16, 63] as const : [255, 63] as const;
  const cylinders = Math.max(1, Math.min(CYLINDERS_MAX, Math.floor(sectors / (heads * sectorsPerTrack))));
  return `${[
    '# Disk DescriptorFile',
    'version=1',
    'encoding="UTF-8"',
    `CID=${contentId}`,
    'parentCID=ffffffff',
    `createType="${createType}"`,
    '',
    '# Extent description',
    createType === 'vmfs' ? `RW ${sectors} VMFS "${flatFileName}"` : `RW ${sectors} FLAT "${flatFileName}" 0`,
    '',
    '# The Disk Data Base',
    '#DDB',
    '',
    `ddb.adapterType = "${adapterType}"`,
    `ddb.geometry.cylinders = "${cylinders}"`,
    `ddb.geometry.heads = "${heads}"`,
    `ddb.geometry.sectors = "${sectorsPerTrack}"`,
    'ddb.virtualHWVersion = "4"',
  ].join('\n')}\n`;
}

export interface VmdkExtent {
  readonly access: 'RW' | 'RDONLY' | 'NOACCESS';
  readonly sizeBytes: number;
  /** `FLAT`, `VMFS`, `SPARSE`, `VMFSSPARSE`, `SESPARSE`, `ZERO`, `VMFSRDM`... */
  readonly type: string;
  readonly file: string | null;
  readonly offsetBytes: number;
}

export interface VmdkDescriptor {
  readonly createType: string;
  readonly contentId: string;
  readonly extents: readonly VmdkExtent[];
  /** The one file that is the raw disk; null when the disk is anything else (a delta, sparse, in pieces, a device). */
  readonly rawFile: string | null;
}

/** Throws `foreign-format` when the text is no descriptor. */
export function parseVmdkDescriptor(text: string): VmdkDescriptor {
  if (text.length > DESCRIPTOR_CHARACTERS_MAX || !/^\s*# Disk DescriptorFile\s*$/im.test(text.slice(0, 200))) {
    throw new OffshootError('foreign-format', 'this is no descriptor of a VMware disk: its first line is not "# Disk DescriptorFile"');
  }
  const values = new Map<string, string>();
  const extents: VmdkExtent[] = [];
  let offset = 0;
  for (const raw of text.split('\n')) {
    const line = raw.trim();
    const number = lineAt(text, offset);
    offset += raw.length + 1;
    if (line === '' || line.startsWith('#')) continue;
    if (/^(RW|RDONLY|NOACCESS)\s/.test(line)) {
      if (extents.length === EXTENTS_MAX) throw new OffshootError('foreign-format', `line ${number} of the descriptor: more than ${EXTENTS_MAX} extents`, { line: number });
      extents.push(parseExtent(line, number));
      continue;
    }
    const equals = line.indexOf('=');
    if (equals < 0) throw new OffshootError('foreign-format', `line ${number} of the descriptor is neither an extent nor 'key=value': ${shown(line)}`, { line: number });
    values.set(line.slice(0, equals).trim().toLowerCase(), line.slice(equals + 1).trim().replace(/^"(.*)"$/, '$1'));
  }
  const createType = values.get('createtype') ?? '';
  const isBase = (values.get('parentcid') ?? 'ffffffff').toLowerCase() === 'ffffffff';
  const only = extents.length === 1 ? extents[0]! : null;
  const isRaw = isBase && only?.offsetBytes === 0 && only.access === 'RW' && (only.type === 'FLAT' || only.type === 'VMFS')
    && ['vmfs', 'monolithicflat'].includes(createType.toLowerCase());
  return { createType, contentId: (values.get('cid') ?? '').toLowerCase(), extents, rawFile: isRaw ? only.file : null };
}

function parseExtent(line: string, number: number): VmdkExtent {
  const parts = /^(RW|RDONLY|NOACCESS)\s+([0-9]{1,15})\s+([A-Z]+)(?:\s+"([^"]*)"(?:\s+([0-9]{1,15}))?)?(?:\s.*)?$/.exec(line);
  if (parts === null) throw new OffshootError('foreign-format', `line ${number} of the descriptor is no extent: ${shown(line)}`, { line: number });
  const [, access, sectors, type, file, start] = parts;
  if (Math.max(Number(sectors), Number(start ?? 0)) > SECTORS_MAX) throw new OffshootError('foreign-format', `line ${number} of the descriptor: no disk is so large`, { line: number });
  return {
    access: access as VmdkExtent['access'], type: type!, file: file ?? null,
    sizeBytes: Number(sectors) * SECTOR_BYTES, offsetBytes: Number(start ?? 0) * SECTOR_BYTES,
  };
}
