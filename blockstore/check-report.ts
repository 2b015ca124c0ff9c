/**
 * What a check takes and what it says, as data: findings, the verdict over them, and what the steps of a check share.
 */
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';

export type FindingKind =
  | 'database'
  | 'row-unreadable'
  | 'names'
  | 'layer-file-missing'
  | 'layer-file-wrong'
  | 'layer-file-short'
  | 'ownership'
  | 'shared-extents'
  | 'backing-chain'
  | 'active-layer'
  | 'external-changed'
  | 'external-unreachable'
  | 'data-unreadable'
  | 'data-damaged'
  | 'stray-layer-file'
  | 'stray-file'
  | 'stray-import'
  | 'unreferenced-layer'
  | 'orphan-node'
  | 'dangling-job'
  | 'dangling-machine'
  | 'machine-place';

export interface Finding {
  readonly kind: FindingKind;
  readonly severity: 'leak' | 'corruption';
  /** What is wrong and what to do, as a sentence. */
  readonly message: string;
  readonly layerId?: number;
  readonly nodeId?: number;
  readonly file?: string;
  readonly offsetBytes?: number;
  readonly lengthBytes?: number;
  /** The disks that are wrong because of it. */
  readonly disks?: readonly string[];
  /** The leak is gone. */
  readonly repaired?: boolean;
}

/** A disk that takes no more writes. */
export interface FaultedDisk {
  readonly nodeId: number;
  readonly path: string;
  readonly reason: string;
}

export interface CheckReport {
  /** Of what is left: repaired leaks do not count. */
  readonly verdict: 'clean' | 'leaks' | 'corruption';
  readonly findings: readonly Finding[];
  readonly faulted: readonly FaultedDisk[];
}

export interface CheckParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  /** The open disks of a store in use; without them nothing is open and no job runs. */
  readonly disks?: { isUsed(nodeId: number): boolean; retireIdle(nodeId: number): void };
}

export interface CheckOptions {
  /** Faults that are not in the database yet, by node. */
  readonly notedFaults?: ReadonlyMap<number, string>;
  /** Take leaks away. */
  readonly repair?: boolean;
  /** False: somebody else looks after SQLite's own check of its file, which cannot be cut into steps. */
  readonly database?: boolean;
  /** True for layers whose content is looked at anew, so that what the scrub found in it is left out. */
  readonly isReadAnew?: (layerId: number) => boolean;
  /** True for a node that somebody has open although it has no name any more. */
  readonly isNodeInUse?: (nodeId: number) => boolean;
}

/** Steps done of those known. */
export interface CheckProgress {
  readonly done: number;
  readonly total: number;
}

/** What the steps share: where findings go, and how a disk is named in them. */
export interface CheckContext {
  readonly parts: CheckParts;
  readonly add: (finding: Finding) => void;
  /** Paths of the nodes whose content comes from this layer, at most DISKS_NAMED_MAX of them. */
  readonly disksOn: (layerId: number) => string[];
}
