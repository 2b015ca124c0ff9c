/**
 * What a disk may hold after a loss: the window model, in small.
 *
 * Every block has a list of states, one for each change that was asked for. After a loss a block is right if and only if it
 * is one of the states between the newest one that a completed flush covers and the newest that was asked for; where
 * sectors can tear, that holds for each sector by itself. A disk is there if its making was answered, is not if its removal
 * was, and may be either in between; all clones of one request are there, or none. After the death of the process
 * alone, everything that was answered is there.
 */
import { patternBytes } from '../model/pattern.js';
import type { StreamSpec } from './streams.js';
import {
  BLOCK_BYTES, answer, contentNow, evidenceOf, judgeDisk, newest, padded, setSize, snapshotOf, statesOf, type DiskWindow, type Snapshot, type TurnedBlock,
} from './window-states.js';


/** What a recorded program says that it is doing: `begin` before, `end` after. */
export type Marker =
  | { readonly op: 'create'; readonly phase: Phase; readonly disk: string; readonly sizeBytes: number; readonly seed: number; readonly holes: number }
  | { readonly op: 'write'; readonly phase: Phase; readonly disk: string; readonly at: number; readonly length: number; readonly seed: number }
  | { readonly op: 'discard'; readonly phase: Phase; readonly disk: string; readonly at: number; readonly length: number }
  | { readonly op: 'flush'; readonly phase: Phase; readonly id: number; readonly disks: readonly string[] }
  | { readonly op: 'clone'; readonly phase: Phase; readonly source: string; readonly targets: readonly string[] }
  | { readonly op: 'snapshot'; readonly phase: Phase; readonly disks: readonly string[]; readonly targets: readonly string[] }
  | { readonly op: 'range'; readonly phase: Phase; readonly source: string; readonly disk: string; readonly ranges: readonly MarkedRange[] }
  | { readonly op: 'copy'; readonly phase: Phase; readonly source: string; readonly disk: string; readonly from: number; readonly to: number; readonly length: number }
  | { readonly op: 'turn'; readonly phase: Phase; readonly made: readonly Turned[]; readonly changed: readonly Turned[]; readonly gone: readonly string[] }
  | { readonly op: 'promote'; readonly phase: Phase; readonly disk: string; readonly origin: string }
  | { readonly op: 'receive'; readonly phase: Phase; readonly stream: StreamSpec }
  | { readonly op: 'received'; readonly phase: Phase; readonly uuid: string; readonly records: number }
  | { readonly op: 'finish' | 'drop'; readonly phase: Phase; readonly uuid: string }
  | { readonly op: 'resize'; readonly phase: Phase; readonly disk: string; readonly sizeBytes: number }
  | { readonly op: 'remove'; readonly phase: Phase; readonly disk: string }
  | { readonly op: 'note'; readonly phase: Phase; readonly text: string };
type Phase = 'begin' | 'end';

/** Blocks of one disk that become blocks of another. */
export interface MarkedRange {
  readonly from: number;
  readonly to: number;
  readonly length: number;
}

/** A disk that one operation makes, or gives another content, together with others: all of it is there, or nothing of it. */
export interface Turned {
  readonly disk: string;
  readonly content: Content;
  /** Blocks that stay what they are; the size, too, when there are any such. */
  readonly except?: readonly number[];
}

/** What another disk holds now; or something new, with writes above it (of zeros where the seed is 0). */
export type Content = { readonly copyOf: string } | Written;

export interface Written {
  readonly sizeBytes: number;
  readonly seed: number;
  readonly holes: number;
  readonly writes: readonly { readonly at: number; readonly length: number; readonly seed: number }[];
}

/** A disk as it was found after the loss. A directory is a disk of no bytes whose name ends with a slash. */
export interface FoundDisk {
  readonly name: string;
  readonly content: Buffer;
  /** Of whom it is a clone. */
  readonly origin?: string | null;
}

/** A stream that is being received, as it was found. */
export interface FoundReceive {
  readonly uuid: string;
  readonly records: number;
}

