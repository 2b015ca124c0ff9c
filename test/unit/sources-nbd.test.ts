/**
 * The NBD client against real servers, qemu-nbd and nbdkit with its error and delay filters, and the reader of remote sources against its own fetcher:
 * content, errors, order of answers, time limits, and what becomes of who waits when a server ends.
 */
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import type { Duplex } from 'node:stream';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { identityOf } from '../../blockstore/sources/identity.js';
import { NbdClient, NbdRefusal, NbdReplyError } from '../../blockstore/sources/nbd-client.js';
import { RemoteReader } from '../../blockstore/sources/remote-reader.js';
import { patternBytes } from '../support/model/pattern.js';
import { isAlive, signalProcess, stopProcess, waitUntil, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const MIB = 1024 * 1024;
const SIZE_BYTES = 4 * MIB + 512;
const CONTENT = patternBytes(5, 0, SIZE_BYTES);
const PATIENCE_MS = 20_000;
const FETCHER = path.resolve(import.meta.dirname, '../../dist/blockstore/sources/fetcher/main.js');

const cleanup = createCleanup();
let directory = '';
let file = '';

beforeEach(() => {
  directory = makeTempDir('nbd', cleanup);
  file = path.join(directory, 'source');
  fs.writeFileSync(file, CONTENT);
});
afterEach(() => cleanup.run());

/** A server on a socket, and a client of it. */
async function connect(program: string, args: (socket: string) => readonly string[], exportName = ''): Promise<{ client: NbdClient; pid: number }> {
  const socketPath = path.join(directory, 'socket');
  const child = spawn(program, args(socketPath), { stdio: ['ignore', 'ignore', 'ignore'] });
  const pid = child.pid ?? 0;
  cleanup.add(async () => {
    signalProcess(pid, 'SIGCONT');
    signalProcess(pid, 'SIGKILL');
    await waitUntilGone(pid, PATIENCE_MS);
  });
  if (!(await waitUntil(() => fs.existsSync(socketPath), PATIENCE_MS))) throw new Error(`${program} has made no socket`);
  const socket = await new Promise<Duplex>((resolve, reject) => {
    const made = net.connect(socketPath, () => { resolve(made); });
    made.once('error', reject);
  });
  const client = await NbdClient.connect(socket, exportName);
  cleanup.add(() => { client.end(); });
  return { client, pid };
}

const nbdkit = (...filters: readonly string[]) => (socket: string): readonly string[] => ['--foreground', '--readonly', '--unix', socket, ...filters.filter((each) => each.startsWith('--')), 'file', file,
  ...filters.filter((each) => !each.startsWith('--'))];

async function failure(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise;
  } catch (thrown) {
    return thrown;
  }
  throw new Error('it did not fail');
}

