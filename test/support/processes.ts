/**
 * Processes, looked at through /proc: found by a path that they were given, waited for, ended by id.
 */
import { readFileSync, readdirSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

const POLL_MS = 20;
const STOP_MS_MAX = 10_000;

/**
 * Ids of the processes that have `text` in their arguments or their environment, which children inherit. Arguments alone would
 * not do: a process may write over its own to give itself a title. The text should be a path that nobody else uses.
 */
export function processesNaming(text: string): number[] {
  return readdirSync('/proc').filter((name) => /^[0-9]+$/u.test(name) && Number(name) !== process.pid)
    .filter((name) => readProc(name, 'cmdline').includes(text) || readProc(name, 'environ').includes(text)).map(Number);
}

/** False for zombies: they hold no descriptor and no mount any more, unless another thread of theirs has not come out of the kernel yet. */
export function isAlive(pid: number): boolean {
  const stat = readProc(String(pid), 'stat');
  if (stat === '') return false;
  return !/^[ZX]/u.test(stat.slice(stat.lastIndexOf(')') + 2)) || threadsOf(pid) > 1;
}

function threadsOf(pid: number): number {
  try {
    return readdirSync(`/proc/${pid}/task`).length;
  } catch {
    return 0;
  }
}

/** As they are now, one after the other; empty when it has ended. */
export function argumentsOf(pid: number): string { return readProc(String(pid), 'cmdline').replaceAll('\0', ' '); }

function readProc(pid: string, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, 'latin1');
  } catch {
    // It has just ended.
    return '';
  }
}

/** True when it did not live to begin with, or was told. */
export function signalProcess(pid: number, signal: NodeJS.Signals): boolean {
  try {
    return process.kill(pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
    throw error;
  }
}

/** SIGSTOP, and waits until no thread of it runs any more: kill(2) returns before that. */
export async function stopProcess(pid: number): Promise<void> {
  signalProcess(pid, 'SIGSTOP');
  const isStopped = (): boolean => readdirSync(`/proc/${pid}/task`).every((task) => /^State:\s+T/mu.test(readProc(`${pid}/task/${task}`, 'status')));
  if (!(await waitUntil(isStopped, STOP_MS_MAX))) throw new Error(`process ${pid} was told to stop, and has not`);
}

export async function waitUntilGone(pid: number, timeoutMs: number): Promise<boolean> {
  return await waitUntil(() => !isAlive(pid), timeoutMs);
}

/** Asks again and again; gives whether it came true in time. */
export async function waitUntil(isSo: () => boolean | Promise<boolean>, timeoutMs: number): Promise<boolean> {
  const deadline = performance.now() + timeoutMs;
  while (!(await isSo())) {
    if (performance.now() > deadline) return false;
    await sleep(POLL_MS);
  }
  return true;
}
