/**
 * Clones of machines, each with an identity of its own, registered with a hypervisor: one operation, done or undone as a whole. Main thread.
 *
 *   1. checks: source, permission, state, targets, hypervisor                    (dies: nothing was made)
 *   2. one transaction, at one instant: clones of all files but those that a hypervisor makes anew, their machines in the table as
 *      `making`, the roots of what was made in the job's row                     (dies: all of it, or nothing)
 *   3. each configuration customised, all written and synced, put in place in one transaction (see machine-files.ts)
 *   4. registered, some at a time: noted as asked before the calls, as registered after them
 *   5. one transaction: the machines are `ready`, the job is completed
 *
 * What fails undoes everything, and so does the next server when it finds the job running (see machine-operations.ts, machine-undo.ts).
 */
import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import type { MachineRow } from '../../blockstore/meta/machine-table.js';
import type { JobRow, NodeRow } from '../../blockstore/meta/rows.js';
import { byPath } from '../../blockstore/trees.js';
import type { Resolved } from '../filesystem/references.js';
import type { FormatId, MachineDocument } from './format.js';
import { newIdentity } from './identities.js';
import { replaceContents } from './machine-files.js';
import { applySettings, machineName, planClone, sourceState, type CloneMachinesRequest, type ClonePlan, type PlanParts, type PlannedMachine } from './machine-plan.js';
import { MACHINE_CLONE_JOB, type MachineOperations, type OperationParts } from './machine-operations.js';
import { CALLS_AT_ONCE, isRefusal, toRegister } from './machine-undo.js';
import { assertClonable, fileOfClone, nodeBelow, pathInTree, readText } from './machines.js';

/** As `cloneTree` of the server: rows only, all targets in one transaction. */
export type CloneTrees = (source: Resolved, targets: readonly string[], options: {
  readonly copyOnRead: boolean;
  readonly record: () => void;
  readonly leaveOut: (node: NodeRow) => boolean;
  readonly owner: { readonly uid: number; readonly gid: number } | null;
  readonly made: (trees: readonly (readonly NodeRow[])[]) => void;
}) => Promise<readonly (readonly NodeRow[])[]>;

export interface MachineCloneParts extends PlanParts, OperationParts {
  readonly cloneTrees: CloneTrees;
}

/** One machine of one target. */
interface Made {
  readonly machine: PlannedMachine;
  readonly target: string;
  readonly row: MachineRow;
}

const STEPS = 5;
/** Longest list of targets that the job's row repeats. */
const TARGETS_NOTED_MAX = 1000;

export class MachineClones {
  readonly #parts: MachineCloneParts;
  readonly #operations: MachineOperations;
  readonly #isOpen = (nodeId: number): boolean => this.#parts.fileSystem.openCount(nodeId) > 0;

  constructor(parts: MachineCloneParts, operations: MachineOperations) {
    this.#parts = parts;
    this.#operations = operations;
  }

  /** Begins; the answer to everything that can be wrong is in the job. */
  start(request: CloneMachinesRequest): JobRow {
    return this.#operations.begin(MACHINE_CLONE_JOB, stepText(1, 'checks'), {
      target: request.targets[0] ?? null, source: request.source, targets: request.targets.slice(0, TARGETS_NOTED_MAX), roots: [], errorKind: null,
    }, async (jobId, signal) => { await this.#steps(jobId, request, signal); });
  }

  async #steps(jobId: number, request: CloneMachinesRequest, signal: AbortSignal): Promise<void> {
    const parts = this.#parts;
    const { meta } = parts.store;
    const plan = await planClone(parts, request, signal); // Step 1.
    const { consistency, freeze } = await sourceState(parts, this.#isOpen, plan, request.waitMs, signal);
    signal.throwIfAborted();
    this.#operations.say(jobId, stepText(2, 'cloning'));
    const { made: { made, wasOpen }, isFrozen } = await this.#whileFrozen(freeze, signal, async () => await this.#clone(jobId, request, plan)); // Step 2.
    await Promise.all([...new Set(made.map(({ row }) => meta.nodes.byId(row.nodeId)?.parentId ?? 0))].map(parts.forgetAttributes));
    signal.throwIfAborted();
    this.#operations.say(jobId, stepText(3, `customising ${made.length}`));
    await this.#customise(request, plan, made); // Step 3.
    signal.throwIfAborted();
    await this.#register(jobId, made, signal); // Step 4.
    signal.throwIfAborted();
    // One that was off when it was looked at may have been started since.
    const said = (consistency === 'application' && !isFrozen) || (consistency === 'off' && wasOpen) ? 'crash' : consistency;
    meta.transaction(() => { // Step 5.
      meta.machines.ready(jobId);
      const { parameters } = meta.jobs.byId(jobId) ?? { parameters: {} };
      meta.jobs.update(jobId, {
        state: 'completed', updatedUs: Date.now() * 1000, parameters: { ...(parameters as object), consistency: said },
        message: `${made.length} ${made.length === 1 ? 'machine' : 'machines'} of ${request.source}${registeredWith(made)}${CONSISTENCY_TEXT[said]}`,
      });
    });
  }

