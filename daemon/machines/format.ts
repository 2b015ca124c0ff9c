/**
 * The seam to the formats of machine configurations: libvirt's domain XML, VMware's .vmx, and a description of our own for QEMU.
 *
 * A format is text in, text out: no file, no store, no process. What a format does not know stays in the text as it was, comments and
 * order too. Which facts of a clone are dropped, and which are made new, is a table in each format's own file.
 */

export const FORMAT_IDS = ['libvirt', 'vmx', 'qemu'] as const;
export type FormatId = (typeof FORMAT_IDS)[number];

/** A file that a configuration names. */
export interface FileReference {
  /** As the configuration calls it: `vda`, `scsi0:0`, `nvram`. Unique in the configuration. */
  readonly slot: string;
  /** As it stands in the configuration: absolute, or relative to the configuration's directory. */
  readonly file: string;
  readonly role: 'disk' | 'cdrom' | 'nvram' | 'firmware' | 'kernel' | 'initrd' | 'other';
  /** Null where the format does not say. Disks of the store are always raw. */
  readonly diskFormat: string | null;
}

/** What is common to machines of all formats. */
export interface MachineFacts {
  readonly name: string | null;
  /** Lower case with hyphens. */
  readonly uuid: string | null;
  readonly memoryBytes: number | null;
  readonly processors: number | null;
  /** Of the network interfaces in their order, lower case with colons; null: made by the hypervisor. */
  readonly macs: readonly (string | null)[];
  readonly files: readonly FileReference[];
}

/** What a clone must have of its own. */
export interface MachineIdentity {
  readonly name: string;
  readonly uuid: string;
  /** One for each network interface. */
  readonly macs: readonly string[];
  /** Where a file that the configuration names lies for this clone; null: it keeps what it has (a firmware of the host). */
  readonly fileOf: (reference: FileReference) => string | null;
}

/** One line of what was done to a configuration. */
export interface ConfigurationChange {
  readonly key: string;
  readonly action: 'set' | 'removed';
  readonly before: string | null;
  readonly after: string | null;
}

/** A configuration that was read. Changes are made in it and written by `toText`. */
export interface MachineDocument {
  facts(): MachineFacts;
  /** Parameters by the format's own names (`memory`, `vcpu`, `displayName`, `scsi0:0.fileName`), in the order of the text. */
  keys(): readonly string[];
  get(key: string): string | null;
  /** Throws `invalid-argument` when the key cannot hold the value, or there is no such key in the format. */
  set(key: string, value: string): void;
  /** Gives the machine an identity of its own by the format's table, and says what changed. */
  customise(identity: MachineIdentity): readonly ConfigurationChange[];
  toText(): string;
}

export interface MachineFormat {
  readonly id: FormatId;
  /** How a configuration is to name what lies with the machine: `relative` to its directory where the hypervisor sees it by another path than this host does. */
  readonly ownFiles: 'absolute' | 'relative';
  /** What a configuration names as a disk: the raw disk itself, or VMware's descriptor beside it (see `vmdk-disks.ts`). */
  readonly diskFiles: 'raw' | 'vmdk';
  /** The name that a configuration of this format has in a machine's directory: `NAME.xml`, `NAME.vmx`, `machine.json`. */
  fileName(machineName: string): string;
  /** True when a file of this name may be a configuration of this format; `text` is its beginning. */
  recognises(fileName: string, text: string): boolean;
  /** Names of files beside the configuration that a hypervisor made and makes anew: logs, swap, locks. A clone does not have them. */
  isRegenerated(fileName: string): boolean;
  /** Throws `invalid-argument`, naming the line, when the text is not of this format. */
  parse(text: string): MachineDocument;
}
