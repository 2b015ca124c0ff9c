/**
 * Operations on machines under the power-cut harness: in the recorded process through the code that serves the control API, and in the test's own
 * process the next server, which finds what a cut has left.
 *
 * The hypervisor is the one of test-machines.ts, and lies outside of what is cut: whatever it was told before the power went, it knows. Operations come
 * one after the other, so that the newest note says how far the program had come.
 */
import fs from 'node:fs';
import path from 'node:path';

import { ROOT_ID } from '../../../blockstore/meta/rows.js';
import type { Store } from '../../../blockstore/store.js';
import { readText } from '../../../daemon/machines/machines.js';
import { controlParts } from '../control-parts.js';
import { MOUNT, machinesOn, writeFile } from '../machines-fixture.js';
import { TestHypervisorSeat } from '../test-machines.js';
import { ContainerGuest } from './container-guest.js';
import type { Guest } from './guest.js';
import type { FoundDisk, Marker } from './window.js';

const DISK_BYTES = 4 * 4096;
const ROOT = { uid: 0, gid: 0, groups: [] };

interface Operation {
  readonly source: string;
  readonly targets: readonly string[];
  readonly register: boolean;
  /** Which registration of it is refused, so that it is undone. */
  readonly refuse?: number;
}

/** Each with targets of its own. */
const OPERATIONS: readonly Operation[] = [
  { source: 'golden/base', targets: ['lab/a1', 'lab/a2', 'lab/a3', 'lab/a4'], register: true },
  { source: 'golden/base', targets: ['lab/b1', 'lab/b2', 'lab/b3'], register: true, refuse: 2 },
  { source: 'golden/base', targets: ['lab/c1', 'lab/c2'], register: false },
  { source: 'golden', targets: ['g1', 'g2'], register: true },
  { source: 'golden/base', targets: ['lab/d1', 'lab/d2', 'lab/d3'], register: true, refuse: 1 },
  { source: 'golden/base', targets: Array.from({ length: 9 }, (_, i) => `lab/e${i}`), register: true },
];

/** The recorded process. */
export async function machines(open: () => Guest): Promise<void> {
  const guest = open();
  const { store } = guest;
  const operator = new ContainerGuest(guest);
  for (const directory of ['golden', 'golden/base', 'lab']) operator.makeDirectory(directory);
  guest.create('golden/base/disk.img', DISK_BYTES, 3);
  const { fileSystem } = operator.parts;
  writeFile({ store }, fileSystem, guest.idOf('golden/base'), 'machine.json', JSON.stringify({
    name: 'base', uuid: '11111111-2222-4333-8444-555555555555', macs: ['52:54:00:11:22:33'], memory: 512, disks: { vda: `${MOUNT}/golden/base/disk.img` },
  }));
  await store.flush(guest.idOf('golden/base/machine.json'));
  const fixture = machinesOn({ store, storeDir: store.files.storeDir, fileSystem }, path.join(guest.root, '..', 'hypervisor'));
  const note = fixture.seat.note.bind(fixture.seat);
  fixture.seat.note = (what, after) => {
    const nth = note(what, after);
    if (after !== true && what.startsWith('register ')) guest.note(what);
    return nth;
  };
  for (const [index, { source, targets, register, refuse }] of OPERATIONS.entries()) {
    fixture.seat.order(refuse === undefined ? {} : { refuse: fixture.seat.count('register') + refuse });
    guest.note(`begin ${index}`);
    const job = await fixture.waitFor((await fixture.service.clone({ source, targets: [...targets], register }, ROOT)).id);
    if ((job.state === 'completed') !== (refuse === undefined)) throw new Error(`operation ${index} is ${job.state}: ${job.message ?? ''}`);
    guest.note(`end ${index}`);
    if (index % 2 === 1) guest.checkpoint(true);
  }
}

