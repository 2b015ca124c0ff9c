/**
 * Checksums of sealed layers, and what a scrub found wrong with them. Main thread only.
 *
 * A row holds the hashes of 64 pieces of one layer, 32 bytes each; how they are made is the business of `checksums.ts`.
 * Hashes are added from the front, so the last row says how far a layer has come. A row that is missing before that, or in a layer that has
 * all of its hashes, is one of zeros: a hole of many terabytes takes no rows. All of it goes with its layer.
 */
import { HASH_BYTES, ROW_PIECES } from '../checksum-units.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export interface LayerChecksums {
  readonly algorithm: string;
  readonly pieceBytes: number;
  /** Every piece has its hash. */
  readonly complete: boolean;
  /** When all of the layer was last read and found to be right; null: never. */
  readonly verifiedUs: number | null;
}

export interface Damage {
  readonly layerId: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** `damaged`: other content than was sealed. `unreadable`: the device gives an error. */
  readonly kind: 'damaged' | 'unreadable';
  readonly foundUs: number;
}

interface RawChecksums {
  readonly algorithm: string;
  readonly piece_bytes: number;
  readonly complete: number;
  readonly verified_us: number | null;
}

interface RawDamage {
  readonly layer_id: number;
  readonly offset_bytes: number;
  readonly length_bytes: number;
  readonly kind: string;
  readonly found_us: number;
}

