/** Promote, rebase and the end of a flatten: who stands on whom, and that no byte is another one for it. */
import fs from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { originOf } from '../../blockstore/promote.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import type { RebaseOutcome } from '../../blockstore/rebase.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, kindOf, kindOfRejection, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';
import { createRandom } from '../support/model/random.js';

const BLOCKS = 30;
const SIZE_BYTES = BLOCKS * BLOCK_BYTES;

afterEach(() => { vi.restoreAllMocks(); });

function removeDisk({ store }: TestStore, node: NodeRow): void {
  store.meta.nodes.orphan(node.id);
  store.discardNode(node.id);
}

function originName({ store }: TestStore, node: NodeRow): string | null {
  return originOf(store.meta, node.id, store.meta.layers.chain(store.meta.nodes.byId(node.id)?.layerId ?? 0))?.name ?? null;
}

function close({ store }: TestStore, node: NodeRow): void {
  store.disks.release(node.id);
  store.disks.retireIdle(node.id);
}

function put(fixture: TestStore, node: NodeRow, content: Buffer, block: number, data: Buffer): void {
  fixture.acquire(node);
  fixture.write(node, block * BLOCK_BYTES, data);
  data.copy(content, block * BLOCK_BYTES);
  close(fixture, node);
}

describe('promote', () => {
  it('makes the clone the source of the disk that it was cloned from, and changes no byte', async () => {
    const fixture = new TestStore();
    const content = patterned(1, SIZE_BYTES, everyThird);
    const golden = fixture.image('golden', content);
    const [a, b] = [fixture.clone(golden, 'a'), fixture.clone(golden, 'b')];
    expect([golden, a, b].map((node) => originName(fixture, node))).toEqual([null, 'golden', 'golden']);
    fixture.acquire(a);
    expect(fixture.store.promote(a.id)).toMatchObject({ origin: { name: 'golden' }, layers: 1 });
    expect([golden, a, b].map((node) => originName(fixture, node))).toEqual(['a', null, 'a']);
    for (const node of [golden, a, b]) fixture.expectContent(node, content);
    // The same back again.
    fixture.store.promote(golden.id);
    expect([golden, a, b].map((node) => originName(fixture, node))).toEqual([null, 'golden', 'golden']);
    await fixture.restart();
    removeDisk(fixture, golden);
    for (const node of [a, b]) fixture.expectContent(node, content);
  });

  it('of a clone of a clone takes its place, and what that one was cloned from keeps its own', () => {
    const fixture = new TestStore();
    const content = patterned(1, SIZE_BYTES);
    const golden = fixture.image('golden', content);
    const middle = fixture.clone(golden, 'middle');
    put(fixture, middle, content, 3, patternBytes(2, 0, BLOCK_BYTES));
    const top = fixture.clone(middle, 'top');
    expect(originName(fixture, top)).toBe('middle');
    expect(fixture.store.promote(top.id).layers).toBe(1);
    expect([golden, middle, top].map((node) => originName(fixture, node))).toEqual([null, 'top', 'golden']);
    fixture.expectContent(top, content);
    expect(fixture.store.promote(top.id).origin.name).toBe('golden');
    expect([golden, middle, top].map((node) => originName(fixture, node))).toEqual(['top', 'top', null]);
  });

  it('has a reason for what has no source, or has one that is gone', () => {
    const fixture = new TestStore();
    const golden = fixture.image('golden', patterned(1, SIZE_BYTES));
    expect(kindOf(() => fixture.store.promote(golden.id))).toBe('invalid-argument');
    const clone = fixture.clone(golden, 'clone');
    removeDisk(fixture, golden);
    expect(() => fixture.store.promote(clone.id)).toThrow(/gone already/u);
  });
});

