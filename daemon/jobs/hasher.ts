/**
 * The main thread's end of a hash worker: one chunk after another, as promises.
 *
 * A worker that dies is a fault of the program: whatever waits for it fails with that error, which its owner passes on.
 */
import { Worker } from 'node:worker_threads';

import type { LayerChunk } from '../../blockstore/checksum-units.js';
import { OffshootError } from '../../blockstore/errors.js';
import type { SharedStateHandles } from '../../blockstore/hot/shared-state.js';
import type { HashOrder, HashReport, HashWorkerData } from './hash-messages.js';

export type HashedChunk = Extract<HashReport, { type: 'done' }>;

export class Hasher {
  readonly #shared: SharedStateHandles | null;
  #worker: Worker | null = null;
  readonly #waiting = new Map<number, { readonly resolve: (chunk: HashedChunk) => void; readonly reject: (error: Error) => void }>();
  #nextTicket = 1;
  #ended: Error | null = null;

  /** `shared`: of the store that serves guests; null when nobody is served. */
  constructor(shared: SharedStateHandles | null) {
    this.#shared = shared;
  }

  /** Starts the thread, if the first chunk has not done that: a start of the daemon does not wait for a thread that guests do not need. */
  prepare(): void {
    if (this.#ended === null) this.#thread();
  }

  /** `io-error` when the file cannot be opened or written back. */
  async run(order: Omit<HashOrder, 'ticket'>): Promise<HashedChunk> {
    if (this.#ended !== null) throw this.#ended;
    const ticket = this.#nextTicket;
    this.#nextTicket += 1;
    return await new Promise<HashedChunk>((resolve, reject) => {
      this.#waiting.set(ticket, { resolve, reject });
      this.#thread().postMessage({ ...order, ticket } satisfies HashOrder);
    });
  }

  /** Hashes of a chunk. */
  async hash(chunk: LayerChunk, options: { readonly fromDisk: boolean; readonly rateBytesPerSecond: number }): Promise<HashedChunk> {
    return await this.run({ type: 'hash', chunk, ...options });
  }

  /** Ends at once; what was under way is `cancelled`. */
  async close(): Promise<void> {
    this.#end(new OffshootError('cancelled', 'the check was ended'));
    await this.#worker?.terminate();
  }

  #thread(): Worker {
    if (this.#worker !== null) return this.#worker;
    const worker = new Worker(new URL('./hash-worker.js', import.meta.url), { name: 'hash', workerData: { shared: this.#shared } satisfies HashWorkerData });
    worker.on('message', (report: HashReport) => { this.#take(report); });
    worker.on('error', (error: unknown) => { this.#end(error instanceof Error ? error : new Error(String(error))); });
    worker.on('exit', (code) => { this.#end(new Error(`the hash worker ended with code ${code}`)); });
    // Whoever waits for a chunk keeps the process alive by other means.
    worker.unref();
    this.#worker = worker;
    return worker;
  }

  #take(report: HashReport): void {
    const waiting = this.#waiting.get(report.ticket);
    if (waiting === undefined) return;
    this.#waiting.delete(report.ticket);
    if (report.type === 'done') waiting.resolve(report);
    else waiting.reject(new OffshootError('io-error', `${report.what} failed with errno ${report.errno}`, { errno: report.errno }));
  }

  #end(error: Error): void {
    this.#ended ??= error;
    for (const { reject } of this.#waiting.values()) reject(this.#ended);
    this.#waiting.clear();
  }
}
