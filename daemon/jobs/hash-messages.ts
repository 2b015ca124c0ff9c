/** What travels between the hash worker and the main thread: chunks to read, and what came of each. */
import type { LayerChunk } from '../../blockstore/checksum-units.js';
import type { SharedStateHandles } from '../../blockstore/hot/shared-state.js';

export interface HashWorkerData {
  /** Of a store that serves guests: the worker makes way for them. Null: nobody else is there. */
  readonly shared: SharedStateHandles | null;
}

/**
 * `hash`: the hash of each piece. `settle`: the page cache is made to hold exactly what is on the disk, for a file whose
 * fdatasync failed; see `lift-faults.ts`.
 */
export interface HashOrder {
  readonly type: 'hash' | 'settle';
  readonly ticket: number;
  readonly chunk: LayerChunk;
  /** Read past the page cache, which may remember what the disk has forgotten. */
  readonly fromDisk: boolean;
  /** Limit; 0: none. */
  readonly rateBytesPerSecond: number;
}

export interface UnreadableExtent {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  readonly errno: number;
}

export type HashReport =
  /** `hashes` has 32 bytes for each piece; those of an unreadable one mean nothing. `differentBytes`: the page cache held something else than the disk. */
  | { readonly type: 'done'; readonly ticket: number; readonly hashes: Uint8Array; readonly unreadable: readonly UnreadableExtent[]; readonly readBytes: number; readonly differentBytes: number;
      /** Where the file may hold something again: the end of the chunk, or behind a hole that it lies in. */
      readonly nextBytes: number }
  /** The file itself could not be opened. */
  | { readonly type: 'failed'; readonly ticket: number; readonly errno: number; readonly what: string };
