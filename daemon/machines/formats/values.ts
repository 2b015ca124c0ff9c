/**
 * Values that configurations of all formats hold: amounts of memory, numbers of processors, UUIDs, MAC addresses, names; what each may
 * look like, and what is said when it does not. Pure functions, no text of any format.
 */
import { isAbsolute } from 'node:path';

import { OffshootError } from '../../../blockstore/errors.js';
import type { FileReference, MachineIdentity } from '../format.js';

/** More than any configuration that a person or a hypervisor wrote; less than what would keep the daemon busy. */
export const TEXT_CHARACTERS_MAX = 1024 * 1024;
const MEMORY_BYTES_MAX = 64 * 1024 ** 4;
const PROCESSORS_MAX = 4096;
/** What a hypervisor, a log line and a file system take. */
const NAME_CHARACTERS_MAX = 200;

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
const MAC = /^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/;

/** Suffixes as libvirt has them: K, M, G and KiB, MiB, GiB are powers of 1024, KB, MB, GB powers of 1000. */
const UNIT_BYTES: ReadonlyMap<string, number> = new Map([
  ['b', 1], ['byte', 1], ['bytes', 1],
  ['k', 1024], ['kib', 1024], ['kb', 1000],
  ['m', 1024 ** 2], ['mib', 1024 ** 2], ['mb', 1000 ** 2],
  ['g', 1024 ** 3], ['gib', 1024 ** 3], ['gb', 1000 ** 3],
  ['t', 1024 ** 4], ['tib', 1024 ** 4], ['tb', 1000 ** 4],
]);

export function invalid(message: string, context: Readonly<Record<string, string | number>> = {}): OffshootError {
  return new OffshootError('invalid-argument', message, context);
}

/** A value as an error shows it: short, and on one line. */
export function shown(value: string): string {
  const text = JSON.stringify(value);
  return text.length <= 80 ? text : `${text.slice(0, 76)}..."`;
}

export function assertTextSize(text: string, what: string): void {
  if (text.length > TEXT_CHARACTERS_MAX) throw invalid(`${what} is too large: ${text.length} characters, at most ${TEXT_CHARACTERS_MAX}`);
}

/** The number of the line that `offset` lies in, from 1. */
export function lineAt(text: string, offset: number): number {
  let line = 1;
  for (let at = text.indexOf('\n'); at >= 0 && at < offset; at = text.indexOf('\n', at + 1)) line += 1;
  return line;
}

/** Bytes of a unit by its name, null for one that is none. */
export function unitBytes(unit: string): number | null {
  return UNIT_BYTES.get(unit.toLowerCase()) ?? null;
}

/** `2GiB`, `2048 M`: a number with its unit. A number alone means another thing in each format, so that it is refused. */
export function parseMemory(key: string, value: string): number {
  const parts = /^\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]+)\s*$/.exec(value);
  const unit = parts === null ? null : unitBytes(parts[2]!);
  if (parts === null || unit === null) throw invalid(`${key} must be a number with its unit, as 2GiB or 2048MiB, not ${shown(value)}`, { key });
  const bytes = Number(parts[1]) * unit;
  if (!Number.isSafeInteger(bytes) || bytes % 1024 !== 0) throw invalid(`${key} must be a whole number of KiB, not ${shown(value)}`, { key });
  return assertMemory(key, bytes);
}

export function assertMemory(key: string, bytes: number): number {
  if (bytes < 1024 ** 2 || bytes > MEMORY_BYTES_MAX) throw invalid(`${key} must lie between 1 MiB and 64 TiB`, { key });
  return bytes;
}

/** In the largest unit that leaves a whole number: `2GiB`, `1536MiB`. `parseMemory` takes it. */
export function formatMemory(bytes: number): string {
  for (const [unit, size] of [['GiB', 1024 ** 3], ['MiB', 1024 ** 2], ['KiB', 1024]] as const) {
    if (bytes % size === 0) return `${bytes / size}${unit}`;
  }
  return `${bytes}B`;
}

export function parseProcessors(key: string, value: string): number {
  const count = /^[1-9][0-9]{0,3}$/.test(value.trim()) ? Number(value.trim()) : Number.NaN;
  if (!(count <= PROCESSORS_MAX)) throw invalid(`${key} must be a whole number from 1 to ${PROCESSORS_MAX}, not ${shown(value)}`, { key });
  return count;
}

