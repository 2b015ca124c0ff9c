/**
 * A command in a real terminal: a pty of a given width that script(1) makes, with Ctrl-C as a key that is pressed, and what the terminal shows.
 */
import { spawn } from 'node:child_process';

import { waitUntil } from './processes.js';
import type { Cleanup } from './temp.js';

export interface Terminal {
  /** All that was written to it, control sequences included. */
  shown(): string;
  /** Waits for it to be shown. */
  see(pattern: RegExp): Promise<void>;
  pressCtrlC(): void;
  /** The exit code of the command. */
  ended(): Promise<number>;
}

export interface TerminalOptions {
  readonly env: Readonly<Record<string, string>>;
  readonly columns: number;
  readonly cleanup: Cleanup;
}

const SEEN_WITHIN_MS = 60_000;
const ENDED_WITHIN_MS = 120_000;
const CTRL_C = '\u0003';

export function runInTerminal(command: readonly string[], { env, columns, cleanup }: TerminalOptions): Terminal {
  const words = command.map((word) => `'${word.replaceAll("'", String.raw`'\''`)}'`).join(' ');
  const child = spawn('script', ['-qec', `stty cols ${columns} rows 24; exec ${words}`, '/dev/null'], {
    env: { ...process.env, TERM: 'xterm', LANG: 'C.UTF-8', ...env }, stdio: ['pipe', 'pipe', 'inherit'],
  });
  let shown = '';
  let code: number | null = null;
  child.stdout.on('data', (chunk: Buffer) => { shown += chunk.toString('utf8'); });
  child.on('close', (exitCode) => { code = exitCode ?? -1; });
  cleanup.add(() => { if (code === null) child.kill('SIGKILL'); });
  return {
    shown: () => shown,
    see: async (pattern) => {
      await waitUntil(() => pattern.test(shown) || code !== null, SEEN_WITHIN_MS);
      if (!pattern.test(shown)) throw new Error(`the terminal does not show ${String(pattern)}, but:\n${shown}`);
    },
    pressCtrlC: () => { child.stdin.write(CTRL_C); },
    ended: async () => {
      await waitUntil(() => code !== null, ENDED_WITHIN_MS);
      if (code === null) throw new Error(`the command has not ended; the terminal shows:\n${shown}`);
      return code;
    },
  };
}
