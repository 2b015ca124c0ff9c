/**
 * Random numbers that repeat: the same seed gives the same run.
 *
 * The seed is taken from OFFSHOOT_SEED, or drawn and printed by the test, so that a failure can be run again.
 */
export interface Random {
  readonly seed: number;
  /** A whole number from 0 to `below` - 1. */
  below(below: number): number;
  /** A whole number from `from` to `to`, both included. */
  between(from: number, to: number): number;
  chance(probability: number): boolean;
  pick<T>(list: readonly T[]): T;
}

const SPAN = 2 ** 32;

/** mulberry32: small, and good enough to choose offsets. */
export function createRandom(seed: number): Random {
  let state = seed % SPAN;
  const next = (): number => {
    state = (state + 0x6d2b79f5) % SPAN;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / SPAN;
  };
  const below = (limit: number): number => Math.floor(next() * limit);
  return {
    seed,
    below,
    between: (from, to) => from + below(to - from + 1),
    chance: (probability) => next() < probability,
    pick<T>(list: readonly T[]): T {
      if (list.length === 0) throw new Error('nothing to pick from');
      return list[below(list.length)] as T;
    },
  };
}

export function seedFromEnvironment(): number {
  const given = process.env['OFFSHOOT_SEED'];
  if (given === undefined || given === '') return Math.floor(Math.random() * SPAN);
  const seed = Number(given);
  if (!Number.isSafeInteger(seed) || seed < 0) throw new Error(`OFFSHOOT_SEED must be a whole number, not '${given}'`);
  return seed;
}
