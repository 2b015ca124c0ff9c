/**
 * The kernel transport's own parts on real mounts: mounting, the state of a mount, the protocol as this kernel speaks it, requests
 * that are sent again, notifications.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import ts from 'typescript';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { OffshootError } from '../../blockstore/errors.js';
import { ExchangeIntents } from '../../daemon/transport/kernel/exchange-intents.js';
import {
  abortConnection, connectionOf, ensureFuseControl, isMounted, mountFuse, mountState, requestTimeouts, topmostMount, unmount, waitingRequests,
} from '../../daemon/transport/kernel/mount.js';
import { isTaken } from '../../daemon/transport/kernel/negotiation.js';
import { Notifier } from '../../daemon/transport/kernel/notifier.js';
import { resendMessage } from '../../daemon/transport/kernel/notify.js';
import { command, mustRun, type CommandResult } from '../support/model/command.js';
import { mountEntry } from '../support/model/mounts.js';
import { KernelConnection } from './kernel-connection.js';

const MKDIR = 9;
const RENAME2 = 45;
const INIT = 26;
const OPENDIR = 27;
const RELEASEDIR = 29;
const INTERRUPT = 36;
const koffiPath = createRequire(import.meta.url).resolve('koffi');

let connection: KernelConnection;
beforeEach(() => { connection = new KernelConnection(); });
afterEach(async () => { await connection.close(); });

const at = (path: string): string => join(connection.mountDir, path);

async function until(condition: () => boolean): Promise<void> {
  for (let tries = 0; tries < 500; tries++) {
    if (condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error('it did not come to that in 5 s');
}

/** Runs a line of JavaScript in a process of its own, with fs, and syscall failures as the exit code. */
function script(body: string): Promise<CommandResult> {
  return command(process.execPath, ['-e', `const fs = require('node:fs'); const koffi = require(${JSON.stringify(koffiPath)}); ${body}`]);
}

describe('a mount', () => {
  it('is what it says in the mount table, until it is unmounted', async () => {
    expect([isMounted(connection.mountDir), mountState(connection.mountDir)]).toEqual([false, { kind: 'none' }]);
    connection.mount();
    const entry = mountEntry(connection.mountDir);
    expect(entry?.kind).toBe('fuse.offshoot');
    for (const option of ['nosuid', 'nodev', 'noexec', 'allow_other', 'default_permissions', 'max_read=1048576', 'user_id=0']) {
      expect(entry?.options.split(',')).toContain(option);
    }
    expect(mountState(connection.mountDir)).toEqual({ kind: 'mounted', fileSystemType: 'fuse.offshoot', source: 'offshoot' });
    expect(topmostMount(connection.mountDir)?.deviceMinor).toBe(connectionOf(connection.mountDir));
    connection.serve();
    expect(unmount(connection.mountDir, { lazy: false })).toBe('unmounted');
    expect(await connection.ended()).toBe('ENODEV');
    expect(mountState(connection.mountDir)).toEqual({ kind: 'none' });
    expect(unmount(connection.mountDir, { lazy: false })).toBe('unmounted');
  });

  it('cannot be made where there is no directory', () => {
    expect(() => { mountFuse(connection.descriptor, join(connection.scratch, 'missing')); }).toThrow(/missing: there is no such directory. Make it first/);
    writeFileSync(join(connection.scratch, 'file'), '');
    expect(() => { mountFuse(connection.descriptor, join(connection.scratch, 'file')); }).toThrow(OffshootError);
    expect(() => { mountFuse(0, connection.mountDir); }).toThrow(/kernel refused the options/);
  });

  it('with blanks in its path is found', () => {
    const dir = join(connection.scratch, 'a b\\c');
    mkdirSync(dir);
    mountFuse(connection.descriptor, dir);
    try {
      expect(isMounted(dir)).toBe(true);
    } finally {
      unmount(dir, { lazy: true });
    }
    expect(isMounted(dir)).toBe(false);
  });

  it('in use is busy; lazily it goes from sight', async () => {
    connection.mount();
    connection.serve();
    connection.fileSystem.mkdir(1, 'dir', 0o755, { uid: 0, gid: 0, pid: 0 });
    // Not with spawn's cwd: this process would walk into the mount that it serves, and wait for itself.
    const user = spawn('sh', ['-c', 'cd "$0" && touch dir && exec sleep 60', connection.mountDir], { stdio: 'ignore' });
    try {
      await until(() => connection.opcodes().includes(4));
      expect(unmount(connection.mountDir, { lazy: false })).toBe('busy');
      expect(isMounted(connection.mountDir)).toBe(true);
      expect(unmount(connection.mountDir, { lazy: true })).toBe('unmounted');
      expect(isMounted(connection.mountDir)).toBe(false);
    } finally {
      user.kill('SIGKILL');
    }
    expect(await connection.ended()).toBe('ENODEV');
  });

  it('whose descriptor is gone is dead', () => {
    connection.mount();
    connection.closeDescriptor();
    expect(mountState(connection.mountDir)).toEqual({ kind: 'dead', fileSystemType: 'fuse.offshoot', source: 'offshoot' });
    expect(unmount(connection.mountDir, { lazy: false })).toBe('unmounted');
  });

  it('of another process whose server is hung is not dead, and does not hang the one that asks', async () => {
    // mount(8) makes it, so that it is not this process's own.
    const child = spawn('mount', ['-i', '-t', 'fuse.offshoot', '-o', 'fd=3,rootmode=40000,user_id=0,group_id=0', 'offshoot', connection.mountDir], {
      stdio: ['ignore', 'ignore', 'ignore', connection.descriptor],
    });
    expect(await new Promise((resolve) => child.once('exit', resolve))).toBe(0);
    const started = performance.now();
    expect(mountState(connection.mountDir).kind).toBe('mounted');
    // INIT is read and never answered: from here on a caller cannot even be killed.
    connection.keepBack = () => true;
    connection.serve();
    await until(() => connection.kept.length > 0);
    expect(mountState(connection.mountDir).kind).toBe('mounted');
    expect(performance.now() - started).toBeLessThan(10_000);
  });

  it('that hangs can be seen, and ended as the last resort', async () => {
    connection.mount();
    const number = connectionOf(connection.mountDir) ?? -1;
    ensureFuseControl();
    const caller = command('ls', [connection.mountDir]);
    await until(() => (waitingRequests(number) ?? 0) > 0);
    expect(abortConnection(number)).toBe(true);
    expect((await caller).code).not.toBe(0);
    unmount(connection.mountDir, { lazy: true });
    expect([waitingRequests(number), abortConnection(number)]).toEqual([null, false]);
  });

  it('can wait for a next server: no request timeout is set on this machine', () => {
    expect(requestTimeouts()).toEqual([]);
  });
});

