/** Clones: a cut of a disk that is being written to, nothing sealed twice, nothing sealed that changes, all or nothing. */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, describe, expect, it, vi } from 'vitest';

import { Errno, OffshootError } from '../../blockstore/errors.js';
import { IoBuffer } from '../../blockstore/hot/door.js';
import { ROOT_ID, type LayerRow, type NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { Kind, Stop } from '../support/blockstore-actor-orders.js';
import { ActorThread } from '../support/blockstore-actors.js';
import { TestStore, everyThird, kindOf, patterned } from '../support/blockstore-fixture.js';
import { compilePrograms } from '../support/compiled-program.js';
import { patternBytes } from '../support/model/pattern.js';

const PROGRAM = 'test/support/blockstore-actor.ts';
const programs = compilePrograms('blockstore-clone', [PROGRAM]);
const actors: ActorThread[] = [];
const SIZE_BYTES = 12 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);
const BLOCK = patternBytes(2, 0, BLOCK_BYTES);

afterAll(() => { programs.remove(); });

afterEach(async () => {
  vi.restoreAllMocks();
  for (const actor of actors.splice(0)) await actor.end();
});

function chainOf({ store }: TestStore, node: NodeRow): LayerRow[] {
  return store.meta.layers.chain(store.meta.nodes.byId(node.id)?.layerId ?? 0);
}

