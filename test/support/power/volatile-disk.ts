/**
 * A model of a file system over a disk with a volatile cache: what may be on the disk when the power goes.
 *
 * Every file has the content that a sync has made durable, and the changes since. When the power goes, each unit of a
 * file (4 KiB, or a sector of 512 bytes) holds its content after any number of the changes that touched it since, chosen for each unit
 * by itself: not there, there, torn, and in another order than written are all among that. The file's size is any that
 * it had since. A punched hole is a change like a write; cutting a file is one thing, for every file system logs the new size before it
 * frees what lay behind it, and is there with all that it cuts or not at all. The names in a directory are durable by the directory's own fsync
 * alone; each name is what it was after any number of its changes since then (or all names are, after the same prefix of the directory's
 * changes). Only a rename is one thing: its old name does not go before the new one is there, as on every journaled file system.
 *
 * Pessimistic on purpose: ext4 and XFS keep more (an fsync of a new file, the order of metadata), so what holds here holds there.
 */
import path from 'node:path';

import type { Random } from '../model/random.js';
import type { FileEvent } from './events.js';

export const PAGE_BYTES = 4096;
export const SECTOR_BYTES = 512;
const GARBAGE = { bytes: Buffer.alloc(32_768, 0x5a), sizeBytes: 32_768 };

interface Change {
  readonly sequence: number;
  readonly from: number;
  readonly to: number;
  /** Null: zeros. */
  readonly data: Buffer | null;
  /** The size after the change. */
  readonly sizeBytes: number;
  readonly cuts: boolean;
}

interface Content {
  bytes: Buffer;
  sizeBytes: number;
}

interface FileInode {
  readonly kind: 'file';
  readonly durable: Content;
  readonly current: Content;
  pending: Change[];
}

interface NameChange {
  readonly sequence: number;
  readonly name: string;
  readonly inode: number | null;
  /** The name goes because of a rename to this directory and name. */
  readonly movedTo?: { readonly directory: number; readonly name: string };
}

interface DirectoryInode {
  readonly kind: 'directory';
  readonly durable: Map<string, number>;
  readonly current: Map<string, number>;
  pending: NameChange[];
}

/** Files and directories by their path relative to the root; directories before what is in them. */
export type Image = ReadonlyMap<string, { readonly directory: true } | { readonly directory: false; readonly bytes: Buffer; readonly sizeBytes: number }>;

/** Says for `versions` states, the durable one first, which is on the disk. */
export type Chooser = (what: { readonly path: string; readonly subject: 'data' | 'size' | 'name'; readonly versions: number }) => number;

export interface Tear {
  /** Top directories that the image leaves out. */
  readonly without?: readonly string[];
  readonly unitBytes: number;
  /** The names of a directory change in their order. */
  readonly orderedNames: boolean;
  readonly choose: Chooser;
}

export class VolatileDisk {
  private readonly inodes = new Map<number, FileInode | DirectoryInode>();
  private readonly paths = new Map<string, number>();
  private readonly syncs = new Map<number, number>();
  private readonly root: string;
  private sequence = 0;

  /** `root`: the path of the directory that the image is of; it is durable itself. */
  constructor(root: string) {
    this.root = root;
    this.inodes.set(0, { kind: 'directory', durable: new Map(), current: new Map(), pending: [] });
    this.paths.set(root, 0);
  }

  names(): ReadonlyMap<string, number> {
    return this.paths;
  }

  /** True when the event may change what is on the disk. */
  apply(event: FileEvent): boolean {
    this.sequence += 1;
    switch (event.kind) {
      case 'marker': return false;
      case 'create': return this.create(event.path, event.inode, event.directory);
      case 'unlink': return this.rename(event.path, undefined);
      case 'rename': return this.rename(event.path, event.target);
      case 'sync-begin':
        this.syncs.set(event.sync, this.sequence);
        return false;
      case 'sync-end': return this.synced(event.inode, this.syncs.get(event.sync) ?? 0);
      case 'write':
        return this.change(event.inode, event.offsetBytes, event.offsetBytes + event.data.length, event.data, (size) => Math.max(size, event.offsetBytes + event.data.length));
      case 'zero': return this.change(event.inode, event.offsetBytes, event.offsetBytes + event.lengthBytes, null, (size) => size);
      case 'extend': return this.change(event.inode, 0, 0, null, (size) => Math.max(size, event.sizeBytes));
      case 'truncate': return this.change(event.inode, event.sizeBytes, Number.MAX_SAFE_INTEGER, null, () => event.sizeBytes);
      default: throw new Error(`an event of no known kind: ${JSON.stringify(event satisfies never)}`);
    }
  }

