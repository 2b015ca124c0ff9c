/**
 * Snapshots in a model run: taken of one disk or of the whole container, read under the mount, cloned from, gone back to, removed;
 * and containers that were cloned, live or from a snapshot. In the model a snapshot is a copy of contents.
 *
 * What was frozen must stay as it was through everything that the run does to the disks meanwhile.
 */
import { constants } from 'node:fs';
import { join } from 'node:path';

import type { ModelContent } from './model-disks.js';
import { AGENTS } from './model-hands.js';
import { BLOCK_BYTES, SECTOR_BYTES, disturb, makeIdle, pause, retryBusy, type ModelParts, type Operation } from './model-parts.js';

/** Names in the container, and what each held. */
export type Contents = ReadonlyMap<string, ModelContent>;

export interface Remembered {
  readonly name: string;
  /** `CONTAINER@NAME` or `CONTAINER/PATH@NAME`. */
  readonly reference: string;
  /** The one disk, as a name in the container; null: all of it. */
  readonly only: string | null;
  readonly contents: Contents;
}

/** One disk in a snapshot. */
export interface OldDisk {
  readonly snapshot: Remembered;
  readonly disk: string;
  readonly mountPath: string;
  readonly held: ModelContent;
}

interface ContainerCopy {
  readonly container: string;
  readonly contents: Contents;
}

const { O_RDONLY, O_RDWR, O_DIRECT } = constants;
const SNAPSHOTS_NAME = '.snapshots';
const SNAPSHOTS_MAX = 5;
const COPIES_MAX = 2;
/** The agents are at their writes by then. */
const BURST_DELAY_MS_MAX = 10;

export class ModelSnapshots {
  readonly operations: readonly Operation[];
  readonly #parts: ModelParts;
  #taken: readonly Remembered[] = [];
  #copies: readonly ContainerCopy[] = [];

