/**
 * The group seal: any number of disks and files, open or closed, sealed at one instant, while guests write.
 *
 * What a guest notices is the time for which the gates are closed. No sync and no commit lies in it, and nothing in it depends on how large a disk is
 * or how much was written to it. Main thread; what waits for the disk does so in the thread pool.
 *
 *   1. everything that is open is synced, side by side, so that little is left to sync at step 5
 *   2. each open disk that has written something gets the layer that it will write to next: a row that nobody refers to, its durable file, open.
 *      (crash: rows and files that nothing refers to)
 *   3. in one turn of the main thread: what belongs to the group is asked for, the gates of all its open disks close, everybody has left them. If
 *      something came up meanwhile (a disk was opened, a clean one was written to), the gates open and it begins again at 1
 *   4. a note on tmpfs names every disk with its new layer, the maps move on to them, the gates open. That is the instant. (killed: the next
 *      server finds the note and does step 5; power loss: note, journals and everything that was written since are gone, as if nothing was asked)
 *   5. the sealed files are synced, then one transaction: what they own, that they are sealed, which layer is each node's, and whatever the caller adds
 *      as of the instant. Until then a flush of these disks waits, so that nothing on a new layer is called durable, and who wants to
 *      change one of them finishes this first, at once (`settleNow`)
 *   6. the note goes
 *
 * A sync that fails at step 5 faults its disk, as everywhere: it stays on the layer that the database knows, the others are sealed, and
 * what the caller wanted to add does not happen.
 */
import fs from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';

import { assertMayGrow, foundationBelow, insertActive, isPristine, requireActive, roomToBeIncomplete, type CloneParts, type Foundation } from './clone.js';
import type { PendingSeal } from './committer.js';
import { isInDoubt } from './doubt.js';
import { OffshootError, isOperatingError, toOffshootError } from './errors.js';
import { FLAG_COMPLETE, STATE_GATE_CLOSED } from './hot/block-map.js';
import type { SharedState } from './hot/shared-state.js';
import type { ActiveFile, LayerFile } from './layer-files.js';
import type { LayerRow, NodeRow } from './meta/rows.js';
import type { OpenDisk } from './open-disks.js';
import { attachSealed, removeSealNote, writeSealNote } from './seal-note.js';
import { BLOCK_BYTES } from './units.js';

export interface SealParts extends CloneParts {
  readonly shared: SharedState;
  /** Where the note lies, see `seal-note.ts`. */
  readonly notePath: string;
}

/** A node as it was at the instant. */
export interface SealedNode {
  /** With the size and time of an open disk, not those of its row. */
  readonly node: NodeRow;
  /** What a copy of it stands on; null for what has no data. */
  readonly foundation: Foundation | null;
}

export interface SealWish<T> {
  /** The nodes of the group at this moment, those without data among them. Asked again at each attempt. */
  readonly list: () => readonly NodeRow[];
  /** What is to be in the database when they are sealed. Within the transaction of step 5; `timeUs` is the instant. */
  readonly commit: (nodes: readonly SealedNode[], timeUs: number) => T;
}

export interface SealResult<T> {
  readonly value: T;
  /** How long the gates were closed. */
  readonly gateMs: number;
  readonly sealed: number;
}

/** Longest that gates stay closed for requests inside to end; one that waits for its source takes longer, and is waited for with open gates. */
const GATE_WAIT_MS = 10;
const BUSY_WAIT_MS = 2000;
const ATTEMPTS_MAX = 50;

interface Prepared {
  readonly layer: LayerRow;
  readonly file: ActiveFile;
  /** The layer that is to be sealed, opened for reading. */
  readonly below: LayerFile;
}

/** One disk of a seal that is not committed. */
interface Switched {
  readonly before: OpenDisk;
  readonly sealedLayerId: number;
  readonly active: LayerRow;
  readonly sizeBytes: number;
}

interface Closed {
  readonly node: NodeRow;
  readonly active: LayerRow;
}

/** What an open disk knows better than its row. */
type Live = Pick<NodeRow, 'sizeBytes' | 'mtimeUs'>;

export class GroupSeals {
  readonly #parts: SealParts;
  #last: Promise<unknown> = Promise.resolve();

  constructor(parts: SealParts) {
    this.#parts = parts;
  }