describe.skipIf(lacks('nbdkit', 'qemu-nbd'))('the NBD client', { timeout: 60_000 }, () => {
  it.each([
    ['qemu-nbd', (socket: string) => ['--read-only', '--format=raw', '--persistent', `--socket=${socket}`, file]],
    ['nbdkit', nbdkit()],
  ] as const)('reads from %s, many requests at a time', async (program, args) => {
    const { client } = await connect(program, args);
    expect(client.sizeBytes).toBe(SIZE_BYTES);
    const places = Array.from({ length: 64 }, (_, i) => [(i * 64_007) % (SIZE_BYTES - 70_000), i === 0 ? MIB : 1 + ((i * 997) % 70_000)] as const);
    const parts = await Promise.all(places.map(async ([at, length]) => await client.read(at, length)));
    places.forEach(([at, length], i) => { expect(parts[i]?.equals(CONTENT.subarray(at, at + length)), `${length} bytes at ${at}`).toBe(true); });
    expect((await client.read(SIZE_BYTES - 512, 512)).equals(CONTENT.subarray(SIZE_BYTES - 512))).toBe(true);
  });

  it('is told of an export that is not there', async () => {
    const made = connect('qemu-nbd', (socket) => ['--read-only', '--format=raw', '--export-name=right', `--socket=${socket}`, file], 'wrong');
    expect(await failure(made)).toBeInstanceOf(NbdRefusal);
  });

  it('fails the request that the server cannot answer, and goes on with the next', async () => {
    const flag = path.join(directory, 'flag');
    const { client } = await connect('nbdkit', nbdkit('--filter=error', 'error-pread=EIO', 'error-pread-rate=100%', `error-file=${flag}`));
    fs.writeFileSync(flag, '');
    const thrown = await failure(client.read(0, 4096));
    expect(thrown).toBeInstanceOf(NbdReplyError);
    expect((thrown as NbdReplyError).errno).toBe(5);
    expect((await failure(client.read(SIZE_BYTES, 512)) as NbdReplyError).errno).toBeGreaterThan(0);
    fs.rmSync(flag);
    expect((await client.read(0, 4096)).equals(CONTENT.subarray(0, 4096))).toBe(true);
  });

  it('waits as long as it takes, and keeps late answers apart', async () => {
    const { client, pid } = await connect('nbdkit', nbdkit('--filter=delay', 'delay-read=50ms'));
    await stopProcess(pid);
    const late = [client.read(0, 1000), client.read(5000, 3000)];
    expect(client.inFlight).toBe(2);
    signalProcess(pid, 'SIGCONT');
    const [first, second] = await Promise.all(late);
    expect(first?.equals(CONTENT.subarray(0, 1000))).toBe(true);
    expect(second?.equals(CONTENT.subarray(5000, 8000))).toBe(true);
  });

  it('fails all that is under way when the server dies, and what comes later', async () => {
    const { client, pid } = await connect('nbdkit', nbdkit());
    await stopProcess(pid);
    const waiting = [client.read(0, 10), client.read(10, 10)].map(failure);
    signalProcess(pid, 'SIGKILL');
    for (const thrown of await Promise.all(waiting)) expect((thrown as Error).message).toMatch(/closed|ECONNRESET/);
    expect(await failure(client.read(0, 1))).toBeInstanceOf(Error);
  });

  it('ends the connection to what does not speak the protocol', async () => {
    const server = net.createServer((socket) => { socket.write('HTTP/1.1 400 Bad Request\r\n\r\n'); });
    const socketPath = path.join(directory, 'http');
    await new Promise<void>((resolve) => { server.listen(socketPath, resolve); });
    cleanup.add(() => { server.close(); });
    expect((await failure(NbdClient.connect(net.connect(socketPath))) as Error).message).toMatch(/newstyle/);
  });
});

