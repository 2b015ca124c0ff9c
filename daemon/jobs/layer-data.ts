/**
 * Reads a sealed layer chunk by chunk, compares it with its checksums, or makes them where there are none.
 *
 * Main thread; the reading is a hash worker's. Each chunk looks at the layer anew: it may be removed at any time, which ends the
 * work on it and is no error. A file that is used where it lies is looked at before and after each chunk: what was read
 * while it was exchanged is not compared.
 */
import { CHECKSUM_ALGORITHM, CHUNK_BYTES, HASH_BYTES, PIECE_BYTES, type LayerChunk } from '../../blockstore/checksum-units.js';
import { chunkAt, differences } from '../../blockstore/checksums.js';
import { isOperatingError, type OffshootError } from '../../blockstore/errors.js';
import type { LayerFiles } from '../../blockstore/layer-files.js';
import { assertUnchanged } from '../../blockstore/sources/external-source.js';
import { placeOf } from '../../blockstore/sources/place.js';
import type { Damage } from '../../blockstore/meta/checksum-table.js';
import type { MetaStore } from '../../blockstore/meta/meta-store.js';
import type { LayerRow } from '../../blockstore/meta/rows.js';
import type { HashedChunk, Hasher } from './hasher.js';

export type Found = Omit<Damage, 'foundUs' | 'layerId'>;

export interface DataParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
}

export interface ChunkOptions {
  /** Keep hashes that are missing. */
  readonly keep: boolean;
  readonly fromDisk: boolean;
  /** 0: no limit. */
  readonly rateBytesPerSecond: number;
}

export interface ChunkResult {
  readonly lengthBytes: number;
  readonly readBytes: number;
  readonly found: readonly Found[];
  /** False: there was nothing to compare with. */
  readonly compared: boolean;
  /** The layer is a file that somebody else answers for, and was not read. */
  readonly isRemote: boolean;
  /** The layer cannot be read at all. */
  readonly error: OffshootError | null;
}

/** The chunk of a layer at `offsetBytes`, with the holes behind it; null when the layer is gone, or has no more. */
export async function readChunk(parts: DataParts, hasher: Hasher, layerId: number, offsetBytes: number, options: ChunkOptions): Promise<ChunkResult | null> {
  const { meta, files } = parts;
  const layer = meta.layers.byId(layerId);
  if (layer?.sealed !== true) return null;
  const chunk = chunkAt(meta, layer, files.pathOf(layer), offsetBytes, layer.sizeBytes);
  if (chunk === undefined) return null;
  // A file that somebody else answers for is never read by a thread of this process, for it may not answer: there is nothing to compare then.
  if (layer.kind === 'external' && placeOf(files.pathOf(layer)).isRemote) {
    return { lengthBytes: chunk.lengthBytes, readBytes: 0, found: [], compared: false, isRemote: true, error: null };
  }
  const failed = (error: OffshootError): ChunkResult => ({ lengthBytes: CHUNK_BYTES, readBytes: 0, found: [], compared: false, isRemote: false, error });
  const hash = async (at: LayerChunk): Promise<HashedChunk> => await hasher.hash(at, { fromDisk: options.fromDisk, rateBytesPerSecond: options.rateBytesPerSecond });
  try {
    assertSame(layer);
    let done = await hash(chunk);
    assertSame(layer);
    const expected = knownHashes(meta, layerId, chunk.firstPiece);
    if (expected !== undefined) return compared(parts, layer, chunk, done, expected);
    // A hole gets no hashes: a missing row is one of zeros. What follows it is read in the same go, so that its row says how far the layer has come.
    let hashed: LayerChunk | undefined = chunk;
    if (isHole(done)) {
      hashed = chunkAt(meta, layer, chunk.file, chunkFloor(Math.min(done.nextBytes, layer.sizeBytes), layer.sizeBytes), layer.sizeBytes);
      if (hashed !== undefined) {
        done = await hash(hashed);
        assertSame(layer);
      }
    }
    const endBytes = hashed === undefined ? layer.sizeBytes : hashed.offsetBytes + hashed.lengthBytes;
    const found = unreadableOf(done);
    if (options.keep && found.length === 0 && meta.layers.byId(layerId) !== undefined) {
      meta.checksums.begin(layerId, CHECKSUM_ALGORITHM, PIECE_BYTES);
      // In order, or not at all: the rows that are there say how far the layer has come.
      if (meta.checksums.nextPiece(layerId) === chunk.firstPiece) {
        if (hashed === undefined) meta.checksums.finish(layerId, CHECKSUM_ALGORITHM, PIECE_BYTES);
        else meta.checksums.add(layerId, hashed.firstPiece, done.hashes, endBytes >= layer.sizeBytes);
      }
    }
    return { lengthBytes: endBytes - chunk.offsetBytes, readBytes: done.readBytes, found, compared: false, isRemote: false, error: null };
  } catch (thrown) {
    if (!isOperatingError(thrown) || thrown.kind === 'cancelled') throw thrown;
    if (meta.layers.byId(layerId) === undefined) return null;
    return failed(thrown);
  }
}

/** The chunk against its hashes; where both say that there is nothing, up to where one of them says something. */
function compared({ meta }: DataParts, layer: LayerRow, chunk: LayerChunk, done: HashedChunk, expected: Uint8Array): ChunkResult {
  const found = unreadableOf(done);
  const hashes = Uint8Array.from(done.hashes);
  // What could not be read is not called different as well.
  for (const { offsetBytes: at } of done.unreadable) {
    const index = ((at - chunk.offsetBytes) / PIECE_BYTES) * HASH_BYTES;
    hashes.set(expected.subarray(index, index + HASH_BYTES), index);
  }
  found.push(...differences(chunk, expected, hashes));
  let endBytes = chunk.offsetBytes + chunk.lengthBytes;
  if (found.length === 0 && isHole(done)) {
    endBytes = chunkFloor(Math.min(done.nextBytes, meta.checksums.nextRow(layer.id, chunk.firstPiece) * PIECE_BYTES, layer.sizeBytes), layer.sizeBytes);
  }
  return { lengthBytes: endBytes - chunk.offsetBytes, readBytes: done.readBytes, found, compared: true, isRemote: false, error: null };
}

function unreadableOf(done: HashedChunk): Found[] {
  return done.unreadable.map(({ offsetBytes, lengthBytes }) => ({ offsetBytes, lengthBytes, kind: 'unreadable' as const }));
}

/** Nothing of it was there to be read. */
function isHole(done: HashedChunk): boolean {
  return done.readBytes === 0 && done.unreadable.length === 0;
}

/** Where the chunk of a byte begins; the end of the layer is one. */
function chunkFloor(offsetBytes: number, sizeBytes: number): number {
  return offsetBytes >= sizeBytes ? sizeBytes : offsetBytes - (offsetBytes % CHUNK_BYTES);
}

function assertSame(layer: LayerRow): void {
  if (layer.kind === 'external') assertUnchanged(layer);
}

function knownHashes(meta: MetaStore, layerId: number, firstPiece: number): Uint8Array | undefined {
  const known = meta.checksums.of(layerId);
  if (known?.algorithm !== CHECKSUM_ALGORITHM || known.pieceBytes !== PIECE_BYTES) return undefined;
  return meta.checksums.hashes(layerId, firstPiece);
}
