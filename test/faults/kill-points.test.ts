/**
 * SIGKILL at every system call of a store at work, and behind the writes of the data path that no further system call follows.
 *
 * The journals are kept, as they are when a server dies and its mount lives on; another process opens the store. Every operation
 * that was acknowledged must be there, exactly: flushed or not. The one that was under way may have happened or not, and never in part.
 * Of runs of writes to SQLite's files within one operation the first and the last are tried;
 * `OFFSHOOT_FAULTS=all` tries all of them.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { Campaign, type Judged } from '../support/faults/campaign.js';
import type { ActorRun, Call } from '../support/faults/injector.js';
import { describeSite, onceAt, roleOf, sitesOf, type Site } from '../support/faults/sites.js';
import { lacks } from '../support/tools.js';

const EVERY_CALL = process.env['OFFSHOOT_FAULTS'] === 'all';
const MINUTE_MS = 60_000;
const MISSED_SHARE_MAX = 0.15;
/** Call sites of the data path that are followed by a record in the journal, and how often the workload comes by. */
const BEHIND: Readonly<Record<string, number>> = { 'first-touch-write': 10, 'keep-write': 6, punch: 2, 'owned-write': 8 };

/** Indices into the calls: where it is worth dying. */
function pointsOf(calls: readonly Call[]): number[] {
  const runs = new Map<string, number[]>();
  for (const [at, { operation, call, file }] of calls.entries()) {
    if (call === 'mkdir') continue;
    const isSqlite = call === 'pwrite64' && roleOf(file).startsWith('db');
    const key = isSqlite && !EVERY_CALL ? `${operation} ${file}` : String(at);
    runs.set(key, [...(runs.get(key) ?? []), at]);
  }
  return [...runs.values()].flatMap((run) => [...new Set([run[0]!, run.at(-1)!])]).sort((a, b) => a - b);
}

function wrongIn(name: string, { run, verdict }: Judged): string[] {
  const wrong = [...verdict.wrong];
  if (run.crash !== null) wrong.push(`it ended itself: ${run.crash}`);
  if (verdict.faulted.length > 0) wrong.push(`${verdict.faulted.join(', ')} faulted`);
  if (verdict.check === 'corruption') wrong.push('corruption');
  return wrong.map((each) => `killed at ${name}: ${each}`);
}

describe.skipIf(lacks('strace', 'mkfifo'))('a process that is killed', { timeout: 30 * MINUTE_MS }, () => {
  let campaign: Campaign;
  beforeAll(() => { campaign = new Campaign('kill-points'); });
  afterAll(() => { campaign.remove(); });

  it('at any system call has lost nothing that it acknowledged', async () => {
    const { run: { calls } } = await campaign.run([], { counting: true });
    const sites = sitesOf(calls, true);
    const points = pointsOf(calls).map((at) => sites.find((site) => site.at === at)!);
    const judged = await campaign.forEach(points, async (site) => await campaign.run(onceAt(calls, site, 'KILL')));
    const leaks = judged.filter(({ verdict }) => verdict.check === 'leaks').length;
    process.stdout.write(`killed at a system call: ${points.length} points of ${sites.length} calls, ${judged.length - leaks} clean, ${leaks} leaks\n`);
    expect(points.flatMap((site, index) => wrongIn(`call ${site.at}, ${describeSite(site)}`, judged[index]!))).toEqual([]);
    // Each died, in the operation that the call belongs to: or the point was none. How many pages SQLite writes differs a little between
    // runs, the more the later it is: a point behind the last of them is not met.
    const isMet = (site: Site, { outcomes }: ActorRun): boolean => (site.role.startsWith('db') ? outcomes.includes('unknown') : outcomes[site.operation] === 'unknown');
    const missed = points.filter((site, index) => !isMet(site, judged[index]!.run));
    expect(missed.filter(({ role }) => !role.startsWith('db')).map(describeSite)).toEqual([]);
    expect(missed.length, missed.map(describeSite).join('; ')).toBeLessThan(points.length * MISSED_SHARE_MAX);
  });

  it('behind a write of the data path, before its fact is in the journal, has lost nothing that it acknowledged', async () => {
    const points = Object.entries(BEHIND).flatMap(([label, count]) => Array.from({ length: count }, (_, index) => `${label}:${index + 1}`));
    const judged = await campaign.forEach(points, async (killAfter) => await campaign.run([], { killAfter }));
    expect(points.flatMap((point, index) => wrongIn(`the end of ${point}`, judged[index]!))).toEqual([]);
    // The workload comes by all of them; the last operation is the one that ends the store.
    const died = judged.filter(({ run }) => run.outcomes.includes('unknown')).length;
    expect(died).toBeGreaterThanOrEqual(points.length - 6);
  });
});
