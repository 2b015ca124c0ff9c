/**
 * What the control API shows: rows, open disks and jobs put together into the shapes of the schemas.
 *
 * Main thread; reads only. Sizes and counts are those of this moment: an open disk is asked, not its row.
 */
import path from 'node:path';

import { OffshootError, httpStatusOf, toOffshootError, type ErrorKind } from '../../blockstore/errors.js';
import { listedNames } from '../../blockstore/listed-names.js';
import type { ListedNode } from '../../blockstore/meta/listing.js';
import type { JobRow, JobState, LayerRow, NodeRow } from '../../blockstore/meta/rows.js';
import type { SourceCondition } from '../../blockstore/sources/external-source.js';
import { originOf } from '../../blockstore/promote.js';
import type { Store } from '../../blockstore/store.js';
import { layersBelow } from '../../blockstore/shared-origins.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { unownedDataBytes } from '../../blockstore/unowned-data.js';
import type { ContainerInfo, DaemonStatus, DiskInfo, FillInfo, JobInfo, NodeInfo } from '../control/schemas.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import { ROOT_NODE_ID } from '../filesystem/types.js';
import type { HolderState } from '../holder/holder-state.js';
import type { ServerOptions } from '../holder/options.js';
import { isFlatten, type FillState, type Fills } from '../jobs/fills.js';
import type { Imports } from '../jobs/imports.js';
import type { SpaceAccounts } from './space-accounts.js';
import type { SpaceWatch } from './space-watch.js';
import type { Merges } from '../jobs/merges.js';
import type { Scrub } from '../jobs/scrub.js';
import { scrubInfo } from './check-info.js';

export interface ViewOptions {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly fills: Fills;
  readonly imports: Imports;
  readonly scrub: Scrub;
  readonly merges: Merges;
  readonly server: ServerOptions;
  /** Of the server's build. */
  readonly version: string;
  readonly startedAt: Date;
  /** What the holder says of itself. */
  readonly holderState: () => HolderState | null;
  readonly space: SpaceWatch;
  readonly accounts: SpaceAccounts;
}

export class ControlViews {
  readonly #options: ViewOptions;

  constructor(options: ViewOptions) {
    this.#options = options;
  }

