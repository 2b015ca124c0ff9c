/**
 * The shapes of snapshots in the control API: see `schemas.ts`, whose rules hold here.
 */
import { Type, type Static } from '@sinclair/typebox';
import { bytes, count, exact, named, nullable, oneOf, path, queryFlag, time } from './schemas.js';

const COMMAND_BYTES_MAX = 8192;
/** A guest whose file systems are frozen for longer than this is no guest that anybody wants. */
const QUIESCE_SECONDS_MAX = 600;

const reference = path('CONTAINER@NAME, or CONTAINER/PATH@NAME of one disk or file');

export const SnapshotInfo = named(Type.Object({
  reference: Type.String({ description: 'CONTAINER@NAME, or CONTAINER/PATH@NAME: what to clone from' }),
  container: Type.String(),
  name: Type.String(),
  path: nullable(Type.String({ description: 'the one disk or file in it, as a path in the container; null: all of the container' })),
  uuid: Type.String({ description: 'the same on every host that it was sent to' }),
  consistency: oneOf(['crash', 'application'], 'application: the quiesce command froze and thawed those who write; crash: as after a power cut'),
  message: nullable(Type.String({ description: 'what the quiesce command said, or why it is not application-consistent' })),
  disks: count('disks in it'),
  files: count('other files in it'),
  sizeBytes: bytes('virtual sizes of its disks and files together'),
  directory: Type.String({ description: 'where it is seen, read-only: CONTAINER/.snapshots/NAME' }),
  createdAt: time('the instant that it shows'),
}, { $id: 'SnapshotInfo' }));

export const SnapshotCreateBody = Type.Object({
  reference,
  quiesce: Type.Optional(nullable(Type.Object({
    command: Type.String({ minLength: 1, maxLength: COMMAND_BYTES_MAX, description: 'run by sh -c with $1 = freeze before the snapshot, thaw after it; only root may give one' }),
    timeoutSeconds: Type.Number({ exclusiveMinimum: 0, maximum: QUIESCE_SECONDS_MAX, description: 'of each of the two runs' }),
  }, exact))),
}, exact);

export const SnapshotListQuery = Type.Object({ container: Type.Optional(path('only those of this container')) }, exact);

export const SnapshotRemoveQuery = Type.Object({
  reference,
  keepData: queryFlag('although clones stand on it: its layers stay for as long as they need them'),
}, exact);

export const SnapshotRemoveResult = named(Type.Object({
  name: Type.String({ description: 'the reference of what is gone' }),
  nodesRemoved: count('disks, files, symbolic links and directories that are gone'),
  layersRemoved: count('layers that nothing refers to any more'),
  clonesKept: count('clones that still read through layers of it'),
}, { $id: 'SnapshotRemoveResult' }));

export const SnapshotRevertBody = Type.Object({
  reference,
  discardPresent: Type.Literal(true, { description: 'what was made and written since the snapshot is lost; true says that this is meant' }),
}, exact);

export const SnapshotRevertResult = named(Type.Object({
  name: Type.String({ description: 'the reference of the snapshot' }),
  nodesReverted: count('disks and files whose content is that of the snapshot again'),
  nodesRemoved: count('what had come since, and is gone'),
  nodesRestored: count('what had gone since, and is back'),
}, { $id: 'SnapshotRevertResult' }));

export type SnapshotInfo = Static<typeof SnapshotInfo>;
export type SnapshotRemoveResult = Static<typeof SnapshotRemoveResult>;
export type SnapshotRevertResult = Static<typeof SnapshotRevertResult>;

export interface SnapshotCreateRequest {
  readonly reference: string;
  readonly quiesce: { readonly command: string; readonly timeoutMs: number } | null;
}

/** What the control API can ask of snapshots; see `service.ts` for the rules. */
export interface SnapshotService {
  create(request: SnapshotCreateRequest): Promise<SnapshotInfo>;
  /** Those of one container, or all, oldest first. */
  list(container: string | null): readonly SnapshotInfo[];
  remove(reference: string, options: { readonly keepData: boolean }): Promise<SnapshotRemoveResult>;
  revert(reference: string): Promise<SnapshotRevertResult>;
}