function layerFilesIn({ storeDir }: TestStore): string[] {
  return fs.readdirSync(path.join(storeDir, 'layers'), { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.layer'));
}

function hashOf(file: string): string {
  return createHash('sha256').update(fs.readFileSync(file)).digest('hex');
}

describe('a clone of a disk that is being written to', () => {
  it('is a cut: all of what was written before some moment, and nothing of what came after', async () => {
    const blocks = 48;
    const clonesMade = 25;
    const fixture = new TestStore({ threads: 2 });
    const source = fixture.clone(fixture.emptyImage('base', blocks * BLOCK_BYTES), 'source');
    const { handles } = fixture.acquire(source).shared;
    const actor = new ActorThread(programs.pathOf(PROGRAM), fixture.store.threadBoot(1), handles);
    actors.push(actor);
    actor.give({ kind: Kind.COUNT, offsetBytes: 0, lengthBytes: blocks * BLOCK_BYTES });
    actor.goOn();
    fixture.waitForRequests(3 * blocks);
    const clones: NodeRow[] = [];
    const hashes = new Map<string, string>();
    const seen: Float64Array[] = [];
    /** What each block of the clone says, checked to be one number all over. */
    const valuesOf = (clone: NodeRow): Float64Array => {
      const content = fixture.content(clone);
      const words = new Float64Array(content.buffer, content.byteOffset, content.length / 8);
      const values = new Float64Array(blocks);
      for (let block = 0; block < blocks; block += 1) {
        values[block] = words[block * 512]!;
        if (words.subarray(block * 512, (block + 1) * 512).some((word) => word !== values[block])) throw new Error(`block ${block} is torn`);
      }
      return values;
    };
    while (clones.length < clonesMade) {
      expect(actor.isStillAfter(2)).toBe(false);
      const clone = fixture.clone(source, `clone-${clones.length}`);
      const sealed = chainOf(fixture, clone)[1]!;
      if (sealed.kind === 'store') hashes.set(fixture.store.files.storePath(sealed.id), hashOf(fixture.store.files.storePath(sealed.id)));
      clones.push(clone);
      seen.push(valuesOf(clone));
    }
    actor.enough();
    expect(actor.waitUntilStill(10_000)).toBe(true);
    expect(actor.result).toBeGreaterThan(0);
    let last = 0;
    for (const [i, clone] of clones.entries()) {
      const values = seen[i]!;
      // A pass over the disk that was under way: its number up to somewhere, the one before it from there on.
      for (let block = 1; block < blocks; block += 1) expect(values[block - 1]! - values[block]!).toBeGreaterThanOrEqual(0);
      expect(values[0]! - values.at(-1)!).toBeLessThanOrEqual(1);
      expect(values[0]!).toBeGreaterThanOrEqual(last);
      last = values[0]!;
      expect(valuesOf(clone)).toEqual(values);
    }
    expect(last).toBeGreaterThan(2);
    for (const [file, hash] of hashes) expect(hashOf(file)).toBe(hash);
    await fixture.restart();
    for (const [i, clone] of clones.entries()) expect(valuesOf(clone)).toEqual(seen[i]);
  });

  it('waits for the write that is inside, and holds it', () => {
    const fixture = new TestStore({ threads: 2 });
    const source = fixture.clone(fixture.image('base', SOURCE), 'source');
    const actor = new ActorThread(programs.pathOf(PROGRAM), fixture.store.threadBoot(1), fixture.acquire(source).shared.handles);
    actors.push(actor);
    fixture.write(source, 5 * BLOCK_BYTES, BLOCK);
    actor.give({ kind: Kind.WRITE, offsetBytes: 0, lengthBytes: BLOCK_BYTES, byte: 9, stops: Stop.BEFORE_FIRST_TOUCH, pauseMs: 200 });
    actor.goOn();
    fixture.waitForRequests(1);
    const clone = fixture.clone(source, 'clone');
    const expected = Buffer.from(SOURCE).fill(9, 0, BLOCK_BYTES);
    BLOCK.copy(expected, 5 * BLOCK_BYTES);
    fixture.expectContent(clone, expected);
    expect(actor.waitUntilStill(2000)).toBe(true);
    fixture.expectContent(source, expected);
    fixture.kill();
    fixture.expectContent(clone, expected);
  });

  it('waits at most a moment for a request that is inside, and then says that the disk is busy', () => {
    const fixture = new TestStore();
    const source = fixture.clone(fixture.image('base', SOURCE), 'source');
    fixture.acquire(source);
    fixture.write(source, 0, BLOCK);
    const actor = fixture.actor(1);
    actor.shared.enter(fixture.disk(source).shared.serial);
    expect(kindOf(() => fixture.clone(source, 'refused'))).toBe('busy');
    // The gate is open again.
    fixture.write(source, BLOCK_BYTES, BLOCK);
    actor.shared.leave(true);
    fixture.clone(source, 'clone');
  });
});

describe('a disk', () => {
  it('that has written nothing since it was sealed is not sealed again', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    const first = fixture.clone(source, 'first');
    const chain = chainOf(fixture, source);
    const [active, sealed] = chain;
    expect(chain.map((layer) => layer.sealed)).toEqual([false, true]);
    for (const open of [false, true]) {
      if (open) fixture.acquire(source);
      for (let i = 0; i < 3; i += 1) {
        const clone = fixture.clone(source, `clone-${open ? 'open' : 'closed'}-${i}`);
        expect(chainOf(fixture, source)).toEqual(chain);
        expect(chainOf(fixture, clone)[1]).toEqual(sealed);
      }
    }
    fixture.write(source, 0, BLOCK);
    const changed = fixture.clone(source, 'changed');
    expect(chainOf(fixture, source).slice(1).map(({ id }) => id)).toEqual([active!.id, sealed!.id]);
    // A clone of a clone that wrote nothing stands on what that stands on.
    expect(chainOf(fixture, fixture.clone(first, 'of first')).length).toBe(2);
    expect(chainOf(fixture, fixture.clone(changed, 'of changed')).length).toBe(3);
  });

  it('reads through a long chain as through a short one, and at every link', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    fixture.acquire(source);
    const model = Buffer.from(SOURCE);
    const links: { readonly node: NodeRow; readonly content: Buffer }[] = [];
    for (let i = 0; i < 64; i += 1) {
      const data = patternBytes(i + 10, 0, 300);
      fixture.write(source, (i * 777) % (SIZE_BYTES - 300), data);
      data.copy(model, (i * 777) % (SIZE_BYTES - 300));
      links.push({ node: fixture.clone(source, `link-${i}`), content: Buffer.from(model) });
    }
    expect(chainOf(fixture, source).length).toBe(65);
    fixture.expectContent(source, model);
    fixture.kill();
    fixture.expectContent(source, model);
    for (const { node, content } of links) fixture.expectContent(node, content);
  });

  it('keeps what was sealed, whatever is done to it and to its clones afterwards', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    fixture.acquire(source);
    const clone = fixture.clone(source, 'clone', { copyOnRead: true });
    fixture.acquire(clone);
    const sealed = chainOf(fixture, clone)[1]!;
    const file = fixture.store.files.storePath(sealed.id);
    const before = hashOf(file);
    for (const node of [source, clone]) {
      fixture.write(node, 100, patternBytes(3, 0, 5 * BLOCK_BYTES));
      fixture.store.data.discard(node.id, 7 * BLOCK_BYTES, 2 * BLOCK_BYTES);
      fixture.read(node, 0, SIZE_BYTES);
      fixture.store.resize(node.id, 5 * BLOCK_BYTES);
      fixture.store.resize(node.id, 2 * SIZE_BYTES);
    }
    expect(hashOf(file)).toBe(before);
    expect(fs.statSync(file).size).toBe(SIZE_BYTES);
    // A write that comes too late fails loudly.
    const { shared } = fixture.disk(source);
    const origins = Array.from({ length: shared.originCount() }, (_, origin) => origin).filter((origin) => origin > 0 && origin !== shared.activeOrigin());
    const buffer = new IoBuffer(10);
    for (const origin of origins) expect(fixture.store.context.door.pwrite('late', shared.originFd(origin), buffer.address, 10, 0)).toBe(-Errno.EBADF);
    fixture.expectContent(fixture.clone(source, 'fresh'), fixture.content(source));
  });

  it('that nobody has open has its last writes synced before it is sealed', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    fixture.acquire(source);
    fixture.write(source, 0, BLOCK);
    fixture.store.disks.release(source.id);
    const events: string[] = [];
    const { id } = fixture.layer(source);
    const real = fs.fdatasyncSync;
    vi.spyOn(fs, 'fdatasyncSync').mockImplementation((fd) => { events.push(fs.readlinkSync(`/proc/self/fd/${fd}`)); real(fd); });
    const transaction = fixture.store.meta.transaction.bind(fixture.store.meta);
    vi.spyOn(fixture.store.meta, 'transaction').mockImplementation((body) => { events.push('transaction'); return transaction(body); });
    fixture.clone(source, 'clone');
    expect(events.slice(-2)).toEqual([fixture.store.files.storePath(id), 'transaction']);
  });

  it('that is open has its new active layer\'s file made, durable, before the metadata says so', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    fixture.acquire(source);
    fixture.write(source, 0, BLOCK);
    const events: string[] = [];
    const create = fixture.store.files.create.bind(fixture.store.files);
    vi.spyOn(fixture.store.files, 'create').mockImplementation((layerId, sizeBytes) => { create(layerId, sizeBytes); events.push('file'); });
    const transaction = fixture.store.meta.transaction.bind(fixture.store.meta);
    vi.spyOn(fixture.store.meta, 'transaction').mockImplementation((body) => {
      const result = transaction(body);
      events.push('committed');
      return result;
    });
    fixture.clone(source, 'clone');
    expect(events).toEqual(['file', 'committed']);
    expect(fixture.store.files.exists(fixture.layer(source).id)).toBe(true);
  });
});

