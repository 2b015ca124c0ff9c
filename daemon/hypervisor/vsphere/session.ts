/**
 * A session with a vSphere: logged in when the first call needs it, used by all calls, and made again when the server has forgotten it.
 *
 * A call that is answered with NotAuthenticated has done nothing, so it is sent once more after a new login. Calls that
 * meet the end of a session together wait for one login. The login belongs to no caller: one who gives up does not take it away
 * from the others.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { CallOptions } from '../hypervisor.js';
import { Connection, type Answer } from './connection.js';
import { readCredentials, redact } from './credentials.js';
import { faultError, soapFault, VsphereFault } from './faults.js';
import type { VsphereSettings } from './settings.js';
import { asObject, childOf, envelope, parseEnvelope, textAt, textElement, type ManagedObject, type XmlElement } from './xml.js';

/** The objects that every server has, and what it says it is. */
export interface ServiceContent {
  /** `VMware ESXi 6.5.0 build-5969303`. */
  readonly fullName: string;
  /** `6.5.0`. */
  readonly version: string;
  readonly rootFolder: ManagedObject;
  readonly propertyCollector: ManagedObject;
  readonly searchIndex: ManagedObject;
  readonly sessionManager: ManagedObject;
}

const SERVICE_INSTANCE: ManagedObject = { type: 'ServiceInstance', id: 'ServiceInstance' };
const COOKIE = /^vmware_soap_session=[^;\r\n]+/u;
/** A server that is stopping does not wait long for one that is not there. */
const LOGOUT_MS_MAX = 3000;
const HTTP_OK = 200;
const HTTP_FAULT = 500;

export class Session {
  readonly #settings: VsphereSettings;
  readonly #connection: Connection;
  #content: ServiceContent | null = null;
  #cookie: string | null = null;
  #login: Promise<string> | null = null;

  constructor(settings: VsphereSettings) {
    this.#settings = settings;
    this.#connection = new Connection(settings);
  }

  /** What the server says of itself; asked without a login, and kept. */
  async content(options: CallOptions): Promise<ServiceContent> {
    this.#content ??= serviceContent(await this.#post(SERVICE_INSTANCE, 'RetrieveServiceContent', [], null, options.signal));
    return this.#content;
  }

  /** Calls a method as who we are. Throws VsphereFault when the server refuses, otherwise what `Connection.post` throws. */
  async call(object: ManagedObject, method: string, content: readonly string[], options: CallOptions): Promise<XmlElement> {
    const cookie = await this.#ensureLogin(options);
    try {
      return await this.#post(object, method, content, cookie, options.signal);
    } catch (error) {
      if (!(error instanceof VsphereFault) || error.type !== 'NotAuthenticated') throw error;
      // Another call may have logged in again meanwhile.
      if (this.#cookie === cookie) this.#cookie = null;
    }
    return this.#post(object, method, content, await this.#ensureLogin(options), options.signal);
  }

  /** Ends the session on the server, as far as it answers, and all connections. */
  async close(): Promise<void> {
    const cookie = this.#cookie;
    this.#cookie = null;
    try {
      if (cookie !== null && this.#content !== null) {
        await this.#post(this.#content.sessionManager, 'Logout', [], cookie, AbortSignal.timeout(LOGOUT_MS_MAX));
      }
    } catch (error) {
      // A session that cannot be ended ends by itself on the server after half an hour without a call.
      if (!(error instanceof VsphereFault || error instanceof OffshootError)) throw error;
    } finally {
      this.#connection.close();
    }
  }

  async #ensureLogin(options: CallOptions): Promise<string> {
    if (this.#cookie !== null) return this.#cookie;
    this.#login ??= this.#logIn().finally(() => { this.#login = null; });
    return abortable(this.#login, options.signal);
  }

  async #logIn(): Promise<string> {
    // It lasts as long as two calls may, and nobody's signal ends it.
    const { signal } = new AbortController();
    const content = await this.content({ signal });
    const credentials = readCredentials(this.#settings.credentialsFile);
    const parts = [textElement('userName', credentials.user), textElement('password', credentials.password)];
    const where = `${this.#settings.host}:${this.#settings.port}`;
    let answer: Answer;
    try {
      answer = await this.#connection.post({ body: envelope(content.sessionManager, 'Login', parts), cookie: null, signal });
      readAnswer('Login', answer, (text) => redact(text, credentials));
    } catch (error) {
      throw faultError(error, `log in '${credentials.user}' at ${where}`);
    }
    const cookie = answer.cookies.map((each) => COOKIE.exec(each)?.[0]).find((each) => each !== undefined);
    if (cookie === undefined) throw new OffshootError('io-error', `${where} accepted the login and gave no session: is it a vSphere?`);
    this.#cookie = cookie;
    return cookie;
  }

  async #post(object: ManagedObject, method: string, content: readonly string[], cookie: string | null, signal: AbortSignal): Promise<XmlElement> {
    return readAnswer(method, await this.#connection.post({ body: envelope(object, method, content), cookie, signal }), (text) => text);
  }
}

/** The `…Response` of a method. Throws VsphereFault for a fault, `io-error` for what is no answer to a SOAP message. */
function readAnswer(method: string, { status, body }: Answer, clean: (text: string) => string): XmlElement {
  if (status !== HTTP_OK && status !== HTTP_FAULT) {
    throw new OffshootError('io-error', `vSphere answered ${method} with HTTP status ${status}${status === 404 || status === 301 || status === 302 ? ': is it a vSphere?' : ''}`);
  }
  const answer = parseEnvelope(clean(body));
  if (answer.name === 'Fault') throw soapFault(method, answer);
  if (answer.name !== `${method}Response`) throw new OffshootError('io-error', `vSphere answered ${method} with <${answer.name}>`);
  return answer;
}

function serviceContent(answer: XmlElement): ServiceContent {
  const content = childOf(answer, 'returnval');
  const need = (name: string): ManagedObject => {
    const object = asObject(childOf(content, name));
    if (object === null) throw new OffshootError('not-supported', `the server has no ${name}: it is no ESXi host and no vCenter`);
    return object;
  };
  return {
    fullName: textAt(content, 'about', 'fullName') ?? 'vSphere',
    version: textAt(content, 'about', 'version') ?? '0.0',
    rootFolder: need('rootFolder'),
    propertyCollector: need('propertyCollector'),
    searchIndex: need('searchIndex'),
    sessionManager: need('sessionManager'),
  };
}

/** Waits for something that goes on without us. */
async function abortable<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  const gaveUp = (): OffshootError => new OffshootError('cancelled', 'the call to vSphere was cancelled');
  if (signal.aborted) throw gaveUp();
  let onAbort: (() => void) | undefined;
  try {
    return await Promise.race([promise, new Promise<never>((_resolve, reject) => {
      onAbort = () => { reject(gaveUp()); };
      signal.addEventListener('abort', onAbort, { once: true });
    })]);
  } finally {
    if (onAbort !== undefined) signal.removeEventListener('abort', onAbort);
  }
}
