/** The holder at work on a real mount: servers that are killed, crash loops, the unmount and who is in its way, dead mounts. */
import { spawn, type ChildProcess } from 'node:child_process';
import { readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';

import { command, mustRun } from '../support/model/command.js';
import { mountEntry } from '../support/model/mounts.js';
import { endChild, isAlive, refusal, signal, useHolderTestBed } from '../support/holder-test-bed.js';

const GETATTR = 3;
const INIT = 26;
/** O_PATH: opens the root of the mount and asks no server. */
const OPEN_PATH_FLAG = 0o10000000;

const bed = useHolderTestBed('holder');

function mountsOf(mountDir: string): number {
  return readFileSync('/proc/self/mountinfo', 'utf8').split('\n').filter((line) => line.split(' ')[4] === mountDir).length;
}

describe('a server that is killed', () => {
  it('is replaced, and who waited gets an answer from the next', async () => {
    const { mountDir } = bed();
    bed().conduct({ dieOfOpcode: GETATTR });
    const { holderPid, serverPid } = await bed().start();
    const answer = mustRun('stat', ['-c', '%F', mountDir]);
    await bed().until('the request that kills', () => bed().events().some(({ opcode }) => opcode === GETATTR));
    bed().conduct({});
    await expect(answer).resolves.toMatchObject({ stdout: 'directory\n' });

    const state = await bed().untilState('the next server', ({ state: phase, restarts }) => phase === 'running' && restarts > 0);
    expect(state).toMatchObject({ holderPid, lastExit: { code: null, signal: 'SIGKILL' } });
    expect(state.serverPid).not.toBe(serverPid);
    expect(state.lastStallMs).toBeGreaterThan(0);
    expect(state.lastStallMs).toBeLessThan(5_000);
    const requests = bed().events().filter(({ what }) => what === 'request');
    expect(requests.filter(({ opcode }) => opcode === INIT)).toHaveLength(1);
    expect(requests.find(({ pid, opcode }) => pid === state.serverPid && opcode === GETATTR)?.isResent).toBe(true);
    const starts = bed().events().filter(({ what }) => what === 'start');
    expect(starts.map(({ options }) => options?.restarts)).toEqual(Array.from({ length: state.restarts + 1 }, (_, index) => index));
  });

  it('is replaced each time, with the mount there all the while', async () => {
    const { holderPid } = await bed().start();
    const busy = await bed().keepBusy();
    for (let round = 0; round < 3; round += 1) {
      const { serverPid } = await bed().untilState('a server', ({ state, restarts }) => state === 'running' && restarts === round);
      signal(serverPid, 'SIGKILL');
      await expect(mustRun('stat', ['-c', '%F', bed().mountDir])).resolves.toMatchObject({ stdout: 'directory\n' });
    }
    expect(isAlive(holderPid)).toBe(true);
    expect(busy.exitCode).toBeNull();
  });

  it('again and again leaves the holder down with the mount kept, until an operator wants another try', async () => {
    const { mountDir } = bed();
    const { holderPid, serverPid } = await bed().start();
    bed().conduct({ exitAtOnce: 4 });
    signal(serverPid, 'SIGKILL');
    const down = await bed().untilState('the crash loop', ({ state }) => state === 'down');
    expect(down).toMatchObject({ restarts: 4, lastExit: { code: 4, signal: null } });
    expect(bed().log()).toContain(`kill -USR1 ${holderPid}`);
    expect(mountEntry(mountDir)).not.toBeNull();

    const waiting = mustRun('stat', ['-c', '%F', mountDir]);
    bed().conduct({});
    signal(holderPid, 'SIGUSR1');
    await expect(waiting).resolves.toMatchObject({ stdout: 'directory\n' });
    // SIGUSR1 is also what makes Node.js open its debugger, unless somebody listens to it.
    expect(bed().log()).not.toContain('Debugger');
    await bed().untilState('the next server', ({ state, restarts }) => state === 'running' && restarts === 5);
  });

  it('for good can be unmounted once nobody uses the mount, and the journal stays for the next daemon', async () => {
    const { mountDir, runtimeDir } = bed();
    const { holderPid, serverPid } = await bed().start();
    writeFileSync(join(runtimeDir, 'journal-0'), 'acknowledged');
    bed().conduct({ exitAtOnce: 4 });
    signal(serverPid, 'SIGKILL');
    await bed().untilState('the crash loop', ({ state }) => state === 'down');
    const busy = await keepOpen();
    signal(holderPid, 'SIGTERM');
    await bed().until('the refusal', () => bed().log().includes('not unmounted'));
    expect(isAlive(holderPid)).toBe(true);

    await endChild(busy);
    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid);
    expect(mountEntry(mountDir)).toBeNull();
    expect(readdirSync(runtimeDir)).toEqual(['journal-0']);
  });

  /** Keeps the mount busy without a server to answer. */
  async function keepOpen(): Promise<ChildProcess> {
    const script = `require('fs').openSync(process.argv[1], ${OPEN_PATH_FLAG}); process.stdout.write('in'); setInterval(() => {}, 1e6);`;
    const child = bed().keep(spawn(process.execPath, ['-e', script, bed().mountDir], { stdio: ['ignore', 'pipe', 'inherit'] }));
    await new Promise((settle) => child.stdout?.once('data', settle));
    return child;
  }

  it('between the unmount and the end is followed by one that closes the store', async () => {
    const { holderPid, serverPid } = await bed().start();
    bed().conduct({ dieAfterUnmount: true });
    signal(serverPid, 'SIGKILL');
    await bed().untilState('the next server', ({ state, restarts }) => state === 'running' && restarts === 1);
    bed().conduct({});
    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
    expect(bed().events().filter(({ what }) => what === 'start')).toHaveLength(3);
  });
});