  mountPath(storePath: string): string { return path.join(this.#options.server.mountDir, storePath); }

  status(): DaemonStatus {
    const { store, server, startedAt, version } = this.#options;
    const holder = this.#options.holderState();
    const space = this.#options.space.look();
    const counts = store.meta.nodes.counts();
    return {
      version, holderVersion: server.holderVersion, serverPid: process.pid, holderPid: server.holderPid, sparePid: holder?.sparePid ?? null,
      restarts: server.restarts, lastStallMs: holder?.lastStallMs ?? null, upgrade: holder?.upgrade ?? null,
      startedAt: startedAt.toISOString(), storeDir: server.storeDir, mountDir: server.mountDir, socketPath: server.socketPath,
      transport: server.transport, workers: server.transport === 'kernel' ? server.workers : 0, sqliteVersion: store.meta.sqliteVersion,
      nodeVersion: process.versions.node, disksOpen: this.#openNodes(), disksTotal: counts.disks, snapshotsTotal: counts.snapshots, containersTotal: counts.containers,
      layersTotal: store.meta.layers.count(), storeBytesTotal: space.totalBytes, storeBytesFree: space.freeBytes, storeBytesReserved: space.reservedBytes,
      merge: this.#options.merges.status(), spaceLevel: space.level, virtualBytesTotal: space.virtualBytes, scrub: scrubInfo(this.#options.scrub.status()), warnings: this.#warnings(this.#options.space.advice(space)),
    };
  }

  container(row: NodeRow): ContainerInfo {
    const { store } = this.#options;
    let disks = 0;
    let files = 0;
    let sizeBytes = 0;
    const layers = new Map<number, LayerRow>();
    for (const node of store.meta.nodes.disksUnder(row.id)) {
      // What is in a snapshot takes room and is no disk of its own.
      if (!node.frozen) {
        if (node.kind === 'disk') disks += 1;
        else files += 1;
        sizeBytes += this.#sizeOf(node);
      }
      if (node.layerId === null) continue;
      // A layer that several disks stand on is there once.
      for (const layer of layersBelow(store.meta, node.layerId)) if (layer.kind === 'store') layers.set(layer.id, layer);
    }
    return {
      name: row.name, disks, files, snapshots: store.meta.snapshots.of(row.id).length, sizeBytes, allocatedBytes: store.files.allocatedInChain([...layers.values()]), createdAt: isoTime(row.createdUs),
    };
  }

  node(row: NodeRow, storePath: string): NodeInfo {
    const listed = this.#options.store.meta.listing.one(row.id);
    if (listed === undefined) throw new OffshootError('not-found', `there is no node ${row.id}`);
    return this.listed(listed, storePath);
  }

  /** The same for an entry of a listing, which brought along what would else be asked for each. */
  listed({ node, isComplete, ownedBlocks, fillState }: ListedNode, storePath: string): NodeInfo {
    const { fileSystem, store } = this.#options;
    const open = store.disks.get(node.id);
    const sizeBytes = open?.shared.sizeBytes() ?? node.sizeBytes;
    const ownedBytes = open !== undefined ? store.ownedBlocks(node) * BLOCK_BYTES : isComplete ? sizeBytes : ownedBlocks * BLOCK_BYTES;
    return {
      path: storePath, kind: node.kind, sizeBytes, ownedBytes: node.layerId === null ? 0 : Math.min(sizeBytes, ownedBytes), mode: node.mode, uid: node.uid, gid: node.gid,
      modifiedAt: isoTime(open === undefined ? node.mtimeUs : Math.round(open.shared.mtimeMs() * 1000)), openCount: fileSystem.openCount(node.id), fillState,
    };
  }

  disk(row: NodeRow): DiskInfo {
    const { fileSystem, store, fills, server } = this.#options;
    if (row.id === ROOT_NODE_ID) throw new OffshootError('is-a-directory', 'the root of the store is no disk');
    const storePath = store.meta.nodes.pathOf(row.id);
    const attributes = fileSystem.getattr(row.id);
    const ownedBytes = this.#ownedBytes(row);
    const fill = row.layerId === null ? null : fills.latest(row);
    const chain = row.layerId === null ? [] : store.meta.layers.chain(row.layerId);
    return {
      path: storePath, nodeId: row.id, kind: row.kind, sizeBytes: attributes.sizeBytes, ownedBytes,
      unownedBytes: row.layerId === null ? 0 : Math.max(0, attributes.sizeBytes - ownedBytes), unownedDataBytes: row.layerId === null ? null : unownedDataBytes(store, row),
      allocatedBytes: row.layerId === null ? 0 : store.files.allocatedBytes(row.layerId),
      backingChain: chain.map((layer) => ({
        layerId: layer.id, kind: layer.kind, path: layer.externalPath, sizeBytes: layer.sealed ? layer.sizeBytes : attributes.sizeBytes, sealed: layer.sealed, complete: layer.complete,
        writtenBy: layer.sealed ? this.#pathOrNull(layer.writtenBy) : storePath,
      })),
      cloneOf: this.#pathOrNull(row.layerId === null ? null : originOf(store.meta, row.id, chain)?.id ?? null),
      sharedWith: this.#sharedWith(chain),
      copyOnRead: row.copyOnRead, fill: fill === null ? null : this.fill(fill, storePath), openCount: fileSystem.openCount(row.id),
      transport: server.transport, mountPath: this.mountPath(storePath), fault: row.fault ?? this.#sourceProblem(row), createdAt: isoTime(row.createdUs),
      modifiedAt: isoTime(attributes.mtimeUs), mode: row.mode, uid: row.uid, gid: row.gid,
    };
  }

  /** Whose blocks the layers of a chain have by range clones and copies. */
  #sharedWith(chain: readonly LayerRow[]): DiskInfo['sharedWith'] {
    const { meta } = this.#options.store;
    const sums = new Map<number, number>();
    for (const layer of chain) {
      if (layer.complete) continue;
      for (const { layerId, bytes } of meta.sharedExtents.bytesBySource(layer.id)) sums.set(layerId, (sums.get(layerId) ?? 0) + bytes);
    }
    return [...sums].flatMap(([layerId, bytes]) => {
      const layer = meta.layers.byId(layerId);
      if (layer === undefined) return [];
      const writer = layer.writtenBy === null ? undefined : meta.nodes.byId(layer.writtenBy);
      return [{ layerId, kind: layer.kind, path: layer.externalPath, disk: writer === undefined ? null : meta.nodes.pathOf(writer.id), bytes }];
    });
  }

  fill(state: FillState, storePath: string): FillInfo {
    return {
      path: storePath, jobId: state.job.id, state: state.job.state, doneBytes: state.doneBytes, totalBytes: state.totalBytes,
      rateBytesPerSecond: state.rateBytesPerSecond, currentBytesPerSecond: state.currentBytesPerSecond, startedAt: isoTime(state.job.createdUs),
      updatedAt: isoTime(state.job.updatedUs), message: state.job.message, flatten: isFlatten(state.job),
    };
  }

  job(id: number): JobInfo {
    const row = this.#options.store.meta.jobs.byId(id);
    if (row === undefined) throw new OffshootError('not-found', `there is no job ${id}: offshoot jobs lists those that are remembered`, { jobId: id });
    return this.#jobInfo(row);
  }

  jobs(state: JobState | null): JobInfo[] {
    return this.#options.store.meta.jobs.list(state === null ? {} : { states: [state] }).map((row) => this.#jobInfo(row));
  }

  #jobInfo(row: JobRow): JobInfo {
    const progress = this.#options.imports.progress(row.id) ?? this.#options.merges.progress(row) ?? this.#fillProgress(row) ?? { doneBytes: row.progressDone, totalBytes: row.progressTotal };
    return {
      id: row.id, kind: row.kind, state: row.state, path: this.#jobPath(row), progressDoneBytes: progress.doneBytes, progressTotalBytes: progress.totalBytes,
      message: row.message, error: errorOf(row), createdAt: isoTime(row.createdUs), updatedAt: isoTime(row.updatedUs),
    };
  }

