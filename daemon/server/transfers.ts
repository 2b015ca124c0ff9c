/**
 * What the control API shows of disks and snapshots to those who send, export or compare them: trees, extents, and clones for a
 * moment. Main thread. Content is never read here: whoever wants it reads it under the mount, with his own rights.
 *
 * An *instant* is a clone that holds a disk still while somebody reads it. Its reader opens it and takes its name away at once; then it is gone at the
 * last close, whatever becomes of the reader. One that is never opened loses its name after a minute, or at the next start.
 */
import { createHash, randomBytes } from 'node:crypto';
import path from 'node:path';

import { changedExtents, haveCommonLayer, type DiskState } from '../../blockstore/changed-extents.js';
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow, type SnapshotRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { INSTANT_PREFIX, treeBelow } from '../../blockstore/trees.js';
import type { TransferService } from '../control/transfer-service.js';
import type { ExtentPage, InstantInfo, ReceiveInfo, ReceiveResult, TreeInfo, TreeNode } from '../control/transfer-schemas.js';
import { References, type Resolved } from '../filesystem/references.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import { Receives } from '../jobs/receives.js';

export interface TransfersOptions {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly storeDir: string;
  readonly mountDir: string;
  readonly logger: { info(context: object, message: string): void; warn(context: object, message: string): void };
  readonly forgetAttributes: (nodeId: number) => Promise<void>;
}

/** How long a reader may take to open what was made for him. */
const INSTANT_MS = 60_000;

/** It brings a library for schemas along, and few servers are ever sent a stream. */
export const loadReceiveHeader = async () => await import('../jobs/receive-header.js');

export class Transfers implements TransferService {
  readonly #options: TransfersOptions;
  readonly #references: References;
  readonly #receives: Receives;
  readonly #timers = new Map<string, NodeJS.Timeout>();

