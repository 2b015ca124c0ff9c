/**
 * What the administrator says of a vSphere: where it is, what its certificate is trusted by, who we are there, and which directories
 * of this host are which datastores there. JSON, read once; the password is in a file of its own, see `credentials.ts`.
 *
 * There is no setting that turns the check of the certificate off.
 */
import { isAbsolute, join, normalize, relative } from 'node:path';

import { Type, type Static } from '@sinclair/typebox';
import { Value } from '@sinclair/typebox/value';

import { OffshootError } from '../../../blockstore/errors.js';

const SECOND_MS = 1000;

const Text = Type.String({ minLength: 1, maxLength: 1024 });

const settingsSchema = Type.Object({
  /** `https://HOST[:PORT]`, of an ESXi host or a vCenter. */
  url: Text,
  /** A file of this host with mode 0600: the user's name in its first line, the password in the second. */
  credentialsFile: Text,
  /** PEM file with the authorities that may have signed the certificate. */
  caFile: Type.Optional(Text),
  /** SHA-256 of the server's own certificate, for one that no authority signed. */
  thumbprint: Type.Optional(Text),
  /** Which directory of this host, under the mount, is the top of which datastore. */
  datastores: Type.Array(Type.Object({ directory: Text, datastore: Text }, { additionalProperties: false }), { minItems: 1, maxItems: 256 }),
  /** Inventory paths. Needed where there is more than one: `DC0`, `DC0/vm/clones`, `DC0/host/cluster/Resources`. */
  datacenter: Type.Optional(Text),
  folder: Type.Optional(Text),
  resourcePool: Type.Optional(Text),
  callTimeoutMs: Type.Optional(Type.Integer({ minimum: 100, maximum: 600 * SECOND_MS })),
  taskTimeoutMs: Type.Optional(Type.Integer({ minimum: 100, maximum: 3600 * SECOND_MS })),
}, { additionalProperties: false });

/** Which authority the server's certificate is believed by: a pinned one by itself, otherwise the file's, otherwise the system's. */
export type Trust =
  | { readonly by: 'thumbprint'; readonly sha256: string }
  | { readonly by: 'file'; readonly caFile: string }
  | { readonly by: 'system' };

export interface DatastoreMapping {
  readonly directory: string;
  readonly datastore: string;
}

export interface VsphereSettings {
  readonly host: string;
  readonly port: number;
  readonly trust: Trust;
  readonly credentialsFile: string;
  readonly datastores: readonly DatastoreMapping[];
  readonly datacenter: string | null;
  readonly folder: string | null;
  readonly resourcePool: string | null;
  readonly callTimeoutMs: number;
  readonly taskTimeoutMs: number;
}

const HTTPS_PORT = 443;
const CALL_TIMEOUT_MS = 30 * SECOND_MS;
const TASK_TIMEOUT_MS = 300 * SECOND_MS;
const SHA256_BYTES = 32;

/** Throws `invalid-argument`, saying which setting is wrong and how it would be right. */
export function parseVsphereSettings(text: string): VsphereSettings {
  let given: unknown;
  try {
    given = JSON.parse(text);
  } catch (error) {
    throw new OffshootError('invalid-argument', `the settings for vSphere are no JSON: ${error instanceof Error ? error.message : String(error)}`, {}, error);
  }
  if (!Value.Check(settingsSchema, given)) {
    const first = Value.Errors(settingsSchema, given).First();
    throw wrong(`${first?.path === undefined || first.path === '' ? 'the whole' : first.path}: ${first?.message ?? 'not as it should be'}`);
  }
  const settings: Static<typeof settingsSchema> = given;
  const { host, port } = parseUrl(settings.url);
  if (settings.caFile !== undefined && settings.thumbprint !== undefined) throw wrong('caFile and thumbprint exclude each other: give one');
  for (const file of [settings.credentialsFile, settings.caFile]) {
    if (file !== undefined && !isAbsolute(file)) throw wrong(`'${file}' must be an absolute path`);
  }
  return {
    host,
    port,
    trust: settings.thumbprint !== undefined ? { by: 'thumbprint', sha256: parseThumbprint(settings.thumbprint) }
      : settings.caFile !== undefined ? { by: 'file', caFile: settings.caFile } : { by: 'system' },
    credentialsFile: settings.credentialsFile,
    datastores: settings.datastores.map(parseMapping),
    datacenter: settings.datacenter ?? null,
    folder: settings.folder ?? null,
    resourcePool: settings.resourcePool ?? null,
    callTimeoutMs: settings.callTimeoutMs ?? CALL_TIMEOUT_MS,
    taskTimeoutMs: settings.taskTimeoutMs ?? TASK_TIMEOUT_MS,
  };
}