describe('rebase', () => {
  /** Two versions of an image, and a clone of the first one that has written block 5 and discarded block 8. */
  function threeDisks(fixture: TestStore, differing: readonly number[], options: { readonly newBytes?: number } = {}): { readonly clone: NodeRow; readonly next: NodeRow; readonly nextContent: Buffer; readonly expected: Buffer } {
    const content = patterned(1, SIZE_BYTES, everyThird);
    const clone = fixture.clone(fixture.image('old', content), 'clone');
    const nextContent = Buffer.from(content.subarray(0, options.newBytes ?? SIZE_BYTES));
    for (const block of differing) patternBytes(50 + block, 0, BLOCK_BYTES).copy(nextContent, block * BLOCK_BYTES);
    const next = fixture.image('new', nextContent);
    const expected = Buffer.alloc(SIZE_BYTES);
    nextContent.copy(expected);
    const data = patternBytes(9, 0, BLOCK_BYTES);
    fixture.acquire(clone);
    fixture.write(clone, 5 * BLOCK_BYTES, data);
    fixture.store.data.discard(clone.id, 8 * BLOCK_BYTES, BLOCK_BYTES);
    close(fixture, clone);
    data.copy(expected, 5 * BLOCK_BYTES);
    expected.fill(0, 8 * BLOCK_BYTES, 9 * BLOCK_BYTES);
    return { clone, next, nextContent, expected };
  }

  const rebase = async ({ store }: TestStore, clone: NodeRow, image: NodeRow, force = false): Promise<RebaseOutcome> => await store.rebase(clone.id, image.id, force);

  it('keeps what the clone has written, and takes all else from the new image', async () => {
    const fixture = new TestStore();
    const { clone, next, nextContent, expected } = threeDisks(fixture, [0, 4, 6, 20]);
    expect(await rebase(fixture, clone, next)).toMatchObject({ rebased: true, conflictsTotal: 0 });
    fixture.expectContent(clone, expected);
    expect(originName(fixture, clone)).toBe('new');
    fixture.expectContent(next, nextContent);
    await fixture.restart();
    fixture.expectContent(clone, expected);
    expect(await rebase(fixture, clone, next)).toMatchObject({ rebased: true });
    fixture.expectContent(clone, expected);
  });

  it('changes nothing where a block was written or discarded that differs, and lists the extents', async () => {
    const fixture = new TestStore();
    const { clone, next } = threeDisks(fixture, [4, 5, 8]);
    const before = fixture.content(clone);
    const chain = fixture.store.meta.layers.chain(fixture.layer(clone).id).map((layer) => layer.id);
    expect(await rebase(fixture, clone, next)).toEqual({
      rebased: false, conflictsTotal: 2, conflictBytes: 2 * BLOCK_BYTES,
      conflicts: [{ offsetBytes: 5 * BLOCK_BYTES, lengthBytes: BLOCK_BYTES }, { offsetBytes: 8 * BLOCK_BYTES, lengthBytes: BLOCK_BYTES }],
    });
    fixture.expectContent(clone, before);
    expect(fixture.store.meta.layers.chain(fixture.layer(clone).id).map((layer) => layer.id)).toEqual(chain);
  });

  it('by force lets the blocks of the clone win', async () => {
    const fixture = new TestStore();
    const { clone, next, expected } = threeDisks(fixture, [4, 5, 8]);
    expect(await rebase(fixture, clone, next, true)).toMatchObject({ rebased: true });
    fixture.expectContent(clone, expected);
  });

  it('lists at most 1000 extents, and counts all', async () => {
    const fixture = new TestStore();
    const blocks = 2600;
    const clone = fixture.clone(fixture.emptyImage('old', blocks * BLOCK_BYTES), 'clone');
    const next = fixture.image('new', patterned(3, blocks * BLOCK_BYTES));
    fixture.acquire(clone);
    for (let block = 0; block < blocks; block += 2) fixture.write(clone, block * BLOCK_BYTES, patternBytes(block, 0, BLOCK_BYTES));
    close(fixture, clone);
    const outcome = await rebase(fixture, clone, next);
    expect(outcome).toMatchObject({ conflictsTotal: blocks / 2, conflictBytes: (blocks / 2) * BLOCK_BYTES });
    expect(outcome.conflicts).toHaveLength(1000);
    expect(outcome.conflicts.at(-1)).toEqual({ offsetBytes: 2 * 999 * BLOCK_BYTES, lengthBytes: BLOCK_BYTES });
  });

  it('reads zeros behind the end of a shorter image, and refuses one that is longer than the clone', async () => {
    const fixture = new TestStore();
    const { clone, next, expected } = threeDisks(fixture, [2], { newBytes: 20 * BLOCK_BYTES + 512 });
    await rebase(fixture, clone, next);
    fixture.expectContent(clone, expected);
    const longer = fixture.image('longer', patterned(1, SIZE_BYTES + 512));
    expect(await kindOfRejection(rebase(fixture, clone, longer))).toBe('invalid-argument');
  });

  it('compares no blocks that both images have from one layer', async () => {
    const fixture = new TestStore();
    const content = patterned(1, SIZE_BYTES);
    const old = fixture.image('old', content);
    const clone = fixture.clone(old, 'clone');
    put(fixture, clone, content, 5, patternBytes(2, 0, BLOCK_BYTES));
    const next = fixture.clone(old, 'new');
    put(fixture, next, content, 6, patternBytes(3, 0, BLOCK_BYTES));
    const read = vi.spyOn(fs, 'read');
    expect(await rebase(fixture, clone, next)).toMatchObject({ rebased: true });
    expect(read).not.toHaveBeenCalled();
    fixture.expectContent(clone, content);
  });

  it('gives back what only the clone read through', async () => {
    const fixture = new TestStore();
    const { clone, next, expected } = threeDisks(fixture, [2]);
    const old = fixture.store.meta.nodes.child(1, 'old');
    if (old !== undefined) removeDisk(fixture, old);
    const layers = fixture.store.meta.layers.count();
    await rebase(fixture, clone, next);
    // The old image's layer went, the new one was sealed.
    expect(fixture.store.meta.layers.count()).toBe(layers);
    fixture.expectContent(clone, expected);
    expect(fixture.store.meta.layers.unreferenced()).toEqual([]);
  });

  it('moves sealed layers of the clone with it, unless others stand on them', async () => {
    const fixture = new TestStore();
    const { clone, next, expected } = threeDisks(fixture, [2]);
    const other = fixture.clone(clone, 'other');
    put(fixture, clone, expected, 12, patternBytes(4, 0, BLOCK_BYTES));
    expect(await kindOfRejection(rebase(fixture, clone, next))).toBe('in-use');
    removeDisk(fixture, other);
    await rebase(fixture, clone, next);
    fixture.expectContent(clone, expected);
  });

  it('is refused while the clone is open, for what is no clone, and on itself', async () => {
    const fixture = new TestStore();
    const { clone, next } = threeDisks(fixture, []);
    expect(await kindOfRejection(rebase(fixture, next, clone))).toBe('invalid-argument');
    expect(await kindOfRejection(rebase(fixture, clone, clone))).toBe('invalid-argument');
    const mine = fixture.clone(clone, 'mine');
    expect(await kindOfRejection(rebase(fixture, clone, mine))).toMatch(/in-use|invalid-argument/u);
    removeDisk(fixture, mine);
    fixture.acquire(clone);
    expect(await kindOfRejection(rebase(fixture, clone, next))).toBe('in-use');
  });

  it('keeps away what was cut off the clone once', async () => {
    const fixture = new TestStore();
    const { clone, next, expected } = threeDisks(fixture, []);
    fixture.store.resize(clone.id, 25 * BLOCK_BYTES);
    fixture.store.resize(clone.id, SIZE_BYTES);
    expected.fill(0, 25 * BLOCK_BYTES);
    // The new image has there what the old one had: the zeros of the clone are as good as written.
    expect((await rebase(fixture, clone, next)).rebased).toBe(true);
    fixture.expectContent(clone, expected);
  });

  it.each([1, 2, 3, 4, 5, 6, 7, 8])('agrees with a comparison byte by byte (seed %i)', async (seed) => {
    const random = createRandom(seed);
    const fixture = new TestStore();
    const before = patterned(seed, SIZE_BYTES, everyThird);
    const old = fixture.image('old', before);
    const clone = fixture.clone(old, 'clone');
    const after = Buffer.from(before);
    const mine = Buffer.from(before);
    const next = random.chance(0.5) ? fixture.clone(old, 'new') : fixture.image('new', before);
    const owned = new Set<number>();
    for (let i = 0; i < 6; i += 1) {
      // Now and then what is there already: no conflict, although it is owned.
      const at = random.between(0, BLOCKS - 1);
      put(fixture, next, after, at, random.chance(0.3) ? Buffer.from(before.subarray(at * BLOCK_BYTES, (at + 1) * BLOCK_BYTES)) : patternBytes(seed * 100 + i, 0, BLOCK_BYTES));
      const block = random.between(0, BLOCKS - 1);
      owned.add(block);
      put(fixture, clone, mine, block, patternBytes(seed * 200 + i, 0, BLOCK_BYTES));
      if (random.chance(0.3)) removeDisk(fixture, fixture.clone(random.pick([next, clone]), 'sealed'));
    }
    const conflicts = [...owned].filter((block) => !before.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES).equals(after.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)));
    const outcome = await rebase(fixture, clone, next);
    expect(outcome.conflictBytes).toBe(conflicts.length * BLOCK_BYTES);
    if (conflicts.length > 0) {
      fixture.expectContent(clone, mine);
      return;
    }
    for (const block of owned) mine.copy(after, block * BLOCK_BYTES, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
    fixture.expectContent(clone, after);
  });
});

describe('the end of a flatten', () => {
  it('drops the backing reference, and gives back the layers that nobody else reads', () => {
    const fixture = new TestStore();
    const content = patterned(1, SIZE_BYTES);
    const golden = fixture.image('golden', content);
    const clone = fixture.clone(golden, 'clone');
    const sibling = fixture.clone(golden, 'sibling');
    expect(kindOf(() => { fixture.store.detach(clone.id); })).toBe('busy');
    fixture.acquire(clone);
    fixture.write(clone, 0, content);
    fixture.store.markComplete(clone.id);
    expect(fixture.layer(clone).backingId).not.toBeNull();
    fixture.store.detach(clone.id);
    expect(fixture.layer(clone)).toMatchObject({ backingId: null, complete: true });
    removeDisk(fixture, golden);
    fixture.expectContent(sibling, content);
    removeDisk(fixture, sibling);
    expect(fixture.store.meta.layers.count()).toBe(1);
    fixture.expectContent(clone, content);
  });
});
