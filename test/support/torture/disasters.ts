/**
 * What happens to a daemon in a torture run while its lanes work: kills of the server, stops and starts, the death of holder
 * and server together in the middle of writes, a store that is full, an upgrade, a check. Each has disks of its own to
 * look at, besides what the lanes compare.
 */
import { constants } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

import type { TestDaemon } from '../daemon.js';
import { FileAgent } from '../model/file-agent.js';
import { firstDifference, patternBytes } from '../model/pattern.js';
import type { Random } from '../model/random.js';
import { waitUntil } from '../processes.js';
import { removeWhenClosed, type PatientControl } from './patient-control.js';
import type { TortureStore } from './torture-store.js';

const { O_RDWR, O_RDONLY } = constants;
const BLOCK_BYTES = 4096;
const SECTOR_BYTES = 512;
const IN_FLIGHT = 8;
const WRITES_MAX = 50_000;
const FULL_WRITE_BYTES = 512 * 1024;
const ROOM_MS_MAX = 30_000;
const AGENT_MS_MAX = 60_000;

export interface DisasterParts {
  readonly daemon: TestDaemon;
  readonly control: PatientControl;
  readonly store: TortureStore;
  readonly random: Random;
  readonly container: string;
  /** An image, and what it holds. */
  readonly source: string;
  readonly sourceContent: Buffer;
}

export class Disasters {
  readonly #parts: DisasterParts;
  #names = 0;
  #patternSeed = 1_000_001;
  /** Disks that stay until the end, and what they hold. */
  readonly #kept = new Map<string, Buffer>();
  refusedForSpace = 0;
  unansweredWrites = 0;

  constructor(parts: DisasterParts) {
    this.#parts = parts;
  }

  async killServer(): Promise<void> {
    const { daemon } = this.#parts;
    await daemon.waitForServer(await daemon.killServer(), AGENT_MS_MAX);
  }

