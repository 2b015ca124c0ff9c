/**
 * Formats of disk images: found out by signature, described and converted by qemu-img.
 *
 * A raw disk may hold anything, also what looks like another format, so a signature is only ever a reason to ask. An
 * image is hostile until it is converted. What it says of other files was looked for before (`image-header.ts`), in the same copy that
 * qemu-img gets. qemu-img runs as a user that owns nothing on this machine but the two files that it is handed as descriptors, with
 * no capabilities, an argument vector, the format said explicitly, bounded output, and limits on memory, file size,
 * descriptors and, for the description, time. So a flaw in it reads what everybody may read, and writes one file.
 * Main thread of the server; the work is done by children.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import type { FileHandle } from 'node:fs/promises';

import { OffshootError } from '../../blockstore/errors.js';
import { DISK_BYTES_MAX } from '../../blockstore/units.js';
import { conversionUid } from '../control/conversion-user.js';

export type ImageFormat = 'raw' | 'qcow2' | 'vmdk' | 'vhdx' | 'vdi';

const OUTPUT_BYTES_MAX = 256 * 1024;
const INFO_TIMEOUT_MS = 60_000;
/** Address space and processor time of a qemu-img that describes or converts an image. */
const CHILD_MEMORY_BYTES = 4 * 1024 ** 3;
const CHILD_FILES_MAX = 64;
const CHILD_PROCESSES_MAX = 256;
const INFO_CPU_SECONDS = 30;
/** The child's descriptors: the image, and the file to write. */
const IMAGE_FD = 3;
const TARGET_FD = 4;

interface Signature {
  readonly format: string;
  readonly offsetBytes: number;
  readonly bytes: Buffer;
}

const SIGNATURES: readonly Signature[] = [
  { format: 'qcow2', offsetBytes: 0, bytes: Buffer.from([0x51, 0x46, 0x49, 0xfb]) },
  { format: 'vmdk', offsetBytes: 0, bytes: Buffer.from('KDMV') },
  { format: 'vmdk', offsetBytes: 0, bytes: Buffer.from('COWD') },
  { format: 'vmdk', offsetBytes: 0, bytes: Buffer.from('# Disk DescriptorFile') },
  { format: 'vhdx', offsetBytes: 0, bytes: Buffer.from('vhdxfile') },
  { format: 'vdi', offsetBytes: 0x40, bytes: Buffer.from([0x7f, 0x10, 0xda, 0xbe]) },
  { format: 'vpc', offsetBytes: 0, bytes: Buffer.from('conectix') },
  { format: 'qed', offsetBytes: 0, bytes: Buffer.from('QED\0') },
  { format: 'parallels', offsetBytes: 0, bytes: Buffer.from('WithoutFreeSpace') },
];

/** The foreign format that the file's first bytes speak of; null: nothing known, so raw. */
export async function detectFormat(handle: FileHandle): Promise<string | null> {
  const head = Buffer.alloc(512);
  const { bytesRead } = await handle.read(head, 0, head.length, 0);
  return formatOf(head.subarray(0, bytesRead));
}

/** The same, of the first bytes themselves. */
export function formatOf(head: Buffer): string | null {
  for (const { format, offsetBytes, bytes } of SIGNATURES) {
    const end = offsetBytes + bytes.length;
    if (end <= head.length && head.subarray(offsetBytes, end).equals(bytes)) return format;
  }
  return null;
}

/** Virtual size in bytes of a foreign image that stands on no other file. `file` is what messages call it. */
export async function describeImage(image: FileHandle, format: ImageFormat, file: string): Promise<{ readonly virtualBytes: number }> {
  const text = await run(['info', '--output=json', '-f', format, `/dev/fd/${IMAGE_FD}`], {
    descriptors: [image.fd], limits: ['--fsize=0', `--cpu=${INFO_CPU_SECONDS}`],
  });
  let parsed: unknown;
  try {
    parsed = JSON.parse(text) as unknown;
  } catch (error) {
    throw new OffshootError('foreign-format', `qemu-img said nothing sensible of ${file}`, { path: file }, error);
  }
  const fields = new Map<string, unknown>(Object.entries(parsed as object));
  const specific = objectAt(objectAt(parsed, 'format-specific'), 'data');
  if (fields.get('backing-filename') !== undefined || fields.get('full-backing-filename') !== undefined) {
    throw new OffshootError('foreign-format',
      `${file} is an overlay of ${String(fields.get('backing-filename'))}, which is never followed; flatten it first, with \`qemu-img convert\``, { path: file });
  }
  if (specific.has('data-file')) {
    throw new OffshootError('foreign-format', `${file} keeps its data in another file, which is never followed; convert it first`, { path: file });
  }
  if (fields.get('encrypted') === true) throw new OffshootError('foreign-format', `${file} is encrypted; decrypt it first`, { path: file });
  const virtualBytes = fields.get('virtual-size');
  if (typeof virtualBytes !== 'number') throw new OffshootError('foreign-format', `qemu-img did not say how large ${file} is`, { path: file });
  // A header says what it likes, and numbers beyond this are not even exact.
  if (virtualBytes > DISK_BYTES_MAX) throw new OffshootError('too-large', `${file} describes a disk larger than 64 TiB`, { path: file });
  return { virtualBytes };
}

