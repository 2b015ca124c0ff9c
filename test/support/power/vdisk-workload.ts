/**
 * Staging, deploying, decommissioning and presenting under the power-cut harness: in the recorded process through the code that serves the control API, and in
 * the test's own process the next server, which finds what a cut has left.
 *
 * The host is the one of vdisk-fixture.ts, but for what it writes into disks: its copy and its files are written to the store, and durable when it was told to sync. With
 * the power go the host's devices and mounts. The hypervisor lies outside of what is cut: whatever it was told, it knows; its machines are off.
 */
import fs from 'node:fs';
import path from 'node:path';

import { OffshootError } from '../../../blockstore/errors.js';
import type { Store } from '../../../blockstore/store.js';
import { Exports } from '../../../daemon/presenter/exports.js';
import type { Presenter } from '../../../daemon/presenter/presenter.js';
import { controlParts } from '../control-parts.js';
import { MOUNT, machinesOn, writeFile } from '../machines-fixture.js';
import { TestHypervisorSeat } from '../test-machines.js';
import { vdisksOver, type VdisksFixture } from '../vdisk-fixture.js';
import { ContainerGuest } from './container-guest.js';
import type { Guest } from './guest.js';
import type { FoundDisk, Marker } from './window.js';

const DISK_BYTES = 4 * 4096;
const SOURCE = 'golden/base';
const SHOWN = 'golden/base/disk.img';
/** Where in a container file the copy and the configuration are written, and as what. */
const [COPY_AT, WRITE_AT] = [1024 * 1024, 2 * 1024 * 1024];
const COPIED = Buffer.alloc(8192, 'copied ');
const WRITTEN = Buffer.alloc(512, 'written ');
const QUIET = { info: (): void => undefined, warn: (): void => undefined };

interface Operation {
  readonly kind: 'stage' | 'deploy' | 'decommission' | 'present' | 'withdraw';
  /** Container file, deployed machine, or what is presented. */
  readonly name: string;
  /** A step of it is refused, so that it is undone. */
  readonly fails?: boolean;
}

const OPERATIONS: readonly Operation[] = [
  { kind: 'stage', name: 'f1' }, { kind: 'present', name: SHOWN }, { kind: 'deploy', name: 'd1' }, { kind: 'stage', name: 'f2', fails: true }, { kind: 'withdraw', name: SHOWN },
  { kind: 'deploy', name: 'd2', fails: true }, { kind: 'decommission', name: 'd1' }, { kind: 'deploy', name: 'd3' }, { kind: 'present', name: SHOWN }, { kind: 'decommission', name: 'd3' },
];

/** Shows whatever it is told. */
const presenter: Presenter = {
  id: 'nbd', abilities: { directories: false, disks: true, clients: 'addresses', encryption: null, knowsClients: false },
  probe: () => Promise.resolve({ usable: true, version: '1' }), check: () => undefined, apply: () => Promise.resolve([]), clientsOf: () => Promise.resolve([]), end: () => Promise.resolve(),
};

