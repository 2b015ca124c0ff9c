/** The power goes while a store is made, and while an older one is brought to this version. */
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import path from 'node:path';

import { MIGRATIONS, SCHEMA_VERSION, migrate, schemaVersionOf } from '../../blockstore/meta/migrations.js';
import { imagesWanted } from '../support/power/cuts.js';
import { NOTES_PER_LAYER, ONE_STEP_MORE, openRaw } from '../support/power/older-store.js';
import { STORE, compileRecorded, createBench, cutAndReport, powerVerdict } from '../support/power/power-test.js';
import { createCleanup } from '../support/temp.js';

const cleanup = createCleanup();
const programs = compileRecorded('migration');

afterEach(async () => { await cleanup.run(); });
afterAll(() => { programs.remove(); });

describe('a power loss', () => {
  it('while a store is made, first used and closed leaves a store that opens, with all that was answered', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record('use-and-close');
    const result = await cutAndReport(bench, { name: 'first start', verdict: powerVerdict(bench) });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });

  it('while the next start of a store of any version brings it to this one loses nothing', async () => {
    for (let version = 1; version <= SCHEMA_VERSION; version += 1) {
      const bench = createBench(programs, cleanup);
      await bench.record(`older:${version}`);
      const startAt = bench.recorder.events.length;
      await bench.record('start');
      const result = await cutAndReport(bench, { name: `start of a store of version ${version}`, firstCut: startAt - 1, images: 500, verdict: powerVerdict(bench) });
      expect(result.failures).toEqual([]);
      expect(result.images).toBeGreaterThan(300);
    }
  });

  it('during a migration leaves the version before or the version after, whole, and the migration can be made again', async () => {
    const bench = createBench(programs, cleanup);
    await bench.record(`older:${SCHEMA_VERSION}`);
    const migrationAt = bench.recorder.events.length;
    await bench.record('one-step-more');
    const result = await cutAndReport(bench, {
      // Some more than are asked for: where little is pending, ways to tear leave the same image, which counts once.
      name: 'migration', firstCut: migrationAt - 1, images: Math.ceil(1.15 * imagesWanted()),
      verdict: ({ directory }) => Promise.resolve(judgeMigration(path.join(directory, STORE))),
    });
    expect(result.failures).toEqual([]);
    expect(result.images).toBeGreaterThanOrEqual(1000);
  });
});

function judgeMigration(storeDir: string): string | null {
  const database = openRaw(storeDir);
  try {
    const version = schemaVersionOf(database);
    const tables = database.prepare<[], number>("SELECT count(*) FROM sqlite_schema WHERE name = 'power_notes'").pluck().get();
    if (version !== MIGRATIONS.length && version !== MIGRATIONS.length + 1) return `the version is ${version}`;
    if (tables !== version - MIGRATIONS.length) return `version ${version} has ${tables ?? 0} of the new tables`;
    migrate(database, ONE_STEP_MORE);
    const verdict = String(database.pragma('integrity_check(1)', { simple: true }));
    if (verdict !== 'ok') return verdict;
    const marks = database.prepare<[], number>('SELECT count(*) FROM nodes WHERE power_mark = id * 2').pluck().get();
    const notes = database.prepare<[], number>('SELECT count(*) FROM power_notes').pluck().get();
    return marks === 3 && notes === 3 * NOTES_PER_LAYER ? null : `${marks ?? 0} nodes and ${notes ?? 0} notes were made, not 3 and ${3 * NOTES_PER_LAYER}`;
  } finally {
    database.close();
  }
}
