/**
 * What the control API does: the ControlService on a store, its names and its jobs.
 *
 * Main thread of the server. Each method is one user's wish from names to answer; the work itself lies below (`Store`,
 * `Namespace`, `Fills`, `Imports`). What is shown of nodes and jobs is put together in `control-views.ts`.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import type { CloneTarget } from '../../blockstore/clone.js';
import type { Store } from '../../blockstore/store.js';
import type { PromoteResult, RebaseRequest, RebaseResult } from '../control/independence-schemas.js';
import type {
  CheckInfo, CheckRequest, CloneRangesRequest, CloneRangesResult, CloneRequest, CloneResult, ContainerInfo, DaemonStatus, DiskInfo, FillInfo, ImportRequest, JobInfo,
  JobState, MetricInfo, NodeInfo, RemoveResult, ScrubInfo,
} from '../control/schemas.js';
import type { SpaceReport, QuotaInfo } from '../control/space-schemas.js';
import { checkPathInContainer } from '../control/paths.js';
import type { ContainerOptions, ControlService, FillOptions, FillResumeOptions, RemoveOptions } from '../control/service.js';
import { assertNoBoundMachineIn } from '../filesystem/bound-machines.js';
import { assertThawed } from '../filesystem/frozen.js';
import { References, type Resolved } from '../filesystem/references.js';
import type { TransferService } from '../control/transfer-service.js';
import { ROOT_NODE_ID, type NodeId } from '../filesystem/types.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { Checks } from '../jobs/checks.js';
import { CloneRecords } from '../jobs/clone-records.js';
import type { Fills } from '../jobs/fills.js';
import type { Imports } from '../jobs/imports.js';
import type { Scrub } from '../jobs/scrub.js';
import { checkInfo, scrubInfo } from './check-info.js';
import type { ControlViews } from './control-views.js';
import { listDirectory } from './list-directory.js';
import { Independence } from './independence.js';
import type { LazyMetrics } from './lazy-metrics.js';
import { cloneTree } from './clone-trees.js';
import { cloneRanges } from './range-service.js';
import { snapshotsError } from './dependents.js';
import { removeNode } from './remove-node.js';
import type { StoreExportService } from './export-service.js';
import type { StoreMachineService } from './machine-service.js';
import type { StoreVdiskService } from './vdisk-service.js';
import { Snapshots } from './snapshots.js';
import type { SpaceAccounts } from './space-accounts.js';

export interface ServiceLogger {
  info(context: object, message: string): void;
  warn(context: object, message: string): void;
}

export interface ServiceOptions {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly fills: Fills;
  readonly imports: Imports;
  readonly checks: Checks;
  readonly scrub: Scrub;
  readonly views: ControlViews;
  readonly accounts: SpaceAccounts;
  readonly metrics: LazyMetrics;
  readonly transfers: TransferService;
  readonly machines: StoreMachineService;
  readonly exports: StoreExportService;
  readonly vdisks: StoreVdiskService;
  readonly logger: ServiceLogger;
  /** The kernel may remember attributes of this node that are not true any more; resolves when it does not. */
  readonly forgetAttributes: (nodeId: NodeId) => Promise<void>;
  readonly stop: (force: boolean) => Promise<void>;
  readonly upgrade: (serverEntry: string) => Promise<number>;
}

const CALLER = { uid: 0, gid: 0, pid: 0 } as const;

export class StoreControlService implements ControlService {
  readonly snapshots: Snapshots;
  readonly #options: ServiceOptions;
  readonly #references: References;
  readonly #cloneRecords: CloneRecords;
  readonly #independence: Independence;

  constructor(options: ServiceOptions) {
    this.#options = options;
    this.#cloneRecords = new CloneRecords(options.store.meta.jobs);
    const { store, fileSystem, fills, logger, forgetAttributes } = options;
    this.#references = new References(store.meta, (path) => fileSystem.namespace.resolve(path));
    this.snapshots = new Snapshots({
      store, fileSystem, references: this.#references, logger, forgetAttributes, beforeDiscard: (nodeId) => { fills.cancel(nodeId, 'its container went back to a snapshot'); },
    });
    this.#independence = new Independence({ store, fileSystem, references: this.#references, logger, forgetAttributes });
  }

