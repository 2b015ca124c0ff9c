/**
 * The configuration of a machine of VMware (.vmx): what it says of the machine, what of it a clone must not have, what a clone gets anew.
 * The lines themselves are the matter of `vmx-text.ts`; the descriptors of disks that of `vmdk.ts`.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { ConfigurationChange, FileReference, MachineDocument, MachineFacts, MachineFormat, MachineIdentity } from '../format.js';
import {
  assertIdentity, assertMemory, assertOwnDisk, assertPath, canonicalMac, canonicalUuid, configurationName, endsWithOneOf, formatMemory, invalid,
  parseMac, parseMemory, parseName, parseProcessors, parseUuid, shown,
} from './values.js';
import { VmxText } from './vmx-text.js';

/** Lines that say what the source is, where it lay or what it was doing: a clone does not have them. `*` is a number. */
export const VMX_DROPPED: readonly { readonly key: string; readonly reason: string }[] = [
  { key: 'uuid.location', reason: 'made from the path of the file; VMware asks "moved or copied?" when it does not fit' },
  { key: 'vc.uuid', reason: 'the identity in vCenter, which gives a new one' },
  { key: 'sched.swap.derivedName', reason: 'the path of the swap file of the source' },
  { key: 'extendedConfigFile', reason: 'names the .vmxf, which is made anew' },
  { key: 'migrate.hostLog', reason: 'names the log of a migration of the source' },
  { key: 'migrate.hostLogState', reason: 'the state of a migration of the source' },
  { key: 'migrate.migrationId', reason: 'the state of a migration of the source' },
  { key: 'checkpoint.vmState', reason: 'names the memory of the suspended source: the clone would go on from it, on another disk' },
  { key: 'checkpoint.vmState.readOnly', reason: 'belongs to checkpoint.vmState' },
  { key: 'vmxstats.filename', reason: 'names the statistics of the source' },
  { key: 'vm.genid', reason: 'says to the guest that it is the same machine; made anew when it starts' },
  { key: 'vm.genidX', reason: 'the other half of vm.genid' },
  { key: 'vmci0.id', reason: 'an address that no two machines of a host may share; made anew when it starts' },
  { key: 'cleanShutdown', reason: 'how the source was ended' },
  { key: 'softPowerOff', reason: 'how the source was ended' },
  { key: 'ethernet*.generatedAddress', reason: 'the MAC address is a static one' },
  { key: 'ethernet*.generatedAddressOffset', reason: 'belongs to generatedAddress' },
];

/** Lines that a clone gets with a value of its own. */
export const VMX_MADE_NEW: readonly { readonly key: string; readonly value: string }[] = [
  { key: 'displayName', value: 'the name of the clone' },
  { key: 'uuid.bios', value: 'the UUID, in the bytes of VMware: "56 4d ... 3a-22 be ... 90"' },
  { key: 'uuid.action', value: 'keep: without it VMware may give another UUID at the first start, and other MAC addresses' },
  { key: 'ethernet*.addressType', value: 'static' },
  { key: 'ethernet*.address', value: 'the MAC address, 00:50:56:00:00:00 to 00:50:56:3f:ff:ff' },
  { key: '*.fileName', value: 'where the file lies for the clone' },
  { key: 'nvram', value: 'where the file lies for the clone; dropped when it has none, VMware then makes NAME.nvram' },
];

/** Files beside the .vmx that VMware made and makes anew. */
export const VMX_REGENERATED: readonly string[] = [
  '.log', '.vmxf', '.nvram', '.vswp', '.lck', '.vmss', '.vmsd', '.vmem', '.vmsn', '.hlog', '.scoreboard', '.vmx~', '.zdump', '-aux.xml',
];
const LOCK_OF_NFS = '.lck-';

/** What people call a thing in every format, and the key that it has in this one. */
const ALIASES: ReadonlyMap<string, string> = new Map([['name', 'displayName'], ['uuid', 'uuid.bios'], ['memory', 'memSize'], ['vcpu', 'numvcpus'], ['processors', 'numvcpus']]);

const MIB = 1024 ** 2;
const DEVICE_FILE = /^((?:scsi|sata|ide|nvme)[0-9]{1,2}:[0-9]{1,3}|(?:floppy|serial|parallel)[0-9]{1,2})\.filename$/;
const STATIC_MAC = /^00:50:56:[0-3][0-9a-f]:[0-9a-f]{2}:[0-9a-f]{2}$/;
/** What a device without a file has in its place. */
const NO_FILE = new Set(['', 'auto detect', 'emptybackingstring', '-1']);