  /** What is in the page cache: the files as their processes see them. */
  current(): Image {
    return this.image({ unitBytes: PAGE_BYTES, orderedNames: false, choose: ({ versions }) => versions - 1 });
  }

  image(tear: Tear): Image {
    const image = new Map<string, { readonly directory: true } | { readonly directory: false; readonly bytes: Buffer; readonly sizeBytes: number }>();
    const names = this.chooseNames(tear);
    const walk = (inode: number, relative: string): void => {
      for (const [name, child] of names.get(inode) ?? []) {
        const at = relative === '' ? name : `${relative}/${name}`;
        if (tear.without?.includes(at) === true) continue;
        const found = this.inodes.get(child)!;
        if (found.kind === 'directory') {
          image.set(at, { directory: true });
          walk(child, at);
        } else {
          // SQLite maps the index of its log; what a loss leaves of it is nobody's business, so it may be anything.
          image.set(at, { directory: false, ...(at.endsWith('-shm') ? GARBAGE : chooseContent(found, at, tear)) });
        }
      }
    };
    walk(0, '');
    return image;
  }

  /** Changes that a power loss now could take away. */
  pendingChanges(): number {
    let count = 0;
    for (const inode of this.inodes.values()) count += inode.pending.length;
    return count;
  }

  pathOf(inode: number): string | undefined {
    for (const [name, number] of this.paths) if (number === inode) return name;
    return undefined;
  }

  private create(name: string, inode: number, directory: boolean): boolean {
    this.inodes.set(inode, directory
      ? { kind: 'directory', durable: new Map(), current: new Map(), pending: [] }
      : { kind: 'file', durable: { bytes: Buffer.alloc(0), sizeBytes: 0 }, current: { bytes: Buffer.alloc(0), sizeBytes: 0 }, pending: [] });
    this.setName(name, inode);
    this.paths.set(name, inode);
    return true;
  }

  private rename(from: string, to: string | undefined): boolean {
    const inode = this.paths.get(from);
    if (inode === undefined) throw new Error(`${from} is not in the model`);
    this.paths.delete(from);
    if (to === undefined) {
      this.setName(from, null);
      return true;
    }
    this.setName(to, inode);
    this.setName(from, null, { directory: this.parentOf(to), name: path.basename(to) });
    this.paths.set(to, inode);
    return true;
  }

  private parentOf(name: string): number {
    const parent = this.paths.get(path.dirname(name));
    if (parent === undefined) throw new Error(`the directory of ${name} is not in the model below ${this.root}`);
    return parent;
  }

  private setName(name: string, inode: number | null, movedTo?: NameChange['movedTo']): void {
    const directory = this.inodes.get(this.parentOf(name));
    if (directory?.kind !== 'directory') throw new Error(`${name} does not lie in a directory`);
    const base = path.basename(name);
    directory.pending.push({ sequence: this.sequence, name: base, inode, ...(movedTo === undefined ? {} : { movedTo }) });
    applyName(directory.current, base, inode);
  }

  private change(inode: number, from: number, to: number, data: Buffer | null, sizeAfter: (sizeBytes: number) => number): boolean {
    const file = this.inodes.get(inode);
    if (file?.kind !== 'file') throw new Error(`a write to inode ${inode}, which is no file`);
    const sizeBytes = sizeAfter(file.current.sizeBytes);
    // Zeroing behind the end (a truncation, a hole) changes nothing there.
    const end = data === null ? Math.min(to, file.current.sizeBytes) : to;
    const change: Change = { sequence: this.sequence, from: Math.min(from, end), to: end, data, sizeBytes, cuts: sizeBytes < file.current.sizeBytes };
    file.pending.push(change);
    applyChange(file.current, change);
    return true;
  }

