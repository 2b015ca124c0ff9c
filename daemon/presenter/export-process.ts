/**
 * A server program of an export: its files in a directory of ours, its start, and its end. Main thread of the server; the holder uses it to clear up.
 *
 * In DIRECTORY (`/run/offshoot-exports-KEY/KIND`, closed to others, gone with the machine's power) lie for each program `NAME.pid`, `NAME.log`,
 * `NAME.conf`. A program is found again by its pid file and by its command line together: one of its arguments must name a file `DIRECTORY/NAME.…`,
 * so that a number that meanwhile is somebody else's is never signalled. It runs in a session of its own (where systemd runs the host: in a scope of its
 * own), outlives the server of ours, and is ended with whatever it has started.
 *
 * Two that are killed at one moment: a server that dies between the start of a program and the line below it leaves a program that nobody knows; the next
 * one cannot have its port, and says so.
 */
import {
  chmodSync, closeSync, constants, copyFileSync, fsyncSync, fstatSync, ftruncateSync, lstatSync, mkdirSync, openSync, readFileSync, readSync, readdirSync, renameSync, rmSync, statSync,
  writeSync,
} from 'node:fs';
import { dirname, join } from 'node:path';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { sleepUnlessAborted } from '../programs/child.js';
import { launch, type Command } from '../programs/launch.js';
import { EXPORTS_SLICE, inScope, scopeProgram } from '../programs/scope.js';

export type ExportProcessState =
  | { readonly kind: 'off' }
  /** It was started, and has ended without being asked. */
  | { readonly kind: 'ended' }
  | { readonly kind: 'running'; readonly pid: number };

export interface StartOptions {
  readonly signal: AbortSignal;
  readonly timeoutMs: number;
  /** Whether it answers; asked again and again, never twice at once. */
  readonly isUp: () => Promise<boolean>;
}

const LOG_BYTES_MAX = 1024 * 1024;
const LAST_WORDS_BYTES_MAX = 4096;
const END_MS = 5_000;
const POLL_MS = 30;
const PID_BYTES_MAX = 32;

/** Makes `DIRECTORY`, and its parent, for nobody but us. */
export function makeExportsDirectory(directory: string): void {
  for (const path of [dirname(directory), directory]) {
    try {
      mkdirSync(path, { mode: 0o700 });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw toOffshootError(error);
    }
    const found = lstatSync(path);
    if (!found.isDirectory() || found.uid !== process.geteuid?.() || (found.mode & 0o022) !== 0) {
      throw new OffshootError('not-permitted', `${path} is not a directory that only this user may write to`, { path });
    }
  }
}

export class ExportProcess {
  readonly directory: string;
  readonly name: string;
  readonly pidFile: string;
  readonly logFile: string;
  readonly configFile: string;

  /** `name` without dots or slashes: letters, digits, `-`. Makes nothing. */
  constructor({ directory, name }: { readonly directory: string; readonly name: string }) {
    if (!/^[a-z0-9-]+$/u.test(name)) throw new Error(`an export program cannot be called ${name}`);
    this.directory = directory;
    this.name = name;
    this.pidFile = join(directory, `${name}.pid`);
    this.logFile = join(directory, `${name}.log`);
    this.configFile = join(directory, `${name}.conf`);
  }

  state(): ExportProcessState {
    const pid = readPid(this.pidFile);
    if (pid === null) return { kind: 'off' };
    return isProcessOf(pid, this.directory, this.name) ? { kind: 'running', pid } : { kind: 'ended' };
  }

  /** What it was configured with last; null: never. */
  readConfig(): string | null {
    try {
      return readFileSync(this.configFile, 'utf8');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
      throw toOffshootError(error);
    }
  }

  /** Whole or not at all, mode 0600. False when it was the same before. */
  writeConfig(text: string): boolean {
    if (this.readConfig() === text) return false;
    makeExportsDirectory(this.directory);
    writeWhole(this.configFile, text);
    return true;
  }

  /**
   * Starts it, and waits until it is up. It must stay in the foreground, and name one of its files (`pidFile`, `configFile`) as an argument. What it says
   * goes to its log. Throws with what it said when it ends instead; then there is no process of it. One that runs already is left alone.
   */
  async start(command: Command, { signal, timeoutMs, isUp }: StartOptions): Promise<void> {
    if (this.state().kind === 'running') return;
    if (!namesOwnFile(command.arguments, this.directory, this.name)) throw new Error(`${command.program} is not told any of its files, and could not be found again`);
    makeExportsDirectory(this.directory);
    const output = openSync(this.logFile, constants.O_WRONLY | constants.O_CREAT | constants.O_APPEND | constants.O_NOFOLLOW, 0o600);
    try {
      boundLog(this.logFile, output);
      const saidBefore = fstatSync(output).size;
      const scopes = scopeProgram();
      const started = scopes === null ? command : inScope(scopes, command, { slice: EXPORTS_SLICE, id: `export-${this.name}`, description: `Export ${this.name} of Offshoot` });
      const result = await launch(started, { signal, timeoutMs, isUp, output, onStarted: (pid) => { writeWhole(this.pidFile, `${pid}\n`); } });
      if (result.kind === 'up') return;
      const said = this.#saidSince(saidBefore);
      throw new OffshootError('io-error', `${command.program} ended as soon as it was started: ${said === '' ? `it says nothing (${result.endedBy ?? 'no signal'})` : said}`, { program: command.program });
    } catch (error) {
      await this.end().catch(() => undefined);
      throw error;
    } finally {
      closeSync(output);
    }
  }

