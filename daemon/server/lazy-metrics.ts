/**
 * The daemon's figures, loaded after the start: nobody asks for them in its first moments, and their library takes a while to load.
 *
 * Main thread. What has to be counted as it happens (commits) is kept from the first on and handed over when they are loaded, so that the
 * figures are the same as if they had been there all the time.
 */
import type { DaemonStatus } from '../control/schemas.js';
import type { MetricSources, Metrics } from './metrics.js';

interface Commit {
  readonly durationMs: number;
  readonly isWhole: boolean;
}

export class LazyMetrics {
  readonly #sources: Omit<MetricSources, 'status'>;
  #status: (() => DaemonStatus) | null = null;
  #loading: Promise<Metrics> | null = null;
  #metrics: Metrics | null = null;
  /** Commits so far; not many, for they are a second apart and the figures are loaded soon. */
  #early: Commit[] = [];

  constructor(sources: Omit<MetricSources, 'status'>) {
    this.#sources = sources;
  }

  committed(durationMs: number, isWhole: boolean): void {
    if (this.#metrics === null) this.#early.push({ durationMs, isWhole });
    else this.#metrics.committed(durationMs, isWhole);
  }

  /** Before the first `load`. */
  statusFrom(status: () => DaemonStatus): void {
    this.#status = status;
  }

  /** Once; later calls get what the first one made. */
  async load(): Promise<Metrics> {
    return await (this.#loading ??= this.#make());
  }

  async #make(): Promise<Metrics> {
    const status = this.#status;
    if (status === null) throw new Error('figures were asked for before there was a status');
    const { Metrics } = await import('./metrics.js');
    const metrics = new Metrics({ ...this.#sources, status });
    for (const { durationMs, isWhole } of this.#early) metrics.committed(durationMs, isWhole);
    this.#early = [];
    this.#metrics = metrics;
    return metrics;
  }
}