  /** A machine that cannot be made quiet after all is cloned as it is; one that was is always let go on. */
  async #whileFrozen<T>(rows: readonly MachineRow[], signal: AbortSignal, body: () => Promise<T>): Promise<{ readonly made: T; readonly isFrozen: boolean }> {
    const frozen: MachineRow[] = [];
    let isFrozen = rows.length > 0;
    try {
      for (const row of rows) {
        // Before the call: one that is not answered may have been heard.
        frozen.push(row);
        try {
          await this.#parts.adapters.hypervisor(row.hypervisor ?? '').freeze(row.externalId ?? '', { signal });
        } catch (thrown) {
          if (!isOperatingError(thrown)) throw thrown;
          isFrozen = false;
          this.#parts.logger.warn({ machine: row.name, reason: thrown.message }, 'a machine could not be made quiet: its clones are crash-consistent');
        }
      }
      return { made: await body(), isFrozen };
    } finally {
      for (const row of frozen) await this.#thaw(row);
    }
  }

  async #thaw(row: MachineRow): Promise<void> {
    try {
      await this.#parts.adapters.hypervisor(row.hypervisor ?? '').thaw(row.externalId ?? '', { signal: this.#operations.closing });
    } catch (thrown) {
      if (!isOperatingError(thrown)) throw thrown;
      this.#parts.logger.warn({ machine: row.name, reason: thrown.message }, 'a machine may still be frozen: thaw it by hand');
    }
  }

  /** `wasOpen`: a disk of the source, at the instant of the clone. */
  async #clone(jobId: number, request: CloneMachinesRequest, plan: ClonePlan): Promise<{ readonly made: Made[]; readonly wasOpen: boolean }> {
    const { store, cloneTrees } = this.#parts;
    const { meta } = store;
    const made: Made[] = [];
    let wasOpen = false;
    const regenerated = this.#regenerated(plan);
    await cloneTrees(plan.source, request.targets, {
      copyOnRead: false, record: () => undefined, owner: request.owner, leaveOut: regenerated,
      made: (trees) => {
        const roots: number[] = [];
        wasOpen = plan.disks.some(this.#isOpen);
        trees.forEach((nodes, i) => {
          const [root] = nodes;
          const target = request.targets[i] ?? '';
          if (root === undefined) throw new Error('a tree has a root');
          roots.push(root.id);
          const places = byPath(nodes, (node) => node, root);
          for (const machine of plan.machines) made.push({ machine, target, row: this.#insertMachine(jobId, request, machine, target, places.get(machine.path)) });
        });
        const { parameters } = meta.jobs.byId(jobId) ?? { parameters: {} };
        meta.jobs.update(jobId, { parameters: { ...(parameters as object), roots }, updatedUs: Date.now() * 1000 });
      },
    });
    return { made, wasOpen };
  }

  #insertMachine(jobId: number, request: CloneMachinesRequest, { path, format, configuration, macCount }: PlannedMachine, target: string, directory: NodeRow | undefined): MachineRow {
    const { machines } = this.#parts.store.meta;
    if (directory === undefined) throw new OffshootError('conflict', `${request.source} was changed while it was cloned: try again`);
    const { uuid, macs } = newIdentity({
      format: format.id satisfies FormatId, macCount, seed: request.seed, path: path === '' ? target : `${target}/${path}`,
      isTaken: (kind, value) => (kind === 'uuid' ? machines.byUuid(value) : machines.byMac(value)) !== undefined,
    });
    return machines.insert({ nodeId: directory.id, format: format.id, configuration, name: machineName(target, path, path !== ''), uuid, macs, state: 'making', jobId });
  }

  /** Of each machine's own directory: logs, swap and the like, which its hypervisor makes anew. */
  #regenerated(plan: ClonePlan): (node: NodeRow) => boolean {
    const { meta } = this.#parts.store;
    const formats = new Map(plan.machines.map((machine) => {
      let directory: NodeRow | undefined = plan.source.node;
      for (const name of machine.path === '' ? [] : machine.path.split('/')) directory = directory === undefined ? undefined : meta.nodes.child(directory.id, name);
      return [directory?.id ?? 0, machine];
    }));
    return (node) => {
      const machine = formats.get(node.parentId ?? 0);
      return machine !== undefined && node.kind !== 'directory' && node.name !== machine.configuration && machine.format.isRegenerated(node.name);
    };
  }

  /** All clones of one machine have the same text, that of the instant: it is read once. */
  async #customise(request: CloneMachinesRequest, plan: ClonePlan, made: readonly Made[]): Promise<void> {
    const { store, fileSystem, forgetAttributes } = this.#parts;
    const texts = new Map<PlannedMachine, string>();
    const contents: { readonly nodeId: number; readonly content: Uint8Array }[] = [];
    for (const { machine, target, row } of made) {
      const node = store.meta.nodes.child(row.nodeId, machine.configuration);
      if (node === undefined) throw new OffshootError('conflict', `${machine.configuration} of ${request.source} went while it was cloned: try again`);
      const known = texts.get(machine);
      const text = known ?? await readText(store, node);
      texts.set(machine, text);
      const document = machine.format.parse(text);
      // The checks of step 1 saw the text of a moment before.
      if (known === undefined) await this.#assertStillClonable(request, plan, machine, document, row);
      if (document.facts().macs.length !== machine.macCount) throw new OffshootError('conflict', `the configuration of ${request.source} was changed while it was cloned: try again`);
      document.customise({ name: row.name, uuid: row.uuid, macs: row.macs, fileOf: fileOfClone(plan.places, machine.path, target, machine.format) });
      applySettings(document, request.settings);
      contents.push({ nodeId: node.id, content: Buffer.from(document.toText(), 'utf8') });
    }
    await replaceContents(store, contents);
    for (const { nodeId } of contents) fileSystem.contentReplaced(nodeId);
    await Promise.all(contents.map(async ({ nodeId }) => { await forgetAttributes(nodeId); }));
  }

  async #assertStillClonable(request: CloneMachinesRequest, plan: ClonePlan, machine: PlannedMachine, document: MachineDocument, row: MachineRow): Promise<void> {
    const { store } = this.#parts;
    let root = store.meta.nodes.byId(row.nodeId);
    for (let depth = machine.path === '' ? 0 : machine.path.split('/').length; depth > 0; depth -= 1) root = store.meta.nodes.byId(root?.parentId ?? 0);
    await assertClonable(document, machine.format, request.source, {
      pathOf: (file) => pathInTree(plan.places, machine.path, file), nodeAt: (inside) => (root === undefined ? undefined : nodeBelow(store, root, inside)),
      read: async (node) => await readText(store, node),
    });
  }

  async #register(jobId: number, made: readonly Made[], signal: AbortSignal): Promise<void> {
    const parts = this.#parts;
    const { meta } = parts.store;
    const wanted = made.filter(({ machine }) => machine.hypervisor !== null);
    for (let first = 0; first < wanted.length; first += CALLS_AT_ONCE) {
      signal.throwIfAborted();
      const batch = wanted.slice(first, first + CALLS_AT_ONCE);
      meta.transaction(() => {
        for (const { row, machine } of batch) meta.machines.asked(row.id, machine.hypervisor?.id ?? '');
        this.#operations.say(jobId, stepText(4, `registered ${first} of ${wanted.length}`));
      });
      const outcomes = await Promise.allSettled(batch.map(async ({ row, machine }) => await machine.hypervisor?.register(await toRegister(parts, row), { signal })));
      meta.transaction(() => {
        outcomes.forEach((outcome, i) => {
          const { row, machine } = batch[i] ?? {};
          if (row === undefined || machine === undefined) return;
          if (outcome.status === 'fulfilled') meta.machines.registered(row.id, machine.hypervisor?.id ?? '', outcome.value?.externalId ?? '');
          // Somebody else's machine may have the name: it must not be asked about again, and never be unregistered.
          else if (isOperatingError(outcome.reason) && isRefusal(outcome.reason)) meta.machines.unregistered(row.id);
        });
      });
      const failed = outcomes.find((outcome) => outcome.status === 'rejected');
      if (failed !== undefined) throw failed.reason;
    }
  }
}

const CONSISTENCY_TEXT = {
  off: '', snapshot: '', application: '; its file systems were quiet', crash: '; crash-consistent, as after a power cut, for the source was in use',
} as const;

function stepText(step: number, what: string): string {
  return `step ${step} of ${STEPS}: ${what}`;
}

function registeredWith(made: readonly Made[]): string {
  const ids = [...new Set(made.flatMap(({ machine }) => machine.hypervisor?.id ?? []))];
  return ids.length === 0 ? '' : `, registered with ${ids.join(' and ')}`;
}
