/**
 * vSphere does what every hypervisor adapter must, against govmomi's simulator as one ESXi host. What is particular to vSphere is in
 * `hypervisor-vsphere.test.ts`.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe } from 'vitest';

import { Vsphere } from '../../daemon/hypervisor/vsphere/vsphere.js';
import { testHypervisor } from '../support/hypervisor-conformance.js';
import { makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { startVcsim, VCSIM_PACKAGES, VCSIM_PASSWORD, VCSIM_USER } from '../support/vcsim.js';

const DATASTORE = 'offshoot';
const TIMEOUT_MS = 60_000;
/** Nothing listens there. */
const NO_PORT = 9;

describe.skipIf(lacks(...VCSIM_PACKAGES))('vSphere', () => {
  testHypervisor({
    id: 'vsphere',
    abilities: { formats: ['vmx'], shutdown: true, guestAgent: true, quiesce: false, isRemote: true },
    hooks: [],
    setUp: async (cleanup) => {
      const simulator = await startVcsim('esx', cleanup);
      // No system runs in the simulator's machines.
      await simulator.deafen();
      const top = join(simulator.directory, DATASTORE);
      mkdirSync(top);
      const credentialsFile = join(makeTempDir('vsphere', cleanup), 'credentials');
      writeFileSync(credentialsFile, `${VCSIM_USER}\n${VCSIM_PASSWORD}\n`, { mode: 0o600 });
      const adapterAt = (port: number): Vsphere => {
        const vsphere = new Vsphere({
          host: simulator.host, port, trust: { by: 'thumbprint', sha256: simulator.thumbprint }, credentialsFile,
          datastores: [{ directory: top, datastore: DATASTORE }], datacenter: null, folder: null, resourcePool: null,
          callTimeoutMs: TIMEOUT_MS, taskTimeoutMs: TIMEOUT_MS,
        });
        cleanup.add(() => vsphere.close());
        return vsphere;
      };
      const hypervisor = adapterAt(simulator.port);
      await hypervisor.mountDatastore({ datastore: DATASTORE, server: '192.0.2.7', path: '/export', version: 3, readOnly: false }, { signal: AbortSignal.timeout(TIMEOUT_MS) });
      let count = 0;
      return {
        hypervisor,
        makeMachine({ name, uuid }) {
          count += 1;
          const directory = join(top, `m${count}`);
          const text = `config.version = "8"\nuuid.bios = "${uuid}"\ndisplayName = "${name}"\n`;
          mkdirSync(directory);
          writeFileSync(join(directory, 'machine.vmx'), text);
          return { name, uuid, directory, configuration: 'machine.vmx', text, owner: { uid: 0, gid: 0 } };
        },
        withoutHypervisor: () => adapterAt(NO_PORT),
      };
    },
  });
});
