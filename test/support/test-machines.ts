/**
 * A format and a hypervisor for tests of what is done with machines, whatever formats and hypervisors there are: small, and real. The format is
 * a JSON object in `machine.json`; the hypervisor keeps what is registered in a directory, so that it outlives servers, and does what a file there tells it.
 *
 * Imports types only: it is loaded into a daemon too, whose classes must not be there twice.
 */
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';

import type { ErrorKind, OffshootError } from '../../blockstore/errors.js';
import type { Hypervisor, MachineState, MachineToRegister } from '../../daemon/hypervisor/hypervisor.js';
import type { ConfigurationChange, FileReference, MachineDocument, MachineFormat, MachineIdentity } from '../../daemon/machines/format.js';

export type NewError = (kind: ErrorKind, message: string) => OffshootError;

interface Description {
  name: string;
  uuid: string;
  macs: string[];
  memory: number;
  disks: Record<string, string>;
  formats?: Record<string, string>;
  nvram?: string;
  firmware?: string;
}

/** What the hypervisor, or the format, is to do; in `control.json` beside the registrations, so that another process can change it. */
export interface Orders {
  /** The server dies at the nth call of this, before or after it was carried out. */
  readonly kill?: { readonly at: 'probe' | 'customise' | 'register' | 'unregister'; readonly nth: number; readonly after?: boolean };
  /** The nth registration is refused. */
  readonly refuse?: number;
  /** Machines of this name are refused, as often as they are tried, as what may not be. */
  readonly forbid?: string;
  readonly unregisterFails?: boolean;
  /** How long each registration takes. */
  readonly registerMs?: number;
  readonly agent?: boolean;
  readonly unusable?: boolean;
}

export interface Registered extends MachineToRegister {
  readonly state: MachineState;
}

/** What a test sees and says, of the hypervisor whose directory this is. */
export class TestHypervisorSeat {
  readonly directory: string;

  constructor(directory: string) {
    this.directory = directory;
    fs.mkdirSync(path.join(directory, 'machines'), { recursive: true });
  }

  order(orders: Orders): void {
    // At once, for the daemon reads it at any moment.
    const file = path.join(this.directory, 'control.json');
    fs.writeFileSync(`${file}.new`, JSON.stringify(orders));
    fs.renameSync(`${file}.new`, file);
  }

  orders(): Orders { return JSON.parse(readOr(path.join(this.directory, 'control.json'), '{}')) as Orders; }

  registered(): Registered[] {
    return fs.readdirSync(path.join(this.directory, 'machines')).toSorted().map((name) => JSON.parse(fs.readFileSync(path.join(this.directory, 'machines', name), 'utf8')) as Registered);
  }

  setState(uuid: string, state: MachineState): void {
    const file = this.fileOf(uuid);
    fs.writeFileSync(file, JSON.stringify({ ...JSON.parse(fs.readFileSync(file, 'utf8')) as Registered, state }));
  }

  fileOf(uuid: string): string { return path.join(this.directory, 'machines', `${uuid}.json`); }
  calls(): string[] { return readOr(path.join(this.directory, 'calls'), '').split('\n').filter((line) => line !== ''); }

  /** Calls of a kind that were begun, or carried out. */
  count(verb: string, after = false): number {
    return readOr(path.join(this.directory, after ? 'done' : 'calls'), '').split('\n').filter((line) => line.split(' ', 1)[0] === verb).length;
  }

  /** Notes a call, and later that it was carried out; the server dies here when it was told to. */
  note(what: string, after = false): number {
    fs.appendFileSync(path.join(this.directory, after ? 'done' : 'calls'), `${what}\n`);
    const verb = what.split(' ', 1)[0] ?? '';
    const nth = this.count(verb, after);
    const { kill } = this.orders();
    if (kill?.at === verb && kill.nth === nth && (kill.after ?? false) === after) process.kill(process.pid, 'SIGKILL');
    return nth;
  }
}

