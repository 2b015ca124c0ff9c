/**
 * The journals' life around the server: made when it starts, replayed when the one before it was killed.
 *
 * Main thread, before any other thread exists. What each leftover means:
 *
 *   - no journal files: the last server ended in an orderly way, or the machine lost power and tmpfs with it. The database
 *     is the truth, and data files may hold blocks that nobody owns
 *   - journal files: the server was killed and the page cache lives on. Every record between head and the first invalid one
 *     was written after its data, so its blocks are owned. They are synced, then committed, then the files are deleted; a
 *     second death anywhere in between only replays the same records again
 *   - a note of a seal: the server was killed after a group of disks was sealed and before that was committed. It is committed now,
 *     from the note and the journals; what the seal was for (a snapshot) had not been answered, and is not there
 *   - a size record says that a file grew; its data file's length, which survived in the page cache, says how far. Longer
 *     than the database says after a power loss, it is cut back when it is opened
 */
import fs from 'node:fs';
import path from 'node:path';

import { OffshootError, toOffshootError } from './errors.js';
import { mapShared, realDoor } from './hot/door.js';
import { JOURNAL_FILE_BYTES, JOURNAL_OWN, JournalReader, formatJournal, journalStoreId, replayJournal } from './hot/journal.js';
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import { ROOT_ID, type BlockRun } from './meta/rows.js';
import { attachSealed, openSeals, readSealNote, removeSealNote, sealNotePath, type NotedSeal } from './seal-note.js';
import { BLOCK_BYTES, DISK_BYTES_MAX } from './units.js';

const JOURNAL_NAME = /^journal-\d+$/;
const FAULT_NAME = /^journal-fault-(\d+)-(\d+)$/;
const LAYER_FAULT_NAME = /^journal-fault-(\d+)-layer-(\d+)$/;

export interface Replay {
  readonly records: number;
  readonly layers: number;
}

export function journalPath(runtimeDir: string, thread: number): string {
  return path.join(runtimeDir, `journal-${thread}`);
}

/** A random number that was made with the store: its root's generation. */
export function storeIdOf(meta: MetaStore): number {
  return meta.nodes.byId(ROOT_ID)?.generation ?? 0;
}

/**
 * Writes out, all at once, the files that the journals speak of. The replay syncs them one after another, and each of those calls would
 * wait for a journal commit of the file system of its own; side by side they share one. The
 * kernel tells an error once, so one that is told here is noted for the replay, which faults the disk.
 */
export async function syncAhead(runtimeDir: string, files: LayerFiles): Promise<void> {
  /** Layers, each with the store that the journal names. */
  const layerIds = new Map<number, number>();
  for (const name of fs.existsSync(runtimeDir) ? fs.readdirSync(runtimeDir).filter((each) => JOURNAL_NAME.test(each)) : []) {
    const memory = journalBytes(path.join(runtimeDir, name));
    if (memory === null) continue;
    const storeId = journalStoreId(memory);
    replayJournal(memory, storeId, (operation, id) => {
      if (operation === JOURNAL_OWN) layerIds.set(id, storeId);
    });
  }
  await Promise.all([...layerIds].filter(([id]) => files.exists(id)).map(async ([id, storeId]) => {
    try {
      const file = await fs.promises.open(files.storePath(id), 'r+');
      try {
        await file.datasync();
      } finally {
        await file.close();
      }
    } catch (thrown) {
      const failure = toOffshootError(thrown);
      if (failure.kind !== 'io-error' && failure.kind !== 'no-space') throw failure;
      fs.writeFileSync(path.join(runtimeDir, `journal-fault-${storeId}-layer-${id}`), failure.message, { mode: 0o600 });
    }
  }));
}

/** Null for a file that a server left which died while it made it: it had not begun to serve. */
function journalBytes(file: string): ArrayBuffer | null {
  const bytes = fs.readFileSync(file);
  if (bytes.length !== JOURNAL_FILE_BYTES) return null;
  const memory = new ArrayBuffer(bytes.length);
  new Uint8Array(memory).set(bytes);
  return memory;
}

