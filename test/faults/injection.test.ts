/**
 * The failing system calls: every call site of a store at work, with EIO and ENOSPC, once and for ever, in the real kernel.
 *
 * What must hold for each of them is checked by rule (see `verdict.ts` and `model.ts`): nothing acknowledged and flushed is lost, a fault is
 * never forgotten, `check` finds leaks at the most, reads go on. What each of them looks like is kept in `injection-matrix.txt`: what the
 * operation said, whether the process ended itself, which disks are faulted afterwards, the verdict. A change of the store's
 * calls changes that table: `vitest run --project faults -u` writes it anew, and the difference is to be read.
 *
 * `OFFSHOOT_FAULTS=all` lets every single call fail instead of the first of each call site; the table is not compared then.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { Campaign, type Judged } from '../support/faults/campaign.js';
import type { Call, Injection } from '../support/faults/injector.js';
import { alwaysFrom, describeSite, goneFrom, onceAt, sitesOf, type Site } from '../support/faults/sites.js';
import { WORKLOAD, nameOf } from '../support/faults/workload.js';
import { lacks } from '../support/tools.js';

const EVERY_CALL = process.env['OFFSHOOT_FAULTS'] === 'all';
const MINUTE_MS = 60_000;

type Mode = 'once' | 'always';

interface Point {
  readonly site: Site;
  readonly errno: 'EIO' | 'ENOSPC';
  readonly mode: Mode;
}

const MODES: readonly Omit<Point, 'site'>[] = [
  { errno: 'EIO', mode: 'once' }, { errno: 'EIO', mode: 'always' }, { errno: 'ENOSPC', mode: 'once' }, { errno: 'ENOSPC', mode: 'always' },
];

/** All of them where guests' data and its facts go; elsewhere a failure is one of the operation, and for ever differs little from once. */
function isTried({ operation, role }: Site, { errno, mode }: Omit<Point, 'site'>): boolean {
  if (EVERY_CALL || role === 'data' || role === 'db-wal') return EVERY_CALL || operation > 0 || (errno === 'EIO' && mode === 'once');
  return mode === 'once' && (errno === 'EIO' || operation > 0);
}

function injectionsOf(calls: readonly Call[], { site, errno, mode }: Point): Injection[] {
  return mode === 'once' ? onceAt(calls, site, errno) : alwaysFrom(calls, site, errno);
}

function nameOfPoint({ site, errno, mode }: Point): string {
  return `${describeSite(site)}, ${errno} ${mode}`;
}

/** What the operation said (`died`: the process ended itself), faulted disks in brackets, the verdict when it is not clean. */
function cell(site: Site, { run, verdict }: Judged): string {
  const outcome = run.crash === null ? run.outcomes[site.operation] : 'died';
  return [outcome, ...(verdict.faulted.length === 0 ? [] : [`[${verdict.faulted.join(' ')}]`]), ...(verdict.check === 'clean' ? [] : [verdict.check])].join(' ');
}

/** What guests are promised for the call that failed, beside what holds for all. */
function broken({ site, errno }: Point, { run, verdict }: Judged): string[] {
  const wrong = verdict.wrong.map((each) => `${each} (${run.crash ?? 'it ran to its end'})`);
  const operation = WORKLOAD[site.operation]!;
  const outcome = run.outcomes[site.operation];
  const disk = 'disk' in operation ? operation.disk : '';
  // Whatever a sync of data says, it faults the disk, and the guest is told of an error that it does not try again.
  const isDataSync = site.call === 'fdatasync' && site.role === 'data';
  if (isDataSync && operation.kind === 'flush' && (outcome !== 'faulted' || !verdict.faulted.includes(disk))) wrong.push(`a failed sync of ${disk} is told as ${outcome}`);
  if (isDataSync && (operation.kind === 'commit' ? run.faulted.length === 0 : !run.faulted.includes(disk))) wrong.push(`${disk} is not faulted by a failed sync`);
  // A guest's write that found no room, and a commit that found none, leave the disk as it was.
  const wantsRoom = errno === 'ENOSPC' && ((operation.kind === 'write' && site.role === 'data') || (site.call === 'pwrite64' && site.role.startsWith('db-wal')));
  if (wantsRoom && operation.kind !== 'open' && outcome !== 'no-space' && outcome !== 'ok') wrong.push(`a full store is told as ${outcome}`);
  if (errno === 'EIO' && operation.kind === 'write' && outcome !== 'io-error') wrong.push(`a write that failed is told as ${outcome}`);
  return wrong;
}

