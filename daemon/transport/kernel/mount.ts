/**
 * Mounting and unmounting: /dev/fuse, mount(2), umount2(2), and what the kernel says of a mount without being asked through
 * it.
 *
 * Runs in the holder, and in the server for the figures of its own connection. Nothing here walks into a mount in the calling
 * process: a stat of a mount whose server is hung, or is this very process, waits for ever. The mount table
 * (/proc/self/mountinfo) and the FUSE control file system (/sys/fs/fuse/connections) answer from the kernel's memory;
 * the one question that only the mount itself can answer, whether its server is dead, is put by a child process that may be
 * left behind. Loads koffi and nothing else: the holder stays small.
 */
import { spawnSync } from 'node:child_process';
import { closeSync, existsSync, fstatSync, mkdtempSync, openSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import koffi from 'koffi';
import { Errno, OffshootError, toOffshootError } from '../../../blockstore/errors.js';

/** What /proc/self/mountinfo says of one mount. */
export interface MountEntry {
  readonly mountId: number;
  readonly parentId: number;
  /** Minor number of the file system's device: for FUSE, the number of the connection. */
  readonly deviceMinor: number;
  readonly mountDir: string;
  readonly fileSystemType: string;
  readonly source: string;
}

export type MountState =
  | { readonly kind: 'none' }
  | { readonly kind: 'mounted'; readonly fileSystemType: string; readonly source: string }
  /** A FUSE mount whose connection is gone: every use of it is ENOTCONN, and nothing can bring it back. */
  | { readonly kind: 'dead'; readonly fileSystemType: string; readonly source: string };

export interface MountOptions {
  /** Largest READ that the kernel sends. Only a mount option can say it; INIT must agree with the buffers behind it. */
  readonly readBytesMax?: number;
}

export const FILE_SYSTEM_TYPE = 'fuse.offshoot';
const SOURCE = 'offshoot';
const DEVICE = '/dev/fuse';
const READ_BYTES_MAX = 1024 * 1024;
const CONNECTIONS_DIR = '/sys/fs/fuse/connections';

const MountFlag = { NOSUID: 2, NODEV: 4, NOEXEC: 8 } as const;
const UnmountFlag = { DETACH: 2, NOFOLLOW: 8 } as const;
/** A live server answers in microseconds; one that takes longer is busy or hung, which is not dead. */
const PROBE_SECONDS = 1;

const libc = koffi.load('libc.so.6');
const sysMount = libc.func('int mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)') as unknown as (
  source: string, target: string, type: string, flags: number, data: string,
) => number;
const sysUmount2 = libc.func('int umount2(const char *target, int flags)') as unknown as (target: string, flags: number) => number;

/** Mounts that this process made, and its descriptor of each: as long as that is open, the connection lives. */
const ownMounts = new Map<number, number>();

/** A new, unconnected FUSE connection. Closed on exec; a child gets it as a slot of its stdio. */
export function openFuseDevice(): number {
  try {
    return openSync(DEVICE, 'r+');
  } catch (thrown) {
    const cause = toOffshootError(thrown);
    const [kind, advice] = cause.kind === 'not-found'
      ? ['tool-missing' as const, "Load the kernel's module: modprobe fuse"]
      : [cause.kind, 'Run as root'];
    throw new OffshootError(kind, `${DEVICE} cannot be opened: ${cause.message}. ${advice}.`, { path: DEVICE }, thrown);
  }
}

/**
 * Mounts the connection `fuseFd` on `mountDir`, for all users, with the kernel checking permissions. Returns when the mount is
 * in place; INIT waits on the descriptor to be read by the first server.
 */
export function mountFuse(fuseFd: number, mountDir: string, options: MountOptions = {}): void {
  const data = [
    `fd=${fuseFd}`, 'rootmode=40000', 'user_id=0', 'group_id=0', 'allow_other', 'default_permissions',
    `max_read=${options.readBytesMax ?? READ_BYTES_MAX}`,
  ].join(',');
  const code = errnoOfCall(() => sysMount(SOURCE, mountDir, FILE_SYSTEM_TYPE, MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC, data));
  if (code !== 0) throw mountFailure(`Offshoot could not be mounted on ${mountDir}`, mountDir, code);
  const entry = topmostMount(mountDir);
  if (entry !== null) ownMounts.set(entry.mountId, fuseFd);
}

/** Unmounts the topmost mount of `mountDir`. `lazy` takes it from sight at once, whoever still uses it. */
export function unmount(mountDir: string, options: { readonly lazy: boolean }): 'unmounted' | 'busy' {
  const entry = topmostMount(mountDir);
  if (entry === null) return 'unmounted';
  const code = errnoOfCall(() => sysUmount2(mountDir, UnmountFlag.NOFOLLOW | (options.lazy ? UnmountFlag.DETACH : 0)));
  if (code === Errno.EBUSY) return 'busy';
  if (code !== 0 && isMounted(mountDir)) throw mountFailure(`${mountDir} could not be unmounted`, mountDir, code);
  ownMounts.delete(entry.mountId);
  return 'unmounted';
}

// --- What is mounted -----------------------------------------------------------------------------------------------------

/** Asks the mount table only. `mountDir` is an absolute path without symbolic links. */
export function isMounted(mountDir: string): boolean {
  return topmostMount(mountDir) !== null;
}

/**
 * What is mounted on `mountDir`, and whether a FUSE mount there is dead. Looks at the table; only a FUSE mount of some other
 * process is tried, by a child, for at most a second or so. A server that does not answer in that time counts as mounted.
 */
export function mountState(mountDir: string): MountState {
  const entry = topmostMount(mountDir);
  if (entry === null) return { kind: 'none' };
  const { fileSystemType, source } = entry;
  const isFuse = fileSystemType === 'fuse' || fileSystemType === 'fuseblk' || fileSystemType.startsWith('fuse.');
  const isDead = isFuse && !isHeldHere(entry) && isUnconnected(mountDir);
  return { kind: isDead ? 'dead' : 'mounted', fileSystemType, source };
}

function isHeldHere(entry: MountEntry): boolean {
  const fuseFd = ownMounts.get(entry.mountId);
  if (fuseFd === undefined) return false;
  try {
    return fstatSync(fuseFd).rdev === statSync(DEVICE).rdev;
  } catch (thrown) {
    // Closed meanwhile, or no device any more: then it is not known here.
    if (['EBADF', 'ENOENT'].includes(String((thrown as { readonly code?: unknown }).code))) return false;
    throw thrown;
  }
}

/** The mount that a path walk to `mountDir` ends in, or null. */
export function topmostMount(mountDir: string): MountEntry | null {
  const here = parseMountTable(readFileSync('/proc/self/mountinfo', 'utf8')).filter((entry) => entry.mountDir === mountDir);
  const covered = new Set(here.map((entry) => entry.parentId));
  return here.find((entry) => !covered.has(entry.mountId)) ?? null;
}

export function parseMountTable(text: string): readonly MountEntry[] {
  return text.split('\n').flatMap((line) => {
    const [left = '', right] = line.split(' - ');
    const [mountId, parentId, device, , mountDir] = left.split(' ');
    const [fileSystemType, source] = right?.split(' ') ?? [];
    if (device === undefined || mountDir === undefined || fileSystemType === undefined || source === undefined) return [];
    return [{
      mountId: Number(mountId),
      parentId: Number(parentId),
      deviceMinor: Number(device.split(':')[1]),
      mountDir: unescapeOctal(mountDir),
      fileSystemType: unescapeOctal(fileSystemType),
      source: unescapeOctal(source),
    }];
  });
}

/** Blanks, newlines, backslashes and number signs stand in the table as a backslash and three octal digits. */
function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/gu, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}