/** Opens what a cut left as the next server does, and says what is wrong with it. `hypervisorDir` is made anew. */
export async function judgeMachines(store: Store, disks: readonly FoundDisk[], lastMarker: Marker | undefined, hypervisorDir: string): Promise<string | null> {
  const { meta } = store;
  const said = lastMarker?.op === 'note' ? lastMarker.text : '';
  const [, asked] = /^register (\S+)$/u.exec(said) ?? [];
  // What is undone is asked for again, and forgotten then.
  const isUndone = OPERATIONS.some(({ targets, refuse }) => refuse !== undefined && targets.some((target) => target.endsWith(`/${asked ?? ''}`)));
  if (asked !== undefined && !isUndone && (meta.machines.byName(asked)?.registration ?? 'none') === 'none') return `${asked} was registered, and the store does not say that anybody was asked`;
  const running = meta.jobs.list({ states: ['running'], kind: 'machine-clone' }).map(({ id }) => id);
  fs.rmSync(hypervisorDir, { recursive: true, force: true });
  // Before the next server begins, which asks it at once.
  tellWhatIsKnown(store, new TestHypervisorSeat(hypervisorDir));
  const fixture = machinesOn({ store, storeDir: store.files.storeDir, fileSystem: controlParts(store).fileSystem }, hypervisorDir);
  for (const id of running) await fixture.waitFor(id);
  if (fixture.fatal.length > 0) return `the next server ends: ${String(fixture.fatal[0])}`;
  const begun = Number(/^begin (\d+)$/u.exec(said)?.[1] ?? -1);
  const ended = Number(/^end (\d+)$/u.exec(said)?.[1] ?? begun - 1);
  const base = disks.find(({ name }) => name === 'golden/base/disk.img');
  const registered = new Map(fixture.seat.registered().map((each) => [each.uuid, each]));
  let machinesMade = 0;
  for (const [index, operation] of OPERATIONS.entries()) {
    const places = operation.source === 'golden' ? operation.targets.map((target) => `${target}/base`) : operation.targets;
    const there = operation.targets.filter((target) => meta.nodes.byPath(target) !== undefined);
    if (there.length !== 0 && there.length !== operation.targets.length) return `of operation ${index} only ${there.join(', ')} are there`;
    if (there.length === 0) {
      if (index <= ended && operation.refuse === undefined) return `operation ${index} was answered, and nothing of it is there`;
      continue;
    }
    if (operation.refuse !== undefined) return `operation ${index} failed, and ${there.join(', ')} are there`;
    for (const place of places) {
      machinesMade += 1;
      const directory = meta.nodes.byPath(place);
      const row = directory === undefined ? undefined : meta.machines.byNode(directory.id);
      if (row?.state !== 'ready') return `${place} is ${row?.state ?? 'no machine'}`;
      const configuration = meta.nodes.child(row.nodeId, row.configuration);
      if (configuration === undefined) return `${place} has no configuration`;
      const text = await readText(store, configuration);
      const { name, uuid, disks: { vda } } = JSON.parse(text) as { readonly name: string; readonly uuid: string; readonly disks: { readonly vda: string } };
      if (name !== row.name || uuid !== row.uuid || vda !== `${MOUNT}/${place}/disk.img`) return `the configuration of ${place} is not its own: ${text}`;
      const disk = disks.find((each) => each.name === `${place}/disk.img`);
      if (base === undefined || disk?.content.equals(base.content) !== true) return `the disk of ${place} is not that of its source`;
      if (operation.register !== (registered.get(row.uuid)?.name === row.name)) return `${place} is ${operation.register ? 'not registered' : 'registered'}`;
      registered.delete(row.uuid);
    }
  }
  if (registered.size > 0) return `the hypervisor knows ${[...registered.values()].map(({ name }) => name).join(', ')}, which are not there`;
  if (meta.machines.all().length !== machinesMade) return `the table has ${meta.machines.all().length} machines, and ${machinesMade} are there`;
  const left = meta.nodes.children(meta.nodes.byPath('lab')?.id ?? ROOT_ID, 0, 1000).filter(({ id, parentId }) => parentId !== ROOT_ID && meta.machines.byNode(id) === undefined);
  return left.length === 0 ? null : `${left.map(({ name }) => name).join(', ')} are left in lab`;
}

/** At worst it heard every call that was noted. */
function tellWhatIsKnown({ meta }: Store, seat: TestHypervisorSeat): void {
  for (const row of meta.machines.all()) {
    if (row.registration === 'none') continue;
    const directory = `${MOUNT}/${meta.nodes.pathOf(row.nodeId)}`;
    fs.writeFileSync(seat.fileOf(row.uuid), JSON.stringify({ name: row.name, uuid: row.uuid, directory, configuration: row.configuration, text: '', owner: { uid: 0, gid: 0 }, state: 'shut-off' }));
  }
}

export function emptyDirectory(directory: string): string {
  fs.rmSync(directory, { recursive: true, force: true });
  fs.mkdirSync(directory);
  return directory;
}
