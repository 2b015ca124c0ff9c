/**
 * The daemon's file system and snapshots over a test store, with nothing around them: no transport has anything open, and no kernel has to forget.
 * To be made anew after a kill, which puts another store in the place of the old one.
 */
import { References } from '../../daemon/filesystem/references.js';
import type { OpenHandles } from '../../daemon/filesystem/open-handles.js';
import { StoreFileSystem } from '../../daemon/filesystem/store-file-system.js';
import { Snapshots } from '../../daemon/server/snapshots.js';
import type { TestStore } from './blockstore-fixture.js';

const nothingOpen: OpenHandles = {
  add: () => { throw new Error('nobody opens anything here'); },
  givenTo: () => undefined,
  remove: () => undefined,
  openCountOf: () => 0,
  entries: () => [],
};

function nothing(): void {
  // Nobody is told.
}

export function fileSystemOver({ store, storeDir }: TestStore): StoreFileSystem {
  return new StoreFileSystem({ store, storeDir, handles: nothingOpen, beforeDiscard: nothing, onWarning: nothing });
}

export function snapshotsOver(fixture: TestStore): Snapshots {
  const { store } = fixture;
  const fileSystem = fileSystemOver(fixture);
  return new Snapshots({
    store, fileSystem, references: new References(store.meta, (path) => fileSystem.namespace.resolve(path)), logger: { info: nothing, warn: nothing },
    forgetAttributes: async () => { await Promise.resolve(); }, beforeDiscard: nothing,
  });
}
