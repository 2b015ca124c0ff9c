/**
 * A program that starts a daemon as the command line does, for tests that need it in a process of its own (signals, its
 * death). Its argument: `{ options, hooks }` of startDaemon as JSON. Writes one JSON object a line: ready, ended, error.
 */
import { startDaemon, type LaunchHooks, type StartDaemonOptions } from '../../daemon/control/launch.js';
import { toOffshootError } from '../../blockstore/errors.js';

const { options, hooks } = JSON.parse(process.argv[2] ?? '') as {
  readonly options: StartDaemonOptions;
  readonly hooks: LaunchHooks;
};

function say(event: string, details: object): void {
  process.stdout.write(`${JSON.stringify({ event, ...details })}\n`);
}

try {
  const result = await startDaemon(options, {
    ...hooks,
    onReady: (ready) => {
      say('ready', { holderPid: ready.holderPid });
    },
  });
  say('ended', { holderPid: result.holderPid });
} catch (error) {
  const { kind, message } = toOffshootError(error);
  say('error', { kind, message });
  process.exitCode = 1;
}
