/**
 * The client of the control API: what the command line, and any other program in Node, calls the daemon with.
 *
 * One connection per call, over node:http. A refused call throws the daemon's own error, kind and context included. A
 * daemon that is not there is `daemon-not-running`, and the message says how to start it. While a server is being
 * restarted its socket refuses connections: a call waits that out for a moment, and calls that only read do so even
 * when the connection breaks. One who may not use the socket, but the read-only one beside it, uses that for calls that only read. A call that changes something is never sent twice: when its connection breaks, the error says
 * that its outcome is not known.
 */
import { existsSync } from 'node:fs';
import { request as httpRequest, type IncomingMessage } from 'node:http';
import { setTimeout as delay } from 'node:timers/promises';
import { OffshootError, httpStatusOf, type ErrorContext, type ErrorKind } from '../../blockstore/errors.js';
import { RESPONSE_BYTES_MAX } from './limits.js';
import { visible } from './paths.js';
import { checkSocketPath, readOnlySocketPath } from './socket-path.js';
import type { PromoteResult, RebaseRequest, RebaseResult } from './independence-schemas.js';
import type {
  CheckInfo, CheckRequest, CloneRangesRequest, CloneRangesResult, CloneRequest, CloneResult, ContainerInfo, DaemonStatus, DiskInfo, FillInfo, ImportRequest, JobInfo,
  JobState, MetricInfo, NodeInfo, RemoveResult, ScrubInfo, StopResult, UpgradeStarted,
} from './schemas.js';
import type { SpaceReport, QuotaInfo } from './space-schemas.js';
import type { SnapshotInfo, SnapshotRemoveResult, SnapshotRevertResult } from './snapshot-schemas.js';
import type { ContainerOptions, FillOptions, FillResumeOptions, RemoveOptions } from './service.js';
import { createExportClient, type ExportClient } from './export-client.js';
import { createMachineClient, type MachineClient } from './machine-client.js';
import { createVdiskClient, type VdiskClient } from './vdisk-client.js';
import { createTransferClient, type TransferClient } from './transfer-client.js';

export interface ControlClientOptions {
  readonly socketPath: string;
  /** How long a call waits for a server that is being restarted. */
  readonly patienceMs?: number;
  /** How long a call waits for its answer. */
  readonly timeoutMs?: number;
}

export interface ControlClient {
  readonly socketPath: string;
  status(): Promise<DaemonStatus>;
  metrics(): Promise<MetricInfo[]>;
  /** In the text format of Prometheus. */
  metricsText(): Promise<string>;
  stop(options: { readonly force: boolean }): Promise<StopResult>;
  upgrade(serverEntry: string): Promise<UpgradeStarted>;
  createContainer(name: string, options: Partial<ContainerOptions>): Promise<ContainerInfo>;
  listContainers(): Promise<ContainerInfo[]>;
  list(path: string | null): Promise<NodeInfo[]>;
  show(path: string): Promise<DiskInfo>;
  startImport(request: ImportRequest): Promise<JobInfo>;
  job(id: number): Promise<JobInfo>;
  jobs(state: JobState | null): Promise<JobInfo[]>;
  cancelJob(id: number): Promise<JobInfo>;
  clone(request: CloneRequest): Promise<CloneResult>;
  cloneRanges(request: CloneRangesRequest): Promise<CloneRangesResult>;
  fillStart(path: string, options: FillOptions): Promise<FillInfo>;
  fillPause(path: string): Promise<FillInfo>;
  fillResume(path: string, options: FillResumeOptions): Promise<FillInfo>;
  fillStatus(path: string): Promise<FillInfo>;
  remove(path: string, options: RemoveOptions): Promise<RemoveResult>;
  resize(path: string, sizeBytes: number): Promise<DiskInfo>;
  df(target: string | null): Promise<SpaceReport>;
  quotaSet(container: string, limitBytes: number): Promise<QuotaInfo>;
  quotaRemove(container: string): Promise<QuotaInfo>;
  quotaList(): Promise<QuotaInfo[]>;
  promote(path: string): Promise<PromoteResult>;
  rebase(request: RebaseRequest): Promise<RebaseResult>;
  checkStart(request: CheckRequest): Promise<CheckInfo>;
  checkStatus(id: number): Promise<CheckInfo>;
  checkCancel(id: number): Promise<CheckInfo>;
  scrubStatus(): Promise<ScrubInfo>;
  scrubStart(options: FillOptions): Promise<ScrubInfo>;
  scrubPause(): Promise<ScrubInfo>;
  scrubResume(options: FillResumeOptions): Promise<ScrubInfo>;
  createSnapshot(reference: string, options: { readonly quiesce: { readonly command: string; readonly timeoutSeconds: number } | null }): Promise<SnapshotInfo>;
  listSnapshots(container: string | null): Promise<SnapshotInfo[]>;
  removeSnapshot(reference: string, options: { readonly keepData: boolean }): Promise<SnapshotRemoveResult>;
  /** What came since the snapshot is lost. */
  revertSnapshot(reference: string): Promise<SnapshotRevertResult>;
  openApi(): Promise<Record<string, unknown>>;
  readonly transfers: TransferClient;
  readonly machines: MachineClient;
  readonly exports: ExportClient;
  readonly vdisks: VdiskClient;
}

