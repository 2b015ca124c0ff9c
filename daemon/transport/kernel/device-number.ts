/**
 * Makes a mount get a device number that was chosen before. Runs in the holder, around mount(2); loads koffi and nothing else.
 *
 * The kernel gives a file system without a device the lowest number that is free, so that it is another one after a restart of the host, or
 * when something else was mounted meanwhile. NFS-Ganesha puts it into the handles that clients keep (`daemon/presenter/nfs/NFS.md`, 4). So for the moment of the
 * mount everything below is taken, by file systems in memory that are mounted nowhere; they go when their descriptors are closed, or their process dies.
 * The numbers are high enough that nobody comes there by himself. Best effort: where it fails the mount has some other number, and the caller says so.
 */
import { randomInt } from 'node:crypto';
import { closeSync, fstatSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import koffi from 'koffi';

const SYS = { fsopen: 430, fsconfig: 431, fsmount: 432 } as const;
const FSOPEN_CLOEXEC = 1;
const FSCONFIG_CMD_CREATE = 6;
const FSMOUNT_CLOEXEC = 1;
/** A descriptor and some kilobytes of the kernel's memory for each number below, for milliseconds. */
const NUMBER_MIN = 500;
const NUMBER_MAX = 1500;
/** Numbers between that somebody else has, or gives back. */
const CORRECTIONS_MAX = 400;
/** From too low to too high: somebody else has the number itself. */
const TURNS_MAX = 3;
const MINOR_LOW = 256;
const MINOR_HIGH_AT = 2 ** 20;

const libc = koffi.load('libc.so.6');
const syscall = libc.func('long syscall(long number, ...)') as unknown as (number: number, ...args: unknown[]) => number;

/** The number that the store's mounts have had; a new one for a store that never had one, which the file then holds. */
export function chosenNumber(file: string): number {
  const kept = readKept(file);
  if (kept !== null) return kept;
  const number = randomInt(NUMBER_MIN, NUMBER_MAX);
  writeFileSync(`${file}.new`, `${number}\n`, { mode: 0o600, flush: true });
  renameSync(`${file}.new`, file);
  return number;
}

/** Runs `mount` while `wanted` is the lowest number that is free, or while it is not, when somebody else has it. */
export function withNumber<T>(wanted: number, mount: () => T): T {
  const taken: number[] = [];
  try {
    takeAllBelow(wanted, taken);
    return mount();
  } finally {
    for (const fd of taken) closeSync(fd);
  }
}

function takeAllBelow(wanted: number, taken: number[]): void {
  let free = lowestFree();
  if (free === null || free > wanted) return;
  for (const missing = wanted - free; taken.length < missing;) {
    const fd = memoryFileSystem();
    if (fd === null) return;
    taken.push(fd);
  }
  // Too many, by those in between that others have, or that somebody gave back meanwhile: corrected from the last, until nobody can be the cause but who has the wanted one.
  let turns = 0;
  let wasBelow = false;
  free = lowestFree();
  for (let corrections = 0; free !== null && free !== wanted && corrections < CORRECTIONS_MAX && turns < TURNS_MAX; corrections += 1) {
    const isBelow = free < wanted;
    if (wasBelow && !isBelow) turns += 1;
    wasBelow = isBelow;
    const fd = isBelow ? memoryFileSystem() : taken.pop() ?? null;
    if (fd === null) return;
    if (isBelow) taken.push(fd);
    else closeSync(fd);
    free = lowestFree();
  }
}

/** A file system of its own, with a number, that is mounted nowhere. */
function memoryFileSystem(): number | null {
  const fd = syscall(SYS.fsopen, 'const char *', 'ramfs', 'unsigned int', FSOPEN_CLOEXEC);
  if (fd < 0) return null;
  if (syscall(SYS.fsconfig, 'int', fd, 'unsigned int', FSCONFIG_CMD_CREATE, 'const char *', null, 'const char *', null, 'int', 0) === 0) return fd;
  closeSync(fd);
  return null;
}

function lowestFree(): number | null {
  const fd = memoryFileSystem();
  if (fd === null) return null;
  try {
    const mountFd = syscall(SYS.fsmount, 'int', fd, 'unsigned int', FSMOUNT_CLOEXEC, 'unsigned int', 0);
    if (mountFd < 0) return null;
    try {
      const { dev } = fstatSync(mountFd);
      return (dev % MINOR_LOW) + Math.floor(dev / MINOR_HIGH_AT) * MINOR_LOW;
    } finally {
      closeSync(mountFd);
    }
  } finally {
    closeSync(fd);
  }
}

function readKept(file: string): number | null {
  try {
    const text = readFileSync(file, 'utf8').trim();
    return /^[1-9][0-9]{0,4}$/u.test(text) ? Number(text) : null;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw error;
  }
}