  #fillProgress(row: JobRow): { readonly doneBytes: number; readonly totalBytes: number } | null {
    const { store, fills } = this.#options;
    const node = row.kind === 'fill' && row.state === 'running' && row.nodeId !== null ? store.meta.nodes.byId(row.nodeId) : undefined;
    return node === undefined ? null : fills.status(node);
  }

  /** What keeps a disk from being opened or read: a source that was changed, is gone, or does not answer. */
  #sourceProblem(row: NodeRow): string | null {
    if (row.layerId === null) return null;
    const { disks } = this.#options.store;
    try {
      const { files } = disks.acquire(row.id);
      try {
        for (const { source } of files) {
          source?.look();
          const condition = source?.condition();
          if (condition !== undefined && condition.kind !== 'ok') return problemOf(condition);
        }
      } finally {
        disks.release(row.id);
      }
      return null;
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      return error.message;
    }
  }

  #jobPath(row: JobRow): string | null {
    const target = (row.parameters as { readonly target?: unknown } | null)?.target;
    if (typeof target === 'string') return target;
    const { nodes } = this.#options.store.meta;
    return row.nodeId === null || nodes.byId(row.nodeId) === undefined ? null : nodes.pathOf(row.nodeId);
  }

  #ownedBytes(row: NodeRow): number {
    if (row.layerId === null) return 0;
    return Math.min(this.#sizeOf(row), this.#options.store.ownedBlocks(row) * BLOCK_BYTES);
  }

  #pathOrNull(nodeId: number | null): string | null {
    const { nodes } = this.#options.store.meta;
    return nodeId === null || nodes.byId(nodeId) === undefined ? null : nodes.pathOf(nodeId);
  }

  #sizeOf(row: NodeRow): number {
    return this.#options.store.disks.get(row.id)?.shared.sizeBytes() ?? row.sizeBytes;
  }

  #openNodes(): number {
    return this.#options.fileSystem.openNodes();
  }

  /** Sources that are away, changed, silent or about to be missed, and who reads from them. */
  #sourceWarnings(): string[] {
    const { files, disks, meta } = this.#options.store;
    return files.sourceConditions().filter(({ kind }) => kind !== 'ok').map((condition) => {
      const names = disks.standingOn(condition.layerId).map((disk) => meta.nodes.pathOf(disk.nodeId)).toSorted();
      return `${problemOf(condition)}; ${listedNames(names, (name) => name)} ${names.length === 1 ? 'reads' : 'read'} from it`;
    });
  }

  #warnings(ofSpace: string | null): string[] {
    const warnings = ofSpace === null ? [] : [ofSpace];
    warnings.push(...this.#options.accounts.warnings(), ...this.#sourceWarnings());
    const damaged = new Set(this.#options.store.meta.checksums.damages().map((damage) => damage.layerId));
    if (damaged.size > 0) warnings.push(`the content of ${damaged.size === 1 ? 'a layer' : `${damaged.size} layers`} is damaged: offshoot check --data names what is wrong and what stands on it`);
    const faulted = this.#options.store.meta.nodes.faulted();
    for (const node of faulted) warnings.push(`${this.#options.store.meta.nodes.pathOf(node.id)} is faulted: ${node.fault ?? ''}`);
    const hang = this.#options.holderState()?.lastHang ?? null;
    if (hang !== null) {
      warnings.push(`the main thread of server ${hang.serverPid} did not answer the holder for ${(hang.ms / 1000).toFixed(0)} s until ${hang.at}: names, flushes and commands waited; look at the log`);
    }
    return warnings;
  }
}

function problemOf({ file, kind, reason }: SourceCondition): string {
  const said = reason ?? kind;
  return said.includes(file) ? said : `the source file ${file}: ${said}`;
}

function errorOf(row: JobRow): JobInfo['error'] {
  const kind = (row.parameters as { readonly errorKind?: unknown } | null)?.errorKind;
  if (row.state !== 'failed' && row.state !== 'cancelled') return null;
  const known = typeof kind === 'string' && Object.hasOwn(httpStatusOf, kind) ? (kind as ErrorKind) : 'io-error';
  return { kind: known, message: row.message ?? row.state };
}

function isoTime(timeUs: number): string {
  return new Date(timeUs / 1000).toISOString();
}
