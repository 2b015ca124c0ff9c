/**
 * What bad input gets, through the command line: a clear error, a non-zero exit code, nothing changed.
 *
 * One daemon for what the control API refuses; each start that must fail gets directories of its own. What "nothing
 * changed" means is looked at from outside: the names in the store, the files of the store, the mount table.
 */
import { createHash } from 'node:crypto';
import { chmodSync, closeSync, mkdirSync, openSync, readFileSync, readdirSync, statSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { request } from 'node:http';
import { dirname, join, relative } from 'node:path';
import Database from 'better-sqlite3';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf } from '../../blockstore/errors.js';
import type { ErrorKind } from '../../blockstore/errors.js';
import type { ContainerInfo, DiskInfo, NodeInfo } from '../../daemon/control/schemas.js';
import { CLI_ENTRY, startTestDaemon } from '../support/daemon.js';
import type { TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun } from '../support/model/command.js';
import type { CommandResult } from '../support/model/command.js';
import { mountEntry } from '../support/model/mounts.js';
import { processesNaming } from '../support/processes.js';
import { createCleanup, makeTempDir, makeTmpfsDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';
import { REFUSED_ON_SOME_KERNELS } from './conformance-context.js';

const MIB = 1024 * 1024;
const NOBODY = 65534;
const LONG_NAME = 'n'.repeat(256);

/** Exit code, kind and words of a refusal; with `--json` too, where the error is one object on standard error. */
async function refused(daemon: TestDaemon, args: readonly string[], kind: ErrorKind, words: RegExp): Promise<void> {
  const plain = await daemon.cli(args);
  expect(plain.stderr, args.join(' ')).toMatch(words);
  expect(plain.code, `${args.join(' ')}: ${plain.stderr}`).toBe(exitCodeOf[kind]);
  expect(plain.stdout).toBe('');
  // After the other: two starts at once are in each other's way.
  const json = await daemon.cli([...args, '--json']);
  expect(json.code).toBe(exitCodeOf[kind]);
  expect(json.stdout).toBe('');
  expect(JSON.parse(json.stderr)).toMatchObject({ error: { kind, exitCode: exitCodeOf[kind], message: expect.stringMatching(words) as string } });
}

describe.skipIf(lacks('/dev/fuse', 'qemu-img', 'setpriv', 'mkfs.ext4'))('bad input to a running daemon', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let files: string;
  const file = (name: string): string => join(files, name);

  beforeAll(async () => {
    files = makeTempDir('files', cleanup);
    daemon = await startTestDaemon({ transport: 'kernel', cleanup });
    await daemon.json(['container', 'create', 'c']);
    makePatternImage(file('good'), { sizeBytes: MIB, seed: 31 });
    await daemon.json(['import', file('good'), 'c/image']);
    await daemon.json(['clone', 'c/image', 'c/clone']);
    await mustRun('mkdir', [daemon.path('c/dir')]);
  });

  afterAll(() => cleanup.run());

  /** Everything that a refused command could have changed. */
  async function everything(): Promise<unknown> {
    const containers = await daemon.json<ContainerInfo[]>(['container', 'ls']);
    const nodes = await Promise.all(containers.map(({ name }) => daemon.json<NodeInfo[]>(['ls', name])));
    return { containers, nodes: nodes.flat().map(({ path, kind, sizeBytes }) => ({ path, kind, sizeBytes })), layers: filesIn(daemon.storeDir) };
  }

  async function changesNothing(body: () => Promise<void>): Promise<void> {
    const before = await everything();
    await body();
    expect(await everything()).toEqual(before);
  }

  /** A target that no other refusal has, so that one that is let through stands in nobody's way. */
  let targets = 0;
  const target = (): string => `c/new-${(targets += 1)}`;

  const refuses = (args: readonly string[], kind: ErrorKind, words: RegExp): Promise<void> => refused(daemon, args, kind, words);

  it('refuses to import what is not there, a directory, an empty file, a device', () => changesNothing(async () => {
    await refuses(['import', file('missing'), target()], 'not-found', /missing/);
    await refuses(['import', files, target()], 'is-a-directory', /directory/);
    writeFileSync(file('empty'), '');
    await refuses(['import', file('empty'), target()], 'invalid-argument', /empty/);
    await refuses(['import', '/dev/zero', target()], 'invalid-argument', /regular file/);
    await refuses(['import', file('missing'), target(), '--in-place'], 'not-found', /missing/);
    await refuses(['import', '', target()], 'invalid-argument', /empty/);
  }));

  it('refuses a file of another format than said', () => changesNothing(async () => {
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file('foreign'), '1M']);
    await refuses(['import', file('foreign'), target()], 'foreign-format', /qcow2/);
    await refuses(['import', file('foreign'), target(), '--format', 'raw'], 'foreign-format', /qcow2/);
    await refuses(['import', file('foreign'), target(), '--in-place'], 'foreign-format', /qcow2/);
    await refuses(['import', file('good'), target(), '--format', 'qcow2'], 'foreign-format', /qcow2/);
    await refuses(['import', file('good'), target(), '--format', 'vmdk'], 'foreign-format', /vmdk/);
    expect((await daemon.cli(['import', file('good'), target(), '--format', 'floppy'])).code).toBe(2);
  }));

  it('never follows the backing file of a foreign image', () => changesNothing(async () => {
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', '/etc/hostname', '-F', 'raw', file('chained'), '1M']);
    const result = await daemon.cli(['import', file('chained'), target(), '--format', 'qcow2']);
    expect(result.code).not.toBe(0);
    expect(result.stderr).toMatch(/overlay|backing/);
  }));

  it('refuses a raw file of part sectors, or says what it makes of it', async () => {
    makePatternImage(file('partial'), { sizeBytes: MIB + 100, seed: 32 });
    const before = await everything();
    const result = await daemon.cli(['import', file('partial'), 'c/partial']);
    expect(result.stdout + result.stderr).toMatch(/512/);
    if (result.code === 0) {
      expect((await daemon.json<DiskInfo>(['show', 'c/partial'])).sizeBytes).toBe(MIB + 512);
      await mustRun('cmp', ['--bytes', String(MIB + 100), file('partial'), daemon.path('c/partial')]);
      const tail = await mustRun('tail', ['-c', '412', daemon.path('c/partial')]);
      expect(Buffer.from(tail.stdout)).toEqual(Buffer.alloc(412));
      await daemon.json(['rm', 'c/partial']);
    }
    expect(await everything()).toEqual(before);
  });

  it('refuses names that cannot be, wherever they are given', () => changesNothing(async () => {
    for (const name of ['', '.', '..', 'a/b', '/a', 'a/', 'new\nline', 'bell\u0007', 'at@sign']) {
      await refuses(['container', 'create', name], 'invalid-name', /name|empty|holds/);
    }
    await refuses(['container', 'create', LONG_NAME], 'name-too-long', /256 bytes/);
    await refuses(['container', 'create', 'ä'.repeat(128)], 'name-too-long', /256 bytes/);
    for (const path of ['', 'c', '/c/x', 'c/x/', 'c//x', 'c/../x', 'c/./x', '../c', 'c/new\nline', 'c/.snapshots', 'c/.block']) {
      await refuses(['import', file('good'), path], 'invalid-name', /name|path|holds|begins|ends|empty|kept/);
      await refuses(['clone', 'c/image', path], 'invalid-name', /name|path|holds|begins|ends|empty|kept/);
    }
    await refuses(['import', file('good'), `c/${LONG_NAME}`], 'name-too-long', /256 bytes/);
    await refuses(['clone', 'c/image', `c/${LONG_NAME}`], 'name-too-long', /256 bytes/);
    await refuses(['clone', 'c/image', `c/${'d/'.repeat(2100)}x`], 'name-too-long', /bytes/);
  }));

  it('refuses a NUL byte, which no command line can carry, on the control socket', () => changesNothing(async () => {
    expect(await post(daemon.socketPath, '/v1/containers', { name: 'a\0b' })).toMatchObject({ status: 400, kind: 'invalid-name' });
  }));

  it('refuses names that are taken, that are missing, that are of another kind', () => changesNothing(async () => {
    await refuses(['container', 'create', 'c'], 'already-exists', /exists/);
    await refuses(['import', file('good'), 'c/image'], 'already-exists', /exists/);
    await refuses(['clone', 'c/image', 'c/clone'], 'already-exists', /exists/);
    await refuses(['clone', 'c/missing', target()], 'not-found', /c\/missing/);
    await refuses(['clone', 'c/image', 'none/new'], 'not-found', /none/);
    await refuses(['import', file('good'), 'none/new'], 'not-found', /none/);
    await refuses(['clone', 'c/image', 'c/nodir/new'], 'not-found', /nodir/);
    await refuses(['clone', 'c/image', 'c/clone/new'], 'not-a-directory', /clone/);
    await refuses(['show', 'c/missing'], 'not-found', /c\/missing/);
    await refuses(['rm', 'c/missing'], 'not-found', /c\/missing/);
    await refuses(['rm', 'c'], 'not-empty', /not empty/);
    await refuses(['resize', 'c/missing', '1M'], 'not-found', /c\/missing/);
    await refuses(['fill', 'start', 'c/missing'], 'not-found', /c\/missing/);
    await refuses(['fill', 'pause', 'c/clone'], 'not-found', /fill/);
    await refuses(['ls', 'none'], 'not-found', /none/);
  }));

  it('makes all clones of a request or none', () => changesNothing(async () => {
    await refuses(['clone', 'c/image', 'c/one', 'c/two', 'c/clone', 'c/three'], 'already-exists', /c\/clone/);
    await refuses(['clone', 'c/image', 'c/one', 'c/two', 'c/one'], 'invalid-argument', /twice|c\/one/);
    await refuses(['clone', 'c/image', 'c/one', 'none/two'], 'not-found', /none/);
  }));

  it('refuses sizes, rates and options that make no sense', () => changesNothing(async () => {
    for (const size of ['0', '100', '-1', 'much', '1.5', '10GB', '65T', '513']) await refuses(['resize', 'c/clone', size], 'invalid-argument', /size|disk|multiple|could mean|whole|option/);
    await refuses(['fill', 'start', 'c/clone', '--rate', 'fast'], 'invalid-argument', /rate/);
    for (const args of [['clone'], ['clone', 'c/image'], ['nonsense'], ['daemon', 'start'], ['resize', 'c/clone'], ['show', 'c/clone', '--wrong'], []]) {
      expect((await daemon.cli(args)).code, args.join(' ')).toBe(2);
    }
  }));

  it('refuses to remove a disk that clones read from, and one that is open', async () => {
    await changesNothing(() => refuses(['rm', 'c/image'], 'in-use', /clone/));
    const opening = command('sh', ['-c', `exec 3<'${daemon.path('c/clone')}'; sleep 6`], { timeoutMs: 15_000 });
    await expect.poll(async () => (await daemon.json<DiskInfo>(['show', 'c/clone'])).openCount, { timeout: 5_000 }).toBe(1);
    await changesNothing(async () => {
      await refuses(['rm', 'c/clone'], 'in-use', /open/);
      await refuses(['daemon', 'stop'], 'in-use', /in use/);
    });
    await opening;
    await expect.poll(async () => (await daemon.json<DiskInfo>(['show', 'c/clone'])).openCount, { timeout: 5_000 }).toBe(0);
  });

  it('lets nobody but its owner use the socket', () => changesNothing(async () => {
    chmodSync(dirname(daemon.socketPath), 0o711);
    const result = await asNobody(['container', 'create', 'theirs', '--socket', daemon.socketPath]);
    expect(result.stderr).toMatch(/root|permission/);
    expect(result.code).toBe(exitCodeOf['permission-denied']);
  }));

  it('refuses a second daemon on the same store, mount or socket', async () => {
    const other = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: daemon.storeDir, start: false });
    const { disksTotal } = await daemon.status();
    const start = (store: string, mount: string, socket: string): string[] => ['daemon', 'start', '--store', store, '--mount', mount, '--socket', socket];
    const otherStore = join(dirname(other.mountDir), 'store');
    await refused(other, start(daemon.storeDir, other.mountDir, other.socketPath), 'store-locked', /in use/);
    await refused(other, start(otherStore, daemon.mountDir, other.socketPath), 'mount-unusable', /already the mount/);
    await refused(other, start(otherStore, other.mountDir, daemon.socketPath), 'in-use', /another daemon/);
    expect(mountEntry(other.mountDir)).toBeNull();
    expect(processesNaming(other.mountDir)).toEqual([]);
    expect((await daemon.status()).disksTotal).toBe(disksTotal);
  });

  it('has written no error to its log but what it refused', () => {
    daemon.assertQuietLog([REFUSED_ON_SOME_KERNELS, /"msg":"import failed"/, /"msg":"not unmounted/]);
  });
});

