/**
 * The rows of the metadata store, as the rest of the program sees them.
 *
 * Plain data: camel case, units in the names, booleans as booleans, SQL's 0 and 1 and snake case stay inside the
 * tables' own files. Rows are snapshots: reading one again is the only way to see a later state. FORMAT.md says what
 * each column promises.
 */

/**
 * `disk`: a virtual disk of fixed virtual size, made by import or clone. `file`: an ordinary file that grows as it is
 * written. Both have an active layer; directories and symlinks have none.
 */
export type NodeKind = 'directory' | 'file' | 'disk' | 'symlink';

/** Id of the mount's root directory, made by the first migration. */
export const ROOT_ID = 1;

export interface NodeRow {
  readonly id: number;
  /** Null for the root, and for an orphan: a node that lost its last name while it was open. */
  readonly parentId: number | null;
  /** Empty for the root and for orphans. */
  readonly name: string;
  readonly kind: NodeKind;
  /** Permission bits, 0 to 0o7777. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly sizeBytes: number;
  readonly atimeUs: number;
  readonly mtimeUs: number;
  readonly ctimeUs: number;
  /** When the node was made. */
  readonly createdUs: number;
  /** Random, 1 to 2^32 - 1, made with the node and never changed. */
  readonly generation: number;
  /** The active layer of a file or disk; null for every other kind. */
  readonly layerId: number | null;
  /** Set for symlinks only. */
  readonly linkTarget: string | null;
  /** Keep in the active layer what a read had to fetch from the source. */
  readonly copyOnRead: boolean;
  /** Why the disk is faulted, as a sentence; null when it is well. */
  readonly fault: string | null;
  /** Part of a snapshot: neither it nor what is below it ever changes; it is only removed, with its snapshot. */
  readonly frozen: boolean;
}

export type NewNode = Omit<NodeRow, 'id' | 'generation' | 'createdUs' | 'frozen'> & { readonly frozen?: boolean };

/** What may change in place. Names change through `move` and `orphan`; kind, link target and generation never do. */
export type NodeUpdate = Partial<
  Pick<
    NodeRow,
    'mode' | 'uid' | 'gid' | 'sizeBytes' | 'atimeUs' | 'mtimeUs' | 'ctimeUs' | 'layerId' | 'copyOnRead' | 'fault'
  >
>;

/** What an external file looked like when it was taken in: a difference later means that it was changed underneath. */
export interface FileIdentity {
  readonly device: number;
  readonly inode: number;
  readonly sizeBytes: number;
  /** Nanoseconds since the epoch in decimal: they do not fit a double. */
  readonly mtimeNs: string;
  readonly ctimeNs: string;
}

/** `store`: a data file of the store. `external`: a file used where it lies, never written to. */
export type LayerKind = 'store' | 'external';

export interface LayerRow {
  readonly id: number;
  readonly kind: LayerKind;
  /** Absolute path of an external layer; null for a layer of the store. */
  readonly externalPath: string | null;
  readonly externalIdentity: FileIdentity | null;
  /** The layer that un-owned blocks are read from. */
  readonly backingId: number | null;
  /** Bytes of the backing that may be seen, null for all: a shrink lowers it, so that a later grow reads zeros. */
  readonly backingLimitBytes: number | null;
  readonly sizeBytes: number;
  /** Immutable for ever. */
  readonly sealed: boolean;
  /** Owns every block: its backing, if one is still noted, is never consulted. */
  readonly complete: boolean;
  readonly createdUs: number;
  /** The node that wrote it before it was sealed, or brought it in: the source of those who stand on it. May be gone. */
  readonly writtenBy: number | null;
}

export type NewLayer = Omit<LayerRow, 'id' | 'writtenBy'> & { readonly writtenBy?: number | null };
export type LayerUpdate = Partial<NewLayer>;

export type JobState = 'running' | 'paused' | 'completed' | 'failed' | 'cancelled';

export interface JobRow {
  readonly id: number;
  readonly kind: string;
  readonly nodeId: number | null;
  readonly state: JobState;
  /** Anything that JSON can hold; its shape is the business of the job's kind. */
  readonly parameters: unknown;
  readonly progressDone: number;
  readonly progressTotal: number;
  readonly message: string | null;
  readonly createdUs: number;
  readonly updatedUs: number;
}

export type NewJob = Omit<JobRow, 'id'>;
export type JobUpdate = Partial<Omit<JobRow, 'id' | 'kind' | 'createdUs'>>;

export interface JobFilter {
  readonly states?: readonly JobState[];
  readonly kind?: string;
  readonly nodeId?: number;
}

/** Consecutive blocks of a layer. */
export interface BlockRun {
  readonly block: number;
  readonly count: number;
}

/** `application`: the quiesce command said that those who write had put their affairs in order. `crash`: as after a power cut. */
export type Consistency = 'crash' | 'application';

export interface SnapshotRow {
  readonly id: number;
  /** The container whose disks and files it holds. */
  readonly containerId: number;
  readonly name: string;
  /** `CONTAINER/.snapshots/NAME`: frozen copies of the nodes, as clones of them. */
  readonly directoryId: number;
  /** The one disk or file that it holds, as a path in the container; null for all. */
  readonly path: string | null;
  /** The same on every host that it was sent to. */
  readonly uuid: string;
  readonly consistency: Consistency;
  /** What the quiesce command said, or why it did not make it consistent. */
  readonly message: string | null;
  readonly createdUs: number;
}

export type NewSnapshot = Omit<SnapshotRow, 'id'>;
