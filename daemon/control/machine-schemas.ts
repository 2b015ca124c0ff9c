/**
 * The shapes of virtual machines in the control API: see `schemas.ts`, whose rules hold here.
 */
import { Type, type Static } from '@sinclair/typebox';
import { CLONE_TARGETS_MAX } from './limits.js';
import { bytes, count, exact, named, nullable, oneOf, path, queryFlag, time, type JobInfo, type RemoveResult } from './schemas.js';

export const HYPERVISORS = ['libvirt', 'qemu', 'vsphere'] as const;
const FORMATS = ['libvirt', 'vmx', 'qemu'] as const;
const SETTINGS_MAX = 100;
const VALUE_BYTES_MAX = 4096;
const WAIT_SECONDS_MAX = 86_400;
const STOP_SECONDS_MAX = 3600;

const machine = path('CONTAINER/PATH of the directory of a machine');
const hypervisor = oneOf(HYPERVISORS, 'libvirt; qemu: without another daemon; vsphere');
const key = Type.String({ minLength: 1, maxLength: VALUE_BYTES_MAX, description: "a parameter by the format's own name" });

export const MachineSetting = named(Type.Object({
  key,
  value: Type.String({ maxLength: VALUE_BYTES_MAX }),
}, { $id: 'MachineSetting' }));

export const MachineInfo = named(Type.Object({
  path: Type.String({ description: 'its directory' }),
  name: nullable(Type.String()),
  uuid: nullable(Type.String()),
  macs: Type.Array(nullable(Type.String()), { description: 'of its network interfaces, in their order; null: made by the hypervisor' }),
  state: oneOf(['making', 'ready', 'found'], 'making: an operation is at it; found: its names are not kept unique yet, for it was not made or registered by Offshoot'),
  format: oneOf(FORMATS, "of its configuration: libvirt's XML, VMware's .vmx, machine.json for QEMU"),
  configuration: Type.String({ description: 'its file name' }),
  memoryBytes: nullable(bytes('of the machine')),
  processors: nullable(count('of the machine')),
  files: Type.Array(Type.Object({
    slot: Type.String(), file: Type.String(),
    sizeBytes: nullable(bytes('of a file in the directory; null: it is none, or is not there yet')), ownedBytes: nullable(bytes('that are its own; the rest is read from what it was cloned from')),
    role: oneOf(['disk', 'cdrom', 'nvram', 'firmware', 'kernel', 'initrd', 'other'], 'what it is to the machine'),
  }), { description: 'that the configuration names; empty in a list' }),
  hypervisor: nullable(hypervisor),
  registration: oneOf(['none', 'asked', 'registered'], 'asked: a server died before it wrote the answer down; register or unregister it again'),
  externalId: nullable(Type.String({ description: 'what the hypervisor calls it' })),
  power: nullable(oneOf(['running', 'paused', 'shut-off', 'crashed', 'missing', 'unknown'],
    'what the hypervisor says; missing: it does not know it any more; unknown: it does not answer; null: not asked, or not registered')),
  powerError: nullable(Type.String({ description: 'why the hypervisor does not answer' })),
  agent: nullable(Type.Boolean({ description: 'whether the agent inside answers; null: not asked, or not running' })),
  operationId: nullable(Type.String({ description: 'the operation that made it' })),
  mountPath: Type.String(),
  createdAt: nullable(time('when it was made')),
}, { $id: 'MachineInfo' }));

export const MachineListQuery = Type.Object({
  container: Type.Optional(path('only those in this container, and also those that are only found')),
  operationId: Type.Optional(Type.String({ pattern: '^[1-9][0-9]{0,14}$', description: 'only those that this operation made' })),
  power: queryFlag('ask hypervisors for states'),
}, exact);

export const MachineQuery = Type.Object({ path: machine }, exact);
export const MachineBody = Type.Object({ path: machine }, exact);

