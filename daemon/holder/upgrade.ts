/**
 * The upgrade, as the holder sees it: which build follows, whether it fits, and how it went.
 *
 *   1. the new build's server is started on standby; until it has said hello, nothing of the old one is disturbed
 *   2. it must fit: same holder protocol, store schema and run-time format. Otherwise it is dismissed and the upgrade refused
 *   3. the old server is told to hand over: it commits, closes, and ends. However it ends, the new one goes
 *   4. the new one is ready: done. It ends before that: the old build serves again, and the upgrade says so with the reason
 *
 * A crash of the old server in step 3 costs its successor a recovery and nothing else.
 */
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import type { UpgradeState } from './holder-state.js';
import { describeExit, type ServerExit } from './holder-ports.js';
import { HOLDER_PROTOCOL, type BuildIdentity, type ReportedError, type ServerMessage } from './ipc.js';
import type { ServerSeat } from './server-seat.js';

export interface UpgradePorts {
  /** Throws when the program may not be run as this daemon's server. */
  check(entry: string): void;
  spawn(entry: string, listener: { message(message: ServerMessage): void; gone(exit: ServerExit): void }): ServerSeat;
  schedule(delayMs: number, body: () => void): () => void;
  wallClock(): string;
  changed(): void;
}

/** A build that loads longer than this is not taken. */
const LOAD_MS_MAX = 30_000;
/** How long the old server may take to commit and close before it is killed: recovery then does the rest. */
const HAND_OVER_MS_MAX = 60_000;
/** How long the new one may take to be ready before the old build serves again. */
const READY_MS_MAX = 60_000;

export class Upgrade {
  readonly #ports: UpgradePorts;
  #lastId = 0;
  #candidate: ServerSeat | undefined;
  #entry = '';
  #cancel: () => void = () => undefined;
  #reason: ReportedError | null = null;
  #state: UpgradeState | null = null;

  constructor(ports: UpgradePorts) {
    this.#ports = ports;
  }

  get state(): UpgradeState | null { return this.#state; }
  get isUnderWay(): boolean { return this.#candidate !== undefined; }
  get entry(): string { return this.#entry; }

  /** Steps 1 to 3. Resolves with the upgrade's number once the old server has been told to hand over. */
  async begin(old: ServerSeat, entry: string): Promise<number> {
    if (this.isUnderWay) throw new OffshootError('busy', 'an upgrade is under way already: look at offshoot daemon status');
    const from = old.identity;
    if (from === undefined) throw new OffshootError('busy', 'the server that serves has not said which build it is: try again');
    this.#ports.check(entry);
    const to = await this.#load(entry);
    const misfit = misfitOf(from, to);
    if (misfit !== null || old.isGone) {
      this.dismiss();
      throw new OffshootError('not-supported', misfit ?? 'the server ended while the new build was loaded: try again');
    }
    this.#lastId += 1;
    this.#entry = entry;
    this.#reason = null;
    this.#state = {
      id: this.#lastId, state: 'running', fromVersion: from.version, toVersion: to.version, fromServerPid: old.pid, serverPid: null, stallMs: null,
      error: null, at: this.#ports.wallClock(),
    };
    this.#ports.changed();
    this.#cancel = this.#ports.schedule(HAND_OVER_MS_MAX, () => { old.kill(); });
    return this.#lastId;
  }

  async #load(entry: string): Promise<BuildIdentity> {
    return await new Promise((resolve, reject) => {
      let said: ReportedError | null = null;
      const refuse = (error: OffshootError): void => {
        this.dismiss();
        reject(error);
      };
      const seat = this.#ports.spawn(entry, {
        message: (message) => {
          if (message.type === 'failed') said = message.error;
          if (message.type !== 'hello') return;
          this.#cancel();
          resolve(message.build);
        },
        gone: (exit) => {
          refuse(new OffshootError(said?.kind ?? 'not-supported', `the new build does not start: ${said?.message ?? `its server ${describeExit(exit)}`}. Nothing was changed`));
        },
      });
      this.#candidate = seat;
      this.#cancel = this.#ports.schedule(LOAD_MS_MAX, () => {
        refuse(new OffshootError('timed-out', `the new build was not loaded within ${LOAD_MS_MAX} ms. Nothing was changed`));
      });
    });
  }

  /** Step 4 begins: the old server is gone. The candidate is the caller's to listen to; `tooLate` when it takes too long. */
  take(tooLate: () => void): ServerSeat | undefined {
    this.#cancel();
    if (this.#state?.state === 'running') this.#cancel = this.#ports.schedule(READY_MS_MAX, tooLate);
    else this.dismiss();
    return this.#candidate;
  }

  failed(error: ReportedError): void {
    this.#reason ??= error;
  }

  /** The candidate ended before it was ready. */
  rolledBack(exit: ServerExit): ReportedError {
    this.#cancel();
    this.#candidate = undefined;
    const error = this.#reason ?? { kind: 'internal' as const, message: `its server ${describeExit(exit)} before it was ready` };
    if (this.#state !== null) this.#state = { ...this.#state, state: 'rolled-back', error };
    return error;
  }

  done(serverPid: number, stallMs: number | null): void {
    this.#cancel();
    this.#candidate = undefined;
    if (this.#state !== null) this.#state = { ...this.#state, state: 'done', serverPid, stallMs };
  }

  /** After a roll-back: who serves since, and what guests waited in all. */
  settled(serverPid: number, stallMs: number | null): void {
    if (this.#state?.state === 'rolled-back' && this.#state.serverPid === null) this.#state = { ...this.#state, serverPid, stallMs };
  }

  dismiss(then: () => void = () => undefined): void {
    this.#cancel();
    const candidate = this.#candidate;
    this.#candidate = undefined;
    if (candidate === undefined) then();
    else candidate.dismiss(then);
  }
}

/** Why the one build cannot follow the other; null when it can. */
export function misfitOf(from: BuildIdentity, to: BuildIdentity): string | null {
  const differences = [
    ...(to.holderProtocol === HOLDER_PROTOCOL ? [] : [`the holder speaks protocol ${HOLDER_PROTOCOL}, the new build ${to.holderProtocol}`]),
    ...(to.storeSchema === from.storeSchema ? [] : [`the store has schema ${from.storeSchema}, the new build makes it ${to.storeSchema}`]),
    ...(to.runtimeFormat === from.runtimeFormat ? [] : [`the run-time state has format ${from.runtimeFormat}, the new build reads ${to.runtimeFormat}`]),
  ];
  if (differences.length === 0) return null;
  return `offshoot ${to.version} cannot follow ${from.version} under a mount in use: ${differences.join('; ')}. ` +
    `Nothing was changed. Shut the guests down or migrate them, then 'offshoot daemon stop', and start the new build`;
}

export function reported(thrown: unknown): ReportedError {
  const { kind, message } = toOffshootError(thrown);
  return { kind, message };
}
