/**
 * Makes RENAME_EXCHANGE safe to see twice.
 *
 * Every other operation shows by the state it left whether it was done; an exchange does not, and done twice it is undone.
 * So the node that a name means before the exchange is written down first, under the request's `unique`, which the
 * kernel uses once in the life of a mount. Main thread only; files lie in the runtime directory on tmpfs.
 *
 * 1. Write `exchange-UNIQUE` = node id before, and the CRC-32 of it. A crash now: the file is there, the name still means that
 *    node: not done. (A crash in the middle of the write leaves a file that is not whole, which counts as none: not done.)
 * 2. Exchange, in one transaction. A crash now: the file is there, the name means another node: done.
 * 3. Reply. The file may go from now on; it goes when the next exchange begins in the same process, because by then its
 *    reply was written. A file that a dead server left stays until the mount ends: a few bytes, never read again.
 */
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import { UNIQUE_TOP_BYTE, UNIQUE_TOP_RESENT } from './protocol.js';

export class ExchangeIntents {
  readonly #runtimeDir: string;
  #answered: string | null = null;

  constructor(runtimeDir: string) {
    this.#runtimeDir = runtimeDir;
  }

  /** Step 1. */
  begin(unique: Uint8Array, nodeIdBefore: number): void {
    const path = this.#pathOf(unique);
    try {
      if (this.#answered !== null) rmSync(this.#answered, { force: true });
      this.#answered = null;
      writeFileSync(path, contentFor(nodeIdBefore), { mode: 0o600 });
      this.#answered = path;
    } catch (thrown) {
      const cause = toOffshootError(thrown);
      throw new OffshootError(cause.kind, `An exchange of names could not be prepared in ${this.#runtimeDir}: ${cause.message}. Make room there.`, { path }, thrown);
    }
  }

  /** The node that the first name meant before a dead server saw this request, or null if none got that far. */
  recall(unique: Uint8Array): number | null {
    let text: string;
    try {
      text = readFileSync(this.#pathOf(unique), 'utf8');
    } catch (thrown) {
      const cause = toOffshootError(thrown);
      if (cause.kind === 'not-found') return null;
      throw cause;
    }
    const nodeId = Number.parseInt(text, 10);
    return contentFor(nodeId) === text ? nodeId : null;
  }

  #pathOf(unique: Uint8Array): string {
    const plain = Uint8Array.from(unique);
    plain[UNIQUE_TOP_BYTE] = (plain[UNIQUE_TOP_BYTE] ?? 0) & ~UNIQUE_TOP_RESENT;
    return join(this.#runtimeDir, `exchange-${Buffer.from(plain).toString('hex')}`);
  }
}

function contentFor(nodeId: number): string {
  return `${nodeId} ${crc32(String(nodeId)).toString(16)}\n`;
}
