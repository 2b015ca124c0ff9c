/**
 * The main thread's side of the notifier: tells the kernel to forget what it knows of a node, through a thread of its own.
 *
 * Used for what changes behind the kernel's back, through the control API: a size, a mode, a removal. The kernel then asks
 * again before it uses the node; a node that is gone is ESTALE (see Operation.absent), which makes it ask for the name
 * again as well; and a changed time or size makes it drop pages that it cached. The write waits for nothing, and nothing
 * that could wait is offered (see notify.ts); the thread keeps the rule whole that who answers requests never notifies.
 * What is posted is written in order. Nothing is posted once the server is stopping.
 */
import { Worker } from 'node:worker_threads';
import type { NodeId } from '../../filesystem/types.js';
import { invalidateAttributesMessage } from './notify.js';

export interface NotifierOptions {
  /** /dev/fuse, as inherited from the holder. */
  readonly descriptor: number;
  /** Crash-only: a thread that ends, or a write that fails as it may not, ends the server. */
  readonly onFatal: (error: Error) => void;
  /** Where the thread's code lies; only tests, which run from sources, say it. */
  readonly threadUrl?: URL;
}

export class Notifier {
  readonly #options: NotifierOptions;
  #worker: Worker | null = null;
  #ended: Promise<void> = Promise.resolve();
  #isClosing = false;
  /** Called in the order of what was posted. */
  readonly #waiting: (() => void)[] = [];

  constructor(options: NotifierOptions) {
    this.#options = options;
  }

  /** Starts the thread, if the first notice has not done that: a start of the daemon does not wait for a thread that guests do not need. */
  prepare(): void {
    if (!this.#isClosing) this.#thread();
  }

  /**
   * After a change that the kernel did not ask for, when it is committed. Resolves when the kernel has been told, so that whoever
   * is answered then sees the change under the mount at once. A node that it does not know is no error.
   */
  async invalidateAttributes(nodeId: NodeId): Promise<void> {
    if (this.#isClosing) return;
    await new Promise<void>((resolve) => {
      this.#waiting.push(resolve);
      this.#thread().postMessage(invalidateAttributesMessage(nodeId));
    });
  }

  /** Ends the thread when what was posted is written. */
  async close(): Promise<void> {
    this.#isClosing = true;
    this.#worker?.postMessage(null);
    await this.#ended;
  }

  #thread(): Worker {
    if (this.#worker !== null) return this.#worker;
    const { descriptor, onFatal, threadUrl } = this.#options;
    const worker = new Worker(threadUrl ?? new URL('./notifier-thread.js', import.meta.url), { name: 'notifier', workerData: { descriptor } });
    worker.on('message', () => { this.#waiting.shift()?.(); });
    worker.on('error', (thrown) => { onFatal(thrown instanceof Error ? thrown : new Error(String(thrown))); });
    this.#ended = new Promise((resolve) => {
      worker.on('exit', (code) => {
        if (!this.#isClosing) onFatal(new Error(`the notifier's thread ended with code ${code}`));
        for (const written of this.#waiting.splice(0)) written();
        resolve();
      });
    });
    this.#worker = worker;
    return worker;
  }
}
