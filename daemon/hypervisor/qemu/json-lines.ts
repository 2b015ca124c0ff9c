/**
 * One connection to a unix socket on which JSON objects come and go, one a line: what QMP and the guest agent have in common.
 *
 * What is at the other end is not believed: a guest speaks through its agent, and whoever owns a machine could put a socket of his own into
 * its directory. So lines and the number of those that nobody has read are bounded, everything has one deadline, and the process that
 * listens must be of the user whom the machine belongs to, as the kernel noted it: a link to another machine's socket leads nowhere.
 */
import { connect, type Socket } from 'node:net';

import { OffshootError } from '../../../blockstore/errors.js';
import { peerOf } from '../../control/peer-credentials.js';
import { cancelled, throwIfAborted } from '../../programs/child.js';

export interface SocketCall {
  readonly socketPath: string;
  /** Of the process that listens. */
  readonly ownerUid: number;
  /** For the connection and all that is said on it. */
  readonly timeoutMs: number;
  readonly signal: AbortSignal;
}

export interface JsonLines {
  send(message: object): void;
  sendBytes(bytes: Uint8Array): void;
  /** The next line, without its end. */
  next(): Promise<Buffer>;
}

export const LINE_BYTES_MAX = 1024 * 1024;
const LINES_WAITING_MAX = 1000;
const NEWLINE = 0x0a;

/** Connects, lets `talk` speak, and hangs up whatever comes of it. */
export async function withJsonLines<T>(call: SocketCall, talk: (lines: JsonLines) => Promise<T>): Promise<T> {
  throwIfAborted(call.signal);
  const socket = connect({ path: call.socketPath });
  const waiting: Buffer[] = [];
  let rest: Buffer[] = [];
  let restBytes = 0;
  let failure: OffshootError | null = null;
  let wake: (() => void) | null = null;

  const fail = (error: OffshootError): void => {
    failure ??= error;
    wake?.();
  };
  const onAbort = (): void => { fail(cancelled()); };
  const timer = setTimeout(() => {
    fail(new OffshootError('timed-out', `no answer on ${call.socketPath} within ${call.timeoutMs} ms`, { path: call.socketPath, timeoutMs: call.timeoutMs }));
  }, call.timeoutMs);
  call.signal.addEventListener('abort', onAbort);
  socket.on('error', (error) => { fail(connectionError(call.socketPath, error)); });
  socket.on('close', () => { fail(new OffshootError('io-error', `${call.socketPath}: the other side has hung up`, { path: call.socketPath })); });
  socket.on('data', (chunk: Buffer) => {
    let from = 0;
    for (let at = chunk.indexOf(NEWLINE); at >= 0; at = chunk.indexOf(NEWLINE, from)) {
      const line = Buffer.concat([...rest, chunk.subarray(from, at)]);
      rest = [];
      restBytes = 0;
      from = at + 1;
      if (line.length > 0) waiting.push(line);
    }
    rest.push(chunk.subarray(from));
    restBytes += chunk.length - from;
    if (restBytes > LINE_BYTES_MAX || waiting.length > LINES_WAITING_MAX) {
      fail(new OffshootError('too-large', `${call.socketPath}: more was said than is ever listened to`, { path: call.socketPath }));
      socket.destroy();
    }
    wake?.();
  });

  const event = async (): Promise<void> => {
    await new Promise<void>((resolve) => { wake = resolve; });
    wake = null;
  };
  const throwFailure = (): void => {
    if (failure !== null) throw failure;
  };

  try {
    socket.once('connect', () => wake?.());
    while (socket.connecting) {
      throwFailure();
      await event();
    }
    throwFailure();
    assertOwner(socket, call);
    return await talk({
      send: (message) => { socket.write(`${JSON.stringify(message)}\n`); },
      sendBytes: (bytes) => { socket.write(bytes); },
      async next() {
        for (;;) {
          const line = waiting.shift();
          if (line !== undefined) return line;
          throwFailure();
          await event();
        }
      },
    });
  } finally {
    clearTimeout(timer);
    call.signal.removeEventListener('abort', onAbort);
    socket.destroy();
  }
}

function assertOwner(socket: Socket, { socketPath, ownerUid }: SocketCall): void {
  const peer = peerOf(socket);
  if (peer?.uid === ownerUid) return;
  throw new OffshootError('not-permitted', `${socketPath}: the process that listens there is not of user ${ownerUid}, whom the machine belongs to`, { path: socketPath });
}

function connectionError(socketPath: string, error: NodeJS.ErrnoException): OffshootError {
  const gone = error.code === 'ENOENT' || error.code === 'ECONNREFUSED';
  return new OffshootError(gone ? 'not-found' : 'io-error', `${socketPath}: ${gone ? 'nobody listens there' : error.message}`, { path: socketPath }, error);
}
