/**
 * Container files, deployed machines and block devices of a running server, put together. Main thread.
 *
 * At the start, in the background, while guests are served:
 *
 *   1. what is attached by us, and by whom it was asked for, is found again                 (attachments.ts)
 *   2. operations that the last server did not bring to their end are undone, or gone on with
 *   3. deployed machines are attached and mounted again; the machines themselves are the administrator's to start
 *
 * At the end of a mount, and only then: deployed machines that run hold it up; what is mounted is unmounted, what is attached is given back.
 */
import { realpathSync } from 'node:fs';
import path from 'node:path';

import { OffshootError, isOperatingError, toOffshootError } from '../../blockstore/errors.js';
import { listedNames } from '../../blockstore/listed-names.js';
import type { JobInfo } from '../control/schemas.js';
import { References } from '../filesystem/references.js';
import { Operations, type OperationParts } from '../jobs/operations.js';
import type { MachineAdapters } from '../machines/adapters.js';
import type { TakeAwayParts } from '../machines/machine-undo.js';
import { Attachments } from '../vdisks/attachments.js';
import { BlockAccess } from '../vdisks/block-access.js';
import { endDecommission } from '../vdisks/decommission.js';
import { descriptionOf, hideClone, showClone, undoDeploy } from '../vdisks/deploy.js';
import { undoStage } from '../vdisks/stage.js';
import type { VdiskHost } from '../vdisks/vdisk-host.js';
import { DECOMMISSION_JOB, DEPLOY_JOB, STAGE_JOB, type VdiskParts } from '../vdisks/vdisk-parts.js';
import { cloneTree } from './clone-trees.js';
import { StoreVdiskService } from './vdisk-service.js';

export interface VdiskPlaneParts extends OperationParts, TakeAwayParts {
  readonly adapters: MachineAdapters;
  readonly mountDir: string;
  readonly runtimeDir: string;
  readonly attachLimit: number;
  readonly host: VdiskHost;
  readonly jobInfo: (jobId: number) => JobInfo;
}

export class VdiskPlane {
  readonly service: StoreVdiskService;
  readonly blocks: BlockAccess;
  readonly #parts: VdiskParts;
  readonly #operations: Operations;
  readonly #ending = new AbortController();
  readonly #restored: Promise<void>;

