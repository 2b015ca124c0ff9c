/**
 * The QEMU guest agent over the unix socket of its virtio-serial port: one command, one answer.
 *
 * The port keeps what was said before, by an earlier client or by an agent that has died since. So each connection begins with the byte
 * that the agent's parser drops everything at, then `guest-sync-delimited` with a number of its own, and drops every line up to that answer.
 * An agent that does not run says nothing: the time-out is the answer.
 */
import { randomInt } from 'node:crypto';

import { OffshootError } from '../../../blockstore/errors.js';
import { withJsonLines, type JsonLines, type SocketCall } from './json-lines.js';

/** Not UTF-8, so never part of a message; the agent puts it before its answer to the synchronisation. */
const DELIMITER = 0xff;
const SYNC_ID_MAX = 2 ** 31;

export async function askGuestAgent(call: SocketCall, command: string, parameters?: object): Promise<unknown> {
  return await withJsonLines(call, async (lines) => {
    const id = randomInt(1, SYNC_ID_MAX);
    lines.sendBytes(Buffer.from([DELIMITER]));
    lines.send({ execute: 'guest-sync-delimited', arguments: { id } });
    while ((await nextAnswer(lines))?.['return'] !== id);
    lines.send({ execute: command, ...(parameters === undefined ? {} : { arguments: parameters }) });
    for (;;) {
      const answer = await nextAnswer(lines);
      if (answer === null) continue;
      if ('error' in answer) throw refusal(command, answer['error']);
      return answer['return'];
    }
  });
}

/** Null for a line that is none: the end of one that an earlier client did not read, say. */
async function nextAnswer(lines: JsonLines): Promise<Readonly<Record<string, unknown>> | null> {
  const line = await lines.next();
  try {
    const value: unknown = JSON.parse(line.subarray(line.lastIndexOf(DELIMITER) + 1).toString());
    return typeof value === 'object' && value !== null ? value as Readonly<Record<string, unknown>> : null;
  } catch {
    return null;
  }
}

function refusal(command: string, error: unknown): OffshootError {
  const { class: errorClass, desc } = (typeof error === 'object' && error !== null ? error : {}) as { readonly class?: unknown; readonly desc?: unknown };
  return new OffshootError(errorClass === 'CommandNotFound' ? 'not-supported' : 'io-error', `the guest agent refused ${command}: ${String(desc)}`, { command });
}
