/**
 * Machines: which directories are virtual machines, what each is called everywhere, and with which hypervisor it is registered. Main thread only.
 *
 * Names, UUIDs and MACs are each there once in the store: the tables keep that, and say of what is taken by whom. A machine goes with its
 * directory. FORMAT.md explains every column.
 */
import { OffshootError } from '../errors.js';
import { DeployedIdentities } from './deployed-identities.js';
import { safeInteger, safeIntegerOrNull } from './sql-values.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

/** `making`: an operation is at it, and undoes it if it does not come to its end. */
export type MachineRowState = 'making' | 'ready';
/** `asked`: the hypervisor was asked, and its answer was not written down: it may know the machine. */
export type Registration = 'none' | 'asked' | 'registered';

export interface MachineRow {
  readonly id: number;
  /** Its directory. */
  readonly nodeId: number;
  readonly format: string;
  /** File name in the directory. */
  readonly configuration: string;
  readonly name: string;
  readonly uuid: string;
  /** In the order of its network interfaces. */
  readonly macs: readonly string[];
  readonly state: MachineRowState;
  /** The operation that made it. May be gone. */
  readonly jobId: number | null;
  readonly hypervisor: string | null;
  readonly registration: Registration;
  readonly externalId: string | null;
  readonly createdUs: number;
}

export type NewMachine = Pick<MachineRow, 'nodeId' | 'format' | 'configuration' | 'name' | 'uuid' | 'macs' | 'state' | 'jobId'>;
export type MachineIdentityRow = Pick<MachineRow, 'name' | 'uuid' | 'macs'>;

interface RawMachine {
  readonly id: number;
  readonly node_id: number;
  readonly format: string;
  readonly configuration: string;
  readonly name: string;
  readonly uuid: string;
  readonly state: string;
  readonly job_id: number | null;
  readonly hypervisor: string | null;
  readonly registration: string;
  readonly external_id: string | null;
  readonly created_us: number;
}

export class MachineTable {
  readonly #connection: SqlConnection;
  readonly #deployed: DeployedIdentities;
  readonly #byId: SqlStatement<RawMachine>;
  readonly #byNode: SqlStatement<RawMachine>;
  readonly #byJob: SqlStatement<RawMachine>;
  readonly #byName: SqlStatement<RawMachine>;
  readonly #byUuid: SqlStatement<RawMachine>;
  readonly #all: SqlStatement<RawMachine>;
  readonly #bound: SqlStatement<{ readonly id: number; readonly node_id: number }>;
  readonly #macs: SqlStatement<{ readonly mac: string }>;
  readonly #macOwner: SqlStatement<{ readonly machine_id: number }>;
  readonly #insert: SqlStatement<unknown>;
  readonly #insertMac: SqlStatement<unknown>;
  readonly #removeMacs: SqlStatement<unknown>;
  readonly #identity: SqlStatement<unknown>;
  readonly #registration: SqlStatement<unknown>;
  readonly #ready: SqlStatement<unknown>;
  readonly #remove: SqlStatement<unknown>;

