/**
 * The file system in memory, with what a protocol test wants to prescribe: the mode of an open, errors, the answers of seek;
 * and with what it wants to see: the calls that the memory does not show.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { AttributeChanges, Attributes, FallocateMode, NodeId, OpenMode, OpenResult, RenameFlags } from '../../daemon/filesystem/types.js';
import { MemoryFileSystem } from '../support/model/memory-file-system.js';

/** What memory is used for one file: fuzzed requests ask for terabytes. */
const FILE_BYTES_MAX = 16 * 1024 * 1024;

type Method = 'getattr' | 'setattr' | 'read' | 'write' | 'flush' | 'statfs' | 'rename';

export class ScriptedFileSystem extends MemoryFileSystem {
  mode: OpenMode = 'direct';
  seekAnswer: number | 'past-the-end' = 0;
  readonly fallocations: unknown[] = [];
  readonly seeks: unknown[] = [];
  readonly changes: AttributeChanges[] = [];
  readonly openFlags: number[] = [];
  readonly released: number[] = [];
  readonly #failures = new Map<Method, Error>();
  #held: Promise<void> | null = null;

  /** The next call of `method` throws, or rejects. */
  failNext(method: Method, thrown: Error): void {
    this.#failures.set(method, thrown);
  }

  /** Flushes wait until the function that is returned is called. */
  holdFlushes(): () => void {
    let release: () => void = () => undefined;
    this.#held = new Promise((resolve) => { release = resolve; });
    return release;
  }

  override getattr(id: NodeId): Attributes {
    this.#failIfAsked('getattr');
    return super.getattr(id);
  }

  override setattr(id: NodeId, changes: AttributeChanges): Promise<Attributes> {
    this.changes.push(changes);
    return this.#failLater('setattr') ?? this.#tooLarge(changes.sizeBytes ?? 0) ?? super.setattr(id, changes);
  }

  override open(id: NodeId, flags: number): OpenResult {
    this.openFlags.push(flags);
    return { ...super.open(id, flags), mode: this.mode };
  }

  override release(handle: number): void {
    this.released.push(handle);
    super.release(handle);
  }

  override read(id: NodeId, offsetBytes: number, target: Uint8Array): number {
    this.#failIfAsked('read');
    return super.read(id, offsetBytes, target);
  }

  override write(id: NodeId, offsetBytes: number, data: Uint8Array): number {
    this.#failIfAsked('write');
    if (offsetBytes + data.byteLength > FILE_BYTES_MAX) throw new OffshootError('too-large', 'too large for this memory');
    return super.write(id, offsetBytes, data);
  }

  override rename(parent: NodeId, name: string, newParent: NodeId, newName: string, flags: RenameFlags): void {
    this.#failIfAsked('rename');
    if (!flags.exchange) {
      super.rename(parent, name, newParent, newName, flags);
      return;
    }
    const plain = { noReplace: true, exchange: false };
    super.rename(newParent, newName, newParent, 'exchange in progress', plain);
    super.rename(parent, name, newParent, newName, plain);
    super.rename(newParent, 'exchange in progress', parent, name, plain);
  }

  override fallocate(id: NodeId, mode: FallocateMode, offsetBytes = 0, lengthBytes = 0): null {
    this.fallocations.push([id, mode, offsetBytes, lengthBytes]);
    return null;
  }

  override seek(id: NodeId, offsetBytes: number, whence: 'data' | 'hole'): number {
    this.seeks.push([id, offsetBytes, whence]);
    if (this.seekAnswer === 'past-the-end') throw new OffshootError('invalid-argument', 'no data there', { enxio: true });
    return this.seekAnswer;
  }

  override flush(id: NodeId): Promise<void> {
    return this.#failLater('flush') ?? (this.#held ?? Promise.resolve()).then(() => super.flush(id));
  }

  override statfs(): typeof this.statistics {
    this.#failIfAsked('statfs');
    return super.statfs();
  }

  #tooLarge(sizeBytes: number): Promise<never> | null {
    return sizeBytes > FILE_BYTES_MAX ? Promise.reject(new OffshootError('too-large', 'too large for this memory')) : null;
  }

  #failIfAsked(method: Method): void {
    const failure = this.#takeFailure(method);
    if (failure !== undefined) throw failure;
  }

  #failLater(method: Method): Promise<never> | null {
    const failure = this.#takeFailure(method);
    return failure === undefined ? null : Promise.reject(failure);
  }

  #takeFailure(method: Method): Error | undefined {
    const failure = this.#failures.get(method);
    this.#failures.delete(method);
    return failure;
  }
}
