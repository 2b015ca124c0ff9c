/**
 * Does the same random thing to real disks under a mount and to `ModelDisks`, and compares what was touched.
 *
 * One step is one operation. Steps follow each other, so the model always knows the one legal content; what runs beside
 * them is what must not matter: fills, several processes writing to the same blocks at once (to different bytes), and the
 * death of the server in the middle of such writes. The choice of operations comes from the seed alone; timing does not.
 */
import { constants } from 'node:fs';

import type { TransportAbilities } from '../../../daemon/transport/abilities.js';
import { ModelDisks } from './model-disks.js';
import { AGENTS, ModelHands } from './model-hands.js';
import type { Handle } from './model-hands.js';
import { DISKS_MAX, ModelLife } from './model-life.js';
import { BLOCK_BYTES, SECTOR_BYTES, pause, type ModelDaemon, type ModelParts, type Operation } from './model-parts.js';
import { ModelRanges } from './model-ranges.js';
import { ModelRebase } from './model-rebase.js';
import { ModelSnapshots } from './model-snapshots.js';
import { ModelTransfers } from './model-transfers.js';
import { patternBytes } from './pattern.js';
import type { Random } from './random.js';

export interface ModelRunOptions {
  readonly daemon: ModelDaemon;
  readonly abilities: TransportAbilities;
  readonly random: Random;
  readonly container: string;
  /** Whether the run itself kills and restarts the daemon; true when left out. Somebody else may if not, at any moment. */
  readonly disasters?: boolean;
}

interface Range {
  readonly offset: number;
  readonly length: number;
}

const { O_RDWR } = constants;
const LOG_LINES = 60;
const WHOLE_COMPARE_EVERY = 25;
const CHUNK_BYTES = 1024 * 1024;
const PUNCH_HOLE_KEEP_SIZE = 3;
const ZERO_RANGE = 0x10;
const ZERO_RANGE_KEEP_SIZE = 0x11;
/** What the reader of a chase takes at once, and how many writes each writer does to it meanwhile. */
const CHASE_BYTES = 256 * 1024;
const CHASE_WRITES = 6;
const KILL_DELAY_MS_MAX = 20;
const KILLED = ', server killed';
const KILLS_IN_WINDOW_MAX = 4;
const KILLS_WINDOW_MS = 65_000;

export class ModelRun {
  readonly #options: ModelRunOptions;
  readonly #random: Random;
  readonly #disks = new ModelDisks();
  readonly #hands: ModelHands;
  readonly #snapshots: ModelSnapshots;
  readonly #life: ModelLife;
  readonly #operations: readonly Operation[];
  readonly #log: string[] = [];
  readonly #counts = new Map<string, number>();
  #names = 0;
  /** What is to come: each operation once at first, then each as often as its weight says, then the same again in another order. */
  #deck: Operation[] = [];
  #patternSeed = 1;
  #steps = 0;
  #kills: readonly number[] = [];

