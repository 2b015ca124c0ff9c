/**
 * Snapshots: taken, listed, removed, and gone back to. Main thread.
 *
 * A snapshot is made at one instant for all that is in it (`blockstore/seal-group.ts`); its content is frozen nodes below
 * `CONTAINER/.snapshots/NAME`. What is written to the database is one transaction each time: a snapshot is there in full, or not at all.
 */
import { randomUUID } from 'node:crypto';

import { OffshootError } from '../../blockstore/errors.js';
import { listedNames, shellWord } from '../../blockstore/listed-names.js';
import { ROOT_ID, type Consistency, type NodeRow, type SnapshotRow } from '../../blockstore/meta/rows.js';
import type { SealedNode } from '../../blockstore/seal-group.js';
import type { Store } from '../../blockstore/store.js';
import { SNAPSHOTS_NAME, frozenTree, insertCopy, insertTree, listTree } from '../../blockstore/trees.js';
import type { SnapshotCreateRequest, SnapshotInfo, SnapshotRemoveResult, SnapshotRevertResult } from '../control/snapshot-schemas.js';
import { assertNotExported } from '../filesystem/bound-exports.js';
import { snapshotsDirectory } from '../filesystem/frozen.js';
import { assertNewName, shown } from '../filesystem/names.js';
import type { References } from '../filesystem/references.js';
import { splitReference } from '../filesystem/references.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { NodeId } from '../filesystem/types.js';
import { dependentsError } from './dependents.js';
import { quiesced } from './quiesce.js';
import { revertTree } from './revert-snapshot.js';

const DIRECTORY_MODE = 0o755;

export interface SnapshotsOptions {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly references: References;
  readonly logger: { info(context: object, message: string): void; warn(context: object, message: string): void };
  readonly forgetAttributes: (nodeId: NodeId) => Promise<void>;
  /** The node's content becomes another, or it goes: whoever works on it lets go of it. */
  readonly beforeDiscard: (nodeId: NodeId) => void;
}

/** What is to be sealed: a container, or one disk or file in it. */
interface Subject {
  readonly container: NodeRow;
  readonly name: string;
  /** In the container; null for all of it. */
  readonly path: string | null;
}

export class Snapshots {
  readonly #options: SnapshotsOptions;

  constructor(options: SnapshotsOptions) {
    this.#options = options;
  }

