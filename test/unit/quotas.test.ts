/**
 * Limits of containers: what counts, what is refused at the limit and what is not, and that a limit holds between two looks as well.
 *
 * On a real store. Looks are made by hand, so that it is known when the room was last measured; what is counted is held against the data files.
 */
import fs from 'node:fs';
import { describe, expect, it } from 'vitest';

import { Errno, type OffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { PLENTY_BLOCKS } from '../../blockstore/hot/room.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, kindOf, patterned } from '../support/blockstore-fixture.js';

const MIB = 1024 * 1024;
const SIZE = 16 * MIB;

function container(test: TestStore, name: string): number {
  return test.store.meta.nodes.insert({
    parentId: ROOT_ID, name, kind: 'directory', mode: 0o755, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 1, mtimeUs: 1, ctimeUs: 1, layerId: null, linkTarget: null, copyOnRead: false, fault: null,
  }).id;
}

function put(test: TestStore, node: NodeRow, parentId: number): NodeRow {
  test.store.meta.nodes.move(node.id, parentId, node.name);
  return test.row(node);
}

function used(test: TestStore, containerId: number): number {
  return test.store.quotas.list().find(({ nodeId }) => nodeId === containerId)?.usedBytes ?? -1;
}

function allocated(test: TestStore, node: NodeRow): number {
  return fs.statSync(test.store.files.storePath(test.row(node).layerId!)).blocks * 512;
}

/** Blocks that went in, one after another from `from` on, until one was refused; and the error. */
function writeUntilRefused(test: TestStore, node: NodeRow, from: number, to: number): { blocks: number; error: OffshootError | null } {
  for (let block = from; block < to; block += 1) {
    try {
      test.write(node, block * BLOCK_BYTES, patterned(block, BLOCK_BYTES));
    } catch (thrown) {
      return { blocks: block - from, error: thrown as OffshootError };
    }
  }
  return { blocks: to - from, error: null };
}

interface Bed {
  readonly test: TestStore;
  readonly vms: number;
  readonly other: number;
  readonly image: NodeRow;
  readonly clone: NodeRow;
  readonly neighbour: NodeRow;
}

/** An image of 4 MiB of data in a container of its own, a clone of it in the limited one, one in a third. */
function bed(): Bed {
  const test = new TestStore();
  const content = Buffer.alloc(SIZE);
  patterned(1, 4 * MIB).copy(content);
  const golden = container(test, 'golden');
  const [vms, other] = [container(test, 'vms'), container(test, 'other')];
  const image = put(test, test.image('image', content), golden);
  const clone = put(test, test.clone(image, 'clone'), vms);
  const neighbour = put(test, test.clone(image, 'neighbour'), other);
  test.acquire(clone);
  test.acquire(neighbour);
  return { test, vms, other, image, clone, neighbour };
}

describe('a limit', () => {
  it('is held to the block between two looks, and by the next look as well', () => {
    const { test, vms, clone } = bed();
    test.store.quotas.set(vms, MIB);
    expect(test.disk(clone).shared.quotaSlot()).toBeGreaterThan(0);
    const first = writeUntilRefused(test, clone, 1024, 4096);
    expect(first.blocks).toBe(256);
    expect(first.error).toMatchObject({ kind: 'no-space', context: { errno: Errno.ENOSPC } });
    expect(allocated(test, clone)).toBe(MIB);
    test.store.quotas.lookNow();
    expect(writeUntilRefused(test, clone, 3000, 3001).blocks).toBe(0);
    expect(used(test, vms)).toBe(MIB);
  });

  it('hurts no other container, and nothing that is owned or takes no room', () => {
    const { test, vms, clone, neighbour, image } = bed();
    test.store.quotas.set(vms, MIB);
    writeUntilRefused(test, clone, 1024, 4096);
    test.write(clone, 1024 * BLOCK_BYTES, patterned(77, 256 * BLOCK_BYTES));
    expect(test.read(clone, 1024 * BLOCK_BYTES, 256 * BLOCK_BYTES).equals(patterned(77, 256 * BLOCK_BYTES))).toBe(true);
    expect(test.read(clone, 0, MIB).equals(patterned(1, MIB))).toBe(true);
    expect(writeUntilRefused(test, neighbour, 0, 600).blocks).toBe(600);
    test.store.data.discard(clone.id, 0, 8 * BLOCK_BYTES);
    expect(test.read(clone, 0, 8 * BLOCK_BYTES).every((byte) => byte === 0)).toBe(true);
    expect(test.store.clone(image.id, [{ parentId: test.row(neighbour).parentId!, name: 'more' }], { copyOnRead: false }).length).toBe(1);
  });

  it('gives room back that discards and removals have made', () => {
    const { test, vms, image, clone } = bed();
    const victim = put(test, test.clone(image, 'victim'), vms);
    test.acquire(victim);
    test.write(victim, 0, patterned(5, MIB / 2));
    test.store.disks.release(victim.id);
    test.store.quotas.set(vms, MIB);
    expect(writeUntilRefused(test, clone, 1024, 4096).blocks).toBe(128);
    test.store.data.discard(clone.id, 1024 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    test.store.quotas.lookNow();
    expect(writeUntilRefused(test, clone, 2000, 4096).blocks).toBe(16);
    test.store.meta.nodes.orphan(victim.id);
    test.store.discardNode(victim.id);
    test.store.quotas.look();
    expect(writeUntilRefused(test, clone, 3000, 4096).blocks).toBe(128);
  });

  it('counts what the disks in it wrote and sealed, wherever clones of that are; and the snapshot of a disk that is gone', () => {
    const { test, vms, other, clone } = bed();
    test.write(clone, 0, patterned(2, MIB));
    test.store.quotas.set(vms, 8 * MIB);
    // Seals what it wrote. The copy lies in another container, and costs that nothing.
    const copy = put(test, test.clone(clone, 'copy'), other);
    const frozen = put(test, test.clone(clone, 'frozen'), vms);
    test.write(clone, MIB, patterned(3, MIB / 2));
    test.store.quotas.set(other, 8 * MIB);
    expect([used(test, vms), used(test, other)]).toEqual([MIB + MIB / 2, 0]);
    // Its writer is gone, and both containers need it: it is charged to neither.
    test.store.disks.release(clone.id);
    test.store.meta.nodes.orphan(clone.id);
    test.store.discardNode(clone.id);
    expect([used(test, vms), used(test, other)]).toEqual([0, 0]);
    // Only one needs it any more.
    test.store.meta.nodes.orphan(copy.id);
    test.store.discardNode(copy.id);
    expect([used(test, vms), used(test, other)]).toEqual([MIB, 0]);
    expect(test.row(frozen).parentId).toBe(vms);
  });

  it('refuses new clones when it is reached, with the reason, and lets them be when there is room', () => {
    const { test, vms, image, clone } = bed();
    const make = (name: string) => test.store.clone(image.id, [{ parentId: vms, name }], { copyOnRead: false });
    test.store.quotas.set(vms, MIB);
    expect(make('early').length).toBe(1);
    writeUntilRefused(test, clone, 1024, 4096);
    expect(kindOf(() => make('late'))).toBe('quota');
    expect(() => make('late')).toThrow(/the limit of the container vms leaves no room for this: 1048576 of 1048576 bytes are used; .*offshoot quota set vms SIZE/u);
    expect(test.store.meta.nodes.child(vms, 'late')).toBeUndefined();
    test.store.quotas.set(vms, 2 * MIB);
    expect(make('late').length).toBe(1);
    expect(kindOf(() => { test.store.quotas.assertRoom([vms], MIB + 1); })).toBe('quota');
    expect(kindOf(() => { test.store.quotas.assertRoom([vms], MIB); })).toBeUndefined();
  });

  it('stops a fill and copy-on-read, and fails no read', () => {
    const { test, vms, image } = bed();
    test.store.quotas.set(vms, MIB);
    const reader = put(test, test.clone(image, 'reader', { copyOnRead: true }), vms);
    test.acquire(reader);
    expect(test.read(reader, 0, 4 * MIB).equals(patterned(1, 4 * MIB))).toBe(true);
    expect(allocated(test, reader)).toBeLessThanOrEqual(MIB);
    expect(allocated(test, reader)).toBeGreaterThan(0);
    expect(test.store.quotas.refusalOf(reader.id)).toMatchObject({ kind: 'quota' });
  });

  it('tells files EDQUOT, growing ones too, and lets them grow within a block that they have', () => {
    const { test, vms } = bed();
    const file = put(test, test.image('file', patterned(4, BLOCK_BYTES + 100), { kind: 'file' }), vms);
    test.acquire(file);
    test.store.quotas.set(vms, 4 * BLOCK_BYTES);
    test.write(file, BLOCK_BYTES + 100, patterned(5, 200));
    const { blocks, error } = writeUntilRefused(test, file, 2, 64);
    expect(blocks).toBe(2);
    expect(error).toMatchObject({ kind: 'quota', context: { errno: Errno.EDQUOT } });
    test.write(file, 0, patterned(6, 4 * BLOCK_BYTES));
    expect(allocated(test, file)).toBe(4 * BLOCK_BYTES);
  });

  it('counts writes into holes of a disk that owns everything', () => {
    const { test, vms } = bed();
    const sparse = put(test, test.emptyImage('sparse', SIZE), vms);
    test.acquire(sparse);
    test.store.quotas.set(vms, MIB);
    expect(test.store.context.shared.room(test.disk(sparse).shared.quotaSlot())).toBeLessThan(PLENTY_BLOCKS);
    expect(writeUntilRefused(test, sparse, 0, 4096)).toMatchObject({ blocks: 256, error: { kind: 'no-space' } });
    test.write(sparse, 0, patterned(9, MIB));
    expect(allocated(test, sparse)).toBe(MIB);
  });

  it('goes on to hold for a file that was removed while it is open', () => {
    const { test, vms } = bed();
    const file = put(test, test.image('file', patterned(4, BLOCK_BYTES), { kind: 'file' }), vms);
    test.acquire(file);
    test.store.quotas.set(vms, 8 * BLOCK_BYTES);
    test.store.meta.nodes.orphan(file.id);
    for (let i = 0; i < 4; i += 1) test.store.quotas.lookNow();
    expect(writeUntilRefused(test, file, 1, 64).blocks).toBe(7);
    test.store.quotas.lookNow();
    expect(writeUntilRefused(test, file, 8, 64).blocks).toBe(0);
  });

  it('is kept over a restart, goes with its container, and is taken away by whoever set it', async () => {
    const { test, vms, clone, neighbour, other } = bed();
    test.store.quotas.set(vms, MIB);
    test.store.quotas.set(other, MIB);
    test.store.disks.release(clone.id);
    test.store.disks.release(neighbour.id);
    await test.restart();
    test.acquire(clone);
    test.acquire(neighbour);
    expect(writeUntilRefused(test, clone, 1024, 4096).blocks).toBe(256);
    expect(test.store.quotas.remove(vms)).toBe(true);
    expect(test.store.quotas.remove(vms)).toBe(false);
    expect(writeUntilRefused(test, clone, 2000, 3000).blocks).toBe(1000);
    test.store.disks.release(neighbour.id);
    test.store.meta.nodes.orphan(neighbour.id);
    test.store.discardNode(neighbour.id);
    test.store.meta.nodes.orphan(other);
    test.store.meta.nodes.remove(other);
    expect(test.store.quotas.list()).toEqual([]);
    expect(test.store.meta.quotas.all()).toEqual([]);
  });

  it('counts what was cloned by range where it was written, and in the target only what is written there', () => {
    const { test, vms, other, clone, neighbour } = bed();
    test.write(neighbour, 0, patterned(2, 4 * MIB));
    test.write(clone, 0, patterned(3, MIB / 2));
    test.store.quotas.set(vms, MIB);
    test.store.quotas.set(other, 8 * MIB);
    expect([used(test, vms), used(test, other)]).toEqual([MIB / 2, 4 * MIB]);
    test.store.cloneRanges(neighbour.id, clone.id, [{ sourceAtBytes: 0, targetAtBytes: 0, lengthBytes: 4 * MIB }]);
    // What the target had there went.
    expect([used(test, vms), used(test, other)]).toEqual([0, 4 * MIB]);
    expect(test.read(clone, 0, 4 * MIB).equals(patterned(2, 4 * MIB))).toBe(true);
    // Each side pays for what it writes from now on.
    const { blocks, error } = writeUntilRefused(test, clone, 100, 1024);
    expect([blocks, error?.kind]).toEqual([256, 'no-space']);
    test.write(neighbour, 0, patterned(4, MIB));
    expect([used(test, vms), used(test, other)]).toEqual([MIB, 5 * MIB]);
    expect(allocated(test, clone)).toBe(MIB);
  });

  it('is charged with the source\'s layer, in whole, when the source goes and nobody outside needs it: nothing is refused or lost by that', () => {
    const { test, vms, other, image, clone, neighbour } = bed();
    test.write(neighbour, 8 * MIB, patterned(2, 2 * MIB));
    test.store.quotas.set(vms, MIB);
    test.store.quotas.set(other, 8 * MIB);
    const third = put(test, test.clone(image, 'third'), container(test, 'third-container'));
    const share = { sourceAtBytes: 8 * MIB, targetAtBytes: 0, lengthBytes: MIB / 2 };
    for (const target of [clone, third]) test.store.cloneRanges(neighbour.id, target.id, [share]);
    const gone = (node: NodeRow): void => {
      if (test.store.disks.isUsed(node.id)) test.store.disks.release(node.id);
      test.store.meta.nodes.orphan(node.id);
      test.store.discardNode(node.id);
    };
    gone(neighbour);
    // Two containers need it, and who wrote it is gone: nobody is charged.
    expect([used(test, vms), used(test, other)]).toEqual([0, 0]);
    gone(third);
    expect([used(test, vms), used(test, other)]).toEqual([2 * MIB, 0]);
    expect(writeUntilRefused(test, clone, 2000, 2001).error?.kind).toBe('no-space');
    expect(test.read(clone, 0, MIB / 2).equals(patterned(2, MIB / 2))).toBe(true);
    test.store.data.discard(clone.id, 0, MIB / 2);
    // The layer goes when no row refers to it any more: with the next range clone into the disk, a fill, or a start.
    test.store.cloneRanges(image.id, clone.id, [{ sourceAtBytes: 0, targetAtBytes: 0, lengthBytes: BLOCK_BYTES }]);
    expect(used(test, vms)).toBe(0);
    expect(writeUntilRefused(test, clone, 2000, 2001).blocks).toBe(1);
  });

  it('refuses a new disk by ranges when it is reached; blocks that come into one that is there take no room', () => {
    const { test, vms, image, clone } = bed();
    const share = { sourceAtBytes: 0, targetAtBytes: 8 * MIB, lengthBytes: MIB };
    const make = (name: string) => test.store.cloneRangesToNew(image.id, { parentId: vms, name, mode: 0o600, uid: 0, gid: 0, copyOnRead: false }, SIZE, [share]);
    test.store.quotas.set(vms, MIB);
    make('early');
    writeUntilRefused(test, clone, 1024, 4096);
    expect(kindOf(() => make('late'))).toBe('quota');
    expect(test.store.meta.nodes.child(vms, 'late')).toBeUndefined();
    test.store.cloneRanges(image.id, clone.id, [share]);
    expect(test.read(clone, 8 * MIB, MIB).equals(patterned(1, MIB))).toBe(true);
    expect(used(test, vms)).toBe(MIB);
  });

  it('of a source: once it was cloned or copied at its limit, what it writes needs new room', () => {
    const { test, vms, clone, neighbour } = bed();
    test.store.quotas.set(vms, MIB);
    writeUntilRefused(test, clone, 1024, 4096);
    test.write(clone, 1024 * BLOCK_BYTES, patterned(5, BLOCK_BYTES));
    test.store.cloneRanges(clone.id, neighbour.id, [{ sourceAtBytes: 4 * MIB, targetAtBytes: 0, lengthBytes: MIB }]);
    expect(writeUntilRefused(test, clone, 1024, 1025).error?.kind).toBe('no-space');
    test.store.quotas.set(vms, 2 * MIB);
    expect(writeUntilRefused(test, clone, 1024, 1025).blocks).toBe(1);
  });

  it('keeps room for what is about to come from being written by guests meanwhile', () => {
    const { test, vms, clone } = bed();
    test.store.quotas.set(vms, MIB);
    test.store.quotas.assertRoom([vms], MIB - 8 * BLOCK_BYTES);
    expect(writeUntilRefused(test, clone, 1024, 4096).blocks).toBe(8);
    // It did not come: the next look says so.
    test.store.quotas.lookNow();
    expect(writeUntilRefused(test, clone, 2000, 4096).blocks).toBe(248);
  });

  it('is said once when it is reached, and once when there is room again', () => {
    const { test, vms, clone } = bed();
    const said = test.quotaChanges;
    test.store.quotas.set(vms, MIB);
    writeUntilRefused(test, clone, 1024, 4096);
    for (let i = 0; i < 3; i += 1) test.store.quotas.lookNow();
    expect(said.map(({ container: name, isReached }) => [name, isReached])).toEqual([['vms', true]]);
    test.store.data.discard(clone.id, 1024 * BLOCK_BYTES, MIB / 2);
    for (let i = 0; i < 3; i += 1) test.store.quotas.lookNow();
    expect(said.map(({ isReached }) => isReached)).toEqual([true, false]);
  });

  it('is reached until room is made, also when what was refused wanted more than was free', () => {
    const { test, vms, clone } = bed();
    const said = test.quotaChanges;
    test.store.quotas.set(vms, MIB / 2);
    expect(() => { test.write(clone, 1024 * BLOCK_BYTES, patterned(1, MIB)); }).toThrow();
    for (let i = 0; i < 3; i += 1) test.store.quotas.lookNow();
    expect(test.store.quotas.of(vms)).toMatchObject({ isReached: true, usedBytes: 0 });
    test.store.quotas.set(vms, 4 * MIB);
    for (let i = 0; i < 3; i += 1) test.store.quotas.lookNow();
    expect(said.map(({ isReached }) => isReached)).toEqual([true, false]);
  });
});
