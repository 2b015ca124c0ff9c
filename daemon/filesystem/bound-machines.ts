/**
 * The directory of a machine that a hypervisor knows, or that an operation is making, keeps its place: what was registered names files by their
 * paths, and would be left behind with a hypervisor that nobody tells. Whoever is about to take such a name away asks here first. Main thread.
 *
 * Through the mount the answer is EBUSY. Files in the directory are the owner's to change and to remove.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { MachineRow } from '../../blockstore/meta/machine-table.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';

/** Throws when the directory itself is such a machine's. */
export function assertNoBoundMachine(meta: MetaStore, node: NodeRow): void {
  if (node.kind !== 'directory') return;
  const row = meta.machines.byNode(node.id);
  if (row !== undefined && isBound(row)) throw boundError(meta, row);
}

/** Throws when one lies in the node, or is it. */
export function assertNoBoundMachineIn(meta: MetaStore, top: NodeRow): void {
  if (top.kind !== 'directory') return;
  for (const { id, nodeId } of meta.machines.bound()) {
    for (let at: number | null | undefined = nodeId; at !== null && at !== undefined && at !== ROOT_ID; at = meta.nodes.byId(at)?.parentId) {
      if (at !== top.id) continue;
      const row = meta.machines.byId(id);
      if (row !== undefined) throw boundError(meta, row);
    }
  }
}

function isBound({ state, registration }: MachineRow): boolean {
  return state === 'making' || registration !== 'none';
}

function boundError(meta: MetaStore, { nodeId, state, jobId, hypervisor }: MachineRow): OffshootError {
  const path = meta.nodes.pathOf(nodeId);
  return new OffshootError('in-use', state === 'making'
    ? `${path} is being made by operation ${jobId ?? 0}: wait for it, or cancel it (offshoot job cancel ${jobId ?? 0})`
    : `${path} is a machine that ${hypervisor ?? ''} knows: remove it with offshoot vm rm ${path}, or unregister it first (offshoot vm unregister ${path})`, { path });
}
