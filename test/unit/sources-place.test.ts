/** Where a path leads, found out from the mount table and local links alone: what lies beyond a remote mount is never looked at. */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { fileSystemOf, parseMounts, placeOf } from '../../blockstore/sources/place.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const cleanup = createCleanup();
afterEach(() => cleanup.run());

const line = (directory: string, type: string): string => `36 35 0:31 / ${directory} rw,relatime shared:1 - ${type} source rw\n`;

describe('the place of a path', () => {
  it('is that of the longest mount above it, and of two on one directory the later', () => {
    const mounts = parseMounts(line('/', 'ext4') + line('/srv', 'nfs4') + line('/srv/local', 'xfs') + line('/srv/local', 'fuse.sshfs') + line('/with\\040blank', 'cifs'));
    expect(['/a', '/srv', '/srv/x', '/srvx', '/srv/local/x', '/with blank/x'].map((file) => fileSystemOf(file, mounts)))
      .toEqual(['ext4', 'nfs4', 'nfs4', 'ext4', 'fuse.sshfs', 'cifs']);
  });

  it('is remote for what is not known to be local', () => {
    for (const type of ['fuse', 'fuse.sshfs', 'fuseblk', 'nfs', 'nfs4', 'cifs', 'smb3', '9p', 'virtiofs', 'ceph', 'autofs', 'somethingnew']) {
      expect(placeOf('/x/y', line('/', 'ext4') + line('/x', type))).toEqual({ isRemote: true, fileSystemType: type });
    }
    for (const type of ['ext4', 'xfs', 'btrfs', 'tmpfs', 'overlay']) expect(placeOf('/x/y', line('/', 'ext4') + line('/x', type)).isRemote).toBe(false);
  });

  it('follows links, and looks at nothing behind a remote mount', () => {
    const directory = fs.realpathSync(makeTempDir('place', cleanup));
    const away = path.join(directory, 'away');
    fs.symlinkSync('away/deep/er', path.join(directory, 'relative'));
    fs.symlinkSync(path.join(directory, 'relative'), path.join(directory, 'absolute'));
    fs.symlinkSync('../nowhere', path.join(directory, 'up'));
    fs.symlinkSync('loop', path.join(directory, 'loop'));
    const table = line('/', 'ext4') + line(away, 'nfs4');
    const looked = vi.spyOn(fs, 'readlinkSync');
    try {
      for (const name of ['away', 'away/x', 'relative/file', 'absolute']) expect(placeOf(path.join(directory, name), table).isRemote, name).toBe(true);
      expect(looked.mock.calls.filter(([file]) => String(file).startsWith(away))).toEqual([]);
      for (const name of ['', 'none', 'up/x', 'loop/x']) expect(placeOf(path.join(directory, name), table).isRemote, name).toBe(false);
    } finally {
      looked.mockRestore();
    }
  });
});
