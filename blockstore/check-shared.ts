/**
 * The part of a check that looks at shared extents: blocks that layers have from others. Steps of the main thread, like all of `check.ts`.
 *
 * A row is right when the layer may have rows, none lies over another, and what it names is a sealed layer that owns all of those blocks
 * itself. One that names blocks which the layer only reads from elsewhere would show what lies in its file there, which means nothing.
 */
import type { CheckContext } from './check-report.js';
import type { AuditExtent, AuditLayer } from './meta/audit.js';
import { BLOCK_BYTES, DISK_BYTES_MAX, PAGE_BLOCKS } from './units.js';

/** Each layer that has shared extents, one in a step. */
export function* checkShared(context: CheckContext): Generator<undefined, void, undefined> {
  for (const layerId of context.parts.meta.sharedExtents.sharingLayers()) {
    checkLayerExtents(context, layerId);
    yield;
  }
}

function checkLayerExtents({ parts: { meta }, add, disksOn }: CheckContext, layerId: number): void {
  const layer = layerOf(layerId);
  // Removed since, and its rows with it.
  if (layer === undefined) return;
  const problems = layer.complete === 1 || layer.kind === 'external' ? ['it owns every block, and has rows for some'] : [];
  let end = 0;
  for (const row of meta.audit.extentsOf(layerId)) {
    if (row.first_block < end) problems.push(`blocks from ${row.first_block} on are there twice`);
    end = Math.max(end, row.first_block + row.block_count);
    const problem = problemOf(row);
    if (problem !== null) problems.push(problem);
  }
  for (const problem of problems.slice(0, PROBLEMS_MAX)) {
    add({
      kind: 'shared-extents', severity: 'corruption', layerId, disks: disksOn(layerId),
      message: `what the database says of the blocks that layer ${layerId} has from others cannot be: ${problem}; restore offshoot.db from a backup`,
    });
  }

  function layerOf(id: number): AuditLayer | undefined {
    const [found] = meta.audit.layersAfter(id - 1, 1);
    return found?.id === id ? found : undefined;
  }

  function problemOf(row: AuditExtent): string | null {
    const { first_block: first, block_count: count, source_layer_id: sourceId, source_block: sourceBlock, limit_bytes: limit } = row;
    if (![first, count, sourceBlock, limit ?? 0].every((value) => Number.isSafeInteger(value) && value >= 0) || count < 1 || (first + count) * BLOCK_BYTES > DISK_BYTES_MAX) {
      return `${count} blocks from ${first} on`;
    }
    if (sourceId === null) return limit === null ? null : `zeros from block ${first} on that end within a block`;
    if (limit !== null && (limit <= (count - 1) * BLOCK_BYTES || limit >= count * BLOCK_BYTES)) return `${count} blocks from ${first} on are seen up to byte ${limit} of them`;
    const source = layerOf(sourceId);
    if (source === undefined) return `blocks from ${first} on lie in layer ${sourceId}, which does not exist`;
    if (source.sealed === 0) return `blocks from ${first} on lie in layer ${sourceId}, which is not sealed and can still change`;
    if (source.complete === 1) return null;
    const missing = firstUnowned(sourceId, sourceBlock, sourceBlock + count);
    return missing === null ? null : `blocks from ${first} on lie in layer ${sourceId}, which does not own its block ${missing}`;
  }

  /** The first block up to `to` that the layer does not own; null when it owns all of them. */
  function firstUnowned(id: number, from: number, to: number): number | null {
    let at = from;
    meta.ownership.forEachBetween(id, Math.floor(from / PAGE_BLOCKS), Math.ceil(to / PAGE_BLOCKS), (page, pageCount, bitmap) => {
      const pageFirst = page * PAGE_BLOCKS;
      if (at < pageFirst || at >= pageFirst + pageCount * PAGE_BLOCKS) return;
      if (bitmap === null) {
        at = pageFirst + pageCount * PAGE_BLOCKS;
        return;
      }
      while (at < Math.min(to, pageFirst + PAGE_BLOCKS) && hasBit(bitmap, at - pageFirst)) at += 1;
    });
    return at >= to ? null : at;
  }
}

/** Problems of one layer that are told. */
const PROBLEMS_MAX = 100;

function hasBit(bitmap: Uint8Array, bit: number): boolean {
  return Math.floor((bitmap[Math.floor(bit / 8)] ?? 0) / 2 ** (bit % 8)) % 2 === 1;
}
