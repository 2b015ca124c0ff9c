/**
 * A server without a mount: store, file system, dispatcher and I/O worker as they are, with a `MessageSocket` in the place of
 * /dev/fuse. It holds three disks (a base and two clones of it, one with copy-on-read) and a small file.
 *
 * Needs compiled workers beside it, as the program that `scripts/fuzz` starts has.
 */
import { mkdirSync, rmSync, statSync, writeSync, openSync, closeSync, readFileSync } from 'node:fs';
import { createHash } from 'node:crypto';
import { join } from 'node:path';

import { toOffshootError } from '../../../blockstore/errors.js';
import { Store } from '../../../blockstore/store.js';
import { BLOCK_BYTES } from '../../../blockstore/units.js';
import { StoreFileSystem } from '../../../daemon/filesystem/store-file-system.js';
import { KernelDispatcher } from '../../../daemon/transport/kernel/dispatch.js';
import { ExchangeIntents } from '../../../daemon/transport/kernel/exchange-intents.js';
import { HandleTable } from '../../../daemon/transport/kernel/handles.js';
import { WorkerPool } from '../../../daemon/transport/kernel/worker-pool.js';
import { patternBytes } from '../model/pattern.js';
import { withoutReserve } from '../without-reserve.js';
import { MessageSocket } from './message-socket.js';

/** Ends in the middle of a block. */
export const DISK_BYTES = 96 * 1024 + 3 * 512;
const HOLE_BLOCKS = [2, 3, 9];
const END_MS_MAX = 60_000;
const CALLER = { uid: 0, gid: 0, pid: 0 };

export interface FuzzDirectories {
  readonly storeDir: string;
  readonly runtimeDir: string;
}

export class FuzzServer {
  readonly socket = new MessageSocket();
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  /** Node ids: a container, disks by their number, a file. */
  readonly container: number;
  readonly disks: readonly number[];
  readonly file: number;
  readonly fatal: Error[] = [];
  readonly #handles: HandleTable;
  readonly #baseFile: string;
  readonly #baseSum: string;

  constructor(directories: FuzzDirectories) {
    const pool = new WorkerPool();
    this.store = openStore(directories, pool);
    this.#handles = HandleTable.load(directories.runtimeDir);
    this.fileSystem = new StoreFileSystem({
      store: this.store, storeDir: directories.storeDir, handles: this.#handles, beforeDiscard: () => undefined, onWarning: () => undefined,
    });
    this.container = this.fileSystem.namespace.mkdir(1, 'c', 0o755, CALLER).nodeId;
    const { base, layerId } = this.#makeBase();
    const clone = (name: string, copyOnRead: boolean): number => this.store.clone(base, [{ parentId: this.container, name }], { copyOnRead })[0]!.id;
    this.disks = [base, clone('one', true), clone('two', false)];
    const made = this.fileSystem.create(this.container, 'file', 0o644, 2, CALLER);
    if (this.fileSystem.write(made.attributes.nodeId, 0, Buffer.from('some bytes in a file')) instanceof Promise) throw new Error('a new file has no source to wait for');
    this.fileSystem.release(made.open.handle);
    this.file = made.attributes.nodeId;
    this.#baseFile = this.store.files.storePath(layerId);
    this.#baseSum = sumOf(this.#baseFile);
    for (const disk of this.disks) this.fileSystem.open(disk, 2);
    this.#serve(pool, directories);
  }

  /** What the base holds, and at first its clones. */
  static content(): Buffer {
    const content = patternBytes(7, 0, DISK_BYTES);
    for (const block of HOLE_BLOCKS) content.fill(0, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
    return content;
  }

  /** The sealed layer that all disks stand on. */
  assertBaseUntouched(): void {
    if (sumOf(this.#baseFile) !== this.#baseSum) throw new Error('the sealed layer below the disks was changed');
  }

  /** Ends the worker; with `orderly`, closes the store as well. Otherwise nothing is committed: it was killed. */
  async end(orderly: boolean): Promise<void> {
    const before = this.fatal.length;
    this.socket.hangUp();
    const deadline = performance.now() + END_MS_MAX;
    while (this.fatal.length === before) {
      if (performance.now() > deadline) throw new Error('the worker does not end although its socket has');
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    this.socket.closeServerEnd();
    if (orderly) await this.store.close();
    this.#handles.close();
  }

  #makeBase(): { readonly base: number; readonly layerId: number } {
    const { meta, files } = this.store;
    return meta.transaction(() => {
      const layer = meta.layers.insert({
        kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes: DISK_BYTES, sealed: false,
        complete: true, createdUs: 0,
      });
      files.create(layer.id, DISK_BYTES);
      const fd = openSync(files.storePath(layer.id), 'r+');
      const content = FuzzServer.content();
      for (let at = 0; at < DISK_BYTES; at += BLOCK_BYTES) {
        if (!HOLE_BLOCKS.includes(at / BLOCK_BYTES)) writeSync(fd, content, at, Math.min(BLOCK_BYTES, DISK_BYTES - at), at);
      }
      closeSync(fd);
      const node = meta.nodes.insert({
        parentId: this.container, name: 'base', kind: 'disk', mode: 0o600, uid: 0, gid: 0, sizeBytes: DISK_BYTES, atimeUs: 0, mtimeUs: 0, ctimeUs: 0,
        layerId: layer.id, linkTarget: null, copyOnRead: false, fault: null,
      });
      return { base: node.id, layerId: layer.id };
    });
  }

  #serve(pool: WorkerPool, { runtimeDir }: FuzzDirectories): void {
    const fuseFd = this.socket.serverFd;
    const onFatal = (error: Error): void => { this.fatal.push(error); };
    const reply = (message: Uint8Array): void => { writeSync(fuseFd, message); };
    const silent = (): void => undefined;
    const dispatcher = new KernelDispatcher({
      fileSystem: this.fileSystem, reply, onFatal, logger: { debug: silent, warn: silent }, onSession: silent, exchangeIntents: new ExchangeIntents(runtimeDir),
    });
    pool.start({
      fuseFd, shared: this.store.context.shared, boots: [this.store.threadBoot(1)],
      onRequest: (message) => { dispatcher.handle(message); },
      onFlushReply: (nodeId, message) => {
        this.store.flush(nodeId).then(() => { reply(message); }, (thrown: unknown) => { onFatal(toOffshootError(thrown)); }).catch(onFatal);
      },
      onCommitWanted: () => { this.store.committer.commitAll().catch(onFatal); },
      onUnmounted: silent, onFatal,
    });
  }
}

/** The store of a server that has ended, one way or the other. */
export function openStore({ storeDir, runtimeDir }: FuzzDirectories, announcer: { opened: WorkerPool['opened']; closed: WorkerPool['closed'] }): Store {
  return withoutReserve(() => Store.open({
    mapChunks: 2, storeDir, runtimeDir, threads: 2,
    announcer: { opened: (handles) => { announcer.opened(handles); }, closed: (nodeId, serial) => { announcer.closed(nodeId, serial); } },
    onFault: (nodeId, reason) => { throw new Error(`node ${nodeId} was faulted: ${reason}`); },
    onFull: () => undefined,
  }));
}

export function makeDirectories(base: string): FuzzDirectories {
  rmSync(base, { recursive: true, force: true });
  const directories = { storeDir: join(base, 'store'), runtimeDir: join(base, 'run') };
  for (const directory of [base, directories.storeDir, directories.runtimeDir]) mkdirSync(directory);
  return directories;
}

function sumOf(file: string): string {
  return createHash('sha256').update(readFileSync(file)).update(String(statSync(file).size)).digest('hex');
}
