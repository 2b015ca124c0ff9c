/** The parts of a server that snapshots, receives and clones of containers need, over a store that has no mount. */
import path from 'node:path';

import type { Store } from '../../blockstore/store.js';
import type { OpenHandles } from '../../daemon/filesystem/open-handles.js';
import { References } from '../../daemon/filesystem/references.js';
import { StoreFileSystem } from '../../daemon/filesystem/store-file-system.js';
import { parseHeader } from '../../daemon/jobs/receive-header.js';
import { Receives } from '../../daemon/jobs/receives.js';
import { Snapshots } from '../../daemon/server/snapshots.js';

export interface ControlParts {
  readonly fileSystem: StoreFileSystem;
  readonly references: References;
  readonly snapshots: Snapshots;
  readonly receives: Receives;
}

/** Nobody has anything open through a mount. */
const NO_HANDLES: OpenHandles = {
  add: () => { throw new Error('nothing is opened through a mount here'); },
  givenTo: () => undefined, remove: () => undefined, openCountOf: () => 0, entries: () => [],
};
const QUIET = { info: (): void => undefined, warn: (): void => undefined };

/** As a server makes them at its start, with what it puts in order before anything else. */
export function controlParts(store: Store): ControlParts {
  const { storeDir } = store.files;
  const fileSystem = new StoreFileSystem({ store, storeDir, handles: NO_HANDLES, beforeDiscard: () => undefined, onWarning: () => undefined });
  const references = new References(store.meta, (text) => fileSystem.namespace.resolve(text));
  const forgetAttributes = (): Promise<void> => Promise.resolve();
  const snapshots = new Snapshots({ store, fileSystem, references, logger: QUIET, forgetAttributes, beforeDiscard: () => undefined });
  const receives = new Receives({ store, fileSystem, storeDir: path.resolve(storeDir), logger: QUIET, parseHeader: async (json) => await Promise.resolve(parseHeader(json)), forgetAttributes });
  fileSystem.restore();
  receives.recover();
  return { fileSystem, references, snapshots, receives };
}
