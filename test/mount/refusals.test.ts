/**
 * What the world refuses, seen from the mount: the caller gets the errno, and the server lives on.
 *
 * Limits of the file system below the store, paths that cannot be followed, a source that is away: none of them is a fault
 * of the program, so none may end the server, for every other disk hangs on it. One daemon for all; each test looks whether
 * the server is still the same.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, renameSync, statfsSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf, type ErrorKind } from '../../blockstore/errors.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import type { NodeInfo } from '../../daemon/control/schemas.js';
import { startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage, patternBlock } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import { signalProcess, waitUntilGone } from '../support/processes.js';
import { createCleanup, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { REFUSED_ON_SOME_KERNELS } from './conformance-context.js';

const MIB = 1024 * 1024;
const TIB = 1024 ** 4;
const EXT4_MAGIC = 0xef53;
const SEED = 51;
const WRITTEN_SEED = 52;
const ANSWER_TIMEOUT_MS = 20_000;

/** Opens a disk once, and reads the block that each line of its input names: a checksum, or the error. */
const READER = `
  const fs = require('node:fs');
  const fd = fs.openSync(process.argv[1], 'r');
  const block = Buffer.alloc(${BLOCK_BYTES});
  console.log('open');
  require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => {
    try {
      const length = fs.readSync(fd, block, 0, block.length, Number(line) * block.length);
      console.log(require('node:crypto').createHash('sha256').update(block.subarray(0, length)).digest('hex'));
    } catch (error) { console.log(error.code); }
  });`;

/** A process that has a disk open as long as the test wants. */
class Reader {
  private readonly child: ChildProcess;
  private readonly answers: AsyncIterator<string>;

  constructor(file: string) {
    this.child = spawn(process.execPath, ['-e', READER, file], { stdio: ['pipe', 'pipe', 'inherit'] });
    if (this.child.stdout === null) throw new Error('the reader has no output');
    this.answers = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
  }

  async opened(): Promise<void> {
    expect(await this.answer()).toBe('open');
  }

  /** SHA-256 of the block, or the code of the error. */
  async read(block: number): Promise<string> {
    this.child.stdin?.write(`${block}\n`);
    return await this.answer();
  }

  async end(): Promise<void> {
    const { pid } = this.child;
    if (pid === undefined) return;
    signalProcess(pid, 'SIGKILL');
    if (!(await waitUntilGone(pid, ANSWER_TIMEOUT_MS))) throw new Error(`reader ${pid} could not be ended`);
  }

  private async answer(): Promise<string> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => { reject(new Error(`no answer from the reader within ${ANSWER_TIMEOUT_MS} ms`)); }, ANSWER_TIMEOUT_MS);
    });
    try {
      const line = await Promise.race([this.answers.next(), late]);
      if (line.done === true) throw new Error('the reader has ended');
      return line.value;
    } finally {
      clearTimeout(timer);
    }
  }
}

function sumOf(seed: number, block: number): string {
  return createHash('sha256').update(patternBlock(seed, block)).digest('hex');
}

