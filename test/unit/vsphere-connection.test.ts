/**
 * The way to a vSphere when the other side is wrong, slow, gone or not one: certificates, time-outs, answers that are too large or no
 * XML. Against an HTTPS server of the test, since a simulator never does such things; what a vSphere does right is in
 * test/vm/hypervisor-vsphere.test.ts.
 */
import { writeFileSync } from 'node:fs';
import type { ServerResponse } from 'node:http';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';

import { Vsphere } from '../../daemon/hypervisor/vsphere/vsphere.js';
import type { Trust } from '../../daemon/hypervisor/vsphere/settings.js';
import { startHttpsServer, type ReceivedCall, type Responder, type TestHttpsServer } from '../support/https-server.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const PASSWORD = 'ge"heim & <wort>';
const VM = 'vm-1/11111111-2222-4333-8444-555555555555';
const never = new AbortController().signal;

const envelope = (inner: string): string => '<?xml version="1.0"?><soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" '
  + `xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>${inner}</soapenv:Body></soapenv:Envelope>`;
const answer = (method: string, inner = ''): string => envelope(`<${method}Response xmlns="urn:vim25">${inner}</${method}Response>`);
const fault = (type: string, sentence: string): string => envelope(`<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>${sentence}</faultstring>`
  + `<detail><${type}Fault xmlns="urn:vim25" xsi:type="${type}"></${type}Fault></detail></soapenv:Fault>`);
const CONTENT = '<returnval><rootFolder type="Folder">root</rootFolder><propertyCollector type="PropertyCollector">pc</propertyCollector>'
  + '<about><fullName>A test</fullName><apiType>HostAgent</apiType></about><sessionManager type="SessionManager">sm</sessionManager>'
  + '<searchIndex type="SearchIndex">si</searchIndex></returnval>';
const STATE = `<returnval><objects><obj type="VirtualMachine">vm-1</obj><propSet><name>runtime.powerState</name><val>poweredOff</val></propSet></objects></returnval>`;

const send = (response: ServerResponse, body: string, status = 200): void => { response.writeHead(status, { 'content-type': 'text/xml' }).end(body); };

/** What a sound server answers to the first calls. */
function sound(call: ReceivedCall, response: ServerResponse): boolean {
  if (call.method === 'RetrieveServiceContent') send(response, answer(call.method, CONTENT));
  else if (call.method === 'Login') response.writeHead(200, { 'set-cookie': 'vmware_soap_session="abc"; Path=/; HttpOnly' }).end(answer('Login', '<returnval/>'));
  else if (call.method === 'Logout') send(response, answer(call.method));
  else return false;
  return true;
}