  /** False when it does not run. */
  signal(signal: NodeJS.Signals): boolean {
    const state = this.state();
    if (state.kind !== 'running') return false;
    try {
      process.kill(state.pid, signal);
      return true;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
      throw toOffshootError(error);
    }
  }

  /** SIGTERM, then SIGKILL for it and all that it started; its pid file goes, its log and configuration stay. Well when there is none. */
  async end({ termMs = END_MS, killMs = END_MS }: { readonly termMs?: number; readonly killMs?: number } = {}): Promise<void> {
    const state = this.state();
    if (state.kind === 'running') {
      this.signal('SIGTERM');
      if (!(await this.#hasEnded(state.pid, termMs))) {
        killGroup(state.pid);
        if (!(await this.#hasEnded(state.pid, killMs))) {
          throw new OffshootError('timed-out', `${this.name} (pid ${state.pid}) does not end, although it was killed: look at what it waits for`, { pid: state.pid });
        }
      }
      // What it started, and left behind: the number of a session is not given out again while it has processes.
      killQuietly(-state.pid);
    }
    rmSync(this.pidFile, { force: true });
  }

  /** After `end`, when it is not wanted any more: everything of it that is called `NAME.…`. */
  forget(): void {
    for (const file of listed(this.directory)) if (file.startsWith(`${this.name}.`)) rmSync(join(this.directory, file), { force: true });
  }

  /** Cheap enough to be called every few seconds. */
  boundLog(): void {
    let fd: number;
    try {
      fd = openSync(this.logFile, constants.O_WRONLY | constants.O_APPEND | constants.O_NOFOLLOW);
    } catch {
      return;
    }
    try {
      boundLog(this.logFile, fd);
    } finally {
      closeSync(fd);
    }
  }

  /** The end of its log, for people. */
  lastWords(): string {
    return this.#saidSince(0);
  }

  #saidSince(fromByte: number): string {
    try {
      const fd = openSync(this.logFile, constants.O_RDONLY | constants.O_NOFOLLOW);
      try {
        const size = fstatSync(fd).size;
        const from = Math.max(fromByte, size - LAST_WORDS_BYTES_MAX);
        const bytes = Buffer.alloc(Math.max(0, size - from));
        return bytes.toString('utf8', 0, readSync(fd, bytes, 0, bytes.length, from)).trim().split('\n').map((line) => line.trim()).join('; ');
      } finally {
        closeSync(fd);
      }
    } catch {
      return '';
    }
  }

  async #hasEnded(pid: number, withinMs: number): Promise<boolean> {
    const deadline = performance.now() + withinMs;
    const never = new AbortController().signal;
    for (;;) {
      if (!isProcessOf(pid, this.directory, this.name)) return true;
      if (performance.now() > deadline) return false;
      await sleepUnlessAborted(POLL_MS, never);
    }
  }
}

function listed(directory: string): readonly string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw toOffshootError(error);
  }
}

/** The programs that have a pid file in `DIRECTORY`, by their names. */
export function exportProcessesIn(directory: string): ExportProcess[] {
  return listed(directory).flatMap((file) => {
    const name = /^([a-z0-9-]+)\.pid$/u.exec(file)?.[1];
    return name === undefined ? [] : [new ExportProcess({ directory, name })];
  });
}

/** SIGKILL, at once and without waiting: for what is left of a mount that is dead. */
export function killExportProcess(exported: ExportProcess): boolean {
  const state = exported.state();
  if (state.kind === 'running') killGroup(state.pid);
  return state.kind === 'running';
}

export function writeWhole(path: string, text: string): void {
  const temporary = `${path}.new`;
  try {
    rmSync(temporary, { force: true });
    const fd = openSync(temporary, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600);
    try {
      const bytes = Buffer.from(text);
      for (let written = 0; written < bytes.length;) written += writeSync(fd, bytes, written, bytes.length - written);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    // Whatever the umask left of it.
    chmodSync(temporary, 0o600);
    renameSync(temporary, path);
  } catch (error) {
    throw toOffshootError(error);
  }
}

/** The older part is kept beside it. Programs append, so that what they say next is at the beginning. */
function boundLog(path: string, fd: number): void {
  if (fstatSync(fd).size <= LOG_BYTES_MAX) return;
  copyFileSync(path, `${path}.1`);
  ftruncateSync(fd, 0);
}

function killGroup(pid: number): void {
  killQuietly(-pid);
  killQuietly(pid);
}

function killQuietly(target: number): void {
  try {
    process.kill(target, 'SIGKILL');
  } catch {
    // It has ended.
  }
}

/** Null: there is no pid file. Anything else than a number is 0, which is no process. */
function readPid(path: string): number | null {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw toOffshootError(error);
  }
  try {
    const bytes = Buffer.alloc(PID_BYTES_MAX);
    const text = bytes.toString('latin1', 0, readSync(fd, bytes, 0, PID_BYTES_MAX, 0)).trim();
    return /^[1-9][0-9]{0,9}$/u.test(text) ? Number(text) : 0;
  } finally {
    closeSync(fd);
  }
}

/** One that has ended, and that nobody has waited for, has an empty command line. */
function isProcessOf(pid: number, directory: string, name: string): boolean {
  if (pid <= 1) return false;
  try {
    return statSync(`/proc/${pid}`).isDirectory() && namesOwnFile(readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0'), directory, name);
  } catch {
    return false;
  }
}

function namesOwnFile(args: readonly string[], directory: string, name: string): boolean {
  const mark = `${join(directory, name)}.`;
  return args.some((argument) => argument.includes(mark));
}
