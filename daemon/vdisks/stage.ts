/**
 * Staging: a machine that is off, copied into one file of the store from which it can be deployed in a moment. The machine stays as it is. One operation, done
 * or undone as a whole. Main thread; whatever opens a file of the mount is a program of the host.
 *
 *   1. checks: the machine, off, with all its files its own; the name of the container file; the file system       (dies: nothing was made)
 *   2. an empty disk of the data's virtual size and a tenth more, and its row, `making`                        (dies: the next server removes both)
 *   3. attached as a block device, partitioned, detached                                                      (dies: given back, removed)
 *   4. the partition attached, formatted                                                                      (the same)
 *   5. mounted where nobody else looks, its description written, the files copied, on the device              (unmounted, given back, removed)
 *   6. unmounted, detached: nothing of it is attached any more
 *   7. one transaction: the row is `ready`, the job is completed
 */
import { randomUUID } from 'node:crypto';
import path from 'node:path';

import { isInDoubt } from '../../blockstore/doubt.js';
import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import { ROOT_ID, type JobRow, type NodeRow } from '../../blockstore/meta/rows.js';
import { byPath, listTree } from '../../blockstore/trees.js';
import { shown } from '../filesystem/names.js';
import type { Resolved } from '../filesystem/references.js';
import type { OperationEnd } from '../jobs/operations.js';
import { assertClonable, pathInTree, placesOf, readText, requireMachine, type FoundMachine } from '../machines/machines.js';
import { takeAway } from '../machines/machine-undo.js';
import { DESCRIPTION_FILE, DESCRIPTION_VERSION, OFFSHOOT_DIRECTORY, descriptionText, type VdiskDescription } from './description.js';
import { ALIGNMENT_BYTES, dataBytesOf, planLayout, type FileSystemType, type VdiskLayout } from './layout.js';
import { LINUX_FILE_SYSTEM } from './partition.js';
import { STAGE_JOB, stagingMountPoint, stepText, type VdiskParts } from './vdisk-parts.js';

export interface StageRequest {
  /** CONTAINER/NAME, also in a snapshot. */
  readonly source: string;
  readonly target: string;
  readonly fileSystem: FileSystemType;
}

interface StagePlan {
  readonly source: Resolved;
  readonly machine: FoundMachine;
  /** All that is copied. */
  readonly tree: readonly NodeRow[];
  readonly layout: VdiskLayout;
  readonly description: VdiskDescription;
}

const STEPS = 7;
/** The kernel mounts what it holds, and the machine's owner may do in it what he likes: so nobody writes to it but through that. */
const ROOTS_ALONE = { mode: 0o600, uid: 0, gid: 0 } as const;
const LABEL = 'offshoot';

export function startStage(parts: VdiskParts, request: StageRequest): JobRow {
  return parts.operations().begin(STAGE_JOB, stepText(1, STEPS, 'checks'), {
    target: request.target, source: request.source, targets: [request.target], roots: [], errorKind: null,
  }, async (jobId, signal) => { await stage(parts, jobId, request, signal); });
}

