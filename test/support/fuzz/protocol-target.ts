/**
 * The FUSE decoder, the dispatcher and the I/O worker against malformed messages, with a real store behind them.
 *
 * What must hold of every message: it has at most one reply, and exactly one if the kernel waits for one; the reply carries
 * all 64 bits of its number and is one that the kernel would take; nothing ends the server; what was written is read back,
 * and nothing else has changed, also after the server was killed or stopped, and the store opened again.
 */
import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';

import { checkStore } from '../../../blockstore/check.js';
import { OffshootError } from '../../../blockstore/errors.js';
import { parseReply, type Reply } from '../../protocol/messages.js';
import { firstDifference } from '../model/pattern.js';
import { FuzzServer, makeDirectories, openStore, type FuzzDirectories } from './fuzz-server.js';
import { bytesOfStep, stepsOn, type Step } from './fuzz-messages.js';
import { fuzzCases, makeFuzzDirectory, type FuzzOptions, type FuzzTarget } from './fuzz-target.js';

/** What the store of every case looks like: ids are given out in order. */
export const NODES = { container: 2, disks: [3, 4, 5], file: 6 } as const;
const INIT = 26;
const UNANSWERED = [2, 41, 42];
const HEADER_BYTES = 40;
/** Bytes that the body of what a worker answers must have. */
const BODY_BYTES_MIN: Readonly<Record<number, number>> = { 15: 40, 16: 40, 43: 32, 46: 24, 47: 56, 53: 56 };
/** Bytes of the payload of a success; what is not here may have any length up to what was asked for. */
const PAYLOAD_BYTES: Readonly<Record<number, number>> = {
  1: 128, 3: 104, 4: 104, 6: 128, 8: 128, 9: 128, 10: 0, 11: 0, 12: 0, 14: 16, 16: 8, 17: 80, 18: 0, 20: 0, 25: 0, 27: 16, 29: 0, 30: 0, 35: 144, 43: 0, 45: 0, 46: 8, 47: 8, 53: 8,
};
const REPLY_MS_MAX = 20_000;
const ERRNO_MAX = 511;
const SENTINEL = 0x5e17_15e1_0000_0000n;

/** What one disk must hold: its first bytes, and how large it is. */
interface ModelDisk {
  readonly content: Buffer;
  sizeBytes: number;
}

class Case {
  readonly #server: FuzzServer;
  readonly #model: Map<number, ModelDisk>;
  #sentinels = 0;

