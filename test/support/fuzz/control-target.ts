/**
 * The control API of a real daemon, over its socket: bytes that are no HTTP, HTTP that is no request, JSON that is not what
 * was asked for, requests that never end, many connections at once; and sound calls in random order against a model of names.
 *
 * What must hold: every whole request has one answer, in JSON, that is no `internal` error; a call that is refused changes
 * nothing; what the model says is there is listed, and nothing else; and the same server still answers afterwards.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';

import { createControlClient, type ControlClient } from '../../../daemon/control/client.js';
import { routes } from '../../../daemon/control/routes.js';
import { startTestDaemon, type TestDaemon } from '../daemon.js';
import { mustRun } from '../model/command.js';
import { createCleanup, makeTempDir } from '../temp.js';
import { patternBytes } from '../model/pattern.js';
import { waitUntil } from '../processes.js';
import { fuzzCases, type FuzzOptions, type FuzzTarget } from './fuzz-target.js';
import { playCalls, sequences, type NameCall } from './control-names.js';
import { askHttp, openMany, sendRaw, type HttpQuestion } from './control-wire.js';

const IMAGE_BYTES = 1024 * 1024;
const BODY_BYTES_MAX = 9 * 1024 * 1024;
const LOG_LEVEL_ERROR = 50;
const IMPORT_MS_MAX = 60_000;

type Case =
  | { readonly type: 'raw'; readonly chunks: readonly Uint8Array[]; readonly end: 'half' | 'destroy' | 'leave' }
  | { readonly type: 'http'; readonly question: HttpQuestion }
  | { readonly type: 'many'; readonly count: number; readonly chunk: Uint8Array }
  | { readonly type: 'names'; readonly calls: readonly NameCall[] };

const text = (value: string): Uint8Array => new Uint8Array(Buffer.from(value));
const pieces = fc.oneof(
  fc.constantFrom(
    'GET /v1/status HTTP/1.1\r\n', 'POST /v1/clones HTTP/1.1\r\n', 'Host: x\r\n', '\r\n', 'Content-Length: 5\r\n', 'Content-Length: -1\r\n', 'Content-Length: 99999999999999\r\n',
    'Transfer-Encoding: chunked\r\n', 'Transfer-Encoding: gzip, chunked\r\n', 'Content-Type: application/json\r\n', 'ffffffffffffffff\r\n', '0\r\n\r\n', '5\r\n{"a":\r\n', 'Expect: 100-continue\r\n',
    'Upgrade: websocket\r\nConnection: upgrade\r\n', 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', 'GET /v1/nodes?path=%', 'GET http://[::1', `X: ${'y'.repeat(20_000)}\r\n`, `GET /${'a'.repeat(70_000)} HTTP/1.1\r\n\r\n`,
  ).map(text),
  fc.uint8Array({ maxLength: 200 }),
);

const hostileText = fc.oneof(
  fc.constantFrom('', '/', '.', '..', '../x', 'a/../b', 'base/img', 'base', 'a//b', 'a/', '\u0000', 'a\nb', '\ud800', '\u202e', 'x'.repeat(256), 'x'.repeat(5000), 'a/'.repeat(2000), '%00', '__proto__', 'constructor'),
  fc.string({ maxLength: 30 }), fc.string({ unit: 'binary', maxLength: 30 }),
);
const hostileNumber = fc.oneof(fc.constantFrom(0, -1, 1, 0.5, 511, 512, 2 ** 31, 2 ** 32, 2 ** 53, 2 ** 63, 1e308, -1e308, 2 ** 46, 2 ** 46 + 512), fc.double(), fc.integer());
const hostile: fc.Arbitrary<unknown> = fc.oneof(
  hostileText, hostileNumber, fc.boolean(), fc.constant(null), fc.jsonValue({ maxDepth: 3 }), fc.array(hostileText, { maxLength: 5 }), fc.constantFrom([], {}, [[]], { a: {} }),
);
const FIELDS = ['path', 'name', 'mode', 'source', 'targets', 'fill', 'copyOnRead', 'file', 'target', 'inPlace', 'format', 'sizeBytes', 'rateBytesPerSecond', 'keepData', 'recursive', 'id', '__proto__', 'toString'] as const;

function httpCases(files: readonly string[]): fc.Arbitrary<Case> {
  const calls = routes.filter((route) => route.operationId !== 'stop').map((route) => ({ method: route.method, url: route.url }));
  const route = fc.oneof(
    { weight: 8, arbitrary: fc.constantFrom(...calls) },
    { weight: 1, arbitrary: fc.record({ method: fc.constantFrom('GET', 'POST', 'DELETE', 'PUT', 'PATCH', 'HEAD', 'OPTIONS', 'TRACE'), url: fc.webPath({ size: 'small' }).map((path) => `/${path}`) }) },
    { weight: 1, arbitrary: fc.constant({ method: 'POST', url: '/v1/stop' }) },
  );
  // Values that are right now and then, or nothing would get past the first check.
  const value = fc.oneof(
    { weight: 3, arbitrary: hostile },
    { weight: 3, arbitrary: fc.constantFrom<unknown>('base/img', 'base/clone', 'base/none/x', ['base/clone'], ['base/img', 'base/clone-2'], 'base', true, false, null, 4096, 'raw', 'qcow2', 'true', 1) },
    { weight: 1, arbitrary: fc.constantFrom<unknown>(...files) },
  );
  const fields = fc.array(fc.tuple(fc.constantFrom(...FIELDS), value), { maxLength: 6 }).map((pairs) => Object.fromEntries(pairs));
  const body = fc.oneof(
    { weight: 8, arbitrary: fields.map((object) => JSON.stringify(object)) },
    { weight: 1, arbitrary: fc.oneof(fc.string({ unit: 'binary', maxLength: 50 }), fc.json(), fc.constantFrom('{', '[', '{"a":1,}', '[['.repeat(5000), `{"__proto__":{"path":"x"}}`, 'null', '1e999', `"${'x'.repeat(100_000)}"`)) },
    { weight: 1, arbitrary: fc.constantFrom(8 * 1024 * 1024, BODY_BYTES_MAX).map((length) => 'x'.repeat(length)) },
  );
  const type = fc.constantFrom('application/json', 'application/json', 'application/json', 'application/json; charset=utf-16', 'text/plain', 'multipart/form-data', 'application/x-www-form-urlencoded', '');
  return fc.record({ type: fc.constant('http' as const), question: fc.record({ route, query: fields, body, contentType: type, id: fc.oneof(fc.constantFrom('1', '0', '-1', '999999', 'x', '1e3', '99999999999999999999'), hostileText) })
    .map(({ route: { method, url }, query, body: sent, contentType, id }): HttpQuestion => ({
      method, contentType,
      path: encodePath(url.replace(':id', encodeURIComponent(wellFormed(id))), method === 'POST' ? {} : query),
      // A sound one would end the daemon.
      body: url === '/v1/stop' ? '{"force":1}' : method === 'POST' ? sent : '',
    })) });
}

/** Halves of characters cannot be sent as UTF-8. */
function wellFormed(value: string): string {
  return Buffer.from(value).toString();
}

