/**
 * Where the parts of a machine lie in a domain's XML: its disks and other files, its network interfaces. Reading only; the tables of what
 * a clone must not have, and the changes, are in `libvirt.ts`, the keys in `libvirt-keys.ts`.
 */
import type { FileReference } from '../format.js';
import { unitBytes } from './values.js';
import { childrenOf, find, type Element, type XmlTextDocument } from './xml-text.js';

/** A file that the XML names, and where. */
export interface FilePlace {
  readonly reference: FileReference;
  /** What holds the path: in the attribute, or as its text when that is null. */
  readonly element: Element;
  readonly attribute: string | null;
  /** The `<disk>`, for disks. */
  readonly disk: Element | null;
  /** A disk that nobody writes to, or that says itself that several machines may. */
  readonly isShareable: boolean;
}

const CHARACTER_DEVICES = ['serial', 'parallel', 'console', 'channel'] as const;
const OS_FILES = [['loader', 'firmware'], ['nvram', 'nvram'], ['kernel', 'kernel'], ['initrd', 'initrd'], ['dtb', 'other']] as const;

export function devicesOf(xml: XmlTextDocument, name: string): Element[] {
  return childrenOf(find(xml.root, 'devices'), name);
}

/** `vda`; a disk without a target has its number. */
export function diskSlot(xml: XmlTextDocument, disk: Element, index: number): string {
  return xml.attribute(find(disk, 'target'), 'dev') ?? `disk${index}`;
}

export function filePlaces(xml: XmlTextDocument): FilePlace[] {
  const places: FilePlace[] = [];
  const slots = new Set<string>();
  const add = (slot: string, role: FileReference['role'], diskFormat: string | null, where: Pick<FilePlace, 'element' | 'attribute'>, disk: Element | null = null): void => {
    const file = where.attribute === null ? where.element.text.trim() : xml.attribute(where.element, where.attribute);
    if (file === null || file === '') return;
    let unique = slot;
    for (let number = 2; slots.has(unique); number += 1) unique = `${slot}.${number}`;
    slots.add(unique);
    const isShareable = disk !== null && (find(disk, 'readonly') !== null || find(disk, 'shareable') !== null);
    places.push({ reference: { slot: unique, file, role, diskFormat }, ...where, disk, isShareable });
  };
  for (const [name, role] of OS_FILES) {
    const element = find(xml.root, 'os', name);
    if (element === null) continue;
    const source = find(element, 'source');
    add(name, role, null, source === null ? { element, attribute: null } : { element: source, attribute: 'file' });
  }
  devicesOf(xml, 'disk').forEach((disk, index) => {
    const source = find(disk, 'source');
    if (source === null) return;
    const device = xml.attribute(disk, 'device') ?? 'disk';
    const role = device === 'disk' || device === 'lun' ? 'disk' : device === 'cdrom' ? 'cdrom' : 'other';
    const attribute = xml.attribute(disk, 'type') === 'block' ? 'dev' : 'file';
    add(diskSlot(xml, disk, index), role, xml.attribute(find(disk, 'driver'), 'type'), { element: source, attribute }, disk);
  });
  for (const name of CHARACTER_DEVICES) {
    devicesOf(xml, name).forEach((element, index) => {
      const source = find(element, 'source');
      if (source !== null && xml.attribute(element, 'type') === 'file') add(`${name}${index}`, 'other', null, { element: source, attribute: 'path' });
      const log = find(element, 'log');
      if (log !== null) add(`${name}${index}.log`, 'other', null, { element: log, attribute: 'file' });
    });
  }
  devicesOf(xml, 'memory').forEach((element, index) => {
    const path = find(element, 'source', 'path');
    if (path !== null && xml.attribute(element, 'model') === 'nvdimm') add(`memory${index}`, 'other', null, { element: path, attribute: null });
  });
  return places;
}

/** Bytes of `<memory unit='KiB'>`; null when it says nothing that can be understood. */
export function memoryBytes(xml: XmlTextDocument, element: Element | null): number | null {
  if (element === null) return null;
  const unit = unitBytes(xml.attribute(element, 'unit') ?? 'KiB');
  const text = element.text.trim();
  return unit === null || !/^[0-9]{1,15}$/.test(text) ? null : Number(text) * unit;
}