describe.skipIf(lacks('strace', 'mkfifo'))('a system call that fails', { timeout: 60 * MINUTE_MS }, () => {
  let campaign: Campaign;
  beforeAll(() => { campaign = new Campaign('injection'); });
  afterAll(() => { campaign.remove(); });

  it('at any call site leaves what was promised', async () => {
    const { run: { calls, outcomes, crash }, verdict } = await campaign.run([], { counting: true });
    expect({ crash, wrong: verdict.wrong, check: verdict.check }).toEqual({ crash: null, wrong: [], check: 'clean' });
    expect(outcomes.map((outcome, number) => `${number} ${nameOf(WORKLOAD[number]!)} ${outcome}`).filter((each) => !each.endsWith(' ok'))).toEqual([]);
    const sites = sitesOf(calls, EVERY_CALL);
    // The workload is worth something only as long as it comes by all of these.
    for (const call of ['pwrite64', 'fdatasync', 'fsync', 'ftruncate', 'fallocate', 'openat', 'rename', 'unlink']) expect(sites.map((site) => site.call)).toContain(call);
    for (const role of ['data', 'db', 'db-wal', 'db-shm', 'import', 'reserve', 'layer directory', 'store directory']) expect(sites.map((site) => site.role)).toContain(role);

    const points = sites.flatMap((site) => MODES.filter((mode) => isTried(site, mode)).map((mode) => ({ site, ...mode })));
    const judged = await campaign.forEach(points, async (point) => await campaign.run(injectionsOf(calls, point)));
    const wrong = points.flatMap((point, index) => broken(point, judged[index]!).map((each) => `${nameOfPoint(point)}: ${each}`));
    const rows = sites.map((site) => [describeSite(site), ...MODES.map(({ errno, mode }) => {
      const index = points.findIndex((point) => point.site === site && point.errno === errno && point.mode === mode);
      return index < 0 ? '' : cell(site, judged[index]!);
    })]);
    const verdicts = judged.map(({ verdict: { check } }) => check);
    const count = (check: string): number => verdicts.filter((each) => each === check).length;
    process.stdout.write(`failing system calls: ${sites.length} call sites, ${points.length} runs: ${count('clean')} clean, ${count('leaks')} leaks, ${count('corruption')} corruption\n`);
    expect(wrong).toEqual([]);
    if (!EVERY_CALL) await expect(tableOf(rows)).toMatchFileSnapshot('injection-matrix.txt');
  });

  it('with every other from then on, as on a device that is gone, leaves what was promised', async () => {
    const { run: { calls } } = await campaign.run([], { counting: true });
    const operations = [...WORKLOAD.keys()].filter((operation) => calls.some((call) => call.operation === operation));
    const judged = await campaign.forEach(operations, async (operation) => await campaign.run(goneFrom(calls, operation, 'EIO')));
    expect(operations.flatMap((operation, index) => judged[index]!.verdict.wrong.map((each) => `from ${operation} ${nameOf(WORKLOAD[operation]!)}: ${each} (${judged[index]!.run.crash ?? 'it ran to its end'})`))).toEqual([]);
  });
});

function tableOf(rows: readonly (readonly string[])[]): string {
  const head = ['   operation     call      file', ...MODES.map(({ errno, mode }) => `${errno} ${mode}`)];
  const widths = head.map((title, column) => Math.max(title.length, ...rows.map((row) => row[column]!.length)));
  return [head, ...rows].map((row) => row.map((text, column) => text.padEnd(widths[column]!)).join(' | ').trimEnd()).join('\n').concat('\n');
}
