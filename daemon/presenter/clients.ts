/**
 * Who an export is for, as people write it: addresses and networks, initiator names, user names. Well-formed, in one spelling, and never a pattern:
 * everybody is `0.0.0.0/0` and `::/0`, written out. Pure.
 */
import { isIP, isIPv6 } from 'node:net';

import { OffshootError } from '../../blockstore/errors.js';
import { shown } from '../filesystem/names.js';
import type { PresenterAbilities } from './presenter.js';

const CLIENTS_MAX = 256;
const INITIATOR_BYTES_MAX = 223;
const INITIATOR = /^(?:iqn\.[0-9]{4}-(?:0[1-9]|1[0-2])\.[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[a-z0-9._:-]+)?|eui\.[0-9a-f]{16}|naa\.(?:[0-9a-f]{16}|[0-9a-f]{32}))$/u;
const USER = /^[A-Za-z_][A-Za-z0-9._-]{0,31}$/u;

/** In one spelling, each once. `invalid-argument` says which is wrong, and what is right. */
export function checkedClients(clients: readonly string[], kind: string, who: PresenterAbilities['clients']): readonly string[] {
  if (who === 'host') {
    if (clients.length > 0) throw refused(`${kind} is for this host alone: leave --to out`);
    return [];
  }
  if (clients.length === 0) throw refused(`say for whom: --to ${EXAMPLES[who]}`);
  if (clients.length > CLIENTS_MAX) throw refused(`${clients.length} clients are too many: at most ${CLIENTS_MAX}; name networks instead`);
  return [...new Set(clients.map(CHECKS[who]))];
}

/** Whether somebody on another host is among them. */
export function reachesBeyondLoopback(clients: readonly string[]): boolean {
  return clients.some((client) => !isLoopback(client));
}

/** An address (not a network, nor a name). */
export function isLoopbackAddress(address: string): boolean { return isIP(address) !== 0 && isLoopback(address); }

const EXAMPLES = { addresses: '192.0.2.7, --to 192.0.2.0/24', initiators: 'iqn.2004-10.com.example:host', users: 'NAME' } as const;

const CHECKS = {
  addresses: addressOf,
  initiators: (text: string): string => {
    const name = text.toLowerCase();
    if (INITIATOR.test(name) && Buffer.byteLength(name) <= INITIATOR_BYTES_MAX) return name;
    throw refused(`${shown(text)} is not an initiator name: write it as ${EXAMPLES.initiators}`);
  },
  users: (text: string): string => {
    if (USER.test(text)) return text;
    throw refused(`${shown(text)} is not a user name: letters, digits, '.', '_' and '-', at most 32`);
  },
} as const;

function addressOf(text: string): string {
  const [address = '', prefix, ...more] = text.split('/');
  const version = isIP(address);
  if (version === 0 || more.length > 0 || address.includes('%')) {
    throw refused(`${shown(text)} is neither an address nor a network: write ${EXAMPLES.addresses}${text === '*' ? '; everybody is --to 0.0.0.0/0 --to ::/0, written out' : ''}`);
  }
  const bits = version === 4 ? 32 : 128;
  const value = valueOf(address);
  if (prefix === undefined) return spelled(value, version);
  const length = Number(prefix);
  if (!/^[0-9]{1,3}$/u.test(prefix) || length > bits) throw refused(`${shown(text)} is not a network: what comes behind the / is a number up to ${bits}`);
  const hostBits = BigInt(bits - length);
  const network = (value >> hostBits) << hostBits;
  if (network !== value) throw refused(`${shown(text)} names a host and a network at once: write ${spelled(value, version)} for the host, ${spelled(network, version)}/${length} for the network`);
  return length === bits ? spelled(value, version) : `${spelled(network, version)}/${length}`;
}

/** Of a text in `addressOf`'s spelling. */
function isLoopback(client: string): boolean {
  const [address = '', prefix] = client.split('/');
  if (isIPv6(address)) return address === '::1' && prefix === undefined;
  return address.startsWith('127.') && (prefix === undefined || Number(prefix) >= 8);
}

function valueOf(address: string): bigint {
  if (!isIPv6(address)) return address.split('.').reduce((value, byte) => (value << 8n) | BigInt(byte), 0n);
  const dotted = /^(?<before>.*:)(?<v4>[0-9.]+)$/u.exec(address);
  const text = dotted?.groups?.['v4']?.includes('.') === true ? `${dotted.groups['before'] ?? ''}${hexOf(dotted.groups['v4'])}` : address;
  const [head = '', tail] = text.split('::');
  const words = (part: string): string[] => (part === '' ? [] : part.split(':'));
  const [first, last] = [words(head), words(tail ?? '')];
  const all = [...first, ...Array.from({ length: tail === undefined ? 0 : 8 - first.length - last.length }, () => '0'), ...last];
  return all.reduce((value, word) => (value << 16n) | BigInt(`0x${word}`), 0n);
}

function hexOf(v4: string): string {
  const value = valueOf(v4);
  return `${(value >> 16n).toString(16)}:${(value & 0xffffn).toString(16)}`;
}

function spelled(value: bigint, version: number): string {
  if (version === 4) return [24n, 16n, 8n, 0n].map((shift) => (value >> shift) & 0xffn).join('.');
  const words = Array.from({ length: 8 }, (_, i) => ((value >> BigInt(16 * (7 - i))) & 0xffffn).toString(16));
  const zeros = [...words.join(':').matchAll(/(?:^|:)(?:0(?::|$)){2,}/gu)].map(([text]) => text).toSorted((a, b) => b.length - a.length)[0];
  return zeros === undefined ? words.join(':') : words.join(':').replace(zeros, '::');
}

function refused(message: string): OffshootError { return new OffshootError('invalid-argument', message); }