describe.skipIf(lacks('openssl'))('a connection to vSphere', () => {
  const cleanup = createCleanup();
  afterEach(() => cleanup.run());

  const vsphereAt = (port: number, trust: Trust, callTimeoutMs = 20_000, taskTimeoutMs = 20_000): Vsphere => {
    const credentialsFile = join(makeTempDir('vsphere', cleanup), 'credentials');
    writeFileSync(credentialsFile, `root\n${PASSWORD}\n`, { mode: 0o600 });
    const vsphere = new Vsphere({
      host: '127.0.0.1', port, trust, credentialsFile, datastores: [{ directory: '/mnt/offshoot', datastore: 'offshoot' }],
      datacenter: null, folder: null, resourcePool: null, callTimeoutMs, taskTimeoutMs,
    });
    cleanup.add(() => vsphere.close());
    return vsphere;
  };
  const pinned = (server: TestHttpsServer): Trust => ({ by: 'thumbprint', sha256: server.thumbprint });
  const status = async (vsphere: Vsphere, signal = never): Promise<string> => vsphere.status(VM, { signal });
  const start = async (respond: Responder): Promise<TestHttpsServer> => startHttpsServer((call, response, request) => {
    if (!sound(call, response)) respond(call, response, request);
  }, cleanup);
  const answersState: Responder = (call, response) => { send(response, answer(call.method, STATE)); };
  const failure = async (promise: Promise<unknown>): Promise<Error> => promise.then(
    (value) => { throw new Error(`it succeeded: ${JSON.stringify(value)}`); },
    (error: unknown) => error as Error,
  );

  it('works with a pinned certificate and with an authority from a file, on connections that are kept', async () => {
    const server = await start(answersState);
    const byPin = vsphereAt(server.port, pinned(server));
    expect(await status(byPin)).toBe('shut-off');
    expect(await status(byPin)).toBe('shut-off');
    expect(server.connections()).toBe(1);
    expect(await status(vsphereAt(server.port, { by: 'file', caFile: server.certificateFile }))).toBe('shut-off');
  });

  it('sends nothing to a server whose certificate is not the pinned one, or not trusted', async () => {
    const server = await start(answersState);
    const wrongPin = await failure(status(vsphereAt(server.port, { by: 'thumbprint', sha256: '00'.repeat(32) })));
    expect(wrongPin).toMatchObject({ kind: 'permission-denied', message: expect.stringContaining(server.thumbprint) as string });
    const unknown = await failure(status(vsphereAt(server.port, { by: 'system' })));
    expect(unknown).toMatchObject({ kind: 'permission-denied', message: expect.stringMatching(/not trusted.*caFile/u) as string });
    const other = await start(answersState);
    expect(await failure(status(vsphereAt(server.port, { by: 'file', caFile: other.certificateFile })))).toMatchObject({ kind: 'permission-denied' });
    expect(server.calls).toEqual([]);
  });

  it('logs in once for calls that come together, and sends the password in that call only', async () => {
    const server = await start(answersState);
    const vsphere = vsphereAt(server.port, pinned(server));
    expect(await Promise.all([status(vsphere), status(vsphere), status(vsphere)])).toEqual(['shut-off', 'shut-off', 'shut-off']);
    const logins = server.calls.filter(({ method }) => method === 'Login');
    expect(logins).toHaveLength(1);
    expect(logins[0]?.body).toContain('<password>ge&quot;heim &amp; &lt;wort&gt;</password>');
    expect(server.calls.filter(({ body }) => body.includes('heim'))).toHaveLength(1);
    expect(server.calls.filter(({ method }) => method === 'RetrievePropertiesEx').map(({ cookie }) => cookie)).toEqual(Array(3).fill('vmware_soap_session="abc"'));
  });

  it('keeps the password out of an error, also when the server says it', async () => {
    const server = await startHttpsServer((call, response) => {
      if (call.method === 'RetrieveServiceContent') send(response, answer(call.method, CONTENT));
      else send(response, fault('InvalidLogin', 'Cannot log in root with geheim'), 500);
    }, cleanup);
    const credentialsFile = join(makeTempDir('vsphere', cleanup), 'credentials');
    writeFileSync(credentialsFile, 'root\ngeheim\n', { mode: 0o600 });
    const vsphere = new Vsphere({
      host: '127.0.0.1', port: server.port, trust: pinned(server), credentialsFile, datastores: [{ directory: '/mnt', datastore: 'x' }],
      datacenter: null, folder: null, resourcePool: null, callTimeoutMs: 20_000, taskTimeoutMs: 20_000,
    });
    cleanup.add(() => vsphere.close());
    const error = await failure(vsphere.status(VM, { signal: never }));
    expect(error).toMatchObject({ kind: 'permission-denied', message: expect.stringMatching(/Cannot log in root with \(redacted\).*InvalidLogin.*credentials file/u) as string });
    expect(JSON.stringify([error, error.message, error.stack, String(error.cause)])).not.toContain('geheim');
  });

  it('is logged in again when the session has ended in the middle, once, and the call is made again', async () => {
    let isExpired = false;
    const server = await start((call, response) => {
      if (isExpired) send(response, fault('NotAuthenticated', 'The session is not authenticated.'), 500);
      else answersState(call, response, undefined as never);
      isExpired = false;
    });
    const vsphere = vsphereAt(server.port, pinned(server));
    expect(await status(vsphere)).toBe('shut-off');
    isExpired = true;
    expect(await status(vsphere)).toBe('shut-off');
    expect(server.calls.filter(({ method }) => method === 'Login')).toHaveLength(2);
  });

  it('gives up when the server never accepts the session', async () => {
    const server = await start((_call, response) => { send(response, fault('NotAuthenticated', 'The session is not authenticated.'), 500); });
    expect(await failure(status(vsphereAt(server.port, pinned(server))))).toMatchObject({ kind: 'permission-denied', message: expect.stringContaining('The session is not authenticated.') as string });
    expect(server.calls.filter(({ method }) => method === 'Login')).toHaveLength(2);
  });

  it('ends a call that is answered too late, and one that is cancelled', async () => {
    let arrived = (): void => undefined;
    const server = await start(() => { arrived(); });
    expect(await failure(status(vsphereAt(server.port, pinned(server), 300)))).toMatchObject({ kind: 'timed-out' });
    const controller = new AbortController();
    arrived = () => { controller.abort(); };
    expect(await failure(status(vsphereAt(server.port, pinned(server)), controller.signal))).toMatchObject({ kind: 'cancelled' });
    expect(await failure(status(vsphereAt(server.port, pinned(server)), AbortSignal.abort()))).toMatchObject({ kind: 'cancelled' });
  });

  it('ends a handshake that never comes', async () => {
    const silent = createServer();
    await new Promise<void>((resolve) => { silent.listen(0, '127.0.0.1', resolve); });
    const sockets = new Set<{ destroy: () => void }>();
    silent.on('connection', (socket) => { sockets.add(socket); socket.on('error', () => undefined); });
    cleanup.add(() => {
      for (const socket of sockets) socket.destroy();
      silent.close();
    });
    const { port } = silent.address() as AddressInfo;
    expect(await failure(status(vsphereAt(port, { by: 'thumbprint', sha256: '00'.repeat(32) }, 300)))).toMatchObject({ kind: 'timed-out' });
    expect(await failure(status(vsphereAt(port, { by: 'system' }, 300)))).toMatchObject({ kind: 'timed-out' });
  });

  it.each<[string, Responder, string, RegExp]>([
    ['no XML', (_call, response) => { send(response, 'Service unavailable, try later'); }, 'io-error', /no XML/u],
    ['an HTML page', (_call, response) => { send(response, '<html><body>Welcome</body></html>'); }, 'io-error', /no SOAP message: it is <html>/u],
    ['XML that breaks off', (call, response) => { send(response, answer(call.method, STATE).slice(0, -60)); }, 'io-error', /no XML/u],
    ['a document type', (call, response) => { send(response, `<!DOCTYPE x [<!ENTITY a "b">]>${answer(call.method, STATE)}`); }, 'io-error', /document type/u],
    ['another method\'s answer', (_call, response) => { send(response, answer('Logout')); }, 'io-error', /<LogoutResponse>/u],
    ['elements without end', (call, response) => { send(response, answer(call.method, '<a>'.repeat(5000) + '</a>'.repeat(5000))); }, 'io-error', /nested|no XML/u],
    ['a redirection', (_call, response) => { response.writeHead(302, { location: 'https://127.0.0.1:1/' }).end(); }, 'io-error', /status 302/u],
    ['more than it may', (_call, response) => { send(response, 'x'.repeat(9 * 1024 * 1024)); }, 'too-large', /more than/u],
    ['half of what it announced', (_call, response) => {
      response.writeHead(200, { 'content-length': '1000' });
      response.write('<a>', () => { response.destroy(); });
    }, 'source-unreachable', /cannot be reached/u],
    ['nothing, and hangs up', (_call, response) => { response.destroy(); }, 'source-unreachable', /cannot be reached/u],
    ['a fault without a type', (_call, response) => { send(response, envelope('<soapenv:Fault><faultcode>Client</faultcode><faultstring>no such thing</faultstring></soapenv:Fault>'), 500); },
      'io-error', /no such thing \(Client\)/u],
  ])('says what is wrong with a server that answers with %s', async (_name, respond, kind, message) => {
    const server = await start(respond);
    expect(await failure(status(vsphereAt(server.port, pinned(server))))).toMatchObject({ kind, message: expect.stringMatching(message) as string });
  });

  it('says what vSphere asks before it starts a machine, and does not wait for ever', async () => {
    const values = (properties: string): string => `<returnval><objects><obj type="VirtualMachine">vm-1</obj>${properties}</objects></returnval>`;
    const server = await start((call, response) => {
      if (call.method === 'PowerOnVM_Task') send(response, answer(call.method, '<returnval type="Task">task-1</returnval>'));
      else if (call.body.includes('>task-1<')) {
        send(response, answer(call.method, '<returnval><objects><obj type="Task">task-1</obj><propSet><name>info</name><val><state>running</state></val></propSet></objects></returnval>'));
      } else if (call.body.includes('runtime.question')) {
        send(response, answer(call.method, values('<propSet><name>runtime.question</name><val><id>1</id><text>This machine was moved or copied.</text>'
          + '<choice><choiceInfo><key>1</key><label>I moved it</label></choiceInfo><choiceInfo><key>2</key><label>I copied it</label></choiceInfo></choice></val></propSet>')));
      } else answersState(call, response, undefined as never);
    });
    expect(await failure(vsphereAt(server.port, pinned(server)).start(VM, { signal: never }))).toMatchObject({
      kind: 'busy', message: expect.stringContaining('This machine was moved or copied. (I moved it, I copied it)') as string,
    });
  });

  it('says that a task does not end, and that a machine does not shut down', async () => {
    const running = STATE.replace('poweredOff', 'poweredOn');
    const server = await start((call, response) => {
      if (call.method === 'ShutdownGuest') send(response, answer(call.method));
      else if (call.method === 'PowerOffVM_Task') send(response, answer(call.method, '<returnval type="Task">task-1</returnval>'));
      else if (call.body.includes('>task-1<')) {
        send(response, answer(call.method, '<returnval><objects><obj type="Task">task-1</obj><propSet><name>info</name><val><state>queued</state></val></propSet></objects></returnval>'));
      } else send(response, answer(call.method, running));
    });
    const vsphere = vsphereAt(server.port, pinned(server), 20_000, 200);
    const options = { signal: never, timeoutMs: 200 };
    expect(await failure(vsphere.stop(VM, { ...options, force: false }))).toMatchObject({ kind: 'busy', message: expect.stringContaining('force takes its power') as string });
    expect(await failure(vsphere.stop(VM, { ...options, force: true }))).toMatchObject({ kind: 'timed-out', message: expect.stringContaining('task-1') as string });
    const controller = new AbortController();
    const stopping = failure(vsphere.stop(VM, { signal: controller.signal, timeoutMs: 20_000, force: false }));
    await expect.poll(() => server.calls.filter(({ method }) => method === 'ShutdownGuest').length, { timeout: 20_000 }).toBe(2);
    controller.abort();
    expect(await stopping).toMatchObject({ kind: 'cancelled' });
  });

  it('does not take a property that may not be read for one that is not set', async () => {
    const server = await start((call, response) => {
      send(response, answer(call.method, '<returnval><objects><obj type="VirtualMachine">vm-1</obj><missingSet><path>runtime.powerState</path><fault>'
        + '<fault xsi:type="NoPermission"><privilegeId>System.Read</privilegeId></fault><localizedMessage>Permission was denied.</localizedMessage></fault></missingSet></objects></returnval>'));
    });
    expect(await failure(status(vsphereAt(server.port, pinned(server))))).toMatchObject({
      kind: 'permission-denied', message: expect.stringMatching(/Permission was denied\. \(NoPermission, privilegeId System\.Read\)/u) as string,
    });
  });

  it('reads on when the properties come in pages', async () => {
    const server = await start((call, response) => {
      const page = (id: string, token: string): string => `<returnval>${token}<objects><obj type="Datacenter">${id}</obj><propSet><name>name</name><val>${id}</val></propSet></objects></returnval>`;
      if (call.method === 'RetrievePropertiesEx') send(response, answer(call.method, page('one', '<token>7</token>')));
      else if (call.body.includes('<token>7</token>')) send(response, answer(call.method, page('two', '')));
      else send(response, fault('InvalidArgument', 'token'), 500);
    });
    expect(await vsphereAt(server.port, pinned(server)).probe({ signal: never })).toMatchObject({ usable: false, reason: expect.stringContaining('one, two') as string });
  });

  it('goes on over a new connection when the server has closed the one that was kept', async () => {
    let count = 0;
    const server = await start((call, response, request) => {
      count += 1;
      // The second call meets a connection that is reset under it, as an idle one may be.
      if (count === 2) request.socket.destroy();
      else answersState(call, response, request);
    });
    const vsphere = vsphereAt(server.port, pinned(server));
    expect(await status(vsphere)).toBe('shut-off');
    expect(await status(vsphere)).toBe('shut-off');
    expect(server.connections()).toBe(2);
  });

  it('is unusable with the reason when nobody listens', async () => {
    const server = await start(answersState);
    await server.close();
    const vsphere = vsphereAt(server.port, pinned(server));
    expect(await failure(status(vsphere))).toMatchObject({ kind: 'source-unreachable' });
    expect(await vsphere.probe({ signal: never })).toMatchObject({ usable: false, reason: expect.stringContaining('cannot be reached') as string });
  });
});
