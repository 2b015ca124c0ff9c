/** Server programs of exports: found again, ended, never mistaken. With real processes: bash and sleep. */
import fs from 'node:fs';
import path from 'node:path';

import { afterEach, describe, expect, it } from 'vitest';

import { ExportProcess, exportProcessesIn, killExportProcess } from '../../daemon/presenter/export-process.js';
import { createCleanup, makeTempDir } from '../support/temp.js';

const cleanup = createCleanup();
const signal = new AbortController().signal;

afterEach(() => cleanup.run());

function exportProcess(name = 'server'): ExportProcess {
  const made = new ExportProcess({ directory: path.join(makeTempDir('export-process', cleanup), 'exports', 'nbd'), name });
  cleanup.add(() => { killExportProcess(made); });
  return made;
}

/** Runs a script that is told the name of its configuration file. */
async function start(server: ExportProcess, script: string, isUp: () => boolean = () => fs.existsSync(`${server.configFile}.up`)): Promise<void> {
  server.writeConfig('x');
  await server.start({ program: 'bash', arguments: ['-c', script, 'bash', server.configFile] }, { signal, timeoutMs: 60_000, isUp: async () => await Promise.resolve(isUp()) });
}

function pidOf(server: ExportProcess): number {
  const state = server.state();
  if (state.kind !== 'running') throw new Error(`it is ${state.kind}`);
  return state.pid;
}

const SLEEPS = 'echo started; touch $1.up; while :; do sleep 0.1; done';

describe('a server program of an export', () => {
  it('is found again by whoever comes later, in a session of its own, with what it says in its log', async () => {
    const server = exportProcess();
    await start(server, SLEEPS);
    const pid = pidOf(server);
    const [again] = exportProcessesIn(server.directory);
    expect(again?.state()).toEqual({ kind: 'running', pid });
    expect(fs.readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ').slice(2, 4)).toEqual([String(pid), String(pid)]);
    expect(server.lastWords()).toBe('started');
    expect(fs.statSync(server.configFile).mode & 0o777).toBe(0o600);
    expect(fs.statSync(server.directory).mode & 0o777).toBe(0o700);
    await start(server, 'exit 1');
    expect(pidOf(server)).toBe(pid);
    await server.end();
    expect(server.state()).toEqual({ kind: 'off' });
    await server.end();
    server.forget();
    expect(fs.readdirSync(server.directory).filter((file) => !file.endsWith('.up'))).toEqual([]);
  });

  it('is told from one that was killed, and from a stranger with its number', async () => {
    const server = exportProcess();
    await start(server, SLEEPS);
    const pid = pidOf(server);
    process.kill(pid, 'SIGKILL');
    await expect.poll(() => server.state(), { timeout: 60_000 }).toEqual({ kind: 'ended' });
    fs.writeFileSync(server.pidFile, String(process.pid));
    expect(server.state()).toEqual({ kind: 'ended' });
    await server.end();
    expect(server.state()).toEqual({ kind: 'off' });
    fs.writeFileSync(server.pidFile, 'not a number');
    expect(server.state()).toEqual({ kind: 'ended' });
  });

  it('is not mistaken for another of the same directory', async () => {
    const server = exportProcess();
    await start(server, SLEEPS);
    const other = new ExportProcess({ directory: server.directory, name: 'serve' });
    fs.writeFileSync(other.pidFile, fs.readFileSync(server.pidFile));
    expect(other.state()).toEqual({ kind: 'ended' });
  });

  it('is killed with all that it started when it does not listen to SIGTERM', async () => {
    const server = exportProcess();
    await start(server, `trap '' TERM; sleep 1000 & echo $! > $1.child; ${SLEEPS}`);
    const child = Number(fs.readFileSync(`${server.configFile}.child`, 'utf8'));
    await server.end({ termMs: 300 });
    expect(server.state()).toEqual({ kind: 'off' });
    await expect.poll(() => fs.existsSync(`/proc/${child}`) && !fs.readFileSync(`/proc/${child}/stat`, 'utf8').includes(') Z '), { timeout: 60_000 }).toBe(false);
  });

  it('says what it said when it ends at once, and leaves nothing', async () => {
    const server = exportProcess();
    await expect(start(server, 'echo the port is taken >&2; exit 3')).rejects.toMatchObject({ kind: 'io-error', message: expect.stringContaining('the port is taken') as string });
    expect(server.state()).toEqual({ kind: 'off' });
    await expect(server.start({ program: 'sleep', arguments: ['1000'] }, { signal, timeoutMs: 1000, isUp: async () => await Promise.resolve(true) })).rejects.toThrow('could not be found again');
  });

  it('writes its configuration only when it is another, and keeps its log bounded', () => {
    const server = exportProcess();
    expect(server.readConfig()).toBeNull();
    expect(server.writeConfig('a')).toBe(true);
    expect(server.writeConfig('a')).toBe(false);
    expect(server.writeConfig('b')).toBe(true);
    expect(server.readConfig()).toBe('b');
    fs.writeFileSync(server.logFile, Buffer.alloc(2 * 1024 * 1024, 'x'));
    server.boundLog();
    expect(fs.statSync(server.logFile).size).toBe(0);
    expect(fs.statSync(`${server.logFile}.1`).size).toBe(2 * 1024 * 1024);
  });
});
