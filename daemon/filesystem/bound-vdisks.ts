/**
 * The clone that a deployed machine lives in, and a container file that is being made, keep their names: with the name the row would go that says what
 * is mounted, and what a hypervisor was told. Whoever is about to take one away asks here first. Main thread.
 *
 * Through the mount the answer is EBUSY. A container file that is ready is its owner's to remove; what was deployed from it goes on.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { listedLines, listedNames, shellWord } from '../../blockstore/listed-names.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';

/** Throws when the node itself is one. */
export function assertNoBoundVdisk(meta: MetaStore, node: Pick<NodeRow, 'id'>): void {
  const deployed = meta.deployments.byNode(node.id);
  if (deployed !== undefined) {
    const path = meta.nodes.pathOf(node.id);
    throw new OffshootError('in-use', `${path} is the deployed machine ${deployed.name}: decommission it first (offshoot decommission ${deployed.name})`, { path });
  }
  const vdisk = meta.vdisks.byNode(node.id);
  if (vdisk?.state === 'making') {
    const path = meta.nodes.pathOf(node.id);
    throw new OffshootError('in-use', `${path} is being staged by operation ${vdisk.jobId ?? 0}: wait for it, or cancel it (offshoot job cancel ${vdisk.jobId ?? 0})`, { path });
  }
}

/**
 * Throws when the container file would get another content than the one that its row describes: that of a snapshot which was taken while it was staged, or when
 * another file had its name. It is never written, so one that has the time of change of then is that of then.
 */
export function assertContainerFileStays(meta: MetaStore, node: Pick<NodeRow, 'id'>, before: Pick<NodeRow, 'kind' | 'mtimeUs' | 'sizeBytes'>): void {
  if (meta.vdisks.byNode(node.id) === undefined) return;
  const now = meta.nodes.byId(node.id);
  if (before.kind !== now?.kind || (before.mtimeUs === now.mtimeUs && before.sizeBytes === now.sizeBytes)) return;
  const path = meta.nodes.pathOf(node.id);
  throw new OffshootError('in-use', `${path} is a container file that was not what it is now when the snapshot was taken (it was being staged, or another): move it to another container, or remove it (offshoot rm ${shellWord(path)}), first; what comes back is a disk, and no container file`, { path });
}

/** Throws when machines are deployed from one of them: without its row they are attached and mounted by no server after this one. `command`: which removes it all the same, with --keep-data; null: there is none. */
export function assertNothingDeployedFrom(meta: MetaStore, nodes: readonly Pick<NodeRow, 'id'>[], command: string | null): void {
  for (const { id } of nodes) {
    const row = meta.vdisks.byNode(id);
    const names = row === undefined ? [] : meta.deployments.ofVdisk(row.id).map(({ name }) => name);
    if (names.length === 0) continue;
    const path = meta.nodes.pathOf(id);
    const isOne = names.length === 1;
    const commands = listedLines(names, (name) => `offshoot decommission ${name}`);
    throw new OffshootError('in-use', [
      `${isOne ? 'a machine is' : `${names.length} machines are`} deployed from ${path}: ${listedNames(names, (name) => name)}. Decommission ${isOne ? 'it' : 'them'} first:`,
      ...commands.lines,
      ...(commands.more > 0 ? [`and ${commands.more} more: offshoot deployed lists them`] : []),
      ...(command === null ? [] : [`or ${command} --keep-data, which removes the name; ${isOne ? 'the machine goes on, and is' : 'the machines go on, and are'} not mounted again by the next daemon start`]),
    ].join('\n'), { path, deployed: names.length });
  }
}
