/**
 * What the control API does with virtual machines: one user's wish from names to answer. Main thread; the steps of a clone are in
 * `daemon/machines/machine-clone.ts`.
 *
 * A machine that is registered is changed only while it is off, as its hypervisor has a copy of the configuration: it forgets the machine,
 * the file is written, and it is told again.
 */
import { setMaxListeners } from 'node:events';
import path from 'node:path';

import { OffshootError, isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { shellWord } from '../../blockstore/listed-names.js';
import type { MachineRow } from '../../blockstore/meta/machine-table.js';
import { listTree } from '../../blockstore/trees.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { HypervisorName, MachineCaller, MachineCloneBody, MachineImportBody, MachineInfo, MachineService, MachineSetting } from '../control/machine-schemas.js';
import type { JobInfo, RemoveResult } from '../control/schemas.js';
import { assertThawed } from '../filesystem/frozen.js';
import { shown } from '../filesystem/names.js';
import type { MachineState } from '../hypervisor/hypervisor.js';
import type { MachineDocument } from '../machines/format.js';
import { normalMac, normalUuid } from '../machines/identities.js';
import type { MachineClones, MachineCloneParts } from '../machines/machine-clone.js';
import { replaceContents } from '../machines/machine-files.js';
import type { MachineImports } from '../machines/machine-import.js';
import type { MachineOperations } from '../machines/machine-operations.js';
import { forgetMachine, isRefusal, toRegister } from '../machines/machine-undo.js';
import { assertOwnsItsFiles, findMachine, nodeBelow, pathInTree, placesOf, requireMachine, type FoundMachine } from '../machines/machines.js';
import { assertMayRead, type User } from '../machines/permissions.js';
import { userNamed } from '../machines/users.js';
import { removeNode, untilClosed } from './remove-node.js';

export interface MachineServiceParts extends MachineCloneParts {
  readonly operations: MachineOperations;
  readonly clones: MachineClones;
  readonly imports: MachineImports;
  readonly jobInfo: (jobId: number) => JobInfo;
  /** The block device by which a disk may be written to now; null: there is none. */
  readonly writableDevice: (nodeId: number, signal: AbortSignal) => Promise<string | null>;
}

/** Hypervisors are programs or other hosts: so many are asked at a time. */
const ASKED_AT_ONCE = 8;
/** After a machine's end, for the kernel to say that its disks are closed. */
const CLOSED_TIMEOUT_MS = 5_000;

export class StoreMachineService implements MachineService {
  readonly #parts: MachineServiceParts;
  /** What is going on with a machine, by its directory: one thing at a time. */
  readonly #busy = new Set<number>();
  readonly #ending = new AbortController();

  constructor(parts: MachineServiceParts) {
    this.#parts = parts;
    setMaxListeners(0, this.#ending.signal);
  }

  async list({ container, operationId, power }: { readonly container: string | null; readonly operationId: number | null; readonly power: boolean }): Promise<readonly MachineInfo[]> {
    const { meta } = this.#parts.store;
    const prefix = container === null ? '' : `${container}/`;
    if (container !== null) this.#parts.namespace.resolve(container);
    const rows = operationId === null ? meta.machines.all() : meta.machines.ofJob(operationId);
    const wanted = rows.map((row) => ({ row, path: meta.nodes.pathOf(row.nodeId) })).filter((each) => each.path.startsWith(prefix));
    const found: MachineInfo[] = [];
    for (let first = 0; first < wanted.length; first += ASKED_AT_ONCE) {
      const batch = wanted.slice(first, first + ASKED_AT_ONCE);
      found.push(...await Promise.all(batch.map(async (each) => ({ ...this.#info(each.path, each.row, null, null), ...(power ? await this.#powerOrUnknown(each.row) : {}) }))));
    }
    if (container !== null && operationId === null) found.push(...await this.#unlisted(container));
    return found.toSorted((a, b) => (a.path < b.path ? -1 : 1));
  }

  /** Machines directly in the container that nobody cloned, imported or registered yet. */
  async #unlisted(container: string): Promise<MachineInfo[]> {
    const { store, namespace } = this.#parts;
    const found: MachineInfo[] = [];
    for (const node of store.meta.nodes.children(namespace.resolve(container).id, 0, Number.MAX_SAFE_INTEGER)) {
      if (node.kind !== 'directory' || node.frozen || store.meta.machines.byNode(node.id) !== undefined) continue;
      try {
        const machine = await findMachine(this.#parts, node);
        if (machine !== null) found.push(this.#info(`${container}/${node.name}`, null, machine, null));
      } catch (thrown) {
        // One that cannot be read must not hide the others; `show` says what is wrong with it.
        if (toOffshootError(thrown).kind === 'internal') throw thrown;
      }
    }
    return found;
  }

  async show(reference: string): Promise<MachineInfo> {
    const resolved = this.#parts.references.resolve(reference);
    const row = this.#parts.store.meta.machines.byNode(resolved.node.id) ?? null;
    const machine = await requireMachine(this.#parts, resolved);
    const said = await this.#powerOrUnknown(row);
    const info = this.#info(resolved.path, row, machine, said.power);
    const { meta } = this.#parts.store;
    const places = placesOf(this.#parts.mountDir, resolved);
    const files = info.files.map((file) => {
      const inside = pathInTree(places, '', file.file);
      const node = inside === null ? undefined : nodeBelow(this.#parts.store, resolved.node, inside);
      if (node === undefined || node.layerId === null) return file;
      const sizeBytes = this.#parts.store.disks.get(node.id)?.shared.sizeBytes() ?? node.sizeBytes;
      return { ...file, sizeBytes, ownedBytes: Math.min(sizeBytes, this.#parts.store.ownedBlocks(meta.nodes.byId(node.id) ?? node) * BLOCK_BYTES) };
    });
    return { ...info, files, powerError: said.powerError, agent: await this.#agent(row, said.power) };
  }

  async clone(body: MachineCloneBody, peer: MachineCaller | null): Promise<JobInfo> {
    const user = await this.#userOf(body.user ?? null, peer);
    const isOther = body.user !== undefined && body.user !== null;
    const job = this.#parts.clones.start({
      source: body.source, targets: body.targets, settings: body.settings ?? [], seed: body.seed ?? null, register: body.register ?? false, hypervisor: body.hypervisor ?? null,
      user, owner: user.uid === 0 && !isOther ? null : { uid: user.uid, gid: user.gid }, waitMs: body.waitSeconds === undefined || body.waitSeconds === null ? null : body.waitSeconds * 1000,
    });
    return this.#parts.jobInfo(job.id);
  }

  startImport(body: MachineImportBody): JobInfo {
    return this.#parts.jobInfo(this.#parts.imports.start({ directory: body.directory, target: body.target, allow: body.allow ?? [] }).id);
  }

  async get(reference: string, key: string | null, peer: MachineCaller | null): Promise<readonly MachineSetting[]> {
    const machine = await requireMachine(this.#parts, this.#parts.references.resolve(reference));
    // All that it says, passwords of consoles too: for those who could read the file.
    assertMayRead(this.#parts.store.meta, await this.#userOf(null, peer), [machine.configuration]);
    const document = machine.format.parse(machine.text);
    if (key === null) return document.keys().flatMap((each) => { const value = document.get(each); return value === null ? [] : [{ key: each, value }]; });
    const value = document.get(key);
    if (value === null) throw new OffshootError('not-found', `${reference} has no parameter ${shown(key)}: offshoot vm get ${reference} lists those that it has`, { path: reference, key });
    return [{ key, value }];
  }

  async set(reference: string, settings: readonly MachineSetting[]): Promise<MachineInfo> {
    return await this.#alone(reference, async ({ node, path: at, machine, row }) => {
      const { store, fileSystem, forgetAttributes } = this.#parts;
      await this.#assertOff(row, 'changed');
      const document = machine.format.parse(machine.text);
      const before = filesIn(document);
      for (const { key, value } of settings) document.set(key, value);
      // What was wrong before is not this caller's; who says where a disk lies, or what it is, must be right.
      if (filesIn(document) !== before) await assertOwnsItsFiles(this.#parts, document, machine.format, node);
      if (row !== null) await forgetMachine(this.#parts, row, this.#ending.signal);
      try {
        await replaceContents(store, [{ nodeId: machine.configuration.id, content: Buffer.from(document.toText(), 'utf8') }], () => {
          if (row !== null) store.meta.machines.identify(row.id, identityIn(document, at));
        });
        fileSystem.contentReplaced(machine.configuration.id);
      } finally {
        // With what the file holds now, be it the old or the new.
        if (row !== null && row.registration !== 'none' && row.hypervisor !== null) await this.#registerRow(row.id, row.hypervisor);
      }
      await forgetAttributes(machine.configuration.id);
      return await this.show(at);
    });
  }

  async register(reference: string, hypervisor: HypervisorName | null): Promise<MachineInfo> {
    return await this.#alone(reference, async ({ path: at, node, machine, row }) => {
      const { meta } = this.#parts.store;
      const adapter = this.#parts.adapters.hypervisorFor(machine.format.id, hypervisor ?? row?.hypervisor ?? null);
      if (row !== null && row.registration === 'registered' && row.hypervisor !== adapter.id) {
        throw new OffshootError('conflict', `${at} is registered with ${row.hypervisor ?? ''}: unregister it there first (offshoot vm unregister ${at})`, { path: at });
      }
      const document = machine.format.parse(machine.text);
      await assertOwnsItsFiles(this.#parts, document, machine.format, node);
      const probe = await adapter.probe({ signal: this.#ending.signal });
      if (!probe.usable) throw new OffshootError('not-supported', `${adapter.id} cannot be used: ${probe.reason}`);
      const known = row ?? meta.machines.insert({
        nodeId: node.id, format: machine.format.id, configuration: machine.configuration.name, ...identityIn(document, at), state: 'ready', jobId: null,
      });
      await this.#registerRow(known.id, adapter.id);
      return await this.show(at);
    });
  }

  async unregister(reference: string): Promise<MachineInfo> {
    return await this.#alone(reference, async ({ path: at, row }) => {
      if (row === null || row.registration === 'none') throw new OffshootError('not-found', `${at} is registered with no hypervisor`, { path: at });
      await this.#assertOff(row, 'unregistered');
      await forgetMachine(this.#parts, row, this.#ending.signal);
      return await this.show(at);
    });
  }

  async start(reference: string): Promise<MachineInfo> {
    return await this.#alone(reference, async ({ node, path: at, row }) => {
      const { hypervisor, externalId } = registeredRow(row, at);
      await this.#assertNotAttached(node, at);
      await this.#parts.adapters.hypervisor(hypervisor).start(externalId, { signal: this.#ending.signal });
      return await this.show(at);
    });
  }

  async stop(reference: string, options: { readonly force: boolean; readonly timeoutMs: number }): Promise<MachineInfo> {
    return await this.#alone(reference, async ({ path: at, row }) => {
      const { hypervisor, externalId } = registeredRow(row, at);
      const adapter = this.#parts.adapters.hypervisor(hypervisor);
      if (!options.force && !adapter.abilities.shutdown) throw new OffshootError('not-supported', `${hypervisor} cannot tell a machine to shut down: add --force to take its power`);
      await adapter.stop(externalId, { ...options, signal: this.#ending.signal });
      return await this.show(at);
    });
  }

  async remove(reference: string, options: { readonly force: boolean }): Promise<RemoveResult> {
    const { store, fileSystem, forgetAttributes } = this.#parts;
    const { node, path: at } = this.#own(reference);
    const row = store.meta.machines.byNode(node.id) ?? null;
    // One whose configuration cannot be read any more is removed all the same.
    if (row === null) await requireMachine(this.#parts, { node, path: at, snapshot: null });
    return await this.#exclusively(node, at, async () => {
      if (row !== null && row.registration === 'registered') {
        const adapter = this.#parts.adapters.hypervisor(row.hypervisor ?? '');
        const state = await adapter.status(row.externalId ?? '', { signal: this.#ending.signal });
        if (state === 'running' || state === 'paused') {
          if (!options.force) throw new OffshootError('in-use', `${at} is ${state}: stop it first (offshoot vm stop ${at}), or add --force`, { path: at });
          await adapter.stop(row.externalId ?? '', { force: true, timeoutMs: 30_000, signal: this.#ending.signal });
        }
        // Before it is forgotten: what is refused must have changed nothing.
        await untilClosed({ store, fileSystem }, node, CLOSED_TIMEOUT_MS);
      }
      if (row !== null) await forgetMachine(this.#parts, row, this.#ending.signal);
      const result = await removeNode({ store, fileSystem }, node, at, { keepData: true, recursive: true });
      await Promise.all([node.id, node.parentId ?? ROOT_ID].map(forgetAttributes));
      return result;
    });
  }

  async cancel(jobId: number): Promise<void> { await this.#parts.operations.cancel(jobId); }

  /** Resolves when nothing of the operation is left running, also when it has ended. */
  async settled(jobId: number): Promise<void> { await this.#parts.operations.ended(jobId); }

  /** Nothing goes on, and nothing waits for a hypervisor, when this resolves. */
  async close(): Promise<void> {
    this.#ending.abort();
    await this.#parts.operations.close();
  }

  async #userOf(name: string | null, peer: MachineCaller | null): Promise<User> {
    if (peer === null) throw new OffshootError('permission-denied', 'the kernel does not say who asks: use another connection');
    if (name === null) return { uid: peer.uid, gid: peer.gid, groups: peer.groups };
    const user = await userNamed(name);
    if (peer.uid !== 0 && user.uid !== peer.uid) throw new OffshootError('permission-denied', `only root may clone as somebody else: leave --as out, or ask root`);
    return user;
  }

  #own(reference: string): { readonly node: NodeRow; readonly path: string } {
    const { node, path: at } = this.#parts.references.resolve(reference);
    assertThawed(this.#parts.store.meta, node);
    return { node, path: at };
  }

  async #alone<T>(
    reference: string, body: (machine: { readonly node: NodeRow; readonly path: string; readonly machine: FoundMachine; readonly row: MachineRow | null }) => Promise<T>,
  ): Promise<T> {
    const { node, path: at } = this.#own(reference);
    return await this.#exclusively(node, at, async () => {
      const machine = await requireMachine(this.#parts, { node, path: at, snapshot: null });
      return await body({ node, path: at, machine, row: this.#parts.store.meta.machines.byNode(node.id) ?? null });
    });
  }

  async #exclusively<T>(node: NodeRow, at: string, body: () => Promise<T>): Promise<T> {
    const row = this.#parts.store.meta.machines.byNode(node.id);
    if (row?.state === 'making') throw new OffshootError('in-use', `${at} is being made by operation ${row.jobId ?? 0}: wait for it (offshoot jobs ${row.jobId ?? 0})`, { path: at });
    if (this.#busy.has(node.id)) throw new OffshootError('busy', `something else is being done with ${at}: try again when it is done`, { path: at });
    this.#busy.add(node.id);
    try {
      return await body();
    } finally {
      this.#busy.delete(node.id);
    }
  }

  async #registerRow(machineId: number, hypervisor: string): Promise<void> {
    const { meta } = this.#parts.store;
    meta.machines.asked(machineId, hypervisor);
    const row = meta.machines.byId(machineId);
    if (row === undefined) throw new OffshootError('not-found', 'the machine was removed meanwhile');
    try {
      const { externalId } = await this.#parts.adapters.hypervisor(hypervisor).register(await toRegister(this.#parts, row), { signal: this.#ending.signal });
      meta.machines.registered(machineId, hypervisor, externalId);
    } catch (thrown) {
      const error = toOffshootError(thrown);
      // Refused for sure; whatever else went wrong, it may have been heard.
      if (isRefusal(error) || error.kind === 'not-found') meta.machines.unregistered(machineId);
      throw thrown;
    }
  }

  async #assertOff(row: MachineRow | null, what: string): Promise<void> {
    const state = row === null ? null : await this.#power(row);
    if (state === 'running' || state === 'paused') throw new OffshootError('in-use', `${row?.name ?? ''} is ${state}, and cannot be ${what} now: shut it down first (offshoot vm stop)`);
  }

  /** A file system that the machine and this host write to, each with a cache of its own, is destroyed. */
  async #assertNotAttached(node: NodeRow, at: string): Promise<void> {
    const { store: { meta }, writableDevice } = this.#parts;
    for (const { id } of listTree(meta, node)) {
      const device = meta.attachments.byNode(id) === undefined ? null : await writableDevice(id, this.#ending.signal);
      if (device === null) continue;
      const disk = meta.nodes.pathOf(id);
      throw new OffshootError('in-use', `${disk} of ${at} is attached as ${device} and may be written to: detach it first (offshoot detach ${shellWord(disk)}), or attach it with --read-only`, { path: disk });
    }
  }

  async #power(row: MachineRow): Promise<MachineState | null> {
    if (row.registration !== 'registered' || row.hypervisor === null || row.externalId === null) return null;
    return await this.#parts.adapters.hypervisor(row.hypervisor).status(row.externalId, { signal: this.#ending.signal });
  }

  /** For those who look: a hypervisor that does not answer hides nothing else. */
  async #powerOrUnknown(row: MachineRow | null): Promise<Pick<MachineInfo, 'power' | 'powerError'>> {
    try {
      return { power: row === null ? null : await this.#power(row), powerError: null };
    } catch (thrown) {
      if (!isOperatingError(thrown)) throw thrown;
      return { power: 'unknown', powerError: thrown.message };
    }
  }

  async #agent(row: MachineRow | null, power: MachineInfo['power']): Promise<boolean | null> {
    if (row?.hypervisor === undefined || row.hypervisor === null || power !== 'running') return null;
    const adapter = this.#parts.adapters.hypervisor(row.hypervisor);
    if (!adapter.abilities.guestAgent) return null;
    return await adapter.pingAgent(row.externalId ?? '', { signal: this.#ending.signal }).catch((thrown: unknown) => {
      if (!isOperatingError(thrown)) throw thrown;
      return false;
    });
  }

  #info(at: string, row: MachineRow | null, machine: FoundMachine | null, power: MachineInfo['power']): MachineInfo {
    const facts = machine?.format.parse(machine.text).facts() ?? null;
    return {
      path: at, name: row?.name ?? facts?.name ?? null, uuid: row?.uuid ?? facts?.uuid ?? null, macs: [...row?.macs ?? facts?.macs ?? []], state: row?.state ?? 'found',
      format: machine?.format.id ?? row?.format as MachineInfo['format'], configuration: row?.configuration ?? machine?.configuration.name ?? '',
      memoryBytes: facts?.memoryBytes ?? null, processors: facts?.processors ?? null, files: (facts?.files ?? []).map(({ slot, file, role }) => ({ slot, file, role, sizeBytes: null, ownedBytes: null })),
      hypervisor: row?.hypervisor as MachineInfo['hypervisor'] ?? null, registration: row?.registration ?? 'none', externalId: row?.externalId ?? null, power, powerError: null, agent: null,
      operationId: row?.jobId === undefined || row.jobId === null ? null : String(row.jobId), mountPath: path.posix.join(this.#parts.mountDir, at),
      createdAt: row === null ? null : new Date(row.createdUs / 1000).toISOString(),
    };
  }
}

/** What is unique of a machine whose configuration says it. */
function identityIn(document: MachineDocument, at: string): { readonly name: string; readonly uuid: string; readonly macs: readonly string[] } {
  const { name, uuid, macs } = document.facts();
  const known = normalUuid(uuid ?? '');
  if (name === null || known === null) throw new OffshootError('invalid-argument', `the configuration of ${at} says no ${name === null ? 'name' : 'UUID'}: give it one (offshoot vm set ${at})`, { path: at });
  return { name, uuid: known, macs: macs.flatMap((mac) => (mac === null ? [] : (normalMac(mac) ?? []))) };
}

/** What a machine writes to, and as what. */
function filesIn(document: MachineDocument): string {
  return JSON.stringify(document.facts().files.filter(({ role }) => role === 'disk' || role === 'nvram').map(({ slot, file, role, diskFormat }) => [slot, file, role, diskFormat]));
}

function registeredRow(row: MachineRow | null, at: string): { readonly hypervisor: string; readonly externalId: string } {
  if (row?.hypervisor !== undefined && row.hypervisor !== null && row.externalId !== null) return { hypervisor: row.hypervisor, externalId: row.externalId };
  throw new OffshootError('not-found', `${at} is registered with no hypervisor: register it first (offshoot vm register ${at})`, { path: at });
}