describe('this kernel', () => {
  it('agrees on what disks need', async () => {
    connection.mount();
    connection.serve();
    expect((await command('stat', ['-f', connection.mountDir])).code).toBe(0);
    const session = connection.sessions[0];
    if (session === undefined) throw new Error('no session');
    for (const bit of [0, 5, 12, 15, 18, 21, 22, 28, 30, 39]) expect(isTaken(session, bit), `bit ${bit}`).toBe(true);
    expect(connection.sessions).toHaveLength(1);
  });

  it('does through the dispatcher what coreutils ask for', async () => {
    connection.mount();
    connection.serve({ exchangeIntents: new ExchangeIntents(connection.scratch) });
    connection.fileSystem.mode = 'cached';
    await mustRun('sh', ['-ec', `
      cd "$1"
      mkdir dir; echo one > dir/file; echo two >> dir/file; cp dir/file dir/copy; mv dir/copy dir/moved; ln -s file dir/link
      test "$(cat dir/link)" = "$(printf 'one\\ntwo')"
      chmod 4711 dir/file; test "$(stat -c %a dir/file)" = 711
      chown 12:34 dir/file; test "$(stat -c %u:%g:%s dir/file)" = 12:34:8
      truncate -s 3 dir/file; test "$(cat dir/file)" = one
      touch -d '1969-12-31 23:59:58.5 UTC' dir/file; test "$(stat -c %Y dir/file)" = -2
      test "$(ls -A dir | sort | tr '\\n' ' ')" = 'file link moved '
      for i in $(seq 300); do : > "dir/many-$i"; done
      test "$(ls dir | wc -l)" = 303
      ! ln dir/file dir/hard; ! mkfifo dir/fifo; ! getfattr -d -m - dir/file 2>/dev/null
      sync dir/file; sync dir
      rm -r dir; test -z "$(ls -A)"
    `, 'sh', connection.mountDir]);
    expect(connection.fatal).toEqual([]);
    expect(connection.replyErrors).toEqual([]);
    expect(connection.fileSystem.openHandles).toBe(0);
    expect(connection.opcodes()).not.toContain(25);
  });

  it('sends what QEMU and databases ask for: direct, durable, holes, fallocate, exchange', async () => {
    connection.mount();
    connection.serve({ exchangeIntents: new ExchangeIntents(connection.scratch) });
    const result = await script(`
      const at = (name) => ${JSON.stringify(connection.mountDir)} + '/' + name;
      const libc = koffi.load('libc.so.6');
      const fallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)');
      const lseek = libc.func('int64_t lseek(int fd, int64_t offset, int whence)');
      const renameat2 = libc.func('int renameat2(int a, const char *from, int b, const char *to, unsigned int flags)');
      const expect = (what, got, wanted) => { if (got !== wanted) throw new Error(what + ': ' + got + ', errno ' + koffi.errno()); };
      const fd = fs.openSync(at('disk'), fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_EXCL | fs.constants.O_DIRECT);
      expect('write', fs.writeSync(fd, Buffer.alloc(4096, 7), 0, 4096, 0), 4096);
      const durable = fs.openSync(at('disk'), fs.constants.O_WRONLY | fs.constants.O_DSYNC);
      expect('durable write', fs.writeSync(durable, Buffer.from('abc'), 0, 3, 1), 3);
      expect('punch', fallocate(fd, 3, 512, 512), 0);
      expect('zero', fallocate(fd, 0x11, 281600, 3072), 0);
      expect('collapse', fallocate(fd, 8, 0, 4096), -1);
      expect('hole', Number(lseek(fd, 0, 4)), 0);
      fs.fdatasyncSync(fd);
      fs.writeFileSync(at('other'), 'other');
      expect('exchange', renameat2(-100, at('disk'), -100, at('other'), 2), 0);
      expect('no replace', renameat2(-100, at('disk'), -100, at('other'), 1), -1);
      if (fs.readFileSync(at('disk'), 'latin1') !== 'other') throw new Error('not exchanged');
    `);
    expect(result.stderr).toBe('');
    const { fileSystem } = connection;
    const disk = fileSystem.lookup(1, 'other').nodeId;
    expect(fileSystem.fallocations).toEqual([[disk, 'punch-hole', 512, 512], [disk, 'zero-range-keep-size', 281600, 3072]]);
    // The durable write and the fdatasync; nothing else.
    expect(fileSystem.flushed).toEqual([disk, disk]);
    expect(connection.fatal).toEqual([]);
  });

  it('sends one INTERRUPT, is told that there is no such thing, and sends no more', async () => {
    connection.mount();
    connection.serve();
    for (const name of ['first', 'second']) {
      connection.keepBack = (opcode) => opcode === MKDIR;
      const caller = spawn('mkdir', [at(name)], { stdio: 'ignore' });
      const gone = new Promise((resolve) => caller.once('exit', (_code, signal) => { resolve(signal); }));
      await until(() => connection.kept.length > 0);
      caller.kill('SIGINT');
      await until(() => connection.opcodes().includes(INTERRUPT));
      await new Promise((resolve) => setTimeout(resolve, 100));
      connection.keepBack = () => false;
      connection.kept.length = 0;
      connection.write(resendMessage());
      expect(await gone).toBe('SIGINT');
    }
    expect(connection.opcodes().filter((opcode) => opcode === INTERRUPT)).toHaveLength(1);
    expect(connection.replyErrors).toEqual([]);
  });

  it('looks again when a name was taken between LOOKUP and CREATE, and checks permissions of what it finds', async () => {
    const { fileSystem } = connection;
    await fileSystem.setattr(1, { mode: 0o777 });
    connection.mount();
    connection.serve();
    const create = fileSystem.create.bind(fileSystem);
    fileSystem.create = (parent, name, mode, flags, caller) => {
      if (name.startsWith('raced') && fileSystem.readdir(1, 0, 99).every((entry) => entry.name !== name)) {
        const other = create(parent, name, 0o600, 0, { uid: 0, gid: 0, pid: 0 });
        fileSystem.release(other.open.handle);
        fileSystem.write(other.attributes.nodeId, 0, Buffer.from('somebody was quicker'));
      }
      return create(parent, name, mode, flags, caller);
    };
    await mustRun('sh', ['-c', 'echo -n mine > "$1/raced"', 'sh', connection.mountDir]);
    expect((await mustRun('cat', [at('raced')])).stdout).toBe('mine');
    const other = await script(`process.setgid(65534); process.setuid(65534); fs.writeFileSync(${JSON.stringify(at('raced-too'))}, 'x');`);
    expect(other.stderr).toContain('EACCES');
    expect((await mustRun('cat', [at('raced-too')])).stdout).toBe('somebody was quicker');
  });
});

