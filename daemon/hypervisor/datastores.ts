/**
 * What some hypervisors can do beside the seam to machines: reach the mount over the network as a datastore of theirs, and look at it
 * again when files have come that they did not make.
 */
import type { CallOptions } from './hypervisor.js';

/** An export of the mount, as hosts of the hypervisor reach it. */
export interface NfsExport {
  /** What the hypervisor calls the datastore. */
  readonly datastore: string;
  /** Host name or address of the NFS server. */
  readonly server: string;
  /** What the server exports. */
  readonly path: string;
  readonly version: 3 | 4;
  readonly readOnly: boolean;
}

export interface DatastoreAbilities {
  /**
   * Makes the export known as a datastore on every host. A host that has it is left as it is, so that the call can be made again.
   * Throws `already-exists` when a datastore of that name is something else. Returns the names of the hosts that have it now.
   */
  mountDatastore(nfs: NfsExport, options: CallOptions): Promise<readonly string[]>;
  /** Has the hypervisor look again at its storage and at the datastores of the mount. */
  refresh(options: CallOptions): Promise<void>;
}
