/** The control API over a real unix socket: every operation there and back, what it refuses, and how it ends. */
import { request as httpRequest } from 'node:http';
import { connect } from 'node:net';
import { existsSync, lstatSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { OffshootError, type ErrorKind } from '../../blockstore/errors.js';
import { pathOf } from '../../daemon/control/http-app.js';
import { CLONE_TARGETS_MAX, REQUEST_BYTES_MAX } from '../../daemon/control/limits.js';
import { startFixture, type Fixture } from '../support/control-fixture.js';

const GIB = 1024 ** 3;

let fixture: Fixture;
beforeEach(async () => { fixture = await startFixture(); });
afterEach(async () => { await fixture.end(); });

interface RawAnswer {
  readonly status: number;
  readonly type: string;
  readonly body: unknown;
}

async function raw(method: string, path: string, body?: string, headers: Record<string, string> = { 'content-type': 'application/json' }): Promise<RawAnswer> {
  return await new Promise((resolve, reject) => {
    const request = httpRequest({ socketPath: fixture.socketPath, agent: false, method, path, headers: body === undefined ? {} : headers }, (response) => {
      const chunks: Buffer[] = [];
      response.on('data', (chunk: Buffer) => chunks.push(chunk));
      response.on('end', () => {
        resolve({ status: response.statusCode ?? 0, type: response.headers['content-type'] ?? '', body: JSON.parse(Buffer.concat(chunks).toString()) as unknown });
      });
    });
    request.on('error', reject);
    request.end(body);
  });
}

async function refusal(call: Promise<unknown>): Promise<OffshootError> {
  const error = await call.then(() => new Error('the call was not refused'), (thrown: unknown) => thrown);
  if (!(error instanceof OffshootError)) throw error;
  return error;
}

function errorOf(answer: RawAnswer): { kind: ErrorKind; message: string; context: Record<string, unknown> } {
  return (answer.body as { error: { kind: ErrorKind; message: string; context: Record<string, unknown> } }).error;
}

describe('operations', () => {
  it('makes and lists containers', async () => {
    const made = await fixture.client.createContainer('vms', { mode: 0o700 });
    expect(made).toEqual({ name: 'vms', disks: 0, files: 0, snapshots: 1, sizeBytes: 0, allocatedBytes: 0, createdAt: '2026-01-02T03:04:05.678Z' });
    expect(fixture.service.containers.get('vms')).toEqual({ mode: 0o700 });
    await fixture.client.createContainer('other', {});
    expect(fixture.service.containers.get('other')).toEqual({ mode: 0o755 });
    expect((await fixture.client.listContainers()).map((each) => each.name)).toEqual(['other', 'vms']);
    expect((await fixture.client.list(null)).map((each) => [each.path, each.kind])).toEqual([['vms', 'directory'], ['other', 'directory']]);
  });

  it('imports, follows, clones, fills, shows, resizes and removes', async () => {
    const { client } = fixture;
    await client.createContainer('vms', {});
    const job = await client.startImport({ file: '/images/debian.raw', target: 'vms/debian.img', inPlace: false, format: 'raw' });
    expect(job).toMatchObject({ kind: 'import', state: 'running', path: 'vms/debian.img', progressTotalBytes: 4 * GIB, message: 'raw', error: null });
    expect((await client.job(job.id)).progressDoneBytes).toBe(2 * GIB);
    expect((await client.job(job.id)).state).toBe('completed');

    const cloned = await client.clone({ source: 'vms/debian.img', targets: ['vms/a.img', 'vms/b.img'], fill: false, copyOnRead: true });
    expect(cloned).toEqual({
      operationId: 'op-1', durationMs: 12.25,
      clones: ['a', 'b'].map((name) => ({ path: `vms/${name}.img`, sizeBytes: 10 * GIB, mountPath: `/mnt/offshoot/vms/${name}.img` })),
    });

    expect(await client.fillStart('vms/a.img', { rateBytesPerSecond: 1000 })).toMatchObject({ state: 'running', rateBytesPerSecond: 1000, doneBytes: 0 });
    expect(await client.fillPause('vms/a.img')).toMatchObject({ state: 'paused', rateBytesPerSecond: 1000 });
    expect(await client.fillResume('vms/a.img', { rateBytesPerSecond: undefined })).toMatchObject({ state: 'running', rateBytesPerSecond: 1000 });
    expect(await client.fillResume('vms/a.img', { rateBytesPerSecond: null })).toMatchObject({ state: 'running', rateBytesPerSecond: null });
    expect(await client.fillStatus('vms/a.img')).toMatchObject({ state: 'running', doneBytes: GIB });

    const shown = await client.show('vms/a.img');
    expect(shown).toEqual(fixture.service.show('vms/a.img'));
    expect(shown.fill).toMatchObject({ state: 'running', doneBytes: GIB });
    expect(shown.backingChain.map((layer) => [layer.kind, layer.path, layer.sealed])).toEqual([['store', null, false], ['external', '/images/debian.raw', true]]);
    expect(shown.copyOnRead).toBe(true);

    expect((await client.resize('vms/b.img', 20 * GIB)).sizeBytes).toBe(20 * GIB);
    expect((await refusal(client.remove('vms/debian.img', { keepData: false, recursive: false }))).kind).toBe('in-use');
    expect(await client.remove('vms/debian.img', { keepData: true, recursive: false })).toEqual({ path: 'vms/debian.img', nodesRemoved: 1, layersRemoved: 0, layersKept: 1, freedBytes: 0 });
    expect((await client.list('vms')).map((each) => each.path)).toEqual(['vms/a.img', 'vms/b.img']);
    expect((await refusal(client.remove('vms', { keepData: false, recursive: false }))).kind).toBe('not-empty');
    expect((await client.remove('vms', { keepData: false, recursive: true })).nodesRemoved).toBe(3);
    expect(await client.listContainers()).toEqual([]);
  });

  it('cancels a job', async () => {
    fixture.service.jobStep = 0;
    await fixture.client.createContainer('vms', {});
    const job = await fixture.client.startImport({ file: '/a.raw', target: 'vms/a.img', inPlace: false, format: null });
    expect((await fixture.client.cancelJob(job.id)).state).toBe('cancelled');
    expect((await fixture.client.job(job.id)).state).toBe('cancelled');
  });

  it('clones as many targets at once as it says, and not one more', async () => {
    await fixture.client.createContainer('vms', {});
    await fixture.client.startImport({ file: '/a.raw', target: 'vms/a.img', inPlace: true, format: null });
    const targets = Array.from({ length: CLONE_TARGETS_MAX }, (_each, index) => `vms/${'x'.repeat(200)}${index}.img`);
    const made = await fixture.client.clone({ source: 'vms/a.img', targets, fill: false, copyOnRead: false });
    expect(made.clones.map((each) => each.path)).toEqual(targets);
    const tooMany = await refusal(fixture.client.clone({ source: 'vms/a.img', targets: [...targets, 'vms/more.img'], fill: false, copyOnRead: false }));
    expect([tooMany.kind, tooMany.message]).toEqual(['invalid-argument', expect.stringMatching(/^targets must NOT have more than 10000 items/u)]);
  });

  it('says how the daemon is', async () => {
    expect(await fixture.client.status()).toEqual(fixture.service.status());
  });

  it('carries names of any script and with every awkward character', async () => {
    const name = 'vm ü 日本 & = ? # % + "quoted" \\ \'.img';
    await fixture.client.createContainer(name, {});
    await fixture.client.startImport({ file: '/a.raw', target: `${name}/${name}`, inPlace: true, format: null });
    expect((await fixture.client.list(name)).map((each) => each.path)).toEqual([`${name}/${name}`]);
    expect((await fixture.client.show(`${name}/${name}`)).path).toBe(`${name}/${name}`);
  });

  it('logs what changes something, with its path, and looks only for debugging', async () => {
    await fixture.client.createContainer('vms', {});
    await fixture.client.listContainers();
    const lines = fixture.log.filter((line) => line.message === 'control call');
    expect(lines.map((line) => [line.level, line.fields['operation'], line.fields['path'], line.fields['status']])).toEqual([
      ['info', 'createContainer', 'vms', 201], ['debug', 'listContainers', undefined, 200],
    ]);
  });
});

describe('refusals', () => {
  it('carries kind, message and context of what the service refuses, with the HTTP status of the kind', async () => {
    const error = await refusal(fixture.client.show('vms/none.img'));
    expect([error.kind, error.message, error.context]).toEqual(['not-found', 'there is no vms/none.img: offshoot ls lists what there is', { path: 'vms/none.img' }]);
    const answer = await raw('GET', '/v1/disks?path=vms/none.img');
    expect([answer.status, answer.type]).toEqual([404, 'application/json; charset=utf-8']);
  });

  it.each<[string, string, string | undefined, number, ErrorKind, RegExp]>([
    ['GET', '/v1/nothing', undefined, 404, 'not-found', /has no GET \/v1\/nothing/u],
    ['GET', '/v1/%zz', undefined, 400, 'invalid-argument', /not a valid url/u],
    ['GET', '/v1/disks', undefined, 400, 'invalid-argument', /lacks the field 'path'/u],
    ['GET', '/v1/disks?path=', undefined, 400, 'invalid-argument', /^path must NOT have fewer than 1 characters/u],
    ['GET', '/v1/disks?path=a/b&more=1', undefined, 400, 'invalid-argument', /unknown field 'more'/u],
    ['GET', '/v1/disks?path=/a/b', undefined, 400, 'invalid-name', /begins with '\/'/u],
    ['GET', '/v1/disks?path=a%00b', undefined, 400, 'invalid-name', /NUL/u],
    ['GET', '/v1/jobs/0', undefined, 400, 'invalid-argument', /^id must match/u],
    ['GET', '/v1/jobs/7', undefined, 404, 'not-found', /no job 7/u],
    ['DELETE', '/v1/nodes?path=a&recursive=yes', undefined, 400, 'invalid-argument', /^recursive must be one of true, false/u],
    ['POST', '/v1/containers', undefined, 400, 'invalid-argument', /lacks the field 'name'/u],
    ['POST', '/v1/containers', '{"name":', 400, 'invalid-argument', /not valid JSON/u],
    ['POST', '/v1/containers', '[]', 400, 'invalid-argument', /must be object/u],
    ['POST', '/v1/containers', '{"name":7}', 400, 'invalid-argument', /^name must be string/u],
    ['POST', '/v1/containers', '{"name":"a","mode":65536}', 400, 'invalid-argument', /^mode must be <= 4095/u],
    ['POST', '/v1/containers', '{"name":"a","mdoe":1}', 400, 'invalid-argument', /unknown field 'mdoe'/u],
    ['POST', '/v1/containers', '{"name":"a/b"}', 400, 'invalid-name', /holds '\/'/u],
    ['POST', '/v1/containers', '{"name":".."}', 400, 'invalid-name', /holds '..'/u],
    ['POST', '/v1/containers', '{"__proto__":{"name":"a"}}', 400, 'invalid-argument', /cannot be understood/u],
    ['POST', '/v1/imports', '{"file":"debian.raw","target":"a/b"}', 400, 'invalid-argument', /^file must match pattern/u],
    ['POST', '/v1/imports', '{"file":"/a.raw","target":"b"}', 400, 'invalid-name', /names a container/u],
    ['POST', '/v1/imports', '{"file":"/a.raw","target":"a/b","format":"vhs"}', 400, 'invalid-argument', /^format must be one of raw, qcow2/u],
    ['POST', '/v1/clones', '{"source":"a/b","targets":[]}', 400, 'invalid-argument', /^targets must NOT have fewer than 1 items/u],
    ['POST', '/v1/clones', '{"source":"a/b","targets":["a/c",1]}', 400, 'invalid-argument', /^targets\.1 must be string/u],
    ['POST', '/v1/clones', '{"source":"a/b","targets":["a/c","a/d","a/c"]}', 400, 'invalid-argument', /'a\/c' is given twice/u],
    ['POST', '/v1/clones', '{"source":"a/b","targets":["a/c","a/../d"]}', 400, 'invalid-name', /holds '..'/u],
    ['POST', '/v1/disks/resize', '{"path":"a/b","sizeBytes":"10"}', 400, 'invalid-argument', /^sizeBytes must be integer/u],
    ['POST', '/v1/disks/resize', '{"path":"a/b","sizeBytes":513}', 400, 'invalid-argument', /^sizeBytes must be multiple of 512/u],
    ['POST', '/v1/disks/resize', '{"path":"a/b","sizeBytes":0}', 400, 'invalid-argument', /^sizeBytes must be >= 512/u],
    ['POST', '/v1/disks/resize', `{"path":"a/b","sizeBytes":${65 * 1024 ** 4}}`, 400, 'invalid-argument', /^sizeBytes must be <= /u],
    ['POST', '/v1/fills', '{"path":"a/b","rateBytesPerSecond":0}', 400, 'invalid-argument', /^rateBytesPerSecond must be >= 1/u],
    ['POST', '/v1/fills', '{"path":"a/b","rateBytesPerSecond":1.5}', 400, 'invalid-argument', /^rateBytesPerSecond must be integer/u],
  ])('%s %s %s: %i %s', async (method, path, body, status, kind, message) => {
    const answer = await raw(method, path, body);
    expect([answer.status, errorOf(answer).kind]).toEqual([status, kind]);
    expect(errorOf(answer).message).toMatch(message);
    expect(fixture.service.containers.size).toBe(0);
    expect(fixture.internalErrors).toEqual([]);
  });

  it('takes JSON only', async () => {
    const answer = await raw('POST', '/v1/containers', 'name=a', { 'content-type': 'application/x-www-form-urlencoded' });
    expect([answer.status, errorOf(answer).message]).toEqual([400, 'the body must be JSON: send it with content-type: application/json']);
    expect((await raw('POST', '/v1/containers', '{"name":"a"}', { 'content-type': 'text/plain' })).status).toBe(400);
  });

  it('refuses a request that is too large, and goes on', async () => {
    const answer = await raw('POST', '/v1/containers', JSON.stringify({ name: 'a'.repeat(REQUEST_BYTES_MAX) }));
    expect([answer.status, errorOf(answer).kind]).toEqual([413, 'too-large']);
    expect(await fixture.client.listContainers()).toEqual([]);
  });

  it('answers what is not HTTP, and goes on', async () => {
    const answer = await new Promise<string>((resolve, reject) => {
      let text = '';
      const socket = connect({ path: fixture.socketPath }, () => { socket.write('hello\r\n\r\n'); });
      socket.on('data', (chunk) => { text += chunk.toString(); });
      socket.on('end', () => { resolve(text); });
      socket.on('error', reject);
    });
    expect(answer).toMatch(/^HTTP\/1\.1 400 Bad Request/u);
    expect(answer).toMatch(/"kind":"invalid-argument"/u);
    expect((await fixture.client.status()).version).toBe('1.2.3');
  });

  it('answers a programmer error without its text, logs it, and hands it to its owner', async () => {
    const broken = new TypeError('secret detail');
    fixture.service.broken = broken;
    const error = await refusal(fixture.client.status());
    expect(error.kind).toBe('internal');
    expect(error.message).not.toContain('secret');
    await expect.poll(() => fixture.internalErrors).toEqual([broken]);
    expect(fixture.log.filter((line) => line.level === 'error').map((line) => line.fields['err'])).toEqual([broken]);
  });
});

describe('the socket', () => {
  it('is for its owner only, from the first moment', () => {
    const found = lstatSync(fixture.socketPath);
    expect([found.isSocket(), (found.mode & 0o777).toString(8)]).toEqual([true, '600']);
    expect(existsSync(fixture.socketPath.replace(/.$/u, '~'))).toBe(false);
  });

  it('goes when the server is closed, as often as that is asked for', async () => {
    await Promise.all([fixture.server.close(), fixture.server.close()]);
    await fixture.server.close();
    expect(existsSync(fixture.socketPath)).toBe(false);
  });

  it('is closed although a client keeps its connection open', async () => {
    const socket = connect({ path: fixture.socketPath });
    await new Promise((resolve) => socket.once('connect', resolve));
    socket.write('GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n');
    await new Promise((resolve) => socket.once('data', resolve));
    const gone = new Promise((resolve) => { socket.once('close', resolve); });
    socket.resume();
    const beganMs = performance.now();
    await fixture.server.close();
    await gone;
    expect(performance.now() - beganMs).toBeLessThan(1000);
  });

  it('answers the call to stop although the server is closed by it', async () => {
    const { service, server } = fixture;
    let closing: Promise<void> | null = null;
    service.stop = async (options) => {
      service.stopped = options;
      closing = server.close();
      await new Promise((resolve) => setImmediate(resolve));
    };
    expect(await fixture.client.stop({ force: true })).toEqual({ stopping: true, holderPid: 4_000_001 });
    await expect(closing).resolves.toBeUndefined();
    expect(service.stopped).toEqual({ force: true });
  });
});

describe('the log of a call', () => {
  it('has the paths that it was about, and never walks through the bytes of a batch', () => {
    expect(pathOf({ query: { reference: 'vms@v1' }, body: { target: 'vms/a', targets: ['vms/b', 'vms/c'] } })).toEqual({ reference: 'vms@v1', path: 'vms/b', targets: 2 });
    const bytes = new Proxy(Buffer.alloc(4096), { ownKeys: () => { throw new Error('each byte was made a field'); } });
    expect(pathOf({ query: { first: '7', target: 'vms/a' }, body: bytes })).toEqual({ path: 'vms/a' });
  });
});
