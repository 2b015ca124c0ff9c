/**
 * Where the servers of exports have their files, and how what a daemon left there that was killed with its holder is ended. Main thread of the
 * server; the holder's at the start.
 *
 * Beside the server's run-time directory and not in it: that one is emptied with each mount, while servers outlive the server of ours.
 */
import { readdirSync } from 'node:fs';
import path from 'node:path';

import { toOffshootError } from '../../blockstore/errors.js';
import { releaseLoops } from './block/loop-record.js';
import { exportProcessesIn } from './export-process.js';
import { endGuests } from './nbd/guests.js';
import type { ExportKind } from './presenter.js';

export interface PresenterLogger {
  info(context: object, message: string): void;
  warn(context: object, message: string): void;
}

/** What a presenter is made with. */
export interface PresenterPlace {
  /** Its own: `/run/offshoot-exports-KEY/KIND`. Not there yet: `makeExportsDirectory`. */
  readonly directory: string;
  readonly mountDir: string;
  /** Where to listen (`daemon start --export-address`), loopback when nobody said. */
  readonly address: string;
  readonly logger: PresenterLogger;
}

export const EXPORT_ADDRESS_DEFAULT = '127.0.0.1';

/** `/run/offshoot/KEY` gives `/run/offshoot-exports-KEY`. */
export function exportsRuntimeDir(runtimeDir: string): string {
  return `${path.dirname(runtimeDir)}-exports-${path.basename(runtimeDir)}`;
}

export function directoryOf(runtimeDir: string, kind: ExportKind): string { return path.join(exportsRuntimeDir(runtimeDir), kind); }

/**
 * Ends what a daemon started that is gone with its mount: its servers, its block devices; nobody else's. What it says is for people.
 * Never throws for one that does not end: the unmount says who is in the way.
 */
export async function endLeftExports(runtimeDir: string): Promise<readonly string[]> {
  const notes: string[] = [];
  const top = exportsRuntimeDir(runtimeDir);
  for (const kind of listed(top)) {
    const directory = path.join(top, kind);
    for (const left of exportProcessesIn(directory)) {
      const wasRunning = left.state().kind === 'running';
      try {
        await left.end({ termMs: 0 });
        if (wasRunning) notes.push(`ended the export server ${kind}/${left.name} of a daemon that was killed`);
      } catch (thrown) {
        notes.push(toOffshootError(thrown).message);
      }
    }
    try {
      const connections = await endGuests(directory);
      if (connections > 0) notes.push(`ended ${connections} connections to exports by ${kind} of a daemon that was killed`);
    } catch (thrown) {
      notes.push(toOffshootError(thrown).message);
    }
    for (const device of await releaseLoops(directory)) notes.push(`gave back ${device}, which a daemon that was killed had attached for an export`);
  }
  return notes;
}

function listed(directory: string): readonly string[] {
  try {
    return readdirSync(directory);
  } catch {
    // There never was an export, or it is of another user, who has mounted nothing of ours.
    return [];
  }
}
