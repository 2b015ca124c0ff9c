/**
 * One run of the store-level model: a disk or file that is in use, what it must hold, and all that was made of it on the way, with
 * what that must hold for ever. The operations come from `unit/blockstore-model.test.ts`, which shrinks what fails.
 */
import path from 'node:path';
import { expect } from 'vitest';

import { checkShared } from '../../../blockstore/check-shared.js';
import { OffshootError } from '../../../blockstore/errors.js';
import { enterDisk, leaveDisk, REQUEST_BYTES_MAX } from '../../../blockstore/hot/context.js';
import { IoBuffer } from '../../../blockstore/hot/door.js';
import { fillStep, newFillProgress } from '../../../blockstore/hot/fill-step.js';
import { copyMerged } from '../../../blockstore/merge-copy.js';
import { cheapestPair } from '../../../blockstore/merge.js';
import { ROOT_ID, type NodeRow } from '../../../blockstore/meta/rows.js';
import { BLOCK_BYTES } from '../../../blockstore/units.js';
import { kindOf, patterned, type TestStore } from '../blockstore-fixture.js';
import { snapshotsOver } from '../snapshots-fixture.js';
import { firstDifference, patternBytes } from './pattern.js';

/** Where something is: near a boundary as a rule, because that is where mistakes live. */
export type Place = { readonly block: number; readonly delta: number } | { readonly part: number };

export type Operation =
  | { readonly type: 'read' | 'discard'; readonly at: Place; readonly lengthBytes: number }
  | { readonly type: 'write'; readonly at: Place; readonly lengthBytes: number; readonly seed: number }
  | { readonly type: 'resize'; readonly sizeBytes: number }
  | { readonly type: 'fill'; readonly steps: number }
  | { readonly type: 'seal' | 'move'; readonly copyOnRead: boolean }
  /** Shares blocks of the disk itself (0) or of one that is kept. */
  | { readonly type: 'copy'; readonly from: number; readonly source: number; readonly target: number; readonly blocks: number }
  /** The same into a new disk. */
  | { readonly type: 'copy to new'; readonly from: number; readonly source: number; readonly blocks: number }
  /** Makes layers that nobody else stands on, and merges some. */
  | { readonly type: 'deepen'; readonly at: number; readonly blocks: readonly number[]; readonly merges: number }
  | { readonly type: 'snapshot'; readonly ofAll: boolean }
  /** To one that was taken before; or one is taken, and the disk written to. */
  | { readonly type: 'revert'; readonly to: number; readonly at: Place; readonly lengthBytes: number }
  /** A clone goes to a newer version of its image; each of the two has another content at one block. */
  | { readonly type: 'rebase'; readonly own: number; readonly newer: number }
  | { readonly type: 'flush' | 'commit' | 'close' | 'kill' | 'complete' | 'promote' };

export interface Scenario {
  readonly kind: 'disk' | 'file';
  readonly base: 'image' | 'in place' | 'in place, padded';
  readonly sizeBytes: number;
  readonly holesBits: number;
  readonly copyOnRead: boolean;
  readonly operations: readonly Operation[];
}

interface Kept {
  readonly node: NodeRow;
  readonly content: Buffer;
}

interface Snapshot {
  readonly reference: string;
  readonly disk: string;
  readonly content: Buffer;
}

/** Bytes behind the end of a file where a write may begin. */
const GAP_BYTES = 20_000;
const FILE_BYTES_MAX = 400_000;
const PADDING_BYTES = 5000;

/** One scenario under way: the disk that is in use, and what it must hold. */
export class StoreRun {
  private readonly fixture: TestStore;
  private readonly scenario: Scenario;
  private readonly buffer = new IoBuffer(REQUEST_BYTES_MAX);
  private readonly kept: Kept[] = [];
  private readonly nodes: NodeRow[] = [];
  private readonly snapshots: Snapshot[] = [];
  private readonly name: string;
  /** The directory that all of it lies in. */
  private readonly container: NodeRow;
  private node: NodeRow;
  private model: Buffer;
  /** How many layers were merged, images rebased, snapshots gone back to: none of these can be taken for granted. */
  merges = 0;
  rebases = 0;
  reverts = 0;

