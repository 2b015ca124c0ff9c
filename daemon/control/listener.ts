/**
 * The control sockets, listening before there is anything that could answer: one for administrators, mode 0600, or 0660 with a group;
 * and, when there is a group that may only look, a second one for that.
 *
 * Runs on the main thread of the server process. What answers (`server.ts`) takes longer to load than all else that a start waits for, so a
 * start does not wait for it: from the moment that this listens, a command can connect and ask, and its request is held, unread, until `serve`.
 * Who may do what is decided for each connection by what the kernel says of its maker (`access.ts`); the sockets' modes keep the rest
 * out, so that nobody else can use up the connections.
 */
import { statSync } from 'node:fs';
import { createServer as createHttpServer, type IncomingMessage, type Server as HttpServer, type ServerResponse } from 'node:http';
import { createServer, type Server, type Socket } from 'node:net';
import { dirname } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { Callers, type Caller } from './access.js';
import { CONNECTIONS_MAX, HEADER_BYTES_MAX, REQUEST_TIMEOUT_MS } from './limits.js';
import { DEFAULT_POLICY, type DaemonPolicy } from './policy.js';
import { claimSocketPath, readOnlySocketPath } from './socket-path.js';

export interface ListenerOptions {
  /** Absolute. */
  readonly socketPath: string;
  readonly logger: { info(fields: object, message: string): void; warn(fields: object, message: string): void };
  /** The groups that may use it; left out: root alone. */
  readonly policy?: DaemonPolicy;
  /** For tests; see `limits.ts`. */
  readonly requestTimeoutMs?: number;
}

export type RequestHandler = (request: IncomingMessage, response: ServerResponse) => void;

export interface ControlListener {
  readonly socketPath: string;
  readonly server: HttpServer;
  readonly callerOf: (socket: Socket) => Caller;
  /** From now on requests go to `handler`, those first that have waited. */
  serve(handler: RequestHandler): void;
  /** No new connections; resolves when the calls that are being answered have ended, or have taken too long. */
  withdraw(): Promise<void>;
  /** Ends every connection. */
  close(): Promise<void>;
}

/** How often connections are looked at whose requests take too long. */
const SLOW_CHECK_MS_MAX = 5000;
/** A connection on which nothing is asked is kept this long: as fastify does it. */
const KEEP_ALIVE_MS = 72_000;
/** How long `withdraw` waits for calls that are being answered, the one to stop among them. */
const CLOSE_GRACE_MS = 2000;
const CLOSE_POLL_MS = 5;

export async function listenForControl(options: ListenerOptions): Promise<ControlListener> {
  const { adminGid, readOnlyGid } = options.policy ?? DEFAULT_POLICY;
  const place = await claimSocketPath(options.socketPath, adminGid);
  const readOnlyPlace = readOnlyGid === null ? null : await claimSocketPath(readOnlySocketPath(options.socketPath), readOnlyGid);
  const callers = new Callers({ adminGid, readOnlyGid });
  const timeoutMs = options.requestTimeoutMs ?? REQUEST_TIMEOUT_MS;
  let callsInFlight = 0;
  let handler: RequestHandler | null = null;
  const waiting: (readonly [IncomingMessage, ServerResponse])[] = [];
  const server = createHttpServer({
    maxHeaderSize: HEADER_BYTES_MAX, headersTimeout: timeoutMs, requestTimeout: timeoutMs, keepAliveTimeout: KEEP_ALIVE_MS,
    connectionsCheckingInterval: Math.min(SLOW_CHECK_MS_MAX, timeoutMs),
  }, (request, response) => {
    callsInFlight += 1;
    response.once('close', () => { callsInFlight -= 1; });
    if (handler === null) waiting.push([request, response]);
    else handler(request, response);
  });
  server.maxConnections = CONNECTIONS_MAX;
  // What comes by the second socket is handed to the one HTTP server, as its documentation has it; the mark tells them apart.
  const byReadOnly = new WeakSet<Socket>();
  server.prependListener('connection', (socket: Socket) => {
    callers.admit(socket, byReadOnly.has(socket) ? 'read-only' : 'admin');
  });
  const readOnlyServer = readOnlyPlace === null ? null : createServer({ allowHalfOpen: true }, (socket) => {
    byReadOnly.add(socket);
    server.emit('connection', socket);
  });
  try {
    await listen(server, place.bindPath);
    place.publish();
    if (readOnlyServer !== null && readOnlyPlace !== null) {
      readOnlyServer.maxConnections = CONNECTIONS_MAX;
      await listen(readOnlyServer, readOnlyPlace.bindPath);
      readOnlyPlace.publish();
    }
  } catch (error) {
    place.withdraw();
    readOnlyServer?.close();
    server.close();
    throw error;
  }
  options.logger.info({ socketPath: options.socketPath, adminGid, readOnlyGid }, 'control API listens');
  warnOfClosedDirectory(options, [adminGid, readOnlyGid]);
  return {
    socketPath: options.socketPath,
    server,
    callerOf: (socket) => callers.of(socket),
    serve: (given) => {
      handler = given;
      for (const [request, response] of waiting.splice(0)) given(request, response);
    },
    withdraw: async () => {
      place.withdraw();
      readOnlyPlace?.withdraw();
      readOnlyServer?.close();
      const deadline = performance.now() + CLOSE_GRACE_MS;
      while (callsInFlight > 0 && performance.now() < deadline) await delay(CLOSE_POLL_MS);
    },
    close: async () => {
      const closed = new Promise<void>((resolve) => { server.close(() => { resolve(); }); });
      server.closeAllConnections();
      await closed;
    },
  };
}

async function listen(server: Server, path: string): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen({ path }, () => {
      server.off('error', reject);
      resolve();
    });
  });
}

/** A group that was named and cannot get to its socket is a mistake, which would otherwise show as a refusal by the kernel. */
function warnOfClosedDirectory({ socketPath, logger }: ListenerOptions, gids: readonly (number | null)[]): void {
  const directory = dirname(socketPath);
  const { mode, gid: owner } = statSync(directory);
  for (const gid of gids) {
    if (gid === null || (mode & 0o001) !== 0 || ((mode & 0o010) !== 0 && owner === gid)) continue;
    logger.warn({ directory, gid }, 'the members of this group cannot reach the control socket: its directory does not let them pass (chmod o+x)');
  }
}