/**
 * Asks the mount itself, by a grandchild that nobody waits for: a process that waits for a hung server may not even die of
 * SIGKILL. timeout(1) in between is the one that is waited for, and it is killed in turn. What the grandchild says
 * goes to a file, since a pipe would stay open as long as it lives.
 */
function isUnconnected(mountDir: string): boolean {
  const scratch = mkdtempSync(join(tmpdir(), 'offshoot-probe-'));
  const said = openSync(join(scratch, 'stderr'), 'w');
  try {
    spawnSync('timeout', ['--signal=KILL', String(PROBE_SECONDS), 'stat', '--file-system', '--', mountDir], {
      stdio: ['ignore', 'ignore', said],
      env: { ...process.env, LC_ALL: 'C' },
      cwd: '/',
      timeout: (PROBE_SECONDS + 1) * 1000,
      killSignal: 'SIGKILL',
    });
    const words = readFileSync(join(scratch, 'stderr'), 'utf8');
    return words.includes('Transport endpoint is not connected') || words.includes('Software caused connection abort');
  } finally {
    closeSync(said);
    rmSync(scratch, { recursive: true, force: true });
  }
}

// --- The connection ------------------------------------------------------------------------------------------------------

/** Number of the FUSE connection mounted on `mountDir`, or null if there is none. */
export function connectionOf(mountDir: string): number | null {
  return topmostMount(mountDir)?.deviceMinor ?? null;
}

