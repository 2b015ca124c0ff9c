/**
 * Checks of the store that is being served: one at a time, asked for over the control API.
 *
 * Main thread. A check is not a job: nobody needs it after a restart, it is simply begun again. It ends with the server,
 * and whoever asks for it then is told so.
 */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { Store } from '../../blockstore/store.js';
import { runCheck, type CheckOutcome, type CheckPhase, type CheckRequest } from './check-run.js';
import type { JobLogger } from './fills.js';
import { Hasher } from './hasher.js';

export interface RunningCheck {
  readonly id: number;
  readonly target: string | null;
  readonly data: boolean;
  readonly repair: boolean;
  readonly startedAt: Date;
  endedAt: Date | null;
  state: 'running' | 'completed' | 'cancelled' | 'failed';
  phase: CheckPhase;
  doneBytes: number;
  totalBytes: number;
  outcome: CheckOutcome | null;
  error: OffshootError | null;
}

export interface ChecksOptions {
  readonly store: Store;
  readonly storeDir: string;
  readonly logger: JobLogger;
  readonly onFatal: (error: Error) => void;
  readonly isNodeInUse: (nodeId: number) => boolean;
}

const CHECK_PROGRAM = fileURLToPath(new URL('../check/main.js', import.meta.url));
const OUTPUT_BYTES_MAX = 1024 * 1024;

export class Checks {
  readonly #options: ChecksOptions;
  #latest: { readonly check: RunningCheck; readonly abort: AbortController; readonly ended: Promise<void> } | null = null;
  // Not 1: a client that asks a newer server for an older one's check must not get another's.
  #nextId = Math.floor(Date.now() / 1000);

  constructor(options: ChecksOptions) {
    this.#options = options;
  }

  /** Begins a check; `busy` while another one runs. */
  start(request: CheckRequest, target: string | null): RunningCheck {
    if (this.#latest?.check.state === 'running') throw new OffshootError('busy', 'another check is running: wait for it, or end it with Ctrl-C where it was started');
    const abort = new AbortController();
    const check: RunningCheck = {
      id: this.#nextId, target, data: request.data, repair: request.repair, startedAt: new Date(), endedAt: null, state: 'running', phase: 'database',
      doneBytes: 0, totalBytes: 0, outcome: null, error: null,
    };
    this.#nextId += 1;
    const ended = this.#run(check, request, abort.signal).catch((error: unknown) => {
      this.#options.onFatal(error instanceof Error ? error : new Error(String(error)));
    });
    this.#latest = { check, abort, ended };
    return check;
  }

  /** `not-found` when this server never began it, or has begun another one since. */
  find(id: number): RunningCheck {
    const check = this.#latest?.check;
    if (check?.id !== id) throw new OffshootError('not-found', 'that check is gone: the server was restarted, or another check was begun; start it again', { checkId: id });
    return check;
  }

  /** Resolves when nothing of it is left running. */
  async cancel(id: number): Promise<RunningCheck> {
    const check = this.find(id);
    await this.close();
    return check;
  }

  async close(): Promise<void> {
    this.#latest?.abort.abort();
    await this.#latest?.ended;
  }

  async #run(check: RunningCheck, request: CheckRequest, signal: AbortSignal): Promise<void> {
    const { store, storeDir, isNodeInUse, logger } = this.#options;
    try {
      check.outcome = await runCheck({
        meta: store.meta, files: store.files, disks: store.disks, isNodeInUse,
        databaseProblems: async () => databaseProblems(storeDir, signal),
        makeHasher: () => new Hasher(store.context.shared.handles),
        lift: {
          prepare: async (nodeId) => { await store.prepareToLift(nodeId); },
          clear: (nodeId) => {
            store.clearFault(nodeId);
            logger.warn({ disk: store.meta.nodes.pathOf(nodeId) }, 'the fault of the disk was lifted: what was acknowledged since its last completed flush is not promised');
          },
        },
      }, request, {
        signal,
        progress: (phase, doneBytes, totalBytes) => { Object.assign(check, { phase, doneBytes, totalBytes }); },
      });
      check.state = 'completed';
      const { verdict, findings, faulted } = check.outcome;
      logger.info({ verdict, findings: findings.length, faulted: faulted.length }, 'check completed');
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (signal.aborted) check.state = 'cancelled';
      else if (error.kind === 'internal') throw thrown;
      else {
        check.state = 'failed';
        check.error = error;
        logger.warn({ reason: error.message }, 'a check could not be completed');
      }
    } finally {
      check.endedAt = new Date();
    }
  }
}

/** In a process of its own, because SQLite's check cannot be cut into steps, and this thread answers guests. */
async function databaseProblems(storeDir: string, signal: AbortSignal): Promise<readonly string[]> {
  let stdout: string;
  try {
    ({ stdout } = await promisify(execFile)(process.execPath, [CHECK_PROGRAM, JSON.stringify({ mode: 'database', storeDir })], {
      signal, maxBuffer: OUTPUT_BYTES_MAX, cwd: '/',
    }));
  } catch (thrown) {
    signal.throwIfAborted();
    throw new OffshootError('io-error', `the database could not be checked: ${(thrown as Error).message}`, {}, thrown);
  }
  return (JSON.parse(stdout) as { readonly problems: readonly string[] }).problems;
}