describe.skipIf(lacks(FETCHER))('a remote reader', { timeout: 60_000 }, () => {
  function reader(timeoutMs = PATIENCE_MS): RemoteReader {
    const made = new RemoteReader({ file, identity: identityOf(fs.statSync(file, { bigint: true })), scope: 'inode', timeoutMs, fetcherEntry: FETCHER });
    cleanup.add(() => { made.close(); });
    return made;
  }
  const soon = (): number => performance.now() + PATIENCE_MS;
  const kind = async (promise: Promise<unknown>): Promise<string> => {
    const thrown = await failure(promise);
    if (!(thrown instanceof OffshootError)) throw thrown as Error;
    return thrown.kind;
  };

  it('reads the file through its fetcher, which ends with it', async () => {
    const source = reader();
    const parts = await Promise.all([0, 1, 2, 3].map(async (i) => await source.read(i * MIB, MIB, soon())));
    expect(Buffer.concat(parts).equals(CONTENT.subarray(0, 4 * MIB))).toBe(true);
    expect(source.condition().kind).toBe('ok');
    const { pid } = source;
    expect(pid).not.toBeNull();
    source.close();
    expect(await waitUntilGone(pid ?? 0, PATIENCE_MS)).toBe(true);
    expect(await kind(source.read(0, 1, soon()))).toBe('source-unreachable');
  });

  it('fails each read at its own limit while the fetcher hangs, and reads on when it comes back', async () => {
    const source = reader();
    await source.read(0, 1, soon());
    const pid = source.pid ?? 0;
    await stopProcess(pid);
    const limits = [300, 600, 900];
    const startedMs = performance.now();
    const kinds = await Promise.all(limits.map(async (ms, i) => {
      const found = await kind(source.read(i, 1, startedMs + ms));
      expect(performance.now() - startedMs).toBeGreaterThan(ms - 20);
      return found;
    }));
    expect(kinds).toEqual(limits.map(() => 'source-unreachable'));
    const patient = source.read(100, 50, soon());
    expect(await waitUntil(() => source.condition().kind === 'waiting', PATIENCE_MS)).toBe(true);
    signalProcess(pid, 'SIGCONT');
    expect((await patient).equals(CONTENT.subarray(100, 150))).toBe(true);
    expect(source.condition().kind).toBe('ok');
    expect(source.pid).toBe(pid);
  });

  it('gives what was under way to the next fetcher when one dies', async () => {
    const source = reader();
    await source.read(0, 1, soon());
    const pid = source.pid ?? 0;
    await stopProcess(pid);
    const waiting = Array.from({ length: 80 }, (_, i) => source.read(i * 1000, 1000, soon()));
    signalProcess(pid, 'SIGKILL');
    const parts = await Promise.all(waiting);
    expect(Buffer.concat(parts).equals(CONTENT.subarray(0, 80_000))).toBe(true);
    expect(source.pid).not.toBe(pid);
  });

  it('gives up a fetcher that says nothing for twice the limit', async () => {
    const source = reader(200);
    await source.read(0, 1, soon());
    const pid = source.pid ?? 0;
    await stopProcess(pid);
    const patient = source.read(0, 10, soon());
    expect(await waitUntil(() => {
      source.look();
      return !isAlive(pid);
    }, PATIENCE_MS)).toBe(true);
    expect((await patient).equals(CONTENT.subarray(0, 10))).toBe(true);
  });

  it.each<readonly [string, () => void, () => void, string]>([
    ['truncated', () => { fs.truncateSync(file, MIB); }, () => { fs.writeFileSync(file, CONTENT); }, 'source-changed'],
    ['written to', () => { fs.writeFileSync(file, 'x', { flag: 'r+' }); }, () => { fs.writeFileSync(file, CONTENT); }, 'source-changed'],
  ])('that was %s while it is read gives no byte, until it is as it was', async (_name, change, restore, expected) => {
    const time = new Date('2026-01-02T03:04:05Z');
    fs.utimesSync(file, time, time);
    const source = reader();
    await source.read(0, 10, soon());
    change();
    expect(await kind(source.read(2 * MIB, 10, soon()))).toBe(expected);
    expect(await kind(source.read(0, 10, soon()))).toBe(expected);
    expect(source.condition()).toMatchObject({ kind: expected, reason: expect.stringContaining(file) as string });
    restore();
    fs.utimesSync(file, time, time);
    expect(await waitUntil(() => {
      source.look();
      return source.condition().kind === 'ok';
    }, PATIENCE_MS)).toBe(true);
    expect((await source.read(2 * MIB, 10, soon())).equals(CONTENT.subarray(2 * MIB, 2 * MIB + 10))).toBe(true);
  });

  it('says at once that a file is gone, and finds it when it is back', async () => {
    const source = reader();
    fs.renameSync(file, `${file}.away`);
    expect(await kind(source.read(0, 1, soon()))).toBe('source-unreachable');
    expect(source.condition().reason).toMatch(/ENOENT/);
    fs.renameSync(`${file}.away`, file);
    expect(await waitUntil(async () => await source.read(0, 4, soon()).then((bytes) => bytes.equals(CONTENT.subarray(0, 4)), () => false), PATIENCE_MS)).toBe(true);
  });
});