/** The recorded process. */
export async function vdisks(open: () => Guest): Promise<void> {
  const guest = open();
  const { store } = guest;
  const operator = new ContainerGuest(guest);
  for (const directory of ['golden', SOURCE, 'depot']) operator.makeDirectory(directory);
  guest.create(SHOWN, DISK_BYTES, 3);
  const { fileSystem, references } = operator.parts;
  writeFile({ store }, fileSystem, guest.idOf(SOURCE), 'machine.json', JSON.stringify({
    name: 'base', uuid: '11111111-2222-4333-8444-555555555555', macs: ['52:54:00:11:22:33'], memory: 512, disks: { vda: `${MOUNT}/${SHOWN}` },
  }));
  await store.flush(guest.idOf(`${SOURCE}/machine.json`));
  const directory = path.join(guest.root, '..', 'hypervisor');
  const machines = machinesOn({ store, storeDir: store.files.storeDir, fileSystem }, directory);
  const { seat } = machines;
  const note = seat.note.bind(seat);
  seat.note = (what, after) => {
    const nth = note(what, after);
    if (after !== true && what.startsWith('register ')) guest.note(what);
    return nth;
  };
  const fixture = vdisksOver({ store }, machines, directory, { mountDir: MOUNT });
  let failing = false;
  writeToDisks(store, fixture, () => failing);
  const exports = new Exports({ meta: store.meta, references, presenters: [presenter], mountDir: MOUNT, logger: QUIET, onFatal: (thrown) => { throw thrown; } });
  for (const [index, { kind, name, fails = false }] of OPERATIONS.entries()) {
    failing = fails;
    seat.order(fails ? { refuse: seat.count('register') + 1 } : {});
    guest.note(`begin ${index}`);
    if (kind === 'present') await exports.present({ path: name, kind: 'nbd', clients: ['127.0.0.1'], readOnly: false, options: {} });
    else if (kind === 'withdraw') await exports.withdraw({ path: name, kind: 'nbd' }, { force: false });
    else {
      const { service } = fixture.plane;
      const { id } = kind === 'stage' ? service.stage({ source: SOURCE, target: `depot/${name}` })
        : kind === 'deploy' ? await service.deploy({ source: 'depot/f1', name })
          : await service.decommission(name, { force: true, timeoutMs: 1000 });
      const job = await fixture.waitFor(id);
      if ((job.state === 'completed') === fails) throw new Error(`operation ${index} is ${job.state}: ${job.message ?? ''}`);
    }
    guest.note(`end ${index}`);
    if (index % 3 === 2) guest.checkpoint(true);
  }
}

/** What a mounted file system would write to its disk, and when it would be durable. */
function writeToDisks(store: Store, fixture: VdisksFixture, fails: () => boolean): void {
  const diskAt = (target: string): number => {
    const { mounts, devices } = fixture.state();
    const device = Object.entries(mounts).find(([mountPoint]) => target === mountPoint || target.startsWith(`${mountPoint}/`))?.[1];
    return devices.find((each) => each.device === device)?.nodeId ?? 0;
  };
  const write = (target: string, at: number, data: Buffer): void => {
    const nodeId = diskAt(target);
    store.disks.acquire(nodeId);
    store.data.write(nodeId, at, data);
    store.disks.release(nodeId);
  };
  Object.assign(fixture.host, {
    copy: async (_source: string, target: string) => {
      write(target, COPY_AT, COPIED);
      if (fails()) throw new OffshootError('no-space', 'the copy was told to fail');
      await Promise.resolve();
    },
    write: async ({ path: target }: { readonly path: string }) => { write(target, WRITE_AT, WRITTEN); await Promise.resolve(); },
    sync: async (directory: string) => { await store.flush(diskAt(directory)); },
  });
}

/** Opens what a cut left as the next server does, and says what is wrong with it. `directory` is the host's and the hypervisor's, and made anew. */
export async function judgeVdisks(store: Store, disks: readonly FoundDisk[], lastMarker: Marker | undefined, directory: string): Promise<string | null> {
  const { meta } = store;
  const said = lastMarker?.op === 'note' ? lastMarker.text : '';
  const [, asked] = /^register (\S+)$/u.exec(said) ?? [];
  const isUndone = OPERATIONS.some(({ name, fails }) => fails === true && name === asked);
  if (asked !== undefined && !isUndone && (meta.deployments.byName(asked)?.registration ?? 'none') === 'none') return `${asked} was registered, and the store does not say that anybody was asked`;
  fs.rmSync(directory, { recursive: true, force: true });
  const seat = new TestHypervisorSeat(directory);
  // Before the next server begins, which asks it at once. At worst it heard every call that was noted.
  for (const row of meta.deployments.all()) {
    if (row.registration === 'none') continue;
    fs.writeFileSync(seat.fileOf(row.uuid), JSON.stringify({ name: row.name, uuid: row.uuid, directory: row.mountPoint, configuration: 'machine.json', text: '', owner: { uid: 0, gid: 0 }, state: 'shut-off' }));
  }
  const running = meta.jobs.list({ states: ['running'] }).map(({ id }) => id);
  const { fileSystem } = controlParts(store);
  const machines = machinesOn({ store, storeDir: store.files.storeDir, fileSystem }, directory);
  const fixture = vdisksOver({ store }, machines, directory, { mountDir: MOUNT });
  writeToDisks(store, fixture, () => false);
  for (const id of running) await fixture.waitFor(id);
  await fixture.plane.service.deployed({ name: null, agent: false });
  const wrong = fixture.fatal.length > 0 ? `the next server ends: ${String(fixture.fatal[0])}` : verdictOf(store, disks, said, seat, fixture);
  await fixture.plane.close();
  return wrong;
}