  /** Seals what `wish` names, at one instant; durable, with what it commits, when the promise resolves. One at a time, in the order of the calls. */
  async seal<T>(wish: SealWish<T>): Promise<SealResult<T>> {
    const before = this.#last;
    const mine = (async (): Promise<SealResult<T>> => {
      await before;
      return await new Attempt(this.#parts, wish).run();
    })();
    this.#last = mine.catch(() => undefined);
    return await mine;
  }
}

class Attempt<T> {
  readonly #parts: SealParts;
  readonly #wish: SealWish<T>;
  readonly #prepared = new Map<number, Prepared>();
  /** Closed nodes whose files were synced, and that nobody has opened since. */
  readonly #synced = new Set<number>();

  constructor(parts: SealParts, wish: SealWish<T>) {
    this.#parts = parts;
    this.#wish = wish;
  }

  async run(): Promise<SealResult<T>> {
    const { committer, disks } = this.#parts;
    const opened = new Set<number>();
    const unwatch = disks.watchOpened(opened);
    const deadlineMs = performance.now() + BUSY_WAIT_MS;
    try {
      for (let attempt = 0; attempt < ATTEMPTS_MAX;) {
        await Promise.all(committer.pendingSeals().map(async (seal) => { await seal.settle(); }));
        const nodes = this.#wish.list().filter((node) => node.layerId !== null);
        await this.#syncAll(nodes, opened); // Step 1.
        await this.#prepare(nodes); // Step 2.
        const pending = this.#atOnce(opened, deadlineMs); // Steps 3 and 4.
        if (pending instanceof Pending) {
          await pending.settleOrGiveUp(); // Steps 5 and 6.
          return pending.result();
        }
        if (pending === 'busy') await delay(GATE_WAIT_MS);
        else attempt += 1;
      }
      throw new OffshootError('busy', `what is to be sealed changed ${ATTEMPTS_MAX} times while it was made ready: try again`);
    } finally {
      unwatch();
      this.#dropPrepared();
    }
  }

