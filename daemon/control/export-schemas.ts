/**
 * The shapes of exports in the control API: see `schemas.ts`, whose rules hold here.
 */
import { Type, type Static } from '@sinclair/typebox';
import { count, exact, named, nullable, oneOf, path, queryFlag, time } from './schemas.js';

export const EXPORT_KIND_NAMES = ['nfs', 'smb', 'iscsi', 'nbd', 'block'] as const;
const CLIENTS_MAX = 256;
const OPTIONS_MAX = 32;
const TEXT_BYTES_MAX = 1024;

const kind = oneOf(EXPORT_KIND_NAMES, 'as what');
const options = Type.Record(Type.String({ minLength: 1, maxLength: 64 }), Type.String({ maxLength: TEXT_BYTES_MAX }), { maxProperties: OPTIONS_MAX, description: 'of the kind: SEMANTICS.md, section 26' });

export const ExportInfo = named(Type.Object({
  id: Type.Integer({ minimum: 1 }),
  uuid: Type.String(),
  path: Type.String({ description: 'in the store' }),
  nodeKind: oneOf(['directory', 'disk'], 'what is shown'),
  kind,
  clients: Type.Array(Type.String(), { description: 'for whom: addresses and networks, initiator or user names; empty for block' }),
  readOnly: Type.Boolean(),
  options: Type.Record(Type.String(), Type.String()),
  addresses: Type.Array(Type.String(), { description: 'what a client is given: nbd://192.0.2.1:10809/vms/a.img, /dev/loop7; empty until it is shown' }),
  connected: nullable(Type.Array(Type.String(), { description: 'who uses it now; null: cannot be known, or was not asked' })),
  state: oneOf(['shown', 'starting', 'failing'], 'starting: a server of ours that has just begun has not come to it yet; failing: its server cannot be started now, and it is tried again'),
  failure: nullable(Type.String({ description: 'why it is failing' })),
  losses: count('how often the servers of its kind were found dead since the server of ours started'),
  createdAt: time('when it was presented'),
}, { $id: 'ExportInfo' }));

export const PresentBody = Type.Object({
  path: path('CONTAINER or CONTAINER/PATH, either with @SNAPSHOT'),
  kind,
  clients: Type.Optional(Type.Array(Type.String({ minLength: 1, maxLength: TEXT_BYTES_MAX }), { maxItems: CLIENTS_MAX })),
  readOnly: Type.Optional(Type.Boolean({ default: false })),
  options: Type.Optional(options),
}, exact);

export const WithdrawQuery = Type.Object({
  path: Type.Optional(path('CONTAINER or CONTAINER/PATH')),
  id: Type.Optional(Type.String({ pattern: '^[1-9][0-9]{0,14}$' })),
  kind: Type.Optional(kind),
  force: queryFlag('also while somebody uses it'),
}, exact);

export const DiscoverBody = Type.Object({
  with: oneOf(['libvirt', 'vsphere', 'iscsi'], 'who is to look again'),
  pool: Type.Optional(nullable(Type.String({ minLength: 1, maxLength: TEXT_BYTES_MAX, description: "libvirt's storage pool" }))),
  portal: Type.Optional(nullable(Type.String({ minLength: 1, maxLength: TEXT_BYTES_MAX, description: 'ADDRESS[:PORT] of an iSCSI portal' }))),
  mount: Type.Optional(nullable(Type.String({ minLength: 1, maxLength: 80, description: 'vSphere: make the NFS export a datastore of this name' }))),
  path: Type.Optional(nullable(path('which NFS export; may be left out where there is one'))),
  server: Type.Optional(nullable(Type.String({ minLength: 1, maxLength: 255, description: 'what the hosts of vSphere call this host' }))),
  version: Type.Optional(Type.Unsafe<3 | 4>({ type: 'integer', enum: [3, 4], description: 'of NFS' })),
}, exact);

export const DiscoverResult = named(Type.Object({
  with: oneOf(['libvirt', 'vsphere', 'iscsi'], 'who has looked again'),
  message: Type.String(),
  found: Type.Array(Type.String(), { description: 'names of volumes, targets, or hosts that have the datastore' }),
}, { $id: 'DiscoverResult' }));

export type ExportInfo = Static<typeof ExportInfo>;
export type PresentBody = Static<typeof PresentBody>;
export type WithdrawQuery = Static<typeof WithdrawQuery>;
export type DiscoverBody = Static<typeof DiscoverBody>;
export type DiscoverResult = Static<typeof DiscoverResult>;

export interface ExportService {
  present(body: PresentBody): Promise<ExportInfo>;
  /** What it was. `in-use` while somebody uses it, unless forced. */
  withdraw(query: WithdrawQuery): Promise<ExportInfo>;
  list(): Promise<readonly ExportInfo[]>;
  discover(body: DiscoverBody): Promise<DiscoverResult>;
}
