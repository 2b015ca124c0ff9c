/**
 * A real daemon for tests that mount: started by the built command line, on a store, mount and socket of its own.
 *
 * What a test leaves is taken away by `cleanup`: processes by id, the mount by abort and lazy unmount, so that neither a
 * killed server nor a hung one can keep the test or its successors waiting; then what showed its exports (`export-servers.ts`). Nothing here looks below the mount. Does not
 * import vitest: the benchmark uses it too.
 */
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import type { DaemonStatus } from '../../daemon/control/schemas.js';
import { endServersIn, loopsBelow, releaseLoops, type LoopDevice } from './export-servers.js';
import { command, type CommandResult } from './model/command.js';
import { mountEntry, removeMount } from './model/mounts.js';
import { isAlive, processesNaming, signalProcess, waitUntil, waitUntilGone } from './processes.js';
import { makeTempDir, makeTmpfsDir, type Cleanup } from './temp.js';

export const CLI_ENTRY = resolve(import.meta.dirname, '../../dist/cli/main.js');

const CLI_TIMEOUT_MS = 60_000;
const START_TIMEOUT_MS = 90_000;
const RESTART_TIMEOUT_MS = 15_000;
const END_TIMEOUT_MS = 10_000;
const ROUNDS_MAX = 20;
const LOOK_AGAIN_MS = 50;
/** In the environment of everything that a test daemon starts: its mount point. */
const MARK = 'OFFSHOOT_TEST_DAEMON';
/** What a daemon rightly says of some machines: containers without CAP_SYS_RESOURCE. */
const SAID_OF_THE_MACHINE = [/PR_SET_IO_FLUSHER/u];
/** Numbers of pino's levels. */
const LEVEL_WARN = 40;

export type TestTransport = 'kernel' | 'fuse-native';

export interface TestDaemonOptions {
  readonly transport: TestTransport;
  /** Everything that the daemon leaves is taken away by this; call its `run` in afterEach or afterAll. */
  readonly cleanup: Cleanup;
  /** An existing store, for a second daemon on what a first one made. By default a new one on disk. */
  readonly storeDir?: string;
  readonly workers?: number;
  readonly logLevel?: string;
  readonly sourceTimeoutSeconds?: number;
  readonly environment?: Readonly<Record<string, string>>;
  /** More for `daemon start`, such as `--vsphere FILE`. Told where the mount will be. */
  readonly startArguments?: (mountDir: string) => readonly string[];
  /** False: nothing is started yet. */
  readonly start?: boolean;
  /** The build to run, when it is not the checkout's. */
  readonly cliEntry?: string;
}

export interface LogLine {
  readonly level: number;
  readonly msg: string;
  readonly text: string;
}

export interface TestDaemon {
  readonly transport: TestTransport;
  readonly storeDir: string;
  readonly mountDir: string;
  readonly socketPath: string;
  /** `offshoot ARGS` against this daemon, whatever its exit code. */
  cli(args: readonly string[], options?: { readonly timeoutMs?: number }): Promise<CommandResult>;
  /** `offshoot ARGS --json`, which must succeed. */
  json<T = unknown>(args: readonly string[]): Promise<T>;
  status(): Promise<DaemonStatus>;
  /** The path under the mount of `CONTAINER/PATH`. */
  path(diskPath: string): string;
  start(): Promise<void>;
  /** An orderly stop: returns when the processes are gone and the mount with them. */
  stop(options?: { readonly force?: boolean }): Promise<void>;
  /** SIGKILL for the server alone; gives its id once it is gone. The holder starts the next one. */
  killServer(): Promise<number>;
  /** Waits for a server other than the given one to answer; gives its id. */
  waitForServer(otherThan: number, timeoutMs?: number): Promise<number>;
  /** SIGKILL for holder and server, as after an accident that took both. The dead mount is removed. */
  killBoth(): Promise<void>;
  log(): LogLine[];
  /** Throws when the log holds a warning or an error that none of `expected` matches. */
  assertQuietLog(expected?: readonly RegExp[]): void;
}

