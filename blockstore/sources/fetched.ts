/**
 * Requests that need a source which must be asked: what they need is found out, fetched without holding anything, and given to the
 * same data path that every other request takes.
 *
 * Main thread. A request is run; if it says FETCH, the map says which parts of which layers are missing; those are fetched, outside of the
 * disk's gate, so that clone, resize and close of the disk never wait for a source; then it is run again. What was fetched is
 * the content of sealed layers, which never changes, so it is as good as read at that moment; the map may have changed, so what
 * is needed is found out anew each time.
 */
import { OffshootError } from '../errors.js';
import { ORIGIN_ZERO, blockBytesWithin } from '../hot/block-map.js';
import type { FetchedBytes, HotContext } from '../hot/context.js';
import type { IoBuffer } from '../hot/door.js';
import type { OpenDisk } from '../open-disks.js';
import { BLOCK_BYTES } from '../units.js';
import type { ExternalSource } from './external-source.js';

/** A part of a source that a request needs. */
export interface Missing {
  readonly source: ExternalSource;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

interface Part {
  readonly offsetBytes: number;
  readonly bytes: Buffer;
}

/** What was fetched for one request, by layer: origins are numbers of one instance of a disk, which may be another one by now. */
export class Fetched {
  private readonly parts = new Map<number, Part[]>();

  async fetch(missing: readonly Missing[], deadlineMs: number): Promise<void> {
    await Promise.all(missing.map(async ({ source, offsetBytes, lengthBytes }) => {
      const bytes = await source.read(offsetBytes, lengthBytes, deadlineMs);
      const known = this.parts.get(source.layerId);
      if (known === undefined) this.parts.set(source.layerId, [{ offsetBytes, bytes }]);
      else known.push({ offsetBytes, bytes });
    }));
  }

  has(layerId: number, offsetBytes: number, lengthBytes: number): boolean {
    return this.find(layerId, offsetBytes, lengthBytes) !== undefined;
  }

  /** As the data path of this disk asks for it. */
  of(disk: OpenDisk): FetchedBytes {
    return {
      copy: (origin: number, offsetBytes: number, lengthBytes: number, target: IoBuffer, targetOffset: number): boolean => {
        const layerId = disk.files[origin - 1]?.layerId;
        const part = layerId === undefined ? undefined : this.find(layerId, offsetBytes, lengthBytes);
        if (part === undefined) return false;
        const at = offsetBytes - part.offsetBytes;
        part.bytes.copy(target.bytes, targetOffset, at, at + lengthBytes);
        return true;
      },
    };
  }

  private find(layerId: number, offsetBytes: number, lengthBytes: number): Part | undefined {
    return this.parts.get(layerId)?.find((part) => part.offsetBytes <= offsetBytes && offsetBytes + lengthBytes <= part.offsetBytes + part.bytes.length);
  }
}

/** What a read of this range needs and has not got. */
export function missingForRead(context: HotContext, disk: OpenDisk, offsetBytes: number, lengthBytes: number, fetched: Fetched): Missing[] {
  const { shared } = disk;
  const missing: Missing[] = [];
  const end = Math.min(offsetBytes + lengthBytes, shared.sizeBytes());
  const limitBlock = Math.ceil(end / BLOCK_BYTES);
  for (let at = offsetBytes; at < end; ) {
    const block = Math.floor(at / BLOCK_BYTES);
    const origin = shared.originOf(context.shared, block);
    const to = Math.min(end, shared.runEnd(context.shared, block + 1, limitBlock, origin) * BLOCK_BYTES);
    addMissing(missing, disk, origin, at, to, fetched);
    at = to;
  }
  return missing;
}

/** What a write or discard of this range needs and has not got: the rest of the blocks that it names in part. */
export function missingForWrite(context: HotContext, disk: OpenDisk, offsetBytes: number, lengthBytes: number, fetched: Fetched): Missing[] {
  const { shared } = disk;
  const missing: Missing[] = [];
  const end = offsetBytes + lengthBytes;
  const first = Math.floor(offsetBytes / BLOCK_BYTES);
  const last = Math.floor((end - 1) / BLOCK_BYTES);
  const lastEnd = last * BLOCK_BYTES + blockBytesWithin(last, Math.max(shared.sizeBytes(), end));
  for (const block of new Set([...(offsetBytes > first * BLOCK_BYTES ? [first] : []), ...(end < lastEnd ? [last] : [])])) {
    const to = Math.min((block + 1) * BLOCK_BYTES, Math.max(shared.sizeBytes(), end));
    addMissing(missing, disk, shared.originOf(context.shared, block), block * BLOCK_BYTES, to, fetched);
  }
  return missing;
}

function addMissing(missing: Missing[], disk: OpenDisk, origin: number, from: number, to: number, fetched: Fetched): void {
  if (origin === ORIGIN_ZERO || disk.shared.originFd(origin) >= 0) return;
  const lengthBytes = Math.min(to, disk.shared.originLimitBytes(origin)) - from;
  const file = disk.files[origin - 1];
  const fileAt = from + disk.shared.originDeltaBytes(origin);
  if (lengthBytes <= 0 || file === undefined || fetched.has(file.layerId, fileAt, lengthBytes)) return;
  if (file.source === null) throw new Error(`layer ${file.layerId} cannot be read directly and is no source`);
  missing.push({ source: file.source, offsetBytes: fileAt, lengthBytes });
}

/** The error of a source that is known to be wrong, for requests that cannot wait. */
export function sourceErrorOf(missing: readonly Missing[], nodeId: number): OffshootError {
  for (const { source } of missing) {
    const { kind, reason } = source.condition();
    if (kind === 'source-changed' || kind === 'source-unreachable') return new OffshootError(kind, reason ?? kind, { nodeId, path: source.file });
  }
  return new OffshootError('source-unreachable', `the source of node ${nodeId} must be asked, which this request cannot wait for`, { nodeId });
}
