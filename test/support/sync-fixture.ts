/**
 * Two clones of one image with fdatasync in the test's hand: held until the test answers, or failed as by a dying device.
 */
import fs from 'node:fs';
import { vi } from 'vitest';

import type { NodeRow } from '../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { TestStore, everyThird, patterned } from './blockstore-fixture.js';
import { patternBytes } from './model/pattern.js';

export const SIZE_BYTES = 12 * BLOCK_BYTES + 100;
export const SOURCE = patterned(1, SIZE_BYTES, everyThird);
export const BLOCK = patternBytes(2, 0, BLOCK_BYTES);

/** The syncs that were asked for and not answered. */
export interface HeldSync {
  readonly fd: number;
  /** Lets the sync happen, or fail. */
  answer(error?: NodeJS.ErrnoException): Promise<void>;
}

export function holdSyncs(): HeldSync[] {
  const held: HeldSync[] = [];
  const real = fs.fdatasync;
  vi.spyOn(fs, 'fdatasync').mockImplementation((fd, callback) => {
    held.push({
      fd,
      answer: async (error) => {
        await new Promise<void>((resolve) => {
          if (error === undefined) real(fd, (failure) => { callback(failure); resolve(); });
          else { callback(error); resolve(); }
        });
        // What waits for the answer goes on in promises.
        await new Promise((resolve) => { setImmediate(resolve); });
      },
    });
  });
  return held;
}

export function ioError(code = 'EIO'): NodeJS.ErrnoException {
  return Object.assign(new Error(`${code}: made by the test, fdatasync`), { code, errno: -5, syscall: 'fdatasync' });
}

export function failSyncsOnce(): void {
  vi.spyOn(fs, 'fdatasync').mockImplementationOnce((_fd, callback) => { callback(ioError()); });
}

export interface Setting {
  readonly fixture: TestStore;
  readonly clone: NodeRow;
  readonly other: NodeRow;
}

export function openClones(): Setting {
  const fixture = new TestStore();
  const base = fixture.image('base', SOURCE);
  const [clone, other] = [fixture.clone(base, 'clone'), fixture.clone(base, 'other')];
  fixture.acquire(clone);
  fixture.acquire(other);
  return { fixture, clone, other };
}

export function committed(fixture: TestStore, node: NodeRow): number[] {
  return fixture.committedBlocks(fixture.layer(node).id);
}