export const vmxFormat: MachineFormat = {
  id: 'vmx',
  ownFiles: 'relative',
  diskFiles: 'vmdk',
  fileName: (machineName) => configurationName(machineName, '.vmx'),
  recognises: (fileName) => endsWithOneOf(fileName, ['.vmx']),
  isRegenerated: (fileName) => endsWithOneOf(fileName, VMX_REGENERATED) || fileName.startsWith(LOCK_OF_NFS),
  parse: (text) => new VmxDocument(new VmxText(text)),
};

class VmxDocument implements MachineDocument {
  readonly #text: VmxText;

  constructor(text: VmxText) {
    this.#text = text;
    if (!['config.version', 'virtualHW.version', 'displayName', 'guestOS'].some((key) => text.has(key))) {
      throw invalid('this is no .vmx file of a machine: it has neither config.version nor virtualHW.version, displayName or guestOS');
    }
  }

  facts(): MachineFacts {
    const memory = this.#number('memSize');
    const uuid = this.#text.get('uuid.bios');
    return {
      name: this.#text.get('displayName'),
      uuid: uuid === null ? null : canonicalUuid(uuid),
      memoryBytes: memory === null ? null : memory * MIB,
      processors: this.#text.has('numvcpus') ? this.#number('numvcpus') : 1,
      macs: this.#interfaces().map((name) => this.#macOf(name)),
      files: this.#files(),
    };
  }

  keys(): readonly string[] {
    return this.#text.keys();
  }

  get(key: string): string | null {
    const own = this.#ownKey(key, 'read');
    if (own === null) return null;
    const value = this.#text.get(own);
    if (value === null || own === key) return value;
    // By a name that all formats share, in the form that all formats share.
    if (own === 'memSize') return /^[0-9]{1,9}$/.test(value) ? formatMemory(Number(value) * MIB) : value;
    if (own === 'uuid.bios') return canonicalUuid(value) ?? value;
    return value;
  }

  set(key: string, value: string): void {
    const own = this.#ownKey(key, 'write');
    if (own === null) throw invalid(`there is no network interface for ${key}: the machine has ${this.#interfaces().length}, counted from 0`, { key });
    this.#text.set(own, checkedValue(key, own, value));
    const address = /^(ethernet[0-9]+)\.address$/i.exec(own);
    if (address === null) return;
    this.#text.set(`${address[1]!}.addressType`, 'static');
    this.#text.remove([`${address[1]!}.generatedAddress`, `${address[1]!}.generatedAddressOffset`]);
  }

