/**
 * What the fault tests do to a store: a fixed list of operations, each of which a guest or an operator can ask for.
 *
 * Short, and it passes every place where the store asks the operating system for something that lasts: import, clone of closed
 * and open disks, first touches in whole and in part, flushes with and without news, discards, copy-on-read, a fill to its
 * end, both directions of a resize, a growing file, removal, commits by the clock, checkpoints, the end. The same list is
 * carried out by the actor and, as a model, by the test; so it is data, and the same each time.
 */
import { BLOCK_BYTES } from '../../../blockstore/units.js';

export type Operation =
  | { readonly kind: 'open' | 'commit' | 'close' }
  | { readonly kind: 'checkpoint'; readonly idle: boolean }
  | { readonly kind: 'import'; readonly disk: string; readonly blocks: number; readonly seed: number }
  | { readonly kind: 'create'; readonly disk: string }
  | { readonly kind: 'clone'; readonly disk: string; readonly target: string; readonly copyOnRead: boolean }
  | { readonly kind: 'acquire' | 'release' | 'flush' | 'read' | 'fill' | 'remove'; readonly disk: string }
  | { readonly kind: 'write'; readonly disk: string; readonly offsetBytes: number; readonly lengthBytes: number; readonly seed: number }
  | { readonly kind: 'discard'; readonly disk: string; readonly offsetBytes: number; readonly lengthBytes: number }
  | { readonly kind: 'resize'; readonly disk: string; readonly sizeBytes: number };

/** What became of an operation: `ok`, an error's kind, `skipped` (its disk was not there), or `unknown`: the process died in it. */
export type Outcome = string;

const B = BLOCK_BYTES;
let nextSeed = 100;

function write(disk: string, offsetBytes: number, lengthBytes: number): Operation {
  nextSeed += 1;
  return { kind: 'write', disk, offsetBytes, lengthBytes, seed: nextSeed };
}

function clone(disk: string, target: string, copyOnRead = false): Operation {
  return { kind: 'clone', disk, target, copyOnRead };
}

export const IMPORT_BLOCKS = 16;

export const WORKLOAD: readonly Operation[] = [
  { kind: 'open' },
  { kind: 'import', disk: 'base', blocks: IMPORT_BLOCKS, seed: 1 },
  clone('base', 'c1'),
  clone('base', 'c2', true),
  { kind: 'acquire', disk: 'c1' },
  // First touches: whole blocks, and parts of two.
  write('c1', 0, 3 * B),
  write('c1', 5 * B + 1000, B),
  { kind: 'flush', disk: 'c1' },
  // Owned blocks only: the flush has nothing to commit.
  write('c1', B, B + 512),
  { kind: 'flush', disk: 'c1' },
  { kind: 'discard', disk: 'c1', offsetBytes: 7 * B + 512, lengthBytes: 2 * B },
  { kind: 'flush', disk: 'c1' },
  { kind: 'acquire', disk: 'c2' },
  { kind: 'read', disk: 'c2' },
  { kind: 'commit' },
  // A live clone, with something pending.
  write('c1', 10 * B, B),
  clone('c1', 'c3'),
  write('c1', 2 * B, 2 * B),
  { kind: 'flush', disk: 'c1' },
  { kind: 'acquire', disk: 'c3' },
  write('c3', 12 * B, B),
  { kind: 'fill', disk: 'c3' },
  write('c3', 13 * B, B),
  { kind: 'flush', disk: 'c3' },
  { kind: 'resize', disk: 'c1', sizeBytes: 20 * B },
  write('c1', 18 * B, B),
  { kind: 'flush', disk: 'c1' },
  { kind: 'checkpoint', idle: false },
  // Cut, then longer again: what was cut off must not come back.
  { kind: 'resize', disk: 'c3', sizeBytes: 9 * B },
  { kind: 'resize', disk: 'c3', sizeBytes: 16 * B },
  { kind: 'read', disk: 'c3' },
  { kind: 'create', disk: 'log' },
  { kind: 'acquire', disk: 'log' },
  write('log', 0, 700),
  write('log', 700, 5000),
  { kind: 'flush', disk: 'log' },
  { kind: 'release', disk: 'c2' },
  { kind: 'remove', disk: 'c2' },
  { kind: 'remove', disk: 'base' },
  // Cut last, with a write and a flush behind it: whether it was cut shows.
  { kind: 'resize', disk: 'c1', sizeBytes: 17 * B },
  write('c1', 16 * B, B),
  write('c1', 4 * B, B),
  { kind: 'flush', disk: 'c1' },
  write('c1', 6 * B, B),
  { kind: 'read', disk: 'c1' },
  { kind: 'release', disk: 'c1' },
  { kind: 'flush', disk: 'c1' },
  { kind: 'checkpoint', idle: true },
  { kind: 'close' },
];

/** How an operation is called in a table. */
export function nameOf(operation: Operation): string {
  return 'disk' in operation ? `${operation.kind} ${operation.disk}` : operation.kind;
}

/** Operations of one shape pass the same call sites for the same reason. */
export function shapeOf(operation: Operation): string {
  switch (operation.kind) {
    case 'acquire': return operation.disk === 'log' ? 'acquire log' : 'acquire';
    case 'flush': return operation.disk === 'log' ? 'flush log' : 'flush';
    case 'checkpoint': return `checkpoint ${String(operation.idle)}`;
    case 'resize': return `resize ${operation.disk} ${operation.sizeBytes}`;
    case 'write': return operation.offsetBytes === B ? 'write owned' : `write ${operation.disk === 'log' ? `log ${operation.offsetBytes}` : operation.lengthBytes % B}`;
    default: return nameOf(operation);
  }
}
