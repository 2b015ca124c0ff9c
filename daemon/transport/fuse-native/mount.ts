/**
 * Mounts a FileSystem by the npm package fuse-native: the second transport.
 *
 * Requests come through libfuse 2 and are answered on the main thread, one callback each, about a tenth of the speed of
 * the kernel transport; in return an ordinary user can mount. The mount lives and dies with this process: there is no
 * descriptor to hand over, so a dead mount that a killed server left behind is detached before mounting anew.
 *
 * Two methods of the pinned package are replaced. Its option string knows neither `direct_io` (without it the
 * kernel keeps a second cache), nor `use_ino`, nor time-outs of 0 (the control API changes names and sizes too). Its unmount
 * detaches lazily through a shell, which would say yes while disks are open. Its own time-out of 15 s per request is
 * switched off: a slow source must not turn into lost writes.
 */
import { execFile } from 'node:child_process';
import { readFileSync, readdirSync, realpathSync } from 'node:fs';
import { resolve } from 'node:path';
import type { Logger } from 'pino';

import { OffshootError } from '../../../blockstore/errors.js';
import { fuseNativeAbilities } from '../abilities.js';
import type { FileSystem } from '../../filesystem/types.js';
import { loadFuseNative } from './binding.js';
import type { FuseMount } from './binding.js';
import { createOperations } from './operations.js';
import { OPERATION_UTIMENS, OPERATION_WRITE, modificationTimeMs, writeFlags } from './request-record.js';

export interface FuseNativeOptions {
  readonly fileSystem: FileSystem;
  /** An existing, empty directory. */
  readonly mountDir: string;
  readonly logger: Pick<Logger, 'info' | 'warn' | 'error'>;
}

export interface FuseNativeMount {
  /**
   * `busy`: files are open, nothing has changed. With `force` never: whoever has files open gets I/O errors once this
   * process ends. A mount that somebody else has detached counts as unmounted.
   */
  unmount(options?: { readonly force: boolean }): Promise<'unmounted' | 'busy'>;
}

const FILE_SYSTEM_NAME = 'offshoot';
const UNMOUNT_TIMEOUT_MS = 30_000;
const LOOK_TIMEOUT_MS = 5_000;
const UINT32_SPAN = 2 ** 32;

export async function mountFuseNative(options: FuseNativeOptions): Promise<FuseNativeMount> {
  const { fileSystem, logger } = options;
  const FuseClass = loadFuseNative();
  await detachDeadMount(options.mountDir, logger);
  const mountDir = usableMountDir(options.mountDir);

  let currentFlags: number | null = null;
  const translator = createOperations({
    fileSystem,
    currentWriteFlags: () => currentFlags,
    crash(thrown) {
      logger.error({ err: thrown }, 'a file operation failed in a way that it must not');
      process.nextTick(() => { throw thrown; });
    },
  });
  const fuse = new FuseClass(mountDir, translator.operations, { timeout: false });
  const allowOther = mayAllowOther();
  if (!allowOther) logger.warn({ mountDir }, 'only this user can use the mount: /etc/fuse.conf has no user_allow_other');
  fuse._fuseOptions = () => mountOptions(allowOther);
  lookIntoRecords(fuse, (flags) => { currentFlags = flags; }, logger);
  FuseClass.unmount = (_mountDir, done) => { done(null); };
  await mount(fuse, mountDir);
  logger.info({ mountDir, requestBytesMax: fuseNativeAbilities.requestBytesMax }, 'mounted by fuse-native');

  return {
    async unmount({ force } = { force: false }) {
      if (await detach(mountDir, force ? 'lazily' : 'if-idle') === 'busy') return 'busy';
      await closeLoop(fuse);
      translator.releaseAll();
      logger.info({ mountDir }, 'unmounted');
      return 'unmounted';
    },
  };
}

function mountOptions(allowOther: boolean): string {
  const options = [
    ...(allowOther ? ['allow_other'] : []), 'default_permissions', 'nosuid', 'nodev', 'noexec', 'direct_io', 'use_ino',
    'entry_timeout=0', 'attr_timeout=0', `fsname=${FILE_SYSTEM_NAME}`, `subtype=${FILE_SYSTEM_NAME}`,
  ];
  return `-o${options.join(',')}`;
}

/** fusermount grants it to an ordinary user only if the administrator has said so. */
function mayAllowOther(): boolean {
  if (process.getuid?.() === 0) return true;
  try {
    return readFileSync('/etc/fuse.conf', 'utf8').split('\n').some((line) => line.trim() === 'user_allow_other');
  } catch {
    return false; // No configuration file: the default is no.
  }
}