  constructor(connection: SqlConnection) {
    const select = 'SELECT id, node_id, format, configuration, name, uuid, state, job_id, hypervisor, registration, external_id, created_us FROM machines';
    this.#connection = connection;
    this.#deployed = new DeployedIdentities(connection);
    this.#byId = connection.prepare(`${select} WHERE id = ?`);
    this.#byNode = connection.prepare(`${select} WHERE node_id = ?`);
    this.#byJob = connection.prepare(`${select} WHERE job_id = ? ORDER BY id`);
    this.#byName = connection.prepare(`${select} WHERE name = ?`);
    this.#byUuid = connection.prepare(`${select} WHERE uuid = ?`);
    this.#all = connection.prepare(`${select} ORDER BY id`);
    this.#bound = connection.prepare("SELECT id, node_id FROM machines WHERE state = 'making' OR registration <> 'none'");
    this.#macs = connection.prepare('SELECT mac FROM machine_macs WHERE machine_id = ? ORDER BY position');
    this.#macOwner = connection.prepare('SELECT machine_id FROM machine_macs WHERE mac = ?');
    this.#insert = connection.prepare(
      `INSERT INTO machines (node_id, format, configuration, name, uuid, state, job_id, hypervisor, registration, external_id, created_us)
       VALUES (?, ?, ?, ?, ?, ?, ?, NULL, 'none', NULL, ?)`,
    );
    this.#insertMac = connection.prepare('INSERT INTO machine_macs (mac, machine_id, position) VALUES (?, ?, ?)');
    this.#removeMacs = connection.prepare('DELETE FROM machine_macs WHERE machine_id = ?');
    this.#identity = connection.prepare('UPDATE machines SET name = ?, uuid = ? WHERE id = ?');
    this.#registration = connection.prepare('UPDATE machines SET hypervisor = ?, registration = ?, external_id = ? WHERE id = ?');
    this.#ready = connection.prepare("UPDATE machines SET state = 'ready' WHERE job_id = ?");
    this.#remove = connection.prepare('DELETE FROM machines WHERE id = ?');
  }

  byId(id: number): MachineRow | undefined { return this.#row(this.#byId.get(id)); }
  byNode(nodeId: number): MachineRow | undefined { return this.#row(this.#byNode.get(nodeId)); }
  byName(name: string): MachineRow | undefined { return this.#row(this.#byName.get(name)); }
  byUuid(uuid: string): MachineRow | undefined { return this.#row(this.#byUuid.get(uuid)); }

  byMac(mac: string): MachineRow | undefined {
    const owner = this.#macOwner.get(mac);
    return owner === undefined ? undefined : this.byId(owner.machine_id);
  }

  /** What an operation made, or is making. */
  ofJob(jobId: number): MachineRow[] { return this.#byJob.all(jobId).map((raw) => this.#toRow(raw)); }

  /** All of the store, oldest first. */
  all(): MachineRow[] { return this.#all.all().map((raw) => this.#toRow(raw)); }

  /** Those that an operation is making, or that a hypervisor may know. */
  bound(): readonly { readonly id: number; readonly nodeId: number }[] { return this.#bound.all().map((raw) => ({ id: raw.id, nodeId: raw.node_id })); }

  /** `already-exists` says what of it is taken, and by whom. */
  insert(fields: NewMachine): MachineRow {
    return this.#connection.transaction(() => {
      this.#assertFree(fields, null);
      const { lastId } = this.#insert.run(fields.nodeId, fields.format, fields.configuration, fields.name, fields.uuid, fields.state, fields.jobId, Date.now() * 1000);
      this.#putMacs(lastId, fields.macs);
      return this.#existing(lastId);
    });
  }

  /** Another name, UUID and MACs; `already-exists` as above. */
  identify(id: number, identity: MachineIdentityRow): void {
    this.#connection.transaction(() => {
      this.#existing(id);
      this.#assertFree(identity, id);
      this.#identity.run(identity.name, identity.uuid, id);
      this.#removeMacs.run(id);
      this.#putMacs(id, identity.macs);
    });
  }

  /** The hypervisor is about to be asked. */
  asked(id: number, hypervisor: string): void { this.#setRegistration(id, hypervisor, 'asked', null); }
  registered(id: number, hypervisor: string, externalId: string): void { this.#setRegistration(id, hypervisor, 'registered', externalId); }
  unregistered(id: number): void { this.#setRegistration(id, null, 'none', null); }

  /** What the operation made is there for good. */
  ready(jobId: number): void { this.#ready.run(jobId); }

  /** Forgets that the directory is a machine. */
  remove(id: number): void { this.#remove.run(id); }

  /** Throws `already-exists` when a name, UUID or MAC is a machine's, or a deployed machine's. */
  assertFree(identity: MachineIdentityRow): void { this.#assertFree(identity, null); }

  #setRegistration(id: number, hypervisor: string | null, registration: Registration, externalId: string | null): void {
    if (this.#registration.run(hypervisor, registration, externalId, id).changes === 0) throw gone(id);
  }

  #putMacs(id: number, macs: readonly string[]): void {
    macs.forEach((mac, position) => { this.#insertMac.run(mac, id, position); });
  }

  #assertFree(identity: MachineIdentityRow, exceptId: number | null): void {
    const { name, uuid, macs } = identity;
    if (new Set(macs).size !== macs.length) throw new OffshootError('already-exists', `the machine "${name}" has one MAC address twice: give each network interface its own`, { name });
    const claims: readonly (readonly [string, string, MachineRow | undefined])[] = [
      ['name', name, this.byName(name)], ['UUID', uuid, this.byUuid(uuid)], ...macs.map((mac) => ['MAC address', mac, this.byMac(mac)] as const),
    ];
    for (const [what, value, owner] of claims) {
      if (owner === undefined || owner.id === exceptId) continue;
      throw new OffshootError('already-exists', `the ${what} ${value} belongs to the machine "${owner.name}" already: choose another, or remove that one first`, { name, [what === 'name' ? 'taken' : 'value']: value });
    }
    this.#deployed.assertFree(identity);
  }

  #row(raw: RawMachine | undefined): MachineRow | undefined { return raw === undefined ? undefined : this.#toRow(raw); }

  #existing(id: number): MachineRow {
    const row = this.byId(id);
    if (row === undefined) throw gone(id);
    return row;
  }

  #toRow(raw: RawMachine): MachineRow {
    const id = safeInteger(raw.id, 'machines.id');
    return {
      id, nodeId: safeInteger(raw.node_id, 'machines.node_id'), format: raw.format, configuration: raw.configuration, name: raw.name, uuid: raw.uuid,
      macs: this.#macs.all(id).map(({ mac }) => mac), state: raw.state as MachineRowState, jobId: safeIntegerOrNull(raw.job_id, 'machines.job_id'),
      hypervisor: raw.hypervisor, registration: raw.registration as Registration, externalId: raw.external_id, createdUs: safeInteger(raw.created_us, 'machines.created_us'),
    };
  }
}

function gone(id: number): OffshootError {
  return new OffshootError('not-found', 'the machine does not exist any more: look at its name again', { machineId: id });
}
