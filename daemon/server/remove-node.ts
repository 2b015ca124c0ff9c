/**
 * Removing by path: a disk, a file, or a directory with what is in it; all names in one transaction, then the data in steps, between
 * which guests are served. A server that dies in between leaves nodes without a name, which the next one takes away.
 *
 * What is open is refused: its users would go on with a disk that has no name. What clones stand on is refused, with the
 * list of them, unless the data is to be kept; then the name goes at once, and the sealed layers stay for as long as
 * somebody needs them. Main thread.
 */
import { setTimeout as delay } from 'node:timers/promises';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { listedNames, shellWord } from '../../blockstore/listed-names.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { originOf } from '../../blockstore/promote.js';
import type { Store } from '../../blockstore/store.js';
import type { RemoveResult } from '../control/schemas.js';
import type { RemoveOptions } from '../control/service.js';
import { assertNothingExportedIn } from '../filesystem/bound-exports.js';
import { assertNoBoundVdisk, assertNothingDeployedFrom } from '../filesystem/bound-vdisks.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import { ROOT_NODE_ID } from '../filesystem/types.js';
import { inSteps } from '../jobs/steps.js';
import { dependentsError } from './dependents.js';

/** Of those who stand on a disk, so many are looked at for one that can take its place. Those with the longest chains come first. */
const SUCCESSORS_TRIED = 8;
const CLOSED_POLL_MS = 20;

export interface RemoveParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
}

export async function removeNode(parts: RemoveParts, row: NodeRow, path: string, options: RemoveOptions): Promise<RemoveResult> {
  const { store, fileSystem } = parts;
  if (row.id === ROOT_NODE_ID) throw new OffshootError('not-permitted', 'the root of the store cannot be removed');
  assertNothingExportedIn(store.meta, row);
  // Depth first: a directory comes after what is in it.
  const nodes = collect(store, row);
  if (nodes.length > 1 && !options.recursive) {
    throw new OffshootError('not-empty', `${path} is not empty (${nodes.length - 1} nodes in it): add --recursive to remove all of it`, { path });
  }
  for (const node of nodes) assertNoBoundVdisk(store.meta, node);
  assertNotOpen(parts, nodes);
  const command = `offshoot rm${options.recursive ? ' -r' : ''} ${shellWord(path)}`;
  if (!options.keepData) assertNothingDeployedFrom(store.meta, nodes, command);
  const kept = neededByOthers(store, nodes);
  if (kept.users.length > 0 && !options.keepData) {
    throw dependentsError(store.meta, {
      name: path, command, users: kept.users.map(({ id }) => id), successor: nodes.length === 1 ? successorOf(store, row, kept) : null,
    });
  }
  const shared = kept.chain.map((layerId) => ({ layerId, bytes: store.files.allocatedBytes(layerId) }));
  fileSystem.namespace.removeAll(row, nodes);
  // From here on nothing can be refused, and the names are gone: what is left is work, done in steps.
  const { layersRemoved, freedBytes } = await discardInSteps(parts, nodes);
  const freedShared = shared.filter(({ layerId }) => store.meta.layers.byId(layerId) === undefined).reduce((sum, { bytes }) => sum + bytes, 0);
  return { path, nodesRemoved: nodes.length, layersRemoved, layersKept: kept.ownLayers, freedBytes: freedBytes + freedShared };
}

/** The nodes' active layers, which nobody else has, go with them; what they stood on goes with the last that needs it. */
async function discardInSteps({ store, fileSystem }: RemoveParts, nodes: readonly NodeRow[]): Promise<{ readonly layersRemoved: number; readonly freedBytes: number }> {
  let layersRemoved = 0;
  let freedBytes = 0;
  const failures: OffshootError[] = [];
  await inSteps(nodes.filter((node) => node.layerId !== null), (batch) => {
    for (const { layerId } of batch) if (layerId !== null) freedBytes += store.files.allocatedBytes(layerId);
    try {
      layersRemoved += fileSystem.discardAll(batch.map((node) => node.id));
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      // The others still go; what stays has no name any more, and the next server tries again.
      failures.push(error);
    }
  });
  const [failure] = failures;
  if (failure !== undefined) throw failure;
  return { layersRemoved, freedBytes };
}

