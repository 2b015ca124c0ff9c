/**
 * What the control API does with container files, deployed machines and block devices. Main thread; the steps are in `daemon/vdisks/`.
 */
import { OffshootError, isOperatingError } from '../../blockstore/errors.js';
import type { DeploymentRow } from '../../blockstore/meta/deployment-table.js';
import type { VdiskRow } from '../../blockstore/meta/vdisk-table.js';
import type { JobInfo } from '../control/schemas.js';
import type { AttachedInfo, DeployBody, DeployedInfo, StageBody, StagedInfo, VdiskService } from '../control/vdisk-schemas.js';
import { assertThawed } from '../filesystem/frozen.js';
import { requireDeployed, startDecommission } from '../vdisks/decommission.js';
import { startDeploy } from '../vdisks/deploy.js';
import { parseDescription } from '../vdisks/description.js';
import { startStage } from '../vdisks/stage.js';
import type { VdiskParts } from '../vdisks/vdisk-parts.js';

export class StoreVdiskService implements VdiskService {
  readonly #parts: VdiskParts;
  readonly #jobInfo: (jobId: number) => JobInfo;
  /** What the last server left is found again. */
  readonly #ready: () => Promise<void>;
  readonly #ending = new AbortController();

  constructor(parts: VdiskParts, jobInfo: (jobId: number) => JobInfo, ready: () => Promise<void>) {
    this.#parts = parts;
    this.#jobInfo = jobInfo;
    this.#ready = ready;
  }

  stage(body: StageBody): JobInfo {
    return this.#jobInfo(startStage(this.#parts, { source: body.source, target: body.target, fileSystem: body.fileSystem ?? 'ext4' }).id);
  }