function verdictOf(store: Store, disks: readonly FoundDisk[], said: string, seat: TestHypervisorSeat, fixture: VdisksFixture): string | null {
  const { meta } = store;
  const begun = Number(/^begin (\d+)$/u.exec(said)?.[1] ?? -1);
  const ended = Number(/^end (\d+)$/u.exec(said)?.[1] ?? begun - 1);
  const contentOf = (name: string): Buffer | undefined => disks.find((each) => each.name === name)?.content;
  const holds = (content: Buffer | undefined, at: number, what: Buffer): boolean => content?.subarray(at, at + what.length).equals(what) === true;
  const isThere = (kind: Operation['kind'], name: string): boolean =>
    (kind === 'present' ? meta.exports.all().some(({ nodeId }) => meta.nodes.pathOf(nodeId) === name) : kind === 'stage' ? meta.nodes.byPath(`depot/${name}`) !== undefined : meta.deployments.byName(name) !== undefined);
  const made = OPERATIONS.filter(({ kind }) => kind === 'stage' || kind === 'deploy' || kind === 'present');
  for (const { kind, name } of new Map(made.map((each) => [`${each.kind} ${each.name}`, each])).values()) {
    const changes = [...OPERATIONS.entries()].filter(([, each]) => each.name === name).map(([index, each]) => ({ index, isMade: each.kind === kind && each.fails !== true }));
    const last = changes.findLast(({ index }) => index <= ended);
    // One that was begun, and not answered as far as anybody knows, may be there or not.
    const isOpen = said !== '' && changes.some(({ index }) => index === ended + 1 && OPERATIONS[index]?.fails !== true);
    const wanted = last?.isMade ?? false;
    const found = isThere(kind, name);
    if (found !== wanted && !isOpen && !said.startsWith('register')) return `${name} is ${found ? '' : 'not '}there, behind "${said}"`;
    if (!found || kind === 'present') continue;
    const file = kind === 'stage' ? `depot/${name}` : `depot/${name}.vdisk`;
    const node = meta.nodes.byPath(file);
    if (node === undefined) return `${name} has no ${file}`;
    const state = kind === 'stage' ? meta.vdisks.byNode(node.id)?.state : meta.deployments.byNode(node.id)?.state;
    if (state !== 'ready') return `${file} is ${state ?? 'nothing that is known'}`;
    if (!holds(contentOf(file), COPY_AT, COPIED)) return `${file} does not hold what was copied`;
    if (kind === 'deploy' && !holds(contentOf(file), WRITE_AT, WRITTEN)) return `${file} does not have its configuration`;
  }
  if (OPERATIONS.some(({ kind, name, fails }) => fails === true && isThere(kind, name))) return 'what was undone is there';
  const file = meta.nodes.byPath('depot/f1');
  // Its own description may have been written to the container file where a machine's configuration is in its clone.
  if (file !== undefined && contentOf('depot/f1')?.subarray(COPY_AT + COPIED.length, WRITE_AT).some((byte) => byte !== 0) === true) return 'something else was written to the container file';
  const deployed = meta.deployments.all();
  const { devices, mounts } = fixture.state();
  if (meta.attachments.count() !== deployed.length || devices.length !== deployed.length || Object.keys(mounts).length !== deployed.length) {
    return `${deployed.length} machines are deployed, with ${meta.attachments.count()} attachments, ${devices.length} devices and ${Object.keys(mounts).length} mounts`;
  }
  const registered = seat.registered().map(({ name }) => name);
  if (registered.toSorted().join() !== deployed.map(({ name }) => name).toSorted().join()) return `the hypervisor knows ${registered.join(', ')}`;
  const left = meta.nodes.children(meta.nodes.byPath('depot')?.id ?? 0, 0, 100).filter(({ id }) => meta.vdisks.byNode(id) === undefined && meta.deployments.byNode(id) === undefined);
  if (left.length > 0) return `${left.map(({ name }) => name).join(', ')} are left in depot`;
  return meta.nodes.orphans().length === 0 ? null : 'nodes without names are left';
}
