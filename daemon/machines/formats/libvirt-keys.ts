/**
 * Keys of a domain's XML: names that people guess (`memory`, `interface.0.mac`, `disk.vda.cache`), and simple element paths for the rest
 * (`devices/disk[2]/driver/@cache`, counted from 1 as XPath does). A key that has a name is checked as what it is, by whichever of the
 * two it is given.
 */
import { childrenOf, escapeAttribute, escapeText, find, type Element, type XmlTextDocument } from './xml-text.js';
import { devicesOf, diskSlot, memoryBytes } from './libvirt-parts.js';
import { assertPath, formatMemory, invalid, parseMac, parseMemory, parseName, parseProcessors, parseUuid, shown } from './values.js';

type Kind = 'text' | 'name' | 'uuid' | 'memory' | 'processors' | 'mac' | 'path' | 'raw';

/** What a key means: an element's text, or one of its attributes. The element may be missing, its parent is there. */
interface Target {
  readonly parent: Element | null;
  readonly element: Element | null;
  readonly elementName: string;
  readonly attribute: string | null;
  readonly kind: Kind;
}

/** Of the domain: the key, the path to the element, the attribute, what it holds. Missing elements are made where their parent is there. */
const DOMAIN_KEYS: readonly (readonly [key: string, path: string, attribute: string | null, kind: Kind])[] = [
  ['name', 'name', null, 'name'],
  ['uuid', 'uuid', null, 'uuid'],
  ['title', 'title', null, 'text'],
  ['description', 'description', null, 'text'],
  ['memory', 'memory', null, 'memory'],
  ['currentMemory', 'currentMemory', null, 'memory'],
  ['vcpu', 'vcpu', null, 'processors'],
  ['machine', 'os/type', 'machine', 'text'],
  ['kernel', 'os/kernel', null, 'path'],
  ['initrd', 'os/initrd', null, 'path'],
  ['cmdline', 'os/cmdline', null, 'text'],
];
const INTERFACE_KEYS: readonly (readonly [key: string, element: string, attribute: string, kind: Kind])[] = [
  ['mac', 'mac', 'address', 'mac'],
  ['model', 'model', 'type', 'text'],
  ['network', 'source', 'network', 'text'],
  ['bridge', 'source', 'bridge', 'text'],
  ['link', 'link', 'state', 'text'],
];
const DISK_KEYS: readonly (readonly [key: string, element: string, attribute: string | null, kind: Kind])[] = [
  ['file', 'source', 'file', 'path'],
  ['format', 'driver', 'type', 'raw'],
  ['cache', 'driver', 'cache', 'text'],
  ['io', 'driver', 'io', 'text'],
  ['discard', 'driver', 'discard', 'text'],
  ['bus', 'target', 'bus', 'text'],
  ['serial', 'serial', null, 'text'],
];
const OTHER_NAMES: ReadonlyMap<string, string> = new Map([['processors', 'vcpu'], ['append', 'cmdline'], ['kernelArguments', 'cmdline']]);