  constructor(fixture: TestStore, run: number, data: Scenario) {
    this.fixture = fixture;
    this.scenario = data;
    this.name = `run-${run}`;
    const { kind } = data;
    this.container = fixture.store.meta.nodes.insert({
      parentId: ROOT_ID, name: `container-${run}`, kind: 'directory', mode: 0o700, uid: 0, gid: 0, sizeBytes: 0, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId: null, linkTarget: null,
      copyOnRead: false, fault: null,
    });
    const content = patterned(run, data.sizeBytes, (block) => (Math.floor(data.holesBits / 2 ** (block % 8)) % 2) === 1);
    if (data.base === 'image') {
      this.node = this.keepNode(fixture.image(this.name, content, { kind }));
      this.kept.push({ node: this.node, content });
      this.node = this.keepNode(fixture.clone(this.node, `${this.name}-clone`, data));
      this.model = Buffer.from(content);
    } else {
      const sizeBytes = content.length + (data.base === 'in place' ? 0 : PADDING_BYTES);
      this.node = this.keepNode(fixture.inPlace(this.name, content, { kind, sizeBytes, copyOnRead: data.copyOnRead }).node);
      this.model = Buffer.concat([content], sizeBytes);
    }
    fixture.acquire(this.node);
  }

  async apply(operation: Operation): Promise<void> {
    const { fixture, node } = this;
    switch (operation.type) {
      case 'read': {
        const at = this.offset(operation.at, this.model.length + 100);
        this.compare(this.model.subarray(at, at + operation.lengthBytes), fixture.read(node, at, operation.lengthBytes), at);
        return;
      }
      case 'write': {
        this.write(operation);
        return;
      }
      case 'discard': {
        const at = this.offset(operation.at, this.model.length);
        fixture.store.data.discard(node.id, at, operation.lengthBytes);
        this.model.fill(0, at, Math.min(this.model.length, at + operation.lengthBytes));
        this.compare(this.model.subarray(at, at + 4), fixture.read(node, at, 4), at);
        return;
      }
      case 'resize':
        fixture.store.resize(node.id, operation.sizeBytes);
        this.model = Buffer.concat([this.model.subarray(0, operation.sizeBytes)], operation.sizeBytes);
        return;
      case 'fill':
        this.fill(operation.steps);
        return;
      case 'seal':
        this.keep(fixture.clone(node, this.newName(), operation));
        return;
      case 'move': {
        // The source goes on as one of those that must not change, and the clone is written to.
        const clone = this.keepNode(fixture.clone(node, this.newName(), operation));
        this.kept.push({ node, content: Buffer.from(this.model) });
        fixture.store.disks.release(node.id);
        this.node = clone;
        fixture.acquire(clone);
        return;
      }
      case 'flush':
        await fixture.store.flush(node.id);
        return;
      case 'commit':
        await fixture.store.committer.commitAll();
        return;
      case 'close':
        fixture.store.disks.release(node.id);
        fixture.store.disks.retireIdle(node.id);
        fixture.acquire(node);
        return;
      case 'copy':
        this.copy(operation);
        return;
      case 'copy to new':
        this.copyToNew(operation);
        return;
      case 'snapshot':
        await this.snapshot(operation.ofAll);
        return;
      case 'revert':
        await this.revert(operation);
        return;
      case 'rebase':
        await this.rebase(operation.own, operation.newer);
        return;
      case 'deepen':
        this.deepen(operation);
        for (let merges = 0; merges < operation.merges; merges += 1) await this.merge();
        return;
      case 'promote':
        expect([undefined, 'invalid-argument']).toContain(kindOf(() => fixture.store.promote(node.id)));
        return;
      case 'complete':
        this.fill(Number.MAX_SAFE_INTEGER);
        await fixture.store.flush(node.id);
        fixture.store.markComplete(node.id);
        return;
      case 'kill':
        fixture.kill();
        fixture.acquire(node);
    }
  }

