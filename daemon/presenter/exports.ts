/**
 * What is shown to others: presented, withdrawn, kept alive, ended and begun again. Main thread of the server.
 *
 *   present    1. all is checked, and nothing changed   2. the row, in one transaction   3. the presenter is told its whole list
 *   withdraw   1. refused while somebody uses it, unless forced   2. the row goes   3. the presenter is told what is left
 *
 * When step 3 is refused the row is as it was. A server that dies between 2 and 3 is followed by one that tells every presenter its list: what has a row
 * is shown, what has none is not. Each presenter is told one thing after the other. What its servers have lost (a program has died, a device was
 * detached) is found by a look every few seconds and shown again, at once first and ever later after that. Servers outlive this one; they end with `suspend`,
 * before the unmount.
 */
import { randomUUID } from 'node:crypto';
import path from 'node:path';

import { OffshootError, isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import type { ExportRow } from '../../blockstore/meta/export-table.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { assertNoBoundVdisk } from '../filesystem/bound-vdisks.js';
import type { References } from '../filesystem/references.js';
import { checkedClients } from './clients.js';
import type { PresenterLogger } from './place.js';
import { EXPORT_KINDS, type Export, type ExportKind, type Presenter } from './presenter.js';
import { Turns } from './turns.js';

export interface ExportsParts {
  readonly meta: MetaStore;
  readonly references: References;
  readonly presenters: readonly Presenter[];
  readonly mountDir: string;
  readonly logger: PresenterLogger;
  /** An error that is nobody's to handle. */
  readonly onFatal: (error: unknown) => void;
  readonly lookMs?: number;
}

export interface ExportRequest {
  readonly path: string;
  readonly kind: ExportKind;
  readonly clients: readonly string[];
  readonly readOnly: boolean;
  readonly options: Readonly<Record<string, string>>;
}

export interface ExportStatus {
  readonly row: ExportRow;
  readonly path: string;
  readonly nodeKind: 'directory' | 'disk';
  readonly addresses: readonly string[];
  /** Null: cannot be known, or was not asked. */
  readonly connected: readonly string[] | null;
  /** Null: it is shown. */
  readonly failure: string | null;
  /** How often what shows it was found lost, by this server. */
  readonly losses: number;
}

interface Stand {
  readonly presenter: Presenter;
  readonly turns: Turns;
  readonly addresses: Map<number, readonly string[]>;
  failure: string | null;
  losses: number;
  lastLossMs: number;
  delayMs: number;
  nextTryMs: number;
}

const LOOK_MS = 3_000;
const DELAY_MS_MIN = 1_000;
const DELAY_MS_MAX = 300_000;
/** One that held this long has recovered. */
const CALM_MS = 60_000;

export class Exports {
  readonly #parts: ExportsParts;
  readonly #stands = new Map<ExportKind, Stand>();
  readonly #ending = new AbortController();
  #timer: NodeJS.Timeout | undefined;
  #looking: Promise<void> | null = null;
  #suspended = false;

  constructor(parts: ExportsParts) {
    this.#parts = parts;
    for (const presenter of parts.presenters) {
      this.#stands.set(presenter.id, { presenter, turns: new Turns(), addresses: new Map(), failure: null, losses: 0, lastLossMs: -Infinity, delayMs: 0, nextTryMs: 0 });
    }
  }

  /** Shows what is in the table, and nothing else. What cannot be shown now is said, and tried again. */
  async start(): Promise<void> {
    await Promise.all([...this.#stands.values()].map(async (stand) => { await this.#reconcile(stand); }));
    if (!this.#ending.signal.aborted) this.#timer = setInterval(() => { this.#look(); }, this.#parts.lookMs ?? LOOK_MS).unref();
  }

  async present(request: ExportRequest): Promise<ExportStatus> {
    const stand = this.#stand(request.kind);
    return await stand.turns.take(async () => {
      this.#assertGoingOn();
      const { presenter } = stand;
      const { meta } = this.#parts;
      const clients = checkedClients(request.clients, request.kind, presenter.abilities.clients);
      const found = this.#exportable(request, presenter);
      const uuid = randomUUID();
      const wanted = { ...this.#describe(found, { ...request, clients }), id: 0, uuid };
      presenter.check(wanted);
      const probe = await presenter.probe({ signal: this.#ending.signal });
      if (!probe.usable) throw new OffshootError('not-supported', `${request.kind} cannot be used: ${probe.reason}`, { kind: request.kind });
      const shown = this.#list(presenter.id);
      const options = await presenter.settle?.(wanted, shown, { signal: this.#ending.signal }) ?? wanted.options;
      const row = meta.transaction(() => {
        // What was found may have been removed, renamed or attached meanwhile.
        if (this.#exportable(request, presenter).id !== found.id) throw new OffshootError('conflict', `${request.path} is something else by now: try again`, { path: request.path });
        return meta.exports.insert({ uuid, nodeId: found.id, kind: request.kind, clients: wanted.clients, readOnly: request.readOnly, options });
      });
      try {
        await this.#apply(stand);
      } catch (thrown) {
        meta.exports.remove(row.id);
        throw thrown;
      }
      this.#parts.logger.info({ export: row.id, path: wanted.path, kind: row.kind, clients: row.clients, readOnly: row.readOnly }, 'presented');
      return this.#status(stand, row, null);
    });
  }

  /** By path and kind, or by id. The path alone is enough where it is presented in one way only. */
  async withdraw(reference: { readonly path: string; readonly kind: ExportKind | null } | { readonly id: number }, { force }: { readonly force: boolean }): Promise<ExportStatus> {
    const { kind, id } = this.#find(reference);
    const stand = this.#stand(kind);
    return await stand.turns.take(async () => {
      this.#assertGoingOn();
      const { meta } = this.#parts;
      const row = meta.exports.byId(id);
      if (row === undefined) throw new OffshootError('not-found', 'it was withdrawn meanwhile');
      const shown = this.#toExport(row);
      const connected = await stand.presenter.clientsOf(shown, { signal: this.#ending.signal });
      if (connected.length > 0 && !force) throw inUse(shown.path, kind, connected, 'withdraw it with --force, which cuts them off');
      const before = this.#status(stand, row, connected);
      meta.exports.remove(id);
      try {
        await this.#apply(stand);
      } catch (thrown) {
        meta.exports.restore(row);
        throw thrown;
      }
      stand.addresses.delete(id);
      this.#parts.logger.info({ export: id, path: shown.path, kind, force, connected: connected.length }, 'withdrawn');
      return before;
    });
  }

  async list(): Promise<readonly ExportStatus[]> {
    return await Promise.all(this.#parts.meta.exports.all().map(async (row) => {
      const stand = this.#stands.get(row.kind);
      if (stand === undefined) return this.#status(undefined, row, null);
      if (!stand.presenter.abilities.knowsClients) return this.#status(stand, row, null);
      try {
        return this.#status(stand, row, await stand.presenter.clientsOf(this.#toExport(row), { signal: this.#ending.signal }));
      } catch (thrown) {
        if (!isOperatingError(thrown)) throw thrown;
        return this.#status(stand, row, null);
      }
    }));
  }

  /** Ends every server, before the unmount. `in-use` while somebody uses an export, unless forced; then nothing has changed. */
  async suspend({ force }: { readonly force: boolean }): Promise<void> {
    if (!force) {
      for (const { row, path: at, connected } of await this.list()) if (connected !== null && connected.length > 0) throw inUse(at, row.kind, connected, 'disconnect them, or add --force, which cuts them off');
    }
    this.#suspended = true;
    await this.#endAll();
  }

  /** After an unmount that was refused. */
  async resume(): Promise<void> {
    this.#suspended = false;
    await Promise.all([...this.#stands.values()].map(async (stand) => { await this.#reconcile(stand); }));
  }

  /** Servers go on, for the next server of ours; or end, when the mount is gone. */
  async close({ mountIsGone }: { readonly mountIsGone: boolean }): Promise<void> {
    clearInterval(this.#timer);
    this.#ending.abort();
    await this.#looking;
    await Promise.all([...this.#stands.values()].map(async ({ turns }) => { await turns.idle(); }));
    if (mountIsGone && !this.#suspended) await this.#endAll();
  }

  async #endAll(): Promise<void> {
    await Promise.all([...this.#stands.values()].map(async ({ presenter, turns }) => {
      await turns.take(async () => {
        try {
          await presenter.end({ signal: new AbortController().signal });
        } catch (thrown) {
          const error = toOffshootError(thrown);
          if (!isOperatingError(error)) throw thrown;
          this.#parts.logger.warn({ kind: presenter.id, reason: error.message }, 'a server of exports could not be ended');
        }
      });
    }));
  }

  #look(): void {
    if (this.#suspended || this.#looking !== null) return;
    this.#looking = Promise.all([...this.#stands.values()].map(async (stand) => { await this.#lookAt(stand); }))
      .then(() => undefined, (thrown: unknown) => { this.#parts.onFatal(thrown); })
      .finally(() => { this.#looking = null; });
  }

  async #lookAt(stand: Stand): Promise<void> {
    const now = performance.now();
    if (now < stand.nextTryMs) return;
    await stand.turns.take(async () => {
      if (this.#suspended || this.#ending.signal.aborted) return;
      const shown = this.#list(stand.presenter.id);
      if (shown.length === 0) return;
      if (stand.failure === null) {
        const lost = await this.#operating(async () => await stand.presenter.lost?.(shown, { signal: this.#ending.signal }) ?? null);
        if (lost === null) {
          if (now - stand.lastLossMs > CALM_MS) stand.delayMs = 0;
          return;
        }
        stand.losses += 1;
        stand.lastLossMs = now;
        this.#parts.logger.warn({ kind: stand.presenter.id, losses: stand.losses, reason: lost }, 'what shows exports is lost: showing them again');
      }
      // The next loss or failure waits longer than this one.
      stand.nextTryMs = now + stand.delayMs;
      stand.delayMs = Math.min(DELAY_MS_MAX, Math.max(DELAY_MS_MIN, stand.delayMs * 2));
      await this.#applyOrNote(stand);
    });
  }

  async #reconcile(stand: Stand): Promise<void> {
    await stand.turns.take(async () => { if (!this.#suspended && !this.#ending.signal.aborted) await this.#applyOrNote(stand); });
  }

  async #applyOrNote(stand: Stand): Promise<void> {
    const failure = await this.#operating(async () => {
      await this.#apply(stand);
      return null;
    });
    if (this.#ending.signal.aborted) return;
    if (failure !== null && failure !== stand.failure) this.#parts.logger.warn({ kind: stand.presenter.id, reason: failure }, 'exports cannot be shown; it is tried again');
    if (failure === null && stand.failure !== null) this.#parts.logger.info({ kind: stand.presenter.id }, 'exports are shown again');
    stand.failure = failure;
  }

  /** What went wrong, for people, where it is no error of the program's. */
  async #operating(body: () => Promise<string | null>): Promise<string | null> {
    try {
      return await body();
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (!isOperatingError(error)) throw thrown;
      return error.message;
    }
  }

  async #apply(stand: Stand): Promise<void> {
    const shown = await stand.presenter.apply(this.#list(stand.presenter.id), { signal: this.#ending.signal });
    stand.addresses.clear();
    for (const { id, addresses } of shown) stand.addresses.set(id, addresses);
    stand.failure = null;
  }

  #list(kind: ExportKind): Export[] { return this.#parts.meta.exports.ofKind(kind).map((row) => this.#toExport(row)); }

  #toExport(row: ExportRow): Export {
    const node = this.#parts.meta.nodes.byId(row.nodeId);
    if (node === undefined) throw new Error(`export ${row.id} is of a node that is not there`);
    return { ...this.#describe(node, row), id: row.id, uuid: row.uuid };
  }

  #describe(node: NodeRow, { clients, readOnly, options }: Pick<ExportRow, 'clients' | 'readOnly' | 'options'>): Omit<Export, 'id' | 'uuid'> {
    const at = this.#parts.meta.nodes.pathOf(node.id);
    return {
      path: at, mountPath: path.posix.join(this.#parts.mountDir, at), kind: node.kind === 'directory' ? 'directory' : 'disk', sizeBytes: node.kind === 'directory' ? null : node.sizeBytes,
      clients, readOnly, options,
    };
  }

  /** Throws what is wrong with what is asked for. */
  #exportable({ path: reference, kind, readOnly }: ExportRequest, { abilities }: Presenter): NodeRow {
    const { meta, references } = this.#parts;
    const { node, path: at } = references.resolve(reference);
    if (node.id === ROOT_ID) throw new OffshootError('not-permitted', 'the whole store is never presented: name a container', { path: at });
    if (node.kind === 'symlink') throw new OffshootError('invalid-argument', `${at} is a symbolic link: name what it leads to`, { path: at });
    const isDirectory = node.kind === 'directory';
    if (isDirectory ? !abilities.directories : !abilities.disks) {
      const others = EXPORT_KINDS.filter((other) => isDirectory === (this.#stands.get(other)?.presenter.abilities.directories ?? false));
      throw new OffshootError('not-supported', `${kind} shows ${isDirectory ? 'disks, and no directories' : 'directories, and no single disks'}: choose ${others.length === 0 ? 'another kind' : others.join(', ')}`, { path: at, kind });
    }
    if (node.frozen && !readOnly) throw new OffshootError('invalid-argument', `${at} is part of a snapshot, which never changes: add --read-only`, { path: at });
    const attached = meta.attachments.byNode(node.id);
    if (attached !== undefined) throw new OffshootError('in-use', `${at} is attached${attached.device === null ? '' : ` as ${attached.device}`}: detach it first`, { path: at });
    assertNoBoundVdisk(meta, node);
    if (!readOnly && meta.vdisks.byNode(node.id) !== undefined) throw new OffshootError('not-permitted', `${at} is a container file, which is never written: add --read-only, or deploy it (offshoot deploy)`, { path: at });
    const machine = meta.machines.byNode(node.id);
    if (machine?.state === 'making') throw new OffshootError('in-use', `${at} is being made by operation ${machine.jobId ?? 0}: wait for it`, { path: at });
    return node;
  }

  #find(reference: { readonly path: string; readonly kind: ExportKind | null } | { readonly id: number }): ExportRow {
    const { meta, references } = this.#parts;
    if ('id' in reference) {
      const row = meta.exports.byId(reference.id);
      if (row === undefined) throw new OffshootError('not-found', `there is no export ${reference.id}: offshoot exports lists them`);
      return row;
    }
    const { node, path: at } = references.resolve(reference.path);
    const rows = meta.exports.ofNode(node.id).filter(({ kind }) => reference.kind === null || kind === reference.kind);
    const [row] = rows;
    if (row === undefined) throw new OffshootError('not-found', `${at} is not presented${reference.kind === null ? '' : ` as ${reference.kind}`}: offshoot exports lists what is`, { path: at });
    if (rows.length > 1) throw new OffshootError('invalid-argument', `${at} is presented as ${rows.map(({ kind }) => kind).join(', ')}: say which with --as`, { path: at });
    return row;
  }

  #stand(kind: ExportKind): Stand {
    const stand = this.#stands.get(kind);
    if (stand === undefined) throw new OffshootError('not-supported', `this daemon cannot present as ${kind}: choose one of ${[...this.#stands.keys()].join(', ')}`, { kind });
    return stand;
  }

  #status(stand: Stand | undefined, row: ExportRow, connected: readonly string[] | null): ExportStatus {
    const node = this.#parts.meta.nodes.byId(row.nodeId);
    return {
      row, path: this.#parts.meta.nodes.pathOf(row.nodeId), nodeKind: node?.kind === 'directory' ? 'directory' : 'disk', addresses: stand?.addresses.get(row.id) ?? [], connected,
      failure: stand === undefined ? `this daemon cannot present as ${row.kind}` : stand.failure, losses: stand?.losses ?? 0,
    };
  }

  #assertGoingOn(): void {
    if (this.#suspended || this.#ending.signal.aborted) throw new OffshootError('busy', 'the daemon is ending: try again when it is back');
  }
}

function inUse(at: string, kind: string, connected: readonly string[], advice: string): OffshootError {
  return new OffshootError('in-use', `${at} is in use as ${kind} by ${connected.join(', ')}: ${advice}`, { path: at, kind });
}