  /** SIGKILL of holder and server while writes are under way: what was answered is there, of the rest each sector is old or new. */
  async killEverything(): Promise<void> {
    const { daemon, random } = this.#parts;
    const [path, before] = await this.#clone(true);
    const agent = await FileAgent.start({ timeoutMs: AGENT_MS_MAX });
    const after = Buffer.from(before);
    const writes: { readonly offset: number; readonly data: Buffer; outcome: string }[] = [];
    try {
      const fd = await agent.call('open', daemon.path(path), O_RDWR, 0);
      let isDead = false;
      // The agent does one after the other; several wait, so that there is always one in the server.
      const writers = Array.from({ length: IN_FLIGHT }, async () => {
        while (!isDead && writes.length < WRITES_MAX) {
          const block = random.below(Math.floor(before.length / BLOCK_BYTES));
          const skip = random.pick([0, 0, 100]);
          const write = { offset: block * BLOCK_BYTES + skip, data: this.#fresh(Math.min(BLOCK_BYTES - skip, random.pick([BLOCK_BYTES, 700, SECTOR_BYTES]))), outcome: '' };
          writes.push(write);
          write.outcome = await agent.outcome('pwrite', fd, write.data, write.offset);
          if (write.outcome !== 'ok') isDead = true;
        }
      });
      await sleep(random.between(0, 300));
      await daemon.killBoth();
      await Promise.all(writers);
    } finally {
      await agent.stop();
    }
    await daemon.start();
    const now = await this.#read(path);
    for (const { offset, data, outcome } of writes) {
      if (outcome !== 'ok') this.unansweredWrites += 1;
      for (let at = 0; at < data.length; at += SECTOR_BYTES) {
        const end = Math.min(data.length, at + SECTOR_BYTES);
        // What an earlier write of this run left is old as well.
        const isOld = now.subarray(offset + at, offset + end).equals(after.subarray(offset + at, offset + end));
        // An answer makes it new; without one it may still be old.
        if (outcome === 'ok' || !isOld) data.copy(after, offset + at, at, end);
      }
    }
    this.#expectSame(path, after, now);
    this.#kept.set(path, after);
  }

  async restart(): Promise<void> {
    await this.#parts.daemon.stop();
    await this.#parts.daemon.start();
  }

  /** Fills the store up below writers: they get ENOSPC and nothing else, what they did not write is as before, names can be removed; then room is made. */
  async fillStore(): Promise<void> {
    const { daemon, store, control } = this.#parts;
    const [path, content] = await this.#clone(false);
    const [spare] = await this.#clone(false);
    const agent = await FileAgent.start({ timeoutMs: AGENT_MS_MAX });
    try {
      const fd = await agent.call('open', daemon.path(path), O_RDWR, 0);
      await store.fillUp();
      let refused = 0;
      for (let offset = 0; offset < content.length; offset += FULL_WRITE_BYTES) {
        const data = this.#fresh(Math.min(FULL_WRITE_BYTES, content.length - offset));
        const outcome = await agent.outcome('pwrite', fd, data, offset);
        if (outcome === 'ok') data.copy(content, offset);
        else if (outcome === 'ENOSPC') refused += 1;
        else throw new Error(`a write to a full store gave ${outcome}`);
        // A write of which a part had room may have been done in part: each sector is old or new.
        if (outcome === 'ENOSPC') this.#adopt(content, await agent.call('pread', fd, data.length, offset), data, offset, path);
      }
      if (refused === 0) throw new Error('the store was filled up, and no write was refused');
      this.refusedForSpace += refused;
      await removeWhenClosed(control, spare);
      this.#expectSame(path, content, await this.#read(path));
      store.empty();
      // A write to where there is room already would not show that there is room again.
      if (!(await waitUntil(async () => (await control.status()).spaceLevel !== 'full', ROOM_MS_MAX))) throw new Error('room was made, and the store is still called full');
      const data = this.#fresh(FULL_WRITE_BYTES);
      if (!(await waitUntil(async () => await agent.outcome('pwrite', fd, data, 0) === 'ok', ROOM_MS_MAX))) throw new Error('room was made, and writes are still refused');
      data.copy(content, 0);
      await agent.call('fsync', fd);
    } finally {
      store.empty();
      await agent.stop();
    }
    this.#expectSame(path, content, await this.#read(path));
    this.#kept.set(path, content);
  }

  /** True when this command line has such a command. */
  async has(...command: readonly string[]): Promise<boolean> {
    const parent = await this.#parts.daemon.cli([...command.slice(0, -1), '--help']);
    return new RegExp(`^\\s+${command.at(-1) ?? ''}\\b`, 'mu').test(parent.stdout);
  }

  async upgrade(): Promise<void> {
    await this.#mustSucceed(['daemon', 'upgrade']);
  }

  async check(...options: readonly string[]): Promise<void> {
    await this.#mustSucceed(['check', ...options]);
  }

  /** Everything that was kept; older ones are taken away so that the store does not fill up by itself. */
  async compareKept(keepAtMost: number): Promise<void> {
    for (const [path, content] of this.#kept) {
      this.#expectSame(path, content, await this.#read(path));
      if (this.#kept.size <= keepAtMost) continue;
      await removeWhenClosed(this.#parts.control, path);
      this.#kept.delete(path);
    }
  }

  async #mustSucceed(args: readonly string[]): Promise<void> {
    const { code, stdout, stderr } = await this.#parts.daemon.cli(args, { timeoutMs: 120_000 });
    if (code !== 0) throw new Error(`offshoot ${args.join(' ')}: exit code ${code}\n${stdout}${stderr}`);
  }

  async #clone(fill: boolean): Promise<[string, Buffer]> {
    const { control, source, sourceContent, container } = this.#parts;
    this.#names += 1;
    const path = `${container}/disk-${this.#names}`;
    await control.clone({ source, targets: [path], fill, copyOnRead: false });
    return [path, Buffer.from(sourceContent)];
  }

  #fresh(lengthBytes: number): Buffer {
    this.#patternSeed += 2;
    return Buffer.from(patternBytes(this.#patternSeed, 0, lengthBytes));
  }

  #adopt(content: Buffer, now: Buffer, data: Buffer, offset: number, path: string): void {
    for (let at = 0; at < data.length; at += SECTOR_BYTES) {
      const sector = now.subarray(at, at + SECTOR_BYTES);
      if (sector.equals(content.subarray(offset + at, offset + at + sector.length))) continue;
      if (!sector.equals(data.subarray(at, at + sector.length))) throw new Error(`${path}: a write that was refused for space left what nobody wrote at ${offset + at}`);
      sector.copy(content, offset + at);
    }
  }

  async #read(path: string): Promise<Buffer> {
    const agent = await FileAgent.start({ timeoutMs: AGENT_MS_MAX });
    try {
      const fd = await agent.call('open', this.#parts.daemon.path(path), O_RDONLY, 0);
      const { sizeBytes } = await agent.call('fstat', fd);
      return await agent.call('pread', fd, sizeBytes, 0);
    } finally {
      await agent.stop();
    }
  }

  #expectSame(path: string, expected: Buffer, actual: Buffer): void {
    const difference = firstDifference(expected, actual, 0);
    if (difference !== null) throw new Error(`${path}: ${difference}`);
  }
}
