/**
 * Which statements of the metadata store read a whole table: those that have to, by name. Everything else finds its rows by an index,
 * so that it costs the same in a store of ten disks and of ten thousand.
 */
import Database from 'better-sqlite3';
import { describe, expect, it, vi } from 'vitest';

import { databasePath, openStore } from '../support/meta-store-fixture.js';

interface PlanStep {
  readonly detail: string;
}

/**
 * Statements that look at all of a table, each with its reason. A new one belongs here only if nothing calls it for one disk, one name
 * or one request of a guest.
 */
const WHOLE_TABLE: readonly (readonly [pattern: RegExp, reason: string])[] = [
  [/AS disks, \(SELECT count/u, 'status and metrics count all disks'],
  [/sum\(size_bytes\).* AS bytes FROM nodes/u, 'status adds up all sizes'],
  [/FROM nodes WHERE fault IS NOT NULL/u, 'status names what is faulted'],
  [/SELECT count\(\*\) AS count FROM layers/u, 'status counts all layers'],
  [/FROM layers WHERE NOT EXISTS/u, 'a start looks once for layers that nothing refers to'],
  [/WITH RECURSIVE reached/u, 'a check looks at every name'],
  [/SELECT id, backing_id FROM layers WHERE backing_id IS NOT NULL/u, 'a check looks at every chain'],
  [/FROM layers LEFT JOIN layer_checksums/u, 'the scrub looks for layers without checksums'],
  [/FROM damages ORDER BY/u, 'all that a scrub has found, which is little'],
  [/FROM jobs, wanted/u, 'jobs are bounded by the job table itself'],
  [/DELETE FROM jobs/u, 'history is trimmed once in a hundred jobs'],
  [/FROM snapshots ORDER BY id/u, 'a list of all snapshots'],
  [/WITH RECURSIVE chain\(id, depth\)/u, 'the search for long chains, when layers came or went'],
  [/SELECT max\(id\) AS newest, count\(\*\) AS layers FROM layers/u, 'whether layers came or went, every few seconds'],
  [/FROM quotas ORDER BY node_id/u, 'all limits, which are few'],
  [/FROM machines ORDER BY id$/u, 'a list of all machines'],
  [/FROM machines WHERE state = 'making' OR registration/u, 'a directory is renamed or removed with all that is in it, which people do'],
  [/FROM machines LEFT JOIN nodes/u, 'a check looks at every machine'],
  [/FROM exports WHERE kind = /u, 'exports of one presenter, which are about as few as all'],
  [/FROM (?:exports|vdisks|attachments|deployments) ORDER BY id$/u, 'lists of exports, container files, attachments, deployed machines'],
  [/count\(\*\) AS count FROM attachments/u, 'attached devices are few: there is a limit'],
  [/FROM deployments, json_each/u, 'somebody makes a machine: is its MAC that of a deployed one'],
  [/SELECT id, CASE complete WHEN 0 THEN backing_id END AS backing_id/u, 'df counts who needs which layer'],
  [/SELECT id, parent_id, name, kind, size_bytes, layer_id, frozen FROM nodes/u, 'df counts what every disk takes'],
  [/SELECT DISTINCT layer_id, source_layer_id FROM shared_extents/u, 'df counts who needs which layer'],
  [/SELECT DISTINCT layer_id AS id FROM shared_extents/u, 'a start and a check look at every layer that shares extents'],
  [/^PRAGMA/u, 'a check of SQLite itself'],
];

/** A step over rows that the statement made itself is no scan of a table. */
const OWN_ROWS = /^SCAN (?:json_each|wanted|above|reached|below|CONSTANT ROW|\(subquery|\d+ CONSTANT)/u;

function plansOf(): { readonly sql: string; readonly scans: readonly string[]; readonly sorts: boolean }[] {
  const texts = new Set<string>();
  const spy = vi.spyOn(Database.prototype, 'prepare');
  const path = databasePath();
  openStore(path).close();
  for (const [sql] of spy.mock.calls) texts.add(sql);
  spy.mockRestore();
  const database = new Database(path, { readonly: true });
  try {
    return [...texts].filter((sql) => /^\s*(?:SELECT|WITH|INSERT|UPDATE|DELETE)/u.test(sql) && !sql.includes('sqlite_')).map((sql) => {
      const values = Array.from({ length: sql.split('?').length - 1 }, () => null);
      const plan = database.prepare<null[], PlanStep>(`EXPLAIN QUERY PLAN ${sql}`).all(...values);
      return { sql: sql.replaceAll(/\s+/gu, ' ').trim(), scans: plan.map((step) => step.detail).filter((detail) => detail.startsWith('SCAN ') && !OWN_ROWS.test(detail)), sorts: plan.some((step) => step.detail.includes('TEMP B-TREE')) };
    });
  } finally {
    database.close();
  }
}

describe('statements of the metadata store', () => {
  it('find their rows by an index, but for those that are about the whole store', () => {
    const plans = plansOf();
    expect(plans.length).toBeGreaterThan(60);
    const scanning = plans.filter(({ sql, scans }) => scans.length > 0 && !WHOLE_TABLE.some(([pattern]) => pattern.test(sql)));
    expect(scanning, 'these read a whole table: give them an index, or put them on the list with a reason').toEqual([]);
  });

  it('go on in a directory, a layer or a list where they stopped, without sorting what is left', () => {
    const paging = plansOf().filter(({ sql }) => / > \? ORDER BY (?:\w+\.)?(?:id|name|first_page|first_piece) LIMIT/u.test(sql));
    expect(paging.length).toBeGreaterThanOrEqual(6);
    expect(paging.filter(({ sorts }) => sorts)).toEqual([]);
  });
});