describe.skipIf(lacks('/dev/fuse', 'setpriv'))('starts that must fail', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();

  afterEach(() => cleanup.run());

  async function unstarted(storeDir?: string): Promise<TestDaemon> {
    return startTestDaemon({ transport: 'kernel', cleanup, start: false, ...(storeDir === undefined ? {} : { storeDir }) });
  }

  const startArgs = (daemon: TestDaemon, more: { readonly mount?: string; readonly socket?: string } = {}): string[] =>
    ['daemon', 'start', '--store', daemon.storeDir, '--mount', more.mount ?? daemon.mountDir, '--socket', more.socket ?? daemon.socketPath];

  /** Nothing runs, nothing is mounted, and an ordinary start works. */
  async function startsAfterwards(daemon: TestDaemon): Promise<void> {
    expect(processesNaming(daemon.mountDir)).toEqual([]);
    expect(mountEntry(daemon.mountDir)).toBeNull();
    await daemon.start();
    await daemon.stop();
  }

  it('a mount point that is missing, a file, not empty, or inside the store', async () => {
    const daemon = await unstarted();
    const top = dirname(daemon.mountDir);
    writeFileSync(join(top, 'file'), 'x');
    mkdirSync(join(top, 'full/sub'), { recursive: true });
    await refused(daemon, startArgs(daemon, { mount: join(top, 'missing') }), 'mount-unusable', /does not exist/);
    await refused(daemon, startArgs(daemon, { mount: join(top, 'file') }), 'mount-unusable', /not a directory/);
    await refused(daemon, startArgs(daemon, { mount: join(top, 'full') }), 'mount-unusable', /not empty/);
    mkdirSync(daemon.storeDir, { recursive: true, mode: 0o700 });
    await refused(daemon, startArgs(daemon, { mount: daemon.storeDir }), 'invalid-argument', /same directory/);
    await startsAfterwards(daemon);
  });

  it('a mount point that has something mounted on it', async () => {
    const daemon = await unstarted();
    await mustRun('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'none', daemon.mountDir]);
    try {
      await refused(daemon, startArgs(daemon), 'mount-unusable', /already a mount/);
      expect(mountEntry(daemon.mountDir)?.kind).toBe('tmpfs');
    } finally {
      await mustRun('umount', [daemon.mountDir]);
    }
    await startsAfterwards(daemon);
  });

  it('a store of a newer format', async () => {
    const daemon = await unstarted();
    await daemon.start();
    await daemon.stop();
    const path = join(daemon.storeDir, 'offshoot.db');
    const database = new Database(path);
    const version = database.pragma('user_version', { simple: true }) as number;
    database.pragma('user_version = 1000');
    database.close();
    const before = sumOf(path);
    await refused(daemon, startArgs(daemon), 'store-version', /newer|version/);
    expect(sumOf(path)).toBe(before);
    const again = new Database(path);
    again.pragma(`user_version = ${version}`);
    again.close();
    await startsAfterwards(daemon);
  });

  it('a store with a damaged database, or with something else in its place', async () => {
    const daemon = await unstarted();
    await daemon.start();
    await daemon.json(['container', 'create', 'c']);
    await daemon.stop();
    const path = join(daemon.storeDir, 'offshoot.db');
    const good = readFileSync(path);
    for (const damage of [
      (): void => { writeFileSync(path, 'this is no database at all, although it has some length'.repeat(200)); },
      (): void => { writeFileSync(path, good.subarray(0, good.length - 4096)); },
      (): void => { overwrite(path, 4096, Buffer.alloc(good.length - 8192, 0xee)); },
      (): void => { writeFileSync(path, ''); truncateSync(path, 4096); },
    ]) {
      writeFileSync(path, good);
      damage();
      const before = sumOf(path);
      await refused(daemon, startArgs(daemon), 'store-damaged', /damaged|not a database|not an? offshoot|store/i);
      expect(sumOf(path)).toBe(before);
    }
    writeFileSync(path, good);
    await startsAfterwards(daemon);
  });

  it('no permission', async () => {
    const daemon = await unstarted();
    chmodSync(dirname(daemon.mountDir), 0o755);
    const result = await asNobody(startArgs(daemon));
    expect(result.code).toBe(exitCodeOf['permission-denied']);
    expect(result.stderr).toMatch(/root|permission/);
    await startsAfterwards(daemon);
  });

  it('a socket path that is too long, or is taken by a file', async () => {
    const daemon = await unstarted();
    const long = join(dirname(daemon.mountDir), 's'.repeat(108));
    await refused(daemon, startArgs(daemon, { socket: long }), 'name-too-long', /107/);
    await refused(daemon, ['ls', '--socket', long], 'name-too-long', /107/);
    writeFileSync(join(dirname(daemon.mountDir), 'taken'), 'x');
    await refused(daemon, startArgs(daemon, { socket: join(dirname(daemon.mountDir), 'taken') }), 'already-exists', /not a socket/);
    await startsAfterwards(daemon);
  });

  it('no daemon: every command says how to start one', async () => {
    const daemon = await unstarted();
    for (const args of [['ls'], ['daemon', 'status'], ['daemon', 'stop'], ['clone', 'c/a', 'c/b'], ['show', 'c/a'], ['fill', 'status', 'c/a'], ['rm', 'c/a']]) {
      await refused(daemon, args, 'daemon-not-running', /daemon start/);
    }
  });

  it('fuse-native where a package is missing names the package', async () => {
    const daemon = await unstarted();
    const bin = join(dirname(daemon.mountDir), 'bin');
    mkdirSync(bin);
    await mustRun('ln', ['-s', '/bin/true', join(bin, 'true')]);
    // Only a mount namespace without fusermount shows it, as the transport looks in the usual places too.
    const script = ['for f in /bin/fusermount /usr/bin/fusermount /usr/local/bin/fusermount; do [ -e $f ] && mount --bind /dev/null $f; done', 'exec "$@"'].join('\n');
    const args = ['--mount', '--propagation', 'slave', '--', 'sh', '-c', script, 'sh', process.execPath, CLI_ENTRY, ...startArgs(daemon), '--transport', 'fuse-native'];
    const result = await command('unshare', args, { timeoutMs: 60_000 });
    expect(result.stderr).toMatch(/fusermount is not installed: apt-get install libfuse2 fuse/);
    expect(result.code).toBe(exitCodeOf['tool-missing']);
    await startsAfterwards(daemon);
  });
});

