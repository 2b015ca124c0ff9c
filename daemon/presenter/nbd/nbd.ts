/**
 * Exports over NBD: a door (`main.ts`) that listens for all of them and lets in whom each one's list names, and for each connection an nbdkit(1) of its own.
 *
 * nbdkit, for its file plugin has what disks need (1.32, by nbdinfo): flush and FUA by fdatasync, trim and write-zeroes by fallocate, extents by SEEK_HOLE, several connections
 * of one client, which see each other's flushes, for it is one file. The file is raw to it whatever it holds: nothing is probed. It is opened when a client comes, and
 * without one nothing is open. The list of clients is the door's: qemu-nbd has none, and nbdkit's ip filter knows no addresses at all in Debian 12 (1.32.5 was built without
 * inet_pton: "don't know how to parse rule"). Only the export's own name is answered; with `tls=DIRECTORY` nothing is said without TLS.
 *
 * Options: `listen` (ADDRESS, or ADDRESS:PORT; the port is settled once and kept), `name` (the path when left out), `tls` (a directory with ca-cert.pem,
 * server-cert.pem, server-key.pem), `verify=yes` (clients need a certificate of that CA).
 */
import { createHash } from 'node:crypto';
import { readFileSync, rmSync } from 'node:fs';
import { access, constants } from 'node:fs/promises';
import { createServer, isIPv4, isIPv6 } from 'node:net';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import { runChild, sleepUnlessAborted } from '../../programs/child.js';
import { isLoopbackAddress, reachesBeyondLoopback } from '../clients.js';
import { ExportProcess } from '../export-process.js';
import type { PresenterPlace } from '../place.js';
import type { Export, ExportAddress, Presenter, PresenterAbilities, PresenterCall } from '../presenter.js';
import { connectedTo } from './connections.js';
import { stateFileOf, type DoorConfig, type DoorEntry, type DoorState } from './door-config.js';
import { endGuests } from './guests.js';

const FIRST_PORT = 10_809;
const PORTS_TRIED = 4_000;
const PROBE_TIMEOUT_MS = 10_000;
const START_TIMEOUT_MS = 60_000;
const POLL_MS = 30;
const PROGRAM = 'nbdkit';
const DOOR = fileURLToPath(new URL('main.js', import.meta.url));
const OPTIONS = new Set(['listen', 'name', 'tls', 'verify']);
const CERTIFICATES = ['ca-cert.pem', 'server-cert.pem', 'server-key.pem'];
/** Of the protocol: an export's name. */
const NAME_BYTES_MAX = 255;

export function createNbdPresenter(place: PresenterPlace): Presenter { return new NbdPresenter(place); }

interface Listening {
  readonly address: string;
  readonly port: number | null;
}

class NbdPresenter implements Presenter {
  readonly id = 'nbd';
  readonly abilities: PresenterAbilities = { directories: false, disks: true, clients: 'addresses', encryption: 'tls', knowsClients: true };
  readonly #place: PresenterPlace;
  readonly #door: ExportProcess;

  constructor(place: PresenterPlace) {
    this.#place = place;
    this.#door = new ExportProcess({ directory: place.directory, name: 'nbd' });
  }