/** Mounts the FUSE control file system where it belongs, if it is not: without it a hung mount has no medicine. */
export function ensureFuseControl(): void {
  if (topmostMount(CONNECTIONS_DIR)?.fileSystemType === 'fusectl') return;
  const code = errnoOfCall(() => sysMount('fusectl', CONNECTIONS_DIR, 'fusectl', MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC, ''));
  // EBUSY: another process was quicker.
  if (code !== 0 && code !== Errno.EBUSY) throw mountFailure(`The FUSE control file system could not be mounted on ${CONNECTIONS_DIR}`, CONNECTIONS_DIR, code);
}

/** Requests that wait for an answer, read or not. Null if the connection or the control file system is not there. */
export function waitingRequests(connection: number): number | null {
  const path = `${CONNECTIONS_DIR}/${connection}/waiting`;
  return existsSync(path) ? Number(readFileSync(path, 'utf8')) : null;
}

/**
 * The last resort: ends the connection. Every request, waiting and to come, fails; the mount is dead from then on and has only
 * to be unmounted. Sets processes free that nothing else can. False if there is no such connection.
 */
export function abortConnection(connection: number): boolean {
  ensureFuseControl();
  const path = `${CONNECTIONS_DIR}/${connection}/abort`;
  if (!existsSync(path)) return false;
  writeFileSync(path, '1');
  return true;
}

/**
 * Settings of the kernel that would end a connection, and every guest's disk with it, when one request waits too long: a
 * request that waits for the next server is such a one. Empty when all is well.
 */
export function requestTimeouts(): readonly { readonly name: string; readonly seconds: number }[] {
  return ['default_request_timeout', 'max_request_timeout'].flatMap((name) => {
    const path = `/proc/sys/fs/fuse/${name}`;
    const seconds = existsSync(path) ? Number(readFileSync(path, 'utf8')) : 0;
    return seconds === 0 ? [] : [{ name: `fs.fuse.${name}`, seconds }];
  });
}

// --- Calls ---------------------------------------------------------------------------------------------------------------

/** The errno of a call that gives 0 for success; 0 then. Made again when a signal broke it off. */
function errnoOfCall(call: () => number): number {
  for (;;) {
    if (call() === 0) return 0;
    const code = koffi.errno();
    if (code !== Errno.EINTR) return code === 0 ? Errno.EIO : code;
  }
}

function mountFailure(what: string, path: string, code: number): OffshootError {
  const [reason, advice] = explained.get(code) ?? [`errno ${code}`, "See the kernel's log (dmesg)"];
  const kind = code === Errno.EPERM || code === Errno.EACCES ? 'permission-denied' : 'mount-unusable';
  return new OffshootError(kind, `${what}: ${reason}. ${advice}.`, { path, errno: code });
}

const explained = new Map<number, readonly [string, string]>([
  [Errno.EPERM, ['not permitted', 'Run as root, in a container with CAP_SYS_ADMIN']],
  [Errno.EACCES, ['permission denied', 'Run as root']],
  [Errno.ENOENT, ['there is no such directory', 'Make it first']],
  [Errno.ENOTDIR, ['it is not a directory', 'Name a directory']],
  [Errno.EBUSY, ['it is in use', 'Name another directory']],
  [Errno.ENODEV, ['the kernel does not know the file system', 'Load its module: modprobe fuse']],
  [Errno.EINVAL, ['the kernel refused the options, or it is not a mount point', "See the kernel's log (dmesg)"]],
]);
