/**
 * Where a path leads: to a file system of this machine, or to one that somebody else answers for (a network, FUSE).
 *
 * A local file system answers, if with an error; anything else may take for ever, and then not even SIGKILL frees the thread that asked.
 * So the answer is found without asking the file system itself: the mount table says what lies where, and the path is walked
 * name by name (symbolic links included) only as long as it stays on file systems that are known to be local. What is
 * not known counts as remote: that is slower and never wrong. A local file system whose block device is itself served by
 * somebody (a loop device over a network file) is taken for local.
 */
import fs from 'node:fs';
import path from 'node:path';

export interface Place {
  readonly isRemote: boolean;
  /** As the mount table calls it. */
  readonly fileSystemType: string;
}

const LOCAL_TYPES = new Set([
  'ext2', 'ext3', 'ext4', 'xfs', 'btrfs', 'f2fs', 'zfs', 'bcachefs', 'jfs', 'reiserfs', 'nilfs2', 'tmpfs', 'ramfs', 'rootfs', 'overlay', 'devtmpfs',
  'vfat', 'msdos', 'exfat', 'ntfs', 'ntfs3', 'hfsplus', 'iso9660', 'udf', 'squashfs', 'erofs',
]);
/** As many as the kernel follows. */
const LINKS_MAX = 40;

export interface MountPoint {
  readonly directory: string;
  readonly fileSystemType: string;
}

/** The mount table's lines in their order: of two mounts on one directory the later covers the earlier. */
export function parseMounts(text: string): readonly MountPoint[] {
  return text.split('\n').flatMap((line) => {
    const [left = '', right = ''] = line.split(' - ');
    const directory = left.split(' ')[4];
    const fileSystemType = right.split(' ')[0];
    if (directory === undefined || fileSystemType === undefined || fileSystemType === '') return [];
    return [{ directory: unescapeOctal(directory), fileSystemType }];
  });
}

/** The file system that an absolute path without symbolic links lies on. */
export function fileSystemOf(file: string, mounts: readonly MountPoint[]): string {
  let best: MountPoint | undefined;
  for (const mount of mounts) {
    const covers = mount.directory === '/' || file === mount.directory || file.startsWith(`${mount.directory}/`);
    if (covers && (best === undefined || mount.directory.length >= best.directory.length)) best = mount;
  }
  return best?.fileSystemType ?? 'unknown';
}

/** Where an absolute path leads. Names that do not exist end the walk where they would lie. */
export function placeOf(file: string, mountTable: string = fs.readFileSync('/proc/self/mountinfo', 'utf8')): Place {
  const mounts = parseMounts(mountTable);
  const left = names(file);
  let at = '/';
  let links = 0;
  for (;;) {
    const fileSystemType = fileSystemOf(at, mounts);
    // Nothing beyond this point may be looked at: the place of all that follows is this one's, or below it.
    if (!LOCAL_TYPES.has(fileSystemType)) return { isRemote: true, fileSystemType };
    const name = left.shift();
    if (name === undefined) return { isRemote: false, fileSystemType };
    const next = name === '..' ? path.dirname(at) : path.join(at, name);
    // A mount point is looked at from its own file system's side, which the next turn asks for first.
    const target = LOCAL_TYPES.has(fileSystemOf(next, mounts)) ? linkTarget(next) : null;
    if (target === null) {
      at = next;
      continue;
    }
    links += 1;
    if (links > LINKS_MAX) return { isRemote: false, fileSystemType };
    if (path.isAbsolute(target)) at = '/';
    left.unshift(...names(target));
  }
}

function names(file: string): string[] {
  return file.split('/').filter((name) => name !== '' && name !== '.');
}

function linkTarget(file: string): string | null {
  try {
    return fs.readlinkSync(file);
  } catch {
    // No link, or nothing there: whoever opens the path is told so.
    return null;
  }
}

function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/gu, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}
