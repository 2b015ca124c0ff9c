/**
 * The version of this build, read from the package's own package.json: the one place where it is written. Works from
 * the sources and from dist/, for it looks upwards until it finds the package.
 */
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

let known: string | undefined;

export function offshootVersion(): string {
  known ??= readVersion(dirname(fileURLToPath(import.meta.url)));
  return known;
}

function readVersion(directory: string): string {
  try {
    const manifest = JSON.parse(readFileSync(join(directory, 'package.json'), 'utf8')) as { name?: unknown; version?: unknown };
    if (manifest.name === 'offshoot' && typeof manifest.version === 'string') return manifest.version;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  const above = dirname(directory);
  if (above === directory) throw new Error('package.json of offshoot was not found above this file');
  return readVersion(above);
}
