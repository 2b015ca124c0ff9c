/**
 * Limits of containers: what is charged to each, measured; how much room is left, in shared memory; what is refused at the limit.
 *
 * Main thread. What counts is said in `accounting.ts` (charged). `look` measures and sets the room of each limit; between two looks first touches of
 * blocks take from it themselves (`hot/room.ts`), so that a limit is not overshot by however fast guests write. What was taken while the
 * files were looked at may be in the measure or not: it is taken off once more, which errs towards refusing early, by what was
 * written in that moment. Writes of owned blocks into holes take from the room when less than 256 MiB are left; with more they are found by the next look.
 *
 * A look costs what an account costs: nothing without limits, under a millisecond for a few disks, some 100 ms for 10,000 clones. It is not made more
 * often than lets it take a twentieth of the main thread's time; discards and removals are seen as room by then.
 *
 * At the limit are refused: writes that need blocks, clones, imports, snapshots. What a rename brings from another container is charged from the next
 * look on, and not refused. Nothing here touches what is owned, and nothing another container.
 */
import { Account } from './accounting.js';
import { OffshootError } from './errors.js';
import { QUOTAS_MAX, type SharedState } from './hot/shared-state.js';
import type { LayerFiles } from './layer-files.js';
import type { MetaStore } from './meta/meta-store.js';
import { ROOT_ID } from './meta/rows.js';
import type { OpenDisks } from './open-disks.js';
import { BLOCK_BYTES } from './units.js';

export interface QuotaState {
  readonly nodeId: number;
  readonly limitBytes: number;
  /** As of the last look. */
  readonly usedBytes: number;
  readonly isReached: boolean;
}

export interface QuotaChange extends QuotaState {
  readonly container: string;
}

export interface QuotaParts {
  readonly meta: MetaStore;
  readonly files: LayerFiles;
  readonly disks: OpenDisks;
  readonly shared: SharedState;
  readonly onChange: (change: QuotaChange) => void;
}

interface Limit {
  readonly nodeId: number;
  readonly slot: number;
  limitBytes: number;
  usedBytes: number;
  isReached: boolean;
  refusals: number;
  /** What was free when something was refused last: less than that wanted, if it wanted much. */
  refusedFreeBytes: number;
}

/** The room of a limit is one 32-bit word: 4 TiB at a time are enough until the next look. */
const ROOM_BLOCKS_MAX = 2 ** 30;
/** A look may take one part in so many of the time. */
const LOOK_PART = 20;
/** How much more must be free than at the last refusal for a limit to count as not reached any more: one part in so many of it, and at most this much. */
const RELIEF_PART = 100;
const RELIEF_BYTES_MAX = 64 * 1024 * 1024;

export class Quotas {
  readonly #parts: QuotaParts;
  readonly #limits = new Map<number, Limit>();
  #nextLookMs = 0;

  constructor(parts: QuotaParts) {
    this.#parts = parts;
    for (const { nodeId, limitBytes } of parts.meta.quotas.all()) this.#take(nodeId, limitBytes);
    this.look();
  }

  /** Gives a container a limit, or another one. One below what is charged already refuses from now on, and takes nothing away. */
  set(nodeId: number, limitBytes: number): QuotaState {
    if (!this.#limits.has(nodeId) && this.#limits.size >= QUOTAS_MAX) {
      throw new OffshootError('not-supported', `${QUOTAS_MAX} containers have limits already, which is as many as there can be: take one away first (offshoot quota rm)`, { nodeId });
    }
    this.#parts.meta.quotas.set(nodeId, limitBytes);
    const limit = this.#limits.get(nodeId) ?? this.#take(nodeId, limitBytes);
    limit.limitBytes = limitBytes;
    this.lookNow();
    return this.of(nodeId)!;
  }

  /** False when there was none. */
  remove(nodeId: number): boolean {
    const removed = this.#parts.meta.quotas.remove(nodeId);
    this.#limits.delete(nodeId);
    this.#giveSlots();
    return removed;
  }

  /** As they are now. */
  list(): QuotaState[] {
    this.lookNow();
    return this.states();
  }

