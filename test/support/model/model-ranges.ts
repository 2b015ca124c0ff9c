/**
 * Shared blocks in a model run: range clones by the control API, copy_file_range(2) and cp(1) under the mount, from disks, files and
 * snapshots into disks and files, within one disk too. In the model each is a copy of bytes.
 */
import { constants } from 'node:fs';
import { join } from 'node:path';

import type { CloneRangesRequest } from '../../../daemon/control/schemas.js';
import { mustRun } from './command.js';
import { AGENTS } from './model-hands.js';
import type { ModelSnapshots } from './model-snapshots.js';
import { BLOCK_BYTES, SECTOR_BYTES, retryBusy, type ModelParts, type Operation } from './model-parts.js';

type CopyRange = CloneRangesRequest['ranges'][number];

/** Where bytes come from: a disk of the model, or one in a snapshot. */
interface From {
  readonly mountPath: string;
  /** As the control API names it. */
  readonly reference: string;
  readonly content: Buffer;
}

const { O_RDONLY, O_RDWR } = constants;
const RANGES_MAX = 4;
const COPY_BYTES_MAX = 1024 * 1024;
/** Beyond this files do not grow. */
const FILE_BYTES_MAX = 6 * 1024 * 1024;
const CP_TIMEOUT_MS = 120_000;

export class ModelRanges {
  readonly operations: readonly Operation[];
  readonly #parts: ModelParts;
  readonly #snapshots: ModelSnapshots;

  constructor(parts: ModelParts, snapshots: ModelSnapshots) {
    this.#parts = parts;
    this.#snapshots = snapshots;
    this.operations = [
      { name: 'range clone', weight: 6, run: () => this.#cloneRanges() },
      { name: 'range clone to new', weight: 2, run: () => this.#cloneRangesToNew() },
      { name: 'copy range', weight: 7, run: () => this.#copyRange() },
      { name: 'cp', weight: 2, run: () => this.#cp() },
    ];
  }

  async #cloneRanges(): Promise<string> {
    const { random, daemon, disks, hands, othersKill } = this.#parts;
    const target = random.pick(disks.paths);
    const from = random.chance(0.2) ? this.#fromDisk(target) : this.#from();
    const isSame = from.mountPath === target;
    const ranges = this.#ranges(from.content, disks.sizeBytes(target), disks.isFile(target))
      // Made twice, because its answer was lost, this would copy what it made.
      .filter((range) => !isSame || !othersKill || isApart(range));
    if (ranges.length === 0 || (isSame && othersKill && !areApart(ranges))) return `${from.reference} to ${target}: nothing fits`;
    await retryBusy(() => daemon.control.cloneRanges({ source: from.reference, target, ranges, sizeBytes: null }));
    this.#copyInModel(from.content, target, ranges);
    await hands.compareWhole(target);
    return `${from.reference} to ${target}: ${textOf(ranges)}`;
  }

  async #cloneRangesToNew(): Promise<string> {
    const { random, container, daemon, disks, hands, freshName, makeRoom } = this.#parts;
    await makeRoom();
    const from = this.#from();
    const target = `${container}/${freshName('range')}`;
    const wanted = SECTOR_BYTES * random.between(16 * 8, Math.max(16 * 8, Math.floor(from.content.length / SECTOR_BYTES)));
    const ranges = this.#ranges(from.content, wanted, false);
    if (ranges.length === 0) return 'nothing fits';
    const sizeBytes = random.chance(0.5) ? wanted : null;
    const size = sizeBytes ?? Math.max(...ranges.map((range) => range.targetAtBytes + range.lengthBytes));
    await retryBusy(() => daemon.control.cloneRanges({ source: from.reference, target, ranges, sizeBytes }));
    disks.add(target, Buffer.alloc(size));
    this.#copyInModel(from.content, target, ranges);
    await hands.compareWhole(target);
    return `${from.reference} to ${target} of ${size}: ${textOf(ranges)}`;
  }

  /** copy_file_range(2): in blocks as a rule, which are shared; at odd places otherwise, where bytes are copied. */
  async #copyRange(): Promise<string> {
    const { random, disks, hands } = this.#parts;
    const target = random.pick(disks.paths);
    const from = random.chance(0.2) ? this.#fromDisk(target) : this.#from();
    const unit = random.pick([BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES, SECTOR_BYTES, 1]);
    const place = (sizeBytes: number): number => unit * random.below(Math.ceil(sizeBytes / unit));
    const fromAt = place(from.content.length);
    const skew = random.chance(0.3) && unit !== BLOCK_BYTES ? random.below(BLOCK_BYTES) : 0;
    const targetBytes = disks.sizeBytes(target);
    const at = place(targetBytes);
    // Odd places that lie alike in their blocks are shared but for their ends.
    const to = unit === BLOCK_BYTES ? at : Math.min(targetBytes - 1, Math.floor(at / BLOCK_BYTES) * BLOCK_BYTES + (fromAt + skew) % BLOCK_BYTES);
    const room = disks.isFile(target) ? FILE_BYTES_MAX - to : targetBytes - to;
    const distance = from.mountPath === target ? Math.abs(fromAt - to) : COPY_BYTES_MAX;
    const length = Math.min(random.pick([random.between(1, COPY_BYTES_MAX), BLOCK_BYTES * random.between(1, 256), COPY_BYTES_MAX]), from.content.length - fromAt, room, distance);
    if (length <= 0) return `${from.mountPath} to ${target}: nothing fits`;
    const agent = random.below(AGENTS);
    const source = await hands.openFor(from.mountPath, O_RDONLY, agent);
    const fd = await hands.openFor(target, O_RDWR, agent);
    try {
      const copied = await hands.agent(agent).call('copyFileRange', source, fromAt, fd, to, length);
      if (copied !== length) throw new Error(`of ${length} bytes from ${from.mountPath} at ${fromAt} to ${target} at ${to}, ${copied} were copied`);
      disks.write(target, to, Buffer.from(from.content.subarray(fromAt, fromAt + length)));
      if (random.chance(0.3)) await hands.compareWhole(target);
      else await hands.compareAround(target, { agent, fd, direct: false }, to, length);
    } finally {
      await hands.agent(agent).outcome('close', source);
      await hands.agent(agent).outcome('close', fd);
    }
    return `${from.mountPath} ${fromAt} to ${target} ${to}+${length}`;
  }

  /** The whole of a disk becomes a file, as coreutils do it. */
  async #cp(): Promise<string> {
    const { random, container, daemon, disks, hands, freshName, makeRoom } = this.#parts;
    await makeRoom();
    const from = this.#from();
    const target = `${container}/${freshName('file')}`;
    await mustRun('cp', [random.pick(['--reflink=auto', '--reflink=never']), random.pick(['--sparse=never', '--sparse=auto']), join(daemon.mountDir, from.mountPath), join(daemon.mountDir, target)], { timeoutMs: CP_TIMEOUT_MS });
    disks.add(target, Buffer.from(from.content), true);
    await hands.compareWhole(target);
    return `${from.mountPath} to ${target}`;
  }

