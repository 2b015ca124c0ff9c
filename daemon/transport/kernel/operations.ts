/**
 * The opcode table: every operation of the protocol that is served or refused by name, one row each. What is not in it is
 * ENOSYS.
 */
import type { Operation } from './operation.js';
import { attributeOperations } from './operations-attributes.js';
import { directoryOperations } from './operations-directories.js';
import { fileOperations } from './operations-files.js';
import { nameOperations } from './operations-names.js';
import { sessionOperations } from './operations-session.js';

export const operations: ReadonlyMap<number, Operation> = tableOf([
  ...sessionOperations,
  ...nameOperations,
  ...attributeOperations,
  ...fileOperations,
  ...directoryOperations,
]);

function tableOf(rows: readonly Operation[]): ReadonlyMap<number, Operation> {
  const table = new Map(rows.map((row) => [row.opcode, row]));
  if (table.size !== rows.length) throw new Error('two operations have one opcode');
  return table;
}