/** Wraps the two handlers whose requests hold more than the package hands on. See `request-record.ts`. */
function lookIntoRecords(fuse: FuseMount, setFlags: (flags: number | null) => void, logger: FuseNativeOptions['logger']): void {
  let warned = false;
  const warnOnce = (): void => {
    if (warned) return;
    warned = true;
    logger.warn({}, 'this build of fuse-native keeps its requests in another layout: every write is flushed before its reply');
  };
  const write = fuse._handlers[OPERATION_WRITE];
  const utimens = fuse._handlers[OPERATION_UTIMENS];
  if (write === undefined || utimens === undefined) {
    throw new OffshootError('tool-missing', 'The fuse-native package has no handlers for writes: reinstall it with npm.');
  }
  fuse._handlers[OPERATION_WRITE] = (record, operation, ...args) => {
    const [, fd, , lengthBytes, low, high] = args as [string, number, Buffer, number, number, number];
    const flags = writeFlags(record, { fd, lengthBytes, offsetBytes: low + high * UINT32_SPAN });
    if (flags === null) warnOnce();
    setFlags(flags);
    return write(record, operation, ...args);
  };
  fuse._handlers[OPERATION_UTIMENS] = (record, operation, ...args) => {
    const [path, atimeLow, atimeHigh, ...rest] = args as [string, number, number, number, number];
    const mtimeMs = modificationTimeMs(record, atimeLow, atimeHigh);
    if (mtimeMs === null) return utimens(record, operation, path, atimeLow, atimeHigh, ...rest);
    return utimens(record, operation, path, atimeLow, signed(atimeHigh), ((mtimeMs % UINT32_SPAN) + UINT32_SPAN) % UINT32_SPAN, Math.floor(mtimeMs / UINT32_SPAN));
  };
}

/** The upper half of a 64-bit number of which the package made two unsigned halves; below 0 is before 1970. */
function signed(high: number): number {
  return high >= UINT32_SPAN / 2 ? high - UINT32_SPAN : high;
}

function mount(fuse: FuseMount, mountDir: string): Promise<void> {
  return new Promise((done, reject) => {
    fuse.mount((error) => {
      if (error === null || error === undefined) done();
      else reject(unusable(mountDir, `libfuse refused it (${error.message}; its own words are on standard error); is /dev/fuse there, and may this user use it?`, error));
    });
  });
}

/** Lets the event loop end. The file system is detached already; the package's own unmount has been made harmless. */
function closeLoop(fuse: FuseMount): Promise<void> {
  return new Promise((done, reject) => {
    fuse.unmount((error) => {
      if (error === null || error === undefined) done();
      else reject(error);
    });
  });
}

/** The directory's real path, if it is there, empty, and nothing is mounted on it. */
function usableMountDir(mountDir: string): string {
  if (isMounted(resolve(mountDir))) throw alreadyMounted(mountDir);
  let realPath: string;
  let entries: readonly string[];
  try {
    realPath = realpathSync(mountDir);
    if (isMounted(realPath)) throw alreadyMounted(mountDir);
    entries = readdirSync(realPath);
  } catch (thrown) {
    if (thrown instanceof OffshootError) throw thrown;
    const { code, message } = thrown as NodeJS.ErrnoException;
    if (code === 'ENOENT') throw unusable(mountDir, 'it does not exist; make the directory first', thrown);
    if (code === 'ENOTDIR') throw unusable(mountDir, 'it is not a directory', thrown);
    throw unusable(mountDir, `it cannot be read (${message})`, thrown);
  }
  if (entries.length > 0) throw unusable(mountDir, 'it is not empty; choose an empty directory');
  return realPath;
}

function alreadyMounted(mountDir: string): OffshootError {
  return unusable(mountDir, 'something is mounted there already; unmount it or choose another directory');
}

function unusable(mountDir: string, reason: string, cause?: unknown): OffshootError {
  return new OffshootError('mount-unusable', `Cannot mount on ${mountDir}: ${reason}.`, { mountDir }, cause);
}

/**
 * A killed server leaves its mount behind, and every access to it fails: nobody can be using it. A child looks, because
 * this process must never wait for a file system that may be its own or may hang.
 */
async function detachDeadMount(path: string, logger: FuseNativeOptions['logger']): Promise<void> {
  const mountDir = resolve(path);
  if (!isMounted(mountDir)) return;
  const said = await complaintOf('stat', ['--', mountDir], LOOK_TIMEOUT_MS);
  if (!said.includes('not connected')) return;
  logger.warn({ mountDir }, 'detaching the dead mount that an earlier server left');
  await detach(mountDir, 'lazily');
}

/** Whether anything is mounted there, without touching it. */
function isMounted(mountDir: string): boolean {
  const escaped = mountDir.replaceAll('\\', '\\134').replaceAll(' ', '\\040').replaceAll('\t', '\\011').replaceAll('\n', '\\012');
  return readFileSync('/proc/self/mountinfo', 'utf8').split('\n').some((line) => line.split(' ')[4] === escaped);
}

async function detach(mountDir: string, how: 'if-idle' | 'lazily'): Promise<'unmounted' | 'busy'> {
  const lazily = how === 'lazily' ? ['-l'] : [];
  const [program, args] = process.getuid?.() === 0
    ? ['umount', ['-i', '--no-canonicalize', ...lazily, '--', mountDir]]
    : ['fusermount', ['-u', ...(how === 'lazily' ? ['-z'] : []), '--', mountDir]];
  const said = await complaintOf(program, args, UNMOUNT_TIMEOUT_MS);
  if (!isMounted(mountDir)) return 'unmounted';
  if (/busy/i.test(said)) return 'busy';
  throw new OffshootError('io-error', `Cannot unmount ${mountDir}: ${said || 'it is still mounted'}.`, { mountDir });
}

/** What a program said when it failed; empty if it did not. */
function complaintOf(program: string, args: readonly string[], timeoutMs: number): Promise<string> {
  return new Promise((done) => {
    execFile(program, args, { timeout: timeoutMs, env: { ...process.env, LC_ALL: 'C' } }, (error, _out, standardError) => {
      done(error === null ? '' : standardError.trim() || error.message);
    });
  });
}