  #from(): From {
    const { random, container, disks } = this.#parts;
    const old = random.chance(0.3) ? this.#snapshots.pickOld() : null;
    if (old === null) return this.#fromDisk(random.pick(disks.paths));
    return { mountPath: old.mountPath, content: old.held.content, reference: random.chance(0.5) ? old.mountPath : `${container}/${old.disk}@${old.snapshot.name}` };
  }

  #fromDisk(path: string): From {
    return { mountPath: path, reference: path, content: this.#parts.disks.content(path) };
  }

  /** Ranges that name no block of the target twice. The last may be what the source ends with, if that is where the target ends as well. */
  #ranges(content: Buffer, targetBytes: number, mayGrow: boolean): CopyRange[] {
    const { random } = this.#parts;
    const sourceBlocks = Math.floor(content.length / BLOCK_BYTES);
    const targetBlocks = Math.floor(targetBytes / BLOCK_BYTES) + (mayGrow && targetBytes < FILE_BYTES_MAX ? 20 : 0);
    const ranges: CopyRange[] = [];
    const oddBytes = content.length % BLOCK_BYTES;
    if (oddBytes !== 0 && oddBytes === targetBytes % BLOCK_BYTES && random.chance(0.5)) {
      const blocks = random.below(Math.min(sourceBlocks, Math.floor(targetBytes / BLOCK_BYTES), 64));
      const lengthBytes = blocks * BLOCK_BYTES + oddBytes;
      ranges.push({ sourceAtBytes: content.length - lengthBytes, targetAtBytes: targetBytes - lengthBytes, lengthBytes });
    }
    for (let tries = random.between(1, RANGES_MAX); tries > 0; tries -= 1) {
      const blocks = Math.min(random.pick([1, random.between(1, 16), random.between(1, 300), 2048]), sourceBlocks, targetBlocks);
      if (blocks === 0) continue;
      const range = {
        sourceAtBytes: BLOCK_BYTES * random.between(0, sourceBlocks - blocks), targetAtBytes: BLOCK_BYTES * random.between(0, targetBlocks - blocks), lengthBytes: blocks * BLOCK_BYTES,
      };
      const endBytes = range.targetAtBytes + range.lengthBytes;
      if (!ranges.some((other) => range.targetAtBytes < other.targetAtBytes + other.lengthBytes && other.targetAtBytes < endBytes)) ranges.push(range);
    }
    return ranges;
  }

  /** All of them take what was there before the first. */
  #copyInModel(source: Buffer, target: string, ranges: readonly CopyRange[]): void {
    const pieces = ranges.map((range) => Buffer.from(source.subarray(range.sourceAtBytes, range.sourceAtBytes + range.lengthBytes)));
    for (const [index, piece] of pieces.entries()) this.#parts.disks.write(target, ranges[index]!.targetAtBytes, piece);
  }
}

/** No range's source is a block that another, or itself, writes. */
function areApart(ranges: readonly CopyRange[]): boolean {
  return ranges.every((one) => ranges.every((other) => one.sourceAtBytes + one.lengthBytes <= other.targetAtBytes || other.targetAtBytes + other.lengthBytes <= one.sourceAtBytes));
}

function isApart(range: CopyRange): boolean {
  return areApart([range]);
}

function textOf(ranges: readonly CopyRange[]): string {
  return ranges.map(({ sourceAtBytes, targetAtBytes, lengthBytes }) => `${sourceAtBytes}:${targetAtBytes}:${lengthBytes}`).join(' ');
}
