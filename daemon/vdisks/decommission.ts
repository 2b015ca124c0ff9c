/**
 * The end of a deployed machine: off, forgotten by its hypervisor, unmounted, detached, its clone destroyed. The container file is as before. Main thread.
 *
 *   1. it is asked to shut down, or its power is taken; one that does not goes on as it was      (dies: it is as it was)
 *   2. one transaction: it is `ending`. From here on there is only forward                       (dies: the next server goes on)
 *   3. unregistered
 *   4. unmounted, detached: nobody has it open
 *   5. one transaction: clone and row are gone, the job is completed; then the data goes
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { DeploymentRow } from '../../blockstore/meta/deployment-table.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import type { OperationEnd } from '../jobs/operations.js';
import { takeAway } from '../machines/machine-undo.js';
import { forgetDeployed, hideClone } from './deploy.js';
import { DECOMMISSION_JOB, stepText, type VdiskParts } from './vdisk-parts.js';

export interface DecommissionRequest {
  readonly name: string;
  /** Take its power at once. */
  readonly force: boolean;
  readonly timeoutMs: number;
}

const STEPS = 5;

export function startDecommission(parts: VdiskParts, request: DecommissionRequest): JobRow {
  requireDeployed(parts, request.name);
  return parts.operations().begin(DECOMMISSION_JOB, stepText(1, STEPS, request.force ? 'taking its power' : 'shutting down'), {
    target: request.name, source: request.name, targets: [request.name], roots: [], errorKind: null,
  }, async (jobId, signal) => { await decommission(parts, jobId, request, signal); });
}

async function decommission(parts: VdiskParts, jobId: number, request: DecommissionRequest, signal: AbortSignal): Promise<void> {
  const { meta } = parts.store;
  const row = requireReady(parts, request.name);
  await powerOff(parts, row, request, signal); // Step 1.
  signal.throwIfAborted();
  meta.transaction(() => { // Step 2.
    meta.deployments.ending(requireReady(parts, request.name).id, jobId);
    const { parameters } = meta.jobs.byId(jobId) ?? { parameters: {} };
    meta.jobs.update(jobId, { parameters: { ...(parameters as object), roots: [row.nodeId] }, message: stepText(3, STEPS, 'unregistering'), updatedUs: Date.now() * 1000 });
  });
  // A cancel comes too late from here on.
  await goOn(parts, jobId, parts.operations().closing);
}

/** What was not begun is not done; what was begun is brought to its end. */
export async function endDecommission(parts: VdiskParts, jobId: number, end: OperationEnd, signal: AbortSignal): Promise<void> {
  const { meta } = parts.store;
  if (meta.deployments.ofJob(jobId).some(({ state }) => state === 'ending')) {
    await goOn(parts, jobId, signal);
    return;
  }
  const job = meta.jobs.byId(jobId);
  meta.jobs.update(jobId, { state: end.state, message: end.message, parameters: { ...(job?.parameters as object), errorKind: end.errorKind }, updatedUs: Date.now() * 1000 });
}

async function goOn(parts: VdiskParts, jobId: number, signal: AbortSignal): Promise<void> {
  const { meta } = parts.store;
  const [row] = meta.deployments.ofJob(jobId);
  if (row === undefined) throw new OffshootError('not-found', `the deployed machine of operation ${jobId} is gone`, { jobId });
  await forgetDeployed(parts, row, signal); // Step 3.
  parts.operations().say(jobId, stepText(4, STEPS, 'unmounting'));
  await hideClone(parts, row, signal); // Step 4.
  const message = `${row.name} is decommissioned`;
  await takeAway(parts, jobId, { state: 'completed', message, errorKind: null }, () => { meta.deployments.remove(row.id); }); // Step 5.
}

async function powerOff({ adapters }: VdiskParts, row: DeploymentRow, { force, timeoutMs }: DecommissionRequest, signal: AbortSignal): Promise<void> {
  if (row.registration !== 'registered') return;
  const hypervisor = adapters.hypervisor(row.hypervisor ?? '');
  const externalId = row.externalId ?? '';
  const state = await hypervisor.status(externalId, { signal });
  if (state !== 'running' && state !== 'paused') return;
  if (!force && !hypervisor.abilities.shutdown) throw new OffshootError('not-supported', `${hypervisor.id} cannot tell a machine to shut down: add --force to take its power`);
  await hypervisor.stop(externalId, { force, timeoutMs, signal });
}

export function requireDeployed({ store }: VdiskParts, name: string): DeploymentRow {
  const row = store.meta.deployments.byName(name);
  if (row === undefined) throw new OffshootError('not-found', `no deployed machine is called ${JSON.stringify(name)}: offshoot deployed lists those that there are`, { name });
  return row;
}

function requireReady(parts: VdiskParts, name: string): DeploymentRow {
  const row = requireDeployed(parts, name);
  if (row.state !== 'ready') throw new OffshootError('busy', `${name} is ${row.state === 'making' ? 'being deployed' : 'being decommissioned'} by operation ${row.jobId ?? 0}: wait for it (offshoot jobs ${row.jobId ?? 0})`, { name });
  return row;
}
