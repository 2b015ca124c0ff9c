/**
 * Receives: streams that another store sent become disks and containers of this one.
 *
 * Main thread. What comes lies in a spool that nothing leads to (`receive-spool.ts`) and becomes visible at its end, in one transaction
 * (`receive-finish.ts`). Each is a job: `running` while somebody sends, `paused` when the sender went away or a server ended, and kept until
 * somebody goes on with it or drops it. The stream comes from outside: its header was judged in `receive-header.ts`, each record in the spool.
 *
 * The limit of the container that it goes into holds from the first record on: what came into all spools for that container counts with what is
 * charged to it. What is refused is not kept; what came before is, and is gone on with when there is room.
 */
import { readdirSync, rmSync } from 'node:fs';
import path from 'node:path';

import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import { encodeToken, type StreamHeader } from '../../blockstore/stream-format.js';
import type { ReceiveInfo, ReceiveResult } from '../control/transfer-schemas.js';
import { assertStandsOnBase } from './receive-base.js';
import { destinationOf, makeVisible, undoHalfFinished, type ReceiveParts } from './receive-finish.js';
import { Spool } from './receive-spool.js';
import { ROOT_NODE_ID } from '../filesystem/types.js';

export interface ReceivesOptions extends ReceiveParts {
  readonly storeDir: string;
  readonly logger: { info(context: object, message: string): void; warn(context: object, message: string): void };
  /** The kernel may remember what is not true any more of these nodes. */
  readonly forgetAttributes: (nodeIds: readonly number[]) => Promise<void>;
  /** `parseHeader` of `receive-header.ts`, which is loaded when the first stream comes. */
  readonly parseHeader: (json: string) => Promise<StreamHeader>;
}

interface Parameters {
  readonly target: string;
  readonly uuid: string;
  readonly baseUuid: string | null;
  readonly reference: string;
}

const JOB_KIND = 'receive';
/** Streams that are kept at a time, under way or interrupted: each takes room that nobody sees. */
const RECEIVES_MAX = 16;

export class Receives {
  private readonly options: ReceivesOptions;
  private readonly spools = new Map<number, Promise<Spool>>();

  constructor(options: ReceivesOptions) {
    this.options = options;
  }

  /** Before anything else is done with the store: what the server before left is put in order. Its spools are kept for whoever goes on. */
  recover(): void {
    const { meta } = this.options.store;
    for (const name of this.directories()) {
      const job = meta.jobs.byId(Number(name));
      const isOpen = job?.kind === JOB_KIND && (job.state === 'running' || job.state === 'paused');
      // One that ended: its files are those of layers. Jobs that ended are forgotten at last.
      try {
        undoHalfFinished(this.options.store.files, path.join(this.directory(), name), !isOpen);
      } catch (thrown) {
        // Tried again before it becomes visible; until then it stays as it is.
        this.options.logger.warn({ err: thrown, receiveId: Number(name) }, 'a receive that a server left half finished could not be put in order');
      }
      if (!isOpen) rmSync(path.join(this.directory(), name), { recursive: true, force: true });
    }
    for (const job of this.jobs()) {
      // It died before there was anything that could be gone on with; nobody was answered.
      if (!Spool.isThere(this.spoolDirectory(job.id))) this.giveUp(job.id, 'the server ended before anything of it was kept');
      else if (job.state === 'running') meta.jobs.update(job.id, { state: 'paused', message: 'the server was restarted', updatedUs: Date.now() * 1000 });
    }
  }

  /** Begins one; or, when the stream goes on from where one was interrupted, goes on with that. */
  async begin(target: string, json: string): Promise<ReceiveInfo> {
    const header = await this.options.parseHeader(json);
    const kept = this.keptOf(header.uuid);
    if (header.resume !== null) return await this.goOn(kept, target, header, header.resume);
    if (kept !== undefined) {
      throw new OffshootError('busy',
        `${header.reference} was received in part before, into ${parametersOf(kept).target}: go on with that (offshoot receive ${parametersOf(kept).target} --resume-token), or drop it (offshoot receive ${parametersOf(kept).target} --abort)`,
        { receiveId: kept.id });
    }
    if (this.jobs().length >= RECEIVES_MAX) {
      throw new OffshootError('busy', `${RECEIVES_MAX} streams are being received or were interrupted: end one (offshoot receive --list shows them)`);
    }
    const destination = destinationOf(this.options, header, target);
    if (destination.base !== null) assertStandsOnBase(this.options, destination.base);
    if (destination.container !== null) this.options.store.quotas.assertRoom([destination.container.id]);
    const nowUs = Date.now() * 1000;
    const parameters: Parameters = { target, uuid: header.uuid, baseUuid: header.baseUuid, reference: header.reference };
    const job = this.options.store.meta.jobs.insert({
      kind: JOB_KIND, nodeId: null, state: 'running', parameters: { ...parameters, errorKind: null }, progressDone: 0, progressTotal: 0, message: null, createdUs: nowUs, updatedUs: nowUs,
    });
    const making = Spool.create(this.spoolDirectory(job.id), header, json);
    this.spools.set(job.id, making);
    try {
      await making;
    } catch (thrown) {
      this.giveUp(job.id, 'it could not be begun');
      throw thrown;
    }
    this.options.logger.info({ path: target, reference: header.reference, uuid: header.uuid, receiveId: job.id }, 'receive begun');
    return await this.info(job.id);
  }

