/**
 * What the holder and the server are told when they are started: one JSON argument each, checked at the door.
 *
 * Launcher and holder come from one build. A server may come from a later one (`offshoot daemon upgrade`): what it is told here is part of
 * the holder's protocol, see `ipc.ts`. Paths are absolute: both processes run in `/`. Opens and checks nothing itself; see `preflight.ts`.
 */
import { isIP } from 'node:net';
import { availableParallelism } from 'node:os';
import { isAbsolute } from 'node:path';

import { OffshootError } from '../../blockstore/errors.js';
import { ATTACH_LIMIT_MAX, LOG_LEVELS, SOURCE_TIMEOUT_SECONDS, SOURCE_TIMEOUT_SECONDS_MAX, TRANSPORTS, WORKERS_MAX } from '../control/limits.js';
import { parsePolicy, type DaemonPolicy } from '../control/policy.js';
import type { StoredConnection } from './stored-connections.js';

export type Transport = (typeof TRANSPORTS)[number];
export type LogLevel = (typeof LOG_LEVELS)[number];

/** What the administrator said of hypervisors; each may be left out. */
export interface HypervisorSettings {
  /** Of libvirt: `qemu:///system` when left out. */
  readonly libvirtUri?: string;
  /** A file, see VSPHERE.md; without it there is no vSphere. */
  readonly vsphereSettings?: string;
}

export interface HolderOptions {
  readonly storeDir: string;
  readonly mountDir: string;
  readonly socketPath: string;
  readonly workers: number;
  readonly transport: Transport;
  readonly logLevel: LogLevel;
  /** Who may use the control sockets, and when space is little; the defaults when left out. */
  readonly policy?: DaemonPolicy;
  /** How long a read waits for a source that does not answer. */
  readonly sourceTimeoutSeconds: number;
  /** True: output goes to the terminal that started the daemon. False: to STORE/offshoot.log. */
  readonly foreground: boolean;
  /** The inherited descriptor that takes the report of the start, one JSON line; null when nobody waits for it. */
  readonly reportFd: number | null;
  /** The program to run as the server; null for the one beside the holder. Tests put their own here. */
  readonly serverEntry: string | null;
  /** Keep a next server loaded: a shorter stall for some memory. */
  readonly spare: boolean;
  /** Connections that a service manager kept for us: inherited descriptors, and the number of each. */
  readonly stored: readonly StoredConnection[];
  /** Limit of the scrub that begins by itself; null: none begins. Undefined: SCRUB_RATE_BYTES_DEFAULT. */
  readonly scrubRateBytesPerSecond?: number | null;
  readonly hypervisors?: HypervisorSettings;
  /** Where servers of exports listen: this host's own address when left out. */
  readonly exportAddress?: string;
  /** File handles for NFS servers: fixed for the mount when it is made. Left out: none. */
  readonly nfs?: boolean;
  /** Virtual disks that may be attached at a time. */
  readonly attachLimit?: number;
}

export interface ServerOptions {
  readonly storeDir: string;
  readonly mountDir: string;
  readonly socketPath: string;
  readonly runtimeDir: string;
  readonly workers: number;
  readonly transport: Transport;
  readonly logLevel: LogLevel;
  readonly policy?: DaemonPolicy;
  readonly sourceTimeoutSeconds: number;
  /** 0 for the first server of a mount: only that one is sent INIT. */
  readonly restarts: number;
  readonly holderPid: number;
  /** Of the holder's build, which an upgrade does not change. */
  readonly holderVersion: string;
  /** Load everything and wait for `go`, which brings the number of restarts. */
  readonly standby: boolean;
  /** The connection is also kept by the service manager: without its holder the server ends, and the next holder takes over. */
  readonly connectionIsStored: boolean;
  readonly scrubRateBytesPerSecond?: number | null;
  readonly hypervisors?: HypervisorSettings;
  /** Where servers of exports listen: this host's own address when left out. */
  readonly exportAddress?: string;
  readonly nfs?: boolean;
  readonly attachLimit?: number;
}

/** Descriptors that the server inherits; `fuse` with the kernel transport only, otherwise that number is not ours. */
export const SERVER_FD = { fuse: 3, lock: 4 } as const;

/** Workers when nobody says: two keep a single queue busy, more than eight were never faster. */
export function defaultWorkers(): number {
  return Math.min(8, Math.max(2, availableParallelism()));
}

export function parseHolderOptions(json: string | undefined): HolderOptions {
  const fields = parseFields(json, 'holder');
  return {
    ...parseCommon(fields),
    foreground: boolean(fields, 'foreground'),
    reportFd: fields['reportFd'] === null ? null : wholeNumber(fields, 'reportFd', 3, 1_000_000),
    serverEntry: fields['serverEntry'] === null ? null : path(fields, 'serverEntry'),
    spare: boolean(fields, 'spare'),
    stored: stored(fields['stored']),
  };
}

