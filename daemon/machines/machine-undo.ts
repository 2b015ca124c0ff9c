/**
 * Takes away all that an operation on machines made: what the hypervisor was told, then names, rows and data. Main thread.
 *
 * Also what a server left that died in the middle: everything that must be known is in the table, and a call that may have
 * been made is made again, as the same machine gives the same id. Can be done again from its beginning at any time.
 */
import path from 'node:path';

import { OffshootError, toOffshootError, type ErrorKind } from '../../blockstore/errors.js';
import type { MachineRow } from '../../blockstore/meta/machine-table.js';
import { ROOT_ID, type JobRow, type NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { Hypervisor, MachineToRegister } from '../hypervisor/hypervisor.js';
import type { OperationEnd } from '../jobs/operations.js';
import { inSteps } from '../jobs/steps.js';
import { readText, type MachineReadParts } from './machines.js';

/** Calls to a hypervisor at a time: programs, mostly, that are to share the machine with guests. */
export const CALLS_AT_ONCE = 8;

/**
 * A hypervisor, or its adapter, that refuses a machine for what it is: it does not have it, and would refuse it again. Anything else (no
 * answer, no access) says nothing about that.
 */
const REFUSALS: ReadonlySet<ErrorKind> = new Set(['already-exists', 'invalid-argument', 'not-permitted', 'not-supported']);

export function isRefusal({ kind }: OffshootError): boolean {
  return REFUSALS.has(kind);
}

/** Kinds of errors after which a call may have been heard, or may be carried out later. */
const IN_DOUBT: ReadonlySet<ErrorKind> = new Set(['timed-out', 'cancelled', 'source-unreachable', 'busy', 'internal']);

export interface TakeAwayParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly forgetAttributes: (nodeId: number) => Promise<void>;
}

export type UndoParts = MachineReadParts & TakeAwayParts;

/** The roots of what an operation made are in its row from the transaction on that makes them. */
export function rootsOf(job: JobRow): readonly number[] {
  const roots = (job.parameters as { readonly roots?: unknown } | null)?.roots;
  return Array.isArray(roots) ? roots.filter((id): id is number => typeof id === 'number') : [];
}

/** Ends the job as `state`. What a hypervisor refuses to forget is thrown, and nothing of it taken away: to be tried again. */
export async function undoMachines(parts: UndoParts, jobId: number, end: OperationEnd, signal: AbortSignal): Promise<void> {
  const { meta } = parts.store;
  const rows = meta.machines.ofJob(jobId);
  for (let first = 0; first < rows.length; first += CALLS_AT_ONCE) {
    const outcomes = await Promise.allSettled(rows.slice(first, first + CALLS_AT_ONCE).map(async (row) => { await forgetMachine(parts, row, signal); }));
    const failed = outcomes.find((outcome) => outcome.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
  }
  // The rows of the machines go with their directories, but for those that have none any more.
  await takeAway(parts, jobId, end, () => { for (const row of meta.machines.ofJob(jobId)) meta.machines.remove(row.id); });
}

/** What stands in the job's row as made by it loses its names, `also` runs and the job ends, all in one transaction; then the data goes. */
export async function takeAway(parts: TakeAwayParts, jobId: number, end: OperationEnd, also: () => void): Promise<void> {
  const { store, fileSystem } = parts;
  const { meta } = store;
  const job = meta.jobs.byId(jobId);
  if (job === undefined) throw new OffshootError('not-found', `there is no job ${jobId}`, { jobId });
  const roots = rootsOf(job).flatMap((id) => meta.nodes.byId(id) ?? []);
  const data: NodeRow[] = [];
  meta.transaction(() => {
    for (const root of roots) {
      const nodes = deepestFirst(store, root);
      data.push(...nodes.filter((node) => node.layerId !== null));
      // Rows about them go with them.
      fileSystem.namespace.removeAll(root, nodes);
    }
    also();
    const { target, source, targets } = job.parameters as Readonly<Record<string, unknown>>;
    meta.jobs.update(jobId, { state: end.state, message: end.message, parameters: { target, source, targets, errorKind: end.errorKind }, updatedUs: Date.now() * 1000 });
  });
  // Nothing can be refused from here on. What is left when the server dies has no name, and the next one takes it away.
  await inSteps(data, (batch) => { fileSystem.discardAll(batch.map((node) => node.id)); });
  await Promise.all([...new Set(roots.flatMap((root) => [root.id, root.parentId ?? ROOT_ID]))].map(parts.forgetAttributes));
}

/** The hypervisor does not know it afterwards, and the table says so. */
export async function forgetMachine(parts: UndoParts, row: MachineRow, signal: AbortSignal): Promise<void> {
  if (row.registration === 'none') return;
  const hypervisor = parts.adapters.hypervisor(row.hypervisor ?? '');
  const externalId = row.externalId ?? await idOfAsked(parts, hypervisor, row, signal);
  if (externalId !== null) await hypervisor.unregister(externalId, { signal });
  parts.store.meta.machines.unregistered(row.id);
}

/** Asked, and not answered as far as anybody knows: asking again gives the id. Null: it is refused, so it was then, too. */
async function idOfAsked(parts: UndoParts, hypervisor: Hypervisor, row: MachineRow, signal: AbortSignal): Promise<string | null> {
  const machine = await toRegister(parts, row);
  try {
    return (await hypervisor.register(machine, { signal })).externalId;
  } catch (thrown) {
    const error = toOffshootError(thrown);
    if (error.kind === 'already-exists' || error.kind === 'invalid-argument') return null;
    // Refused, and would be for ever (a privilege, a licence): what is there counts. What may still be going on there is asked again.
    if (hypervisor.find !== undefined && !IN_DOUBT.has(error.kind)) return await hypervisor.find(machine, { signal });
    if (isRefusal(error)) return null;
    throw thrown;
  }
}

/** What a hypervisor is told of a machine. */
export async function toRegister({ store, mountDir }: MachineReadParts, row: MachineRow): Promise<MachineToRegister> {
  const { meta } = store;
  const directory = meta.nodes.byId(row.nodeId);
  const configuration = directory === undefined ? undefined : meta.nodes.child(directory.id, row.configuration);
  if (directory === undefined || configuration === undefined) {
    throw new OffshootError('not-found', `the configuration ${row.configuration} of ${row.name} is not there any more: put it back, or remove the machine (offshoot vm rm)`, { name: row.name });
  }
  const disk = meta.nodes.children(directory.id, 0, Number.MAX_SAFE_INTEGER).find((node) => node.kind === 'disk') ?? configuration;
  return {
    name: row.name, uuid: row.uuid, directory: path.posix.join(mountDir, meta.nodes.pathOf(directory.id)), configuration: row.configuration,
    text: await readText(store, configuration), owner: { uid: disk.uid, gid: disk.gid },
  };
}

function deepestFirst(store: Store, root: NodeRow): NodeRow[] {
  if (root.kind !== 'directory') return [root];
  return [...store.meta.nodes.children(root.id, 0, Number.MAX_SAFE_INTEGER).flatMap((child) => deepestFirst(store, child)), root];
}