async function stage(parts: VdiskParts, jobId: number, request: StageRequest, signal: AbortSignal): Promise<void> {
  const { store, host, attachments } = parts;
  const { meta } = store;
  const operations = parts.operations();
  const plan = await planStage(parts, request); // Step 1.
  const before = stateOf(parts, plan.tree);
  signal.throwIfAborted();
  operations.say(jobId, stepText(2, STEPS, 'making an empty disk'));
  const nodeId = await makeContainerFile(parts, jobId, request, plan); // Step 2.
  signal.throwIfAborted();
  const { layout, description } = plan;
  operations.say(jobId, stepText(3, STEPS, 'partitioning')); // Step 3.
  const whole = await attachments.attach({ nodeId, purpose: 'stage', jobId, readOnly: false }, signal);
  const { guid, partition } = description.partitionTable;
  await host.partition(whole.device, { diskGuid: guid, partitionGuid: partition.guid, name: partition.name, window: layout.partition }, signal);
  await attachments.giveBack(nodeId, signal);
  operations.say(jobId, stepText(4, STEPS, `formatting (${request.fileSystem})`)); // Step 4.
  const { device } = await attachments.attach({ nodeId, purpose: 'stage', jobId, readOnly: false, window: layout.partition }, signal);
  await host.makeFileSystem(device, { ...description.fileSystem, sizeBytes: layout.partition.sizeBytes, files: description.sizes.files }, signal);
  const mountPoint = stagingMountPoint(parts, jobId);
  operations.say(jobId, stepText(5, STEPS, 'copying')); // Step 5.
  await host.mount(device, mountPoint, request.fileSystem, signal);
  const wayBefore = stateOf(parts, wayTo(parts, plan.source));
  await copyIn(parts, jobId, plan, { device, mountPoint }, signal);
  if (plan.source.snapshot === null) for (const { id, kind } of plan.tree) if (kind === 'disk') await attachments.untilClosed(id, signal);
  assertUnchanged(parts, request, plan, new Map([...before, ...wayBefore]));
  operations.say(jobId, stepText(6, STEPS, 'detaching')); // Step 6.
  await host.unmount(mountPoint, signal);
  await attachments.giveBack(nodeId, signal);
  signal.throwIfAborted();
  meta.transaction(() => { // Step 7.
    const row = meta.vdisks.byNode(nodeId);
    if (row === undefined) throw new OffshootError('conflict', `${request.target} was removed while it was made: try again`);
    meta.vdisks.ready(row.id);
    meta.jobs.update(jobId, { state: 'completed', updatedUs: Date.now() * 1000, message: `${request.source} is staged in ${meta.nodes.pathOf(nodeId)}` });
  });
}

export async function undoStage(parts: VdiskParts, jobId: number, end: OperationEnd, signal: AbortSignal): Promise<void> {
  const { meta } = parts.store;
  await parts.host.unmount(stagingMountPoint(parts, jobId), signal);
  for (const { nodeId } of meta.attachments.ofJob(jobId)) await parts.attachments.giveBack(nodeId, signal);
  const nodes = meta.vdisks.ofJob(jobId).map(({ nodeId }) => nodeId);
  for (const nodeId of nodes) await parts.attachments.untilClosed(nodeId, signal);
  await takeAway(parts, jobId, end, () => { for (const row of meta.vdisks.ofJob(jobId)) meta.vdisks.remove(row.id); });
}

async function planStage(parts: VdiskParts, request: StageRequest): Promise<StagePlan> {
  const { store, references, namespace, host } = parts;
  if (!host.canMount(request.fileSystem)) {
    throw new OffshootError('not-supported', `the kernel of this host has no ${request.fileSystem} (/proc/filesystems): load its module, or choose another --fs`);
  }
  if (!request.target.includes('/')) throw new OffshootError('invalid-argument', `a container file lies in a container: write CONTAINER/NAME instead of ${shown(request.target)}`, { path: request.target });
  namespace.resolveNew(request.target);
  const source = references.resolve(request.source);
  const machine = await requireMachine(parts, source);
  const tree = listTree(store.meta, source.node);
  await assertOff(parts, source, tree);
  const document = machine.format.parse(machine.text);
  const facts = document.facts();
  const places = placesOf(parts.mountDir, source);
  const names = byPath(tree, (node) => node, source.node);
  if (names.has(OFFSHOOT_DIRECTORY)) throw new OffshootError('invalid-name', `${request.source} holds ${OFFSHOOT_DIRECTORY}, which is Offshoot's own in a container file: rename it first`);
  await assertClonable(document, machine.format, source.path, {
    pathOf: (file) => pathInTree(places, '', file), nodeAt: (inside) => names.get(inside), read: async (node) => await readText(store, node),
  });
  const data = { fileBytes: tree.flatMap((node) => (node.layerId === null ? [] : [sizeOf(parts, node)])), directories: tree.filter((node) => node.kind === 'directory').length };
  const layout = planLayout(data, request.fileSystem);
  const disk = tree.find((node) => node.kind === 'disk') ?? machine.configuration;
  const name = facts.name ?? source.node.name;
  const description: VdiskDescription = {
    version: DESCRIPTION_VERSION,
    partitionTable: {
      type: 'gpt', guid: randomUUID(), alignmentBytes: ALIGNMENT_BYTES, partition: { guid: randomUUID(), typeGuid: LINUX_FILE_SYSTEM, name: LABEL, ...layout.partition },
    },
    fileSystem: { type: request.fileSystem, uuid: randomUUID(), label: LABEL },
    sizes: { virtualBytes: layout.sizeBytes, dataBytes: dataBytesOf(data), files: data.fileBytes.length },
    host: { system: 'linux', architecture: host.architecture(), fileSystem: request.fileSystem, format: machine.format.id },
    machine: {
      name, format: machine.format.id, configuration: machine.configuration.name, text: machine.text, uid: machine.configuration.uid, gid: machine.configuration.gid,
      mode: machine.configuration.mode & 0o777, owner: { uid: disk.uid, gid: disk.gid }, macCount: facts.macs.length,
      directories: places.roots.map((root) => path.posix.join(places.mountDir, root)),
    },
  };
  return { source, machine, tree, layout, description };
}

