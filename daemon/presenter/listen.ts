/**
 * Where the server of an export listens: the option `listen`, settled once and kept, so that it is the same after every restart. Exports with the same
 * address and port are shown by one server; a port belongs to one address.
 */
import { connect, isIPv4, isIPv6 } from 'node:net';

import { OffshootError } from '../../blockstore/errors.js';
import { sleepUnlessAborted } from '../programs/child.js';
import type { ExportProcess } from './export-process.js';
import type { Export } from './presenter.js';

export interface Listening {
  readonly address: string;
  readonly port: number;
}

type WithOptions = Pick<Export, 'options'>;

const PORT_MAX = 65_535;
const CONNECT_MS = 1_000;
const GIVE_UP_MS = 2_000;
const LOOK_AGAIN_MS = 50;
const LISTEN = /^(?:\[(?<bracketed>[^\]]+)\]|(?<plain>[^:[\]]*|[0-9a-fA-F]*:[0-9a-fA-F.]*:[0-9a-fA-F:.]*))(?::(?<port>[0-9]{1,5}))?$/u;

/** `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT`, `:PORT`; what is left out is the standard. */
export function listeningOf({ options }: WithOptions, standard: Listening): Listening {
  const listen = options['listen'];
  if (listen === undefined) return standard;
  const { bracketed, plain, port } = LISTEN.exec(listen)?.groups ?? {};
  const address = bracketed ?? (plain === '' ? standard.address : plain) ?? '';
  if (bracketed === undefined ? !isIPv4(address) && !isIPv6(address) : !isIPv6(address)) {
    throw new OffshootError('invalid-argument', `'${listen}' is no address to listen on: write ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, with numbers`, { listen });
  }
  if (port !== undefined && (Number(port) < 1 || Number(port) > PORT_MAX)) throw new OffshootError('invalid-argument', `'${port}' is no port: 1 to ${PORT_MAX}`, { listen });
  return { address, port: port === undefined ? standard.port : Number(port) };
}

/** For `settle`. Throws when the port is another address's already. */
export function settledListen(wanted: WithOptions, shown: readonly WithOptions[], standard: Listening): string {
  const mine = listeningOf(wanted, standard);
  const other = shown.map((each) => listeningOf(each, standard)).find(({ address, port }) => port === mine.port && address !== mine.address);
  if (other !== undefined) {
    throw new OffshootError('conflict', `port ${mine.port} is shown at ${other.address} already: choose another with --listen ${mine.address}:PORT`, { port: mine.port });
  }
  return writtenListen(mine);
}

/** `192.0.2.1:3260`, `[2001:db8::1]:3260`. */
export function writtenListen({ address, port }: Listening): string {
  return isIPv6(address) ? `[${address}]:${port}` : `${address}:${port}`;
}

/** Exports by their servers, in the order of the ports. */
export function byListening(exports: readonly Export[], standard: Listening): readonly { readonly at: Listening; readonly exports: readonly Export[] }[] {
  const found = new Map<number, { at: Listening; exports: Export[] }>();
  for (const each of exports) {
    const at = listeningOf(each, standard);
    const group = found.get(at.port);
    if (group === undefined) found.set(at.port, { at, exports: [each] });
    else group.exports.push(each);
  }
  return [...found.values()].sort((a, b) => a.at.port - b.at.port);
}

/** Whether nobody listens there, or stops to within a moment. */
export async function isGivenUp(at: Listening, signal: AbortSignal): Promise<boolean> {
  for (const deadline = performance.now() + GIVE_UP_MS; ;) {
    if (!(await isListening(at))) return true;
    if (performance.now() > deadline) return false;
    await sleepUnlessAborted(LOOK_AGAIN_MS, signal);
  }
}

/** Whether somebody listens there, who may be anybody. */
export async function isListening({ address, port }: Listening): Promise<boolean> {
  const host = address === '0.0.0.0' ? '127.0.0.1' : address === '::' ? '::1' : address;
  return await new Promise((resolve) => {
    const socket = connect({ host, port, timeout: CONNECT_MS });
    const answer = (listens: boolean) => () => {
      socket.destroy();
      resolve(listens);
    };
    socket.once('connect', answer(true));
    socket.once('error', answer(false));
    socket.once('timeout', answer(false));
  });
}

/** For `check`: an option that nobody knows is refused, with those that there are. */
export function checkOptionNames({ options }: WithOptions, known: readonly string[]): void {
  for (const name of Object.keys(options)) {
    if (!known.includes(name)) throw new OffshootError('invalid-argument', `there is no option ${name}: there are ${known.join(', ')}`, { option: name });
  }
}

/** What to say of the first server that has ended without being asked; null: all run. Their logs are kept within their bounds on the way. */
export function endedServer(protocol: string, groups: readonly { readonly at: Listening }[], serverAt: (at: Listening) => ExportProcess): string | null {
  for (const { at } of groups) {
    const server = serverAt(at);
    server.boundLog();
    if (server.state().kind === 'running') continue;
    const said = server.lastWords();
    return `the ${protocol} server at ${writtenListen(at)} has ended${said === '' ? '' : `: ${said}`}`;
  }
  return null;
}
