/**
 * What a transport may ask of the file system: the seam between `daemon/filesystem` and `daemon/transport/*`.
 *
 * Names, attributes and promises only; nothing here knows FUSE. Every method throws OffshootError; the transport turns
 * its kind into an errno with `errnoOf`. Node ids are stable across servers and never used again. Methods are
 * synchronous unless they wait for the disk (fsync, and what follows a write that must be durable).
 */
export type NodeId = number;

/** Node id of the mount's root directory; its children are the containers. */
export const ROOT_NODE_ID = 1;

/**
 * `disk`: a virtual disk of fixed virtual size, made by import or clone. `file`: an ordinary file that grows as it is
 * written. Both are layered in the same way.
 */
export type NodeKind = 'directory' | 'file' | 'disk' | 'symlink';

export interface Attributes {
  readonly nodeId: NodeId;
  /** Random 32-bit number made with the node (NFS handles). */
  readonly generation: number;
  readonly kind: NodeKind;
  /** Permission bits, 0 to 0o7777. The type bits are the transport's to add. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly linkCount: number;
  readonly sizeBytes: number;
  /** What the node's active layer takes on the store's file system (st_blocks * 512). */
  readonly allocatedBytes: number;
  /** Microseconds since the epoch. */
  readonly atimeUs: number;
  readonly mtimeUs: number;
  readonly ctimeUs: number;
}

export interface Caller {
  readonly uid: number;
  readonly gid: number;
  readonly pid: number;
}

export interface AttributeChanges {
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  readonly sizeBytes?: number;
  readonly atimeUs?: number | 'now';
  readonly mtimeUs?: number | 'now';
  readonly ctimeUs?: number;
}

export interface DirectoryEntry {
  readonly name: string;
  /** Opaque, positive, increasing; pass the last one seen to read on. */
  readonly cookie: number;
  readonly attributes: Attributes;
}

/** How a file may be cached by the caller: one mode for all opens of a node, kept until its last close. */
export type OpenMode = 'direct' | 'cached';

/** Tells one request from another, when the caller's transport may deliver it a second time. */
export interface RequestMark {
  /** Never 0; the same for the second delivery, another one for every other request that is under way. */
  readonly key: number;
  /** It was delivered before: what it was given then it is to be given again. */
  readonly isSecond: boolean;
}

export interface OpenResult {
  /** A persistent number, never used again within the life of a mount. */
  readonly handle: number;
  readonly mode: OpenMode;
  /** The kernel may have pages of the file that show another content than it has now: they must not be kept. */
  readonly dropsPages?: boolean;
}

export interface StoreStatistics {
  readonly blockBytes: number;
  readonly blocksTotal: number;
  readonly blocksFree: number;
  readonly blocksAvailable: number;
  readonly nodesTotal: number;
  readonly nodesFree: number;
  readonly nameBytesMax: number;
}

export type FallocateMode = 'allocate' | 'allocate-keep-size' | 'punch-hole' | 'zero-range' | 'zero-range-keep-size';

export interface RenameFlags {
  /** RENAME_NOREPLACE */
  readonly noReplace: boolean;
  /** RENAME_EXCHANGE */
  readonly exchange: boolean;
}

export interface FileSystem {
  /** `.` and `..` are allowed (NFS export asks for them). Not found: `not-found`. */
  lookup(parent: NodeId, name: string): Attributes;
  getattr(node: NodeId): Attributes;
  /** A size change of an open disk waits for its gate, hence the promise. */
  setattr(node: NodeId, changes: AttributeChanges, caller: Caller): Promise<Attributes>;
  /** At most `max` entries with a cookie greater than `afterCookie` (0: from the start). `.` and `..` are not in it. */
  readdir(node: NodeId, afterCookie: number, max: number): readonly DirectoryEntry[];
  /** Parent of a directory; the root is its own. */
  parentOf(node: NodeId): NodeId;
  mkdir(parent: NodeId, name: string, mode: number, caller: Caller): Attributes;
  rmdir(parent: NodeId, name: string): void;
  /** Makes an empty file and opens it. `exclusive`: O_EXCL was given. An existing file is opened when not exclusive. */
  create(parent: NodeId, name: string, mode: number, flags: number, caller: Caller, mark?: RequestMark): { readonly attributes: Attributes; readonly open: OpenResult };
  symlink(parent: NodeId, name: string, target: string, caller: Caller): Attributes;
  /** A promise where the target must be made first. `caller`: who asks, where that is known. */
  readlink(node: NodeId, caller?: Caller): string | Promise<string>;
  unlink(parent: NodeId, name: string): void;
  rename(parent: NodeId, name: string, newParent: NodeId, newName: string, flags: RenameFlags): void;
  /** `flags` are Linux open flags. */
  open(node: NodeId, flags: number, mark?: RequestMark): OpenResult;
  /** Unknown handles are ignored: a RELEASE may be seen twice. */
  release(handle: number): void;
  /**
   * Data path for transports that have no I/O workers, and for requests that a worker handed on; runs in the calling
   * thread. Bytes read: less than asked for only at end of file. A promise when a source must be asked, which may take as long as
   * sources are waited for; nothing else waits meanwhile.
   */
  read(node: NodeId, offsetBytes: number, target: Uint8Array): number | Promise<number>;
  /** Bytes written. Not durable until fsync. `data` may be used again when this returns. */
  write(node: NodeId, offsetBytes: number, data: Uint8Array): number | Promise<number>;
  /** A promise when a source must be asked; otherwise null. */
  fallocate(node: NodeId, mode: FallocateMode, offsetBytes: number, lengthBytes: number): Promise<void> | null;
  /**
   * Copies by sharing; bytes copied, fewer than asked for only at the end of the source or of a disk. `not-supported`: nothing was done, and
   * whoever asks is to copy the bytes. Done again, it leads to the same.
   */
  copyFileRange(source: NodeId, sourceAtBytes: number, target: NodeId, targetAtBytes: number, lengthBytes: number): Promise<number>;
  /** SEEK_DATA and SEEK_HOLE; `not-found` kind is never used, past the last data is `OffshootError('invalid-argument')` with context `{ enxio: true }`. */
  seek(node: NodeId, offsetBytes: number, whence: 'data' | 'hole'): number;
  /** Everything acknowledged before the call is durable when the promise resolves. */
  flush(node: NodeId): Promise<void>;
  /** Directory flush: names are committed as they are made, so this only waits for the last commit. */
  flushDirectory(node: NodeId): Promise<void>;
  /** Of the file system as somebody sees it who asks at this node: within a container that has a limit, that limit. */
  statfs(node: NodeId): StoreStatistics;
}