export async function startTestDaemon(options: TestDaemonOptions): Promise<TestDaemon> {
  const cliEntry = options.cliEntry ?? CLI_ENTRY;
  if (!existsSync(cliEntry)) throw new Error(`${cliEntry} is missing: build first (npm run build; ./scripts/test does)`);
  const { cleanup, transport } = options;
  const top = makeTempDir('daemon', cleanup);
  const storeDir = options.storeDir ?? join(top, 'store');
  const mountDir = join(top, 'mount');
  const socketPath = join(top, 'control');
  mkdirSync(mountDir);
  const environment = {
    [MARK]: mountDir,
    OFFSHOOT_SOCKET: socketPath,
    OFFSHOOT_RUNTIME_DIR: makeTmpfsDir('run', cleanup),
    ...options.environment,
  };
  const loops = new Map<string, LoopDevice>();
  // Servers and devices outlive the daemon, as they should; and hold what is now a dead mount. Each is ended whatever became of the others.
  cleanup.add(async () => { await releaseLoops([...loops.values()]); });
  cleanup.add(async () => { await endServersIn(environment.OFFSHOOT_RUNTIME_DIR); });
  cleanup.add(endEverything);

  const cli: TestDaemon['cli'] = async (args, { timeoutMs = CLI_TIMEOUT_MS } = {}) =>
    await command(process.execPath, [cliEntry, ...args], { timeoutMs, env: environment, cwd: top });

  const mustCli = async (args: readonly string[], timeoutMs = CLI_TIMEOUT_MS): Promise<CommandResult> => {
    const result = await cli(args, { timeoutMs });
    if (result.code !== 0) throw new Error(`offshoot ${args.join(' ')}: exit code ${result.code}\n${result.stdout}${result.stderr}${logTail()}`);
    return result;
  };

  const json = async <T>(args: readonly string[]): Promise<T> => JSON.parse((await mustCli([...args, '--json'])).stdout) as T;
  const status = async (): Promise<DaemonStatus> => await json<DaemonStatus>(['daemon', 'status']);
  const logFile = join(storeDir, 'offshoot.log');

  function log(): LogLine[] {
    if (!existsSync(logFile)) return [];
    return readFileSync(logFile, 'utf8').split('\n').filter((text) => text !== '').map((text) => {
      try {
        const { level, msg } = JSON.parse(text) as { level: unknown; msg: unknown };
        return { level: typeof level === 'number' ? level : LEVEL_WARN, msg: typeof msg === 'string' ? msg : '', text };
      } catch {
        // Not of the logger: an uncaught error's stack, or a line of a native library.
        return { level: LEVEL_WARN, msg: text, text };
      }
    });
  }

  function logTail(): string {
    return log().slice(-20).map((line) => `\n  log: ${line.text}`).join('');
  }

  function ownProcesses(): number[] {
    return processesNaming(mountDir).filter(isAlive);
  }

  async function start(): Promise<void> {
    const args = ['daemon', 'start', '--store', storeDir, '--mount', mountDir, '--transport', transport];
    if (options.workers !== undefined) args.push('--workers', String(options.workers));
    if (options.logLevel !== undefined) args.push('--log-level', options.logLevel);
    if (options.sourceTimeoutSeconds !== undefined) args.push('--source-timeout', String(options.sourceTimeoutSeconds));
    args.push(...options.startArguments?.(mountDir) ?? []);
    await mustCli(args, START_TIMEOUT_MS);
  }

  async function waitForServer(otherThan: number, timeoutMs = RESTART_TIMEOUT_MS): Promise<number> {
    let found = 0;
    const came = await waitUntil(async () => {
      const result = await cli(['daemon', 'status', '--json'], { timeoutMs });
      if (result.code !== 0) return false;
      found = (JSON.parse(result.stdout) as DaemonStatus).serverPid;
      return found !== otherThan;
    }, timeoutMs);
    if (!came) throw new Error(`no server other than ${otherThan} answered within ${timeoutMs} ms${logTail()}`);
    return found;
  }

  /** By force, and in the order in which nothing comes back: the holder would start another server. */
  async function endEverything(): Promise<void> {
    // Until two looks find nobody: a process that is just being started has neither arguments nor environment for a moment.
    for (let round = 0, quietLooks = 0; round < ROUNDS_MAX && quietLooks < 2; round += 1) {
      const pids = ownProcesses();
      quietLooks = pids.length === 0 ? quietLooks + 1 : 0;
      for (const pid of pids) signalProcess(pid, 'SIGKILL');
      for (const loop of loopsBelow(mountDir)) loops.set(`${loop.device} ${loop.sequence}`, loop);
      await removeMount(mountDir);
      for (const pid of pids) await waitUntilGone(pid, END_TIMEOUT_MS);
      if (pids.length === 0) await sleep(LOOK_AGAIN_MS);
    }
    await removeMount(mountDir);
    const left = ownProcesses();
    if (left.length > 0) throw new Error(`processes ${left.join(', ')} of the daemon on ${mountDir} could not be ended`);
    if (mountEntry(mountDir) !== null) throw new Error(`${mountDir} could not be unmounted`);
  }

  const daemon: TestDaemon = {
    transport, storeDir, mountDir, socketPath, cli, json, status, start, waitForServer, log,
    path: (diskPath) => join(mountDir, diskPath),
    async stop({ force = false } = {}) {
      await mustCli(['daemon', 'stop', ...(force ? ['--force'] : [])]);
      const left = ownProcesses();
      if (left.length > 0) throw new Error(`daemon stop returned, but processes ${left.join(', ')} live${logTail()}`);
      if (mountEntry(mountDir) !== null) throw new Error(`daemon stop returned, but ${mountDir} is mounted${logTail()}`);
    },
    async killServer() {
      const { serverPid } = await status();
      signalProcess(serverPid, 'SIGKILL');
      if (!(await waitUntilGone(serverPid, END_TIMEOUT_MS))) throw new Error(`server ${serverPid} did not die of SIGKILL`);
      return serverPid;
    },
    killBoth: endEverything,
    assertQuietLog(expected = []) {
      const loud = log().filter((line) => line.level >= LEVEL_WARN && ![...SAID_OF_THE_MACHINE, ...expected].some((pattern) => pattern.test(line.text)));
      if (loud.length > 0) throw new Error(`unexpected in the log:\n${loud.map((line) => line.text).join('\n')}`);
    },
  };
  if (options.start !== false) await start();
  return daemon;
}
