/** What fuzzing has found, each by its name. */
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';

import { Errno, OffshootError } from '../../blockstore/errors.js';
import { JOURNAL_FILE_BYTES, JOURNAL_OWN, Journal, formatJournal, replayJournal } from '../../blockstore/hot/journal.js';
import { SharedState, createSharedState } from '../../blockstore/hot/shared-state.js';
import { conversionUid } from '../../daemon/control/conversion-user.js';
import { readHolderState, writeHolderState } from '../../daemon/holder/holder-state.js';
import { describeImage } from '../../daemon/jobs/image-format.js';
import { parseHeader } from '../../daemon/jobs/receive-header.js';
import { ExchangeIntents } from '../../daemon/transport/kernel/exchange-intents.js';
import { compilePrograms } from '../support/compiled-program.js';
import { mustRun } from '../support/model/command.js';
import { lacks } from '../support/tools.js';

const PROGRAM = 'test/support/fuzz/cut-short-program.ts';
const programs = compilePrograms('fuzz-regressions', [PROGRAM, 'daemon/transport/kernel/io-worker.ts']);
let runtimeDir: string;

beforeEach(() => { runtimeDir = mkdtempSync(join(tmpdir(), 'offshoot-fuzz-')); });
afterEach(() => { rmSync(runtimeDir, { recursive: true, force: true }); });
afterAll(() => { programs.remove(); });

describe('an I/O worker', () => {
  it('does not read a request that was cut short on into the one before it', async () => {
    const { stdout } = await mustRun(process.execPath, [programs.pathOf(PROGRAM)]);
    const refused = [0, Errno.EINVAL];
    expect(JSON.parse(stdout)).toEqual({ READ: refused, WRITE: refused, FALLOCATE: refused, LSEEK: refused });
  });
});

describe('the holder\'s report', () => {
  it.each(['', '{', 'null', '[]', '{"lastStallMs":"x"}', '{"holderPid":1,"serverPid":2,"restarts":0,"lastStallMs":-1,"state":"running"}'])('that reads %j counts as none', (text) => {
    writeFileSync(join(runtimeDir, 'holder.json'), text);
    expect(readHolderState(runtimeDir)).toBeNull();
  });

  it('that is sound is read', () => {
    const state = {
      holderPid: 1, holderVersion: '0.1.0', serverPid: 2, sparePid: null, restarts: 0, startedAt: 'now', lastExit: null, lastStallMs: null, lastHang: null, upgrade: null, state: 'running',
    } as const;
    writeHolderState(runtimeDir, state);
    expect(readHolderState(runtimeDir)).toEqual(state);
  });
});

describe('an exchange intent', () => {
  it('with a digit changed counts as none: another node would make it look done', () => {
    const intents = new ExchangeIntents(runtimeDir);
    const unique = Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0);
    intents.begin(unique, 123);
    expect(intents.recall(unique)).toBe(123);
    const file = join(runtimeDir, readdirSync(runtimeDir)[0]!);
    writeFileSync(file, readFileSync(file, 'utf8').replace('123', '124'));
    expect(intents.recall(unique)).toBeNull();
  });
});

describe('a first-touch journal', () => {
  const RECORDS = 5;
  const HEAD = 2;
  const FIRST_RECORD = 16;
  const RECORD_WORDS = 8;

  function journal(): { readonly words: Int32Array; readonly replay: () => number | string } {
    const memory = new ArrayBuffer(JOURNAL_FILE_BYTES);
    formatJournal(memory, 0, 77);
    const shared = new SharedState(createSharedState(1), 0);
    const writer = new Journal(memory, 0);
    for (let block = 0; block < RECORDS; block += 1) writer.append(shared, JOURNAL_OWN, 3, block, 1);
    return {
      words: new Int32Array(memory),
      replay: () => {
        try {
          return replayJournal(memory, 77, () => undefined);
        } catch (thrown) {
          return thrown instanceof OffshootError ? thrown.kind : String(thrown);
        }
      },
    };
  }

  it('with a record damaged before others is refused: they were acknowledged', () => {
    const { words, replay } = journal();
    expect(replay()).toBe(RECORDS);
    words[FIRST_RECORD + 2 * RECORD_WORDS + 4]! ^= 1;
    expect(replay()).toBe('store-damaged');
  });

  it('whose last record was never finished ends before it', () => {
    const { words, replay } = journal();
    words[FIRST_RECORD + (RECORDS - 1) * RECORD_WORDS] = 0;
    expect(replay()).toBe(RECORDS - 1);
  });

  it('whose head lies behind its records is refused', () => {
    const { words, replay } = journal();
    words[HEAD] = RECORDS + 11;
    expect(replay()).toBe('store-damaged');
    words[HEAD] = RECORDS;
    expect(replay()).toBe(0);
  });

  it('of another version is refused with an error that says what to do', () => {
    const { words, replay } = journal();
    words[0] = 1;
    expect(replay()).toBe('store-damaged');
  });
});

describe('a stream for the receive', () => {
  it('whose snapshot has an @ in its name is refused: nobody could name it afterwards', () => {
    const header = JSON.stringify({
      reference: 'sent@v', baseReference: null, kind: 'container', uuid: '00000000-0000-8000-8000-000000000001', name: 'v@1', consistency: 'crash', message: null, createdUs: 1, baseUuid: null, nodes: [],
      resume: null,
    });
    expect(() => parseHeader(header)).toThrow('no name of a snapshot');
    expect(parseHeader(header.replace('v@1', 'v1'))).toMatchObject({ name: 'v1' });
  });
});

describe.skipIf(lacks('qemu-img'))('the description of a foreign image', () => {
  it('refuses a size that no disk has, before anybody counts with it', async () => {
    const file = join(runtimeDir, 'huge.vmdk');
    await mustRun('qemu-img', ['create', '-q', '-f', 'vmdk', file, '1M']);
    const bytes = readFileSync(file);
    // Its flags and its number of sectors, of which qemu-img makes 128 PiB.
    bytes.fill(0xff, 10, 18);
    writeFileSync(file, bytes);
    const image = await open(file, 'r');
    try {
      if (process.geteuid?.() === 0) await image.chown(conversionUid(), conversionUid());
      await expect(describeImage(image, 'vmdk', file)).rejects.toMatchObject({ kind: 'too-large' });
    } finally {
      await image.close();
    }
  });
});
