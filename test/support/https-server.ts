/**
 * An HTTPS server on loopback with a certificate of its own, that answers as a test says: for what a real vSphere does only when it is broken.
 */
import { readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:https';
import { X509Certificate } from 'node:crypto';
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';

import { mustRun } from './model/command.js';
import { makeTempDir, type Cleanup } from './temp.js';

export interface ReceivedCall {
  /** Of the SOAP message: `Login`. */
  readonly method: string;
  readonly body: string;
  readonly cookie: string | null;
}

export interface TestHttpsServer {
  readonly port: number;
  readonly thumbprint: string;
  /** The certificate, PEM. It is its own authority. */
  readonly certificateFile: string;
  /** What has come in so far. */
  readonly calls: readonly ReceivedCall[];
  /** Connections whose handshake has ended. */
  connections(): number;
  close(): Promise<void>;
}

export type Responder = (call: ReceivedCall, response: ServerResponse, request: IncomingMessage) => void;

export async function startHttpsServer(respond: Responder, cleanup: Cleanup): Promise<TestHttpsServer> {
  const directory = makeTempDir('https', cleanup);
  const key = join(directory, 'key.pem');
  const certificateFile = join(directory, 'certificate.pem');
  await mustRun('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2', '-subj', '/CN=offshoot-test',
    '-addext', 'subjectAltName=IP:127.0.0.1', '-keyout', key, '-out', certificateFile]);
  const calls: ReceivedCall[] = [];
  let connections = 0;
  const server: Server = createServer({ key: readFileSync(key), cert: readFileSync(certificateFile) }, (request, response) => {
    const chunks: Buffer[] = [];
    request.on('data', (chunk: Buffer) => chunks.push(chunk));
    request.on('end', () => {
      const body = Buffer.concat(chunks).toString('utf8');
      const call = { method: /<soapenv:Body><([A-Za-z_]+)/u.exec(body)?.[1] ?? '', body, cookie: request.headers.cookie ?? null };
      calls.push(call);
      respond(call, response, request);
    });
  });
  server.on('secureConnection', () => { connections += 1; });
  // A client that does not trust us ends the handshake, and that is no failure here.
  server.on('tlsClientError', () => undefined);
  await new Promise<void>((resolve) => { server.listen(0, '127.0.0.1', resolve); });
  const close = async (): Promise<void> => {
    server.closeAllConnections();
    await new Promise<void>((resolve) => { server.close(() => { resolve(); }); });
  };
  cleanup.add(close);
  return {
    port: (server.address() as AddressInfo).port,
    thumbprint: new X509Certificate(readFileSync(certificateFile)).fingerprint256.replaceAll(':', '').toLowerCase(),
    certificateFile,
    calls,
    connections: () => connections,
    close,
  };
}
