/**
 * From a counting run to what is to be injected: the call sites of the workload, and the runs in which each of them fails.
 *
 * A call site is a shape of operation, a system call, a kind of file and a thread, the first time that they come together. `once`: this call on
 * this file fails, and everything after it works. `always`: this call and every
 * later one of its kind on this file.
 */
import { CALLS, type Call, type Injection, type ThreadName } from './injector.js';
import { WORKLOAD, nameOf, shapeOf } from './workload.js';

export interface Site {
  readonly operation: number;
  readonly call: string;
  /** What the file is to the store. */
  readonly role: string;
  readonly thread: ThreadName;
  readonly file: string;
  /** Index into the calls of the counting run. */
  readonly at: number;
}

export function roleOf(file: string): string {
  if (file === '') return 'store directory';
  if (file.startsWith('offshoot.db')) return file.slice('offshoot.'.length);
  if (file.endsWith('.layer')) return 'data';
  if (file.startsWith('layers')) return 'layer directory';
  return file.startsWith('import') ? 'import' : file;
}

/** `every`: all calls of a site and not only its first. */
export function sitesOf(calls: readonly Call[], every: boolean): Site[] {
  const first = new Map<string, number>();
  const last = new Map<string, number>();
  for (const [at, { operation, call, thread, file }] of calls.entries()) {
    const key = [shapeOf(WORKLOAD[operation]!), call, roleOf(file), thread].join(' ');
    const known = first.get(key);
    if (known === undefined) first.set(key, at);
    // SQLite's log: the first sync may be its header's, the last is the commit's own.
    if (call === 'fsync' && roleOf(file) === 'db-wal' && (known === undefined || calls[known]!.operation === operation)) last.set(key, at);
  }
  const chosen = new Set([...first.values(), ...last.values()]);
  return calls.flatMap(({ operation, call, thread, file }, at) => {
    if (call === 'mkdir' || !(every || chosen.has(at))) return [];
    const isLast = first.get([shapeOf(WORKLOAD[operation]!), call, roleOf(file), thread].join(' ')) !== at;
    return [{ operation, call, role: `${roleOf(file)}${isLast && !every ? ', last' : ''}`, thread, file, at }];
  });
}

export function describeSite({ operation, call, role }: Site): string {
  return `${String(operation).padStart(2)} ${nameOf(WORKLOAD[operation]!).padEnd(13)} ${call.padEnd(9)} ${role}`;
}

export function onceAt(calls: readonly Call[], site: Site, effect: Injection['effect']): Injection[] {
  const number = calls.slice(0, site.at + 1).filter(({ operation, thread, call, file }) =>
    operation === site.operation && thread === site.thread && call === site.call && file === site.file).length;
  return [{ operation: site.operation, thread: site.thread, call: site.call, number, always: false, effect, files: [site.file] }];
}

export function alwaysFrom(calls: readonly Call[], site: Site, effect: Injection['effect']): Injection[] {
  return onceAt(calls, site, effect).map((injection) => ({ ...injection, always: true }));
}

/** From an operation on everything fails, in both threads: the device is gone. */
export function goneFrom(calls: readonly Call[], operation: number, effect: Injection['effect']): Injection[] {
  const files = [...new Set(calls.map(({ file }) => file))];
  return (['main', 'pool'] as const).flatMap((thread) => CALLS.map((call) => ({ operation, thread, call, number: 1, always: true, effect, files })));
}
