/** The torture run from a terminal: options, a line of progress, counts and a verdict. Started by `scripts/torture`, which builds. */
import { parseArgs } from 'node:util';

import { summaryOf, torture } from '../../test/support/torture/torture-run.js';
import { STORE_FILE_SYSTEMS } from '../../test/support/torture/torture-store.js';

const { values } = parseArgs({
  options: { minutes: { type: 'string', default: '10' }, seed: { type: 'string' }, 'store-fs': { type: 'string', default: 'ext4' }, 'cli-entry': { type: 'string', default: 'dist/cli/main.js' } },
});

function numberOf(text: string, name: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value < 0) throw new Error(`--${name} must be a number, not '${text}'`);
  return value;
}

const seed = values.seed === undefined ? Math.floor(Math.random() * 2 ** 31) : numberOf(values.seed, 'seed');
const minutes = numberOf(values.minutes, 'minutes');
const storeFileSystem = STORE_FILE_SYSTEMS.find((name) => name === values['store-fs']);
if (storeFileSystem === undefined) throw new Error(`--store-fs must be one of ${STORE_FILE_SYSTEMS.join(', ')}, not '${values['store-fs']}'`);
process.stdout.write(`torture: --seed ${seed} --store-fs ${storeFileSystem}, ${minutes} min\n`);
const { counts, failure, artefactsDir } = await torture({
  seed, storeFileSystem, milliseconds: minutes * 60_000, cliEntry: values['cli-entry'],
  onProgress: (line) => { if (process.stdout.isTTY) process.stdout.write(`\r\u001b[K${line.slice(0, process.stdout.columns - 1)}`); },
});
if (process.stdout.isTTY) process.stdout.write('\r\u001b[K');
process.stdout.write(`torture: ${summaryOf(counts)}\n`);
if (failure !== null) process.stdout.write(`${failure.stack ?? failure.message}\nkept: ${artefactsDir ?? 'nothing'}\n`);
process.stdout.write(failure === null ? 'torture: PASSED\n' : `torture: FAILED (again: ./scripts/torture --seed ${seed} --store-fs ${storeFileSystem} --minutes ${minutes})\n`);
process.exit(failure === null ? 0 : 1);
