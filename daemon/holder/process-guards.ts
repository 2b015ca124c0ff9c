/**
 * What makes a process hard to kill by accident: signals, memory pressure, inherited limits, a closed terminal.
 *
 * Best effort where the kernel may refuse (a container without CAP_SYS_RESOURCE), for a daemon that is a little easier to kill is
 * better than none. SIGPIPE and SIGXFSZ need nothing: Node.js ignores both from its first moment, in every process.
 */
import { closeSync, constants, openSync, readFileSync, writeFileSync } from 'node:fs';
import koffi from 'koffi';

import { OffshootError } from '../../blockstore/errors.js';

/** The kernel's out-of-memory killer spares -1000 altogether. The server may be chosen last: it comes back. */
export const OOM_SCORE = { holder: -1000, server: -900 } as const;

const RLIMIT_FSIZE = 1;
/** RLIM_INFINITY, twice: soft and hard. */
const NO_LIMIT = Buffer.alloc(16, 0xff);

const libc = koffi.load('libc.so.6');
const sysDup2 = libc.func('int dup2(int from, int to)') as unknown as (from: number, to: number) => number;
const sysSetrlimit = libc.func('int setrlimit(int resource, const void *limit)') as unknown as (resource: number, limit: Buffer) => number;

/** For the holder, before it makes or opens anything; the server inherits all of it. */
export function guardProcess(): void {
  process.chdir('/');
  // What the daemon makes in the store is nobody else's.
  process.umask(0o077);
  // The end of the terminal or of the session that started the daemon is not its end.
  process.on('SIGHUP', () => undefined);
  // A limit that some shell had set would fail guests' writes to large layer files; refused without CAP_SYS_RESOURCE.
  sysSetrlimit(RLIMIT_FSIZE, NO_LIMIT);
  spareFromMemoryKiller(process.pid, OOM_SCORE.holder);
}

export function spareFromMemoryKiller(pid: number, score: number): void {
  try {
    writeFileSync(`/proc/${pid}/oom_score_adj`, String(score));
  } catch {
    // See the head of this file: refused here means as easy to kill as any other process.
  }
}

/** Standard output and error of this process, and of every process it starts, go to the end of `logPath` from now on. */
export function redirectOutput(logPath: string): void {
  const { O_WRONLY, O_APPEND, O_CREAT, O_NOFOLLOW } = constants;
  const fd = openSync(logPath, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW, 0o600);
  try {
    if (sysDup2(fd, 1) < 0 || sysDup2(fd, 2) < 0) {
      throw new OffshootError('io-error', `cannot send output to ${logPath}: dup2 failed with errno ${koffi.errno()}`);
    }
  } finally {
    closeSync(fd);
  }
}

/** The state of a process's main thread: one letter as proc(5) has it; empty when there is no such process. */
export function processState(pid: number): string {
  try {
    // The name stands in brackets before it, and may hold anything.
    return /^.*\) (\S)/su.exec(readFileSync(`/proc/${pid}/task/${pid}/stat`, 'latin1'))?.[1] ?? '';
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ESRCH') return '';
    throw error;
  }
}
