/**
 * Entry point of the holder process: `node holder/main.js OPTIONS`, OPTIONS being HolderOptions as JSON.
 *
 * Started by `daemon/control/launch.ts`. SIGTERM and SIGINT stop in an orderly way, SIGUSR1 tries again after a crash loop.
 * Once it holds a mount, this process does not end because of an error of its own: it says so and goes on, for every guest's disk
 * hangs on it and it has no state that an error could spoil.
 */
import { OffshootError, exitCodeOf, toOffshootError } from '../../blockstore/errors.js';
import type { Holder } from './holder.js';
import { holderLog } from './holder-log.js';
import { parseHolderOptions, type HolderOptions } from './options.js';
import { guardProcess } from './process-guards.js';
import { runHolder } from './start.js';
import { startReporter } from './start-reporter.js';

/** Signal handlers do not keep Node.js running, and a holder that is down has nothing else. */
const KEEP_ALIVE_MS = 2 ** 30;

async function main(): Promise<number> {
  guardProcess();
  let options: HolderOptions;
  try {
    options = parseHolderOptions(process.argv[2]);
  } catch (error) {
    const known = toOffshootError(error);
    process.stderr.write(`offshoot-holder: ${known.message}\n`);
    return exitCodeOf[known.kind];
  }
  process.title = `offshoot-holder ${options.storeDir}`;
  let holder: Holder | undefined;
  let giveUpReason: OffshootError | undefined;
  const giveUp = (reason: OffshootError): void => {
    giveUpReason ??= reason;
    holder?.giveUp(giveUpReason);
  };
  const stop = (): void => {
    if (holder === undefined) giveUp(new OffshootError('cancelled', 'the daemon was told to stop before it was ready'));
    else holder.stop();
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  process.on('SIGUSR1', () => holder?.retry());
  const log = holderLog(options.logLevel);
  process.on('uncaughtException', (error) => {
    log('fatal', `an error in the holder: ${error.stack ?? error.message}`);
    giveUp(toOffshootError(error));
  });
  setInterval(() => undefined, KEEP_ALIVE_MS);
  const reporter = startReporter(options.reportFd, () => {
    giveUp(new OffshootError('cancelled', 'the command that started the daemon went away before it was ready'));
  });
  return await runHolder(options, {
    reporter,
    running: (running) => {
      holder = running;
      // A wish from the time before there was a holder; the server is about to be started, and is ended at once.
      setImmediate(() => {
        if (giveUpReason !== undefined) running.giveUp(giveUpReason);
      });
    },
  });
}

process.exit(await main());
