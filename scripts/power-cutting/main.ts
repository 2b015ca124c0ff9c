/** Power cuts below a real file system, from a terminal: options, a line of progress, counts and a verdict. Started by `scripts/power-cut --block-device`. */
import { mkdtempSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { ACTOR_PROGRAM, BLOCK_FILE_SYSTEMS, RECORDER_PROGRAM, type BlockFileSystem } from '../../test/support/power/block-device.js';
import { BLOCK_WORKLOADS, cutBlockDevice, type BlockResult } from '../../test/support/power/block-cuts.js';
import { createCleanup, makeTmpfsDir } from '../../test/support/temp.js';

const TOP = fileURLToPath(new URL('../..', import.meta.url));
const { values } = parseArgs({
  options: {
    'cli-entry': { type: 'string' }, fs: { type: 'string', multiple: true, default: Object.keys(BLOCK_FILE_SYSTEMS) },
    points: { type: 'string', default: '200' }, seed: { type: 'string' }, lie: { type: 'string' },
  },
});

function numberOf(text: string, name: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new Error(`--${name} must be a whole number from 1 on, not '${text}'`);
  return value;
}

function isFileSystem(name: string): name is BlockFileSystem {
  return name in BLOCK_FILE_SYSTEMS;
}

function programOf(source: string): string {
  return join(TOP, source.replace(/\.ts$/u, '.js'));
}

function show(line: string): void {
  if (process.stdout.isTTY) process.stdout.write(`\r\u001b[K${line.slice(0, process.stdout.columns - 1)}`);
}

const seed = values.seed === undefined ? Math.floor(Math.random() * 2 ** 31) : numberOf(values.seed, 'seed');
const points = numberOf(values.points, 'points');
if (values.lie !== undefined && values.lie !== 'flushes') throw new Error(`--lie takes 'flushes', not '${values.lie}'`);
const isLying = values.lie !== undefined;
const wrong = values.fs.find((name) => !isFileSystem(name));
if (wrong !== undefined) throw new Error(`--fs must be one of ${Object.keys(BLOCK_FILE_SYSTEMS).join(', ')}, not '${wrong}'`);

async function cut(fileSystem: BlockFileSystem): Promise<BlockResult> {
  const cleanup = createCleanup();
  try {
    const memoryDir = makeTmpfsDir('cuts', cleanup);
    const workDir = mkdtempSync(join(tmpdir(), 'cuts-'));
    return await cutBlockDevice({
      fileSystem, points, seed, isLying, workDir, memoryDir, cleanup, workloads: BLOCK_WORKLOADS, onProgress: show,
      programs: { recorder: programOf(RECORDER_PROGRAM), actor: programOf(ACTOR_PROGRAM) },
    });
  } finally {
    await cleanup.run();
  }
}

let failures = 0;
for (const fileSystem of values.fs.filter(isFileSystem)) {
  const beganMs = performance.now();
  const result = await cut(fileSystem);
  if (process.stdout.isTTY) process.stdout.write('\r\u001b[K');
  failures += result.failures.length;
  for (const failure of result.failures) process.stdout.write(`${failure}\n`);
  const seconds = ((performance.now() - beganMs) / 1000).toFixed(0);
  process.stdout.write(
    `power-cut: ${fileSystem}: ${result.points} points of ${result.writes} writes, ${result.discards} discards and ${result.flushes} flushes that the device saw; ${result.dropped} of ${result.unflushed} unflushed ones ` +
      `left out, ${result.torn} torn; ${result.failures.length} wrong; ${seconds} s\n`,
  );
}
const again = `./scripts/power-cut --block-device ${values.fs.map((name) => `--fs ${name}`).join(' ')} --points ${points} --seed ${seed}${isLying ? ' --lie flushes' : ''}`;
process.stdout.write(failures === 0 ? `power-cut: PASSED (--seed ${seed})\n` : `power-cut: FAILED (again: ${again})\n`);
process.exit(failures === 0 ? 0 : 1);
