/**
 * A store with everything in it that its schema can hold, and what its content must be: made once by the program of its time
 * (`scripts/golden-store`), kept in `test/fixtures/store-vN.tar.gz` (schema 4 brought the machine), and opened by every later one.
 *
 * Blocks say in words what they are, so that the file is small.
 */
import fs from 'node:fs';
import path from 'node:path';

import { copyMerged } from '../../blockstore/merge-copy.js';
import { cheapestPair } from '../../blockstore/merge.js';
import { ROOT_ID } from '../../blockstore/meta/rows.js';
import { Store } from '../../blockstore/store.js';
import { cloneTree } from '../../daemon/server/clone-trees.js';
import { controlParts, type ControlParts } from './control-parts.js';
import { encodeStream, uuidOf, type StreamSpec } from './power/streams.js';
import { withoutReserve } from './without-reserve.js';

const BLOCK = 4096;
const OPERATOR = { uid: 0, gid: 0, pid: 1 };
export const GOLDEN_QUOTA_BYTES = 512 * 1024 * 1024;
/** Records of the stream that was interrupted. */
export const GOLDEN_RECORDS = 2;

/** Of this one only the beginning was received; its blocks are zeros but for the writes. */
export const GOLDEN_STREAM: StreamSpec = { uuid: uuidOf(33), name: 'v1', target: 'received', baseUuid: null, nodes: [
  { path: 'c.img', kind: 'disk', content: { sizeBytes: 12 * BLOCK, seed: 1, holes: 1, writes: [0, 4, 8].map((block) => ({ at: block * BLOCK, length: BLOCK, seed: block + 40 })) }, delta: false },
] };

export const GOLDEN_MACHINE = {
  format: 'libvirt', configuration: 'vm.xml', name: 'vm', uuid: uuidOf(44), macs: ['52:54:00:00:00:01', '52:54:00:00:00:02'], hypervisor: 'libvirt', externalId: uuidOf(44),
} as const;

/** Blocks with a text of their own each. */
function worded(what: string, blocks: number): Buffer {
  return Buffer.concat(Array.from({ length: blocks }, (_, block) => Buffer.alloc(BLOCK, `${what}, block ${block}. `)));
}

function withParts(content: Buffer, parts: readonly (readonly [atBlock: number, bytes: Buffer])[]): Buffer {
  const changed = Buffer.from(content);
  for (const [block, bytes] of parts) bytes.copy(changed, block * BLOCK);
  return changed;
}

const IMAGE = worded('the image', 16);
const AT_S1 = withParts(IMAGE, [[2, worded('written before s1', 2)], [6, Buffer.alloc(BLOCK)]]);
const AT_S2 = withParts(AT_S1, [[3, worded('written before s2', 1)]]);
const NOW = withParts(AT_S2, [[10, worded('written after s2', 1)]]);
const FILE = Buffer.from('a small file that was there\n');
const MERGED = [0, 1, 2, 3, 4].reduce((content, layer) => withParts(content, [[layer * 3, worded(`layer ${layer}`, 1)]]), AT_S1);

/** Content by path; of what is in snapshots, too. */
export const GOLDEN_CONTENT: ReadonlyMap<string, Buffer> = new Map([
  ['vm/image.img', IMAGE], ['vm/a.img', NOW], ['vm/etc/f', Buffer.concat([FILE, FILE])],
  ['vm/.snapshots/s1/image.img', IMAGE], ['vm/.snapshots/s1/a.img', AT_S1], ['vm/.snapshots/s1/etc/f', FILE], ['vm/.snapshots/s2/a.img', AT_S2],
  ['web/image.img', IMAGE], ['web/a.img', MERGED], ['web/etc/f', FILE],
  // Blocks 4 to 7 are shared with a.img, but block 5 was written; the rest are zeros.
  ['vm/shared.img', withParts(Buffer.alloc(12 * BLOCK), [[4, AT_S2.subarray(0, 4 * BLOCK)], [5, worded('written over a shared block', 1)]])],
]);

export function openGolden(storeDir: string, runtimeDir: string): Store {
  return withoutReserve(() => Store.open({
    storeDir, runtimeDir, threads: 1, mapChunks: 1, announcer: { opened: () => undefined, closed: () => undefined },
    onFault: (nodeId, reason) => { throw new Error(`disk ${nodeId} was faulted: ${reason}`); }, onFull: () => undefined,
  }));
}

