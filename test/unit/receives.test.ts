/** What becomes of a receive whose beginning fails, or whose server dies in it. What comes later is tested with the real mount, by `mount/transfer.test.ts`. */
import fs from 'node:fs';
import path from 'node:path';
import { expect, it } from 'vitest';

import { parseHeader } from '../../daemon/jobs/receive-header.js';
import { Receives } from '../../daemon/jobs/receives.js';
import type { StreamHeader } from '../../blockstore/stream-format.js';
import { TestStore } from '../support/blockstore-fixture.js';
import { fileSystemOver } from '../support/snapshots-fixture.js';

const header: StreamHeader = {
  reference: 'golden@v1', baseReference: null, kind: 'container', uuid: '00000000-0000-4000-8000-000000000001', name: 'v1', consistency: 'crash', message: null, createdUs: 0,
  baseUuid: null, nodes: [], resume: null,
};
const json = JSON.stringify(header);

function receivesOver(fixture: TestStore): Receives {
  const nothing = (): void => undefined;
  return new Receives({
    store: fixture.store, fileSystem: fileSystemOver(fixture), storeDir: fixture.storeDir, logger: { info: nothing, warn: nothing },
    parseHeader: async (text) => await Promise.resolve(parseHeader(text)), forgetAttributes: async () => { await Promise.resolve(); },
  });
}

it('a receive whose server died before anything of it was kept has failed, and stands in the way of nobody', async () => {
  const fixture = new TestStore();
  const { receiveId } = await receivesOver(fixture).begin('vms', json);
  // Killed behind the row, before the state of the spool had its name.
  fs.rmSync(path.join(fixture.storeDir, 'receive', String(receiveId), 'state'));
  fixture.kill();
  const receives = receivesOver(fixture);
  receives.recover();
  expect(await receives.list()).toEqual([]);
  expect(fixture.store.meta.jobs.byId(receiveId)?.state).toBe('failed');
  expect(fs.readdirSync(path.join(fixture.storeDir, 'receive'))).toEqual([]);
  expect((await receives.begin('vms', json)).records).toBe(0);
});

it('a receive that could not be begun has failed, and stands in the way of nobody', async () => {
  const fixture = new TestStore();
  const receives = receivesOver(fixture);
  const directory = path.join(fixture.storeDir, 'receive');
  fs.rmSync(directory, { recursive: true, force: true });
  fs.writeFileSync(directory, 'in the way');
  await expect(receives.begin('vms', json)).rejects.toThrow();
  fs.rmSync(directory);
  expect(await receives.list()).toEqual([]);
  expect((await receives.begin('vms', json)).records).toBe(0);
});
