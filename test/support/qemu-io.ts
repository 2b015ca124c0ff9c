/** qemu-io(1) that goes on: a client of QEMU's block drivers which stays connected, is asked one thing after the other, and can be killed with what it has not flushed. */
import { spawn } from 'node:child_process';

import { signalProcess, waitUntil, waitUntilGone } from './processes.js';
import type { Cleanup } from './temp.js';

const ANSWER_MS = 120_000;
const END_MS = 10_000;

export interface QemuIo {
  readonly pid: number;
  /** `write -P 1 0 4k`; gives what was said, or throws when it was an error or nothing. */
  ask(text: string): Promise<string>;
  /** What was asked is answered, without waiting for it here. */
  say(text: string): void;
  /** All that it said. */
  said(): string;
  /** As when its host loses its power: nothing is flushed. */
  kill(): Promise<void>;
}

/** `options` as `--image-opts`. */
export function startQemuIo(options: string, cleanup: Cleanup, more: readonly string[] = []): QemuIo {
  const child = spawn('qemu-io', ['-t', 'none', ...more, '--image-opts', options], { stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, LC_ALL: 'C' } });
  const pid = child.pid ?? 0;
  let said = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk: Buffer) => { said += chunk.toString(); });
  child.stdin.on('error', () => { /* It has ended: whoever asks is told. */ });
  child.on('error', (error) => { said += error.message; });
  const kill = async (): Promise<void> => {
    if (pid > 0) signalProcess(pid, 'SIGKILL');
    if (!(await waitUntilGone(pid, END_MS))) throw new Error(`qemu-io ${pid} did not die of SIGKILL`);
  };
  cleanup.add(kill);
  // Its prompt comes when it is done with what was asked before.
  const prompts = (): number => said.split('qemu-io> ').length - 1;
  return {
    pid, kill,
    said: () => said,
    say: (text) => { child.stdin.write(`${text}\n`); },
    async ask(text) {
      const isReady = (): boolean => prompts() > 0 || child.exitCode !== null;
      await waitUntil(isReady, ANSWER_MS);
      const [before, from] = [prompts(), said.length];
      child.stdin.write(`${text}\n`);
      await waitUntil(() => prompts() > before || child.exitCode !== null, ANSWER_MS);
      const answer = said.slice(from);
      if (prompts() <= before || /fail|error|cannot|No such/iu.test(answer)) throw new Error(`qemu-io: ${text}: ${said}`);
      return answer;
    },
  };
}
