/**
 * Machines in the store: which directory is one, what its configuration says, where the files lie that it names. Main thread; changes nothing.
 *
 * A machine is a directory in a container with exactly one configuration that a format recognises. What the table says of it is in
 * `machine-table.ts`; a directory that nobody cloned, imported or registered yet is a machine all the same, and has no row.
 */
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { SNAPSHOTS_NAME } from '../../blockstore/trees.js';
import { shown } from '../filesystem/names.js';
import type { Resolved } from '../filesystem/references.js';
import type { MachineAdapters } from './adapters.js';
import type { FileReference, MachineDocument, MachineFormat } from './format.js';
import { flatFileOf } from './vmdk-disks.js';

/** No configuration is larger. */
export const CONFIGURATION_BYTES_MAX = 1024 * 1024;
/** What a configuration may be called: others are not even looked into. */
const MAY_BE_CONFIGURATION = /(?:\.xml|\.vmx|^machine\.json)$/iu;

export interface MachineReadParts {
  readonly store: Store;
  readonly adapters: MachineAdapters;
  readonly mountDir: string;
}

export interface FoundMachine {
  readonly directory: NodeRow;
  readonly configuration: NodeRow;
  readonly format: MachineFormat;
  readonly text: string;
}

/** The machine in a directory; null when there is none. `invalid-argument` when it has two configurations. */
export async function findMachine(parts: MachineReadParts, directory: NodeRow): Promise<FoundMachine | null> {
  if (directory.kind !== 'directory' || directory.parentId === null || directory.parentId === ROOT_ID) return null;
  const { meta } = parts.store;
  const found: FoundMachine[] = [];
  for (const node of meta.nodes.children(directory.id, 0, Number.MAX_SAFE_INTEGER)) {
    if (node.kind !== 'file' || !MAY_BE_CONFIGURATION.test(node.name) || node.sizeBytes > CONFIGURATION_BYTES_MAX) continue;
    const text = await readText(parts.store, node);
    const format = parts.adapters.formatOf(node.name, text);
    if (format !== null) found.push({ directory, configuration: node, format, text });
  }
  const [first, second] = found;
  if (second !== undefined) {
    throw new OffshootError('invalid-argument',
      `${meta.nodes.pathOf(directory.id)} holds two configurations, ${shown(first?.configuration.name ?? '')} and ${shown(second.configuration.name)}: a machine has one, remove or rename the other`, { path: meta.nodes.pathOf(directory.id) });
  }
  return first ?? null;
}

/** The same for a directory that must be one. */
export async function requireMachine(parts: MachineReadParts, resolved: Resolved): Promise<FoundMachine> {
  const found = await findMachine(parts, resolved.node);
  if (found !== null) return found;
  throw new OffshootError('not-found', resolved.node.parentId === ROOT_ID
    ? `${shown(resolved.path)} is a container, no machine: a machine is a directory in one`
    : `${shown(resolved.path)} is no machine: it has no configuration (NAME.xml, NAME.vmx or machine.json) that Offshoot knows`, { path: resolved.path });
}

/** What an ordinary, small file holds. */
export async function readText(store: Store, node: NodeRow): Promise<string> {
  const disk = store.disks.acquire(node.id);
  try {
    const sizeBytes = disk.shared.sizeBytes();
    if (sizeBytes > CONFIGURATION_BYTES_MAX) throw new OffshootError('too-large', `${shown(node.name)} has ${sizeBytes} bytes: no configuration of a machine has more than ${CONFIGURATION_BYTES_MAX}`);
    const bytes = Buffer.alloc(sizeBytes);
    const got = await store.data.readOrLater(node.id, 0, bytes);
    return bytes.subarray(0, got).toString('utf8');
  } finally {
    store.disks.release(node.id);
  }
}

/** Where a tree is seen, and where what was written into its configurations says that it is: of a snapshot, the live one. */
export interface TreePlaces {
  readonly mountDir: string;
  /** In the store. */
  readonly roots: readonly string[];
}

export function placesOf(mountDir: string, resolved: Resolved): TreePlaces {
  if (resolved.snapshot === null) return { mountDir, roots: [resolved.path] };
  const [container = '', snapshots, , ...rest] = resolved.path.split('/');
  return { mountDir, roots: snapshots === SNAPSHOTS_NAME ? [resolved.path, [container, ...rest].join('/')] : [resolved.path] };
}

/** The path of a file below the root of its tree; null when it lies elsewhere. `directory`: the machine's, below the root, empty for the root itself. */
export function pathInTree(places: TreePlaces, directory: string, file: string): string | null {
  if (!path.posix.isAbsolute(file)) {
    const joined = path.posix.join('/', directory, file);
    // `join` keeps what would lead out of '/' inside it: that is another file.
    return path.posix.normalize(path.posix.join(directory, file)).startsWith('..') ? null : joined.slice(1);
  }
  const normal = path.posix.normalize(file);
  for (const root of places.roots) {
    const top = `${path.posix.join(places.mountDir, root)}/`;
    if (normal.startsWith(top)) return normal.slice(top.length);
  }
  return null;
}

/**
 * Where the files of a clone lie, for `MachineIdentity.fileOf`: what lies in the tree is the clone's own, everything else stays what it is. A
 * path that was relative stays so, as it is right for the clone too; one that was absolute becomes what the format wants.
 */