describe('a clone that fails', () => {
  function expectNothing(fixture: TestStore, source: NodeRow, body: () => unknown, kind: string): void {
    const before = { layers: fixture.store.meta.layers.count(), files: layerFilesIn(fixture), chain: chainOf(fixture, source) };
    const names = fixture.store.meta.nodes.children(ROOT_ID, 0, 100).length;
    expect(kindOf(body)).toBe(kind);
    expect(fixture.store.meta.layers.count()).toBe(before.layers);
    expect(chainOf(fixture, source)).toEqual(before.chain);
    expect(fixture.store.meta.nodes.children(ROOT_ID, 0, 100).length).toBe(names);
    expect(layerFilesIn(fixture)).toEqual(before.files);
    fixture.acquire(source);
    fixture.write(source, 0, BLOCK);
    expect(fixture.read(source, 0, BLOCK_BYTES).equals(BLOCK)).toBe(true);
    fixture.store.disks.release(source.id);
  }

  it.each([true, false])('because one of its names is taken makes none of them (open: %s)', (open) => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    fixture.image('taken', SOURCE);
    if (open) {
      fixture.acquire(source);
      fixture.write(source, 0, BLOCK);
    }
    const targets = ['one', 'two', 'taken', 'three'].map((name) => ({ parentId: ROOT_ID, name }));
    expectNothing(fixture, source, () => fixture.store.clone(source.id, targets, { copyOnRead: false }), 'already-exists');
  });

  it('for want of room for the new layer\'s file leaves the disk as it was', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    fixture.acquire(source);
    fixture.write(source, 0, BLOCK);
    vi.spyOn(fixture.store.files, 'create').mockImplementationOnce(() => { throw new OffshootError('no-space', 'the store is full'); });
    expectNothing(fixture, source, () => fixture.clone(source, 'refused'), 'no-space');
    fixture.clone(source, 'clone');
  });

  it('has a reason for what cannot be cloned', () => {
    const fixture = new TestStore();
    expect(kindOf(() => fixture.store.clone(ROOT_ID, [{ parentId: ROOT_ID, name: 'x' }], { copyOnRead: false }))).toBe('is-a-directory');
    expect(kindOf(() => fixture.store.clone(999, [{ parentId: ROOT_ID, name: 'x' }], { copyOnRead: false }))).toBe('not-found');
  });
});

