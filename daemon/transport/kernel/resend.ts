/**
 * RESEND, exactly once, before any thread reads: the one moment at which it is right.
 *
 * Sent later it would bring back requests that this very server is working on: each would be done twice at the same time, and the answer to
 * its old number refused by the kernel. So a RESEND at any other moment is a programmer's error, and ends the server.
 */
import { resendMessage } from './notify.js';

export class Resend {
  #isOver = false;

  /** The threads that read are about to start. */
  readersStart(): void {
    this.#isOver = true;
  }

  send(write: (message: Uint8Array) => void): void {
    if (this.#isOver) throw new Error('RESEND is sent once, before any thread reads: sent now, it would bring back requests that are being answered');
    this.#isOver = true;
    write(resendMessage());
  }
}
