/** The arithmetic of the stall benchmark. */
export interface Distribution {
  readonly p50Ms: number;
  readonly p99Ms: number;
  readonly maxMs: number;
}

export interface StallSummary {
  readonly kills: number;
  /** Between two answers that a guest got. */
  readonly client: Distribution;
  /** As the holder says it. */
  readonly holder: Distribution;
  readonly targetP99Ms: number;
  readonly reached: boolean;
}

/** The smallest value that at least `percent` of the values do not exceed. */
export function percentile(values: readonly number[], percent: number): number {
  if (values.length === 0) return Number.NaN;
  const ordered = [...values].sort((a, b) => a - b);
  return ordered[Math.max(0, Math.ceil((percent / 100) * ordered.length) - 1)]!;
}

export function summarise(client: readonly number[], holder: readonly number[], targetP99Ms: number): StallSummary {
  const of = (values: readonly number[]): Distribution => ({ p50Ms: percentile(values, 50), p99Ms: percentile(values, 99), maxMs: Math.max(...values) });
  return { kills: client.length, client: of(client), holder: of(holder), targetP99Ms, reached: percentile(client, 99) < targetP99Ms };
}
