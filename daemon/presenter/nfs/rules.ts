/**
 * What an NFS export may say of itself: its clients and options, checked before anything is done. Pure functions.
 *
 *   squash=root|none|all         whose rights root of a client has: nobody's; root's (ESXi needs it, and its clients must be trusted as root here); all users are nobody
 *   versions=4|3,4               3 as well needs rpcbind on this host; one export that wants it makes the server speak it
 *   security=sys|krb5|krb5i|krb5p
 *   port=N                       of the one server of all NFS exports: whoever comes first decides
 */
import { isIPv4, isIPv6 } from 'node:net';

import { OffshootError } from '../../../blockstore/errors.js';
import type { Export } from '../presenter.js';

export const SQUASHES = ['root', 'none', 'all'] as const;
export const SECURITIES = ['sys', 'krb5', 'krb5i', 'krb5p'] as const;

export interface NfsRules {
  readonly squash: (typeof SQUASHES)[number];
  readonly security: (typeof SECURITIES)[number];
  readonly version3: boolean;
  /** Null: not said. */
  readonly port: number | null;
  /** As the server takes them. */
  readonly clients: readonly string[];
}

/** Of the server, in 16 bits. */
const EXPORT_ID_MAX = 65_535;
const EVERYBODY = ['0.0.0.0/0', '::/0'] as const;
const OPTIONS = ['squash', 'versions', 'security', 'port'] as const;
/** In a quoted text of the server's configuration there is no way to write them. */
const CANNOT_BE_QUOTED = /["'\\\p{Cc}]/u;

/** Throws `invalid-argument` for what cannot be meant. */
export function rulesOf(wanted: Export): NfsRules {
  if (wanted.kind === 'disk') {
    const directory = wanted.path.slice(0, wanted.path.lastIndexOf('/'));
    throw refused(`${wanted.path} is a disk, and NFS shows directories: present ${directory === '' ? 'its container' : directory}, or present the disk as iscsi or nbd`);
  }
  if (wanted.id > EXPORT_ID_MAX) throw refused(`NFS has numbers for ${EXPORT_ID_MAX} exports, and this would be number ${wanted.id}`);
  for (const path of [wanted.path, wanted.mountPath]) {
    if (CANNOT_BE_QUOTED.test(path)) throw refused(`${JSON.stringify(path)} has a quote or a backslash in it, which an NFS export cannot be called: rename it, or move the mount`);
  }
  for (const name of Object.keys(wanted.options)) {
    if (!(OPTIONS as readonly string[]).includes(name)) throw refused(`NFS has no option ${name}: it has ${OPTIONS.join(', ')}`);
  }
  const { squash = 'root', security = 'sys', versions = '4', port } = wanted.options;
  if (versions !== '4' && versions !== '3,4') throw refused(`versions is 4 or 3,4, not ${versions}`);
  return {
    squash: oneOf('squash', squash, SQUASHES), security: oneOf('security', security, SECURITIES), version3: versions === '3,4',
    port: port === undefined ? null : portOf(port), clients: clientsFor(wanted.clients),
  };
}

function clientsFor(clients: readonly string[]): readonly string[] {
  if (EVERYBODY.every((network) => clients.includes(network))) return ['*'];
  for (const client of clients) {
    const [address = '', prefix] = client.split('/');
    if (isIPv4(address) || (isIPv6(address) && prefix === undefined)) continue;
    if (isIPv6(address)) throw refused(`${client} is an IPv6 network, which this NFS server does not know: name single IPv6 addresses, or IPv4 networks`);
    throw refused(`${client} is no address: name clients as 192.0.2.7, 192.0.2.0/24 or 2001:db8::7`);
  }
  if (clients.length === 0) throw refused('an NFS export needs clients: name them with --to');
  return clients;
}

function oneOf<T extends string>(name: string, value: string, allowed: readonly T[]): T {
  const found = allowed.find((each) => each === value);
  if (found === undefined) throw refused(`${name} is ${allowed.join(' or ')}, not ${value}`);
  return found;
}

function portOf(text: string): number {
  const port = Number(text);
  if (!/^[0-9]{1,5}$/u.test(text) || port < 1 || port > 65_535) throw refused(`port is a number from 1 to 65535, not ${text}`);
  return port;
}

function refused(message: string): OffshootError {
  return new OffshootError('invalid-argument', message);
}
