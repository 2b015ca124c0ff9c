/** Merges of sealed layers: nobody sees a difference, at any moment; a crash leaves one chain or the other; what others need is left alone. */
import fs from 'node:fs';
import path from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { copyMerged } from '../../blockstore/merge-copy.js';
import { cheapestPair, commitMerge, mergePair, type MergePair } from '../../blockstore/merge.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, kindOf, kindOfRejection, patterned } from '../support/blockstore-fixture.js';
import { createRandom } from '../support/model/random.js';
import { patternBytes } from '../support/model/pattern.js';

const BLOCKS = 40;
const SIZE_BYTES = BLOCKS * BLOCK_BYTES + 512;
const options = { pace: async () => { await Promise.resolve(); } };

afterEach(() => { vi.restoreAllMocks(); });

/** A disk with what it must hold. */
interface Known {
  readonly node: NodeRow;
  content: Buffer;
}

function seal(fixture: TestStore, node: NodeRow): void {
  const clone = fixture.clone(node, 'to-seal');
  removeDisk(fixture, clone);
}

function removeDisk({ store }: TestStore, node: NodeRow): void {
  store.meta.nodes.orphan(node.id);
  store.discardNode(node.id);
}

function layerIds({ store }: TestStore, node: NodeRow): number[] {
  return store.meta.layers.chain(store.meta.nodes.byId(node.id)?.layerId ?? 0).map((layer) => layer.id);
}

function write(fixture: TestStore, disk: Known, at: number, data: Buffer): void {
  fixture.write(disk.node, at, data);
  data.copy(disk.content, at);
}

function discard(fixture: TestStore, disk: Known, block: number, count: number): void {
  const from = block * BLOCK_BYTES;
  const to = Math.min(disk.content.length, from + count * BLOCK_BYTES);
  fixture.store.data.discard(disk.node.id, from, to - from);
  disk.content.fill(0, from, to);
}

function resize(fixture: TestStore, disk: Known, sizeBytes: number): void {
  fixture.store.resize(disk.node.id, sizeBytes);
  const content = Buffer.alloc(sizeBytes);
  disk.content.copy(content, 0, 0, Math.min(sizeBytes, disk.content.length));
  disk.content = content;
}

async function merge(fixture: TestStore, pair: MergePair, share = true): Promise<void> {
  const file = path.join(fixture.storeDir, 'import', 'x.merge');
  if (pair.costBytes > 0) await copyMerged(fixture.store, pair, file, { ...options, share });
  fixture.store.merge(pair, pair.costBytes > 0 ? file : null);
}

/** A clone with `seals` sealed layers of its own, each with a few blocks. */
function deepClone(fixture: TestStore, seals: number): Known {
  const base = patterned(1, SIZE_BYTES, everyThird);
  const name = `deep${fixture.store.meta.layers.count()}`;
  const disk: Known = { node: fixture.clone(fixture.image(`base-${name}`, base), name), content: Buffer.from(base) };
  fixture.acquire(disk.node);
  for (let layer = 0; layer < seals; layer += 1) {
    write(fixture, disk, layer * BLOCK_BYTES, patternBytes(100 + layer, 0, 3 * BLOCK_BYTES));
    discard(fixture, disk, layer + 5, 1);
    seal(fixture, disk.node);
  }
  return disk;
}

function pairOf(fixture: TestStore, disk: Known): MergePair {
  const pair = cheapestPair(fixture.store.meta, fixture.layer(disk.node).id);
  if (pair === null) throw new Error('nothing can be merged');
  return pair;
}

function findings(fixture: TestStore, repair = false): string[] {
  const steps = fixture.store.checkSteps({ database: true, repair, isNodeInUse: () => false });
  for (;;) {
    const step = steps.next();
    if (step.done === true) return step.value.findings.filter((finding) => finding.repaired !== true).map((finding) => `${finding.kind}: ${finding.message}`);
  }
}

function openLayerFiles(): string[] {
  return fs.readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      return [fs.readlinkSync(path.join('/proc/self/fd', fd))];
    } catch {
      // The one that the directory itself was read through.
      return [];
    }
  }).filter((name) => name.includes('.layer'));
}