describe.skipIf(lacks('/dev/fuse'))('a full store', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();

  afterEach(() => cleanup.run());

  it('refuses imports and writes with ENOSPC, loses nothing, and goes on when there is room', async () => {
    const files = makeTmpfsDir('files', cleanup);
    const small = makeTmpfsDir('small', cleanup);
    await mustRun('mount', ['-t', 'tmpfs', '-o', 'size=96m', 'none', small]);
    cleanup.add(async () => { await mustRun('umount', ['-l', small]); });
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, storeDir: join(small, 'store') });
    await daemon.json(['container', 'create', 'c']);
    makePatternImage(join(files, 'large'), { sizeBytes: 256 * MIB, seed: 41 });
    makePatternImage(join(files, 'small'), { sizeBytes: 8 * MIB, seed: 42 });
    const before = filesIn(daemon.storeDir);
    await refused(daemon, ['import', join(files, 'large'), 'c/large'], 'no-space', /space|full|room/);
    expect(filesIn(daemon.storeDir)).toEqual(before);
    expect(await daemon.json(['ls', 'c'])).toEqual([]);

    await daemon.json(['import', join(files, 'large'), 'c/source', '--in-place']);
    await daemon.json(['import', join(files, 'small'), 'c/kept']);
    await daemon.json(['clone', 'c/source', 'c/clone']);
    const filling = await command('dd', ['if=/dev/urandom', `of=${daemon.path('c/clone')}`, 'bs=1M', 'count=200', 'conv=notrunc', 'oflag=direct'], { timeoutMs: 60_000 });
    expect(filling.code).not.toBe(0);
    expect(filling.stderr).toMatch(/No space left on device/);
    const written = Number(/(\d+)\+\d+ records out/.exec(filling.stderr)?.[1]);
    expect(written).toBeGreaterThan(10);
    await mustRun('cmp', [join(files, 'small'), daemon.path('c/kept')]);
    // What was not written is the source's, in the same disk.
    await mustRun('cmp', [`--ignore-initial=${220 * MIB}`, join(files, 'large'), daemon.path('c/clone')]);
    expect((await daemon.json<DiskInfo>(['show', 'c/clone'])).fault).toBeNull();

    await daemon.json(['clone', 'c/source', 'c/another']);
    await daemon.json(['rm', 'c/clone']);
    await mustRun('dd', ['if=/dev/urandom', `of=${daemon.path('c/another')}`, 'bs=1M', 'count=20', 'conv=notrunc,fsync']);
    await mustRun('cmp', [`--ignore-initial=${20 * MIB}`, join(files, 'large'), daemon.path('c/another')]);
    await daemon.stop();
    await daemon.start();
    await mustRun('cmp', [join(files, 'small'), daemon.path('c/kept')]);
  });
});

