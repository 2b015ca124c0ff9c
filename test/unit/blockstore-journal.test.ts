/**
 * The first-touch journal: what a server that was killed had acknowledged is there in the next one, and nothing else is. The
 * ring by itself, against a list; then under a store that dies.
 */
import fs from 'node:fs';
import path from 'node:path';
import fc from 'fast-check';
import { afterAll, afterEach, describe, expect, it } from 'vitest';

import {
  JOURNAL_CAPACITY, JOURNAL_FILE_BYTES, JOURNAL_OWN, JOURNAL_SIZE, Journal, JournalReader, formatJournal, replayJournal,
} from '../../blockstore/hot/journal.js';
import { SharedState, createSharedState } from '../../blockstore/hot/shared-state.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { Kind } from '../support/blockstore-actor-orders.js';
import { ActorThread } from '../support/blockstore-actors.js';
import { TestStore, everyThird, patterned } from '../support/blockstore-fixture.js';
import { compilePrograms } from '../support/compiled-program.js';
import { patternBytes } from '../support/model/pattern.js';
import { seedFromEnvironment } from '../support/model/random.js';

const PROGRAM = 'test/support/blockstore-actor.ts';
const programs = compilePrograms('blockstore-journal', [PROGRAM]);
const actors: ActorThread[] = [];
const SEED = seedFromEnvironment();
const STORE_ID = 4_000_000_000;
const THREAD = 1;
const SPAN = 2 ** 32;
const HEADER_BYTES = 64;
const RECORD_BYTES = 32;

afterAll(() => { programs.remove(); });

afterEach(async () => {
  for (const actor of actors.splice(0)) await actor.end();
});

interface Ring {
  readonly memory: ArrayBuffer;
  readonly shared: SharedState;
  readonly journal: Journal;
  readonly reader: JournalReader;
}

/** All of the shared memory is 4 GiB of addresses; one is enough. */
const handles = createSharedState(1);

function openRing(position = 0): Ring {
  const memory = new ArrayBuffer(JOURNAL_FILE_BYTES);
  const shared = new SharedState(handles, THREAD);
  formatJournal(memory, position, STORE_ID);
  shared.publishJournalHead(THREAD, position);
  shared.publishJournalTail(position);
  return { memory, shared, journal: new Journal(memory, position), reader: new JournalReader(memory, position) };
}

/** Record number `n` of a test. */
function append({ journal, shared }: Ring, n: number): void {
  journal.append(shared, n % 2 === 0 ? JOURNAL_OWN : JOURNAL_SIZE, n + 2 ** 40, n * 3 + 2 ** 34, n % 2048);
}

function numbersOf(memory: ArrayBuffer, storeId = STORE_ID): number[] {
  const numbers: number[] = [];
  const count = replayJournal(memory, storeId, (operation, id, value, blocks) => {
    const n = id - 2 ** 40;
    const isWhole = operation === (n % 2 === 0 ? JOURNAL_OWN : JOURNAL_SIZE) && value === n * 3 + 2 ** 34 && blocks === n % 2048;
    if (!isWhole) throw new Error(`record ${n} is not what was appended`);
    numbers.push(n);
  });
  expect(count).toBe(numbers.length);
  return numbers;
}

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, i) => from + i);
}

/** Commits what was appended, as the committer does. */
function commit({ reader, shared }: Ring): void {
  const position = reader.drain(shared.journalTail(THREAD), () => undefined);
  reader.commit(position);
  shared.publishJournalHead(THREAD, position);
}