export const MachineCloneBody = Type.Object({
  source: path('CONTAINER/PATH of a machine, or a container with machines; either with @SNAPSHOT'),
  targets: Type.Array(path('CONTAINER/PATH of a clone, or the name of a new container'), { minItems: 1, maxItems: CLONE_TARGETS_MAX }),
  settings: Type.Optional(Type.Array(MachineSetting, { maxItems: SETTINGS_MAX })),
  seed: Type.Optional(nullable(Type.String({ minLength: 1, maxLength: VALUE_BYTES_MAX, description: 'UUIDs and MACs follow from it and from the paths' }))),
  register: Type.Optional(Type.Boolean({ default: false })),
  hypervisor: Type.Optional(nullable(hypervisor)),
  user: Type.Optional(nullable(Type.String({ minLength: 1, maxLength: 256, description: 'name or number; only root may name somebody else' }))),
  waitSeconds: Type.Optional(nullable(Type.Number({ minimum: 0, maximum: WAIT_SECONDS_MAX, description: 'until the source is off, or the agent in it can make it quiet; null: it is taken as it is' }))),
}, exact);

export const MachineImportBody = Type.Object({
  directory: Type.String({ minLength: 1, maxLength: VALUE_BYTES_MAX, description: 'absolute, on the host' }),
  target: machine,
  allow: Type.Optional(Type.Array(Type.String({ minLength: 1, maxLength: VALUE_BYTES_MAX }), { maxItems: SETTINGS_MAX, description: 'files outside of the directory that the configuration may name' })),
}, exact);

export const MachineGetQuery = Type.Object({ path: machine, key: Type.Optional(key) }, exact);
export const MachineSetBody = Type.Object({ path: machine, settings: Type.Array(MachineSetting, { minItems: 1, maxItems: SETTINGS_MAX }) }, exact);
export const MachineRegisterBody = Type.Object({ path: machine, hypervisor: Type.Optional(nullable(hypervisor)) }, exact);
export const MachineStopBody = Type.Object({
  path: machine,
  force: Type.Optional(Type.Boolean({ default: false, description: 'take its power' })),
  timeoutSeconds: Type.Optional(Type.Number({ exclusiveMinimum: 0, maximum: STOP_SECONDS_MAX, description: 'how long it may take to shut down' })),
}, exact);
export const MachineRemoveQuery = Type.Object({ path: machine, force: queryFlag('also when it runs: its power is taken') }, exact);

export type MachineInfo = Static<typeof MachineInfo>;
export type MachineSetting = Static<typeof MachineSetting>;
export type MachineCloneBody = Static<typeof MachineCloneBody>;
export type MachineImportBody = Static<typeof MachineImportBody>;
export type HypervisorName = (typeof HYPERVISORS)[number];

/** Who asks, as the kernel says. */
export interface MachineCaller {
  readonly uid: number;
  readonly gid: number;
  readonly groups: readonly number[];
}

/** What the control API can ask of machines; see `service.ts` for the rules. */
export interface MachineService {
  list(query: { readonly container: string | null; readonly operationId: number | null; readonly power: boolean }): Promise<readonly MachineInfo[]>;
  /** With its state from the hypervisor. */
  show(path: string): Promise<MachineInfo>;
  clone(request: MachineCloneBody, caller: MachineCaller | null): Promise<JobInfo>;
  startImport(request: MachineImportBody): JobInfo;
  /** All parameters for null. */
  get(path: string, key: string | null, caller: MachineCaller | null): Promise<readonly MachineSetting[]>;
  set(path: string, settings: readonly MachineSetting[]): Promise<MachineInfo>;
  register(path: string, hypervisor: HypervisorName | null): Promise<MachineInfo>;
  unregister(path: string): Promise<MachineInfo>;
  start(path: string): Promise<MachineInfo>;
  stop(path: string, options: { readonly force: boolean; readonly timeoutMs: number }): Promise<MachineInfo>;
  remove(path: string, options: { readonly force: boolean }): Promise<RemoveResult>;
}
