/**
 * The benchmark's arithmetic: medians of rounds, ratios to the baseline, targets reached or missed.
 */
import { describe, expect, it } from 'vitest';

import { buildReport, median, renderTable, type Rounds } from '../../scripts/benchmark/report.js';
import { workloads } from '../../scripts/benchmark/workloads.js';

const read16 = workloads.filter((workload) => workload.id === 'random-read-4k-depth-16');

function roundsOf(figures: Readonly<Partial<Record<'raw' | 'qemu-storage-daemon' | 'kernel', readonly number[]>>>): Rounds {
  return new Map(Object.entries(figures).map(([id, values]) => [id as 'raw', new Map([['random-read-4k-depth-16', values]])]));
}

describe('the report', () => {
  it('takes the median, of an even number the mean of the two in the middle', () => {
    expect(median([9, 1, 5])).toBe(5);
    expect(median([10, 1, 4, 2])).toBe(3);
  });

  it('says reached from the target on, by medians and not by the best round', () => {
    const rows = (kernel: readonly number[]) => buildReport(read16, roundsOf({ 'qemu-storage-daemon': [50, 40, 60], kernel }));
    expect(rows([10, 150, 150])[0]).toMatchObject({ targetRatio: 3, reached: true, figures: { kernel: { median: 150, ratio: 3 } } });
    expect(rows([900, 149, 149])[0]).toMatchObject({ reached: false });
  });

  it('has no ratio and no verdict without the baseline, or without the subject', () => {
    expect(buildReport(read16, roundsOf({ raw: [7], kernel: [5] }))[0]).toMatchObject({ reached: null, figures: { kernel: { median: 5, ratio: null } } });
    expect(buildReport(read16, roundsOf({ raw: [7], 'qemu-storage-daemon': [5] }))[0]).toMatchObject({ reached: null, figures: { raw: { ratio: 1.4 } } });
  });

  it('shows a table with figures, ratios and verdicts', () => {
    const rows = buildReport(read16, roundsOf({ raw: [400_000], 'qemu-storage-daemon': [50_000], kernel: [100_000] }));
    const [header, , line] = renderTable(read16, rows, ['raw', 'qemu-storage-daemon', 'kernel']).split('\n');
    expect(header).toMatch(/raw +qemu-storage-daemon +kernel +to reach/u);
    expect(line).toMatch(/^4 KiB random read, depth 16 +400\.0 k \(8\.0 x\) +50\.0 k +100\.0 k \(2\.0 x\) +3 x +missed$/u);
  });

  it('has the targets that the project has set itself', () => {
    expect(Object.fromEntries(workloads.map((workload) => [workload.id, workload.targetRatio]))).toEqual({
      'random-read-4k-depth-1': 1.5,
      'random-read-4k-depth-16': 3,
      'sequential-read-1m-depth-4': 4,
      'random-write-4k-depth-1': null,
      'random-write-4k-depth-16': null,
      'first-touch-write-4k-depth-1': 5,
      'first-touch-write-4k-depth-16': 5,
    });
  });
});
