/**
 * `offshoot discover --vsphere` against govmomi's simulator: every host looks at its adapters, file systems and storage again, and an NFS export that a real NFS-Ganesha shows
 * becomes a datastore of them.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { DiscoverResult } from '../../daemon/control/export-schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { startVcsim, VCSIM_PACKAGES, VCSIM_PASSWORD, VCSIM_USER, type Vcsim } from '../support/vcsim.js';

const DATASTORE = 'offshoot';
const TEST_MS = 120_000;
const SERVER = '192.0.2.7';
const CALLS = ['RescanAllHba', 'RescanVmfs', 'RefreshStorageSystem', 'RefreshDatastore'] as const;
const MODELS = [{ model: 'esx', hosts: 1, place: {} }, { model: 'vpx', hosts: 4, place: { datacenter: 'DC0', resourcePool: 'DC0/host/DC0_C0/Resources' } }] as const;

describe.skipIf(lacks('/dev/fuse', 'ganesha.nfsd', ...VCSIM_PACKAGES)).each(MODELS)('vSphere, the model $model, told to look again', ({ model, hosts, place }) => {
  const cleanup = createCleanup();
  let simulator: Vcsim;
  let daemon: TestDaemon;

  beforeAll(async () => {
    simulator = await startVcsim(model, cleanup);
    mkdirSync(join(simulator.directory, DATASTORE));
    const settings = makeTempDir('vsphere', cleanup);
    writeFileSync(join(settings, 'credentials'), `${VCSIM_USER}\n${VCSIM_PASSWORD}\n`, { mode: 0o600 });
    daemon = await startTestDaemon({
      transport: 'kernel', cleanup,
      startArguments: (mountDir) => {
        writeFileSync(join(settings, 'settings.json'), JSON.stringify({
          url: `https://${simulator.host}:${simulator.port}`, credentialsFile: join(settings, 'credentials'), thumbprint: simulator.thumbprint,
          datastores: [{ directory: mountDir, datastore: DATASTORE }], callTimeoutMs: TEST_MS, taskTimeoutMs: TEST_MS, ...place,
        }));
        return ['--vsphere', join(settings, 'settings.json'), '--nfs'];
      },
    });
    await daemon.json(['container', 'create', 'vms']);
  }, TEST_MS);
  afterAll(async () => { await cleanup.run(); }, TEST_MS);

  const counts = async (): Promise<readonly number[]> => await Promise.all(CALLS.map(async (call) => await simulator.calls(call)));
  const refusal = async (...args: readonly string[]): Promise<string> => {
    const { code, stderr } = await daemon.cli(['discover', '--vsphere', ...args, '--json'], { timeoutMs: TEST_MS });
    expect(code).not.toBe(0);
    return stderr;
  };

  it('is refused while there is nothing to look at, with what to do', async () => {
    expect(await refusal()).toContain(`no datastore '${DATASTORE}': mount it first`);
    expect(await refusal('--mount', DATASTORE, '--server', SERVER)).toContain('offshoot present CONTAINER --as nfs');
    expect(await counts()).toEqual([0, 0, 0, 0]);
  }, TEST_MS);

  it('has the NFS export as a datastore of every host, once; and looks at all of its storage', async () => {
    await daemon.json(['present', 'vms', '--as', 'nfs', '--to', '127.0.0.1', '--option', `port=${await freePort()}`]);
    expect(await refusal('--mount', DATASTORE)).toContain('--server ADDRESS');
    for (let times = 0; times < 2; times += 1) {
      const mounted = await daemon.json<DiscoverResult>(['discover', '--vsphere', '--mount', DATASTORE, '--server', SERVER]);
      expect(mounted).toMatchObject({ with: 'vsphere', found: expect.objectContaining({ length: hosts }) as string[] });
    }
    expect(await simulator.datastores()).toMatchObject([{ name: DATASTORE, server: SERVER, path: '/vms', type: 'NFS' }]);
    expect(await counts()).toEqual([0, 0, 0, 0]);
    expect(await daemon.json(['discover', '--vsphere'])).toEqual({ with: 'vsphere', message: 'vSphere has looked at its storage again', found: [] });
    expect(await counts()).toEqual([hosts, hosts, hosts, 1]);
  }, TEST_MS);

  it('says which call a host refuses', async () => {
    await simulator.refuseNext('RescanAllHba', 'FileFault');
    expect(await refusal()).toMatch(/look at the storage of host/u);
    await simulator.forgive();
    await daemon.json(['discover', '--vsphere']);
  }, TEST_MS);
});