/** Off, as its hypervisor says, and nothing of it open. */
async function assertOff(parts: VdiskParts, source: Resolved, tree: readonly NodeRow[]): Promise<void> {
  const row = parts.store.meta.machines.byNode(source.node.id);
  if (row?.state === 'making') throw new OffshootError('in-use', `${source.path} is being made: wait for it (offshoot jobs ${row.jobId ?? 0})`);
  if (row?.registration === 'registered') {
    const state = await parts.adapters.hypervisor(row.hypervisor ?? '').status(row.externalId ?? '', { signal: parts.operations().closing });
    if (state === 'running' || state === 'paused') throw new OffshootError('in-use', `${source.path} is ${state}: only a machine that is off can be staged, shut it down first (offshoot vm stop ${source.path})`, { path: source.path });
  }
  if (source.snapshot !== null) return;
  const open = tree.find((node) => node.kind === 'disk' && parts.fileSystem.openCount(node.id) > 0);
  if (open !== undefined) {
    throw new OffshootError('in-use', `${parts.store.meta.nodes.pathOf(open.id)} is open: only a machine that is off can be staged, stop what uses it first`, { path: source.path });
  }
}

/** An empty disk under its name, and the row that says what it is to be, in one transaction. */
async function makeContainerFile({ store, namespace, forgetAttributes }: VdiskParts, jobId: number, { target }: StageRequest, { layout, description }: StagePlan): Promise<number> {
  const { meta, files } = store;
  const { sizeBytes } = layout;
  const nowUs = Date.now() * 1000;
  const layer = meta.layers.insert({
    kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes, sealed: false, complete: true, createdUs: nowUs,
  });
  meta.layers.prepared.add(layer.id);
  let parentId = 0;
  try {
    await files.createAll([{ layerId: layer.id, sizeBytes }]);
    const nodeId = meta.transaction(() => {
      const { parent, name } = namespace.resolveNew(target);
      parentId = parent.id;
      const node = namespace.addDisk(parent.id, name, { ...ROOTS_ALONE, sizeBytes, copyOnRead: false, layerId: layer.id });
      const { machine } = description;
      meta.vdisks.insert({ uuid: randomUUID(), nodeId: node.id, format: machine.format, configuration: machine.configuration, name: machine.name, description, state: 'making', jobId });
      const { parameters } = meta.jobs.byId(jobId) ?? { parameters: {} };
      meta.jobs.update(jobId, { parameters: { ...(parameters as object), roots: [node.id] }, updatedUs: nowUs });
      return node.id;
    });
    meta.layers.prepared.delete(layer.id);
    await forgetAttributes(parentId);
    return nodeId;
  } catch (thrown) {
    meta.layers.prepared.delete(layer.id);
    store.reclaim([layer.id]);
    throw thrown;
  }
}