  get transfers(): TransferService { return this.#options.transfers; }
  get machines(): StoreMachineService { return this.#options.machines; }
  get exports(): StoreExportService { return this.#options.exports; }
  get vdisks(): StoreVdiskService { return this.#options.vdisks; }

  status(): DaemonStatus { return this.#options.views.status(); }
  async metrics(): Promise<readonly MetricInfo[]> { return await (await this.#options.metrics.load()).list(); }
  async metricsText(): Promise<string> { return await (await this.#options.metrics.load()).text(); }
  async stop(options: { readonly force: boolean }): Promise<void> { await this.#options.stop(options.force); }

  async upgrade(serverEntry: string): Promise<number> { return await this.#options.upgrade(serverEntry); }

  async createContainer(name: string, options: ContainerOptions): Promise<ContainerInfo> {
    const { fileSystem, views, forgetAttributes, logger } = this.#options;
    const { nodeId } = fileSystem.namespace.mkdir(ROOT_NODE_ID, name, options.mode, CALLER);
    await forgetAttributes(ROOT_NODE_ID);
    logger.info({ container: name }, 'container created');
    return views.container(this.#row(nodeId));
  }

  listContainers(): readonly ContainerInfo[] {
    return this.#children(ROOT_NODE_ID).map((row) => this.#options.views.container(row)).toSorted((a, b) => compare(a.name, b.name));
  }

  async list(path: string | null): Promise<readonly NodeInfo[]> {
    const { node: row, path: at } = path === null ? { node: this.#row(ROOT_NODE_ID), path: '' } : this.#find(path);
    if (row.kind !== 'directory') return [this.#options.views.node(row, at)];
    return (await listDirectory(this.#options.store, this.#options.views, row.id, path === null ? null : at)).toSorted((a, b) => compare(a.path, b.path));
  }

  show(path: string): DiskInfo { return this.#options.views.disk(this.#resolve(path)); }

  startImport(request: ImportRequest): JobInfo {
    const { imports, views } = this.#options;
    return views.job(imports.start({ file: request.file, target: request.target, inPlace: request.inPlace, format: request.format }).id);
  }

  job(id: number): JobInfo { return this.#options.views.job(id); }
  jobs(state: JobState | null): readonly JobInfo[] { return this.#options.views.jobs(state); }

  async cancelJob(id: number): Promise<JobInfo> {
    const { store, fills, imports, views } = this.#options;
    const job = store.meta.jobs.byId(id);
    if (job?.kind === 'import') await imports.cancel(id);
    await this.machines.cancel(id);
    await this.vdisks.cancel(id);
    const isUnderWay = job?.state === 'running' || job?.state === 'paused';
    if (job?.kind === 'scrub') this.#options.scrub.cancel();
    if (job?.kind === 'fill' && job.nodeId !== null && isUnderWay) fills.cancel(job.nodeId, 'cancelled');
    return views.job(id);
  }

  async clone(request: CloneRequest): Promise<CloneResult> {
    const { fills, views, forgetAttributes, logger } = this.#options;
    const startedMs = performance.now();
    const found = this.#cloneRecords.recording(request, () => this.#find(request.source));
    if (found.node.kind === 'directory') return await this.#cloneTree(request, found);
    const { operationId, rows, targets } = this.#cloneRecords.recording(request, () => this.#makeClones(request, found.node.id));
    await Promise.all(Array.from(new Set(targets.map((target) => target.parentId)), forgetAttributes));
    const durationMs = performance.now() - startedMs;
    logger.info({ operationId, source: request.source, clones: rows.length, disk: request.targets[0], durationMs: Math.round(durationMs * 100) / 100 }, 'cloned');
    if (request.fill) fills.startAll(rows);
    return {
      operationId, durationMs,
      clones: rows.map((row, i) => ({ path: request.targets[i] ?? '', sizeBytes: row.sizeBytes, mountPath: views.mountPath(request.targets[i] ?? '') })),
    };
  }

  async #cloneTree(request: CloneRequest, source: Resolved): Promise<CloneResult> {
    const { store, fileSystem, fills, views, forgetAttributes, logger } = this.#options;
    const startedMs = performance.now();
    let jobId = 0;
    const trees = await this.#cloneRecords.recordingLater(request, async () => await cloneTree(
      { store, namespace: fileSystem.namespace }, source, request.targets, { copyOnRead: request.copyOnRead, record: () => { jobId = this.#cloneRecords.made(request, source.node.id); } },
    ));
    const operationId = String(jobId);
    await Promise.all(Array.from(new Set(trees.map(([root]) => root?.parentId ?? ROOT_NODE_ID)), forgetAttributes));
    const durationMs = performance.now() - startedMs;
    logger.info({ operationId, source: request.source, clones: trees.length, nodes: trees.length * (trees[0]?.length ?? 0), durationMs: Math.round(durationMs * 100) / 100 }, 'cloned');
    if (request.fill) for (const row of trees.flat()) if (row.kind === 'disk') fills.start(row, null);
    return {
      operationId, durationMs,
      clones: trees.map((nodes, i) => ({
        path: request.targets[i] ?? '', sizeBytes: nodes.reduce((sum, node) => sum + (node.layerId === null ? 0 : node.sizeBytes), 0), mountPath: views.mountPath(request.targets[i] ?? ''),
      })),
    };
  }

  #makeClones(request: CloneRequest, sourceId: number): { readonly operationId: string; readonly rows: readonly NodeRow[]; readonly targets: readonly CloneTarget[] } {
    const { store, fileSystem } = this.#options;
    for (const target of request.targets) checkPathInContainer(target);
    const targets = request.targets.map((target) => {
      const { parent, name } = fileSystem.namespace.resolveNew(target);
      return { parentId: parent.id, name };
    });
    store.assertSourcesUsable(sourceId);
    let jobId = 0;
    const rows = store.clone(sourceId, targets, { copyOnRead: request.copyOnRead, record: () => { jobId = this.#cloneRecords.made(request, sourceId); } });
    return { operationId: String(jobId), rows, targets };
  }

  async cloneRanges(request: CloneRangesRequest): Promise<CloneRangesResult> {
    return await cloneRanges(this.#options, this.#cloneRecords, (path) => this.#resolve(path), request);
  }

  fillStart(path: string, options: FillOptions): FillInfo {
    return this.#options.views.fill(this.#options.fills.start(this.#ownDataNode(path), options.rateBytesPerSecond, options.flatten === true), path);
  }

  fillPause(path: string): FillInfo { return this.#options.views.fill(this.#options.fills.pause(this.#dataNode(path)), path); }

  fillResume(path: string, options: FillResumeOptions): FillInfo {
    return this.#options.views.fill(this.#options.fills.resume(this.#dataNode(path), options.rateBytesPerSecond), path);
  }

  fillStatus(path: string): FillInfo { return this.#options.views.fill(this.#options.fills.status(this.#dataNode(path)), path); }

  async remove(path: string, options: RemoveOptions): Promise<RemoveResult> {
    const { store, fileSystem, forgetAttributes, logger } = this.#options;
    const row = this.#resolve(path);
    assertThawed(store.meta, row);
    assertNoBoundMachineIn(store.meta, row);
    const kept = this.snapshots.namesOf(row.id);
    if (kept.length > 0) throw snapshotsError(path, kept);
    const result = await removeNode({ store, fileSystem }, row, path, options);
    // A name that the kernel still remembers leads to a node that is gone: ESTALE makes it look the name up again.
    await Promise.all([row.id, row.parentId ?? ROOT_NODE_ID].map(forgetAttributes));
    logger.info({ disk: path, nodes: result.nodesRemoved, layers: result.layersRemoved }, 'removed');
    return result;
  }

  async resize(path: string, sizeBytes: number): Promise<DiskInfo> {
    const { store, fileSystem, views, forgetAttributes, logger } = this.#options;
    const row = this.#ownDataNode(path);
    const before = store.disks.get(row.id)?.shared.sizeBytes() ?? row.sizeBytes;
    if (sizeBytes < before && fileSystem.openCount(row.id) > 0) {
      throw new OffshootError('in-use', `${path} is open: it can be made larger, but not smaller, while somebody uses it`, { path });
    }
    store.resize(row.id, sizeBytes);
    await forgetAttributes(row.id);
    logger.info({ disk: path, sizeBytes, before }, 'resized');
    return views.disk(this.#row(row.id));
  }

  async df(target: string | null): Promise<SpaceReport> { return await this.#options.accounts.df(target); }

  quotaSet(container: string, limitBytes: number): QuotaInfo {
    const info = this.#options.accounts.quotaSet(container, limitBytes);
    this.#options.logger.info({ ...info }, 'limit set');
    return info;
  }

  quotaRemove(container: string): QuotaInfo {
    const info = this.#options.accounts.quotaRemove(container);
    this.#options.logger.info({ ...info }, 'limit removed');
    return info;
  }

  quotaList(): readonly QuotaInfo[] { return this.#options.accounts.quotaList(); }
  promote(path: string): PromoteResult { return this.#independence.promote(path); }
  async rebase(request: RebaseRequest): Promise<RebaseResult> { return await this.#independence.rebase(request); }

  checkStart({ target, data, repair }: CheckRequest): CheckInfo {
    const node = target === null ? null : this.#resolve(target);
    return checkInfo(this.#options.checks.start({ target: node, data, repair }, target));
  }

  checkStatus(id: number): CheckInfo { return checkInfo(this.#options.checks.find(id)); }
  async checkCancel(id: number): Promise<CheckInfo> { return checkInfo(await this.#options.checks.cancel(id)); }
  scrubStatus(): ScrubInfo { return scrubInfo(this.#options.scrub.status()); }
  scrubStart(options: FillOptions): ScrubInfo { return scrubInfo(this.#options.scrub.start(options.rateBytesPerSecond)); }
  scrubPause(): ScrubInfo { return scrubInfo(this.#options.scrub.pause()); }
  scrubResume(options: FillResumeOptions): ScrubInfo { return scrubInfo(this.#options.scrub.resume(options.rateBytesPerSecond)); }

  #find(reference: string): Resolved { return this.#references.resolve(reference); }

  #resolve(reference: string): NodeRow { return this.#find(reference).node; }

  /** One that is about to be changed. */
  #ownDataNode(path: string): NodeRow {
    const row = this.#dataNode(path);
    assertThawed(this.#options.store.meta, row);
    return row;
  }

  #dataNode(path: string): NodeRow {
    const row = this.#resolve(path);
    if (row.layerId === null) throw new OffshootError('is-a-directory', `${path} is not a disk or file`, { path });
    return row;
  }

  #row(id: number): NodeRow {
    const row = this.#options.store.meta.nodes.byId(id);
    if (row === undefined) throw new OffshootError('not-found', `there is no node ${id}`);
    return row;
  }

  #children(parentId: number): NodeRow[] {
    return this.#options.store.meta.nodes.children(parentId, 0, Number.MAX_SAFE_INTEGER);
  }
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