  /** Takes whole records, the first of which has number `first`. */
  async add(receiveId: number, first: number, bytes: Buffer): Promise<ReceiveInfo> {
    const spool = await this.spoolOf(receiveId);
    if (this.options.store.space().isFull) {
      throw new OffshootError('no-space', 'the store is full: make room and go on with the receive; what came is kept');
    }
    await this.assertRoomFor(parametersOf(this.job(receiveId)).target, bytes.length);
    await spool.add(bytes, first);
    return await this.info(receiveId);
  }

  /** The sender went away: all that came is made durable, and kept. */
  async pause(receiveId: number): Promise<ReceiveInfo> {
    const spool = await this.spoolOf(receiveId);
    try {
      await spool.checkpoint();
    } finally {
      await spool.close();
      const { state } = this.job(receiveId);
      if (state === 'running') this.setState(receiveId, 'paused', 'the stream was interrupted');
    }
    return await this.info(receiveId);
  }

  /** Everything came: it appears under its name. */
  async finish(receiveId: number): Promise<ReceiveResult> {
    const job = this.options.store.meta.jobs.byId(receiveId);
    if (job?.kind === JOB_KIND && job.state === 'completed') return this.resultOf(job);
    const spool = await this.spoolOf(receiveId);
    if (!spool.position().ended) throw new OffshootError('foreign-format', 'the stream has no end: what came of it is kept, and it can be gone on with');
    await spool.checkpoint();
    await spool.close();
    const runs = await spool.runsByNode();
    const { target } = parametersOf(this.job(receiveId));
    const { dataBytes } = spool.position();
    const takesBytes = await spool.allocatedBytes();
    const { container } = destinationOf(this.options, spool.header, target);
    if (container !== null) this.options.store.quotas.assertRoom([container.id], takesBytes);
    const received = makeVisible(this.options, spool, runs, target, () => {
      this.options.store.meta.jobs.update(receiveId, { state: 'completed', progressDone: dataBytes, progressTotal: dataBytes, message: null, updatedUs: Date.now() * 1000 });
    });
    this.spools.delete(receiveId);
    await this.options.forgetAttributes(received.touched);
    // It is there, whatever becomes of what is left of the spool: the next server takes that away.
    await spool.remove().catch((thrown: unknown) => { this.options.logger.warn({ err: thrown, receiveId }, 'what was kept of a receive that has ended could not be removed'); });
    this.options.logger.info({ path: received.path, snapshot: received.snapshot, receiveId, bytes: dataBytes }, 'received');
    return { receiveId, path: received.path, snapshot: received.snapshot, uuid: spool.header.uuid, dataBytes };
  }

  async abort(receiveId: number): Promise<void> {
    const spool = await this.spoolOf(receiveId);
    this.setState(receiveId, 'cancelled', 'dropped');
    this.spools.delete(receiveId);
    await spool.remove();
  }

  async list(): Promise<ReceiveInfo[]> {
    return await Promise.all(this.jobs().filter((job) => this.isKept(job)).map(async (job) => await this.info(job.id)));
  }

  async info(receiveId: number): Promise<ReceiveInfo> {
    const job = this.job(receiveId);
    const spool = await this.spoolOf(receiveId);
    const at = spool.position();
    const durable = spool.durablePosition();
    const { header } = spool;
    return {
      receiveId, state: job.state === 'running' ? 'running' : 'paused', target: parametersOf(job).target, reference: header.reference, uuid: header.uuid, records: at.records,
      durableRecords: durable.records, dataBytes: at.dataBytes, ended: at.ended,
      token: encodeToken({
        receiveId, reference: header.reference, baseReference: header.baseReference, uuid: header.uuid, baseUuid: header.baseUuid, records: durable.records, check: durable.check,
        node: durable.node, offsetBytes: durable.offsetBytes,
      }),
    };
  }

  /** At the end of the server. */
  async close(): Promise<void> {
    for (const spool of this.spools.values()) {
      await spool.then(async (each) => {
        await each.checkpoint();
        await each.close();
      }).catch((thrown: unknown) => { this.options.logger.warn({ err: thrown }, 'what was received last could not be kept; it must be sent again'); });
    }
  }

