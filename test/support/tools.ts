/**
 * What a test needs of the machine: programs and devices. In CI something missing is a failure; at a desk the test says
 * what it misses and is left out.
 */
import { accessSync, constants, existsSync } from 'node:fs';
import { delimiter, join } from 'node:path';

const EXTRA_DIRECTORIES = ['/usr/sbin', '/sbin', '/usr/bin', '/bin'];

/** For `describe.skipIf(lacks('fio', '/dev/fuse'))`. Names with a slash are files. */
export function lacks(...needed: readonly string[]): boolean {
  const missing = needed.filter((each) => (each.includes('/') ? !existsSync(each) : findProgram(each) === null));
  if (missing.length === 0) return false;
  const message = `missing on this machine: ${missing.join(', ')}; ./scripts/test installs what the tests need`;
  if (inCi()) throw new Error(message);
  process.stderr.write(`${message}: tests that need it are left out\n`);
  return true;
}

export function inCi(): boolean {
  const ci = process.env['CI'];
  return ci === 'true' || ci === '1';
}

export function findProgram(name: string): string | null {
  const directories = [...(process.env['PATH'] ?? '').split(delimiter), ...EXTRA_DIRECTORIES];
  for (const directory of directories) {
    const file = join(directory, name);
    try {
      accessSync(file, constants.X_OK);
      return file;
    } catch {
      // Not here: the next directory may have it.
    }
  }
  return null;
}
