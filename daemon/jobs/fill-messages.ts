/** What the fill worker and the main thread say to each other, and the words of a disk's control block that both know. */
import type { DiskHandles } from '../../blockstore/hot/block-map.js';
import type { FileIdentity } from '../../blockstore/meta/rows.js';
import type { ThreadBoot } from '../../blockstore/hot/thread-context.js';

export interface FillWorkerData {
  readonly boot: ThreadBoot;
}

/** Command word of a filling disk. */
export const FILL_RUN = 1;
export const FILL_PAUSE = 2;

/** To the worker. A disk that was rebuilt while it fills is started again with its new handles. */
export type FillOrder =
  | { readonly type: 'start'; readonly handles: DiskHandles; readonly sources: readonly FillSource[] }
  /** The answer to `fetch`. Without bytes: there is a reason to look again, the source may be readable directly now. */
  | { readonly type: 'fetched'; readonly nodeId: number; readonly serial: number; readonly origin: number; readonly offsetBytes: number; readonly bytes: Uint8Array<ArrayBuffer> | null }
  | { readonly type: 'forget'; readonly nodeId: number };

/** An origin that is a file outside of the store: what it must be behind each batch that is read of it. */
export interface FillSource {
  readonly origin: number;
  readonly identity: FileIdentity;
}

/** From the worker. */
export type FillReport =
  | { readonly type: 'commit-wanted' }
  /** Every block was owned when the cursor passed it. */
  | { readonly type: 'reached-end'; readonly nodeId: number; readonly serial: number }
  /** These bytes of the origin cannot be read by the worker itself; the disk rests until they come. */
  | { readonly type: 'fetch'; readonly nodeId: number; readonly serial: number; readonly origin: number; readonly offsetBytes: number; readonly lengthBytes: number }
  | { readonly type: 'failed'; readonly nodeId: number; readonly serial: number; readonly errno: number; readonly atBytes: number };