/** Lower case with hyphens, whatever of the usual forms it came in. */
export function parseUuid(key: string, value: string): string {
  const uuid = canonicalUuid(value);
  if (uuid === null) throw invalid(`${key} must be a UUID as 1b4e28ba-2fa1-4d2b-a05e-3f5c8e1c7a10, not ${shown(value)}`, { key });
  return uuid;
}

export function canonicalUuid(value: string): string | null {
  const hex = value.trim().toLowerCase().replaceAll(/[\s-]/g, '');
  if (!/^[0-9a-f]{32}$/.test(hex)) return null;
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`;
}

/** Lower case with colons. An address of a group, or of nobody, is none that an interface can have. */
export function parseMac(key: string, value: string): string {
  const mac = canonicalMac(value);
  if (mac === null) throw invalid(`${key} must be a MAC address as 52:54:00:12:34:56, not ${shown(value)}`, { key });
  if (Number.parseInt(mac.slice(0, 2), 16) % 2 === 1) throw invalid(`${key} must be the address of one interface: ${mac} is a multicast address`, { key });
  if (mac === '00:00:00:00:00:00') throw invalid(`${key} must not be ${mac}`, { key });
  return mac;
}

export function canonicalMac(value: string): string | null {
  const mac = value.trim().toLowerCase().replaceAll('-', ':');
  return MAC.test(mac) ? mac : null;
}

/** A name that every hypervisor takes: no slash, no control character, not only blanks. */
export function parseName(key: string, value: string): string {
  if (value.trim() === '' || value !== value.trim()) throw invalid(`${key} must be a name that neither begins nor ends with a blank, not ${shown(value)}`, { key });
  if (value.length > NAME_CHARACTERS_MAX) throw invalid(`${key} must have at most ${NAME_CHARACTERS_MAX} characters, not ${value.length}`, { key });
  if (value === '.' || value === '..') throw invalid(`${key} must not be ${shown(value)}`, { key });
  if (/[/\p{Cc}\p{Cs}]/u.test(value)) throw invalid(`${key} must hold neither a slash nor a control character: ${shown(value)}`, { key });
  return value;
}

/** A file's name or path as a configuration can hold it. */
export function assertPath(key: string, value: string): string {
  if (value === '' || /[\p{Cc}\p{Cs}]/u.test(value)) throw invalid(`${key} must be a path without control characters, not ${shown(value)}`, { key });
  return value;
}

/** What `customise` was given: whole, and one MAC address for each interface. */
export function assertIdentity(identity: MachineIdentity, interfaces: number): void {
  parseName('name', identity.name);
  if (!UUID.test(identity.uuid)) throw invalid(`uuid must be written in lower case with hyphens, not ${shown(identity.uuid)}`);
  if (identity.macs.length !== interfaces) {
    throw invalid(`the machine has ${interfaces} network interfaces, and ${identity.macs.length} MAC addresses were given: give one for each`);
  }
  identity.macs.forEach((mac, index) => {
    if (parseMac(`interface.${index}.mac`, mac) !== mac) throw invalid(`interface.${index}.mac must be written in lower case with colons, not ${shown(mac)}`);
  });
  if (new Set(identity.macs).size !== identity.macs.length) throw invalid('two network interfaces of a machine cannot have the same MAC address');
}

/** Two machines that write to one disk destroy it. A relative path is another file in another directory. */
export function assertOwnDisk(reference: FileReference, place: string | null, isShareable: boolean): void {
  if (reference.role !== 'disk' || isShareable || place !== null || !isAbsolute(reference.file)) return;
  throw new OffshootError('not-supported', `the disk ${reference.slot} (${shown(reference.file)}) does not belong to the machine: a clone would write to the same one`, { key: reference.slot });
}

/** `NAME` + `suffix`, as a file in the machine's directory. */
export function configurationName(machineName: string, suffix: string): string {
  parseName('name', machineName);
  return `${machineName}${suffix}`;
}

/** True when the name ends, in any case, with one of the suffixes and is not the suffix alone. */
export function endsWithOneOf(fileName: string, suffixes: readonly string[]): boolean {
  const lower = fileName.toLowerCase();
  return suffixes.some((suffix) => lower.length > suffix.length && lower.endsWith(suffix));
}