interface TurnedDisk {
  readonly blocks: readonly TurnedBlock[];
  /** It may get another size. */
  readonly isSized: boolean;
}

interface ReceiveWindow {
  readonly stream: StreamSpec;
  state: 'asked' | 'answered' | 'ending';
  /** So many records were promised to be kept. */
  kept: number;
}

/** `window`: the power went. `answered`: only the process died. */
export type Survival = 'window' | 'answered';

export function contentOf(sizeBytes: number, seed: number, holes: number): Buffer {
  const content = patternBytes(seed, 0, sizeBytes);
  for (let block = 0; holes > 0 && block * BLOCK_BYTES < sizeBytes; block += 1) {
    if (block % holes === holes - 1) content.fill(0, block * BLOCK_BYTES, Math.min(sizeBytes, (block + 1) * BLOCK_BYTES));
  }
  return content;
}

/** All of it. */
export function writtenBytes({ sizeBytes, seed, holes, writes }: Written): Buffer {
  const content = contentOf(sizeBytes, seed, holes);
  for (const write of writes) (write.seed === 0 ? Buffer.alloc(write.length) : patternBytes(write.seed, write.at, write.length)).copy(content, write.at);
  return content;
}

export class WindowModel {
  private readonly disks = new Map<string, DiskWindow>();
  private readonly gone = new Set<string>();
  private readonly flushes = new Map<number, ReadonlyMap<string, Snapshot>>();
  private readonly clones = new Map<string, Snapshot>();
  /** Of the disks of the snapshot that is being taken, at its instant. */
  private snapshots = new Map<string, Snapshot>();
  /** Range clones that were asked for and not answered, by their target: the blocks, with the index of their new state. */
  private readonly ranges = new Map<string, { readonly snapshot: Snapshot; readonly blocks: readonly TurnedBlock[] }>();
  /** The operation of several disks that was asked for and not answered. */
  private turn: { readonly made: readonly string[]; readonly gone: readonly string[]; readonly changed: ReadonlyMap<string, TurnedDisk> } | null = null;
  /** Who was promoted over whom. */
  private readonly promoted = new Map<string, string>();
  private readonly receives = new Map<string, ReceiveWindow>();
  private nextRequest = 1;
  /** What the program was doing last, for reports. */
  lastMarker: Marker | undefined;