describe('the unmount', () => {
  it('is refused while the mount is in use, naming who uses it, and all goes on', async () => {
    const { holderPid, serverPid } = await bed().start();
    const busy = await bed().keepBusy();
    signal(holderPid, 'SIGTERM');
    const { message } = await bed().until('the refusal', () => bed().events().find(({ what }) => what === 'refused'));
    expect(message).toContain(`sleep (pid ${String(busy.pid)})`);
    await expect(mustRun('ls', [bed().mountDir])).resolves.toMatchObject({ code: 0 });
    expect([holderPid, serverPid].every(isAlive)).toBe(true);

    await endChild(busy);
    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
  });

  it('by force takes the mount away from who uses it', async () => {
    bed().conduct({ force: true });
    const { holderPid } = await bed().start();
    const busy = await bed().keepBusy();
    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
    const left = await command('stat', [`/proc/${String(busy.pid)}/cwd/`]);
    expect(left).toMatchObject({ code: 1, stderr: expect.stringContaining('not connected') as string });
  });

  it('is refused while something else is mounted over it, and that is left alone', async () => {
    const { mountDir } = bed();
    const { holderPid } = await bed().start();
    await mustRun('mount', ['-t', 'tmpfs', 'none', mountDir]);
    signal(holderPid, 'SIGTERM');
    const { message } = await bed().until('the refusal', () => bed().events().find(({ what }) => what === 'refused'));
    expect(message).toContain('tmpfs');
    expect(mountEntry(mountDir)).toMatchObject({ kind: 'tmpfs' });
    await mustRun('umount', [mountDir]);
    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid);
  });

  it("by somebody's hand is the end too", async () => {
    const { holderPid } = await bed().start();
    await mustRun('umount', [bed().mountDir]);
    await bed().untilGone(holderPid);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
  });
});

describe('a dead mount', () => {
  async function startAndKillBoth(): Promise<void> {
    const { holderPid, serverPid } = await bed().start();
    signal(holderPid, 'SIGKILL');
    signal(serverPid, 'SIGKILL');
    await bed().untilGone(holderPid, serverPid);
  }

  it('of a daemon that was killed is cleared, and that is said', async () => {
    const { mountDir } = bed();
    await startAndKillBoth();
    await expect(command('ls', [mountDir])).resolves.toMatchObject({ stderr: expect.stringContaining('not connected') as string });
    const { notes } = await bed().start();
    expect(notes).toEqual([expect.stringContaining('cleared the dead mount')]);
    await expect(mustRun('ls', [mountDir])).resolves.toMatchObject({ code: 0 });
    expect(mountsOf(mountDir)).toBe(1);
  });

  it('that somebody still uses is refused, naming who', async () => {
    const { holderPid, serverPid } = await bed().start();
    const busy = await bed().keepBusy();
    signal(holderPid, 'SIGKILL');
    signal(serverPid, 'SIGKILL');
    await bed().untilGone(holderPid, serverPid);
    await expect(bed().start()).rejects.toEqual(refusal('mount-unusable', 'dead mount', `sleep \\(pid ${String(busy.pid)}\\)`));
    expect(mountEntry(bed().mountDir)).not.toBeNull();
  });

  it('is not there while a server lives on without its holder, and the store stays locked', async () => {
    const { holderPid, serverPid } = await bed().start();
    signal(holderPid, 'SIGKILL');
    await bed().until('the loss', () => bed().events().some(({ what }) => what === 'lost'));
    await expect(mustRun('ls', [bed().mountDir])).resolves.toMatchObject({ code: 0 });
    await expect(bed().start()).rejects.toEqual(refusal('store-locked', `pid ${holderPid}`, 'its holder has died'));
    signal(serverPid, 'SIGKILL');
    await bed().untilGone(serverPid);
    await bed().start();
  });
});

describe('a server that mounts for itself', () => {
  it('gets no connection, is replaced on a new mount, and unmounts itself', async () => {
    const { mountDir } = bed();
    const { holderPid, serverPid } = await bed().start({ transport: 'fuse-native' });
    const inherited = bed().events()[0]?.inherited;
    expect(inherited?.['fuseRdev']).not.toBe(statSync('/dev/fuse').rdev);
    expect(inherited?.['lockText']).toBe(`${holderPid}\n`);
    await expect(mustRun('ls', [mountDir])).resolves.toMatchObject({ code: 0 });
    await bed().keepBusy();
    signal(serverPid, 'SIGKILL');
    await bed().untilState('the next server', ({ state, restarts }) => state === 'running' && restarts === 1);
    await expect(mustRun('ls', [mountDir])).resolves.toMatchObject({ code: 0 });
    expect(mountsOf(mountDir)).toBe(1);
    signal(holderPid, 'SIGTERM');
    await bed().untilGone(holderPid);
    expect(bed().traces()).toMatchObject({ mount: null, runtime: [] });
  });
});
