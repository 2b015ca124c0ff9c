/**
 * Faults: how vSphere says no, translated to our kinds of error, in vSphere's own words.
 *
 * A fault has a type (`DuplicateName`), a sentence, and often details that are worth more than the sentence. A type that is not in
 * the table is an `io-error` and still named. `VsphereFault` travels within this folder, where callers look at its type;
 * `faultError` is what leaves it.
 */
import { OffshootError, type ErrorKind } from '../../../blockstore/errors.js';
import { childOf, childrenOf, textAt, type XmlElement } from './xml.js';

const KIND_OF_FAULT: Readonly<Record<string, ErrorKind>> = {
  AlreadyExists: 'already-exists',
  DuplicateName: 'already-exists',
  FileAlreadyExists: 'already-exists',
  ManagedObjectNotFound: 'not-found',
  NotFound: 'not-found',
  FileNotFound: 'not-found',
  DatastoreNotFound: 'not-found',
  InvalidDatastore: 'not-found',
  InvalidDatastorePath: 'invalid-argument',
  InvalidArgument: 'invalid-argument',
  InvalidRequest: 'invalid-argument',
  InvalidName: 'invalid-name',
  InvalidVmConfig: 'invalid-argument',
  VmConfigFault: 'invalid-argument',
  InvalidLogin: 'permission-denied',
  InvalidLocale: 'permission-denied',
  NoClientCertificate: 'permission-denied',
  PasswordExpired: 'permission-denied',
  NotAuthenticated: 'permission-denied',
  NoPermission: 'permission-denied',
  // A licence without the right to change anything: the API of a host without a paid licence can only be read.
  RestrictedVersion: 'not-permitted',
  InvalidLicense: 'not-permitted',
  LicenseExpired: 'not-permitted',
  MethodDisabled: 'not-permitted',
  InvalidState: 'conflict',
  InvalidPowerState: 'conflict',
  InvalidHostState: 'conflict',
  InvalidHostConnectionState: 'conflict',
  ConcurrentAccess: 'conflict',
  TaskInProgress: 'busy',
  ResourceInUse: 'in-use',
  FileLocked: 'in-use',
  DatastoreNotWritableOnHost: 'not-permitted',
  InsufficientResourcesFault: 'busy',
  InsufficientCpuResourcesFault: 'busy',
  InsufficientMemoryResourcesFault: 'busy',
  InsufficientHostCapacityFault: 'busy',
  OutOfBounds: 'busy',
  NoDiskSpace: 'no-space',
  FileTooLarge: 'too-large',
  FileFault: 'io-error',
  CannotAccessFile: 'io-error',
  CannotAccessVmConfig: 'io-error',
  HostConfigFault: 'io-error',
  PlatformConfigFault: 'io-error',
  NotSupported: 'not-supported',
  MethodNotFound: 'not-supported',
  ToolsUnavailable: 'not-supported',
  VmToolsUpgradeFault: 'not-supported',
  HostNotConnected: 'source-unreachable',
  HostNotReachable: 'source-unreachable',
  HostCommunication: 'source-unreachable',
  NoHost: 'source-unreachable',
  RequestCanceled: 'cancelled',
  Timedout: 'timed-out',
};

/** Details of faults that say which thing was meant. */
const DETAILS = ['name', 'file', 'datastore', 'datastorePath', 'invalidProperty', 'property', 'privilegeId', 'existingState', 'requestedState'];
const MESSAGES_MAX = 4;
const TEXT_CHARACTERS_MAX = 500;

/** What vSphere said when it refused. Only `describe` makes text of it. */
export class VsphereFault extends Error {
  readonly type: string;
  readonly details: ReadonlyMap<string, string>;
  readonly method: string;

  constructor(method: string, type: string, words: string, details: ReadonlyMap<string, string>) {
    super(words);
    this.name = 'VsphereFault';
    this.method = method;
    this.type = type;
    this.details = details;
  }
}

/** The `Fault` of a SOAP message. */
export function soapFault(method: string, fault: XmlElement): VsphereFault {
  const detail = childOf(fault, 'detail')?.children[0];
  const type = detail === undefined ? (textAt(fault, 'faultcode') ?? 'Fault') : (detail.xsiType ?? detail.name.replace(/Fault$/u, ''));
  return makeFault(method, type, textAt(fault, 'faultstring') ?? '', detail);
}

/** A `LocalizedMethodFault`: of a task that failed, of a property that cannot be read. */
export function localizedFault(method: string, error: XmlElement): VsphereFault {
  const fault = childOf(error, 'fault');
  return makeFault(method, fault?.xsiType ?? 'unknown fault', textAt(error, 'localizedMessage') ?? '', fault);
}

function makeFault(method: string, type: string, sentence: string, fault: XmlElement | undefined): VsphereFault {
  const details = new Map<string, string>();
  for (const name of DETAILS) {
    const value = textAt(fault, name);
    if (value !== null && value.trim() !== '') details.set(name, clip(value));
  }
  const more = childrenOf(fault, 'faultMessage').map((each) => textAt(each, 'message') ?? '').filter((text) => text !== '' && text !== sentence);
  const words = [sentence, ...more.slice(0, MESSAGES_MAX)].map((text) => clip(text.trim())).filter((text) => text !== '');
  return new VsphereFault(method, type, words.join(' '), details);
}

/** The words of a fault for people: `A general system error (RestrictedVersion)`. */
export function describeFault(fault: VsphereFault): string {
  const details = [...fault.details].map(([name, value]) => `${name} ${value}`);
  return `${fault.message === '' ? 'it gave no reason' : fault.message} (${[fault.type, ...details].join(', ')})`;
}

export function kindOfFault(fault: VsphereFault): ErrorKind {
  return KIND_OF_FAULT[fault.type] ?? (/^Insufficient.*(?:Fault|Resources)$/u.test(fault.type) ? 'busy' : 'io-error');
}

/** A fault as an error for those outside. Anything else that was thrown is handed back as it is. `doing`: `register machine web-1`. */
export function faultError(thrown: unknown, doing: string): unknown {
  if (!(thrown instanceof VsphereFault)) return thrown;
  const advice = ADVICE[thrown.type];
  return new OffshootError(kindOfFault(thrown), `vSphere refused to ${doing}: ${describeFault(thrown)}${advice === undefined ? '' : `; ${advice}`}`,
    { method: thrown.method, fault: thrown.type });
}

const ADVICE: Readonly<Record<string, string>> = {
  InvalidLogin: 'look at the user and the password in the credentials file',
  NoPermission: 'the account lacks a privilege; VSPHERE.md lists those that are needed',
  RestrictedVersion: 'the API of a host without a paid licence can only be read',
  ToolsUnavailable: 'VMware Tools do not run in the machine; only its power can be taken',
};

function clip(text: string): string {
  return text.length <= TEXT_CHARACTERS_MAX ? text : `${text.slice(0, TEXT_CHARACTERS_MAX)}…`;
}
