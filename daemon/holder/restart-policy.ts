/**
 * When a server that ended is started again: at once, or after a back-off; and the crash loop that ends it.
 *
 * Pure: knows only the times that it is told, from a clock that never goes backwards. Guests wait for the next server, so one that
 * served is followed at once. One that ended before it was ready would most likely end the same way again: then the wait doubles. Too
 * many ends within a window mean that starting again does not help: the holder then stays down with the connection
 * kept, so that guests wait rather than fail, until an operator asks for another try.
 */
export interface RestartLimits {
  /** The wait after a second server in a row that was never ready; after the first there is none. */
  readonly firstDelayMs: number;
  readonly delayMsMax: number;
  readonly crashesMax: number;
  readonly crashWindowMs: number;
}

export const RESTART_LIMITS: RestartLimits = {
  firstDelayMs: 100,
  delayMsMax: 5_000,
  crashesMax: 5,
  crashWindowMs: 60_000,
};

const CRASHES_VARIABLE = 'OFFSHOOT_CRASHES_MAX';

/** The limits, with the number of crashes from the environment: tests and benchmarks kill far more often than once in twelve seconds. */
export function restartLimits(environment: Readonly<Record<string, string | undefined>> = process.env): RestartLimits {
  const asked = Number(environment[CRASHES_VARIABLE]);
  return Number.isSafeInteger(asked) && asked > 0 ? { ...RESTART_LIMITS, crashesMax: asked } : RESTART_LIMITS;
}

export type RestartDecision =
  | { readonly action: 'restart'; readonly delayMs: number }
  | { readonly action: 'stay-down'; readonly crashes: number };

export class RestartPolicy {
  readonly #nowMs: () => number;
  readonly #limits: RestartLimits;
  #delayMs = 0;
  #crashesAtMs: readonly number[] = [];

  constructor(nowMs: () => number, limits: RestartLimits = RESTART_LIMITS) {
    this.#nowMs = nowMs;
    this.#limits = limits;
  }

  /** A server was ready: if it ends, the next one may follow at once. */
  serverReady(): void {
    this.#delayMs = 0;
  }

  serverEnded(): RestartDecision {
    const nowMs = this.#nowMs();
    this.#crashesAtMs = [...this.#crashesAtMs.filter((atMs) => nowMs - atMs < this.#limits.crashWindowMs), nowMs];
    if (this.#crashesAtMs.length >= this.#limits.crashesMax) {
      return { action: 'stay-down', crashes: this.#crashesAtMs.length };
    }
    const delayMs = this.#delayMs;
    this.#delayMs = Math.min(Math.max(delayMs * 2, this.#limits.firstDelayMs), this.#limits.delayMsMax);
    return { action: 'restart', delayMs };
  }

  /** An operator asked for another try: what happened before does not count against it. */
  forget(): void {
    this.#crashesAtMs = [];
    this.#delayMs = 0;
  }
}
