/**
 * The daemon's figures for Prometheus and its kin: `GET /metrics`, `offshoot metrics`.
 *
 * Everything is read when somebody asks, from what is there anyhow: the file system, the shared memory, rows, the kernel's own count of
 * requests that wait. Only commits are counted as they happen, on the main thread. Nothing is added to the path of a guest's request, and no
 * figure belongs to a single disk: a store has thousands, and a label for each would make as many series.
 *
 * prom-client does the format. Its own figures of the process are left out: the server is started anew now and then, and node
 * exporters know processes better. A counter begins at 0 with each server, as counters may.
 */
import fs from 'node:fs';
import path from 'node:path';

import { Counter, Gauge, Histogram, Registry } from 'prom-client';

import { JOURNAL_CAPACITY } from '../../blockstore/hot/journal.js';
import type { Store } from '../../blockstore/store.js';
import type { DaemonStatus, MetricInfo } from '../control/schemas.js';
import { SPACE_LEVELS, type SpaceState } from './space-watch.js';

export interface MetricSources {
  readonly store: Store;
  readonly storeDir: string;
  /** Threads with a journal. */
  readonly threads: number;
  readonly status: () => DaemonStatus;
  readonly space: () => SpaceState;
  /** Bytes that fills have copied since this server began. */
  readonly fillBytes: () => number;
  /** Requests of guests that wait for an answer; null: not known. */
  readonly requestsWaiting: () => number | null;
}

const COMMIT_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10];

export class Metrics {
  readonly #registry = new Registry();
  readonly #commitSeconds: Histogram;
  readonly #commitFailures: Counter;
  #status: DaemonStatus | null = null;
  #space: SpaceState | null = null;

  constructor(given: MetricSources) {
    // Each is asked once for all figures of one answer.
    const sources: MetricSources = {
      ...given,
      status: () => (this.#status ??= given.status()),
      space: () => (this.#space ??= given.space()),
    };
    const { store } = sources;
    const registers = [this.#registry];
    this.#commitSeconds = new Histogram({ name: 'offshoot_commit_seconds', help: 'Time of a commit: fdatasync of what it covers, and its transaction', buckets: COMMIT_SECONDS, registers });
    this.#commitFailures = new Counter({ name: 'offshoot_commit_failures_total', help: 'Commits that failed, in whole or for some disks', registers });
    const gauge = (name: string, help: string, value: () => number | null): void => {
      const made: Gauge = new Gauge({
        name: `offshoot_${name}`, help, registers,
        collect: () => {
          const now = value();
          // A series without a value says "not known"; 0 would be a lie.
          if (now === null) made.remove();
          else made.set(now);
        },
      });
    };
    gauge('store_bytes', 'Size of the file system that holds the store', () => sources.space().totalBytes);
    gauge('store_free_bytes', 'What guests can still write; 0 while the store is full', () => sources.space().freeBytes);
    gauge('store_reserved_bytes', 'Space kept back for metadata; 0 while it is given up', () => sources.space().reservedBytes);
    gauge('store_full', '1 while writes that need room are refused', () => (sources.space().level === 'full' ? 1 : 0));
    gauge('store_space_level', `Room in the store: ${SPACE_LEVELS.map((level, i) => `${i} ${level}`).join(', ')}`, () => SPACE_LEVELS.indexOf(sources.space().level));
    gauge('virtual_bytes', 'Virtual sizes of all disks and files, snapshots left out', () => sources.space().virtualBytes);
    gauge('disks', 'Disks in the store, those in snapshots left out', () => sources.status().disksTotal);
    gauge('snapshots', 'Snapshots in the store', () => sources.status().snapshotsTotal);
    gauge('containers', 'Containers in the store', () => sources.status().containersTotal);
    gauge('layers', 'Layers in the store', () => sources.status().layersTotal);
    gauge('disks_open', 'Disks and files that somebody has open', () => sources.status().disksOpen);
    gauge('disks_faulted', 'Disks that take no more writes', () => store.meta.nodes.faulted().length);
    gauge('jobs_running', 'Fills and imports under way', () => store.meta.jobs.list({ states: ['running'] }).length);
    gauge('restarts', 'Times that the server was restarted under this mount', () => sources.status().restarts);
    gauge('last_stall_seconds', 'How long guests waited during the last restart', () => { const ms = sources.status().lastStallMs; return ms === null ? null : ms / 1000; });
    gauge('start_time_seconds', 'When this server began to serve, since the epoch', () => Date.parse(sources.status().startedAt) / 1000);
    gauge('requests_waiting', 'Requests to the mount that wait for an answer, by the kernel\'s count', sources.requestsWaiting);
    gauge('journal_fill_ratio', 'How full the fullest journal is; a full one makes writers wait for a commit', () => journalFill(store, sources.threads));
    gauge('wal_bytes', 'Size of the database\'s write-ahead log', () => fs.statSync(path.join(sources.storeDir, 'offshoot.db-wal'), { throwIfNoEntry: false })?.size ?? 0);
    const fillBytes: Counter = new Counter({
      name: 'offshoot_fill_bytes_total', help: 'Bytes that fills have copied', registers,
      collect: () => {
        fillBytes.reset();
        fillBytes.inc(sources.fillBytes());
      },
    });
    new Gauge({ name: 'offshoot_info', help: 'Versions; always 1', labelNames: ['version', 'node', 'sqlite', 'transport'], registers, collect() {
      const { version, nodeVersion, sqliteVersion, transport } = sources.status();
      this.set({ version, node: nodeVersion, sqlite: sqliteVersion, transport }, 1);
    } });
  }

  committed(durationMs: number, isWhole: boolean): void {
    this.#commitSeconds.observe(durationMs / 1000);
    if (!isWhole) this.#commitFailures.inc();
  }

  /** In the text format of Prometheus. */
  async text(): Promise<string> {
    this.#forget();
    return await this.#registry.metrics();
  }

  #forget(): void {
    this.#status = null;
    this.#space = null;
  }

  async list(): Promise<readonly MetricInfo[]> {
    this.#forget();
    const found = await this.#registry.getMetricsAsJSON();
    return found.map(({ name, help, type, values }) => ({
      name, help, type: String(type),
      values: values.map((each) => ({ name: ('metricName' in each ? each.metricName as string | undefined : undefined) ?? name, labels: Object.fromEntries(Object.entries(each.labels).map(([key, label]) => [key, String(label)])), value: each.value })),
    }));
  }
}

function journalFill(store: Store, threads: number): number {
  const { shared } = store.context;
  let most = 0;
  for (let thread = 0; thread < threads; thread += 1) most = Math.max(most, (shared.journalTail(thread) - shared.journalHead(thread)) >>> 0);
  return most / JOURNAL_CAPACITY;
}
