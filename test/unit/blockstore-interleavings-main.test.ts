/**
 * Snapshots, resizes and commits among writes, copy-on-read, fills and discards of the same blocks: every order of the steps of
 * two; of three every choice, in as many orders as a bound allows, drawn by the seed. Afterwards each disk holds what the order
 * makes of it, each snapshot what it held when the gate was passed, no commit has more in it than what was owned when it froze,
 * and the next server, after a kill, finds the same.
 *
 * The seed is printed; OFFSHOOT_SEED runs it again. The counts are printed as well.
 */
import { afterAll, afterEach, describe, expect, it } from 'vitest';

import type { NodeRow } from '../../blockstore/meta/rows.js';
import { ActorThread } from '../support/blockstore-actors.js';
import { THREAD_DEEDS, schedules } from '../support/blockstore-deeds.js';
import { TestStore, patterned } from '../support/blockstore-fixture.js';
import { MAIN_DEEDS, Play, STAGE_DISK_BYTES, isMain, type AnyDeed, type Kept } from '../support/blockstore-stage.js';
import { compilePrograms } from '../support/compiled-program.js';
import { createRandom, seedFromEnvironment } from '../support/model/random.js';

const PROGRAM = 'test/support/blockstore-actor.ts';
const programs = compilePrograms('blockstore-interleavings-main', [PROGRAM]);
const actors: ActorThread[] = [];
const SEED = seedFromEnvironment();
const DEEDS: readonly AnyDeed[] = [...THREAD_DEEDS, ...MAIN_DEEDS];
/** Plays on one store, before it is killed and everything compared again. */
const PLAYS_A_STAGE = 200;
/** Orders of each three that are played. */
const ORDERS_OF_THREE = 5;
const TIMEOUT_MS = 240_000;

afterAll(() => { programs.remove(); });

afterEach(async () => {
  for (const actor of actors.splice(0)) await actor.end();
});

/** All lists of `count` deeds with something of the main thread in them, regardless of order. Without it: see blockstore-interleavings.test.ts. */
function choices(count: number): readonly AnyDeed[][] {
  const lists = (left: number, from: number): AnyDeed[][] =>
    (left === 0 ? [[]] : DEEDS.slice(from).flatMap((deed, i) => lists(left - 1, from + i).map((rest) => [deed, ...rest])));
  return lists(count, 0).filter((deeds) => deeds.some(isMain));
}

class Stage {
  readonly #fixture = new TestStore({ threads: 4 });
  readonly #threads: readonly ActorThread[];
  readonly #bases: readonly { readonly node: NodeRow; readonly content: Buffer }[];
  readonly #kept: Kept[] = [];
  #plays = 0;

  constructor() {
    const content = patterned(1, STAGE_DISK_BYTES);
    this.#bases = [content, Buffer.alloc(STAGE_DISK_BYTES)].map((each, i) => ({ node: this.#fixture.image(`base-${i}`, each), content: each }));
    const first = this.#fixture.clone(this.#bases[0]!.node, 'first');
    const { handles } = this.#fixture.acquire(first).shared;
    this.#threads = [1, 2, 3].map((thread) => new ActorThread(programs.pathOf(PROGRAM), this.#fixture.store.threadBoot(thread), handles));
    actors.push(...this.#threads);
  }

  get isUsedUp(): boolean {
    return this.#plays >= PLAYS_A_STAGE;
  }

  async play(deeds: readonly AnyDeed[], schedule: readonly number[], onHoles: boolean): Promise<void> {
    this.#plays += 1;
    const { node: base, content } = this.#bases[onHoles ? 1 : 0]!;
    const disk = this.#fixture.clone(base, `disk-${this.#plays}`, { copyOnRead: true });
    const play = new Play(this.#fixture, disk, content, onHoles, this.#threads, deeds, schedule);
    // Over data every disk has something pending to begin with, over holes none.
    if (!onHoles) play.prime();
    await play.run();
    this.#kept.push(...play.kept);
  }

  /** As by kill -9; then every disk and every snapshot once more. */
  async end(): Promise<void> {
    for (const actor of actors.splice(0)) await actor.end();
    this.#fixture.kill();
    for (const { node, content, what } of this.#kept) {
      try {
        this.#fixture.expectContent(node, content);
      } catch (thrown) {
        throw new Error(`after a kill: ${what}`, { cause: thrown });
      }
    }
  }
}

async function playAll(plays: Iterable<readonly [readonly AnyDeed[], readonly number[], boolean]>): Promise<number> {
  let stage = new Stage();
  let played = 0;
  for (const [deeds, schedule, onHoles] of plays) {
    if (stage.isUsedUp) {
      await stage.end();
      stage = new Stage();
    }
    await stage.play(deeds, schedule, onHoles);
    played += 1;
  }
  await stage.end();
  return played;
}

describe('with what the main thread does', () => {
  it('all orders of the steps of two', { timeout: TIMEOUT_MS }, async () => {
    function* plays(): Generator<readonly [readonly AnyDeed[], readonly number[], boolean]> {
      for (const deeds of choices(2)) {
        for (const schedule of schedules(deeds.map(({ steps }) => steps))) for (const onHoles of [false, true]) yield [deeds, schedule, onHoles];
      }
    }
    const played = await playAll(plays());
    process.stdout.write(`interleavings of two with the main thread: ${played}, all there are\n`);
    expect(played).toBeGreaterThan(1500);
  });

  it(`every choice of three, in orders drawn by the seed (${SEED})`, { timeout: TIMEOUT_MS }, async () => {
    const random = createRandom(SEED);
    function* plays(): Generator<readonly [readonly AnyDeed[], readonly number[], boolean]> {
      for (const deeds of choices(3)) {
        for (let order = 0; order < ORDERS_OF_THREE; order += 1) {
          const steps = deeds.flatMap((deed, slot) => Array.from({ length: deed.steps }, () => slot));
          const schedule: number[] = [];
          while (steps.length > 0) schedule.push(...steps.splice(random.below(steps.length), 1));
          yield [deeds, schedule, random.chance(0.4)];
        }
      }
    }
    const played = await playAll(plays());
    process.stdout.write(`interleavings of three with the main thread: ${played}, ${ORDERS_OF_THREE} orders of each choice\n`);
    expect(played).toBe(choices(3).length * ORDERS_OF_THREE);
  });
});