function parseUrl(text: string): { readonly host: string; readonly port: number } {
  // What the administrator wrote is not repeated: it may hold a password.
  const url = URL.canParse(text) ? new URL(text) : null;
  if (url?.protocol !== 'https:') throw wrong('url must be https://HOST or https://HOST:PORT');
  if (url.username !== '' || url.password !== '') throw wrong('url must not hold a user or a password: they belong into credentialsFile');
  if (!['', '/', '/sdk', '/sdk/'].includes(url.pathname) || url.search !== '' || url.hash !== '') throw wrong('url must be https://HOST or https://HOST:PORT');
  return { host: url.hostname.replace(/^\[(.*)\]$/u, '$1'), port: url.port === '' ? HTTPS_PORT : Number(url.port) };
}

function parseThumbprint(text: string): string {
  const hex = text.replaceAll(':', '').toLowerCase();
  if (!/^[0-9a-f]+$/u.test(hex) || hex.length !== SHA256_BYTES * 2) {
    throw wrong('thumbprint must be the SHA-256 of the certificate, 64 hexadecimal digits with or without colons '
      + '(openssl s_client -connect HOST:443 </dev/null | openssl x509 -noout -fingerprint -sha256, compared with what the host\'s console says)');
  }
  return hex;
}

function parseMapping({ directory, datastore }: DatastoreMapping): DatastoreMapping {
  if (!isAbsolute(directory)) throw wrong(`directory '${directory}' of datastore '${datastore}' must be an absolute path`);
  // A bracket would end the datastore's name in `[name] path`.
  if (/[[\]/\\]/u.test(datastore)) throw wrong(`datastore '${datastore}' must not hold brackets or slashes`);
  return { directory: normalize(`${directory}/`).replace(/(?<=.)\/$/u, ''), datastore };
}

/** `[datastore] dir/NAME.vmx` for a file that this host has in `directory`. The longest mapping that holds it decides. */
export function datastorePath(mappings: readonly DatastoreMapping[], directory: string, fileName: string): string {
  if (!isAbsolute(directory)) throw new OffshootError('invalid-argument', `a machine's directory must be an absolute path, and '${directory}' is not`);
  if (fileName.includes('/') || fileName === '' || fileName === '..') {
    throw new OffshootError('invalid-argument', `'${fileName}' is no file name`);
  }
  let best: { readonly mapping: DatastoreMapping; readonly inside: string } | null = null;
  for (const mapping of mappings) {
    const inside = relative(mapping.directory, normalize(directory));
    if (inside === '..' || inside.startsWith('../')) continue;
    if (best === null || mapping.directory.length > best.mapping.directory.length) best = { mapping, inside };
  }
  if (best === null) {
    throw new OffshootError('invalid-argument', `no datastore of vSphere holds ${directory}: the settings map ${mappings.map((each) => each.directory).join(', ')}; `
      + 'add { "directory", "datastore" } for it');
  }
  return `[${best.mapping.datastore}] ${join(best.inside, fileName)}`;
}

function wrong(message: string): OffshootError {
  return new OffshootError('invalid-argument', `settings for vSphere: ${message}`);
}
