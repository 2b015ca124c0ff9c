/**
 * A disk, threads that act on it one step at a time, and the main thread's own operations (snapshot, resize, commit), stopped at
 * each of their steps: so that a test plays any order of all of them, and compares with what that order makes of the content.
 *
 * The main thread does one thing at a time. Its operations behind the gate are stopped by wrapping what they call: after the
 * gate was closed and before anybody has left, after the commit of what was pending, in the transaction, after the map has
 * moved on. At such a stop the threads take steps: who is inside goes on and leaves, who comes waits at the gate. A commit has two
 * steps, freeze and write; between them everything may happen.
 */
import { Errno } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { Kind, Stop } from './blockstore-actor-orders.js';
import type { ActorOrder, ActorThread } from './blockstore-actors.js';
import { REGION_BYTES, applyDeed, deedOf, type Deed } from './blockstore-deeds.js';
import type { TestStore } from './blockstore-fixture.js';
import { firstDifference } from './model/pattern.js';

export type MainDeedKind = 'snapshot' | 'grow' | 'shrink' | 'commit' | 'flush';

export interface MainDeed {
  readonly name: string;
  readonly main: MainDeedKind;
  readonly steps: number;
}

export type AnyDeed = Deed | MainDeed;

export const MAIN_DEEDS: readonly MainDeed[] = [
  { name: 'snapshot', main: 'snapshot', steps: 5 },
  { name: 'growth', main: 'grow', steps: 4 },
  { name: 'shrinking', main: 'shrink', steps: 4 },
  { name: 'commit', main: 'commit', steps: 2 },
  { name: 'flush', main: 'flush', steps: 2 },
];

export const SHRUNK_BYTES = BLOCK_BYTES + 1024;
export const GROWN_BYTES = 5 * BLOCK_BYTES;
/** The region, and a block behind it that nobody but `prime` touches. */
export const STAGE_DISK_BYTES = REGION_BYTES + BLOCK_BYTES;

/** A disk that was played on, and what it must hold for ever. */
export interface Kept {
  readonly node: NodeRow;
  readonly content: Buffer;
  readonly what: string;
}

type ThreadState = 'before' | 'inside' | 'at the gate' | 'done';

interface Commit {
  readonly promise: Promise<void>;
  readonly layerId: number;
  /** What its active layer owned when it froze. */
  readonly owned: readonly number[];
  /** Operations that have passed the gate since count their own commits. */
  readonly gatesBefore: number;
}

export function isMain(deed: AnyDeed): deed is MainDeed {
  return 'main' in deed;
}

export class Play {
  readonly kept: Kept[] = [];
  readonly #fixture: TestStore;
  readonly #node: NodeRow;
  readonly #threads: readonly ActorThread[];
  readonly #deeds: readonly AnyDeed[];
  readonly #orders: readonly (ActorOrder | null)[];
  readonly #schedule: number[];
  readonly #what: string;
  readonly #states: ThreadState[];
  readonly #commits = new Map<number, Commit>();
  readonly #doneMain = new Set<number>();
  /** What the region held at each time, for those who read. */
  readonly #seen: Buffer[];
  #model: Buffer;
  #gateIsClosed = false;
  #gates = 0;

