/**
 * The group seal: many disks at one instant, and what is true when the server dies, the power goes or a sync fails at each of its steps.
 *
 * The seal is held up after the gates have opened and before its commit by a committer whose syncs wait: that is the only part of it in
 * which others run. What survives is looked at in a store that is opened anew, with the journals and the note (kill) or without them (power).
 */
import fs from 'node:fs';
import path from 'node:path';
import { describe, expect, it, vi } from 'vitest';

import type { ActiveLayer } from '../../blockstore/committer.js';
import { STATE_GATE_CLOSED } from '../../blockstore/hot/block-map.js';
import { SharedState, THREADS_MAX } from '../../blockstore/hot/shared-state.js';
import { OffshootError } from '../../blockstore/errors.js';
import { ROOT_ID, type NodeRow } from '../../blockstore/meta/rows.js';
import type { SealResult } from '../../blockstore/seal-group.js';
import { insertCopy } from '../../blockstore/trees.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, kindOf, kindOfRejection, patterned } from '../support/blockstore-fixture.js';

const SIZE = 64 * BLOCK_BYTES;

/** Copies of the nodes beside them, as of the instant. */
async function snapshot(fixture: TestStore, nodes: readonly NodeRow[], suffix = '-copy'): Promise<SealResult<NodeRow[]>> {
  const { store } = fixture;
  return await store.groupSeals.seal({
    list: () => nodes.map((node) => fixture.row(node)),
    commit: (sealed, timeUs) => sealed.map(({ node, foundation }) =>
      insertCopy(store.meta, node, foundation, { parentId: ROOT_ID, name: `${node.name}${suffix}` }, { frozen: true, copyOnRead: false, timeUs })),
  });
}

function named(fixture: TestStore, name: string): NodeRow | undefined {
  return fixture.store.meta.nodes.child(ROOT_ID, name);
}

function expectClean(fixture: TestStore): void {
  const steps = fixture.store.checkSteps({ database: true, isNodeInUse: () => false });
  for (let step = steps.next(); ; step = steps.next()) {
    if (step.done !== true) continue;
    expect(step.value.findings).toEqual([]);
    return;
  }
}

/** The disks of the next seal are switched, and its commit waits until the result is called. */
function holdUp(fixture: TestStore, failing: (layer: ActiveLayer) => boolean = () => false): { readonly reached: Promise<void>; readonly release: () => void } {
  const { committer } = fixture.store;
  const sync = committer.sync.bind(committer);
  let release = (): void => undefined;
  const released = new Promise<void>((resolve) => { release = resolve; });
  let reach = (): void => undefined;
  const reached = new Promise<void>((resolve) => { reach = resolve; });
  committer.sync = async (layer) => {
    if (committer.pendingSeals().length === 0) return await sync(layer);
    reach();
    await released;
    if (!failing(layer)) return await sync(layer);
    const failure = new OffshootError('io-error', 'the device is gone');
    committer.fault(layer, failure);
    return failure;
  };
  return { reached, release };
}

interface World {
  readonly fixture: TestStore;
  /** Complete and open; an open clone that was written to; a closed one that was; an open clean one. */
  readonly whole: NodeRow;
  readonly written: NodeRow;
  readonly closed: NodeRow;
  readonly clean: NodeRow;
  readonly content: Map<string, Buffer>;
}

function world(): World {
  const fixture = new TestStore();
  const base = patterned(1, SIZE, everyThird);
  const source = fixture.image('source', base);
  const whole = fixture.image('whole', patterned(2, SIZE));
  const [written, closed, clean] = ['written', 'closed', 'clean'].map((name) => fixture.clone(source, name)) as [NodeRow, NodeRow, NodeRow];
  const content = new Map<string, Buffer>([['whole', patterned(2, SIZE)], ...[written, closed, clean].map((node) => [node.name, Buffer.from(base)] as const)]);
  const made: World = { fixture, whole, written, closed, clean, content };
  for (const node of [whole, written, closed, clean]) fixture.acquire(node);
  change(made, whole, 3, 10);
  change(made, written, 5, 11);
  change(made, closed, 7, 12);
  fixture.store.disks.release(closed.id);
  fixture.store.disks.retireIdle(closed.id);
  return made;
}