  constructor(directories: FuzzDirectories) {
    this.#server = new FuzzServer(directories);
    const ids = [this.#server.container, ...this.#server.disks, this.#server.file];
    if (ids.join() !== [NODES.container, ...NODES.disks, NODES.file].join()) throw new Error(`the nodes have other ids: ${ids.join()}`);
    this.#model = new Map(NODES.disks.map((disk) => [disk, { content: FuzzServer.content(), sizeBytes: FuzzServer.content().length }]));
  }

  /** False when the server has ended because no session is possible, as it should. */
  async step(step: Step, index: number): Promise<boolean> {
    const message = bytesOfStep(step, index);
    const opcode = message.length >= 8 ? message.readUInt32LE(4) : null;
    // A server that refused the session is gone a moment after its answer; what came to it in between nobody can judge.
    if (this.#server.fatal.some(isRefusedSession)) return false;
    this.#server.socket.send(message);
    if (message.length < 16 || (opcode !== null && UNANSWERED.includes(opcode))) {
      // One worker takes one message after another: when the next one is answered, this one was not.
      this.#sentinels += 1;
      const sentinel = struct17(SENTINEL + BigInt(this.#sentinels));
      this.#server.socket.send(sentinel);
      return await this.#replyTo(sentinel) !== null;
    }
    const reply = await this.#replyTo(message);
    if (reply === null) return false;
    this.#judge(message, reply);
    if (opcode === INIT) for (let turn = 0; turn < 3; turn += 1) await new Promise(setImmediate);
    return true;
  }

  async end(killed: boolean, directories: FuzzDirectories): Promise<void> {
    const { socket, fatal } = this.#server;
    for (let turn = 0; turn < 3; turn += 1) await new Promise(setImmediate);
    const extra = socket.receive();
    if (extra !== null) throw new Error(`a reply that nobody asked for: ${extra.toString('hex')}`);
    if (fatal.some((error) => !isRefusedSession(error))) throw fatal[0]!;
    this.#server.assertBaseUntouched();
    await this.#server.end(!killed);
    const store = openStore(directories, { opened: () => undefined, closed: () => undefined });
    for (const [disk, model] of this.#model) {
      if (store.meta.nodes.byId(disk) === undefined) continue;
      store.disks.acquire(disk);
      const actual = Buffer.alloc(model.content.length, 0xee);
      const got = store.data.read(disk, 0, actual);
      store.disks.release(disk);
      const difference = firstDifference(model.content.subarray(0, Math.min(model.content.length, model.sizeBytes)), actual.subarray(0, got), 0);
      if (difference !== null) throw new Error(`node ${disk}, ${killed ? 'killed' : 'stopped'} and opened again: ${difference}`);
      const { sizeBytes, layerId } = store.meta.nodes.byId(disk)!;
      if (sizeBytes !== model.sizeBytes) throw new Error(`node ${disk} has ${sizeBytes} bytes instead of ${model.sizeBytes}`);
      for (const layer of store.meta.layers.chain(layerId!)) {
        if (layer.kind === 'store' && (layer.sealed || layer.complete) && !existsSync(store.files.storePath(layer.id))) throw new Error(`layer ${layer.id} has no file`);
      }
    }
    // What was open and lost its last name is there until a server starts, which takes it away: here only the store is opened.
    const { verdict, findings, faulted } = checkStore(store, { isNodeInUse: () => true });
    if (verdict !== 'clean' || faulted.length > 0) throw new Error(`the check says ${verdict}: ${JSON.stringify([...findings, ...faulted])}`);
    this.#server.assertBaseUntouched();
    await store.close();
    if (killed) this.#server.store.meta.close();
  }

  async #replyTo(message: Buffer): Promise<Reply | null> {
    const { socket, fatal } = this.#server;
    const deadline = performance.now() + REPLY_MS_MAX;
    for (;;) {
      const bytes = socket.receive();
      if (bytes !== null) return checkedReply(message, bytes);
      const [thrown] = fatal;
      if (thrown !== undefined && isRefusedSession(thrown)) return null;
      if (thrown !== undefined) throw new Error(`the server ended: ${thrown.message}`, { cause: thrown });
      if (performance.now() > deadline) throw new Error(`no reply to ${message.subarray(0, 100).toString('hex')}`);
      await new Promise(setImmediate);
    }
  }

  #copied(sourceId: bigint, payload: Buffer, count: number): void {
    const targetId = Number(payload.readBigUInt64LE(16));
    const target = this.#model.get(targetId);
    if (target === undefined || count === 0) return;
    const source = this.#model.get(Number(sourceId));
    const [from, to] = [Number(payload.readBigUInt64LE(8)), Number(payload.readBigUInt64LE(32))];
    if (to + count > target.sizeBytes || (source !== undefined && from + count > source.sizeBytes)) throw new Error(`a copy of ${count} bytes went over an end`);
    if (source === target && Math.abs(from - to) < count) throw new Error('a copy within one disk overlapped');
    // What came from the file, or from behind what the model knows, nobody knows here any more.
    if (source === undefined || (to < target.content.length && from + Math.min(count, target.content.length - to) > source.content.length)) this.#model.delete(targetId);
    else source.content.copy(target.content, Math.min(to, target.content.length), Math.min(from, source.content.length), Math.min(from + count, source.content.length));
  }

  /** Compares with the model, and keeps it up. */
  #judge(message: Buffer, reply: Reply): void {
    if (message.length < HEADER_BYTES || reply.errno !== 0) return;
    const opcode = message.readUInt32LE(4);
    const payload = message.subarray(HEADER_BYTES);
    const shortest = BODY_BYTES_MIN[opcode] ?? 0;
    if (payload.length < shortest) throw new Error(`success for a body of ${payload.length} bytes, opcode ${opcode}`);
    const expected = PAYLOAD_BYTES[opcode];
    if (expected !== undefined && reply.payload.length !== expected) throw new Error(`${reply.payload.length} bytes answer opcode ${opcode}`);
    if (opcode === 47 || opcode === 53) {
      this.#copied(message.readBigUInt64LE(16), payload, Number(opcode === 53 ? reply.payload.readBigUInt64LE(0) : reply.payload.readUInt32LE(0)));
      return;
    }
    const model = this.#model.get(Number(message.readBigUInt64LE(16)));
    if (model === undefined) return;
    const { content } = model;
    switch (opcode) {
      case 4: {
        if ((payload.readUInt32LE(0) & 8) !== 0) model.sizeBytes = Number(payload.readBigUInt64LE(16));
        return;
      }
      case 15: {
        const offset = Number(payload.readBigUInt64LE(8));
        const end = Math.min(offset + payload.readUInt32LE(16), model.sizeBytes);
        if (reply.payload.length !== Math.max(0, end - offset)) throw new Error(`a read of ${end - offset} bytes gave ${reply.payload.length}`);
        const known = content.subarray(offset, Math.max(offset, end));
        const difference = firstDifference(known, reply.payload.subarray(0, known.length), offset);
        if (difference !== null) throw new Error(`node ${message.readBigUInt64LE(16)}: ${difference}`);
        return;
      }
      case 16: {
        const offset = Number(payload.readBigUInt64LE(8));
        const data = payload.subarray(40);
        if (reply.payload.readUInt32LE(0) !== data.length || (data.length > 0 && offset + data.length > model.sizeBytes)) throw new Error('a write wrote more or fewer bytes than it may');
        if (offset < content.length) data.copy(content, offset);
        return;
      }
      case 43: {
        if ([0, 1].includes(payload.readUInt32LE(24))) return;
        const offset = Number(payload.readBigUInt64LE(8));
        content.fill(0, Math.min(offset, content.length), Math.min(content.length, offset + Number(payload.readBigUInt64LE(16))));
        return;
      }
      case 46: {
        const offset = Number(payload.readBigUInt64LE(8));
        const found = Number(reply.payload.readBigUInt64LE(0));
        if (found < offset || found > model.sizeBytes) throw new Error(`a seek from ${offset} found ${found} of ${model.sizeBytes}`);
        if (payload.readUInt32LE(16) === 4 ? (content[found] ?? 0) !== 0 : content.subarray(offset, found).some((byte) => byte !== 0)) {
          throw new Error(`data from ${offset} to ${found} was called a hole`);
        }
      }
    }
  }
}

function checkedReply(message: Buffer, bytes: Buffer): Reply {
  if (bytes.length < 16) throw new Error(`a reply of ${bytes.length} bytes`);
  const reply = parseReply(bytes);
  const unique = message.readBigUInt64LE(8);
  if (reply.lengthField !== bytes.length) throw new Error(`a reply of ${bytes.length} bytes says ${reply.lengthField}`);
  if (reply.unique !== unique) throw new Error(`a reply to ${reply.unique.toString(16)}, when ${unique.toString(16)} was asked`);
  if (reply.errno < 0 || reply.errno > ERRNO_MAX) throw new Error(`a reply with errno ${reply.errno}, which the kernel refuses`);
  if (reply.errno !== 0 && bytes.length !== 16) throw new Error(`an error of ${bytes.length} bytes`);
  return reply;
}

function struct17(unique: bigint): Buffer {
  return bytesOfStep({ opcode: 17, nodeId: 1n, uniqueHigh: Number(unique / (1n << 32n)), body: new Uint8Array(), damage: null }, Number(unique % (1n << 32n)) - 1);
}

/** INIT of a kernel that no session is possible with: an orderly end. */
function isRefusedSession(error: Error): boolean {
  return error instanceof OffshootError && error.kind === 'not-supported';
}

export const protocolTarget: FuzzTarget = {
  name: 'protocol',
  summary: 'FUSE messages: dispatcher and I/O worker over a real store',
  async run(options: FuzzOptions) {
    const top = makeFuzzDirectory();
    const counts = { cases: 0, messages: 0 };
    try {
      const cases = fc.record({ steps: stepsOn(NODES), killed: fc.boolean() });
      await fuzzCases(options, cases, async ({ steps, killed }) => {
        const directories = makeDirectories(join(top, `case-${counts.cases}`));
        const current = new Case(directories);
        for (const [index, step] of steps.entries()) {
          counts.messages += 1;
          if (!(await current.step(step, index))) break;
        }
        await current.end(killed, directories);
        rmSync(join(top, `case-${counts.cases}`), { recursive: true, force: true });
        counts.cases += 1;
      });
    } finally {
      rmSync(top, { recursive: true, force: true });
    }
    return counts;
  },
};
