/**
 * A domain's XML as libvirt keeps it and `virsh dumpxml` writes it, of a running machine too: what it says of the machine, what of it a
 * clone must not have, what a clone gets anew. Where things lie in it is in `libvirt-parts.ts`, keys are in `libvirt-keys.ts`; changes
 * are made in place, so that everything else keeps every byte.
 *
 * Disks are always given as raw: a guest writes what it likes to its disk, and whoever looked into it for a format would believe the
 * guest.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { ConfigurationChange, MachineDocument, MachineFacts, MachineFormat, MachineIdentity } from '../format.js';
import { getKey, listKeys, setKey } from './libvirt-keys.js';
import { devicesOf, diskSlot, filePlaces, memoryBytes, type FilePlace } from './libvirt-parts.js';
import { assertIdentity, assertOwnDisk, assertPath, canonicalMac, canonicalUuid, configurationName, endsWithOneOf, invalid, shown } from './values.js';
import { childrenOf, escapeAttribute, escapeText, find, XmlTextDocument, type Element } from './xml-text.js';

interface Dropped {
  /** Elements from the domain on, `*` for any; `@name` at the end for an attribute. */
  readonly path: string;
  readonly reason: string;
  /** Only where this holds for the element (for an attribute: its element). */
  readonly when?: (xml: XmlTextDocument, element: Element) => boolean;
}

const parentIs = (attribute: string, value: string) => (xml: XmlTextDocument, element: Element): boolean => xml.attribute(element.parent, attribute) === value;
/** Where libvirt itself puts the socket of a channel, by the domain's name and number. */
const GENERATED_CHANNEL = /\/(?:channel\/target|libvirt\/qemu\/channel|qemu\/run\/channel)\//;

/** What says which machine the source is, or what it was doing when it was looked at: a clone does not have it. */
export const LIBVIRT_DROPPED: readonly Dropped[] = [
  { path: '@id', reason: 'the number of the running domain' },
  { path: 'hwuuid', reason: 'a second UUID for the guest: the clone has the one' },
  { path: 'devices/*/alias', reason: 'the name of a device of the running domain', when: (xml, element) => !(xml.attribute(element, 'name') ?? '').startsWith('ua-') },
  { path: 'devices/interface/target@dev', reason: 'the name of the tap device, of which a host has one (vnet3)', when: (xml, element) => xml.attribute(element, 'managed') !== 'no' },
  { path: 'devices/interface/source@portid', reason: 'the port of the running domain in the network' },
  { path: 'devices/interface/source@bridge', reason: 'the bridge of the network at the time', when: (xml, element) => xml.attribute(element.parent, 'type') === 'network' },
  { path: 'devices/interface/virtualport/parameters@interfaceid', reason: 'the port of a virtual switch; libvirt makes a new one' },
  { path: 'devices/interface/virtualport/parameters@instanceid', reason: 'the port of a virtual switch; libvirt makes a new one' },
  { path: 'devices/disk/backingStore', reason: 'the chain of files that a running machine had open; a disk of the store is one raw file' },
  { path: 'devices/disk/mirror', reason: 'a block job of the running domain' },
  { path: 'devices/disk/source@index', reason: 'a number of the running domain' },
  { path: 'devices/console@tty', reason: 'the terminal of the running domain' },
  { path: 'devices/*/source@path', reason: 'the terminal of the running domain', when: parentIs('type', 'pty') },
  {
    path: 'devices/channel/source', reason: 'the socket that libvirt made for the source; it makes one for each',
    when: (xml, element) => xml.attribute(element.parent, 'type') === 'unix' && GENERATED_CHANNEL.test(xml.attribute(element, 'path') ?? ''),
  },
  { path: 'devices/channel/target@state', reason: 'whether the agent of the running domain was connected' },
  { path: 'devices/graphics@port', reason: 'the port that the running domain had, or that two machines would fight for' },
  { path: 'devices/graphics@tlsPort', reason: 'the port that the running domain had, or that two machines would fight for' },
  { path: 'devices/graphics@websocket', reason: 'the port that the running domain had, or that two machines would fight for' },
  { path: 'devices/vsock/cid@address', reason: 'an address of which a host has one' },
  { path: 'seclabel/label', reason: 'the label of the running domain', when: parentIs('type', 'dynamic') },
  { path: 'seclabel/imagelabel', reason: 'the label of the running domain', when: parentIs('type', 'dynamic') },
];

