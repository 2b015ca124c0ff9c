/**
 * What a store may hold after the workload, however it went: the definition of "nothing lost" for the fault tests.
 *
 * For each block of each disk two sets of contents. `current`: what it may hold while the process lives, or after it was killed:
 * the newest acknowledged content, and that of writes which failed or were never answered. `window`: what it may hold once the disk
 * was faulted: everything since its last completed flush. An operation that is not `ok` may have happened or not, but never half;
 * one that failed for want of room has not.
 */
import { createHash } from 'node:crypto';

import { BLOCK_BYTES } from '../../../blockstore/units.js';
import { patternBytes } from '../model/pattern.js';
import type { Operation, Outcome } from './workload.js';

const ZEROS = Buffer.alloc(BLOCK_BYTES);

interface ModelBlock {
  current: Buffer[];
  window: Buffer[];
}

export interface ModelDisk {
  /** `maybe`: an operation that made or removed it did not say how it ended. */
  exists: 'yes' | 'maybe' | 'no';
  sizes: number[];
  /** Of a disk: what its users see. A resize that fails does not change that. */
  size: number;
  /** Of a growing file: sizes that it may have once it was faulted. */
  sizesWindow: number[];
  blocks: ModelBlock[];
}

export class StoreModel {
  readonly disks = new Map<string, ModelDisk>();

  apply(operation: Operation, outcome: Outcome): void {
    if (outcome === 'skipped') return;
    const done = outcome === 'ok';
    switch (operation.kind) {
      case 'import':
        this.disks.set(operation.disk, {
          exists: existence(outcome), size: operation.blocks * BLOCK_BYTES, sizes: [operation.blocks * BLOCK_BYTES], sizesWindow: [operation.blocks * BLOCK_BYTES],
          blocks: blocksOf(patternBytes(operation.seed, 0, operation.blocks * BLOCK_BYTES)),
        });
        break;
      case 'create': this.disks.set(operation.disk, { exists: existence(outcome), size: 0, sizes: [0], sizesWindow: [0], blocks: [] }); break;
      case 'clone': this.clone(operation.disk, operation.target, outcome); break;
      case 'write': this.write(operation.disk, operation.offsetBytes, patternBytes(operation.seed, 0, operation.lengthBytes), done); break;
      case 'discard': this.write(operation.disk, operation.offsetBytes, Buffer.alloc(operation.lengthBytes), done); break;
      case 'flush': if (done) this.flushed(this.disk(operation.disk)); break;
      case 'resize': this.resize(this.disk(operation.disk), operation.sizeBytes, done); break;
      case 'remove': this.remove(this.disk(operation.disk), outcome); break;
      default: break;
    }
  }

  disk(name: string): ModelDisk {
    const disk = this.disks.get(name);
    if (disk === undefined) throw new Error(`the model has no disk ${name}`);
    return disk;
  }

  /** What is wrong with a disk's content; null when nothing is. */
  compare(name: string, content: Buffer, isFaulted: boolean): string | null {
    const disk = this.disk(name);
    if (!(isFaulted ? disk.sizesWindow : disk.sizes).includes(content.length)) return `${name} has ${content.length} bytes, not ${disk.sizes.join(' or ')}`;
    for (let block = 0; block * BLOCK_BYTES < content.length; block += 1) {
      const found = content.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
      const { current, window } = disk.blocks[block] ?? { current: [ZEROS], window: [ZEROS] };
      const allowed = isFaulted ? window : current;
      if (!allowed.some((each) => each.subarray(0, found.length).equals(found))) {
        return `block ${block} of ${name}${isFaulted ? ' (faulted)' : ''} holds ${found.subarray(0, 8).toString('hex')}… and none of ${allowed.length} allowed: ${allowed.map((each) => each.subarray(0, 8).toString('hex')).join(' ')}`;
      }
    }
    return null;
  }

  /** The same for the hashes that the actor's `read` gives. */
  compareRead(name: string, read: string): string | null {
    const [length = '0', hashes = ''] = read.split(' ');
    const disk = this.disk(name);
    if (!disk.sizes.includes(Number(length))) return `${name} reads ${length} bytes, not ${disk.sizes.join(' or ')}`;
    for (const [block, hash] of hashes.split(',').entries()) {
      const lengthBytes = Math.min(BLOCK_BYTES, Number(length) - block * BLOCK_BYTES);
      if (lengthBytes > 0 && !(disk.blocks[block]?.current ?? [ZEROS]).some((each) => hashOf(each.subarray(0, lengthBytes)) === hash)) return `block ${block} of ${name} reads wrong`;
    }
    return null;
  }

