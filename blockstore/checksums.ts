/**
 * Checksums of sealed layers: what is hashed, and what a difference means.
 *
 * A layer is cut into pieces of 1 MiB; each has the SHA-256 of what a reader gets from it: blocks that the layer does not own count
 * as zeros, for what lies there means nothing and may be anything. A piece that reads as zeros has 32 zero bytes for its hash, so
 * that holes need not be read. Hashes are made and compared by a thread (`hash-worker.ts`) chunk by chunk: a chunk is the pieces of
 * one row of the table, 64 MiB. Here is the arithmetic around it; main thread, synchronous.
 *
 * Why SHA-256 through node:crypto (one piece after another on this kind of machine, MB/s): sha1 1750, **sha256 1430**, blake2b 925, hash-wasm
 * blake3 790, @node-rs/xxhash xxh3 2200, xxhash-wasm 6800. It is OpenSSL's, which is kept better than any package; it uses the processor's
 * SHA instructions; it is faster than the disks it reads; and nobody can make content that passes for other content.
 */
import { CHUNK_BYTES, HASH_BYTES, PIECE_BYTES, type LayerChunk } from './checksum-units.js';
import type { Damage } from './meta/checksum-table.js';
import type { MetaStore } from './meta/meta-store.js';
import type { BlockRun, LayerRow } from './meta/rows.js';
import { BLOCK_BYTES, PAGE_BLOCKS, PAGE_BYTES } from './units.js';

/** The chunk that begins at `offsetBytes`; undefined behind the end. `sizeBytes` is what the layer holds. */
export function chunkAt(meta: MetaStore, layer: LayerRow, file: string, offsetBytes: number, sizeBytes: number): LayerChunk | undefined {
  if (offsetBytes >= sizeBytes) return undefined;
  const lengthBytes = Math.min(CHUNK_BYTES, sizeBytes - offsetBytes);
  const owned = layer.complete ? null : ownedRuns(meta, layer.id, offsetBytes / BLOCK_BYTES, Math.ceil((offsetBytes + lengthBytes) / BLOCK_BYTES));
  return { file, firstPiece: offsetBytes / PIECE_BYTES, offsetBytes, lengthBytes, owned };
}

/** Runs of blocks that an incomplete layer owns between two blocks, ascending. */
function ownedRuns(meta: MetaStore, layerId: number, fromBlock: number, toBlock: number): BlockRun[] {
  const runs: { block: number; count: number }[] = [];
  const add = (from: number, to: number): void => {
    const first = Math.max(from, fromBlock);
    const end = Math.min(to, toBlock);
    if (first >= end) return;
    const last = runs.at(-1);
    if (last !== undefined && last.block + last.count === first) last.count += end - first;
    else runs.push({ block: first, count: end - first });
  };
  const firstPage = Math.floor((fromBlock * BLOCK_BYTES) / PAGE_BYTES);
  meta.ownership.forEachBetween(layerId, firstPage, Math.ceil((toBlock * BLOCK_BYTES) / PAGE_BYTES), (page, count, bitmap) => {
    const base = page * PAGE_BLOCKS;
    if (bitmap === null) {
      add(base, base + count * PAGE_BLOCKS);
      return;
    }
    for (let block = 0; block < PAGE_BLOCKS; block += 1) {
      if (((bitmap[Math.floor(block / 8)] ?? 0) & (1 << (block % 8))) !== 0) add(base + block, base + block + 1);
    }
  });
  return runs;
}

/** Pieces that differ, neighbours joined. */
export function differences(chunk: LayerChunk, expected: Uint8Array, actual: Uint8Array): Omit<Damage, 'foundUs' | 'layerId'>[] {
  const found: { offsetBytes: number; lengthBytes: number; kind: 'damaged' }[] = [];
  for (let piece = 0; piece * PIECE_BYTES < chunk.lengthBytes; piece += 1) {
    const at = piece * HASH_BYTES;
    if (Buffer.compare(expected.subarray(at, at + HASH_BYTES), actual.subarray(at, at + HASH_BYTES)) === 0) continue;
    const offsetBytes = chunk.offsetBytes + piece * PIECE_BYTES;
    const lengthBytes = Math.min(PIECE_BYTES, chunk.lengthBytes - piece * PIECE_BYTES);
    const last = found.at(-1);
    if (last !== undefined && last.offsetBytes + last.lengthBytes === offsetBytes) last.lengthBytes += lengthBytes;
    else found.push({ offsetBytes, lengthBytes, kind: 'damaged' });
  }
  return found;
}