/** What a clone gets with a value of its own. */
export const LIBVIRT_MADE_NEW: readonly { readonly path: string; readonly value: string }[] = [
  { path: 'name', value: 'the name of the clone' },
  { path: 'uuid', value: 'the UUID' },
  { path: 'genid', value: 'empty: libvirt makes a new one, which tells the guest that it was cloned' },
  { path: 'sysinfo/system/entry[name=uuid]', value: 'the UUID: libvirt takes no other' },
  { path: 'devices/interface/mac@address', value: 'the MAC address' },
  { path: 'devices/disk/source@file', value: 'where the disk lies for the clone; the disk is of type file' },
  { path: 'devices/disk/driver@type', value: 'raw' },
  { path: 'os/nvram', value: 'where the file lies for the clone; empty when it has none, libvirt then makes one from the template' },
  { path: 'devices/graphics@autoport', value: 'yes, where a port was given: no two machines of a host have the same' },
  { path: 'devices/vsock/cid@auto', value: 'yes' },
];

/** Files beside the XML that a running machine, or libvirt, made. A saved memory would let the clone go on from it, on another disk. */
export const LIBVIRT_REGENERATED: readonly string[] = ['.log', '.pid', '.sock', '.save', '.monitor'];

/** Other documents of libvirt that people have at hand, and what to do instead. */
const OTHER_ROOTS: Readonly<Record<string, string>> = {
  domstatus: 'this is what libvirt keeps of a running domain: use what "virsh dumpxml" prints',
  domainsnapshot: 'this is a snapshot: use what "virsh dumpxml" prints',
  domainbackup: 'this is a backup job: use what "virsh dumpxml" prints',
};
export const libvirtFormat: MachineFormat = {
  id: 'libvirt',
  ownFiles: 'absolute',
  diskFiles: 'raw',
  fileName: (machineName) => configurationName(machineName, '.xml'),
  recognises: (fileName, text) => endsWithOneOf(fileName, ['.xml']) && mayBeDomain(text),
  isRegenerated: (fileName) => endsWithOneOf(fileName, LIBVIRT_REGENERATED),
  parse: (text) => new LibvirtDocument(new XmlTextDocument(text, "the domain's XML")),
};

/** Looks behind the declaration and the comments; a beginning that is nothing else may go on as a domain. */
function mayBeDomain(text: string): boolean {
  let rest = text.replace(/^\uFEFF/, '').trimStart();
  if (rest === '') return false;
  for (const [open, close] of [['<?xml', '?>'], ...Array.from({ length: 100 }, () => ['<!--', '-->'])] as [string, string][]) {
    if (!rest.startsWith(open)) continue;
    const end = rest.indexOf(close, open.length);
    if (end < 0) return true;
    rest = rest.slice(end + close.length).trimStart();
  }
  return rest === '' || /^<domain[\s/>]/.test(rest);
}

class LibvirtDocument implements MachineDocument {
  readonly #xml: XmlTextDocument;

  constructor(xml: XmlTextDocument) {
    this.#xml = xml;
    const { name } = xml.root;
    if (name === 'domain') return;
    const advice = Object.hasOwn(OTHER_ROOTS, name) ? OTHER_ROOTS[name]! : 'a machine of libvirt is a <domain>';
    throw invalid(`line ${xml.lineOf(xml.root)} of the domain's XML begins with <${name}>: ${advice}`, { line: xml.lineOf(xml.root) });
  }