/** Makes the store in an empty directory. */
export async function makeGoldenStore(storeDir: string, runtimeDir: string): Promise<void> {
  const store = openGolden(storeDir, runtimeDir);
  const parts = controlParts(store);
  const idOf = (name: string): number => store.meta.nodes.byPath(name)!.id;
  const write = (name: string, at: number, bytes: Buffer): void => {
    store.disks.acquire(idOf(name));
    if (store.data.write(idOf(name), at, bytes) !== bytes.length) throw new Error(`${name} could not be written`);
    store.disks.release(idOf(name));
  };
  const vm = parts.fileSystem.mkdir(ROOT_ID, 'vm', 0o755, OPERATOR).nodeId;
  const etc = parts.fileSystem.mkdir(vm, 'etc', 0o750, OPERATOR).nodeId;
  store.meta.transaction(() => {
    const layer = store.meta.layers.insert({
      kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: IMAGE.length, sealed: false, complete: true, createdUs: 0,
    });
    store.files.create(layer.id, IMAGE.length);
    fs.writeFileSync(store.files.storePath(layer.id), IMAGE);
    addNode(store, vm, 'image.img', 'disk', IMAGE.length, layer.id);
    addNode(store, etc, 'f', 'file', 0, store.createEmptyLayer().id);
  });
  parts.fileSystem.symlink(vm, 'link', 'etc/f', OPERATOR);
  store.clone(idOf('vm/image.img'), [{ parentId: vm, name: 'a.img' }], { copyOnRead: true });
  write('vm/etc/f', 0, FILE);
  write('vm/a.img', 2 * BLOCK, worded('written before s1', 2));
  store.disks.acquire(idOf('vm/a.img'));
  store.data.discard(idOf('vm/a.img'), 6 * BLOCK, BLOCK);
  store.disks.release(idOf('vm/a.img'));
  await parts.snapshots.create({ reference: 'vm@s1', quiesce: null });
  write('vm/etc/f', FILE.length, FILE);
  write('vm/a.img', 3 * BLOCK, worded('written before s2', 1));
  await parts.snapshots.create({ reference: 'vm/a.img@s2', quiesce: null });
  write('vm/a.img', 10 * BLOCK, worded('written after s2', 1));
  await cloneTree({ store, namespace: parts.fileSystem.namespace }, parts.references.resolve('vm@s1'), ['web'], { copyOnRead: false, record: () => undefined });
  await mergeLayers(store, write, idOf('web/a.img'));
  store.cloneRangesToNew(idOf('vm/a.img'), { parentId: vm, name: 'shared.img', mode: 0o600, uid: 0, gid: 0, copyOnRead: false }, 12 * BLOCK,
    [{ sourceAtBytes: 0, targetAtBytes: 4 * BLOCK, lengthBytes: 4 * BLOCK }]);
  write('vm/shared.img', 5 * BLOCK, worded('written over a shared block', 1));
  store.quotas.set(vm, GOLDEN_QUOTA_BYTES);
  addMachine(store, vm);
  await beginReceive(parts);
  await store.close();
}

function addNode(store: Store, parentId: number, name: string, kind: 'disk' | 'file', sizeBytes: number, layerId: number): void {
  store.meta.nodes.insert({ parentId, name, kind, mode: 0o600, uid: 0, gid: 0, sizeBytes, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId, linkTarget: null, copyOnRead: false, fault: null });
}

function addMachine(store: Store, nodeId: number): void {
  const { format, configuration, name, uuid, macs, hypervisor, externalId } = GOLDEN_MACHINE;
  const { machines } = store.meta;
  const { id } = machines.insert({ nodeId, format, configuration, name, uuid, macs, state: 'ready', jobId: null });
  machines.asked(id, hypervisor);
  machines.registered(id, hypervisor, externalId);
}

/** Sealed layers one above the other, most of which are then one. */
async function mergeLayers(store: Store, write: (name: string, at: number, bytes: Buffer) => void, nodeId: number): Promise<void> {
  for (const layer of [0, 1, 2, 3, 4]) {
    write('web/a.img', layer * 3 * BLOCK, worded(`layer ${layer}`, 1));
    const [clone] = store.clone(nodeId, [{ parentId: ROOT_ID, name: 'seal' }], { copyOnRead: false });
    store.discardNode(clone!.id);
  }
  for (let merged = 0; merged < 2; merged += 1) {
    const pair = cheapestPair(store.meta, store.meta.nodes.byId(nodeId)?.layerId ?? 0);
    if (pair === null) throw new Error('there is nothing to merge');
    const file = path.join(store.files.storeDir, 'import', `${merged}.merge`);
    if (pair.costBytes > 0) await copyMerged(store, pair, file, { share: false, pace: async () => { await Promise.resolve(); } });
    store.merge(pair, pair.costBytes > 0 ? file : null);
  }
}

async function beginReceive({ receives }: ControlParts): Promise<void> {
  const { json, records } = encodeStream(GOLDEN_STREAM);
  const { receiveId } = await receives.begin(GOLDEN_STREAM.target, json);
  await receives.add(receiveId, 0, Buffer.concat(records.slice(0, GOLDEN_RECORDS)));
  await receives.pause(receiveId);
  await receives.close();
}
