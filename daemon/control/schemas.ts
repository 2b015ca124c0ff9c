/**
 * The shapes that travel over the control socket, and that `--json` prints: one definition for the validator, the
 * serialiser, the OpenAPI document and the compiler.
 *
 * Sizes are whole bytes, times are ISO 8601 in UTC with milliseconds, absent values are null and never left out of an
 * answer. Requests refuse unknown fields. A field is only ever added; a change of meaning gets a new name. Runs on the
 * main thread of the server; the command line imports types only.
 */
import { Type, type Static, type TSchema, type TUnsafe } from '@sinclair/typebox';
import { httpStatusOf, type ErrorContext, type ErrorKind } from '../../blockstore/errors.js';
import {
  CLONE_RANGES_MAX, CLONE_TARGETS_MAX, DISK_SIZE_BYTES_MAX, DISK_SIZE_UNIT_BYTES, IMPORT_FORMATS, PATH_BYTES_MAX, TRANSPORTS, WORKERS_MAX,
} from './limits.js';

/** Every schema that the OpenAPI document names. */
export const namedSchemas: TSchema[] = [];

export function named<T extends TSchema>(schema: T): T {
  namedSchemas.push(schema);
  return schema;
}

/** A reference to a named schema, with its type. */
export function refTo<T extends TSchema>(schema: T): TUnsafe<Static<T>> {
  return Type.Unsafe<Static<T>>({ $ref: `${schema.$id ?? ''}#` });
}

export function oneOf<const T extends readonly string[]>(values: T, description: string): TUnsafe<T[number]> {
  return Type.Unsafe<T[number]>({ type: 'string', enum: [...values], description });
}

export function nullable<T extends TSchema>(schema: T): TUnsafe<Static<T> | null> {
  return Type.Unsafe<Static<T> | null>({ anyOf: [schema, { type: 'null' }] });
}

export const bytes = (description: string) => Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER, description });
export const count = (description: string) => Type.Integer({ minimum: 0, description });
export const time = (description: string) => Type.String({ format: 'date-time', description: `${description}, ISO 8601 in UTC` });
export const path = (description: string) => Type.String({ minLength: 1, maxLength: PATH_BYTES_MAX, description });
export const exact = { additionalProperties: false } as const;

export const NODE_KINDS = ['directory', 'file', 'disk', 'symlink'] as const;
const LAYER_KINDS = ['store', 'external'] as const;
const SPACE_LEVELS = ['ok', 'low', 'critical', 'full'] as const;
const JOB_STATES = ['running', 'paused', 'completed', 'failed', 'cancelled'] as const;
const errorKinds = Object.keys(httpStatusOf) as ErrorKind[];

const jobState = oneOf(JOB_STATES, 'completed, failed and cancelled are final');

/* ---- errors ---- */

export const ErrorInfo = named(Type.Object({
  kind: oneOf(errorKinds, 'what went wrong: small, stable, matchable'),
  message: Type.String({ description: 'what was wrong and what to do, for people' }),
}, { $id: 'ErrorInfo', description: 'Why a job failed.' }));

export const ErrorResponse = named(Type.Object({
  error: Type.Object({
    kind: oneOf(errorKinds, 'what went wrong: small, stable, matchable'),
    message: Type.String({ description: 'what was wrong and what to do, for people' }),
    context: Type.Record(Type.String(), Type.Unsafe<ErrorContext[string]>({}),
      { description: 'paths, offsets, numbers that belong to the error; for a conflict the extents concerned, at most 1000' }),
  }),
}, { $id: 'ErrorResponse', description: 'Any answer whose status is not 2xx.' }));

/* ---- check and scrub ---- */

export const ScrubInfo = named(Type.Object({
  state: nullable(jobState),
  doneBytes: bytes('sizes of the sealed layers that were passed; holes cost nothing'),
  totalBytes: bytes('sizes of the sealed layers when it was started'),
  rateBytesPerSecond: nullable(Type.Integer({ minimum: 1, description: 'the limit; null: none' })),
  startedAt: nullable(time('when the latest scrub was started')),
  lastCompletedAt: nullable(time('when a scrub last came to its end')),
  damagedExtents: count('extents of sealed layers that are known to be damaged or unreadable'),
  layersWithoutChecksums: count('sealed layers that were not hashed yet'),
  message: nullable(Type.String({ description: 'how the latest one ended' })),
}, { $id: 'ScrubInfo', description: 'The scrub; a state of null: there was never one.' }));

