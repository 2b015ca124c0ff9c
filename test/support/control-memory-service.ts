/**
 * A ControlService that keeps real state in memory, for tests of the HTTP layer and of the command line: what is made is
 * listed, what is removed is gone, jobs and fills move on at every look. It stores no data.
 */
import { OffshootError, type ErrorExtent } from '../../blockstore/errors.js';
import type { PromoteResult, RebaseRequest, RebaseResult } from '../../daemon/control/independence-schemas.js';
import type {
  CheckInfo, CheckRequest, CheckResult, CloneRangesRequest, CloneRangesResult, CloneRequest, CloneResult, ContainerInfo, DaemonStatus, DiskInfo, FillInfo, ImportRequest,
  JobInfo, JobState, MetricInfo, NodeInfo, RemoveResult, ScrubInfo,
} from '../../daemon/control/schemas.js';
import type { SpaceReport, QuotaInfo } from '../../daemon/control/space-schemas.js';
import type { ContainerOptions, ControlService, FillOptions, FillResumeOptions, RemoveOptions } from '../../daemon/control/service.js';
import { memoryExports } from './control-memory-exports.js';
import { memoryMachines } from './control-memory-machines.js';
import { memoryVdisks } from './control-memory-vdisks.js';
import { memoryTransfers } from './control-memory-transfers.js';

import { MemorySnapshots } from './control-memory-snapshots.js';

const GIB = 1024 ** 3;
const MIB = 1024 ** 2;
const EPOCH = '2026-01-02T03:04:05.678Z';

interface Disk {
  readonly id: number;
  sizeBytes: number;
  readonly source: string | null;
  ownedBytes: number;
  readonly copyOnRead: boolean;
}

export interface MemoryServiceOptions {
  readonly mountDir?: string;
  readonly holderPid?: number;
  /** Share of a job that is done at each look, 0 to 1. 0: it never moves. */
  readonly jobStep?: number;
}

type Mutable<T> = { -readonly [K in keyof T]: T[K] };

export class MemoryService implements ControlService {
  readonly snapshots = new MemorySnapshots();
  readonly transfers = memoryTransfers;
  readonly machines = memoryMachines;
  readonly exports = memoryExports;
  readonly vdisks = memoryVdisks;
  readonly upgradedTo: string[] = [];
  readonly containers = new Map<string, ContainerOptions>();
  readonly disks = new Map<string, Disk>();
  readonly jobRows = new Map<number, Mutable<JobInfo>>();
  readonly fills = new Map<string, Mutable<FillInfo>>();
  stopped: { readonly force: boolean } | null = null;
  /** Throw this at the next call of `status`: for programmer errors. */
  broken: Error | null = null;
  jobStep: number;
  readonly #mountDir: string;
  readonly #holderPid: number;
  #lastId = 1;

  constructor(options: MemoryServiceOptions = {}) {
    this.#mountDir = options.mountDir ?? '/mnt/offshoot';
    this.#holderPid = options.holderPid ?? 4_000_001;
    this.jobStep = options.jobStep ?? 0.5;
  }