  /** Compares everything, then takes it away, clones first or sources first. */
  async finish(): Promise<void> {
    const { fixture } = this;
    const { meta, files } = fixture.store;
    const steps = checkShared({ parts: { meta, files }, add: ({ message }) => { throw new Error(message); }, disksOn: () => [] });
    while (steps.next().done !== true) continue;
    this.compare(this.model, fixture.read(this.node, 0, this.model.length + 10), 0);
    expectNoFalseHoles(fixture, this.node, this.model);
    this.kept.push({ node: this.node, content: this.model });
    fixture.store.disks.release(this.node.id);
    fixture.store.disks.retireIdle(this.node.id);
    for (const { node, content } of this.kept) {
      this.compare(content, fixture.content(node), 0);
      expect(fixture.row(node).sizeBytes).toBe(content.length);
    }
    const removal = async (): Promise<void> => {
      for (const { reference } of this.snapshots) await snapshotsOver(fixture).remove(reference, { keepData: true });
    };
    // Before what it was taken of, or after.
    if (this.scenario.copyOnRead) await removal();
    if (this.scenario.holesBits % 2 === 0) this.nodes.reverse();
    for (const node of this.nodes) fixture.store.discardNode(node.id);
    if (!this.scenario.copyOnRead) await removal();
  }

  private keepNode(node: NodeRow): NodeRow {
    this.fixture.store.meta.nodes.move(node.id, this.container.id, node.name);
    this.nodes.push(node);
    return node;
  }

  /** A name that no node of this run has. */
  private newName(): string {
    return `${this.name}-${this.nodes.length}`;
  }

  private keep(node: NodeRow): void {
    this.kept.push({ node: this.keepNode(node), content: Buffer.from(this.model) });
  }

  private write(operation: Extract<Operation, { type: 'write' }>): void {
    const { fixture, node } = this;
    const grows = this.scenario.kind === 'file' && this.model.length < FILE_BYTES_MAX;
    const at = this.offset(operation.at, grows ? this.model.length + GAP_BYTES : this.model.length);
    const data = patternBytes(operation.seed, at, grows ? operation.lengthBytes : Math.min(operation.lengthBytes, this.model.length - at));
    fixture.write(node, at, data);
    const end = at + data.length;
    if (end > this.model.length) this.model = Buffer.concat([this.model], end);
    data.copy(this.model, at);
    this.compare(this.model.subarray(Math.max(0, at - 10), end + 10), fixture.read(node, Math.max(0, at - 10), end + 10 - Math.max(0, at - 10)), Math.max(0, at - 10));
  }

  private copy({ from, source, target, blocks }: Extract<Operation, { type: 'copy' }>): void {
    const { fixture, node } = this;
    const other = from === 0 ? undefined : this.kept[from % Math.max(1, this.kept.length)];
    const content = Buffer.from(other?.content ?? this.model);
    const mayGrow = this.scenario.kind === 'file' && this.model.length < FILE_BYTES_MAX;
    const targetBlocks = Math.ceil(this.model.length / BLOCK_BYTES) + (mayGrow ? 5 : 0);
    if (content.length === 0 || targetBlocks === 0) return;
    const sourceAtBytes = (source % Math.ceil(content.length / BLOCK_BYTES)) * BLOCK_BYTES;
    const targetAtBytes = (target % targetBlocks) * BLOCK_BYTES;
    let lengthBytes = Math.min(blocks * BLOCK_BYTES, content.length - sourceAtBytes);
    if (!mayGrow) lengthBytes = Math.min(lengthBytes, Math.max(this.model.length, targetAtBytes) - targetAtBytes);
    const isOdd = lengthBytes % BLOCK_BYTES !== 0;
    if (isOdd && (sourceAtBytes + lengthBytes < content.length || targetAtBytes + lengthBytes < this.model.length)) lengthBytes -= lengthBytes % BLOCK_BYTES;
    if (lengthBytes === 0) return;
    fixture.store.cloneRanges(other?.node.id ?? node.id, node.id, [{ sourceAtBytes, targetAtBytes, lengthBytes }]);
    const end = targetAtBytes + lengthBytes;
    if (end > this.model.length) this.model = Buffer.concat([this.model], end);
    content.copy(this.model, targetAtBytes, sourceAtBytes, sourceAtBytes + lengthBytes);
    this.compare(this.model.subarray(targetAtBytes, end + 10), fixture.read(node, targetAtBytes, lengthBytes + 10), targetAtBytes);
  }