export const CheckFinding = named(Type.Object({
  kind: Type.String({ description: 'what it is, small and stable: FORMAT.md lists the kinds' }),
  severity: oneOf(['leak', 'corruption'], 'leak: space wasted; corruption: content lost or wrong'),
  message: Type.String({ description: 'what is wrong and what to do, for people' }),
  layerId: nullable(Type.Integer()),
  nodeId: nullable(Type.Integer()),
  file: nullable(Type.String()),
  offsetBytes: nullable(bytes('where in the file')),
  lengthBytes: nullable(bytes('how much of it')),
  disks: Type.Array(Type.String(), { description: 'what stands on it: paths, at most 1000' }),
  repaired: Type.Boolean({ description: 'the leak was taken away' }),
}, { $id: 'CheckFinding' }));

const pathWithReason = Type.Object({ path: Type.String(), reason: Type.String() });

export const CheckResult = named(Type.Object({
  verdict: oneOf(['clean', 'leaks', 'corruption'], 'of what is left after a repair'),
  findings: Type.Array(refTo(CheckFinding)),
  faulted: Type.Array(pathWithReason, { description: 'disks that take no more writes' }),
  lifted: Type.Array(Type.Object({ path: Type.String(), lostBytes: bytes('what the page cache had and the disk had not') }), { description: 'disks whose fault was lifted' }),
  notLifted: Type.Array(pathWithReason, { description: 'disks whose fault was to be lifted, and was not' }),
  layersChecked: count('sealed layers whose content was read'),
  layersWithoutChecksums: count('of these, those that there was nothing to compare with'),
  bytesRead: bytes('content that was read'),
}, { $id: 'CheckResult' }));

export const CheckInfo = named(Type.Object({
  checkId: Type.Integer({ minimum: 1 }),
  state: oneOf(['running', 'completed', 'cancelled', 'failed'], 'failed: it could not be completed'),
  target: nullable(Type.String()),
  data: Type.Boolean(),
  repair: Type.Boolean(),
  phase: oneOf(['database', 'metadata', 'data', 'faults'], 'what is being looked at'),
  doneBytes: bytes('of the phase; 0 of 0 where there are no bytes to count'),
  totalBytes: bytes('of the phase'),
  result: nullable(refTo(CheckResult)),
  error: nullable(refTo(ErrorInfo)),
  startedAt: time('when it was started'),
  endedAt: nullable(time('when it ended')),
}, { $id: 'CheckInfo' }));

export const CheckBody = Type.Object({
  target: Type.Optional(nullable(path('CONTAINER or CONTAINER/PATH whose content and faults are concerned; null: all content, and no fault'))),
  data: Type.Optional(Type.Boolean({ default: false, description: 'read the content of sealed layers and compare it with its checksums' })),
  repair: Type.Optional(Type.Boolean({ default: false, description: 'take leaks away; lift the faults of what the target names' })),
}, exact);

export const ScrubStartBody = Type.Object({
  rateBytesPerSecond: Type.Optional(nullable(Type.Integer({ minimum: 1, maximum: Number.MAX_SAFE_INTEGER, description: 'limit; null: none; left out: as before, or none' }))),
}, exact);
export const EmptyBody = Type.Object({}, exact);

/* ---- the daemon ---- */

export const UpgradeInfo = named(Type.Object({
  id: Type.Integer({ minimum: 1, description: 'counted from the start of the holder' }),
  state: oneOf(['running', 'done', 'rolled-back'], 'rolled-back: the new build did not become ready, and the old one serves again'),
  fromVersion: Type.String(),
  toVersion: Type.String(),
  fromServerPid: Type.Integer(),
  serverPid: nullable(Type.Integer({ description: 'the server that serves since; null while it runs' })),
  stallMs: nullable(Type.Number({ minimum: 0, description: 'how long guests waited' })),
  error: nullable(refTo(ErrorInfo)),
  at: time('when it began'),
}, { $id: 'UpgradeInfo' }));

export const UpgradeBody = Type.Object({
  serverEntry: Type.String({ minLength: 2, maxLength: PATH_BYTES_MAX, pattern: '^/', description: "absolute path of the new build's server, dist/daemon/server/main.js" }),
}, exact);

