/**
 * What the tests of the holder stand on: a store, a mount point, a socket and a run-time directory of their own for each test,
 * the programs of the daemon with a small real server, and a clean-up that leaves no process and no mount, whatever a test did.
 *
 * Every access to the mount is made by a process of its own with a time-out; the test's process never touches it.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, realpathSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, afterEach, beforeAll, beforeEach, expect } from 'vitest';

import { startDaemon, type StartDaemonOptions, type StartDaemonResult } from '../../daemon/control/launch.js';
import { readHolderState, type HolderState } from '../../daemon/holder/holder-state.js';
import { runtimeDirectoryFor } from '../../daemon/runtime-directory.js';
import { compilePrograms, type CompiledPrograms } from './compiled-program.js';
import type { Conduct } from './holder-test-server.js';
import { mountEntry, removeMount } from './model/mounts.js';

const WAIT_MS_MAX = 20_000;
const HOLDER = 'daemon/holder/main.ts';
const SERVER = 'test/support/holder-test-server.ts';
const LAUNCHER = 'test/support/start-daemon-program.ts';
const BASE_VARIABLE = 'OFFSHOOT_RUNTIME_DIR';

/** What the small server writes down. */
export interface SeenEvent {
  readonly pid: number;
  readonly what: string;
  readonly opcode?: number;
  readonly isResent?: boolean;
  readonly message?: string;
  readonly options?: { readonly restarts: number };
  readonly inherited?: Readonly<Record<string, string | number>>;
}

export class HolderTestBed {
  readonly scratch = realpathSync(mkdtempSync(join(tmpdir(), 'offshoot-holder-')));
  readonly runtimeBase = mkdtempSync('/dev/shm/offshoot-holder-');
  readonly mountDir = join(this.scratch, 'mount');
  readonly socketPath = join(this.scratch, 'socket');
  store = join(this.scratch, 'store');
  readonly #programs: CompiledPrograms;
  readonly #children: ChildProcess[] = [];

  constructor(programs: CompiledPrograms) {
    this.#programs = programs;
    process.env[BASE_VARIABLE] = this.runtimeBase;
    mkdirSync(this.store, { mode: 0o700 });
    mkdirSync(this.mountDir);
  }