  async #syncAll(nodes: readonly NodeRow[], opened: Set<number>): Promise<void> {
    const { meta, disks, committer, files } = this.#parts;
    for (const nodeId of opened) this.#synced.delete(nodeId);
    opened.clear();
    await Promise.all(nodes.map(async (node) => {
      const active = requireActive(meta, disks, node);
      const disk = disks.get(node.id);
      if (disk !== undefined) {
        if (this.#prepared.has(active.id)) return;
        const failure = await committer.sync(disk);
        if (failure !== null) throw failure;
        return;
      }
      if (this.#synced.has(node.id) || isPristine(meta, active)) return;
      const failure = await syncPath(files.storePath(active.id));
      if (failure !== null) {
        this.#parts.faultNode(node.id, failure.message);
        throw new OffshootError('faulted', `the disk is faulted now: ${failure.message}`, { nodeId: node.id }, failure);
      }
      this.#synced.add(node.id);
    }));
    for (const nodeId of opened) this.#synced.delete(nodeId);
  }

  /** Rows first, because they give the ids; then the files, side by side. */
  async #prepare(nodes: readonly NodeRow[]): Promise<void> {
    const { meta, disks, files, committer } = this.#parts;
    const wanted: { readonly active: LayerRow; readonly sizeBytes: number }[] = [];
    for (const { id } of nodes) {
      const node = meta.nodes.byId(id);
      const open = disks.get(id);
      if (node === undefined || open === undefined) continue;
      const disk = roomToBeIncomplete(disks, open) ?? open;
      const active = requireActive(meta, disks, node);
      committer.drain();
      if (this.#prepared.has(active.id) || (isPristine(meta, active) && !committer.hasPendingRuns(active.id))) continue;
      assertMayGrow(meta, active);
      if (disk.shared.originCount() >= disk.shared.originsMax - 1) {
        throw new OffshootError('busy', 'the disk was sealed too often while it was open: close it once, then try again', { nodeId: id });
      }
      wanted.push({ active, sizeBytes: disk.shared.sizeBytes() });
    }
    if (wanted.length === 0) return;
    const made = meta.transaction(() => wanted.map(({ active, sizeBytes }) => {
      const layer = meta.layers.insert({
        kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes, sealed: false, complete: false,
        createdUs: Date.now() * 1000,
      });
      meta.layers.prepared.add(layer.id);
      return { active, layer };
    }));
    try {
      await files.createAll(made.map(({ layer }) => ({ layerId: layer.id, sizeBytes: layer.sizeBytes })));
      for (const { active, layer } of made) {
        const file = files.openActive(layer);
        try {
          this.#prepared.set(active.id, { layer, file, below: files.openSealed({ ...active, sealed: true }) });
        } catch (thrown) {
          files.release(file);
          throw thrown;
        }
      }
    } catch (thrown) {
      this.#forget(made.map((each) => each.layer).filter((layer) => ![...this.#prepared.values()].some((prepared) => prepared.layer === layer)));
      throw toOffshootError(thrown);
    }
  }

  /** Steps 3 and 4. Nothing here waits for the disk, or for anybody but the requests that are inside. */
  #atOnce(opened: ReadonlySet<number>, deadlineMs: number): Pending<T> | 'again' | 'busy' {
    const { meta, disks, committer, shared } = this.#parts;
    if (committer.pendingSeals().length > 0) return 'again';
    const nodes = this.#wish.list();
    const open: { readonly node: NodeRow; readonly disk: OpenDisk; readonly active: LayerRow; readonly isClean: boolean }[] = [];
    const closed: Closed[] = [];
    for (const node of nodes) {
      if (node.layerId === null) continue;
      const active = requireActive(meta, disks, node);
      const disk = disks.get(node.id);
      const isClean = isPristine(meta, active);
      if (disk !== undefined) open.push({ node, disk, active, isClean });
      else if (isClean) continue;
      else if (!this.#synced.has(node.id) || opened.has(node.id)) return 'again';
      else closed.push({ node, active });
    }
    for (const { active } of closed) assertMayGrow(meta, active);
    // Most of it now, so that little is left behind the gates.
    committer.drain();
    const beganMs = performance.now();
    let switched: readonly Switched[];
    const asOfInstant = new Map<number, Live>();
    for (const { disk } of open) disk.shared.setState(STATE_GATE_CLOSED);
    try {
      for (const { disk } of open) {
        if (shared.waitUntilNobodyIn(disk.shared.serial, Math.max(0, GATE_WAIT_MS - (performance.now() - beganMs)))) continue;
        if (performance.now() < deadlineMs) return 'busy';
        throw new OffshootError('busy', `a request on ${meta.nodes.pathOf(disk.nodeId)} takes longer than ${BUSY_WAIT_MS} ms; its source may be slow: try again`, { nodeId: disk.nodeId });
      }
      committer.drain();
      const dirty = open.filter(({ active, isClean }) => !isClean || committer.hasPendingRuns(active.id));
      for (const { disk, active } of dirty) {
        const isTooSmall = disk.shared.sizeBytes() > disk.shared.capacityBlocks * BLOCK_BYTES && (disk.shared.flags() & FLAG_COMPLETE) !== 0;
        if (isTooSmall || !this.#prepared.has(active.id)) return 'again';
      }
      for (const { disk } of open) asOfInstant.set(disk.nodeId, { sizeBytes: disk.shared.sizeBytes(), mtimeUs: Math.round(disk.shared.mtimeMs() * 1000) });
      switched = this.#switch(dirty);
    } finally {
      for (const { disk } of open) disk.shared.clearState(STATE_GATE_CLOSED);
    }
    const gateMs = performance.now() - beganMs;
    // Guests go on, and this thread is in the turn in which it closed their gates: what can be said of the instant is said without haste.
    const instant = { switched, closed, nodes: this.#nodesOf(nodes, asOfInstant, switched, closed), timeUs: Date.now() * 1000 };
    const pending = new Pending(this.#parts, this.#wish, instant, gateMs);
    for (const entry of switched) committer.beginSeal(disks.get(entry.before.nodeId) ?? entry.before, pending);
    return pending;
  }

  /** Step 4: the note, then the maps. */
  #switch(dirty: readonly { readonly disk: OpenDisk; readonly active: LayerRow }[]): Switched[] {
    const { disks, notePath } = this.#parts;
    const entries = dirty.map(({ disk, active }) => {
      const prepared = this.#prepared.get(active.id);
      if (prepared === undefined) throw new Error(`no layer was made ready for node ${disk.nodeId}`);
      const sizeBytes = disk.shared.sizeBytes();
      if (sizeBytes !== prepared.layer.sizeBytes) fs.ftruncateSync(prepared.file.fd, sizeBytes);
      return { disk, active, prepared, sizeBytes };
    });
    if (entries.length === 0) return [];
    writeSealNote(notePath, entries.map(({ disk, active, prepared, sizeBytes }) => ({
      nodeId: disk.nodeId, sealedLayerId: active.id, sizeBytes, newLayerId: prepared.layer.id,
    })));
    return entries.map(({ disk, active, prepared, sizeBytes }) => {
      disks.exchangeActive(disk, prepared.below, prepared.file, sizeBytes);
      this.#prepared.delete(active.id);
      return { before: disk, sealedLayerId: active.id, active: prepared.layer, sizeBytes };
    });
  }

  /** Every node with what a copy of it stands on. What is closed and not clean is sealed by the commit; nobody opens it before that. */
  #nodesOf(nodes: readonly NodeRow[], asOfInstant: ReadonlyMap<number, Live>, switched: readonly Switched[], closed: readonly Closed[]): SealedNode[] {
    const { meta } = this.#parts;
    const sealed = new Map<number, number>([
      ...switched.map(({ before, sealedLayerId }) => [before.nodeId, sealedLayerId] as const), ...closed.map(({ node, active }) => [node.id, active.id] as const),
    ]);
    return nodes.map((node) => {
      if (node.layerId === null) return { node, foundation: null };
      const live = { ...node, ...asOfInstant.get(node.id) };
      const layerId = sealed.get(node.id);
      if (layerId !== undefined) return { node: live, foundation: { backingId: layerId, backingLimitBytes: null } };
      const active = meta.layers.byId(node.layerId);
      if (active === undefined) throw new Error(`the active layer of node ${node.id} is gone`);
      return { node: live, foundation: foundationBelow(active) };
    });
  }

  /** Layers that were made ready and not used. */
  #dropPrepared(): void {
    const { files } = this.#parts;
    const unused = [...this.#prepared.values()];
    this.#prepared.clear();
    if (unused.length === 0) return;
    for (const { file, below } of unused) {
      files.release(file);
      files.release(below);
      // The layer below is still written to: nobody may find this descriptor, or what was known of the file, later.
      files.forgetIdle(below.layerId);
    }
    this.#forget(unused.map(({ layer }) => layer));
  }

  #forget(layers: readonly LayerRow[]): void {
    const { meta, files } = this.#parts;
    for (const layer of layers) meta.layers.prepared.delete(layer.id);
    try {
      meta.transaction(() => { for (const layer of layers) meta.layers.remove(layer.id); });
      for (const layer of layers) files.unlink(layer.id);
    } catch (thrown) {
      // Rows and files that nothing refers to: the next server takes them away.
      if (toOffshootError(thrown).kind === 'internal') throw thrown;
    }
  }
}

interface Instant {
  readonly switched: readonly Switched[];
  readonly closed: readonly Closed[];
  readonly nodes: readonly SealedNode[];
  readonly timeUs: number;
}

/** Steps 5 and 6: what the database does not know yet. */
class Pending<T> implements PendingSeal {
  readonly #parts: SealParts;
  readonly #wish: SealWish<T>;
  readonly #instant: Instant;
  readonly #gateMs: number;
  #running: Promise<void> | null = null;
  #isDone = false;
  #outcome: { readonly value: T } | { readonly failure: unknown } | null = null;

