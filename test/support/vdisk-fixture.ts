/**
 * Container files over a test store: the operations as the control API asks them, and a host that keeps what is attached, partitioned, formatted and mounted in one
 * file, so that it outlives servers, and refuses what a real one refuses. What real programs do is tested in mount/stage.test.ts.
 */
import fs from 'node:fs';
import path from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import type { JobRow } from '../../blockstore/meta/rows.js';
import type { JobInfo } from '../../daemon/control/schemas.js';
import { MachineAdapters } from '../../daemon/machines/adapters.js';
import { VdiskPlane } from '../../daemon/server/vdisk-plane.js';
import type { AttachedDevice, BlockDevices } from '../../daemon/vdisks/block-devices.js';
import type { VdiskHost } from '../../daemon/vdisks/vdisk-host.js';
import type { TestStore } from './blockstore-fixture.js';
import type { MachinesFixture } from './machines-fixture.js';
import { testFormat } from './test-machines.js';

interface HostState {
  devices: AttachedDevice[];
  /** Mount point to device. */
  mounts: Record<string, string>;
  /** What a node's disk holds: `gpt`, `ext4`. */
  contents: Record<number, string[]>;
}

export interface VdisksFixture {
  readonly plane: VdiskPlane;
  readonly host: VdiskHost;
  readonly fatal: Error[];
  state(): HostState;
  waitFor(jobId: number): Promise<JobRow>;
}

/** To be made anew after a kill of the store; what the host has is in `directory`. */
export function vdisksOver(fixture: Pick<TestStore, 'store'>, machines: MachinesFixture, directory: string, { mountDir, limit = 16 }: { readonly mountDir: string; readonly limit?: number }): VdisksFixture {
  const file = path.join(directory, 'host.json');
  const state = (): HostState => (fs.existsSync(file) ? JSON.parse(fs.readFileSync(file, 'utf8')) as HostState : { devices: [], mounts: {}, contents: {} });
  const host = paperHost(directory, state, (after) => { fs.writeFileSync(file, JSON.stringify(after)); });
  const adapters = new MachineAdapters();
  adapters.addFormat(testFormat(machines.seat, (kind, message) => new OffshootError(kind, message)));
  adapters.addHypervisor(machines.hypervisor);
  const fatal: Error[] = [];
  const { store } = fixture;
  const plane = new VdiskPlane({
    store, fileSystem: machines.fileSystem, adapters, host, mountDir, runtimeDir: path.join(directory, 'run', 'key'), attachLimit: limit, retryMs: 5,
    logger: { info: () => undefined, warn: () => undefined }, onFatal: (error) => { fatal.push(error); }, forgetAttributes: () => Promise.resolve(), jobInfo: (id) => ({ id }) as JobInfo,
  });
  machines.devices.of = async (nodeId, signal) => await plane.writableDevice(nodeId, signal);
  const waitFor = async (jobId: number): Promise<JobRow> => {
    for (;;) {
      const job = store.meta.jobs.byId(jobId);
      if (job === undefined) throw new Error(`job ${jobId} is gone`);
      if (fatal.length > 0) throw new Error('the server would have ended', { cause: fatal[0] });
      if (job.state !== 'running') {
        await plane.service.settled(jobId);
        return store.meta.jobs.byId(jobId) ?? job;
      }
      await new Promise((resolve) => { setTimeout(resolve, 2); });
    }
  };
  return { plane, host, fatal, state, waitFor };
}

/** What a real host would do with a disk that is a file; the content of the disks is not its concern. Devices are files of its own: whoever is given one owns no real one. */
function paperHost(directory: string, state: () => HostState, keep: (after: HostState) => void): VdiskHost {
  const change = (how: (now: HostState) => void): Promise<void> => {
    const now = state();
    how(now);
    keep(now);
    return Promise.resolve();
  };
  const shown = (now: HostState, device: string): AttachedDevice => {
    const found = now.devices.find((each) => each.device === device);
    if (found === undefined) throw new OffshootError('io-error', `${device} shows nothing`);
    return found;
  };
  const devices: BlockDevices = {
    attach: async (file, { readOnly, window, nodeId }) => {
      const now = state();
      let number = 0;
      const deviceOf = (nth: number): string => path.join(directory, `paper${nth}`);
      while (now.devices.some(({ device }) => device === deviceOf(number))) number += 1;
      fs.writeFileSync(deviceOf(number), '');
      const attached = { device: deviceOf(number), file, readOnly, offsetBytes: window?.offsetBytes ?? 0, isLeaving: false, nodeId };
      await change((after) => { after.devices.push(attached); });
      return attached;
    },
    list: (below) => Promise.resolve(state().devices.filter(({ file }) => file.startsWith(`${below}/`))),
    find: (device) => Promise.resolve(state().devices.find((each) => each.device === device) ?? null),
    detach: async (device) => {
      const now = state();
      if (Object.values(now.mounts).includes(device)) throw new OffshootError('in-use', `${device} is mounted`);
      await change((after) => { after.devices = after.devices.filter((each) => each.device !== device); });
    },
    lend: () => Promise.resolve(),
  };
  const wants = (now: HostState, device: string, ...contents: readonly string[]): void => {
    const { nodeId } = shown(now, device);
    for (const each of contents) if (now.contents[nodeId ?? 0]?.includes(each) !== true) throw new OffshootError('io-error', `${device} holds no ${each}`);
  };
  const add = (now: HostState, device: string, content: string): void => {
    const nodeId = shown(now, device).nodeId ?? 0;
    now.contents[nodeId] = [...now.contents[nodeId] ?? [], content];
  };
  const inMount = (target: string): void => {
    if (!Object.keys(state().mounts).some((each) => target === each || target.startsWith(`${each}/`))) throw new OffshootError('io-error', `nothing is mounted at ${target}`);
  };
  return {
    devices, canMount: () => true, architecture: () => 'x86_64',
    partition: async (device) => {
      if (shown(state(), device).offsetBytes !== 0) throw new OffshootError('io-error', 'a part of a disk is not partitioned');
      await change((now) => { add(now, device, 'gpt'); });
    },
    makeFileSystem: async (device, { type }) => {
      if (shown(state(), device).offsetBytes === 0) throw new OffshootError('io-error', 'the partition table would be written over');
      wants(state(), device, 'gpt');
      await change((now) => { add(now, device, type); });
    },
    mount: async (device, directory) => { shown(state(), device); await change((now) => { now.mounts[directory] = device; }); },
    unmount: async (directory) => { await change((now) => { now.mounts = Object.fromEntries(Object.entries(now.mounts).filter(([each]) => each !== directory)); }); },
    isMounted: (directory) => directory in state().mounts,
    makeDirectory: async (target) => { inMount(target); await Promise.resolve(); },
    copy: async (_source, target) => { inMount(target); await Promise.resolve(); },
    write: async ({ path: target }) => { inMount(target); await Promise.resolve(); },
    sync: async (directory) => { inMount(directory); await Promise.resolve(); },
  };
}
