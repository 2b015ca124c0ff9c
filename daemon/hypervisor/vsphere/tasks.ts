/**
 * Waiting for what vSphere does in the background: tasks, and states that a machine comes to by itself.
 *
 * Asked again and again with pauses that grow, rather than by WaitForUpdatesEx: that needs a collector and a filter for each task, which
 * live in the session and die with it; a question that stands by itself goes on after a new login.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import { OffshootError } from '../../../blockstore/errors.js';
import type { CallOptions } from '../hypervisor.js';
import { localizedFault } from './faults.js';
import { retrieveOne } from './properties.js';
import type { Session } from './session.js';
import { asObject, childOf, textAt, type ManagedObject } from './xml.js';

const PAUSE_FIRST_MS = 20;
const PAUSE_MAX_MS = 1000;
const PAUSE_GROWTH = 1.6;

/** Waits until a task has ended. Returns the object that it made, if any. Throws VsphereFault with its error, `timed-out`, `cancelled`. */
export async function waitForTask(session: Session, task: ManagedObject, method: string, options: CallOptions & { readonly timeoutMs: number; readonly meanwhile?: () => Promise<void> }):
Promise<ManagedObject | null> {
  const info = await poll(async () => {
    const found = (await retrieveOne(session, task, ['info'], options)).get('info');
    const state = textAt(found, 'state');
    if (state === 'success' || state === 'error') return found;
    await options.meanwhile?.();
    return undefined;
  }, options);
  if (info === undefined) {
    throw new OffshootError('timed-out', `vSphere did not end ${method} within ${options.timeoutMs} ms; task ${task.id} may still be running there`, { task: task.id });
  }
  const error = childOf(info, 'error');
  if (error !== undefined) throw localizedFault(method, error);
  if (textAt(info, 'state') !== 'success') throw new OffshootError('io-error', `vSphere says that ${method} failed, and not why (task ${task.id})`, { task: task.id });
  return asObject(childOf(info, 'result'));
}

/** Asks until there is an answer other than undefined; undefined when the time is over. */
export async function poll<T>(ask: () => Promise<T | undefined>, options: CallOptions & { readonly timeoutMs: number }): Promise<T | undefined> {
  const began = performance.now();
  let pauseMs = PAUSE_FIRST_MS;
  while (true) {
    const answer = await ask();
    if (answer !== undefined) return answer;
    const leftMs = options.timeoutMs - (performance.now() - began);
    if (leftMs <= 0) return undefined;
    try {
      await sleep(Math.min(pauseMs, leftMs), undefined, { signal: options.signal });
    } catch (error) {
      if (options.signal.aborted) throw new OffshootError('cancelled', 'waiting for vSphere was cancelled', {}, error);
      throw error;
    }
    pauseMs = Math.min(pauseMs * PAUSE_GROWTH, PAUSE_MAX_MS);
  }
}