export class ChecksumTable {
  readonly #connection: SqlConnection;
  readonly #state: SqlStatement<RawChecksums>;
  readonly #begin: SqlStatement<unknown>;
  readonly #finish: SqlStatement<unknown>;
  readonly #verified: SqlStatement<unknown>;
  readonly #hashes: SqlStatement<{ readonly hashes: Uint8Array }>;
  readonly #put: SqlStatement<unknown>;
  readonly #following: SqlStatement<{ readonly first_piece: number }>;
  readonly #last: SqlStatement<{ readonly first_piece: number }>;
  readonly #unfinished: SqlStatement<{ readonly id: number }>;
  readonly #sealedAfter: SqlStatement<{ readonly id: number }>;
  readonly #sealedBytes: SqlStatement<{ readonly bytes: number | null }>;
  readonly #damages: SqlStatement<RawDamage>;
  readonly #putDamage: SqlStatement<unknown>;
  readonly #clearDamages: SqlStatement<unknown>;
  readonly #forget: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    this.#connection = connection;
    this.#state = connection.prepare('SELECT algorithm, piece_bytes, complete, verified_us FROM layer_checksums WHERE layer_id = ?');
    this.#begin = connection.prepare('INSERT INTO layer_checksums (layer_id, algorithm, piece_bytes, complete) VALUES (?, ?, ?, 0)');
    this.#finish = connection.prepare('UPDATE layer_checksums SET complete = 1, computed_us = ? WHERE layer_id = ?');
    this.#verified = connection.prepare('UPDATE layer_checksums SET verified_us = ? WHERE layer_id = ?');
    this.#hashes = connection.prepare('SELECT hashes FROM checksums WHERE layer_id = ? AND first_piece = ?');
    this.#put = connection.prepare('INSERT INTO checksums (layer_id, first_piece, hashes) VALUES (?, ?, ?)');
    this.#following = connection.prepare('SELECT first_piece FROM checksums WHERE layer_id = ? AND first_piece > ? ORDER BY first_piece LIMIT 1');
    this.#last = connection.prepare('SELECT first_piece FROM checksums WHERE layer_id = ? ORDER BY first_piece DESC LIMIT 1');
    this.#unfinished = connection.prepare(
      `SELECT layers.id FROM layers LEFT JOIN layer_checksums ON layer_checksums.layer_id = layers.id
       WHERE layers.sealed = 1 AND coalesce(layer_checksums.complete, 0) = 0 ORDER BY layers.id`,
    );
    this.#sealedAfter = connection.prepare('SELECT id FROM layers WHERE sealed = 1 AND id > ? ORDER BY id LIMIT 1');
    this.#sealedBytes = connection.prepare('SELECT sum(size_bytes) AS bytes FROM layers WHERE sealed = 1 AND id > ?');
    this.#damages = connection.prepare('SELECT * FROM damages ORDER BY layer_id, offset_bytes');
    this.#putDamage = connection.prepare('INSERT INTO damages (layer_id, offset_bytes, length_bytes, kind, found_us) VALUES (?, ?, ?, ?, ?)');
    this.#clearDamages = connection.prepare('DELETE FROM damages WHERE layer_id = ? AND offset_bytes >= ? AND offset_bytes < ?');
    this.#forget = connection.prepare('DELETE FROM layer_checksums WHERE layer_id = ?');
  }

  /** Undefined: nothing was hashed yet. */
  of(layerId: number): LayerChecksums | undefined {
    const raw = this.#state.get(layerId);
    return raw === undefined ? undefined : { algorithm: raw.algorithm, pieceBytes: raw.piece_bytes, complete: raw.complete === 1, verifiedUs: raw.verified_us };
  }

  /** Hashes of the pieces from `firstPiece`, a multiple of ROW_PIECES, on; undefined when they were not made yet. */
  hashes(layerId: number, firstPiece: number): Uint8Array | undefined {
    const row = this.#hashes.get(layerId, firstPiece);
    if (row !== undefined) return row.hashes;
    return firstPiece < this.#endPiece(layerId) ? new Uint8Array(ROW_PIECES * HASH_BYTES) : undefined;
  }

  /** The first piece behind this one's row that has a row of its own, or no hashes yet. */
  nextRow(layerId: number, firstPiece: number): number {
    return this.#following.get(layerId, firstPiece)?.first_piece ?? this.#endPiece(layerId);
  }

  /** The first piece whose hash is missing, when they are added from the front. */
  nextPiece(layerId: number): number {
    const last = this.#last.get(layerId);
    return last === undefined ? 0 : last.first_piece + ROW_PIECES;
  }

  #endPiece(layerId: number): number {
    return this.of(layerId)?.complete === true ? Number.MAX_SAFE_INTEGER : this.nextPiece(layerId);
  }

  /** Hashes made in another way than this are forgotten, and made anew. */
  begin(layerId: number, algorithm: string, pieceBytes: number): void {
    this.#connection.transaction(() => {
      const known = this.of(layerId);
      if (known?.algorithm === algorithm && known.pieceBytes === pieceBytes) return;
      this.#forget.run(layerId);
      this.#begin.run(layerId, algorithm, pieceBytes);
    });
  }

  /** Adds a row of hashes; `isLast`: the layer has them all then. */
  add(layerId: number, firstPiece: number, hashes: Uint8Array, isLast: boolean): void {
    this.#connection.transaction(() => {
      this.#put.run(layerId, firstPiece, hashes);
      if (isLast) this.#finish.run(Date.now() * 1000, layerId);
    });
  }

  /** All that is left of the layer is a hole, or the layer has no size: it has all of its hashes. */
  finish(layerId: number, algorithm: string, pieceBytes: number): void {
    this.#connection.transaction(() => {
      this.begin(layerId, algorithm, pieceBytes);
      this.#finish.run(Date.now() * 1000, layerId);
    });
  }

  /** Sealed layers that do not have all of their hashes. */
  unfinished(): number[] {
    return this.#unfinished.all().map((row) => row.id);
  }

  /** The next sealed layer by its id. */
  sealedAfter(layerId: number): number | undefined {
    return this.#sealedAfter.get(layerId)?.id;
  }

  /** Sizes of the sealed layers behind this id. */
  sealedBytesAfter(layerId: number): number {
    return this.#sealedBytes.get(layerId)?.bytes ?? 0;
  }

  /** A part of the layer was read: this is what is wrong with it now, and nothing else. */
  found(layerId: number, offsetBytes: number, lengthBytes: number, damages: readonly Omit<Damage, 'foundUs' | 'layerId'>[]): void {
    const nowUs = Date.now() * 1000;
    this.#connection.transaction(() => {
      this.#clearDamages.run(layerId, offsetBytes, offsetBytes + lengthBytes);
      for (const damage of damages) this.#putDamage.run(layerId, damage.offsetBytes, damage.lengthBytes, damage.kind, nowUs);
    });
  }

  /** All of the layer was read, and nothing was wrong with it. */
  verified(layerId: number): void {
    this.#verified.run(Date.now() * 1000, layerId);
  }

  damages(): Damage[] {
    return this.#damages.all().map((raw) => ({
      layerId: raw.layer_id, offsetBytes: raw.offset_bytes, lengthBytes: raw.length_bytes, kind: raw.kind as Damage['kind'], foundUs: raw.found_us,
    }));
  }
}
