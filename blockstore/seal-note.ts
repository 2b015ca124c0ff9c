/**
 * The note of a seal that the database does not know yet.
 *
 * Between the instant at which a group of disks is sealed and the commit of that, guests write to layers that no node has. The note says which
 * layer belongs to which node. It lies beside the journals, on tmpfs: after a kill the next server goes on from it (`recovery.ts`), and after
 * a power loss it is gone, as it must be: nothing that was written to the new layers was called durable before the commit. Main thread.
 */
import fs from 'node:fs';
import path from 'node:path';

import { toOffshootError } from './errors.js';
import type { MetaStore } from './meta/meta-store.js';
import type { LayerRow, NodeRow } from './meta/rows.js';

/** One disk of the group. */
export interface NotedSeal {
  readonly nodeId: number;
  /** The layer that was sealed; the database has it as the node's active one until the commit. */
  readonly sealedLayerId: number;
  /** The disk's size at the instant. */
  readonly sizeBytes: number;
  readonly newLayerId: number;
}

export function sealNotePath(runtimeDir: string, storeId: number): string {
  return path.join(runtimeDir, `journal-seal-${storeId}`);
}

/** A process that dies before this returns has opened no gate yet: what it leaves, which is no whole array, means nothing. */
export function writeSealNote(file: string, seals: readonly NotedSeal[]): void {
  try {
    fs.writeFileSync(file, JSON.stringify(seals), { mode: 0o600 });
  } catch (thrown) {
    throw toOffshootError(thrown);
  }
}

export function removeSealNote(file: string): void {
  fs.rmSync(file, { force: true });
}

/** What a killed server left; empty when it left none. */
export function readSealNote(file: string): NotedSeal[] {
  let text: string;
  try {
    text = fs.readFileSync(file, 'utf8');
  } catch (thrown) {
    const error = toOffshootError(thrown);
    if (error.kind === 'not-found') return [];
    throw error;
  }
  const value = parsedOrNull(text);
  return Array.isArray(value) ? value.filter(isNotedSeal) : [];
}

function parsedOrNull(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null; // Cut off: see writeSealNote.
  }
}

function isNotedSeal(value: unknown): value is NotedSeal {
  const fields = value as Partial<Record<keyof NotedSeal, unknown>> | null;
  return [fields?.nodeId, fields?.sealedLayerId, fields?.sizeBytes, fields?.newLayerId].every((each) => Number.isSafeInteger(each) && Number(each) >= 0);
}

/** Those that are not committed: the node stands on the layer that was sealed, and is well. A faulted disk keeps what its last commit says. */
export function openSeals(meta: MetaStore, seals: readonly NotedSeal[]): NotedSeal[] {
  return seals.filter((seal) => {
    const node = meta.nodes.byId(seal.nodeId);
    return node?.layerId === seal.sealedLayerId && node.fault === null && meta.layers.byId(seal.newLayerId) !== undefined;
  });
}

/** The layer is sealed, and the node stands on the new one. Inside a transaction. */
export function attachSealed(meta: MetaStore, node: Pick<NodeRow, 'id'>, sealedLayerId: number, active: Pick<LayerRow, 'id'>, sizeBytes: number): void {
  meta.layers.update(sealedLayerId, { sealed: true, sizeBytes, writtenBy: node.id });
  meta.layers.update(active.id, { backingId: sealedLayerId, sizeBytes });
  meta.nodes.update(node.id, { layerId: active.id, sizeBytes });
}
