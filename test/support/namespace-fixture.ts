/** A namespace over a real metadata store, and the smallest data half that can stand under it. */
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { Namespace } from '../../daemon/filesystem/namespace.js';
import type { LiveAttributes, NodeData } from '../../daemon/filesystem/node-data.js';
import { ROOT_NODE_ID, type Attributes, type Caller, type RenameFlags } from '../../daemon/filesystem/types.js';
import { addLayer, openStore } from './meta-store-fixture.js';

export const CALLER: Caller = { uid: 1000, gid: 100, pid: 42 };

export const PLAIN: RenameFlags = { noReplace: false, exchange: false };
export const NO_REPLACE: RenameFlags = { noReplace: true, exchange: false };
export const EXCHANGE: RenameFlags = { noReplace: false, exchange: true };

/** No data files: only which nodes are open, with which live values, and what was asked for. */
export class MemoryNodeData implements NodeData {
  readonly open = new Map<number, LiveAttributes>();
  readonly discarded: number[] = [];
  readonly changed: number[] = [];
  layersMade = 0;
  readonly #meta: MetaStore;

  constructor(meta: MetaStore) {
    this.#meta = meta;
  }

  createEmptyLayer(): number {
    this.layersMade += 1;
    return addLayer(this.#meta, { sizeBytes: 0, complete: true }).id;
  }

  liveAttributes(nodeId: number): LiveAttributes | undefined {
    return this.open.get(nodeId);
  }

  allocatedBytes(layerId: number | null): number {
    return (layerId ?? 0) * 4096;
  }

  isOpen(nodeId: number): boolean {
    return this.open.has(nodeId);
  }

  discard(nodeId: number): void {
    this.discarded.push(nodeId);
    this.#meta.transaction(() => {
      const layerId = this.#meta.nodes.byId(nodeId)?.layerId ?? null;
      this.#meta.nodes.remove(nodeId);
      if (layerId !== null) this.#meta.layers.remove(layerId);
    });
  }

  attributesChanged(nodeId: number): void {
    const live = this.open.get(nodeId);
    const row = this.#meta.nodes.byId(nodeId);
    if (live === undefined || row === undefined) return;
    this.changed.push(nodeId);
    this.open.set(nodeId, { sizeBytes: live.sizeBytes, atimeUs: row.atimeUs, mtimeUs: row.mtimeUs, ctimeUs: row.ctimeUs });
  }

  /** What the data half does at open: from now on its values are the ones that count. */
  openNode(nodeId: number): void {
    const row = this.#meta.nodes.byId(nodeId);
    if (row !== undefined) this.open.set(nodeId, row);
  }

  /** What it does at the last close. */
  release(nodeId: number): void {
    this.open.delete(nodeId);
    if (this.#meta.nodes.orphans().some((orphan) => orphan.id === nodeId)) this.discard(nodeId);
  }
}

export interface NamespaceFixture {
  readonly meta: MetaStore;
  readonly data: MemoryNodeData;
  readonly names: Namespace;
  /** The clock, which goes on by one microsecond at each reading. */
  readonly clock: { nowUs: number };
}

export function openNamespace(): NamespaceFixture {
  const meta = openStore();
  const data = new MemoryNodeData(meta);
  const clock = { nowUs: 1_700_000_000_000_000 };
  const names = new Namespace({ meta, data, nowUs: () => (clock.nowUs += 1) });
  return { meta, data, names, clock };
}

export function container({ names }: NamespaceFixture, name = 'vms'): Attributes {
  return names.mkdir(ROOT_NODE_ID, name, 0o755, CALLER);
}

export function namesIn({ names }: NamespaceFixture, node: number): string[] {
  return names.readdir(node, 0, 1000).map((entry) => entry.name);
}
