/**
 * The file that is to be imported: found, opened once, and looked at through that one descriptor.
 *
 * A path may lie where others can write, and lead somewhere else a moment later. So it is resolved, opened without following a
 * link at its end and without waiting for a FIFO, and the descriptor is asked what was really opened: another path than the
 * resolved one means that somebody exchanged something in between, and is refused. From there on nothing uses the path any more. A
 * symbolic link that is there when the administrator names it is followed, and the result says where it led.
 *
 * Main thread; only asynchronous calls touch source paths, because one that leads into our own mount would make this thread wait for
 * itself. A file on a network or FUSE file system is not touched by this process at all, since one that hangs would take its threads with
 * it: a process of its own says what the file is, and another one reads it (`remote-import.ts`), as long as it is that file.
 */
import fs from 'node:fs/promises';
import path from 'node:path';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { FileIdentity } from '../../blockstore/meta/rows.js';
import { identityOf } from '../../blockstore/sources/identity.js';
import { placeOf, type Place } from '../../blockstore/sources/place.js';
import { DISK_BYTES_MAX } from '../../blockstore/units.js';
import { inspectRemote } from './remote-import.js';

export interface ImportSource {
  /** Without symbolic links. */
  readonly file: string;
  readonly identity: FileIdentity;
  /** Null: the file may not answer, and is read by a process of its own. */
  readonly handle: fs.FileHandle | null;
  readonly place: Place;
  /** The first bytes of a file that has no handle here. */
  readonly head: Buffer | null;
}

export interface ForbiddenPlaces {
  readonly storeDir: string;
  readonly mountDir: string;
}

const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK, O_NOCTTY } = fs.constants;

/** Opens a regular file that lies neither under the mount nor in the store. The caller closes the handle. */
export async function openSource(file: string, places: ForbiddenPlaces, timeoutMs: number, signal: AbortSignal): Promise<ImportSource> {
  refusePlace(file, path.resolve(file), places);
  const place = placeOf(path.resolve(file));
  if (place.isRemote) return await openRemote(file, place, places, timeoutMs, signal);
  const real = await resolvePath(file);
  refusePlace(file, real, places);
  // Before it is opened: opening a device may have effects, and a file under our own mount must not be opened at all.
  refuseKind(file, await fs.lstat(real, { bigint: true }).catch((error: unknown) => exchanged(file, error)));
  const handle = await fs.open(real, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY).catch((error: unknown) => {
    if ((error as NodeJS.ErrnoException).code === 'ELOOP') return exchanged(file, error);
    throw unreachable(file, error);
  });
  try {
    const stat = await handle.stat({ bigint: true });
    // Another way to the same mount (a bind mount) has another path and the same device.
    if (stat.dev === (await fs.stat(places.mountDir, { bigint: true })).dev) {
      throw new OffshootError('invalid-argument', `${file} lies under the mount already, by another path: use \`offshoot clone\``, { path: real });
    }
    refuseKind(file, stat);
    if (await fs.readlink(`/proc/self/fd/${handle.fd}`) !== real) exchanged(file, undefined);
    return { file: real, identity: identityOf(stat), handle, place, head: null };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

async function openRemote(file: string, place: Place, places: ForbiddenPlaces, timeoutMs: number, signal: AbortSignal): Promise<ImportSource> {
  const found = await inspectRemote(file, timeoutMs, signal);
  refusePlace(file, found.file, places);
  if (found.identity.device === Number((await fs.stat(places.mountDir, { bigint: true })).dev)) {
    throw new OffshootError('invalid-argument', `${file} lies under the mount already, by another path: use \`offshoot clone\``, { path: found.file });
  }
  refuseKind(file, { isDirectory: () => found.kind === 'directory', isFile: () => found.kind === 'file', size: BigInt(found.identity.sizeBytes) });
  return { file: found.file, identity: found.identity, handle: null, place, head: found.head };
}

/** `source-changed` when the file was written to since it was opened. */
export async function assertSourceUnchanged(source: ImportSource, file: string): Promise<void> {
  // Looked at behind each read, by who read it.
  if (source.handle === null) return;
  const after = identityOf(await source.handle.stat({ bigint: true }));
  if (after.mtimeNs === source.identity.mtimeNs && after.sizeBytes === source.identity.sizeBytes) return;
  throw new OffshootError('source-changed', `${file} was changed while it was imported; stop whoever writes to it and import it again`, { path: source.file });
}

function refuseKind(file: string, stat: { isDirectory(): boolean; isFile(): boolean; readonly size: bigint }): void {
  if (stat.isDirectory()) throw new OffshootError('is-a-directory', `${file} is a directory; name the file of a disk image`, { path: file });
  if (!stat.isFile()) throw new OffshootError('invalid-argument', `${file} is not a regular file; only those can be imported`, { path: file });
  if (stat.size === 0n) throw new OffshootError('invalid-argument', `${file} is empty; a disk has at least one byte`, { path: file });
  if (stat.size > BigInt(DISK_BYTES_MAX)) throw new OffshootError('too-large', `${file} is larger than 64 TiB`, { path: file });
}

function refusePlace(file: string, where: string, { storeDir, mountDir }: ForbiddenPlaces): void {
  if (isWithin(where, mountDir)) {
    throw new OffshootError('invalid-argument', `${file} lies under the mount already: use \`offshoot clone ${path.relative(mountDir, where)} ...\``, { path: file });
  }
  if (isWithin(where, storeDir)) {
    throw new OffshootError('invalid-argument', `${file} lies in the store itself, whose files are not for import`, { path: file });
  }
}

async function resolvePath(file: string): Promise<string> {
  try {
    return await fs.realpath(file);
  } catch (error) {
    throw unreachable(file, error);
  }
}

function unreachable(file: string, error: unknown): OffshootError {
  const cause = toOffshootError(error);
  if (cause.kind === 'not-found') return new OffshootError('not-found', `${file} does not exist`, { path: file }, error);
  return new OffshootError(cause.kind, `${file} cannot be reached: ${(error as Error).message}`, { path: file }, error);
}

function exchanged(file: string, cause: unknown): never {
  throw new OffshootError('source-changed', `${file} was exchanged for another file while it was opened: import it from a directory that only trusted users can write to`, { path: file }, cause);
}

function isWithin(file: string, directory: string): boolean {
  return file === directory || file.startsWith(`${directory}/`);
}
