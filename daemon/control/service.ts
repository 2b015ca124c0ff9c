/**
 * What the control API can ask of the daemon: the seam between the HTTP layer and the server process.
 *
 * Runs on the server's main thread. Paths are syntactically sound when they arrive (`paths.ts`), targets of a clone are
 * distinct, sizes are within the limits and multiples of a sector; whether something exists, fits or is in use is for
 * the implementation to say. Every method throws OffshootError for what the world refuses, and changes nothing then;
 * any other exception is a programmer error, and the HTTP layer hands it to its owner after it has answered.
 * What a method did is durable when it returns. Waiting for a job is not offered: clients ask again.
 */
import type { PromoteResult, RebaseRequest, RebaseResult } from './independence-schemas.js';
import type {
  CheckInfo, CheckRequest, CloneRangesRequest, CloneRangesResult, CloneRequest, CloneResult, ContainerInfo, DaemonStatus, DiskInfo, FillInfo, ImportRequest, JobInfo,
  JobState, MetricInfo, NodeInfo, RemoveResult, ScrubInfo,
} from './schemas.js';
import type { SpaceReport, QuotaInfo } from './space-schemas.js';
import type { ExportService } from './export-schemas.js';
import type { MachineService } from './machine-schemas.js';
import type { SnapshotService } from './snapshot-schemas.js';
import type { TransferService } from './transfer-service.js';
import type { VdiskService } from './vdisk-schemas.js';

export interface ContainerOptions {
  /** Permission bits of the container's directory. */
  readonly mode: number;
}

export interface FillOptions {
  /** The limit; null: none. */
  readonly rateBytesPerSecond: number | null;
  /** Of a fill: at its end the disk drops its backing reference. */
  readonly flatten?: boolean;
}

export interface FillResumeOptions {
  /** The new limit; null: none from now on; undefined: as before. */
  readonly rateBytesPerSecond: number | null | undefined;
}

export interface RemoveOptions {
  /** Allowed although clones read from it: its sealed layers stay for as long as they need them. */
  readonly keepData: boolean;
  /** A container or directory that is not empty goes with all that is in it. */
  readonly recursive: boolean;
}

export interface ControlService {
  readonly snapshots: SnapshotService;
  readonly machines: MachineService;
  readonly exports: ExportService;
  readonly vdisks: VdiskService;
  status(): DaemonStatus;
  metrics(): Promise<readonly MetricInfo[]>;
  /** The same in the text format of Prometheus. */
  metricsText(): Promise<string>;
  /** Resolves when the mount is gone; the processes end after the answer was sent. `in-use` when the mount is busy and `force` was not given. */
  stop(options: { readonly force: boolean }): Promise<void>;
  /** Resolves with the upgrade's number when the new build is loaded and fits; this server then hands over. Nothing has changed when it throws. */
  upgrade(serverEntry: string): Promise<number>;
  createContainer(name: string, options: ContainerOptions): ContainerInfo | Promise<ContainerInfo>;
  listContainers(): readonly ContainerInfo[];
  /** What lies directly in a container or directory, ordered by path; the containers for null; a disk or file gives itself. */
  list(path: string | null): readonly NodeInfo[] | Promise<readonly NodeInfo[]>;
  show(path: string): DiskInfo;
  startImport(request: ImportRequest): JobInfo;
  job(id: number): JobInfo;
  /** All that are remembered, oldest first; null: in any state. */
  jobs(state: JobState | null): readonly JobInfo[];
  /** Resolves when nothing of the job is left running. A job that has ended is answered as it is. */
  cancelJob(id: number): Promise<JobInfo>;
  clone(request: CloneRequest): Promise<CloneResult>;
  cloneRanges(request: CloneRangesRequest): Promise<CloneRangesResult>;
  fillStart(path: string, options: FillOptions): FillInfo;
  fillPause(path: string): FillInfo;
  fillResume(path: string, options: FillResumeOptions): FillInfo;
  /** `not-found` when the disk was never filled. */
  fillStatus(path: string): FillInfo;
  remove(path: string, options: RemoveOptions): RemoveResult | Promise<RemoveResult>;
  resize(path: string, sizeBytes: number): Promise<DiskInfo>;
  /** Null: all of the store. */
  df(target: string | null): Promise<SpaceReport>;
  quotaSet(container: string, limitBytes: number): QuotaInfo;
  /** What it was; `not-found` when there was none. */
  quotaRemove(container: string): QuotaInfo;
  quotaList(): readonly QuotaInfo[];
  /** `invalid-argument` for what is no clone, or whose source is gone. */
  promote(path: string): PromoteResult;
  /** `conflict`, with the extents, when the clone has written where the images differ: nothing has changed then. `in-use` while it is open. */
  rebase(request: RebaseRequest): Promise<RebaseResult>;
  /** `busy` while another check runs. */
  checkStart(request: CheckRequest): CheckInfo;
  /** `not-found` when this server did not begin it, or began another one since. */
  checkStatus(id: number): CheckInfo;
  /** Resolves when nothing of it is left running. */
  checkCancel(id: number): Promise<CheckInfo>;
  scrubStatus(): ScrubInfo;
  scrubStart(options: FillOptions): ScrubInfo;
  scrubPause(): ScrubInfo;
  scrubResume(options: FillResumeOptions): ScrubInfo;
  /** Sending, receiving, exporting, comparing. */
  readonly transfers: TransferService;
}
