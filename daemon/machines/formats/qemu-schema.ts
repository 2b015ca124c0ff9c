/**
 * The description of a machine for QEMU without libvirt: `machine.json`, its shape as a schema, its limits, what of it must agree. Its
 * text for people is in MACHINES.md. It describes a machine and no command: what becomes of it on a command line is in
 * `qemu-arguments.ts`, and nothing in it names a program.
 */
import { Type, type Static } from '@sinclair/typebox';
import { Value } from '@sinclair/typebox/value';

import { checkExtraArguments } from './qemu-extra-arguments.js';
import { invalid, parseMac, parseMemory, parseName, shown } from './values.js';

export const QEMU_DESCRIPTION_FORMAT = 'offshoot-machine/1';

const exact = { additionalProperties: false } as const;
const path = Type.String({ minLength: 1, maxLength: 4095, pattern: '^[^\\u0000-\\u001f\\u007f]+$' });
const choice = <const T extends readonly string[]>(...values: T) => Type.Unsafe<T[number]>(Type.Union(values.map((value) => Type.Literal(value))));

/** What a name on QEMU's command line may hold, so that it needs no quoting there. */
const word = '^[A-Za-z0-9][A-Za-z0-9._+-]*$';

const Disk = Type.Object({
  file: path,
  interface: Type.Optional(choice('virtio', 'scsi', 'nvme', 'ide')),
  serial: Type.Optional(Type.String({ pattern: '^[A-Za-z0-9._-]{1,20}$' })),
  cache: Type.Optional(choice('none', 'directsync', 'writeback', 'writethrough')),
  readOnly: Type.Optional(Type.Boolean()),
}, exact);

const Backend = Type.Union([
  Type.Object({
    type: Type.Literal('user'),
    /** `tcp:127.0.0.1:2222-:22`: a port of the host that leads into the guest. */
    forwards: Type.Optional(Type.Array(Type.String({ pattern: '^(tcp|udp):[0-9.]{0,15}:[0-9]{1,5}-[0-9.]{0,15}:[0-9]{1,5}$' }), { maxItems: 32 })),
    restrict: Type.Optional(Type.Boolean()),
  }, exact),
  Type.Object({ type: Type.Literal('bridge'), bridge: Type.String({ pattern: '^[A-Za-z0-9._-]{1,15}$' }) }, exact),
  Type.Object({ type: Type.Literal('tap'), device: Type.String({ pattern: '^[A-Za-z0-9._-]{1,15}$' }) }, exact),
]);

const NetworkInterface = Type.Object({
  mac: Type.Optional(Type.String()),
  model: Type.Optional(choice('virtio', 'e1000', 'e1000e', 'rtl8139', 'vmxnet3')),
  backend: Backend,
}, exact);

export const QemuMachineSchema = Type.Object({
  format: Type.Literal(QEMU_DESCRIPTION_FORMAT),
  name: Type.String(),
  uuid: Type.Optional(Type.String({ pattern: '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' })),
  architecture: Type.Optional(choice('x86_64', 'aarch64')),
  machineType: Type.Optional(Type.String({ pattern: word, maxLength: 64 })),
  accelerator: Type.Optional(choice('auto', 'kvm', 'tcg')),
  cpu: Type.Optional(Type.String({ pattern: '^[A-Za-z0-9][A-Za-z0-9._+=,-]*$', maxLength: 1024 })),
  processors: Type.Integer({ minimum: 1, maximum: 4096 }),
  memory: Type.String(),
  disks: Type.Array(Disk, { maxItems: 64 }),
  networkInterfaces: Type.Optional(Type.Array(NetworkInterface, { maxItems: 16 })),
  kernel: Type.Optional(path),
  initrd: Type.Optional(path),
  append: Type.Optional(Type.String({ maxLength: 4096, pattern: '^[^\\u0000-\\u001f\\u007f]*$' })),
  firmware: Type.Optional(path),
  nvram: Type.Optional(path),
  consoleLog: Type.Optional(path),
  guestAgent: Type.Optional(Type.Boolean()),
  extraArguments: Type.Optional(Type.Array(Type.String({ minLength: 1, maxLength: 4096, pattern: '^[^\\u0000-\\u001f\\u007f]+$' }), { maxItems: 128 })),
  /** Whatever people want to keep with a machine; nothing reads it. */
  annotations: Type.Optional(Type.Unknown()),
}, exact);

export type QemuMachine = Static<typeof QemuMachineSchema>;

/** Deeper than the description goes; what people keep in `annotations` goes no deeper either. */
const DEPTH_MAX = 32;

/** The value as a description; `invalid-argument` with the path of what is wrong. */
export function checkQemuMachine(value: unknown): QemuMachine {
  assertDepth(value);
  const problem = Value.Errors(QemuMachineSchema, value).First();
  if (problem !== undefined) {
    const where = problem.path.replace(/^\//, '').replaceAll('/', '.');
    const found = problem.value === undefined ? 'it is missing' : `it is ${JSON.stringify(problem.value).slice(0, 80)}`;
    throw invalid(`${where === '' ? 'the whole' : where} of the machine's description: ${problem.message}; ${found}`, { path: where });
  }
  const machine = value as QemuMachine;
  parseName('name', machine.name);
  parseMemory('memory', machine.memory);
  (machine.networkInterfaces ?? []).forEach(({ mac }, index) => {
    if (mac !== undefined) parseMac(`networkInterfaces.${index}.mac`, mac);
  });
  if (machine.initrd !== undefined && machine.kernel === undefined) throw invalid('initrd needs kernel', { path: 'initrd' });
  if (machine.append !== undefined && machine.kernel === undefined) throw invalid('append needs kernel', { path: 'append' });
  if (machine.nvram !== undefined && machine.firmware === undefined) throw invalid('nvram needs firmware: it holds the variables of that firmware', { path: 'nvram' });
  if (machine.consoleLog !== undefined && !machine.consoleLog.endsWith('.log')) {
    throw invalid(`consoleLog must end in .log, so that a clone does not take it along: ${shown(machine.consoleLog)}`, { path: 'consoleLog' });
  }
  machine.disks.forEach((disk, index) => {
    if (disk.readOnly === true && disk.interface === 'ide') throw invalid('a disk of the interface ide cannot be read-only: take virtio or scsi', { path: `disks.${index}.readOnly` });
  });
  const files = [...machine.disks.map(({ file }) => file), ...(machine.nvram === undefined ? [] : [machine.nvram])];
  const twice = files.find((file, index) => files.indexOf(file) !== index);
  if (twice !== undefined) throw invalid(`two disks of the machine cannot be one file: ${shown(twice)}`, { path: 'disks' });
  checkExtraArguments(machine.extraArguments ?? []);
  return machine;
}

/** Whatever walks through the value later may do so by calling itself. */
function assertDepth(value: unknown): void {
  let level: unknown[] = [value];
  for (let depth = 0; level.length > 0; depth += 1) {
    if (depth > DEPTH_MAX) throw invalid(`the machine's description is nested more than ${DEPTH_MAX} deep`);
    level = level.flatMap((each) => typeof each === 'object' && each !== null ? Object.values(each) as unknown[] : []);
  }
}
