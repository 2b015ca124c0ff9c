/** Where run-time state lies, and whom it belongs to. /dev/shm is a tmpfs on every Linux machine. */
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import {
  createRuntimeDirectory,
  discardSession,
  leaveRuntimeDirectory,
  removeRuntimeDirectory,
  runtimeDirectoryFor,
} from '../../daemon/runtime-directory.js';

let base: string;
let store: string;
let environment: { OFFSHOOT_RUNTIME_DIR: string };

beforeEach(() => {
  base = mkdtempSync('/dev/shm/offshoot-test-');
  store = mkdtempSync(join(tmpdir(), 'offshoot-store-'));
  environment = { OFFSHOOT_RUNTIME_DIR: base };
});

afterEach(() => {
  rmSync(base, { recursive: true, force: true });
  rmSync(store, { recursive: true, force: true });
});

describe('the run-time directory', () => {
  it('is named after the store, however the store is reached', () => {
    const link = join(base, 'link');
    symlinkSync(store, link);
    const directory = runtimeDirectoryFor(store, environment);
    expect(directory.startsWith(`${base}/offshoot/`)).toBe(true);
    expect(basename(directory)).toMatch(/^[0-9a-f]{16}$/u);
    expect(runtimeDirectoryFor(link, environment)).toBe(directory);
    expect(runtimeDirectoryFor(`${store}/../${basename(store)}/`, environment)).toBe(directory);
    expect(runtimeDirectoryFor(base, environment)).not.toBe(directory);
    expect(existsSync(join(base, 'offshoot'))).toBe(false);
  });

  it('is ours alone', () => {
    const previous = process.umask(0);
    try {
      const directory = createRuntimeDirectory(store, environment);
      expect(statSync(directory).mode & 0o777).toBe(0o700);
      expect(statSync(join(base, 'offshoot')).mode & 0o777).toBe(0o755);
      expect(createRuntimeDirectory(store, environment)).toBe(directory);
    } finally {
      process.umask(previous);
    }
  });

  it('lies on a tmpfs of the machine when nobody says', () => {
    expect(runtimeDirectoryFor(store, {})).toMatch(/^\/(run|dev\/shm)\/offshoot\/[0-9a-f]{16}$/u);
    expect(runtimeDirectoryFor(store, { OFFSHOOT_RUNTIME_DIR: '' })).toBe(runtimeDirectoryFor(store, {}));
  });

  it.each([
    ['/proc', 'not a directory on a tmpfs'],
    ['/nowhere/at/all', 'not a directory on a tmpfs'],
    ['relative', 'absolute'],
  ])('refuses %s as a base', (bad, words) => {
    expect(() => runtimeDirectoryFor(store, { OFFSHOOT_RUNTIME_DIR: bad })).toThrow(
      expect.objectContaining({ kind: 'invalid-argument', message: expect.stringContaining(words) as string }),
    );
  });

  it('refuses a directory that others may write to', () => {
    mkdirSync(join(base, 'offshoot'));
    chmodSync(join(base, 'offshoot'), 0o777);
    expect(() => createRuntimeDirectory(store, environment)).toThrow(expect.objectContaining({ kind: 'not-permitted' }));
  });

  it('refuses a link in the place of a directory', () => {
    mkdirSync(join(base, 'elsewhere'), { mode: 0o700 });
    symlinkSync(join(base, 'elsewhere'), join(base, 'offshoot'));
    expect(() => createRuntimeDirectory(store, environment)).toThrow(expect.objectContaining({ kind: 'not-permitted' }));
  });
});

describe('what is kept', () => {
  const files = ['journal-0', 'journal-main', 'session.json', 'session.json.new', 'handles.log', 'holder.json', 'exchange-12'];

  function filledDirectory(): string {
    const directory = createRuntimeDirectory(store, environment);
    for (const name of files) writeFileSync(join(directory, name), 'x');
    return directory;
  }

  it('for the next mount is the journal and nothing else', () => {
    const directory = filledDirectory();
    discardSession(directory);
    expect(readdirSync(directory).sort()).toEqual(['journal-0', 'journal-main']);
  });

  it('after a start that failed is the journal, if there is one', () => {
    const directory = filledDirectory();
    leaveRuntimeDirectory(directory);
    expect(readdirSync(directory).sort()).toEqual(['journal-0', 'journal-main']);
    for (const name of readdirSync(directory)) rmSync(join(directory, name));
    leaveRuntimeDirectory(directory);
    expect(existsSync(directory)).toBe(false);
  });

  it('after an orderly end is nothing', () => {
    const directory = filledDirectory();
    removeRuntimeDirectory(directory);
    expect(existsSync(directory)).toBe(false);
  });
});
