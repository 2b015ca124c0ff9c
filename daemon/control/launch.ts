/**
 * Starts a daemon and waits until it is ready, or says why it did not start.
 *
 * Runs in the command that starts the daemon. The holder is started in a session of its own, so that neither Ctrl-C nor the end of
 * the terminal reaches it or its server; it reports over a descriptor, and until it has opened the store's log, its error output goes to an
 * unnamed temporary file, so that even a holder that dies at once is not mute. In the foreground the command stays, passes signals
 * on, and shows the log on standard error: standard output belongs to the command's own answer.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { closeSync, openSync, readFileSync, unlinkSync } from 'node:fs';
import { randomUUID } from 'node:crypto';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import type { Readable } from 'node:stream';
import { fileURLToPath } from 'node:url';

import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { readCredentials } from '../hypervisor/vsphere/credentials.js';
import { parseVsphereSettings } from '../hypervisor/vsphere/settings.js';
import { lastWordsIn, lastWordsOf, sizeOf } from '../holder/last-words.js';
import { SOURCE_TIMEOUT_SECONDS } from './limits.js';
import { readStartReport, type StartReport } from '../holder/ipc.js';
import { defaultWorkers, parseHolderOptions, type HolderOptions, type HypervisorSettings, type LogLevel, type Transport } from '../holder/options.js';
import { storedConnections, type StoredConnection } from '../holder/stored-connections.js';
import type { DaemonPolicy } from './policy.js';

export interface StartDaemonOptions {
  readonly storeDir: string;
  readonly mountDir: string;
  readonly socketPath: string;
  /** I/O workers; undefined: as many as suit the machine. */
  readonly workers: number | undefined;
  readonly transport: Transport;
  readonly logLevel: LogLevel;
  /** Who may use the control sockets, and when space is little; the defaults when left out. */
  readonly policy?: DaemonPolicy;
  /** How long a read waits for a source that does not answer; left out: as long as is usual. */
  readonly sourceTimeoutSeconds?: number;
  /** True: resolves when the daemon has ended, in an orderly way. */
  readonly foreground: boolean;
  /** Keep a next server loaded, so that a crash stalls guests for a shorter time; left out: yes. */
  readonly spare?: boolean;
  /** Limit of the scrub that begins by itself; null: none does; undefined: the default. */
  readonly scrubRateBytesPerSecond?: number | null | undefined;
  readonly hypervisors?: HypervisorSettings;
  readonly exportAddress?: string;
  /** Lets an NFS server make file handles of what is under the mount; left out: no. */
  readonly nfs?: boolean;
  readonly attachLimit?: number | undefined;
}

export interface StartDaemonResult {
  readonly holderPid: number;
  readonly serverPid: number;
  readonly socketPath: string;
  readonly mountDir: string;
  /** What the start has to say to people, one sentence each: a dead mount that was cleared, for example. */
  readonly notes: readonly string[];
}

export interface LaunchHooks {
  /** In the foreground: called when the daemon is ready. */
  readonly onReady?: (result: StartDaemonResult) => void;
  /** Programs to run instead of the built ones. */
  readonly holderEntry?: string;
  readonly serverEntry?: string;
}

const HOLDER_ENTRY = fileURLToPath(new URL('../holder/main.js', import.meta.url));
const REPORT_FD = 3;
const REPORT_BYTES_MAX = 1024 * 1024;
/** SIGHUP too: in the foreground the daemon belongs to its terminal. */
const STOP_SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

export async function startDaemon(options: StartDaemonOptions, hooks: LaunchHooks = {}): Promise<StartDaemonResult> {
  // The service manager started this process, and the holder needs what it kept.
  const stored = options.foreground ? storedConnections(process.pid) : [];
  const holderOptions = checkedOptions(options, hooks, stored);
  const lastWords = options.foreground ? undefined : openLastWords(join(holderOptions.storeDir, 'offshoot.log'));
  try {
    const output = lastWords === undefined ? 2 : lastWords.fd;
    // Meant for this process alone.
    const environment = { ...process.env, LISTEN_PID: undefined, LISTEN_FDS: undefined, LISTEN_FDNAMES: undefined };
    const holder = spawn(process.execPath, [hooks.holderEntry ?? HOLDER_ENTRY, JSON.stringify(holderOptions)], {
      cwd: '/',
      detached: true,
      env: environment,
      stdio: ['ignore', output, output, 'pipe', ...stored.map(({ fd }) => fd)],
    });
    const stopForwarding = options.foreground ? forwardSignals(holder) : () => undefined;
    try {
      const ended = exitOf(holder);
      const report = await reportOf(holder);
      if (report === undefined) throw diedError(await ended, lastWords?.read());
      if (!report.ready) throw new OffshootError(report.error.kind, report.error.message);
      const result = {
        holderPid: report.holderPid,
        serverPid: report.serverPid,
        socketPath: holderOptions.socketPath,
        mountDir: holderOptions.mountDir,
        notes: report.notes,
      };
      if (!options.foreground) {
        holder.unref();
        return result;
      }
      hooks.onReady?.(result);
      const end = await ended;
      if (end.code !== 0) throw diedError(end, undefined);
      return result;
    } finally {
      stopForwarding();
    }
  } finally {
    lastWords?.close();
  }
}

