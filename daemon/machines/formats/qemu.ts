/**
 * The format of `machine.json`: reads it, keeps it byte for byte while nothing changes, gives a clone its own identity. A changed
 * description is written with the indentation it had, its fields in their order.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { ConfigurationChange, FileReference, MachineDocument, MachineFacts, MachineFormat, MachineIdentity } from '../format.js';
import { checkQemuMachine, type QemuMachine } from './qemu-schema.js';
import { assertIdentity, assertOwnDisk, assertPath, assertTextSize, canonicalMac, endsWithOneOf, invalid, lineAt, parseMac, parseMemory, parseName, shown } from './values.js';

export const QEMU_FILE_NAME = 'machine.json';

/** The description holds nothing of a running machine, so that nothing is dropped. */
export const QEMU_MADE_NEW: readonly { readonly key: string; readonly value: string }[] = [
  { key: 'name', value: 'the name of the clone' },
  { key: 'uuid', value: 'the UUID' },
  { key: 'networkInterfaces.*.mac', value: 'the MAC address' },
  { key: 'disks.*.file', value: 'where the file lies for the clone; kernel, initrd, firmware, nvram and consoleLog likewise' },
];

/** Files beside the description that a running machine made. */
export const QEMU_REGENERATED: readonly string[] = ['.log', '.pid', '.sock', '.qmp'];

const ALIASES: ReadonlyMap<string, string> = new Map([['vcpu', 'processors'], ['kernelArguments', 'append']]);
const FILES = ['kernel', 'initrd', 'firmware', 'nvram', 'consoleLog'] as const;
const ROLES = { kernel: 'kernel', initrd: 'initrd', firmware: 'firmware', nvram: 'nvram', consoleLog: 'other' } as const;

export const qemuFormat: MachineFormat = {
  id: 'qemu',
  ownFiles: 'absolute',
  diskFiles: 'raw',
  fileName(machineName) {
    parseName('name', machineName);
    return QEMU_FILE_NAME;
  },
  recognises: (fileName) => fileName === QEMU_FILE_NAME,
  isRegenerated: (fileName) => endsWithOneOf(fileName, QEMU_REGENERATED),
  parse: (text) => new QemuDocument(text),
};

/** The description in `text`, for who starts the machine. */
export function parseQemuMachine(text: string): QemuMachine {
  assertTextSize(text, QEMU_FILE_NAME);
  let value: unknown;
  try {
    value = JSON.parse(text.startsWith('\uFEFF') ? text.slice(1) : text) as unknown;
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    const position = /position ([0-9]+)/.exec(message)?.[1];
    const line = lineAt(text, position === undefined ? text.length : Number(position));
    throw new OffshootError('invalid-argument', `line ${line} of ${QEMU_FILE_NAME} is no JSON: ${message.slice(0, 200)}`, { line }, error);
  }
  return checkQemuMachine(value);
}

class QemuDocument implements MachineDocument {
  #machine: QemuMachine;
  readonly #original: string;
  readonly #originalJson: string;

  constructor(text: string) {
    this.#original = text;
    this.#machine = parseQemuMachine(text);
    this.#originalJson = JSON.stringify(this.#machine);
  }

  facts(): MachineFacts {
    const machine = this.#machine;
    return {
      name: machine.name,
      uuid: machine.uuid ?? null,
      memoryBytes: parseMemory('memory', machine.memory),
      processors: machine.processors,
      macs: (machine.networkInterfaces ?? []).map(({ mac }) => mac === undefined ? null : canonicalMac(mac)),
      files: this.#files(),
    };
  }