  constructor(options: TransfersOptions) {
    this.#options = options;
    const { store, fileSystem, storeDir, logger } = options;
    this.#references = new References(store.meta, (text) => fileSystem.namespace.resolve(text));
    this.#receives = new Receives({
      store, fileSystem, storeDir, logger, parseHeader: async (json) => (await loadReceiveHeader()).parseHeader(json), forgetAttributes: async (nodeIds) => { await Promise.all(nodeIds.map(options.forgetAttributes)); },
    });
  }

  /** Before anything else is done with the store: what the server before left half done. */
  recover(): void {
    this.#receives.recover();
    const { meta } = this.#options.store;
    for (const container of meta.nodes.children(ROOT_ID, 0, Number.MAX_SAFE_INTEGER)) {
      for (const row of meta.nodes.childrenWithPrefix(container.id, INSTANT_PREFIX)) this.#removeInstant(row);
    }
  }

  async close(): Promise<void> {
    for (const timer of this.#timers.values()) clearTimeout(timer);
    await this.#receives.close();
  }

  tree(reference: string): TreeInfo {
    const { store, mountDir } = this.#options;
    const { node, path: storePath, snapshot } = this.#resolve(reference);
    const mountPath = path.join(mountDir, storePath);
    if (node.layerId !== null) {
      return { reference, kind: 'disk', snapshot: this.#snapshotInfo(snapshot, storePath), nodes: [treeNode(this.#settled(node), node.name, storePath, mountPath)] };
    }
    const isWhole = snapshot === null ? node.parentId === ROOT_ID : node.id === snapshot.directoryId;
    if (!isWhole) throw new OffshootError('invalid-argument', `${reference} is a directory or a link: name a container, or a disk or file in it`, { path: reference });
    const nodes = [...treeBelow(store.meta, node)].map(([name, row]) => treeNode(row.layerId === null ? row : this.#settled(row), name, `${storePath}/${name}`, path.join(mountPath, name)));
    return { reference, kind: 'container', snapshot: this.#snapshotInfo(snapshot, null), nodes };
  }

  extents(reference: string, base: string | null, offsetBytes: number): ExtentPage {
    const { store } = this.#options;
    const later = this.#dataNode(reference);
    const earlier = base === null ? null : this.#dataNode(base);
    const page = changedExtents(store, earlier === null ? null : stateOf(earlier), stateOf(later), offsetBytes);
    return {
      nodeId: later.id, sizeBytes: later.sizeBytes, baseSizeBytes: earlier?.sizeBytes ?? null, related: earlier === null || haveCommonLayer(store.meta, stateOf(earlier), stateOf(later)),
      extents: [...page.extents], nextOffsetBytes: page.nextOffsetBytes,
    };
  }

  async instant(reference: string): Promise<InstantInfo> {
    const { store, mountDir, forgetAttributes } = this.#options;
    const { path: storePath } = this.#resolve(reference);
    const source = this.#dataNode(reference);
    const containerName = storePath.split('/', 1)[0] ?? '';
    const container = this.#options.fileSystem.namespace.resolve(containerName);
    store.assertSourcesUsable(source.id);
    const name = `${INSTANT_PREFIX}${randomBytes(8).toString('hex')}`;
    const [row] = store.clone(source.id, [{ parentId: container.id, name }], { copyOnRead: false });
    if (row === undefined) throw new Error('a clone of one target makes one');
    const instantPath = `${containerName}/${name}`;
    const timer = setTimeout(() => { this.#removeLate(instantPath); }, INSTANT_MS);
    timer.unref();
    this.#timers.set(instantPath, timer);
    await forgetAttributes(container.id);
    return { path: instantPath, mountPath: path.join(mountDir, instantPath), nodeId: row.id, sizeBytes: row.sizeBytes };
  }

  async releaseInstant(instantPath: string): Promise<{ readonly dropped: true }> {
    const row = this.#options.fileSystem.namespace.resolve(instantPath);
    if (!row.name.startsWith(INSTANT_PREFIX)) throw new OffshootError('invalid-argument', `${instantPath} is no instant: offshoot rm removes disks`, { path: instantPath });
    clearTimeout(this.#timers.get(instantPath));
    this.#timers.delete(instantPath);
    this.#removeInstant(row);
    await Promise.all([row.id, row.parentId ?? ROOT_ID].map(this.#options.forgetAttributes));
    return { dropped: true };
  }

  async receives(): Promise<readonly ReceiveInfo[]> { return await this.#receives.list(); }
  async receive(receiveId: number): Promise<ReceiveInfo> { return await this.#receives.info(receiveId); }
  async receiveBegin(target: string, header: string): Promise<ReceiveInfo> { return await this.#receives.begin(target, header); }
  async receiveRecords(receiveId: number, first: number, bytes: Buffer): Promise<ReceiveInfo> { return await this.#receives.add(receiveId, first, bytes); }
  async receivePause(receiveId: number): Promise<ReceiveInfo> { return await this.#receives.pause(receiveId); }
  async receiveFinish(receiveId: number): Promise<ReceiveResult> { return await this.#receives.finish(receiveId); }

  async receiveAbort(receiveId: number): Promise<{ readonly dropped: true }> {
    await this.#receives.abort(receiveId);
    return { dropped: true };
  }

  /** A snapshot that was taken of one disk stands for that disk, however it is called. */
  #resolve(reference: string): Resolved {
    const found = this.#references.resolve(reference);
    const { snapshot } = found;
    const inside = snapshot?.path ?? null;
    return inside === null || found.node.id !== snapshot?.directoryId ? found : this.#references.resolve(`${found.path}/${inside}`);
  }

  #dataNode(reference: string): NodeRow {
    const { node } = this.#resolve(reference);
    if (node.layerId === null) throw new OffshootError('is-a-directory', `${reference} is not a disk or file`, { path: reference });
    return this.#settled(node);
  }

  /** With all that was acknowledged so far in the metadata, and its size. */
  #settled(node: NodeRow): NodeRow {
    const { store } = this.#options;
    const disk = store.disks.get(node.id);
    if (disk === undefined || node.frozen) return node;
    store.committer.commitLayerNow(disk);
    const row = store.meta.nodes.byId(node.id) ?? node;
    return { ...row, sizeBytes: disk.shared.sizeBytes() };
  }

  /** `diskPath`: of one disk, its path under the mount. One out of a snapshot of a container has an identity of its own. */
  #snapshotInfo(snapshot: SnapshotRow | null, diskPath: string | null): TreeInfo['snapshot'] {
    if (snapshot === null) return null;
    const { name, consistency, message, createdUs } = snapshot;
    const inside = diskPath === null ? null : diskPath.split('/').slice(3).join('/');
    return { name, consistency, message, createdUs, uuid: inside === null || inside === snapshot.path ? snapshot.uuid : partUuid(snapshot.uuid, inside) };
  }

  #removeLate(instantPath: string): void {
    this.#timers.delete(instantPath);
    this.releaseInstant(instantPath).catch((thrown: unknown) => {
      const error = toOffshootError(thrown);
      if (error.kind !== 'not-found') this.#options.logger.warn({ path: instantPath, reason: error.message }, 'a clone that was made for a reader could not be removed');
    });
  }

  #removeInstant(row: NodeRow): void {
    if (row.parentId !== null) this.#options.fileSystem.namespace.unlink(row.parentId, row.name);
  }
}

function stateOf(node: NodeRow): DiskState {
  if (node.layerId === null) throw new Error(`node ${node.id} has no data`);
  return { layerId: node.layerId, sizeBytes: node.sizeBytes };
}

function treeNode(row: NodeRow, nodePath: string, storePath: string, mountPath: string): TreeNode {
  return {
    path: nodePath, nodeId: row.id, kind: row.kind, mode: row.mode, uid: row.uid, gid: row.gid, mtimeUs: row.mtimeUs, sizeBytes: row.sizeBytes, linkTarget: row.linkTarget, mountPath, storePath,
  };
}

/** The same wherever it is computed: version 8 of RFC 9562, made of the whole snapshot's and the disk's path. */
function partUuid(uuid: string, diskPath: string): string {
  const hash = createHash('sha256').update(`${uuid}/${diskPath}`).digest();
  hash[6] = ((hash[6] ?? 0) % 16) + 0x80;
  hash[8] = ((hash[8] ?? 0) % 64) + 0x80;
  const hex = hash.toString('hex', 0, 16);
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join('-');
}
