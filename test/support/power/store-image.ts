/**
 * The store of an image: opened as the next server opens it, every disk read, everything held against everything.
 *
 * In the test's own process, because thousands of images are tried. No space is kept back for metadata, and the journals'
 * memory goes back after each image: a mapping cannot be undone here, but its file can be cut.
 */
import fs from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';

import { checkStore } from '../../../blockstore/check.js';
import { realDoor } from '../../../blockstore/hot/door.js';
import { ROOT_ID, type NodeRow } from '../../../blockstore/meta/rows.js';
import { originOf } from '../../../blockstore/promote.js';
import { Store } from '../../../blockstore/store.js';
import type { FoundDisk } from './window.js';

/** Opens the store as a server with one thread does. */
export function openImage(storeDir: string, runtimeDir: string): Store {
  const fallocate = realDoor.fallocate.bind(realDoor);
  // The space kept back for metadata would be 64 MiB of memory, zeroed anew for each image.
  realDoor.fallocate = (label, ...call) => (label === 'reserve-allocate' ? 0 : fallocate(label, ...call));
  try {
    return Store.open({
      storeDir, runtimeDir, threads: 1, mapChunks: 1, announcer: { opened: () => undefined, closed: () => undefined },
      onFault: (nodeId, reason) => { throw new Error(`disk ${nodeId} was faulted: ${reason}`); }, onFull: () => undefined,
    });
  } finally {
    realDoor.fallocate = fallocate;
  }
}

/** Every disk and file, whole, by its path; and every directory, with nothing in it. */
export function readDisks(store: Store): FoundDisk[] {
  const found: FoundDisk[] = [];
  for (const { name, node } of everything(store)) {
    if (node.layerId === null) {
      found.push({ name: `${name}/`, content: Buffer.alloc(0) });
      continue;
    }
    const { layerId } = node;
    store.disks.acquire(node.id);
    try {
      const content = Buffer.alloc(node.sizeBytes, 0xee);
      const got = store.data.read(node.id, 0, content);
      if (got !== node.sizeBytes) throw new Error(`${name} gives ${got} of its ${node.sizeBytes} bytes`);
      const origin = originOf(store.meta, node.id, store.meta.layers.chain(layerId));
      found.push({ name, content, origin: origin === undefined ? null : store.meta.nodes.pathOf(origin.id) });
    } finally {
      store.disks.release(node.id);
    }
  }
  return found;
}

function everything({ meta }: Store): { readonly name: string; readonly node: NodeRow }[] {
  const found: { readonly name: string; readonly node: NodeRow }[] = [];
  const enter = (directoryId: number, prefix: string): void => {
    for (const node of meta.nodes.children(directoryId, 0, Number.MAX_SAFE_INTEGER)) {
      found.push({ name: `${prefix}${node.name}`, node });
      if (node.kind === 'directory') enter(node.id, `${prefix}${node.name}/`);
    }
  };
  enter(ROOT_ID, '');
  return found;
}

/** What `offshoot check` says of it: leaks may be left by a loss, corruption may not. */
export function verdictOfCheck(store: Store): string | null {
  const { verdict, findings } = checkStore({ meta: store.meta, files: store.files, disks: store.disks });
  if (verdict !== 'corruption') return null;
  return findings.filter((finding) => finding.severity === 'corruption').map((finding) => finding.message).join('; ');
}

/** The same asked without its help, and short: metadata against files. Files that nothing refers to are leaks, and no damage. */
export function damageOf(store: Store): string | null {
  const seen = new Set<number>();
  for (const node of [...everything(store).map((each) => each.node), ...store.meta.nodes.orphans()]) {
    if (node.fault !== null) return `${node.name} is faulted: ${node.fault}`;
    if (node.layerId === null) continue;
    for (const layer of store.meta.layers.chain(node.layerId)) {
      if (seen.has(layer.id)) continue;
      seen.add(layer.id);
      const owned = layer.complete ? Number.NaN : store.meta.ownership.ownedBlocks(layer.id);
      if (layer.id === node.layerId && layer.sealed) return `the active layer ${layer.id} of ${node.name} is sealed`;
      if (layer.id !== node.layerId && !layer.sealed) return `layer ${layer.id} has layers above it and is not sealed`;
      if (layer.kind === 'external') continue;
      const stat = fs.statSync(store.files.storePath(layer.id), { throwIfNoEntry: false });
      if (stat === undefined) {
        if (owned !== 0) return `layer ${layer.id} of ${node.name} owns ${layer.complete ? 'all' : owned} blocks and has no file`;
      } else if (layer.sealed && stat.size < layer.sizeBytes && owned !== 0) {
        return `the file of the sealed layer ${layer.id} has ${stat.size} bytes, not ${layer.sizeBytes}`;
      }
    }
  }
  return null;
}

/** Closes the store as at an orderly stop, and gives the journals' memory back. */
export async function closeImage(store: Store, runtimeDir: string): Promise<void> {
  const journal = fs.openSync(path.join(runtimeDir, 'journal-0'), 'r+');
  try {
    await store.close();
    fs.ftruncateSync(journal, 0);
  } finally {
    fs.closeSync(journal);
  }
}

/** SQLite's own opinion of a database that nobody has open; null when it is good. */
export function integrityOf(storeDir: string): string | null {
  const database = new Database(path.join(storeDir, 'offshoot.db'), { readonly: true });
  try {
    const verdict = String(database.pragma('integrity_check(1)', { simple: true }));
    return verdict === 'ok' ? null : `SQLite says: ${verdict}`;
  } finally {
    database.close();
  }
}