/** Commits what a killed server had acknowledged and not committed, and deletes its journals. */
export function replayJournals(runtimeDir: string, meta: MetaStore, files: LayerFiles): Replay {
  const notePath = sealNotePath(runtimeDir, storeIdOf(meta));
  const noted = readSealNote(notePath);
  takeOverFaults(runtimeDir, meta, noted);
  const names = fs.readdirSync(runtimeDir).filter((name) => JOURNAL_NAME.test(name));
  const runs = new Map<number, BlockRun[]>();
  const grown = new Set<number>();
  const storeId = storeIdOf(meta);
  let records = 0;
  for (const name of names) {
    const memory = journalBytes(path.join(runtimeDir, name));
    if (memory === null) continue;
    records += replayJournal(memory, storeId, (operation, id, value, count) => {
      if (operation === JOURNAL_OWN) {
        if ((value + count) * BLOCK_BYTES > DISK_BYTES_MAX) return;
        const known = runs.get(id);
        if (known === undefined) runs.set(id, [{ block: value, count }]);
        else known.push({ block: value, count });
      } else {
        grown.add(id);
      }
    });
  }
  const seals = openSeals(meta, noted).filter((seal) => syncSealed(runtimeDir, meta, files, seal));
  // Of a disk that stays on the layer below it, because it is faulted, nothing above is believed.
  for (const { newLayerId } of noted) if (meta.nodes.byLayer(newLayerId) === undefined && !seals.some((seal) => seal.newLayerId === newLayerId)) runs.delete(newLayerId);
  const layers = [...runs.keys()].filter((layerId) => {
    // What a faulted disk had not committed may never have reached its file, whatever a later sync says.
    const isFaulted = meta.nodes.byLayer(layerId)?.fault !== null && meta.nodes.byLayer(layerId) !== undefined;
    return meta.layers.byId(layerId)?.complete === false && !isFaulted;
  });
  const durable = layers.filter((layerId) => syncOrFault(runtimeDir, meta, files, layerId) !== null);
  const sizes = new Map<number, number>();
  for (const nodeId of grown) {
    const layerId = seals.find((seal) => seal.nodeId === nodeId)?.newLayerId ?? meta.nodes.byId(nodeId)?.layerId;
    // Cloned since, and not opened: the size was committed with the seal, and the new layer has no file yet.
    if (layerId === null || layerId === undefined || !files.exists(layerId)) continue;
    const sizeBytes = meta.nodes.byId(nodeId)?.fault === null ? syncOrFault(runtimeDir, meta, files, layerId) : null;
    if (sizeBytes !== null) sizes.set(nodeId, sizeBytes);
  }
  meta.transaction(() => {
    for (const layerId of durable) meta.ownership.add(layerId, runs.get(layerId) ?? []);
    for (const seal of seals) attachSealed(meta, { id: seal.nodeId }, seal.sealedLayerId, { id: seal.newLayerId }, seal.sizeBytes);
    for (const [nodeId, sizeBytes] of sizes) meta.nodes.update(nodeId, { sizeBytes });
  });
  for (const name of names) fs.rmSync(path.join(runtimeDir, name));
  // After the journals: without the note their records would be those of layers that nobody has.
  removeSealNote(notePath);
  return { records, layers: durable.length };
}

/** True when both layers are on the disk; otherwise their disk is faulted. */
function syncSealed(runtimeDir: string, meta: MetaStore, files: LayerFiles, seal: NotedSeal): boolean {
  return [seal.sealedLayerId, seal.newLayerId].every((layerId) => syncOrFault(runtimeDir, meta, files, layerId, seal.nodeId) !== null);
}

/** Notes on tmpfs that a disk is faulted, until the database says so. */
export function noteFault(runtimeDir: string, meta: MetaStore, nodeId: number, reason: string): void {
  fs.writeFileSync(faultPath(runtimeDir, meta, nodeId), reason, { mode: 0o600 });
}

export function forgetFault(runtimeDir: string, meta: MetaStore, nodeId: number): void {
  fs.rmSync(faultPath(runtimeDir, meta, nodeId), { force: true });
}

/** The store's id is in it, as in the journals: another store at the same path has other nodes. */
function faultPath(runtimeDir: string, meta: MetaStore, nodeId: number): string {
  return path.join(runtimeDir, `journal-fault-${storeIdOf(meta)}-${nodeId}`);
}

/** Faults that only tmpfs knows of, by node: what the next server will say of them. Changes nothing. */
export function notedFaults(runtimeDir: string, meta: MetaStore): Map<number, string> {
  const faults = new Map<number, string>();
  for (const name of fs.existsSync(runtimeDir) ? fs.readdirSync(runtimeDir) : []) {
    const [, storeId, id] = FAULT_NAME.exec(name) ?? [];
    const [, storeOfLayer, layerId] = LAYER_FAULT_NAME.exec(name) ?? [];
    if ((storeId ?? storeOfLayer) !== String(storeIdOf(meta))) continue;
    const node = id === undefined ? meta.nodes.byLayer(Number(layerId)) : meta.nodes.byId(Number(id));
    if (node !== undefined) faults.set(node.id, fs.readFileSync(path.join(runtimeDir, name), 'utf8'));
  }
  return faults;
}