function asNobody(args: readonly string[]): Promise<CommandResult> {
  return command('setpriv', [`--reuid=${NOBODY}`, `--regid=${NOBODY}`, '--clear-groups', process.execPath, CLI_ENTRY, ...args], { timeoutMs: 60_000 });
}

/** Data files and leftovers of a store, with sizes; not the database's own and not the log. */
function filesIn(storeDir: string): readonly string[] {
  return readdirSync(storeDir, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .filter((path) => /^(layers|import)\//.test(relative(storeDir, path)))
    .map((path) => `${relative(storeDir, path)} ${statSync(path).size}`)
    .sort();
}

function sumOf(path: string): string {
  return createHash('sha256').update(readFileSync(path)).digest('hex');
}

function overwrite(path: string, offsetBytes: number, data: Buffer): void {
  const fd = openSync(path, 'r+');
  writeSync(fd, data, 0, data.length, offsetBytes);
  closeSync(fd);
}

/** One request to the control socket, past the command line's own checks. */
function post(socketPath: string, path: string, body: unknown): Promise<{ readonly status: number; readonly kind: string }> {
  return new Promise((resolve, reject) => {
    const sent = request({ socketPath, path, method: 'POST', headers: { 'content-type': 'application/json' }, timeout: 10_000 }, (response) => {
      let text = '';
      response.on('data', (chunk: Buffer) => { text += chunk.toString(); });
      response.on('end', () => {
        const { error } = JSON.parse(text) as { readonly error: { readonly kind: string } };
        resolve({ status: response.statusCode ?? 0, kind: error.kind });
      });
    });
    sent.on('error', reject);
    sent.end(JSON.stringify(body));
  });
}
