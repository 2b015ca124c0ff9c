/**
 * The shapes of staged and deployed machines, and of block devices, in the control API: see `schemas.ts`, whose rules hold here.
 */
import { Type, type Static } from '@sinclair/typebox';
import { HYPERVISORS } from './machine-schemas.js';
import { bytes, exact, named, nullable, oneOf, path, queryFlag, time, type JobInfo } from './schemas.js';

const NAME_CHARACTERS_MAX = 63;
const STOP_SECONDS_MAX = 3600;
const FILE_SYSTEMS = ['ext4', 'xfs'] as const;
const PURPOSES = ['stage', 'deploy', 'block'] as const;

const deployedName = Type.String({ minLength: 1, maxLength: NAME_CHARACTERS_MAX, description: 'of the deployed machine: letters, digits, "_", "." and "-"' });
const hypervisor = oneOf(HYPERVISORS, 'libvirt; qemu: without another daemon; vsphere');

export const StagedInfo = named(Type.Object({
  path: Type.String({ description: 'the container file' }),
  uuid: Type.String(),
  state: oneOf(['making', 'ready'], 'making: it is being staged'),
  machine: Type.String({ description: 'its name when it was staged' }),
  format: Type.String({ description: 'of its configuration' }),
  fileSystem: oneOf(FILE_SYSTEMS, 'in the container file'),
  fileSystemUuid: Type.String(),
  diskGuid: Type.String({ description: 'of the partition table' }),
  partitionGuid: Type.String(),
  sizeBytes: bytes('virtual size of the container file'),
  dataBytes: bytes('virtual sizes of what was copied'),
  architecture: Type.String({ description: 'of hosts that can deploy it' }),
  deployed: Type.Array(Type.String(), { description: 'names of the machines that are deployed from it' }),
  createdAt: time('when it was staged'),
}, { $id: 'StagedInfo' }));

export const DeployedInfo = named(Type.Object({
  name: Type.String(),
  uuid: Type.String(),
  macs: Type.Array(Type.String()),
  state: oneOf(['making', 'ready', 'ending'], 'making, ending: an operation is at it'),
  from: nullable(Type.String({ description: 'the container file; null: it was removed since' })),
  path: Type.String({ description: 'its clone of the container file' }),
  mountPoint: Type.String({ description: 'where its files are, on this host' }),
  mounted: Type.Boolean(),
  device: nullable(Type.String({ description: 'what its clone is attached as' })),
  hypervisor: nullable(hypervisor),
  registration: oneOf(['none', 'asked', 'registered'], 'asked: an operation is at it'),
  externalId: nullable(Type.String({ description: 'what the hypervisor calls it' })),
  power: nullable(oneOf(['running', 'paused', 'shut-off', 'crashed', 'missing', 'unknown'], 'what the hypervisor says; unknown: it does not answer; null: not registered')),
  agent: nullable(Type.Boolean({ description: 'whether the agent inside answers; null: not running, or not asked' })),
  operationId: nullable(Type.String({ description: 'what is at it' })),
  createdAt: time('when it was deployed'),
}, { $id: 'DeployedInfo' }));

export const AttachedInfo = named(Type.Object({
  path: Type.String({ description: 'CONTAINER/PATH of the disk' }),
  device: nullable(Type.String({ description: 'null: it is being attached' })),
  purpose: oneOf(PURPOSES, 'block: by offshoot attach, or by .block under the mount'),
  readOnly: Type.Boolean(),
  leaving: Type.Boolean({ description: 'it goes with its last close' }),
  operationId: nullable(Type.String()),
}, { $id: 'AttachedInfo' }));

export const StageBody = Type.Object({
  source: path('CONTAINER/PATH of a machine that is off, also in a snapshot'),
  target: path('CONTAINER/PATH of the container file'),
  fileSystem: Type.Optional(oneOf(FILE_SYSTEMS, 'in the container file; ext4 when left out')),
}, exact);
export const DeployedQuery = Type.Object({
  name: Type.Optional(deployedName),
  agent: queryFlag('ask the agents inside, too, which takes three seconds where none answers'),
}, exact);
export const DeployBody = Type.Object({
  source: path('CONTAINER/PATH of a container file'),
  name: deployedName,
  container: Type.Optional(nullable(path('where the clone goes; null: beside the container file'))),
  start: Type.Optional(Type.Boolean({ default: true })),
  hypervisor: Type.Optional(nullable(hypervisor)),
}, exact);
export const DecommissionBody = Type.Object({
  name: deployedName,
  force: Type.Optional(Type.Boolean({ default: false, description: 'take its power' })),
  timeoutSeconds: Type.Optional(Type.Number({ exclusiveMinimum: 0, maximum: STOP_SECONDS_MAX, description: 'how long it may take to shut down' })),
}, exact);
export const DeployedBody = Type.Object({ name: deployedName }, exact);
export const AttachBody = Type.Object({ path: path('CONTAINER/PATH of a disk, also in a snapshot'), readOnly: Type.Optional(Type.Boolean({ default: false })) }, exact);
export const DetachBody = Type.Object({ path: path('CONTAINER/PATH of a disk') }, exact);

export type StagedInfo = Static<typeof StagedInfo>;
export type DeployedInfo = Static<typeof DeployedInfo>;
export type AttachedInfo = Static<typeof AttachedInfo>;
export type StageBody = Static<typeof StageBody>;
export type DeployBody = Static<typeof DeployBody>;

/** What the control API can ask of container files; see `service.ts` for the rules. */
export interface VdiskService {
  stage(body: StageBody): JobInfo;
  deploy(body: DeployBody): Promise<JobInfo>;
  decommission(name: string, options: { readonly force: boolean; readonly timeoutMs: number }): Promise<JobInfo>;
  staged(): readonly StagedInfo[];
  deployed(query: { readonly name: string | null; readonly agent: boolean }): Promise<readonly DeployedInfo[]>;
  start(name: string): Promise<DeployedInfo>;
  attached(): Promise<readonly AttachedInfo[]>;
  attach(path: string, readOnly: boolean): Promise<AttachedInfo>;
  detach(path: string): Promise<AttachedInfo>;
}