/** Faults that the last server could not write down: without them its journal would make a faulted disk look well. */
function takeOverFaults(runtimeDir: string, meta: MetaStore, seals: readonly NotedSeal[]): void {
  for (const name of fs.readdirSync(runtimeDir)) {
    const [, storeId, id] = FAULT_NAME.exec(name) ?? [];
    if (storeId !== String(storeIdOf(meta))) continue;
    const nodeId = Number(id);
    if (meta.nodes.byId(nodeId) !== undefined) meta.nodes.update(nodeId, { fault: fs.readFileSync(path.join(runtimeDir, name), 'utf8') });
    forgetFault(runtimeDir, meta, nodeId);
  }
  for (const name of fs.readdirSync(runtimeDir)) {
    const [, storeId, id] = LAYER_FAULT_NAME.exec(name) ?? [];
    if (storeId !== String(storeIdOf(meta))) continue;
    const file = path.join(runtimeDir, name);
    const sealedOf = openSeals(meta, seals).find((seal) => seal.newLayerId === Number(id))?.nodeId;
    const node = sealedOf === undefined ? meta.nodes.byLayer(Number(id)) : meta.nodes.byId(sealedOf);
    // Nobody's layer any more: its disk was removed, or it was sealed, which synced it.
    if (node !== undefined) meta.nodes.update(node.id, { fault: fs.readFileSync(file, 'utf8') });
    fs.rmSync(file);
  }
}

/**
 * fdatasync of a layer's file; returns its length, or null when that failed: its disk is faulted then, and what the journals say of
 * it is not believed, because the next start's fdatasync would succeed although the pages are gone.
 */
function syncOrFault(runtimeDir: string, meta: MetaStore, files: LayerFiles, layerId: number, nodeId?: number): number | null {
  try {
    return syncLayer(files, layerId);
  } catch (thrown) {
    const failure = toOffshootError(thrown);
    const node = nodeId === undefined ? meta.nodes.byLayer(layerId) : meta.nodes.byId(nodeId);
    if (node === undefined || (failure.kind !== 'io-error' && failure.kind !== 'no-space')) throw thrown;
    noteFault(runtimeDir, meta, node.id, failure.message);
    meta.nodes.update(node.id, { fault: failure.message });
    forgetFault(runtimeDir, meta, node.id);
    return null;
  }
}

/** fdatasync of a layer's file; returns its length. */
function syncLayer(files: LayerFiles, layerId: number): number {
  let fd: number;
  try {
    fd = fs.openSync(files.storePath(layerId), fs.constants.O_RDWR);
  } catch (error) {
    throw new OffshootError('store-damaged', `the data file of layer ${layerId} is missing although its journal was written`, { layerId }, error);
  }
  try {
    fs.fdatasyncSync(fd);
    return fs.fstatSync(fd).size;
  } catch (error) {
    throw toOffshootError(error);
  } finally {
    fs.closeSync(fd);
  }
}

/** Makes an empty journal for each of `threads` threads; their readers, for the committer. */
export function createJournals(runtimeDir: string, threads: number, storeId: number): Map<number, JournalReader> {
  const readers = new Map<number, JournalReader>();
  for (let thread = 0; thread < threads; thread += 1) {
    const fd = fs.openSync(journalPath(runtimeDir, thread), 'w+', 0o600);
    // Allocated now: a store into a mapping that tmpfs has no page for would kill the process.
    const failed = realDoor.fallocate('journal-allocate', fd, 0, 0, JOURNAL_FILE_BYTES);
    if (failed < 0) {
      fs.closeSync(fd);
      throw new OffshootError('no-space', `the run-time directory ${runtimeDir} has no room for the journal (errno ${-failed}); free some memory there`);
    }
    const memory = mapShared(fd, JOURNAL_FILE_BYTES);
    fs.closeSync(fd);
    formatJournal(memory, 0, storeId);
    readers.set(thread, new JournalReader(memory, 0));
  }
  return readers;
}

export function removeJournals(runtimeDir: string): void {
  for (const name of fs.readdirSync(runtimeDir)) {
    if (JOURNAL_NAME.test(name)) fs.rmSync(path.join(runtimeDir, name), { force: true });
  }
}
