/**
 * The server as a child process: what it inherits, what it is told, and when it is truly gone.
 *
 * Runs in the holder. The server gets the FUSE connection and the locked lock file as descriptors 3 and 4, its options as one JSON
 * argument, a channel for messages, and the holder's own output as its output. It is reported as gone only when the process was
 * reaped, which the kernel allows after the last of its threads has ended, and when all its messages were delivered. No call here throws.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';

import type { HolderLog } from './holder-log.js';
import type { ServerEvents, ServerExit, ServerProcess } from './holder-ports.js';
import { readServerMessage } from './ipc.js';
import type { ServerOptions } from './options.js';
import { OOM_SCORE, spareFromMemoryKiller } from './process-guards.js';

export interface ServerCommand {
  /** The program's file. */
  readonly entry: string;
  readonly options: ServerOptions;
  /** The FUSE connection; null when the server mounts for itself. */
  readonly fuseFd: number | null;
  readonly lockFd: number;
}

/** The server that is built together with this holder. */
export const SERVER_ENTRY = fileURLToPath(new URL('../server/main.js', import.meta.url));

/** Threads for the few calls that the server makes off its main thread: name look-ups, copies, checks of sources. */
const THREAD_POOL_SIZE = '16';
/** How long the messages of a server that was reaped may take to arrive: they lie in the channel already. */
const LAST_MESSAGES_MS_MAX = 1_000;

export function spawnServer(command: ServerCommand, events: ServerEvents, log: HolderLog): ServerProcess {
  let child: ChildProcess;
  try {
    child = spawn(process.execPath, [command.entry, JSON.stringify(command.options)], {
      cwd: '/',
      // The service manager is the holder's to speak to.
      env: { ...process.env, NOTIFY_SOCKET: undefined, UV_THREADPOOL_SIZE: THREAD_POOL_SIZE },
      stdio: ['ignore', 'inherit', 'inherit', command.fuseFd ?? 'ignore', command.lockFd, 'ipc'],
    });
  } catch (error) {
    setImmediate(() => {
      events.gone({ code: null, signal: null, error: (error as Error).message });
    });
    return { pid: 0, send: () => undefined, kill: () => undefined };
  }
  if (child.pid !== undefined) spareFromMemoryKiller(child.pid, OOM_SCORE.server);
  reportEnd(child, events, log);
  child.on('message', (value: unknown) => {
    const message = readServerMessage(value);
    if (message === undefined) log('warn', 'the server sent what is not a message', { received: JSON.stringify(value).slice(0, 200) });
    else events.message(message);
  });
  return {
    pid: child.pid ?? 0,
    send: (message) => {
      if (!child.connected) return;
      child.send(message, (error) => {
        if (error === null) return;
        // Of a server that has ended, its end is what is told.
        const hasEnded = 'code' in error && (error.code === 'EPIPE' || error.code === 'ERR_IPC_CHANNEL_CLOSED');
        log(hasEnded ? 'info' : 'warn', 'a message did not reach the server', { type: message.type, error: error.message });
      });
    },
    kill: () => {
      child.kill('SIGKILL');
    },
  };
}

function reportEnd(child: ChildProcess, events: ServerEvents, log: HolderLog): void {
  let isReported = false;
  const report = (exit: ServerExit): void => {
    if (isReported) return;
    isReported = true;
    events.gone(exit);
  };
  child.on('error', (error) => {
    if (child.pid === undefined) report({ code: null, signal: null, error: error.message });
    else log('warn', 'the channel to the server had an error', { error: error.message });
  });
  child.on('exit', (code, signal) => {
    const exit = { code, signal };
    if (!child.connected) {
      report(exit);
      return;
    }
    const timer = setTimeout(() => {
      report(exit);
    }, LAST_MESSAGES_MS_MAX);
    child.once('disconnect', () => {
      clearTimeout(timer);
      report(exit);
    });
  });
}
