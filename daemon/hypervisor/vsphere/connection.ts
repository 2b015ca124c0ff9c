/**
 * The way to a vSphere: one POST of a SOAP message over HTTPS, bounded in time and in the size of its answer.
 *
 * The server's certificate is always checked: against the system's authorities, against those of a file, or against the pinned SHA-256 of
 * the certificate itself. A pinned certificate is compared when the handshake has ended and before a byte of ours is sent. Redirections
 * are not followed, and no proxy of the environment is asked.
 *
 * Connections are kept and used again. A kept one that the server has closed meanwhile fails at once, and the message is
 * sent once more over a new one: all that this adapter asks can be asked twice (see `vsphere.ts`).
 */
import { readFileSync } from 'node:fs';
import { Agent, request, type RequestOptions } from 'node:https';
import { isIP } from 'node:net';
import type { Duplex } from 'node:stream';
import { connect, type ConnectionOptions } from 'node:tls';

import { OffshootError } from '../../../blockstore/errors.js';
import type { Trust, VsphereSettings } from './settings.js';

export interface Answer {
  readonly status: number;
  readonly body: string;
  readonly cookies: readonly string[];
}

export interface Message {
  readonly body: string;
  readonly cookie: string | null;
  readonly signal: AbortSignal;
}

const PATH = '/sdk';
/** The oldest API with all that is asked here; every server since then speaks it. */
const SOAP_ACTION = 'urn:vim25/6.0';
const ANSWER_BYTES_MAX = 8 * 1024 * 1024;
const CONNECTIONS_MAX = 4;
const IDLE_MS = 15_000;
const HANDSHAKE_MS_MAX = 30_000;

type Target = Pick<VsphereSettings, 'host' | 'port' | 'trust' | 'callTimeoutMs'>;

/** Marks a certificate that is not the pinned one; its sentence is for people already. */
class WrongCertificate extends Error {}

export class Connection {
  readonly #target: Target;
  readonly #agent: Agent;

  constructor(target: Target) {
    this.#target = target;
    this.#agent = new TrustingAgent(target.trust, { keepAlive: true, maxSockets: CONNECTIONS_MAX, timeout: IDLE_MS });
  }

