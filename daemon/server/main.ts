/**
 * The server's entry: takes its options from the holder, loads everything, puts the parts together, says `ready`, and serves until the
 * mount is gone.
 *
 * On standby it says hello and waits for `go`, which the holder sends when the server before is gone with all its threads; until then it
 * touches neither store nor mount. Crash-only: whatever is not an operating error ends the whole process at once, all threads, by
 * SIGKILL; the holder starts the next one, which finds the journals and the handle table where this one left them.
 */
import { pino } from 'pino';

import { toOffshootError, type OffshootError } from '../../blockstore/errors.js';
import { becomeIoFlusher, exitNow } from '../../blockstore/hot/door.js';
import { connectToHolder } from '../holder/holder-link.js';
import type { ServerMessage } from '../holder/ipc.js';
import { parseServerOptions } from '../holder/options.js';
import { WorkerPool } from '../transport/kernel/worker-pool.js';
import { buildIdentity } from './build-identity.js';
import type { Server } from './server.js';

const told = parseServerOptions(process.argv[2]);
// Synchronous: what was said before a crash is in the log. A log that cannot be written, for the store that it lies in is full, must end
// nothing: what was not written goes out with the next line that can be, or is dropped when there is too much of it.
const LOG_PENDING_BYTES_MAX = 256 * 1024;
const destination = pino.destination({ dest: 1, sync: true, maxLength: LOG_PENDING_BYTES_MAX });
destination.on('error', () => undefined);
const logger = pino({ level: told.logLevel, base: { pid: process.pid }, timestamp: pino.stdTimeFunctions.isoTime }, destination);

function die(error: unknown): never {
  logger.fatal({ err: error }, 'the server ends at once; the holder starts the next one');
  process.kill(process.pid, 'SIGKILL');
  throw error;
}

process.on('uncaughtException', die);
process.on('unhandledRejection', die);

// Inherited by every thread made from here on: memory reclaim in this process never waits for the disks it serves.
if (!becomeIoFlusher()) logger.warn({}, 'the kernel refused PR_SET_IO_FLUSHER: under memory pressure this process might wait for itself');

let server: Server | undefined;

try {
  const holder = connectToHolder({
    shutdown: () => {
      server?.stop(false).catch((thrown: unknown) => {
        const error = toOffshootError(thrown);
        if (error.kind === 'internal') die(thrown);
        logger.warn({ reason: error.message }, 'the holder asked for the end, and the mount is in use: serving on');
      });
    },
    handOver: () => { server?.handOver('the next build takes over'); },
    lost: () => {
      // On standby nobody is served, and nobody will ever say `go`.
      if (server === undefined) exitNow(0);
      if (told.connectionIsStored) {
        logger.error({}, 'the holder is gone: making room for the next one, which gets the connection from the service manager');
        server.handOver('the holder is gone');
        return;
      }
      logger.error({}, 'the holder is gone: serving on, but nobody can restart this server');
    },
    unknown: (received) => { logger.warn({ received }, 'the holder sent what this build does not understand'); },
  });
  const build = buildIdentity();
  // Threads load themselves side by side with this one, and wait: with guests about to come, they are there when the store is.
  const pool = new WorkerPool();
  if (told.transport === 'kernel') pool.prepare(told.workers);
  const { Server } = await import('./server.js');
  await holder.hello(build);
  let { restarts } = told;
  if (told.standby) {
    await Server.preload();
    restarts = await holder.go();
  }
  server = await Server.create({ options: { ...told, restarts }, build, pool, logger, onFatal: die });
  await server.start(holder);
  await holder.ready();
  await server.serveControl();
} catch (thrown) {
  const error = toOffshootError(thrown);
  if (error.kind === 'internal') die(thrown);
  logger.error({ err: error }, 'the server cannot start');
  await reportFailure(error);
  exitNow(1);
}

/** Tells the holder why, before there is a link to it. */
async function reportFailure(error: OffshootError): Promise<void> {
  await new Promise<void>((resolve) => {
    if (process.send === undefined || !process.connected) resolve();
    else process.send({ type: 'failed', error: { kind: error.kind, message: error.message } } satisfies ServerMessage, undefined, undefined, () => { resolve(); });
  });
}