function collect(store: Store, row: NodeRow): NodeRow[] {
  if (row.kind !== 'directory') return [row];
  const inside = store.meta.nodes.children(row.id, 0, Number.MAX_SAFE_INTEGER).flatMap((child) => collect(store, child));
  return [...inside, row];
}

function assertNotOpen({ store, fileSystem }: RemoveParts, nodes: readonly NodeRow[]): void {
  const open = nodes.filter((node) => fileSystem.openCount(node.id) > 0);
  if (open.length === 0) return;
  throw new OffshootError('in-use', `${listedNames(open, (node) => store.meta.nodes.pathOf(node.id))} ${open.length === 1 ? 'is' : 'are'} open: stop what uses ${open.length === 1 ? 'it' : 'them'} first`);
}

/**
 * Waits until nothing in the node is open. The kernel says that a file was closed a little after whoever had it open has ended: that must not
 * be somebody's mistake. Throws `in-use` when it is open still after `timeoutMs`.
 */
export async function untilClosed(parts: RemoveParts, row: NodeRow, timeoutMs: number): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  const nodes = collect(parts.store, row);
  while (nodes.some((node) => parts.fileSystem.openCount(node.id) > 0) && performance.now() < deadline) await delay(CLOSED_POLL_MS);
  assertNotOpen(parts, nodes);
}

interface Needed {
  readonly users: readonly NodeRow[];
  /** Layers that these would lose. */
  readonly sources: readonly number[];
  readonly ownLayers: number;
  /** Sealed layers that the set stands on. */
  readonly chain: readonly number[];
}

/**
 * Layers of the set's nodes that nodes outside of it read through, and of those readers the ones that would lose their
 * source: a layer counts as the source of others when one of the set's nodes wrote it. A clone's siblings do not.
 */
function neededByOthers(store: Store, nodes: readonly NodeRow[]): Needed {
  const going = new Set(nodes.map((node) => node.id));
  const users = new Map<number, NodeRow>();
  const chain = new Set<number>();
  const sources: number[] = [];
  let ownLayers = 0;
  const ahead = nodes.flatMap((node) => node.layerId ?? []);
  for (let id = ahead.pop(); id !== undefined; id = ahead.pop()) {
    const layer = chain.has(id) ? undefined : store.meta.layers.byId(id);
    if (layer === undefined) continue;
    // Nothing can stand on a layer that is not sealed.
    if (layer.sealed) {
      chain.add(layer.id);
      const others = layer.writtenBy !== null && going.has(layer.writtenBy) ? store.meta.layers.dependantNodes(layer.id).filter((other) => !going.has(other.id)) : [];
      if (others.length > 0) ownLayers += 1;
      const losing = others.filter((other) => !keepsItself(store, other, going));
      if (losing.length > 0) sources.push(layer.id);
      for (const other of losing) users.set(other.id, other);
    }
    if (layer.complete) continue;
    if (layer.backingId !== null) ahead.push(layer.backingId);
    ahead.push(...store.meta.sharedExtents.sources(layer.id));
  }
  return { users: [...users.values()], sources, ownLayers, chain: [...chain] };
}

/** A snapshot is there to outlast what it was made of, and so is what was cloned from one. */
function keepsItself(store: Store, other: NodeRow, going: ReadonlySet<number>): boolean {
  const sourceId = store.meta.snapshots.sourceOf(other.id);
  return other.frozen || (sourceId !== undefined && !going.has(sourceId));
}

/** The clone that everybody else who stands on the disk would be a clone of, if it were promoted. */
function successorOf({ meta }: Store, row: NodeRow, { users, sources }: Needed): number | null {
  return users.slice(0, SUCCESSORS_TRIED).find((user) => {
    const chain = user.layerId === null ? [] : meta.layers.chain(user.layerId);
    const inChain = new Set(chain.map((layer) => layer.id));
    return originOf(meta, user.id, chain)?.id === row.id && sources.every((layerId) => inChain.has(layerId));
  })?.id ?? null;
}
