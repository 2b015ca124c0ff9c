/**
 * Reads one remote source through its fetcher process: queues, time limits, restarts.
 *
 * Main thread, asynchronous. One fetcher a source, started when somebody wants to read. A read waits until its own limit and no longer,
 * whatever the source does; requests that were under way when a fetcher ended go to the next one. What a fetcher says at the door
 * decides who goes on waiting: a file that is gone or changed fails everybody at once, a connection that is down may come back within
 * the limit. A fetcher that has said nothing for two such limits is killed; since a process that waits in the kernel may not die, the next
 * one is started when it has, so that there is never more than one. After failures the pause before the next start doubles.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import type { Duplex } from 'node:stream';
import { fileURLToPath } from 'node:url';

import { OffshootError } from '../errors.js';
import type { FileIdentity } from '../meta/rows.js';
import type { FetcherOptions, FetcherRefusal } from './fetcher/options.js';
import type { IdentityScope } from './identity.js';
import { NbdClient, NbdRefusal, NbdReplyError } from './nbd-client.js';
import { NbdError } from './nbd.js';

export interface RemoteReaderOptions {
  readonly file: string;
  readonly identity: FileIdentity;
  readonly scope: IdentityScope;
  /** What a read may wait at most; here it says when a fetcher is given up. */
  readonly timeoutMs: number;
  /** The program to run; null for the one beside this file. Tests put their own here. */
  readonly fetcherEntry?: string;
}

export type ConditionKind = 'ok' | 'waiting' | 'source-unreachable' | 'source-changed';

export interface Condition {
  readonly kind: ConditionKind;
  readonly reason: string | null;
}

interface Entry {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  readonly resolve: (bytes: Buffer) => void;
  readonly reject: (error: Error) => void;
  timer: NodeJS.Timeout | null;
  settled: boolean;
}

const IN_FLIGHT_MAX = 32;
const BACK_OFF_MS_MIN = 100;
const BACK_OFF_MS_MAX = 10_000;
/** A refusal is the answer for this long: a missing file is not looked for by every read. */
const REFUSAL_MS = 1000;
/** A source that has said nothing for this long is reported as hanging. */
const SLOW_MS = 2000;
const STDERR_BYTES_MAX = 2000;
/** What will not pass by waiting. All other errors may: a server that is down, a mount that hangs. */
const FINAL_CODES = new Set(['ENOENT', 'ENOTDIR', 'EACCES', 'EPERM', 'EISDIR', 'ELOOP', 'ENAMETOOLONG', 'EINVAL']);

export class RemoteReader {
  private readonly options: RemoteReaderOptions;
  private child: ChildProcess | null = null;
  private client: NbdClient | null = null;
  private readonly queue: Entry[] = [];
  private readonly inFlight = new Set<Entry>();
  private refusal: OffshootError | null = null;
  private lostReason: string | null = null;
  private restart: NodeJS.Timeout | null = null;
  private failures = 0;
  private lastStartMs = Number.NEGATIVE_INFINITY;
  /** When the fetcher last said something, or was first asked for something. */
  private progressMs = 0;
  private closed = false;

  constructor(options: RemoteReaderOptions) {
    this.options = options;
  }

  /** Process id of the fetcher; null while there is none. */
  get pid(): number | null {
    return this.child?.pid ?? null;
  }

  /** Exactly `lengthBytes`. `source-unreachable` at `deadlineMs` (of performance.now()) at the latest; `io-error` for what the source cannot read. */
  async read(offsetBytes: number, lengthBytes: number, deadlineMs: number): Promise<Buffer> {
    if (this.closed) throw this.unreachable('it is not in use any more');
    if (this.refusal !== null && performance.now() - this.lastStartMs < REFUSAL_MS) throw this.refusal;
    return await new Promise<Buffer>((resolve, reject) => {
      const entry: Entry = { offsetBytes, lengthBytes, resolve, reject, timer: null, settled: false };
      entry.timer = setTimeout(() => {
        this.settle(entry);
        const seconds = (this.options.timeoutMs / 1000).toFixed(0);
        reject(this.unreachable(this.lostReason ?? `it did not answer within ${seconds} s`));
      }, Math.max(0, deadlineMs - performance.now()));
      if (this.queue.length === 0 && this.inFlight.size === 0) this.progressMs = performance.now();
      this.queue.push(entry);
      this.pump();
    });
  }

  condition(): Condition {
    if (this.refusal !== null) return { kind: this.refusal.kind === 'source-changed' ? 'source-changed' : 'source-unreachable', reason: this.refusal.message };
    if (this.lostReason !== null) return { kind: 'source-unreachable', reason: this.lostReason };
    const isAsked = this.queue.length > 0 || this.inFlight.size > 0 || (this.child !== null && this.client === null);
    const silentMs = performance.now() - this.progressMs;
    return isAsked && silentMs > SLOW_MS ? { kind: 'waiting', reason: `it has not answered for ${Math.round(silentMs / 1000)} s` } : { kind: 'ok', reason: null };
  }

  /** By the clock: looks whether a source that was away is back, and gives up a fetcher that hangs. */
  look(): void {
    if (this.closed) return;
    const nowMs = performance.now();
    if (this.child === null) {
      const isAway = this.refusal !== null || this.lostReason !== null;
      if (isAway && this.restart === null && nowMs - this.lastStartMs > this.backOffMs()) this.start();
      return;
    }
    const isAsked = this.inFlight.size > 0 || this.client === null || this.queue.length > 0;
    if (isAsked && nowMs - this.progressMs > 2 * this.options.timeoutMs) this.child.kill('SIGKILL');
  }

