/**
 * The QEMU machine protocol, as much of it as starting and stopping needs: a greeting, the negotiation of capabilities, commands with ids,
 * events in between.
 *
 * QEMU serves one client of a monitor at a time, and lets others wait: a connection is made for a command or two and closed again, so that
 * an administrator's own client only waits for a moment. There is no maintained library for Node.js (`qemu-qmp` is of 2013).
 */
import { OffshootError } from '../../../blockstore/errors.js';
import { withJsonLines, type JsonLines, type SocketCall } from './json-lines.js';

export interface Qmp {
  /** Throws what QEMU says when it refuses. */
  execute(command: string, parameters?: object): Promise<unknown>;
  /** The next event of that name, of those that came since the connection was made. */
  waitForEvent(name: string): Promise<void>;
}

const EVENTS_KEPT_MAX = 1000;

export async function withQmp<T>(call: SocketCall, talk: (qmp: Qmp) => Promise<T>): Promise<T> {
  return await withJsonLines(call, async (lines) => {
    const greeting = await nextMessage(lines, call.socketPath);
    if (!('QMP' in greeting)) throw new OffshootError('io-error', `${call.socketPath} is not a QEMU monitor: it does not greet as one`, { path: call.socketPath });
    const events: string[] = [];
    let commands = 0;

    const noteEvent = (message: Message): boolean => {
      if (typeof message['event'] !== 'string') return false;
      if (events.length < EVENTS_KEPT_MAX) events.push(message['event']);
      return true;
    };
    const execute = async (command: string, parameters?: object): Promise<unknown> => {
      commands += 1;
      const id = `offshoot-${commands}`;
      lines.send({ execute: command, id, ...(parameters === undefined ? {} : { arguments: parameters }) });
      for (;;) {
        const message = await nextMessage(lines, call.socketPath);
        if (noteEvent(message) || message['id'] !== id) continue;
        if ('error' in message) throw refusal(command, message['error']);
        return message['return'];
      }
    };
    await execute('qmp_capabilities');
    return await talk({
      execute,
      async waitForEvent(name) {
        for (;;) {
          const at = events.indexOf(name);
          if (at >= 0) {
            events.splice(at, 1);
            return;
          }
          noteEvent(await nextMessage(lines, call.socketPath));
        }
      },
    });
  });
}

type Message = Readonly<Record<string, unknown>>;

async function nextMessage(lines: JsonLines, socketPath: string): Promise<Message> {
  const text = (await lines.next()).toString();
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Message;
  } catch {
    // Said below, as for a number or a list.
  }
  throw new OffshootError('io-error', `${socketPath}: not a message of QEMU: ${text.slice(0, 200)}`, { path: socketPath });
}

function refusal(command: string, error: unknown): OffshootError {
  const { class: errorClass, desc } = (typeof error === 'object' && error !== null ? error : {}) as { readonly class?: unknown; readonly desc?: unknown };
  return new OffshootError(errorClass === 'CommandNotFound' ? 'not-supported' : 'io-error', `QEMU refused ${command}: ${String(desc)}`, { command });
}
