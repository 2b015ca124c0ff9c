/**
 * The control API for callers whose server may be killed at any moment: waits for the next one, looks whether the call was
 * done before the connection broke, and makes it again if it was not.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import { OffshootError } from '../../../blockstore/errors.js';
import { createControlClient, type ControlClient } from '../../../daemon/control/client.js';
import type { SnapshotInfo } from '../../../daemon/control/snapshot-schemas.js';

const PATIENCE_MS = 60_000;
const AGAIN_MS = 50;
const CLOSE_MS_MAX = 10_000;

function isBroken(thrown: unknown): boolean {
  return thrown instanceof OffshootError && (thrown.kind === 'daemon-not-running' || (thrown.kind === 'io-error' && thrown.context['connectionBroken'] === true));
}

/** The calls that somebody thought of, so that none is made without patience by oversight. */
export type PatientControl = Pick<ControlClient,
  | 'createContainer' | 'startImport' | 'job'
  | 'status' | 'show' | 'list' | 'listContainers' | 'clone' | 'remove' | 'promote' | 'resize' | 'fillStart' | 'fillPause' | 'fillResume' | 'fillStatus'
  | 'cancelJob' | 'cloneRanges' | 'rebase' | 'createSnapshot' | 'listSnapshots' | 'removeSnapshot' | 'revertSnapshot'>;

/** `onLost`: told of each call whose answer never came. Containers and imports are made while nothing is killed, and are not made again. */
export function createPatientControl(socketPath: string, onLost: () => void): PatientControl {
  const inner = createControlClient({ socketPath, patienceMs: PATIENCE_MS });

  /** `wasDone` gives the answer that was lost, or null when the call must be made again. */
  async function patient<T>(call: () => Promise<T>, wasDone: () => Promise<T | null> = () => Promise.resolve(null)): Promise<T> {
    const deadline = Date.now() + PATIENCE_MS;
    for (;;) {
      try {
        return await call();
      } catch (thrown) {
        if (!isBroken(thrown) || Date.now() > deadline) throw thrown;
        onLost();
        await sleep(AGAIN_MS);
        const answer = await patient(wasDone);
        if (answer !== null) return answer;
      }
    }
  }

  async function listed(path: string): Promise<boolean> {
    try {
      await inner.list(path);
      return true;
    } catch (thrown) {
      if (thrown instanceof OffshootError && thrown.kind === 'not-found') return false;
      throw thrown;
    }
  }

  async function snapshotOf(reference: string): Promise<SnapshotInfo | null> {
    const [container = ''] = reference.split(/[/@]/u);
    return (await inner.listSnapshots(container)).find((info) => info.reference === reference) ?? null;
  }

  return {
    createContainer: (name, options) => inner.createContainer(name, options),
    startImport: (request) => inner.startImport(request),
    job: (id) => inner.job(id),
    status: () => patient(() => inner.status()),
    show: (path) => patient(() => inner.show(path)),
    list: (path) => patient(() => inner.list(path)),
    listContainers: () => patient(() => inner.listContainers()),
    clone: (request) => patient(() => inner.clone(request), async () => {
      const there = await Promise.all(request.targets.map(listed));
      if (there.some((is) => is !== there[0])) throw new Error(`of the clones ${request.targets.join(', ')} some were made and some were not`);
      return there[0] === true ? { operationId: 'lost', durationMs: 0, clones: [] } : null;
    }),
    remove: (path, options) => patient(() => inner.remove(path, options), async () =>
      (await listed(path) ? null : { path, nodesRemoved: 1, layersRemoved: 0, layersKept: 0, freedBytes: 0 })),
    resize: (path, sizeBytes) => patient(() => inner.resize(path, sizeBytes), async () => {
      const info = await inner.show(path);
      return info.sizeBytes === sizeBytes ? info : null;
    }),
    // Made twice, it makes another disk the source, or is refused; bytes it never changes.
    promote: (path) => patient(() => inner.promote(path)),
    fillStart: (path, options) => patient(() => inner.fillStart(path, options)),
    fillPause: (path) => patient(() => inner.fillPause(path)),
    fillResume: (path, options) => patient(() => inner.fillResume(path, options)),
    fillStatus: (path) => patient(() => inner.fillStatus(path)),
    // A job that has ended stays as it ended.
    cancelJob: (id) => patient(() => inner.cancelJob(id)),
    // Made twice, it leads to the same, unless the disk is its own source (callers see to that), or has to be made with a size.
    cloneRanges: (request) => patient(() => inner.cloneRanges(request), async () => {
      if (request.sizeBytes === null || !(await listed(request.target))) return null;
      return { operationId: 'lost', path: request.target, sizeBytes: request.sizeBytes, mountPath: '', created: true, ranges: request.ranges.length, sharedBytes: 0, durationMs: 0 };
    }),
    // On what it stands on already it succeeds at once; a conflict changes nothing, and comes again.
    rebase: (request) => patient(() => inner.rebase(request)),
    createSnapshot: (reference, options) => patient(() => inner.createSnapshot(reference, options), async () => await snapshotOf(reference)),
    listSnapshots: (container) => patient(() => inner.listSnapshots(container)),
    removeSnapshot: (reference, options) => patient(() => inner.removeSnapshot(reference, options), async () =>
      (await snapshotOf(reference) === null ? { name: reference, nodesRemoved: 0, layersRemoved: 0, clonesKept: 0 } : null)),
    // Nobody has written meanwhile, so that going back once more changes nothing.
    revertSnapshot: (reference) => patient(() => inner.revertSnapshot(reference)),
  };
}

/** Removes a disk whose last close(2) has returned: it reaches the server a moment later. */
export async function removeWhenClosed(control: PatientControl, path: string): Promise<void> {
  const deadline = Date.now() + CLOSE_MS_MAX;
  for (;;) {
    try {
      await control.remove(path, { keepData: true, recursive: false });
      return;
    } catch (thrown) {
      if (!(thrown instanceof OffshootError) || thrown.kind !== 'in-use' || Date.now() > deadline) throw thrown;
      await sleep(AGAIN_MS);
    }
  }
}