  close(): void {
    this.closed = true;
    if (this.restart !== null) clearTimeout(this.restart);
    for (const entry of [...this.queue, ...this.inFlight]) {
      this.settle(entry);
      entry.reject(this.unreachable('it is not in use any more'));
    }
    this.client?.end();
    this.child?.kill('SIGKILL');
  }

  private pump(): void {
    if (this.closed) return;
    if (this.client === null) {
      // An exit or a refusal under way decides first.
      if (this.child === null && this.restart === null) this.start();
      return;
    }
    while (this.queue.length > 0 && this.inFlight.size < IN_FLIGHT_MAX) {
      const entry = this.queue.shift();
      if (entry === undefined || entry.settled) continue;
      this.inFlight.add(entry);
      void this.send(this.client, entry);
    }
  }

  private async send(client: NbdClient, entry: Entry): Promise<void> {
    let bytes: Buffer;
    try {
      bytes = await client.read(entry.offsetBytes, entry.lengthBytes);
    } catch (thrown) {
      this.inFlight.delete(entry);
      if (thrown instanceof NbdReplyError && thrown.errno !== NbdError.ESHUTDOWN) {
        this.progressed();
        if (!entry.settled) {
          this.settle(entry);
          entry.reject(new OffshootError('io-error',
            `the source file ${this.options.file} cannot be read at byte ${entry.offsetBytes} (error ${thrown.errno})`, { path: this.options.file, offsetBytes: entry.offsetBytes, errno: thrown.errno }));
        }
        this.pump();
        return;
      }
      // The file is another one now, or the fetcher ended: the next fetcher says which, and answers if it can.
      if (!entry.settled) this.queue.unshift(entry);
      if (this.client === client) {
        this.client = null;
        client.end();
        this.child?.kill('SIGKILL');
      }
      return;
    }
    this.inFlight.delete(entry);
    this.failures = 0;
    this.progressed();
    if (!entry.settled) {
      this.settle(entry);
      entry.resolve(bytes);
    }
    this.pump();
  }

  private progressed(): void {
    this.progressMs = performance.now();
    this.lostReason = null;
  }

  private start(): void {
    this.lastStartMs = performance.now();
    this.progressMs = this.lastStartMs;
    const { file, identity, scope } = this.options;
    const fetcher: FetcherOptions = { file, expected: { identity, scope }, parentPid: process.pid };
    const child = spawnFetcher(fetcher, this.options.fetcherEntry);
    this.child = child;
    let said = '';
    child.stderr?.on('data', (chunk: Buffer) => { said = (said + chunk.toString('utf8')).slice(-STDERR_BYTES_MAX); });
    child.once('error', (error) => { this.gone(child, `its fetcher could not be started: ${error.message}`); });
    child.once('exit', () => { this.gone(child, said === '' ? 'its connection was lost' : `its fetcher failed: ${said.trim().split('\n')[0] ?? ''}`); });
    NbdClient.connect(child.stdio[3] as Duplex).then(
      (client) => {
        if (this.child !== child || this.closed) {
          client.end();
          return;
        }
        this.client = client;
        this.refusal = null;
        this.progressed();
        this.pump();
      },
      (thrown: unknown) => {
        if (this.child === child && thrown instanceof NbdRefusal) this.refused(thrown.message);
        child.kill('SIGKILL');
      },
    );
  }

  /** The fetcher opened the door and said no. */
  private refused(text: string): void {
    this.progressed();
    const { file } = this.options;
    const { kind, message, code } = JSON.parse(text) as FetcherRefusal;
    if (kind === 'source-changed') this.refusal = sourceChanged(file, message);
    else if (code !== null && FINAL_CODES.has(code)) this.refusal = this.unreachable(message);
    else {
      this.refusal = null;
      this.lostReason = message;
      return;
    }
    for (const entry of this.queue.splice(0)) {
      if (entry.settled) continue;
      this.settle(entry);
      entry.reject(this.refusal);
    }
  }

  /** The fetcher has ended. Who still waits gets the next one. */
  private gone(child: ChildProcess, reason: string): void {
    if (this.child !== child) return;
    this.child = null;
    this.client?.end();
    this.client = null;
    if (this.closed) return;
    this.failures += 1;
    if (this.refusal === null) this.lostReason ??= reason;
    this.restart = setTimeout(() => {
      this.restart = null;
      if (this.queue.length > 0 || this.inFlight.size > 0) this.start();
    }, this.failures === 1 ? 0 : this.backOffMs());
  }

  private backOffMs(): number {
    return Math.min(BACK_OFF_MS_MAX, BACK_OFF_MS_MIN * 2 ** Math.min(this.failures, 10));
  }

  private settle(entry: Entry): void {
    entry.settled = true;
    if (entry.timer !== null) clearTimeout(entry.timer);
    const at = this.queue.indexOf(entry);
    if (at >= 0) this.queue.splice(at, 1);
  }

  private unreachable(why: string): OffshootError {
    return new OffshootError('source-unreachable', `the source file ${this.options.file} cannot be reached: ${why}`, { path: this.options.file });
  }
}

export function sourceChanged(file: string, what: string): OffshootError {
  return new OffshootError('source-changed',
    `the source file ${file} was changed or replaced since it was imported in place (${what}); put the original back, or remove what stands on it`, { path: file });
}

/** Starts a fetcher; its socket is its `stdio[3]`. It inherits nothing else of this process. */
export function spawnFetcher(options: FetcherOptions, entry = fileURLToPath(new URL('./fetcher/main.js', import.meta.url))): ChildProcess {
  return spawn(process.execPath, [entry, JSON.stringify(options)], {
    cwd: '/', stdio: ['ignore', options.expected === null ? 'pipe' : 'ignore', 'pipe', 'pipe'], env: { ...process.env, UV_THREADPOOL_SIZE: '8' },
  });
}
