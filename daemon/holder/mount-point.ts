/**
 * The daemon's place in the mount table: made sure of at the start, given back at the end.
 *
 * Runs in the holder. What is mounted is asked of the mount table alone; the mount itself is never walked into. Only a mount of our own
 * kind is ever unmounted or aborted: what somebody else has mounted below or above it is not ours to touch.
 */
import { closeSync, constants, openSync, readFileSync } from 'node:fs';

import { OffshootError } from '../../blockstore/errors.js';
import { FILE_SYSTEM_TYPE, abortConnection, isMounted, mountState, parseMountTable, topmostMount, unmount } from '../transport/kernel/mount.js';
import type { UnmountOutcome } from './holder-ports.js';
import { findMountUsers } from './mount-users.js';
import { tryLock } from './store-lock.js';

const DEAD_MOUNTS_MAX = 16;

/** Unmounts what a daemon left that was killed together with its holder, and says so. Anything else there is refused. */
export function clearDeadMounts(mountDir: string): readonly string[] {
  const notes: string[] = [];
  for (let cleared = 0; cleared < DEAD_MOUNTS_MAX; cleared += 1) {
    const state = mountState(mountDir);
    if (state.kind === 'none') return notes;
    const isOurs = state.fileSystemType === FILE_SYSTEM_TYPE;
    if (!isOurs) {
      throw unusable(
        mountDir,
        `is already a mount, of ${state.source} (${state.fileSystemType}${state.kind === 'dead' ? ', dead' : ''}): unmount that first, or name another directory`,
      );
    }
    if (state.kind === 'mounted') {
      throw unusable(mountDir, 'is already the mount of an offshoot daemon: stop that daemon first, or name another directory');
    }
    if (unmount(mountDir, { lazy: false }) === 'busy') {
      throw unusable(mountDir, `holds the dead mount of a daemon that was killed, still in use${usedBy(mountDir)}: end them, or 'umount -l ${mountDir}'`);
    }
    notes.push(`cleared the dead mount of a daemon that was killed from ${mountDir}`);
  }
  throw unusable(mountDir, "holds too many dead mounts: 'umount' them by hand");
}

/**
 * Locks the directory under the mount, so that two daemons with two stores cannot mount over each other. The descriptor is kept
 * as long as the mount is wanted.
 */
export function lockMountPoint(mountDir: string): number {
  const fd = openSync(mountDir, constants.O_RDONLY | constants.O_DIRECTORY);
  // Looked at again under the lock: what was opened may be the mount of a daemon that was quicker.
  if (tryLock(fd) && !isMounted(mountDir)) return fd;
  closeSync(fd);
  throw unusable(mountDir, 'is being used by another daemon that starts just now: name another directory');
}

/** Whether our mount is still there, under whatever somebody may have mounted over it. */
export function isOurMountThere(mountDir: string): boolean {
  return parseMountTable(readFileSync('/proc/self/mountinfo', 'utf8')).some(
    (entry) => entry.mountDir === mountDir && entry.fileSystemType === FILE_SYSTEM_TYPE,
  );
}

/** For the server's wish to end. `force`: whoever uses the mount gets errors from now on. */
export function unmountForServer(mountDir: string, force: boolean): UnmountOutcome {
  if (!isOurMountThere(mountDir)) return { unmounted: true };
  const entry = topmostMount(mountDir);
  if (entry?.fileSystemType !== FILE_SYSTEM_TYPE) {
    return refused(`something else (${entry?.fileSystemType ?? 'unknown'}) is mounted over the mount ${mountDir}: unmount that first`);
  }
  try {
    if (unmount(mountDir, { lazy: false }) === 'unmounted') return { unmounted: true };
    if (!force) return refused(`the mount ${mountDir} is in use${usedBy(mountDir)}: close what is open there, or stop with --force, which breaks it off`);
    unmount(mountDir, { lazy: true });
    // What is open lives on after a lazy unmount, and the server would wait for its requests for ever.
    abortConnection(entry.deviceMinor);
    return { unmounted: true };
  } catch (error) {
    return refused((error as Error).message);
  }
}

/** For a mount that has no server any more: lazily if somebody has it open, for there is nothing to wait for. */
export function unmountAnyhow(mountDir: string): void {
  if (topmostMount(mountDir)?.fileSystemType !== FILE_SYSTEM_TYPE) return;
  if (unmount(mountDir, { lazy: false }) === 'busy') unmount(mountDir, { lazy: true });
}

function refused(message: string): UnmountOutcome {
  return { unmounted: false, message };
}

function usedBy(mountDir: string): string {
  const users = findMountUsers(mountDir);
  return users.length === 0 ? '' : ` by ${users.join(', ')}`;
}

function unusable(mountDir: string, what: string): OffshootError {
  return new OffshootError('mount-unusable', `the mount point ${mountDir} ${what}`, { mountDir });
}
