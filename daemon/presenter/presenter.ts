/**
 * The seam to servers that present parts of the mount to others: NFS-Ganesha, Samba, tgt, qemu-nbd, loop devices.
 *
 * A presenter is told the whole list of what it is to show, every time, and makes it so: configuration files of our own are written whole and
 * checked, servers are started, told to look again, or ended when the list is empty. So the same call does a first export, a withdrawal, and
 * the first look of a new daemon; made again it changes nothing. What others have open is not disturbed by a change that does not concern it.
 *
 * A presenter never opens a file below the mount: servers do, in their own processes, which outlive the server of ours and end with the mount.
 */

export const EXPORT_KINDS = ['nfs', 'smb', 'iscsi', 'nbd', 'block'] as const;
export type ExportKind = (typeof EXPORT_KINDS)[number];

export interface PresenterAbilities {
  /** It shows directories: containers, and what is in them. */
  readonly directories: boolean;
  /** It shows single disks, as block devices of some kind. */
  readonly disks: boolean;
  /** Who is let in: addresses and networks (`192.0.2.7`, `192.0.2.0/24`), initiator names (`iqn.…`), users, or whoever may open the device on this host. */
  readonly clients: 'addresses' | 'initiators' | 'users' | 'host';
  /** What protects it on the way; null: nothing, which belongs on a network of its own. */
  readonly encryption: 'tls' | 'kerberos' | 'smb3' | null;
  /** `clients` can say who has it open. */
  readonly knowsClients: boolean;
}

/** One thing that is shown. */
export interface Export {
  /** Of the row: unique in the store, and the same over restarts; file system ids and LUN identities are made of it. */
  readonly id: number;
  /** Never changes while the export exists, also over restarts and restores. */
  readonly uuid: string;
  /** In the store: `vms`, `vms/web001.img`. */
  readonly path: string;
  /** The same on this host, under the mount. */
  readonly mountPath: string;
  readonly kind: 'directory' | 'disk';
  readonly sizeBytes: number | null;
  /** Never empty, except where `clients` is `host`. There is no `*`: everybody is `0.0.0.0/0` and `::/0`, written out. */
  readonly clients: readonly string[];
  readonly readOnly: boolean;
  /** Of this presenter, checked by `checkOptions`: a port, a TLS directory. */
  readonly options: Readonly<Record<string, string>>;
}

/** How a client reaches it: `nfs://192.0.2.1:2049/vms`, `iqn.…`, `/dev/loop7`. */
export interface ExportAddress {
  readonly id: number;
  readonly addresses: readonly string[];
}

export interface PresenterCall {
  readonly signal: AbortSignal;
}

export interface Presenter {
  readonly id: ExportKind;
  readonly abilities: PresenterAbilities;
  /** Whether it can be used now. `reason` says what is missing and what to do. */
  probe(options: PresenterCall): Promise<{ readonly usable: true; readonly version: string } | { readonly usable: false; readonly reason: string }>;
  /** Throws `invalid-argument` for a client or an option that it cannot mean, before anything is done. Clients are well-formed already (`clients.ts`). */
  check(wanted: Export): void;
  /**
   * What is settled once and kept with the export (a port, so that it is the same after every restart): the options to keep, with those that were
   * given. Before the row is made: its id is 0. Left out where there is nothing to settle.
   */
  settle?(wanted: Export, shown: readonly Export[], options: PresenterCall): Promise<Readonly<Record<string, string>>>;
  /**
   * A cheap look, every few seconds: what of these is not shown any more although it was (a server has ended), as a sentence for people; null when all is
   * well. `apply` is called then. Left out where nothing can be lost.
   */
  lost?(shown: readonly Export[], options: PresenterCall): Promise<string | null>;
  /** Shows exactly these; none: nothing is left running, also where the tools are missing. Throws what the server said; then the list before is shown as it was. */
  apply(wanted: readonly Export[], options: PresenterCall): Promise<readonly ExportAddress[]>;
  /** Who uses it now, in its own words (addresses, initiator names); empty where it cannot be known. */
  clientsOf(shown: Export, options: PresenterCall): Promise<readonly string[]>;
  /** Ends its servers, when the mount goes away. Everything that it shows is shown again by the next `apply`. */
  end(options: PresenterCall): Promise<void>;
}