  private copyToNew({ from, source, blocks }: Extract<Operation, { type: 'copy to new' }>): void {
    const { fixture, node } = this;
    const other = from === 0 ? undefined : this.kept[from % Math.max(1, this.kept.length)];
    const content = Buffer.from(other?.content ?? this.model);
    const sourceAtBytes = (source % Math.ceil(content.length / BLOCK_BYTES)) * BLOCK_BYTES;
    const lengthBytes = Math.min(blocks * BLOCK_BYTES, content.length - sourceAtBytes);
    const made = fixture.store.cloneRangesToNew(
      other?.node.id ?? node.id, { parentId: ROOT_ID, name: this.newName(), mode: 0o600, uid: 0, gid: 0, copyOnRead: false }, BLOCK_BYTES + lengthBytes,
      [{ sourceAtBytes, targetAtBytes: BLOCK_BYTES, lengthBytes }],
    );
    this.kept.push({ node: this.keepNode(made), content: Buffer.concat([Buffer.alloc(BLOCK_BYTES), content.subarray(sourceAtBytes, sourceAtBytes + lengthBytes)]) });
  }

  /** Of the disk alone, or of all that there is: what is frozen must not change any more, whatever comes. */
  private async snapshot(ofAll: boolean): Promise<void> {
    const { fixture, node, container } = this;
    const { meta } = fixture.store;
    const name = `at-${this.snapshots.length}`;
    const reference = `${container.name}${ofAll ? '' : `/${node.name}`}@${name}`;
    await snapshotsOver(fixture).create({ reference, quiesce: null });
    this.snapshots.push({ reference, disk: node.name, content: Buffer.from(this.model) });
    const frozen = (disk: string): NodeRow => meta.nodes.byPath(`${container.name}/.snapshots/${name}/${disk}`)!;
    const others = ofAll ? this.kept.filter((kept) => !kept.node.frozen) : [];
    this.kept.push({ node: frozen(node.name), content: Buffer.from(this.model) }, ...others.map((kept) => ({ node: frozen(kept.node.name), content: kept.content })));
  }

  private async revert({ to, at, lengthBytes }: Extract<Operation, { type: 'revert' }>): Promise<void> {
    const { fixture, node } = this;
    const candidates = (): Snapshot[] => this.snapshots.filter(({ disk, reference }) => disk === node.name && reference.includes('/'));
    if (candidates().length === 0) {
      await this.snapshot(false);
      this.write({ type: 'write', at, lengthBytes, seed: 8_000_001 + 2 * to });
    }
    const snapshot = candidates()[to % candidates().length]!;
    fixture.store.disks.release(node.id);
    await snapshotsOver(fixture).revert(snapshot.reference);
    this.reverts += 1;
    fixture.acquire(node);
    this.model = Buffer.from(snapshot.content);
    this.compare(this.model, fixture.read(node, 0, this.model.length + 10), 0);
  }

  /** One layer after the other, each with a few blocks from `at` on. */
  private deepen({ at, blocks }: Extract<Operation, { type: 'deepen' }>): void {
    const { store } = this.fixture;
    for (const [index, count] of blocks.entries()) {
      const block = (at + index) % Math.ceil(this.model.length / BLOCK_BYTES);
      this.write({ type: 'write', at: { block, delta: 0 }, lengthBytes: count * BLOCK_BYTES, seed: 9_000_001 + 2 * (at + index) });
      const clone = this.fixture.clone(this.node, `${this.name}-sealing`);
      store.meta.nodes.orphan(clone.id);
      store.discardNode(clone.id);
    }
  }

