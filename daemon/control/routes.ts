/**
 * The control API as a table: one row per operation, with what it takes, what it gives, and the one call of the service
 * that it stands for. The HTTP application registers the rows, the OpenAPI document lists them, API.md explains them.
 *
 * A row checks what the schema cannot say (the text of paths, targets given twice) and fills in defaults. It neither
 * knows HTTP nor decides anything.
 */
import { Type } from '@sinclair/typebox';
import { OffshootError } from '../../blockstore/errors.js';
import { exportRoutes } from './export-routes.js';
import { machineRoutes } from './machine-routes.js';
import { checkContainerName, checkPathInContainer, checkStorePath } from './paths.js';
import { refuseTwice, route, type Route } from './route.js';
import { PromoteResult, RebaseBody, RebaseResult } from './independence-schemas.js';
import {
  CheckBody, CheckInfo, CloneBody, CloneRangesBody, CloneRangesResult, CloneResult, ContainerInfo, CreateContainerBody, DaemonStatus, DiskInfo, EmptyBody, FillInfo,
  FillResumeBody, FillStartBody, ImportBody, JobInfo, JobParams, JobsQuery, MetricInfo, NodeInfo, OptionalPathQuery, PathBody, PathQuery,
  RemoveQuery, RemoveResult, ResizeBody, ScrubInfo, ScrubStartBody, StopBody, StopResult, UpgradeBody, UpgradeStarted, refTo,
} from './schemas.js';
import { vdiskRoutes } from './vdisk-routes.js';
import { SpaceReport, QuotaInfo, QuotaBody, QuotaQuery, OptionalTargetQuery } from './space-schemas.js';
import {
  SnapshotCreateBody, SnapshotInfo, SnapshotListQuery, SnapshotRemoveQuery, SnapshotRemoveResult, SnapshotRevertBody, SnapshotRevertResult,
} from './snapshot-schemas.js';
import { Dropped, ExtentPage, ExtentsQuery, InstantBody, InstantInfo, ReceiveBody, ReceiveInfo, ReceiveRecordsQuery, ReceiveResult, ReferenceQuery, TreeInfo } from './transfer-schemas.js';

function requireBytes(body: unknown): Buffer {
  if (Buffer.isBuffer(body)) return body;
  throw new OffshootError('invalid-argument', 'the body must be records of a stream: send them with content-type: application/octet-stream');
}

