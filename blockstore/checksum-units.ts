/** How a layer is cut into what is hashed. Worker-safe. */
import type { BlockRun } from './meta/rows.js';

export const CHECKSUM_ALGORITHM = 'sha256';
export const HASH_BYTES = 32;
/** What one hash is of. */
export const PIECE_BYTES = 1024 * 1024;
/** Pieces whose hashes share a row of the table. */
export const ROW_PIECES = 64;
/** What is hashed at a time, and fills one row. */
export const CHUNK_BYTES = ROW_PIECES * PIECE_BYTES;

/** A chunk of a layer's file: what to read, and which blocks of it count. */
export interface LayerChunk {
  readonly file: string;
  readonly firstPiece: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** Owned blocks by their index in the file; null: all of them. */
  readonly owned: readonly BlockRun[] | null;
}
