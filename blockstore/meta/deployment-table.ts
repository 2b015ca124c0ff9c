/**
 * Machines deployed from container files: the clone they live in, where it is mounted, and with which hypervisor each is registered.
 * Main thread only.
 *
 * Their names, UUIDs and MACs are unique among themselves and the machines of the store alike. FORMAT.md explains every column.
 */
import { OffshootError } from '../errors.js';
import type { MachineTable, Registration } from './machine-table.js';
import { safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

/** `making` and `ending`: the operation `jobId` is at it. */
export type DeploymentState = 'making' | 'ready' | 'ending';

export interface DeploymentRow {
  readonly id: number;
  /** What it was deployed from; null when that container file was removed since. */
  readonly vdiskId: number | null;
  /** Its clone of the container file. */
  readonly nodeId: number;
  readonly name: string;
  readonly uuid: string;
  readonly macs: readonly string[];
  readonly mountPoint: string;
  readonly state: DeploymentState;
  readonly jobId: number | null;
  readonly hypervisor: string | null;
  readonly registration: Registration;
  readonly externalId: string | null;
  readonly createdUs: number;
}

export type NewDeployment = Pick<DeploymentRow, 'vdiskId' | 'nodeId' | 'name' | 'uuid' | 'macs' | 'mountPoint'> & { readonly jobId: number };

interface RawDeployment {
  readonly id: number;
  readonly vdisk_id: number | null;
  readonly node_id: number;
  readonly name: string;
  readonly uuid: string;
  readonly macs: string;
  readonly mount_point: string;
  readonly state: string;
  readonly job_id: number | null;
  readonly hypervisor: string | null;
  readonly registration: string;
  readonly external_id: string | null;
  readonly created_us: number;
}

export class DeploymentTable {
  readonly #connection: SqlConnection;
  readonly #machines: MachineTable;
  readonly #byId: SqlStatement<RawDeployment>;
  readonly #byNode: SqlStatement<RawDeployment>;
  readonly #byName: SqlStatement<RawDeployment>;
  readonly #byVdisk: SqlStatement<RawDeployment>;
  readonly #byJob: SqlStatement<RawDeployment>;
  readonly #all: SqlStatement<RawDeployment>;
  readonly #insert: SqlStatement<unknown>;
  readonly #state: SqlStatement<unknown>;
  readonly #registration: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;

  constructor(connection: SqlConnection, machines: MachineTable) {
    const select = 'SELECT id, vdisk_id, node_id, name, uuid, macs, mount_point, state, job_id, hypervisor, registration, external_id, created_us FROM deployments';
    this.#connection = connection;
    this.#machines = machines;
    this.#byId = connection.prepare(`${select} WHERE id = ?`);
    this.#byNode = connection.prepare(`${select} WHERE node_id = ?`);
    this.#byName = connection.prepare(`${select} WHERE name = ?`);
    this.#byVdisk = connection.prepare(`${select} WHERE vdisk_id = ? ORDER BY id`);
    this.#byJob = connection.prepare(`${select} WHERE job_id = ? ORDER BY id`);
    this.#all = connection.prepare(`${select} ORDER BY id`);
    this.#insert = connection.prepare(
      `INSERT INTO deployments (vdisk_id, node_id, name, uuid, macs, mount_point, state, job_id, hypervisor, registration, external_id, created_us)
       VALUES (?, ?, ?, ?, ?, ?, 'making', ?, NULL, 'none', NULL, ?)`,
    );
    this.#state = connection.prepare('UPDATE deployments SET state = ?, job_id = ? WHERE id = ?');
    this.#registration = connection.prepare('UPDATE deployments SET hypervisor = ?, registration = ?, external_id = ? WHERE id = ?');
    this.#remove = connection.prepare('DELETE FROM deployments WHERE id = ?');
  }

  byId(id: number): DeploymentRow | undefined { return rowOrNone(this.#byId.get(id)); }
  byNode(nodeId: number): DeploymentRow | undefined { return rowOrNone(this.#byNode.get(nodeId)); }
  byName(name: string): DeploymentRow | undefined { return rowOrNone(this.#byName.get(name)); }
  ofVdisk(vdiskId: number): DeploymentRow[] { return this.#byVdisk.all(vdiskId).map(toRow); }
  ofJob(jobId: number): DeploymentRow[] { return this.#byJob.all(jobId).map(toRow); }
  /** Oldest first. */
  all(): DeploymentRow[] { return this.#all.all().map(toRow); }

  /** Its id; `making`, with no hypervisor. `already-exists` says what of it is taken, and by whom. */
  insert({ vdiskId, nodeId, name, uuid, macs, mountPoint, jobId }: NewDeployment): number {
    return this.#connection.transaction(() => {
      this.#machines.assertFree({ name, uuid, macs });
      return this.#insert.run(vdiskId, nodeId, name, uuid, JSON.stringify(macs), mountPoint, jobId, Date.now() * 1000).lastId;
    });
  }

  ready(id: number): void { this.#setState(id, 'ready', null); }
  /** It is being undone by an operation. */
  ending(id: number, jobId: number): void { this.#setState(id, 'ending', jobId); }

  /** The hypervisor is about to be asked. */
  asked(id: number, hypervisor: string): void { this.#setRegistration(id, hypervisor, 'asked', null); }
  registered(id: number, hypervisor: string, externalId: string): void { this.#setRegistration(id, hypervisor, 'registered', externalId); }
  unregistered(id: number): void { this.#setRegistration(id, null, 'none', null); }

  remove(id: number): void { this.#remove.run(id); }

  #setState(id: number, state: DeploymentState, jobId: number | null): void {
    if (this.#state.run(state, jobId, id).changes === 0) throw gone(id);
  }

  #setRegistration(id: number, hypervisor: string | null, registration: Registration, externalId: string | null): void {
    if (this.#registration.run(hypervisor, registration, externalId, id).changes === 0) throw gone(id);
  }
}

function rowOrNone(raw: RawDeployment | undefined): DeploymentRow | undefined { return raw === undefined ? undefined : toRow(raw); }

function toRow(raw: RawDeployment): DeploymentRow {
  return {
    id: safeInteger(raw.id, 'deployments.id'), vdiskId: safeIntegerOrNull(raw.vdisk_id, 'deployments.vdisk_id'), nodeId: safeInteger(raw.node_id, 'deployments.node_id'),
    name: raw.name, uuid: raw.uuid, macs: JSON.parse(raw.macs) as string[], mountPoint: raw.mount_point, state: raw.state as DeploymentState,
    jobId: safeIntegerOrNull(raw.job_id, 'deployments.job_id'), hypervisor: raw.hypervisor, registration: raw.registration as Registration,
    externalId: raw.external_id, createdUs: safeInteger(raw.created_us, 'deployments.created_us'),
  };
}

function gone(id: number): OffshootError {
  return new OffshootError('not-found', 'the deployed machine does not exist any more: look at its name again', { deploymentId: id });
}
