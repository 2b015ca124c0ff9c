/**
 * NFS-Ganesha's configuration file, written whole from the list of exports. Pure functions.
 *
 * Two parts: what only a start of the server reads, and the EXPORT blocks, which SIGHUP makes it read again. Each is the same text for the same
 * list, so that comparing texts says what has to be done. Reasons for the settings are in NFS.md.
 */
import type { Export } from '../presenter.js';
import { rulesOf, type NfsRules } from './rules.js';

export interface ServerSettings {
  readonly address: string;
  readonly port: number;
  /** Of the MOUNT protocol, which version 3 needs. */
  readonly mountPort: number;
  /** How long a client may be silent before its state is taken away. */
  readonly leaseSeconds: number;
  /** How long after a start the clients of before alone may have their state back. It ends at once when there were none, or when all have it. */
  readonly graceSeconds: number;
  /** Which clients had state, for the server that comes after. */
  readonly recoveryDir: string;
  /** A directory for credentials that are never used. */
  readonly credentialsDir: string;
}

const EXPORTS_MARK = '# Exports\n';
/** The largest request of the mount: what is larger would be split, and some clients fail over more. */
const TRANSFER_BYTES_MAX = 1024 * 1024;
const SQUASH_WORDS = { root: 'root_squash', none: 'no_root_squash', all: 'all_squash' } as const;
const HALF_OF_UUID_DIGITS = 16;

export function configuration(exports: readonly Export[], settings: ServerSettings): string {
  const each = exports.map((shown) => ({ shown, rules: rulesOf(shown) })).sort((a, b) => a.shown.id - b.shown.id);
  return `${serverPart(each.map(({ rules }) => rules), settings)}${EXPORTS_MARK}${each.map(({ shown, rules }) => exportBlock(shown, rules)).join('')}`;
}

/** Whether a server that runs with one can be told of the other by SIGHUP. An export that lies elsewhere now is another one, which no rereading makes. */
export function canBeReread(before: string, after: string): boolean {
  const [serverBefore, serverAfter] = [before, after].map((text) => text.slice(0, text.indexOf(EXPORTS_MARK)));
  if (serverBefore !== serverAfter) return false;
  const placesBefore = placesIn(before);
  return [...placesIn(after)].every(([id, place]) => (placesBefore.get(id) ?? place) === place);
}

/** Two numbers of 63 bits, made of the export's uuid: the same for ever, so that clients see the same file system. */
export function fileSystemIdOf(uuid: string): string {
  const digits = uuid.replaceAll('-', '');
  const half = (from: number): bigint => BigInt(`0x${digits.slice(from, from + HALF_OF_UUID_DIGITS)}`) / 2n;
  return `${half(0)}.${half(HALF_OF_UUID_DIGITS)}`;
}

function serverPart(rules: readonly NfsRules[], { address, port, mountPort, leaseSeconds, graceSeconds, recoveryDir, credentialsDir }: ServerSettings): string {
  const versions = versionsOf(rules);
  const kerberos = rules.some(({ security }) => security !== 'sys');
  return `# Written by Offshoot, whole, whenever an export changes. Changes made here are lost.
NFS_CORE_PARAM {
  Protocols = ${versions};
  Bind_addr = ${address};
  NFS_Port = ${port};
  MNT_Port = ${mountPort};
  Enable_UDP = false;
  Enable_NLM = false;
  Enable_RQUOTA = false;
  mount_path_pseudo = true;
  Short_File_Handle = true;
}
NFSv4 {
  Graceless = false;
  Lease_Lifetime = ${leaseSeconds};
  Grace_Period = ${graceSeconds};
  RecoveryBackend = fs;
  RecoveryRoot = "${recoveryDir}";
  Only_Numeric_Owners = true;
  Delegations = false;
}
NFS_KRB5 {
  Active_krb5 = ${String(kerberos)};
  CCacheDir = "${credentialsDir}";
}
LOG {
  Default_log_level = EVENT;
  COMPONENTS {
    TIRPC = FATAL;
    DBUS = FATAL;
  }
}
EXPORT_DEFAULTS {
  Access_Type = None;
  Protocols = ${versions};
  Transports = TCP;
  SecType = sys;
  Squash = root_squash;
}
`;
}

function exportBlock({ id, uuid, path, mountPath, readOnly }: Export, { squash, security, clients }: NfsRules): string {
  return `EXPORT {
  Export_Id = ${id};
  Path = "${mountPath}";
  Pseudo = "/${path}";
  Filesystem_Id = ${fileSystemIdOf(uuid)};
  MaxRead = ${TRANSFER_BYTES_MAX};
  MaxWrite = ${TRANSFER_BYTES_MAX};
  PrefRead = ${TRANSFER_BYTES_MAX};
  PrefWrite = ${TRANSFER_BYTES_MAX};
  Attr_Expiration_Time = 1;
  Access_Type = None;
  SecType = ${security};
  FSAL {
    Name = VFS;
  }
  CLIENT {
    Clients = ${clients.join(', ')};
    Access_Type = ${readOnly ? 'RO' : 'RW'};
    Squash = ${SQUASH_WORDS[squash]};
    SecType = ${security};
  }
}
`;
}

function versionsOf(rules: readonly NfsRules[]): string {
  return rules.some(({ version3 }) => version3) ? '3, 4' : '4';
}

function placesIn(text: string): Map<string, string> {
  return new Map([...text.matchAll(/ {2}Export_Id = ([0-9]+);\n {2}Path = ("[^"]*");\n {2}Pseudo = ("[^"]*");\n {2}Filesystem_Id = ([0-9.]+);/gu)]
    .map(([, id = '', path = '', pseudo = '', fileSystem = '']) => [id, [path, pseudo, fileSystem].join()]));
}
