/**
 * What the tests of all formats of machine configurations share: the samples. What every document keeps is in `support/machine-texts.ts`, for the fuzzer has it too.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';

const FIXTURES = join(import.meta.dirname, '..', 'fixtures', 'machines');

export const SAMPLES = readdirSync(FIXTURES).sort();

export function sample(name: string): string {
  return readFileSync(join(FIXTURES, name), 'utf8');
}

/** What a call throws; a test that expects an error fails when there is none. */
export function thrown(call: () => unknown): OffshootError {
  try {
    call();
  } catch (error) {
    if (error instanceof OffshootError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}
