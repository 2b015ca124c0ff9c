/**
 * Takes away what a crash left, once, when a server has begun to serve: files that no layer refers to, and the like.
 *
 * Main thread, in short steps: guests that waited for this server are answered first, and all the time. What is a leak, and
 * why nothing under way can be mistaken for one, is said in `blockstore/check.ts`. Corruption that is seen on the way is
 * said in the log, and left for `offshoot check`.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';

import { toOffshootError } from '../../blockstore/errors.js';
import type { Store } from '../../blockstore/store.js';
import type { JobLogger } from './fills.js';
import { inSteps } from './steps.js';

export interface LeftoverOptions {
  readonly store: Store;
  readonly logger: JobLogger & { error(context: object, message: string): void };
  readonly onFatal: (error: Error) => void;
  readonly isNodeInUse: (nodeId: number) => boolean;
  /** Nodes that have neither a name nor a user any more, and how they go. */
  readonly orphans: () => readonly number[];
  readonly discard: (nodeIds: readonly number[]) => void;
}

export class LeftoverCollector {
  readonly #options: LeftoverOptions;
  #closing = false;
  #ended: Promise<void> = Promise.resolve();

  constructor(options: LeftoverOptions) {
    this.#options = options;
  }

  run(): void {
    this.#ended = this.#collect().catch((error: unknown) => {
      this.#options.onFatal(error instanceof Error ? error : new Error(String(error)));
    });
  }

  async close(): Promise<void> {
    this.#closing = true;
    await this.#ended;
  }

  async #collect(): Promise<void> {
    const { store, logger, isNodeInUse } = this.#options;
    try {
      await inSteps(this.#options.orphans(), this.#options.discard, () => !this.#closing);
      const steps = store.checkSteps({ database: false, repair: true, isNodeInUse });
      for (let step = steps.next(); !this.#closing; step = steps.next()) {
        if (step.done === true) {
          const { findings } = step.value;
          for (const finding of findings) {
            const { kind, message } = finding;
            if (finding.repaired === true) logger.info({ kind }, `taken away: ${message}`);
            else if (finding.severity === 'leak') logger.warn({ kind }, message);
            else logger.error({ kind, disks: finding.disks }, message);
          }
          return;
        }
        await nextTurn();
      }
    } catch (thrown) {
      // The metadata cannot be read or changed just now, which others say more loudly; the next server tries again.
      const error = toOffshootError(thrown);
      if (error.kind === 'internal') throw thrown;
      logger.warn({ reason: error.message }, 'what a crash may have left was not looked for');
    }
  }
}