export const UpgradeStarted = named(Type.Object({
  upgradeId: Type.Integer({ minimum: 1, description: "the status's `upgrade` with this id says how it went" }),
  serverPid: Type.Integer({ description: 'the server that hands over' }),
}, { $id: 'UpgradeStarted', description: 'The new build is loaded and fits; the old server hands over after this answer.' }));

export const DaemonStatus = named(Type.Object({
  version: Type.String({ description: 'of the build that serves' }),
  holderVersion: Type.String({ description: 'of the build that holds the mount: an upgrade does not change it, only a stop and a start' }),
  serverPid: Type.Integer({ description: 'the process that serves; changes when it is restarted' }),
  holderPid: Type.Integer({ description: 'the process that holds the mount; signals go to this one' }),
  sparePid: nullable(Type.Integer({ description: 'the next server, loaded and waiting; null while there is none' })),
  restarts: count('times that the server was restarted under this mount'),
  lastStallMs: nullable(Type.Number({ minimum: 0, description: 'how long guests waited during the last restart; null without one' })),
  upgrade: nullable(refTo(UpgradeInfo)),
  startedAt: time('when this server started to serve'),
  storeDir: Type.String(),
  mountDir: Type.String(),
  socketPath: Type.String(),
  transport: oneOf(TRANSPORTS, 'how the mount is served'),
  workers: Type.Integer({ minimum: 0, maximum: WORKERS_MAX, description: 'I/O worker threads; 0 with a transport that has none' }),
  sqliteVersion: Type.String(),
  nodeVersion: Type.String(),
  disksOpen: count('disks and files that somebody has open'),
  disksTotal: count('disks in the store; those in snapshots are not counted'),
  snapshotsTotal: count('snapshots in the store'),
  containersTotal: count('containers in the store'),
  layersTotal: count('layers in the store'),
  storeBytesTotal: bytes('size of the file system that holds the store'),
  storeBytesFree: bytes('what is free there'),
  storeBytesReserved: bytes('kept back there for metadata; 0 while that is given up'),
  merge: nullable(Type.Object({
    jobId: Type.Integer({ minimum: 1 }),
    path: Type.String({ description: 'a disk whose backing chain is made shorter' }),
    doneBytes: bytes('copied'),
    totalBytes: bytes('to be copied at most'),
  }, { description: 'the merge of sealed layers that runs now; null: none' })),
  spaceLevel: oneOf(SPACE_LEVELS, 'room in the store; full: writes that need room get ENOSPC'),
  virtualBytesTotal: bytes('virtual sizes of all disks and files together, snapshots left out; more than storeBytesTotal: they cannot all be written in full'),
  scrub: refTo(ScrubInfo),
  warnings: Type.Array(Type.String(), { description: 'what an administrator should look at; empty when all is well' }),
}, { $id: 'DaemonStatus' }));

export const MetricInfo = named(Type.Object({
  name: Type.String(),
  help: Type.String(),
  type: Type.String({ description: 'counter, gauge, histogram' }),
  values: Type.Array(Type.Object({
    name: Type.String({ description: 'of the series: a histogram has several' }),
    labels: Type.Record(Type.String(), Type.String()),
    value: Type.Number(),
  }), { description: 'empty: not known' }),
}, { $id: 'MetricInfo', description: 'A figure of the daemon; GET /metrics has the same as text.' }));

export const StopBody = Type.Object({
  force: Type.Optional(Type.Boolean({ default: false, description: 'unmount although files are open: whoever has them open gets I/O errors' })),
}, exact);

export const StopResult = named(Type.Object({
  stopping: Type.Literal(true),
  holderPid: Type.Integer({ description: 'the daemon has ended when this process is gone' }),
}, { $id: 'StopResult', description: 'Unmounted; the processes end after this answer.' }));

/* ---- containers and nodes ---- */

export const CreateContainerBody = Type.Object({
  name: Type.String({ minLength: 1, maxLength: PATH_BYTES_MAX }),
  mode: Type.Optional(Type.Integer({ minimum: 0, maximum: 0o7777, default: 0o755, description: 'permission bits, as a decimal number' })),
}, exact);

