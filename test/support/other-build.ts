/**
 * Another build of this checkout, for upgrades: a copy of dist/ with another version, and changed where a test wants it to fail.
 */
import { cpSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';

import { makeTempDir, type Cleanup } from './temp.js';

const ROOT = resolve(import.meta.dirname, '../..');

export interface OtherBuild {
  readonly version: string;
  readonly cliEntry: string;
}

/** `changes`: text put in place of other text, by file below dist/. */
export function makeBuild(version: string, cleanup: Cleanup, changes: Readonly<Record<string, readonly [string, string]>> = {}): OtherBuild {
  const directory = makeTempDir('build', cleanup);
  cpSync(join(ROOT, 'dist'), join(directory, 'dist'), { recursive: true });
  symlinkSync(join(ROOT, 'node_modules'), join(directory, 'node_modules'));
  const manifest = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as Record<string, unknown>;
  writeFileSync(join(directory, 'package.json'), JSON.stringify({ ...manifest, version }));
  for (const [file, [from, to]] of Object.entries(changes)) {
    const path = join(directory, 'dist', file);
    const text = readFileSync(path, 'utf8');
    if (!text.includes(from)) throw new Error(`${path} does not hold '${from}': the test is out of date`);
    writeFileSync(path, text.replace(from, () => to));
  }
  return { version, cliEntry: join(directory, 'dist/cli/main.js') };
}
