/**
 * The holder's report of itself: `holder.json` in the run-time directory, for the server's status and for people.
 *
 * Written by the holder alone, whole, by rename, so that a reader never sees half of it. It is a report: the one thing that is decided
 * from it is the number of the next server, by a holder that takes a mount over from one that died.
 */
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import type { ReportedError } from './ipc.js';

export interface UpgradeState {
  readonly id: number;
  /** `rolled-back`: the new build did not become ready, and the old one serves again. */
  readonly state: 'running' | 'done' | 'rolled-back';
  readonly fromVersion: string;
  readonly toVersion: string;
  readonly fromServerPid: number;
  /** The server that serves since; null while it runs. */
  readonly serverPid: number | null;
  readonly stallMs: number | null;
  readonly error: ReportedError | null;
  readonly at: string;
}

export interface HolderState {
  readonly holderPid: number;
  readonly holderVersion: string;
  /** The newest server, which is gone unless `state` is running. */
  readonly serverPid: number;
  /** The next server, loaded and waiting; null while there is none. */
  readonly sparePid: number | null;
  readonly restarts: number;
  /** When the holder mounted: ISO 8601. */
  readonly startedAt: string;
  readonly lastExit: { readonly code: number | null; readonly signal: string | null; readonly at: string } | null;
  /** From the end of the last server that served until its successor served: what guests waited. */
  readonly lastStallMs: number | null;
  /** The last time that a server's main thread did not answer the holder for long; `serverPid` says which. */
  readonly lastHang: { readonly ms: number; readonly serverPid: number; readonly at: string } | null;
  readonly upgrade: UpgradeState | null;
  /** `down`: the server crashed too often; the connection is kept, and SIGUSR1 to the holder tries again. */
  readonly state: 'running' | 'restarting' | 'down';
}

const FILE_NAME = 'holder.json';

export function writeHolderState(runtimeDir: string, state: HolderState): void {
  const path = join(runtimeDir, FILE_NAME);
  const unfinished = `${path}.new`;
  writeFileSync(unfinished, `${JSON.stringify(state)}\n`, { mode: 0o600 });
  renameSync(unfinished, path);
}

/** Null when there is none (no holder has got so far), and when what is there is no report: nothing is decided from it. */
export function readHolderState(runtimeDir: string): HolderState | null {
  let report: unknown;
  try {
    report = JSON.parse(readFileSync(join(runtimeDir, FILE_NAME), 'utf8'));
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw error;
  }
  return isReport(report) ? report : null;
}

function isReport(value: unknown): value is HolderState {
  if (typeof value !== 'object' || value === null) return false;
  const { holderPid, serverPid, restarts, lastStallMs, state } = value as Partial<Record<keyof HolderState, unknown>>;
  const isStall = lastStallMs === null || (typeof lastStallMs === 'number' && lastStallMs >= 0);
  return [holderPid, serverPid, restarts].every((count) => Number.isSafeInteger(count)) && isStall && ['running', 'restarting', 'down'].includes(String(state));
}
