/** Exports as the control API asks for them, and `discover`: making the other side look again. Main thread of the server. */
import { OffshootError } from '../../blockstore/errors.js';
import type { DiscoverBody, DiscoverResult, ExportInfo, ExportService, PresentBody, WithdrawQuery } from '../control/export-schemas.js';
import type { DatastoreAbilities } from '../hypervisor/datastores.js';
import { virsh } from '../hypervisor/libvirt/virsh.js';
import type { MachineAdapters } from '../machines/adapters.js';
import { EXPORT_ADDRESS_DEFAULT } from '../presenter/place.js';
import type { ExportStatus, Exports } from '../presenter/exports.js';
import { rescanIscsi } from '../presenter/iscsi/initiator.js';

export interface ExportServiceParts {
  readonly exports: Exports;
  readonly adapters: MachineAdapters;
  readonly libvirtUri: string | undefined;
}

const LIBVIRT_URI = 'qemu:///system';
const DISCOVER_TIMEOUT_MS = 90_000;

export class StoreExportService implements ExportService {
  readonly #parts: ExportServiceParts;
  readonly #ending = new AbortController();

  constructor(parts: ExportServiceParts) { this.#parts = parts; }

  async present({ path, kind, clients, readOnly, options }: PresentBody): Promise<ExportInfo> {
    return infoOf(await this.#parts.exports.present({ path, kind, clients: clients ?? [], readOnly: readOnly ?? false, options: options ?? {} }));
  }

  async withdraw({ path, id, kind, force }: WithdrawQuery): Promise<ExportInfo> {
    if ((path === undefined) === (id === undefined)) throw new OffshootError('invalid-argument', 'say either path or id of the export');
    const reference = path === undefined ? { id: Number(id) } : { path, kind: kind ?? null };
    return infoOf(await this.#parts.exports.withdraw(reference, { force: force === 'true' }));
  }

  async list(): Promise<readonly ExportInfo[]> { return (await this.#parts.exports.list()).map(infoOf); }

  async discover(body: DiscoverBody): Promise<DiscoverResult> {
    switch (body.with) {
      case 'libvirt': return await this.#refreshPool(required(body.pool, 'pool'));
      case 'iscsi': return await this.#rescan(required(body.portal, 'portal'));
      case 'vsphere': return await this.#refreshVsphere(body);
    }
  }

  close(): void { this.#ending.abort(); }

  async #refreshPool(pool: string): Promise<DiscoverResult> {
    assertPlain(pool, 'pool');
    const call = { signal: this.#ending.signal, timeoutMs: DISCOVER_TIMEOUT_MS };
    const libvirt = { program: 'virsh', uri: this.#parts.libvirtUri ?? LIBVIRT_URI };
    await virsh(libvirt, ['pool-refresh', '--pool', pool], call);
    const volumes = (await virsh(libvirt, ['vol-list', '--pool', pool], call)).split('\n').flatMap((line) => /^\s*(\S.*?)\s{2,}\//u.exec(line)?.[1] ?? []);
    return { with: 'libvirt', message: `libvirt has looked at the pool ${pool} again`, found: volumes };
  }

  async #rescan(portal: string): Promise<DiscoverResult> {
    assertPlain(portal, 'portal');
    const { targets, hasSessions } = await rescanIscsi(portal, { signal: this.#ending.signal, timeoutMs: DISCOVER_TIMEOUT_MS });
    return { with: 'iscsi', message: `${portal} says what targets it has${hasSessions ? ', and the sessions look at their disks again' : ''}`, found: [...targets] };
  }

  async #refreshVsphere({ mount, path, server, version }: DiscoverBody): Promise<DiscoverResult> {
    const vsphere = this.#parts.adapters.hypervisor('vsphere') as Partial<DatastoreAbilities>;
    if (vsphere.mountDatastore === undefined || vsphere.refresh === undefined) throw new OffshootError('not-supported', 'this adapter for vSphere knows no datastores');
    const call = { signal: this.#ending.signal };
    if (mount === undefined || mount === null) {
      await vsphere.refresh(call);
      return { with: 'vsphere', message: 'vSphere has looked at its storage again', found: [] };
    }
    const shown = await this.#nfsExport(path ?? null);
    const reached = new URL(shown.addresses[0] ?? 'nfs://nowhere/');
    const host = server ?? reached.hostname.replace(/^\[|\]$/gu, '');
    if (host === '0.0.0.0' || host === '::' || host === EXPORT_ADDRESS_DEFAULT || host === '') {
      throw new OffshootError('invalid-argument', `the hosts of vSphere do not reach ${host === '' ? 'an export without an address' : host}: say the address that they know this host by (--server ADDRESS)`);
    }
    const hosts = await vsphere.mountDatastore({ datastore: mount, server: host, path: `/${shown.path}`, version: version ?? 3, readOnly: shown.row.readOnly }, call);
    return { with: 'vsphere', message: `the datastore ${mount} is ${host}:/${shown.path}`, found: [...hosts] };
  }

  async #nfsExport(path: string | null): Promise<ExportStatus> {
    const all = (await this.#parts.exports.list()).filter(({ row, path: at }) => row.kind === 'nfs' && (path === null || at === path));
    const [shown] = all;
    if (shown === undefined) throw new OffshootError('not-found', `${path ?? 'nothing'} is presented as nfs: offshoot present CONTAINER --as nfs --to ADDRESS first`);
    if (all.length > 1) throw new OffshootError('invalid-argument', `several are presented as nfs (${all.map(({ path: at }) => at).join(', ')}): say which with --path`);
    if (shown.failure !== null) throw new OffshootError('io-error', `${shown.path} is not shown now: ${shown.failure}`);
    if (shown.addresses.length === 0) throw new OffshootError('busy', `${shown.path} is not shown yet: try again in a moment`);
    return shown;
  }
}

function infoOf({ row, path, nodeKind, addresses, connected, failure, losses }: ExportStatus): ExportInfo {
  return {
    id: row.id, uuid: row.uuid, path, nodeKind, kind: row.kind, clients: [...row.clients], readOnly: row.readOnly, options: { ...row.options }, addresses: [...addresses],
    connected: connected === null ? null : [...connected], state: failure !== null ? 'failing' : addresses.length === 0 ? 'starting' : 'shown', failure, losses, createdAt: new Date(row.createdUs / 1000).toISOString(),
  };
}

function required(value: string | null | undefined, name: string): string {
  if (value === undefined || value === null) throw new OffshootError('invalid-argument', `say the ${name}`);
  return value;
}

/** A program would take it for an option. */
function assertPlain(value: string, name: string): void {
  if (/^-|\p{Cc}/u.test(value)) throw new OffshootError('invalid-argument', `'${value}' is no ${name}`);
}
