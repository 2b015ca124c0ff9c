/**
 * The fixtures themselves: what shows exports outlives its daemon by design, so a test that fails in the middle leaves servers, loop devices and what is mounted of them. The clean-up of the
 * test daemon ends all of it, and this is a test that goes no further than its middle. On the way: what these servers hold open.
 */
import { chmodSync, existsSync, readFileSync, readdirSync, readlinkSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import type { ExportInfo } from '../../daemon/control/export-schemas.js';
import { startTestDaemon } from '../support/daemon.js';
import { freePort } from '../support/exports-fixture.js';
import { mustRun } from '../support/model/command.js';
import { isAlive, processesNaming } from '../support/processes.js';
import { createCleanup, makeShortTmpfsDir, makeTempDir } from '../support/temp.js';
import { lacks } from '../support/tools.js';

const TEST_MS = 240_000;
const SIZE = 64 * 1024 * 1024;

/** Process by process, whatever name each has given itself since. */
async function sessionsOf(pids: readonly number[]): Promise<number[]> {
  const table = (await mustRun('ps', ['-e', '-o', 'pid=,sid='])).stdout.split('\n').map((line) => line.trim().split(/\s+/u).map(Number));
  const sessions = new Set(table.filter(([pid]) => pids.includes(pid!)).map(([, session]) => session));
  return table.filter(([pid, session]) => pid !== process.pid && sessions.has(session)).map(([pid]) => pid!);
}

describe.skipIf(lacks('/dev/fuse', 'ganesha.nfsd', 'smbd', 'tgtd', 'nbdkit', 'losetup', 'mkfs.ext4'))('a test that fails with exports', () => {
  const outer = createCleanup();
  afterEach(async () => { await outer.run(); });

  it('whose servers hold neither the connection to the kernel nor a file of the store leaves no server, no loop device and no mount', async () => {
    const cleanup = createCleanup();
    const scratch = makeTempDir('leftovers', outer);
    const mounted = makeTempDir('mounted', outer);
    // The last that was added is done first: what is mounted there goes before the directories do.
    outer.add(async () => { await cleanup.run(); });
    const runtimeBase = makeShortTmpfsDir(cleanup);
    const daemon = await startTestDaemon({ transport: 'kernel', cleanup, environment: { OFFSHOOT_RUNTIME_DIR: runtimeBase }, startArguments: () => ['--nfs'] });
    const image = join(scratch, 'image.raw');
    writeFileSync(image, Buffer.alloc(SIZE, 1));
    await daemon.json(['container', 'create', 'vms']);
    for (const name of ['net.img', 'block.img']) await daemon.json(['import', image, `vms/${name}`]);
    const passwords = join(scratch, 'passwords');
    writeFileSync(passwords, 'nobody:a password of a test\n');
    chmodSync(passwords, 0o600);
    const present = async (...args: readonly string[]): Promise<ExportInfo> => await daemon.json<ExportInfo>(['present', ...args]);
    const loopback = async (): Promise<readonly string[]> => ['--listen', `127.0.0.1:${await freePort()}`];
    await present('vms', '--as', 'nfs', '--to', '127.0.0.1', '--option', `port=${await freePort()}`);
    await present('vms', '--as', 'smb', '--to', 'nobody', '--option', `password-file=${passwords}`, ...await loopback());
    await present('vms/net.img', '--as', 'iscsi', '--to', 'iqn.2004-10.com.example:host', ...await loopback());
    const nbd = await present('vms/net.img', '--as', 'nbd', '--to', '127.0.0.1');
    const device = (await present('vms/block.img', '--as', 'block')).addresses[0]!;
    // The door has started an nbdkit for it.
    const client = net.connect({ host: '127.0.0.1', port: Number(new URL(nbd.addresses[0]!).port) });
    client.on('error', () => undefined);
    outer.add(() => { client.destroy(); });
    await new Promise((resolve) => { client.once('data', resolve); });
    await mustRun('mkfs.ext4', ['-q', device]);
    await mustRun('mount', [device, mounted]);

    const servers = await sessionsOf(processesNaming(`${runtimeBase}/`).filter(isAlive));
    const named = servers.map((pid) => readFileSync(`/proc/${pid}/comm`, 'utf8').trim());
    for (const name of [/^ganesha/u, /^smbd/u, /^tgtd/u, /^nbdkit/u]) expect(named.some((each) => name.test(each)), `${String(name)} in ${named.join(', ')}`).toBe(true);
    // Whoever holds the connection to the kernel keeps a dead mount alive; whoever holds a file of the store's own writes past us.
    const commandOf = (pid: number): string => readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
    const held = servers.filter((pid) => isAlive(pid) && !/^offshoot-holder |\/daemon\/server\/main\.js/u.test(commandOf(pid)))
      .flatMap((pid) => readdirSync(`/proc/${pid}/fd`).map((fd) => ({ file: readlinkSync(`/proc/${pid}/fd/${fd}`), by: commandOf(pid) })));
    expect(held.some(({ file }) => file.startsWith(`${daemon.mountDir}/`))).toBe(true);
    expect(held.filter(({ file }) => file === '/dev/fuse' || file.startsWith(`${daemon.storeDir}/`))).toEqual([]);

    // As after a failed assertion: nothing was withdrawn, nobody was stopped.
    await cleanup.run();
    expect(servers.filter(isAlive).map(commandOf)).toEqual([]);
    expect(readdirSync('/sys/block').filter((name) => existsSync(`/sys/block/${name}/loop/backing_file`) && readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').startsWith(daemon.mountDir))).toEqual([]);
    const mounts = readFileSync('/proc/self/mountinfo', 'utf8');
    expect([mounted, daemon.mountDir].filter((point) => mounts.includes(point))).toEqual([]);
    expect(existsSync(runtimeBase)).toBe(false);
  }, TEST_MS);
});