describe('what a clone is like', () => {
  it('takes over owner, mode and size, or is given them', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE, { kind: 'file' });
    fixture.store.meta.nodes.update(source.id, { mode: 0o640, uid: 12, gid: 34 });
    const [same, other] = fixture.store.clone(source.id, [{ parentId: ROOT_ID, name: 'same' }, { parentId: ROOT_ID, name: 'other' }], { copyOnRead: true });
    expect(same).toMatchObject({ kind: 'file', mode: 0o640, uid: 12, gid: 34, sizeBytes: SIZE_BYTES, copyOnRead: true, fault: null });
    expect(other!.layerId).not.toBe(same!.layerId);
    const [given] = fixture.store.clone(source.id, [{ parentId: ROOT_ID, name: 'given' }], { copyOnRead: false, mode: 0o600, uid: 1, gid: 2 });
    expect(given).toMatchObject({ mode: 0o600, uid: 1, gid: 2, copyOnRead: false });
  });

  it('keeps what it stands on when the source is removed, and gives it back when it goes itself', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    const clone = fixture.clone(source, 'clone');
    fixture.store.discardNode(source.id);
    fixture.expectContent(clone, SOURCE);
    expect(fixture.store.meta.layers.count()).toBe(2);
    fixture.store.discardNode(clone.id);
    expect(fixture.store.meta.layers.count()).toBe(0);
    expect(layerFilesIn(fixture)).toEqual([]);
  });

  it('lets its source go once it is complete', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    const clone = fixture.clone(source, 'clone');
    fixture.acquire(clone);
    expect(kindOf(() => { fixture.store.markComplete(clone.id); })).toBe('busy');
    fixture.write(clone, 0, SOURCE);
    fixture.store.markComplete(clone.id);
    fixture.store.discardNode(source.id);
    expect(fixture.store.meta.layers.count()).toBe(1);
    fixture.expectContent(clone, SOURCE);
    fixture.kill();
    fixture.expectContent(clone, SOURCE);
  });
});

describe('reclaim', () => {
  it('takes no file away before its transaction is durable', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    const before = layerFilesIn(fixture);
    expect(() => fixture.store.meta.transaction(() => {
      fixture.store.meta.nodes.remove(source.id);
      expect(fixture.store.reclaim()).toBe(1);
      throw new Error('undone');
    })).toThrow('undone');
    expect(layerFilesIn(fixture)).toEqual(before);
    fixture.expectContent(source, SOURCE);
  });

  it('gives back what nobody reads through any more when a disk has become complete', async () => {
    const fixture = new TestStore();
    const middle = fixture.clone(fixture.image('source', SOURCE), 'middle');
    fixture.acquire(middle);
    fixture.write(middle, 0, BLOCK);
    const clones = [fixture.clone(middle, 'clone'), fixture.clone(middle, 'other')];
    const sealed = chainOf(fixture, clones[0]!)[1]!;
    fixture.store.disks.release(middle.id);
    fixture.store.discardNode(middle.id);
    const content = patternBytes(5, 0, SIZE_BYTES);
    const isThere: boolean[] = [];
    for (const clone of clones) {
      isThere.push(fs.existsSync(fixture.store.files.storePath(sealed.id)));
      fixture.acquire(clone);
      fixture.write(clone, 0, content);
      await fixture.store.flush(clone.id);
      fixture.store.markComplete(clone.id);
      fixture.expectContent(clone, content);
    }
    expect(isThere).toEqual([true, true]);
    expect(fixture.store.meta.layers.byId(sealed.id)).toBeUndefined();
    expect(fs.existsSync(fixture.store.files.storePath(sealed.id))).toBe(false);
    expect(fixture.store.meta.layers.unreferenced()).toEqual([]);
  });

  it('happens at the next start when a server died before it', () => {
    const fixture = new TestStore();
    const source = fixture.image('source', SOURCE);
    const kept = fixture.image('kept', SOURCE);
    fixture.store.meta.nodes.remove(source.id);
    fixture.kill();
    expect(fixture.store.meta.layers.count()).toBe(1);
    expect(layerFilesIn(fixture).length).toBe(1);
    fixture.expectContent(kept, SOURCE);
  });
});