/** A server is back within some 100 ms; a socket that nobody listens on for this long belongs to a dead daemon. */
const PATIENCE_MS = 2000;
const RETRY_MS = 50;
/** Control calls are short; long work is a job. Clones of 10,000 and a stop that waits for flushes fit. */
const TIMEOUT_MS = 120_000;
const REBASE_TIMEOUT_MS = 6 * 3_600_000;

export function createControlClient(options: ControlClientOptions): ControlClient {
  const socketPath = checkSocketPath(options.socketPath);
  const connection: Connection = { socketPath, patienceMs: options.patienceMs ?? PATIENCE_MS, timeoutMs: options.timeoutMs ?? TIMEOUT_MS };
  const get = async <T>(url: string): Promise<T> => await call<T>(connection, 'GET', url);
  const post = async <T>(url: string, body: object): Promise<T> => await call<T>(connection, 'POST', url, body);
  return {
    socketPath,
    status: () => get('/v1/status'),
    metrics: () => get('/v1/metrics'),
    metricsText: () => call(connection, 'GET', '/metrics', undefined, (text) => text),
    stop: (body) => post('/v1/stop', { force: body.force }),
    upgrade: (serverEntry) => post('/v1/upgrade', { serverEntry }),
    createContainer: (name, more) => post('/v1/containers', { name, ...more }),
    listContainers: () => get('/v1/containers'),
    list: (path) => get(path === null ? '/v1/nodes' : `/v1/nodes?${query({ path })}`),
    show: (path) => get(`/v1/disks?${query({ path })}`),
    startImport: (body) => post('/v1/imports', body),
    job: (id) => get(`/v1/jobs/${id}`),
    jobs: (state) => get(state === null ? '/v1/jobs' : `/v1/jobs?${query({ state })}`),
    cancelJob: (id) => post(`/v1/jobs/${id}/cancel`, {}),
    clone: (body) => post('/v1/clones', body),
    cloneRanges: (body) => post('/v1/clone-ranges', body),
    fillStart: (path, more) => post('/v1/fills', { path, rateBytesPerSecond: more.rateBytesPerSecond, flatten: more.flatten ?? false }),
    fillPause: (path) => post('/v1/fills/pause', { path }),
    // JSON leaves undefined out: the rate stays as it is.
    fillResume: (path, more) => post('/v1/fills/resume', { path, rateBytesPerSecond: more.rateBytesPerSecond }),
    fillStatus: (path) => get(`/v1/fills?${query({ path })}`),
    remove: (path, more) => call(connection, 'DELETE', `/v1/nodes?${query({ path, keepData: String(more.keepData), recursive: String(more.recursive) })}`),
    promote: (path) => post('/v1/disks/promote', { path }),
    // Compares what the clone has written with both images, however much that is.
    rebase: (body) => call({ ...connection, timeoutMs: Math.max(connection.timeoutMs, REBASE_TIMEOUT_MS) }, 'POST', '/v1/disks/rebase', body),
    resize: (path, sizeBytes) => post('/v1/disks/resize', { path, sizeBytes }),
    df: (target) => get(target === null ? '/v1/space' : `/v1/space?${query({ target })}`),
    quotaSet: (container, limitBytes) => post('/v1/quotas', { container, limitBytes }),
    quotaRemove: (container) => call(connection, 'DELETE', `/v1/quotas?${query({ container })}`),
    quotaList: () => get('/v1/quotas'),
    checkStart: (body) => post('/v1/checks', body),
    checkStatus: (id) => get(`/v1/checks/${id}`),
    checkCancel: (id) => post(`/v1/checks/${id}/cancel`, {}),
    scrubStatus: () => get('/v1/scrub'),
    scrubStart: (more) => post('/v1/scrub', { rateBytesPerSecond: more.rateBytesPerSecond }),
    scrubPause: () => post('/v1/scrub/pause', {}),
    scrubResume: (more) => post('/v1/scrub/resume', { rateBytesPerSecond: more.rateBytesPerSecond }),
    createSnapshot: (reference, more) => call({ ...connection, timeoutMs: connection.timeoutMs + 2000 * (more.quiesce?.timeoutSeconds ?? 0) }, 'POST', '/v1/snapshots', { reference, quiesce: more.quiesce }),
    listSnapshots: (container) => get(container === null ? '/v1/snapshots' : `/v1/snapshots?${query({ container })}`),
    removeSnapshot: (reference, more) => call(connection, 'DELETE', `/v1/snapshots?${query({ reference, keepData: String(more.keepData) })}`),
    revertSnapshot: (reference) => post('/v1/snapshots/revert', { reference, discardPresent: true }),
    openApi: () => get('/v1/openapi.json'),
    transfers: createTransferClient((method, url, body) => call(connection, method, url, body)),
    vdisks: createVdiskClient((method, url, body) => call(connection, method, url, body)),
    machines: createMachineClient((method, url, body, timeoutMs) => call({ ...connection, timeoutMs: connection.timeoutMs + (timeoutMs ?? 0) }, method, url, body)),
    exports: createExportClient((method, url, body) => call(connection, method, url, body)),
  };
}