  apply(marker: Marker): void {
    this.lastMarker = marker;
    const begins = marker.phase === 'begin';
    switch (marker.op) {
      case 'note': return;
      case 'create':
        if (begins) this.make([marker.disk], contentOf(marker.sizeBytes, marker.seed, marker.holes));
        else this.require(marker.disk).made = 'answered';
        return;
      case 'write':
        if (begins) this.change(marker.disk, marker.at, patternBytes(marker.seed, marker.at, marker.length));
        else answer(this.require(marker.disk));
        return;
      case 'discard': {
        const disk = this.require(marker.disk);
        const end = Math.min(marker.at + marker.length, newest(disk.size));
        if (begins) this.change(marker.disk, marker.at, Buffer.alloc(Math.max(0, end - marker.at)));
        else answer(disk);
        return;
      }
      case 'flush':
        if (begins) this.flushes.set(marker.id, new Map(marker.disks.map((name) => [name, snapshotOf(this.require(name))])));
        else for (const [name, snapshot] of this.flushes.get(marker.id) ?? []) this.makeDurable(name, snapshot);
        return;
      case 'clone': {
        const source = this.require(marker.source);
        if (begins) {
          this.clones.set(marker.source, snapshotOf(source));
          this.make(marker.targets, contentNow(source));
        } else {
          for (const name of marker.targets) this.require(name).made = 'answered';
          this.makeDurable(marker.source, this.clones.get(marker.source)!);
        }
        return;
      }
      case 'snapshot': {
        if (begins) {
          this.snapshots = new Map(marker.disks.map((name) => [name, snapshotOf(this.require(name))]));
          this.makeEach(marker.targets.map((name, i) => ({ name, content: contentNow(this.require(marker.disks[i] ?? '')) })));
          return;
        }
        for (const name of marker.targets) this.require(name).made = 'answered';
        for (const [name, snapshot] of this.snapshots) this.makeDurable(name, snapshot);
        return;
      }
      case 'range': {
        const disk = this.require(marker.disk);
        if (begins) {
          const source = Buffer.from(contentNow(this.require(marker.source)));
          for (const { from, to, length } of marker.ranges) this.change(marker.disk, to, source.subarray(from, from + length));
          const blocks = marker.ranges.flatMap(({ to, length }) => Array.from({ length: Math.ceil(length / BLOCK_BYTES) }, (_, i) => {
            const block = to / BLOCK_BYTES + i;
            return { block, state: disk.blocks[block]!.all.length - 1 };
          }));
          this.ranges.set(marker.disk, { snapshot: snapshotOf(disk), blocks });
        } else {
          answer(disk);
          this.makeDurable(marker.disk, this.ranges.get(marker.disk)!.snapshot);
          this.ranges.delete(marker.disk);
        }
        return;
      }
      case 'copy': {
        const disk = this.require(marker.disk);
        if (begins) this.growInSteps(disk, marker.to, marker.length);
        if (begins) this.change(marker.disk, marker.to, Buffer.from(contentNow(this.require(marker.source)).subarray(marker.from, marker.from + marker.length)));
        else answer(disk);
        return;
      }
      case 'turn':
        if (begins) this.beginTurn(marker.made, marker.changed, marker.gone);
        else this.endTurn();
        return;
      case 'promote':
        if (!begins) this.promoted.set(marker.origin, marker.disk);
        return;
      case 'receive':
        if (begins) this.receives.set(marker.stream.uuid, { stream: marker.stream, state: 'asked', kept: 0 });
        else this.requireReceive(marker.stream.uuid).state = 'answered';
        return;
      case 'received':
        if (!begins) this.requireReceive(marker.uuid).kept = marker.records;
        return;
      case 'finish':
      case 'drop':
        if (begins) this.requireReceive(marker.uuid).state = 'ending';
        else this.receives.delete(marker.uuid);
        return;
      case 'resize':
        if (begins) this.resize(marker.disk, marker.sizeBytes);
        else {
          // The size is promised, and that what was cut off stays away; what was written before still waits for its flush.
          const disk = this.require(marker.disk);
          answer(disk);
          disk.size.durable = disk.size.answered;
          for (const states of disk.blocks.slice(Math.floor(marker.sizeBytes / BLOCK_BYTES) + 1)) states.durable = states.answered;
        }
        return;
      case 'remove':
        if (begins) this.require(marker.disk).removal = 'asked';
        else {
          this.disks.delete(marker.disk);
          this.gone.add(marker.disk);
        }
        return;
      default: throw new Error(`a marker of no known kind: ${JSON.stringify(marker satisfies never)}`);
    }
  }

  /** What is wrong with the disks that were found; null when nothing is. */
  judge(found: readonly FoundDisk[], survival: Survival, tornBytes: number): string | null {
    const byName = new Map(found.map((disk) => [disk.name, disk]));
    for (const { name } of found) {
      if (this.gone.has(name) && !this.disks.has(name)) return `${name} is there although its removal was answered`;
      if (!this.disks.has(name)) return `${name} is there although nobody asked for it`;
    }
    const requests = new Map<number, boolean>();
    for (const disk of this.disks.values()) {
      const there = byName.get(disk.name);
      if (disk.made === 'asked') {
        const others = requests.get(disk.request);
        if (others !== undefined && others !== (there !== undefined)) return `of one request some disks are there and others (${disk.name}) are not`;
        requests.set(disk.request, there !== undefined);
      }
      if (there === undefined) {
        if (disk.made === 'answered' && disk.removal === 'none') return `${disk.name} is not there although its making was answered`;
        continue;
      }
      const wrong = judgeDisk(disk, there.content, survival, tornBytes);
      if (wrong !== null) return `${disk.name}: ${wrong}`;
      const { isNew, isOld } = evidenceOf(disk, this.ranges.get(disk.name)?.blocks ?? [], there.content);
      if (isNew !== null && isOld !== null) return `${disk.name}: block ${isNew} is what an unanswered range clone put there, and others of the same range clone are not`;
    }
    for (const [origin, disk] of this.promoted) {
      const source = byName.get(origin);
      if (source !== undefined && byName.has(disk) && source.origin !== disk) return `${origin} is a clone of ${source.origin ?? 'nobody'}, although ${disk} was promoted over it`;
    }
    return this.judgeTurn(byName);
  }

