/**
 * `.block` at the top of each container, and of each snapshot of one: a directory that nobody made, with a symbolic link for each disk directly in it. Reading a
 * link attaches the disk as a block device of this host and gives the device's path; what that takes is done elsewhere (`vdisks/block-access.ts`), and
 * nothing else waits meanwhile. Main thread.
 *
 * A wrapper with the file system's own interface: everything else goes through as it is. The directory is no node of the store: it is in no listing of
 * its container, no snapshot and no copy of one, and whoever looks for it by name finds it. Its nodes have numbers of their own, above all that
 * the store gives, which follow from the container's and the disk's, so that they are the same for every server.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { assertNameLength } from './names.js';
import type { Attributes, Caller, DirectoryEntry, FileSystem, NodeId } from './types.js';

export const BLOCK_NAME = '.block';

/** Node ids of the store are far below. */
const DIRECTORIES_FROM = 2 ** 52;
const LINKS_FROM = 2 ** 52 + 2 ** 51;
const READ_AND_ENTER = 0o555;

export interface BlockViewParts {
  readonly meta: MetaStore;
  /** Attaches the disk and gives `/dev/loop7`; throws for whom may not, and when there are too many. */
  readonly device: (nodeId: NodeId, caller: Caller | undefined) => Promise<string>;
}

/** Adds the view to a file system. */
export function withBlockView(inner: FileSystem, { meta, device }: BlockViewParts): FileSystem {
  const row = (node: NodeId): NodeRow => {
    const found = meta.nodes.byId(node);
    if (found === undefined) throw new OffshootError('not-found', `node ${node} does not exist any more: look its name up again`, { nodeId: node });
    return found;
  };
  const directoryAttributes = (containerId: NodeId): Attributes => {
    const container = inner.getattr(containerId);
    return { ...container, nodeId: DIRECTORIES_FROM + containerId, mode: container.mode & READ_AND_ENTER, linkCount: 2, sizeBytes: 0, allocatedBytes: 0 };
  };
  const linkAttributes = (disk: NodeRow): Attributes => ({
    nodeId: LINKS_FROM + disk.id, generation: disk.generation, kind: 'symlink', mode: 0o777, uid: disk.uid, gid: disk.gid, linkCount: 1, sizeBytes: 0, allocatedBytes: 0,
    atimeUs: disk.atimeUs, mtimeUs: disk.mtimeUs, ctimeUs: disk.ctimeUs,
  });
  const diskOf = (link: NodeId): NodeRow => {
    const disk = row(link - LINKS_FROM);
    if (disk.kind !== 'disk' || disk.parentId === null) throw new OffshootError('not-found', `the disk of ${BLOCK_NAME} is gone: look its name up again`);
    return disk;
  };
  const hasView = (node: NodeId): boolean => meta.nodes.byId(node)?.parentId === ROOT_ID || meta.snapshots.byDirectory(node) !== undefined;

  const lookup = (parent: NodeId, name: string): Attributes => {
    if (isLink(parent)) throw new OffshootError('not-a-directory', `a link in ${BLOCK_NAME} is not a directory`);
    if (!isDirectory(parent)) {
      if (name === BLOCK_NAME && hasView(parent) && meta.nodes.child(parent, name) === undefined) return directoryAttributes(parent);
      return inner.lookup(parent, name);
    }
    const containerId = parent - DIRECTORIES_FROM;
    if (name === '.') return directoryAttributes(containerId);
    if (name === '..') return inner.getattr(containerId);
    assertNameLength(name);
    row(containerId);
    const disk = meta.nodes.child(containerId, name);
    if (disk?.kind !== 'disk') throw new OffshootError('not-found', `${name} is not a disk directly in the container: look at the name again`);
    return linkAttributes(disk);
  };

  const readdir = (node: NodeId, afterCookie: number, max: number): readonly DirectoryEntry[] => {
    if (isLink(node)) throw new OffshootError('not-a-directory', `a link in ${BLOCK_NAME} is not a directory`);
    if (!isDirectory(node)) return inner.readdir(node, afterCookie, max);
    row(node - DIRECTORIES_FROM);
    const entries: DirectoryEntry[] = [];
    for (let after = afterCookie; entries.length < max; ) {
      const batch = meta.nodes.children(node - DIRECTORIES_FROM, after, max);
      const last = batch.at(-1);
      if (last === undefined) break;
      for (const child of batch) if (child.kind === 'disk' && entries.length < max) entries.push({ name: child.name, cookie: child.id, attributes: linkAttributes(child) });
      after = last.id;
    }
    return entries;
  };

  /** Whatever changes something is refused before it is asked for. */
  const real = (...nodes: readonly NodeId[]): void => {
    if (nodes.some((node) => node >= DIRECTORIES_FROM)) throw new OffshootError('not-permitted', `${BLOCK_NAME} is Offshoot's own: nothing in it can be changed`);
  };
  const onDirectory = (node: NodeId): NodeId => (isDirectory(node) ? node - DIRECTORIES_FROM : isLink(node) ? diskOf(node).id : node);

  return {
    lookup,
    readdir,
    getattr: (node) => (isLink(node) ? linkAttributes(diskOf(node)) : isDirectory(node) ? directoryAttributes(node - DIRECTORIES_FROM) : inner.getattr(node)),
    parentOf: (node) => (isDirectory(node) ? node - DIRECTORIES_FROM : inner.parentOf(node)),
    readlink: (node, caller) => (isLink(node) ? device(diskOf(node).id, caller) : inner.readlink(node)),
    setattr: async (node, changes, caller) => {
      real(node);
      return await inner.setattr(node, changes, caller);
    },
    mkdir: (parent, name, mode, caller) => { real(parent); return inner.mkdir(parent, name, mode, caller); },
    rmdir: (parent, name) => { real(parent); inner.rmdir(parent, name); },
    create: (parent, name, mode, flags, caller, mark) => { real(parent); return inner.create(parent, name, mode, flags, caller, mark); },
    symlink: (parent, name, target, caller) => { real(parent); return inner.symlink(parent, name, target, caller); },
    unlink: (parent, name) => { real(parent); inner.unlink(parent, name); },
    rename: (parent, name, newParent, newName, flags) => { real(parent, newParent); inner.rename(parent, name, newParent, newName, flags); },
    open: (node, flags, mark) => { real(node); return inner.open(node, flags, mark); },
    release: (handle) => { inner.release(handle); },
    read: (node, offsetBytes, target) => inner.read(node, offsetBytes, target),
    write: (node, offsetBytes, data) => inner.write(node, offsetBytes, data),
    fallocate: (node, mode, offsetBytes, lengthBytes) => { real(node); return inner.fallocate(node, mode, offsetBytes, lengthBytes); },
    copyFileRange: async (source, sourceAt, target, targetAt, length) => await inner.copyFileRange(source, sourceAt, target, targetAt, length),
    seek: (node, offsetBytes, whence) => inner.seek(node, offsetBytes, whence),
    flush: async (node) => { await inner.flush(onDirectory(node)); },
    flushDirectory: async (node) => { await inner.flushDirectory(onDirectory(node)); },
    statfs: (node) => inner.statfs(onDirectory(node)),
  };
}

function isLink(node: NodeId): boolean { return node >= LINKS_FROM; }
function isDirectory(node: NodeId): boolean { return node >= DIRECTORIES_FROM && node < LINKS_FROM; }
