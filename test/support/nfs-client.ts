/** Speaks with an NFS client that is not ours: libnfs, in a process of its own (`nfs-client-program.mjs`), which is killed when it does not answer. */
import { spawn } from 'node:child_process';
import { resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';

import type { Cleanup } from './temp.js';

export interface NfsMount {
  readonly server?: string;
  readonly path: string;
  readonly version?: 3 | 4;
  readonly port?: number;
  readonly mountPort?: number;
}

export interface NfsRange {
  readonly handle: number;
  readonly offset: number;
  readonly length: number;
  readonly seed: string;
}

const PROGRAM = resolve(import.meta.dirname, 'nfs-client-program.mjs');
const ANSWER_MS = 60_000;
const GRACE_TRIES = 120;
const GRACE_PAUSE_MS = 250;

export class NfsClient {
  readonly #child;
  readonly #waiting: ((answer: { ok: boolean; value?: unknown; error?: string }) => void)[] = [];
  readonly #ended: Promise<void>;

  /** `prefix`: a program that starts it, such as `nsenter`. */
  constructor(cleanup: Cleanup, prefix: readonly string[] = []) {
    const command = [...prefix, process.execPath, PROGRAM];
    this.#child = spawn(command[0] ?? process.execPath, command.slice(1), { stdio: ['pipe', 'pipe', 'inherit'] });
    this.#ended = new Promise((done) => { this.#child.once('close', () => { done(); }); });
    createInterface(this.#child.stdout).on('line', (line) => { this.#waiting.shift()?.(JSON.parse(line) as { ok: boolean }); });
    cleanup.add(async () => {
      this.#child.kill('SIGKILL');
      await this.#ended;
    });
  }

  async end(): Promise<void> {
    this.#child.stdin.end();
    await this.#ended;
  }

  async mount({ server = '127.0.0.1', version = 4, ...rest }: NfsMount): Promise<void> { await this.#ask({ op: 'mount', server, version, ...rest }); }
  /** A server that has just begun tells clients to come again until those of before have had their chance (NFS4ERR_GRACE). */
  async open(name: string, flags: number): Promise<number> {
    for (let tries = 0; ; tries += 1) {
      try {
        return await this.#ask({ op: 'open', name, flags }) as number;
      } catch (error) {
        if (!(error as Error).message.includes('NFS4ERR_GRACE') || tries >= GRACE_TRIES) throw error;
        await sleep(GRACE_PAUSE_MS);
      }
    }
  }

  async close(handle: number): Promise<void> { await this.#ask({ op: 'close', handle }); }
  async write(range: NfsRange): Promise<void> { await this.#ask({ op: 'write', ...range }); }
  /** Throws when what is there is not what `write` with this seed wrote. */
  async check(range: NfsRange): Promise<void> { await this.#ask({ op: 'check', ...range }); }
  async fsync(handle: number): Promise<void> { await this.#ask({ op: 'fsync', handle }); }
  async unlink(name: string): Promise<void> { await this.#ask({ op: 'unlink', name }); }

  async #ask(request: object): Promise<unknown> {
    const answer = await new Promise<{ ok: boolean; value?: unknown; error?: string }>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#child.kill('SIGKILL');
        reject(new Error(`the NFS client did not answer ${JSON.stringify(request)} within ${ANSWER_MS} ms`));
      }, ANSWER_MS);
      this.#ended.then(() => { reject(new Error('the NFS client has ended')); }, reject);
      this.#waiting.push((given) => {
        clearTimeout(timer);
        resolve(given);
      });
      this.#child.stdin.write(`${JSON.stringify(request)}\n`);
    });
    if (!answer.ok) throw new Error(answer.error);
    return answer.value;
  }
}
