/**
 * Who may use the control sockets, tried with real processes of other users and groups on real sockets: the kernel's file modes, the
 * credentials that it keeps of each connection, and what is refused to whom. Needs root, as the daemon does.
 */
import { chmodSync, chownSync, lstatSync } from 'node:fs';
import { connect, createConnection, type Socket } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { accessOf, assertMay } from '../../daemon/control/access.js';
import { createControlClient } from '../../daemon/control/client.js';
import { CONNECTIONS_MAX, HEADER_BYTES_MAX } from '../../daemon/control/limits.js';
import { DEFAULT_POLICY, parsePolicy, type DaemonPolicy } from '../../daemon/control/policy.js';
import type { Peer } from '../../daemon/control/peer-credentials.js';
import { routes } from '../../daemon/control/routes.js';
import { startControlServer, type ControlServer } from '../../daemon/control/server.js';
import { readOnlySocketPath } from '../../daemon/control/socket-path.js';
import { makeDirectory, recordingLogger, type LogLine } from '../support/control-fixture.js';
import { MemoryService } from '../support/control-memory-service.js';
import { command } from '../support/model/command.js';
import { lacks } from '../support/tools.js';

const ADMINS = 71_001;
const READERS = 71_002;
const OTHERS = 71_003;
const UID = 71_100;

const POLICY: DaemonPolicy = { ...DEFAULT_POLICY, adminGid: ADMINS, readOnlyGid: READERS };
const CHANGE = ['POST', '/v1/containers', '{"name":"made"}'] as const;
const LOOK = ['GET', '/v1/containers', ''] as const;

/** Prints the status and the kind of what a request got, or the code of the error of its connection. */
const REQUEST = `
const [socketPath, method, path, body] = process.argv.slice(1);
const request = require('node:http').request({ socketPath, method, path, headers: { 'content-type': 'application/json' } }, (response) => {
  let text = '';
  response.on('data', (chunk) => { text += chunk; });
  response.on('end', () => { console.log(response.statusCode, JSON.parse(text).error?.kind ?? '-'); });
});
request.on('error', (error) => { console.log(error.code); });
request.end(body === '' ? undefined : body);
`;

let directory: ReturnType<typeof makeDirectory>;
let service: MemoryService;
let log: LogLine[];
const servers: ControlServer[] = [];
const sockets: Socket[] = [];

beforeEach(() => {
  directory = makeDirectory();
  chmodSync(directory.path, 0o711);
  service = new MemoryService();
  log = [];
});
afterEach(async () => {
  for (const socket of sockets.splice(0)) socket.destroy();
  for (const server of servers.splice(0)) await server.close();
  directory.remove();
});

async function start(policy: DaemonPolicy = POLICY, requestTimeoutMs?: number): Promise<string> {
  const socketPath = join(directory.path, 'o.sock');
  servers.push(await startControlServer({
    service, socketPath, version: '1', logger: recordingLogger(log), onInternalError: () => undefined, policy,
    ...(requestTimeoutMs === undefined ? {} : { requestTimeoutMs }),
  }));
  return socketPath;
}

interface Who {
  readonly uid?: number;
  readonly gid?: number;
  readonly groups?: readonly number[];
}

/** What a process of that user and those groups gets. */
async function ask(who: Who, socketPath: string, [method, path, body]: readonly [string, string, string]): Promise<string> {
  const { uid = UID, gid = OTHERS, groups = [] } = who;
  const groupArguments = groups.length === 0 ? ['--clear-groups'] : [`--groups=${groups.join(',')}`];
  const result = await command('setpriv', [`--reuid=${uid}`, `--regid=${gid}`, ...groupArguments, process.execPath, '-e', REQUEST, socketPath, method, path, body]);
  expect(result.stderr).toBe('');
  return result.stdout.trim();
}

