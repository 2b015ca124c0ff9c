/**
 * Finds and loads the npm package fuse-native 2.2.6, and says what to install when it cannot.
 *
 * The package is an optional dependency in CommonJS with a prebuilt addon that is linked to Debian's libfuse 2, so it is
 * required only when this transport is asked for. Its types are declared here, as far as they are used. Two methods of
 * it are replaced by the mount (see `mount.ts`), which is why the version is checked: the package is pinned.
 */
import { accessSync, constants } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

import { OffshootError } from '../../../blockstore/errors.js';

/** 0, a negative errno, or for read and write the number of bytes. */
export type Reply = (result: number) => void;

export interface StatReply {
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly size: number;
  readonly blocks: number;
  readonly blksize: number;
  readonly ino: number;
  readonly nlink: number;
  /** Milliseconds since the epoch. */
  readonly atime: number;
  readonly mtime: number;
  readonly ctime: number;
}

export interface StatfsReply {
  readonly bsize: number;
  readonly frsize: number;
  readonly blocks: number;
  readonly bfree: number;
  readonly bavail: number;
  readonly files: number;
  readonly ffree: number;
  readonly favail: number;
  readonly namemax: number;
}

/**
 * The callbacks that are given to the package. What is left out is left out on purpose: `create` (it hides the open
 * flags; without it the kernel falls back to mknod and open, which shows them), `opendir` (its arguments are wrong in
 * this version), `fgetattr` (ignored by the package), `access` (the kernel checks), `flush` (promises nothing), extended attributes.
 */
export interface FuseOperations {
  getattr(path: string, reply: (error: number, stat?: StatReply) => void): void;
  readdir(path: string, reply: (error: number, names?: readonly string[], stats?: readonly StatReply[]) => void): void;
  readlink(path: string, reply: (error: number, target?: string) => void): void;
  statfs(path: string, reply: (error: number, statfs?: StatfsReply) => void): void;
  mknod(path: string, mode: number, device: number, reply: Reply): void;
  mkdir(path: string, mode: number, reply: Reply): void;
  symlink(target: string, path: string, reply: Reply): void;
  link(path: string, newPath: string, reply: Reply): void;
  unlink(path: string, reply: Reply): void;
  rmdir(path: string, reply: Reply): void;
  rename(path: string, newPath: string, reply: Reply): void;
  chmod(path: string, mode: number, reply: Reply): void;
  chown(path: string, uid: number, gid: number, reply: Reply): void;
  truncate(path: string, sizeBytes: number, reply: Reply): void;
  ftruncate(path: string, fd: number, sizeBytes: number, reply: Reply): void;
  utimens(path: string, atimeMs: number, mtimeMs: number, reply: Reply): void;
  open(path: string, flags: number, reply: (error: number, fd?: number) => void): void;
  release(path: string, fd: number, reply: Reply): void;
  read(path: string, fd: number, buffer: Buffer, length: number, position: number, reply: Reply): void;
  write(path: string, fd: number, buffer: Buffer, length: number, position: number, reply: Reply): void;
  fsync(path: string, dataOnly: number, fd: number, reply: Reply): void;
  fsyncdir(path: string, dataOnly: number, fd: number, reply: Reply): void;
}

/** What the addon calls for one request: the request's record (native memory), its operation number, its arguments. */
export type RequestHandler = (record: Buffer, operation: number, ...args: readonly unknown[]) => unknown;

export interface FuseMount {
  readonly _handlers: (RequestHandler | undefined)[];
  _fuseOptions: () => string;
  mount(done: (error?: Error | null) => void): void;
  unmount(done: (error?: Error | null) => void): void;
}

export interface FuseNative {
  new (mountDir: string, operations: FuseOperations, options: { readonly timeout: false }): FuseMount;
  unmount: (mountDir: string, done: (error?: Error | null) => void) => void;
}

export interface LoaderEnvironment {
  readonly require: (id: string) => unknown;
  /** Full path of a program, or null. */
  readonly findProgram: (name: string) => string | null;
}

const VERSION = '2.2.6';
const PACKAGES = 'apt-get install libfuse2 fuse';

export function loadFuseNative(environment: LoaderEnvironment = realEnvironment()): FuseNative {
  if (environment.findProgram('fusermount') === null) {
    throw missing(`fusermount is not installed: ${PACKAGES}`);
  }
  let loaded: unknown;
  let version: unknown;
  try {
    version = (environment.require('fuse-native/package.json') as { readonly version?: unknown }).version;
    loaded = environment.require('fuse-native');
  } catch (thrown) {
    throw missing(reasonOf(thrown), thrown);
  }
  if (version !== VERSION) {
    throw missing(`version ${VERSION} of the npm package fuse-native is needed, not ${String(version)}: npm install fuse-native@${VERSION}`);
  }
  return loaded as FuseNative;
}

function reasonOf(thrown: unknown): string {
  const text = thrown instanceof Error ? thrown.message : String(thrown);
  const code = (thrown as { code?: unknown } | null)?.code;
  if (text.includes('libfuse.so.2')) return `Debian's libfuse 2 is not installed: ${PACKAGES}`;
  if (code === 'MODULE_NOT_FOUND' && text.includes('fuse-native')) {
    return `the optional npm package fuse-native is not installed: npm install --include=optional, and ${PACKAGES}`;
  }
  return `the npm package fuse-native does not load on this machine (${text.split('\n')[0] ?? text}): reinstall it with npm, and ${PACKAGES}`;
}

function missing(reason: string, cause?: unknown): OffshootError {
  return new OffshootError(
    'tool-missing', `The fuse-native transport cannot be used: ${reason}. The kernel transport needs none of it (--transport kernel).`, {}, cause,
  );
}

function realEnvironment(): LoaderEnvironment {
  return { require: createRequire(import.meta.url) as (id: string) => unknown, findProgram };
}

/** Looks in PATH and in the places where Debian keeps it, because a daemon's PATH may be short. */
function findProgram(name: string): string | null {
  const directories = [...(process.env['PATH'] ?? '').split(':'), '/usr/bin', '/bin', '/usr/local/bin'];
  for (const directory of directories) {
    if (directory === '') continue;
    const path = join(directory, name);
    try {
      accessSync(path, constants.X_OK);
      return path;
    } catch {
      // Not here; the next directory may have it.
    }
  }
  return null;
}
