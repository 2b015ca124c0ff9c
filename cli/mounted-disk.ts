/**
 * Reading disks under the mount: what is sent, exported or compared is read by the command itself, with the rights of whoever
 * called it. A restart of the server is only a pause for it.
 *
 * A path under the mount could lead elsewhere by the time it is opened: what was opened must be the very node that the daemon spoke of.
 */
import { open, type FileHandle } from 'node:fs/promises';
import { OffshootError } from '../blockstore/errors.js';
import type { ControlClient } from '../daemon/control/client.js';
import { visible } from '../daemon/control/paths.js';
import type { ExtentInfo, ExtentPage } from '../daemon/control/transfer-schemas.js';

/** Read at a time. */
export const PIECE_BYTES = 1024 * 1024;

const ZEROS = Buffer.alloc(PIECE_BYTES);

export function isZero(bytes: Uint8Array): boolean {
  return ZEROS.subarray(0, bytes.length).equals(bytes);
}

export async function openMounted(mountPath: string, nodeId: number): Promise<FileHandle> {
  let handle: FileHandle;
  try {
    handle = await open(mountPath, 'r');
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'EACCES' || code === 'EPERM') {
      throw new OffshootError('permission-denied', `${visible(mountPath)} may not be read: disks are read under the mount with your own rights; run this as root, or as whoever may read it`, { path: mountPath }, error);
    }
    throw new OffshootError(code === 'ENOENT' ? 'not-found' : 'io-error', `${visible(mountPath)} cannot be opened (${code ?? String(error)}): it was removed meanwhile, or the mount is not seen from here`, { path: mountPath }, error);
  }
  const { ino } = await handle.stat();
  if (ino === nodeId) return handle;
  await handle.close();
  throw new OffshootError('not-found', `${visible(mountPath)} is something else by now: begin again`, { path: mountPath });
}

/** Bytes from `offsetBytes` on; behind the end of the disk there are zeros. */
export async function readPiece(handle: FileHandle, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
  const bytes = Buffer.alloc(lengthBytes);
  for (let done = 0; done < lengthBytes; ) {
    const { bytesRead } = await handle.read(bytes, done, lengthBytes - done, offsetBytes + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return bytes;
}

/** All pages of extents from an offset on. `expectedNode`: the reference must still stand for it. */
export async function* extentPages(client: ControlClient, reference: string, base: string | null, expectedNode: number, fromBytes = 0): AsyncGenerator<ExtentPage, void, undefined> {
  for (let at: number | null = fromBytes; at !== null; ) {
    const page: ExtentPage = await client.transfers.extents(reference, base, at);
    if (page.nodeId !== expectedNode) throw new OffshootError('not-found', `${visible(reference)} was replaced while it was read: begin again`, { path: reference });
    yield page;
    at = page.nextOffsetBytes;
  }
}

/** Adds an extent, joined with the last one where they touch and are of one type. */
export function pushExtent(extents: ExtentInfo[], next: ExtentInfo): void {
  const last = extents.at(-1);
  if (last?.type === next.type && last.offsetBytes + last.lengthBytes === next.offsetBytes) {
    extents[extents.length - 1] = { ...last, lengthBytes: last.lengthBytes + next.lengthBytes };
  } else if (next.lengthBytes > 0) {
    extents.push({ ...next });
  }
}