function checkedOptions(options: StartDaemonOptions, hooks: LaunchHooks, stored: readonly StoredConnection[]): HolderOptions {
  if (options.nfs === true && options.transport !== 'kernel') {
    throw new OffshootError('invalid-argument', `--nfs needs the kernel transport: libfuse keeps no file handles over a restart, so leave --transport ${options.transport} out`);
  }
  return parseHolderOptions(
    JSON.stringify({
      storeDir: absolute(options.storeDir, 'store'),
      mountDir: absolute(options.mountDir, 'mount point'),
      socketPath: absolute(options.socketPath, 'control socket'),
      workers: options.workers ?? defaultWorkers(),
      transport: options.transport,
      logLevel: options.logLevel,
      ...(options.policy === undefined ? {} : { policy: options.policy }),
      sourceTimeoutSeconds: options.sourceTimeoutSeconds ?? SOURCE_TIMEOUT_SECONDS,
      foreground: options.foreground,
      reportFd: REPORT_FD,
      serverEntry: hooks.serverEntry ?? null,
      spare: options.spare ?? true,
      stored: stored.map(({ connection }, index) => ({ fd: REPORT_FD + 1 + index, connection })),
      ...(options.scrubRateBytesPerSecond === undefined ? {} : { scrubRateBytesPerSecond: options.scrubRateBytesPerSecond }),
      ...(options.exportAddress === undefined ? {} : { exportAddress: options.exportAddress }),
      ...(options.attachLimit === undefined ? {} : { attachLimit: options.attachLimit }),
      ...(options.hypervisors === undefined ? {} : { hypervisors: checkedHypervisors(options.hypervisors, absolute(options.mountDir, 'mount point')) }),
      ...(options.nfs === true ? { nfs: true } : {}),
    } satisfies HolderOptions),
  );
}

/** What is wrong with settings is said while somebody reads it; what goes wrong with them later costs the machines of vSphere and nothing else. */
function checkedHypervisors({ libvirtUri, vsphereSettings }: HypervisorSettings, mountDir: string): HypervisorSettings {
  if (libvirtUri?.startsWith('-') === true) throw new OffshootError('invalid-argument', `--libvirt takes an address such as qemu:///system, not ${libvirtUri}`);
  if (vsphereSettings === undefined) return { ...(libvirtUri === undefined ? {} : { libvirtUri }) };
  const file = absolute(vsphereSettings, 'settings for vSphere');
  try {
    const { datastores, credentialsFile } = parseVsphereSettings(readFileSync(file, 'utf8'));
    if (!datastores.some(({ directory }) => isBelow(directory, mountDir) || isBelow(mountDir, directory))) {
      throw new OffshootError('invalid-argument', `settings for vSphere: none of its datastores holds the mount ${mountDir}, but ${datastores.map(({ directory }) => directory).join(', ')}: set directory of one to it`);
    }
    readCredentials(credentialsFile);
  } catch (thrown) {
    const error = toOffshootError(thrown);
    throw new OffshootError(error.kind, `${file}: ${error.message}`, { path: file }, error);
  }
  return { ...(libvirtUri === undefined ? {} : { libvirtUri }), vsphereSettings: file };
}

function isBelow(top: string, directory: string): boolean {
  return `${directory}/`.startsWith(top.endsWith('/') ? top : `${top}/`);
}

/** The holder runs in `/`, so paths are made absolute here, where they were typed. */
function absolute(path: string, what: string): string {
  if (path === '') throw new OffshootError('invalid-argument', `the path of the ${what} is empty: name one`);
  return resolve(path);
}

interface ProcessEnd {
  readonly code: number | null;
  readonly signal: string | null;
  readonly error?: Error;
}

function exitOf(child: ChildProcess): Promise<ProcessEnd> {
  return new Promise((settle) => {
    child.once('error', (error) => {
      settle({ code: null, signal: null, error });
    });
    child.once('exit', (code, signal) => {
      settle({ code, signal });
    });
  });
}

/** The holder's one line; undefined when it died without a word. */
async function reportOf(holder: ChildProcess): Promise<StartReport | undefined> {
  const pipe = holder.stdio[REPORT_FD] as Readable | null | undefined;
  if (pipe === null || pipe === undefined) return undefined;
  let text = '';
  try {
    for await (const chunk of pipe) {
      text += String(chunk);
      if (text.length > REPORT_BYTES_MAX) return undefined;
    }
    return readStartReport(JSON.parse(text));
  } catch (error) {
    // A line cut short by the holder's death, or no line at all: what follows says how it died.
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code === 'ECONNRESET') return undefined;
    throw error;
  }
}

function forwardSignals(holder: ChildProcess): () => void {
  const forward = (): void => {
    holder.kill('SIGTERM');
  };
  for (const signal of STOP_SIGNALS) process.on(signal, forward);
  return () => {
    for (const signal of STOP_SIGNALS) process.off(signal, forward);
  };
}

function diedError(end: ProcessEnd, lastWords: string | undefined): OffshootError {
  const how =
    end.error !== undefined
      ? `could not be started: ${end.error.message}`
      : end.signal === null
        ? `ended with code ${end.code ?? 'unknown'}`
        : `was killed by ${end.signal}`;
  const words = lastWords === undefined || lastWords === '' ? '' : `; its last words:\n${lastWords}`;
  return new OffshootError('internal', `the daemon's holder ${how}${words}`, { code: end.code, signal: end.signal }, end.error);
}

interface LastWords {
  readonly fd: number;
  read(): string;
  close(): void;
}

function openLastWords(logPath: string): LastWords {
  const logBytesBefore = sizeOf(logPath);
  const path = join(tmpdir(), `offshoot-start-${randomUUID()}`);
  const fd = openSync(path, 'wx+', 0o600);
  unlinkSync(path);
  return {
    fd,
    read: () => [lastWordsOf(fd, 0), lastWordsIn(logPath, logBytesBefore)].filter((words) => words !== '').join('\n'),
    close: () => {
      closeSync(fd);
    },
  };
}