  private synced(inode: number, begun: number): boolean {
    const found = this.inodes.get(inode);
    if (found === undefined) throw new Error(`a sync of inode ${inode}, which is not in the model`);
    if (found.kind === 'file') {
      for (const change of found.pending) if (change.sequence < begun) applyChange(found.durable, change);
      found.pending = found.pending.filter((change) => change.sequence >= begun);
    } else {
      for (const change of found.pending) if (change.sequence < begun) applyName(found.durable, change.name, change.inode);
      found.pending = found.pending.filter((change) => change.sequence >= begun);
    }
    return true;
  }

  private chooseNames(tear: Tear): Map<number, Map<string, number>> {
    const chosen = new Map<number, Map<string, number>>();
    const moves: { readonly directory: number; readonly change: NameChange; readonly inode: number }[] = [];
    for (const [number, directory] of this.inodes) {
      if (directory.kind !== 'directory') continue;
      const names = new Map(directory.durable);
      const isApplied = this.chooserOfNames(number, directory, tear);
      for (const change of directory.pending) {
        if (!isApplied(change)) continue;
        const before = names.get(change.name);
        if (change.movedTo !== undefined && before !== undefined) moves.push({ directory: number, change, inode: before });
        applyName(names, change.name, change.inode);
      }
      chosen.set(number, names);
    }
    for (const { directory, change, inode } of moves) {
      const target = change.movedTo!;
      const arrived = this.inodes.get(target.directory) as DirectoryInode;
      const isThere = chosen.get(target.directory)?.has(target.name) === true || arrived.durable.get(target.name) === inode;
      if (!isThere && !chosen.get(directory)!.has(change.name)) chosen.get(directory)!.set(change.name, inode);
    }
    return chosen;
  }

  private chooserOfNames(number: number, directory: DirectoryInode, tear: Tear): (change: NameChange) => boolean {
    const at = this.pathOf(number) ?? '';
    if (directory.pending.length === 0) return () => false;
    if (tear.orderedNames) {
      const count = tear.choose({ path: at, subject: 'name', versions: directory.pending.length + 1 });
      const applied = new Set(directory.pending.slice(0, count));
      return (change) => applied.has(change);
    }
    const applied = new Set<NameChange>();
    for (const name of new Set(directory.pending.map((change) => change.name))) {
      const changes = directory.pending.filter((change) => change.name === name);
      for (const change of changes.slice(0, tear.choose({ path: `${at}/${name}`, subject: 'name', versions: changes.length + 1 }))) applied.add(change);
    }
    return (change) => applied.has(change);
  }
}

function chooseContent(file: FileInode, at: string, tear: Tear): { readonly bytes: Buffer; readonly sizeBytes: number } {
  const { durable, pending } = file;
  if (pending.length === 0) return { bytes: durable.bytes.subarray(0, durable.sizeBytes), sizeBytes: durable.sizeBytes };
  // The cuts that are on the disk, each whole: what was written after one that is not there cannot be there.
  const cuts = pending.filter((change) => change.cuts);
  const cutsThere = cuts.length === 0 ? 0 : tear.choose({ path: at, subject: 'size', versions: cuts.length + 1 });
  const nextCut = cuts[cutsThere];
  const possible = nextCut === undefined ? pending : pending.slice(0, pending.indexOf(nextCut));
  const lastCut = cutsThere === 0 ? undefined : cuts[cutsThere - 1];
  const sizes = [lastCut?.sizeBytes ?? durable.sizeBytes];
  for (const { sizeBytes } of possible.slice(lastCut === undefined ? 0 : possible.indexOf(lastCut))) if (sizeBytes !== sizes.at(-1)) sizes.push(sizeBytes);
  const sizeBytes = sizes.length === 1 ? sizes[0]! : sizes[tear.choose({ path: at, subject: 'size', versions: sizes.length })]!;
  const bytes = Buffer.alloc(Math.max(durable.sizeBytes, ...pending.map((change) => change.sizeBytes)));
  durable.bytes.copy(bytes, 0, 0, durable.sizeBytes);
  const units = new Map<number, Change[]>();
  for (const change of possible) {
    for (let unit = Math.floor(change.from / tear.unitBytes); unit * tear.unitBytes < change.to; unit += 1) {
      const list = units.get(unit);
      if (list === undefined) units.set(unit, [change]);
      else list.push(change);
    }
  }
  for (const [unit, changes] of units) {
    const least = changes.findLastIndex((change) => change.cuts) + 1;
    const count = least + tear.choose({ path: at, subject: 'data', versions: changes.length - least + 1 });
    for (const change of changes.slice(0, count)) {
      const from = Math.max(change.from, unit * tear.unitBytes);
      const to = Math.min(change.to, (unit + 1) * tear.unitBytes);
      if (change.data === null) bytes.fill(0, from, to);
      else change.data.copy(bytes, from, from - change.from, to - change.from);
    }
  }
  return { bytes: bytes.subarray(0, sizeBytes), sizeBytes };
}

