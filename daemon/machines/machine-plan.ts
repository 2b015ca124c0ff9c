/**
 * Step 1 of a clone of machines: what is to be cloned, whether it may be and can be, with which hypervisor it is registered. Changes nothing.
 *
 * One machine, or a container with all machines in it: both are a tree with machines at paths below its root. What is read here of a
 * machine that is in use may be another text a moment later; what counts is read again from what was cloned.
 */
import { setTimeout as delay } from 'node:timers/promises';

import { OffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import type { MachineRow } from '../../blockstore/meta/machine-table.js';
import { byPath, listTree } from '../../blockstore/trees.js';
import type { Namespace } from '../filesystem/namespace.js';
import { shown } from '../filesystem/names.js';
import type { References, Resolved } from '../filesystem/references.js';
import type { Hypervisor } from '../hypervisor/hypervisor.js';
import type { MachineDocument, MachineFacts, MachineFormat } from './format.js';
import { newIdentity } from './identities.js';
import { assertClonable, fileOfClone, findMachine, pathInTree, placesOf, readText, requireMachine, type FoundMachine, type MachineReadParts, type TreePlaces } from './machines.js';
import { assertMayAdd, assertMayRead, type User } from './permissions.js';

export interface Setting {
  readonly key: string;
  readonly value: string;
}

export interface CloneMachinesRequest {
  /** CONTAINER/NAME, or a container; either of them in a snapshot. */
  readonly source: string;
  readonly targets: readonly string[];
  readonly settings: readonly Setting[];
  readonly seed: string | null;
  readonly register: boolean;
  readonly hypervisor: string | null;
  /** Who must be allowed to. */
  readonly user: User;
  /** Whom the clones belong to; null: whom their source belongs to. */
  readonly owner: { readonly uid: number; readonly gid: number } | null;
  /** How long to wait for a better state than running; null: not at all. */
  readonly waitMs: number | null;
}

export interface PlannedMachine {
  /** Its directory below the root of the tree; empty: the root itself. */
  readonly path: string;
  readonly format: MachineFormat;
  readonly configuration: string;
  readonly macCount: number;
  readonly hypervisor: Hypervisor | null;
}

/** `crash`: as after a power cut. */
export type SourceConsistency = 'off' | 'application' | 'crash' | 'snapshot';

export interface ClonePlan {
  readonly source: Resolved;
  readonly places: TreePlaces;
  readonly machines: readonly PlannedMachine[];
  /** Machines of the source that a hypervisor knows. */
  readonly known: readonly MachineRow[];
  /** Disks of the source, unless it is a snapshot: one that is open is in use, by whomever. */
  readonly disks: readonly number[];
}

export interface PlanParts extends MachineReadParts {
  readonly namespace: Namespace;
  readonly references: References;
}

const STATE_LOOK_MS = 250;

export async function planClone(parts: PlanParts, request: CloneMachinesRequest, signal: AbortSignal): Promise<ClonePlan> {
  const { store, references } = parts;
  const source = references.resolve(request.source);
  const isContainer = source.node.parentId === ROOT_ID || (source.snapshot !== null && source.snapshot.directoryId === source.node.id && source.snapshot.path === null);
  const tree = listTree(store.meta, source.node);
  assertMayRead(store.meta, request.user, tree);
  assertTargets(parts, request, isContainer);
  const found = isContainer ? await machinesIn(parts, source.node, tree) : [{ path: '', machine: await requireMachine(parts, source) }];
  if (found.length === 0) throw new OffshootError('not-found', `${shown(source.path)} holds no machine: a machine is a directory with a configuration that Offshoot knows`, { path: source.path });
  const places = placesOf(parts.mountDir, source);
  const names = byPath(tree, (node) => node, source.node);
  const machines: PlannedMachine[] = [];
  for (const { path, machine } of found) machines.push(await planMachine(parts, request, places, names, path, machine));
  for (const hypervisor of new Set(machines.flatMap((machine) => machine.hypervisor ?? []))) {
    const answer = await hypervisor.probe({ signal });
    if (!answer.usable) throw new OffshootError('not-supported', `${hypervisor.id} cannot be used: ${answer.reason}`);
  }
  const known = source.snapshot !== null ? [] : found.flatMap(({ machine }) => store.meta.machines.byNode(machine.directory.id) ?? []).filter((row) => row.registration === 'registered');
  const disks = source.snapshot !== null ? [] : tree.flatMap((node) => (node.kind === 'disk' ? [node.id] : []));
  return { source, places, machines, known, disks };
}

function assertTargets({ store, namespace }: PlanParts, { targets, user }: CloneMachinesRequest, isContainer: boolean): void {
  for (const target of targets) {
    if (isContainer && target.includes('/')) throw new OffshootError('invalid-argument', `a whole container is cloned, so ${shown(target)} must be the name of one`, { path: target });
    if (!isContainer && !target.includes('/')) throw new OffshootError('invalid-argument', `a machine lies in a container: write CONTAINER/NAME instead of ${shown(target)}`, { path: target });
    const { parent } = namespace.resolveNew(target);
    // Containers are the administrators' to make, whoever reads them.
    if (!isContainer) assertMayAdd(store.meta, user, parent.id);
  }
  const names = isContainer ? [] : targets.map((target) => machineName(target, '', false));
  const twice = names.find((name, i) => names.indexOf(name) !== i);
  if (twice !== undefined) throw new OffshootError('already-exists', `two of the targets would be called ${shown(twice)}: a machine's name is that of its directory, and unique in the store`, { name: twice });
  for (const name of names) {
    const owner = store.meta.machines.byName(name);
    if (owner !== undefined) throw new OffshootError('already-exists', `a machine is called ${shown(name)} already (${store.meta.nodes.pathOf(owner.nodeId)}): a machine's name is that of its directory, choose another`, { name });
  }
}

/** What a clone is called: as its directory; in a cloned container with the container's name before it, as the same names may be in many. */
export function machineName(target: string, path: string, isContainer: boolean): string {
  if (isContainer) return [target, ...path.split('/')].join('-');
  return target.slice(target.lastIndexOf('/') + 1);
}

async function machinesIn(parts: PlanParts, root: NodeRow, tree: readonly NodeRow[]): Promise<{ readonly path: string; readonly machine: FoundMachine }[]> {
  const found: { readonly path: string; readonly machine: FoundMachine }[] = [];
  for (const [path, node] of byPath(tree, (each) => each, root)) {
    if (path === '' || node.kind !== 'directory') continue;
    const machine = await findMachine(parts, node);
    if (machine !== null) found.push({ path, machine });
  }
  return found;
}

/** Everything that can be refused is refused here, before anything is made: the configuration is changed once for trial. */
async function planMachine(
  parts: PlanParts, request: CloneMachinesRequest, places: TreePlaces, names: ReadonlyMap<string, NodeRow>, path: string, { directory, configuration, format, text }: FoundMachine,
): Promise<PlannedMachine> {
  const document = format.parse(text);
  const name = parts.store.meta.nodes.pathOf(directory.id);
  await assertClonable(document, format, name, {
    pathOf: (file) => pathInTree(places, path, file), nodeAt: (file) => names.get(file), read: async (node) => await readText(parts.store, node),
  });
  const macCount = document.facts().macs.length;
  // What the format takes for an identity is known where identities are made; nothing is taken by this one.
  const trial = newIdentity({ format: format.id, macCount, seed: 'trial', path, isTaken: () => false });
  document.customise({ name: machineName(request.targets[0] ?? '', path, path !== ''), ...trial, fileOf: fileOfClone(places, path, request.targets[0] ?? '', format) });
  applySettings(document, request.settings);
  const row = parts.store.meta.machines.byNode(directory.id);
  return {
    path, format, configuration: configuration.name, macCount,
    hypervisor: request.register ? parts.adapters.hypervisorFor(format.id, request.hypervisor ?? row?.hypervisor ?? null) : null,
  };
}

/** Everything but who a machine is and where its files lie: those follow from the clone, and must be true. */
export function applySettings(document: MachineDocument, settings: readonly Setting[]): void {
  for (const { key, value } of settings) {
    const before = document.facts();
    document.set(key, value);
    const after = document.facts();
    if (after.name !== before.name || after.uuid !== before.uuid || after.macs.join() !== before.macs.join()) {
      throw new OffshootError('invalid-argument', `${key} is part of who the machine is, which is unique in the store: a clone is called as its directory, and --seed makes the rest reproducible`, { key });
    }
    if (placesIn(after) !== placesIn(before)) {
      throw new OffshootError('invalid-argument', `${key} says where a file of the machine lies: what a machine opens is in its directory, and stays so`, { key });
    }
  }
}

function placesIn({ files }: MachineFacts): string {
  return JSON.stringify(files.map(({ slot, file, role, diskFormat }) => [slot, role === 'cdrom' ? '' : file, role, diskFormat]));
}

/**
 * What the states of the source's machines make of a clone; with `waitMs`, the best that comes in that time. `freeze`: these can be made quiet. A disk
 * that is open is in use, also where no hypervisor is known: somebody started the machine by hand.
 */
export async function sourceState(
  { adapters }: PlanParts, isOpen: (nodeId: number) => boolean, plan: ClonePlan, waitMs: number | null, signal: AbortSignal,
): Promise<{ readonly consistency: SourceConsistency; readonly freeze: readonly MachineRow[] }> {
  if (plan.source.snapshot !== null) return { consistency: 'snapshot', freeze: [] };
  const deadlineMs = performance.now() + (waitMs ?? 0);
  for (;;) {
    const running: MachineRow[] = [];
    let mayFreeze = true;
    for (const row of plan.known) {
      const hypervisor = adapters.hypervisor(row.hypervisor ?? '');
      const state = await hypervisor.status(row.externalId ?? '', { signal });
      if (state !== 'running' && state !== 'paused') continue;
      running.push(row);
      if (waitMs === null) continue;
      mayFreeze &&= state === 'running' && hypervisor.abilities.quiesce && await hypervisor.pingAgent(row.externalId ?? '', { signal });
    }
    const isInUse = running.length === 0 && plan.disks.some(isOpen);
    if (running.length === 0 && !isInUse) return { consistency: 'off', freeze: [] };
    if (waitMs === null) return { consistency: 'crash', freeze: [] };
    if (mayFreeze && !isInUse) return { consistency: 'application', freeze: running };
    if (performance.now() >= deadlineMs) {
      if (isInUse) throw new OffshootError('timed-out', `a disk of ${plan.source.path} is still open, and no hypervisor that is known runs the machine: stop what uses it (offshoot show says how many do), or clone without --wait: as after a power cut`);
      throw new OffshootError('timed-out',
        `${running.map((row) => row.name).join(', ')} ${running.length === 1 ? 'is' : 'are'} still running, and no agent inside answers: shut ${running.length === 1 ? 'it' : 'them'} down (offshoot vm stop), or clone without --wait: as after a power cut`);
    }
    await delay(STATE_LOOK_MS, undefined, { signal });
  }
}