describe.skipIf(lacks('setpriv') || process.geteuid?.() !== 0)('the control sockets', () => {
  it('admit root alone when no group was named', async () => {
    const socketPath = await start(DEFAULT_POLICY);
    expect(lstatSync(socketPath).mode & 0o7777).toBe(0o600);
    expect(lstatSync(readOnlySocketPath(socketPath), { throwIfNoEntry: false })).toBeUndefined();
    expect(await ask({ uid: 0, gid: 0 }, socketPath, CHANGE)).toBe('201 -');
    expect(await ask({}, socketPath, LOOK)).toBe('EACCES');
    expect(await ask({ groups: [ADMINS] }, socketPath, LOOK)).toBe('EACCES');
  });

  it('let the administrators\' group do everything, as primary and as supplementary group, however many groups there are', async () => {
    const socketPath = await start();
    const found = lstatSync(socketPath);
    expect([found.mode & 0o7777, found.uid, found.gid]).toEqual([0o660, 0, ADMINS]);
    expect(await ask({ gid: ADMINS }, socketPath, CHANGE)).toBe('201 -');
    expect(await ask({ groups: [OTHERS, ADMINS] }, socketPath, LOOK)).toBe('200 -');
    const many = Array.from({ length: 500 }, (_, i) => 80_000 + i);
    expect(await ask({ groups: [...many, ADMINS] }, socketPath, LOOK)).toBe('200 -');
    expect(await ask({ groups: [OTHERS] }, socketPath, LOOK)).toBe('EACCES');
  });

  it('take a quiesce command from root alone: it is run as root', async () => {
    const socketPath = await start();
    const snapshot = (quiesce: object | null): [string, string, string] => ['POST', '/v1/snapshots', JSON.stringify({ reference: 'made@now', quiesce })];
    const quiesce = { command: 'true', timeoutSeconds: 1 };
    expect(await ask({ gid: ADMINS }, socketPath, CHANGE)).toBe('201 -');
    expect(await ask({ gid: ADMINS }, socketPath, snapshot(quiesce))).toBe('403 permission-denied');
    expect(await ask({ gid: ADMINS }, socketPath, snapshot(null))).not.toContain('403');
    expect(await ask({ uid: 0, gid: 0 }, socketPath, snapshot(quiesce))).not.toContain('403');
  });

  it('let the read-only group look, by a socket of its own, and change nothing', async () => {
    const readOnly = readOnlySocketPath(await start());
    const found = lstatSync(readOnly);
    expect([found.mode & 0o7777, found.uid, found.gid]).toEqual([0o660, 0, READERS]);
    expect(await ask({ groups: [READERS] }, readOnly, LOOK)).toBe('200 -');
    expect(await ask({ groups: [READERS] }, readOnly, CHANGE)).toBe('403 permission-denied');
    expect(await ask({ groups: [READERS] }, readOnly, ['DELETE', '/v1/nodes?path=made', ''])).toBe('403 permission-denied');
    expect(await ask({ groups: [OTHERS] }, readOnly, LOOK)).toBe('EACCES');
    // Not root either: what is given this socket cannot do harm.
    expect(await ask({ uid: 0, gid: 0 }, readOnly, CHANGE)).toBe('403 permission-denied');
    expect(service.containers.size).toBe(0);
  });

  it('go by the credentials of the connection when the modes are wider than they should be', async () => {
    const socketPath = await start();
    for (const path of [socketPath, readOnlySocketPath(socketPath)]) {
      chmodSync(path, 0o666);
      expect(await ask({}, path, LOOK)).toBe('403 permission-denied');
      expect(await ask({}, path, CHANGE)).toBe('403 permission-denied');
      expect(await ask({}, path, ['GET', '/v1/openapi.json', ''])).toBe('403 permission-denied');
    }
    expect(await ask({ groups: [READERS] }, socketPath, LOOK)).toBe('200 -');
    expect(await ask({ groups: [READERS] }, socketPath, CHANGE)).toBe('403 permission-denied');
    expect(service.containers.size).toBe(0);
  });

  it('refuse before the body is read, and say in the log who was refused', async () => {
    const readOnly = readOnlySocketPath(await start());
    expect(await ask({ groups: [READERS] }, readOnly, ['POST', '/v1/clones', 'not json'])).toBe('403 permission-denied');
    const line = log.find(({ level }) => level === 'warn');
    expect(line?.fields).toMatchObject({ operation: 'POST /v1/clones', kind: 'permission-denied', callerUid: UID, callerGid: OTHERS });
    expect(line?.fields['callerPid']).toEqual(expect.any(Number));
  });

  it('write down who made each change', async () => {
    const socketPath = await start();
    expect(await ask({ gid: ADMINS }, socketPath, CHANGE)).toBe('201 -');
    expect(await ask({ gid: ADMINS }, socketPath, CHANGE)).toBe('409 already-exists');
    const lines = log.filter(({ level, fields }) => level === 'info' && 'operation' in fields);
    expect(lines.map(({ fields }) => [fields['callerUid'], fields['callerGid'], fields['kind'] ?? fields['path']])).toEqual([[UID, ADMINS, 'made'], [UID, ADMINS, 'already-exists']]);
  });

  it('warn when a group cannot get to its socket', async () => {
    chmodSync(directory.path, 0o700);
    await start();
    expect(log.filter(({ level }) => level === 'warn').map(({ fields }) => fields['gid'])).toEqual([ADMINS, READERS]);
    chownSync(directory.path, 0, ADMINS);
    chmodSync(directory.path, 0o710);
    log.length = 0;
    await servers.pop()?.close();
    await start();
    expect(log.filter(({ level }) => level === 'warn').map(({ fields }) => fields['gid'])).toEqual([READERS]);
  });

  it('make a directory that is missing passable for the group, and for nothing else', async () => {
    const nested = join(directory.path, 'run');
    servers.push(await startControlServer({
      service, socketPath: join(nested, 'o.sock'), version: '1', logger: recordingLogger(log), onInternalError: () => undefined, policy: POLICY,
    }));
    expect(lstatSync(nested).mode & 0o777).toBe(0o711);
  });
});