  private clone(source: string, target: string, outcome: Outcome): void {
    const from = this.disk(source);
    const done = outcome === 'ok';
    // A live clone commits what is pending, in order, behind data that it synced.
    if (done) this.flushed(from);
    const blocks = from.blocks.map(({ current, window }) => ({ current: [...current], window: [...(done ? current : window)] }));
    this.disks.set(target, { exists: existence(outcome), size: from.size, sizes: [...from.sizes], sizesWindow: [...from.sizes], blocks });
  }

  private write(name: string, offsetBytes: number, data: Buffer, done: boolean): void {
    const disk = this.disk(name);
    const end = offsetBytes + data.length;
    const isFile = name === 'log';
    // Acknowledged behind one of the sizes that it may have: it has the other.
    if (done && !isFile) disk.sizes = disk.sizes.filter((size) => size >= end);
    if (!isFile) disk.sizesWindow = disk.sizes;
    if (isFile) disk.sizesWindow = [...new Set([...disk.sizesWindow, Math.max(end, ...disk.sizes)])];
    if (isFile) disk.sizes = done ? [Math.max(end, ...disk.sizes)] : [...new Set([...disk.sizes, Math.max(end, ...disk.sizes)])];
    for (let block = disk.blocks.length; block * BLOCK_BYTES < end; block += 1) disk.blocks[block] = { current: [ZEROS], window: [ZEROS] };
    for (let block = Math.floor(offsetBytes / BLOCK_BYTES); block * BLOCK_BYTES < end; block += 1) {
      const state = (disk.blocks[block] ??= { current: [ZEROS], window: [ZEROS] });
      const from = Math.max(offsetBytes, block * BLOCK_BYTES);
      const to = Math.min(end, (block + 1) * BLOCK_BYTES);
      const changed = state.current.map((content) => {
        const copy = Buffer.from(content);
        data.copy(copy, from - block * BLOCK_BYTES, from - offsetBytes, to - offsetBytes);
        return copy;
      });
      state.window = distinct([...state.window, ...changed]);
      state.current = done ? distinct(changed) : distinct([...state.current, ...changed]);
    }
  }

  private flushed(disk: ModelDisk): void {
    for (const block of disk.blocks) block.window = [...block.current];
    disk.sizesWindow = [...disk.sizes];
  }

  private resize(disk: ModelDisk, sizeBytes: number, done: boolean): void {
    const before = Math.max(...disk.sizes);
    const wasCut = disk.sizes.length > 1;
    // The size that it had all along: nothing is done, and nothing committed.
    if (done && sizeBytes === disk.size) {
      disk.sizes = [sizeBytes];
      disk.sizesWindow = [sizeBytes];
      return;
    }
    if (done) {
      disk.size = sizeBytes;
      // A resize commits what is pending first.
      this.flushed(disk);
      disk.sizes = [sizeBytes];
      disk.sizesWindow = [sizeBytes];
      if (sizeBytes < before) disk.blocks.length = Math.min(disk.blocks.length, sizeBytes / BLOCK_BYTES);
      else if (wasCut) for (const block of disk.blocks) for (const each of [block.current, block.window]) each.push(ZEROS);
      for (let block = disk.blocks.length; block * BLOCK_BYTES < sizeBytes; block += 1) disk.blocks[block] = { current: [ZEROS], window: [ZEROS] };
      return;
    }
    disk.sizes = [...new Set([...disk.sizes, sizeBytes])];
    disk.sizesWindow = [...new Set([...disk.sizesWindow, sizeBytes])];
  }

  private remove(disk: ModelDisk, outcome: Outcome): void {
    if (outcome === 'ok') disk.exists = 'no';
    else if (disk.exists === 'yes') disk.exists = 'maybe';
  }
}

/** Of something that an operation was to make. What failed for want of room was undone in full. */
function existence(outcome: Outcome): ModelDisk['exists'] {
  if (outcome === 'ok') return 'yes';
  return outcome === 'no-space' ? 'no' : 'maybe';
}

function blocksOf(content: Buffer): ModelBlock[] {
  const blocks: ModelBlock[] = [];
  for (let at = 0; at < content.length; at += BLOCK_BYTES) {
    const block = content.subarray(at, at + BLOCK_BYTES);
    blocks.push({ current: [block], window: [block] });
  }
  return blocks;
}

function distinct(contents: readonly Buffer[]): Buffer[] {
  return contents.filter((content, index) => contents.findIndex((other) => other.equals(content)) === index);
}

export function hashOf(bytes: Buffer): string {
  return createHash('sha1').update(bytes).digest('hex').slice(0, 12);
}
