/**
 * Names, UUIDs and MAC addresses of new machines, each unique in the store. Pure, but for the random numbers.
 *
 * Without a seed they are random. With one they follow from it and from the path of the machine's directory (UUID version 5, RFC 9562), so
 * that the same command on another store gives the same machines; what is taken is drawn again, with a counter in what is hashed, so
 * that this too comes out the same wherever the same is taken.
 */
import { createHash, randomBytes, randomUUID } from 'node:crypto';

import { OffshootError } from '../../blockstore/errors.js';
import type { FormatId } from './format.js';

export interface NewIdentity {
  readonly uuid: string;
  readonly macs: readonly string[];
}

export interface IdentityWish {
  readonly format: FormatId;
  /** Network interfaces. */
  readonly macCount: number;
  readonly seed: string | null;
  /** Of the machine's directory in the store. */
  readonly path: string;
  /** Whether somebody in the store has it. */
  readonly isTaken: (kind: 'uuid' | 'mac', value: string) => boolean;
}

/** The namespace of UUIDs that follow from a seed: made once, at random, for Offshoot. */
const NAMESPACE = Buffer.from('6f1d2f0a3c0e4d0e9a57c1c7f0b6d9e4', 'hex');
/** There are four million addresses for VMware, and sixteen for the others: who gets here has a store full of machines. */
const DRAWS_MAX = 10_000;

/** As hypervisors write it: lower case, hyphens. Null for what is none. */
export function normalUuid(text: string): string | null {
  const digits = text.replaceAll(/[-\s]/gu, '').toLowerCase();
  return /^[0-9a-f]{32}$/u.test(digits) ? hyphened(digits) : null;
}

/** Lower case with colons; null for what is none. */
export function normalMac(text: string): string | null {
  const mac = text.trim().toLowerCase().replaceAll('-', ':');
  return /^[0-9a-f]{2}(?::[0-9a-f]{2}){5}$/u.test(mac) ? mac : null;
}

/** Whether a configuration of the format can say that address: VMware starts no machine with a static one out of its range, such as one that it generated. */
export function canHaveMac(format: FormatId, mac: string): boolean {
  return format !== 'vmx' || /^00:50:56:[0-3]/u.test(mac);
}

export function newIdentity(wish: IdentityWish): NewIdentity {
  const uuid = draw('UUID', (attempt) => uuidOf(wish, attempt), (value) => wish.isTaken('uuid', value));
  const macs: string[] = [];
  for (let position = 0; position < wish.macCount; position += 1) {
    macs.push(draw('MAC address', (attempt) => macOf(wish, position, attempt), (value) => wish.isTaken('mac', value) || macs.includes(value)));
  }
  return { uuid, macs };
}

function draw(what: string, make: (attempt: number) => string, isTaken: (value: string) => boolean): string {
  for (let attempt = 0; attempt < DRAWS_MAX; attempt += 1) {
    const value = make(attempt);
    if (!isTaken(value)) return value;
  }
  throw new OffshootError('already-exists', `no free ${what} was found in ${DRAWS_MAX} attempts: remove machines, or give another --seed`);
}

function uuidOf({ seed, path }: IdentityWish, attempt: number): string {
  return seed === null ? randomUUID() : uuidFrom(textOf(seed, path, 'uuid', attempt));
}

/** Version 5: SHA-1 of the namespace and the text. */
export function uuidFrom(text: string, namespace: Buffer = NAMESPACE): string {
  const bytes = createHash('sha1').update(namespace).update(text, 'utf8').digest().subarray(0, 16);
  bytes[6] = ((bytes[6] ?? 0) & 0x0f) | 0x50;
  bytes[8] = ((bytes[8] ?? 0) & 0x3f) | 0x80;
  return hyphened(bytes.toString('hex'));
}

/** 52:54:00 is QEMU's own; 00:50:56:00 to 3f is what VMware leaves to administrators. */
function macOf({ format, seed, path }: IdentityWish, position: number, attempt: number): string {
  const bytes = seed === null ? randomBytes(3) : createHash('sha256').update(textOf(seed, path, `mac ${position}`, attempt), 'utf8').digest().subarray(0, 3);
  if (format === 'vmx') bytes[0] = (bytes[0] ?? 0) & 0x3f;
  const prefix = format === 'vmx' ? '00:50:56' : '52:54:00';
  return [prefix, ...[...bytes].map((byte) => byte.toString(16).padStart(2, '0'))].join(':');
}

/** No name holds a NUL byte, so that no two different wishes make the same text. */
function textOf(seed: string, path: string, what: string, attempt: number): string {
  return [seed, path, what, ...(attempt === 0 ? [] : [String(attempt)])].join('\0');
}

function hyphened(digits: string): string {
  return [digits.slice(0, 8), digits.slice(8, 12), digits.slice(12, 16), digits.slice(16, 20), digits.slice(20, 32)].join('-');
}
