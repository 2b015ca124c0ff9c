/**
 * The seam to hypervisors: one interface for libvirt, QEMU by itself and vSphere, what each can do as data, one conformance suite.
 *
 * An adapter keeps nothing: whatever it must find again is in what `register` returned, or with the hypervisor. It never opens a file under
 * the mount; hypervisors do, in their own processes. Every call is bounded in time, can be made again, and fails with what the
 * hypervisor said.
 */
import type { FormatId } from '../machines/format.js';

export const HYPERVISOR_IDS = ['libvirt', 'qemu', 'vsphere'] as const;
export type HypervisorId = (typeof HYPERVISOR_IDS)[number];

export interface HypervisorAbilities {
  /** Formats of configurations that it takes. */
  readonly formats: readonly FormatId[];
  /** It tells a machine to shut down, besides taking its power. */
  readonly shutdown: boolean;
  /** It reaches the agent inside a machine. */
  readonly guestAgent: boolean;
  /** It can make a running machine's file systems quiet for a snapshot, by the agent. */
  readonly quiesce: boolean;
  /** It looks at other hosts' files: paths of machines are its own, not this host's. */
  readonly isRemote: boolean;
}

export type MachineState = 'running' | 'paused' | 'shut-off' | 'crashed' | 'missing';

export interface MachineToRegister {
  readonly name: string;
  readonly uuid: string;
  /** The machine's directory as this host sees it, under the mount. */
  readonly directory: string;
  /** The configuration's file name within it. */
  readonly configuration: string;
  /** What the file holds, with absolute paths of this host. */
  readonly text: string;
  /** Whom the disks belong to; the machine runs as this user where the hypervisor can. */
  readonly owner: { readonly uid: number; readonly gid: number };
}

export interface CallOptions {
  readonly signal: AbortSignal;
}

export interface Hypervisor {
  readonly id: HypervisorId;
  readonly abilities: HypervisorAbilities;
  /** Whether it can be used now. `reason` says what is missing and what to do. */
  probe(options: CallOptions): Promise<{ readonly usable: true; readonly version: string } | { readonly usable: false; readonly reason: string }>;
  /** Makes the machine known; it is not started. Throws `already-exists` when its name or UUID is taken. Made again after a crash it gives the same id. */
  register(machine: MachineToRegister, options: CallOptions): Promise<{ readonly externalId: string }>;
  /**
   * The id of the machine if it is known, by name, UUID and directory; null when it is not. For one that was asked for and not answered, where
   * `register` would be refused now: without it, whoever undoes asks `register` again.
   */
  find?(machine: MachineToRegister, options: CallOptions): Promise<string | null>;
  /** Forgets the machine, and no file of it. One that is not known is no error; one that runs throws `in-use`. */
  unregister(externalId: string, options: CallOptions): Promise<void>;
  start(externalId: string, options: CallOptions): Promise<void>;
  /** Resolves when it is off. `force` takes its power; otherwise it is asked, and `timeoutMs` later `busy` is thrown. */
  stop(externalId: string, options: CallOptions & { readonly force: boolean; readonly timeoutMs: number }): Promise<void>;
  status(externalId: string, options: CallOptions): Promise<MachineState>;
  /** True when the agent inside answers. */
  pingAgent(externalId: string, options: CallOptions): Promise<boolean>;
  /** Makes the file systems inside quiet, and lets them go on. Throws `not-supported` without the ability. */
  freeze(externalId: string, options: CallOptions): Promise<void>;
  thaw(externalId: string, options: CallOptions): Promise<void>;
}
