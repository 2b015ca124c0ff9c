/**
 * A source that misbehaves on demand: a file on a FUSE mount of nbdfuse, which reads it from an nbdkit of its own.
 *
 * nbdkit stopped is a source that hangs: the kernel has handed the read on, and whoever made it cannot even be killed. Its error filter
 * makes reads fail as long as a file exists, its delay filter makes them slow. Nothing here looks at the file on the mount.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { mountEntry, removeMount } from './model/mounts.js';
import { signalProcess, stopProcess, waitUntil, waitUntilGone } from './processes.js';
import { makeTempDir, type Cleanup } from './temp.js';

export const FAULTY_SOURCE_NEEDS = ['nbdkit', 'nbdfuse', '/dev/fuse'] as const;

const START_MS_MAX = 20_000;
const END_MS_MAX = 10_000;

export class FaultySource {
  /** The path to import: on a FUSE mount. */
  readonly file: string;
  readonly mountDir: string;
  private readonly errorFlag: string;
  private readonly server: ChildProcess;
  private readonly fuse: ChildProcess;

  private constructor(options: { readonly directory: string; readonly mountDir: string; readonly server: ChildProcess; readonly fuse: ChildProcess }) {
    this.mountDir = options.mountDir;
    this.file = join(options.mountDir, 'source.raw');
    this.errorFlag = join(options.directory, 'errors');
    this.server = options.server;
    this.fuse = options.fuse;
  }

  /** Serves `image`, each read `delayMs` late. */
  static async start(image: string, cleanup: Cleanup, options: { readonly delayMs?: number } = {}): Promise<FaultySource> {
    const directory = makeTempDir('faulty', cleanup);
    const mountDir = join(directory, 'mount');
    const socket = join(directory, 'nbd');
    mkdirSync(mountDir);
    const server = spawn('nbdkit', [
      '--foreground', '--readonly', '--unix', socket, '--filter=error', '--filter=delay', 'file', image,
      'error-pread=EIO', 'error-pread-rate=100%', `error-file=${join(directory, 'errors')}`, `delay-read=${options.delayMs ?? 0}ms`,
    ], { stdio: ['ignore', 'ignore', 'inherit'] });
    cleanup.add(async () => { await end(server); });
    if (!(await waitUntil(() => existsSync(socket), START_MS_MAX))) throw new Error('nbdkit has made no socket');
    const fuse = spawn('nbdfuse', ['--readonly', join(mountDir, 'source.raw'), '--unix', socket], { stdio: ['ignore', 'ignore', 'inherit'] });
    cleanup.add(async () => {
      signalProcess(server.pid ?? 0, 'SIGCONT');
      await removeMount(mountDir);
      await end(fuse);
    });
    if (!(await waitUntil(() => mountEntry(mountDir) !== null, START_MS_MAX))) throw new Error('nbdfuse has mounted nothing');
    return new FaultySource({ directory, mountDir, server, fuse });
  }

  /** From here on no read is answered. */
  async hang(): Promise<void> {
    await stopProcess(pidOf(this.server));
  }

  /** What waited is answered. */
  goOn(): void {
    signalProcess(pidOf(this.server), 'SIGCONT');
  }

  /** Every read is EIO, or none. */
  fail(fails: boolean): void {
    if (fails) writeFileSync(this.errorFlag, '');
    else rmSync(this.errorFlag, { force: true });
  }

  /** The process that serves the file system dies: ENOTCONN for all. */
  async die(): Promise<void> {
    signalProcess(pidOf(this.fuse), 'SIGKILL');
    await waitUntilGone(pidOf(this.fuse), END_MS_MAX);
  }
}

function pidOf(child: ChildProcess): number {
  if (child.pid === undefined) throw new Error('a process was not started');
  return child.pid;
}

async function end(child: ChildProcess): Promise<void> {
  if (child.pid === undefined) return;
  signalProcess(child.pid, 'SIGCONT');
  signalProcess(child.pid, 'SIGKILL');
  if (!(await waitUntilGone(child.pid, END_MS_MAX))) throw new Error(`process ${child.pid} could not be ended`);
}
