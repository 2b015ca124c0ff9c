/**
 * What every command gets: the outside world, its output, and a client of the daemon made from the global options.
 * The client is made when it is asked for, so that a wrong socket path is this command's error and not the program's.
 */
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { createControlClient, type ControlClient } from '../daemon/control/client.js';
import { DEFAULT_SOCKET_PATH } from '../daemon/control/limits.js';
import { checkSocketPath } from '../daemon/control/socket-path.js';
import type { CliIo } from './io.js';
import { createOutput, type Output } from './output.js';

export interface CliContext {
  readonly io: CliIo;
  readonly output: Output;
  /** Absolute and checked. */
  readonly socketPath: () => string;
  readonly client: () => ControlClient;
}

/** Global options may be given before or after the command: commander gathers both. */
interface GlobalOptions {
  readonly json?: boolean;
  readonly socket?: string;
}

export function contextOf(io: CliIo, command: Command): CliContext {
  const global = command.optsWithGlobals<GlobalOptions>();
  const socketPath = (): string => {
    const fromEnvironment = io.env['OFFSHOOT_SOCKET'];
    const given = global.socket ?? (fromEnvironment === undefined || fromEnvironment === '' ? DEFAULT_SOCKET_PATH : fromEnvironment);
    return checkSocketPath(given === '' ? given : resolveKeepingSlash(io.cwd(), given));
  };
  return {
    io,
    output: createOutput(io, global.json === true),
    socketPath,
    client: () => createControlClient({ socketPath: socketPath() }),
  };
}

/** A final '/' says that a directory was meant: it is kept for the check to see. */
function resolveKeepingSlash(cwd: string, path: string): string {
  return path.endsWith('/') ? `${resolve(cwd, path)}/` : resolve(cwd, path);
}