  constructor(parts: SealParts, wish: SealWish<T>, instant: Instant, gateMs: number) {
    this.#parts = parts;
    this.#wish = wish;
    this.#instant = instant;
    this.#gateMs = gateMs;
    parts.committer.addSeal(this);
    for (const { node } of instant.closed) parts.disks.settleBeforeOpening(node.id, this);
  }

  async settle(): Promise<void> {
    if (this.#isDone) return;
    this.#running ??= this.#syncAndCommit().finally(() => { this.#running = null; });
    await this.#running;
  }

  settleNow(): void {
    if (this.#isDone) return;
    const failed = new Set<Switched>();
    for (const entry of this.#instant.switched) {
      try {
        this.#parts.committer.syncNow(entry.before);
      } catch {
        // Its disk is faulted, and says so to whoever asks.
        failed.add(entry);
      }
    }
    this.#commit(failed);
  }

  /** Waits for the commit. When there is no room for it now the seal stays, the wish is given up, and whoever flushes tries again. */
  async settleOrGiveUp(): Promise<void> {
    try {
      await this.settle();
    } catch (thrown) {
      this.#outcome ??= { failure: thrown };
    }
  }

  result(): SealResult<T> {
    if (this.#outcome === null) throw new Error('the seal has no outcome');
    if ('failure' in this.#outcome) throw this.#outcome.failure;
    return { value: this.#outcome.value, gateMs: this.#gateMs, sealed: this.#instant.switched.length + this.#instant.closed.length };
  }

  async #syncAndCommit(): Promise<void> {
    const { committer } = this.#parts;
    const failed = new Set<Switched>();
    await Promise.all(this.#instant.switched.map(async (entry) => {
      // Whoever cannot wait may finish the seal, and close the file, while this sync still waits for another one.
      const letGo = entry.before.hold();
      try {
        if (await committer.sync(entry.before) !== null) failed.add(entry);
      } finally {
        letGo();
      }
    }));
    // Somebody who could not wait may have done it meanwhile.
    if (!this.#isDone) this.#commit(failed);
  }

  #commit(failed: ReadonlySet<Switched>): void {
    const { committer, meta } = this.#parts;
    const healthy = this.#instant.switched.filter((entry) => !failed.has(entry));
    let outcome = this.#outcome;
    try {
      committer.commitSealed(healthy.map((entry) => entry.before), () => {
        for (const { before, sealedLayerId, active, sizeBytes } of healthy) attachSealed(meta, { id: before.nodeId }, sealedLayerId, active, sizeBytes);
        for (const { node, active } of this.#instant.closed) insertActive(meta, node, active, node.sizeBytes);
        outcome ??= failed.size > 0 ? { failure: faultedOf(failed) } : this.#fulfil();
      });
    } catch (thrown) {
      if (isInDoubt(thrown)) {
        for (const entry of this.#instant.switched) committer.fault(entry.before, thrown);
        for (const { node } of this.#instant.closed) this.#parts.faultNode(node.id, thrown.message);
        this.#outcome = { failure: thrown };
        this.#end([], this.#instant.switched);
      }
      throw thrown;
    }
    this.#outcome = outcome;
    this.#end(healthy, [...failed]);
  }

  /** What the caller wants is undone by itself when it cannot be: the disks are sealed all the same. */
  #fulfil(): { readonly value: T } | { readonly failure: unknown } {
    try {
      return { value: this.#parts.meta.transaction(() => this.#wish.commit(this.#instant.nodes, this.#instant.timeUs)) };
    } catch (thrown) {
      if (!isOperatingError(thrown) || 'sqliteCode' in thrown.context) throw thrown;
      return { failure: thrown };
    }
  }

  #end(healthy: readonly Switched[], failed: readonly Switched[]): void {
    const { committer, disks, files, meta, notePath } = this.#parts;
    this.#isDone = true;
    for (const { before, active } of [...healthy, ...failed]) {
      committer.endSeal(before);
      meta.layers.prepared.delete(active.id);
      files.release(before.activeFile());
    }
    for (const { node } of this.#instant.closed) disks.settled(node.id);
    committer.removeSeal(this);
    // The new layers of faulted disks are nobody's; the disks read from their files until they are closed.
    removeSealNote(notePath);
  }
}

function faultedOf(failed: ReadonlySet<Switched>): OffshootError {
  const [first] = failed;
  return new OffshootError('faulted', 'a disk could not be made durable and is faulted now; see `offshoot show` for the reason', { nodeId: first?.before.nodeId ?? 0 });
}

/** Null when what was written to the file is on the disk. One that cannot be opened is thrown: that says nothing of its data. */
async function syncPath(file: string): Promise<OffshootError | null> {
  let handle: fs.promises.FileHandle;
  try {
    handle = await fs.promises.open(file, 'r+');
  } catch (thrown) {
    const error = toOffshootError(thrown);
    // A clone's file is made when it is first opened.
    if (error.kind === 'not-found') return null;
    throw error;
  }
  try {
    await handle.datasync();
    return null;
  } catch (thrown) {
    return toOffshootError(thrown);
  } finally {
    await handle.close();
  }
}