  async deploy(body: DeployBody): Promise<JobInfo> {
    await this.#ready();
    return this.#jobInfo(startDeploy(this.#parts, {
      source: body.source, name: body.name, container: body.container ?? null, start: body.start ?? true, hypervisor: body.hypervisor ?? null,
    }).id);
  }

  async decommission(name: string, options: { readonly force: boolean; readonly timeoutMs: number }): Promise<JobInfo> {
    await this.#ready();
    return this.#jobInfo(startDecommission(this.#parts, { name, ...options }).id);
  }

  staged(): readonly StagedInfo[] {
    const { meta } = this.#parts.store;
    return meta.vdisks.all().map((row) => this.#stagedInfo(row)).toSorted((a, b) => (a.path < b.path ? -1 : 1));
  }

  async deployed({ name, agent }: { readonly name: string | null; readonly agent: boolean }): Promise<readonly DeployedInfo[]> {
    await this.#ready();
    const rows = this.#parts.store.meta.deployments.all().filter((row) => name === null || row.name === name);
    return (await Promise.all(rows.map(async (row) => await this.#deployedInfo(row, agent)))).toSorted((a, b) => (a.name < b.name ? -1 : 1));
  }

  async start(name: string): Promise<DeployedInfo> {
    await this.#ready();
    const row = requireDeployed(this.#parts, name);
    if (row.state !== 'ready' || row.hypervisor === null || row.externalId === null) throw new OffshootError('busy', `an operation is at ${name}: wait for it (offshoot jobs ${row.jobId ?? 0})`, { name });
    if (!this.#parts.host.isMounted(row.mountPoint)) throw new OffshootError('io-error', `the files of ${name} are not mounted at ${row.mountPoint}: the daemon's log says why`, { name });
    await this.#parts.adapters.hypervisor(row.hypervisor).start(row.externalId, { signal: this.#ending.signal });
    return await this.#deployedInfo(row, false);
  }

  async attached(): Promise<readonly AttachedInfo[]> {
    await this.#ready();
    const { meta } = this.#parts.store;
    return (await this.#parts.attachments.listed(this.#ending.signal)).map(({ row, device }) => ({
      path: meta.nodes.pathOf(row.nodeId), device: device?.device ?? row.device, purpose: row.purpose, readOnly: device?.readOnly ?? false, leaving: device?.isLeaving ?? false,
      operationId: row.jobId === null ? null : String(row.jobId),
    })).toSorted((a, b) => (a.path < b.path ? -1 : 1));
  }

  async attach(reference: string, readOnly: boolean): Promise<AttachedInfo> {
    await this.#ready();
    const { store, references, attachments } = this.#parts;
    const { node, path } = references.resolve(reference);
    if (node.kind !== 'disk') throw new OffshootError('invalid-argument', `${path} is a ${node.kind}: only disks are attached`, { path });
    if (!readOnly) {
      assertThawed(store.meta, node);
      if (store.meta.vdisks.byNode(node.id) !== undefined) throw new OffshootError('not-permitted', `${path} is a container file, which is never written: add --read-only, or deploy it (offshoot deploy)`, { path });
    }
    const { device } = await attachments.attach({ nodeId: node.id, purpose: 'block', jobId: null, readOnly }, this.#ending.signal);
    attachments.openToOwner(node.id, device);
    return { path, device, purpose: 'block', readOnly, leaving: false, operationId: null };
  }

  async detach(reference: string): Promise<AttachedInfo> {
    await this.#ready();
    const { store, references, attachments } = this.#parts;
    const { node, path } = references.resolve(reference);
    const row = store.meta.attachments.byNode(node.id);
    if (row === undefined) throw new OffshootError('not-found', `${path} is not attached: offshoot attached lists what is`, { path });
    if (row.purpose !== 'block') {
      const name = store.meta.deployments.byNode(node.id)?.name;
      throw new OffshootError('in-use', name === undefined ? `${path} is being staged by operation ${row.jobId ?? 0}: wait for it, or cancel it` : `${path} is the deployed machine ${name}: decommission it (offshoot decommission ${name})`, { path });
    }
    const device = await attachments.deviceOf(node.id, this.#ending.signal);
    await attachments.giveBack(node.id, this.#ending.signal);
    return { path, device: device?.device ?? row.device, purpose: 'block', readOnly: device?.readOnly ?? false, leaving: false, operationId: null };
  }

  async cancel(jobId: number): Promise<void> { await this.#parts.operations().cancel(jobId); }

  async settled(jobId: number): Promise<void> { await this.#parts.operations().ended(jobId); }

  close(): Promise<void> {
    this.#ending.abort();
    return Promise.resolve();
  }

  #stagedInfo(row: VdiskRow): StagedInfo {
    const { meta } = this.#parts.store;
    const path = meta.nodes.pathOf(row.nodeId);
    const { partitionTable, fileSystem, sizes, host } = parseDescription(row.description, path);
    return {
      path, uuid: row.uuid, state: row.state, machine: row.name, format: row.format, fileSystem: fileSystem.type, fileSystemUuid: fileSystem.uuid, diskGuid: partitionTable.guid,
      partitionGuid: partitionTable.partition.guid, sizeBytes: sizes.virtualBytes, dataBytes: sizes.dataBytes, architecture: host.architecture,
      deployed: meta.deployments.ofVdisk(row.id).map(({ name }) => name), createdAt: new Date(row.createdUs / 1000).toISOString(),
    };
  }

  async #deployedInfo(row: DeploymentRow, isAgentAsked: boolean): Promise<DeployedInfo> {
    const { meta } = this.#parts.store;
    const vdisk = row.vdiskId === null ? undefined : meta.vdisks.byId(row.vdiskId);
    return {
      name: row.name, uuid: row.uuid, macs: [...row.macs], state: row.state, from: vdisk === undefined ? null : meta.nodes.pathOf(vdisk.nodeId), path: meta.nodes.pathOf(row.nodeId),
      mountPoint: row.mountPoint, mounted: this.#parts.host.isMounted(row.mountPoint), device: meta.attachments.byNode(row.nodeId)?.device ?? null,
      hypervisor: row.hypervisor as DeployedInfo['hypervisor'], registration: row.registration, externalId: row.externalId, ...await this.#power(row, isAgentAsked),
      operationId: row.jobId === null ? null : String(row.jobId), createdAt: new Date(row.createdUs / 1000).toISOString(),
    };
  }

  async #power(row: DeploymentRow, isAgentAsked: boolean): Promise<Pick<DeployedInfo, 'power' | 'agent'>> {
    if (row.hypervisor === null || row.externalId === null) return { power: null, agent: null };
    const hypervisor = this.#parts.adapters.hypervisor(row.hypervisor);
    const { signal } = this.#ending;
    try {
      const power = await hypervisor.status(row.externalId, { signal });
      const agent = isAgentAsked && power === 'running' && hypervisor.abilities.guestAgent ? await hypervisor.pingAgent(row.externalId, { signal }).catch(() => false) : null;
      return { power, agent };
    } catch (thrown) {
      if (!isOperatingError(thrown)) throw thrown;
      return { power: 'unknown', agent: null };
    }
  }
}