export function testHypervisor(seat: TestHypervisorSeat, error: NewError): Hypervisor {
  const read = (uuid: string): Registered | null => JSON.parse(readOr(seat.fileOf(uuid), 'null')) as Registered | null;
  const mustRead = (uuid: string): Registered => {
    const found = read(uuid);
    if (found === null) throw error('not-found', `the test hypervisor knows no ${uuid}`);
    return found;
  };
  return {
    id: 'qemu',
    abilities: { formats: ['qemu'], shutdown: true, guestAgent: true, quiesce: true, isRemote: false },
    probe: () => {
      seat.note('probe');
      return Promise.resolve(seat.orders().unusable === true ? { usable: false, reason: 'it was told to be away' } : { usable: true, version: '1' });
    },
    register: async (machine) => {
      const nth = seat.note(`register ${machine.name}`);
      await delay(seat.orders().registerMs ?? 1);
      if (seat.orders().refuse === nth) throw error('io-error', `the test hypervisor refuses ${machine.name}`);
      if (seat.orders().forbid === machine.name) throw error('not-permitted', `the test hypervisor never takes ${machine.name}`);
      const other = seat.registered().find((each) => each.name === machine.name || each.uuid === machine.uuid);
      if (other !== undefined && other.directory !== machine.directory) throw error('already-exists', `the test hypervisor knows a ${other.name} already`);
      fs.writeFileSync(seat.fileOf(machine.uuid), JSON.stringify({ ...machine, state: other?.state ?? 'shut-off' }));
      seat.note(`register ${machine.name}`, true);
      return { externalId: machine.uuid };
    },
    unregister: async (externalId) => {
      seat.note(`unregister ${externalId}`);
      await delay(1);
      if (seat.orders().unregisterFails === true) throw error('source-unreachable', 'the test hypervisor does not answer');
      if (read(externalId)?.state === 'running') throw error('in-use', 'it runs');
      fs.rmSync(seat.fileOf(externalId), { force: true });
      seat.note(`unregister ${externalId}`, true);
    },
    start: (externalId) => { mustRead(externalId); seat.setState(externalId, 'running'); return Promise.resolve(); },
    stop: (externalId) => { mustRead(externalId); seat.setState(externalId, 'shut-off'); return Promise.resolve(); },
    status: (externalId) => Promise.resolve(read(externalId)?.state ?? 'missing'),
    pingAgent: () => Promise.resolve(seat.orders().agent === true),
    freeze: (externalId) => { seat.note(`freeze ${externalId}`); return Promise.resolve(); },
    thaw: (externalId) => { seat.note(`thaw ${externalId}`); return Promise.resolve(); },
  };
}

/** `seat`: where calls of `customise` are noted; null: nowhere. */
export function testFormat(seat: TestHypervisorSeat | null, error: NewError): MachineFormat {
  return {
    id: 'qemu',
    ownFiles: 'absolute',
    diskFiles: 'raw',
    fileName: () => 'machine.json',
    recognises: (fileName, text) => fileName === 'machine.json' && text.trimStart().startsWith('{'),
    isRegenerated: (fileName) => fileName.endsWith('.log') || fileName.endsWith('.nvram'),
    parse: (text) => parse(text, seat, error),
  };
}

function parse(text: string, seat: TestHypervisorSeat | null, error: NewError): MachineDocument {
  let content: Description;
  try {
    content = JSON.parse(text) as Description;
  } catch {
    throw error('invalid-argument', 'machine.json is no JSON');
  }
  const files = (): FileReference[] => [
    ...Object.entries(content.disks).map(([slot, file]) => ({ slot, file, role: 'disk' as const, diskFormat: content.formats?.[slot] ?? 'raw' })),
    ...(content.nvram === undefined ? [] : [{ slot: 'nvram', file: content.nvram, role: 'nvram' as const, diskFormat: null }]),
    ...(content.firmware === undefined ? [] : [{ slot: 'firmware', file: content.firmware, role: 'firmware' as const, diskFormat: null }]),
  ];
  const values = (): Record<string, string> => ({ name: content.name, uuid: content.uuid, memory: String(content.memory), ...content.disks });
  return {
    facts: () => ({ name: content.name, uuid: content.uuid, memoryBytes: content.memory, processors: 1, macs: [...content.macs], files: files() }),
    keys: () => Object.keys(values()),
    get: (key) => values()[key] ?? null,
    set: (key, value) => {
      if (key === 'memory' && /^\d+$/u.test(value)) content.memory = Number(value);
      else if (key === 'name' || key === 'uuid') content[key] = value;
      else if (key in content.disks) content.disks[key] = value;
      else throw error('invalid-argument', `machine.json has no ${key} that could be ${value}`);
    },
    customise: (identity: MachineIdentity): ConfigurationChange[] => {
      seat?.note(`customise ${identity.name}`);
      // As the real formats say.
      if (new Set(identity.macs).size !== identity.macs.length) throw error('invalid-argument', 'two network interfaces have the same MAC address');
      const before = content;
      content = { ...before, name: identity.name, uuid: identity.uuid, macs: [...identity.macs], disks: { ...before.disks }, formats: {} };
      for (const file of files()) {
        const place = identity.fileOf(file);
        if (place === null) continue;
        if (file.role === 'disk') content.disks[file.slot] = place;
        else if (file.role === 'nvram') content.nvram = place;
      }
      return [{ key: 'name', action: 'set', before: before.name, after: content.name }];
    },
    toText: () => JSON.stringify(content, null, 2),
  };
}

function readOr(file: string, otherwise: string): string {
  try {
    return fs.readFileSync(file, 'utf8');
  } catch {
    return otherwise;
  }
}
