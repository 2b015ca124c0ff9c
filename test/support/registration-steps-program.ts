/**
 * Put into a daemon by `NODE_OPTIONS=--import`: numbers the calls that change files below a directory, and has the process killed before the one that
 * it is told, or after it. In OFFSHOOT_TEST_STEPS: `steps`, a line for each call; `kill`, `before N` or `after N`.
 */
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { join } from 'node:path';

type Call = (...args: unknown[]) => unknown;

const CHANGING = ['mkdirSync', 'symlinkSync', 'openSync', 'writeFileSync', 'fsyncSync', 'renameSync', 'unlinkSync'] as const;
const watched = process.env['OFFSHOOT_TEST_WATCHED'] ?? '';
const seat = process.env['OFFSHOOT_TEST_STEPS'] ?? '';
const append = fs.appendFileSync;
const table = fs as unknown as Record<(typeof CHANGING)[number], Call>;

function placeOf(name: string, args: readonly unknown[]): string {
  if (typeof args[0] === 'number') return fs.readlinkSync(`/proc/self/fd/${args[0]}`);
  return String(name === 'symlinkSync' ? args[1] : args[0]);
}

function dieIf(when: 'before' | 'after', step: number): void {
  let order = '';
  try {
    order = fs.readFileSync(join(seat, 'kill'), 'utf8');
  } catch {
    // Nothing is ordered.
  }
  if (order === `${when} ${step}`) process.kill(process.pid, 'SIGKILL');
}

for (const name of CHANGING) {
  const real = table[name];
  table[name] = (...args) => {
    if (!placeOf(name, args).startsWith(watched) || (name === 'openSync' && args[1] === 'r')) return real(...args);
    const file = join(seat, 'steps');
    append(file, `${name}\n`);
    const step = fs.readFileSync(file, 'utf8').split('\n').length - 1;
    dieIf('before', step);
    const result = real(...args);
    dieIf('after', step);
    return result;
  };
}
syncBuiltinESMExports();