export const ContainerInfo = named(Type.Object({
  name: Type.String(),
  disks: count('disks in it, at any depth; those in snapshots are not counted'),
  files: count('other files in it, at any depth; those in snapshots are not counted'),
  snapshots: count('snapshots of it, and of disks and files in it'),
  sizeBytes: bytes('virtual sizes of its disks and files together'),
  allocatedBytes: bytes('what their layers and those of its snapshots take in the store, shared ones once'),
  createdAt: time('when it was made'),
}, { $id: 'ContainerInfo' }));

export const NodeInfo = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/PATH' }),
  kind: oneOf(NODE_KINDS, 'disk: made by import or clone; file: made under the mount'),
  sizeBytes: bytes('virtual size'),
  ownedBytes: bytes('bytes of blocks that its active layer owns'),
  mode: Type.Integer({ description: 'permission bits, as a decimal number' }),
  uid: Type.Integer(),
  gid: Type.Integer(),
  modifiedAt: time('last change of its content'),
  openCount: count('opens that were not closed yet'),
  fillState: nullable(jobState),
}, { $id: 'NodeInfo' }));

export const FillInfo = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/PATH of the clone that is filled' }),
  jobId: Type.Integer({ minimum: 1 }),
  state: jobState,
  doneBytes: bytes('source data that the clone owns by now; holes are not counted'),
  totalBytes: bytes('source data that it has to own in the end; 0: none. Where the source is too fragmented to say, both are bytes of the disk'),
  rateBytesPerSecond: nullable(Type.Integer({ minimum: 1, description: 'the limit; null: none' })),
  currentBytesPerSecond: Type.Number({ minimum: 0, description: 'bytes copied per second just now; holes cost nothing and are not in it' }),
  startedAt: time('when it was first started'),
  updatedAt: time('last progress'),
  message: nullable(Type.String({ description: 'why it failed, what it waits for, or what is worth knowing' })),
  flatten: Type.Boolean({ description: 'at its end the disk drops its backing reference' }),
}, { $id: 'FillInfo' }));

export const LayerInfo = named(Type.Object({
  layerId: Type.Integer({ minimum: 1 }),
  kind: oneOf(LAYER_KINDS, 'store: a file of the store; external: a file used where it lies'),
  path: nullable(Type.String({ description: 'the file of an external layer' })),
  sizeBytes: bytes('virtual size'),
  sealed: Type.Boolean({ description: 'never written again' }),
  complete: Type.Boolean({ description: 'owns every block: nothing below it is read' }),
  writtenBy: nullable(Type.String({ description: 'the disk or file that wrote it; null when that is gone' })),
}, { $id: 'LayerInfo' }));

export const SharedInfo = named(Type.Object({
  layerId: Type.Integer({ minimum: 1, description: 'the sealed layer that owns the blocks' }),
  kind: oneOf(LAYER_KINDS, 'store: a file of the store; external: a file used where it lies'),
  path: nullable(Type.String({ description: 'the file of an external layer' })),
  disk: nullable(Type.String({ description: 'CONTAINER/PATH of the disk that wrote them; null: it is gone' })),
  bytes: bytes('what this disk shares with it'),
}, { $id: 'SharedInfo' }));

export const DiskInfo = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/PATH' }),
  nodeId: Type.Integer({ minimum: 1, description: 'its inode number under the mount; never used again' }),
  kind: oneOf(NODE_KINDS, 'disk: made by import or clone; file: made under the mount'),
  sizeBytes: bytes('virtual size'),
  ownedBytes: bytes('bytes of blocks that its active layer owns'),
  unownedBytes: bytes('bytes of blocks that are read from the source'),
  unownedDataBytes: nullable(bytes('of the un-owned bytes, those that are not holes of the source; null: not known')),
  allocatedBytes: bytes('what its active layer takes in the store'),
  backingChain: Type.Array(refTo(LayerInfo), { description: 'the active layer first' }),
  cloneOf: nullable(Type.String({ description: 'what it was cloned from, and still reads from; null: nothing, or it is gone' })),
  sharedWith: Type.Array(refTo(SharedInfo), { description: 'whose blocks it has by range clones and copies, apart from its backing chain' }),
  copyOnRead: Type.Boolean(),
  fill: nullable(refTo(FillInfo)),
  openCount: count('opens that were not closed yet'),
  transport: oneOf(TRANSPORTS, 'how the mount is served'),
  mountPath: Type.String({ description: 'the absolute path under the mount' }),
  fault: nullable(Type.String({ description: 'what is wrong with it: why writes are refused, or why its source cannot be read; null: all is well' })),
  createdAt: time('when it was made'),
  modifiedAt: time('last change of its content'),
  mode: Type.Integer({ description: 'permission bits, as a decimal number' }),
  uid: Type.Integer(),
  gid: Type.Integer(),
}, { $id: 'DiskInfo' }));

