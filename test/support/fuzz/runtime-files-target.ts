/**
 * The files in the run-time directory, damaged while no server ran: handles.log, session.json, exchange intents, the
 * holder's report, the first-touch journal.
 *
 * What must hold of each: a file that was cut short where a write may be cut short gives what was whole before; any other
 * damage gives a clear error (`store-damaged`, which says what to do) or nothing; never a handle, node or block that was not
 * written, and never less than was written without a word.
 */
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';

import { OffshootError } from '../../../blockstore/errors.js';
import { JOURNAL_CAPACITY, JOURNAL_FILE_BYTES, JOURNAL_OWN, Journal, formatJournal, replayJournal } from '../../../blockstore/hot/journal.js';
import { SharedState, createSharedState } from '../../../blockstore/hot/shared-state.js';
import { readHolderState, writeHolderState, type HolderState } from '../../../daemon/holder/holder-state.js';
import { ExchangeIntents } from '../../../daemon/transport/kernel/exchange-intents.js';
import { HandleTable } from '../../../daemon/transport/kernel/handles.js';
import type { SessionParameters } from '../../../daemon/transport/kernel/negotiation.js';
import { loadSession, saveSession } from '../../../daemon/transport/kernel/session.js';
import { fuzzCases, makeFuzzDirectory, type FuzzOptions, type FuzzTarget } from './fuzz-target.js';

const STORE_ID = 0x1234_5678;
const RECORD_BYTES = 32;
const JOURNAL_HEADER_BYTES = 64;
const HEAD_WORD_AT = 8;
const STATE: HolderState = {
  holderPid: 10, holderVersion: '1.0.0', serverPid: 11, sparePid: 12, upgrade: null, lastHang: null, restarts: 3, startedAt: '2026-01-02T03:04:05.678Z', lastExit: { code: 1, signal: null, at: '2026-01-02T03:04:05.678Z' }, lastStallMs: 98.5, state: 'running',
};
const SESSION: SessionParameters = {
  kernelMinor: 45, minor: 45, flags: 1, flags2: 2, readaheadBytesMax: 131072, writeBytesMax: 1048576, readBytesMax: 1048576, pagesMax: 256, backgroundMax: 64,
  congestionThreshold: 48, timeGranularityNs: 1, passthrough: false, exportSupport: false,
};

/** A change of a file's bytes: places as fractions of its length. */
interface Damage {
  readonly flips: readonly (readonly [number, number])[];
  readonly keep: number | null;
  readonly tail: Uint8Array;
}

const fraction = fc.double({ min: 0, max: 1, noNaN: true });
const damages: fc.Arbitrary<Damage> = fc.record({
  flips: fc.array(fc.tuple(fraction, fc.integer({ min: 1, max: 255 })), { maxLength: 3 }),
  keep: fc.option(fraction, { freq: 2 }),
  tail: fc.oneof(fc.constant(new Uint8Array()), fc.uint8Array({ maxLength: 70 })),
});

function damage(bytes: Buffer, { flips, keep, tail }: Damage): Buffer {
  const harmed = Buffer.from(keep === null ? bytes : bytes.subarray(0, Math.floor(keep * bytes.length)));
  for (const [at, change] of flips) {
    if (harmed.length > 0) harmed[Math.min(harmed.length - 1, Math.floor(at * harmed.length))]! ^= change;
  }
  return Buffer.concat([harmed, tail]);
}

/** What `load` gives, or null when it refuses as it should. */
function orRefused<T>(load: () => T): T | null {
  try {
    return load();
  } catch (thrown) {
    if (thrown instanceof OffshootError && thrown.kind === 'store-damaged') return null;
    throw thrown;
  }
}

/** Opens, some of them released again; then the log is damaged. */
function tryHandles(directory: string, opens: readonly (readonly [number, boolean])[], harm: Damage): void {
  const table = HandleTable.load(directory);
  for (const [nodeId, released] of opens) {
    const handle = table.add(nodeId, nodeId % 7, nodeId % 2 === 0 ? 'direct' : 'cached');
    if (released) table.remove(handle);
  }
  table.close();
  const file = join(directory, 'handles.log');
  const whole = readFileSync(file);
  const harmed = damage(whole, harm);
  writeFileSync(file, harmed);
  const loaded = orRefused(() => HandleTable.load(directory));
  if (loaded === null) {
    if (whole.equals(harmed.subarray(0, whole.length)) && harmed.length < whole.length + RECORD_BYTES) throw new Error('a whole log was refused');
    return;
  }
  for (const { handle, nodeId, flags, mode } of loaded.entries()) {
    const added = opens[handle - 1];
    const isRight = added?.[0] === nodeId && flags === nodeId % 7 && mode === (nodeId % 2 === 0 ? 'direct' : 'cached');
    if (!isRight) throw new Error(`handle ${handle} of node ${nodeId} was never given`);
  }
  // Every open record that lies whole before the end of an undamaged prefix must be there, unless it was released.
  const wholeRecords = Math.floor(prefixLength(whole, harmed) / RECORD_BYTES) - 1;
  let records = 0;
  for (const [index, [, released]] of opens.entries()) {
    records += 1;
    if (records <= wholeRecords && !released && loaded.get(index + 1) === undefined) throw new Error(`handle ${index + 1} was lost`);
    if (released) records += 1;
  }
  loaded.close();
}

function prefixLength(a: Buffer, b: Buffer): number {
  const limit = Math.min(a.length, b.length);
  for (let at = 0; at < limit; at += 1) if (a[at] !== b[at]) return at;
  return limit;
}

