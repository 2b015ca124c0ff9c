/** Changed extents against contents: what is not listed is the same, what is listed as zeros reads as zeros, and little is listed for nothing. */
import { describe, expect, it } from 'vitest';

import { changedExtents, haveCommonLayer, type ChangedExtent, type DiskState } from '../../blockstore/changed-extents.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, patterned } from '../support/blockstore-fixture.js';
import { createRandom } from '../support/model/random.js';
import { patternBytes } from '../support/model/pattern.js';

/** The state of a node that nobody writes to any more. */
function stateOf(fixture: TestStore, node: NodeRow): DiskState {
  const disk = fixture.store.disks.get(node.id);
  if (disk !== undefined) fixture.store.committer.commitLayerNow(disk);
  const row = fixture.row(node);
  return { layerId: row.layerId ?? 0, sizeBytes: disk?.shared.sizeBytes() ?? row.sizeBytes };
}

function changes(fixture: TestStore, before: NodeRow | null, after: NodeRow): ChangedExtent[] {
  const all: ChangedExtent[] = [];
  for (let at: number | null = 0; at !== null; ) {
    const page = changedExtents(fixture.store, before === null ? null : stateOf(fixture, before), stateOf(fixture, after), at);
    all.push(...page.extents);
    if (page.nextOffsetBytes !== null) expect(page.nextOffsetBytes).toBeGreaterThan(at);
    at = page.nextOffsetBytes;
  }
  return all;
}

/** What a reader of the extents believes: the old content, with the listed extents from the new one. */
function applied(old: Buffer, now: Buffer, extents: readonly ChangedExtent[]): Buffer {
  const result = Buffer.alloc(now.length);
  old.copy(result, 0, 0, Math.min(old.length, now.length));
  let last = 0;
  for (const { offsetBytes, lengthBytes, type } of extents) {
    expect(offsetBytes).toBeGreaterThanOrEqual(last);
    last = offsetBytes + lengthBytes;
    expect(last).toBeLessThanOrEqual(now.length);
    if (type === 'zero') result.fill(0, offsetBytes, last);
    else now.copy(result, offsetBytes, offsetBytes, last);
  }
  return result;
}

function inside(fixture: TestStore, node: NodeRow, body: () => void): void {
  fixture.acquire(node);
  body();
  fixture.store.disks.release(node.id);
}

