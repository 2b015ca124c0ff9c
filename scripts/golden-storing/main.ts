/** Makes the golden store of this schema anew. Started by `scripts/golden-store`. */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { SCHEMA_VERSION } from '../../blockstore/meta/migrations.js';
import { makeGoldenStore } from '../../test/support/golden-store.js';
import { createCleanup, makeTmpfsDir } from '../../test/support/temp.js';

const { values } = parseArgs({ options: { 'cli-entry': { type: 'string' }, file: { type: 'string' }, force: { type: 'boolean', default: false } } });
const file = values.file ?? join(process.cwd(), 'test', 'fixtures', `store-v${SCHEMA_VERSION}.tar.gz`);
const cleanup = createCleanup();
try {
  if (existsSync(file) && !values.force) throw new Error(`${file} is there: a released version's store is never made anew; --force if this version was never released`);
  const top = makeTmpfsDir('golden', cleanup);
  const [storeDir, runtimeDir] = [join(top, 'store'), join(top, 'run')];
  for (const directory of [storeDir, runtimeDir]) mkdirSync(directory);
  await makeGoldenStore(storeDir, runtimeDir);
  for (const name of ['reserve', 'offshoot.db-shm', 'offshoot.db-wal']) rmSync(join(storeDir, name), { force: true });
  execFileSync('tar', ['--sparse', '--sort=name', '--owner=0', '--group=0', '--mtime=@0', '-I', 'gzip -9n', '-cf', file, '-C', storeDir, '.']);
  process.stdout.write(`${file} was made\n`);
} finally {
  await cleanup.run();
}
