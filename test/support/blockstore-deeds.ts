/** What threads may do to the same two blocks, in how many steps, and all orders of such steps: for the tests of interleavings. */
import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { ActorOrder } from './blockstore-actors.js';
import { Kind } from './blockstore-actor-orders.js';

/** The blocks that the actors of one order meet on: two, both data of the source or both holes. */
export const REGION_BYTES = 2 * BLOCK_BYTES;

export interface Deed {
  readonly name: string;
  readonly kind: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** Steps it takes while the region is un-owned. */
  readonly steps: number;
}

export const THREAD_DEEDS: readonly Deed[] = [
  { name: 'write of the first block', kind: Kind.WRITE, offsetBytes: 0, lengthBytes: BLOCK_BYTES, steps: 1 },
  { name: 'write of both blocks', kind: Kind.WRITE, offsetBytes: 0, lengthBytes: 2 * BLOCK_BYTES, steps: 1 },
  { name: 'write behind a head', kind: Kind.WRITE, offsetBytes: 1000, lengthBytes: 3096, steps: 2 },
  { name: 'write before a tail', kind: Kind.WRITE, offsetBytes: BLOCK_BYTES, lengthBytes: 2900, steps: 2 },
  { name: 'write across both', kind: Kind.WRITE, offsetBytes: 2000, lengthBytes: 4500, steps: 3 },
  { name: 'discard of the second block', kind: Kind.DISCARD, offsetBytes: BLOCK_BYTES, lengthBytes: BLOCK_BYTES, steps: 1 },
  { name: 'copy-on-read', kind: Kind.READ, offsetBytes: 0, lengthBytes: REGION_BYTES, steps: 2 },
  { name: 'fill', kind: Kind.FILL, offsetBytes: 0, lengthBytes: 0, steps: 2 },
];

/** Each actor does a deed in a slightly different place, so that nobody's bytes cover another's. */
export function deedOf(deed: Deed, slot: number): Deed {
  if (deed.kind !== Kind.WRITE || deed.steps === 1) return deed;
  if (deed.offsetBytes === BLOCK_BYTES) return { ...deed, lengthBytes: deed.lengthBytes - 700 * slot };
  return { ...deed, offsetBytes: deed.offsetBytes + 500 * slot, lengthBytes: deed.lengthBytes - 500 * slot };
}

/** All orders of the actors' steps. */
export function schedules(steps: readonly number[]): readonly number[][] {
  if (steps.every((left) => left === 0)) return [[]];
  return steps.flatMap((left, slot) => {
    if (left === 0) return [];
    return schedules(steps.map((other, i) => (i === slot ? other - 1 : other))).map((rest) => [slot, ...rest]);
  });
}

/** Does to `model`, whose first byte lies at `base`, what the order does. */
export function applyDeed(model: Buffer, order: ActorOrder, base: number): void {
  if (order.kind !== Kind.WRITE && order.kind !== Kind.DISCARD) return;
  const from = order.offsetBytes - base;
  model.fill(order.kind === Kind.WRITE ? order.byte! : 0, from, Math.min(model.length, from + order.lengthBytes));
}
