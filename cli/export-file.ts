/**
 * Writing a disk to a file: raw by this process, other formats by qemu-img, which runs without rights and can read the one disk and write the one
 * directory that it is given. The file takes its name only when it is whole and on the disk; until then it lies in a directory beside it.
 */
import { spawn } from 'node:child_process';
import { chmod, chown, link, mkdtemp, open, rename, rm, unlink, type FileHandle } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { OffshootError, toOffshootError } from '../blockstore/errors.js';
import { conversionUid } from '../daemon/control/conversion-user.js';
import { visible } from '../daemon/control/paths.js';
import type { ExtentInfo } from '../daemon/control/transfer-schemas.js';
import { isZero, PIECE_BYTES, readPiece } from './mounted-disk.js';

export interface ExportJob {
  /** Open under the mount, and nobody changes it. */
  readonly disk: FileHandle;
  readonly sizeBytes: number;
  /** Where the disk has data. */
  readonly extents: readonly ExtentInfo[];
  readonly file: string;
  readonly format: 'raw' | 'qcow2' | 'vmdk' | 'vhdx';
  /** A file of this name may be replaced. */
  readonly replace: boolean;
  readonly signal: AbortSignal;
  readonly onProgress: (doneBytes: number, totalBytes: number) => void;
}

const CHILD_MEMORY_BYTES = 4 * 1024 ** 3;
/** What formats take beside the content. */
const OVERHEAD_BYTES = 1024 ** 3;

/** Writes the file. When this throws there is none, and nothing beside it. */
export async function exportFile(job: ExportJob): Promise<void> {
  const directory = dirname(job.file);
  const temporary = await mkdtemp(join(directory, '.offshoot-export-')).catch((error: unknown) => { throw unwritable(directory, error); });
  const written = join(temporary, basename(job.file));
  try {
    if (job.format === 'raw') await writeRaw(job, written);
    else await convert(job, temporary);
    await makeDurable(written);
    job.signal.throwIfAborted();
    await publish(written, job);
    await syncDirectory(directory);
  } catch (thrown) {
    if (job.signal.aborted) throw new OffshootError('cancelled', 'the export was cancelled: nothing of it is left');
    throw thrown instanceof OffshootError ? thrown : toOffshootError(thrown);
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
}

function unwritable(directory: string, error: unknown): OffshootError {
  const code = (error as NodeJS.ErrnoException).code;
  const { kind, message } = toOffshootError(error);
  const what = code === 'ENOENT' ? 'does not exist: make it first' : code === 'ENOTDIR' ? 'is no directory' : code === 'EACCES' || code === 'EPERM' || code === 'EROFS' ? 'cannot be written to by you' : message;
  return new OffshootError(kind, `${visible(directory)} ${what}`, { file: directory }, error);
}

async function writeRaw({ disk, sizeBytes, extents, signal, onProgress }: ExportJob, file: string): Promise<void> {
  const totalBytes = extents.reduce((sum, extent) => sum + extent.lengthBytes, 0);
  const target = await open(file, 'wx', 0o600);
  try {
    await target.truncate(sizeBytes);
    let doneBytes = 0;
    for (const extent of extents) {
      const endBytes = extent.offsetBytes + extent.lengthBytes;
      for (let at = extent.offsetBytes; at < endBytes; at += PIECE_BYTES) {
        signal.throwIfAborted();
        const bytes = await readPiece(disk, at, Math.min(PIECE_BYTES, endBytes - at));
        if (!isZero(bytes)) await writeAll(target, bytes, at);
        doneBytes += bytes.length;
        onProgress(doneBytes, totalBytes);
      }
    }
  } finally {
    await target.close();
  }
}

async function writeAll(target: FileHandle, bytes: Buffer, offsetBytes: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) done += (await target.write(bytes, done, bytes.length - done, offsetBytes + done)).bytesWritten;
}

/** The child's working directory is all that it can write to; the disk is its descriptor 3, which it may open anew because it is made its user's. */
async function convert({ disk, sizeBytes, file, format, signal, onProgress }: ExportJob, temporary: string): Promise<void> {
  const isRoot = process.geteuid?.() === 0;
  const identity = isRoot ? { uid: conversionUid(), gid: conversionUid() } : {};
  if (isRoot) {
    await disk.chown(conversionUid(), conversionUid());
    await disk.chmod(0o400);
    await chown(temporary, conversionUid(), conversionUid());
  }
  const limits = [`--as=${CHILD_MEMORY_BYTES}`, '--core=0', '--nofile=64', '--nproc=256', `--fsize=${Math.ceil(sizeBytes * 1.05) + OVERHEAD_BYTES}`];
  // The name is the final one, because some formats write it into the file; './' keeps qemu-img from reading anything else into it.
  const args = ['convert', '-p', '-f', 'raw', '-O', format, '-t', 'writeback', '/dev/fd/3', `./${basename(file)}`];
  const child = spawn('prlimit', [...limits, '--', 'qemu-img', ...args], {
    cwd: temporary, stdio: ['ignore', 'pipe', 'pipe', disk.fd], env: { PATH: process.env['PATH'] ?? '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' }, ...identity,
  });
  const abort = (): void => { child.kill('SIGKILL'); };
  signal.addEventListener('abort', abort, { once: true });
  let said = '';
  child.stdout?.on('data', (chunk: Buffer) => {
    const percent = /\((\d+(?:\.\d+)?)\/100%\)\s*$/u.exec(chunk.toString('utf8'))?.[1];
    if (percent !== undefined) onProgress(Math.round(Number(percent) / 100 * sizeBytes), sizeBytes);
  });
  child.stderr?.on('data', (chunk: Buffer) => { said = (said + chunk.toString('utf8')).slice(-4096); });
  try {
    const code = await new Promise<number | null>((resolve, reject) => {
      child.on('error', reject);
      child.on('close', resolve);
    }).catch((error: unknown) => { throw missing(error); });
    if (signal.aborted || code === 0) return;
    if (code === 127 || said.includes('failed to execute qemu-img')) throw missing(null);
    const last = said.trim().split('\n').at(-1)?.replace(/^qemu-img: /u, '') ?? '';
    throw new OffshootError(said.includes('No space left') ? 'no-space' : 'io-error', `qemu-img could not write ${visible(file)}: ${last === '' ? `it ended with ${String(code)}` : visible(last)}`);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}

function missing(cause: unknown): OffshootError {
  return new OffshootError('tool-missing', 'qemu-img and prlimit are needed for formats other than raw: apt-get install qemu-utils util-linux', {}, cause);
}

async function makeDurable(file: string): Promise<void> {
  if (process.geteuid?.() === 0) await chown(file, process.geteuid(), process.getegid?.() ?? 0);
  await chmod(file, 0o600);
  const handle = await open(file, 'r+');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Gives the file its name, over no other one unless that is wanted. */
async function publish(written: string, { file, replace }: ExportJob): Promise<void> {
  if (replace) {
    await rename(written, file);
    return;
  }
  try {
    await link(written, file);
    await unlink(written);
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'EEXIST') throw new OffshootError('already-exists', `${visible(file)} exists: choose another name, or add --force to replace it`, { file }, error);
    // A file system without links. Whether the name is free was looked at when it began.
    if (code !== 'EPERM' && code !== 'EOPNOTSUPP') throw error;
    await rename(written, file);
  }
}

async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
