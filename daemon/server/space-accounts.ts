/**
 * `offshoot df` and `offshoot quota`: what disks, snapshots and containers cost, and how much they may. Main thread.
 *
 * The arithmetic is in `blockstore/accounting.ts`; here rows get their paths, and the store's own files are added.
 */
import fs from 'node:fs';
import path from 'node:path';

import { Account, REMOVED, type Cost } from '../../blockstore/accounting.js';
import { OffshootError } from '../../blockstore/errors.js';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import type { SpaceNode } from '../../blockstore/meta/space-reader.js';
import type { QuotaState } from '../../blockstore/quotas.js';
import type { Store } from '../../blockstore/store.js';
import type { StoreSpace, SpaceReport, QuotaInfo } from '../control/space-schemas.js';
import type { References } from '../filesystem/references.js';

/** Disks that `sharedWith` names; their number is told in full. */
export const SHARED_WITH_MAX = 8;
const NOTHING: Cost = { allocatedBytes: 0, exclusiveBytes: 0, sharedBytes: 0 };

export interface SpaceAccountsOptions {
  readonly store: Store;
  readonly storeDir: string;
  readonly references: Pick<References, 'resolve'>;
}

export class SpaceAccounts {
  readonly #store: Store;
  readonly #storeDir: string;
  readonly #references: SpaceAccountsOptions['references'];

  constructor(options: SpaceAccountsOptions) {
    this.#store = options.store;
    this.#storeDir = options.storeDir;
    this.#references = options.references;
  }

  async df(target: string | null): Promise<SpaceReport> {
    const { meta, files } = this.#store;
    const root = target === null ? null : this.#references.resolve(target).node.id;
    const account = new Account(meta.space.read(), files);
    const snapshots = meta.snapshots.all();
    const snapshotOf = snapshotsByNode(account, snapshots);
    const quotas = this.#store.quotas.list();
    await account.measure();

    const wanted = account.dataNodes.filter((node) => root === null ? account.containerOf(node.id) !== REMOVED : isUnder(account, node.id, root));
    const inTarget = new Set(wanted.map(({ id }) => id));
    const byDisk = account.costs((node) => node.id);
    const byContainer = account.costs((node) => account.containerOf(node.id));
    const bySnapshot = snapshots.length === 0 ? new Map<number, Cost>() : account.costs((node) => snapshotOf(node.id));
    const total = account.costs((node) => (inTarget.has(node.id) ? 1 : null)).get(1) ?? NOTHING;
    const containers = [...account.nodes.values()].filter((node) => node.parent_id === ROOT_ID && (root === null || node.id === root));
    const charged = account.charged(new Set(containers.map(({ id }) => id)));
    const limits = new Map(quotas.map(({ nodeId, limitBytes }) => [nodeId, limitBytes]));
    const counts = countBy(account.dataNodes.filter((node) => node.frozen === 0).map((node) => account.containerOf(node.id)));
    const snapshotCounts = countBy(snapshots.map(({ containerId }) => containerId));
    const wantedSnapshots = snapshots.filter(({ directoryId }) => root === null || isUnder(account, directoryId, root));
    const inSnapshot = countBy(account.dataNodes.flatMap((node) => snapshotOf(node.id) ?? []));
    const named = new Map<number, string>();
    const nameOf = (id: number): string => {
      let name = named.get(id);
      if (name === undefined) named.set(id, name = account.pathOf(id));
      return name;
    };
    return {
      target,
      disks: wanted.map((node) => {
        const { count, first } = account.sharedWith(node);
        return {
          path: nameOf(node.id), kind: node.kind, frozen: node.frozen === 1, sizeBytes: this.#store.disks.get(node.id)?.shared.sizeBytes() ?? node.size_bytes,
          ...byDisk.get(node.id) ?? NOTHING, sharedWithCount: count, sharedWith: first(SHARED_WITH_MAX).map(nameOf),
        };
      }).sort(byPath),
      snapshots: wantedSnapshots.map(({ directoryId, containerId, name, path: only }) => ({
        path: `${nameOf(containerId)}${only === null ? '' : `/${only}`}@${name}`, disks: inSnapshot.get(directoryId) ?? 0, ...bySnapshot.get(directoryId) ?? NOTHING,
      })).sort(byPath),
      containers: containers.map(({ id }) => ({
        name: nameOf(id), disks: counts.get(id) ?? 0, snapshots: snapshotCounts.get(id) ?? 0, ...byContainer.get(id) ?? NOTHING, usedBytes: charged.get(id) ?? 0, limitBytes: limits.get(id) ?? null,
      })).sort((a, b) => compare(a.name, b.name)),
      total: { disks: wanted.filter((node) => node.frozen === 0).length, snapshots: wantedSnapshots.length, ...total },
      store: root === null ? this.#storeSpace(account) : null,
    };
  }

