/**
 * Open disks: who uses them, what is committed when an idle one is retired, and that everything taken is given back: pages of
 * the block maps, descriptors, places at the announcer.
 */
import fs from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { SharedState } from '../../blockstore/hot/shared-state.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES, PAGE_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, kindOf, patterned } from '../support/blockstore-fixture.js';
import { patternBytes } from '../support/model/pattern.js';

const SIZE_BYTES = 12 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);
const BLOCK = patternBytes(2, 0, BLOCK_BYTES);
/** Disks that stay open although nobody uses them. */
const IDLE_DISKS_MAX = 64;

afterEach(() => { vi.restoreAllMocks(); });

function pagesInUse({ store }: TestStore): number {
  return store.context.shared.pagesInUse();
}

/** What this process has open below the store's layers. */
function openLayerFiles({ storeDir }: TestStore): string[] {
  const targets = fs.readdirSync('/proc/self/fd').map((fd) => {
    try {
      return fs.readlinkSync(`/proc/self/fd/${fd}`);
    } catch {
      // The listing had a descriptor of its own, which is gone by now.
      return '';
    }
  });
  return targets.filter((target) => target.startsWith(`${storeDir}/layers/`));
}

function committed(fixture: TestStore, node: NodeRow): number[] {
  return fixture.committedBlocks(fixture.layer(node).id);
}

describe('users', () => {
  it('share one instance, which stays for a while after the last', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    const first = fixture.acquire(disk);
    expect(fixture.acquire(disk)).toBe(first);
    expect(first.users).toBe(2);
    fixture.store.disks.release(disk.id);
    expect(fixture.store.disks.isUsed(disk.id)).toBe(true);
    fixture.store.disks.release(disk.id);
    expect(fixture.store.disks.isUsed(disk.id)).toBe(false);
    expect(fixture.store.disks.count()).toBe(0);
    expect(fixture.acquire(disk)).toBe(first);
    fixture.store.disks.retireIdle(disk.id);
    expect(fixture.disk(disk)).toBe(first);
    fixture.store.disks.release(disk.id);
    fixture.store.disks.retireIdle(disk.id);
    expect(fixture.store.disks.get(disk.id)).toBeUndefined();
    expect(fixture.acquire(disk)).not.toBe(first);
    expect(() => { fixture.store.disks.release(999); }).toThrow('without being open');
  });

  it('find nothing where there is nothing', () => {
    const fixture = new TestStore();
    expect(kindOf(() => fixture.store.disks.acquire(999))).toBe('not-found');
    expect(kindOf(() => fixture.store.disks.acquire(1))).toBe('is-a-directory');
    expect(kindOf(() => fixture.store.data.read(999, 0, new Uint8Array(1)))).toBe('bad-handle');
  });
});

