/**
 * What disks, containers and snapshots cost: who takes how many bytes of the store's file system, and what would be freed with whom.
 *
 * An account is of one moment's rows; the bytes are those that the data files have allocated when they are looked at (`st_blocks`), so
 * that sparse files, discards and what the file system adds are in them, and files outside of the store are not. Rows are read and
 * the graph is made in one go, some 50 ms for 10,000 clones; the files are looked at in slices, between which the main thread does
 * other work. Main thread.
 *
 *   exclusive  the layers that only this disk (container, snapshot) reaches: what the store gets back when it is removed with --keep-data
 *   shared     the other layers that it reads through
 *   charged    what counts against a container's limit: the active layers of what is in it, its snapshots among them; the sealed layers
 *              that something in it wrote; and sealed layers whose writer is gone, when it alone still reads through them
 */
import { setImmediate as nextTurn } from 'node:timers/promises';

import { LayerGraph, LEFT_OVER } from './layer-graph.js';
import type { LayerFiles } from './layer-files.js';
import { ROOT_ID } from './meta/rows.js';
import type { SpaceNode, SpaceRows } from './meta/space-reader.js';

/** Files looked at before other work may run: some 5 ms. */
const SLICE_FILES = 500;
/** In the place of a container's id, for what lost its name while it is open. */
export const REMOVED = Number.MAX_SAFE_INTEGER;

export interface Cost {
  /** Of the active layers. */
  readonly allocatedBytes: number;
  readonly exclusiveBytes: number;
  readonly sharedBytes: number;
}

export class Account {
  readonly nodes: ReadonlyMap<number, SpaceNode>;
  readonly graph: LayerGraph;
  readonly #rows: SpaceRows;
  readonly #files: LayerFiles;
  /** Bytes of each layer, by its index; below zero: not looked at yet. */
  readonly #bytes: Float64Array;
  readonly #containers = new Map<number, number>();
  readonly #data: readonly SpaceNode[];
  readonly #activeOf: ReadonlyMap<number, number>;
  readonly #readersOf = new Map<number, readonly number[]>();

  constructor(rows: SpaceRows, files: LayerFiles) {
    this.#rows = rows;
    this.#files = files;
    this.graph = new LayerGraph(rows.layers, rows.shares);
    this.nodes = new Map(rows.nodes.map((node) => [node.id, node]));
    this.#bytes = Float64Array.from(rows.layers, ({ stored }) => (stored === 1 ? -1 : 0));
    this.#data = rows.nodes.filter((node) => node.layer_id !== null && this.graph.indexOf(node.layer_id) !== undefined);
    this.#activeOf = new Map(this.#data.map((node) => [this.graph.indexOf(node.layer_id!)!, node.id]));
  }

