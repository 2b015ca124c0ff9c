/**
 * Copies between files under the mount, by sharing extents: what `cp` and copy_file_range(2) ask for. Main thread.
 *
 * Whole blocks that lie alike in their blocks at both places are shared; what is left at either end, less than a block each, is read
 * and written like any other data. A last block in part is shared too when both files end there. What cannot be shared, or is so
 * short that its bytes are copied sooner than rows are committed, is `not-supported`: then the caller copies all of it.
 *
 * Done twice, because a server died before it could answer, it leads to the same: the parts do not overlap, so a copy changes
 * nothing that it reads.
 */
import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import type { Store } from '../../blockstore/store.js';
import { BLOCK_BYTES, DISK_BYTES_MAX } from '../../blockstore/units.js';

export interface CopyRequest {
  readonly source: number;
  readonly sourceAtBytes: number;
  readonly target: number;
  readonly targetAtBytes: number;
  readonly lengthBytes: number;
}

/** Shorter copies are copies of bytes: a commit takes longer. */
export const SHARED_BYTES_MIN = 64 * 1024;

/** Bytes copied. */
export async function copyRange(store: Store, request: CopyRequest): Promise<number> {
  const { source, target, sourceAtBytes, targetAtBytes } = request;
  const sourceBytes = sizeOf(store, source);
  const targetBytes = sizeOf(store, target);
  let lengthBytes = Math.min(request.lengthBytes, sourceBytes - sourceAtBytes);
  if (lengthBytes <= 0) return 0;
  const isDisk = store.meta.nodes.byId(target)?.kind === 'disk';
  const limitBytes = isDisk ? targetBytes : DISK_BYTES_MAX;
  if (targetAtBytes >= limitBytes) throw new OffshootError('too-large', 'a disk has a fixed size', { nodeId: target });
  lengthBytes = Math.min(lengthBytes, limitBytes - targetAtBytes);
  // First of all: who copies bytes would read what it has just written.
  if (source === target && Math.abs(sourceAtBytes - targetAtBytes) < lengthBytes) throw new OffshootError('invalid-argument', 'a copy within one file may not overlap');
  if ((sourceAtBytes - targetAtBytes) % BLOCK_BYTES !== 0) throw bytesOnly('the two places lie differently in their blocks');
  const headBytes = Math.min(lengthBytes, (BLOCK_BYTES - (targetAtBytes % BLOCK_BYTES)) % BLOCK_BYTES);
  const endsBoth = sourceAtBytes + lengthBytes === sourceBytes && targetAtBytes + lengthBytes >= targetBytes;
  const tailBytes = endsBoth ? 0 : (lengthBytes - headBytes) % BLOCK_BYTES;
  const sharedBytes = lengthBytes - headBytes - tailBytes;
  if (sharedBytes < SHARED_BYTES_MIN) throw bytesOnly('it is short');

  if (headBytes > 0) await copyBytes(store, request, 0, headBytes);
  try {
    store.cloneRanges(source, target, [{ sourceAtBytes: sourceAtBytes + headBytes, targetAtBytes: targetAtBytes + headBytes, lengthBytes: sharedBytes }]);
  } catch (thrown) {
    // A request inside takes long: whoever copies bytes waits for nobody but itself.
    if (thrown instanceof OffshootError && thrown.kind === 'busy') throw bytesOnly(thrown.message);
    throw thrown;
  }
  return headBytes + sharedBytes + await copyTail(store, request, headBytes + sharedBytes, tailBytes);
}

/** Bytes copied. What was shared before it is done, and must be said: the error is that of the next request, which begins here. */
async function copyTail(store: Store, request: CopyRequest, at: number, lengthBytes: number): Promise<number> {
  if (lengthBytes === 0) return 0;
  try {
    return await copyBytes(store, request, at, lengthBytes);
  } catch (thrown) {
    if (isOperatingError(thrown)) return 0;
    throw thrown;
  }
}

/** Bytes copied: fewer when the source has become shorter meanwhile. */
async function copyBytes(store: Store, { source, sourceAtBytes, target, targetAtBytes }: CopyRequest, at: number, lengthBytes: number): Promise<number> {
  const bytes = new Uint8Array(lengthBytes);
  const got = await store.data.readOrLater(source, sourceAtBytes + at, bytes);
  return await store.data.writeOrLater(target, targetAtBytes + at, bytes.subarray(0, got));
}

function sizeOf(store: Store, nodeId: number): number {
  return store.disks.get(nodeId)?.shared.sizeBytes() ?? store.meta.nodes.byId(nodeId)?.sizeBytes ?? 0;
}

function bytesOnly(why: string): OffshootError {
  return new OffshootError('not-supported', `the copy cannot be shared: ${why}`);
}
