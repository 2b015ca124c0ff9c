/**
 * The real outside world: this process. See `io.ts` for what it offers. The launcher of the daemon is loaded only when
 * a daemon is started, for every other command has no use for what it brings along.
 */
import { readFileSync } from 'node:fs';
import { isatty } from 'node:tty';
import { exitCodeOf } from '../blockstore/errors.js';
import { sleepMs, type CliIo } from './io.js';

const INTERRUPTS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

export function processIo(): CliIo {
  let brokenPipeCode = 0;
  for (const stream of [process.stdout, process.stderr]) {
    stream.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'EPIPE') process.exit(brokenPipeCode);
      throw error;
    });
  }
  return {
    stdout: process.stdout,
    stderr: process.stderr,
    stdin: () => process.stdin,
    stdinIsTerminal: () => isatty(0),
    requireWholeOutput: () => { brokenPipeCode = exitCodeOf['io-error']; },
    env: process.env,
    cwd: () => process.cwd(),
    nowMs: () => performance.now(),
    sleep: sleepMs,
    onInterrupt: (listener) => {
      for (const signal of INTERRUPTS) process.on(signal, listener);
      return () => { for (const signal of INTERRUPTS) process.off(signal, listener); };
    },
    exit: (code) => process.exit(code),
    processLives,
    startDaemon: async (options, hooks) => {
      const { startDaemon } = await import('../daemon/control/launch.js');
      return await startDaemon(options, hooks);
    },
    checkOffline: async (options, hooks) => {
      const { checkOffline } = await import('../daemon/control/offline-check.js');
      return await checkOffline(options, hooks);
    },
  };
}

/** Where nobody reaps orphans (a container without an init), the dead stay as zombies: they count as gone. */
function processLives(pid: number): boolean {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const state = text.slice(text.lastIndexOf(')') + 2, text.lastIndexOf(')') + 3);
    return state !== 'Z' && state !== 'X';
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'ESRCH') return false;
    throw error;
  }
}