  async probe({ signal }: PresenterCall): ReturnType<Presenter['probe']> {
    try {
      const { code, stdout, stderr } = await runChild(PROGRAM, ['--filter=exportname', 'file', '--version'], { signal, timeoutMs: PROBE_TIMEOUT_MS });
      if (code === 0) return { usable: true, version: stdout.split('\n')[0]?.trim() ?? '' };
      return { usable: false, reason: `nbdkit does not work: ${stderr.trim()}: install the package nbdkit` };
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind !== 'tool-missing') throw thrown;
      return { usable: false, reason: `${error.message} (nbdkit)` };
    }
  }

  check({ options, clients, path: at }: Export): void {
    for (const name of Object.keys(options)) {
      if (!OPTIONS.has(name)) throw refused(`nbd has no option ${name}: it has ${[...OPTIONS].join(', ')}`);
    }
    const { listen, tls, verify, name } = options;
    const { address } = this.#listening(listen);
    if (isLoopbackAddress(address) && reachesBeyondLoopback(clients)) {
      throw refused(`${address} is this host's own, and nobody else can come there: name another address (--listen ADDRESS, or daemon start --export-address ADDRESS)`);
    }
    if (Buffer.byteLength(name ?? at) > NAME_BYTES_MAX) throw refused(`the name of an NBD export has at most ${NAME_BYTES_MAX} bytes: give a shorter one with --option name=NAME`);
    if (name === '') throw refused('the option name must not be empty: leave it out for the path');
    if (/\p{Cc}/u.test(name ?? at)) throw refused('the name of an NBD export has no control characters: give one without with --option name=NAME');
    if (verify !== undefined && (verify !== 'yes' || tls === undefined)) throw refused('the option verify is yes, and needs the option tls');
    if (tls !== undefined) checkCertificatesPath(tls, this.#place.mountDir);
  }

  async settle({ options }: Export, shown: readonly Export[]): Promise<Readonly<Record<string, string>>> {
    if (options['tls'] !== undefined) await assertCertificates(options['tls']);
    const { address, port } = this.#listening(options['listen']);
    const taken = new Set(shown.map((each) => this.#listening(each.options['listen']).port));
    if (port !== null) {
      if (taken.has(port)) throw new OffshootError('already-exists', `port ${port} belongs to another export already: choose another, or leave it out`, { port });
      return { ...options, listen: written(address, port) };
    }
    for (let candidate = FIRST_PORT; candidate < FIRST_PORT + PORTS_TRIED; candidate += 1) {
      if (!taken.has(candidate) && await isFree(address, candidate)) return { ...options, listen: written(address, candidate) };
    }
    throw new OffshootError('in-use', `no port is free at ${address} from ${FIRST_PORT} on: name one with --listen ${address}:PORT`);
  }

  async apply(wanted: readonly Export[], { signal }: PresenterCall): Promise<readonly ExportAddress[]> {
    if (wanted.length === 0) {
      await this.end();
      return [];
    }
    const failures = await this.#tell(wanted, signal);
    const failed = wanted.find(({ id }) => failures[String(id)] !== undefined);
    if (failed === undefined) return wanted.map((each) => ({ id: each.id, addresses: [this.#uriOf(each)] }));
    // The others are shown; the next call tries it anew, for it is not in the configuration any more.
    const others = wanted.filter(({ id }) => failures[String(id)] === undefined);
    if (others.length > 0) await this.#tell(others, signal);
    else await this.end();
    throw new OffshootError('in-use', `${failed.path} cannot be shown at ${failed.options['listen'] ?? ''}: ${failures[String(failed.id)] ?? ''}`, { path: failed.path });
  }

  async clientsOf({ options }: Export): Promise<readonly string[]> {
    const { port } = this.#listening(options['listen']);
    return await Promise.resolve(port === null ? [] : connectedTo(port));
  }

  async lost(): Promise<string | null> {
    this.#door.boundLog();
    if (this.#door.state().kind === 'running') return null;
    const said = this.#door.lastWords();
    return await Promise.resolve(`the door of the NBD exports has ended${said === '' ? '' : `: ${said}`}`);
  }

  async end(): Promise<void> {
    await this.#door.end();
    await endGuests(this.#place.directory);
    this.#door.forget();
  }

  /** Why some are not shown, by their ids. */
  async #tell(wanted: readonly Export[], signal: AbortSignal): Promise<DoorState['failures']> {
    const entries = wanted.map((each) => this.#entryOf(each));
    const serial = createHash('sha256').update(JSON.stringify(entries)).digest('hex');
    const door = this.#door;
    const isTold = (): boolean => stateOf(door)?.serial === serial;
    const isNew = door.writeConfig(`${JSON.stringify({ serial, program: PROGRAM, entries } satisfies DoorConfig)}\n`);
    if (door.state().kind !== 'running') {
      await door.end();
      rmSync(stateFileOf(door.configFile), { force: true });
      await door.start({ program: process.execPath, arguments: [DOOR, door.configFile, this.#place.mountDir] }, { signal, timeoutMs: START_TIMEOUT_MS, isUp: async () => await Promise.resolve(isTold()) });
    } else if (isNew || !isTold()) {
      door.signal('SIGHUP');
      for (const deadline = performance.now() + START_TIMEOUT_MS; !isTold();) {
        if (performance.now() > deadline || door.state().kind !== 'running') throw new OffshootError('timed-out', `the door of the NBD exports does not take its configuration: ${door.lastWords()}`);
        await sleepUnlessAborted(POLL_MS, signal);
      }
    }
    return stateOf(door)?.failures ?? {};
  }

  #entryOf(wanted: Export): DoorEntry {
    const { address, port } = this.#listening(wanted.options['listen']);
    const { tls, verify } = wanted.options;
    if (port === null) throw new Error(`export ${wanted.id} has no port`);
    return {
      id: wanted.id, address, port, clients: wanted.clients,
      arguments: [
        '--single', '--log=stderr', ...(wanted.readOnly ? ['--readonly'] : []),
        ...(tls === undefined ? ['--tls=off'] : ['--tls=require', `--tls-certificates=${tls}`, ...(verify === undefined ? [] : ['--tls-verify-peer'])]),
        '--filter=exportname', 'file', `file=${wanted.mountPath}`, 'exportname-list=explicit', 'exportname-strict=true', `exportname=${exportName(wanted)}`,
      ],
    };
  }

  #uriOf(wanted: Export): string {
    const scheme = wanted.options['tls'] === undefined ? 'nbd' : 'nbds';
    return `${scheme}://${wanted.options['listen'] ?? ''}/${exportName(wanted).split('/').map(encodeURIComponent).join('/')}`;
  }

  #listening(listen: string | undefined): Listening {
    if (listen === undefined) return { address: this.#place.address, port: null };
    const [, bracketed, plain, port] = /^(?:\[(.+)\]|([^:]+|[0-9a-fA-F:]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*))(?::([0-9]{1,5}))?$/u.exec(listen) ?? [];
    const address = bracketed ?? plain ?? '';
    if (bracketed === undefined ? !isIPv4(address) && !isIPv6(address) : !isIPv6(address)) throw refused(`'${listen}' is no address to listen on: write ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, with numbers`);
    if (port === undefined) return { address, port: null };
    if (Number(port) < 1 || Number(port) > 65_535) throw refused(`'${port}' is no port: 1 to 65535`);
    return { address, port: Number(port) };
  }
}

function exportName({ options, path: at }: Export): string { return options['name'] ?? at; }
function written(address: string, port: number): string { return isIPv6(address) ? `[${address}]:${port}` : `${address}:${port}`; }

function checkCertificatesPath(directory: string, mountDir: string): void {
  if (!path.isAbsolute(directory) || path.normalize(directory) !== directory || directory.includes('\0')) throw refused('the option tls is the absolute path of a directory');
  if (directory === mountDir || directory.startsWith(`${mountDir}/`)) throw refused('the certificates must not lie under the mount that they are to protect');
}

/** By asynchronous calls alone: the directory may lead below the mount by a link, and this thread would wait for itself. */
async function assertCertificates(directory: string): Promise<void> {
  for (const name of CERTIFICATES) {
    const file = path.join(directory, name);
    await access(file, constants.R_OK).catch((thrown: unknown) => {
      throw refused(`${file} cannot be read (${(thrown as Error).message}): TLS needs ${CERTIFICATES.join(', ')} there`);
    });
  }
}

async function isFree(address: string, port: number): Promise<boolean> {
  return await new Promise((resolve) => {
    const probe = createServer();
    probe.once('error', () => { resolve(false); });
    probe.listen({ host: address, port, exclusive: true }, () => { probe.close(() => { resolve(true); }); });
  });
}

function stateOf({ configFile }: ExportProcess): DoorState | null {
  try {
    return JSON.parse(readFileSync(stateFileOf(configFile), 'utf8')) as DoorState;
  } catch {
    // Not written yet.
    return null;
  }
}

function refused(message: string): OffshootError { return new OffshootError('invalid-argument', message); }