export const PathQuery = Type.Object({ path: path('CONTAINER or CONTAINER/PATH') }, exact);
export const OptionalPathQuery = Type.Object({ path: Type.Optional(path('CONTAINER or CONTAINER/PATH; without one, the containers')) }, exact);
export const PathBody = Type.Object({ path: path('CONTAINER/PATH') }, exact);

export const queryFlag = (description: string) => Type.Optional(Type.Unsafe<'true' | 'false'>({ type: 'string', enum: ['true', 'false'], default: 'false', description }));

export const RemoveQuery = Type.Object({
  path: path('CONTAINER or CONTAINER/PATH'),
  keepData: queryFlag('although clones read from it: its layers stay for as long as they need them'),
  recursive: queryFlag('a container or directory with all that is in it'),
}, exact);

export const RemoveResult = named(Type.Object({
  path: Type.String(),
  nodesRemoved: count('disks, files, symbolic links and directories that are gone'),
  layersRemoved: count('layers that nothing needs any more'),
  layersKept: count('layers that clones still read from'),
  freedBytes: bytes('what the store got back'),
}, { $id: 'RemoveResult' }));

export const ResizeBody = Type.Object({
  path: path('CONTAINER/PATH'),
  sizeBytes: Type.Integer({
    minimum: DISK_SIZE_UNIT_BYTES, maximum: DISK_SIZE_BYTES_MAX, multipleOf: DISK_SIZE_UNIT_BYTES, description: 'new virtual size',
  }),
}, exact);

/* ---- jobs ---- */

export const JobInfo = named(Type.Object({
  id: Type.Integer({ minimum: 1 }),
  kind: Type.String({ description: 'import, fill, clone, scrub, merge' }),
  state: jobState,
  path: nullable(Type.String({ description: 'what it works on; null when that is gone' })),
  progressDoneBytes: bytes('done'),
  progressTotalBytes: bytes('to be done; 0: not known yet'),
  message: nullable(Type.String({ description: 'what is worth knowing, for people' })),
  error: nullable(refTo(ErrorInfo)),
  createdAt: time('when it was started'),
  updatedAt: time('last progress'),
}, { $id: 'JobInfo' }));

export const JobsQuery = Type.Object({ state: Type.Optional(oneOf(JOB_STATES, 'only those in this state')) }, exact);
export const JobParams = Type.Object({ id: Type.String({ pattern: '^[1-9][0-9]{0,14}$', description: 'the id of the job' }) }, exact);

export const ImportBody = Type.Object({
  file: Type.String({ minLength: 1, maxLength: PATH_BYTES_MAX, pattern: '^/', description: 'absolute path of the file to import' }),
  target: path('CONTAINER/PATH of the disk to make'),
  inPlace: Type.Optional(Type.Boolean({ default: false, description: 'use the file where it lies, and never write to it' })),
  format: Type.Optional(nullable(oneOf(IMPORT_FORMATS, 'format of the file; null: raw. A raw file with the signature of another format is refused'))),
}, exact);

export const CloneBody = Type.Object({
  source: path('CONTAINER/PATH of the disk to clone, CONTAINER of all that is in one; with @NAME behind it as in that snapshot'),
  targets: Type.Array(path('CONTAINER/PATH of a clone to make, or CONTAINER'), {
    minItems: 1, maxItems: CLONE_TARGETS_MAX, description: 'all are made in one transaction, or none',
  }),
  fill: Type.Optional(Type.Boolean({ default: false, description: 'start to fill each clone' })),
  copyOnRead: Type.Optional(Type.Boolean({ default: false, description: 'keep in the clone what a read fetched from the source' })),
}, exact);

