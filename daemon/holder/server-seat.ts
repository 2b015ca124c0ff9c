/**
 * A server process and whoever listens to it at present: as the spare, as an upgrade's candidate, or as the one that serves.
 *
 * A server on standby is loaded before it is needed and then takes over; what it says afterwards concerns somebody else. Messages of a
 * process that nobody listens to any more go nowhere, so that an older server is never taken for the newest one.
 */
import type { ServerEvents, ServerExit, ServerProcess } from './holder-ports.js';
import type { BuildIdentity, HolderMessage, ServerMessage } from './ipc.js';

export interface SeatListener {
  message(message: ServerMessage): void;
  gone(exit: ServerExit): void;
}

export class ServerSeat {
  readonly #process: ServerProcess;
  #listener: SeatListener;
  #identity: BuildIdentity | undefined;
  #exit: ServerExit | undefined;
  #whenGone: (() => void)[] = [];

  constructor(spawn: (events: ServerEvents) => ServerProcess, listener: SeatListener) {
    this.#listener = listener;
    this.#process = spawn({
      message: (message) => {
        if (message.type === 'hello') this.#identity = message.build;
        this.#listener.message(message);
      },
      gone: (exit) => {
        this.#exit = exit;
        this.#listener.gone(exit);
        for (const body of this.#whenGone) body();
        this.#whenGone = [];
      },
    });
  }

  get pid(): number { return this.#process.pid; }
  /** Undefined until it has said hello. */
  get identity(): BuildIdentity | undefined { return this.#identity; }
  get isGone(): boolean { return this.#exit !== undefined; }

  listen(listener: SeatListener): void {
    this.#listener = listener;
  }

  send(message: HolderMessage): void {
    this.#process.send(message);
  }

  kill(): void {
    this.#process.kill();
  }

  /** Killed, and not listened to any more; `then` when it is gone. */
  dismiss(then: () => void = () => undefined): void {
    this.#listener = { message: () => undefined, gone: () => undefined };
    if (this.#exit !== undefined) {
      then();
      return;
    }
    this.#whenGone.push(then);
    this.#process.kill();
  }
}