describe.skipIf(lacks('/dev/fuse'))('a refusal', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let files: string;
  const file = (name: string): string => join(files, name);

  beforeAll(async () => {
    files = makeTempDir('files', cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'c']);
    makePatternImage(file('good'), { sizeBytes: MIB, seed: SEED });
    await daemon.json(['import', file('good'), 'c/image']);
    await daemon.json(['clone', 'c/image', 'c/other']);
  });

  afterAll(() => cleanup.run());

  async function sameServer(body: () => Promise<void>): Promise<void> {
    const { serverPid, restarts } = await daemon.status();
    await body();
    expect(await daemon.status()).toMatchObject({ serverPid, restarts });
    await mustRun('cmp', [daemon.path('c/other'), file('good')]);
  }

  async function refuses(args: readonly string[], kind: ErrorKind, words: RegExp): Promise<void> {
    const before = await daemon.json<NodeInfo[]>(['ls', 'c']);
    const result = await daemon.cli([...args, '--json']);
    expect(result.code, result.stderr).toBe(exitCodeOf[kind]);
    expect(JSON.parse(result.stderr)).toMatchObject({ error: { kind, message: expect.stringMatching(words) as string } });
    expect((await daemon.json<NodeInfo[]>(['ls', 'c'])).map(({ path }) => path)).toEqual(before.map(({ path }) => path));
  }

  const sizeOf = async (path: string): Promise<number> => Number((await mustRun('stat', ['-c', '%s', path])).stdout);

  it('of a size that no file below the store can have is EFBIG', () => sameServer(async () => {
    const path = daemon.path('c/long');
    await mustRun('sh', ['-c', 'printf data > "$0"', path]);
    const result = await command('truncate', ['-s', '17T', path]);
    if (statfsSync(daemon.storeDir).type === EXT4_MAGIC) expect(result.code).not.toBe(0);
    if (result.code === 0) {
      expect(await sizeOf(path)).toBe(17 * TIB);
      await mustRun('truncate', ['-s', '4', path]);
    } else {
      expect(result.stderr).toMatch(/File too large/);
    }
    // More than any disk may have, whatever lies below.
    expect((await command('truncate', ['-s', '65T', path])).stderr).toMatch(/File too large/);
    expect(await sizeOf(path)).toBe(4);
    await mustRun('sh', ['-c', 'printf more >> "$0"', path]);
    expect((await mustRun('cat', [path])).stdout).toBe('datamore');
  }));

  it('of one byte at 2^50 or 2^52 of a file is EFBIG, as of one sector without the cache, and the file stays as it is', () => sameServer(async () => {
    await mustRun('sh', ['-c', 'printf data > "$0"', daemon.path('c/far')]);
    // A clone has a map of its blocks, which must not be made to fit.
    await daemon.json(['clone', 'c/far', 'c/far-clone']);
    for (const path of [daemon.path('c/far'), daemon.path('c/far-clone')]) {
      for (const [at, unitBytes, flags] of [[2 ** 50, 1, []], [2 ** 52, 1, []], [2 ** 50, 512, ['oflag=direct']]] as const) {
        const result = await command('dd', ['if=/dev/zero', `of=${path}`, `bs=${unitBytes}`, 'count=1', `seek=${at / unitBytes}`, 'conv=notrunc', ...flags]);
        expect(result.stderr).toMatch(/File too large/);
        expect(result.code).not.toBe(0);
        expect(await sizeOf(path)).toBe(4);
        expect((await mustRun('cat', [path])).stdout).toBe('data');
      }
    }
  }));

  it('to import a path that loops is an error of the import', () => sameServer(async () => {
    symlinkSync(file('loop'), file('loop'));
    symlinkSync(file('pong'), file('ping'));
    symlinkSync(file('ping'), file('pong'));
    for (const name of ['loop', 'ping']) {
      await refuses(['import', file(name), 'c/looping'], 'invalid-argument', /symbolic link|loop|ELOOP/i);
      await refuses(['import', file(name), 'c/looping', '--in-place'], 'invalid-argument', /symbolic link|loop|ELOOP/i);
    }
  }));

  it('to import what lies under the mount holds for a path through a bind mount of it too', () => sameServer(async () => {
    for (const [name, bound, image] of [['all', daemon.mountDir, 'c/image'], ['container', daemon.path('c'), 'image']] as const) {
      const other = file(name);
      mkdirSync(other);
      const unbind = (): Promise<unknown> => command('umount', ['-l', '-i', '--no-canonicalize', '--', other]);
      cleanup.add(async () => { await unbind(); });
      await mustRun('mount', ['--bind', bound, other]);
      await refuses(['import', join(other, image), 'c/again'], 'invalid-argument', /under the mount/);
      await refuses(['import', join(other, image), 'c/again', '--in-place'], 'invalid-argument', /under the mount/);
      await unbind();
    }
  }));

  it('of a source that is away is EIO for what stands on it, until it is back, on the same descriptor', async () => {
    makePatternImage(file('source'), { sizeBytes: MIB, seed: SEED });
    makePatternImage(file('written'), { sizeBytes: BLOCK_BYTES, seed: WRITTEN_SEED });
    await daemon.json(['import', file('source'), 'c/in-place', '--in-place']);
    await daemon.json(['clone', 'c/in-place', 'c/clone']);
    await mustRun('dd', [`if=${file('written')}`, `of=${daemon.path('c/clone')}`, `bs=${BLOCK_BYTES}`, 'count=1', 'conv=notrunc,fsync']);
    const reader = new Reader(daemon.path('c/clone'));
    cleanup.add(() => reader.end());
    await reader.opened();
    expect(await reader.read(0)).toBe(sumOf(WRITTEN_SEED, 0));
    expect(await reader.read(3)).toBe(sumOf(SEED, 3));

    renameSync(file('source'), file('away'));
    await daemon.waitForServer(await daemon.killServer());
    await sameServer(async () => {
      expect(await reader.read(3)).toBe('EIO');
      expect(await reader.read(200)).toBe('EIO');
      expect((await command('cat', [daemon.path('c/clone')])).code).not.toBe(0);
      await daemon.json(['clone', 'c/image', 'c/meanwhile']);
      await mustRun('cmp', [daemon.path('c/meanwhile'), file('good')]);
    });

    renameSync(file('away'), file('source'));
    await sameServer(async () => {
      expect(await reader.read(3)).toBe(sumOf(SEED, 3));
      expect(await reader.read(200)).toBe(sumOf(SEED, 200));
      expect(await reader.read(0)).toBe(sumOf(WRITTEN_SEED, 0));
      await mustRun('cmp', [`--ignore-initial=${BLOCK_BYTES}`, daemon.path('c/clone'), file('good')]);
    });
    await reader.end();
    // Every user was counted once: what nobody has open can be removed, and the daemon stops.
    await daemon.json(['rm', 'c/clone']);
  });

  it('is in the log where somebody would look for it, and nothing else is', async () => {
    await daemon.stop();
    daemon.assertQuietLog([REFUSED_ON_SOME_KERNELS, /"msg":"import failed"/, /could not be opened again/, /"msg":"a layer cannot be scrubbed"/, /"kind":"(?:source|external)-unreachable"/, /SIGKILL/, /"msg":"recovered what/]);
  });
});
