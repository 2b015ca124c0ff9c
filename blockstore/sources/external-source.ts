/**
 * A source file outside of the store, wherever it lies and however it is: there, away, changed, hanging.
 *
 * Main thread. A file on a local file system is opened here, and its descriptor goes to all who read blocks. One on a remote file system is
 * never touched by this process: a fetcher reads it (remote-reader.ts). A source that is away or is not the file that was
 * taken in has no descriptor: who needs it is told why, and everything else of the disks on it goes on. It is looked at when
 * it is opened, by the clock, and whenever somebody needs it while it is away; when the recorded file is back, so is the source.
 *
 * A file that was moved or replaced under its name while it is open is still the file that was taken in, through its
 * descriptor: it is read on, and the condition says that the next open will fail.
 */
import fs from 'node:fs';

import { OffshootError, toOffshootError } from '../errors.js';
import type { FileIdentity, LayerRow } from '../meta/rows.js';
import { differenceOf, identityOf, scopeOf } from './identity.js';
import { placeOf } from './place.js';
import { RemoteReader, sourceChanged, type ConditionKind } from './remote-reader.js';

/** In the place of a descriptor: reads must be asked for, they cannot be made directly. */
export const NOT_DIRECT = -1;

export interface SourceCondition {
  readonly layerId: number;
  readonly file: string;
  readonly isRemote: boolean;
  /** `moved`: what is open is right, what its name leads to is not. */
  readonly kind: ConditionKind | 'moved';
  readonly reason: string | null;
}

export interface ExternalSourceOptions {
  readonly timeoutMs: number;
  /** The descriptor that blocks can be read from has changed; NOT_DIRECT: there is none. */
  readonly onDescriptor: (layerId: number, fd: number) => void;
}

/** Throws unless a source file is what was taken in. A remote one, which may not answer, is not asked. */
export function assertUnchanged(layer: LayerRow): void {
  const source = new ExternalSource(layer, { timeoutMs: 0, onDescriptor: () => undefined });
  try {
    source.assertUsable();
  } finally {
    source.close();
  }
}

export class ExternalSource {
  readonly layerId: number;
  readonly file: string;
  readonly identity: FileIdentity;
  private readonly options: ExternalSourceOptions;
  private fd = NOT_DIRECT;
  /** Descriptors that somebody may still be reading from, of a file that is not to be read any more. */
  private readonly retired: number[] = [];
  private remote: RemoteReader | null = null;
  private error: OffshootError | null = null;
  private moved: string | null = null;

  constructor(layer: LayerRow, options: ExternalSourceOptions) {
    if (layer.externalIdentity === null || layer.externalPath === null) {
      throw new OffshootError('store-damaged', `layer ${layer.id} has no record of its source file`, { layerId: layer.id });
    }
    this.layerId = layer.id;
    this.file = layer.externalPath;
    this.identity = layer.externalIdentity;
    this.options = options;
    this.attach();
  }

  /** Where blocks can be read from directly, by any thread; NOT_DIRECT when they must be asked for. */
  get directFd(): number {
    return this.fd;
  }

  /** Process id of the fetcher, if there is one now. */
  get fetcherPid(): number | null {
    return this.remote?.pid ?? null;
  }

  condition(): SourceCondition {
    const common = { layerId: this.layerId, file: this.file, isRemote: this.remote !== null };
    if (this.remote !== null) return { ...common, ...this.remote.condition() };
    if (this.error !== null) return { ...common, kind: this.error.kind === 'source-changed' ? 'source-changed' : 'source-unreachable', reason: this.error.message };
    return { ...common, kind: this.moved === null ? 'ok' : 'moved', reason: this.moved };
  }

  /** Looks at the file, without waiting for a remote one. */
  look(): void {
    if (this.remote !== null) {
      const { kind } = this.remote.condition();
      if (kind === 'source-unreachable' || kind === 'source-changed') this.attach();
      this.remote.look();
    } else if (this.fd === NOT_DIRECT) {
      this.attach();
    } else {
      this.lookAtOpenFile();
    }
  }

  /** Throws what is known to be wrong, having looked; a source that merely hangs is not wrong. */
  assertUsable(): void {
    this.look();
    if (this.error !== null) throw this.error;
    if (this.moved !== null) throw sourceChanged(this.file, this.moved);
    const condition = this.remote?.condition();
    if (condition?.kind === 'source-changed') throw new OffshootError('source-changed', condition.reason ?? '', { path: this.file });
    if (condition?.kind === 'source-unreachable') throw new OffshootError('source-unreachable', condition.reason ?? '', { path: this.file });
  }

