/**
 * The figures as a table for people and as one object for programs. A figure is the median of its rounds; ratios are of medians.
 */
import { BASELINE, SUBJECT, type CandidateId } from './candidates.js';
import type { Workload } from './workloads.js';

/** One figure a round. */
export type Rounds = ReadonlyMap<CandidateId, ReadonlyMap<string, readonly number[]>>;

export interface ReportRow {
  readonly workload: string;
  readonly unit: Workload['unit'];
  readonly figures: Readonly<Partial<Record<CandidateId, Figure>>>;
  readonly targetRatio: number | null;
  readonly reached: boolean | null;
}

export interface Figure {
  readonly median: number;
  /** Of the baseline's median; null where that was not measured. */
  readonly ratio: number | null;
  readonly rounds: readonly number[];
}

const THOUSAND = 1000;
const MILLION = 1_000_000;

export function buildReport(workloads: readonly Workload[], rounds: Rounds): ReportRow[] {
  return workloads.map((workload) => {
    const baseline = figuresOf(rounds, BASELINE, workload);
    const figures: Partial<Record<CandidateId, Figure>> = {};
    for (const id of rounds.keys()) {
      const own = figuresOf(rounds, id, workload);
      if (own.length === 0) continue;
      figures[id] = { median: median(own), ratio: baseline.length === 0 ? null : median(own) / median(baseline), rounds: own };
    }
    const ratio = figures[SUBJECT]?.ratio ?? null;
    const { targetRatio } = workload;
    return { workload: workload.id, unit: workload.unit, figures, targetRatio, reached: targetRatio === null || ratio === null ? null : ratio >= targetRatio };
  });
}

function figuresOf(rounds: Rounds, id: CandidateId, workload: Workload): readonly number[] {
  return rounds.get(id)?.get(workload.id) ?? [];
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

export function renderTable(workloads: readonly Workload[], rows: readonly ReportRow[], ids: readonly CandidateId[]): string {
  const header = ['', ...ids, 'to reach', ''];
  const body = rows.map((row, index) => [
    workloads[index]?.title ?? row.workload,
    ...ids.map((id) => renderFigure(row, id)),
    row.targetRatio === null ? '' : `${row.targetRatio} x`,
    row.reached === null ? '' : row.reached ? 'reached' : 'missed',
  ]);
  const widths = header.map((_, column) => Math.max(...[header, ...body].map((line) => line[column]!.length)));
  const line = (cells: readonly string[]): string =>
    cells.map((cell, column) => column === 0 || column === cells.length - 1 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!)).join('  ').trimEnd();
  return [line(header), widths.map((width) => '-'.repeat(width)).join('  '), ...body.map(line)].join('\n');
}

function renderFigure(row: ReportRow, id: CandidateId): string {
  const figure = row.figures[id];
  if (figure === undefined) return '-';
  const amount = row.unit === 'IOPS' ? `${(figure.median / THOUSAND).toFixed(1)} k` : `${Math.round(figure.median / MILLION)} MB/s`;
  return id === BASELINE || figure.ratio === null ? amount : `${amount} (${figure.ratio.toFixed(1)} x)`;
}