describe('requests that a dead server left', () => {
  it.each<[string, number, readonly string[]]>([
    ['MKDIR', MKDIR, ['mkdir', 'new']],
    ['SYMLINK', 6, ['ln', '-s', 'target', 'new']],
    ['MKNOD or CREATE', 35, ['dd', 'of=new', 'conv=excl', 'count=0', 'if=/dev/null']],
    ['UNLINK', 10, ['rm', 'file']],
    ['RMDIR', 11, ['rmdir', 'dir']],
    ['RENAME', 12, ['mv', 'file', 'moved']],
    ['RENAME2', RENAME2, ['mv', '-n', 'file', 'moved']],
  ])('%s, done and not answered, succeeds with the next', async (_, opcode, argv) => {
    const { fileSystem } = connection;
    const root = { uid: 0, gid: 0, pid: 0 };
    fileSystem.mkdir(1, 'dir', 0o755, root);
    fileSystem.release(fileSystem.create(1, 'file', 0o644, 0, root).open.handle);
    connection.mount();
    connection.serve();
    // coreutils may use RENAME2 for either form of mv.
    const isWanted = (seen: number): boolean => seen === opcode || ((opcode === 12 || opcode === RENAME2) && (seen === 12 || seen === RENAME2));
    connection.keepBack = isWanted;
    const caller = command('sh', ['-c', `cd "$0" && exec "$@"`, connection.mountDir, ...argv]);
    await until(() => connection.kept.length > 0);
    // The dead server did it and got no further.
    const dead = connection.newDispatcher({ reply: () => undefined });
    for (const message of connection.kept) dead.handle(message);
    connection.keepBack = () => false;
    connection.write(resendMessage());
    const result = await caller;
    expect(result).toMatchObject({ code: 0, stderr: argv[0] === 'dd' ? expect.any(String) as string : '' });
    expect(connection.seen.filter((request) => isWanted(request.opcode)).map((request) => request.resent)).toEqual([false, true]);
    expect(connection.replyErrors).toEqual([]);
  });

  it('INIT itself is among them', async () => {
    connection.keepBack = (opcode) => opcode === INIT;
    connection.mount();
    connection.serve();
    const caller = command('ls', ['-a', connection.mountDir]);
    await until(() => connection.kept.length > 0);
    connection.keepBack = () => false;
    connection.write(resendMessage());
    expect(await caller).toMatchObject({ code: 0, stdout: '.\n..\n' });
    expect(connection.seen.slice(0, 2)).toEqual([{ opcode: INIT, resent: false }, { opcode: INIT, resent: true }]);
  });

  it('RESEND with nothing left does nothing', async () => {
    connection.mount();
    connection.write(resendMessage());
    connection.serve();
    expect((await command('ls', [connection.mountDir])).code).toBe(0);
    // Nobody waits for it: it may come when ls has ended, and is something that is left.
    const seen = (opcode: number): number => connection.opcodes().filter((each) => each === opcode).length;
    await until(() => seen(RELEASEDIR) === seen(OPENDIR));
    connection.write(resendMessage());
    expect((await command('stat', [connection.mountDir])).code).toBe(0);
    expect(connection.seen.some((request) => request.resent)).toBe(false);
    expect(connection.replyErrors).toEqual([]);
  });
});