function encodePath(url: string, query: Readonly<Record<string, unknown>>): string {
  const fields = Object.entries(query).map(([name, value]) => [name, typeof value === 'string' ? wellFormed(value) : JSON.stringify(value)] as [string, string]);
  return fields.length === 0 ? url : `${url}?${new URLSearchParams(fields).toString()}`;
}

class Daemon {
  readonly #daemon: TestDaemon;
  readonly #control: ControlClient;
  readonly #serverPid: number;

  private constructor(daemon: TestDaemon, control: ControlClient, serverPid: number) {
    this.#daemon = daemon;
    this.#control = control;
    this.#serverPid = serverPid;
  }

  static async start(daemon: TestDaemon, imageFile: string): Promise<Daemon> {
    const control = createControlClient({ socketPath: daemon.socketPath });
    await control.createContainer('base', {});
    const job = await control.startImport({ file: imageFile, target: 'base/img', inPlace: false, format: 'raw' });
    if (!(await waitUntil(async () => (await control.job(job.id)).state === 'completed', IMPORT_MS_MAX))) throw new Error('the import did not end');
    return new Daemon(daemon, control, (await control.status()).serverPid);
  }

  async try(one: Case): Promise<void> {
    switch (one.type) {
      case 'raw': await sendRaw(this.#daemon.socketPath, one.chunks, one.end); break;
      case 'http': await askHttp(this.#daemon.socketPath, one.question); break;
      case 'many': await openMany(this.#daemon.socketPath, one.count, one.chunk, () => this.#assertServing()); break;
      case 'names': await playCalls(this.#control, one.calls); break;
    }
    await this.#assertServing();
    await this.#tidy();
  }

  /** What went wrong without a client being told. */
  assertQuiet(): void {
    const loud = this.#daemon.log().filter((line) => line.level >= LOG_LEVEL_ERROR);
    if (loud.length > 0) throw new Error(`the daemon's log: ${loud.slice(0, 5).map((line) => line.text).join('\n')}`);
  }

  async #assertServing(): Promise<void> {
    const { serverPid, restarts } = await this.#control.status();
    if (serverPid !== this.#serverPid || restarts !== 0) throw new Error('the server has ended and was started again');
  }

  /** Every case begins with the base container alone, and one image in it. */
  async #tidy(): Promise<void> {
    for (const { name } of await this.#control.listContainers()) {
      if (name !== 'base') await this.#control.remove(name, { keepData: true, recursive: true });
    }
    const nodes = await this.#control.list('base');
    for (const { path } of nodes) if (path !== 'base/img') await this.#control.remove(path, { keepData: true, recursive: true });
    if (!nodes.some(({ path }) => path === 'base/img')) throw new Error('base/img is gone');
  }
}

export const controlTarget: FuzzTarget = {
  name: 'control',
  summary: 'the control API of a real daemon',
  async run(options: FuzzOptions) {
    const cleanup = createCleanup();
    const counts: Record<string, number> = { raw: 0, http: 0, many: 0, names: 0 };
    try {
      const daemon = await startTestDaemon({ transport: 'kernel', cleanup, cliEntry: options.cliEntry });
      const files = makeTempDir('fuzz', cleanup);
      const image = join(files, 'image');
      writeFileSync(image, patternBytes(3, 0, IMAGE_BYTES));
      await mustRun('mkfifo', [join(files, 'fifo')]);
      const served = await Daemon.start(daemon, image);
      const raw = fc.record({ type: fc.constant('raw' as const), chunks: fc.array(pieces, { minLength: 1, maxLength: 8 }), end: fc.constantFrom('half' as const, 'destroy' as const, 'leave' as const) });
      const many = fc.record({ type: fc.constant('many' as const), count: fc.integer({ min: 1, max: 150 }), chunk: pieces });
      const names = sequences.map((calls) => ({ type: 'names' as const, calls }));
      const cases: fc.Arbitrary<Case> = fc.oneof(
        { weight: 4, arbitrary: raw }, { weight: 8, arbitrary: httpCases([image, join(files, 'fifo'), files, daemon.storeDir, daemon.mountDir, '/dev/zero', '/dev/fuse', '/proc/self/mem', daemon.socketPath]) },
        { weight: 1, arbitrary: many }, { weight: 4, arbitrary: names },
      );
      await fuzzCases(options, cases, async (one) => {
        await served.try(one);
        counts[one.type] = (counts[one.type] ?? 0) + 1;
      });
      served.assertQuiet();
      await daemon.stop();
    } finally {
      await cleanup.run();
    }
    return counts;
  },
};
