/**
 * The adapter for libvirt on this host, through virsh: one child for each question, which calls of one moment may share; no library, no connection that is kept.
 *
 * libvirt keeps all there is to keep; a machine's id is its UUID, so that no other name can be taken for it. Definitions go to virsh by its
 * standard input: no file is written. With the system's libvirtd (root's) a machine whose disks belong to a user runs as that user, see
 * `owner-label.ts`; disks of root run as libvirt is configured. Main thread of the server.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import { sleepUnlessAborted, throwIfAborted } from '../../programs/child.js';
import type { CallOptions, Hypervisor, HypervisorAbilities, MachineState, MachineToRegister } from '../hypervisor.js';
import { withOwnerLabel } from './owner-label.js';
import { virsh, type VirshOptions } from './virsh.js';

export interface LibvirtOptions {
  /** `qemu:///system` by default. */
  readonly uri?: string;
  /** `virsh` by default. */
  readonly program?: string;
}

const ABILITIES: HypervisorAbilities = { formats: ['libvirt'], shutdown: true, guestAgent: true, quiesce: true, isRemote: false };
const DEFAULT_URI = 'qemu:///system';
const QUESTION_TIMEOUT_MS = 30_000;
const START_TIMEOUT_MS = 120_000;
const DESTROY_TIMEOUT_MS = 60_000;
const PING_TIMEOUT_SECONDS = 3;
const FREEZE_TIMEOUT_MS = 60_000;
const POLL_MS = 250;
const UUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/u;

export function createLibvirtHypervisor(options: LibvirtOptions = {}): Hypervisor {
  return new LibvirtHypervisor({ uri: options.uri ?? DEFAULT_URI, program: options.program ?? 'virsh' });
}

class LibvirtHypervisor implements Hypervisor {
  readonly id = 'libvirt';
  readonly abilities = ABILITIES;
  readonly #virsh: VirshOptions;
  /** A question that is about to be asked, and may be shared until it is. */
  #list: { readonly signal: AbortSignal; readonly answer: Promise<ReadonlySet<string> | null> } | null = null;

  constructor(options: VirshOptions) {
    this.#virsh = options;
  }