export const routes: readonly Route[] = [
  route({
    operationId: 'getStatus', tag: 'daemon', method: 'GET', url: '/v1/status', summary: 'How the daemon is, and what it serves',
    response: refTo(DaemonStatus),
    handle: (service) => service.status(),
  }),
  route({
    operationId: 'getMetrics', tag: 'daemon', method: 'GET', url: '/v1/metrics', summary: 'The figures of the daemon',
    response: Type.Array(refTo(MetricInfo)),
    handle: (service) => service.metrics(),
  }),
  route({
    operationId: 'stop', tag: 'daemon', method: 'POST', url: '/v1/stop', summary: 'Unmount and end the daemon', status: 202,
    body: StopBody, response: refTo(StopResult),
    handle: async (service, { body }) => {
      const { holderPid } = service.status();
      await service.stop({ force: body.force ?? false });
      return { stopping: true, holderPid } as const;
    },
  }),
  route({
    operationId: 'upgrade', tag: 'daemon', method: 'POST', url: '/v1/upgrade', summary: "Let another build's server take over the mount", status: 202,
    body: UpgradeBody, response: refTo(UpgradeStarted),
    handle: async (service, { body }) => {
      const { serverPid } = service.status();
      return { upgradeId: await service.upgrade(body.serverEntry), serverPid };
    },
  }),
  route({
    operationId: 'listContainers', tag: 'containers', method: 'GET', url: '/v1/containers', summary: 'All containers',
    response: Type.Array(refTo(ContainerInfo)),
    handle: (service) => service.listContainers(),
  }),
  route({
    operationId: 'createContainer', tag: 'containers', method: 'POST', url: '/v1/containers', summary: 'Make an empty container', status: 201,
    body: CreateContainerBody, response: refTo(ContainerInfo),
    handle: (service, { body }) => service.createContainer(checkContainerName(body.name), { mode: body.mode ?? 0o755 }),
  }),
  route({
    operationId: 'list', tag: 'nodes', method: 'GET', url: '/v1/nodes', summary: 'What lies in a container or directory; without a path, the containers',
    query: OptionalPathQuery, response: Type.Array(refTo(NodeInfo)),
    handle: (service, { query }) => service.list(query.path === undefined ? null : checkStorePath(query.path)),
  }),
  route({
    operationId: 'remove', tag: 'nodes', method: 'DELETE', url: '/v1/nodes', summary: 'Remove a disk, a file, a directory or a container',
    query: RemoveQuery, response: refTo(RemoveResult),
    handle: (service, { query }) => service.remove(checkStorePath(query.path), {
      keepData: query.keepData === 'true', recursive: query.recursive === 'true',
    }),
  }),
  route({
    operationId: 'show', tag: 'disks', method: 'GET', url: '/v1/disks', summary: 'All about one disk or file',
    query: PathQuery, response: refTo(DiskInfo),
    handle: (service, { query }) => service.show(checkStorePath(query.path)),
  }),
  route({
    operationId: 'resize', tag: 'disks', method: 'POST', url: '/v1/disks/resize', summary: 'Give a disk another virtual size',
    body: ResizeBody, response: refTo(DiskInfo),
    handle: (service, { body }) => service.resize(checkPathInContainer(body.path), body.sizeBytes),
  }),
  route({
    operationId: 'promote', tag: 'disks', method: 'POST', url: '/v1/disks/promote', summary: 'Make a clone the source of what it was cloned from',
    body: PathBody, response: refTo(PromoteResult),
    handle: (service, { body }) => service.promote(checkPathInContainer(body.path)),
  }),
  route({
    operationId: 'rebase', tag: 'disks', method: 'POST', url: '/v1/disks/rebase', summary: 'Put a closed clone on a newer version of its image',
    body: RebaseBody, response: refTo(RebaseResult),
    handle: (service, { body }) => service.rebase({ path: checkPathInContainer(body.path), image: checkPathInContainer(body.image), force: body.force ?? false }),
  }),
  route({
    operationId: 'startImport', tag: 'jobs', method: 'POST', url: '/v1/imports', summary: 'Begin to import a file as a disk', status: 202,
    body: ImportBody, response: refTo(JobInfo),
    handle: (service, { body }) => service.startImport({
      file: body.file, target: checkPathInContainer(body.target), inPlace: body.inPlace ?? false, format: body.format ?? null,
    }),
  }),
  route({
    operationId: 'listJobs', tag: 'jobs', method: 'GET', url: '/v1/jobs', summary: 'The jobs that are remembered, oldest first',
    query: JobsQuery, response: Type.Array(refTo(JobInfo)),
    handle: (service, { query }) => service.jobs(query.state ?? null),
  }),
  route({
    operationId: 'getJob', tag: 'jobs', method: 'GET', url: '/v1/jobs/:id', summary: 'How far a job is',
    params: JobParams, response: refTo(JobInfo),
    handle: (service, { params }) => service.job(Number(params.id)),
  }),
  route({
    operationId: 'cancelJob', tag: 'jobs', method: 'POST', url: '/v1/jobs/:id/cancel', summary: 'Cancel a job; answers when nothing of it is left running',
    params: JobParams, response: refTo(JobInfo),
    handle: (service, { params }) => service.cancelJob(Number(params.id)),
  }),
  route({
    operationId: 'clone', tag: 'disks', method: 'POST', url: '/v1/clones', summary: 'Clone a disk any number of times, in one transaction', status: 201,
    body: CloneBody, response: refTo(CloneResult),
    handle: (service, { body }) => {
      checkStorePath(body.source);
      for (const target of body.targets) checkStorePath(target);
      refuseTwice(body.targets);
      return service.clone({ source: body.source, targets: body.targets, fill: body.fill ?? false, copyOnRead: body.copyOnRead ?? false });
    },
  }),
  route({
    operationId: 'listSnapshots', tag: 'snapshots', method: 'GET', url: '/v1/snapshots', summary: 'The snapshots of a container, or all',
    query: SnapshotListQuery, response: Type.Array(refTo(SnapshotInfo)),
    handle: (service, { query }) => service.snapshots.list(query.container === undefined ? null : checkContainerName(query.container)),
  }),
  route({
    operationId: 'createSnapshot', tag: 'snapshots', method: 'POST', url: '/v1/snapshots', summary: 'Take a snapshot of a container, or of one disk or file, at one instant', status: 201,
    body: SnapshotCreateBody, response: refTo(SnapshotInfo),
    handle: (service, { body }, caller) => {
      const quiesce = body.quiesce ?? null;
      if (quiesce !== null && !caller.isRoot) {
        throw new OffshootError('permission-denied', 'only root may give a quiesce command, which is run as root: leave it out, or ask root');
      }
      return service.snapshots.create({
        reference: checkStorePath(body.reference), quiesce: quiesce === null ? null : { command: quiesce.command, timeoutMs: quiesce.timeoutSeconds * 1000 },
      });
    },
  }),
  route({
    operationId: 'removeSnapshot', tag: 'snapshots', method: 'DELETE', url: '/v1/snapshots', summary: 'Remove a snapshot',
    query: SnapshotRemoveQuery, response: refTo(SnapshotRemoveResult),
    handle: (service, { query }) => service.snapshots.remove(checkStorePath(query.reference), { keepData: query.keepData === 'true' }),
  }),
  route({
    operationId: 'revertSnapshot', tag: 'snapshots', method: 'POST', url: '/v1/snapshots/revert', summary: 'Go back to a snapshot: what came since is lost',
    body: SnapshotRevertBody, response: refTo(SnapshotRevertResult),
    handle: (service, { body }) => service.snapshots.revert(checkStorePath(body.reference)),
  }),
  route({
    operationId: 'cloneRanges', tag: 'disks', method: 'POST', url: '/v1/clone-ranges', summary: 'Clone ranges of a disk into another, in one transaction',
    body: CloneRangesBody, response: refTo(CloneRangesResult),
    handle: (service, { body }) => {
      checkPathInContainer(body.source);
      checkPathInContainer(body.target);
      return service.cloneRanges({ source: body.source, target: body.target, ranges: body.ranges, sizeBytes: body.sizeBytes ?? null });
    },
  }),
  route({
    operationId: 'getFill', tag: 'fills', method: 'GET', url: '/v1/fills', summary: 'How far the fill of a clone is',
    query: PathQuery, response: refTo(FillInfo),
    handle: (service, { query }) => service.fillStatus(checkPathInContainer(query.path)),
  }),
  route({
    operationId: 'startFill', tag: 'fills', method: 'POST', url: '/v1/fills', summary: 'Begin to fill a clone', status: 202,
    body: FillStartBody, response: refTo(FillInfo),
    handle: (service, { body }) => service.fillStart(checkPathInContainer(body.path), { rateBytesPerSecond: body.rateBytesPerSecond ?? null, flatten: body.flatten ?? false }),
  }),
  route({
    operationId: 'pauseFill', tag: 'fills', method: 'POST', url: '/v1/fills/pause', summary: 'Pause a fill',
    body: PathBody, response: refTo(FillInfo),
    handle: (service, { body }) => service.fillPause(checkPathInContainer(body.path)),
  }),
  route({
    operationId: 'resumeFill', tag: 'fills', method: 'POST', url: '/v1/fills/resume', summary: 'Go on with a paused fill, perhaps at another rate',
    body: FillResumeBody, response: refTo(FillInfo),
    handle: (service, { body }) => service.fillResume(checkPathInContainer(body.path), { rateBytesPerSecond: body.rateBytesPerSecond }),
  }),
  route({
    operationId: 'getSpace', tag: 'space', method: 'GET', url: '/v1/space', summary: 'What disks, snapshots and containers take, and what would be freed with each',
    query: OptionalTargetQuery, response: refTo(SpaceReport),
    handle: (service, { query }) => service.df(query.target === undefined ? null : checkStorePath(query.target)),
  }),
  route({
    operationId: 'listQuotas', tag: 'space', method: 'GET', url: '/v1/quotas', summary: 'The containers that have a limit',
    response: Type.Array(refTo(QuotaInfo)),
    handle: (service) => service.quotaList(),
  }),
  route({
    operationId: 'setQuota', tag: 'space', method: 'POST', url: '/v1/quotas', summary: 'Give a container a limit, or another one',
    body: QuotaBody, response: refTo(QuotaInfo),
    handle: (service, { body }) => service.quotaSet(checkContainerName(body.container), body.limitBytes),
  }),
  route({
    operationId: 'removeQuota', tag: 'space', method: 'DELETE', url: '/v1/quotas', summary: "Take a container's limit away",
    query: QuotaQuery, response: refTo(QuotaInfo),
    handle: (service, { query }) => service.quotaRemove(checkContainerName(query.container)),
  }),
  route({
    operationId: 'startCheck', tag: 'checks', method: 'POST', url: '/v1/checks', summary: 'Begin to check the store; one check at a time', status: 202,
    body: CheckBody, response: refTo(CheckInfo),
    handle: (service, { body }) => service.checkStart({
      target: body.target === undefined || body.target === null ? null : checkStorePath(body.target), data: body.data ?? false, repair: body.repair ?? false,
    }),
  }),
  route({
    operationId: 'getCheck', tag: 'checks', method: 'GET', url: '/v1/checks/:id', summary: 'How far a check is, and what it found',
    params: JobParams, response: refTo(CheckInfo),
    handle: (service, { params }) => service.checkStatus(Number(params.id)),
  }),
  route({
    operationId: 'cancelCheck', tag: 'checks', method: 'POST', url: '/v1/checks/:id/cancel', summary: 'End a check; answers when nothing of it is left running',
    params: JobParams, response: refTo(CheckInfo),
    handle: (service, { params }) => service.checkCancel(Number(params.id)),
  }),
  route({
    operationId: 'getScrub', tag: 'checks', method: 'GET', url: '/v1/scrub', summary: 'How the scrub is',
    response: refTo(ScrubInfo),
    handle: (service) => service.scrubStatus(),
  }),
  route({
    operationId: 'startScrub', tag: 'checks', method: 'POST', url: '/v1/scrub', summary: 'Begin a scrub, or give the one under way another rate', status: 202,
    body: ScrubStartBody, response: refTo(ScrubInfo),
    handle: (service, { body }) => service.scrubStart({ rateBytesPerSecond: body.rateBytesPerSecond ?? null }),
  }),
  route({
    operationId: 'pauseScrub', tag: 'checks', method: 'POST', url: '/v1/scrub/pause', summary: 'Pause the scrub',
    body: EmptyBody, response: refTo(ScrubInfo),
    handle: (service) => service.scrubPause(),
  }),
  route({
    operationId: 'resumeScrub', tag: 'checks', method: 'POST', url: '/v1/scrub/resume', summary: 'Go on with a paused scrub, perhaps at another rate',
    body: ScrubStartBody, response: refTo(ScrubInfo),
    handle: (service, { body }) => service.scrubResume({ rateBytesPerSecond: body.rateBytesPerSecond }),
  }),
  route({
    operationId: 'getTree', tag: 'transfers', method: 'GET', url: '/v1/trees', summary: 'What a container, disk or snapshot consists of',
    query: ReferenceQuery, response: refTo(TreeInfo),
    handle: (service, { query }) => service.transfers.tree(query.reference),
  }),
  route({
    operationId: 'getExtents', tag: 'transfers', method: 'GET', url: '/v1/extents', summary: 'What differs between two states of a disk, or all data of one',
    query: ExtentsQuery, response: refTo(ExtentPage),
    handle: (service, { query }) => service.transfers.extents(query.reference, query.base ?? null, Number(query.offsetBytes ?? 0)),
  }),
  route({
    operationId: 'makeInstant', tag: 'transfers', method: 'POST', url: '/v1/instants', summary: 'A clone for a reader who opens it at once', status: 201,
    body: InstantBody, response: refTo(InstantInfo),
    handle: (service, { body }) => service.transfers.instant(body.reference),
  }),
  route({
    operationId: 'releaseInstant', tag: 'transfers', method: 'POST', url: '/v1/instants/release', summary: 'Take its name away; who has it open keeps it',
    body: PathBody, response: Dropped,
    handle: (service, { body }) => service.transfers.releaseInstant(checkPathInContainer(body.path)),
  }),
  route({
    operationId: 'listReceives', tag: 'transfers', method: 'GET', url: '/v1/receives', summary: 'Streams that are being received, or were interrupted',
    response: Type.Array(refTo(ReceiveInfo)),
    handle: (service) => service.transfers.receives(),
  }),
  route({
    operationId: 'beginReceive', tag: 'transfers', method: 'POST', url: '/v1/receives', summary: 'Begin to receive a stream, or go on with one', status: 202,
    body: ReceiveBody, response: refTo(ReceiveInfo),
    handle: (service, { body }) => service.transfers.receiveBegin(checkStorePath(body.target), body.header),
  }),
  route({
    operationId: 'getReceive', tag: 'transfers', method: 'GET', url: '/v1/receives/:id', summary: 'How far a receive is',
    params: JobParams, response: refTo(ReceiveInfo),
    handle: (service, { params }) => service.transfers.receive(Number(params.id)),
  }),
  route({
    operationId: 'addRecords', tag: 'transfers', method: 'POST', url: '/v1/receives/:id/records', summary: 'Hand over whole records of the stream', takesBytes: true,
    query: ReceiveRecordsQuery, params: JobParams, response: refTo(ReceiveInfo),
    handle: (service, { query, params, body }) => service.transfers.receiveRecords(Number(params.id), Number(query.first), requireBytes(body)),
  }),
  route({
    operationId: 'pauseReceive', tag: 'transfers', method: 'POST', url: '/v1/receives/:id/pause', summary: 'Keep what came, durably, for somebody to go on with',
    params: JobParams, response: refTo(ReceiveInfo),
    handle: (service, { params }) => service.transfers.receivePause(Number(params.id)),
  }),
  route({
    operationId: 'finishReceive', tag: 'transfers', method: 'POST', url: '/v1/receives/:id/finish', summary: 'Let what was received appear under its name',
    params: JobParams, response: refTo(ReceiveResult),
    handle: (service, { params }) => service.transfers.receiveFinish(Number(params.id)),
  }),
  route({
    operationId: 'abortReceive', tag: 'transfers', method: 'POST', url: '/v1/receives/:id/abort', summary: 'Drop what was received so far',
    params: JobParams, response: Dropped,
    handle: (service, { params }) => service.transfers.receiveAbort(Number(params.id)),
  }),
  ...machineRoutes,
  ...exportRoutes,
  ...vdiskRoutes,
];
