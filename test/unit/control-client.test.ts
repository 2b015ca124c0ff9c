/** The client against daemons that are absent, restarting, broken, slow, or no daemons at all. */
import { chmodSync, renameSync, writeFileSync } from 'node:fs';
import { createServer as createHttpServer, type Server as HttpServer, type ServerResponse } from 'node:http';
import { createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { OffshootError } from '../../blockstore/errors.js';
import { createControlClient, type ControlClient } from '../../daemon/control/client.js';
import { startControlServer } from '../../daemon/control/server.js';
import { makeDirectory, recordingLogger, startFixture } from '../support/control-fixture.js';
import { MemoryService } from '../support/control-memory-service.js';

let directory: ReturnType<typeof makeDirectory>;
let socketPath: string;
const closers: (() => Promise<void>)[] = [];

beforeEach(() => {
  directory = makeDirectory();
  socketPath = join(directory.path, 'o.sock');
});
afterEach(async () => {
  for (const close of closers.splice(0)) await close();
  directory.remove();
});

async function listen<T extends Server | HttpServer>(server: T): Promise<T> {
  await new Promise<void>((resolve) => { server.listen(socketPath, resolve); });
  closers.push(async () => {
    if (!server.listening) return;
    await new Promise<void>((resolve) => {
      server.close(() => { resolve(); });
      if ('closeAllConnections' in server) server.closeAllConnections();
    });
  });
  return server;
}

/** A socket file whose owner is gone, as a killed server leaves it. */
async function leaveStaleSocket(): Promise<void> {
  const kept = `${socketPath}.kept`;
  const server = createServer();
  await new Promise<void>((resolve) => { server.listen(socketPath, resolve); });
  renameSync(socketPath, kept);
  await new Promise<void>((resolve) => { server.close(() => { resolve(); }); });
  renameSync(kept, socketPath);
}

async function refusal(call: Promise<unknown>): Promise<OffshootError> {
  const error = await call.then(() => new Error('the call was not refused'), (thrown: unknown) => thrown);
  if (!(error instanceof OffshootError)) throw error;
  return error;
}

function client(options: { patienceMs?: number; timeoutMs?: number } = {}): ControlClient {
  return createControlClient({ socketPath, patienceMs: 0, ...options });
}

describe('a daemon that is not there', () => {
  it('is not running when there is no socket, and the message says how to start one', async () => {
    const error = await refusal(client({ patienceMs: 60_000 }).status());
    expect(error.kind).toBe('daemon-not-running');
    expect(error.message).toBe(`no daemon answers on ${socketPath} (there is no such socket): start one with 'offshoot daemon start --store DIR --mount DIR', or name its socket with --socket or OFFSHOOT_SOCKET`);
  });

  it('is not running when its directory is missing, or is a file', async () => {
    expect((await refusal(createControlClient({ socketPath: `${directory.path}/no/o.sock` }).status())).kind).toBe('daemon-not-running');
    writeFileSync(join(directory.path, 'file'), '');
    expect((await refusal(createControlClient({ socketPath: `${directory.path}/file/o.sock` }).status())).kind).toBe('daemon-not-running');
  });

  it('is not running when nobody listens on its socket', async () => {
    await leaveStaleSocket();
    const error = await refusal(client().status());
    expect([error.kind, error.message]).toEqual(['daemon-not-running', expect.stringContaining('the socket is there, but nobody listens')]);
  });

  it('is waited for while its server is restarted, and then told once', async () => {
    await leaveStaleSocket();
    const service = new MemoryService();
    const call = client({ patienceMs: 10_000 }).createContainer('vms', {});
    await delay(150);
    const server = await startControlServer({ service, socketPath, version: '1', logger: recordingLogger([]), onInternalError: () => undefined });
    closers.push(() => server.close());
    expect((await call).name).toBe('vms');
    expect([...service.containers.keys()]).toEqual(['vms']);
  });

  it('may be there for root only', async () => {
    await listen(createServer());
    chmodSync(socketPath, 0o600);
    chmodSync(directory.path, 0o711);
    const root = process.geteuid?.() === 0;
    if (root) process.seteuid?.(65_534);
    else chmodSync(socketPath, 0);
    try {
      const error = await refusal(client().status());
      expect([error.kind, error.message]).toEqual(['permission-denied', `the control socket ${socketPath} is for root, and for the groups that were named when the daemon was started (--group, --read-only-group): run this command as root, or join such a group and log in again`]);
    } finally {
      if (root) process.seteuid?.(0);
    }
  });
});

describe('a connection that breaks', () => {
  async function breakingServer(): Promise<{ readonly connections: () => number }> {
    let connections = 0;
    await listen(createServer((socket) => {
      connections += 1;
      socket.on('error', () => undefined);
      socket.once('data', () => { socket.destroy(); });
    }));
    return { connections: () => connections };
  }

  it('leaves the outcome of a change unknown: it says so, and never sends it twice', async () => {
    const server = await breakingServer();
    const error = await refusal(client({ patienceMs: 500 }).createContainer('vms', {}));
    expect([error.kind, error.context['connectionBroken']]).toEqual(['io-error', true]);
    expect(error.message).toMatch(/not known whether this was done/u);
    expect(server.connections()).toBe(1);
  });

  it('lets a call that only looks try again', async () => {
    const server = await breakingServer();
    const error = await refusal(client({ patienceMs: 300 }).status());
    expect(error.kind).toBe('io-error');
    expect(server.connections()).toBeGreaterThan(1);
  });
});

describe('something else on the socket', () => {
  const answering = async (handle: (response: ServerResponse) => void): Promise<void> => {
    await listen(createHttpServer((_request, response) => { handle(response); }));
  };

  it('is no daemon when it does not answer in JSON', async () => {
    await answering((response) => response.end('<html>'));
    const error = await refusal(client().status());
    expect([error.kind, error.message]).toEqual(['internal', expect.stringMatching(/HTTP status 200\) is no offshoot daemon, or one of another version: check --socket/u)]);
  });

  it('is internal when it refuses with a kind that is not known here, and keeps the message', async () => {
    await answering((response) => response.writeHead(418).end('{"error":{"kind":"teapot","message":"short and stout","context":{"handle":1}}}'));
    const error = await refusal(client().status());
    expect([error.kind, error.message, error.context]).toEqual(['internal', 'short and stout', { handle: 1 }]);
  });

  it('is not running when it is about to end', async () => {
    await answering((response) => response.writeHead(503).end('{"error":"Service Unavailable"}'));
    expect((await refusal(client().status())).kind).toBe('daemon-not-running');
  });

  it('is timed out when it does not answer', async () => {
    await answering(() => undefined);
    const error = await refusal(client({ timeoutMs: 100 }).status());
    expect([error.kind, error.message]).toEqual(['timed-out', expect.stringMatching(/did not answer GET \/v1\/status within/u)]);
  });
});

