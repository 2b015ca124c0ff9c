/**
 * Shapes of what the control API says about space: what disks, snapshots, containers and the store take, and limits.
 *
 * Beside `schemas.ts`, which has the rest; API.md says the same in prose.
 */
import { Type, type Static } from '@sinclair/typebox';

import { bytes, count, exact, named, NODE_KINDS, nullable, oneOf, path, refTo } from './schemas.js';

const cost = {
  allocatedBytes: bytes('what the active layers take in the store'),
  exclusiveBytes: bytes('what the store gets back when it is removed with --keep-data'),
  sharedBytes: bytes('what is read through and needed by others too'),
};

export const DiskSpace = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/PATH' }),
  kind: oneOf(NODE_KINDS, 'disk or file'),
  frozen: Type.Boolean({ description: 'part of a snapshot' }),
  sizeBytes: bytes('virtual size'),
  ...cost,
  sharedWithCount: count('other disks and files that stand on something that this one reads through'),
  sharedWith: Type.Array(Type.String(), { description: 'paths of the first of them, at most 8' }),
}, { $id: 'DiskSpace' }));

export const SnapshotSpace = named(Type.Object({
  path: Type.String({ description: 'CONTAINER@NAME, or CONTAINER/PATH@NAME' }),
  disks: count('disks and files in it'),
  ...cost,
}, { $id: 'SnapshotSpace' }));

export const ContainerSpace = named(Type.Object({
  name: Type.String(),
  disks: count('disks and files in it; those in snapshots are not counted'),
  snapshots: count('snapshots of it, and of disks and files in it'),
  ...cost,
  usedBytes: bytes('what counts against a limit'),
  limitBytes: nullable(bytes('the limit; null: none')),
}, { $id: 'ContainerSpace' }));

export const StoreSpace = named(Type.Object({
  layersBytes: bytes('data files of layers'),
  databaseBytes: bytes('metadata, with its log'),
  importBytes: bytes('temporary files of imports'),
  reserveBytes: bytes('kept back for metadata'),
  logBytes: bytes("the daemon's log"),
  totalBytes: bytes('all of these'),
  removedBytes: bytes('of the layers, what goes with the last close of files that were removed while they are open'),
  leftOverBytes: bytes('of the layers, what nothing refers to any more'),
  fileSystemBytes: bytes('size of the file system that holds the store'),
  freeBytes: bytes('what is free there'),
}, { $id: 'StoreSpace' }));

export const SpaceReport = named(Type.Object({
  target: nullable(Type.String({ description: 'what was asked for; null: all' })),
  disks: Type.Array(refTo(DiskSpace), { description: 'ordered by path; those in snapshots are frozen' }),
  snapshots: Type.Array(refTo(SnapshotSpace)),
  containers: Type.Array(refTo(ContainerSpace), { description: 'all, or the one that was asked for' }),
  total: Type.Object({ disks: count('disks and files; those in snapshots are not counted'), snapshots: count('snapshots'), ...cost }, { description: 'of the target, or of all containers' }),
  store: nullable(refTo(StoreSpace)),
}, { $id: 'SpaceReport', description: 'Bytes are those that the data files have allocated. Files that are used where they lie count as nothing.' }));

export const QuotaInfo = named(Type.Object({
  container: Type.String(),
  limitBytes: bytes('the limit'),
  usedBytes: bytes('what counts against it'),
  freeBytes: bytes('what may still be allocated'),
  isReached: Type.Boolean({ description: 'something was refused for want of room, and no room was made since' }),
}, { $id: 'QuotaInfo' }));

export const QuotaBody = Type.Object({
  container: path('the container'),
  limitBytes: Type.Integer({ minimum: 4096, maximum: Number.MAX_SAFE_INTEGER, description: 'bytes that its layers may take' }),
}, exact);
export const QuotaQuery = Type.Object({ container: path('the container') }, exact);
export const OptionalTargetQuery = Type.Object({ target: Type.Optional(path('CONTAINER, CONTAINER/PATH, CONTAINER@NAME or CONTAINER/PATH@NAME')) }, exact);

export type SpaceReport = Static<typeof SpaceReport>;
export type StoreSpace = Static<typeof StoreSpace>;
export type QuotaInfo = Static<typeof QuotaInfo>;