function change({ fixture, content }: World, node: NodeRow, block: number, seed: number): void {
  const data = patterned(seed, 2 * BLOCK_BYTES);
  fixture.write(node, block * BLOCK_BYTES + 100, data);
  data.copy(content.get(node.name)!, block * BLOCK_BYTES + 100);
}

const all = (made: World): NodeRow[] => [made.whole, made.written, made.closed, made.clean];

function expectAll(made: World, content = made.content): void {
  for (const node of all(made)) made.fixture.expectContent(node, content.get(node.name)!);
}

function copyOf(content: Map<string, Buffer>): Map<string, Buffer> {
  return new Map([...content].map(([name, bytes]) => [name, Buffer.from(bytes)]));
}

describe('a group seal', () => {
  it('shows every disk, open or closed, as it was at one instant, whatever is written later', async () => {
    const made = world();
    const { fixture } = made;
    const before = copyOf(made.content);
    const result = await snapshot(fixture, all(made));
    expect(result.sealed).toBe(3);
    fixture.acquire(made.closed);
    for (const [i, node] of all(made).entries()) change(made, node, 4 + i, 20 + i);
    for (const copy of result.value) fixture.expectContent(copy, before.get(copy.name.replace('-copy', ''))!);
    expectAll(made);
    expectClean(fixture);
    // Nothing was written since to those that were copied clean: another seal adds no layer to them.
    const layers = fixture.store.meta.layers.chain(fixture.row(made.written).layerId!).length;
    await snapshot(fixture, [made.written], '-2');
    await snapshot(fixture, [made.written], '-3');
    expect(fixture.store.meta.layers.chain(fixture.row(made.written).layerId!).length).toBe(layers + 1);
    await fixture.restart();
    expectAll(made);
    expectClean(fixture);
  });

  it('loses nothing when the server is killed after the gates have opened, and before the commit', async () => {
    const made = world();
    const { fixture } = made;
    const held = holdUp(fixture);
    const sealing = snapshot(fixture, all(made));
    sealing.catch(() => undefined);
    await held.reached;
    change(made, made.whole, 20, 30);
    change(made, made.written, 5, 31);
    change(made, made.clean, 9, 32);
    fixture.kill();
    expectAll(made);
    expect(named(fixture, 'whole-copy')).toBeUndefined();
    expectClean(fixture);
    // What was committed then is not lost by the next death either.
    fixture.kill();
    expectAll(made);
    expectClean(fixture);
  });

  it('is as if it had never been asked for when the power goes before the commit', async () => {
    const made = world();
    const { fixture } = made;
    for (const node of [made.whole, made.written, made.clean]) await fixture.store.flush(node.id);
    const before = copyOf(made.content);
    const held = holdUp(fixture);
    snapshot(fixture, all(made)).catch(() => undefined);
    await held.reached;
    change(made, made.written, 30, 40);
    change(made, made.clean, 30, 41);
    for (const name of fs.readdirSync(fixture.runtimeDir)) fs.rmSync(path.join(fixture.runtimeDir, name));
    fixture.kill();
    expectAll(made, before);
    expect(named(fixture, 'whole-copy')).toBeUndefined();
    expectClean(fixture);
  });

  it('lets no flush of its disks return before its commit, and a flush then covers what was written since', async () => {
    const made = world();
    const { fixture } = made;
    const held = holdUp(fixture);
    const sealing = snapshot(fixture, all(made));
    await held.reached;
    change(made, made.written, 30, 50);
    let flushed = false;
    const flush = fixture.store.flush(made.written.id).then(() => { flushed = true; });
    await new Promise((resolve) => { setTimeout(resolve, 50); });
    expect(flushed).toBe(false);
    held.release();
    await flush;
    await sealing;
    for (const name of fs.readdirSync(fixture.runtimeDir)) fs.rmSync(path.join(fixture.runtimeDir, name));
    fixture.kill();
    fixture.expectContent(made.written, made.content.get('written')!);
  });

  it.each([
    ['resize', (made: World): void => { made.fixture.store.resize(made.written.id, SIZE + BLOCK_BYTES); }],
    ['clone', (made: World): void => { made.fixture.clone(made.written, 'another'); }],
    ['opening a closed one', (made: World): void => { made.fixture.acquire(made.closed); }],
    ['removal', (made: World): void => {
      made.fixture.store.disks.release(made.written.id);
      made.fixture.store.meta.nodes.orphan(made.written.id);
      made.fixture.store.discardNode(made.written.id);
    }],
  ])('is finished at once by who cannot wait for it: %s', async (_what, body) => {
    const made = world();
    const { fixture } = made;
    const before = copyOf(made.content);
    const held = holdUp(fixture);
    const sealing = snapshot(fixture, all(made));
    await held.reached;
    body(made);
    expect(fixture.store.committer.pendingSeals()).toEqual([]);
    expect(fs.readdirSync(fixture.runtimeDir).filter((name) => name.includes('seal'))).toEqual([]);
    held.release();
    const { value } = await sealing;
    for (const copy of value) fixture.expectContent(copy, before.get(copy.name.replace('-copy', ''))!);
    expectClean(fixture);
  });

  it('faults the disk whose sync fails, seals the others, and does not happen', async () => {
    const made = world();
    const { fixture } = made;
    const held = holdUp(fixture, (layer) => layer.nodeId === made.written.id);
    const sealing = kindOfRejection(snapshot(fixture, all(made)));
    await held.reached;
    held.release();
    expect(await sealing).toBe('faulted');
    expect(fixture.faults.map((fault) => fault.nodeId)).toEqual([made.written.id]);
    expect(named(fixture, 'whole-copy')).toBeUndefined();
    expectAll(made);
    expect(fixture.layer(made.whole).backingId).not.toBeNull();
    expect(await kindOfRejection(fixture.store.flush(made.written.id))).toBe('faulted');
    expect(kindOf(() => { change(made, made.whole, 2, 60); })).toBeUndefined();
    fixture.kill();
    fixture.expectContent(made.whole, made.content.get('whole')!);
    expectClean(fixture);
  });

  it('waits for a request that does not end, with its gates open in between, and gives up after two seconds', async () => {
    const made = world();
    const { fixture } = made;
    const { shared } = fixture.store.context;
    const disk = fixture.disk(made.written);
    // A thread of its own, which nobody else is.
    const other = new SharedState(shared.handles, THREADS_MAX - 1);
    other.enter(disk.shared.serial);
    const [before, layers] = [copyOf(made.content), fixture.store.meta.layers.count()];
    const [closing, opening] = [vi.spyOn(disk.shared, 'setState'), vi.spyOn(disk.shared, 'clearState')];
    const taken = snapshot(fixture, all(made)).then(() => 'taken', (error: unknown) => error);
    const refused = await taken;
    expect(refused).toBeInstanceOf(OffshootError);
    expect(refused).toMatchObject({ kind: 'busy', message: expect.stringContaining('written') as string });
    // Again and again, and not once for all of the time.
    expect(closing.mock.calls.length).toBeGreaterThan(2);
    expect(opening.mock.calls.length).toBe(closing.mock.calls.length);
    expect(disk.shared.state() & STATE_GATE_CLOSED).toBe(0);
    expect(fixture.store.meta.layers.count()).toBe(layers);
    other.leave(true);
    change(made, made.written, 9, 31);
    // One that ends in time is only waited for.
    other.enter(disk.shared.serial);
    const second = snapshot(fixture, all(made), '-second');
    setTimeout(() => { other.leave(true); }, 300);
    expect((await second).value).toHaveLength(all(made).length);
    expectAll(made);
    for (const node of [made.whole, made.closed, made.clean]) fixture.expectContent(named(fixture, `${node.name}-second`)!, before.get(node.name)!);
    expectClean(fixture);
  });

  it('goes on when what it is for cannot be had any more', async () => {
    const made = world();
    const { fixture } = made;
    await snapshot(fixture, all(made));
    change(made, made.written, 33, 70);
    expect(await kindOfRejection(snapshot(fixture, all(made)))).toBe('already-exists');
    expectAll(made);
    change(made, made.written, 34, 71);
    fixture.kill();
    expectAll(made);
    expectClean(fixture);
  });
});
