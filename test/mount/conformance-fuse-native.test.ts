/**
 * The conformance suite on the fuse-native transport.
 *
 * Store and scratch lie on a tmpfs, because ext4 has no files of 16 TiB.
 */
import { join } from 'node:path';
import { afterAll, beforeAll, describe } from 'vitest';

import { fuseNativeAbilities } from '../../daemon/transport/abilities.js';
import { startTestDaemon } from '../support/daemon.js';
import type { TestDaemon } from '../support/daemon.js';
import { createCleanup, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { conformance } from './conformance.js';

const NEEDED = ['/dev/fuse', 'losetup', 'mkfs.ext4', 'e2fsck', 'fstrim', 'qemu-img', 'qemu-io', 'xfs_io', 'tar', 'setpriv', 'fusermount'];

describe.skipIf(lacks(...NEEDED))('the fuse-native transport', () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let scratchDir: string;

  beforeAll(async () => {
    scratchDir = makeTmpfsDir('scratch', cleanup);
    daemon = await startTestDaemon({ transport: 'fuse-native', cleanup, storeDir: join(makeTmpfsDir('store', cleanup), 'store') });
  });

  afterAll(() => cleanup.run());

  conformance(() => ({ daemon, abilities: fuseNativeAbilities, scratchDir }));
});
