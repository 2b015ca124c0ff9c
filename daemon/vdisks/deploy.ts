/**
 * Deployment: a machine of a container file, running in a moment. Nothing is partitioned, formatted or copied: a clone of the file is attached, and its file
 * system is simply there. The container file itself is never written. One operation, done or undone as a whole. Main thread.
 *
 *   1. checks: the container file, this host, the name; whether the hypervisor answers is asked meanwhile   (dies: nothing was made)
 *   2. one transaction: the clone, the deployed machine's row with an identity of its own, `making`       (dies: the next server removes both)
 *   3. the clone's partition attached                                                                     (given back, removed)
 *   4. mounted; the machine's configuration customised and written                                        (unmounted, given back, removed)
 *   5. the hypervisor has answered; registered: noted as asked before the call, as registered after it    (forgotten, and so on)
 *   6. started, if wanted                                                                                 (its power taken, and so on)
 *   7. the configuration is on the device; one transaction: the row is `ready`, the job is completed
 */
import path from 'node:path';

import { OffshootError, isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import type { DeploymentRow } from '../../blockstore/meta/deployment-table.js';
import { ROOT_ID, type JobRow } from '../../blockstore/meta/rows.js';
import type { VdiskRow } from '../../blockstore/meta/vdisk-table.js';
import { shown } from '../filesystem/names.js';
import type { Resolved } from '../filesystem/references.js';
import type { Hypervisor, MachineToRegister } from '../hypervisor/hypervisor.js';
import type { OperationEnd } from '../jobs/operations.js';
import type { FormatId } from '../machines/format.js';
import { newIdentity } from '../machines/identities.js';
import { isRefusal, takeAway } from '../machines/machine-undo.js';
import { pathInTree } from '../machines/machines.js';
import { parseDescription, type VdiskDescription } from './description.js';
import { DEPLOY_JOB, checkDeployedName, deployedMountPoint, stepText, type VdiskParts } from './vdisk-parts.js';

export interface DeployRequest {
  /** CONTAINER/FILE. */
  readonly source: string;
  readonly name: string;
  /** Container or directory of the clone; null: that of the container file. */
  readonly container: string | null;
  readonly start: boolean;
  readonly hypervisor: string | null;
}

interface DeployPlan {
  readonly source: Resolved;
  readonly vdisk: VdiskRow;
  readonly description: VdiskDescription;
  readonly hypervisor: Hypervisor;
  readonly target: string;
}

const STEPS = 7;
/** Of the clone's name, behind the machine's. */
const CLONE_SUFFIX = '.vdisk';
const STOP_TIMEOUT_MS = 30_000;

export function startDeploy(parts: VdiskParts, request: DeployRequest): JobRow {
  return parts.operations().begin(DEPLOY_JOB, stepText(1, STEPS, 'checks'), {
    target: request.name, source: request.source, targets: [request.name], roots: [], errorKind: null,
  }, async (jobId, signal) => { await deploy(parts, jobId, request, signal); });
}

async function deploy(parts: VdiskParts, jobId: number, request: DeployRequest, signal: AbortSignal): Promise<void> {
  // What waits for other programs goes on beside the steps, and is waited for where it counts; nothing of it goes on when this has failed.
  const others: Promise<void>[] = [];
  try {
    await takeSteps(parts, jobId, request, signal, (work) => {
      others.push(work);
      // The steps may fail before they come to it.
      work.catch(() => undefined);
      return work;
    });
  } finally {
    await Promise.allSettled(others);
  }
}

async function takeSteps(parts: VdiskParts, jobId: number, request: DeployRequest, signal: AbortSignal, beside: (work: Promise<void>) => Promise<void>): Promise<void> {
  const { meta } = parts.store;
  const operations = parts.operations();
  const plan = planDeploy(parts, request); // Step 1.
  const answered = beside(assertUsable(plan.hypervisor, signal));
  signal.throwIfAborted();
  operations.say(jobId, stepText(2, STEPS, 'cloning'));
  const row = await makeClone(parts, jobId, request, plan); // Step 2.
  signal.throwIfAborted();
  operations.say(jobId, stepText(3, STEPS, 'attaching'));
  await showClone(parts, row, plan.description, jobId, signal, () => { operations.say(jobId, stepText(4, STEPS, 'customising')); }); // Steps 3 and 4.
  const { machine } = plan.description;
  const told = toRegister(parts, row, plan.description);
  await parts.host.write({ path: path.posix.join(row.mountPoint, machine.configuration), text: told.text, uid: machine.uid, gid: machine.gid, mode: machine.mode }, signal);
  const synced = beside(parts.host.sync(row.mountPoint, signal));
  await answered;
  signal.throwIfAborted();
  const externalId = await register(parts, jobId, row, told, plan.hypervisor, signal); // Step 5.
  if (request.start) {
    signal.throwIfAborted();
    operations.say(jobId, stepText(6, STEPS, 'starting'));
    await plan.hypervisor.start(externalId, { signal }); // Step 6.
  }
  await synced;
  signal.throwIfAborted();
  meta.transaction(() => { // Step 7.
    meta.deployments.ready(row.id);
    meta.jobs.update(jobId, {
      state: 'completed', updatedUs: Date.now() * 1000, message: `${row.name} is deployed from ${request.source}, registered with ${plan.hypervisor.id}${request.start ? ' and started' : ''}`,
    });
  });
}

export async function undoDeploy(parts: VdiskParts, jobId: number, end: OperationEnd, signal: AbortSignal): Promise<void> {
  const { meta } = parts.store;
  for (const row of meta.deployments.ofJob(jobId)) {
    await forgetDeployed(parts, row, signal);
    await hideClone(parts, row, signal);
  }
  await takeAway(parts, jobId, end, () => { for (const row of meta.deployments.ofJob(jobId)) meta.deployments.remove(row.id); });
}

/** Attached and mounted, whatever of it was so before. */
export async function showClone(parts: VdiskParts, row: DeploymentRow, description: VdiskDescription, jobId: number | null, signal: AbortSignal, between: () => void = () => undefined): Promise<void> {
  const { host, attachments } = parts;
  const { offsetBytes, sizeBytes } = description.partitionTable.partition;
  let device = (await attachments.deviceOf(row.nodeId, signal))?.device ?? null;
  if (device === null) {
    // A row without a device is one of before the host was started anew.
    await attachments.giveBack(row.nodeId, signal);
    ({ device } = await attachments.attach({ nodeId: row.nodeId, purpose: 'deploy', jobId, readOnly: false, window: { offsetBytes, sizeBytes } }, signal));
  }
  between();
  await host.mount(device, row.mountPoint, description.fileSystem.type, signal);
}

/** Unmounted and detached. Throws `in-use` while somebody is in it. */
export async function hideClone({ host, attachments }: VdiskParts, row: DeploymentRow, signal: AbortSignal): Promise<void> {
  await host.unmount(row.mountPoint, signal);
  await attachments.giveBack(row.nodeId, signal);
  await attachments.untilClosed(row.nodeId, signal);
}

/** Its power is taken if it runs, and its hypervisor does not know it afterwards. */
export async function forgetDeployed(parts: VdiskParts, row: DeploymentRow, signal: AbortSignal): Promise<void> {
  if (row.registration === 'none') return;
  const hypervisor = parts.adapters.hypervisor(row.hypervisor ?? '');
  const externalId = row.externalId ?? await idOfAsked(parts, hypervisor, row, signal);
  if (externalId !== null) {
    const state = await hypervisor.status(externalId, { signal });
    if (state === 'running' || state === 'paused') await hypervisor.stop(externalId, { force: true, timeoutMs: STOP_TIMEOUT_MS, signal });
    await hypervisor.unregister(externalId, { signal });
  }
  parts.store.meta.deployments.unregistered(row.id);
}

/** What was described when the machine was staged; `not-supported` when that is not to be had. */
export function descriptionOf({ store }: VdiskParts, row: Pick<DeploymentRow, 'vdiskId' | 'name'>): VdiskDescription {
  const vdisk = row.vdiskId === null ? undefined : store.meta.vdisks.byId(row.vdiskId);
  if (vdisk === undefined) throw new OffshootError('not-found', `the container file that ${row.name} was deployed from was removed: decommission the machine (offshoot decommission ${row.name})`, { name: row.name });
  return parseDescription(vdisk.description, vdisk.name);
}

function planDeploy(parts: VdiskParts, request: DeployRequest): DeployPlan {
  const { store, references, namespace, host, adapters } = parts;
  const { meta } = store;
  const name = checkDeployedName(request.name);
  const source = references.resolve(request.source);
  const vdisk = meta.vdisks.byNode(source.node.id);
  if (vdisk === undefined) throw new OffshootError('not-found', `${shown(source.path)} is no container file that was staged here: offshoot staged lists those that are`, { path: source.path });
  if (vdisk.state !== 'ready') throw new OffshootError('busy', `${source.path} is being staged: wait for it (offshoot jobs ${vdisk.jobId ?? 0})`, { path: source.path });
  const description = parseDescription(vdisk.description, source.path);
  const { architecture, fileSystem } = description.host;
  if (!host.canMount(fileSystem)) throw new OffshootError('not-supported', `${source.path} holds ${fileSystem}, which the kernel of this host does not have (/proc/filesystems): load its module, or stage the machine with another --fs`);
  if (host.architecture() !== architecture) {
    throw new OffshootError('not-supported', `${source.path} holds a machine that was staged on ${architecture}, and this host is ${host.architecture()}: deploy it on a host of that architecture`);
  }
  const format = adapters.format(description.machine.format);
  const hypervisor = adapters.hypervisorFor(format.id, request.hypervisor);
  if (hypervisor.abilities.isRemote) {
    throw new OffshootError('not-supported', `${hypervisor.id} looks at files of other hosts, and a deployed machine's are mounted on this one: choose another --hypervisor, or clone the machine instead (offshoot vm clone)`);
  }
  const container = request.container ?? source.path.slice(0, source.path.lastIndexOf('/'));
  const target = `${container}/${name}${CLONE_SUFFIX}`;
  namespace.resolveNew(target);
  if (meta.deployments.byName(name) !== undefined) throw new OffshootError('already-exists', `there is a deployed machine ${JSON.stringify(name)} already: choose another --name (offshoot deployed lists them)`, { name });
  const mountPoint = deployedMountPoint(parts, name);
  if (host.isMounted(mountPoint)) throw new OffshootError('in-use', `something is mounted at ${mountPoint} that is not known: unmount it first`, { mountPoint });
  return { source, vdisk, description, hypervisor, target };
}

async function assertUsable(hypervisor: Hypervisor, signal: AbortSignal): Promise<void> {
  const answer = await hypervisor.probe({ signal });
  if (!answer.usable) throw new OffshootError('not-supported', `${hypervisor.id} cannot be used: ${answer.reason}`);
}

async function makeClone(parts: VdiskParts, jobId: number, { name }: DeployRequest, { source, vdisk, description, target }: DeployPlan): Promise<DeploymentRow> {
  const { store, cloneTrees } = parts;
  const { meta } = store;
  const { uuid, macs } = newIdentity({
    format: description.machine.format as FormatId, macCount: description.machine.macCount, seed: null, path: target,
    isTaken: (kind, value) => isTaken(parts, kind, value),
  });
  let id = 0;
  let parentId = ROOT_ID;
  await cloneTrees(source, [target], {
    // Root's: who could write to it beside the file system that is mounted from it could write into the kernel.
    copyOnRead: false, record: () => undefined, owner: { uid: 0, gid: 0 }, leaveOut: () => false,
    made: ([nodes = []]) => {
      const [clone] = nodes;
      if (clone === undefined) throw new Error('a clone has a node');
      meta.nodes.update(clone.id, { mode: 0o600 });
      parentId = clone.parentId ?? ROOT_ID;
      id = meta.deployments.insert({ vdiskId: vdisk.id, nodeId: clone.id, name, uuid, macs, mountPoint: deployedMountPoint(parts, name), jobId });
      const { parameters } = meta.jobs.byId(jobId) ?? { parameters: {} };
      meta.jobs.update(jobId, { parameters: { ...(parameters as object), roots: [clone.id] }, updatedUs: Date.now() * 1000 });
    },
  });
  await parts.forgetAttributes(parentId);
  const row = meta.deployments.byId(id);
  if (row === undefined) throw new OffshootError('conflict', `${name} was removed while it was made: try again`);
  return row;
}

function isTaken({ store: { meta } }: VdiskParts, kind: 'uuid' | 'mac', value: string): boolean {
  if (kind === 'uuid') return meta.machines.byUuid(value) !== undefined || meta.deployments.all().some(({ uuid }) => uuid === value);
  return meta.machines.byMac(value) !== undefined || meta.deployments.all().some(({ macs }) => macs.includes(value));
}

/** What its hypervisor is told of it: the configuration as it was staged, with an identity and places of its own. The same whenever it is asked for. */
export function toRegister({ adapters }: VdiskParts, { name, uuid, macs, mountPoint }: DeploymentRow, { machine }: VdiskDescription): MachineToRegister {
  const format = adapters.format(machine.format);
  const document = format.parse(machine.text);
  const places = { mountDir: '/', roots: machine.directories.map((each) => each.slice(1)) };
  document.customise({
    name, uuid, macs,
    fileOf: ({ file }) => {
      const inside = path.posix.isAbsolute(file) ? pathInTree(places, '', file) : null;
      if (inside === null) return null;
      return format.ownFiles === 'relative' ? inside : path.posix.join(mountPoint, inside);
    },
  });
  return { name, uuid, directory: mountPoint, configuration: machine.configuration, text: document.toText(), owner: machine.owner };
}

async function register(parts: VdiskParts, jobId: number, row: DeploymentRow, told: MachineToRegister, hypervisor: Hypervisor, signal: AbortSignal): Promise<string> {
  const { meta } = parts.store;
  meta.transaction(() => {
    meta.deployments.asked(row.id, hypervisor.id);
    parts.operations().say(jobId, stepText(5, STEPS, `registering with ${hypervisor.id}`));
  });
  try {
    const { externalId } = await hypervisor.register(told, { signal });
    meta.deployments.registered(row.id, hypervisor.id, externalId);
    return externalId;
  } catch (thrown) {
    // Somebody else's machine may have the name: it must not be asked about again, and never be unregistered.
    if (isOperatingError(thrown) && isRefusal(thrown)) meta.deployments.unregistered(row.id);
    throw thrown;
  }
}

/** Asked, and not answered as far as anybody knows: asking again gives the id. Null: it is refused, so it was then, too. */
async function idOfAsked(parts: VdiskParts, hypervisor: Hypervisor, row: DeploymentRow, signal: AbortSignal): Promise<string | null> {
  const told = toRegister(parts, row, descriptionOf(parts, row));
  if (hypervisor.find !== undefined) return await hypervisor.find(told, { signal });
  try {
    return (await hypervisor.register(told, { signal })).externalId;
  } catch (thrown) {
    if (isRefusal(toOffshootError(thrown))) return null;
    throw thrown;
  }
}