  /** As of the last look. */
  states(): QuotaState[] {
    return Array.from(this.#limits.values(), ({ nodeId, limitBytes, usedBytes, isReached }) => ({ nodeId, limitBytes, usedBytes, isReached }));
  }

  /** The limit of the container that a node lies in, as of the last look. */
  of(nodeId: number): QuotaState | null {
    if (this.#limits.size === 0) return null;
    const container = this.#containerOf(nodeId);
    return (container === null ? undefined : this.#limits.get(container)) ?? null;
  }

  /** For an open disk's shared memory; 0: no limit. */
  slotOf(nodeId: number): number {
    const state = this.of(nodeId);
    return state === null ? 0 : this.#limits.get(state.nodeId)!.slot;
  }

  /**
   * Throws `quota` when something that takes so many bytes may not be made in these containers or directories. What is about to be made is not
   * to be written by guests as well: until the next look has measured it, it is taken from the room.
   */
  assertRoom(parentIds: readonly number[], bytes = 1): void {
    const limits = this.#limitsAbove(parentIds);
    if (limits.length === 0) return;
    this.lookNow();
    for (const limit of limits) if (limit.usedBytes + bytes > limit.limitBytes) throw this.#refusal(limit, bytes);
    for (const { slot } of limits) this.#parts.shared.addRoom(slot, -Math.min(Math.floor(bytes / BLOCK_BYTES), ROOM_BLOCKS_MAX));
  }

  /** The same for what comes in pieces and is not charged yet: `bytes` is all of it so far. Nothing is measured as long as there is room by the last look. */
  assertRoomSoFar(parentId: number, bytes: number): void {
    for (const limit of this.#limitsAbove([parentId])) {
      if (limit.usedBytes + bytes <= limit.limitBytes) continue;
      this.lookNow();
      if (limit.usedBytes + bytes > limit.limitBytes) throw this.#refusal(limit, bytes);
    }
  }

  /** Takes room for blocks that are reserved outside of the data path; throws `quota` when there is not enough. */
  takeRoom(nodeId: number, bytes: number): void {
    const slot = this.slotOf(nodeId);
    const blocks = Math.ceil(bytes / BLOCK_BYTES);
    if (slot === 0 || (blocks < ROOM_BLOCKS_MAX && this.#parts.shared.takeRoom(slot, blocks))) return;
    throw this.#refusal(this.#limits.get(this.of(nodeId)!.nodeId)!, bytes);
  }

  /** Why a write of this node may have been refused for want of room; null: it has no limit. */
  refusalOf(nodeId: number): OffshootError | null {
    const state = this.of(nodeId);
    return state === null ? null : this.#refusal(state, 1);
  }

  /** Room was made, or is about to be asked for: the next tick looks. */
  lookSoon(): void {
    this.#nextLookMs = 0;
  }

  lookNow(): void {
    this.lookSoon();
    this.look();
  }

  /** Measures and sets the room of all limits, unless the last look was too short a while ago. Called by the clock. */
  look(): void {
    const startMs = performance.now();
    if (this.#limits.size === 0 || startMs < this.#nextLookMs) return;
    const { meta, files, shared } = this.#parts;
    const limits = [...this.#limits.values()];
    const before = limits.map(({ slot }) => shared.room(slot));
    const account = new Account(meta.space.read(), files);
    for (const { nodeId } of limits) if (!account.nodes.has(nodeId)) this.#limits.delete(nodeId);
    const charged = account.charged(new Set(this.#limits.keys()));
    const removed = this.#removedBytes();
    limits.forEach((limit, i) => {
      limit.usedBytes = (charged.get(limit.nodeId) ?? 0) + (removed.get(limit.slot) ?? 0);
      const now = shared.room(limit.slot);
      const takenMeanwhile = Math.max(0, before[i]! - now);
      const room = Math.min(ROOM_BLOCKS_MAX, Math.floor((limit.limitBytes - limit.usedBytes) / BLOCK_BYTES) - takenMeanwhile);
      shared.addRoom(limit.slot, Math.max(0, room) - now);
      this.#judge(limit);
    });
    this.#giveSlots();
    const endMs = performance.now();
    this.#nextLookMs = endMs + LOOK_PART * (endMs - startMs);
  }

  #limitsAbove(nodeIds: readonly number[]): Limit[] {
    if (this.#limits.size === 0) return [];
    return [...new Set(nodeIds.map((id) => this.#containerOf(id)))].flatMap((id) => (id === null ? [] : (this.#limits.get(id) ?? [])));
  }

  #judge(limit: Limit): void {
    const { shared, meta, onChange } = this.#parts;
    const refusals = shared.roomRefusals(limit.slot);
    const free = limit.limitBytes - limit.usedBytes;
    const relief = Math.min(RELIEF_BYTES_MAX, limit.limitBytes / RELIEF_PART);
    if (refusals !== limit.refusals || free < BLOCK_BYTES) limit.refusedFreeBytes = Math.max(0, free);
    const isReached = refusals !== limit.refusals || free < BLOCK_BYTES || (limit.isReached && free < limit.refusedFreeBytes + relief);
    limit.refusals = refusals;
    if (isReached === limit.isReached) return;
    limit.isReached = isReached;
    onChange({ ...limit, container: meta.nodes.pathOf(limit.nodeId) });
  }

  /** Tells every open disk whose limit it has: one may have been moved, or the limit is new or gone. What was removed while it is open keeps its limit. */
  #giveSlots(): void {
    const slots = new Set(Array.from(this.#limits.values(), ({ slot }) => slot));
    for (const { nodeId, shared } of this.#parts.disks.all()) {
      const had = shared.quotaSlot();
      if (had === 0 && slots.size === 0) continue;
      const slot = slots.has(had) && this.#containerOf(nodeId) === null ? had : this.slotOf(nodeId);
      if (had !== slot) shared.setQuotaSlot(slot);
    }
  }

  /** By slot, what files take that were removed and are still open: or whoever removes a file first could write without a limit. */
  #removedBytes(): Map<number, number> {
    const { disks, files } = this.#parts;
    const sums = new Map<number, number>();
    for (const { nodeId, layerId, shared } of disks.all()) {
      const slot = shared.quotaSlot();
      if (slot === 0 || this.#containerOf(nodeId) !== null) continue;
      sums.set(slot, (sums.get(slot) ?? 0) + files.allocatedBytes(layerId));
    }
    return sums;
  }

  #take(nodeId: number, limitBytes: number): Limit {
    const taken = new Set(Array.from(this.#limits.values(), ({ slot }) => slot));
    let slot = 1;
    while (taken.has(slot)) slot += 1;
    if (slot > QUOTAS_MAX) throw new Error(`there are more limits than ${QUOTAS_MAX}`);
    const limit = { nodeId, slot, limitBytes, usedBytes: 0, isReached: false, refusals: this.#parts.shared.roomRefusals(slot), refusedFreeBytes: 0 };
    this.#limits.set(nodeId, limit);
    return limit;
  }

  #refusal(limit: Pick<QuotaState, 'nodeId' | 'limitBytes' | 'usedBytes'>, bytes: number): OffshootError {
    const container = this.#parts.meta.nodes.pathOf(limit.nodeId);
    return new OffshootError('quota',
      `the limit of the container ${container} leaves no room for this: ${limit.usedBytes} of ${limit.limitBytes} bytes are used${bytes > BLOCK_BYTES ? `, and ${bytes} more are needed` : ''}; ` +
      `remove what is not needed in it, or raise the limit (offshoot quota set ${container} SIZE)`,
      { container, limitBytes: limit.limitBytes, usedBytes: limit.usedBytes });
  }

  /** The container that a node lies in; null for one without a name. */
  #containerOf(nodeId: number): number | null {
    const { nodes } = this.#parts.meta;
    for (let node = nodes.byId(nodeId); node !== undefined; node = nodes.byId(node.parentId)) {
      if (node.parentId === ROOT_ID) return node.id;
      if (node.parentId === null) return null;
    }
    return null;
  }
}