describe('changed extents', () => {
  it('of random histories of writes, discards, clones, range clones and resizes are all that differs, between any two states', () => {
    for (const seed of [1, 2, 3, 4, 5, 6]) {
      const random = createRandom(seed);
      const fixture = new TestStore();
      const blocks = 64;
      let live = fixture.clone(fixture.image('base', patterned(seed, blocks * BLOCK_BYTES, everyThird)), 'live-0');
      const states: { readonly node: NodeRow; readonly content: Buffer }[] = [];
      const freeze = (): void => {
        const node = fixture.clone(live, `state-${states.length}`);
        states.push({ node, content: fixture.content(node) });
      };
      freeze();
      for (let step = 0; step < 40; step += 1) {
        const sizeBytes = fixture.content(live).length;
        const offset = random.below(sizeBytes / 512 - 1) * 512;
        const length = Math.min(sizeBytes - offset, (1 + random.below(40)) * 512);
        switch (random.below(8)) {
          case 0: inside(fixture, live, () => { fixture.store.data.discard(live.id, offset, length); }); break;
          case 1: fixture.store.disks.retireIdle(live.id); fixture.store.resize(live.id, (16 + random.below(96)) * 512 * 4 + 512); break;
          case 2: freeze(); break;
          case 3: live = fixture.clone(live, `live-after-${step}`); break;
          case 4:
          case 5: {
            const { node, content } = states[random.below(states.length)]!;
            const count = Math.min(Math.floor(content.length / BLOCK_BYTES), Math.floor(sizeBytes / BLOCK_BYTES), 1 + random.below(20));
            const [from, to] = [random.below(Math.floor(content.length / BLOCK_BYTES) - count + 1), random.below(Math.floor(sizeBytes / BLOCK_BYTES) - count + 1)];
            fixture.store.cloneRanges(node.id, live.id, [{ sourceAtBytes: from * BLOCK_BYTES, targetAtBytes: to * BLOCK_BYTES, lengthBytes: count * BLOCK_BYTES }]);
            break;
          }
          default: inside(fixture, live, () => { fixture.write(live, offset, patternBytes(step + seed * 100, offset, length)); });
        }
      }
      freeze();
      for (const one of states) {
        for (const other of states) {
          const extents = changes(fixture, one.node, other.node);
          expect(applied(one.content, other.content, extents).equals(other.content), `seed ${seed}`).toBe(true);
          if (one === other) expect(extents).toEqual([]);
        }
        const data = changes(fixture, null, one.node);
        expect(data.every((each) => each.type === 'data')).toBe(true);
        expect(applied(Buffer.alloc(0), one.content, data).equals(one.content), `seed ${seed}`).toBe(true);
      }
    }
  });

  it('are exactly the blocks that were written to, with what was discarded as zeros', () => {
    const fixture = new TestStore();
    const live = fixture.clone(fixture.image('base', patterned(1, 20 * BLOCK_BYTES)), 'live');
    const before = fixture.clone(live, 'before');
    fixture.acquire(live);
    fixture.write(live, 3 * BLOCK_BYTES + 10, Buffer.from('some'));
    fixture.write(live, 4 * BLOCK_BYTES, Buffer.alloc(BLOCK_BYTES, 7));
    fixture.store.data.discard(live.id, 9 * BLOCK_BYTES, 2 * BLOCK_BYTES);
    expect(changes(fixture, before, live)).toEqual([
      { offsetBytes: 3 * BLOCK_BYTES, lengthBytes: 2 * BLOCK_BYTES, type: 'data' }, { offsetBytes: 9 * BLOCK_BYTES, lengthBytes: 2 * BLOCK_BYTES, type: 'zero' },
    ]);
    expect(changes(fixture, live, before)).toEqual([
      { offsetBytes: 3 * BLOCK_BYTES, lengthBytes: 2 * BLOCK_BYTES, type: 'data' }, { offsetBytes: 9 * BLOCK_BYTES, lengthBytes: 2 * BLOCK_BYTES, type: 'data' },
    ]);
  });

  it('of disks that have nothing in common are all of their data', () => {
    const fixture = new TestStore();
    const one = fixture.image('one', patterned(1, 8 * BLOCK_BYTES, everyThird));
    const other = fixture.image('other', patterned(2, 6 * BLOCK_BYTES + 512));
    expect(haveCommonLayer(fixture.store.meta, stateOf(fixture, one), stateOf(fixture, other))).toBe(false);
    expect(changes(fixture, one, other)).toEqual([{ offsetBytes: 0, lengthBytes: 6 * BLOCK_BYTES + 512, type: 'data' }]);
    expect(haveCommonLayer(fixture.store.meta, stateOf(fixture, one), stateOf(fixture, fixture.clone(one, 'clone')))).toBe(true);
  });

  it('of 16 TiB with three blocks written come at once', () => {
    const fixture = new TestStore();
    const sizeBytes = 16 * 1024 ** 4;
    const live = fixture.clone(fixture.emptyImage('huge', sizeBytes), 'live');
    const before = fixture.clone(live, 'before');
    const offsets = [0, PAGE_BYTES * 1000 - BLOCK_BYTES, sizeBytes - BLOCK_BYTES];
    fixture.acquire(live);
    for (const offset of offsets) fixture.write(live, offset, Buffer.alloc(BLOCK_BYTES, 1));
    expect(changes(fixture, before, live)).toEqual(offsets.map((offsetBytes) => ({ offsetBytes, lengthBytes: BLOCK_BYTES, type: 'data' })));
    expect(changes(fixture, null, live)).toHaveLength(3);
  });
});