  async probe({ signal }: CallOptions): ReturnType<Hypervisor['probe']> {
    try {
      // Asks the daemon, and not only virsh itself.
      await this.#ask(['uri'], signal);
      return { usable: true, version: await this.#ask(['--version'], signal) };
    } catch (error) {
      if (error instanceof OffshootError && error.kind !== 'cancelled') return { usable: false, reason: error.message };
      throw error;
    }
  }

  async register(machine: MachineToRegister, { signal }: CallOptions): Promise<{ readonly externalId: string }> {
    throwIfAborted(signal);
    assertId(machine.uuid);
    assertNames(machine);
    await this.#assertOwn(machine, signal);
    const runsAsOwner = machine.owner.uid !== 0 && /\/system(?:\?|$)/u.test(this.#virsh.uri);
    const text = runsAsOwner ? withOwnerLabel(machine.text, machine.owner) : machine.text;
    await virsh(this.#virsh, ['define', '/dev/stdin'], { signal, timeoutMs: QUESTION_TIMEOUT_MS, input: text });
    return { externalId: machine.uuid };
  }

  async unregister(externalId: string, { signal }: CallOptions): Promise<void> {
    const state = await this.status(externalId, { signal });
    if (state === 'missing') return;
    if (state === 'running' || state === 'paused') throw new OffshootError('in-use', `machine ${externalId} runs: stop it first`, { externalId });
    // The file of the firmware's variables lies with the machine, and stays as all of its files do. Saved memory is libvirt's own.
    await ignoring(['not-found'], this.#ask(['undefine', '--managed-save', '--snapshots-metadata', '--checkpoints-metadata', '--keep-nvram', '--', externalId], signal));
  }

  async start(externalId: string, { signal }: CallOptions): Promise<void> {
    assertId(externalId);
    try {
      await virsh(this.#virsh, ['start', '--', externalId], { signal, timeoutMs: START_TIMEOUT_MS });
    } catch (error) {
      if (error instanceof OffshootError && error.kind === 'not-found' && (await this.status(externalId, { signal })) === 'missing') throw missing(externalId, error);
      if (!(error instanceof OffshootError) || error.kind !== 'in-use') throw error;
      const state = await this.status(externalId, { signal });
      if (state === 'running') return;
      if (state !== 'paused') throw error;
      throw new OffshootError('in-use', `machine ${externalId} is paused, not off: let it go on with \`virsh resume\`, or stop it with --force first`, { externalId }, error);
    }
  }

  async stop(externalId: string, { signal, force, timeoutMs }: CallOptions & { readonly force: boolean; readonly timeoutMs: number }): Promise<void> {
    assertId(externalId);
    if (force) {
      await ignoring(['conflict'], virsh(this.#virsh, ['destroy', '--', externalId], { signal, timeoutMs: DESTROY_TIMEOUT_MS }));
      return;
    }
    const deadline = performance.now() + timeoutMs;
    if (isOff(await this.#stateOfKnown(externalId, signal))) return;
    await ignoring(['conflict'], this.#ask(['shutdown', '--mode', 'acpi', '--', externalId], signal));
    while (!isOff(await this.#stateOfKnown(externalId, signal))) {
      if (performance.now() > deadline) {
        throw new OffshootError('busy',
          `machine ${externalId} was asked to shut down and still runs after ${timeoutMs} ms: its system may not listen to the power button; wait, or stop it with --force`, { externalId });
      }
      await sleepUnlessAborted(POLL_MS, signal);
    }
  }

  async status(externalId: string, { signal }: CallOptions): Promise<MachineState> {
    assertId(externalId);
    try {
      return stateOf(await this.#ask(['domstate', '--reason', '--', externalId], signal));
    } catch (error) {
      if (error instanceof OffshootError && error.kind === 'not-found') return 'missing';
      throw error;
    }
  }

  async pingAgent(externalId: string, { signal }: CallOptions): Promise<boolean> {
    assertId(externalId);
    try {
      await this.#ask(['qemu-agent-command', '--timeout', String(PING_TIMEOUT_SECONDS), '--', externalId, '{"execute":"guest-ping"}'], signal);
      return true;
    } catch (error) {
      if (error instanceof OffshootError && ['timed-out', 'not-supported', 'conflict'].includes(error.kind)) return false;
      throw error;
    }
  }

  async freeze(externalId: string, { signal }: CallOptions): Promise<void> {
    assertId(externalId);
    await virsh(this.#virsh, ['domfsfreeze', '--', externalId], { signal, timeoutMs: FREEZE_TIMEOUT_MS });
  }

  async thaw(externalId: string, { signal }: CallOptions): Promise<void> {
    assertId(externalId);
    await virsh(this.#virsh, ['domfsthaw', '--', externalId], { signal, timeoutMs: FREEZE_TIMEOUT_MS });
  }

  /**
   * libvirt takes a definition with a known UUID and name for a new version of the old one, wherever its disks lie. It is the same machine only
   * if a file of what is defined lies in the machine's directory. (That a name or a UUID alone is taken, libvirt finds out by itself.)
   */
  async #assertOwn(machine: MachineToRegister, signal: AbortSignal): Promise<void> {
    const known = await this.#knownUuids(signal);
    if (known?.has(machine.uuid) === false) return;
    let files: string;
    try {
      files = await this.#ask(['dumpxml', '--inactive', '--xpath', '//devices/disk/source/@file', '--', machine.uuid], signal);
    } catch (error) {
      if (error instanceof OffshootError && error.kind === 'not-found') return;
      throw error;
    }
    if (files.trim() === '' || files.includes(`"${attributeText(machine.directory)}/`)) return;
    throw new OffshootError('already-exists', `libvirt knows another machine with the UUID ${machine.uuid}, whose disks lie elsewhere: undefine that one first (virsh undefine)`, { uuid: machine.uuid });
  }

  /** All who ask in one turn share one child, so that a hundred registrations need half as many. Null: there are too many to be listed. */
  #knownUuids(signal: AbortSignal): Promise<ReadonlySet<string> | null> {
    if (this.#list?.signal === signal) return this.#list.answer;
    const ask = async (): Promise<ReadonlySet<string> | null> => {
      await new Promise((resolve) => { setImmediate(resolve); });
      // Whoever comes from now on may have been told of a machine after this answer.
      if (this.#list === list) this.#list = null;
      try {
        return new Set((await this.#ask(['list', '--all', '--uuid'], signal)).split('\n').map((line) => line.trim()));
      } catch (error) {
        if (error instanceof OffshootError && error.kind === 'too-large') return null;
        throw error;
      }
    };
    const list = { signal, answer: ask() };
    this.#list = list;
    return list.answer;
  }

  async #stateOfKnown(externalId: string, signal: AbortSignal): Promise<MachineState> {
    const state = await this.status(externalId, { signal });
    if (state === 'missing') throw missing(externalId);
    return state;
  }

  async #ask(args: readonly string[], signal: AbortSignal): Promise<string> {
    return await virsh(this.#virsh, args, { signal, timeoutMs: QUESTION_TIMEOUT_MS });
  }
}

/** Of `domstate --reason`: `shut off (crashed)`. */
export function stateOf(answer: string): MachineState {
  const [, state, reason] = /^([a-z ]+?)(?: \((.*)\))?$/u.exec(answer.trim()) ?? [];
  switch (state) {
    case 'running':
    case 'idle':
    case 'in shutdown': return 'running';
    case 'paused':
    case 'pmsuspended': return 'paused';
    case 'crashed': return 'crashed';
    case 'shut off': return reason === 'crashed' ? 'crashed' : 'shut-off';
    default: throw new OffshootError('io-error', `libvirt: domstate says '${answer}', which is no state that is known`, {});
  }
}

function missing(externalId: string, cause?: unknown): OffshootError {
  return new OffshootError('not-found', `libvirt does not know the machine ${externalId} any more: register it again (offshoot vm register)`, { externalId }, cause);
}

function isOff(state: MachineState): boolean {
  return state === 'shut-off' || state === 'crashed';
}

/** Only UUIDs are ids: a number could be taken for a domain's run-time id, and a name for another machine. */
function assertId(externalId: string): void {
  if (!UUID.test(externalId)) throw new OffshootError('invalid-argument', `'${externalId}' is no id of a machine: ids are UUIDs in lower case`, { externalId });
}

/** What libvirt would make up, or take from elsewhere, could not be found again. */
function assertNames({ text, name, uuid }: MachineToRegister): void {
  const given = /<uuid>\s*([0-9a-fA-F-]+)\s*<\/uuid>/u.exec(text)?.[1]?.toLowerCase().replaceAll('-', '');
  if (given !== uuid.replaceAll('-', '')) {
    throw new OffshootError('invalid-argument', `the configuration of machine '${name}' does not have the UUID ${uuid}: it has ${given ?? 'none'}`, { name, uuid });
  }
}

function attributeText(path: string): string {
  return path.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;');
}

async function ignoring(kinds: readonly string[], asked: Promise<unknown>): Promise<void> {
  try {
    await asked;
  } catch (error) {
    if (!(error instanceof OffshootError) || !kinds.includes(error.kind)) throw error;
  }
}