  constructor(parts: ModelParts) {
    this.#parts = parts;
    this.operations = [
      { name: 'snapshot', weight: 4, run: () => this.#snapshot() },
      { name: 'snapshot in a burst', weight: 3, run: () => this.#inBurst() },
      { name: 'read frozen', weight: 4, run: () => this.#readFrozen() },
      { name: 'clone snapshot', weight: 4, run: () => this.#cloneOld() },
      { name: 'revert', weight: 3, run: () => this.#revert() },
      { name: 'remove snapshot', weight: 2, run: () => this.#removeOne() },
      { name: 'clone container', weight: 2, run: () => this.#cloneContainer() },
    ];
  }

  /** Every snapshot and every copy of the container, whole. */
  async compareAll(): Promise<void> {
    await this.#compareNames();
    for (const snapshot of this.#taken) await this.compareTree(`${this.#parts.container}/${SNAPSHOTS_NAME}/${snapshot.name}`, snapshot.contents);
    for (const copy of this.#copies) await this.compareTree(copy.container, copy.contents);
  }

  /** Some disk in some snapshot, if there is a snapshot. */
  pickOld(): OldDisk | null {
    return this.#taken.length === 0 ? null : this.#oldOf(this.#parts.random.pick(this.#taken));
  }

  /** Takes a snapshot of one disk (a name in the container) or of all that is in it (null). */
  async take(only: string | null, prefix = 'at'): Promise<Remembered> {
    const { container, disks } = this.#parts;
    const name = this.#parts.freshName(prefix);
    const reference = await this.#create(name, only);
    const snapshot = { name, reference, only, contents: new Map(this.#namesOf(only).map((disk) => [disk, disks.copy(`${container}/${disk}`)])) };
    this.adopt(snapshot);
    return snapshot;
  }

  /** One that came by itself: the model has its content already. */
  adopt(snapshot: Remembered): void {
    this.#taken = [...this.#taken, snapshot];
  }

  async remove(snapshot: Remembered): Promise<void> {
    await retryBusy(() => this.#parts.daemon.control.removeSnapshot(snapshot.reference, { keepData: true }));
    this.#taken = this.#taken.filter((other) => other !== snapshot);
  }

  async #snapshot(): Promise<string> {
    while (this.#taken.length >= SNAPSHOTS_MAX) await this.remove(this.#parts.random.pick(this.#taken));
    const { reference, contents } = await this.take(this.#pickOnly());
    return `${reference} of ${contents.size}`;
  }

  /**
   * A snapshot while all agents write, to two disks if it is one of all. Each writes one piece after the other, so that there is an instant in each one's
   * row of writes: what came before is in the snapshot, in either disk, and nothing of what came later.
   */
  async #inBurst(): Promise<string> {
    const { container, random, disks, hands, freshData, freshName, othersKill } = this.#parts;
    while (this.#taken.length >= SNAPSHOTS_MAX) await this.remove(random.pick(this.#taken));
    const only = this.#pickOnly();
    const paths = only === null ? [random.pick(disks.paths), random.pick(disks.paths)] : [`${container}/${only}`];
    const contents = new Map(this.#namesOf(only).map((disk) => [disk, disks.copy(`${container}/${disk}`)]));
    const pieceBytes = SECTOR_BYTES * random.pick([1, 2, 8, 24]);
    const count = Math.min(random.between(12, 60), ...paths.map((path) => Math.floor(disks.sizeBytes(path) / pieceBytes)));
    const begin = SECTOR_BYTES * random.below(Math.min(...paths.map((path) => disks.sizeBytes(path) - count * pieceBytes)) / SECTOR_BYTES + 1);
    const fds = new Map<string, number>();
    for (const path of paths) for (let agent = 0; agent < AGENTS; agent += 1) fds.set(`${agent} ${path}`, (await hands.handleOf(path, agent)).fd);
    const pieces = Array.from({ length: count }, (_, index) => ({
      agent: index % AGENTS, path: paths[Math.floor(index / AGENTS) % paths.length]!, offset: begin + index * pieceBytes, data: freshData(pieceBytes),
    }));
    const name = freshName('burst');
    const writes = pieces.map(({ agent, path, offset, data }) => hands.write(agent, fds.get(`${agent} ${path}`)!, data, offset));
    const [reference] = await Promise.all([pause(random.between(0, BURST_DELAY_MS_MAX)).then(() => this.#create(name, only)), ...writes]);
    const late = new Set<number>();
    let included = 0;
    for (const { agent, path, offset, data } of pieces) {
      disks.write(path, offset, data);
      const disk = path.slice(container.length + 1);
      const held = contents.get(disk)!.content.subarray(offset, offset + data.length);
      const found = await this.#readOld(`${container}/${SNAPSHOTS_NAME}/${name}/${disk}`, offset, data.length);
      if (found.equals(held)) {
        late.add(agent);
        continue;
      }
      // A write that a killed server had begun is made again by the next: then a snapshot in between may have a part of it, but only of one.
      // What a program writes to an ordinary file goes through the kernel's page cache, which sends it page by page where it must: a part from the
      // beginning may be there then, up to the end of a page.
      const isWhole = found.equals(data) || (othersKill && isOldOrNew(found, held, data)) || (disks.isFile(path) && isBegun(found, held, data, offset));
      if (!isWhole) throw new Error(`${reference}: what was written to ${path} at ${offset} is neither there nor missing`);
      if (late.has(agent)) throw new Error(`${reference} has what agent ${agent} wrote to ${path} at ${offset}, and not what it wrote before`);
      if (!found.equals(data)) late.add(agent);
      found.copy(held);
      included += 1;
    }
    this.adopt({ name, reference, only, contents });
    for (const path of new Set(paths)) {
      const disk = path.slice(container.length + 1);
      await hands.compareContent(`${container}/${SNAPSHOTS_NAME}/${name}/${disk}`, contents.get(disk)!.content);
      await hands.compareWhole(path);
    }
    return `${reference} with ${included} of ${count} writes of ${pieceBytes} to ${paths.join(' and ')} from ${begin}`;
  }

  /** Reads a piece, or all, of what must not have changed, and tries to change it. */
  async #readFrozen(): Promise<string> {
    const { random, hands } = this.#parts;
    const old = this.#oldOf(await this.#some());
    const agent = random.below(AGENTS);
    const writing = await hands.agent(agent).outcome('open', join(this.#parts.daemon.mountDir, old.mountPath), O_RDWR, 0);
    if (writing !== 'EROFS') throw new Error(`${old.mountPath} is frozen, and opening it for writing gave ${writing}`);
    if (random.chance(0.3)) {
      await hands.compareContent(old.mountPath, old.held.content);
      return `${old.mountPath}, all of it`;
    }
    const { content, isFile } = old.held;
    const fd = await hands.openFor(old.mountPath, isFile || random.chance(0.5) ? O_RDONLY : O_RDONLY | O_DIRECT, agent);
    const blocks = Math.ceil(content.length / BLOCK_BYTES);
    const first = random.below(blocks);
    const length = BLOCK_BYTES * random.between(1, Math.min(256, blocks - first));
    try {
      await hands.comparePiece(old.mountPath, content, { agent, fd }, first * BLOCK_BYTES, length);
    } finally {
      await hands.agent(agent).outcome('close', fd);
    }
    return `${old.mountPath} ${first * BLOCK_BYTES}+${length}`;
  }

  /** A disk as it was, also one that is gone, by either of its names. */
  async #cloneOld(): Promise<string> {
    const { random, container, daemon, disks, hands, freshName, makeRoom } = this.#parts;
    await makeRoom();
    const old = this.#oldOf(await this.#some());
    const source = random.chance(0.5) ? old.mountPath : `${container}/${old.disk}@${old.snapshot.name}`;
    const target = `${container}/${freshName('clone')}`;
    const [fill, copyOnRead] = [random.chance(0.3), random.chance(0.3)];
    await retryBusy(() => daemon.control.clone({ source, targets: [target], fill, copyOnRead }));
    disks.put(target, old.held);
    await hands.compareWhole(target);
    return `${source} to ${target}${fill ? ' filling' : ''}${copyOnRead ? ' copy-on-read' : ''}`;
  }

  /** Back to a snapshot, with what came since gone and what went back again. */
  async #revert(): Promise<string> {
    const { random, container, daemon, disks, hands } = this.#parts;
    const snapshot = await this.#some();
    const concerned = snapshot.only === null ? this.#present() : this.#present().filter((disk) => disk === snapshot.only);
    // Without this, most would go back to what is there already.
    for (const disk of concerned) if (random.chance(0.3)) await disturb(this.#parts, `${container}/${disk}`, random.between(1, 3));
    for (const disk of concerned) await makeIdle(this.#parts, `${container}/${disk}`);
    await retryBusy(() => daemon.control.revertSnapshot(snapshot.reference));
    for (const disk of concerned) disks.remove(`${container}/${disk}`);
    for (const [disk, held] of snapshot.contents) disks.put(`${container}/${disk}`, held);
    await this.#compareNames();
    for (const disk of snapshot.contents.keys()) await hands.compareWhole(`${container}/${disk}`);
    return `to ${snapshot.reference}`;
  }

  async #removeOne(): Promise<string> {
    const snapshot = await this.#some();
    await this.remove(snapshot);
    await this.#compareNames();
    return snapshot.reference;
  }

  /** The whole container, now or as it was; an earlier copy is compared once more and goes. */
  async #cloneContainer(): Promise<string> {
    const { random, container, daemon, freshName, disks } = this.#parts;
    while (this.#copies.length >= COPIES_MAX) await this.#removeCopy();
    const whole = this.#taken.filter(({ only }) => only === null);
    const snapshot = whole.length > 0 && random.chance(0.5) ? random.pick(whole) : null;
    const source = snapshot === null ? container : random.chance(0.5) ? snapshot.reference : `${container}/${SNAPSHOTS_NAME}/${snapshot.name}`;
    const contents = snapshot?.contents ?? new Map(this.#present().map((disk) => [disk, disks.copy(`${container}/${disk}`)]));
    const target = freshName(`${container}-copy`);
    await retryBusy(() => daemon.control.clone({ source, targets: [target], fill: random.chance(0.2), copyOnRead: random.chance(0.3) }));
    this.#copies = [...this.#copies, { container: target, contents }];
    await this.compareTree(target, contents);
    return `${source} to ${target}`;
  }

  async #removeCopy(): Promise<void> {
    const [copy] = this.#copies;
    if (copy === undefined) return;
    await this.compareTree(copy.container, copy.contents);
    await retryBusy(() => this.#parts.daemon.control.remove(copy.container, { keepData: true, recursive: true }));
    this.#copies = this.#copies.filter((other) => other !== copy);
  }

  /** Some snapshot; takes one and changes disks if there is none. */
  async #some(): Promise<Remembered> {
    const { random, container } = this.#parts;
    if (this.#taken.length > 0) return random.pick(this.#taken);
    const snapshot = await this.take(this.#pickOnly());
    for (const disk of snapshot.contents.keys()) await disturb(this.#parts, `${container}/${disk}`, 2);
    return snapshot;
  }

  async #create(name: string, only: string | null): Promise<string> {
    const { container, daemon } = this.#parts;
    const reference = `${container}${only === null ? '' : `/${only}`}@${name}`;
    const info = await retryBusy(() => daemon.control.createSnapshot(reference, { quiesce: null }));
    const names = this.#namesOf(only);
    if (info.disks + info.files !== names.length) throw new Error(`the snapshot ${reference} has ${info.disks} disks and ${info.files} files, and there are ${names.length}`);
    return reference;
  }

  async #readOld(mountPath: string, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
    const { hands } = this.#parts;
    const fd = await hands.openFor(mountPath, O_RDONLY, 0);
    try {
      return await hands.agent(0).call('pread', fd, lengthBytes, offsetBytes);
    } finally {
      await hands.agent(0).outcome('close', fd);
    }
  }

  #namesOf(only: string | null): string[] {
    return only === null ? this.#present() : [only];
  }

  #oldOf(snapshot: Remembered): OldDisk {
    const [disk, held] = this.#parts.random.pick([...snapshot.contents]);
    return { snapshot, disk, held, mountPath: `${this.#parts.container}/${SNAPSHOTS_NAME}/${snapshot.name}/${disk}` };
  }

  #pickOnly(): string | null {
    return this.#parts.random.chance(0.5) ? null : this.#parts.random.pick(this.#present());
  }

  /** Names of the model's disks in the container. */
  #present(): string[] {
    return this.#parts.disks.paths.map((path) => path.slice(this.#parts.container.length + 1));
  }

  /** The container and the directory of its snapshots have the names that the model knows, and no other. */
  async #compareNames(): Promise<void> {
    const { container, hands } = this.#parts;
    const expected = [...this.#present(), ...(this.#taken.length === 0 ? [] : [SNAPSHOTS_NAME])];
    expectNames(container, expected, await hands.names(container));
    if (this.#taken.length > 0) expectNames(`${container}/${SNAPSHOTS_NAME}`, this.#taken.map(({ name }) => name), await hands.names(`${container}/${SNAPSHOTS_NAME}`));
  }

  /** All disks and files, each whole, and nothing else; or all but `besides`. */
  async compareTree(directory: string, contents: Contents, besides: readonly string[] = []): Promise<void> {
    expectNames(directory, [...contents.keys(), ...besides], await this.#parts.hands.names(directory));
    for (const [disk, { content }] of contents) await this.#parts.hands.compareContent(`${directory}/${disk}`, content);
  }
}

/** Each sector is the one or the other. */
function isOldOrNew(found: Buffer, old: Buffer, data: Buffer): boolean {
  for (let at = 0; at < found.length; at += SECTOR_BYTES) {
    const sector = found.subarray(at, at + SECTOR_BYTES);
    if (!sector.equals(old.subarray(at, at + SECTOR_BYTES)) && !sector.equals(data.subarray(at, at + SECTOR_BYTES))) return false;
  }
  return true;
}

/** New up to the end of a page, and old from there on. */
function isBegun(found: Buffer, old: Buffer, data: Buffer, offset: number): boolean {
  for (let at = BLOCK_BYTES - (offset % BLOCK_BYTES); at < found.length; at += BLOCK_BYTES) {
    if (found.subarray(0, at).equals(data.subarray(0, at)) && found.subarray(at).equals(old.subarray(at))) return true;
  }
  return false;
}

function expectNames(directory: string, expected: readonly string[], found: readonly string[]): void {
  const [want, have] = [[...expected].sort().join(' '), [...found].sort().join(' ')];
  if (want !== have) throw new Error(`${directory} has ${have}, and not ${want}`);
}
