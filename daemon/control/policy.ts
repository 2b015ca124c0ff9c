/**
 * What an administrator decides when the daemon is started, beyond its places: who may use the control sockets, and how much free
 * space is little. One value, handed on from the command line through the holder to each server.
 *
 * Group names are turned into numbers by the command that starts the daemon (`groups.ts`): a server that is started again
 * in the middle of the night must not depend on a directory service. Knows numbers and text only; loads nothing heavy.
 */
import { OffshootError } from '../../blockstore/errors.js';

/** An amount of free space: bytes, or a share of the file system. */
export interface SpaceThreshold {
  readonly unit: 'bytes' | 'percent';
  readonly value: number;
}

export interface DaemonPolicy {
  /** Members may do everything through the socket; null: root alone. */
  readonly adminGid: number | null;
  /** Members may ask, and change nothing, through a second socket; null: there is none. */
  readonly readOnlyGid: number | null;
  /** Less free space than this is worth a warning. */
  readonly spaceWarning: SpaceThreshold;
  /** Less than this is urgent. */
  readonly spaceCritical: SpaceThreshold;
}

export const DEFAULT_POLICY: DaemonPolicy = {
  adminGid: null,
  readOnlyGid: null,
  spaceWarning: { unit: 'percent', value: 10 },
  spaceCritical: { unit: 'percent', value: 3 },
};

/** (gid_t) -1 means "no change" to chown(2), and is no group. */
const GID_MAX = 0xffff_fffe;

/** A policy that came as JSON from another process of the same build. */
export function parsePolicy(value: unknown): DaemonPolicy {
  const fields = typeof value === 'object' && value !== null ? value as Readonly<Record<string, unknown>> : refuse('an object');
  return {
    adminGid: parseGid(fields['adminGid']),
    readOnlyGid: parseGid(fields['readOnlyGid']),
    spaceWarning: parseThreshold(fields['spaceWarning']),
    spaceCritical: parseThreshold(fields['spaceCritical']),
  };
}

/** Free bytes that the threshold stands for on a file system of this size. */
export function thresholdBytes(threshold: SpaceThreshold, totalBytes: number): number {
  return threshold.unit === 'bytes' ? threshold.value : Math.floor((totalBytes * threshold.value) / 100);
}

function parseGid(value: unknown): number | null {
  if (value === null) return null;
  return typeof value === 'number' && Number.isInteger(value) && value >= 0 && value <= GID_MAX ? value : refuse('a group number or null');
}

function parseThreshold(value: unknown): SpaceThreshold {
  const { unit, value: amount } = typeof value === 'object' && value !== null ? value as Readonly<Record<string, unknown>> : refuse('a threshold');
  const most = unit === 'percent' ? 100 : unit === 'bytes' ? Number.MAX_SAFE_INTEGER : -1;
  if (typeof amount !== 'number' || !(amount >= 0 && amount <= most)) return refuse('a threshold in bytes or percent');
  return { unit: unit as SpaceThreshold['unit'], value: amount };
}

function refuse(wanted: string): never {
  throw new OffshootError('invalid-argument', `policy must have ${wanted}`, { option: 'policy' });
}