async function copyIn(
  { host, store, mountDir }: VdiskParts, jobId: number, { source, tree, description }: StagePlan, { device, mountPoint }: { readonly device: string; readonly mountPoint: string }, signal: AbortSignal,
): Promise<void> {
  const own = path.posix.join(mountPoint, OFFSHOOT_DIRECTORY);
  const asRoot = { uid: 0, gid: 0, mode: 0o600 };
  // First: what is copied later may hold links, and is the users'.
  await host.makeDirectory(own, signal);
  await host.write({ ...asRoot, path: path.posix.join(own, DESCRIPTION_FILE), text: descriptionText(description) }, signal);
  await host.write({ ...asRoot, path: path.posix.join(own, description.machine.configuration), text: description.machine.text }, signal);
  const totalBytes = tree.reduce((sum, node) => sum + (node.layerId === null ? 0 : Math.min(node.sizeBytes, store.files.allocatedBytes(node.layerId))), 0);
  await host.copy(path.posix.join(mountDir, source.path), mountPoint, {
    signal, device,
    onProgress: (writtenBytes) => {
      try {
        store.meta.jobs.update(jobId, {
          progressDone: writtenBytes, progressTotal: Math.max(writtenBytes, totalBytes), updatedUs: Date.now() * 1000, message: stepText(5, STEPS, `copying, ${Math.round(writtenBytes / ALIGNMENT_BYTES)} of ${Math.round(Math.max(writtenBytes, totalBytes) / ALIGNMENT_BYTES)} MiB`),
        });
      } catch (thrown) {
        // A timer's: a store that is full stops the copy itself.
        if (isInDoubt(thrown) || !isOperatingError(thrown)) throw thrown;
      }
    },
  });
  await host.sync(mountPoint, signal);
}

function sizeOf({ store }: VdiskParts, node: NodeRow): number {
  return store.disks.get(node.id)?.shared.sizeBytes() ?? node.sizeBytes;
}

/** What a write changes of each file. */
function stateOf({ fileSystem }: VdiskParts, tree: readonly NodeRow[]): ReadonlyMap<number, string> {
  return new Map(tree.map((node) => {
    const { mtimeUs, ctimeUs, sizeBytes } = fileSystem.getattr(node.id);
    return [node.id, `${mtimeUs} ${ctimeUs} ${sizeBytes}`];
  }));
}

/** The directories between the container and the machine, which cp comes by: a link for a moment in the place of one would lead it elsewhere. The container keeps its name. */
function wayTo({ store: { meta } }: VdiskParts, { node, snapshot }: Resolved): readonly NodeRow[] {
  const way: NodeRow[] = [];
  // Nobody exchanges anything in a snapshot.
  if (snapshot !== null) return way;
  for (let at = node.parentId === null ? undefined : meta.nodes.byId(node.parentId); at !== undefined && at.parentId !== null && at.parentId !== ROOT_ID; at = meta.nodes.byId(at.parentId)) way.push(at);
  return way;
}

/** Somebody may have started the machine meanwhile, by hand, or exchanged a directory on the way to it. */
function assertUnchanged(parts: VdiskParts, request: StageRequest, { source, tree }: StagePlan, before: ReadonlyMap<number, string>): void {
  const { meta } = parts.store;
  const now = parts.references.resolve(request.source);
  const same = now.node.id === source.node.id && listTree(meta, now.node).map(({ id }) => id).join() === tree.map(({ id }) => id).join();
  const after = same ? stateOf(parts, [...tree, ...wayTo(parts, now)]) : new Map<number, string>();
  if (same && [...before].every(([id, state]) => after.get(id) === state)) return;
  throw new OffshootError('conflict', `${request.source} was changed while it was copied: leave it off until it is staged, and try again`, { path: request.source });
}
