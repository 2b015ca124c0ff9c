/**
 * What a session must leave for the server that comes after: session.json in the runtime directory.
 *
 * Main thread only. The directory lies on tmpfs, which goes when the machine goes and so never outlives a mount; hence
 * nothing is synced. The file is written beside and renamed over, so that a server killed at any instant leaves the old
 * file, or the new one, or none. It is written before INIT is answered: a mount that works has a session.json.
 */
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import type { SessionParameters } from './negotiation.js';

const FILE_NAME = 'session.json';
const FORMAT = 1;
const numberFields = [
  'kernelMinor', 'minor', 'flags', 'flags2', 'readaheadBytesMax', 'writeBytesMax', 'readBytesMax', 'pagesMax', 'backgroundMax',
  'congestionThreshold', 'timeGranularityNs',
] as const satisfies readonly (keyof SessionParameters)[];
const booleanFields = ['passthrough', 'exportSupport'] as const satisfies readonly (keyof SessionParameters)[];

export function saveSession(runtimeDir: string, parameters: SessionParameters): void {
  const path = join(runtimeDir, FILE_NAME);
  try {
    writeFileSync(`${path}.new`, `${JSON.stringify({ format: FORMAT, ...parameters })}\n`, { mode: 0o600 });
    renameSync(`${path}.new`, path);
  } catch (thrown) {
    const cause = toOffshootError(thrown);
    throw new OffshootError(cause.kind, `The session could not be written to ${path}: ${cause.message}. Make room in the runtime directory.`, { path }, thrown);
  }
}

/** The session of this mount, or null if INIT was not answered yet. */
export function loadSession(runtimeDir: string): SessionParameters | null {
  const path = join(runtimeDir, FILE_NAME);
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (thrown) {
    const cause = toOffshootError(thrown);
    if (cause.kind === 'not-found') return null;
    throw new OffshootError(cause.kind, `The session could not be read from ${path}: ${cause.message}.`, { path }, thrown);
  }
  const parsed = parse(text);
  if (parsed === null) {
    throw new OffshootError(
      'store-damaged',
      `${path} does not describe a session of this version of Offshoot. Unmount, and start the daemon again.`,
      { path },
    );
  }
  return parsed;
}

function parse(text: string): SessionParameters | null {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (thrown) {
    if (thrown instanceof SyntaxError) return null;
    throw thrown;
  }
  if (typeof value !== 'object' || value === null) return null;
  const fields = new Map<string, unknown>(Object.entries(value));
  if (fields.get('format') !== FORMAT) return null;
  if (!numberFields.every((name) => Number.isSafeInteger(fields.get(name)) && Number(fields.get(name)) >= 0)) return null;
  if (!booleanFields.every((name) => typeof fields.get(name) === 'boolean')) return null;
  fields.delete('format');
  return Object.fromEntries(fields) as unknown as SessionParameters;
}