describe('the ring', () => {
  it('replays what is not committed, oldest first', () => {
    const ring = openRing();
    expect(numbersOf(ring.memory)).toEqual([]);
    for (const n of range(0, 10)) append(ring, n);
    expect(numbersOf(ring.memory)).toEqual(range(0, 10));
    commit(ring);
    expect(numbersOf(ring.memory)).toEqual([]);
    for (const n of range(10, 15)) append(ring, n);
    expect(numbersOf(ring.memory)).toEqual(range(10, 15));
  });

  it('shows the reader the same records, each once', () => {
    const ring = openRing();
    const seen: number[] = [];
    const visit = (_operation: number, id: number): void => { seen.push(id - 2 ** 40); };
    for (const n of range(0, 5)) append(ring, n);
    expect(ring.reader.drain(ring.shared.journalTail(THREAD), visit)).toBe(5);
    for (const n of range(5, 7)) append(ring, n);
    expect(ring.reader.drain(ring.shared.journalTail(THREAD), visit)).toBe(7);
    expect(ring.reader.position()).toBe(7);
    expect(seen).toEqual(range(0, 7));
  });

  it('does not believe a last record of which a part is missing', () => {
    const ring = openRing();
    for (const n of range(0, 4)) append(ring, n);
    const words = new Int32Array(ring.memory);
    const at = (HEADER_BYTES + 3 * RECORD_BYTES) / 4;
    for (let word = 0; word < RECORD_BYTES / 4; word += 1) {
      const before = words[at + word]!;
      for (const damaged of [before ^ 1, ~before, before === 0 ? 7 : 0]) {
        words[at + word] = damaged;
        expect(numbersOf(ring.memory), `word ${word}`).toEqual(range(0, 3));
      }
      words[at + word] = before;
    }
    expect(numbersOf(ring.memory)).toEqual(range(0, 4));
  });

  it.each([[0, 0], [SPAN - 5, 0], [7, JOURNAL_CAPACITY]])('is refused when more than its last record is damaged, in whatever way (from %i, %i committed)', (position, committed) => {
    const ring = openRing(position);
    for (const n of range(0, committed)) append(ring, n);
    commit(ring);
    for (const n of range(committed, committed + 4)) append(ring, n);
    const words = new Int32Array(ring.memory);
    const placeOf = (n: number): number => (HEADER_BYTES + (((position + committed + n) >>> 0) % JOURNAL_CAPACITY) * RECORD_BYTES) / 4;
    const changes: readonly ((place: number) => void)[] = [
      (place) => { words[place] = words[place]! ^ 1; },
      (place) => { words[place] = 0; },
      (place) => { words[place + 7] = words[place + 7]! ^ 1; },
    ];
    for (const first of changes) {
      for (const second of changes) {
        const before = words.slice();
        first(placeOf(2));
        second(placeOf(3));
        expect(() => numbersOf(ring.memory)).toThrow(/damaged/u);
        words.set(before);
      }
    }
    expect(numbersOf(ring.memory)).toEqual(range(committed, committed + 4));
  });

  it('goes round, and over 2^32, and never takes an earlier lap for news', () => {
    for (const position of [0, SPAN - 5, SPAN - JOURNAL_CAPACITY - 3]) {
      const ring = openRing(position);
      let next = 0;
      const fill = (count: number): void => { for (const n of range(next, next + count)) append(ring, n); next += count; };
      fill(JOURNAL_CAPACITY);
      expect(numbersOf(ring.memory).length).toBe(JOURNAL_CAPACITY);
      commit(ring);
      expect(numbersOf(ring.memory)).toEqual([]);
      fill(3);
      expect(numbersOf(ring.memory)).toEqual(range(JOURNAL_CAPACITY, JOURNAL_CAPACITY + 3));
      commit(ring);
      fill(JOURNAL_CAPACITY - 1);
      const numbers = numbersOf(ring.memory);
      expect([numbers.length, numbers[0], numbers.at(-1)]).toEqual([JOURNAL_CAPACITY - 1, JOURNAL_CAPACITY + 3, next - 1]);
    }
  });

  it('has room while a request fits, and refuses to overwrite what is not committed', () => {
    const ring = openRing(SPAN - 100);
    let count = 0;
    for (; ring.journal.hasRoom(ring.shared); count += 1) append(ring, count);
    expect(ring.journal.isHalfFull(ring.shared)).toBe(true);
    expect(JOURNAL_CAPACITY - count).toBeGreaterThanOrEqual(1024);
    for (; count < JOURNAL_CAPACITY; count += 1) append(ring, count);
    expect(() => { append(ring, count); }).toThrow('full');
    expect(numbersOf(ring.memory).length).toBe(JOURNAL_CAPACITY);
    commit(ring);
    expect(ring.journal.hasRoom(ring.shared)).toBe(true);
    expect(ring.journal.isHalfFull(ring.shared)).toBe(false);
  });

  it('belongs to one store, and to this version', () => {
    const ring = openRing();
    append(ring, 1);
    expect(numbersOf(ring.memory, STORE_ID + 1)).toEqual([]);
    const words = new Int32Array(ring.memory);
    for (const word of [0, 1]) {
      const before = words[word]!;
      words[word] = before + 1;
      expect(() => numbersOf(ring.memory)).toThrow('version');
      words[word] = before;
    }
    // The header is written last; before that nobody was answered.
    words[0] = 0;
    expect(numbersOf(ring.memory)).toEqual([]);
  });

  it(`agrees with a list whatever is appended and committed (seed ${SEED})`, () => {
    const ring = openRing(SPAN - 200_000);
    let next = 0;
    let committed = 0;
    fc.assert(
      fc.property(fc.array(fc.record({ count: fc.oneof(fc.nat(20), fc.nat(60_000)), commits: fc.boolean() }), { maxLength: 8 }), (steps) => {
        for (const { count, commits } of steps) {
          if (next - committed + count <= JOURNAL_CAPACITY) {
            for (let n = 0; n < count; n += 1) append(ring, next + n);
            next += count;
          }
          if (commits) {
            commit(ring);
            committed = next;
          }
        }
        let expected = committed;
        const count = replayJournal(ring.memory, STORE_ID, (_operation, id) => {
          if (id !== 2 ** 40 + expected) throw new Error(`record ${id - 2 ** 40} instead of ${expected}`);
          expected += 1;
        });
        expect(count).toBe(next - committed);
      }),
      { seed: SEED, numRuns: 25 },
    );
  });
});