  private async merge(): Promise<void> {
    const { store, storeDir } = this.fixture;
    const pair = cheapestPair(store.meta, this.fixture.layer(this.node).id);
    if (pair === null) return;
    this.merges += 1;
    const file = path.join(storeDir, 'import', `${this.name}.merge`);
    if (pair.costBytes > 0) await copyMerged(store, pair, file, { pace: async () => { await Promise.resolve(); } });
    store.merge(pair, pair.costBytes > 0 ? file : null);
    this.compare(this.model, this.fixture.read(this.node, 0, this.model.length + 10), 0);
  }

  private async rebase(own: number, newer: number): Promise<void> {
    const { fixture } = this;
    const [clone, image] = [own, newer].map((where, index) => {
      const node = this.keepNode(fixture.clone(this.node, this.newName()));
      const content = Buffer.from(this.model);
      const at = (where % Math.ceil(content.length / BLOCK_BYTES)) * BLOCK_BYTES;
      const data = patternBytes(7_000_001 + 2 * this.nodes.length + index, 0, Math.min(BLOCK_BYTES, content.length - at));
      fixture.acquire(node);
      fixture.write(node, at, data);
      fixture.store.disks.release(node.id);
      data.copy(content, at);
      return { node, content, at, end: at + data.length };
    }) as [Kept & { at: number; end: number }, Kept & { at: number; end: number }];
    this.kept.push(image);
    const before = this.model.subarray(clone.at, clone.end);
    const isInTheWay = !image.content.subarray(clone.at, clone.end).equals(before);
    let content = clone.content;
    try {
      const outcome = await fixture.store.rebase(clone.node.id, image.node.id, false);
      expect(outcome).toMatchObject({ rebased: !isInTheWay, conflicts: isInTheWay ? [{ offsetBytes: clone.at, lengthBytes: clone.end - clone.at }] : [] });
      if (outcome.rebased) {
        this.rebases += 1;
        content = Buffer.from(image.content);
        clone.content.copy(content, clone.at, clone.at, clone.end);
      }
    } catch (thrown) {
      // Blocks from elsewhere are not compared.
      if (!(thrown instanceof OffshootError) || thrown.kind !== 'not-supported') throw thrown;
    }
    this.kept.push({ node: clone.node, content });
    this.compare(content, fixture.content(clone.node), 0);
  }

  private fill(steps: number): void {
    const { context } = this.fixture.store;
    const { shared } = this.fixture.disk(this.node);
    const progress = newFillProgress();
    this.buffer.bytes.fill(0xee);
    expect(enterDisk(context, shared)).toBe(true);
    for (let step = 0; step < steps; step += 1) {
      const atEnd = fillStep(context, shared, this.buffer, progress);
      expect(progress.failed).toBe(0);
      if (atEnd) break;
    }
    leaveDisk(context, shared);
  }

  private offset(at: Place, limitBytes: number): number {
    const wanted = 'part' in at ? Math.floor(at.part * limitBytes) : at.block * BLOCK_BYTES + at.delta;
    return Math.min(Math.max(0, wanted < limitBytes ? wanted : wanted % limitBytes), limitBytes - 1);
  }

  private compare(expected: Buffer, actual: Buffer, offsetBytes: number): void {
    const difference = firstDifference(expected, actual, offsetBytes);
    if (difference !== null) throw new Error(difference);
  }
}

/** Follows data and holes from end to end: whatever is called a hole reads as zeros, and the two take turns. */
function expectNoFalseHoles(fixture: TestStore, node: NodeRow, model: Buffer): void {
  let at = 0;
  while (at < model.length) {
    const data = fixture.store.data.seek(node.id, at, true);
    const holeEnd = data < 0 ? model.length : data;
    expect(holeEnd).toBeGreaterThanOrEqual(at);
    expect(model.subarray(at, holeEnd).every((byte) => byte === 0), `the hole from ${at} to ${holeEnd}`).toBe(true);
    if (data < 0) return;
    const hole = fixture.store.data.seek(node.id, data, false);
    expect(hole).toBeGreaterThan(data);
    expect(hole).toBeLessThanOrEqual(model.length);
    at = hole;
  }
}
