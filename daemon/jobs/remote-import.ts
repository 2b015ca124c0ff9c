/**
 * Imports of files that may not answer: on a network, on FUSE. Looked at and read by processes of their own, with a limit on every wait.
 *
 * Main thread, asynchronous. A copy of such a file asks for no holes; blocks of zeros are left out of the copy instead.
 */
import fs from 'node:fs/promises';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { FileIdentity } from '../../blockstore/meta/rows.js';
import { scopeOf } from '../../blockstore/sources/identity.js';
import type { Place } from '../../blockstore/sources/place.js';
import { probeFile } from '../../blockstore/sources/probe.js';
import { RemoteReader } from '../../blockstore/sources/remote-reader.js';

export interface Inspected {
  /** Without symbolic links. */
  readonly file: string;
  readonly kind: 'file' | 'directory' | 'other';
  readonly identity: FileIdentity;
  /** Its first bytes. */
  readonly head: Buffer;
}

const PART_BYTES = 1024 * 1024;
const ZERO_PART_BYTES = 64 * 1024;
const ZEROS = Buffer.alloc(ZERO_PART_BYTES);
/** Parts that are asked for ahead. */
const AHEAD = 4;

export async function inspectRemote(file: string, timeoutMs: number, signal: AbortSignal): Promise<Inspected> {
  const answer = await probeFile(file, timeoutMs, signal);
  if (!answer.ok) {
    const { kind } = toOffshootError({ code: answer.code, message: answer.message, syscall: 'stat', errno: 0 });
    if (kind === 'not-found') throw new OffshootError('not-found', `${file} does not exist`, { path: file });
    throw new OffshootError(kind === 'internal' ? 'io-error' : kind, `${file} cannot be reached: ${answer.message}`, { path: file });
  }
  return { file: answer.path, kind: answer.kind, identity: answer.identity, head: Buffer.from(answer.headBase64, 'base64') };
}

/** Copies the file into `target`, whose length is set by the caller. Each read has its limit; a source that changes meanwhile fails the copy. */
export async function copyRemote(
  source: { readonly file: string; readonly identity: FileIdentity; readonly place: Place }, target: string, timeoutMs: number, signal: AbortSignal,
  onProgress: (doneBytes: number) => void,
): Promise<void> {
  const { file, identity } = source;
  const reader = new RemoteReader({ file, identity, scope: scopeOf(source.place), timeoutMs });
  const handle = await fs.open(target, 'wx', 0o600);
  const ahead: Promise<Buffer>[] = [];
  const stop = (): void => { reader.close(); };
  signal.addEventListener('abort', stop, { once: true });
  try {
    let asked = 0;
    for (let at = 0; at < identity.sizeBytes; ) {
      signal.throwIfAborted();
      while (ahead.length < AHEAD && asked < identity.sizeBytes) {
        const part = reader.read(asked, Math.min(PART_BYTES, identity.sizeBytes - asked), performance.now() + timeoutMs);
        // Its error is heard when its turn comes.
        part.catch(() => undefined);
        ahead.push(part);
        asked += PART_BYTES;
      }
      const bytes = await ahead.shift()!;
      for (let part = 0; part < bytes.length; part += ZERO_PART_BYTES) {
        const piece = bytes.subarray(part, Math.min(bytes.length, part + ZERO_PART_BYTES));
        if (piece.equals(ZEROS.subarray(0, piece.length))) continue;
        for (let done = 0; done < piece.length; ) done += (await handle.write(piece, done, piece.length - done, at + part + done)).bytesWritten;
      }
      at += bytes.length;
      onProgress(at);
    }
    await handle.truncate(identity.sizeBytes);
  } finally {
    signal.removeEventListener('abort', stop);
    reader.close();
    await handle.close();
  }
}
