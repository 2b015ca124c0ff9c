/**
 * What hostile guests, images and local users get, on a real daemon: see daemon/THREATS.md, whose table names these tests.
 *
 * Other users are real ones (setpriv), so that it is the kernel that refuses. Secrets that must not be read are files whose
 * words would be found in whatever came of an attack.
 */
import { chmodSync, existsSync, lstatSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { exitCodeOf, type ErrorKind } from '../../blockstore/errors.js';
import type { ContainerInfo, DiskInfo, JobInfo, NodeInfo } from '../../daemon/control/schemas.js';
import { CLI_ENTRY, startTestDaemon, type TestDaemon } from '../support/daemon.js';
import { makePatternImage } from '../support/images.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { findProgram, lacks } from '../support/tools.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const MIB = 1024 * 1024;
const ADMINS = 72_001;
const READERS = 72_002;
const ALICE = 72_100;
const BOB = 72_200;
const SECRET = 'the secret of the host';
const NAMED_PIPE_MODE = 0o600;

describe.skipIf(lacks('/dev/fuse', 'qemu-img', 'qemu-io', 'setpriv', 'mkfifo'))('against a running daemon', { timeout: 120_000 }, () => {
  const cleanup = createCleanup();
  let daemon: TestDaemon;
  let files: string;
  const file = (name: string): string => join(files, name);

  beforeAll(async () => {
    files = makeTempDir('files', cleanup);
    chmodSync(files, 0o755);
    writeFileSync(file('secret'), SECRET.padEnd(4096), { mode: 0o600 });
    makePatternImage(file('good'), { sizeBytes: MIB, seed: 61 });
    // A qemu-img that says as whom it runs and what it can do, then does its work.
    mkdirSync(file('bin'));
    writeFileSync(file('ran'), '');
    chmodSync(file('ran'), 0o666);
    writeFileSync(file('bin/qemu-img'), `#!/bin/sh
if [ "$1" = convert ]; then
  { id -u; id -G; grep -E '^(CapEff|CapPrm)' /proc/self/status; ulimit -c; ls /proc/self/fd | tr '\\n' ' '; echo
    for f in ${file('secret')} ${file('')}; do (: > "$f/new") 2>/dev/null; cat "$f" 2>/dev/null && echo READ; done; echo end; } > ${file('ran')} 2>&1
fi
exec ${findProgram('qemu-img') ?? 'qemu-img'} "$@"
`, { mode: 0o755 });
    daemon = await startTestDaemon({ transport: 'kernel', cleanup, start: false, environment: { PATH: `${file('bin')}:${process.env['PATH'] ?? ''}` } });
    chmodSync(dirname(daemon.socketPath), 0o711);
    await daemon.json([
      'daemon', 'start', '--store', daemon.storeDir, '--mount', daemon.mountDir, '--group', String(ADMINS), '--read-only-group', String(READERS),
    ]);
    await daemon.json(['container', 'create', 'c']);
    await daemon.json(['import', file('good'), 'c/image']);
    for (const [name, uid] of [['alice', ALICE], ['bob', BOB]] as const) {
      await daemon.json(['clone', 'c/image', `c/${name}`]);
      await mustRun('chown', [`${uid}:${uid}`, daemon.path(`c/${name}`)]);
    }
  });

  afterAll(() => cleanup.run());

  async function refused(args: readonly string[], kind: ErrorKind, words: RegExp): Promise<void> {
    const result = await daemon.cli(args);
    expect(result.stderr, args.join(' ')).toMatch(words);
    expect(result.code, `${args.join(' ')}: ${result.stderr}`).toBe(exitCodeOf[kind]);
  }

  const as = (uid: number, groups: readonly number[], program: string, args: readonly string[]): Promise<CommandResult> =>
    command('setpriv', [`--reuid=${uid}`, `--regid=${uid}`, ...(groups.length === 0 ? ['--clear-groups'] : [`--groups=${groups.join(',')}`]), program, ...args], { timeoutMs: 60_000 });
  const cliAs = (groups: readonly number[], args: readonly string[]): Promise<CommandResult> =>
    as(ALICE, groups, process.execPath, [CLI_ENTRY, '--socket', daemon.socketPath, ...args]);

  it('administrators do everything, readers look, others get nothing', async () => {
    expect(await cliAs([ADMINS], ['container', 'create', 'theirs'])).toMatchObject({ code: 0 });
    expect(JSON.parse((await cliAs([READERS], ['container', 'ls', '--json'])).stdout)).toMatchObject([{ name: 'c' }, { name: 'theirs' }]);
    expect(await cliAs([READERS], ['daemon', 'status'])).toMatchObject({ code: 0 });
    expect(await cliAs([READERS], ['rm', 'theirs'])).toMatchObject({ code: exitCodeOf['permission-denied'] });
    const through = await as(ALICE, [READERS], process.execPath, [CLI_ENTRY, '--socket', `${daemon.socketPath}-ro`, 'rm', 'theirs']);
    expect(through.code).toBe(exitCodeOf['permission-denied']);
    expect(through.stderr).toMatch(/read-only socket/);
    expect(await cliAs([], ['daemon', 'status'])).toMatchObject({ code: exitCodeOf['permission-denied'] });
    expect((await daemon.json<ContainerInfo[]>(['container', 'ls'])).map(({ name }) => name)).toEqual(['c', 'theirs']);
    const made = daemon.log().find(({ text }) => text.includes('"operation":"createContainer"') && text.includes('theirs'));
    expect(JSON.parse(made?.text ?? '{}')).toMatchObject({ callerUid: ALICE, callerGid: ALICE, msg: 'control call' });
  });

  it('still do so after the server was killed', async () => {
    await daemon.waitForServer(await daemon.killServer());
    expect(await cliAs([ADMINS], ['rm', 'theirs'])).toMatchObject({ code: 0 });
    expect(await cliAs([READERS], ['rm', 'c/bob'])).toMatchObject({ code: exitCodeOf['permission-denied'] });
    expect(await cliAs([], ['container', 'ls'])).toMatchObject({ code: exitCodeOf['permission-denied'] });
  });

  it('refuses groups that are not there, or the same twice, before anything is started', async () => {
    const other = await startTestDaemon({ transport: 'kernel', cleanup, start: false });
    const start = ['daemon', 'start', '--store', other.storeDir, '--mount', other.mountDir];
    for (const [args, kind, words] of [
      [['--group', 'no-such-group'], 'not-found', /no group no-such-group/],
      [['--group', '-x'], 'not-found', /no group/],
      [['--group', '4294967295'], 'invalid-argument', /too large/],
      [['--group', '7', '--read-only-group', '7'], 'invalid-argument', /same group/],
      [['--space-warning', '101%'], 'invalid-argument', /at most 100/],
    ] as const) {
      const result = await other.cli([...start, ...args]);
      expect(result.stderr).toMatch(words);
      expect(result.code).toBe(exitCodeOf[kind]);
    }
    expect(existsSync(other.storeDir)).toBe(false);
  });

  it('an unprivileged QEMU opens exactly the disks that are its own', async () => {
    const io = (uid: number, name: string, what: string): Promise<CommandResult> => as(uid, [], 'qemu-io', ['-f', 'raw', '-t', 'none', '-c', what, daemon.path(name)]);
    expect(statSync(daemon.path('c/alice')).mode & 0o777).toBe(0o600);
    expect(await io(ALICE, 'c/alice', 'write -P 0x5a 4096 65536')).toMatchObject({ code: 0 });
    expect(await io(ALICE, 'c/alice', 'read -P 0x5a 4096 65536')).toMatchObject({ code: 0 });
    for (const what of ['write -P 1 0 4096', 'read 0 4096']) {
      const theirs = await io(BOB, 'c/alice', what);
      expect(theirs.code).not.toBe(0);
      expect(theirs.stderr).toMatch(/Permission denied/);
    }
    expect((await as(ALICE, [], 'qemu-img', ['info', '-f', 'raw', daemon.path('c/image')])).stderr).toMatch(/Permission denied/);
    // What a guest's owner may do to the names is the directory's to say.
    for (const args of [['rm', '-f', daemon.path('c/bob')], ['mv', daemon.path('c/bob'), daemon.path('c/mine')], ['chmod', '666', daemon.path('c/bob')], ['touch', daemon.path('c/new')], ['truncate', '-s', '0', daemon.path('c/bob')]]) {
      expect((await as(ALICE, [], args[0] ?? '', args.slice(1))).code, args.join(' ')).not.toBe(0);
    }
    await mustRun('cmp', ['--bytes', String(MIB), file('good'), daemon.path('c/bob')]);
  });

  it('neither set-user-id programs nor devices nor programs come from the mount', async () => {
    const [, options = ''] = /^\S+ \S+ \S+ \S+ \S+ (\S+) /mu.exec(readFileSync('/proc/self/mountinfo', 'utf8').split('\n').find((line) => line.includes(` ${daemon.mountDir} `)) ?? '') ?? [];
    for (const flag of ['nosuid', 'nodev', 'noexec']) expect(options.split(',')).toContain(flag);
    await mustRun('cp', [findProgram('true') ?? '/bin/true', daemon.path('c/program')]);
    await mustRun('chmod', ['0755', daemon.path('c/program')]);
    expect((await command(daemon.path('c/program'), []).catch((error: unknown) => ({ code: String(error) }))).code).not.toBe(0);
    expect((await command('mknod', [daemon.path('c/null'), 'c', '1', '3'])).code).not.toBe(0);
    await daemon.json(['rm', 'c/program']);
  });

  it('links under the mount lead nobody out of it but who follows them', async () => {
    await mustRun('ln', ['-s', file('secret'), daemon.path('c/link')]);
    await mustRun('ln', ['-s', '..', daemon.path('c/up')]);
    await mustRun('ln', ['-s', files, daemon.path('c/away')]);
    await refused(['clone', 'c/link', 'c/copy'], 'is-a-directory', /only disks/);
    await refused(['clone', 'c/image', 'c/away/copy'], 'not-a-directory', /away/);
    await refused(['clone', 'c/up/c/image', 'c/copy'], 'not-a-directory', /not a directory/);
    await refused(['import', file('good'), 'c/up/escaped'], 'not-a-directory', /not a directory/);
    await refused(['resize', 'c/link', '1M'], 'is-a-directory', /not a disk/);
    await refused(['ls', 'c/away/x'], 'not-a-directory', /not a directory/);
    expect((await daemon.json<DiskInfo>(['show', 'c/link'])).kind).toBe('symlink');
    // An ordinary user who follows one gets what he could get anyhow.
    expect((await as(ALICE, [], 'cat', [daemon.path('c/link')])).stderr).toMatch(/Permission denied/);
    for (const name of ['link', 'up', 'away']) await daemon.json(['rm', `c/${name}`]);
    expect(readFileSync(file('secret'), 'utf8')).toContain(SECRET);
    expect(existsSync(file('good'))).toBe(true);
  });

  it('a container that is removed takes what its links lead to nowhere', async () => {
    await daemon.json(['container', 'create', 'gone']);
    await mustRun('ln', ['-s', files, daemon.path('gone/away')]);
    await mustRun('ln', ['-s', daemon.storeDir, daemon.path('gone/store')]);
    await daemon.json(['rm', '-r', 'gone']);
    expect(readdirSync(files)).toContain('secret');
    expect(readdirSync(daemon.storeDir)).toContain('offshoot.db');
  });

  it('names that climb stay names', async () => {
    for (const name of ['..', '../escaped', 'c/../../escaped', 'c/%2e%2e/x', '/etc/passwd', '-rf', '--help']) {
      const result = await daemon.cli(['clone', '--', 'c/image', name]);
      expect(result.code, name).not.toBe(0);
    }
    // These can be names, and are nothing else.
    for (const name of ['c/--help', 'c/-rf', 'c/$(touch x)', 'c/;reboot', 'c/%2e%2e', 'c/*']) {
      expect(await daemon.cli(['clone', '--', 'c/image', name])).toMatchObject({ code: 0 });
      expect(lstatSync(daemon.path(name)).size).toBe(MIB);
      expect(await daemon.cli(['rm', '--', name])).toMatchObject({ code: 0 });
    }
    expect(existsSync(join(dirname(daemon.mountDir), 'escaped'))).toBe(false);
  });

  describe('imports', () => {
    it('follow no reference of a foreign image to another file', async () => {
      await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-u', '-b', file('secret'), '-F', 'raw', file('backed'), '4096']);
      await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-u', '-b', `json:{"driver":"raw","file":{"driver":"file","filename":"${file('secret')}"}}`, '-F', 'raw', file('json'), '4096']);
      await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `data_file=${file('data')},data_file_raw=on`, file('outside'), '4096']);
      await mustRun('qemu-img', ['create', '-q', '-f', 'vmdk', '-o', 'subformat=monolithicFlat', file('flat.vmdk'), '1M']);
      const descriptor = readFileSync(file('flat.vmdk'), 'latin1').replace(/"flat-flat\.vmdk"/u, `"${file('secret')}"`);
      writeFileSync(file('flat.vmdk'), descriptor);
      const hidden = Buffer.alloc(64 * 1024);
      hidden.write('KDMV');
      hidden.writeUInt32LE(1, 4);
      hidden.writeBigUInt64LE(1n, 28);
      hidden.writeBigUInt64LE(20n, 36);
      hidden.write(`# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8 FLAT "${file('secret')}" 0\n`, 512);
      writeFileSync(file('hidden.vmdk'), hidden);
      for (const [name, format] of [['backed', 'qcow2'], ['json', 'qcow2'], ['outside', 'qcow2'], ['flat.vmdk', 'vmdk'], ['hidden.vmdk', 'vmdk']] as const) {
        await refused(['import', file(name), 'c/stolen', '--format', format], 'foreign-format', /never followed/);
      }
      expect((await daemon.json<NodeInfo[]>(['ls', 'c'])).map(({ path }) => path)).not.toContain('c/stolen');
      expect(readdirSync(join(daemon.storeDir, 'import'))).toEqual([]);
    });

    it('run qemu-img as a user with nothing but two files', async () => {
      for (const format of ['qcow2', 'vmdk', 'vhdx', 'vdi']) {
        await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', format, file('good'), file(`good.${format}`)]);
        chmodSync(file(`good.${format}`), NAMED_PIPE_MODE);
        writeFileSync(file('ran'), '');
        await daemon.json(['import', file(`good.${format}`), `c/from-${format}`, '--format', format]);
        const said = readFileSync(file('ran'), 'utf8').split('\n');
        expect(Number(said[0])).toBeGreaterThan(1000);
        expect(said[1]).toBe(said[0]);
        expect(said.filter((line) => line.startsWith('Cap')).map((line) => line.split(':')[1]?.trim())).toEqual(['0000000000000000', '0000000000000000']);
        expect(said.join('\n')).not.toMatch(/READ|secret of/u);
        expect(said.at(-2)).toBe('end');
        await mustRun('cmp', ['--bytes', String(MIB), file('good'), daemon.path(`c/from-${format}`)]);
        await daemon.json(['rm', `c/from-${format}`]);
      }
    });

    it('refuse sizes that no disk has', async () => {
      for (const sizeBytes of [1n << 62n, (1n << 64n) - 512n, (1n << 46n) + 512n, 0n]) {
        await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file('huge'), '1M']);
        const image = readFileSync(file('huge'));
        image.writeBigUInt64BE(sizeBytes, 24);
        writeFileSync(file('huge'), image);
        const result = await daemon.cli(['import', file('huge'), 'c/huge', '--format', 'qcow2']);
        expect(result.code, `${sizeBytes}: ${result.stderr}`).not.toBe(0);
        expect(result.code).not.toBe(exitCodeOf.internal);
      }
      writeFileSync(file('sparse'), '');
      // As large as the file system lets it be; the most that a disk can have is 64 TiB.
      try {
        truncateSync(file('sparse'), 2 ** 46 + 512);
        await refused(['import', file('sparse'), 'c/huge', '--in-place'], 'too-large', /64 TiB/);
      } catch (error) {
        expect((error as NodeJS.ErrnoException).code).toBe('EFBIG');
      }
      expect(readdirSync(join(daemon.storeDir, 'import'))).toEqual([]);
    });

    it('wait for no FIFO, read no device, and take no file of the store or the mount by whatever path', async () => {
      await mustRun('mkfifo', [file('fifo')]);
      symlinkSync(file('fifo'), file('to-fifo'));
      symlinkSync('/dev/zero', file('to-device'));
      symlinkSync(daemon.storeDir, file('to-store'));
      symlinkSync(daemon.mountDir, file('to-mount'));
      symlinkSync(file('loop'), file('loop'));
      await refused(['import', file('fifo'), 'c/x'], 'invalid-argument', /regular file/);
      await refused(['import', file('to-fifo'), 'c/x'], 'invalid-argument', /regular file/);
      await refused(['import', file('to-device'), 'c/x'], 'invalid-argument', /regular file/);
      await refused(['import', join(file('to-store'), 'offshoot.db'), 'c/x'], 'invalid-argument', /store itself/);
      await refused(['import', join(daemon.storeDir, 'import/../offshoot.db'), 'c/x', '--in-place'], 'invalid-argument', /store itself/);
      await refused(['import', join(file('to-mount'), 'c/image'), 'c/x'], 'invalid-argument', /under the mount/);
      expect((await daemon.cli(['import', file('loop'), 'c/x'])).code).not.toBe(0);
    });

    it('say where a symbolic link led', async () => {
      symlinkSync(file('good'), file('to-good'));
      expect((await daemon.json<JobInfo>(['import', file('to-good'), 'c/linked'])).message).toBe(`read from ${file('good')}, where the path leads`);
      await daemon.json(['rm', 'c/linked']);
    });

    it('read the file that was looked at, or none, while somebody exchanges it', async () => {
      // As a user who can write to the directory would: the name leads to his file and to the secret in turn.
      const swap = join(files, 'swap');
      const swapper = command(process.execPath, ['-e', `
        const fs = require('node:fs');
        const [path, good, secret] = process.argv.slice(1);
        const end = Date.now() + 5000;
        for (let i = 0; Date.now() < end; i += 1) {
          fs.symlinkSync(secret, path + '.s'); fs.renameSync(path + '.s', path);
          fs.copyFileSync(good, path + '.g'); fs.renameSync(path + '.g', path);
        }`, swap, file('good'), file('secret')], { timeoutMs: 30_000 });
      let read = 0;
      for (let i = 0; i < 12; i += 1) {
        const result = await daemon.cli(['import', swap, `c/swap-${i}`, '--json']);
        if (result.code !== 0) continue;
        // What was read is what the result says.
        const { message } = JSON.parse(result.stdout) as JobInfo;
        const { sizeBytes } = await daemon.json<DiskInfo>(['show', `c/swap-${i}`]);
        expect(sizeBytes).toBe(message === null ? MIB : 4096);
        if (message !== null) expect(message).toContain(file('secret'));
        read += 1;
        await daemon.json(['rm', `c/swap-${i}`]);
      }
      await swapper;
      process.stderr.write(`${read} of 12 imports went through while their source was exchanged\n`);
      expect(readdirSync(join(daemon.storeDir, 'import'))).toEqual([]);
    });
  });

  it('clones in a set-group-id directory take its group, and elsewhere the source\'s', async () => {
    await mustRun('mkdir', [daemon.path('c/shared'), daemon.path('c/plain')]);
    await mustRun('chown', [`0:${ALICE}`, daemon.path('c/shared')]);
    await mustRun('chmod', ['2775', daemon.path('c/shared')]);
    await daemon.json(['clone', 'c/image', 'c/shared/clone', 'c/plain/clone']);
    await daemon.json(['import', file('good'), 'c/shared/import']);
    expect(statSync(daemon.path('c/shared/clone')).gid).toBe(ALICE);
    expect(statSync(daemon.path('c/shared/import')).gid).toBe(ALICE);
    expect(statSync(daemon.path('c/plain/clone')).gid).toBe(0);
    await daemon.json(['rm', '-r', 'c/shared']);
  });

  it('everything in the store and of the run is root\'s alone, after a busy day', async () => {
    await daemon.json(['clone', 'c/image', 'c/day', '--fill']);
    await mustRun('dd', ['if=/dev/urandom', `of=${daemon.path('c/day')}`, 'bs=64k', 'count=8', 'conv=notrunc,fsync']);
    await daemon.json(['fill', 'wait', 'c/day']);
    await daemon.json(['clone', 'c/day', 'c/day2']);
    await mustRun('cp', [file('good'), daemon.path('c/file')]);
    await daemon.waitForServer(await daemon.killServer());
    const runtime = runtimeDirectories();
    expect(runtime.length).toBeGreaterThan(0);
    const seen: string[] = [];
    const walk = (path: string): void => {
      const found = lstatSync(path);
      expect([path, found.uid, found.gid, (found.mode & 0o7777).toString(8)]).toEqual([path, 0, 0, found.isDirectory() ? '700' : '600']);
      expect(found.isDirectory() || found.isFile()).toBe(true);
      seen.push(path);
      if (found.isDirectory()) for (const name of readdirSync(path)) walk(join(path, name));
    };
    for (const path of [daemon.storeDir, ...runtime]) walk(path);
    for (const name of ['offshoot.db', 'offshoot.db-wal', 'offshoot.db-shm', 'offshoot.log', 'reserve', 'lock']) expect(seen).toContain(join(daemon.storeDir, name));
    expect(seen.filter((path) => path.endsWith('.layer')).length).toBeGreaterThan(3);
    expect(seen.some((path) => path.includes('journal-'))).toBe(true);
  });

  it('neither the log nor the processes\' arguments say what is in the disks', async () => {
    expect(daemon.log().map(({ text }) => text).join('\n')).not.toContain(SECRET);
    daemon.assertQuietLog([/"msg":"import failed"/, /"msg":"refused: /, /"msg":"recovered what/, /the server (was killed|ended)|server (ended|died|gone)|starting the next/i]);
    rmSync(file('secret'));
    await daemon.stop();
    for (const path of [daemon.socketPath, `${daemon.socketPath}-ro`]) expect(existsSync(path)).toBe(false);
  });

  /** The run-time directory of the server, by what it has open. */
  function runtimeDirectories(): string[] {
    const found = new Set<string>();
    for (const pid of readdirSync('/proc').filter((name) => /^[0-9]+$/u.test(name))) {
      try {
        if (!readFileSync(`/proc/${pid}/environ`, 'utf8').includes(`OFFSHOOT_TEST_DAEMON=${daemon.mountDir}\0`)) continue;
        for (const line of readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n')) {
          const path = /(\/\S+)\/journal-\d+$/u.exec(line)?.[1];
          if (path !== undefined) found.add(path);
        }
      } catch {
        // Gone meanwhile.
      }
    }
    return [...found];
  }
});

