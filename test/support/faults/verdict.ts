/**
 * What a store is worth after a fault: opened again in another process than the one that was hit, and compared with the model.
 *
 * The verdict is the one of `offshoot check` (clean, leaks, corruption) and whatever else is wrong: content that the model does not
 * allow, a fault that was forgotten, a disk that takes no writes although it is not faulted, or takes them although it is.
 */
import { checkStore } from '../../../blockstore/check.js';
import { toOffshootError } from '../../../blockstore/errors.js';
import { ROOT_ID } from '../../../blockstore/meta/rows.js';
import { Store } from '../../../blockstore/store.js';
import { StoreModel } from './model.js';
import type { ActorRun } from './injector.js';
import { WORKLOAD } from './workload.js';

export interface Verdict {
  readonly check: 'clean' | 'leaks' | 'corruption';
  readonly faulted: readonly string[];
  /** What is wrong; empty when everything is as promised. */
  readonly wrong: readonly string[];
}

export async function judge(storeDir: string, runtimeDir: string, run: ActorRun): Promise<Verdict> {
  const wrong: string[] = [];
  const model = new StoreModel();
  for (const [number, operation] of WORKLOAD.entries()) {
    const outcome = run.outcomes[number] ?? 'skipped';
    model.apply(operation, outcome);
    const read = run.reads.get(number);
    if (read !== undefined && operation.kind === 'read') {
      const difference = model.compareRead(operation.disk, read);
      if (difference !== null) wrong.push(`operation ${number}: ${difference}`);
    }
    if (operation.kind === 'flush' && !['ok', 'no-space', 'faulted', 'io-error', 'skipped', 'unknown'].includes(outcome)) wrong.push(`operation ${number}: a flush says ${outcome}`);
  }
  let store: Store;
  try {
    store = reopen(storeDir, runtimeDir);
  } catch (thrown) {
    return { check: 'corruption', faulted: [], wrong: [`it does not open again: ${(thrown as Error).message}`] };
  }
  // As a server does it that starts.
  for (const orphan of store.meta.nodes.orphans()) store.discardNode(orphan.id);
  const report = checkStore(store);
  for (const finding of report.findings) if (finding.severity === 'corruption') wrong.push(finding.message);
  const faulted: string[] = [];
  for (const [name, disk] of model.disks) {
    const node = store.meta.nodes.child(ROOT_ID, name);
    if (node === undefined) {
      if (disk.exists === 'yes') wrong.push(`${name} is gone`);
      continue;
    }
    if (disk.exists === 'no') wrong.push(`${name} is there again`);
    const isFaulted = node.fault !== null;
    if (isFaulted) faulted.push(name);
    else if (run.faulted.includes(name)) wrong.push(`that ${name} was faulted is forgotten`);
    await compareDisk(store, model, name, node.id, isFaulted, wrong);
  }
  await store.close();
  return { check: report.verdict, faulted, wrong };
}

async function compareDisk(store: Store, model: StoreModel, name: string, nodeId: number, isFaulted: boolean, wrong: string[]): Promise<void> {
  try {
    const disk = store.disks.acquire(nodeId);
    const content = Buffer.alloc(disk.shared.sizeBytes(), 0xee);
    if (store.data.read(nodeId, 0, content) !== content.length) wrong.push(`${name} reads short`);
    const difference = model.compare(name, content, isFaulted);
    if (difference !== null) wrong.push(difference);
    if (content.length > 0) {
      const write = outcomeOf(() => { store.data.write(nodeId, 0, content.subarray(0, 512)); });
      const flush = await store.flush(nodeId).then(() => 'ok', (thrown: unknown) => toOffshootError(thrown).kind);
      if (write !== (isFaulted ? 'io-error' : 'ok')) wrong.push(`a write to ${name} says ${write}`);
      if (flush !== (isFaulted ? 'faulted' : 'ok')) wrong.push(`a flush of ${name} says ${flush}`);
    }
    store.disks.release(nodeId);
  } catch (thrown) {
    wrong.push(`${name} cannot be read: ${(thrown as Error).message}`);
  }
}

function outcomeOf(body: () => void): string {
  try {
    body();
    return 'ok';
  } catch (thrown) {
    return toOffshootError(thrown).kind;
  }
}

function reopen(storeDir: string, runtimeDir: string): Store {
  return Store.open({
    mapChunks: 2, storeDir, runtimeDir, threads: 1, announcer: { opened: () => undefined, closed: () => undefined },
    onFault: () => undefined, onFull: () => undefined,
  });
}