function applyChange(content: Content, change: Change): void {
  const needed = Math.max(change.sizeBytes, change.data === null ? 0 : change.to);
  if (needed > content.bytes.length) {
    const grown = Buffer.alloc(Math.max(needed, 2 * content.bytes.length));
    content.bytes.copy(grown, 0, 0, content.sizeBytes);
    content.bytes = grown;
  }
  if (change.data === null) content.bytes.fill(0, Math.min(change.from, content.bytes.length), Math.min(change.to, content.bytes.length));
  else change.data.copy(content.bytes, change.from);
  if (change.sizeBytes < content.sizeBytes) content.bytes.fill(0, change.sizeBytes, Math.min(content.sizeBytes, content.bytes.length));
  content.sizeBytes = change.sizeBytes;
}

function applyName(names: Map<string, number>, name: string, inode: number | null): void {
  if (inode === null) names.delete(name);
  else names.set(name, inode);
}

/** Ways in which the power goes, from the kindest to the strangest; each image takes one of them. */
export const TEARS = ['nothing', 'everything', 'any', 'any-sector', 'mostly-old', 'mostly-new', 'metadata-only', 'data-only', 'prefix-names'] as const;
export type TearName = (typeof TEARS)[number];

export function tearOf(name: TearName, random: Random): Tear {
  const any: Chooser = ({ versions }) => random.below(versions);
  const isData = (what: { readonly path: string }): boolean => what.path.includes('.layer');
  switch (name) {
    case 'nothing': return { unitBytes: PAGE_BYTES, orderedNames: false, choose: () => 0 };
    case 'everything': return { unitBytes: PAGE_BYTES, orderedNames: false, choose: ({ versions }) => versions - 1 };
    case 'any': return { unitBytes: PAGE_BYTES, orderedNames: false, choose: any };
    case 'any-sector': return { unitBytes: SECTOR_BYTES, orderedNames: false, choose: any };
    case 'mostly-old': return { unitBytes: SECTOR_BYTES, orderedNames: false, choose: (what) => (random.chance(0.1) ? any(what) : 0) };
    case 'mostly-new': return { unitBytes: PAGE_BYTES, orderedNames: false, choose: (what) => (random.chance(0.1) ? any(what) : what.versions - 1) };
    case 'metadata-only': return { unitBytes: PAGE_BYTES, orderedNames: false, choose: (what) => (isData(what) ? 0 : what.versions - 1) };
    case 'data-only': return { unitBytes: PAGE_BYTES, orderedNames: false, choose: (what) => (isData(what) ? what.versions - 1 : 0) };
    case 'prefix-names': return { unitBytes: PAGE_BYTES, orderedNames: true, choose: any };
    default: throw new Error(`no way to tear is called ${String(name satisfies never)}`);
  }
}

/** True when a disk's blocks can only be told apart by their sectors after such a loss. */
export function tearsSectors(name: TearName): boolean {
  return name === 'any-sector' || name === 'mostly-old';
}