export function fileOfClone(places: TreePlaces, directory: string, targetRoot: string, format: Pick<MachineFormat, 'ownFiles'>): (reference: FileReference) => string | null {
  return (reference) => {
    const inside = path.posix.isAbsolute(reference.file) ? pathInTree(places, directory, reference.file) : null;
    if (inside === null) return null;
    // Both from the same top: a path that begins nowhere would be taken from where this process is.
    return format.ownFiles === 'relative' ? path.posix.relative(`/${directory}`, `/${inside}`) : path.posix.join(places.mountDir, targetRoot, inside);
  };
}

/** What `assertClonable` asks of the tree. */
export interface ClonableTree {
  /** The path below the root of what is named; null when it lies elsewhere. */
  readonly pathOf: (file: string) => string | null;
  readonly nodeAt: (path: string) => NodeRow | undefined;
  readonly read: (node: NodeRow) => Promise<string>;
}

/** Throws when a machine would write to what is not its own, a clone to the disk of its source, or when a disk is not raw. */
export async function assertClonable(document: MachineDocument, format: Pick<MachineFormat, 'diskFiles'>, name: string, tree: ClonableTree): Promise<void> {
  for (const reference of document.facts().files) {
    const inside = tree.pathOf(reference.file);
    if (reference.role === 'nvram' && inside === null) throw outside(name, reference);
    if (reference.role !== 'disk') continue;
    const hasDescriptor = format.diskFiles === 'vmdk' && reference.diskFormat === 'vmdk';
    if (reference.diskFormat !== null && reference.diskFormat !== 'raw' && !hasDescriptor) {
      throw new OffshootError('foreign-format',
        `${name} gives its disk ${reference.slot} as ${reference.diskFormat}: disks of the store are raw, and in another format a guest could name any file of the host; import the machine (offshoot vm import), or change its configuration`, { slot: reference.slot });
    }
    if (inside === null) throw outside(name, reference);
    const node = tree.nodeAt(inside);
    if (node === undefined) throw new OffshootError('not-found', `${name} names ${shown(reference.file)} as its disk ${reference.slot}, which is not there: correct its configuration (offshoot vm set)`, { slot: reference.slot });
    if (node.kind !== 'disk' && node.kind !== 'file') {
      throw new OffshootError('invalid-argument', `${name} names ${shown(reference.file)} as its disk ${reference.slot}, which is a ${node.kind}: put the disk itself there, as a link may lead to what is another's`, { slot: reference.slot });
    }
    if (hasDescriptor) await assertDescriptor(name, reference, inside, node, tree);
  }
}

/** The same of one machine that is to be registered, or changed: whoever may write to its configuration is not always who registers it. */
export async function assertOwnsItsFiles({ store, mountDir }: MachineReadParts, document: MachineDocument, format: Pick<MachineFormat, 'diskFiles'>, directory: NodeRow): Promise<void> {
  const name = store.meta.nodes.pathOf(directory.id);
  const places = { mountDir, roots: [name] };
  await assertClonable(document, format, name, {
    pathOf: (file) => pathInTree(places, '', file), nodeAt: (inside) => nodeBelow(store, directory, inside), read: async (node) => await readText(store, node),
  });
}

/** The node at a path below a directory; its links are not followed. */
export function nodeBelow({ meta }: Store, directory: NodeRow, inside: string): NodeRow | undefined {
  let node: NodeRow | undefined = directory;
  for (const name of inside === '' ? [] : inside.split('/')) node = node === undefined ? undefined : meta.nodes.child(node.id, name);
  return node;
}

/** The descriptor of a disk of VMware leads to a raw disk beside it, and nowhere else. */
async function assertDescriptor(name: string, { slot, file }: FileReference, inside: string, node: NodeRow, tree: ClonableTree): Promise<void> {
  const what = `${shown(file)} (${slot}) of ${name}`;
  if (node.kind !== 'file') throw new OffshootError('foreign-format', `${what} is no descriptor of a disk but a ${node.kind}: a .vmx names the descriptor beside it`, { slot });
  const { fileName, sizeBytes } = flatFileOf(await tree.read(node), what);
  if (fileName.includes('/')) throw new OffshootError('invalid-argument', `${what} leads to ${shown(fileName)}, out of its own directory: all clones would write to that one file; put the disk beside its descriptor`, { slot });
  const disk = tree.nodeAt(path.posix.join(path.posix.dirname(inside), fileName));
  if (disk === undefined || (disk.kind !== 'disk' && disk.kind !== 'file')) {
    throw new OffshootError('not-found', `${what} leads to ${shown(fileName)}, which is not there: import the disk beside its descriptor (offshoot import)`, { slot });
  }
  if (disk.sizeBytes < sizeBytes) throw new OffshootError('invalid-argument', `${what} describes a disk of ${sizeBytes} bytes, and ${shown(fileName)} has ${disk.sizeBytes}: correct the descriptor, or resize the disk`, { slot });
}

function outside(name: string, reference: FileReference): OffshootError {
  return new OffshootError('invalid-argument',
    `${name} names ${shown(reference.file)} (${reference.slot}), which lies outside of it: a machine writes to files of its own, and all clones of it would share that one; move it into the machine's directory`, { slot: reference.slot });
}
