/** A metadata store in a directory of its own, and rows to put into it. Everything goes after each test. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect } from 'vitest';
import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import { MetaStore } from '../../blockstore/meta/meta-store.js';
import { ROOT_ID, type LayerRow, type NewLayer, type NewNode, type NodeRow } from '../../blockstore/meta/rows.js';

const directories: string[] = [];
const stores: MetaStore[] = [];

afterEach(() => {
  for (const store of stores.splice(0)) store.close();
  for (const directory of directories.splice(0)) rmSync(directory, { recursive: true, force: true });
});

/** A new directory under the system's temporary one. */
export function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), 'offshoot-meta-'));
  directories.push(directory);
  return directory;
}

/** Path of a database that does not exist yet. */
export function databasePath(): string {
  return join(temporaryDirectory(), 'offshoot.db');
}

/** Opens a store that is closed after the test, if it was not before. */
export function openStore(path: string = databasePath()): MetaStore {
  const store = MetaStore.open(path);
  stores.push(store);
  return store;
}

export function addLayer(store: MetaStore, fields: Partial<NewLayer> = {}): LayerRow {
  return store.layers.insert({
    kind: 'store',
    externalPath: null,
    externalIdentity: null,
    backingId: null,
    backingLimitBytes: null,
    sizeBytes: 1024 ** 3,
    sealed: false,
    complete: false,
    createdUs: 1_700_000_000_000_000,
    ...fields,
  });
}

/** A node; files and disks get a new layer unless one is given. */
export function addNode(store: MetaStore, name: string, fields: Partial<NewNode> = {}): NodeRow {
  const kind = fields.kind ?? 'directory';
  const needsLayer = (kind === 'file' || kind === 'disk') && fields.layerId === undefined;
  return store.nodes.insert({
    parentId: ROOT_ID,
    name,
    kind,
    mode: 0o755,
    uid: 0,
    gid: 0,
    sizeBytes: 0,
    atimeUs: 1,
    mtimeUs: 2,
    ctimeUs: 3,
    layerId: needsLayer ? addLayer(store).id : null,
    linkTarget: null,
    copyOnRead: false,
    fault: null,
    ...fields,
  });
}

/** Runs `body`, which must throw an operating error of this kind, and returns the error. */
export function expectError(kind: ErrorKind, body: () => unknown): OffshootError {
  try {
    body();
  } catch (thrown) {
    expect(thrown).toBeInstanceOf(OffshootError);
    expect((thrown as OffshootError).kind).toBe(kind);
    return thrown as OffshootError;
  }
  throw new Error(`nothing was thrown, ${kind} was expected`);
}