export interface Conversion {
  readonly image: FileHandle;
  readonly format: ImageFormat;
  /** Open for writing, empty. */
  readonly target: FileHandle;
  readonly virtualBytes: number;
  readonly signal: AbortSignal;
  /** Gets a fraction of 0 to 1. */
  readonly onProgress: (fraction: number) => void;
}

/** Converts a described image to a sparse raw file. Both files belong to `conversionUid()`. */
export async function convertImage({ image, format, target, virtualBytes, signal, onProgress }: Conversion): Promise<void> {
  await run(['convert', '-p', '-f', format, '-O', 'raw', '-S', '4k', '-t', 'writeback', `/dev/fd/${IMAGE_FD}`, `/dev/fd/${TARGET_FD}`], {
    descriptors: [image.fd, target.fd], limits: [`--fsize=${virtualBytes}`], signal,
    onOutput: (text) => {
      const percent = /\((\d+(?:\.\d+)?)\/100%\)\s*$/.exec(text)?.[1];
      if (percent !== undefined) onProgress(Number(percent) / 100);
    },
  });
}

function objectAt(value: unknown, key: string): ReadonlyMap<string, unknown> {
  const inner: unknown = value instanceof Map ? value.get(key) : typeof value === 'object' && value !== null ? new Map<string, unknown>(Object.entries(value)).get(key) : undefined;
  return new Map(typeof inner === 'object' && inner !== null ? Object.entries(inner) : []);
}

interface RunOptions {
  /** What the child gets from descriptor 3 on. */
  readonly descriptors: readonly number[];
  /** Of prlimit(1), beside those that always hold. */
  readonly limits: readonly string[];
  readonly signal?: AbortSignal;
  /** Gets the output as it comes; without it the output is the result, and there is a time-out. */
  readonly onOutput?: (text: string) => void;
}

/** Runs qemu-img under limits and without rights; its standard output. */
async function run(args: readonly string[], { descriptors, limits, signal, onOutput }: RunOptions): Promise<string> {
  const always = [`--as=${CHILD_MEMORY_BYTES}`, '--core=0', `--nofile=${CHILD_FILES_MAX}`, `--nproc=${CHILD_PROCESSES_MAX}`];
  // Only root can become somebody else, and only root has rights to lose. Becoming an ordinary user takes all capabilities and groups.
  const identity = process.geteuid?.() === 0 ? { uid: conversionUid(), gid: conversionUid() } : {};
  const child = spawn('prlimit', [...always, ...limits, '--', 'qemu-img', ...args], {
    cwd: '/', stdio: ['ignore', 'pipe', 'pipe', ...descriptors], env: { PATH: process.env['PATH'] ?? '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
    ...identity,
    ...(onOutput === undefined ? { timeout: INFO_TIMEOUT_MS, killSignal: 'SIGKILL' as const } : {}),
  });
  const abort = (): void => { child.kill('SIGKILL'); };
  signal?.addEventListener('abort', abort, { once: true });
  try {
    return await collect(child, signal, onOutput);
  } finally {
    signal?.removeEventListener('abort', abort);
  }
}

async function collect(child: ChildProcess, signal: AbortSignal | undefined, onOutput: ((text: string) => void) | undefined): Promise<string> {
  let out = '';
  let err = '';
  child.stdout?.on('data', (chunk: Buffer) => {
    const text = chunk.toString('utf8');
    if (onOutput === undefined) out = (out + text).slice(0, OUTPUT_BYTES_MAX);
    else onOutput(text);
  });
  child.stderr?.on('data', (chunk: Buffer) => { err = (err + chunk.toString('utf8')).slice(-4096); });
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (status) => { resolve(status); });
  }).catch((error: unknown) => {
    throw new OffshootError('tool-missing', 'prlimit and qemu-img are needed to read foreign images: apt-get install util-linux qemu-utils', {}, error);
  });
  if (signal?.aborted === true) throw new OffshootError('cancelled', 'the import was cancelled');
  if (code === 127 || err.includes('failed to execute qemu-img')) {
    throw new OffshootError('tool-missing', 'qemu-img is needed to read foreign images: apt-get install qemu-utils');
  }
  if (code !== 0) {
    const said = err.trim().split('\n').at(-1) ?? '';
    const kind = err.includes('No space left') ? 'no-space' : 'foreign-format';
    throw new OffshootError(kind, said === '' ? `qemu-img ended with ${String(code)}` : said.replace(/^qemu-img: /, ''));
  }
  return out;
}
