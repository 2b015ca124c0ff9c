/**
 * What a file is, asked by a process of its own: for files that may not answer. Main thread, asynchronous.
 *
 * The process that asks is given up after a while and killed; should it hang in the kernel it is left behind, with nothing that anybody needs.
 */
import { OffshootError } from '../errors.js';
import type { ProbeAnswer } from './fetcher/options.js';
import { spawnFetcher } from './remote-reader.js';

const ANSWER_BYTES_MAX = 64 * 1024;

/** `source-unreachable` when there is no answer in time. */
export async function probeFile(file: string, timeoutMs: number, signal?: AbortSignal): Promise<ProbeAnswer> {
  const child = spawnFetcher({ file, expected: null, parentPid: process.pid });
  let text = '';
  try {
    await new Promise<void>((resolve, reject) => {
      const timer = setTimeout(() => {
        reject(new OffshootError('source-unreachable', `${file} cannot be reached: it did not answer within ${Math.round(timeoutMs / 1000)} s`, { path: file }));
      }, timeoutMs);
      const ended = (): void => {
        clearTimeout(timer);
        resolve();
      };
      signal?.addEventListener('abort', ended, { once: true });
      child.stdout?.on('data', (chunk: Buffer) => { text = (text + chunk.toString('utf8')).slice(0, ANSWER_BYTES_MAX); });
      child.once('error', reject);
      child.once('close', ended);
    });
  } finally {
    child.kill('SIGKILL');
  }
  signal?.throwIfAborted();
  if (text === '') throw new OffshootError('io-error', `the process that looked at ${file} ended without a word`, { path: file });
  return JSON.parse(text) as ProbeAnswer;
}