function filesIn({ storeDir }: TestStore): string[] {
  return fs.readdirSync(path.join(storeDir, 'layers'), { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.layer'));
}

describe('a merge', () => {
  it.each([1, 2, 3, 4, 5, 6])('of layers made at random changes no byte, open or not (seed %i)', async (seed) => {
    const random = createRandom(seed);
    const fixture = new TestStore();
    const base = patterned(seed, SIZE_BYTES, everyThird);
    const disk: Known = { node: fixture.clone(fixture.image('base', base), 'disk'), content: Buffer.from(base) };
    const bystander = fixture.clone(disk.node, 'bystander');
    fixture.acquire(disk.node);
    const branches: Known[] = [];
    for (let layer = 0; layer < 14; layer += 1) {
      for (let i = random.between(0, 4); i > 0; i -= 1) {
        const block = random.between(0, Math.floor(disk.content.length / BLOCK_BYTES) - 1);
        const length = Math.min(disk.content.length - block * BLOCK_BYTES, random.between(1, 5 * BLOCK_BYTES));
        if (random.chance(0.3)) discard(fixture, disk, block, random.between(1, 4));
        else write(fixture, disk, block * BLOCK_BYTES, patternBytes(1000 * seed + 10 * layer + i, 0, length));
      }
      if (random.chance(0.3)) resize(fixture, disk, 512 * random.between(8 * 4, 8 * (BLOCKS + 8)));
      if (random.chance(0.15)) branches.push({ node: fixture.clone(disk.node, `branch${layer}`), content: Buffer.from(disk.content) });
      else seal(fixture, disk.node);
    }
    const before = layerIds(fixture, disk.node).length;
    let merges = 0;
    for (let pair = cheapestPair(fixture.store.meta, fixture.layer(disk.node).id); pair !== null; pair = cheapestPair(fixture.store.meta, fixture.layer(disk.node).id)) {
      await merge(fixture, pair, random.chance(0.5));
      merges += 1;
      fixture.expectContent(disk.node, disk.content);
      for (const branch of branches) fixture.expectContent(branch.node, branch.content);
      // What is written now must lie in the active layer alone.
      write(fixture, disk, 0, patternBytes(7000 + merges, 0, BLOCK_BYTES));
    }
    expect(merges).toBeGreaterThan(3);
    expect(layerIds(fixture, disk.node)).toHaveLength(before - merges);
    expect(findings(fixture)).toEqual([]);
    expect(filesIn(fixture).length).toBeLessThanOrEqual(fixture.store.meta.layers.count());
    await fixture.restart();
    fixture.expectContent(disk.node, disk.content);
    fixture.expectContent(bystander, base);
    for (const branch of branches) fixture.expectContent(branch.node, branch.content);
  });

  it('lets a disk that is open go on without the files that are gone', async () => {
    const fixture = new TestStore();
    const disk = deepClone(fixture, 4);
    const { upper, lower } = pairOf(fixture, disk);
    await merge(fixture, { ...pairOf(fixture, disk) });
    fixture.expectContent(disk.node, disk.content);
    for (const { id } of [upper, lower]) expect(fs.existsSync(fixture.store.files.storePath(id))).toBe(false);
    expect(openLayerFiles().filter((name) => name.includes('deleted'))).toEqual([]);
  });

  it('leaves a disk that is busy its old files until it is opened again', async () => {
    const fixture = new TestStore();
    const disk = deepClone(fixture, 3);
    const pair = pairOf(fixture, disk);
    const file = path.join(fixture.storeDir, 'import', 'x.merge');
    await copyMerged(fixture.store, pair, file, options);
    const { shared } = fixture.store.context;
    // A request of another thread that does not end.
    const other = fixture.actor(1);
    other.shared.enter(fixture.disk(disk.node).shared.serial);
    commitMerge(fixture.store, pair, file);
    other.shared.leave(false);
    expect(shared.sequences().length).toBeGreaterThan(0);
    expect(openLayerFiles().filter((name) => name.includes('deleted'))).toHaveLength(2);
    fixture.expectContent(disk.node, disk.content);
    fixture.store.disks.release(disk.node.id);
    fixture.store.disks.retireIdle(disk.node.id);
    expect(openLayerFiles().filter((name) => name.includes('deleted'))).toEqual([]);
    fixture.expectContent(disk.node, disk.content);
  });

  it('copies nothing when the upper layer owns all that the lower one owns', () => {
    const fixture = new TestStore();
    const base = patterned(1, SIZE_BYTES);
    const disk: Known = { node: fixture.clone(fixture.image('base', base), 'disk'), content: Buffer.from(base) };
    fixture.acquire(disk.node);
    write(fixture, disk, 4 * BLOCK_BYTES, patternBytes(2, 0, 2 * BLOCK_BYTES));
    seal(fixture, disk.node);
    write(fixture, disk, 3 * BLOCK_BYTES, patternBytes(3, 0, 4 * BLOCK_BYTES));
    seal(fixture, disk.node);
    const [, upperId] = layerIds(fixture, disk.node);
    fixture.store.meta.checksums.finish(upperId ?? 0, 'sha256', 1024 * 1024);
    const pair = pairOf(fixture, disk);
    expect(pair).toMatchObject({ costBytes: 0, upper: { id: upperId } });
    fixture.store.merge(pair, null);
    // Its file and what is known of its content are as they were.
    expect(layerIds(fixture, disk.node)[1]).toBe(upperId);
    expect(fixture.store.meta.checksums.of(upperId ?? 0)?.complete).toBe(true);
    fixture.expectContent(disk.node, disk.content);
    expect(findings(fixture)).toEqual([]);
  });

  it('keeps what a layer holds behind the end that a shrink gave it from coming back', async () => {
    const fixture = new TestStore();
    const base = patterned(1, SIZE_BYTES);
    const disk: Known = { node: fixture.clone(fixture.image('base', base), 'disk'), content: Buffer.from(base) };
    fixture.acquire(disk.node);
    write(fixture, disk, 10 * BLOCK_BYTES, patternBytes(2, 0, 20 * BLOCK_BYTES));
    seal(fixture, disk.node);
    resize(fixture, disk, 15 * BLOCK_BYTES + 512);
    write(fixture, disk, 0, patternBytes(3, 0, BLOCK_BYTES));
    seal(fixture, disk.node);
    resize(fixture, disk, 30 * BLOCK_BYTES);
    await merge(fixture, pairOf(fixture, disk));
    fixture.expectContent(disk.node, disk.content);
    await fixture.restart();
    fixture.expectContent(disk.node, disk.content);
  });

  it('of layers that were both made smaller and larger again brings back nothing of the lower one or of the image', async () => {
    const fixture = new TestStore();
    const base = patterned(1, SIZE_BYTES);
    const disk: Known = { node: fixture.clone(fixture.image('base', base), 'disk'), content: Buffer.from(base) };
    fixture.acquire(disk.node);
    resize(fixture, disk, 10 * BLOCK_BYTES);
    resize(fixture, disk, 36 * BLOCK_BYTES);
    write(fixture, disk, 12 * BLOCK_BYTES, patternBytes(2, 0, 20 * BLOCK_BYTES));
    seal(fixture, disk.node);
    resize(fixture, disk, 25 * BLOCK_BYTES + 512);
    resize(fixture, disk, 36 * BLOCK_BYTES);
    write(fixture, disk, 0, patternBytes(3, 0, BLOCK_BYTES));
    seal(fixture, disk.node);
    await merge(fixture, pairOf(fixture, disk));
    fixture.expectContent(disk.node, disk.content);
    await fixture.restart();
    fixture.expectContent(disk.node, disk.content);
  });
});

describe('layers are left alone', () => {
  it('when a second clone, a node or shared blocks need them, when they are damaged, and when the lower one is an image', () => {
    const fixture = new TestStore();
    const disk = deepClone(fixture, 3);
    const [, top, middle, low] = layerIds(fixture, disk.node);
    const { meta } = fixture.store;
    expect([top, middle, low].map((id) => mergePair(meta, id ?? 0)?.lower.id ?? null)).toEqual([middle, low, null]);
    // A clone of what the disk was one seal ago would stand on `middle`.
    const other = fixture.clone(disk.node, 'other');
    expect(mergePair(meta, top ?? 0)?.lower.id).toBe(middle);
    meta.layers.update(fixture.layer(other).id, { backingId: middle ?? 0 });
    expect(mergePair(meta, top ?? 0)).toBeNull();
    removeDisk(fixture, other);
    expect(mergePair(meta, top ?? 0)?.lower.id).toBe(middle);
    meta.checksums.found(middle ?? 0, 0, 4096, [{ offsetBytes: 0, lengthBytes: 4096, kind: 'damaged' }]);
    expect(mergePair(meta, top ?? 0)).toBeNull();
    expect(mergePair(meta, middle ?? 0)).toBeNull();
    meta.checksums.found(middle ?? 0, 0, 4096, []);
    expect(mergePair(meta, top ?? 0)?.lower.id).toBe(middle);
  });

  it('when somebody came to need the lower one while it was copied', async () => {
    const fixture = new TestStore();
    const disk = deepClone(fixture, 3);
    const pair = pairOf(fixture, disk);
    const file = path.join(fixture.storeDir, 'import', 'x.merge');
    await copyMerged(fixture.store, pair, file, options);
    const before = layerIds(fixture, disk.node);
    const late = fixture.clone(disk.node, 'late');
    fixture.store.meta.layers.update(fixture.layer(late).id, { backingId: pair.lower.id });
    expect(kindOf(() => fixture.store.merge(pair, file))).toBe('busy');
    expect(layerIds(fixture, disk.node)).toEqual(before);
    fixture.expectContent(disk.node, disk.content);
  });

  it('when the disk is gone by then, and nothing is left behind', async () => {
    const fixture = new TestStore();
    const disk = deepClone(fixture, 3);
    const pair = pairOf(fixture, disk);
    fixture.store.disks.release(disk.node.id);
    const early = copyMerged(fixture.store, pair, path.join(fixture.storeDir, 'import', 'x.merge'), options);
    removeDisk(fixture, disk.node);
    expect(await kindOfRejection(early)).toBe('busy');
    expect(fs.readdirSync(path.join(fixture.storeDir, 'import'))).toEqual([]);
    const second = deepClone(fixture, 3);
    const other = pairOf(fixture, second);
    const file = path.join(fixture.storeDir, 'import', 'y.merge');
    await copyMerged(fixture.store, other, file, options);
    fixture.store.disks.release(second.node.id);
    removeDisk(fixture, second.node);
    expect(kindOf(() => fixture.store.merge(other, file))).toBe('busy');
    expect(findings(fixture).filter((finding) => !finding.startsWith('stray-import'))).toEqual([]);
  });
});

describe('a server that is killed', () => {
  const moments: readonly (readonly [string, (fixture: TestStore, pair: MergePair, file: string) => void])[] = [
    ['when the file is made', () => undefined],
    ['when the file has its place and the transaction is not committed', (fixture, pair, file) => {
      const { store } = fixture;
      const adopt = store.files.adopt.bind(store.files);
      vi.spyOn(store.files, 'adopt').mockImplementation((layerId, name) => {
        adopt(layerId, name);
        throw Object.assign(new Error('killed here'), { code: 'EIO', syscall: 'fsync', errno: -5 });
      });
      expect(() => store.merge(pair, file)).toThrow('killed here');
    }],
    ['when it is committed and no file is unlinked', (fixture, pair, file) => {
      vi.spyOn(fixture.store.files, 'unlink').mockImplementation(() => undefined);
      fixture.store.merge(pair, file);
    }],
    ['when all is done', (fixture, pair, file) => { fixture.store.merge(pair, file); }],
  ];

  it.each(moments)('%s leaves one chain or the other, whole, and nothing that is not found', async (_name, happen) => {
    const fixture = new TestStore();
    const disk = deepClone(fixture, 4);
    const pair = pairOf(fixture, disk);
    const file = path.join(fixture.storeDir, 'import', '1.merge');
    await copyMerged(fixture.store, pair, file, options);
    // Acknowledged, and in no commit yet.
    write(fixture, disk, 20 * BLOCK_BYTES, patternBytes(9, 0, BLOCK_BYTES));
    happen(fixture, pair, file);
    fixture.kill();
    vi.restoreAllMocks();
    fixture.acquire(disk.node);
    fixture.expectContent(disk.node, disk.content);
    expect(fs.readdirSync(path.join(fixture.storeDir, 'import'))).toEqual([]);
    findings(fixture, true);
    expect(findings(fixture)).toEqual([]);
    // What the dead one left does not get in the way of the same work, or of a new layer with the id that it had taken.
    seal(fixture, disk.node);
    write(fixture, disk, 0, patternBytes(11, 0, 2 * BLOCK_BYTES));
    seal(fixture, disk.node);
    await merge(fixture, pairOf(fixture, disk));
    fixture.expectContent(disk.node, disk.content);
    expect(findings(fixture)).toEqual([]);
  });
});

it('a disk can be cloned any number of times while it is open, when its layers are merged meanwhile', async () => {
  const fixture = new TestStore();
  const base = patterned(1, SIZE_BYTES);
  const disk: Known = { node: fixture.clone(fixture.image('base', base), 'disk'), content: Buffer.from(base) };
  fixture.acquire(disk.node);
  for (let round = 0; round < 1040; round += 1) {
    write(fixture, disk, (round % BLOCKS) * BLOCK_BYTES, patternBytes(10_000 + round, 0, BLOCK_BYTES));
    seal(fixture, disk.node);
    const pair = layerIds(fixture, disk.node).length > 6 ? cheapestPair(fixture.store.meta, fixture.layer(disk.node).id) : null;
    if (pair !== null) await merge(fixture, pair);
  }
  expect(layerIds(fixture, disk.node).length).toBeLessThan(10);
  expect(fixture.store.meta.nodes.child(ROOT_ID, 'disk')?.fault).toBeNull();
  fixture.expectContent(disk.node, disk.content);
}, 120_000);