describe('an idle disk', () => {
  it('is retired when there are too many, with everything that it had not committed', () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const nodes = Array.from({ length: IDLE_DISKS_MAX + 6 }, (_, i) => fixture.clone(base, `clone-${i}`));
    for (const node of nodes) {
      fixture.acquire(node);
      fixture.write(node, 0, BLOCK);
      fixture.store.disks.release(node.id);
    }
    expect(nodes.filter((node) => fixture.store.disks.get(node.id) === undefined)).toEqual(nodes.slice(0, 6));
    expect(nodes.map((node) => committed(fixture, node).length)).toEqual(nodes.map((_, i) => (i < 6 ? 1 : 0)));
    expect([...fixture.announced.values()].map(({ nodeId }) => nodeId)).toEqual(nodes.slice(6).map(({ id }) => id));
    expect(pagesInUse(fixture)).toBe(IDLE_DISKS_MAX);
    const expected = Buffer.from(SOURCE);
    BLOCK.copy(expected);
    for (const node of nodes) fixture.expectContent(node, expected);
    fixture.kill();
    for (const node of nodes) fixture.expectContent(node, expected);
  });

  it('is the one that was used longest ago', () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const nodes = Array.from({ length: IDLE_DISKS_MAX }, (_, i) => fixture.clone(base, `clone-${i}`));
    const use = (node: NodeRow): void => {
      fixture.acquire(node);
      fixture.store.disks.release(node.id);
    };
    for (const node of nodes) use(node);
    use(nodes[0]!);
    use(fixture.clone(base, 'one more'));
    expect(fixture.store.disks.get(nodes[0]!.id)).toBeDefined();
    expect(fixture.store.disks.get(nodes[1]!.id)).toBeUndefined();
  });

  it('that cannot be committed stays open, and its data with it; others go instead', () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const nodes = Array.from({ length: IDLE_DISKS_MAX + 2 }, (_, i) => fixture.clone(base, `clone-${i}`));
    const [first] = nodes as [NodeRow];
    for (const node of nodes.slice(0, IDLE_DISKS_MAX)) {
      fixture.acquire(node);
      if (node === first) fixture.write(node, 0, BLOCK);
      fixture.store.disks.release(node.id);
    }
    vi.spyOn(fixture.store.committer, 'commitLayerNow').mockImplementationOnce(() => { throw new OffshootError('no-space', 'the store is full'); });
    fixture.acquire(nodes[IDLE_DISKS_MAX]!);
    fixture.store.disks.release(nodes[IDLE_DISKS_MAX]!.id);
    expect(fixture.store.disks.get(first.id)).toBeDefined();
    expect(fixture.store.disks.get(nodes[1]!.id)).toBeUndefined();
    fixture.acquire(first);
    expect(fixture.read(first, 0, BLOCK_BYTES).equals(BLOCK)).toBe(true);
    fixture.write(first, BLOCK_BYTES, BLOCK);
    fixture.kill();
    fixture.acquire(first);
    expect(fixture.read(first, 0, 2 * BLOCK_BYTES).equals(Buffer.concat([BLOCK, BLOCK]))).toBe(true);
  });

  it('keeps the time of its last write', () => {
    const fixture = new TestStore();
    const disk = fixture.image('disk', SOURCE);
    fixture.acquire(disk);
    fixture.write(disk, 0, BLOCK);
    const mtimeUs = Math.round(fixture.disk(disk).shared.mtimeMs() * 1000);
    expect(mtimeUs).toBeGreaterThan(0);
    fixture.store.disks.release(disk.id);
    fixture.store.disks.retireIdle(disk.id);
    expect(fixture.row(disk).mtimeUs).toBe(mtimeUs);
  });
});