export const CloneRangesBody = Type.Object({
  source: path('CONTAINER/PATH of the disk that has the blocks'),
  target: path('CONTAINER/PATH of the disk that gets them; it is made if it does not exist'),
  ranges: Type.Array(Type.Object({
    sourceAtBytes: bytes('where the range begins in the source, a multiple of 4096'),
    targetAtBytes: bytes('where it begins in the target, a multiple of 4096'),
    lengthBytes: bytes('a multiple of 4096, unless the range ends where the source ends, and reaches the end of the target'),
  }, exact), { minItems: 1, maxItems: CLONE_RANGES_MAX, description: 'all are cloned in one transaction, or none' }),
  sizeBytes: Type.Optional(nullable(bytes('virtual size of a target that is made; null: the end of its last range'))),
}, exact);

export const CloneRangesResult = named(Type.Object({
  operationId: Type.String({ description: 'what the log calls this operation' }),
  path: Type.String({ description: 'CONTAINER/PATH of the target' }),
  sizeBytes: bytes('virtual size'),
  mountPath: Type.String({ description: 'the absolute path under the mount' }),
  created: Type.Boolean({ description: 'the target was made' }),
  ranges: count('ranges that were cloned'),
  sharedBytes: bytes('their length'),
  durationMs: Type.Number({ minimum: 0, description: 'the time it took in the daemon' }),
}, { $id: 'CloneRangesResult' }));

export const CloneInfo = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/PATH' }),
  sizeBytes: bytes('virtual size; of a container, of all disks and files in it'),
  mountPath: Type.String({ description: 'the absolute path under the mount' }),
}, { $id: 'CloneInfo' }));

export const CloneResult = named(Type.Object({
  operationId: Type.String({ description: 'the id of its job, as text' }),
  clones: Type.Array(refTo(CloneInfo), { description: 'in the order of the request' }),
  durationMs: Type.Number({ minimum: 0, description: 'the time it took in the daemon' }),
}, { $id: 'CloneResult' }));

const rate = nullable(Type.Integer({ minimum: 1, maximum: Number.MAX_SAFE_INTEGER, description: 'limit in bytes per second; null: none' }));

export const FillStartBody = Type.Object({
  path: path('CONTAINER/PATH of the clone'), rateBytesPerSecond: Type.Optional(rate),
  flatten: Type.Optional(Type.Boolean({ default: false, description: 'at the end, drop the backing reference' })),
}, exact);
export const FillResumeBody = Type.Object({
  path: path('CONTAINER/PATH of the clone'),
  rateBytesPerSecond: Type.Optional(nullable(Type.Integer({ minimum: 1, maximum: Number.MAX_SAFE_INTEGER, description: 'left out: as before; null: no limit' }))),
}, exact);

export type ErrorInfo = Static<typeof ErrorInfo>;
export type ErrorResponse = Static<typeof ErrorResponse>;
export type DaemonStatus = Static<typeof DaemonStatus>;
export type MetricInfo = Static<typeof MetricInfo>;
export type UpgradeInfo = Static<typeof UpgradeInfo>;
export type UpgradeStarted = Static<typeof UpgradeStarted>;
export type ScrubInfo = Static<typeof ScrubInfo>;
export type CheckFinding = Static<typeof CheckFinding>;
export type CheckResult = Static<typeof CheckResult>;
export type CheckInfo = Static<typeof CheckInfo>;
export type CheckRequest = Required<Static<typeof CheckBody>>;
export type StopResult = Static<typeof StopResult>;
export type ContainerInfo = Static<typeof ContainerInfo>;
export type NodeInfo = Static<typeof NodeInfo>;
export type FillInfo = Static<typeof FillInfo>;
export type LayerInfo = Static<typeof LayerInfo>;
export type DiskInfo = Static<typeof DiskInfo>;
export type RemoveResult = Static<typeof RemoveResult>;
export type JobInfo = Static<typeof JobInfo>;
export type JobState = JobInfo['state'];
export type SharedInfo = Static<typeof SharedInfo>;
export type CloneRangesResult = Static<typeof CloneRangesResult>;
export type CloneRangesRequest = Required<Static<typeof CloneRangesBody>>;
export type CloneInfo = Static<typeof CloneInfo>;
export type CloneResult = Static<typeof CloneResult>;
export type ImportRequest = Required<Static<typeof ImportBody>>;
export type ImportFormat = NonNullable<ImportRequest['format']>;
export type CloneRequest = Required<Static<typeof CloneBody>>;
export type Transport = DaemonStatus['transport'];