  /** Disks and files, those without a name among them. */
  get dataNodes(): readonly SpaceNode[] { return this.#data; }

  /** Looks at all files, letting other work run meanwhile. */
  async measure(): Promise<void> {
    for (let at = 0; at < this.graph.size; at += 1) {
      this.bytesAt(at);
      if (at % SLICE_FILES === SLICE_FILES - 1) await nextTurn();
    }
  }

  /** Bytes that a layer's file takes; looked at once. */
  bytesAt(at: number): number {
    if (this.#bytes[at]! < 0) this.#bytes[at] = this.#files.allocatedBytes(this.graph.idAt(at));
    return this.#bytes[at]!;
  }

  activeBytes(node: SpaceNode): number {
    return node.layer_id === null ? 0 : this.bytesAt(this.graph.indexOf(node.layer_id)!);
  }

  /** The id of the container that a node lies in; of one that has no name any more, REMOVED. */
  containerOf(nodeId: number): number {
    const path: number[] = [];
    let container: number | undefined;
    for (let id = nodeId; container === undefined;) {
      const parent = this.nodes.get(id)?.parent_id ?? null;
      container = this.#containers.get(id) ?? (parent === ROOT_ID ? id : parent === null || path.length > this.nodes.size ? REMOVED : undefined);
      path.push(id);
      if (container === undefined) id = parent!;
    }
    for (const id of path) this.#containers.set(id, container);
    return container;
  }

  /** `CONTAINER/PATH` of a node. */
  pathOf(nodeId: number): string {
    const names: string[] = [];
    for (let node = this.nodes.get(nodeId); node !== undefined && node.parent_id !== null && names.length <= this.nodes.size; node = this.nodes.get(node.parent_id)) names.push(node.name);
    return names.reverse().join('/');
  }

  /**
   * What each group of nodes costs, all groups at once. `groupOf` gives a number above 0, or null for what belongs to none: that still counts as
   * somebody who reads.
   */
  costs(groupOf: (node: SpaceNode) => number | null): Map<number, Cost> {
    const groups = new Map<number, { allocated: number; exclusive: number; readonly active: number[] }>();
    const readers = new Map<number, number>();
    for (const node of this.#data) {
      const at = this.graph.indexOf(node.layer_id!)!;
      const group = groupOf(node);
      readers.set(at, group ?? REMOVED);
      if (group === null) continue;
      let of = groups.get(group);
      if (of === undefined) groups.set(group, of = { allocated: 0, exclusive: 0, active: [] });
      of.allocated += this.bytesAt(at);
      of.active.push(at);
    }
    const owners = this.graph.owners(readers);
    for (let at = 0; at < owners.length; at += 1) {
      const of = groups.get(owners[at]!);
      if (of !== undefined) of.exclusive += this.bytesAt(at);
    }
    const total = this.graph.totals((at) => this.bytesAt(at));
    return new Map([...groups].map(([group, { allocated, exclusive, active }]) => {
      const all = active.length === 1 ? total(active[0]!) : this.graph.reach(active).reduce((sum, at) => sum + this.bytesAt(at), 0);
      return [group, { allocatedBytes: allocated, exclusiveBytes: exclusive, sharedBytes: all - exclusive }];
    }));
  }

  /** Ids of the other disks and files that stand on something that this one reads through, in the order of their ids. */
  sharedWith(node: SpaceNode): { readonly count: number; readonly first: (max: number) => number[] } {
    const at = this.graph.indexOf(node.layer_id!)!;
    const bottoms = this.graph.bottoms(at);
    const readers = bottoms.length === 1 ? this.#readers(bottoms[0]!) : [...new Set(bottoms.flatMap((bottom) => this.#readers(bottom)))].sort((a, b) => a - b);
    return {
      // It is one of them itself.
      count: Math.max(0, readers.length - 1),
      first: (max) => readers.slice(0, max + 1).filter((id) => id !== node.id).slice(0, max),
    };
  }

  /** Bytes of layers that nothing refers to. */
  leftOverBytes(): number {
    const owners = this.graph.owners(new Map(this.#data.map((node) => [this.graph.indexOf(node.layer_id!)!, 1])));
    return owners.reduce((sum, owner, at) => sum + (owner === LEFT_OVER ? this.bytesAt(at) : 0), 0);
  }

  /** What is charged to each of these containers. */
  charged(containers: ReadonlySet<number>): Map<number, number> {
    const sums = new Map([...containers].map((id) => [id, 0]));
    const charge = (container: number, at: number): void => {
      const sum = sums.get(container);
      if (sum !== undefined) sums.set(container, sum + this.bytesAt(at));
    };
    const readers = new Map<number, number>();
    for (const node of this.#data) {
      const at = this.graph.indexOf(node.layer_id!)!;
      const container = this.containerOf(node.id);
      readers.set(at, container);
      charge(container, at);
    }
    const owners = this.graph.owners(readers);
    this.#rows.layers.forEach((layer, at) => {
      if (layer.sealed === 0 || layer.stored === 0) return;
      const written = layer.written_by === null ? undefined : this.nodes.get(layer.written_by);
      charge(written === undefined ? owners[at]! : this.containerOf(written.id), at);
    });
    return sums;
  }

  /** Bytes of all layers. */
  layersBytes(): number {
    let sum = 0;
    for (let at = 0; at < this.graph.size; at += 1) sum += this.bytesAt(at);
    return sum;
  }

  #readers(bottom: number): readonly number[] {
    let known = this.#readersOf.get(bottom);
    if (known === undefined) {
      known = this.graph.reachUp([bottom]).flatMap((at) => this.#activeOf.get(at) ?? []).sort((a, b) => a - b);
      this.#readersOf.set(bottom, known);
    }
    return known;
  }
}