it('refuses a socket path that is too long, with its length', () => {
  const long = `/run/${'x'.repeat(103)}`;
  expect(() => createControlClient({ socketPath: long })).toThrow(/has 108 bytes, 107 are the most that Linux allows/u);
});

it('offers every operation that the OpenAPI document lists', async () => {
  const fixture = await startFixture();
  try {
    const document = await fixture.client.openApi() as { paths: Record<string, Record<string, { operationId: string }>> };
    const operations = Object.values(document.paths).flatMap((methods) => Object.values(methods).map((each) => each.operationId)).sort();
    const renamed: Record<string, string> = {
      getSpace: 'df', listJobs: 'jobs', listQuotas: 'quotaList', setQuota: 'quotaSet', removeQuota: 'quotaRemove',
      startCheck: 'checkStart', getCheck: 'checkStatus', cancelCheck: 'checkCancel', getScrub: 'scrubStatus', startScrub: 'scrubStart', pauseScrub: 'scrubPause', resumeScrub: 'scrubResume',
      getTree: 'tree', getExtents: 'extents', makeInstant: 'instant', listReceives: 'receives', getReceive: 'receive', beginReceive: 'receiveBegin', addRecords: 'receiveRecords',
      pauseReceive: 'receivePause', finishReceive: 'receiveFinish', abortReceive: 'receiveAbort',
      getStatus: 'status', getMetrics: 'metrics', getJob: 'job', getFill: 'fillStatus', startFill: 'fillStart', pauseFill: 'fillPause', resumeFill: 'fillResume',
      listMachines: 'machines.list', showMachine: 'machines.show', cloneMachines: 'machines.clone', importMachine: 'machines.startImport', getMachineSettings: 'machines.get',
      setMachineSettings: 'machines.set', registerMachine: 'machines.register', unregisterMachine: 'machines.unregister', startMachine: 'machines.start', stopMachine: 'machines.stop',
      removeMachine: 'machines.remove', present: 'exports.present', withdraw: 'exports.withdraw', listExports: 'exports.list', discover: 'exports.discover',
      stageMachine: 'vdisks.stage', listStaged: 'vdisks.staged', deployMachine: 'vdisks.deploy', listDeployed: 'vdisks.deployed', startDeployed: 'vdisks.start', decommissionMachine: 'vdisks.decommission',
      listAttached: 'vdisks.attached', attachDisk: 'vdisks.attach', detachDisk: 'vdisks.detach',
    };
    const others = ['socketPath', 'openApi', 'metricsText', 'transfers', 'machines', 'exports', 'vdisks'];
    const { transfers, machines, exports, vdisks } = fixture.client;
    const grouped = Object.entries({ machines, exports, vdisks }).flatMap(([group, client]) => Object.keys(client).map((name) => `${group}.${name}`));
    const methods = [...Object.keys(fixture.client), ...Object.keys(transfers), ...grouped].filter((name) => !others.includes(name)).sort();
    expect(operations.map((name) => renamed[name] ?? name).sort()).toEqual(methods);
  } finally {
    await fixture.end();
  }
});
