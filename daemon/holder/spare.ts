/**
 * The warm spare: the next server, loaded before it is needed.
 *
 * Most of a restart's time is Node.js starting and modules loading (README, "The stall"). So while a server serves, a next one waits on standby:
 * it has inherited the descriptors and loaded everything, and touches neither store nor mount before it is told to go. It is started only
 * when the server before has served for a moment, so that loading it does not compete with guests who have just been kept waiting. A kill
 * that comes before the spare is warm costs what it costs without one: the spare goes on loading, and then goes.
 */
import type { ServerSeat } from './server-seat.js';
import type { HolderLog } from './holder-log.js';

export interface SparePorts {
  readonly log: HolderLog;
  schedule(delayMs: number, body: () => void): () => void;
  /** Starts one on standby. */
  spawn(listener: { message(): void; gone(): void }): ServerSeat;
  changed(): void;
}

const AFTER_READY_MS = 1_000;
/** A spare that ended by itself is no emergency, but something is wrong. */
const RETRY_MS = 30_000;

export class Spare {
  readonly #ports: SparePorts;
  #seat: ServerSeat | undefined;
  #cancel: () => void = () => undefined;

  constructor(ports: SparePorts) {
    this.#ports = ports;
  }

  get pid(): number | null {
    return this.#seat?.identity === undefined ? null : this.#seat.pid;
  }

  /** A server is ready: see to it that there is a next one soon. */
  plan(delayMs = AFTER_READY_MS): void {
    this.#cancel();
    if (this.#seat !== undefined) return;
    this.#cancel = this.#ports.schedule(delayMs, () => { this.#start(); });
  }

  /** Gives the spare away, warm or nearly; undefined when there is none. */
  take(): ServerSeat | undefined {
    this.#cancel();
    const seat = this.#seat;
    this.#seat = undefined;
    return seat;
  }

  #start(): void {
    const seat = this.#ports.spawn({
      message: () => { this.#ports.changed(); },
      gone: () => {
        this.#seat = undefined;
        this.#ports.log('warn', 'the spare server ended by itself; another is tried later', { sparePid: seat.pid });
        this.#ports.changed();
        this.plan(RETRY_MS);
      },
    });
    this.#seat = seat;
  }
}