  /** Exactly these bytes. `source-unreachable`, `source-changed`, or `io-error` for what the source cannot read. */
  async read(offsetBytes: number, lengthBytes: number, deadlineMs: number): Promise<Buffer> {
    if (this.fd === NOT_DIRECT && this.remote === null) this.attach();
    if (this.remote !== null) return await this.remote.read(offsetBytes, lengthBytes, deadlineMs);
    if (this.error !== null) throw this.error;
    return await this.readDirect(offsetBytes, lengthBytes);
  }

  close(): void {
    this.remote?.close();
    this.remote = null;
    if (this.fd !== NOT_DIRECT) this.retired.push(this.fd);
    this.fd = NOT_DIRECT;
    for (const fd of this.retired.splice(0)) fs.closeSync(fd);
  }

  private attach(): void {
    const place = placeOf(this.file);
    if (place.isRemote) {
      this.error = null;
      this.remote ??= new RemoteReader({ file: this.file, identity: this.identity, scope: scopeOf(place), timeoutMs: this.options.timeoutMs });
      return;
    }
    this.remote?.close();
    this.remote = null;
    try {
      const fd = this.openLocal();
      this.error = null;
      this.moved = null;
      this.fd = fd;
      this.options.onDescriptor(this.layerId, fd);
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      this.error = error.kind === 'source-changed' ? error
        : new OffshootError('source-unreachable', `the source file ${this.file} cannot be reached: ${error.message}`, { path: this.file }, thrown);
    }
  }

  private openLocal(): number {
    // Before it is opened: what has come in its place may be a FIFO, whose open waits for ever.
    this.compare(fs.statSync(this.file, { bigint: true }));
    const fd = fs.openSync(this.file, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
    try {
      this.compare(fs.fstatSync(fd, { bigint: true }));
      return fd;
    } catch (thrown) {
      fs.closeSync(fd);
      throw thrown;
    }
  }

  private compare(stat: fs.BigIntStats): void {
    const difference = stat.isFile() ? differenceOf(this.identity, identityOf(stat), 'local') : 'it is no regular file any more';
    if (difference !== null) throw sourceChanged(this.file, difference);
  }

  private lookAtOpenFile(): void {
    const difference = differenceOf(this.identity, identityOf(fs.fstatSync(this.fd, { bigint: true })), 'local');
    if (difference !== null) {
      this.error = sourceChanged(this.file, difference);
      this.moved = null;
      // Threads may be reading from it at this moment, so it is closed with the source.
      this.retired.push(this.fd);
      this.fd = NOT_DIRECT;
      this.options.onDescriptor(this.layerId, NOT_DIRECT);
      return;
    }
    const named = this.whatNameLeadsTo();
    this.moved = named === null ? null : `the name leads elsewhere now (${named}); disks that are open read on from the original, and will not after a restart`;
  }

  /** What is wrong with the file of that name; null: nothing. */
  private whatNameLeadsTo(): string | null {
    const place = placeOf(this.file);
    if (place.isRemote) return `it lies on a file system of type ${place.fileSystemType}`;
    try {
      const stat = fs.statSync(this.file, { bigint: true, throwIfNoEntry: false });
      return stat === undefined ? 'there is no such file' : differenceOf(this.identity, identityOf(stat), 'local');
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      return error.message;
    }
  }

  private async readDirect(offsetBytes: number, lengthBytes: number): Promise<Buffer> {
    const bytes = Buffer.allocUnsafe(lengthBytes);
    const { fd } = this;
    let done = 0;
    while (done < lengthBytes) {
      const got = await new Promise<number>((resolve, reject) => {
        fs.read(fd, bytes, done, lengthBytes - done, offsetBytes + done, (error, bytesRead) => {
          if (error === null) resolve(bytesRead);
          else reject(new OffshootError('io-error', `the source file ${this.file} cannot be read at byte ${offsetBytes + done}: ${error.message}`, { path: this.file, offsetBytes }, error));
        });
      });
      if (got === 0) throw new OffshootError('io-error', `the source file ${this.file} ends at byte ${offsetBytes + done}`, { path: this.file, offsetBytes });
      done += got;
    }
    // Closed meanwhile: its number may have been another file's for a while.
    if (this.fd !== fd) throw new OffshootError('source-unreachable', `the source file ${this.file} was closed while it was read`, { path: this.file });
    return bytes;
  }
}