describe('limits of the sockets', () => {
  it('refuse headers that are too long, and serve the next request', async () => {
    const socketPath = await start(DEFAULT_POLICY);
    expect(await answerTo(socketPath, `GET /v1/status HTTP/1.1\r\nhost: x\r\nx: ${'a'.repeat(HEADER_BYTES_MAX)}\r\n\r\n`)).toMatch(/^HTTP\/1\.1 4\d\d /u);
    expect((await createControlClient({ socketPath }).status()).version).toBe('1.2.3');
  });

  it('end a connection that sends its request too slowly, or nothing at all', { timeout: 60_000 }, async () => {
    const socketPath = await start(DEFAULT_POLICY, 300);
    expect(await answerTo(socketPath, 'POST /v1/containers HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{')).toMatch(/^HTTP\/1\.1 4\d\d /u);
    expect(await answerTo(socketPath, 'GET /v1/status HT')).toMatch(/^HTTP\/1\.1 4\d\d /u);
    expect(await answerTo(socketPath, '')).toMatch(/^(HTTP\/1\.1 4\d\d |$)/u);
    expect((await createControlClient({ socketPath }).status()).version).toBe('1.2.3');
  });

  it('take so many connections at a time; those of readers take none from administrators', { timeout: 60_000 }, async () => {
    const socketPath = await start();
    const readOnly = readOnlySocketPath(socketPath);
    let closed = 0;
    for (let i = 0; i < CONNECTIONS_MAX + 20; i += 1) {
      const socket = connect({ path: readOnly });
      socket.on('error', () => undefined);
      socket.once('close', () => { closed += 1; });
      sockets.push(socket);
    }
    await expect.poll(() => closed, { timeout: 20_000 }).toBe(20);
    expect((await createControlClient({ socketPath }).status()).version).toBe('1.2.3');
  });

  /** All that is answered to these bytes until the connection is closed. */
  async function answerTo(socketPath: string, bytes: string): Promise<string> {
    return await new Promise((resolve) => {
      let text = '';
      const socket = createConnection({ path: socketPath }, () => { if (bytes !== '') socket.write(bytes); });
      sockets.push(socket);
      socket.on('data', (chunk: Buffer) => { text += chunk.toString(); });
      socket.on('error', () => undefined);
      socket.on('close', () => { resolve(text); });
    });
  }
});

describe('the decision', () => {
  const peer = (changes: Partial<Peer>): Peer => ({ uid: UID, gid: OTHERS, groups: [], pid: 1, ...changes });
  const groups = { adminGid: ADMINS, readOnlyGid: READERS };

  it.each([
    ['nobody knows', null, 'none', 'none'],
    ['somebody', peer({}), 'none', 'none'],
    ['root', peer({ uid: 0 }), 'all', 'read'],
    ['the daemon\'s own user', peer({ uid: 5 }), 'all', 'read'],
    ['an administrator', peer({ groups: [OTHERS, ADMINS] }), 'all', 'read'],
    ['a reader', peer({ gid: READERS }), 'read', 'read'],
    ['both', peer({ gid: READERS, groups: [ADMINS] }), 'all', 'read'],
  ] as const)('%s', (_who, who, onAdmin, onReadOnly) => {
    expect(accessOf(who, 'admin', groups, 5)).toBe(onAdmin);
    expect(accessOf(who, 'read-only', groups, 5)).toBe(onReadOnly);
  });

  it('takes group 0 for a group like any other, and "none" for no group', () => {
    expect(accessOf(peer({ gid: 0 }), 'admin', { adminGid: null, readOnlyGid: null }, 0)).toBe('none');
    expect(accessOf(peer({ gid: 0 }), 'admin', { adminGid: 0, readOnlyGid: null }, 5)).toBe('all');
  });

  it('leaves readers every operation that changes nothing, and no other', () => {
    const reader = { access: 'read', peer: null, via: 'read-only' } as const;
    for (const { method, changes, operationId } of routes) {
      if (changes) expect(() => { assertMay(reader, method); }, operationId).toThrow(expect.objectContaining({ kind: 'permission-denied' }));
      else assertMay(reader, method);
    }
  });

  it('is handed on as JSON, and refused when it is no policy', () => {
    expect(parsePolicy(JSON.parse(JSON.stringify(POLICY)))).toEqual(POLICY);
    for (const wrong of [{ adminGid: -1 }, { adminGid: '0' }, { readOnlyGid: 2 ** 32 - 1 }, { spaceWarning: { unit: 'percent', value: 101 } }, { spaceCritical: { unit: 'miles', value: 1 } }]) {
      expect(() => parsePolicy({ ...POLICY, ...wrong })).toThrow(expect.objectContaining({ kind: 'invalid-argument' }));
    }
    expect(() => parsePolicy(null)).toThrow();
  });
});
