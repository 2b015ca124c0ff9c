/**
 * NFS exports by NFS-Ganesha, one server for all of them. Main thread of the server; nothing here opens a file below the mount.
 *
 * The server is a process of its own that outlives ours (`export-process.ts`). A change of exports is written whole and taken over by SIGHUP, which
 * disturbs nobody else; what only a start reads (the port, the versions, an export that lies elsewhere now) is a restart, which clients wait through.
 * `apply` of what is shown already does nothing. An error of the server puts the configuration before it back. Settings, what is promised, and what
 * the other side has to do: NFS.md.
 */
import { closeSync, existsSync, fstatSync, mkdirSync, openSync, readSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { join } from 'node:path';

import { OffshootError, toOffshootError } from '../../../blockstore/errors.js';
import { runChild, sleepUnlessAborted } from '../../programs/child.js';
import { isLoopbackAddress, reachesBeyondLoopback } from '../clients.js';
import { ExportProcess, makeExportsDirectory } from '../export-process.js';
import { isGivenUp, writtenListen } from '../listen.js';
import type { Export, ExportAddress, Presenter, PresenterCall } from '../presenter.js';
import { isAmong } from './address-list.js';
import { canBeReread, configuration, type ServerSettings } from './configuration.js';
import { rulesOf } from './rules.js';
import { tcpSocketsOf } from './sockets.js';

export interface NfsPlace {
  readonly directory: string;
  readonly address: string;
  /** The mount gives file handles (`daemon start --nfs`). */
  readonly nfs: boolean;
  readonly logger: { warn(context: object, message: string): void };
  /** For which clients had state; it should outlive the power. In `directory` when left out. */
  readonly recoveryDir?: string;
}

export interface NfsSettings {
  /** When no export says one. */
  readonly port?: number;
  readonly mountPort?: number;
  readonly leaseSeconds?: number;
  readonly graceSeconds?: number;
}

const PROGRAM = 'ganesha.nfsd';
const PORT = 2049;
/** That is where Linux's own server has it when it is fixed. */
const MOUNT_PORT = 20048;
/** Those that the server has when nobody says: Linux and ESXi are at ease with them. */
const LEASE_SECONDS = 60;
const GRACE_SECONDS = 90;
const PROBE_MS = 10_000;
const START_MS = 60_000;
const REREAD_MS = 30_000;
const POLL_MS = 30;
/** The server says what was wrong with a configuration after it has said that it is done with it. */
const AFTERWORDS_MS = 200;
const END_MS = 10_000;
const SAID_BYTES_MAX = 256 * 1024;
const RPCBIND_SOCKET = '/run/rpcbind.sock';
const KEYTAB = '/etc/krb5.keytab';
const IS_UP = 'NFS SERVER INITIALIZED';
const IS_REREAD = 'Reread exports complete';
/** What is wrong with an export or an address. Without D-Bus and Kerberos the server complains of those, and works. */
const IS_WRONG = /:(?:CONFIG|EXPORT|FSAL|NFS STARTUP) :(?:CRIT|FATAL|MAJ) :(?!.*(?:krb5|keytab))(.*)|:(DISP :(?:CRIT|FATAL) :.*|DISP :MAJ :Cannot register NFS V3.*)/u;
/** Why it ended. */
const IS_GRAVE = /:(?:CRIT|FATAL|MAJ) :(.*)/u;
const IS_WITHOUT_VFS = 'Failed to load FSAL (VFS)';
const EVERY_ADDRESS = new Set(['0.0.0.0', '::']);

export function createNfsPresenter(place: NfsPlace, settings: NfsSettings = {}): Presenter {
  return new NfsPresenter(place, settings);
}

class NfsPresenter implements Presenter {
  readonly id = 'nfs';
  readonly abilities = { directories: true, disks: false, clients: 'addresses', encryption: 'kerberos', knowsClients: true } as const;
  readonly #place: NfsPlace;
  readonly #settings: NfsSettings;
  readonly #server: ExportProcess;

  constructor(place: NfsPlace, settings: NfsSettings) {
    this.#place = place;
    this.#settings = settings;
    this.#server = new ExportProcess({ directory: place.directory, name: 'ganesha' });
  }

  async probe({ signal }: PresenterCall): ReturnType<Presenter['probe']> {
    if (!this.#place.nfs) return { usable: false, reason: 'this mount gives no file handles, which an NFS server needs: stop the daemon, and start it with --nfs' };
    try {
      const { stdout, stderr } = await runChild(PROGRAM, ['-v'], { signal, timeoutMs: PROBE_MS });
      const version = /NFS-Ganesha Release = V(\S+)/u.exec(`${stdout}${stderr}`)?.[1];
      if (version === undefined) return { usable: false, reason: `${PROGRAM} does not say its version: install nfs-ganesha 4 or later` };
      if (Number.parseInt(version, 10) < 4) return { usable: false, reason: `${PROGRAM} is version ${version}, and cannot take exports back while it runs: install nfs-ganesha 4 or later` };
      return { usable: true, version };
    } catch (thrown) {
      const error = toOffshootError(thrown);
      if (error.kind !== 'tool-missing') throw error;
      return { usable: false, reason: 'NFS-Ganesha is not on this host: install nfs-ganesha and nfs-ganesha-vfs' };
    }
  }

  check(wanted: Export): void {
    if (!this.#place.nfs) throw new OffshootError('not-supported', 'this mount gives no file handles, which an NFS server needs: stop the daemon, and start it with --nfs');
    if (wanted.options['listen'] !== undefined) {
      throw new OffshootError('invalid-argument', 'one server shows all NFS exports, where daemon start --export-address says: leave --listen out; --option port=N is the port');
    }
    const { version3, security } = rulesOf(wanted);
    const { address } = this.#place;
    if (isLoopbackAddress(address) && reachesBeyondLoopback(wanted.clients)) {
      throw new OffshootError('invalid-argument', `${address} is this host's own, and nobody else can come there: start the daemon with --export-address ADDRESS`);
    }
    if (version3 && !existsSync(RPCBIND_SOCKET)) {
      throw new OffshootError('tool-missing', 'NFS version 3 needs rpcbind, which does not run on this host: install and start it, or leave versions=3,4 out');
    }
    if (security !== 'sys' && !existsSync(KEYTAB)) throw new OffshootError('tool-missing', `security=${security} needs the host's keytab ${KEYTAB} with a key for nfs: make one, or leave security out`);
  }

  /** The port of the one server: it stays where it is when the export that named it is withdrawn. */
  settle(wanted: Export, shown: readonly Export[]): Promise<Readonly<Record<string, string>>> {
    const theirs = shown.find(({ options }) => options['port'] !== undefined)?.options['port'];
    return Promise.resolve({ ...wanted.options, port: wanted.options['port'] ?? theirs ?? String(this.#settings.port ?? PORT) });
  }

  async apply(wanted: readonly Export[], { signal }: PresenterCall): Promise<readonly ExportAddress[]> {
    if (wanted.length === 0) {
      await this.end();
      this.#server.forget();
      return [];
    }
    const settings = this.#serverSettings(wanted);
    const after = configuration(wanted, settings);
    makeExportsDirectory(this.#place.directory);
    for (const directory of [settings.recoveryDir, settings.credentialsDir]) mkdirSync(directory, { recursive: true, mode: 0o700 });
    this.#server.boundLog();
    const before = this.#server.state().kind === 'running' ? this.#server.readConfig() : null;
    if (before !== after) {
      try {
        await this.#become(before, after, settings, signal);
      } catch (thrown) {
        if (before !== null) await this.#putBack(before, after);
        throw thrown;
      }
    }
    const host = isIPv6(settings.address) ? `[${settings.address}]` : settings.address;
    return wanted.map(({ id, path }) => ({ id, addresses: [`nfs://${host}:${settings.port}/${path}`] }));
  }

  /** Connections, not files: who has come from an address that may use the export. A client of version 3 that has been silent for minutes is not seen. */
  clientsOf(shown: Export): Promise<readonly string[]> {
    const state = this.#server.state();
    if (state.kind !== 'running') return Promise.resolve([]);
    const { clients } = rulesOf(shown);
    const here = tcpSocketsOf(state.pid).filter(({ isConnected, remoteAddress }) => isConnected && isAmong(remoteAddress, clients));
    return Promise.resolve([...new Set(here.map(({ remoteAddress }) => remoteAddress))]);
  }

  lost(shown: readonly Export[]): Promise<string | null> {
    this.#server.boundLog();
    if (shown.length === 0 || this.#server.state().kind === 'running') return Promise.resolve(null);
    return Promise.resolve('the NFS server has ended');
  }

  async end(): Promise<void> {
    await this.#server.end({ termMs: END_MS });
  }

  async #become(before: string | null, after: string, settings: ServerSettings, signal: AbortSignal): Promise<void> {
    if (before !== null && canBeReread(before, after)) {
      this.#server.writeConfig(after);
      await this.#reread(signal);
      return;
    }
    await this.end();
    this.#server.writeConfig(after);
    await this.#start(settings, signal);
  }

  async #start(settings: ServerSettings, signal: AbortSignal): Promise<void> {
    const { address, port } = settings;
    // One that was just killed has it a moment longer.
    if (!(await isGivenUp({ address, port }, signal))) {
      throw new OffshootError('in-use', `somebody else listens at ${writtenListen({ address, port })}, such as this host's own NFS server: end that, or choose another port with --option port=N`, { port });
    }
    const from = this.#logBytes();
    await this.#launch(signal, from);
    try {
      this.#assertNothingWrong(from);
      this.#assertListensWhereItShould(settings);
    } catch (thrown) {
      await this.end();
      throw thrown;
    }
  }

  async #launch(signal: AbortSignal, from: number): Promise<void> {
    const { configFile, logFile, directory } = this.#server;
    try {
      await this.#server.start(
        { program: PROGRAM, arguments: ['-F', '-f', configFile, '-L', logFile, '-N', 'EVENT', '-p', join(directory, 'ganesha.lock')] },
        { signal, timeoutMs: START_MS, isUp: () => Promise.resolve(this.#said(from).includes(IS_UP)) },
      );
    } catch (thrown) {
      // It says a page of what is well before that.
      const grave = this.#said(from).split('\n').flatMap((line) => IS_GRAVE.exec(line)?.[1]?.trim() ?? []);
      if (grave.length === 0 || toOffshootError(thrown).kind !== 'io-error') throw thrown;
      throw new OffshootError('io-error', `the NFS server ended as soon as it was started: ${grave.join('; ')}`, { log: logFile }, thrown);
    }
  }

  async #reread(signal: AbortSignal): Promise<void> {
    const from = this.#logBytes();
    if (!this.#server.signal('SIGHUP')) throw new OffshootError('io-error', `the NFS server has ended: ${this.#server.lastWords()}`);
    const deadline = performance.now() + REREAD_MS;
    while (!this.#said(from).includes(IS_REREAD)) {
      if (performance.now() > deadline) throw new OffshootError('timed-out', `the NFS server has not read its exports again after ${REREAD_MS} ms: look at ${this.#server.logFile}`);
      await sleepUnlessAborted(POLL_MS, signal);
    }
    await sleepUnlessAborted(AFTERWORDS_MS, signal);
    this.#assertNothingWrong(from);
  }

  /** As well as can be; what went wrong first is what is told. */
  async #putBack(before: string, after: string): Promise<void> {
    const signal = new AbortController().signal;
    try {
      const isRunning = this.#server.state().kind === 'running';
      this.#server.writeConfig(before);
      if (isRunning && canBeReread(after, before)) await this.#reread(signal);
      else {
        await this.end();
        await this.#launch(signal, this.#logBytes());
      }
    } catch (thrown) {
      this.#place.logger.warn({ err: toOffshootError(thrown) }, 'the NFS exports of before could not be shown again');
    }
  }

  #assertNothingWrong(from: number): void {
    const wrong = this.#said(from).split('\n').flatMap((line) => {
      const found = IS_WRONG.exec(line);
      return found === null ? [] : [(found[1] ?? found[2] ?? '').trim()];
    });
    if (wrong.some((each) => each.includes(IS_WITHOUT_VFS))) throw new OffshootError('tool-missing', 'NFS-Ganesha cannot show directories without its FSAL VFS: install nfs-ganesha-vfs');
    if (wrong.length > 0) throw new OffshootError('io-error', `the NFS server refuses its configuration: ${wrong.join('; ')}`);
  }

  /** Ganesha 4.3 takes an IPv4 address for "all of them" where the host has no IPv6 address but loopback. */
  #assertListensWhereItShould({ address }: ServerSettings): void {
    const state = this.#server.state();
    const listening = state.kind === 'running' ? tcpSocketsOf(state.pid).filter(({ isListening }) => isListening) : [];
    if (EVERY_ADDRESS.has(address) || (listening.length > 0 && listening.every(({ localAddress }) => localAddress === address))) return;
    throw new OffshootError('not-supported',
      `the NFS server listens at ${listening.map(({ localAddress, localPort }) => `${localAddress}:${localPort}`).join(', ')} instead of ${address}, and was ended: this version needs an ` +
      'IPv6 address on some interface of the host for that; give it one, or start the daemon with --export-address 0.0.0.0 and keep others off by a firewall');
  }

  #serverSettings(wanted: readonly Export[]): ServerSettings {
    const ports = new Map(wanted.flatMap((each) => {
      const { port } = rulesOf(each);
      return port === null ? [] : [[port, each.path] as const];
    }));
    if (ports.size > 1) {
      throw new OffshootError('invalid-argument', `one server shows all NFS exports, at one port: ${[...ports].map(([port, path]) => `${path} says ${port}`).join(', ')}`);
    }
    const { directory, address, recoveryDir } = this.#place;
    const { port = PORT, mountPort = MOUNT_PORT, leaseSeconds = LEASE_SECONDS, graceSeconds = GRACE_SECONDS } = this.#settings;
    return {
      address, mountPort, leaseSeconds, graceSeconds, port: [...ports.keys()][0] ?? port,
      recoveryDir: recoveryDir ?? join(directory, 'recovery'), credentialsDir: join(directory, 'credentials'),
    };
  }

  #logBytes(): number {
    return this.#readLog((fd) => fstatSync(fd).size) ?? 0;
  }

  #said(fromByte: number): string {
    return this.#readLog((fd) => {
      const bytes = Buffer.alloc(Math.min(SAID_BYTES_MAX, Math.max(0, fstatSync(fd).size - fromByte)));
      return bytes.toString('utf8', 0, readSync(fd, bytes, 0, bytes.length, fromByte));
    }) ?? '';
  }

  #readLog<T>(body: (fd: number) => T): T | null {
    if (!existsSync(this.#server.logFile)) return null;
    const fd = openSync(this.#server.logFile, 'r');
    try {
      return body(fd);
    } finally {
      closeSync(fd);
    }
  }
}
