/**
 * The text of our smb.conf: all of it, so that nothing is left to what the host's Samba is configured as. Pure.
 *
 * A value ends with its line, `%` begins a variable, a line that ends in `\` goes on, quotes are taken away, two blanks become one: names with any of these are refused before,
 * and here once more. SMB.md says why each setting is what it is.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { Listening } from '../listen.js';

export interface SmbShare {
  readonly name: string;
  readonly path: string;
  readonly users: readonly string[];
  readonly hosts: readonly string[];
  readonly readOnly: boolean;
  readonly encryption: 'required' | 'desired';
}

/** Of Samba and of Windows: they mean something else. */
const RESERVED = new Set(['global', 'homes', 'printers', 'print', 'ipc', 'admin', 'netlogon', 'sysvol', 'profiles']);
const SHARE = /^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$/u;
// What may not be in a value: control characters, halves of characters, variables, continuations, quotes; nor blanks at its ends, nor two in a row, of which Samba makes one: that would
// be another directory.
// eslint-disable-next-line no-control-regex
const UNSAFE = /[\u0000-\u001f\u007f%"\\\p{Cs}]|^\s|\s$| {2}/u;
const USER = /^[A-Za-z_][A-Za-z0-9._-]{0,31}$/u;
const HOST = /^[0-9a-fA-F.:]+(?:\/[0-9]{1,3})?$/u;

export function isShareName(name: string): boolean { return SHARE.test(name) && !RESERVED.has(name); }
export function isUserName(name: string): boolean { return USER.test(name); }
export function isSafeValue(value: string): boolean { return value !== '' && !UNSAFE.test(value); }

/** A name for a share of this path: its last part, with what a share cannot be called left out. */
export function shareNameOf(path: string): string {
  const plain = (path.split('/').at(-1) ?? '').toLowerCase().replace(/[^a-z0-9._-]+/gu, '-').replace(/^[^a-z0-9]+/u, '').slice(0, 48).replace(/[^a-z0-9]+$/u, '');
  return isShareName(plain) ? plain : `share${plain === '' ? '' : `-${plain}`}`;
}

/** `directory` holds all that this smbd keeps. */
export function smbConf({ address, port }: Listening, directory: string, shares: readonly SmbShare[]): string {
  const isAny = address === '0.0.0.0' || address === '::';
  const kept = (name: string): string => safe(`${directory}/${name}`);
  return [
    '[global]',
    ...settings({
      workgroup: 'WORKGROUP',
      'netbios name': 'OFFSHOOT',
      'server string': 'Offshoot',
      'server role': 'standalone server',
      'disable netbios': 'yes',
      'smb ports': String(port),
      ...(isAny ? { 'bind interfaces only': 'no' } : { interfaces: safe(address), 'bind interfaces only': 'yes' }),

      'private dir': kept('private'),
      'passdb backend': `tdbsam:${kept('private/passdb.tdb')}`,
      // Short, for the kernel's sockets in it.
      'lock directory': safe(directory),
      'state directory': kept('state'),
      'cache directory': kept('cache'),
      'pid directory': safe(directory),
      'ncalrpc dir': kept('rpc'),
      'usershare max shares': '0',

      'server min protocol': 'SMB3',
      'server signing': 'mandatory',
      'server smb encrypt': 'desired',
      'ntlm auth': 'ntlmv2-only',
      'map to guest': 'Never',
      'restrict anonymous': '2',
      'obey pam restrictions': 'no',
      'unix password sync': 'no',
      'enable core files': 'no',
      'log level': '1',

      // What else would be served, or started.
      'load printers': 'no',
      printing: 'bsd',
      'printcap name': '/dev/null',
      'disable spoolss': 'yes',
      'rpc start on demand helpers': 'no',
      'host msdfs': 'no',

      // Links of the mount lead nobody anywhere.
      'follow symlinks': 'no',
      'wide links': 'no',
      'allow insecure wide links': 'no',
      'unix extensions': 'no',

      // Hypervisors of this host have the same files open, and ask no smbd: nothing is kept in clients, locks are the kernel's.
      oplocks: 'no',
      'level2 oplocks': 'no',
      'kernel oplocks': 'no',
      'smb2 leases': 'no',
      'strict locking': 'yes',
      'posix locking': 'yes',
      'durable handles': 'no',

      // A flush of a client is an fsync(2). Holes stay holes. Files are sent by whoever read them.
      'strict sync': 'yes',
      'sync always': 'no',
      'strict allocate': 'no',
      'use sendfile': 'no',

      // The mount has no extended attributes.
      'ea support': 'no',
      'store dos attributes': 'no',
      'nt acl support': 'no',
      'map archive': 'no',
      'create mask': '0600',
      'directory mask': '0700',
      'unix charset': 'UTF-8',
    }),
    ...shares.flatMap((share) => ['', ...shareLines(share)]),
    '',
  ].join('\n');
}

/** Two that are the same text are the same share. */
export function shareLines({ name, path, users, hosts, readOnly, encryption }: SmbShare): readonly string[] {
  if (!isShareName(name)) throw unsafe(name);
  if (users.length === 0 || hosts.length === 0) throw new OffshootError('invalid-argument', `the share ${name} is for nobody`);
  for (const user of users) if (!USER.test(user)) throw unsafe(user);
  for (const host of hosts) if (!HOST.test(host)) throw unsafe(host);
  return [
    `[${name}]`,
    ...settings({
      path: safe(path),
      'valid users': users.join(' '),
      'hosts allow': hosts.join(' '),
      // Without it this host itself is always let in.
      'hosts deny': 'ALL',
      'guest ok': 'no',
      browseable: 'no',
      'read only': readOnly ? 'yes' : 'no',
      'smb encrypt': encryption,
    }),
  ];
}

function settings(values: Readonly<Record<string, string>>): readonly string[] {
  return Object.entries(values).map(([name, value]) => `\t${name} = ${value}`);
}

function safe(value: string): string {
  if (!isSafeValue(value)) throw unsafe(value);
  return value;
}

function unsafe(value: string): OffshootError {
  return new OffshootError('invalid-argument', `${JSON.stringify(value)} cannot be said to Samba: it has a control character, '%', '"' or '\\', two blanks in a row, or one at an end; rename it, or present a directory above it`);
}