  get entries(): { readonly holderEntry: string; readonly serverEntry: string } {
    return { holderEntry: this.#programs.pathOf(HOLDER), serverEntry: this.#programs.pathOf(SERVER) };
  }

  get runtimeDir(): string {
    return existsSync(this.store) ? runtimeDirectoryFor(this.store) : join(this.runtimeBase, 'none');
  }

  options(changes: Partial<StartDaemonOptions> = {}): StartDaemonOptions {
    const { store: storeDir, mountDir, socketPath } = this;
    return { storeDir, mountDir, socketPath, workers: 2, transport: 'kernel', logLevel: 'info', foreground: false, spare: false, ...changes };
  }

  async start(changes: Partial<StartDaemonOptions> = {}): Promise<StartDaemonResult> {
    return await startDaemon(this.options(changes), this.entries);
  }

  /** Starts a daemon from a process of its own, which can be sent signals and killed. */
  launch(changes: Partial<StartDaemonOptions> = {}): ChildProcess {
    const argument = JSON.stringify({ options: this.options(changes), hooks: this.entries });
    return this.keep(spawn(process.execPath, [this.#programs.pathOf(LAUNCHER), argument], { stdio: ['ignore', 'pipe', 'pipe'] }));
  }

  /** Ended when the test is over. */
  keep(child: ChildProcess): ChildProcess {
    this.#children.push(child);
    return child;
  }

  /** A process whose current directory is the mount: keeps it busy. */
  async keepBusy(): Promise<ChildProcess> {
    const child = this.keep(spawn('sh', ['-c', 'cd "$1" && echo in && exec sleep 600', 'sh', this.mountDir], { stdio: ['ignore', 'pipe', 'inherit'] }));
    await new Promise((settle) => child.stdout?.once('data', settle));
    // What it says before it becomes sleep: whoever is named is named as what it is then.
    await this.until('sleep', () => (readFileSync(`/proc/${String(child.pid)}/comm`, 'utf8').trim() === 'sleep' ? true : undefined));
    return child;
  }

  /** Says how servers are to behave that start from now on. */
  conduct(next: Conduct): void {
    writeFileSync(join(this.store, 'conduct.json'), JSON.stringify(next));
  }

  events(): readonly SeenEvent[] {
    const path = join(this.store, 'events.log');
    if (!existsSync(path)) return [];
    return readFileSync(path, 'utf8').split('\n').filter((line) => line !== '').map((line) => JSON.parse(line) as SeenEvent);
  }

  log(): string {
    return readFileSync(join(this.store, 'offshoot.log'), 'utf8');
  }

  state(): HolderState | null {
    return readHolderState(this.runtimeDir);
  }

  /** Everything that a start may change, apart from what the small server writes. */
  traces(): unknown {
    const { store, mountDir, runtimeBase } = this;
    return {
      mount: mountEntry(mountDir),
      store: existsSync(store) ? readdirSync(store).filter((name) => !['conduct.json', 'events.log'].includes(name)) : null,
      runtime: existsSync(join(runtimeBase, 'offshoot')) ? readdirSync(join(runtimeBase, 'offshoot')) : [],
      mountPoint: existsSync(mountDir) && statSync(mountDir).isDirectory() ? readdirSync(mountDir) : null,
    };
  }

  async until<T>(what: string, look: () => T | undefined | false): Promise<T> {
    const endMs = performance.now() + WAIT_MS_MAX;
    for (;;) {
      const found = look();
      if (found !== undefined && found !== false) return found;
      if (performance.now() > endMs) throw new Error(`waited too long for ${what}\n${JSON.stringify(this.events())}`);
      await delay(10);
    }
  }

  async untilState(what: string, look: (state: HolderState) => boolean): Promise<HolderState> {
    return await this.until(what, () => {
      const state = this.state();
      return state !== null && look(state) ? state : undefined;
    });
  }

  async untilGone(...pids: readonly number[]): Promise<void> {
    await this.until(`the end of ${pids.join(', ')}`, () => !pids.some(isAlive));
  }

  async clear(): Promise<void> {
    for (const child of this.#children) child.kill('SIGKILL');
    // Holders first, for they would start other servers; then whatever else names this test's directory.
    const holders = (): readonly number[] => this.#processes().filter((pid) => commandLine(pid).startsWith('offshoot-holder'));
    for (const pid of holders()) signal(pid, 'SIGKILL');
    await this.until('the end of the holders', () => holders().length === 0);
    for (const pid of this.#processes()) signal(pid, 'SIGKILL');
    await removeMount(this.mountDir);
    Reflect.deleteProperty(process.env, BASE_VARIABLE);
    rmSync(this.runtimeBase, { recursive: true, force: true });
    rmSync(this.scratch, { recursive: true, force: true });
  }

  #processes(): readonly number[] {
    const pids = readdirSync('/proc').filter((name) => /^\d+$/u.test(name)).map(Number);
    return pids.filter((pid) => commandLine(pid).includes(this.scratch));
  }
}

/** A test bed for each test of a file; `folder` is where this file's programs are compiled to. */
export function useHolderTestBed(folder: string): () => HolderTestBed {
  let programs: CompiledPrograms | undefined;
  let bed: HolderTestBed | undefined;
  beforeAll(() => {
    programs = compilePrograms(folder, [HOLDER, SERVER, LAUNCHER]);
  });
  afterAll(() => {
    programs?.remove();
  });
  beforeEach(() => {
    if (programs === undefined) throw new Error('the programs were not compiled');
    bed = new HolderTestBed(programs);
  });
  afterEach(async () => {
    await bed?.clear();
    bed = undefined;
  });
  return () => {
    if (bed === undefined) throw new Error('only within a test');
    return bed;
  };
}

export function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** Zombies are dead: nobody may be there to reap them. */
export function isAlive(pid: number): boolean {
  const path = `/proc/${pid}/stat`;
  const stat = existsSync(path) ? readFileSync(path, 'utf8') : '';
  return stat !== '' && !stat.slice(stat.lastIndexOf(')')).startsWith(') Z');
}

export async function endChild(child: ChildProcess): Promise<void> {
  const ended = new Promise((settle) => child.once('exit', settle));
  child.kill('SIGKILL');
  await ended;
}

/** Matches an OffshootError whose message holds these words in this order. */
export function refusal(kind: string, ...words: readonly string[]): unknown {
  return expect.objectContaining({ kind, message: expect.stringMatching(new RegExp(words.join('.*'), 'su')) as string });
}

function commandLine(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8');
  } catch {
    // Gone.
    return '';
  }
}
