/**
 * What all programs of `scripts/bench` have in common: where they work, how options are read, and how a run ends.
 *
 * Exit codes: 0 when everything was measured, whatever the figures are; 2 for wrong options; anything else is a failure. Whether a target was
 * reached stands in the result: what a busy machine misses is no error, and a script that cares asks for `reached` with --json.
 */
import type { ParseArgsConfig } from 'node:util';
import { parseArgs } from 'node:util';

export interface BenchOptions {
  readonly directory: string;
  readonly cliEntry: string;
  readonly quick: boolean;
  readonly json: boolean;
}

const UNITS: Readonly<Record<string, number>> = { '': 1, K: 1024, M: 1024 ** 2, G: 1024 ** 3 };
const SIZE_BYTES_MIN = 64 * 1024 ** 2;

/** What scripts/bench hands to each program. */
const given = {
  'work-dir': { type: 'string' }, 'cli-entry': { type: 'string' }, quick: { type: 'boolean', default: false }, json: { type: 'boolean', default: false },
} as const satisfies ParseArgsConfig['options'];

/** `names` are options with a value, beside the common ones. */
export function readOptions<const T extends readonly string[]>(names: T): { readonly common: BenchOptions; readonly values: Readonly<Partial<Record<T[number], string>>> } {
  const { values } = parseArgs({ options: { ...given, ...Object.fromEntries(names.map((name) => [name, { type: 'string' } as const])) } });
  const { 'work-dir': directory, 'cli-entry': cliEntry, quick, json } = values as { readonly 'work-dir'?: string; readonly 'cli-entry'?: string; readonly quick: boolean; readonly json: boolean };
  if (directory === undefined || cliEntry === undefined) throw new Error('--work-dir and --cli-entry are missing: start this by scripts/bench');
  return { common: { directory, cliEntry, quick, json }, values: values as Partial<Record<T[number], string>> };
}

export function wholeNumber(text: string, name: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new Error(`--${name} must be a whole number from 1, not '${text}'`);
  return value;
}

/** Of --size, in bytes. */
export function sizeOption(text: string): number {
  const match = /^([0-9]+)([KMG]?)$/u.exec(text);
  const bytes = Number(match?.[1] ?? Number.NaN) * (UNITS[match?.[2] ?? ''] ?? 1);
  if (!(bytes >= SIZE_BYTES_MIN) || bytes % 1024 ** 2 !== 0) throw new Error(`--size must be whole MiB, 64M at least, as in 512M or 1G, not '${text}'`);
  return bytes;
}

/** Standard output holds the result, progress goes to standard error. */
export function progress(text: string): void {
  process.stderr.write(`${text}\n`);
}

export function printResult(lines: readonly string[]): void {
  process.stdout.write(`${lines.join('\n')}\n`);
}

export function verdict(reached: boolean): string {
  return reached ? 'reached' : 'missed';
}

/** `read` throws what is wrong with the options. */
export async function runBenchmark<T>(read: () => T, run: (options: T) => Promise<void>): Promise<void> {
  let options: T;
  try {
    options = read();
  } catch (error) {
    progress(`bench: ${error instanceof Error ? error.message : String(error)}; scripts/bench --help shows the options`);
    process.exit(2);
  }
  await run(options);
}