  private async goOn(kept: JobRow | undefined, target: string, header: StreamHeader, resume: { readonly records: number; readonly check: string }): Promise<ReceiveInfo> {
    if (kept === undefined) throw new OffshootError('not-found', `the stream goes on from the middle of ${header.reference}, and nothing of it is kept here: send all of it`);
    if (parametersOf(kept).target !== target) throw new OffshootError('invalid-argument', `${header.reference} was begun to be received into ${parametersOf(kept).target}: go on there`);
    const spool = await this.spoolOf(kept.id);
    if (!isSameStream(spool.header, header)) throw new OffshootError('foreign-format', `${header.reference} is not what it was when it was begun to be sent: drop what is here (offshoot receive ${target} --abort) and send all of it`);
    const at = spool.position();
    if (at.records !== resume.records || at.check !== resume.check) {
      throw new OffshootError('busy', `the stream goes on behind record ${resume.records}, and ${at.records} are here: ask for a new token (offshoot receive ${target} --resume-token)`, { records: at.records });
    }
    this.setState(kept.id, 'running', null);
    return await this.info(kept.id);
  }

  /** Throws `quota` when so many bytes more would not fit into the container, with all that is being received into it. */
  private async assertRoomFor(target: string, bytes: number): Promise<void> {
    const { store } = this.options;
    const name = containerOf(target);
    const container = store.meta.nodes.child(ROOT_NODE_ID, name);
    if (container === undefined || store.quotas.of(container.id) === null) return;
    let pendingBytes = 0;
    for (const job of this.jobs()) {
      if (containerOf(parametersOf(job).target) !== name) continue;
      // One that nothing was kept of takes nothing.
      const spool = await this.spoolOf(job.id).catch((thrown: unknown) => { if (isOperatingError(thrown)) return null; throw thrown; });
      pendingBytes += spool?.position().dataBytes ?? 0;
    }
    store.quotas.assertRoomSoFar(container.id, pendingBytes + bytes);
  }

  /** Of one that has ended: asked for by somebody who did not get the answer. */
  private resultOf(job: JobRow): ReceiveResult {
    const { target, uuid } = parametersOf(job);
    return { receiveId: job.id, path: target, snapshot: this.options.store.meta.snapshots.byUuid(uuid)?.name ?? '', uuid, dataBytes: job.progressDone };
  }

  private setState(receiveId: number, state: 'running' | 'paused' | 'cancelled', message: string | null): void {
    this.options.store.meta.jobs.update(receiveId, { state, message, updatedUs: Date.now() * 1000 });
  }

  private keptOf(uuid: string): JobRow | undefined {
    const job = this.jobs().find((each) => parametersOf(each).uuid === uuid);
    if (job === undefined || this.isKept(job)) return job;
    this.fail(job.id);
    return undefined;
  }

  /** False of one whose begin failed, and which could not even be noted as failed. */
  private isKept(job: JobRow): boolean {
    return this.spools.has(job.id) || Spool.isThere(this.spoolDirectory(job.id));
  }

  private fail(receiveId: number, message = 'nothing of it was kept'): void {
    this.options.store.meta.jobs.update(receiveId, { state: 'failed', message, updatedUs: Date.now() * 1000 });
  }

  private job(receiveId: number): JobRow {
    const job = this.options.store.meta.jobs.byId(receiveId);
    if (job?.kind !== JOB_KIND || (job.state !== 'running' && job.state !== 'paused')) {
      throw new OffshootError('not-found', `no receive ${receiveId} is under way or was interrupted: offshoot receive --list shows what there is`, { receiveId });
    }
    return job;
  }

  private jobs(): JobRow[] {
    return this.options.store.meta.jobs.list({ states: ['running', 'paused'], kind: JOB_KIND });
  }

  private async spoolOf(receiveId: number): Promise<Spool> {
    this.job(receiveId);
    let loading = this.spools.get(receiveId);
    if (loading === undefined) {
      loading = this.load(receiveId);
      this.spools.set(receiveId, loading);
    }
    return await loading;
  }

  private async load(receiveId: number): Promise<Spool> {
    const spool = await Spool.load(this.spoolDirectory(receiveId), this.options.parseHeader);
    if (spool !== null) return spool;
    this.spools.delete(receiveId);
    this.fail(receiveId);
    throw new OffshootError('not-found', `nothing of receive ${receiveId} was kept: send all of it again`, { receiveId });
  }

  /** One of which there is nothing to keep. */
  private giveUp(receiveId: number, message: string): void {
    this.spools.delete(receiveId);
    rmSync(this.spoolDirectory(receiveId), { recursive: true, force: true });
    this.fail(receiveId, message);
  }

  private directories(): string[] {
    try {
      return readdirSync(this.directory()).filter((name) => /^[0-9]+$/u.test(name));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
      throw error;
    }
  }

  private directory(): string { return path.join(this.options.storeDir, 'receive'); }
  private spoolDirectory(receiveId: number): string { return path.join(this.directory(), String(receiveId)); }
}

function parametersOf(job: JobRow): Parameters {
  return job.parameters as Parameters;
}

function containerOf(target: string): string {
  return target.split('/', 1)[0] ?? '';
}

/** The same nodes of the same snapshot; only where it goes on may differ. */
function isSameStream(one: StreamHeader, other: StreamHeader): boolean {
  const essence = (header: StreamHeader): string => JSON.stringify({ ...header, resume: null, reference: '', baseReference: '' });
  return essence(one) === essence(other);
}
