/**
 * The data files behind layers: where they lie, how they come to be, who has them open. Files outside of the store are sources
 * (`sources/external-source.ts`): opening one never fails and never waits, reading it may.
 *
 * A store layer's file is sparse and as long as its disk; block N lies at N * 4096. A file's name is durable before the
 * metadata refers to it, and a file is unlinked only after the metadata no longer does. Sealed layers are opened for
 * reading only, so that a late write to one fails loudly; they are shared by all disks that stand on them, and those
 * nobody uses stay open within a bound. Main thread only.
 */
import fs from 'node:fs';
import path from 'node:path';

import { LRUCache } from 'lru-cache';

import { OffshootError, toOffshootError } from './errors.js';
import type { LayerRow } from './meta/rows.js';
import { ExternalSource, type SourceCondition } from './sources/external-source.js';

/** A layer's file, open. `fd` is valid until the last `release`. */
export interface LayerFile {
  readonly layerId: number;
  /** NOT_DIRECT for a source that is away or must be asked for; then it may change at any time. */
  readonly fd: number;
  readonly writable: boolean;
  /** Of an external layer. */
  readonly source: ExternalSource | null;
}

/**
 * The file of an active layer, open twice. The kernel tells each open description of a failed write-back once, to the first
 * who syncs through it: what the main thread syncs at once and what syncs in the thread pool must not take the error from
 * each other. `hold` keeps both descriptors open, although the file was released, until its result is called: a sync that
 * waits in the pool must not meet another file under the same number.
 */
export class ActiveFile implements LayerFile {
  readonly writable = true;
  readonly source = null;
  readonly layerId: number;
  readonly fd: number;
  /** For syncs in the thread pool. */
  readonly syncFd: number;
  private holds = 1;

  constructor(layerId: number, fd: number, syncFd: number) {
    this.layerId = layerId;
    this.fd = fd;
    this.syncFd = syncFd;
  }

  hold(): () => void {
    this.holds += 1;
    return () => { this.letGo(); };
  }

  letGo(): void {
    this.holds -= 1;
    if (this.holds > 0) return;
    fs.closeSync(this.fd);
    fs.closeSync(this.syncFd);
  }
}

interface SharedFile extends LayerFile {
  users: number;
}

export interface LayerFilesOptions {
  /** How long a read may wait for a source that does not answer. */
  readonly sourceTimeoutMs: number;
  /** A source has another descriptor, or none. */
  readonly onSourceDescriptor: (layerId: number, fd: number) => void;
}

/** Files of sealed layers that stay open although no open disk uses them. */
const IDLE_FILES_MAX = 256;
/** Sealed layers whose allocation is remembered. */
const SEALED_SIZES_MAX = 65_536;

export class LayerFiles {
  readonly storeDir: string;
  /** Where the data files lie, in one directory for each value of `id % 256`. */
  readonly directory: string;
  private readonly options: LayerFilesOptions;
  private readonly sealed = new Map<number, SharedFile>();
  /** Layers that are gone while their files are in use: closed by the last user. */
  private readonly gone = new Set<number>();
  private readonly idle: LRUCache<number, SharedFile>;
  /** Made when it is first needed: its room is set aside at once, which takes longer than all else that opening a store does. */
  private sealedAllocation: LRUCache<number, number> | undefined;

  constructor(storeDir: string, options: LayerFilesOptions) {
    this.storeDir = storeDir;
    this.directory = path.join(storeDir, 'layers');
    this.options = options;
    this.idle = new LRUCache({
      max: IDLE_FILES_MAX,
      dispose: (file, layerId, reason) => {
        // 'delete' means that the file went back into use.
        if (reason !== 'delete' && !this.sealed.has(layerId)) closeFile(file);
      },
    });
  }

  /** Makes the directories that layers lie in. */
  prepare(): void {
    fs.mkdirSync(this.directory, { recursive: true, mode: 0o700 });
    for (let i = 0; i < 256; i += 1) {
      fs.mkdirSync(path.join(this.directory, i.toString(16).padStart(2, '0')), { recursive: true, mode: 0o700 });
    }
    syncDirectory(this.directory);
    syncDirectory(path.dirname(this.directory));
  }

