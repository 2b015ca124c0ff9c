/**
 * The nbdkits that doors have given connections to, found by their first argument: `DIRECTORY/nbdkit-ID-DIGEST`, where the digest says what exactly is shown. So
 * whoever comes after a door that was killed knows whose they are, without a record that could be missing or old. Each has a session of its own, and no tie to its
 * door: it ends with its client, or here. The shell that begins it (`main.ts`) has the same mark and session.
 *
 * Only of processes that are called so the arguments are read: those of one that hangs in a mapping of a file cannot be read without waiting for it.
 */
import { createHash } from 'node:crypto';
import { readFileSync, readdirSync, statSync } from 'node:fs';
import path from 'node:path';

import { OffshootError } from '../../../blockstore/errors.js';
import { sleepUnlessAborted } from '../../programs/child.js';
import type { DoorEntry } from './door-config.js';

export interface Guest {
  readonly pid: number;
  readonly mark: string;
  readonly session: string;
}

const NAME = 'nbdkit';
const CALLED = new Set([NAME, 'bash']);
const END_MS = 10_000;
const POLL_MS = 30;

export function markOf(directory: string, entry: DoorEntry): string {
  return path.join(directory, `${NAME}-${entry.id}-${createHash('sha256').update(JSON.stringify(entry)).digest('hex').slice(0, 16)}`);
}

export function guestsIn(directory: string): readonly Guest[] {
  const beginning = path.join(directory, `${NAME}-`);
  return readdirSync('/proc').filter((name) => /^[1-9][0-9]*$/u.test(name)).flatMap((name) => {
    const guest = guestOf(name);
    return guest?.mark.startsWith(beginning) === true ? [guest] : [];
  });
}

export function connectionsOf(directory: string, mark: string): number {
  return new Set(guestsIn(directory).filter((guest) => guest.mark === mark).map(({ session }) => session)).size;
}

/** At once, and without a word to the client: one that ends in order says that the server goes away, and QEMU does not come again. How many there were. */
export function killGuests(directory: string, kept: ReadonlySet<string> = new Set()): number {
  const guests = guestsIn(directory).filter(({ mark }) => !kept.has(mark));
  for (const { pid } of guests) {
    try {
      process.kill(pid, 'SIGKILL');
    } catch {
      // It has ended.
    }
  }
  return guests.length;
}

/** When the door has ended: all of them, and waits until they have. How many there were. */
export async function endGuests(directory: string, withinMs = END_MS): Promise<number> {
  const count = killGuests(directory);
  const never = new AbortController().signal;
  for (const deadline = performance.now() + withinMs; killGuests(directory) > 0;) {
    if (performance.now() > deadline) throw new OffshootError('timed-out', `nbdkit (pid ${guestsIn(directory).map(({ pid }) => pid).join(', ')}) does not end, although it was killed: look at what it waits for`);
    await sleepUnlessAborted(POLL_MS, never);
  }
  return count;
}

/** Null: it is none of ours, or has ended. */
function guestOf(pid: string): Guest | null {
  try {
    if (!CALLED.has(readFileSync(`/proc/${pid}/comm`, 'utf8').trim()) || statSync(`/proc/${pid}`).uid !== process.geteuid?.()) return null;
    const [mark = ''] = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return { pid: Number(pid), mark, session: stat.slice(stat.lastIndexOf(')') + 2).split(' ')[3] ?? '' };
  } catch {
    return null;
  }
}