export function parseServerOptions(json: string | undefined): ServerOptions {
  const fields = parseFields(json, 'server');
  return {
    ...parseCommon(fields),
    runtimeDir: path(fields, 'runtimeDir'),
    restarts: wholeNumber(fields, 'restarts', 0, Number.MAX_SAFE_INTEGER),
    holderPid: wholeNumber(fields, 'holderPid', 1, Number.MAX_SAFE_INTEGER),
    holderVersion: text(fields, 'holderVersion'),
    standby: boolean(fields, 'standby'),
    connectionIsStored: boolean(fields, 'connectionIsStored'),
  };
}

type Fields = Readonly<Record<string, unknown>>;

function parseCommon(
  fields: Fields,
): Pick<HolderOptions, 'storeDir' | 'mountDir' | 'socketPath' | 'workers' | 'transport' | 'logLevel' | 'policy' | 'sourceTimeoutSeconds' | 'scrubRateBytesPerSecond' | 'hypervisors' | 'exportAddress' | 'nfs' | 'attachLimit'> {
  return {
    storeDir: path(fields, 'storeDir'),
    mountDir: path(fields, 'mountDir'),
    socketPath: path(fields, 'socketPath'),
    workers: wholeNumber(fields, 'workers', 1, WORKERS_MAX),
    transport: oneOf(fields, 'transport', TRANSPORTS),
    logLevel: oneOf(fields, 'logLevel', LOG_LEVELS),
    ...(fields['policy'] === undefined ? {} : { policy: parsePolicy(fields['policy']) }),
    // A holder of a build that did not know it says nothing.
    sourceTimeoutSeconds: fields['sourceTimeoutSeconds'] === undefined ? SOURCE_TIMEOUT_SECONDS : wholeNumber(fields, 'sourceTimeoutSeconds', 1, SOURCE_TIMEOUT_SECONDS_MAX),
    ...(fields['scrubRateBytesPerSecond'] === undefined ? {} : {
      scrubRateBytesPerSecond: fields['scrubRateBytesPerSecond'] === null ? null : wholeNumber(fields, 'scrubRateBytesPerSecond', 1, Number.MAX_SAFE_INTEGER),
    }),
    ...(fields['attachLimit'] === undefined ? {} : { attachLimit: wholeNumber(fields, 'attachLimit', 0, ATTACH_LIMIT_MAX) }),
    ...(fields['hypervisors'] === undefined ? {} : { hypervisors: hypervisorSettings(fields['hypervisors']) }),
    ...(fields['exportAddress'] === undefined ? {} : { exportAddress: address(fields, 'exportAddress') }),
    ...(fields['nfs'] === undefined ? {} : { nfs: boolean(fields, 'nfs') }),
  };
}

function parseFields(json: string | undefined, program: string): Fields {
  let value: unknown;
  try {
    value = JSON.parse(json ?? '');
  } catch (error) {
    throw new OffshootError(
      'invalid-argument',
      `the ${program} is started by 'offshoot daemon start' with its options as one JSON argument, not by hand`,
      {},
      error,
    );
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return refuse('options', 'an object');
  return value as Fields;
}

function refuse(name: string, wanted: string): never {
  throw new OffshootError('invalid-argument', `${name} must be ${wanted}`, { option: name });
}

function text(fields: Fields, name: string): string {
  const value = fields[name];
  return typeof value === 'string' && value !== '' ? value : refuse(name, 'a text that is not empty');
}

function path(fields: Fields, name: string): string {
  const value = text(fields, name);
  return isAbsolute(value) && !value.includes('\0') ? value : refuse(name, 'an absolute path without NUL bytes');
}

function stored(value: unknown): readonly StoredConnection[] {
  if (!Array.isArray(value)) return refuse('stored', 'a list');
  return value.map((each: unknown) => {
    const fields = (typeof each === 'object' && each !== null ? each : {}) as Fields;
    return { fd: wholeNumber(fields, 'fd', 3, 1_000_000), connection: wholeNumber(fields, 'connection', 0, Number.MAX_SAFE_INTEGER) };
  });
}

function hypervisorSettings(value: unknown): HypervisorSettings {
  if (typeof value !== 'object' || value === null) return refuse('hypervisors', 'an object');
  const fields = value as Fields;
  return {
    ...(fields['libvirtUri'] === undefined ? {} : { libvirtUri: text(fields, 'libvirtUri') }),
    ...(fields['vsphereSettings'] === undefined ? {} : { vsphereSettings: path(fields, 'vsphereSettings') }),
  };
}

function address(fields: Fields, name: string): string {
  const value = text(fields, name);
  return isIP(value) === 0 ? refuse(name, 'an address of this host, in numbers: 192.0.2.1, or 0.0.0.0 for all') : value;
}

function boolean(fields: Fields, name: string): boolean {
  const value = fields[name];
  return typeof value === 'boolean' ? value : refuse(name, 'true or false');
}

function wholeNumber(fields: Fields, name: string, least: number, most: number): number {
  const value = fields[name];
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= least && value <= most
    ? value
    : refuse(name, `a whole number from ${least} to ${most}`);
}

function oneOf<T extends string>(fields: Fields, name: string, allowed: readonly T[]): T {
  return allowed.find((candidate) => candidate === fields[name]) ?? refuse(name, `one of ${allowed.join(', ')}`);
}