  async create(request: SnapshotCreateRequest): Promise<SnapshotInfo> {
    const subject = this.#subjectOf(request.reference);
    const { logger, forgetAttributes, store } = this.#options;
    store.quotas.assertRoom([subject.container.id]);
    const startedMs = performance.now();
    const { value, consistency, message } = await quiesced(
      request.quiesce, { reference: request.reference, logger }, async (state) => await this.#take(subject, state),
      (row, state) => { this.#options.store.meta.snapshots.describe(row.snapshot.id, state.consistency, state.message); },
    );
    await Promise.all([subject.container.id, value.snapshot.directoryId, this.#requireDirectory(subject.container.id)].map(forgetAttributes));
    logger.info({
      snapshot: request.reference, nodes: value.nodes, sealed: value.sealed, gateMs: rounded(value.gateMs), durationMs: rounded(performance.now() - startedMs), consistency, message,
    }, 'snapshot taken');
    return this.#info({ ...value.snapshot, consistency, message });
  }

  list(container: string | null): readonly SnapshotInfo[] {
    const { store } = this.#options;
    if (container === null) return store.meta.snapshots.all().map((row) => this.#info(row));
    const node = store.meta.nodes.child(ROOT_ID, container);
    if (node === undefined) throw new OffshootError('not-found', `there is no container ${shown(container)}: look at the name again`, { path: container });
    return store.meta.snapshots.of(node.id).map((row) => this.#info(row));
  }

  async remove(reference: string, options: { readonly keepData: boolean }): Promise<SnapshotRemoveResult> {
    const { store, references, forgetAttributes, logger } = this.#options;
    const { meta } = store;
    const snapshot = references.snapshot(reference);
    store.settleSeals();
    const nodes = listTree(meta, requireNode(store, snapshot.directoryId));
    for (const node of nodes) assertNotExported(meta, node);
    this.#assertNotOpen(nodes);
    const clones = this.#standingOn(nodes);
    if (clones.length > 0 && !options.keepData) {
      throw dependentsError(meta, { name: references.nameOf(snapshot), command: `offshoot snapshot rm ${shellWord(references.nameOf(snapshot))}`, users: clones, successor: null });
    }
    const layersBefore = meta.layers.count();
    const name = references.nameOf(snapshot);
    const directory = this.#requireDirectory(snapshot.containerId);
    for (const node of nodes) store.disks.retireIdle(node.id);
    meta.transaction(() => {
      meta.snapshots.remove(snapshot.id);
      for (const node of nodes.toReversed()) meta.nodes.remove(node.id);
      const nowUs = Date.now() * 1000;
      if (meta.nodes.childCount(directory) === 0) {
        meta.nodes.remove(directory);
        meta.nodes.update(snapshot.containerId, { mtimeUs: nowUs, ctimeUs: nowUs });
      } else meta.nodes.update(directory, { mtimeUs: nowUs, ctimeUs: nowUs });
      store.reclaim(nodes.flatMap((node) => (node.layerId === null ? [] : [node.layerId])));
    });
    await Promise.all([...nodes.map((node) => node.id), directory, snapshot.containerId].map(forgetAttributes));
    const layersRemoved = layersBefore - meta.layers.count();
    logger.info({ snapshot: name, nodes: nodes.length, layers: layersRemoved }, 'snapshot removed');
    return { name, nodesRemoved: nodes.length, layersRemoved, clonesKept: clones.length };
  }

  /** The container, or the one disk, is again what it was: what was made or written since is lost. */
  async revert(reference: string): Promise<SnapshotRevertResult> {
    const { store, references, fileSystem, forgetAttributes, beforeDiscard, logger } = this.#options;
    const snapshot = references.snapshot(reference);
    store.settleSeals();
    const result = revertTree({ store, fileSystem, beforeDiscard }, snapshot);
    // In the same turn: nobody opens one of them in between.
    for (const nodeId of result.touched) fileSystem.contentReplaced(nodeId);
    await Promise.all(result.touched.map(forgetAttributes));
    logger.info({ snapshot: references.nameOf(snapshot), reverted: result.reverted, removed: result.removed, restored: result.restored }, 'gone back to a snapshot');
    return { name: references.nameOf(snapshot), nodesReverted: result.reverted, nodesRemoved: result.removed, nodesRestored: result.restored };
  }

  /** Names of the snapshots of a container. */
  namesOf(containerId: number): string[] {
    const { store, references } = this.#options;
    return store.meta.snapshots.of(containerId).map((row) => references.nameOf(row));
  }

  #subjectOf(reference: string): Subject {
    const parts = splitReference(reference);
    if (parts === null) throw new OffshootError('invalid-argument', `${shown(reference)} gives no name to the snapshot: write CONTAINER@NAME or CONTAINER/PATH@NAME`, { path: reference });
    assertNewName(parts.snapshot, 'directory');
    const { store, fileSystem } = this.#options;
    const [containerName = '', ...rest] = parts.path.split('/');
    const container = fileSystem.namespace.resolve(containerName);
    if (store.meta.snapshots.byName(container.id, parts.snapshot) !== undefined) throw taken(containerName, parts.snapshot);
    if (rest.length === 0) return { container, name: parts.snapshot, path: null };
    const node = fileSystem.namespace.resolve(parts.path);
    if (node.frozen) throw new OffshootError('not-permitted', `${parts.path} is part of a snapshot already`, { path: parts.path });
    if (node.layerId === null) {
      throw new OffshootError('invalid-argument', `${parts.path} is no disk or file: take a snapshot of one, or of the whole container (${containerName}@${parts.snapshot})`, { path: parts.path });
    }
    return { container, name: parts.snapshot, path: rest.join('/') };
  }

  async #take(subject: Subject, state: { readonly consistency: Consistency; readonly message: string | null }): Promise<{
    readonly snapshot: SnapshotRow; readonly nodes: number; readonly sealed: number; readonly gateMs: number;
  }> {
    const { store } = this.#options;
    const { value, gateMs, sealed } = await store.groupSeals.seal({
      list: () => {
        const container = requireNode(store, subject.container.id);
        if (subject.path === null) return listTree(store.meta, container);
        // The directories above the one disk come along, so that it lies at its path.
        const nodes = [container];
        for (const name of subject.path.split('/')) {
          const child = store.meta.nodes.child(nodes.at(-1)?.id ?? 0, name);
          if (child === undefined) throw new OffshootError('not-found', `${shown(subject.path)} does not exist any more`, { path: subject.path });
          nodes.push(child);
        }
        return nodes;
      },
      commit: (nodes, timeUs) => ({ snapshot: this.#insert(subject, nodes, timeUs, state), nodes: nodes.length }),
    });
    return { ...value, gateMs, sealed };
  }

  #insert(subject: Subject, nodes: readonly SealedNode[], timeUs: number, state: { readonly consistency: Consistency; readonly message: string | null }): SnapshotRow {
    const { meta } = this.#options.store;
    const container = meta.nodes.byId(subject.container.id);
    if (container?.parentId !== ROOT_ID) throw new OffshootError('not-found', 'the container was removed while its snapshot was taken');
    if (meta.snapshots.byName(container.id, subject.name) !== undefined) throw taken(container.name, subject.name);
    const options = { frozen: true, copyOnRead: false, timeUs };
    const directory = snapshotsDirectory(meta, container.id) ?? insertCopy(
      meta, { ...container, mode: DIRECTORY_MODE, uid: 0, gid: 0, mtimeUs: timeUs, atimeUs: timeUs }, null, { parentId: container.id, name: SNAPSHOTS_NAME }, options,
    );
    const [root] = insertTree(meta, nodes, { parentId: directory.id, name: subject.name }, options);
    if (root === undefined) throw new Error('a snapshot has a directory at least');
    meta.nodes.update(directory.id, { mtimeUs: timeUs, ctimeUs: timeUs });
    if (meta.nodes.childCount(directory.id) === 1) meta.nodes.update(container.id, { mtimeUs: timeUs, ctimeUs: timeUs });
    return meta.snapshots.insert({
      containerId: container.id, name: subject.name, directoryId: root.id, path: subject.path, uuid: randomUUID(), consistency: state.consistency, message: state.message, createdUs: timeUs,
    });
  }

  #assertNotOpen(nodes: readonly NodeRow[]): void {
    const { fileSystem, store } = this.#options;
    const open = nodes.filter((node) => fileSystem.openCount(node.id) > 0 || store.disks.isUsed(node.id));
    if (open.length === 0) return;
    throw new OffshootError('in-use', `${listedNames(open, (node) => store.meta.nodes.pathOf(node.id))} ${open.length === 1 ? 'is' : 'are'} open: stop what reads from ${open.length === 1 ? 'it' : 'them'} first`);
  }

  /** Clones of the frozen nodes that still read through what these stand on. */
  #standingOn(nodes: readonly NodeRow[]): number[] {
    const { meta } = this.#options.store;
    return frozenTree(meta, nodes).flatMap(({ node, foundation }) => meta.snapshots.clonesOf(node.id).filter((cloneId) => {
      const layerId = meta.nodes.byId(cloneId)?.layerId ?? null;
      return layerId !== null && foundation !== null && meta.layers.chain(layerId).some((layer) => layer.id === foundation.backingId);
    }));
  }

  #requireDirectory(containerId: number): number {
    const directory = snapshotsDirectory(this.#options.store.meta, containerId);
    if (directory === undefined) throw new Error(`container ${containerId} has snapshots, and no directory of them`);
    return directory.id;
  }

  #info(row: SnapshotRow): SnapshotInfo {
    const { store, references } = this.#options;
    const nodes = listTree(store.meta, requireNode(store, row.directoryId)).filter((node) => node.layerId !== null);
    const container = store.meta.nodes.pathOf(row.containerId);
    return {
      reference: references.nameOf(row), container, name: row.name, path: row.path, uuid: row.uuid, consistency: row.consistency, message: row.message,
      disks: nodes.filter((node) => node.kind === 'disk').length, files: nodes.filter((node) => node.kind === 'file').length,
      sizeBytes: nodes.reduce((sum, node) => sum + node.sizeBytes, 0),
      directory: `${container}/${SNAPSHOTS_NAME}/${row.name}`, createdAt: new Date(row.createdUs / 1000).toISOString(),
    };
  }
}

function requireNode(store: Store, nodeId: number): NodeRow {
  const node = store.meta.nodes.byId(nodeId);
  if (node === undefined) throw new OffshootError('not-found', 'it does not exist any more: look at its name again', { nodeId });
  return node;
}

function taken(container: string, name: string): OffshootError {
  return new OffshootError('already-exists', `${container} has a snapshot ${shown(name)} already: choose another name, or remove it first`, { name });
}

function rounded(ms: number): number {
  return Math.round(ms * 100) / 100;
}
