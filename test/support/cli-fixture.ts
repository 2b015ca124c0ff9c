/** A world for commands to run in: captured streams, a clock that the test can move, interrupts at will, and no real daemon. */
import { Readable, Writable } from 'node:stream';
import type { StartDaemonOptions } from '../../daemon/control/launch.js';
import { sleepMs, type CliIo, type CliStream } from '../../cli/io.js';
import { runCli } from '../../cli/program.js';

export class CapturedStream extends Writable {
  text = '';
  readonly isTTY: boolean;
  readonly columns: number;

  constructor(terminal: boolean, columns = 100) {
    super();
    this.isTTY = terminal;
    this.columns = columns;
  }

  override _write(chunk: Buffer, _encoding: string, done: () => void): void {
    this.text += chunk.toString();
    done();
  }
}

export interface CliWorldOptions {
  readonly socketPath: string;
  readonly terminal?: boolean;
  readonly stdin?: readonly Uint8Array[];
  readonly env?: Readonly<Record<string, string>>;
  /** Milliseconds that the clock goes on at each sleep, and at nothing else; real sleeps then take no time. Without it, sleeps and the clock are real. */
  readonly sleepStepMs?: number;
  /** Called at each sleep: the place to interrupt. */
  readonly onSleep?: (world: CliWorld, sleeps: number) => void | Promise<void>;
  readonly startDaemon?: CliIo['startDaemon'];
  readonly checkOffline?: CliIo['checkOffline'];
  readonly processLives?: CliIo['processLives'];
}

export interface CliWorld {
  readonly io: CliIo;
  readonly stdout: CapturedStream;
  readonly stderr: CapturedStream;
  /** What the daemon was started with. */
  readonly started: StartDaemonOptions[];
  /** Codes that `io.exit` was called with. */
  readonly exits: number[];
  interrupt(): void;
  listeners(): number;
}

export interface CliRun {
  readonly code: number;
  readonly out: string;
  readonly err: string;
  readonly world: CliWorld;
}

export function createWorld(options: CliWorldOptions): CliWorld {
  const stdout = new CapturedStream(options.terminal === true);
  const stderr = new CapturedStream(options.terminal === true);
  const started: StartDaemonOptions[] = [];
  const exits: number[] = [];
  const listeners = new Set<() => void>();
  let skippedMs = 0;
  let sleeps = 0;
  const world: CliWorld = {
    stdout, stderr, started, exits,
    interrupt: () => { for (const listener of listeners) listener(); },
    listeners: () => listeners.size,
    io: {
      stdout: stdout as CliStream,
      stderr: stderr as CliStream,
      stdin: () => Readable.from(options.stdin ?? []),
      stdinIsTerminal: () => options.stdin === undefined,
      requireWholeOutput: () => undefined,
      env: { OFFSHOOT_SOCKET: options.socketPath, LANG: 'C.UTF-8', ...options.env },
      cwd: () => '/work/here',
      nowMs: () => (options.sleepStepMs === undefined ? performance.now() : skippedMs),
      sleep: async (durationMs, signal) => {
        sleeps += 1;
        await options.onSleep?.(world, sleeps);
        if (options.sleepStepMs === undefined) await sleepMs(durationMs, signal);
        else skippedMs += options.sleepStepMs;
      },
      onInterrupt: (listener) => {
        listeners.add(listener);
        return () => { listeners.delete(listener); };
      },
      exit: (code) => exits.push(code),
      checkOffline: options.checkOffline ?? (() => Promise.reject(new Error('no check was expected'))),
      processLives: options.processLives ?? (() => false),
      startDaemon: options.startDaemon ?? (async (asked, hooks) => {
        started.push(asked);
        const result = { holderPid: 11, serverPid: 12, socketPath: asked.socketPath, mountDir: asked.mountDir, notes: [] };
        if (asked.foreground) hooks.onReady?.(result);
        return Promise.resolve(result);
      }),
    },
  };
  return world;
}

export async function run(args: readonly string[], options: CliWorldOptions): Promise<CliRun> {
  const world = createWorld(options);
  const code = await runCli(args, world.io);
  return { code, out: world.stdout.text, err: world.stderr.text, world };
}
