/**
 * Checks on values that come out of SQLite. Its integers have 64 bits, a double is exact to 53: a value beyond that
 * was not written by this program, and the database is damaged.
 */
import { OffshootError } from '../errors.js';

export function safeInteger(value: number, column: string): number {
  if (!Number.isSafeInteger(value)) throw unusable(column, String(value));
  return value;
}

export function safeIntegerOrNull(value: number | null, column: string): number | null {
  return value === null ? null : safeInteger(value, column);
}

/** The JSON text of a column, parsed. */
export function parsedJson(text: string, column: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch (thrown) {
    throw unusable(column, text.slice(0, 100), thrown);
  }
}

function unusable(column: string, value: string, cause?: unknown): OffshootError {
  return new OffshootError(
    'store-damaged',
    `the store's database holds a value in ${column} that this program never writes (${value}): restore offshoot.db from a backup`,
    { column },
    cause,
  );
}
