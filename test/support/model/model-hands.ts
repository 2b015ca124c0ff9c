/**
 * The hands of a model run: the processes that do its I/O, what they have open, and the comparing with the model.
 */
import { constants } from 'node:fs';
import { join } from 'node:path';

import { FileAgent } from './file-agent.js';
import type { ModelDisks } from './model-disks.js';
import { firstDifference } from './pattern.js';
import type { Random } from './random.js';

export interface Handle {
  readonly agent: number;
  readonly fd: number;
  /** Direct I/O: whole sectors only. */
  readonly direct: boolean;
}

export const AGENTS = 3;
const { O_RDONLY, O_RDWR, O_DIRECT, O_DSYNC, O_SYNC } = constants;
const BLOCK_BYTES = 4096;
const CHUNK_BYTES = 1024 * 1024;
/** Longer than the longest stall that a killed server may cause. */
const TIMEOUT_MS = 60_000;

export class ModelHands {
  readonly #mountDir: string;
  readonly #disks: ModelDisks;
  readonly #random: Random;
  readonly #handles = new Map<string, readonly Handle[]>();
  #agents: readonly FileAgent[] = [];

  constructor(mountDir: string, disks: ModelDisks, random: Random) {
    this.#mountDir = mountDir;
    this.#disks = disks;
    this.#random = random;
  }

  async begin(): Promise<void> {
    this.#agents = await Promise.all(Array.from({ length: AGENTS }, () => FileAgent.start({ timeoutMs: TIMEOUT_MS })));
  }

  async end(): Promise<void> {
    await Promise.all(this.#agents.map((agent) => agent.stop()));
    this.#agents = [];
    this.#handles.clear();
  }

  agent(number: number): FileAgent {
    const agent = this.#agents[number];
    if (agent === undefined) throw new Error(`there is no agent ${number}`);
    return agent;
  }

  /** Disks that some handle is open of. */
  get openPaths(): readonly string[] {
    return [...this.#handles.keys()];
  }

  openFor(path: string, flags: number, agent: number): Promise<number> {
    return this.agent(agent).call('open', join(this.#mountDir, path), flags, 0);
  }

  /** Any open handle of a disk; opens one if there is none. */
  async handle(path: string): Promise<Handle> {
    const open = this.#handles.get(path) ?? [];
    return open.length > 0 ? this.#random.pick(open) : this.open(path, this.#random.below(AGENTS));
  }

  async handleOf(path: string, agent: number): Promise<Handle> {
    return (this.#handles.get(path) ?? []).find((handle) => handle.agent === agent) ?? await this.open(path, agent);
  }

  async open(path: string, agent: number): Promise<Handle> {
    const picked = this.#random.pick([O_RDWR, O_RDWR, O_RDWR | O_DIRECT, O_RDWR | O_DIRECT, O_RDWR | O_DSYNC, O_RDWR | O_DIRECT | O_SYNC]);
    // Linux promises nothing of a file's cached pages beside writes of others that go around them. Disks have no such pages.
    const flags = this.#disks.isFile(path) ? picked - (picked & O_DIRECT) : picked;
    const handle = { agent, direct: (flags & O_DIRECT) !== 0, fd: await this.openFor(path, flags, agent) };
    this.#handles.set(path, [...(this.#handles.get(path) ?? []), handle]);
    return handle;
  }

  async closeAll(path: string): Promise<void> {
    for (const { agent, fd } of this.#handles.get(path) ?? []) await this.agent(agent).call('close', fd);
    this.#handles.delete(path);
  }

  async write(agent: number, fd: number, data: Buffer, offset: number): Promise<void> {
    const written = await this.agent(agent).call('pwrite', fd, data, offset);
    if (written !== data.length) throw new Error(`a write of ${data.length} bytes at ${offset} wrote ${written}`);
  }

  async compareRange(path: string, { agent, fd }: Pick<Handle, 'agent' | 'fd'>, offsetBytes: number, lengthBytes: number): Promise<void> {
    await this.comparePiece(path, this.#disks.content(path), { agent, fd }, offsetBytes, lengthBytes);
  }

  /** A range that was touched, and the blocks at both its ends. */
  async compareAround(path: string, handle: Handle, offset: number, length: number): Promise<void> {
    const begin = Math.max(0, Math.floor(offset / BLOCK_BYTES) * BLOCK_BYTES - BLOCK_BYTES);
    const end = Math.min(this.#disks.sizeBytes(path), Math.ceil((offset + length) / BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES);
    await this.compareRange(path, handle, begin, end - begin);
  }

  async compareWhole(path: string): Promise<void> {
    await this.compareContent(path, this.#disks.content(path));
  }

  /** Anything under the mount with what it must hold, size included. */
  async compareContent(path: string, expected: Buffer): Promise<void> {
    const agent = this.agent(0);
    const fd = await this.openFor(path, O_RDONLY, 0);
    try {
      const { sizeBytes } = await agent.call('fstat', fd);
      if (sizeBytes !== expected.length) throw new Error(`${path} has ${sizeBytes} bytes instead of ${expected.length}`);
      for (let offset = 0; offset < sizeBytes; offset += CHUNK_BYTES) await this.comparePiece(path, expected, { agent: 0, fd }, offset, CHUNK_BYTES);
    } finally {
      await agent.outcome('close', fd);
    }
  }

  /** The names in a directory under the mount. */
  async names(path: string): Promise<readonly string[]> {
    return await this.agent(0).call('readdir', join(this.#mountDir, path));
  }

  /** Any piece of what is open, whatever the model calls it. */
  async comparePiece(path: string, content: Buffer, { agent, fd }: Pick<Handle, 'agent' | 'fd'>, offsetBytes: number, lengthBytes: number): Promise<void> {
    const expected = content.subarray(offsetBytes, offsetBytes + lengthBytes);
    const difference = firstDifference(expected, await this.agent(agent).call('pread', fd, expected.length, offsetBytes), offsetBytes);
    if (difference !== null) throw new Error(`${path}: ${difference}`);
  }
}