describe('what was taken is given back', () => {
  /** Three disks over one chain, with pages of the map of their own, on both sides of what a directory word can say. */
  function openThree(fixture: TestStore): NodeRow[] {
    const base = fixture.emptyImage('base', 3 * PAGE_BYTES);
    fixture.acquire(base);
    fixture.write(base, 0, BLOCK);
    fixture.store.disks.release(base.id);
    const nodes = [0, 1, 2].map((i) => fixture.clone(base, `clone-${i}`));
    for (const node of nodes) {
      fixture.acquire(node);
      fixture.write(node, 0, BLOCK);
      fixture.write(node, 2 * PAGE_BYTES, BLOCK);
      fixture.store.data.discard(node.id, PAGE_BYTES, PAGE_BYTES);
    }
    return nodes;
  }

  it('when disks are closed one by one', () => {
    const fixture = new TestStore();
    const nodes = openThree(fixture);
    expect(pagesInUse(fixture)).toBe(6);
    for (const [i, node] of nodes.entries()) {
      fixture.store.disks.release(node.id);
      fixture.store.disks.retireIdle(node.id);
      expect(pagesInUse(fixture)).toBe(6 - 2 * (i + 1));
    }
    expect([...fixture.announced.values()].map(({ nodeId }) => nodeId)).toEqual([]);
  });

  it('when disks grow, are sealed, completed, opened again and removed', () => {
    const fixture = new TestStore();
    const nodes = openThree(fixture);
    const [grown, sealed, complete] = nodes as [NodeRow, NodeRow, NodeRow];
    fixture.store.resize(grown.id, 9 * PAGE_BYTES);
    expect(pagesInUse(fixture)).toBe(6);
    fixture.clone(sealed, 'of sealed');
    fixture.store.data.discard(complete.id, 0, 3 * PAGE_BYTES);
    fixture.store.markComplete(complete.id);
    expect(pagesInUse(fixture)).toBe(4);
    // Sealed while it owns everything, a disk begins with an empty map.
    fixture.clone(complete, 'of complete');
    fixture.write(complete, 5, BLOCK);
    expect(pagesInUse(fixture)).toBe(5);
    for (const node of nodes) {
      fixture.store.disks.release(node.id);
      fixture.store.discardNode(node.id);
    }
    expect(pagesInUse(fixture)).toBe(0);
  });

  it('when the store is closed: pages, places, and the times of idle disks', async () => {
    const fixture = new TestStore();
    const nodes = openThree(fixture);
    const [used, idle] = nodes as [NodeRow, NodeRow];
    await fixture.store.committer.commitAll();
    for (const node of [used, idle]) {
      // Nothing newly owned, so that only the end says when it was written.
      fixture.store.meta.nodes.update(node.id, { mtimeUs: 0 });
      fixture.write(node, 0, BLOCK);
    }
    fixture.store.disks.release(idle.id);
    const { shared } = fixture.store.context;
    const view = new SharedState(shared.handles, 0);
    await fixture.close();
    expect(view.pagesInUse()).toBe(0);
    expect(fixture.announced.size).toBe(0);
    const next = new TestStore({ storeDir: fixture.storeDir });
    for (const node of [used, idle]) expect(next.row(node).mtimeUs).toBeGreaterThan(0);
  });

  it('when a disk could not be opened', () => {
    const fixture = new TestStore();
    const { node } = fixture.inPlace('disk', SOURCE);
    const clones = [fixture.clone(node, 'one'), fixture.clone(node, 'two')];
    fixture.acquire(clones[0]!);
    fixture.write(clones[0]!, 0, BLOCK);
    const second = fixture.clone(clones[0]!, 'second');
    fixture.store.disks.release(clones[0]!.id);
    fixture.store.disks.retireIdle(clones[0]!.id);
    const sealed = fixture.layer(second).backingId ?? 0;
    fixture.store.files.forgetIdle(sealed);
    fs.rmSync(fixture.store.files.storePath(sealed));
    const before = openLayerFiles(fixture).length;
    for (let i = 0; i < 5; i += 1) expect(kindOf(() => fixture.acquire(second))).toBe('store-damaged');
    expect(openLayerFiles(fixture).length).toBe(before);
    expect(pagesInUse(fixture)).toBe(0);
  });
});

describe('the arena of map pages', () => {
  it('that is used up fails the write, and nothing else', () => {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', SOURCE), 'clone');
    fixture.acquire(clone);
    const allocate = vi.spyOn(SharedState.prototype, 'allocatePage').mockReturnValue(-1);
    expect(kindOf(() => { fixture.write(clone, 0, BLOCK); })).toBe('io-error');
    expect(fixture.ownedBlocks(clone)).toEqual([]);
    fixture.expectContent(clone, SOURCE);
    allocate.mockRestore();
    fixture.write(clone, 0, BLOCK);
    expect(fixture.ownedBlocks(clone)).toEqual([0]);
  });

  it('that is used up refuses to open a disk, for the reason', () => {
    const fixture = new TestStore();
    const clone = fixture.clone(fixture.image('base', SOURCE), 'clone');
    fixture.acquire(clone);
    fixture.write(clone, 0, BLOCK);
    fixture.store.disks.release(clone.id);
    fixture.store.disks.retireIdle(clone.id);
    const allocate = vi.spyOn(SharedState.prototype, 'allocatePage').mockReturnValue(-1);
    expect(kindOf(() => fixture.acquire(clone))).toBe('no-space');
    allocate.mockRestore();
    fixture.acquire(clone);
    expect(fixture.read(clone, 0, BLOCK_BYTES).equals(BLOCK)).toBe(true);
  });
});

describe('files of sealed layers', () => {
  it('are opened once for all disks that stand on them', () => {
    const fixture = new TestStore();
    const base = fixture.image('base', SOURCE);
    const nodes = [0, 1, 2].map((i) => fixture.clone(base, `clone-${i}`));
    const fds = nodes.map((node) => fixture.acquire(node).shared.originFd(1));
    expect(new Set(fds).size).toBe(1);
    for (const node of nodes) {
      fixture.store.disks.release(node.id);
      fixture.store.disks.retireIdle(node.id);
    }
    // Kept for whoever comes next.
    expect(fixture.acquire(nodes[0]!).shared.originFd(1)).toBe(fds[0]);
  });
});