  /** Throws `cancelled`, `timed-out`, `source-unreachable`, `permission-denied` for a certificate, `io-error`. Status 200 and 500 are answers. */
  async post(message: Message): Promise<Answer> {
    const { signal } = message;
    if (signal.aborted) throw this.#cancelled();
    const ending = new AbortController();
    const state: { ended: 'cancelled' | 'late' | null } = { ended: null };
    const end = (how: 'cancelled' | 'late'): void => {
      state.ended ??= how;
      ending.abort();
    };
    const onAbort = (): void => { end('cancelled'); };
    const timer = setTimeout(() => { end('late'); }, this.#target.callTimeoutMs);
    signal.addEventListener('abort', onAbort, { once: true });
    try {
      try {
        return await this.#send({ ...message, signal: ending.signal });
      } catch (error) {
        if (!(error instanceof StaleConnection)) throw error;
        return await this.#send({ ...message, signal: ending.signal });
      }
    } catch (error) {
      if (state.ended === 'cancelled') throw this.#cancelled();
      if (state.ended === 'late') throw new OffshootError('timed-out', `${this.#name} did not answer within ${this.#target.callTimeoutMs} ms`, this.#where);
      throw this.#unreachable(error);
    } finally {
      clearTimeout(timer);
      signal.removeEventListener('abort', onAbort);
    }
  }

  close(): void {
    this.#agent.destroy();
  }

  get #name(): string {
    return `vSphere at ${this.#target.host}:${this.#target.port}`;
  }

  get #where(): { readonly host: string; readonly port: number } {
    return { host: this.#target.host, port: this.#target.port };
  }

  #cancelled(): OffshootError {
    return new OffshootError('cancelled', `the call to ${this.#name} was cancelled`, this.#where);
  }

  #unreachable(error: unknown): unknown {
    if (error instanceof OffshootError) return error;
    const cause = error instanceof StaleConnection ? error.cause : error;
    if (cause instanceof WrongCertificate) return new OffshootError('permission-denied', `${this.#name} is not trusted: ${cause.message}`, this.#where);
    if (!(cause instanceof Error)) return cause;
    const { code = '' } = cause as { readonly code?: string };
    if (CERTIFICATE_CODES.test(code)) {
      return new OffshootError('permission-denied', `${this.#name} is not trusted: ${cause.message}; give the authority with caFile, or the certificate's thumbprint`,
        this.#where, cause);
    }
    return new OffshootError('source-unreachable', `${this.#name} cannot be reached: ${cause.message}`, this.#where, cause);
  }

  async #send({ body, cookie, signal }: Message): Promise<Answer> {
    const { host, port } = this.#target;
    const bytes = Buffer.from(body, 'utf8');
    return new Promise<Answer>((resolve, reject) => {
      // A request that has no socket yet does not say by itself that it was ended.
      const onEnd = (): void => { reject(new Error('ended')); };
      signal.addEventListener('abort', onEnd, { once: true });
      const sent = request({
        agent: this.#agent,
        host,
        port,
        // The name that is asked for in the handshake; an address is none.
        servername: isIP(host) === 0 ? host : '',
        path: PATH,
        method: 'POST',
        signal,
        headers: {
          'content-type': 'text/xml; charset=utf-8',
          'content-length': bytes.length,
          soapaction: `"${SOAP_ACTION}"`,
          'user-agent': 'offshoot',
          ...(cookie === null ? {} : { cookie }),
        },
      }, (response) => {
        const chunks: Buffer[] = [];
        let length = 0;
        response.on('data', (chunk: Buffer) => {
          length += chunk.length;
          if (length > ANSWER_BYTES_MAX) {
            reject(new OffshootError('too-large', `the answer of ${this.#name} has more than ${ANSWER_BYTES_MAX} bytes`, this.#where));
            sent.destroy();
            return;
          }
          chunks.push(chunk);
        });
        response.on('error', reject);
        response.on('end', () => {
          const status = response.statusCode ?? 0;
          resolve({ status, body: Buffer.concat(chunks).toString('utf8'), cookies: response.headers['set-cookie'] ?? [] });
        });
        // An answer that ends too early has no `end`, and an error only in newer versions of Node.
        response.on('close', () => {
          if (!response.complete) reject(new Error('the connection ended in the middle of the answer'));
        });
      });
      sent.on('error', (error: Error & { readonly code?: string }) => {
        reject(sent.reusedSocket && (error.code === 'ECONNRESET' || error.code === 'EPIPE') ? new StaleConnection(error.message, { cause: error }) : error);
      });
      sent.end(bytes);
    });
  }
}

/** A kept connection was closed by the server before it answered. */
class StaleConnection extends Error {}

const CERTIFICATE_CODES = /^(?:CERT_|UNABLE_TO_|DEPTH_ZERO_|SELF_SIGNED_|ERR_TLS_CERT|HOSTNAME_MISMATCH|INVALID_CA|INVALID_PURPOSE)/u;

class TrustingAgent extends Agent {
  readonly #trust: Trust;
  readonly #authorities: Buffer | null;
  readonly #handshakes = new Set<Duplex>();

  constructor(trust: Trust, options: ConstructorParameters<typeof Agent>[0]) {
    super(options);
    this.#trust = trust;
    this.#authorities = trust.by === 'file' ? readAuthorities(trust.caFile) : null;
  }

  override createConnection(options: RequestOptions, done?: (error: Error | null, stream: Duplex) => void): Duplex | null | undefined {
    const common = { ...options, minVersion: 'TLSv1.2' } as ConnectionOptions;
    if (this.#trust.by !== 'thumbprint') {
      return super.createConnection({ ...common, rejectUnauthorized: true, ...(this.#authorities === null ? {} : { ca: this.#authorities }) }, done);
    }
    const { sha256 } = this.#trust;
    // The chain says nothing about a certificate that is pinned: it is that one, or it is not. No session is resumed, so that there is one to look at.
    const socket = connect({ ...common, rejectUnauthorized: false });
    const fail = (error: Error): void => { done?.(error, socket); };
    socket.once('error', fail);
    // Whoever asked may have given up: nobody but this ends a handshake that hangs.
    const timer = setTimeout(() => { socket.destroy(new Error(`the handshake took longer than ${HANDSHAKE_MS_MAX} ms`)); }, HANDSHAKE_MS_MAX);
    this.#handshakes.add(socket);
    socket.once('close', () => {
      clearTimeout(timer);
      this.#handshakes.delete(socket);
    });
    socket.once('secureConnect', () => {
      clearTimeout(timer);
      this.#handshakes.delete(socket);
      socket.off('error', fail);
      const seen = socket.getPeerCertificate().fingerprint256.replaceAll(':', '').toLowerCase();
      if (seen === sha256) {
        done?.(null, socket);
        return;
      }
      socket.on('error', () => {
        // It is being destroyed, and what is wrong with it is said below.
      });
      socket.destroy();
      fail(new WrongCertificate(`its certificate has the SHA-256 ${seen}, and not the one that is set as thumbprint`));
    });
    return undefined;
  }

  override destroy(): void {
    for (const socket of this.#handshakes) socket.destroy(new Error('the connection was closed'));
    super.destroy();
  }
}

function readAuthorities(file: string): Buffer {
  try {
    return readFileSync(file);
  } catch (error) {
    throw new OffshootError('not-found', `caFile of the settings for vSphere cannot be read: ${error instanceof Error ? error.message : String(error)}`, { path: file }, error);
  }
}
