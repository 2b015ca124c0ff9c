/** Names, UUIDs and MACs of deployed machines, for whoever is about to give one to another: they are unique in the store. Main thread only. */
import { OffshootError } from '../errors.js';
import type { SqlConnection, SqlStatement } from './sql-connection.js';

export class DeployedIdentities {
  readonly #byName: SqlStatement<{ readonly name: string }>;
  readonly #byUuid: SqlStatement<{ readonly name: string }>;
  readonly #byMac: SqlStatement<{ readonly name: string }>;

  constructor(connection: SqlConnection) {
    this.#byName = connection.prepare('SELECT name FROM deployments WHERE name = ?');
    this.#byUuid = connection.prepare('SELECT name FROM deployments WHERE uuid = ?');
    this.#byMac = connection.prepare('SELECT deployments.name FROM deployments, json_each(deployments.macs) AS mac WHERE mac.value = ?');
  }

  /** Throws `already-exists`. */
  assertFree({ name, uuid, macs }: { readonly name: string; readonly uuid: string; readonly macs: readonly string[] }): void {
    const claims = [
      ['name', name, this.#byName.get(name)], ['UUID', uuid, this.#byUuid.get(uuid)], ...macs.map((mac) => ['MAC address', mac, this.#byMac.get(mac)] as const),
    ] as const;
    for (const [what, value, owner] of claims) {
      if (owner === undefined) continue;
      throw new OffshootError('already-exists', `the ${what} ${value} belongs to the deployed machine "${owner.name}" already: choose another, or decommission that one first`, { name, [what === 'name' ? 'taken' : 'value']: value });
    }
  }
}