  constructor(given: VdiskPlaneParts) {
    const { store, fileSystem, host, attachLimit, logger } = given;
    const { namespace } = fileSystem;
    const attachments = new Attachments({
      store, devices: host.devices, mountDir: asTheKernelCalls(given.mountDir), limit: attachLimit, openCount: (nodeId) => fileSystem.openCount(nodeId), logger,
    });
    const parts: VdiskParts = {
      ...given, namespace, attachments, references: new References(store.meta, (each) => namespace.resolve(each)), deployedDir: deployedDirOf(given.runtimeDir),
      cloneTrees: async (source, targets, options) => await cloneTree({ store, namespace }, source, targets, options), operations: () => this.#operations,
    };
    this.#parts = parts;
    this.#operations = new Operations(parts, new Map([
      [STAGE_JOB, { undo: async (jobId, end, signal) => { await undoStage(parts, jobId, end, signal); }, done: 'a machine was staged', undone: 'a machine was not staged, and what there was of it is gone' }],
      [DEPLOY_JOB, { undo: async (jobId, end, signal) => { await undoDeploy(parts, jobId, end, signal); }, done: 'a machine was deployed', undone: 'a machine was not deployed, and what there was of it is gone' }],
      [DECOMMISSION_JOB, { undo: async (jobId, end, signal) => { await endDecommission(parts, jobId, end, signal); }, done: 'a machine was decommissioned', undone: 'a machine was not decommissioned' }],
    ]));
    this.service = new StoreVdiskService(parts, given.jobInfo, async () => { await this.#restored; });
    this.blocks = new BlockAccess({ store, devices: host.devices, attachments, mountDir: asTheKernelCalls(given.mountDir), ready: async () => { await this.#restored; }, logger, onFatal: given.onFatal });
    this.#operations.recover();
    this.#restored = this.#restore().catch((thrown: unknown) => {
      if (!this.#ending.signal.aborted) given.onFatal(thrown instanceof Error ? thrown : new Error(String(thrown)));
    });
  }

  /** Before the mount goes: `in-use`, with everything as it was, while deployed machines run, unless their power is to be taken with it. */
  async #release(force: boolean): Promise<void> {
    await this.#restored;
    if (!force && this.#operations.isBusy()) throw new OffshootError('busy', 'a machine is being staged, deployed or decommissioned: wait for it (offshoot jobs --state running), or cancel it');
    const { store, adapters, attachments, logger } = this.#parts;
    const { meta } = store;
    const signal = this.#ending.signal;
    const rows = meta.deployments.all();
    const running: string[] = [];
    for (const row of rows) {
      if (row.registration !== 'registered') continue;
      const hypervisor = adapters.hypervisor(row.hypervisor ?? '');
      const state = await hypervisor.status(row.externalId ?? '', { signal }).catch((thrown: unknown) => unknownState(thrown, force));
      if (state !== 'running' && state !== 'paused') continue;
      if (force) await hypervisor.stop(row.externalId ?? '', { force: true, timeoutMs: STOP_TIMEOUT_MS, signal });
      else running.push(row.name);
    }
    if (running.length > 0) {
      throw new OffshootError('in-use', `${listedNames(running, (name) => name)} ${running.length === 1 ? 'is deployed and runs' : 'are deployed and run'}: shut ${running.length === 1 ? 'it' : 'them'} down, or decommission ${running.length === 1 ? 'it' : 'them'} first (offshoot deployed), or stop with --force, which takes their power`);
    }
    try {
      for (const row of rows) await hideClone(this.#parts, row, signal);
      for (const { nodeId } of meta.attachments.all()) await attachments.giveBack(nodeId, signal);
    } catch (thrown) {
      if (!isOperatingError(thrown)) throw thrown;
      if (!force) {
        await this.#restore();
        throw thrown;
      }
      logger.warn({ reason: thrown.message }, 'something of the mount is still attached, and the mount goes all the same');
    }
  }

  /** Lets go of the mount, and takes all of it again when it stayed after all. */
  async around(force: boolean, unmount: () => Promise<void>): Promise<void> {
    await this.#release(force);
    try {
      await unmount();
    } catch (thrown) {
      await this.#restore();
      throw thrown;
    }
  }

  /** The block device by which a disk may be written to; null: there is none. */
  async writableDevice(nodeId: number, signal: AbortSignal): Promise<string | null> {
    await this.#restored;
    const found = await this.#parts.attachments.deviceOf(nodeId, signal);
    return found === null || found.readOnly ? null : found.device;
  }

  /** Nothing goes on when this resolves. What is attached and mounted stays: it is the next server's. */
  async close(): Promise<void> {
    this.#ending.abort();
    this.blocks.close();
    await this.#operations.close();
    await this.#restored;
    await this.service.close();
  }

  async #restore(): Promise<void> {
    const { store, attachments, logger } = this.#parts;
    const { meta } = store;
    const signal = this.#ending.signal;
    const rows = meta.deployments.all().filter(({ state }) => state === 'ready');
    if (rows.length === 0 && meta.attachments.count() === 0) return;
    try {
      await attachments.recover(signal);
    } catch (thrown) {
      if (!isOperatingError(thrown)) throw thrown;
      logger.warn({ reason: thrown.message }, 'block devices of the mount could not be listed');
    }
    if (meta.attachments.all().some(({ purpose }) => purpose === 'block')) this.blocks.watch();
    for (const row of rows) {
      if (signal.aborted) return;
      try {
        await showClone(this.#parts, row, descriptionOf(this.#parts, row), null, signal);
      } catch (thrown) {
        if (!isOperatingError(thrown)) throw thrown;
        logger.warn({ name: row.name, reason: thrown.message }, 'a deployed machine could not be attached and mounted again');
      }
    }
  }
}

const STOP_TIMEOUT_MS = 30_000;

/** A hypervisor that does not answer says nothing of what runs: that holds a stop up, too. */
function unknownState(thrown: unknown, force: boolean): 'missing' {
  const error = toOffshootError(thrown);
  if (!isOperatingError(error) || !force) throw thrown;
  return 'missing';
}

/** Without touching the mount itself. */
function asTheKernelCalls(mountDir: string): string {
  return path.join(realpathSync(path.dirname(mountDir)), path.basename(mountDir));
}

/** `/run/offshoot/KEY` gives `/run/offshoot-deployed-KEY`. */
export function deployedDirOf(runtimeDir: string): string {
  return `${path.dirname(runtimeDir)}-deployed-${path.basename(runtimeDir)}`;
}