describe('what the project stands on', () => {
  const root = join(import.meta.dirname, '../..');
  const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as Record<string, Record<string, string>>;
  const lock = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')) as { packages: Record<string, { version?: string; resolved?: string; integrity?: string }> };
  const kinds = ['dependencies', 'optionalDependencies', 'devDependencies'] as const;

  it('is pinned to exact versions, in the manifest and in the lock file, with checksums', () => {
    for (const kind of kinds) {
      for (const [name, version] of Object.entries(manifest[kind] ?? {})) {
        expect(version, name).toMatch(/^\d+\.\d+\.\d+$/u);
        expect(lock.packages[`node_modules/${name}`]?.version, name).toBe(version);
      }
    }
    for (const [path, { resolved, integrity }] of Object.entries(lock.packages)) {
      if (path === '') continue;
      expect(integrity, path).toMatch(/^sha512-/u);
      // Left out where the registry is the configured one.
      expect(resolved ?? 'https://', path).toMatch(/^https:\/\//u);
    }
  });

  it('is listed in the README, each with its reason', () => {
    const section = readFileSync(join(root, 'README.md'), 'utf8').split('## Dependencies')[1]?.split('\n## ')[0] ?? '';
    for (const name of [...Object.keys(manifest['dependencies'] ?? {}), ...Object.keys(manifest['optionalDependencies'] ?? {})]) {
      const row = section.split('\n').find((line) => line.startsWith('|') && line.split('|')[1]?.includes(name.replace(/^@types\//u, '')));
      expect(row?.split('|')[2]?.trim().length ?? 0, name).toBeGreaterThan(20);
    }
    for (const name of Object.keys(manifest['devDependencies'] ?? {})) {
      expect(section.includes(name.replace(/^@types\//u, '')) || name.startsWith('@types/'), name).toBe(true);
    }
  });
});
