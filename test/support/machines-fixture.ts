/** Machines over a test store: the service as the control API asks it, the test format and the test hypervisor, no transport. */
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import type { JobRow, NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import type { MachineCloneBody } from '../../daemon/control/machine-schemas.js';
import type { JobInfo } from '../../daemon/control/schemas.js';
import { Imports } from '../../daemon/jobs/imports.js';
import { MachineAdapters } from '../../daemon/machines/adapters.js';
import { startMachines } from '../../daemon/server/machine-plane.js';
import type { StoreMachineService } from '../../daemon/server/machine-service.js';
import type { Hypervisor } from '../../daemon/hypervisor/hypervisor.js';
import type { StoreFileSystem } from '../../daemon/filesystem/store-file-system.js';
import type { TestStore } from './blockstore-fixture.js';
import { fileSystemOver } from './snapshots-fixture.js';
import { TestHypervisorSeat, testFormat, testHypervisor } from './test-machines.js';

export const MOUNT = '/mnt/test';
const ROOT_PEER = { uid: 0, gid: 0, groups: [], pid: 1 };

export interface MachinesFixture {
  readonly service: StoreMachineService;
  readonly fileSystem: StoreFileSystem;
  readonly seat: TestHypervisorSeat;
  readonly hypervisor: Hypervisor;
  readonly fatal: Error[];
  /** By which disks are written to; whoever has a plane of container files over the same store puts it here. */
  readonly devices: { of: (nodeId: number, signal: AbortSignal) => Promise<string | null> };
  /** Clones, and waits for the end of it. */
  clone(body: MachineCloneBody, peer?: { readonly uid: number; readonly gid: number; readonly groups: readonly number[]; readonly pid: number }): Promise<JobRow>;
  waitFor(jobId: number): Promise<JobRow>;
}

/** To be made anew after a kill of the store; the hypervisor's registrations are in `directory`. */
export function machinesOver(fixture: TestStore, directory: string): MachinesFixture {
  return machinesOn({ store: fixture.store, storeDir: fixture.storeDir, fileSystem: fileSystemOver(fixture) }, directory);
}

export interface MachinesBed {
  readonly store: Store;
  readonly storeDir: string;
  readonly fileSystem: StoreFileSystem;
}

/** The same for those who have a file system already. */
export function machinesOn({ store, storeDir, fileSystem }: MachinesBed, directory: string): MachinesFixture {
  const seat = new TestHypervisorSeat(directory);
  const adapters = new MachineAdapters();
  const error = (kind: ConstructorParameters<typeof OffshootError>[0], message: string): OffshootError => new OffshootError(kind, message);
  adapters.addFormat(testFormat(seat, error));
  const hypervisor = testHypervisor(seat, error);
  adapters.addHypervisor(hypervisor);
  const fatal: Error[] = [];
  const devices: MachinesFixture['devices'] = { of: () => Promise.resolve(null) };
  const logger = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };
  const service = startMachines({
    store, fileSystem, mountDir: MOUNT, logger, adapters, retryMs: 5,
    imports: new Imports({ store, namespace: fileSystem.namespace, storeDir, mountDir: MOUNT, logger, onFatal: (thrown) => { fatal.push(thrown); } }),
    forgetAttributes: () => Promise.resolve(), jobInfo: (id) => ({ id }) as JobInfo, onFatal: (thrown) => { fatal.push(thrown); },
    writableDevice: async (nodeId, signal) => await devices.of(nodeId, signal),
  });
  const waitFor = async (jobId: number): Promise<JobRow> => {
    for (;;) {
      const job = store.meta.jobs.byId(jobId);
      if (job === undefined) throw new Error(`job ${jobId} is gone`);
      if (job.state !== 'running') {
        await service.settled(jobId);
        return store.meta.jobs.byId(jobId) ?? job;
      }
      if (fatal.length > 0) throw new Error('the server would have ended', { cause: fatal[0] });
      await new Promise((resolve) => { setTimeout(resolve, 2); });
    }
  };
  return {
    service, fileSystem, seat, hypervisor, fatal, waitFor, devices,
    clone: async (body, peer = ROOT_PEER) => await waitFor((await service.clone(body, peer)).id),
  };
}

/** A machine `golden/base` with a disk, a configuration, a log and notes; its directory. */
export function baseMachine(fixture: TestStore, { fileSystem }: MachinesFixture, content: Buffer, name = 'base'): NodeRow {
  const { store } = fixture;
  const owner = { uid: 0, gid: 0, pid: 0 };
  const container = store.meta.nodes.byPath('golden') ?? store.meta.nodes.byId(fileSystem.namespace.mkdir(1, 'golden', 0o755, owner).nodeId);
  const directory = fileSystem.namespace.mkdir(container?.id ?? 0, name, 0o755, owner).nodeId;
  const disk = fixture.image(`${name}.img`, content);
  store.meta.nodes.move(disk.id, directory, 'disk.img');
  writeFile(fixture, fileSystem, directory, 'machine.json', JSON.stringify({
    name, uuid: `11111111-2222-4333-8444-${Buffer.from(name).toString('hex').padStart(12, '0').slice(-12)}`, macs: ['52:54:00:11:22:33', '52:54:00:11:22:34'], memory: 512,
    disks: { vda: path.posix.join(MOUNT, 'golden', name, 'disk.img') }, nvram: path.posix.join(MOUNT, 'golden', name, 'vars.nvram'),
  }));
  writeFile(fixture, fileSystem, directory, 'console.log', 'old');
  writeFile(fixture, fileSystem, directory, 'notes', 'kept');
  return store.meta.nodes.byId(directory)!;
}

export function writeFile({ store }: Pick<TestStore, 'store'>, fileSystem: StoreFileSystem, directory: number, name: string, text: string): void {
  const { nodeId } = fileSystem.namespace.create(directory, name, 0o644, { uid: 0, gid: 0, pid: 0 });
  store.disks.acquire(nodeId);
  store.data.write(nodeId, 0, Buffer.from(text, 'utf8'));
  store.disks.release(nodeId);
}
