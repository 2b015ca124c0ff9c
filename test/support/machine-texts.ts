/**
 * Texts of machine configurations that are nearly right, and what must hold of each: for the tests of the formats and for the fuzzer.
 */
import * as fc from 'fast-check';

import { OffshootError } from '../../blockstore/errors.js';
import type { FileReference, MachineFormat, MachineIdentity } from '../../daemon/machines/format.js';

export const CLONE_UUID = '564d7b10-22be-4a6c-8f01-0123456789ab';

export function identity(macs: readonly string[], fileOf: (reference: FileReference) => string | null = () => null): MachineIdentity {
  return { name: 'web-07', uuid: CLONE_UUID, macs, fileOf };
}

/** Text that is nearly of a format: a sample with pieces cut out, doubled, swapped, and junk put in. */
export function mutated(text: string, junk: readonly string[]): fc.Arbitrary<string> {
  const piece = fc.oneof(fc.constantFrom(...junk), fc.string({ unit: 'binary', maxLength: 8 }));
  const edit = fc.record({ at: fc.nat(text.length), length: fc.nat(60), insert: fc.option(piece, { nil: '' }) });
  return fc.array(edit, { minLength: 1, maxLength: 4 })
    .map((edits) => edits.reduce((before, { at, length, insert }) => before.slice(0, at) + insert + before.slice(at + length), text));
}

/**
 * Whatever the text is: it is refused with an operating error, or read; what was read is written as it was, every key that is listed can be
 * read, setting a value to itself changes nothing, and a clone of it is again a configuration with the identity that was given.
 */
export function assertSoundOnAnything(format: MachineFormat, text: string): void {
  let document;
  try {
    document = format.parse(text);
  } catch (error) {
    if (error instanceof OffshootError && error.kind !== 'internal') return;
    throw error;
  }
  if (document.toText() !== text) throw new Error('a text that nothing changed in came out otherwise');
  const facts = document.facts();
  for (const key of document.keys()) if (document.get(key) === null) throw new Error(`the key ${key} is listed and cannot be read`);
  const macs = facts.macs.map((_, index) => `00:50:56:00:00:${index.toString(16).padStart(2, '0')}`);
  if (macs.length > 200) return;
  let after;
  try {
    document.customise(identity(macs, ({ slot }) => `/mnt/clone/${encodeURIComponent(slot)}`));
    after = format.parse(document.toText()).facts();
  } catch (error) {
    if (error instanceof OffshootError && error.kind !== 'internal') return;
    throw error;
  }
  const problems = [
    after.name === 'web-07' ? null : `name ${after.name ?? 'none'}`,
    after.uuid === CLONE_UUID ? null : `uuid ${after.uuid ?? 'none'}`,
    after.macs.join() === macs.join() ? null : `macs ${after.macs.join()}`,
    after.files.every(({ role, file }) => role === 'nvram' || file.startsWith('/mnt/clone/')) ? null : 'a file of the source',
  ].filter((problem) => problem !== null);
  if (problems.length > 0) throw new Error(`the clone has ${problems.join(', ')}`);
}