  quotaSet(container: string, limitBytes: number): QuotaInfo {
    return this.#quotaInfo(this.#store.quotas.set(this.#container(container), limitBytes));
  }

  /** What it was. */
  quotaRemove(container: string): QuotaInfo {
    const id = this.#container(container);
    const state = this.#store.quotas.list().find(({ nodeId }) => nodeId === id);
    if (state === undefined) throw new OffshootError('not-found', `the container ${container} has no limit`, { container });
    const info = this.#quotaInfo(state);
    this.#store.quotas.remove(id);
    return info;
  }

  quotaList(): QuotaInfo[] {
    return this.#store.quotas.list().map((state) => this.#quotaInfo(state)).sort((a, b) => compare(a.container, b.container));
  }

  /** What an administrator should read. */
  warnings(): string[] {
    return this.#store.quotas.states().filter(({ isReached }) => isReached).map((state) => this.#quotaInfo(state)).map(({ container }) =>
      `the container ${container} has reached its limit: writes that need room get ENOSPC (files EDQUOT), and QEMU pauses guests that write (werror=enospc); remove what is not needed in it, or raise the limit (offshoot quota set ${container} SIZE), then let paused guests go on`);
  }

  #quotaInfo({ nodeId, limitBytes, usedBytes, isReached }: QuotaState): QuotaInfo {
    return { container: this.#store.meta.nodes.pathOf(nodeId), limitBytes, usedBytes, freeBytes: Math.max(0, limitBytes - usedBytes), isReached };
  }

  #container(name: string): number {
    const node = this.#store.meta.nodes.child(ROOT_ID, name);
    if (node === undefined) throw new OffshootError('not-found', `there is no container ${name}: offshoot ls lists the containers`, { container: name });
    return node.id;
  }

  #storeSpace(account: Account): StoreSpace {
    const file = (name: string): number => allocatedOf(path.join(this.#storeDir, name));
    const { bsize, blocks, bavail } = fs.statfsSync(this.#storeDir);
    const removed = account.costs((node) => (account.containerOf(node.id) === REMOVED ? 1 : null)).get(1) ?? NOTHING;
    const parts = {
      layersBytes: account.layersBytes(),
      databaseBytes: file('offshoot.db') + file('offshoot.db-wal') + file('offshoot.db-shm'),
      importBytes: fs.readdirSync(path.join(this.#storeDir, 'import')).reduce((sum, name) => sum + file(path.join('import', name)), 0),
      reserveBytes: file('reserve'),
      logBytes: file('offshoot.log') + file('offshoot.log.1'),
    };
    return {
      ...parts, totalBytes: Object.values(parts).reduce((sum, bytes) => sum + bytes, 0), removedBytes: removed.exclusiveBytes, leftOverBytes: account.leftOverBytes(),
      fileSystemBytes: blocks * bsize, freeBytes: bavail * bsize,
    };
  }
}

/** For a node the directory of the snapshot that it is part of; null: none. */
function snapshotsByNode(account: Account, snapshots: readonly { readonly directoryId: number }[]): (nodeId: number) => number | null {
  const directories = new Set(snapshots.map(({ directoryId }) => directoryId));
  if (directories.size === 0) return () => null;
  return (nodeId) => {
    let node: SpaceNode | undefined = account.nodes.get(nodeId);
    if (node?.frozen !== 1) return null;
    while (node !== undefined && !directories.has(node.id)) node = node.parent_id === null ? undefined : account.nodes.get(node.parent_id);
    return node?.id ?? null;
  };
}

function isUnder(account: Account, nodeId: number, rootId: number): boolean {
  for (let node = account.nodes.get(nodeId), left = account.nodes.size; node !== undefined && left >= 0; left -= 1) {
    if (node.id === rootId) return true;
    node = node.parent_id === null ? undefined : account.nodes.get(node.parent_id);
  }
  return false;
}

function allocatedOf(file: string): number {
  return (fs.statSync(file, { throwIfNoEntry: false })?.blocks ?? 0) * 512;
}

function countBy(groups: readonly number[]): Map<number, number> {
  const counts = new Map<number, number>();
  for (const group of groups) counts.set(group, (counts.get(group) ?? 0) + 1);
  return counts;
}

function byPath(a: { readonly path: string }, b: { readonly path: string }): number {
  return compare(a.path, b.path);
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