interface Connection {
  readonly socketPath: string;
  readonly patienceMs: number;
  readonly timeoutMs: number;
}

type Method = 'GET' | 'POST' | 'DELETE';

interface Answer {
  readonly status: number;
  readonly text: string;
}

function query(fields: Readonly<Record<string, string>>): string {
  return new URLSearchParams(fields).toString();
}

async function call<T>(connection: Connection, method: Method, url: string, body?: object, read: (text: string) => unknown = parse): Promise<T> {
  const deadline = performance.now() + connection.patienceMs;
  let socketPath = connection.socketPath;
  for (;;) {
    try {
      // The daemon's serialiser made this from the very schema that T is the type of.
      return resultOf(connection, await send({ ...connection, socketPath }, method, url, body), read) as T;
    } catch (error) {
      const readOnly = readOnlySocketPath(connection.socketPath);
      if (codeOf(error) === 'EACCES' && method === 'GET' && socketPath !== readOnly && existsSync(readOnly)) {
        socketPath = readOnly;
        continue;
      }
      const patient = performance.now() < deadline;
      if (!(patient && mayTryAgain(error, method))) throw connectionError(error, connection, method);
    }
    await delay(RETRY_MS);
  }
}

/** Refused connections never reached a server. Broken ones may have, so only what changes nothing is asked again. */
function mayTryAgain(error: unknown, method: Method): boolean {
  const code = codeOf(error);
  return code === 'ECONNREFUSED' || code === 'EAGAIN' || (method === 'GET' && (code === 'ECONNRESET' || code === 'EPIPE'));
}

function codeOf(error: unknown): string | undefined {
  if (error instanceof OffshootError) return undefined;
  const code = (error as { code?: unknown } | null)?.code;
  return typeof code === 'string' ? code : undefined;
}