describe('the notifier', () => {
  it('makes the kernel see what changed behind its back', async () => {
    const threadUrl = notifierThread();
    connection.mount();
    connection.serve({ sessionLimits: { ...longLived(), entryValidMs: 600_000, attributesValidMs: 600_000 } });
    const { fileSystem } = connection;
    const root = { uid: 0, gid: 0, pid: 0 };
    const make = (content: string): number => {
      const made = fileSystem.create(1, 'disk', 0o644, 0, root);
      fileSystem.release(made.open.handle);
      fileSystem.write(made.attributes.nodeId, 0, Buffer.from(content));
      return made.attributes.nodeId;
    };
    const stat = async (): Promise<string> => (await mustRun('stat', ['-c', '%i %s', at('disk')])).stdout.trim();
    const first = make('four');
    expect(await stat()).toBe(`${first} 4`);

    const failures: Error[] = [];
    const notifier = new Notifier({ descriptor: connection.descriptor, onFatal: (error) => failures.push(error), threadUrl });
    try {
      fileSystem.write(first, 0, Buffer.from('resized'));
      expect(await stat()).toBe(`${first} 4`);
      await notifier.invalidateAttributes(first);
      expect(await stat()).toBe(`${first} 7`);

      // Removed and made again under its name: the attributes' end is enough, since the old node is then ESTALE.
      fileSystem.unlink(1, 'disk');
      const second = make('other');
      expect(await stat()).toBe(`${first} 7`);
      await notifier.invalidateAttributes(first);
      expect(await stat()).toBe(`${second} 5`);

      // Removed for good: gone at once for who looks, and free for who makes it anew.
      fileSystem.unlink(1, 'disk');
      await notifier.invalidateAttributes(second);
      expect((await command('test', ['-e', at('disk')])).code).toBe(1);
      const third = make('thrice');
      expect(await stat()).toBe(`${third} 6`);
      fileSystem.unlink(1, 'disk');
      await notifier.invalidateAttributes(third);
      expect((await command('sh', ['-c', 'echo anew > "$0"', at('disk')])).code).toBe(0);
      expect((await mustRun('cat', [at('disk')])).stdout).toBe('anew\n');

      // Content that the kernel cached goes when the time of change is another.
      fileSystem.mode = 'cached';
      const fourth = fileSystem.lookup(1, 'disk').nodeId;
      const content = async (): Promise<string> => (await mustRun('cat', [at('disk')])).stdout;
      expect(await content()).toBe('anew\n');
      fileSystem.write(fourth, 0, Buffer.from('ANEW\n'));
      await notifier.invalidateAttributes(fourth);
      expect(await content()).toBe('ANEW\n');

      await notifier.invalidateAttributes(4711);
    } finally {
      await notifier.close();
    }
    expect(failures).toEqual([]);
  });

  it('waits for nothing, not even for a directory that a caller keeps locked', async () => {
    const threadUrl = notifierThread();
    connection.mount();
    connection.serve();
    connection.keepBack = (opcode) => opcode === MKDIR;
    const caller = command('mkdir', [at('new')]);
    await until(() => connection.kept.length > 0);
    const failures: Error[] = [];
    const notifier = new Notifier({ descriptor: connection.descriptor, onFatal: (error) => failures.push(error), threadUrl });
    await notifier.invalidateAttributes(1);
    await notifier.close();
    expect([connection.kept.length, failures]).toEqual([1, []]);
    connection.keepBack = () => false;
    connection.write(resendMessage());
    expect((await caller).code).toBe(0);
  });

  it('outlives the mount, and ends the server when a write fails as it may not', async () => {
    const threadUrl = notifierThread();
    connection.mount();
    connection.serve();
    const failures: Error[] = [];
    const notifier = new Notifier({ descriptor: connection.descriptor, onFatal: (error) => failures.push(error), threadUrl });
    unmount(connection.mountDir, { lazy: false });
    await notifier.invalidateAttributes(1);
    await notifier.close();
    expect(failures).toEqual([]);
    const broken = new Notifier({ descriptor: 1_000_000, onFatal: (error) => failures.push(error), threadUrl });
    await broken.invalidateAttributes(1);
    await until(() => failures.length > 0);
    expect(failures[0]?.message).toContain('EBADF');
    await broken.close();
  });
});

function longLived(): { writeBytesMax: number; readBytesMax: number; backgroundMax: number; congestionThreshold: number; exportSupport: boolean } {
  return { writeBytesMax: 1048576, readBytesMax: 1048576, backgroundMax: 64, congestionThreshold: 48, exportSupport: false };
}

/** The thread's code as plain JavaScript: it imports nothing of ours. */
function notifierThread(): URL {
  const source = readFileSync(new URL('../../daemon/transport/kernel/notifier-thread.ts', import.meta.url), 'utf8');
  const { outputText } = ts.transpileModule(source, { compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2023, verbatimModuleSyntax: true } });
  const path = join(connection.scratch, 'notifier-thread.mjs');
  writeFileSync(path, outputText);
  return pathToFileURL(path);
}
