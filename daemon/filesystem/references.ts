/**
 * References: how people name a disk, a container, or either of them in a snapshot. Main thread.
 *
 *   CONTAINER             CONTAINER/PATH             as they are now
 *   CONTAINER@NAME        CONTAINER/PATH@NAME        as they were in the snapshot NAME of the container
 *
 * The names of containers hold no `@`; paths in them may. A text that is a path is that path; otherwise its last `@` counts. The path before it need not
 * exist any more: what was removed since is still in the snapshot. `CONTAINER/.snapshots/NAME/PATH` is the same node.
 */
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NodeRow, type SnapshotRow } from '../../blockstore/meta/rows.js';
import { SNAPSHOTS_NAME } from '../../blockstore/trees.js';
import { shown } from './names.js';

export interface Resolved {
  readonly node: NodeRow;
  /** The path under the mount. */
  readonly path: string;
  /** The snapshot that it is part of. */
  readonly snapshot: SnapshotRow | null;
}

/** What is before and after the last `@`; null without one. Says nothing of what exists. */
export function splitReference(text: string): { readonly path: string; readonly snapshot: string } | null {
  const at = text.lastIndexOf('@');
  if (at <= 0 || at === text.length - 1 || text.includes('/', at)) return null;
  return { path: text.slice(0, at), snapshot: text.slice(at + 1) };
}

export class References {
  readonly #meta: MetaStore;
  readonly #resolvePath: (path: string) => NodeRow;

  constructor(meta: MetaStore, resolvePath: (path: string) => NodeRow) {
    this.#meta = meta;
    this.#resolvePath = resolvePath;
  }

  /** `not-found` says what of it is missing. */
  resolve(text: string): Resolved {
    let missing: OffshootError;
    try {
      const node = this.#resolvePath(text);
      return { node, path: text, snapshot: this.snapshotOf(node) };
    } catch (thrown) {
      missing = toOffshootError(thrown);
      if (missing.kind !== 'not-found' && missing.kind !== 'not-a-directory') throw thrown;
    }
    const parts = splitReference(text);
    if (parts === null) throw missing;
    const { snapshot, inside } = this.#snapshotNamed(parts.path, parts.snapshot, text);
    const directory = `${this.#meta.nodes.pathOf(snapshot.containerId)}/${SNAPSHOTS_NAME}/${snapshot.name}`;
    const path = inside === '' ? directory : `${directory}/${inside}`;
    try {
      return { node: this.#resolvePath(path), path, snapshot };
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind !== 'not-found' && error.kind !== 'not-a-directory') throw thrown;
      throw new OffshootError('not-found', `the snapshot ${shown(snapshot.name)} has no ${shown(inside)} in it: look at the names in it with offshoot ls`, { path: text });
    }
  }

  /** `CONTAINER@NAME` or `CONTAINER/PATH@NAME` of a snapshot that exists. The whole snapshot is meant, whatever it was made of. */
  snapshot(text: string): SnapshotRow {
    const parts = splitReference(text);
    if (parts === null) throw new OffshootError('invalid-argument', `${shown(text)} names no snapshot: write CONTAINER@NAME`, { path: text });
    const { snapshot, inside } = this.#snapshotNamed(parts.path, parts.snapshot, text);
    if (inside !== '' && inside !== snapshot.path) {
      throw new OffshootError('not-found', `${shown(snapshot.name)} is a snapshot of ${snapshot.path === null ? 'the whole container' : shown(snapshot.path)}: name it as that`, { path: text });
    }
    return snapshot;
  }

  /** The snapshot that a frozen node is part of. */
  snapshotOf(node: NodeRow): SnapshotRow | null {
    for (let at: NodeRow | undefined = node; at?.frozen === true && at.parentId !== null; at = this.#meta.nodes.byId(at.parentId)) {
      const snapshot = this.#meta.snapshots.byDirectory(at.id);
      if (snapshot !== undefined) return snapshot;
    }
    return null;
  }

  /** As people write it. */
  nameOf(snapshot: SnapshotRow): string {
    const container = this.#meta.nodes.pathOf(snapshot.containerId);
    return snapshot.path === null ? `${container}@${snapshot.name}` : `${container}/${snapshot.path}@${snapshot.name}`;
  }

  #snapshotNamed(path: string, name: string, text: string): { readonly snapshot: SnapshotRow; readonly inside: string } {
    const [containerName = '', ...rest] = path.split('/');
    const container = this.#meta.nodes.child(ROOT_ID, containerName);
    if (container === undefined) throw new OffshootError('not-found', `there is no container ${shown(containerName)}: look at the name again`, { path: text });
    const snapshot = this.#meta.snapshots.byName(container.id, name);
    if (snapshot === undefined) {
      throw new OffshootError('not-found', `${shown(containerName)} has no snapshot ${shown(name)}, and ${shown(text)} is no path either: offshoot snapshot ls ${containerName} lists what there is`, { path: text });
    }
    return { snapshot, inside: rest.join('/') };
  }
}