  #nextId(): number {
    this.#lastId += 1;
    return this.#lastId;
  }

  #disk(path: string): Disk {
    const disk = this.disks.get(path);
    if (disk === undefined) throw new OffshootError('not-found', `there is no ${path}: offshoot ls lists what there is`, { path });
    return disk;
  }

  #refuseTaken(path: string): void {
    const container = path.split('/', 1)[0] ?? '';
    if (!this.containers.has(container)) throw new OffshootError('not-found', `there is no container ${container}: offshoot container create ${container} makes it`, { path: container });
    if (this.disks.has(path)) throw new OffshootError('already-exists', `${path} exists already: choose another name`, { path });
  }

  status(): DaemonStatus {
    if (this.broken !== null) throw this.broken;
    return {
      version: '1.2.3', holderVersion: '1.2.2', sparePid: null, upgrade: null, serverPid: 4_000_002, holderPid: this.#holderPid, restarts: 2, lastStallMs: 98.4, startedAt: EPOCH,
      storeDir: '/srv/offshoot', mountDir: this.#mountDir, socketPath: '/run/offshoot/offshoot.sock', transport: 'kernel', workers: 2,
      sqliteVersion: '3.51.3', nodeVersion: 'v20.20.0', disksOpen: 1, disksTotal: this.disks.size, snapshotsTotal: 3, containersTotal: this.containers.size,
      layersTotal: this.disks.size, storeBytesTotal: 100 * GIB, storeBytesFree: 42 * GIB, storeBytesReserved: GIB / 16,
      merge: null, spaceLevel: 'ok', virtualBytesTotal: 500 * GIB, scrub: this.scrubStatus(), warnings: ['the store has less than 50 GiB free'],
    };
  }

  async metrics(): Promise<readonly MetricInfo[]> {
    return await Promise.resolve([{ name: 'offshoot_disks', help: 'Disks in the store', type: 'gauge', values: [{ name: 'offshoot_disks', labels: {}, value: this.disks.size }] }]);
  }

  async metricsText(): Promise<string> {
    return await Promise.resolve(`# HELP offshoot_disks Disks in the store\n# TYPE offshoot_disks gauge\noffshoot_disks ${this.disks.size}\n`);
  }

  async stop(options: { readonly force: boolean }): Promise<void> {
    await Promise.resolve();
    if (this.disks.has('vms/open.img') && !options.force) throw new OffshootError('in-use', '1 file is open under the mount: close it, or use --force', { openCount: 1 });
    this.stopped = options;
  }

  async upgrade(serverEntry: string): Promise<number> {
    await Promise.resolve();
    this.upgradedTo.push(serverEntry);
    return this.upgradedTo.length;
  }

  createContainer(name: string, options: ContainerOptions): ContainerInfo {
    if (this.containers.has(name)) throw new OffshootError('already-exists', `the container ${name} exists already: choose another name`, { path: name });
    this.containers.set(name, options);
    return this.#container(name);
  }

  #container(name: string): ContainerInfo {
    const inside = [...this.disks].filter(([path]) => path.startsWith(`${name}/`)).map(([, disk]) => disk);
    return {
      name, disks: inside.length, files: 0, snapshots: 1, createdAt: EPOCH,
      sizeBytes: inside.reduce((sum, disk) => sum + disk.sizeBytes, 0), allocatedBytes: inside.reduce((sum, disk) => sum + disk.ownedBytes, 0),
    };
  }

  listContainers(): readonly ContainerInfo[] {
    return [...this.containers.keys()].sort().map((name) => this.#container(name));
  }

  list(path: string | null): readonly NodeInfo[] {
    const common = { mode: 0o644, uid: 0, gid: 0, modifiedAt: EPOCH };
    if (path === null) {
      return [...this.containers].map(([name, options]) => ({
        ...common, path: name, kind: 'directory', sizeBytes: 0, ownedBytes: 0, mode: options.mode, openCount: 0, fillState: null,
      }));
    }
    if (!this.containers.has(path)) throw new OffshootError('not-found', `there is no ${path}: offshoot ls lists the containers`, { path });
    return [...this.disks].filter(([each]) => each.startsWith(`${path}/`)).map(([each, disk]) => ({
      ...common, path: each, kind: 'disk', sizeBytes: disk.sizeBytes, ownedBytes: disk.ownedBytes, openCount: 0, fillState: this.fills.get(each)?.state ?? null,
    }));
  }

  show(path: string): DiskInfo {
    const disk = this.#disk(path);
    const sealed = disk.source === null ? [] : [{ layerId: 1, kind: 'external' as const, path: '/images/debian.raw', sizeBytes: disk.sizeBytes, sealed: true, complete: true, writtenBy: disk.source }];
    return {
      path, nodeId: disk.id, kind: 'disk', sizeBytes: disk.sizeBytes, ownedBytes: disk.ownedBytes, unownedBytes: disk.sizeBytes - disk.ownedBytes,
      unownedDataBytes: Math.floor((disk.sizeBytes - disk.ownedBytes) / 4), allocatedBytes: disk.ownedBytes, copyOnRead: disk.copyOnRead,
      backingChain: [{ layerId: disk.id, kind: 'store', path: null, sizeBytes: disk.sizeBytes, sealed: false, complete: disk.source === null, writtenBy: path }, ...sealed],
      cloneOf: disk.source,
      sharedWith: [],
      fill: this.fills.get(path) ?? null, openCount: 2, transport: 'kernel', mountPath: `${this.#mountDir}/${path}`, fault: null,
      createdAt: EPOCH, modifiedAt: EPOCH, mode: 0o644, uid: 0, gid: 0,
    };
  }

  startImport(request: ImportRequest): JobInfo {
    if (!request.file.endsWith('.raw') && !request.file.endsWith('.qcow2')) throw new OffshootError('not-found', `there is no file ${request.file}: check its name`, { file: request.file });
    this.#refuseTaken(request.target);
    const job: Mutable<JobInfo> = {
      id: this.#nextId(), kind: 'import', state: 'running', path: request.target, progressDoneBytes: 0, progressTotalBytes: 4 * GIB,
      message: request.format, error: null, createdAt: EPOCH, updatedAt: EPOCH,
    };
    this.jobRows.set(job.id, job);
    if (request.inPlace) this.#finish(job);
    return { ...job };
  }

  #finish(job: Mutable<JobInfo>): void {
    job.state = 'completed';
    job.progressDoneBytes = job.progressTotalBytes;
    if (job.path !== null && job.kind === 'import') this.disks.set(job.path, { id: this.#nextId(), sizeBytes: 10 * GIB, source: null, ownedBytes: 10 * GIB, copyOnRead: false });
  }

  #job(id: number): Mutable<JobInfo> {
    const job = this.jobRows.get(id);
    if (job === undefined) throw new OffshootError('not-found', `there is no job ${id}`, { id });
    return job;
  }

  job(id: number): JobInfo {
    const job = this.#job(id);
    if (job.state === 'running') {
      job.progressDoneBytes = Math.min(job.progressTotalBytes, job.progressDoneBytes + Math.ceil(this.jobStep * job.progressTotalBytes));
      if (job.progressDoneBytes >= job.progressTotalBytes) this.#finish(job);
    }
    return { ...job };
  }

  jobs(state: JobState | null): readonly JobInfo[] {
    return [...this.jobRows.values()].filter((job) => state === null || job.state === state).map((job) => ({ ...job }));
  }

  readonly quotas = new Map<string, number>();

  async df(target: string | null): Promise<SpaceReport> {
    await Promise.resolve();
    const costOf = (disk: Disk): { allocatedBytes: number; exclusiveBytes: number; sharedBytes: number } =>
      ({ allocatedBytes: disk.ownedBytes, exclusiveBytes: disk.ownedBytes, sharedBytes: disk.source === null ? 0 : 2 * GIB });
    const sum = (disks: readonly Disk[]): { allocatedBytes: number; exclusiveBytes: number; sharedBytes: number } => ({
      allocatedBytes: disks.reduce((all, disk) => all + disk.ownedBytes, 0), exclusiveBytes: disks.reduce((all, disk) => all + disk.ownedBytes, 0), sharedBytes: 0,
    });
    const shown = [...this.disks].filter(([path]) => target === null || path === target || path.startsWith(`${target}/`));
    if (target !== null && shown.length === 0 && !this.containers.has(target)) throw new OffshootError('not-found', `there is no ${target}: offshoot ls lists what there is`, { path: target });
    return {
      target, snapshots: target === null ? [{ path: 'vms@v1', disks: 1, allocatedBytes: 0, exclusiveBytes: MIB, sharedBytes: GIB }] : [],
      disks: shown.map(([path, disk]) => {
        const others = [...this.disks].filter(([other, { source }]) => other !== path && (source === path || (disk.source !== null && (source === disk.source || other === disk.source)))).map(([other]) => other);
        return { path, kind: 'disk', frozen: false, sizeBytes: disk.sizeBytes, ...costOf(disk), sharedWithCount: others.length, sharedWith: others.slice(0, 8) };
      }),
      containers: [...this.containers.keys()].filter((name) => target === null || name === target).map((name) => {
        const inside = [...this.disks].filter(([path]) => path.startsWith(`${name}/`)).map(([, disk]) => disk);
        return { name, disks: inside.length, snapshots: 1, ...sum(inside), usedBytes: sum(inside).allocatedBytes, limitBytes: this.quotas.get(name) ?? null };
      }),
      total: { disks: shown.length, snapshots: target === null ? 1 : 0, ...sum(shown.map(([, disk]) => disk)) },
      store: target === null ? {
        layersBytes: 10 * GIB, databaseBytes: MIB, importBytes: 0, reserveBytes: GIB / 16, logBytes: 4096, totalBytes: 10 * GIB + MIB + GIB / 16 + 4096, removedBytes: 0, leftOverBytes: MIB,
        fileSystemBytes: 100 * GIB, freeBytes: 42 * GIB,
      } : null,
    };
  }

  #quota(container: string, limitBytes: number): QuotaInfo {
    return { container, limitBytes, usedBytes: GIB, freeBytes: Math.max(0, limitBytes - GIB), isReached: limitBytes <= GIB };
  }

  quotaSet(container: string, limitBytes: number): QuotaInfo {
    if (!this.containers.has(container)) throw new OffshootError('not-found', `there is no container ${container}: offshoot ls lists the containers`, { container });
    this.quotas.set(container, limitBytes);
    return this.#quota(container, limitBytes);
  }

  quotaRemove(container: string): QuotaInfo {
    const limitBytes = this.quotas.get(container);
    if (limitBytes === undefined) throw new OffshootError('not-found', `the container ${container} has no limit`, { container });
    this.quotas.delete(container);
    return this.#quota(container, limitBytes);
  }

  quotaList(): readonly QuotaInfo[] {
    return [...this.quotas].map(([container, limitBytes]) => this.#quota(container, limitBytes));
  }

  async cancelJob(id: number): Promise<JobInfo> {
    await Promise.resolve();
    const job = this.#job(id);
    if (job.state === 'running') job.state = 'cancelled';
    return { ...job };
  }

  async clone(request: CloneRequest): Promise<CloneResult> {
    await Promise.resolve();
    const source = this.#disk(request.source);
    for (const target of request.targets) this.#refuseTaken(target);
    for (const target of request.targets) {
      this.disks.set(target, { id: this.#nextId(), sizeBytes: source.sizeBytes, source: request.source, ownedBytes: 0, copyOnRead: request.copyOnRead });
      if (request.fill) this.fillStart(target, { rateBytesPerSecond: null });
    }
    return {
      operationId: 'op-1', durationMs: 12.25,
      clones: request.targets.map((path) => ({ path, sizeBytes: source.sizeBytes, mountPath: `${this.#mountDir}/${path}` })),
    };
  }

  async cloneRanges(request: CloneRangesRequest): Promise<CloneRangesResult> {
    await Promise.resolve();
    this.#disk(request.source);
    const created = !this.disks.has(request.target);
    const end = Math.max(...request.ranges.map((range) => range.targetAtBytes + range.lengthBytes));
    const sizeBytes = created ? request.sizeBytes ?? end : this.#disk(request.target).sizeBytes;
    if (end > sizeBytes) throw new OffshootError('too-large', 'a range ends behind the end of the target');
    if (created) this.disks.set(request.target, { id: this.#nextId(), sizeBytes, source: request.source, ownedBytes: 0, copyOnRead: false });
    return {
      operationId: 'op-2', path: request.target, sizeBytes, mountPath: `${this.#mountDir}/${request.target}`, created, ranges: request.ranges.length,
      sharedBytes: request.ranges.reduce((sum, range) => sum + range.lengthBytes, 0), durationMs: 1.5,
    };
  }

  fillStart(path: string, options: FillOptions): FillInfo {
    this.#disk(path);
    const fill: Mutable<FillInfo> = {
      path, jobId: this.#nextId(), state: 'running', doneBytes: 0, totalBytes: 2 * GIB, rateBytesPerSecond: options.rateBytesPerSecond,
      currentBytesPerSecond: 500 * MIB, startedAt: EPOCH, updatedAt: EPOCH, message: null, flatten: options.flatten === true,
    };
    this.fills.set(path, fill);
    return { ...fill };
  }

  #fill(path: string): Mutable<FillInfo> {
    const fill = this.fills.get(path);
    if (fill === undefined) throw new OffshootError('not-found', `${path} was never filled: offshoot fill start ${path} begins`, { path });
    return fill;
  }

  fillPause(path: string): FillInfo {
    const fill = this.#fill(path);
    fill.state = 'paused';
    return { ...fill };
  }

  fillResume(path: string, options: FillResumeOptions): FillInfo {
    const fill = this.#fill(path);
    fill.state = 'running';
    if (options.rateBytesPerSecond !== undefined) fill.rateBytesPerSecond = options.rateBytesPerSecond;
    return { ...fill };
  }

  fillStatus(path: string): FillInfo {
    const fill = this.#fill(path);
    if (fill.state === 'running') {
      fill.doneBytes = Math.min(fill.totalBytes, fill.doneBytes + Math.ceil(this.jobStep * fill.totalBytes));
      if (fill.doneBytes >= fill.totalBytes) {
        fill.state = 'completed';
        const disk = this.#disk(path);
        disk.ownedBytes = disk.sizeBytes;
      }
    }
    return { ...fill };
  }

  remove(path: string, options: RemoveOptions): RemoveResult {
    const inside = [...this.disks.keys()].filter((each) => each.startsWith(`${path}/`));
    if (this.containers.has(path)) {
      if (inside.length > 0 && !options.recursive) throw new OffshootError('not-empty', `${path} is not empty: offshoot rm -r ${path} removes it with all that is in it`, { path });
      for (const each of inside) this.disks.delete(each);
      this.containers.delete(path);
      return { path, nodesRemoved: inside.length + 1, layersRemoved: inside.length, layersKept: 0, freedBytes: 0 };
    }
    const { ownedBytes } = this.#disk(path);
    const clones = [...this.disks.values()].filter((disk) => disk.source === path).length;
    if (clones > 0 && !options.keepData) throw new OffshootError('in-use', `${clones} clones read from ${path}: fill them, or use --keep-data`, { path, clones });
    this.disks.delete(path);
    return { path, nodesRemoved: 1, layersRemoved: clones > 0 ? 0 : 1, layersKept: clones > 0 ? 1 : 0, freedBytes: clones > 0 ? 0 : ownedBytes };
  }

  async resize(path: string, sizeBytes: number): Promise<DiskInfo> {
    await Promise.resolve();
    this.#disk(path).sizeBytes = sizeBytes;
    return this.show(path);
  }

  promote(path: string): PromoteResult {
    const disk = this.#disk(path);
    if (disk.source === null) throw new OffshootError('invalid-argument', 'it reads from no other disk, so there is nothing to promote', { path });
    return { path, origin: disk.source, layers: 1 };
  }

  /** Extents that the next rebase has in its way. */
  conflicts: readonly ErrorExtent[] = [];

  async rebase({ path, image, force }: RebaseRequest): Promise<RebaseResult> {
    await Promise.resolve();
    this.#disk(path);
    this.#disk(image);
    const { conflicts } = this;
    if (conflicts.length > 0 && !force) throw new OffshootError('conflict', `${path} was not changed`, { conflictsTotal: conflicts.length, conflictBytes: 4096, conflicts });
    return { path, image, forced: force };
  }

  /** What the next check finds. */
  checkResult: CheckResult = { verdict: 'clean', findings: [], faulted: [], lifted: [], notLifted: [], layersChecked: 0, layersWithoutChecksums: 0, bytesRead: 0 };
  readonly checksStarted: CheckRequest[] = [];
  #check: Mutable<CheckInfo> | null = null;

  checkStart(request: CheckRequest): CheckInfo {
    this.checksStarted.push(request);
    this.#check = {
      checkId: this.#nextId(), state: 'running', target: request.target, data: request.data, repair: request.repair, phase: 'data', doneBytes: 0, totalBytes: GIB,
      result: null, error: null, startedAt: EPOCH, endedAt: null,
    };
    return { ...this.#check };
  }

  checkStatus(id: number): CheckInfo {
    const check = this.#check;
    if (check?.checkId !== id) throw new OffshootError('not-found', 'that check is gone: start it again', { checkId: id });
    check.doneBytes = Math.min(check.totalBytes, check.doneBytes + Math.ceil(this.jobStep * check.totalBytes));
    if (check.doneBytes >= check.totalBytes) Object.assign(check, { state: 'completed', result: this.checkResult, endedAt: EPOCH });
    return { ...check };
  }

  async checkCancel(id: number): Promise<CheckInfo> {
    await Promise.resolve();
    if (this.#check?.checkId === id && this.#check.state === 'running') Object.assign(this.#check, { state: 'cancelled', endedAt: EPOCH });
    return this.checkStatus(id);
  }

  readonly #scrub: Mutable<ScrubInfo> = {
    state: null, doneBytes: 0, totalBytes: 0, rateBytesPerSecond: null, startedAt: null, lastCompletedAt: null, damagedExtents: 0, layersWithoutChecksums: 3, message: null,
  };

  scrubStatus(): ScrubInfo { return { ...this.#scrub }; }
  scrubStart(options: FillOptions): ScrubInfo { return Object.assign(this.#scrub, { ...options, state: 'running', totalBytes: GIB, startedAt: EPOCH }); }
  scrubPause(): ScrubInfo { return Object.assign(this.#scrub, { state: 'paused' }); }
  scrubResume(options: FillResumeOptions): ScrubInfo {
    if (options.rateBytesPerSecond !== undefined) this.#scrub.rateBytesPerSecond = options.rateBytesPerSecond;
    return Object.assign(this.#scrub, { state: 'running' });
  }
}