  constructor(options: ModelRunOptions) {
    this.#options = options;
    this.#random = options.random;
    this.#hands = new ModelHands(options.daemon.mountDir, this.#disks, options.random);
    const { fallocate, survivesServerRestart } = options.abilities;
    const disasters = options.disasters ?? true;
    const parts: ModelParts = {
      daemon: options.daemon, abilities: options.abilities, random: options.random, container: options.container, disks: this.#disks, hands: this.#hands, othersKill: !disasters,
      freshName: (prefix) => `${prefix}-${(this.#names += 1)}`,
      freshData: (lengthBytes) => this.#freshData(lengthBytes),
      makeRoom: async () => { if (this.#disks.paths.length >= DISKS_MAX) await this.#life.remove(); },
    };
    this.#life = new ModelLife(parts);
    this.#snapshots = new ModelSnapshots(parts);
    const operations: readonly Operation[] = [
      { name: 'write', weight: 30, run: () => this.#write() },
      { name: 'read', weight: 12, run: () => this.#read() },
      { name: 'burst', weight: 8, run: () => this.#burst(false) },
      { name: 'chase', weight: 5, run: () => this.#chase() },
      { name: 'discard', weight: fallocate ? 10 : 0, run: () => this.#discard() },
      { name: 'fsync', weight: 4, run: () => this.#fsync() },
      { name: 'open', weight: 8, run: () => this.#open() },
      { name: 'close', weight: 6, run: () => this.#close() },
      ...this.#life.operations,
      ...this.#snapshots.operations,
      ...new ModelRanges(parts, this.#snapshots).operations,
      ...new ModelRebase(parts).operations,
      ...new ModelTransfers(parts, this.#snapshots).operations,
      { name: 'kill', weight: disasters && survivesServerRestart ? 3 : 0, run: () => this.#burst(this.#mayKill()) },
      { name: 'restart', weight: disasters ? 1 : 0, run: () => this.#restart() },
    ];
    this.#operations = operations.filter(({ weight }) => weight > 0);
    this.#deck = [...this.#operations];
  }

  get steps(): number {
    return this.#steps;
  }

  /** How often each operation was done. */
  get counts(): ReadonlyMap<string, number> {
    return this.#counts;
  }

  /** How often each operation was done, for the test's output. */
  summary(): string {
    return [...this.#counts].map(([name, count]) => `${name} ${count}`).join(', ');
  }

  /** The last steps, for the message of a failure. */
  recent(): string {
    return this.#log.join('\n');
  }

  begin(): Promise<void> {
    return this.#hands.begin();
  }

  end(): Promise<void> {
    return this.#hands.end();
  }

  /** A disk that exists already, with the content it must have. */
  adopt(path: string, content: Buffer): void {
    this.#disks.add(path, content);
  }

  async step(): Promise<void> {
    this.#steps += 1;
    const operation = this.#chooseOperation();
    const index = this.#log.push(`${this.#steps} ${operation.name} …`) - 1;
    const what = await operation.run();
    this.#log[index] = `${this.#steps} ${operation.name} ${what}`;
    const name = operation.name === 'kill' && !what.endsWith(KILLED) ? 'burst' : operation.name;
    this.#counts.set(name, (this.#counts.get(name) ?? 0) + 1);
    if (this.#log.length > LOG_LINES) this.#log.splice(0, this.#log.length - LOG_LINES);
    if (this.#steps % WHOLE_COMPARE_EVERY === 0) await this.#hands.compareWhole(this.#random.pick(this.#disks.paths));
  }

  async compareAll(): Promise<void> {
    for (const path of this.#disks.paths) await this.#hands.compareWhole(path);
    await this.#snapshots.compareAll();
  }

  /** Ends every fill that runs, one way or the other, and compares. */
  fillAll(): Promise<void> {
    return this.#life.fillAll();
  }

  /** Operations that did not come up yet. */
  get missing(): readonly string[] {
    return this.#operations.map(({ name }) => name).filter((name) => !this.#counts.has(name));
  }

  /** Steps after which each operation has come up. */
  get roundSteps(): number {
    return this.#operations.length;
  }

  #chooseOperation(): Operation {
    if (this.#deck.length === 0) this.#deck = this.#operations.flatMap((operation) => Array.from({ length: operation.weight }, () => operation));
    const [operation] = this.#deck.splice(this.#random.below(this.#deck.length), 1);
    return operation!;
  }

  /** Some range of a disk: often a block or its neighbourhood, sometimes large, now and then the end. */
  #range(path: string, direct: boolean): Range {
    const random = this.#random;
    const size = this.#disks.sizeBytes(path);
    const length = Math.min(size, random.pick([
      random.between(1, SECTOR_BYTES), SECTOR_BYTES, BLOCK_BYTES, random.between(1, 3 * BLOCK_BYTES), random.between(1, 64 * 1024),
      BLOCK_BYTES * random.between(1, 64), CHUNK_BYTES,
    ]));
    const last = size - length;
    const offset = random.pick([
      random.between(0, last), Math.floor(random.between(0, last) / BLOCK_BYTES) * BLOCK_BYTES, Math.floor(random.between(0, last) / SECTOR_BYTES) * SECTOR_BYTES, last, 0,
    ]);
    if (!direct) return { offset, length };
    const begin = Math.floor(offset / SECTOR_BYTES) * SECTOR_BYTES;
    return { offset: begin, length: Math.ceil((offset + length) / SECTOR_BYTES) * SECTOR_BYTES - begin };
  }

  #freshData(lengthBytes: number): Buffer {
    this.#patternSeed += 2;
    return Buffer.from(patternBytes(this.#patternSeed, 0, lengthBytes));
  }

  async #write(): Promise<string> {
    const path = this.#random.pick(this.#disks.paths);
    const handle = await this.#hands.handle(path);
    const { offset, length } = this.#range(path, handle.direct);
    const data = this.#freshData(length);
    await this.#hands.write(handle.agent, handle.fd, data, offset);
    this.#disks.write(path, offset, data);
    await this.#hands.compareAround(path, handle, offset, length);
    return `${path} ${offset}+${length}`;
  }

  async #read(): Promise<string> {
    const path = this.#random.pick(this.#disks.paths);
    const handle = await this.#hands.handle(path);
    const { offset, length } = this.#range(path, handle.direct);
    await this.#hands.compareRange(path, handle, offset, length);
    return `${path} ${offset}+${length}`;
  }

  async #discard(): Promise<string> {
    const path = this.#random.pick(this.#disks.paths);
    const handle = await this.#hands.handle(path);
    const { offset, length } = this.#range(path, false);
    const mode = this.#random.pick([PUNCH_HOLE_KEEP_SIZE, ZERO_RANGE, ZERO_RANGE_KEEP_SIZE]);
    await this.#hands.agent(handle.agent).call('fallocate', handle.fd, mode, offset, length);
    this.#disks.zero(path, offset, length);
    await this.#hands.compareAround(path, handle, offset, length);
    return `${path} mode ${mode} ${offset}+${length}`;
  }

  async #fsync(): Promise<string> {
    const path = this.#random.pick(this.#disks.paths);
    const { agent, fd } = await this.#hands.handle(path);
    await this.#hands.agent(agent).call(this.#random.chance(0.5) ? 'fsync' : 'fdatasync', fd);
    return path;
  }

  /** Several processes write to neighbouring bytes at once; with `kill`, the server dies meanwhile. */
  async #burst(kill: boolean): Promise<string> {
    const random = this.#random;
    const path = random.pick(this.#disks.paths);
    const handles: Handle[] = [];
    for (let agent = 0; agent < AGENTS; agent += 1) handles.push(await this.#hands.handleOf(path, agent));
    const pieces = Math.min(random.between(6, 24), Math.floor(this.#disks.sizeBytes(path) / SECTOR_BYTES));
    const direct = handles.some((handle) => handle.direct);
    const pieceBytes = random.pick(direct ? [SECTOR_BYTES, 1024, BLOCK_BYTES] : [SECTOR_BYTES, 700, 1024, 3000, BLOCK_BYTES]);
    const anywhere = random.between(0, Math.max(0, this.#disks.sizeBytes(path) - pieces * pieceBytes));
    const begin = direct ? Math.floor(anywhere / SECTOR_BYTES) * SECTOR_BYTES : anywhere;
    const span = Math.min(pieces * pieceBytes, this.#disks.sizeBytes(path) - begin);
    const writes: Promise<void>[] = [];
    for (let offset = begin; offset < begin + span; offset += pieceBytes) {
      const data = this.#freshData(Math.min(pieceBytes, begin + span - offset));
      const { agent, fd } = handles[writes.length % AGENTS]!;
      writes.push(this.#hands.write(agent, fd, data, offset));
      this.#disks.write(path, offset, data);
    }
    if (kill) {
      await pause(random.between(0, KILL_DELAY_MS_MAX));
      await this.#options.daemon.killServer();
    }
    await Promise.all(writes);
    await this.#hands.compareAround(path, handles[0]!, begin, span);
    if (kill) {
      await this.#options.daemon.waitUntilServing();
      await this.#hands.compareWhole(path);
    }
    return `${path} ${begin}+${span} in pieces of ${pieceBytes}${kill ? KILLED : ''}`;
  }

  /** Writes and reads race through a new clone that fills and keeps what is read: nobody may undo a write. */
  async #chase(): Promise<string> {
    if (this.#disks.paths.length >= DISKS_MAX) return this.#life.remove();
    const source = this.#random.pick(this.#disks.paths);
    const path = `${this.#options.container}/clone-${(this.#names += 1)}`;
    const fill = this.#random.chance(0.5);
    await this.#options.daemon.control.clone({ source, targets: [path], fill, copyOnRead: true });
    this.#disks.clone(source, path);
    const size = this.#disks.sizeBytes(path);
    const fds = await Promise.all(Array.from({ length: AGENTS }, (_, agent) => this.#hands.openFor(path, O_RDWR, agent)));
    const calls: Promise<unknown>[] = [];
    for (let begin = 0; begin < size; begin += CHASE_BYTES) {
      const length = Math.min(CHASE_BYTES, size - begin);
      calls.push(this.#hands.agent(0).call('pread', fds[0]!, length, begin));
      for (let writer = 1; writer < AGENTS; writer += 1) {
        // The writers share the blocks of the piece, each with its own half of each block.
        for (let count = 0; count < CHASE_WRITES; count += 1) {
          const block = Math.floor((begin + this.#random.below(length)) / BLOCK_BYTES) * BLOCK_BYTES;
          const offset = block + (writer - 1) * (BLOCK_BYTES / 2);
          const data = this.#freshData(Math.max(0, Math.min(this.#random.between(1, BLOCK_BYTES / 2), size - offset)));
          if (data.length === 0) continue;
          calls.push(this.#hands.write(writer, fds[writer]!, data, offset));
          this.#disks.write(path, offset, data);
        }
      }
    }
    await Promise.all(calls);
    await this.#hands.compareWhole(path);
    for (const [agent, fd] of fds.entries()) await this.#hands.agent(agent).call('close', fd);
    return `${path} of ${source}${fill ? ', filling' : ''}`;
  }

  /** The holder leaves a server down that died too often within a minute: that is not what is tested here. */
  #mayKill(): boolean {
    const now = Date.now();
    const recent = this.#kills.filter((time) => now - time < KILLS_WINDOW_MS);
    if (recent.length >= KILLS_IN_WINDOW_MAX) return false;
    this.#kills = [...recent, now];
    return true;
  }

  async #open(): Promise<string> {
    const path = this.#random.pick(this.#disks.paths);
    const { agent, fd } = await this.#hands.open(path, this.#random.below(AGENTS));
    return `${path} fd ${fd} of agent ${agent}`;
  }

  async #close(): Promise<string> {
    const open = this.#hands.openPaths;
    if (open.length === 0) return 'nothing is open';
    const path = this.#random.pick(open);
    await this.#hands.closeAll(path);
    return path;
  }

  async #restart(): Promise<string> {
    for (const path of this.#hands.openPaths) await this.#hands.closeAll(path);
    await this.#options.daemon.stop();
    await this.#options.daemon.start();
    await this.compareAll();
    return 'of the daemon';
  }
}