function trySession(directory: string, harm: Damage): void {
  saveSession(directory, SESSION);
  const file = join(directory, 'session.json');
  writeFileSync(file, damage(readFileSync(file), harm));
  const loaded = orRefused(() => loadSession(directory));
  if (loaded === null) return;
  for (const [name, value] of Object.entries(SESSION)) {
    if (typeof loaded[name as keyof SessionParameters] !== typeof value) throw new Error(`${name} of the session is ${String(loaded[name as keyof SessionParameters])}`);
  }
}

function tryHolderState(directory: string, harm: Damage): void {
  writeHolderState(directory, STATE);
  const file = join(directory, 'holder.json');
  writeFileSync(file, damage(readFileSync(file), harm));
  const read = readHolderState(directory);
  if (read === null) return;
  const stall = read.lastStallMs;
  if (typeof read.restarts !== 'number' || !(stall === null || (typeof stall === 'number' && stall >= 0))) throw new Error(`the holder's report reads ${JSON.stringify(read)}`);
}

function tryExchange(directory: string, nodeId: number, harm: Damage): void {
  const intents = new ExchangeIntents(directory);
  const unique = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8);
  intents.begin(unique, nodeId);
  const name = readdirSync(directory).find((each) => each.startsWith('exchange-'))!;
  const file = join(directory, name);
  writeFileSync(file, damage(readFileSync(file), harm));
  const recalled = intents.recall(unique);
  if (recalled !== null && recalled !== nodeId) throw new Error(`node ${recalled} was recalled instead of ${nodeId}`);
}

/** Records appended in a ring that begins at `position`; then some of its bytes are changed. */
function tryJournal(memory: ArrayBuffer, position: number, count: number, places: readonly (readonly [number, number])[]): void {
  const bytes = new Uint8Array(memory);
  bytes.fill(0);
  formatJournal(memory, position, STORE_ID);
  const shared = new SharedState(createSharedState(1), 0);
  shared.publishJournalHead(0, position);
  const journal = new Journal(memory, position);
  for (let i = 0; i < count; i += 1) journal.append(shared, JOURNAL_OWN, 5, i * 10, 3);
  let harmed = false;
  for (const [at, change] of places) {
    // The header, and the records that were written.
    const used = JOURNAL_HEADER_BYTES + count * RECORD_BYTES;
    const place = Math.min(used - 1, Math.floor(at * used));
    const where = place < JOURNAL_HEADER_BYTES ? place : JOURNAL_HEADER_BYTES + (((position % JOURNAL_CAPACITY) * RECORD_BYTES + place - JOURNAL_HEADER_BYTES) % (JOURNAL_CAPACITY * RECORD_BYTES));
    bytes[where]! ^= change;
    // The rest of the header is not used.
    if (where < HEAD_WORD_AT + 8 || where >= JOURNAL_HEADER_BYTES) harmed = true;
  }
  const seen: number[] = [];
  const visited = orRefused(() => replayJournal(memory, STORE_ID, (operation, id, value, length) => {
    if (operation !== JOURNAL_OWN || id !== 5 || length !== 3 || value % 10 !== 0 || value >= count * 10) throw new Error(`a record of layer ${id}, block ${value} was invented`);
    seen.push(value / 10);
  }));
  if (visited === null || new Int32Array(memory)[3] !== STORE_ID || new Int32Array(memory)[0] === 0) return;
  if (!harmed && seen.length !== count) throw new Error(`${count - seen.length} records of a sound journal were lost`);
  // A head that was moved on says that what lies before it is committed: that cannot be told from the truth.
  if (((new Int32Array(memory)[2]! - position) >>> 0) <= count && ((new Int32Array(memory)[2]! - position) >>> 0) > 0) return;
  // The last record may be one that was never finished; any other that is missing is an acknowledged write that is lost.
  if (seen.length < count - 1) throw new Error(`${count - seen.length} of ${count} records were lost without a word`);
}

export const runtimeFilesTarget: FuzzTarget = {
  name: 'runtime-files',
  summary: 'damaged files in the run-time directory',
  async run(options: FuzzOptions) {
    const top = makeFuzzDirectory();
    const counts = { cases: 0, damages: 0 };
    const memory = new ArrayBuffer(JOURNAL_FILE_BYTES);
    try {
      const cases = fc.record({
        opens: fc.array(fc.tuple(fc.integer({ min: 1, max: 1000 }), fc.boolean()), { maxLength: 12 }), handles: damages, session: damages, holder: damages, exchange: damages,
        nodeId: fc.integer({ min: 1, max: Number.MAX_SAFE_INTEGER }),
        position: fc.oneof(fc.nat(JOURNAL_CAPACITY * 2), fc.constantFrom(0, JOURNAL_CAPACITY - 2, 0xffff_fffe, 0x7fff_fffe)),
        records: fc.integer({ min: 0, max: 20 }), journal: fc.array(fc.tuple(fraction, fc.integer({ min: 1, max: 255 })), { maxLength: 2 }),
      });
      await fuzzCases(options, cases, async ({ opens, handles, session, holder, exchange, nodeId, position, records, journal }) => {
        const directory = join(top, `case-${counts.cases}`);
        rmSync(directory, { recursive: true, force: true });
        mkdirSync(directory);
        tryHandles(directory, opens, handles);
        trySession(directory, session);
        tryHolderState(directory, holder);
        tryExchange(directory, nodeId, exchange);
        tryJournal(memory, position, records, journal);
        rmSync(directory, { recursive: true, force: true });
        counts.cases += 1;
        counts.damages += 5;
        // A turn for the clock that ends the run.
        if (counts.cases % 16 === 0) await new Promise(setImmediate);
      });
    } finally {
      rmSync(top, { recursive: true, force: true });
    }
    return counts;
  },
};
