/** What a hostile client of the control socket does: bytes, half requests, requests with anything in them. */
import { request } from 'node:http';
import { connect, type Socket } from 'node:net';

export interface HttpQuestion {
  readonly method: string;
  readonly path: string;
  readonly contentType: string;
  readonly body: string;
}

/** How long an answer may take; longer than anything on a busy machine. */
const ANSWER_MS_MAX = 60_000;
const LINGER_MS = 20;
/** Errors of the world, which are no fault of the server's. */
const WORLDLY_KINDS: readonly unknown[] = ['faulted', 'io-error', 'source-unreachable', 'tool-missing', 'no-space'];

function open(socketPath: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(socketPath, () => { resolve(socket); });
    socket.once('error', reject);
  });
}

/** Sends bytes, then ends in some way. What comes back must be HTTP, or nothing. */
export async function sendRaw(socketPath: string, chunks: readonly Uint8Array[], end: 'half' | 'destroy' | 'leave'): Promise<void> {
  const socket = await open(socketPath);
  const answers: Buffer[] = [];
  socket.on('data', (chunk: Buffer) => answers.push(chunk));
  // The server may close while this end still writes.
  socket.on('error', () => undefined);
  const closed = new Promise((resolve) => { socket.once('close', resolve); });
  for (const chunk of chunks) socket.write(chunk);
  if (end === 'half') socket.end();
  if (end === 'destroy') socket.destroy();
  await Promise.race([closed, new Promise((resolve) => { setTimeout(resolve, LINGER_MS); })]);
  socket.destroy();
  const answer = Buffer.concat(answers);
  if (answer.length > 0 && !answer.toString('latin1').startsWith('HTTP/1.1 ')) throw new Error(`the server said ${answer.subarray(0, 100).toString('latin1')}`);
}

/** One whole request; its answer must be one of the API's. */
export async function askHttp(socketPath: string, { method, path, contentType, body }: HttpQuestion): Promise<void> {
  const answer = await new Promise<{ status: number; text: string } | null>((resolve, reject) => {
    const sent = request({
      socketPath, agent: false, method, path,
      headers: { ...(contentType === '' ? {} : { 'content-type': contentType }), 'content-length': Buffer.byteLength(body) },
    }, (response) => {
      const chunks: Buffer[] = [];
      response.on('data', (chunk: Buffer) => chunks.push(chunk));
      response.on('end', () => { resolve({ status: response.statusCode ?? 0, text: Buffer.concat(chunks).toString() }); });
      response.on('error', reject);
    });
    sent.setTimeout(ANSWER_MS_MAX, () => { sent.destroy(new Error(`no answer to ${method} ${path} within ${ANSWER_MS_MAX} ms`)); });
    sent.on('error', (error: NodeJS.ErrnoException) => {
      // A body that is too large may be refused before all of it was sent.
      if ((error.code === 'EPIPE' || error.code === 'ECONNRESET') && body.length > 1024 * 1024) resolve(null);
      else reject(error);
    });
    sent.end(body);
  });
  if (answer === null || method === 'HEAD') return;
  const { status, text } = answer;
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (thrown) {
    throw new Error(`the answer to ${method} ${path} is no JSON: ${text.slice(0, 200)}`, { cause: thrown });
  }
  if (status >= 200 && status < 300) return;
  const error = (parsed as { error?: { kind?: unknown; message?: unknown } }).error;
  if (typeof error?.kind !== 'string' || typeof error.message !== 'string' || error.message === '') throw new Error(`status ${status} of another shape: ${text.slice(0, 200)}`);
  if (error.kind === 'internal' || (status >= 500 && status !== 501 && !WORLDLY_KINDS.includes(error.kind))) throw new Error(`${method} ${path}: status ${status}, ${text.slice(0, 400)}`);
}

/** Many connections that never finish a request; meanwhile others must be served. */
export async function openMany(socketPath: string, count: number, chunk: Uint8Array, meanwhile: () => Promise<void>): Promise<void> {
  const sockets = await Promise.all(Array.from({ length: count }, () => open(socketPath)));
  try {
    for (const socket of sockets) {
      socket.on('error', () => undefined);
      socket.write(chunk);
    }
    await meanwhile();
  } finally {
    for (const socket of sockets) socket.destroy();
  }
}