async function send(connection: Connection, method: Method, url: string, body?: object): Promise<Answer> {
  const payload = body === undefined ? null : Buffer.isBuffer(body) ? body : Buffer.from(JSON.stringify(body));
  return await new Promise<Answer>((resolve, reject) => {
    const request = httpRequest({
      socketPath: connection.socketPath,
      agent: false,
      method,
      path: url,
      headers: payload === null
        ? { accept: 'application/json' }
        : { accept: 'application/json', 'content-type': Buffer.isBuffer(body) ? 'application/octet-stream' : 'application/json', 'content-length': payload.length },
    }, (response) => { receive(response).then(resolve, reject); });
    request.setTimeout(connection.timeoutMs, () => {
      request.destroy(new OffshootError('timed-out',
        `the daemon did not answer ${method} ${url.split('?', 1)[0] ?? url} within ${Math.round(connection.timeoutMs / 1000)} s: look at its log, and at offshoot daemon status`));
    });
    request.once('error', reject);
    request.end(payload ?? undefined);
  });
}

async function receive(response: IncomingMessage): Promise<Answer> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of response as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > RESPONSE_BYTES_MAX) throw new OffshootError('too-large', `the daemon's answer has more than ${RESPONSE_BYTES_MAX} bytes: ask for less at once`);
    chunks.push(chunk);
  }
  return { status: response.statusCode ?? 0, text: Buffer.concat(chunks).toString('utf8') };
}

function resultOf(connection: Connection, answer: Answer, read: (text: string) => unknown): unknown {
  const result = answer.status >= 200 && answer.status < 300 ? read(answer.text) : undefined;
  if (result !== undefined) return result;
  const parsed = parse(answer.text);
  const error = (parsed as { error?: unknown } | undefined)?.error as { kind?: unknown; message?: unknown; context?: unknown } | undefined;
  if (typeof error?.message === 'string' && typeof error.kind === 'string') {
    throw new OffshootError(isErrorKind(error.kind) ? error.kind : 'internal', error.message, contextOf(error.context));
  }
  if (answer.status === 503) throw notRunning(connection.socketPath, 'it is about to end', undefined);
  throw new OffshootError('internal', `what answers on ${visible(connection.socketPath)} (HTTP status ${answer.status}) is no offshoot daemon, or one of another version: check --socket`, {
    socketPath: connection.socketPath, status: answer.status,
  });
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // resultOf says what that means
  }
}

function isErrorKind(kind: string): kind is ErrorKind {
  return Object.hasOwn(httpStatusOf, kind);
}

function contextOf(value: unknown): ErrorContext {
  return typeof value === 'object' && value !== null ? value as ErrorContext : {};
}

function notRunning(socketPath: string, reason: string, cause: unknown): OffshootError {
  return new OffshootError(
    'daemon-not-running',
    `no daemon answers on ${visible(socketPath)} (${reason}): start one with 'offshoot daemon start --store DIR --mount DIR', or name its socket with --socket or OFFSHOOT_SOCKET`,
    { socketPath },
    cause,
  );
}

function connectionError(error: unknown, connection: Connection, method: Method): unknown {
  const { socketPath } = connection;
  switch (codeOf(error)) {
    case 'ENOENT': return notRunning(socketPath, 'there is no such socket', error);
    case 'ENOTDIR': return notRunning(socketPath, 'there is no such socket', error);
    case 'ECONNREFUSED': return notRunning(socketPath, 'the socket is there, but nobody listens', error);
    case 'ENOTSOCK': return notRunning(socketPath, 'it is not a socket', error);
    case 'EACCES':
    case 'EPERM':
      return new OffshootError('permission-denied', `the control socket ${visible(socketPath)} is for root, and for the groups that were named when the daemon was started (--group, --read-only-group): run this command as root, or join such a group and log in again`, { socketPath }, error);
    case 'EAGAIN':
      return new OffshootError('busy', `the daemon on ${visible(socketPath)} takes no more connections: try again later`, { socketPath }, error);
    case 'ECONNRESET':
    case 'EPIPE':
      return new OffshootError('io-error', method === 'GET'
        ? 'the connection to the daemon broke: try again, and look at its log'
        : 'the daemon ended before it answered, so that it is not known whether this was done: look with offshoot ls or offshoot show before you try again',
      { socketPath, connectionBroken: true }, error);
    default: return error;
  }
}