  /** Path of a store layer's data file. */
  storePath(layerId: number): string {
    return path.join(this.directory, (layerId % 256).toString(16).padStart(2, '0'), `${layerId}.layer`);
  }

  pathOf(layer: LayerRow): string {
    return layer.kind === 'external' ? (layer.externalPath ?? '') : this.storePath(layer.id);
  }

  exists(layerId: number): boolean {
    return fs.existsSync(this.storePath(layerId));
  }

  /** Makes an empty data file of `sizeBytes`; durable, name included, when it returns. */
  create(layerId: number, sizeBytes: number): void {
    const file = this.storePath(layerId);
    // A file of this id can only be left over from a creation whose transaction never committed.
    try {
      const fd = fs.openSync(file, fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_TRUNC, 0o600);
      try {
        fs.ftruncateSync(fd, sizeBytes);
        fs.fsyncSync(fd);
      } finally {
        fs.closeSync(fd);
      }
      syncDirectory(path.dirname(file));
    } catch (error) {
      throw toOffshootError(error);
    }
  }

  /** The same for several at once, side by side in the thread pool; with `content`, if there is some. */
  async createAll(wanted: readonly { readonly layerId: number; readonly sizeBytes: number; readonly content?: Uint8Array }[]): Promise<void> {
    try {
      await Promise.all(wanted.map(async ({ layerId, sizeBytes, content }) => {
        const file = await fs.promises.open(this.storePath(layerId), 'w+', 0o600);
        try {
          if (content !== undefined) await file.writeFile(content);
          await file.truncate(sizeBytes);
          await file.sync();
        } finally {
          await file.close();
        }
      }));
      await Promise.all(Array.from(new Set(wanted.map(({ layerId }) => path.dirname(this.storePath(layerId)))), async (directory) => {
        const opened = await fs.promises.open(directory, fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
        try {
          await opened.sync();
        } finally {
          await opened.close();
        }
      }));
    } catch (error) {
      throw toOffshootError(error);
    }
  }

  /** Takes a finished file (on the same file system) as the data file of a layer; durable when it returns. */
  adopt(layerId: number, file: string): void {
    const target = this.storePath(layerId);
    fs.renameSync(file, target);
    syncDirectory(path.dirname(target));
  }

  /** Opens the file of an active layer for reading and writing; the caller is its only writer. */
  openActive(layer: LayerRow): ActiveFile {
    const fd = this.openStoreFile(layer, fs.constants.O_RDWR);
    try {
      return new ActiveFile(layer.id, fd, this.openStoreFile(layer, fs.constants.O_RDONLY));
    } catch (error) {
      fs.closeSync(fd);
      throw error;
    }
  }

  /** Opens a sealed layer's file, or shares it with those who have it open. */
  openSealed(layer: LayerRow): LayerFile {
    const file: SharedFile = this.sealed.get(layer.id) ?? this.idleFile(layer.id) ?? (layer.kind === 'external' ? this.openExternal(layer)
      : { layerId: layer.id, fd: this.openStoreFile(layer, fs.constants.O_RDONLY), writable: false, source: null, users: 0 });
    file.source?.look();
    this.sealed.set(layer.id, file);
    this.idle.delete(layer.id);
    file.users += 1;
    return file;
  }

  release(file: LayerFile): void {
    if (file instanceof ActiveFile) {
      file.letGo();
      return;
    }
    const shared = this.sealed.get(file.layerId);
    if (shared !== file) throw new Error(`the file of layer ${file.layerId} is released without being open`);
    shared.users -= 1;
    if (shared.users > 0) return;
    this.sealed.delete(file.layerId);
    if (this.gone.delete(file.layerId)) closeFile(shared);
    else this.idle.set(file.layerId, shared);
  }

  /** Forgets and deletes a store layer's file. The metadata must not refer to it any more; who has it open goes on with it. */
  unlink(layerId: number): void {
    this.forgetIdle(layerId);
    if (this.sealed.has(layerId)) this.gone.add(layerId);
    fs.rmSync(this.storePath(layerId), { force: true });
  }

  /** Closes the file if nobody uses it. */
  forgetIdle(layerId: number): void {
    const idle = this.idle.get(layerId);
    if (idle === undefined) return;
    this.idle.delete(layerId);
    closeFile(idle);
  }

  /** Looks at the sources that disks have open; what is wrong is in their condition. Never waits. */
  lookAtSources(): void {
    for (const { source } of this.sealed.values()) source?.look();
  }

  /** Sources that disks have open, and how they are. */
  sourceConditions(): readonly SourceCondition[] {
    return [...this.sealed.values()].flatMap(({ source }) => (source === null ? [] : [source.condition()]));
  }

  /** The source of an external layer: the open one, or one that the caller closes by `closeSource`. */
  sourceOf(layer: LayerRow): ExternalSource {
    const open = (this.sealed.get(layer.id) ?? this.idle.get(layer.id))?.source;
    return open ?? new ExternalSource(layer, { timeoutMs: this.options.sourceTimeoutMs, onDescriptor: () => undefined });
  }

  closeSource(source: ExternalSource): void {
    if ((this.sealed.get(source.layerId) ?? this.idle.get(source.layerId))?.source !== source) source.close();
  }

  /** Bytes that a store layer's file takes on its file system; 0 when it was never made. */
  allocatedBytes(layerId: number): number {
    const stat = fs.statSync(this.storePath(layerId), { throwIfNoEntry: false });
    return stat === undefined ? 0 : stat.blocks * 512;
  }

  /**
   * Bytes that a chain of layers takes, the active one first: what a reader of the disk finds allocated, counted for every
   * disk that shares it, as file systems with shared extents do. Never 0 for a disk that has data: tar takes that for a hole.
   */
  allocatedInChain(chain: readonly LayerRow[]): number {
    let sum = 0;
    for (const layer of chain) sum += layer.sealed ? this.sealedAllocatedBytes(layer) : this.allocatedBytes(layer.id);
    return sum;
  }

  /** A sealed layer does not change, so it is asked once. */
  private sealedAllocatedBytes(layer: LayerRow): number {
    this.sealedAllocation ??= new LRUCache<number, number>({ max: SEALED_SIZES_MAX });
    const known = this.sealedAllocation.get(layer.id);
    if (known !== undefined) return known;
    // A file outside of the store may lie on a network that does not answer: what it takes is taken to be its size.
    const bytes = layer.kind === 'external' ? layer.sizeBytes : this.allocatedBytes(layer.id);
    this.sealedAllocation.set(layer.id, bytes);
    return bytes;
  }

  closeAll(): void {
    for (const { source } of this.sealed.values()) source?.close();
    for (const layerId of [...this.idle.keys()]) this.forgetIdle(layerId);
  }

  /** One that nobody uses. A source whose name leads elsewhere by now is opened anew: what is found there decides. */
  private idleFile(layerId: number): SharedFile | undefined {
    const file = this.idle.get(layerId);
    file?.source?.look();
    if (file?.source?.condition().kind !== 'moved') return file;
    this.forgetIdle(layerId);
    return undefined;
  }

  private openExternal(layer: LayerRow): SharedFile {
    const source = new ExternalSource(layer, { timeoutMs: this.options.sourceTimeoutMs, onDescriptor: this.options.onSourceDescriptor });
    return { layerId: layer.id, get fd() { return source.directFd; }, writable: false, source, users: 0 };
  }

  private openStoreFile(layer: LayerRow, flags: number): number {
    try {
      return fs.openSync(this.storePath(layer.id), flags | fs.constants.O_NOFOLLOW);
    } catch (error) {
      const cause = toOffshootError(error);
      if (cause.kind !== 'not-found') throw cause;
      throw new OffshootError('store-damaged',
        `the data file ${this.storePath(layer.id)} of layer ${layer.id} is missing; restore it from a backup of the store`,
        { layerId: layer.id }, error);
    }
  }
}

function closeFile(file: LayerFile): void {
  if (file.source !== null) file.source.close();
  else fs.closeSync(file.fd);
}

/** Makes the names in a directory durable. */
export function syncDirectory(directory: string): void {
  const fd = fs.openSync(directory, fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
  try {
    fs.fsyncSync(fd);
  } finally {
    fs.closeSync(fd);
  }
}
