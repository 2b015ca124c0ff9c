/**
 * The QEMU machine protocol: JSON objects, one a line, over a unix socket; answers to commands, and events in between.
 */
import { connect, type Socket } from 'node:net';
import { createInterface } from 'node:readline';

import { waitUntil } from './processes.js';

export interface QmpEvent {
  readonly event: string;
  readonly data?: Readonly<Record<string, unknown>>;
}

export interface Qmp {
  /** Everything that happened since the connection was made. */
  readonly events: readonly QmpEvent[];
  execute<T = unknown>(command: string, parameters?: object): Promise<T>;
  /** The `count`th event of that name. */
  waitForEvent(name: string, timeoutMs: number, count?: number): Promise<QmpEvent>;
  close(): void;
}

const ANSWER_TIMEOUT_MS = 20_000;

interface Line {
  readonly QMP?: unknown;
  readonly event?: string;
  readonly data?: Readonly<Record<string, unknown>>;
  readonly return?: unknown;
  readonly error?: { readonly desc: string };
}

export async function connectQmp(path: string): Promise<Qmp> {
  const socket = await new Promise<Socket>((resolve, reject) => {
    const made = connect({ path }, () => { resolve(made); });
    made.once('error', reject);
  });
  const events: QmpEvent[] = [];
  const answers: Line[] = [];
  socket.on('error', () => undefined);
  createInterface({ input: socket }).on('line', (text) => {
    const line = JSON.parse(text) as Line;
    if (line.event !== undefined) events.push({ event: line.event, ...(line.data === undefined ? {} : { data: line.data }) });
    else if (line.QMP === undefined) answers.push(line);
  });
  const execute = async <T>(command: string, parameters: object = {}): Promise<T> => {
    socket.write(`${JSON.stringify({ execute: command, arguments: parameters })}\n`);
    if (!(await waitUntil(() => answers.length > 0, ANSWER_TIMEOUT_MS))) throw new Error(`QEMU did not answer ${command} within ${ANSWER_TIMEOUT_MS} ms`);
    const answer = answers.shift();
    if (answer?.error !== undefined) throw new Error(`${command}: ${answer.error.desc}`);
    return answer?.return as T;
  };
  await execute('qmp_capabilities');
  return {
    events,
    execute,
    async waitForEvent(name, timeoutMs, count = 1) {
      const found = (): QmpEvent | undefined => events.filter(({ event }) => event === name)[count - 1];
      await waitUntil(() => found() !== undefined, timeoutMs);
      const event = found();
      if (event === undefined) throw new Error(`no event ${name} within ${timeoutMs} ms; there were ${events.map((each) => each.event).join(', ')}`);
      return event;
    },
    close: () => { socket.destroy(); },
  };
}
