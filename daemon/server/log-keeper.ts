/**
 * Keeps STORE/offshoot.log within bounds: when it has grown too long it is copied to offshoot.log.1 and cut.
 *
 * Main thread of the server. Holder and server have the file open for appending, so that a cut needs no word to either; lines
 * that are written between copy and cut are lost, which is what logrotate's `copytruncate` does as well. A log that goes
 * elsewhere (a terminal, the journal) is left alone. Nothing depends on the log: a failure is told and tried again later.
 */
import { copyFile, stat, truncate } from 'node:fs/promises';
import { fstatSync } from 'node:fs';
import { join } from 'node:path';

export const LOG_BYTES_MAX = 32 * 1024 * 1024;
const LOOK_INTERVAL_MS = 60_000;
const STANDARD_ERROR = 2;

/** Looks once; true when the log was cut. `logFd`: what this process writes its log to. */
export async function trimLog(storeDir: string, bytesMax: number = LOG_BYTES_MAX, logFd: number = STANDARD_ERROR): Promise<boolean> {
  const written = fstatSync(logFd);
  if (!written.isFile() || written.size <= bytesMax) return false;
  const file = join(storeDir, 'offshoot.log');
  const there = await stat(file);
  if (there.ino !== written.ino || there.dev !== written.dev) return false;
  await copyFile(file, `${file}.1`);
  await truncate(file, 0);
  return true;
}

/** Looks every minute. */
export function keepLogBounded(storeDir: string, logger: { warn(context: object, message: string): void }): void {
  setInterval(() => {
    trimLog(storeDir).catch((thrown: unknown) => { logger.warn({ err: thrown }, 'the log could not be cut; it is tried again'); });
  }, LOOK_INTERVAL_MS).unref();
}
