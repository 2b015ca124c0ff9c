/**
 * What guests, copy-on-read and fills may do to the same blocks at the same time. All orders of the steps of two and three
 * actors, each a real thread that stops where the test says; what holds while a claim is held; and threads let loose.
 *
 * What counts as a step: up to and including each look at a source, and the rest, which happens under the claim.
 */
import { afterAll, afterEach, describe, expect, it } from 'vitest';

import { CLAIM_BLOCKS } from '../../blockstore/hot/shared-state.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { Kind, Stop } from '../support/blockstore-actor-orders.js';
import { ActorThread, type ActorOrder } from '../support/blockstore-actors.js';
import { REGION_BYTES, THREAD_DEEDS as DEEDS, applyDeed as apply, deedOf, schedules, type Deed } from '../support/blockstore-deeds.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { compilePrograms } from '../support/compiled-program.js';
import { firstDifference } from '../support/model/pattern.js';

const PROGRAM = 'test/support/blockstore-actor.ts';
const programs = compilePrograms('blockstore-interleavings', [PROGRAM]);
const actors: ActorThread[] = [];

afterAll(() => { programs.remove(); });

afterEach(async () => {
  for (const actor of actors.splice(0)) await actor.end();
});

const REGIONS = 2048;
/** A pair of data, a pair of holes. */
const GROUP_BYTES = 2 * REGION_BYTES;
const SOURCE = patterned(1, REGIONS * GROUP_BYTES, (block) => isHoleRegion(block * BLOCK_BYTES));

function isHoleRegion(offsetBytes: number): boolean {
  return offsetBytes % GROUP_BYTES >= REGION_BYTES;
}

/** All lists of `count` deeds, regardless of order: the schedules bring in the orders. */
function choices(count: number): readonly Deed[][] {
  if (count === 0) return [[]];
  return choices(count - 1).flatMap((rest) => {
    const from = rest.length === 0 ? 0 : DEEDS.indexOf(rest.at(-1)!);
    return DEEDS.slice(from).map((deed) => [...rest, deed]);
  });
}

interface Stage {
  readonly fixture: TestStore;
  readonly clone: NodeRow;
  readonly actors: readonly ActorThread[];
}

function openStage(count: number, options: { readonly source?: Buffer; readonly copyOnRead?: boolean } = {}): Stage {
  const fixture = new TestStore({ threads: count + 1 });
  const clone = fixture.clone(fixture.image('base', options.source ?? SOURCE), 'clone', { copyOnRead: options.copyOnRead ?? true });
  const { handles } = fixture.acquire(clone).shared;
  const meeting = new SharedArrayBuffer(8);
  const threads = Array.from({ length: count }, (_, i) => new ActorThread(programs.pathOf(PROGRAM), fixture.store.threadBoot(i + 1), handles, meeting));
  actors.push(...threads);
  return { fixture, clone, actors: threads };
}

/** Lets the actors go through one schedule; throws when a byte is not what the order of their last steps makes it. */
function play(stage: Stage, base: number, deeds: readonly Deed[], schedule: readonly number[]): void {
  const model = Buffer.from(SOURCE.subarray(base, base + REGION_BYTES));
  const orders = deeds.map((deed, slot): ActorOrder => {
    const { kind, offsetBytes, lengthBytes } = deedOf(deed, slot);
    // A fill that meets a hole asks where it ends, and reads nothing.
    const stops = kind === Kind.FILL && isHoleRegion(base) ? Stop.AFTER_ORIGIN_SEEK : Stop.AFTER_ORIGIN_READ;
    return { kind, offsetBytes: base + offsetBytes, lengthBytes, byte: 0x11 * (slot + 1), stops };
  });
  orders.forEach((order, slot) => { stage.actors[slot]!.give(order); });
  const isDone = deeds.map(() => false);
  /** What each block held at each time since a reader began. */
  const states = deeds.map(() => [Buffer.from(model)]);
  const step = (slot: number): void => {
    if (isDone[slot]!) return;
    isDone[slot] = stage.actors[slot]!.step();
    if (!isDone[slot]) return;
    apply(model, orders[slot]!, base);
    for (const seen of states) seen.push(Buffer.from(model));
  };
  for (const slot of schedule) step(slot);
  for (const slot of deeds.keys()) while (!isDone[slot]!) step(slot);

  const what = (): string => `${deeds.map(({ name }) => name).join(', ')} in the order ${schedule.join(' ')}`;
  for (const [slot, { kind }] of deeds.entries()) {
    const { result } = stage.actors[slot]!;
    if (result < 0) throw new Error(`errno ${-result}: ${what()}`);
    if (kind !== Kind.READ) continue;
    const answer = stage.actors[slot]!.answer(REGION_BYTES);
    for (let from = 0; from < REGION_BYTES; from += BLOCK_BYTES) {
      const block = answer.subarray(from, from + BLOCK_BYTES);
      if (!states[slot]!.some((state) => state.subarray(from, from + BLOCK_BYTES).equals(block))) throw new Error(`read what never was: ${what()}`);
    }
  }
  const difference = firstDifference(model, stage.fixture.read(stage.clone, base, REGION_BYTES), 0);
  if (difference !== null) throw new Error(`${difference}: ${what()}`);
}

