/**
 * The adapter for QEMU by itself: no other daemon, each machine a process that outlives ours.
 *
 * QEMU runs as the user whom the disks belong to, from its first instruction on: so it opens what that user may open, and a description cannot
 * ask for more. (QEMU's own -runas changes the user only after the disks were opened, as root.) It is a process in a session of its own, up when
 * its monitor answers, and stays when we go. What is known of a machine is in files (`registrations.ts`,
 * `machine-process.ts`); nothing is kept in memory. Main thread of the server; the calls wait, they do not hold it up.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { CallOptions, Hypervisor, HypervisorAbilities, MachineState, MachineToRegister } from '../hypervisor.js';
import { runChild, sleepUnlessAborted, throwIfAborted } from '../../programs/child.js';
import { askGuestAgent } from './guest-agent.js';
import type { SocketCall } from './json-lines.js';
import { launch } from '../../programs/launch.js';
import { inScope, machineScope, scopeProgram } from '../../programs/scope.js';
import { clearRuntime, forgetProcess, isDying, isMachine, killProcess, leaveRuntime, prepareRuntime, processState, runtimePathsOf, type RuntimePaths } from './machine-process.js';
import { withQmp } from './qmp.js';
import { Registrations } from './registrations.js';

/** What the command is to be made for: relative paths are meant from the directory, and the sockets are what the adapter speaks through. */
export interface QemuCommandOptions {
  readonly directory: string;
  readonly qmpSocket: string;
  readonly agentSocket: string;
}

/**
 * Makes a program and its arguments of a description's text: devices, disks (always raw), firmware, sandbox, the monitor on `qmpSocket`, the
 * agent's port on `agentSocket`. Not: the pid file and the user, which are the adapter's.
 */
export type QemuCommandOf = (text: string, options: QemuCommandOptions) => { readonly program: string; readonly arguments: readonly string[] };

export interface QemuOptions {
  readonly commandOf: QemuCommandOf;
  /** Keeps what is registered: on disk, of the daemon's user only. */
  readonly registrationDir: string;
  /** On tmpfs, and not within the store's own run-time directory: that is closed to the machines' users, and emptied with each mount. */
  readonly runtimeDir: string;
  /** Whose version is told, and which must be there for machines to be registered: `qemu-system-x86_64` by default. */
  readonly program?: string;
  /** systemd-run(1) or what stands for it; null: machines are left in our own control group. By default as the host is. */
  readonly scopes?: string | null;
}

const ABILITIES: HypervisorAbilities = { formats: ['qemu'], shutdown: true, guestAgent: true, quiesce: true, isRemote: false };
const DEFAULT_PROGRAM = 'qemu-system-x86_64';
const PROBE_TIMEOUT_MS = 20_000;
const START_TIMEOUT_MS = 120_000;
const MONITOR_TIMEOUT_MS = 20_000;
const PING_TIMEOUT_MS = 3_000;
const FREEZE_TIMEOUT_MS = 60_000;
/** How long it may take to hear that it is to end, and to close its disks, before it is killed. */
const HEAR_TIMEOUT_MS = 5_000;
const QUIT_TIMEOUT_MS = 10_000;
const KILL_TIMEOUT_MS = 20_000;
const POLL_MS = 50;

export function createQemuHypervisor(options: QemuOptions): Hypervisor {
  return new QemuHypervisor(options);
}

class QemuHypervisor implements Hypervisor {
  readonly id = 'qemu';
  readonly abilities = ABILITIES;
  readonly #options: QemuOptions;
  readonly #program: string;
  readonly #registrations: Registrations;

  constructor(options: QemuOptions) {
    this.#options = options;
    this.#program = options.program ?? DEFAULT_PROGRAM;
    this.#registrations = new Registrations(options.registrationDir);
  }