const SIZE_BYTES = 20 * BLOCK_BYTES + 100;
const SOURCE = patterned(1, SIZE_BYTES, everyThird);

interface Setting {
  readonly fixture: TestStore;
  readonly clone: NodeRow;
  readonly model: Buffer;
}

function openClone(kind: 'disk' | 'file' = 'disk'): Setting {
  const fixture = new TestStore({ threads: 4 });
  const clone = fixture.clone(fixture.image('base', SOURCE, { kind }), 'clone');
  fixture.acquire(clone);
  return { fixture, clone, model: Buffer.from(SOURCE) };
}

function write({ fixture, clone, model }: Setting, offsetBytes: number, lengthBytes: number): void {
  const data = patternBytes(offsetBytes + 7, offsetBytes, lengthBytes);
  fixture.write(clone, offsetBytes, data);
  data.copy(model, offsetBytes);
}

function journalFiles(fixture: TestStore): string[] {
  return fs.readdirSync(fixture.runtimeDir).filter((name) => name.startsWith('journal-')).map((name) => path.join(fixture.runtimeDir, name));
}

describe('a server that was killed', () => {
  it('leaves everything that it had acknowledged, committed or not', async () => {
    const setting = openClone();
    const { fixture, clone, model } = setting;
    write(setting, 0, BLOCK_BYTES);
    await fixture.store.flush(clone.id);
    write(setting, 5000, 6000);
    await fixture.store.committer.commitAll();
    write(setting, 12 * BLOCK_BYTES + 5, 10);
    fixture.store.data.discard(clone.id, 15 * BLOCK_BYTES, 2 * BLOCK_BYTES);
    model.fill(0, 15 * BLOCK_BYTES, 17 * BLOCK_BYTES);
    expect(fixture.committedBlocks(fixture.layer(clone).id)).toEqual([0, 1, 2]);
    const { replay } = fixture.kill();
    expect(replay).toEqual({ records: 2, layers: 1 });
    expect(fixture.committedBlocks(fixture.layer(clone).id)).toEqual([0, 1, 2, 12, 15, 16]);
    fixture.expectContent(clone, model);
  });

  it('may be killed again before it has done anything', () => {
    const setting = openClone();
    write(setting, 100, 9000);
    for (const records of [1, 0, 0]) {
      expect(setting.fixture.kill().replay.records).toBe(records);
      setting.fixture.expectContent(setting.clone, setting.model);
    }
  });

  it('may be killed between the commit of a replay and the end of its journals: they are replayed once more', () => {
    const setting = openClone();
    write(setting, 100, 9000);
    const kept = journalFiles(setting.fixture).map((file) => [file, fs.readFileSync(file)] as const);
    setting.fixture.kill();
    for (const [file, bytes] of kept) fs.writeFileSync(file, bytes);
    expect(setting.fixture.kill().replay.records).toBe(1);
    setting.fixture.expectContent(setting.clone, setting.model);
  });

  it('acknowledged nothing whose record is torn', () => {
    const setting = openClone();
    const { fixture, clone } = setting;
    write(setting, 0, BLOCK_BYTES);
    fixture.write(clone, 4 * BLOCK_BYTES, patternBytes(9, 0, BLOCK_BYTES));
    const file = path.join(fixture.runtimeDir, 'journal-0');
    const bytes = fs.readFileSync(file);
    // The sequence number of the second record was never stored.
    bytes.fill(0, HEADER_BYTES + RECORD_BYTES, HEADER_BYTES + RECORD_BYTES + 4);
    fs.writeFileSync(file, bytes);
    expect(fixture.kill().replay.records).toBe(1);
    fixture.expectContent(clone, setting.model);
  });

  it('does not speak for another store, nor when its journal was only half made', () => {
    const setting = openClone();
    write(setting, 0, 10 * BLOCK_BYTES);
    const other = openClone();
    for (const file of journalFiles(setting.fixture)) fs.copyFileSync(file, path.join(other.fixture.runtimeDir, path.basename(file)));
    expect(other.fixture.kill().replay).toEqual({ records: 0, layers: 0 });
    other.fixture.expectContent(other.clone, SOURCE);
    fs.writeFileSync(path.join(other.fixture.runtimeDir, 'journal-0'), Buffer.alloc(1000, 1));
    fs.writeFileSync(path.join(other.fixture.runtimeDir, 'journal-9'), '');
    expect(other.fixture.kill().replay.records).toBe(0);
    expect(fs.existsSync(path.join(other.fixture.runtimeDir, 'journal-9'))).toBe(false);
  });

  it('speaks with the journals of all its threads', () => {
    const setting = openClone();
    const { fixture, clone, model } = setting;
    write(setting, 0, BLOCK_BYTES);
    for (const thread of [1, 2, 3]) {
      const actor = new ActorThread(programs.pathOf(PROGRAM), fixture.store.threadBoot(thread), fixture.disk(clone).shared.handles);
      actors.push(actor);
      const offsetBytes = thread * 3 * BLOCK_BYTES + 1000;
      expect(actor.do({ kind: Kind.WRITE, offsetBytes, lengthBytes: 4000, byte: thread })).toBe(4000);
      model.fill(thread, offsetBytes, offsetBytes + 4000);
    }
    expect(fixture.kill().replay).toEqual({ records: 4, layers: 1 });
    fixture.expectContent(clone, model);
  });

  it('leaves a file as long as its acknowledged writes made it', () => {
    const setting = openClone('file');
    const { fixture, clone } = setting;
    fixture.write(clone, SIZE_BYTES + 5000, Buffer.from('end'));
    const grown = Buffer.concat([SOURCE, Buffer.alloc(5000), Buffer.from('end')]);
    fixture.kill();
    fixture.expectContent(clone, grown);
    expect(fixture.row(clone).sizeBytes).toBe(grown.length);
  });

  it('says nothing about disks that are gone, sealed or complete by now', () => {
    const { fixture, clone } = openClone();
    const others = ['gone', 'sealed', 'complete'].map((name) => fixture.clone(clone, name));
    for (const node of others) {
      fixture.acquire(node);
      fixture.write(node, 0, patternBytes(3, 0, SIZE_BYTES));
    }
    const [gone, sealed, complete] = others as [NodeRow, NodeRow, NodeRow];
    fixture.clone(sealed, 'of sealed');
    fixture.store.markComplete(complete.id);
    fixture.store.disks.release(gone.id);
    fixture.store.discardNode(gone.id);
    fixture.kill();
    for (const node of [sealed, complete]) fixture.expectContent(node, patternBytes(3, 0, SIZE_BYTES));
    fixture.expectContent(clone, SOURCE);
    expect(fixture.layer(complete).complete).toBe(true);
    expect(fixture.committedBlocks(fixture.layer(complete).id)).toEqual([]);
  });
});