  /** The same of streams that are being received. `disks`: what else was found. */
  judgeReceives(found: readonly FoundReceive[], disks: readonly FoundDisk[]): string | null {
    const byUuid = new Map(found.map((receive) => [receive.uuid, receive]));
    for (const { uuid } of found) if (!this.receives.has(uuid)) return `the stream ${uuid} is being received, although it had ended, or nobody sends it`;
    for (const [uuid, { stream, state, kept }] of this.receives) {
      const there = byUuid.get(uuid);
      if (there !== undefined && there.records < kept) return `of the stream ${uuid} ${there.records} records are there, although ${kept} were kept`;
      if (there === undefined && state === 'answered') return `nothing is there of the stream ${uuid}, although its receive was begun`;
      const isVisible = disks.some((disk) => disk.name === `${stream.target}/.snapshots/${stream.name}/`);
      if (there !== undefined && isVisible) return `the stream ${uuid} is being received, and is there already`;
    }
    return null;
  }

  /** Streams that were begun to be received. */
  streams(): StreamSpec[] {
    return [...this.receives.values()].map(({ stream }) => stream);
  }

  private beginTurn(made: readonly Turned[], changed: readonly Turned[], gone: readonly string[]): void {
    const contents = changed.map(({ content }) => this.bytesOf(content));
    this.makeEach(made.map(({ disk, content }) => ({ name: disk, content: this.bytesOf(content) })));
    const blocksOf = new Map<string, TurnedDisk>();
    changed.forEach(({ disk: name, except }, i) => {
      const disk = this.require(name);
      const content = contents[i]!;
      if (except === undefined) setSize(disk, content.length);
      const turned: TurnedBlock[] = [];
      disk.blocks.forEach((states, block) => {
        if (except?.includes(block) === true) return;
        states.all.push(Buffer.from(padded(content.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES))));
        turned.push({ block, state: states.all.length - 1 });
      });
      blocksOf.set(name, { blocks: turned, isSized: except === undefined });
      this.promoted.delete(name);
    });
    for (const name of gone) this.require(name).removal = 'asked';
    this.turn = { made: made.map(({ disk }) => disk), gone, changed: blocksOf };
  }

  /** It is durable when it is answered. */
  private endTurn(): void {
    const turn = this.turn;
    if (turn === null) throw new Error('the recorded program ends what it never began');
    this.turn = null;
    for (const name of turn.made) this.require(name).made = 'answered';
    for (const [name, { blocks }] of turn.changed) {
      const disk = this.require(name);
      answer(disk);
      disk.size.durable = disk.size.answered;
      for (const { block, state } of blocks) disk.blocks[block]!.durable = state;
    }
    for (const name of turn.gone) {
      this.disks.delete(name);
      this.gone.add(name);
      this.promoted.delete(name);
    }
  }

  /** All of it is there, or nothing of it. */
  private judgeTurn(found: ReadonlyMap<string, FoundDisk>): string | null {
    const fresh: string[] = [];
    const stale: string[] = [];
    for (const name of this.turn?.made ?? []) (found.has(name) ? fresh : stale).push(`${name} is ${found.has(name) ? '' : 'not '}there`);
    for (const name of this.turn?.gone ?? []) (found.has(name) ? stale : fresh).push(`${name} is ${found.has(name) ? '' : 'not '}there`);
    for (const [name, { blocks, isSized }] of this.turn?.changed ?? []) {
      const there = found.get(name);
      if (there === undefined) return `${name} is not there`;
      const disk = this.require(name);
      const { isNew, isOld } = evidenceOf(disk, blocks.filter(({ block }) => block * BLOCK_BYTES < there.content.length), there.content);
      if (isNew !== null) fresh.push(`${name} has a new block ${isNew}`);
      if (isOld !== null) stale.push(`${name} has an old block ${isOld}`);
      if (!isSized) continue;
      if (!disk.size.all.slice(0, -1).includes(there.content.length)) fresh.push(`${name} has its new size`);
      if (newest(disk.size) !== there.content.length) stale.push(`${name} has its old size`);
    }
    return fresh.length > 0 && stale.length > 0 ? `of one operation a part is there: ${fresh[0] ?? ''}, and ${stale[0] ?? ''}` : null;
  }

  private bytesOf(content: Content): Buffer {
    return 'copyOf' in content ? Buffer.from(contentNow(this.require(content.copyOf))) : writtenBytes(content);
  }

  private requireReceive(uuid: string): ReceiveWindow {
    const receive = this.receives.get(uuid);
    if (receive === undefined) throw new Error(`the recorded program speaks of the stream ${uuid}, which it never began`);
    return receive;
  }

  private make(names: readonly string[], content: Buffer): void {
    this.makeEach(names.map((name) => ({ name, content })));
  }

  /** Of one request: all of them are there, or none. */
  private makeEach(wanted: readonly { readonly name: string; readonly content: Buffer }[]): void {
    const request = this.nextRequest;
    this.nextRequest += 1;
    for (const { name, content } of wanted) {
      this.gone.delete(name);
      this.disks.set(name, {
        name, made: 'asked', request, removal: 'none',
        size: { all: [content.length], durable: 0, answered: 0 },
        blocks: Array.from({ length: Math.ceil(content.length / BLOCK_BYTES) }, (_, block) => statesOf(padded(content.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)))),
      });
    }
  }

  private change(name: string, at: number, bytes: Buffer): void {
    const disk = this.require(name);
    if (at + bytes.length > newest(disk.size)) setSize(disk, at + bytes.length);
    for (let block = Math.floor(at / BLOCK_BYTES); block * BLOCK_BYTES < at + bytes.length; block += 1) {
      const states = disk.blocks[block]!;
      const next = Buffer.from(newest(states));
      const from = Math.max(at, block * BLOCK_BYTES);
      bytes.copy(next, from - block * BLOCK_BYTES, from - at, Math.min(bytes.length, (block + 1) * BLOCK_BYTES - at));
      states.all.push(next);
    }
  }

  /** Of a copy the whole blocks are shared, and what is left at either end is written before and after. */
  private growInSteps(disk: DiskWindow, at: number, length: number): void {
    const headBytes = Math.min(length, (BLOCK_BYTES - (at % BLOCK_BYTES)) % BLOCK_BYTES);
    for (const end of [at + headBytes, at + length - ((length - headBytes) % BLOCK_BYTES)]) if (end > newest(disk.size)) setSize(disk, end);
  }

  private resize(name: string, sizeBytes: number): void {
    const disk = this.require(name);
    const oldBytes = newest(disk.size);
    setSize(disk, sizeBytes);
    for (let block = Math.floor(sizeBytes / BLOCK_BYTES); block * BLOCK_BYTES < oldBytes; block += 1) {
      const states = disk.blocks[block]!;
      const next = Buffer.from(newest(states));
      next.fill(0, Math.max(0, sizeBytes - block * BLOCK_BYTES));
      states.all.push(next);
    }
  }

  private makeDurable(name: string, snapshot: Snapshot): void {
    const disk = this.disks.get(name);
    // Removed meanwhile, or another one of that name.
    if (disk?.request !== snapshot.request) return;
    disk.size.durable = Math.max(disk.size.durable, snapshot.size);
    for (const [block, state] of snapshot.blocks.entries()) {
      const states = disk.blocks[block]!;
      states.durable = Math.max(states.durable, state);
    }
  }

  private require(name: string): DiskWindow {
    const disk = this.disks.get(name);
    if (disk === undefined) throw new Error(`the recorded program speaks of ${name}, which it never made`);
    return disk;
  }
}