  customise(identity: MachineIdentity): readonly ConfigurationChange[] {
    const interfaces = this.#interfaces();
    const files = this.#files();
    assertIdentity(identity, interfaces.length);
    for (const [index, mac] of identity.macs.entries()) parseStaticMac(`interface.${index}.mac`, mac);
    for (const { slot } of files) {
      if (this.#text.get(`${slot}.deviceType`)?.toLowerCase() === 'rawdisk') {
        throw new OffshootError('not-supported', `${slot} is a disk of the host itself: a clone would write to the same one`, { key: `${slot}.deviceType` });
      }
    }
    const changes: ConfigurationChange[] = [];
    const set = (key: string, after: string): void => {
      const before = this.#text.get(key);
      this.#text.set(key, after);
      if (before !== after) changes.push({ key, action: 'set', before, after });
    };
    const remove = (keys: readonly string[]): void => {
      for (const key of keys) changes.push({ key, action: 'removed', before: this.#text.get(key), after: null });
      this.#text.remove(keys);
    };
    set('displayName', identity.name);
    set('uuid.bios', vmwareUuid(identity.uuid));
    set('uuid.action', 'keep');
    interfaces.forEach((name, index) => {
      set(`${name}.addressType`, 'static');
      set(`${name}.address`, identity.macs[index]!);
    });
    for (const file of files) {
      const place = identity.fileOf(file);
      assertOwnDisk(file, place, false);
      if (file.slot === 'nvram' && place === null) remove(['nvram']);
      else if (place !== null) set(file.slot === 'nvram' ? 'nvram' : `${file.slot}.fileName`, assertPath(file.slot, place));
    }
    const dropped = VMX_DROPPED.map(({ key }) => new RegExp(`^${key.replaceAll('.', '\\.').replaceAll('*', '[0-9]+')}$`, 'i'));
    remove(this.#text.keys().filter((key) => dropped.some((pattern) => pattern.test(key))));
    return changes;
  }

  toText(): string {
    return this.#text.toText();
  }

  /** Null for an interface that the machine does not have. */
  #ownKey(key: string, purpose: 'read' | 'write'): string | null {
    const alias = ALIASES.get(key);
    if (alias !== undefined) return alias;
    const mac = /^interface\.([0-9]{1,3})\.mac$/.exec(key);
    if (mac === null) return key;
    const name = this.#interfaces()[Number(mac[1])];
    if (name === undefined) return null;
    // What is read is what the machine has now; what is written makes it static.
    return `${name}.${purpose === 'read' && !this.#hasStaticMac(name) && this.#text.has(`${name}.generatedAddress`) ? 'generatedAddress' : 'address'}`;
  }

  #number(key: string): number | null {
    const value = this.#text.get(key);
    return value !== null && /^[0-9]{1,9}$/.test(value.trim()) ? Number(value) : null;
  }

  /** `ethernet0`, `ethernet1`, by their numbers; those that are present. */
  #interfaces(): string[] {
    const numbers = new Set<number>();
    for (const key of this.#text.keys()) {
      const name = /^ethernet([0-9]{1,3})\.present$/i.exec(key);
      if (name !== null && isTrue(this.#text.get(key))) numbers.add(Number(name[1]));
    }
    return [...numbers].sort((a, b) => a - b).map((number) => `ethernet${number}`);
  }

  #hasStaticMac(name: string): boolean {
    return this.#text.get(`${name}.addressType`)?.toLowerCase() === 'static';
  }

  #macOf(name: string): string | null {
    const mac = (this.#hasStaticMac(name) ? null : this.#text.get(`${name}.generatedAddress`)) ?? this.#text.get(`${name}.address`);
    return mac === null ? null : canonicalMac(mac);
  }

  #files(): FileReference[] {
    const files: FileReference[] = [];
    for (const key of this.#text.keys()) {
      const lower = key.toLowerCase();
      const file = this.#text.get(key) ?? '';
      if (lower === 'nvram' && file !== '') files.push({ slot: 'nvram', file, role: 'nvram', diskFormat: null });
      const slot = DEVICE_FILE.exec(lower)?.[1];
      if (slot === undefined || NO_FILE.has(file.toLowerCase()) || !isTrue(this.#text.get(`${slot}.present`))) continue;
      const role = this.#roleOf(slot, file);
      if (role !== null) files.push({ slot, file, role, diskFormat: role === 'disk' && file.toLowerCase().endsWith('.vmdk') ? 'vmdk' : null });
    }
    return files;
  }

  /** Null for a device of the host. */
  #roleOf(slot: string, file: string): FileReference['role'] | null {
    const type = (this.#text.get(`${slot}.deviceType`) ?? '').toLowerCase();
    if (/^(?:scsi|sata|ide|nvme)/.test(slot)) {
      if (type === 'cdrom-image') return 'cdrom';
      if (type.includes('cdrom')) return null;
      return 'disk';
    }
    const fileType = (this.#text.get(`${slot}.fileType`) ?? '').toLowerCase();
    return fileType === 'device' || file.startsWith('/dev/') ? null : 'other';
  }
}

function checkedValue(key: string, own: string, value: string): string {
  const lower = own.toLowerCase();
  if (lower === 'displayname') return parseName(key, value);
  if (lower === 'uuid.bios') return vmwareUuid(parseUuid(key, value));
  if (lower === 'numvcpus') return String(parseProcessors(key, value));
  if (lower === 'memsize') {
    const mib = key === own && /^[0-9]{1,9}$/.test(value) ? Number(value) : key === 'memory' || !/^[0-9]+$/.test(value) ? parseMemory(key, value) / MIB : Number(value);
    if (!Number.isInteger(mib) || mib % 4 !== 0) throw invalid(`${key} must be a multiple of 4 MiB, not ${shown(value)}`, { key });
    assertMemory(key, mib * MIB);
    return String(mib);
  }
  if (/^ethernet[0-9]+\.address$/.test(lower)) return parseStaticMac(key, value);
  if (lower.endsWith('.present') && !/^(true|false)$/i.test(value)) throw invalid(`${key} must be TRUE or FALSE, not ${shown(value)}`, { key });
  if (DEVICE_FILE.test(lower) || lower === 'nvram') return value === '' ? value : assertPath(key, value);
  return value;
}

/** VMware does not start a machine with a static address out of this range. */
function parseStaticMac(key: string, value: string): string {
  const mac = parseMac(key, value);
  if (!STATIC_MAC.test(mac)) throw invalid(`${key} must lie between 00:50:56:00:00:00 and 00:50:56:3f:ff:ff, VMware's range of static addresses, not ${mac}`, { key });
  return mac;
}

/** `564d7b10-...` as VMware writes it: `56 4d 7b 10 ...-...`, sixteen bytes in two halves. */
export function vmwareUuid(uuid: string): string {
  const bytes = uuid.replaceAll('-', '').match(/../g) ?? [];
  return `${bytes.slice(0, 8).join(' ')}-${bytes.slice(8).join(' ')}`;
}

function isTrue(value: string | null): boolean {
  return value?.trim().toLowerCase() === 'true';
}