  /** Paths of all values, `annotations` left out. */
  keys(): readonly string[] {
    const keys: string[] = [];
    const walk = (value: unknown, path: string): void => {
      if (path === 'annotations') return;
      if (typeof value !== 'object' || value === null) keys.push(path);
      else for (const [name, child] of Object.entries(value)) walk(child, path === '' ? name : `${path}.${name}`);
    };
    walk(this.#machine, '');
    return keys;
  }

  get(key: string): string | null {
    let value: unknown = this.#machine;
    for (const name of ownPath(key)) {
      if (typeof value !== 'object' || value === null || !Object.hasOwn(value, name)) return null;
      value = (value as Record<string, unknown>)[name];
    }
    return typeof value === 'string' ? value : JSON.stringify(value);
  }

  set(key: string, value: string): void {
    const path = ownPath(key);
    if (path[0] === 'format') throw invalid('format cannot be changed', { key });
    // A value is a text where the schema wants one, and otherwise what it says as JSON: a number, true, a list.
    const candidates: unknown[] = [path.at(-1) === 'mac' ? parseMac(key, value) : value];
    try {
      candidates.push(JSON.parse(value) as unknown);
    } catch {
      // No JSON: a text, then.
    }
    let first: unknown;
    for (const candidate of candidates) {
      const machine = structuredClone(this.#machine);
      assign(machine, path, candidate, key);
      try {
        this.#machine = checkQemuMachine(machine);
        return;
      } catch (error) {
        first ??= error;
      }
    }
    throw first instanceof OffshootError ? invalid(`${key} cannot be ${shown(value)}: ${first.message}`, { key }) : first;
  }

  customise(identity: MachineIdentity): readonly ConfigurationChange[] {
    const machine = structuredClone(this.#machine);
    const interfaces = machine.networkInterfaces ?? [];
    assertIdentity(identity, interfaces.length);
    const changes: ConfigurationChange[] = [];
    const note = (key: string, before: string | undefined, after: string): void => {
      if (before !== after) changes.push({ key, action: 'set', before: before ?? null, after });
    };
    note('name', machine.name, identity.name);
    machine.name = identity.name;
    note('uuid', machine.uuid, identity.uuid);
    machine.uuid = identity.uuid;
    interfaces.forEach((networkInterface, index) => {
      note(`networkInterfaces.${index}.mac`, networkInterface.mac, identity.macs[index]!);
      networkInterface.mac = identity.macs[index]!;
    });
    const files = this.#files();
    machine.disks.forEach((disk, index) => {
      const place = identity.fileOf(files[index]!);
      assertOwnDisk(files[index]!, place, disk.readOnly === true);
      if (place === null) return;
      note(`disks.${index}.file`, disk.file, place);
      disk.file = assertPath(`disks.${index}.file`, place);
    });
    for (const file of files.slice(machine.disks.length)) {
      const place = identity.fileOf(file);
      if (place === null) continue;
      const name = file.slot as (typeof FILES)[number];
      note(name, machine[name], place);
      machine[name] = assertPath(name, place);
    }
    this.#machine = checkQemuMachine(machine);
    return changes;
  }

  toText(): string {
    if (JSON.stringify(this.#machine) === this.#originalJson) return this.#original;
    const indentation = /\n([ \t]+)\S/.exec(this.#original.slice(0, 4096))?.[1] ?? (this.#original.includes('\n') ? '' : '  ');
    const end = this.#original.includes('\r\n') ? '\r\n' : '\n';
    return `${JSON.stringify(this.#machine, null, indentation).replaceAll('\n', end)}${end}`;
  }

  /** Disks first, in their order. */
  #files(): FileReference[] {
    const disks = this.#machine.disks.map(({ file }, index): FileReference => ({ slot: `disk${index}`, file, role: 'disk', diskFormat: 'raw' }));
    const others = FILES.flatMap((name): FileReference[] => {
      const file = this.#machine[name];
      return file === undefined ? [] : [{ slot: name, file, role: ROLES[name], diskFormat: null }];
    });
    return [...disks, ...others];
  }
}

/** `interface.0.mac`, as in the other formats, is `networkInterfaces.0.mac` here. */
function ownPath(key: string): string[] {
  return (ALIASES.get(key) ?? key).replace(/^interface\.(?=[0-9])/, 'networkInterfaces.').split('.');
}

function assign(machine: QemuMachine, path: readonly string[], value: unknown, key: string): void {
  let place: unknown = machine;
  for (const name of path.slice(0, -1)) {
    place = typeof place === 'object' && place !== null && Object.hasOwn(place, name) ? (place as Record<string, unknown>)[name] : undefined;
  }
  const last = path.at(-1)!;
  const isThere = typeof place === 'object' && place !== null && (Array.isArray(place) ? /^(0|[1-9][0-9]{0,3})$/.test(last) && Number(last) < place.length : last !== '__proto__');
  if (!isThere) throw invalid(`${key} is no key of this machine's description`, { key });
  (place as Record<string, unknown>)[last] = value;
}