describe('a server that ended in an orderly way', () => {
  it('leaves no journal, and nothing to replay', async () => {
    const setting = openClone();
    write(setting, 100, 9000);
    const store = await setting.fixture.restart();
    expect(store.replay).toEqual({ records: 0, layers: 0 });
    setting.fixture.expectContent(setting.clone, setting.model);
    await setting.fixture.close();
    expect(journalFiles(setting.fixture)).toEqual([]);
  });
});

describe('a ring that is full', () => {
  const touches = JOURNAL_CAPACITY + 100;

  it('makes its thread wait for a commit, and nobody else', async () => {
    const setting = openClone();
    const { fixture, clone } = setting;
    const { shared } = fixture.store.context;
    const actor = new ActorThread(programs.pathOf(PROGRAM), fixture.store.threadBoot(1), fixture.disk(clone).shared.handles);
    actors.push(actor);
    actor.give({ kind: Kind.DISCARD, offsetBytes: 0, lengthBytes: BLOCK_BYTES, repeat: touches });
    actor.goOn();
    let before = -1;
    while (shared.journalTail(1) !== before || before < JOURNAL_CAPACITY / 2) {
      before = shared.journalTail(1);
      expect(actor.isStillAfter(50)).toBe(false);
    }
    expect(before).toBeLessThan(JOURNAL_CAPACITY);
    write(setting, BLOCK_BYTES, BLOCK_BYTES);
    await fixture.store.committer.commitAll();
    expect(actor.waitUntilStill(20_000)).toBe(true);
    expect(actor.result).toBe(0);
    expect(shared.journalTail(1)).toBe(touches);
    setting.model.fill(0, 0, BLOCK_BYTES);
    fixture.kill();
    fixture.expectContent(clone, setting.model);
  });

  it('is emptied by the main thread itself', () => {
    const setting = openClone();
    const { fixture, clone, model } = setting;
    for (let i = 0; i < touches; i += 1) fixture.store.data.discard(clone.id, 0, BLOCK_BYTES);
    write(setting, BLOCK_BYTES, BLOCK_BYTES);
    model.fill(0, 0, BLOCK_BYTES);
    fixture.kill();
    fixture.expectContent(clone, model);
  });
});
