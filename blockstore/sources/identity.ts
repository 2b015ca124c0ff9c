/**
 * What tells whether a source file is still the one that was taken in: its attributes, not its content.
 *
 * Kept when the file is imported in place, compared each time it is opened and while it is in use. A local file must be the same inode of
 * the same device. The device number of a network or FUSE mount is another one after each mount, and so are inode numbers of many FUSE file
 * systems: there size and time of modification have to do (and the inode number where the file system keeps it).
 */
import type fs from 'node:fs';

import type { FileIdentity } from '../meta/rows.js';

/** How much of an identity has to be the same. */
export type IdentityScope = 'local' | 'inode' | 'content';

export function identityOf(stat: fs.BigIntStats): FileIdentity {
  return {
    device: Number(stat.dev),
    inode: Number(stat.ino),
    sizeBytes: Number(stat.size),
    mtimeNs: stat.mtimeNs.toString(),
    ctimeNs: stat.ctimeNs.toString(),
  };
}

export function scopeOf(place: { readonly isRemote: boolean; readonly fileSystemType: string }): IdentityScope {
  if (!place.isRemote) return 'local';
  return place.fileSystemType.startsWith('fuse') ? 'content' : 'inode';
}

/** What differs, in words; null when it is the same file with the same content, as far as attributes can tell. The ctime also moves when the file is linked or its mode changes. */
export function differenceOf(recorded: FileIdentity, now: FileIdentity, scope: IdentityScope): string | null {
  if (now.sizeBytes !== recorded.sizeBytes) return `it has ${now.sizeBytes} bytes now, and had ${recorded.sizeBytes}`;
  if (now.mtimeNs !== recorded.mtimeNs) return `it was modified at ${timeOf(now.mtimeNs)}, and before at ${timeOf(recorded.mtimeNs)}`;
  if (scope !== 'content' && now.inode !== recorded.inode) return `it is another file of the same size and time (inode ${now.inode}, before ${recorded.inode})`;
  if (scope === 'local' && now.device !== recorded.device) return `it lies on another device (${now.device}, before ${recorded.device})`;
  return null;
}

function timeOf(ns: string): string {
  return new Date(Number(BigInt(ns) / 1_000_000n)).toISOString();
}
