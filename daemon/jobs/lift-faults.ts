/**
 * Lifting a fault: makes sure that everything the database says of a faulted disk is on the disk, then lets it be written again.
 *
 * A disk is faulted when its fdatasync or its commit failed. The kernel reports such an error once and marks the pages clean: a
 * second fdatasync succeeds and proves nothing, and reads give what the disk does not have. So nothing is believed here that
 * was not read from the disk itself:
 *
 *   1. nobody has the disk open, and what it had not committed is given up, journals included (`Store.prepareToLift`)
 *   2. its file is there, and as long as what it owns
 *   3. fdatasync, of what is still dirty: a device that still fails ends it here
 *   4. all that the active layer owns is read from the disk, past the page cache; where the cache says otherwise the disk's
 *      content is written back, and the cache follows. A block that cannot be read ends it here
 *   5. fdatasync again, of what step 4 wrote back
 *   6. the fault is cleared in the database and on tmpfs. *Dies before: still faulted, and it can be done again.*
 *
 * What then holds: each block has the content of the last completed flush or a newer one, as after a power loss. What
 * was acknowledged since that flush is not promised, which is what the fault had said.
 */
import fs from 'node:fs/promises';

import type { LayerChunk } from '../../blockstore/checksum-units.js';
import { chunkAt } from '../../blockstore/checksums.js';
import type { Finding } from '../../blockstore/check-report.js';
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { LayerFiles } from '../../blockstore/layer-files.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { Hasher } from './hasher.js';

export interface LiftParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly hasher: Hasher;
  /** Steps 1 and 6, which differ between a store that is served and one that is not. */
  prepare(nodeId: number): Promise<void>;
  clear(nodeId: number): void;
}

export interface LiftResult {
  readonly lifted: boolean;
  /** Bytes that the page cache had and the disk had not. */
  readonly lostBytes: number;
  /** Why not; null when lifted. */
  readonly reason: string | null;
  readonly findings: readonly Finding[];
}

export async function liftFault(parts: LiftParts, nodeId: number, onProgress: (bytes: number) => void): Promise<LiftResult> {
  const { meta, files } = parts;
  const findings: Finding[] = [];
  let lostBytes = 0;
  try {
    await parts.prepare(nodeId);
    const node = meta.nodes.byId(nodeId);
    const layer = node?.layerId === null || node === undefined ? undefined : meta.layers.byId(node.layerId);
    if (node === undefined || layer === undefined) throw new OffshootError('not-found', 'the disk is gone', { nodeId });
    const file = files.storePath(layer.id);
    // A clone that was never opened has no file, and owns nothing.
    if (layer.complete || meta.ownership.ownedBlocks(layer.id) > 0 || files.exists(layer.id)) {
      await sync(file);
      for (let at = 0; ; ) {
        const chunk = chunkAt(meta, layer, file, at, node.sizeBytes);
        if (chunk === undefined) break;
        await assertLongEnough(file, chunk);
        const done = await parts.hasher.run({ type: 'settle', chunk, fromDisk: true, rateBytesPerSecond: 0 });
        lostBytes += done.differentBytes;
        for (const { offsetBytes, lengthBytes, errno } of done.unreadable) {
          findings.push({
            kind: 'data-unreadable', severity: 'corruption', layerId: layer.id, nodeId, file, offsetBytes, lengthBytes, disks: [meta.nodes.pathOf(nodeId)],
            message: `${lengthBytes} bytes at ${offsetBytes} of ${meta.nodes.pathOf(nodeId)} cannot be read (errno ${errno}); look at the kernel's log for the device`,
          });
        }
        at += chunk.lengthBytes;
        onProgress(chunk.lengthBytes);
      }
      if (findings.length > 0) throw new OffshootError('io-error', 'parts of it cannot be read');
      await sync(file);
    }
    parts.clear(nodeId);
    return { lifted: true, lostBytes, reason: null, findings };
  } catch (thrown) {
    const error = toOffshootError(thrown);
    if (error.kind === 'internal' || error.kind === 'cancelled') throw thrown;
    return { lifted: false, lostBytes, reason: error.message, findings };
  }
}

/** What a chunk says is owned must be there: behind the end of a file there is nothing to read, and nothing fails. */
async function assertLongEnough(file: string, chunk: LayerChunk): Promise<void> {
  const chunkEnd = chunk.offsetBytes + chunk.lengthBytes;
  const last = chunk.owned?.at(-1);
  const endBytes = chunk.owned === null ? chunkEnd : last === undefined ? 0 : Math.min(chunkEnd, (last.block + last.count) * BLOCK_BYTES);
  const { size } = await fs.stat(file);
  if (size < endBytes) throw new OffshootError('store-damaged', `its data file ends at ${size}, before what it owns: ${file}; restore it from a backup of the store`);
}

async function sync(file: string): Promise<void> {
  const handle = await fs.open(file, 'r+');
  try {
    await handle.datasync();
  } finally {
    await handle.close();
  }
}
