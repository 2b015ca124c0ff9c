/**
 * The control API of a running server, put together: what it shows, what it does, and the application that answers.
 *
 * Main thread. Imported by the composition when the socket listens and the mount is served, for with what it brings along it takes longer to
 * load than all that guests wait for. Calls that came meanwhile are answered as soon as it is there.
 */
import type { Logger } from 'pino';

import type { Store } from '../../blockstore/store.js';
import { ATTACH_LIMIT_DEFAULT } from '../control/limits.js';
import type { ControlListener } from '../control/listener.js';
import { startControlServer } from '../control/server.js';
import { References } from '../filesystem/references.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { NodeId } from '../filesystem/types.js';
import { readHolderState } from '../holder/holder-state.js';
import type { ServerOptions } from '../holder/options.js';
import type { Checks } from '../jobs/checks.js';
import type { Fills } from '../jobs/fills.js';
import type { Imports } from '../jobs/imports.js';
import type { Merges } from '../jobs/merges.js';
import type { Scrub } from '../jobs/scrub.js';
import { machineAdapters } from '../machines/adapters.js';
import type { Exports } from '../presenter/exports.js';
import type { BlockAccess } from '../vdisks/block-access.js';
import { createVdiskHost } from '../vdisks/vdisk-host.js';
import { StoreControlService } from './control-service.js';
import { ControlViews } from './control-views.js';
import type { LazyMetrics } from './lazy-metrics.js';
import { StoreExportService } from './export-service.js';
import { addHypervisors } from './hypervisors.js';
import { startMachines } from './machine-plane.js';
import { createExports } from './presenters.js';
import { SpaceAccounts } from './space-accounts.js';
import type { SpaceWatch } from './space-watch.js';
import type { Transfers } from './transfers.js';
import { VdiskPlane } from './vdisk-plane.js';

export interface ControlPlaneParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly fills: Fills;
  readonly imports: Imports;
  readonly checks: Checks;
  readonly scrub: Scrub;
  readonly merges: Merges;
  readonly space: SpaceWatch;
  readonly transfers: Transfers;
  readonly metrics: LazyMetrics;
  readonly options: ServerOptions;
  readonly version: string;
  readonly startedAt: Date;
  readonly logger: Logger;
  readonly listener: ControlListener;
  readonly forgetAttributes: (nodeId: NodeId) => Promise<void>;
  readonly stop: (force: boolean) => Promise<void>;
  readonly upgrade: (serverEntry: string) => Promise<number>;
  readonly onFatal: (error: unknown) => never;
  readonly blockAccess: (access: BlockAccess) => void;
}

export interface ControlPlane {
  readonly exports: Exports;
  /** Lets go of what keeps the mount, unmounts, and takes it again when the mount stayed. */
  around(force: boolean, unmount: () => Promise<void>): Promise<void>;
  /** Answers what is being answered. Servers of exports go on, unless the mount is gone. */
  close(options: { readonly mountIsGone: boolean }): Promise<void>;
}

export async function startControlPlane(parts: ControlPlaneParts): Promise<ControlPlane> {
  const { store, fileSystem, fills, imports, checks, scrub, merges, space, transfers, metrics, options, version, startedAt, logger, forgetAttributes, stop, upgrade } = parts;
  const references = new References(store.meta, (path) => fileSystem.namespace.resolve(path));
  const accounts = new SpaceAccounts({ store, storeDir: options.storeDir, references });
  const views = new ControlViews({
    store, fileSystem, fills, imports, scrub, merges, server: options, version, startedAt, holderState: () => readHolderState(options.runtimeDir), space, accounts,
  });
  metrics.statusFrom(() => views.status());
  const forgetHypervisors = await addHypervisors(machineAdapters, { options, logger });
  const machines = startMachines({
    adapters: machineAdapters, store, fileSystem, imports, mountDir: options.mountDir, logger, forgetAttributes, jobInfo: (jobId) => views.job(jobId), onFatal: parts.onFatal,
    writableDevice: async (nodeId, signal) => await vdisks.writableDevice(nodeId, signal),
  });
  const exports = createExports({ meta: store.meta, references, options, logger, onFatal: parts.onFatal });
  const exportService = new StoreExportService({ exports, adapters: machineAdapters, libvirtUri: options.hypervisors?.libvirtUri });
  const vdisks = new VdiskPlane({
    adapters: machineAdapters, store, fileSystem, host: createVdiskHost(), attachLimit: options.attachLimit ?? ATTACH_LIMIT_DEFAULT, mountDir: options.mountDir, runtimeDir: options.runtimeDir,
    logger, forgetAttributes, jobInfo: (jobId) => views.job(jobId), onFatal: parts.onFatal,
  });
  parts.blockAccess(vdisks.blocks);
  const service = new StoreControlService({
    store, fileSystem, fills, imports, checks, scrub, views, accounts, metrics, transfers, machines, exports: exportService, vdisks: vdisks.service, logger, forgetAttributes, upgrade,
    stop,
  });
  const server = await startControlServer({
    service, socketPath: options.socketPath, version, logger, onInternalError: parts.onFatal, ...(options.policy === undefined ? {} : { policy: options.policy }),
  }, parts.listener);
  // Guests are served, and calls answered: what is shown to others comes after them.
  const starting = exports.start().catch(parts.onFatal);
  return {
    exports,
    around: async (force, unmount) => { await vdisks.around(force, unmount); },
    close: async ({ mountIsGone }) => {
      // First, as calls that are being answered may wait for a hypervisor, or for a server of exports.
      exportService.close();
      await exports.close({ mountIsGone });
      await starting;
      await Promise.all([machines.close(), vdisks.close()]);
      await forgetHypervisors();
      await server.close();
    },
  };
}
