/**
 * Machines of a running server, put together: formats, hypervisors, operations, and the service that the control API asks. Main thread.
 *
 * What the last server left in the middle of an operation is undone as soon as this is there.
 */
import type { Store } from '../../blockstore/store.js';
import type { JobInfo } from '../control/schemas.js';
import { References } from '../filesystem/references.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { Imports } from '../jobs/imports.js';
import type { MachineAdapters } from '../machines/adapters.js';
import { MachineClones, type MachineCloneParts } from '../machines/machine-clone.js';
import { MachineImports } from '../machines/machine-import.js';
import { machineOperations } from '../machines/machine-operations.js';
import { cloneTree } from './clone-trees.js';
import { StoreMachineService, type MachineServiceParts } from './machine-service.js';

export interface MachinePlaneParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly imports: Imports;
  readonly mountDir: string;
  readonly logger: MachineCloneParts['logger'];
  readonly forgetAttributes: (nodeId: number) => Promise<void>;
  readonly jobInfo: (jobId: number) => JobInfo;
  readonly onFatal: (error: Error) => void;
  readonly adapters: MachineAdapters;
  readonly writableDevice: MachineServiceParts['writableDevice'];
  readonly retryMs?: number;
}

export function startMachines(given: MachinePlaneParts): StoreMachineService {
  const { store, fileSystem } = given;
  const { namespace } = fileSystem;
  const parts: MachineCloneParts = {
    ...given, namespace, references: new References(store.meta, (path) => namespace.resolve(path)),
    cloneTrees: async (source, targets, options) => await cloneTree({ store, namespace }, source, targets, options),
  };
  const operations = machineOperations(parts);
  operations.recover();
  const imports = new MachineImports({ ...parts, imports: given.imports }, operations);
  return new StoreMachineService({ ...parts, operations, clones: new MachineClones(parts, operations), imports, jobInfo: given.jobInfo, writableDevice: given.writableDevice });
}
