/**
 * How much room the store has, said before it is used up: in `status`, in the metrics, and once in the log for each threshold that
 * is crossed.
 *
 * Main thread; looks every few seconds, and when somebody asks. A threshold that was crossed counts as crossed until there is a
 * tenth more than it asks for, so that a store that hovers there does not fill the log. That the store is *full* is not decided here:
 * `blockstore/space-reserve.ts` does that, and refuses what would take room.
 */
import fs from 'node:fs';

import type { Store } from '../../blockstore/store.js';
import { thresholdBytes, type DaemonPolicy, type SpaceThreshold } from '../control/policy.js';

/** In the order of urgency. `full`: what needs room is refused with ENOSPC. */
export const SPACE_LEVELS = ['ok', 'low', 'critical', 'full'] as const;
export type SpaceLevel = (typeof SPACE_LEVELS)[number];

export interface SpaceState {
  readonly level: SpaceLevel;
  readonly totalBytes: number;
  /** Free for what guests write; 0 while the store is full, although metadata still has room. */
  readonly freeBytes: number;
  /** Kept back for metadata just now; 0 while that is given up. */
  readonly reservedBytes: number;
  /** Virtual sizes of all disks and files together. */
  readonly virtualBytes: number;
}

export interface SpaceLogger {
  warn(context: object, message: string): void;
  error(context: object, message: string): void;
}

export interface SpaceWatchOptions {
  readonly store: Pick<Store, 'space' | 'meta'>;
  readonly storeDir: string;
  readonly policy: Pick<DaemonPolicy, 'spaceWarning' | 'spaceCritical'>;
  readonly logger: SpaceLogger;
  /** Size and free bytes of the file system; tests put their own here. */
  readonly measure?: () => { readonly totalBytes: number; readonly freeBytes: number };
}

const LOOK_INTERVAL_MS = 5000;
/** Free space must exceed a threshold by this factor before it counts as not crossed any more. */
const RELIEF = 1.1;

export class SpaceWatch {
  readonly #options: SpaceWatchOptions;
  readonly #measure: NonNullable<SpaceWatchOptions['measure']>;
  #level: SpaceLevel = 'ok';
  #timer: NodeJS.Timeout | undefined;

  constructor(options: SpaceWatchOptions) {
    this.#options = options;
    this.#measure = options.measure ?? (() => {
      const { bsize, blocks, bavail } = fs.statfsSync(options.storeDir);
      return { totalBytes: blocks * bsize, freeBytes: bavail * bsize };
    });
  }

  start(): void {
    this.look();
    this.#timer = setInterval(() => { this.look(); }, LOOK_INTERVAL_MS);
    this.#timer.unref();
  }

  close(): void {
    clearInterval(this.#timer);
  }

  /** Looks, says what has changed, and gives what is so now. */
  look(): SpaceState {
    const { store } = this.#options;
    const { totalBytes, freeBytes } = this.#measure();
    const { isFull, reservedBytes } = store.space();
    const level: SpaceLevel = isFull ? 'full' : this.#levelAt(freeBytes, totalBytes);
    const state: SpaceState = { level, totalBytes, freeBytes: isFull ? 0 : freeBytes, reservedBytes, virtualBytes: store.meta.nodes.virtualBytes() };
    const before = this.#level;
    this.#level = level;
    if (level !== before) this.#say(before, state);
    return state;
  }

  /** What an administrator should read, or null when there is room enough. */
  advice(state: SpaceState): string | null {
    const { policy } = this.#options;
    const left = `${((state.freeBytes / state.totalBytes) * 100).toFixed(1)} % (${Math.floor(state.freeBytes / 1024 ** 2)} MiB)`;
    const room = 'remove what is not needed (offshoot rm), or make its file system larger';
    switch (state.level) {
      case 'ok': return null;
      case 'full': return `the store is full: writes that need room get ENOSPC, and QEMU pauses guests that write (werror=enospc); ${room}, then let paused guests go on (virsh resume, or cont)`;
      case 'critical': return `the store's file system has ${left} left, less than the ${shown(policy.spaceCritical)} of --space-critical: writes of guests will fail when it is full; ${room} now`;
      case 'low': return `the store's file system has ${left} left, less than the ${shown(policy.spaceWarning)} of --space-warning: writes of guests will fail when it is full; ${room}`;
    }
  }

  #levelAt(freeBytes: number, totalBytes: number): Exclude<SpaceLevel, 'full'> {
    const { policy } = this.#options;
    const before = SPACE_LEVELS.indexOf(this.#level);
    const isBelow = (threshold: SpaceThreshold, level: SpaceLevel): boolean =>
      freeBytes < thresholdBytes(threshold, totalBytes) * (before >= SPACE_LEVELS.indexOf(level) ? RELIEF : 1);
    if (isBelow(policy.spaceCritical, 'critical')) return 'critical';
    return isBelow(policy.spaceWarning, 'low') ? 'low' : 'ok';
  }

  #say(before: SpaceLevel, state: SpaceState): void {
    const { logger } = this.#options;
    const fields = { spaceLevel: state.level, before, freeBytes: state.freeBytes, totalBytes: state.totalBytes, virtualBytes: state.virtualBytes };
    const worse = SPACE_LEVELS.indexOf(state.level) > SPACE_LEVELS.indexOf(before);
    if (!worse) logger.warn(fields, state.level === 'ok' ? 'the store has room enough again' : `the store has a little more room: ${this.advice(state) ?? ''}`);
    else if (state.level === 'low') logger.warn(fields, this.advice(state) ?? '');
    else logger.error(fields, this.advice(state) ?? '');
  }
}

function shown({ unit, value }: SpaceThreshold): string {
  return unit === 'percent' ? `${value} %` : `${Math.floor(value / 1024 ** 2)} MiB`;
}