describe('all orders of steps', () => {
  it.each([2, 3])('of %i actors on the same blocks', async (count) => {
    let stage = openStage(count);
    let next = 2 * REGIONS;
    let played = 0;
    for (const deeds of choices(count)) {
      if (deeds.filter(({ steps }) => steps === 3).length > 1 && count > 2) continue;
      for (const schedule of schedules(deeds.map(({ steps }) => steps))) {
        if (next < 2) {
          for (const actor of actors.splice(0)) await actor.end();
          stage = openStage(count);
          next = 2 * REGIONS;
        }
        // From the end: a fill that finds its blocks owned goes on behind them, where all is done. Three actors meet on holes
        // every other time only.
        if (count === 2 || played % 2 === 0) play(stage, (next - 1) * REGION_BYTES, deeds, schedule);
        play(stage, (next - 2) * REGION_BYTES, deeds, schedule);
        next -= 2;
        played += 1;
      }
    }
    expect(played).toBeGreaterThan(count === 2 ? 100 : 3000);
  });
});

describe('a claim', () => {
  const write = (byte: number, offsetBytes: number, lengthBytes: number): ActorOrder => ({ kind: Kind.WRITE, offsetBytes, lengthBytes, byte });
  const whole: ActorOrder = { kind: Kind.READ, offsetBytes: 0, lengthBytes: BLOCK_BYTES };
  const fill: ActorOrder = { kind: Kind.FILL, offsetBytes: 0, lengthBytes: 0 };
  const discard: ActorOrder = { kind: Kind.DISCARD, offsetBytes: 0, lengthBytes: BLOCK_BYTES };
  const holders: readonly (readonly [string, ActorOrder, number])[] = [
    ['a write in part, before its data', write(1, 100, 200), Stop.BEFORE_FIRST_TOUCH],
    ['a write in part, after its data', write(1, 100, 200), Stop.AFTER_FIRST_TOUCH],
    ['a write of the block, before its data', write(1, 0, BLOCK_BYTES), Stop.BEFORE_FIRST_TOUCH],
    ['a discard', discard, Stop.BEFORE_PUNCH],
    ['a fill', fill, Stop.BEFORE_KEEP],
    ['copy-on-read', whole, Stop.BEFORE_KEEP],
  ];
  const others: readonly (readonly [string, ActorOrder])[] = [
    ['a write in part', write(2, 250, 300)], ['a write of the block', write(2, 0, BLOCK_BYTES)], ['a discard', discard], ['a fill', fill], ['copy-on-read', whole],
  ];
  const source = patterned(2, (others.length + 1) * CLAIM_BLOCKS * BLOCK_BYTES);

  it.each(holders)('held by %s makes everybody else wait, and both have their way', (_name, order, stop) => {
    const stage = openStage(2, { source });
    const [first, second] = stage.actors as [ActorThread, ActorThread];
    const model = Buffer.from(source);
    for (const [i, [name, other]] of others.entries()) {
      // From the end, because a fill goes on behind what it was asked for.
      const base = (others.length - i) * CLAIM_BLOCKS * BLOCK_BYTES;
      const moved = (given: ActorOrder): ActorOrder => ({ ...given, offsetBytes: base + given.offsetBytes });
      first.give({ ...moved(order), stops: stop });
      expect(first.step()).toBe(false);
      second.give(moved(other));
      second.goOn();
      expect(second.isStillAfter(20), `${name} did not wait`).toBe(false);
      expect(first.step()).toBe(true);
      apply(model, moved(order), 0);
      expect(second.waitUntilStill(10_000)).toBe(true);
      apply(model, moved(other), 0);
      expect(Math.min(first.result, second.result)).toBeGreaterThanOrEqual(0);
      const unit = model.subarray(base, base + CLAIM_BLOCKS * BLOCK_BYTES);
      expect(firstDifference(unit, stage.fixture.read(stage.clone, base, unit.length), base), name).toBeNull();
    }
  });

  it('does not hold up readers, nor writers of what is owned', () => {
    const stage = openStage(2, { source, copyOnRead: false });
    const [first, second] = stage.actors as [ActorThread, ActorThread];
    second.do(write(3, BLOCK_BYTES, BLOCK_BYTES));
    first.give({ ...write(1, 100, 200), stops: Stop.AFTER_FIRST_TOUCH });
    expect(first.step()).toBe(false);
    expect(second.do(whole)).toBe(BLOCK_BYTES);
    expect(second.answer(BLOCK_BYTES).equals(source.subarray(0, BLOCK_BYTES))).toBe(true);
    expect(second.do(write(4, BLOCK_BYTES + 5, 100))).toBe(100);
    expect(first.step()).toBe(true);
  });
});

describe('threads let loose', () => {
  it.each([['', 2], [' during a fill', 3]])('write their parts of the same blocks%s, and none is lost', (_name, count) => {
    const blocks = 6000;
    const source = patterned(4, blocks * BLOCK_BYTES, (block) => block % 16 >= 12);
    const { fixture, clone, actors: threads } = openStage(count, { source, copyOnRead: false });
    threads[0]!.give({ kind: Kind.PARTS, offsetBytes: 0, lengthBytes: 512, byte: 1 });
    threads[1]!.give({ kind: Kind.PARTS, offsetBytes: 512, lengthBytes: 1000, byte: 2 });
    threads[2]?.give({ kind: Kind.FILL_ALL, offsetBytes: 0, lengthBytes: 0 });
    for (const actor of threads) actor.goOn();
    for (const actor of threads) expect(actor.waitUntilStill(20_000)).toBe(true);
    for (const actor of threads) expect(actor.result).toBeGreaterThanOrEqual(0);
    const expected = Buffer.from(source);
    for (let at = 0; at < expected.length; at += BLOCK_BYTES) expected.fill(1, at, at + 512).fill(2, at + 512, at + 1512);
    expect(firstDifference(expected, fixture.content(clone), 0)).toBeNull();
    expect(fixture.ownedBlocks(clone).length).toBe(blocks);
  });
});