  async probe({ signal }: CallOptions): ReturnType<Hypervisor['probe']> {
    try {
      const { code, stdout, stderr } = await runChild(this.#program, ['--version'], { signal, timeoutMs: PROBE_TIMEOUT_MS });
      const version = /version (\S+)/u.exec(stdout)?.[1];
      if (code === 0 && version !== undefined) return { usable: true, version };
      return { usable: false, reason: `${this.#program} --version failed: ${lastLine(stderr)}` };
    } catch (error) {
      if (error instanceof OffshootError && error.kind !== 'cancelled') return { usable: false, reason: error.message };
      throw error;
    }
  }

  async register(machine: MachineToRegister, { signal }: CallOptions): Promise<{ readonly externalId: string }> {
    throwIfAborted(signal);
    return { externalId: this.#registrations.add(machine) };
  }

  async unregister(externalId: string, { signal }: CallOptions): Promise<void> {
    throwIfAborted(signal);
    const machine = this.#registrations.find(externalId);
    if (machine === null) return;
    const paths = this.#paths(externalId);
    if ((await processState(paths, machine.owner)).kind === 'running') {
      throw new OffshootError('in-use', `machine '${machine.name}' runs: stop it first`, { name: machine.name });
    }
    this.#registrations.remove(machine);
    clearRuntime(paths);
    leaveRuntime(this.#options.runtimeDir);
  }

  async start(externalId: string, { signal }: CallOptions): Promise<void> {
    throwIfAborted(signal);
    const machine = this.#find(externalId);
    const paths = this.#paths(externalId);
    if ((await processState(paths, machine.owner)).kind === 'running') {
      if (await this.status(externalId, { signal }) !== 'paused') return;
      throw new OffshootError('in-use', `machine '${machine.name}' is paused, not off: let it go on (QMP cont), or stop it with --force first`, { name: machine.name });
    }
    const { program, arguments: args } = this.#options.commandOf(machine.text, { directory: machine.directory, qmpSocket: paths.qmpSocket, agentSocket: paths.agentSocket });
    const bare = { program, arguments: [...args, '-pidfile', paths.pidFile], ...userToBe(machine) };
    const { scopes = scopeProgram() } = this.#options;
    const command = scopes === null ? bare : inScope(scopes, bare, machineScope(machine));
    prepareRuntime(this.#options.runtimeDir, paths, machine.owner);
    try {
      const result = await launch(command, { signal, timeoutMs: START_TIMEOUT_MS, isUp: () => this.#answers(machine, paths, signal) });
      if (result.kind === 'ended') throw startError(machine, result.stderr, result.endedBy);
    } catch (error) {
      // It has ended, or was killed before it was up: that is no crash of the machine's.
      if (await hasEnded(machine, paths, performance.now() + KILL_TIMEOUT_MS, new AbortController().signal)) forgetProcess(paths);
      throw error;
    }
  }

  async stop(externalId: string, { signal, force, timeoutMs }: CallOptions & { readonly force: boolean; readonly timeoutMs: number }): Promise<void> {
    throwIfAborted(signal);
    const machine = this.#find(externalId);
    const paths = this.#paths(externalId);
    const pid = await pidOf(machine, paths);
    if (pid === null) {
      forgetProcess(paths);
      return;
    }
    if (force) {
      await this.#takePower(machine, paths, pid, signal);
      return;
    }
    const deadline = performance.now() + timeoutMs;
    await unlessGone(withQmp(this.#monitor(machine, paths, signal), async (qmp) => {
      await qmp.execute('system_powerdown');
      await qmp.waitForEvent('POWERDOWN');
    }));
    if (await hasEnded(machine, paths, deadline, signal, pid)) return;
    throw new OffshootError('busy',
      `machine '${machine.name}' was asked to shut down and still runs after ${timeoutMs} ms: its system may not listen to the power button; wait, or stop it with --force`, { name: machine.name });
  }

  async status(externalId: string, { signal }: CallOptions): Promise<MachineState> {
    throwIfAborted(signal);
    const machine = this.#registrations.find(externalId);
    if (machine === null) return 'missing';
    const paths = this.#paths(externalId);
    const seen = (await processState(paths, machine.owner)).kind;
    if (seen !== 'running') return seen === 'off' ? 'shut-off' : 'crashed';
    try {
      return await withQmp(this.#monitor(machine, paths, signal), async (qmp) => stateOf(await qmp.execute('query-status')));
    } catch (error) {
      // It may have ended while it was asked.
      const now = (await processState(paths, machine.owner)).kind;
      if (now !== 'running') return now === 'off' ? 'shut-off' : 'crashed';
      throw error;
    }
  }

  async pingAgent(externalId: string, { signal }: CallOptions): Promise<boolean> {
    throwIfAborted(signal);
    const machine = this.#find(externalId);
    try {
      await askGuestAgent(this.#agent(machine, PING_TIMEOUT_MS, signal), 'guest-ping');
      return true;
    } catch (error) {
      if (error instanceof OffshootError && error.kind !== 'cancelled' && error.kind !== 'not-permitted') return false;
      throw error;
    }
  }

  async freeze(externalId: string, { signal }: CallOptions): Promise<void> {
    await this.#tellAgent(externalId, 'guest-fsfreeze-freeze', signal);
  }

  async thaw(externalId: string, { signal }: CallOptions): Promise<void> {
    await this.#tellAgent(externalId, 'guest-fsfreeze-thaw', signal);
  }

  async #tellAgent(externalId: string, command: string, signal: AbortSignal): Promise<void> {
    throwIfAborted(signal);
    const machine = this.#find(externalId);
    if ((await processState(this.#paths(externalId), machine.owner)).kind !== 'running') {
      throw new OffshootError('conflict', `machine '${machine.name}' does not run, so there is nothing in it to freeze or thaw`, { name: machine.name });
    }
    try {
      await askGuestAgent(this.#agent(machine, FREEZE_TIMEOUT_MS, signal), command);
    } catch (error) {
      if (!(error instanceof OffshootError) || error.kind !== 'not-found') throw error;
      throw new OffshootError('not-supported', `machine '${machine.name}' has no port for a guest agent`, { name: machine.name }, error);
    }
  }

  /** Asks QEMU to close its disks and end; kills it when it does not. */
  async #takePower(machine: MachineToRegister, paths: RuntimePaths, pid: number, signal: AbortSignal): Promise<void> {
    let hasHeard = true;
    try {
      await withQmp({ ...this.#monitor(machine, paths, signal), timeoutMs: HEAR_TIMEOUT_MS }, async (qmp) => { await qmp.execute('quit'); });
    } catch (error) {
      // It does not listen: that is what force is for.
      if (!(error instanceof OffshootError) || error.kind === 'cancelled') throw error;
      hasHeard = false;
    }
    if (!hasHeard || !(await hasEnded(machine, paths, performance.now() + QUIT_TIMEOUT_MS, signal, pid))) {
      await killProcess(paths, machine.owner);
      if (!(await hasEnded(machine, paths, performance.now() + KILL_TIMEOUT_MS, signal, pid))) {
        throw new OffshootError('busy', `machine '${machine.name}' was killed and is still there: it waits for a disk; look at the daemon's status`, { name: machine.name });
      }
    }
    forgetProcess(paths);
  }

  /** False as long as it does not listen; what else goes wrong is QEMU's to say, by its end. */
  async #answers(machine: MachineToRegister, paths: RuntimePaths, signal: AbortSignal): Promise<boolean> {
    try {
      await withQmp(this.#monitor(machine, paths, signal), (qmp) => qmp.execute('query-status'));
      return true;
    } catch (error) {
      if (error instanceof OffshootError && error.kind !== 'cancelled' && error.kind !== 'not-permitted') return false;
      throw error;
    }
  }

  #find(externalId: string): MachineToRegister {
    const machine = this.#registrations.find(externalId);
    if (machine === null) throw new OffshootError('not-found', `no machine ${externalId} is registered with QEMU`, { externalId });
    return machine;
  }

  #paths(externalId: string): RuntimePaths {
    return runtimePathsOf(this.#options.runtimeDir, externalId);
  }

  #monitor(machine: MachineToRegister, paths: RuntimePaths, signal: AbortSignal): SocketCall {
    return { socketPath: paths.qmpSocket, ownerUid: machine.owner.uid, timeoutMs: MONITOR_TIMEOUT_MS, signal };
  }

  #agent(machine: MachineToRegister, timeoutMs: number, signal: AbortSignal): SocketCall {
    return { socketPath: this.#paths(machine.uuid).agentSocket, ownerUid: machine.owner.uid, timeoutMs, signal };
  }
}

/** The process that was running when this was called; its pid file goes a little before it does. */
async function hasEnded(machine: MachineToRegister, paths: RuntimePaths, deadline: number, signal: AbortSignal, known?: number): Promise<boolean> {
  const pid = known ?? await pidOf(machine, paths);
  while (pid !== null && (await isMachine(pid, paths, machine.owner) || await isDying(pid))) {
    if (performance.now() > deadline) return false;
    await sleepUnlessAborted(POLL_MS, signal);
  }
  return true;
}

async function pidOf(machine: MachineToRegister, paths: RuntimePaths): Promise<number | null> {
  const state = await processState(paths, machine.owner);
  return state.kind === 'running' ? state.pid : null;
}

/** A machine that ends while it is told to has done as it was told. */
async function unlessGone(asked: Promise<void>): Promise<void> {
  try {
    await asked;
  } catch (error) {
    if (!(error instanceof OffshootError) || (error.kind !== 'not-found' && error.kind !== 'io-error')) throw error;
  }
}

function userToBe({ name, owner }: MachineToRegister): { readonly user?: { readonly uid: number; readonly gid: number } } {
  const self = process.geteuid?.();
  if (self === 0 && owner.uid !== 0) return { user: owner };
  if (self === owner.uid) return {};
  throw new OffshootError('not-permitted', `machine '${name}' belongs to user ${owner.uid}: only a daemon of root can run it as that user`, { name });
}

/** By QEMU's run states; what is neither running nor at its end is paused, for a reason that QEMU knows. */
export function stateOf(answer: unknown): MachineState {
  const status = typeof answer === 'object' && answer !== null ? (answer as { readonly status?: unknown }).status : undefined;
  switch (status) {
    case 'running': return 'running';
    case 'guest-panicked':
    case 'internal-error': return 'crashed';
    case 'shutdown': return 'shut-off';
    default: return 'paused';
  }
}

/** What QEMU says is its last line; what kind of thing it is can only be told by its words. */
export function startError(machine: Pick<MachineToRegister, 'name' | 'owner'>, stderr: string, endedBy: NodeJS.Signals | null): OffshootError {
  const said = [lastLine(stderr), ...endedBy === null ? [] : [`ended by ${endedBy}`]].filter((text) => text !== '').join('; ');
  const context = { name: machine.name };
  const message = `QEMU did not start machine '${machine.name}': ${said}`;
  if (/Failed to get ".*" lock|Cannot lock pid file/u.test(stderr)) return new OffshootError('in-use', `${message}; another process has the disk open`, context);
  if (stderr.includes('Permission denied')) return new OffshootError('permission-denied', `${message}; it runs as user ${machine.owner.uid}, who must be allowed to open its disks`, context);
  if (stderr.includes('No such file or directory')) return new OffshootError('not-found', message, context);
  if (/Cannot allocate memory|cannot set up guest memory/iu.test(stderr)) return new OffshootError('no-space', message, context);
  if (stderr.includes('No space left on device')) return new OffshootError('no-space', message, context);
  if (endedBy !== null && /\bkvm/iu.test(stderr)) return new OffshootError('not-supported', `${message}; KVM of this host does not run it: "accelerator": "tcg" in its machine.json does without`, context);
  return new OffshootError(endedBy === null ? 'invalid-argument' : 'io-error', message, context);
}

function lastLine(text: string): string {
  return text.trim().split('\n').at(-1)?.slice(0, 1000) ?? '';
}
