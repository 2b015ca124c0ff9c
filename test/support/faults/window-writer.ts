/**
 * A guest that writes until it is told to end or cannot go on: `window-writer.js DISK BLOCKS FIRST-VERSION SEED`.
 *
 * Each write puts a new version into one to four blocks; a flush comes now and then. What it does it says by plain writes, before
 * and after: `w BLOCK COUNT VERSION`, `W` once that is acknowledged, `f`, `F` once that flush is. After an error it says `e CODE` and
 * ends: the device is gone.
 */
import fs from 'node:fs';

import { BLOCK_BYTES } from '../../../blockstore/units.js';
import { versionedBlock } from './versions.js';

const [path = '', blocks = '0', first = '1', seed = '1'] = process.argv.slice(2);
const COUNT_MAX = 4;
const FLUSH_EVERY = 7;

let random = Number(seed);
function below(limit: number): number {
  random = (Math.imul(random, 1103515245) + 12345) >>> 0;
  return Math.floor((random / 2 ** 32) * limit);
}

function say(line: string): void {
  fs.writeSync(1, `${line}\n`);
}

try {
  const fd = fs.openSync(path, 'r+');
  for (let version = Number(first); ; version += 1) {
    const count = 1 + below(COUNT_MAX);
    const block = below(Number(blocks) - count);
    const data = Buffer.concat(Array.from({ length: count }, (_, i) => versionedBlock(block + i, version)));
    say(`w ${block} ${count} ${version}`);
    fs.writeSync(fd, data, 0, data.length, block * BLOCK_BYTES);
    say('W');
    if (below(FLUSH_EVERY) > 0) continue;
    say('f');
    fs.fsyncSync(fd);
    say('F');
  }
} catch (error) {
  say(`e ${(error as NodeJS.ErrnoException).code ?? String(error)}`);
}