const SEGMENT = /^([^ \t\r\n/@[\]"'<>&=]+)(?:\[([1-9][0-9]{0,5})\])?$/;
/** Of an attribute that is made. */
const NEW_ATTRIBUTE = /^[A-Za-z_][A-Za-z0-9_.-]*$/;
const KIB = 1024;

/** In the order of the text; what has a name of its own is listed by that. */
export function listKeys(xml: XmlTextDocument): string[] {
  const names = namedKeys(xml);
  const keys: string[] = [];
  const add = (element: Element, attribute: string | null, path: string): void => {
    keys.push(names.get(element)?.get(attribute) ?? (attribute === null ? path : path === '' ? `@${attribute}` : `${path}/@${attribute}`));
  };
  const walk = (element: Element, path: string): void => {
    for (const { name } of xml.attributes(element)) if (!name.startsWith('xmlns')) add(element, name, path);
    if (path !== '' && element.children.length === 0 && element.text.trim() !== '') add(element, null, path);
    const counts = new Map<string, number>();
    for (const { name } of element.children) counts.set(name, (counts.get(name) ?? 0) + 1);
    const seen = new Map<string, number>();
    for (const child of element.children) {
      const number = (seen.get(child.name) ?? 0) + 1;
      seen.set(child.name, number);
      const step = counts.get(child.name) === 1 ? child.name : `${child.name}[${number}]`;
      walk(child, path === '' ? step : `${path}/${step}`);
    }
  };
  walk(xml.root, '');
  return keys;
}

export function getKey(xml: XmlTextDocument, key: string): string | null {
  const target = resolve(xml, key);
  if (!target?.element) return null;
  const { element, attribute, kind } = target;
  if (attribute !== null) return xml.attribute(element, attribute);
  if (kind === 'memory') {
    const bytes = memoryBytes(xml, element);
    return bytes === null ? element.text.trim() : formatMemory(bytes);
  }
  return element.children.length > 0 ? null : element.text.trim();
}

export function setKey(xml: XmlTextDocument, key: string, value: string): void {
  const target = resolve(xml, key);
  if (target === null) throw invalid(`${shown(key)} is no key of this machine: "vm get" lists those that it has`, { key });
  switch (target.kind) {
    case 'memory': setMemory(xml, key, target, value); break;
    case 'processors': setProcessors(xml, key, target, parseProcessors(key, value)); break;
    case 'uuid': {
      const uuid = parseUuid(key, value);
      write(xml, key, target, uuid);
      // libvirt takes no other there.
      for (const system of childrenOf(xml.root, 'sysinfo').flatMap((sysinfo) => childrenOf(sysinfo, 'system'))) {
        for (const entry of childrenOf(system, 'entry')) if (xml.attribute(entry, 'name') === 'uuid') xml.setText(entry, uuid);
      }
      break;
    }
    case 'name': write(xml, key, target, parseName(key, value)); break;
    case 'mac': write(xml, key, target, parseMac(key, value)); break;
    case 'path': write(xml, key, target, assertPath(key, value)); break;
    case 'raw':
      if (value !== 'raw') throw invalid(`${key} can be raw only: disks of the store are, and no one looks into them for a format`, { key });
      write(xml, key, target, value);
      break;
    case 'text': write(xml, key, target, value); break;
  }
  xml.apply();
}

function write(xml: XmlTextDocument, key: string, { parent, element, elementName, attribute }: Target, value: string): void {
  if (element === null) {
    if (parent === null) throw invalid(`${key} has no place in this machine: the element around it is missing`, { key });
    xml.insertLast(parent, attribute === null ? `<${elementName}>${escapeText(value)}</${elementName}>` : `<${elementName} ${attribute}='${escapeAttribute(value, "'")}'/>`);
  } else if (attribute !== null) {
    xml.setAttribute(element, attribute, value);
  } else {
    if (element.children.length > 0) throw invalid(`${key} holds elements and no value: name one of them`, { key });
    xml.setText(element, value);
  }
}

/** The machine has as much as it may have: `currentMemory` follows, unless it is what was asked for. */
function setMemory(xml: XmlTextDocument, key: string, target: Target, value: string): void {
  const bytes = parseMemory(key, value);
  const kib = String(bytes / KIB);
  const setAmount = (element: Element): void => {
    xml.setAttribute(element, 'unit', 'KiB');
    xml.setText(element, kib);
  };
  const memory = find(xml.root, 'memory');
  const current = find(xml.root, 'currentMemory');
  if (target.elementName === 'currentMemory' && bytes > (memoryBytes(xml, memory) ?? 0)) throw invalid(`${key} cannot be more than memory`, { key });
  if (target.element === null) xml.insertLast(xml.root, `<${target.elementName} unit='KiB'>${kib}</${target.elementName}>`);
  else setAmount(target.element);
  if (target.elementName === 'memory' && current !== null) setAmount(current);
}

/** All of them are there from the start, and their topology is the one that was described, with as many sockets as it takes. */
function setProcessors(xml: XmlTextDocument, key: string, target: Target, count: number): void {
  const topology = find(xml.root, 'cpu', 'topology');
  if (topology !== null) {
    const number = (name: string): number => {
      const value = Number(xml.attribute(topology, name) ?? '1');
      return Number.isInteger(value) && value > 0 ? value : 1;
    };
    const perSocket = number('dies') * number('clusters') * number('cores') * number('threads');
    if (count % perSocket !== 0) throw invalid(`${key} must be a multiple of ${perSocket}, the processors of a socket in cpu/topology, not ${count}`, { key });
    xml.setAttribute(topology, 'sockets', String(count / perSocket));
  }
  const vcpus = find(xml.root, 'vcpus');
  if (vcpus !== null) xml.remove(vcpus);
  if (target.element !== null) xml.removeAttribute(target.element, 'current');
  write(xml, key, target, String(count));
}

/** By name, else by path. Null when there is no such thing and none can be made. */
function resolve(xml: XmlTextDocument, given: string): Target | null {
  const key = OTHER_NAMES.get(given) ?? given;
  const own = DOMAIN_KEYS.find(([name]) => name === key);
  if (own !== undefined) return domainTarget(xml, own);
  const part = /^(interface|disk)\.([^/]+)\.([a-z]+)$/.exec(key);
  if (part !== null) {
    const isInterface = part[1] === 'interface';
    const row = (isInterface ? INTERFACE_KEYS : DISK_KEYS).find(([name]) => name === part[3]);
    const disks = devicesOf(xml, 'disk');
    const parent = isInterface
      ? /^(0|[1-9][0-9]{0,3})$/.test(part[2]!) ? devicesOf(xml, 'interface')[Number(part[2])] : undefined
      : disks.find((disk, index) => diskSlot(xml, disk, index) === part[2]);
    if (row === undefined || parent === undefined) return null;
    return { parent, element: find(parent, row[1]), elementName: row[1], attribute: row[2], kind: row[3] };
  }
  return pathTarget(xml, key);
}

function domainTarget(xml: XmlTextDocument, [, path, attribute, kind]: (typeof DOMAIN_KEYS)[number]): Target {
  const names = path.split('/');
  const parent = find(xml.root, ...names.slice(0, -1));
  return { parent, element: find(xml.root, ...names), elementName: names.at(-1)!, attribute, kind };
}

/** Paths name elements that are there; an attribute may be new. */
function pathTarget(xml: XmlTextDocument, key: string): Target | null {
  const steps = key.split('/');
  const attribute = steps.at(-1)!.startsWith('@') ? steps.pop()!.slice(1) : null;
  let element: Element = xml.root;
  for (const step of steps) {
    const parts = SEGMENT.exec(step);
    const next = parts === null ? undefined : childrenOf(element, parts[1]!)[Number(parts[2] ?? '1') - 1];
    if (next === undefined) return null;
    element = next;
  }
  if (element === xml.root && attribute === null) return null;
  if (attribute !== null && xml.attribute(element, attribute) === null && !NEW_ATTRIBUTE.test(attribute)) return null;
  const name = namedKeys(xml).get(element)?.get(attribute);
  if (name !== undefined) return resolve(xml, name);
  return { parent: element.parent, element, elementName: element.name, attribute, kind: 'text' };
}

/** The names of what is there, by element and attribute. */
function namedKeys(xml: XmlTextDocument): Map<Element, Map<string | null, string>> {
  const names = new Map<Element, Map<string | null, string>>();
  const add = (element: Element | null, attribute: string | null, name: string): void => {
    if (element === null) return;
    const own = names.get(element) ?? new Map<string | null, string>();
    names.set(element, own);
    if (!own.has(attribute)) own.set(attribute, name);
  };
  for (const [name, path, attribute] of DOMAIN_KEYS) add(find(xml.root, ...path.split('/')), attribute, name);
  devicesOf(xml, 'interface').forEach((parent, index) => {
    for (const [name, element, attribute] of INTERFACE_KEYS) add(find(parent, element), attribute, `interface.${index}.${name}`);
  });
  const slots = new Set<string>();
  devicesOf(xml, 'disk').forEach((parent, index) => {
    const slot = diskSlot(xml, parent, index);
    // Two disks of one name: the second is reached by its path.
    if (slots.has(slot) || slot.includes('/')) return;
    slots.add(slot);
    for (const [name, element, attribute] of DISK_KEYS) add(find(parent, element), attribute, `disk.${slot}.${name}`);
  });
  return names;
}
