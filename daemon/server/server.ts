/**
 * The server: store, names, jobs, control API and a transport, put together, started in order and ended in order.
 *
 * Main thread. Start, when the server before was killed under this mount:
 *
 *   1. the store recovers: journals are replayed, synced, committed
 *   2. what was open is opened again
 *   3. RESEND, exactly once, before any thread reads: every request that the dead server had read comes again
 *   4. the I/O workers read; guests go on (`serving`)
 *   5. the control sockets listen, fills go on (`ready`)
 *   6. what answers on them is loaded (`serveControl`), then whatever the first calls do not need (`warm-up.ts`), while requests are served
 *
 * End: the holder unmounts, the workers see it, jobs stop, everything is committed, the process ends with 0. Hand-over is the same without
 * the unmount: what was read and not answered by then, and what comes later, is the next server's.
 */
import fs from 'node:fs';

import type { Logger } from 'pino';

import { Errno, OffshootError, errnoOf, toOffshootError } from '../../blockstore/errors.js';
import { exitNow } from '../../blockstore/hot/door.js';
import { Store } from '../../blockstore/store.js';
import { SCRUB_RATE_BYTES_DEFAULT } from '../control/limits.js';
import { DEFAULT_POLICY } from '../control/policy.js';
import type { ControlListener } from '../control/listener.js';
import { withBlockView } from '../filesystem/block-view.js';
import { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { NodeId } from '../filesystem/types.js';
import type { HolderLink } from '../holder/holder-link.js';
import { HAND_OVER_CODE, type BuildIdentity } from '../holder/ipc.js';
import { SERVER_FD, type ServerOptions } from '../holder/options.js';
import { Checks } from '../jobs/checks.js';
import { Fills } from '../jobs/fills.js';
import { Imports } from '../jobs/imports.js';
import { LeftoverCollector } from '../jobs/leftovers.js';
import { Merges } from '../jobs/merges.js';
import { Scrub } from '../jobs/scrub.js';
import type { FuseNativeMount } from '../transport/fuse-native/mount.js';
import { KernelDispatcher } from '../transport/kernel/dispatch.js';
import { ExchangeIntents } from '../transport/kernel/exchange-intents.js';
import { HandleTable } from '../transport/kernel/handles.js';
import { DEFAULT_SESSION_LIMITS } from '../transport/kernel/negotiation.js';
import { Notifier } from '../transport/kernel/notifier.js';
import { OutHeader } from '../transport/kernel/protocol.js';
import { connectionOf, waitingRequests } from '../transport/kernel/mount.js';
import { Resend } from '../transport/kernel/resend.js';
import { loadSession, saveSession } from '../transport/kernel/session.js';
import type { WorkerPool } from '../transport/kernel/worker-pool.js';
import type { BlockAccess } from '../vdisks/block-access.js';
import type { ControlPlane } from './control-plane.js';
import { keepLogBounded } from './log-keeper.js';
import { LazyMetrics } from './lazy-metrics.js';
import { SpaceWatch } from './space-watch.js';
import { Transfers } from './transfers.js';
import { LATE_PIECES, warmUp, type Piece } from './warm-up.js';

export interface ServerParts {
  readonly options: ServerOptions;
  readonly build: BuildIdentity;
  readonly pool: WorkerPool;
  readonly logger: Logger;
  readonly onFatal: (error: unknown) => never;
}

export class Server {
  readonly #options: ServerOptions;
  readonly #build: BuildIdentity;
  readonly #logger: Logger;
  readonly #onFatal: (error: unknown) => never;
  readonly #pool: WorkerPool;
  readonly #resend = new Resend();
  readonly #store: Store;
  readonly #handles: HandleTable;
  readonly #fileSystem: StoreFileSystem;
  readonly #fills: Fills;
  readonly #imports: Imports;
  readonly #space: SpaceWatch;
  #metrics: LazyMetrics | null = null;
  /** There with the control plane: until then whoever reads a link in `.block` waits. */
  readonly #blocks: Promise<BlockAccess>;
  #haveBlocks: (access: BlockAccess) => void = () => undefined;
  readonly #warming = new AbortController();
  readonly #checks: Checks;
  readonly #scrub: Scrub;
  readonly #merges: Merges;
  readonly #leftovers: LeftoverCollector;
  readonly #transfers: Transfers;
  #holder: HolderLink | null = null;
  #startedAt = new Date();
  #listener: ControlListener | null = null;
  #control: Promise<ControlPlane> | null = null;
  #notifier: Notifier | null = null;
  #fuseNative: FuseNativeMount | null = null;
  #ending: Promise<void> | null = null;

  /** On standby: loads what a start loads late. Touches neither store nor mount. */
  static async preload(): Promise<void> {
    await Promise.all([import('../control/listener.js'), import('./control-plane.js')]);
    for (const piece of LATE_PIECES) await piece();
  }

  static async create(parts: ServerParts): Promise<Server> {
    await Store.prepareRecovery(parts.options.storeDir, parts.options.runtimeDir);
    return new Server(parts);
  }

  private constructor({ options, build, pool, logger, onFatal }: ServerParts) {
    this.#options = options;
    this.#pool = pool;
    this.#build = build;
    this.#logger = logger;
    this.#onFatal = onFatal;
    this.#blocks = new Promise((resolve) => { this.#haveBlocks = resolve; });
    const kernelWorkers = options.transport === 'kernel' ? options.workers : 0;
    this.#store = Store.open({
      storeDir: options.storeDir, runtimeDir: options.runtimeDir, threads: 1 + kernelWorkers + 1, sourceTimeoutMs: options.sourceTimeoutSeconds * 1000,
      announcer: {
        opened: (handles) => { this.#pool.opened(handles); this.#fills.opened(handles); },
        closed: (nodeId, serial) => { this.#pool.closed(nodeId, serial); },
      },
      onFull: (isFull, freeBytes) => {
        if (isFull) {
          logger.error({ freeBytes }, 'the store is full: writes that need room get ENOSPC until some is made');
          // Not yet there when the store is full as it is opened.
          (this.#imports as Imports | undefined)?.stopForSpace();
        } else logger.warn({ freeBytes }, 'the store has room again');
      },
      onQuota: ({ container, isReached, limitBytes, usedBytes }) => {
        if (isReached) logger.warn({ container, limitBytes, usedBytes }, 'the limit of a container is reached: its writes that need room get ENOSPC (files EDQUOT)');
        else logger.warn({ container, limitBytes, usedBytes }, 'there is room below the limit of a container again');
      },
      onCommit: (durationMs, isWhole) => { this.#metrics?.committed(durationMs, isWhole); },
      onFault: (nodeId, reason) => { logger.error({ nodeId, disk: this.#pathOf(nodeId), reason }, 'the disk is faulted: it takes no more writes'); },
    });
    if (this.#store.replay.records > 0) logger.warn({ ...this.#store.replay }, 'recovered what the last server had acknowledged and not committed');
    this.#space = new SpaceWatch({ store: this.#store, storeDir: options.storeDir, policy: options.policy ?? DEFAULT_POLICY, logger });
    this.#handles = HandleTable.load(options.runtimeDir);
    this.#fileSystem = new StoreFileSystem({
      store: this.#store, storeDir: options.storeDir, handles: this.#handles,
      beforeDiscard: (nodeId) => { this.#fills.cancel(nodeId, 'the disk was removed'); },
      onWarning: (context, message) => { logger.warn(context, message); },
    });
    this.#fills = new Fills({ store: this.#store, boot: this.#store.threadBoot(kernelWorkers + 1), logger, onFatal });
    this.#imports = new Imports({
      store: this.#store, namespace: this.#fileSystem.namespace, storeDir: options.storeDir, mountDir: options.mountDir, logger, onFatal,
    });
    const isNodeInUse = (nodeId: NodeId): boolean => this.#handles.openCountOf(nodeId) > 0 || this.#store.disks.isUsed(nodeId);
    this.#checks = new Checks({ store: this.#store, storeDir: options.storeDir, logger, onFatal, isNodeInUse });
    this.#scrub = new Scrub({ store: this.#store, logger, onFatal, rateBytesPerSecond: options.scrubRateBytesPerSecond === undefined ? SCRUB_RATE_BYTES_DEFAULT : options.scrubRateBytesPerSecond });
    this.#merges = new Merges({ store: this.#store, logger, onFatal });
    this.#leftovers = new LeftoverCollector({
      store: this.#store, logger, onFatal, isNodeInUse, orphans: () => this.#fileSystem.orphans(), discard: (nodeIds) => { this.#fileSystem.discardAll(nodeIds); },
    });
    this.#transfers = new Transfers({
      store: this.#store, fileSystem: this.#fileSystem, storeDir: options.storeDir, mountDir: options.mountDir, logger,
      forgetAttributes: async (nodeId) => { await this.#notifier?.invalidateAttributes(nodeId); },
    });
  }

  async start(holder: HolderLink): Promise<void> {
    this.#holder = holder;
    this.#startedAt = new Date();
    this.#fileSystem.restore();
    this.#transfers.recover();
    if (this.#options.transport === 'kernel') this.#startKernelTransport();
    else await this.#startFuseNative();
    await holder.serving();
    const { listenForControl } = await import('../control/listener.js');
    this.#imports.failInterrupted();
    this.#listener = await listenForControl({
      socketPath: this.#options.socketPath, logger: this.#logger, ...(this.#options.policy === undefined ? {} : { policy: this.#options.policy }),
    });
    this.#store.startTimers((thrown) => { this.#commitFailed(thrown); });
    this.#space.start();
    this.#fills.resumeAll();
  }

  /** After `start`: answers the calls that wait, and those that come. Resolves when everything is loaded that is loaded late. */
  async serveControl(): Promise<void> {
    const listener = this.#listener;
    if (listener === null || this.#ending !== null) return;
    const metrics = this.#makeMetrics();
    this.#metrics = metrics;
    const startedAt = this.#startedAt;
    this.#control = import('./control-plane.js').then(async ({ startControlPlane }) => await startControlPlane({
      store: this.#store, fileSystem: this.#fileSystem, fills: this.#fills, imports: this.#imports, checks: this.#checks, scrub: this.#scrub, merges: this.#merges,
      space: this.#space, transfers: this.#transfers, metrics, options: this.#options, version: this.#build.version, startedAt, logger: this.#logger, listener,
      forgetAttributes: async (nodeId) => { await this.#notifier?.invalidateAttributes(nodeId); },
      stop: async (force) => { await this.stop(force); },
      upgrade: async (entry) => await this.#upgrade(entry),
      onFatal: this.#onFatal, blockAccess: (access) => { this.#haveBlocks(access); },
    }));
    await this.#control;
    this.#logger.info({ mount: this.#options.mountDir, store: this.#options.storeDir, transport: this.#options.transport, restarts: this.#options.restarts, version: this.#build.version }, 'serving');
    await warmUp([...this.#lateThreads(), ...LATE_PIECES, () => metrics.load()], this.#warming.signal);
    if (this.#warming.signal.aborted) return;
    keepLogBounded(this.#options.storeDir, this.#logger);
    this.#leftovers.run();
    this.#scrub.run();
    this.#merges.run();
  }

  /** Threads that no guest waits for. Whoever needs one before its turn starts it. */
  #lateThreads(): Piece[] {
    return [() => { this.#notifier?.prepare(); }, () => { this.#fills.prepare(); }, () => { this.#scrub.prepare(); }];
  }

  #makeMetrics(): LazyMetrics {
    const { transport, workers, mountDir, storeDir } = this.#options;
    const connection = transport === 'kernel' ? connectionOf(mountDir) : null;
    return new LazyMetrics({
      store: this.#store, storeDir, threads: 1 + (transport === 'kernel' ? workers : 0) + 1, space: () => this.#space.look(),
      fillBytes: () => this.#fills.copiedBytesTotal(), requestsWaiting: () => (connection === null ? null : waitingRequests(connection)),
    });
  }

  /** Unmounts, then ends the process a moment later, so that whoever asked gets an answer. `in-use`: goes on serving. */
  async stop(force: boolean): Promise<void> {
    if (this.#ending !== null) return;
    const control = await this.#control;
    const unmount = async (): Promise<void> => {
      await control?.exports.suspend({ force });
      try {
        await this.#unmount(force);
      } catch (thrown) {
        await control?.exports.resume();
        throw thrown;
      }
    };
    // Whoever asked, the API or a signal: deployed machines that are off must not keep the mount.
    await (control === null ? unmount() : control.around(force, unmount));
    setImmediate(() => { this.#end('stopped'); });
  }

  async #unmount(force: boolean): Promise<void> {
    if (this.#options.transport === 'kernel') await this.#requireHolder().unmount({ force });
    else if (await this.#fuseNative?.unmount({ force }) === 'busy') {
      throw new OffshootError('in-use', `${this.#options.mountDir} is in use: close what is open under it first (\`fuser -vm ${this.#options.mountDir}\` names it)`);
    }
  }

  /** Commits, closes, and leaves mount and connection to the next server. */
  handOver(reason: string): void {
    this.#end(reason, HAND_OVER_CODE);
  }

  /** The number of the upgrade; the holder then asks for the hand-over. */
  async #upgrade(entry: string): Promise<number> {
    if (this.#imports.isBusy()) throw new OffshootError('busy', 'an import is running, and would have to begin again: wait for it (`offshoot jobs`), or cancel it');
    return await this.#requireHolder().upgrade(entry);
  }

  #startKernelTransport(): void {
    const options = this.#options;
    const fuseFd = SERVER_FD.fuse;
    const reply = (message: Uint8Array): void => { writeReply(fuseFd, message); };
    // A mount keeps what its first server agreed to; the kernel asks again only when that one died before its answer.
    const exportSupport = loadSession(options.runtimeDir)?.exportSupport ?? options.nfs === true;
    const dispatcher = new KernelDispatcher({
      fileSystem: withBlockView(this.#fileSystem, { meta: this.#store.meta, device: async (nodeId, caller) => await (await this.#blocks).device(nodeId, caller) }),
      reply, onFatal: this.#onFatal, logger: this.#logger, sessionLimits: { ...DEFAULT_SESSION_LIMITS, exportSupport },
      onSession: (parameters) => { saveSession(options.runtimeDir, parameters); },
      exchangeIntents: new ExchangeIntents(options.runtimeDir),
    });
    this.#notifier = new Notifier({ descriptor: fuseFd, onFatal: this.#onFatal });
    if (options.restarts > 0) {
      this.#logger.debug({ session: loadSession(options.runtimeDir) }, 'taking over the session of the last server');
      this.#resend.send(reply);
    }
    this.#resend.readersStart();
    this.#pool.start({
      fuseFd, shared: this.#store.context.shared,
      boots: Array.from({ length: options.workers }, (_, i) => this.#store.threadBoot(i + 1)),
      onRequest: (message) => { dispatcher.handle(message); },
      onFlushReply: (nodeId, message) => { this.#flushThenReply(nodeId, message, reply); },
      onCommitWanted: () => { this.#store.committer.commitAll().catch((thrown: unknown) => { this.#commitFailed(thrown); }); },
      onUnmounted: () => { this.#end('the mount is gone'); },
      onFatal: this.#onFatal,
    });
  }

  async #startFuseNative(): Promise<void> {
    const { mountFuseNative } = await import('../transport/fuse-native/mount.js');
    this.#fuseNative = await mountFuseNative({ fileSystem: this.#fileSystem, mountDir: this.#options.mountDir, logger: this.#logger });
  }

  #flushThenReply(nodeId: NodeId, message: Uint8Array, reply: (message: Uint8Array) => void): void {
    this.#store.flush(nodeId).then(
      () => { reply(message); },
      (thrown: unknown) => {
        const error = toOffshootError(thrown);
        if (error.kind === 'internal') this.#onFatal(thrown);
        const refusal = new DataView(new ArrayBuffer(OutHeader.bytes));
        refusal.setUint32(OutHeader.len, OutHeader.bytes, true);
        refusal.setInt32(OutHeader.error, -errnoOf[error.kind], true);
        const bytes = new Uint8Array(refusal.buffer);
        bytes.set(message.subarray(OutHeader.unique, OutHeader.bytes), OutHeader.unique);
        reply(bytes);
      },
    ).catch(this.#onFatal);
  }

  #commitFailed(thrown: unknown): void {
    const error = toOffshootError(thrown);
    if (error.kind === 'internal') this.#onFatal(thrown);
    this.#logger.error({ err: error }, 'a commit failed; it is tried again');
  }

  /** Ends the process once everything is committed. */
  #end(reason: string, code = 0): void {
    this.#ending ??= this.#close(reason, code).catch(this.#onFatal);
  }

  async #close(reason: string, code: number): Promise<void> {
    this.#logger.info({ reason }, 'ending');
    this.#warming.abort();
    this.#space.close();
    await this.#closeControl(code !== HAND_OVER_CODE);
    await this.#checks.close();
    await this.#leftovers.close();
    await this.#scrub.close();
    await this.#merges.close();
    await this.#imports.close();
    await this.#transfers.close();
    await this.#fills.close();
    await this.#store.close();
    this.#handles.close();
    // Threads that sleep in a read would hold up an ordinary exit.
    exitNow(code);
  }

  async #closeControl(mountIsGone: boolean): Promise<void> {
    if (this.#control !== null) await (await this.#control).close({ mountIsGone });
    else if (this.#listener !== null) {
      await this.#listener.withdraw();
      await this.#listener.close();
    }
  }

  #requireHolder(): HolderLink {
    if (this.#holder === null) throw new Error('the server was not started');
    return this.#holder;
  }

  #pathOf(nodeId: NodeId): string | null {
    const { nodes } = this.#store.meta;
    return nodes.byId(nodeId) === undefined ? null : nodes.pathOf(nodeId);
  }

}

function writeReply(fuseFd: number, message: Uint8Array): void {
  try {
    fs.writeSync(fuseFd, message);
  } catch (thrown) {
    const { errno } = thrown as NodeJS.ErrnoException;
    // The request was given up meanwhile, or the mount is gone: nobody waits for the answer.
    if (errno !== -Errno.ENOENT && errno !== -Errno.ENODEV && errno !== -Errno.ECONNABORTED) throw thrown;
  }
}