  /** `isHole`: the base below the node has no data. `threads`: one for each deed of a thread, in their order. */
  constructor(fixture: TestStore, node: NodeRow, content: Buffer, isHole: boolean, threads: readonly ActorThread[], deeds: readonly AnyDeed[], schedule: readonly number[]) {
    this.#fixture = fixture;
    this.#node = node;
    this.#model = Buffer.from(content);
    this.#seen = [Buffer.from(content)];
    this.#deeds = deeds;
    this.#schedule = [...schedule];
    this.#what = `${deeds.map(({ name }) => name).join(', ')} in the order ${schedule.join(' ')}${isHole ? ', on holes' : ''}`;
    this.#states = deeds.map(() => 'before');
    const free = [...threads];
    this.#threads = deeds.map((deed) => (isMain(deed) ? threads[0]! : free.shift()!));
    this.#orders = deeds.map((deed, slot): ActorOrder | null => {
      if (isMain(deed)) return null;
      const { kind, offsetBytes, lengthBytes } = deedOf(deed, slot);
      // A fill that meets a hole asks where it ends, and reads nothing.
      return { kind, offsetBytes, lengthBytes, byte: 0x11 * (slot + 1), stops: kind === Kind.FILL && isHole ? Stop.AFTER_ORIGIN_SEEK : Stop.AFTER_ORIGIN_READ };
    });
  }

  /** Something is written and not committed before all begins: a commit has what to do, a snapshot what to seal. */
  prime(): void {
    const block = Buffer.alloc(BLOCK_BYTES, 0x99);
    this.#fixture.acquire(this.#node);
    this.#fixture.write(this.#node, REGION_BYTES, block);
    this.#fixture.store.disks.release(this.#node.id);
    const primed = Buffer.from(this.#model);
    block.copy(primed, REGION_BYTES);
    this.#setModel(primed);
  }

  async run(): Promise<void> {
    const { handles } = this.#fixture.acquire(this.#node).shared;
    for (const [slot, order] of this.#orders.entries()) {
      if (order === null) continue;
      this.#threads[slot]!.use(handles);
      this.#threads[slot]!.give(order);
    }
    for (let slot = this.#schedule.shift(); slot !== undefined; slot = this.#schedule.shift()) await this.#step(slot);
    for (const [slot, deed] of this.#deeds.entries()) {
      // What an operation had to put off, and what was never brought to its end.
      if (isMain(deed)) while (!this.#doneMain.has(slot)) await this.#step(slot);
      else while (this.#states[slot] !== 'done') this.#stepThread(slot);
    }
    this.#expectContent(this.#node, this.#model, 'the disk');
    for (const { node, content, what } of this.kept) this.#expectContent(node, content, what);
    this.#fixture.store.disks.release(this.#node.id);
    this.kept.push({ node: this.#node, content: this.#model, what: `the disk after ${this.#what}` });
  }

  async #step(slot: number): Promise<void> {
    const deed = this.#deeds[slot]!;
    if (!isMain(deed)) {
      this.#stepThread(slot);
      return;
    }
    if (this.#doneMain.has(slot)) return;
    if (deed.main === 'commit' || deed.main === 'flush') {
      const begun = this.#commits.get(slot);
      if (begun === undefined) this.#beginCommit(slot, deed.main);
      else await this.#endCommit(slot, begun);
      return;
    }
    this.#operate(slot, deed.main);
    this.#doneMain.add(slot);
  }

  #beginCommit(slot: number, kind: 'commit' | 'flush'): void {
    const { store } = this.#fixture;
    const disk = this.#fixture.disk(this.#node);
    // What happens until the first await, the freeze among it, happens now.
    const promise = kind === 'commit' ? store.committer.commitAll() : store.flush(this.#node.id);
    // With what is committed already: behind the end of a disk that was shrunk, that may be more than the map is asked for.
    const owned = [...this.#fixture.ownedBlocks(this.#node), ...this.#fixture.committedBlocks(disk.layerId)];
    this.#commits.set(slot, { promise, layerId: disk.layerId, owned, gatesBefore: this.#gates });
  }

  async #endCommit(slot: number, { promise, layerId, owned, gatesBefore }: Commit): Promise<void> {
    await promise;
    this.#doneMain.add(slot);
    const othersRan = this.#gates !== gatesBefore || [...this.#commits.keys()].length > 1;
    const committed = this.#fixture.committedBlocks(layerId);
    const missing = this.#gates === gatesBefore ? owned.filter((block) => !committed.includes(block)) : [];
    if (missing.length > 0) throw new Error(`blocks ${missing.join()} are not committed: ${this.#what}`);
    const early = othersRan ? [] : committed.filter((block) => !owned.includes(block));
    if (early.length > 0) throw new Error(`blocks ${early.join()} were committed although nobody had synced them: ${this.#what}`);
  }

  /** One operation behind the gate; the schedule goes on at its stops. */
  #operate(slot: number, kind: 'snapshot' | 'grow' | 'shrink'): void {
    const { store } = this.#fixture;
    this.#gates += 1;
    const undo = this.#wrapSteps(slot);
    try {
      if (kind === 'snapshot') {
        const [clone] = store.clone(this.#node.id, [{ parentId: 1, name: `${this.#node.name}-snapshot-${slot}` }], { copyOnRead: false });
        this.kept.push({ node: clone!, content: Buffer.from(this.#model), what: `the snapshot of ${this.#what}` });
      } else {
        const sizeBytes = kind === 'grow' ? GROWN_BYTES : SHRUNK_BYTES;
        store.resize(this.#node.id, sizeBytes);
        this.#setModel(Buffer.concat([this.#model.subarray(0, sizeBytes)], sizeBytes));
      }
    } finally {
      undo();
      this.#gateIsClosed = false;
    }
    // Whoever waited at the gate goes on by itself, to its next stop.
    for (const [other, state] of this.#states.entries()) {
      if (state === 'at the gate') this.#afterStep(other, this.#threads[other]!.waitUntilStill(20_000));
    }
  }

  /** Puts a stop behind each step of an operation; returns what takes them away. */
  #wrapSteps(slot: number): () => void {
    const { store } = this.#fixture;
    const { shared } = store.context;
    const wait = shared.waitUntilNobodyIn.bind(shared);
    const commit = store.committer.commitLayerNow.bind(store.committer);
    const transaction = store.meta.transaction.bind(store.meta);
    const replace = store.disks.replaceActive.bind(store.disks);
    shared.waitUntilNobodyIn = (serial, timeoutMs) => {
      this.#gateIsClosed = true;
      this.#stop(slot);
      // The operation waits for who is inside.
      for (const [other, state] of this.#states.entries()) while (state === 'inside' && this.#states[other] === 'inside') this.#stepThread(other);
      return wait(serial, timeoutMs);
    };
    store.committer.commitLayerNow = (layer) => {
      commit(layer);
      this.#stop(slot);
    };
    store.meta.transaction = <T>(body: () => T): T => transaction(() => {
      const result = body();
      this.#stop(slot);
      return result;
    });
    store.disks.replaceActive = (...parts) => {
      const next = replace(...parts);
      this.#stop(slot);
      return next;
    };
    return () => {
      shared.waitUntilNobodyIn = wait;
      store.committer.commitLayerNow = commit;
      store.meta.transaction = transaction;
      store.disks.replaceActive = replace;
    };
  }

  /** The threads take the steps that the schedule has for them before the operation's next one. The main thread's other deeds have to wait. */
  #stop(slot: number): void {
    const putOff: number[] = [];
    while (this.#schedule.length > 0) {
      const next = this.#schedule.shift()!;
      if (next === slot) break;
      if (isMain(this.#deeds[next]!)) putOff.push(next);
      else this.#stepThread(next);
    }
    this.#schedule.unshift(...putOff);
  }

  #stepThread(slot: number): void {
    const thread = this.#threads[slot]!;
    const state = this.#states[slot]!;
    if (state === 'done' || state === 'at the gate') return;
    if (state === 'before' && this.#gateIsClosed) {
      // One at a time, so that their order afterwards is known.
      if (this.#states.includes('at the gate')) return;
      const { shared } = this.#fixture.store.context;
      const requests = shared.requestsOfOthers();
      thread.goOn();
      this.#fixture.waitForRequests(requests + 1);
      this.#states[slot] = 'at the gate';
      return;
    }
    this.#afterStep(slot, thread.step());
  }

  #afterStep(slot: number, isDone: boolean): void {
    this.#states[slot] = isDone ? 'done' : 'inside';
    if (!isDone) return;
    const order = this.#orders[slot]!;
    const { result } = this.#threads[slot]!;
    const end = order.offsetBytes + order.lengthBytes;
    if (order.kind === Kind.WRITE && end > this.#model.length) {
      if (result !== -Errno.EFBIG) throw new Error(`a write past the end gave ${result}: ${this.#what}`);
      return;
    }
    if (result < 0) throw new Error(`errno ${-result}: ${this.#what}`);
    if (order.kind === Kind.READ) this.#judgeRead(slot, result);
    const changed = Buffer.from(this.#model);
    applyDeed(changed, order, 0);
    this.#setModel(changed);
  }

  /** Each block that was read is what it was at some time since the beginning. */
  #judgeRead(slot: number, lengthBytes: number): void {
    const answer = this.#threads[slot]!.answer(REGION_BYTES).subarray(0, lengthBytes);
    for (let from = 0; from < lengthBytes; from += BLOCK_BYTES) {
      const block = answer.subarray(from, from + BLOCK_BYTES);
      if (!this.#seen.some((state) => state.subarray(from, from + block.length).equals(block))) throw new Error(`read what never was: ${this.#what}`);
    }
  }

  #setModel(model: Buffer): void {
    this.#model = model;
    this.#seen.push(Buffer.from(model));
  }

  #expectContent(node: NodeRow, content: Buffer, what: string): void {
    const difference = firstDifference(content, this.#fixture.content(node), 0);
    if (difference !== null) throw new Error(`${what}: ${difference}: ${this.#what}`);
  }
}