  facts(): MachineFacts {
    const xml = this.#xml;
    const vcpu = find(xml.root, 'vcpu')?.text.trim() ?? '1';
    return {
      name: find(xml.root, 'name')?.text ?? null,
      uuid: canonicalUuid(find(xml.root, 'uuid')?.text ?? ''),
      memoryBytes: memoryBytes(xml, find(xml.root, 'memory')),
      processors: /^[0-9]{1,4}$/.test(vcpu) ? Number(vcpu) : null,
      macs: devicesOf(xml, 'interface').map((element) => canonicalMac(xml.attribute(find(element, 'mac'), 'address') ?? '')),
      files: filePlaces(xml).map(({ reference }) => reference),
    };
  }

  keys(): readonly string[] {
    return listKeys(this.#xml);
  }

  get(key: string): string | null {
    return getKey(this.#xml, key);
  }

  set(key: string, value: string): void {
    setKey(this.#xml, key, value);
  }

  customise(identity: MachineIdentity): readonly ConfigurationChange[] {
    const interfaces = devicesOf(this.#xml, 'interface');
    assertIdentity(identity, interfaces.length);
    const places = filePlaces(this.#xml).map((place) => ({ place, file: identity.fileOf(place.reference) }));
    this.#assertCanBeCloned(places);
    const changes = new Changes(this.#xml);
    changes.child(this.#xml.root, 'name', 'name', identity.name);
    changes.child(this.#xml.root, 'uuid', 'uuid', identity.uuid);
    const genid = find(this.#xml.root, 'genid');
    if (genid !== null && genid.text !== '') changes.text('genid', genid, '');
    for (const system of childrenOf(this.#xml.root, 'sysinfo').flatMap((sysinfo) => childrenOf(sysinfo, 'system'))) {
      for (const entry of childrenOf(system, 'entry')) if (this.#xml.attribute(entry, 'name') === 'uuid') changes.text('sysinfo.uuid', entry, identity.uuid);
    }
    interfaces.forEach((element, index) => {
      const key = `interface.${index}.mac`;
      const mac = find(element, 'mac');
      if (mac === null) changes.insertFirst(key, element, 'mac', 'address', identity.macs[index]!);
      else changes.attribute(key, mac, 'address', identity.macs[index]!);
    });
    for (const { place, file } of places) this.#moveFile(changes, place, file);
    for (const disk of devicesOf(this.#xml, 'disk')) this.#makeRaw(changes, disk);
    this.#freePorts(changes);
    for (const dropped of LIBVIRT_DROPPED) changes.drop(dropped);
    this.#xml.apply();
    return changes.list;
  }

  toText(): string {
    return this.#xml.toText();
  }

  /** What no change of the XML makes the clone's own. */
  #assertCanBeCloned(places: readonly { readonly place: FilePlace; readonly file: string | null }[]): void {
    const xml = this.#xml;
    for (const { place, file } of places) assertOwnDisk(place.reference, file, place.isShareable);
    devicesOf(xml, 'disk').forEach((disk, index) => {
      const type = xml.attribute(disk, 'type') ?? 'file';
      const isShareable = find(disk, 'readonly') !== null || find(disk, 'shareable') !== null || (xml.attribute(disk, 'device') ?? 'disk') === 'cdrom';
      if (type === 'file' || type === 'block' || isShareable) return;
      throw new OffshootError('not-supported', `line ${xml.lineOf(disk)}: the disk ${diskSlot(xml, disk, index)} is of type ${shown(type)}, and no file: a clone would write to the same one`, { line: xml.lineOf(disk) });
    });
    for (const argument of childrenOf(find(xml.root, 'qemu:commandline'), 'qemu:arg')) {
      const value = xml.attribute(argument, 'value') ?? '';
      const disk = places.find(({ place }) => place.reference.role === 'disk' && place.reference.file.length > 1 && value.includes(place.reference.file));
      if (disk !== undefined) {
        throw new OffshootError('not-supported', `line ${xml.lineOf(argument)}: an argument for QEMU names the disk ${disk.place.reference.slot}: a clone would write to the same one`, { line: xml.lineOf(argument) });
      }
    }
  }

  #moveFile(changes: Changes, place: FilePlace, file: string | null): void {
    const { reference, element, attribute, disk } = place;
    const key = disk === null ? reference.slot : `disk.${reference.slot}.file`;
    if (file === null) {
      // Two machines with the variables of one firmware overwrite each other's.
      if (reference.role === 'nvram') {
        if (attribute === null) changes.text(key, element, '');
        else changes.remove(key, element);
      }
      return;
    }
    assertPath(key, file);
    if (attribute === null) {
      changes.text(key, element, file);
    } else if (disk !== null && attribute === 'dev') {
      changes.attribute(`disk.${reference.slot}.type`, disk, 'type', 'file');
      changes.removeAttribute(key, element, 'dev');
      changes.attribute(key, element, 'file', file);
    } else {
      changes.attribute(key, element, attribute, file);
    }
  }

  #makeRaw(changes: Changes, disk: Element): void {
    const key = `disk.${diskSlot(this.#xml, disk, devicesOf(this.#xml, 'disk').indexOf(disk))}.format`;
    const driver = find(disk, 'driver');
    if (driver !== null) changes.attribute(key, driver, 'type', 'raw');
    else changes.insertFirst(key, disk, 'driver', 'type', 'raw');
  }

  /** A port or address that was given by hand is one of the host's: the clone is given a free one. */
  #freePorts(changes: Changes): void {
    const xml = this.#xml;
    devicesOf(xml, 'graphics').forEach((graphics, index) => {
      const port = xml.attribute(graphics, 'port') ?? xml.attribute(graphics, 'tlsPort');
      if (port !== null && port !== '-1') changes.attribute(`graphics.${index}.autoport`, graphics, 'autoport', 'yes');
    });
    for (const cid of devicesOf(xml, 'vsock').flatMap((vsock) => childrenOf(vsock, 'cid'))) changes.attribute('vsock.cid.auto', cid, 'auto', 'yes');
  }
}

/** Changes to the XML, each noted as it is made. */
class Changes {
  readonly list: ConfigurationChange[] = [];
  readonly #xml: XmlTextDocument;

  constructor(xml: XmlTextDocument) {
    this.#xml = xml;
  }

  text(key: string, element: Element, after: string): void {
    if (element.text === after) return;
    this.#xml.setText(element, after);
    this.#note(key, 'set', element.text, after);
  }

  child(parent: Element, name: string, key: string, after: string): void {
    const element = find(parent, name);
    if (element !== null) {
      this.text(key, element, after);
      return;
    }
    this.#xml.insertFirst(parent, `<${name}>${escapeText(after)}</${name}>`);
    this.#note(key, 'set', null, after);
  }

  attribute(key: string, element: Element, name: string, after: string): void {
    const before = this.#xml.attribute(element, name);
    if (before === after) return;
    this.#xml.setAttribute(element, name, after);
    this.#note(key, 'set', before, after);
  }

  insertFirst(key: string, parent: Element, name: string, attribute: string, after: string): void {
    this.#xml.insertFirst(parent, `<${name} ${attribute}='${escapeAttribute(after, "'")}'/>`);
    this.#note(key, 'set', null, after);
  }

  removeAttribute(key: string, element: Element, name: string): void {
    this.#note(key, 'removed', this.#xml.attribute(element, name), null);
    this.#xml.removeAttribute(element, name);
  }

  remove(key: string, element: Element): void {
    this.#note(key, 'removed', element.text.trim() === '' ? null : element.text.trim(), null);
    this.#xml.remove(element);
  }

  drop({ path, when }: Dropped): void {
    const [elements = '', attribute] = path.split('@');
    let found: readonly Element[] = [this.#xml.root];
    for (const name of elements.split('/').filter((each) => each !== '')) {
      found = found.flatMap((element) => element.children.filter((child) => name === '*' || child.name === name));
    }
    for (const element of found) {
      if (when !== undefined && !when(this.#xml, element)) continue;
      if (attribute === undefined) this.remove(path, element);
      else if (this.#xml.attribute(element, attribute) !== null) this.removeAttribute(path, element, attribute);
    }
  }

  #note(key: string, action: ConfigurationChange['action'], before: string | null, after: string | null): void {
    this.list.push({ key, action, before, after });
  }
}
