/**
 * What the holder and the server say to each other, and what the holder reports to whoever started it.
 *
 * Messages cross a process boundary, and after an upgrade a boundary between builds: the holder stays what it was. They are checked
 * on arrival; one that is not understood is `undefined`, and the receiver says so in its log and goes on. A build says what it speaks
 * in its first message (`hello`), and `HOLDER_PROTOCOL` must rise when a message changes its meaning or a new one must be understood.
 * Types and checks only; the channel is Node's own (`child.send`, `process.send`).
 */
import { errnoOf, type ErrorKind } from '../../blockstore/errors.js';

/** Of this file, of the server's options and of the descriptors that it inherits. */
export const HOLDER_PROTOCOL = 1;

export interface ReportedError {
  readonly kind: ErrorKind;
  readonly message: string;
}

/** What must fit for one build's server to follow another's under the same mount. */
export interface BuildIdentity {
  readonly version: string;
  readonly holderProtocol: number;
  /** Of the store's database. */
  readonly storeSchema: number;
  /** Of the journals, handles and session in the run-time directory. */
  readonly runtimeFormat: number;
}

export type ServerMessage =
  /** The first one: all modules are loaded. On standby the server now waits for `go`, and touches neither store nor mount before. */
  | { readonly type: 'hello'; readonly build: BuildIdentity }
  /** Recovered, and answering the kernel: guests go on. */
  | { readonly type: 'serving' }
  /** Listening for commands as well. */
  | { readonly type: 'ready' }
  /** Cannot start; ends itself after this. */
  | { readonly type: 'failed'; readonly error: ReportedError }
  /**
   * Asks the holder to unmount. `force`: also when the mount is in use; whoever uses it then gets errors. After the
   * answer `unmounted` the server commits, closes and exits 0.
   */
  | { readonly type: 'unmount'; readonly requestId: number; readonly force: boolean }
  /** Asks the holder to let another build's server follow: `entry` is its program. Answered by `upgrade-accepted` or `upgrade-refused`. */
  | { readonly type: 'upgrade'; readonly requestId: number; readonly entry: string }
  | { readonly type: 'pong' };

export type HolderMessage =
  /** To a server on standby: the one before is gone, begin. */
  | { readonly type: 'go'; readonly restarts: number }
  /** Stop in an orderly way: ask for the unmount, and go on serving when it is refused. */
  | { readonly type: 'shutdown' }
  /** Commit, close, end with HAND_OVER_CODE, and leave the mount to the next. */
  | { readonly type: 'hand-over' }
  | { readonly type: 'unmounted'; readonly requestId: number }
  | { readonly type: 'unmount-refused'; readonly requestId: number; readonly message: string }
  /** The new build is loaded and fits; `hand-over` follows. */
  | { readonly type: 'upgrade-accepted'; readonly requestId: number; readonly upgradeId: number }
  | { readonly type: 'upgrade-refused'; readonly requestId: number; readonly error: ReportedError }
  | { readonly type: 'ping' };

/** How a server ends that has handed over: everything is committed, the mount lives. */
export const HAND_OVER_CODE = 75;

/** The one line that a start ends with. */
export type StartReport =
  | { readonly ready: true; readonly holderPid: number; readonly serverPid: number; readonly notes: readonly string[] }
  | { readonly ready: false; readonly error: ReportedError };

type Fields = Readonly<Record<string, unknown>>;

export function readServerMessage(value: unknown): ServerMessage | undefined {
  const fields = fieldsOf(value);
  const requestId = fields?.['requestId'];
  switch (fields?.['type']) {
    case 'serving':
      return { type: 'serving' };
    case 'ready':
      return { type: 'ready' };
    case 'pong':
      return { type: 'pong' };
    case 'hello': {
      const build = readBuild(fields['build']);
      return build === undefined ? undefined : { type: 'hello', build };
    }
    case 'failed': {
      const error = readReportedError(fields['error']);
      return error === undefined ? undefined : { type: 'failed', error };
    }
    case 'unmount':
      return typeof requestId === 'number' ? { type: 'unmount', requestId, force: fields['force'] === true } : undefined;
    case 'upgrade': {
      const entry = fields['entry'];
      return typeof requestId === 'number' && typeof entry === 'string' ? { type: 'upgrade', requestId, entry } : undefined;
    }
    default:
      return undefined;
  }
}

export function readHolderMessage(value: unknown): HolderMessage | undefined {
  const fields = fieldsOf(value);
  const requestId = fields?.['requestId'];
  switch (fields?.['type']) {
    case 'shutdown':
      return { type: 'shutdown' };
    case 'hand-over':
      return { type: 'hand-over' };
    case 'ping':
      return { type: 'ping' };
    case 'go': {
      const restarts = fields['restarts'];
      return typeof restarts === 'number' ? { type: 'go', restarts } : undefined;
    }
    case 'unmounted':
      return typeof requestId === 'number' ? { type: 'unmounted', requestId } : undefined;
    case 'unmount-refused': {
      const message = fields['message'];
      return typeof requestId === 'number' && typeof message === 'string'
        ? { type: 'unmount-refused', requestId, message }
        : undefined;
    }
    case 'upgrade-accepted': {
      const upgradeId = fields['upgradeId'];
      return typeof requestId === 'number' && typeof upgradeId === 'number' ? { type: 'upgrade-accepted', requestId, upgradeId } : undefined;
    }
    case 'upgrade-refused': {
      const error = readReportedError(fields['error']);
      return typeof requestId === 'number' && error !== undefined ? { type: 'upgrade-refused', requestId, error } : undefined;
    }
    default:
      return undefined;
  }
}

export function readStartReport(value: unknown): StartReport | undefined {
  const fields = fieldsOf(value);
  if (fields?.['ready'] === true) {
    const { holderPid, serverPid, notes } = fields;
    if (typeof holderPid !== 'number' || typeof serverPid !== 'number' || !Array.isArray(notes)) return undefined;
    return { ready: true, holderPid, serverPid, notes: notes.map(String) };
  }
  const error = readReportedError(fields?.['error']);
  return error === undefined ? undefined : { ready: false, error };
}

function readBuild(value: unknown): BuildIdentity | undefined {
  const fields = fieldsOf(value);
  const version = fields?.['version'];
  const holderProtocol = fields?.['holderProtocol'];
  const storeSchema = fields?.['storeSchema'];
  const runtimeFormat = fields?.['runtimeFormat'];
  return typeof version === 'string' && typeof holderProtocol === 'number' && typeof storeSchema === 'number' && typeof runtimeFormat === 'number'
    ? { version, holderProtocol, storeSchema, runtimeFormat }
    : undefined;
}

function readReportedError(value: unknown): ReportedError | undefined {
  const fields = fieldsOf(value);
  const kind = fields?.['kind'];
  const message = fields?.['message'];
  if (typeof kind !== 'string' || typeof message !== 'string') return undefined;
  // A kind from elsewhere must not reach the tables that are indexed by it.
  return { kind: Object.hasOwn(errnoOf, kind) ? (kind as ErrorKind) : 'internal', message };
}

function fieldsOf(value: unknown): Fields | undefined {
  return typeof value === 'object' && value !== null ? (value as Fields) : undefined;
}
