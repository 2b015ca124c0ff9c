/**
 * Runs outside programs for tests that touch a mount, so that none of them can hold the test for ever.
 *
 * A process that waits for a dead or hung FUSE server may not even die of SIGKILL; so after its time-out it is killed,
 * given a moment, and then left behind: the caller gets its answer in any case, and the mount's clean-up (see `mounts.ts`)
 * aborts the connection, which sets the process free.
 */
import { spawn } from 'node:child_process';

export interface CommandOptions {
  readonly timeoutMs?: number;
  readonly input?: Uint8Array | string;
  readonly cwd?: string;
  readonly env?: Readonly<Record<string, string>>;
}

export interface CommandResult {
  /** Exit code; 128 + number for a signal, as a shell says it; 124 after a time-out, as timeout(1) says it. */
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
  readonly timedOut: boolean;
}

const TIMEOUT_MS = 30_000;
const PATIENCE_AFTER_KILL_MS = 2_000;
const OUTPUT_BYTES_MAX = 16 * 1024 * 1024;
const TIMEOUT_CODE = 124;
const SIGNAL_CODE = 128;

export function command(program: string, args: readonly string[], options: CommandOptions = {}): Promise<CommandResult> {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      stdio: [options.input === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'],
      detached: true,
      ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
      env: { ...process.env, LC_ALL: 'C', ...options.env },
    });
    const out: Buffer[] = [];
    const err: Buffer[] = [];
    let bytes = 0;
    let timedOut = false;
    const keep = (list: Buffer[]) => (chunk: Buffer): void => {
      bytes += chunk.length;
      if (bytes <= OUTPUT_BYTES_MAX) list.push(chunk);
    };
    child.stdout?.on('data', keep(out));
    child.stderr?.on('data', keep(err));
    let giveUp: NodeJS.Timeout | undefined;
    const timer = setTimeout(() => {
      timedOut = true;
      kill(child.pid);
      giveUp = setTimeout(() => { finish(TIMEOUT_CODE); }, PATIENCE_AFTER_KILL_MS);
    }, options.timeoutMs ?? TIMEOUT_MS);
    function finish(code: number): void {
      clearTimeout(timer);
      clearTimeout(giveUp);
      child.stdout?.destroy();
      child.stderr?.destroy();
      child.unref();
      resolve({ code, timedOut, stdout: Buffer.concat(out).toString(), stderr: Buffer.concat(err).toString() });
    }
    child.on('error', (error) => {
      clearTimeout(timer);
      reject(new Error(`${program} could not be started: ${error.message}`, { cause: error }));
    });
    child.on('close', (code, signal) => { finish(timedOut ? TIMEOUT_CODE : code ?? SIGNAL_CODE + (signal === null ? 0 : 9)); });
    if (options.input !== undefined) {
      child.stdin?.on('error', () => { /* The program ended without reading all of it: its exit code says why. */ });
      child.stdin?.end(options.input);
    }
  });
}

/** Runs a program that must succeed; the error holds all it said. */
export async function mustRun(program: string, args: readonly string[], options: CommandOptions = {}): Promise<CommandResult> {
  const result = await command(program, args, options);
  if (result.code !== 0) {
    throw new Error(`${program} ${args.join(' ')}: ${result.timedOut ? 'timed out' : `exit code ${result.code}`}\n${result.stdout}${result.stderr}`);
  }
  return result;
}

/** The whole process group, as the program may have started others. */
function kill(pid: number | undefined): void {
  if (pid === undefined) return;
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // It has just ended.
  }
}
