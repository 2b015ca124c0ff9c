/**
 * A test's hands on a mount: each call is made by a child process (`file-agent.mjs`) and has a time-out.
 *
 * The test process itself never touches a path under a mount, so it cannot hang with the server. Failures are
 * `AgentError` with the name of the errno. Data is copied through the process channel: meant for correctness, not speed.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { constants } from 'node:os';
import { fileURLToPath } from 'node:url';

export interface FileStat {
  readonly sizeBytes: number;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly inode: number;
  readonly links: number;
  readonly allocatedBytes: number;
  readonly mtimeNs: bigint;
  readonly atimeNs: bigint;
  readonly ctimeNs: bigint;
}

/** What the child can do; the arguments are those of the system calls. */
export interface AgentOperations {
  open(path: string, flags: number, mode: number): number;
  close(fd: number): number;
  pread(fd: number, lengthBytes: number, offsetBytes: number): Buffer;
  pwrite(fd: number, data: Uint8Array, offsetBytes: number): number;
  pwriteWithFlags(fd: number, data: Uint8Array, offsetBytes: number, flags: number): number;
  fallocate(fd: number, mode: number, offsetBytes: number, lengthBytes: number): number;
  seek(fd: number, offsetBytes: number, whence: number): number;
  copyFileRange(from: number, fromBytes: number, to: number, toBytes: number, lengthBytes: number): number;
  lock(fd: number, type: 'read' | 'write' | 'unlock', start: number, length: number): number;
  ftruncate(fd: number, sizeBytes: number): number;
  truncate(path: string, sizeBytes: number): number;
  fsync(fd: number): number;
  fdatasync(fd: number): number;
  renameWithFlags(path: string, newPath: string, flags: number): number;
  setTimes(path: string, atimeNs: bigint | null, mtimeNs: bigint | null): number;
  mapShared(fd: number, lengthBytes: number): number;
  stat(path: string): FileStat;
  lstat(path: string): FileStat;
  fstat(fd: number): FileStat;
  statfs(path: string): { readonly blockBytes: number; readonly blocksTotal: number; readonly blocksFree: number; readonly blocksAvailable: number };
  mkdir(path: string, mode: number): void;
  rmdir(path: string): void;
  unlink(path: string): void;
  rename(path: string, newPath: string): void;
  symlink(target: string, path: string): void;
  readlink(path: string): string;
  link(path: string, newPath: string): void;
  readdir(path: string): readonly string[];
  readdirTypes(path: string): readonly (readonly [string, string])[];
  chmod(path: string, mode: number): void;
  chown(path: string, uid: number, gid: number): void;
  readFile(path: string): Buffer;
  writeFile(path: string, data: Uint8Array | string): void;
}

export class AgentError extends Error {
  /** `ENOSPC` and the like; `ETIMEDOUT` also when the agent did not answer in time. */
  readonly code: string;

  constructor(operation: string, code: string, detail: string) {
    super(`${operation}: ${code}${detail === '' ? '' : ` (${detail})`}`);
    this.name = 'AgentError';
    this.code = code;
  }
}

interface Answer {
  readonly id: number;
  readonly result?: unknown;
  readonly errno?: number;
  readonly message?: string;
}

interface Waiting {
  readonly operation: string;
  readonly timer: NodeJS.Timeout;
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: Error) => void;
}

export interface AgentOptions {
  /** Runs as this user and group, without further groups. */
  readonly uid?: number;
  readonly gid?: number;
  readonly timeoutMs?: number;
}

const SCRIPT = fileURLToPath(new URL('./file-agent.mjs', import.meta.url));
const TIMEOUT_MS = 20_000;
const READY_ID = 0;
/** Second names of numbers that have another one. */
const ALIASES: readonly string[] = ['EWOULDBLOCK', 'ENOTSUP', 'EDEADLOCK'];
const ERRNO_NAMES = new Map(Object.entries(constants.errno).filter(([name]) => !ALIASES.includes(name)).map(([name, number]) => [number, name]));

export class FileAgent {
  readonly #child: ChildProcess;
  readonly #timeoutMs: number;
  readonly #waiting = new Map<number, Waiting>();
  readonly #exited: Promise<void>;
  #lastId = READY_ID;
  #gone: string | null = null;

  private constructor(options: AgentOptions) {
    this.#timeoutMs = options.timeoutMs ?? TIMEOUT_MS;
    const [program, args] = options.uid === undefined
      ? [process.execPath, [SCRIPT]]
      : ['setpriv', [`--reuid=${options.uid}`, `--regid=${options.gid ?? options.uid}`, '--clear-groups', process.execPath, SCRIPT]];
    this.#child = spawn(program, args, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'], serialization: 'advanced' });
    this.#child.on('message', (answer) => { this.#settle(answer as Answer); });
    this.#child.on('error', (error) => { this.#end(error.message); });
    this.#exited = new Promise((resolve) => {
      this.#child.on('exit', (code, signal) => {
        this.#end(`the agent ended (${signal ?? String(code)})`);
        resolve();
      });
    });
  }

  static async start(options: AgentOptions = {}): Promise<FileAgent> {
    const agent = new FileAgent(options);
    await agent.#wait(READY_ID, 'start', agent.#timeoutMs);
    return agent;
  }

  call<Name extends keyof AgentOperations>(operation: Name, ...args: Parameters<AgentOperations[Name]>): Promise<ReturnType<AgentOperations[Name]>> {
    if (this.#gone !== null) return Promise.reject(new AgentError(operation, 'ESRCH', this.#gone));
    this.#lastId += 1;
    const answer = this.#wait(this.#lastId, operation, this.#timeoutMs);
    this.#child.send({ id: this.#lastId, operation, args });
    return answer as Promise<ReturnType<AgentOperations[Name]>>;
  }

  /** The errno's name if the call fails, `ok` if it does not. */
  async outcome<Name extends keyof AgentOperations>(operation: Name, ...args: Parameters<AgentOperations[Name]>): Promise<string> {
    try {
      await this.call(operation, ...args);
      return 'ok';
    } catch (thrown) {
      if (thrown instanceof AgentError) return thrown.code;
      throw thrown;
    }
  }

  /** Ends the child, and with it whatever it has open. It never waits longer than a moment. */
  async stop(): Promise<void> {
    this.#child.kill('SIGKILL');
    const moment = new Promise<void>((resolve) => { setTimeout(resolve, 2_000).unref(); });
    await Promise.race([this.#exited, moment]);
    this.#child.unref();
  }

  #wait(id: number, operation: string, timeoutMs: number): Promise<unknown> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#waiting.delete(id);
        this.#child.kill('SIGKILL');
        reject(new AgentError(operation, 'ETIMEDOUT', `no answer within ${timeoutMs} ms`));
      }, timeoutMs);
      this.#waiting.set(id, { operation, timer, resolve, reject });
    });
  }

  #settle(answer: Answer): void {
    const waiting = this.#waiting.get(answer.id);
    if (waiting === undefined) return;
    this.#waiting.delete(answer.id);
    clearTimeout(waiting.timer);
    if (answer.errno === undefined) waiting.resolve(answer.result instanceof Uint8Array ? asBuffer(answer.result) : answer.result);
    else waiting.reject(new AgentError(waiting.operation, ERRNO_NAMES.get(answer.errno) ?? `errno ${answer.errno}`, answer.message ?? ''));
  }

  #end(why: string): void {
    this.#gone ??= why;
    for (const [id, waiting] of this.#waiting) {
      clearTimeout(waiting.timer);
      this.#waiting.delete(id);
      waiting.reject(new AgentError(waiting.operation, 'ESRCH', why));
    }
  }
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
