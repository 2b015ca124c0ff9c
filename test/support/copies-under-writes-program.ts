/**
 * COPY_FILE_RANGE among WRITEs that nobody waits for, through the real I/O worker and the real dispatcher (FuzzServer), and what each copy may have come to.
 *
 * One worker takes messages in their order and hands copies on to the main thread, so that writes sent before a copy are done when it begins, and those sent
 * behind it happen while it is made. Of the writes to the source behind it, a copy of one moment has the first so many, and no other.
 * Prints counts, and what was wrong, as JSON.
 */
import { rmSync } from 'node:fs';

import { body, parseReply, request, struct, type Reply } from '../protocol/messages.js';
import { FuzzServer, makeDirectories } from './fuzz/fuzz-server.js';
import { makeFuzzDirectory } from './fuzz/fuzz-target.js';
import { createRandom } from './model/random.js';

const ROUNDS = 120;
const BLOCK = 4096;
/** Blocks of the disks that copies and writes are about. */
const BLOCKS = 20;
const READ = 15;
const WRITE = 16;
const COPY = 53;
const EOPNOTSUPP = 95;

const top = makeFuzzDirectory();
const server = new FuzzServer(makeDirectories(`${top}/case`));
const random = createRandom(Number(process.env['OFFSHOOT_SEED'] ?? 7));
const replies = new Map<bigint, Reply>();
const wrong: string[] = [];
let unique = 0n;
let marks = 0;

function send(opcode: number, nodeId: number, content: Uint8Array): bigint {
  unique += 2n;
  server.socket.send(request({ opcode, nodeId: BigInt(nodeId), unique, body: content }));
  return unique;
}

async function reply(to: bigint): Promise<Reply> {
  for (;;) {
    const found = replies.get(to);
    if (found !== undefined) return found;
    if (server.fatal[0] !== undefined) throw server.fatal[0];
    const message = server.socket.receive();
    if (message === null) await new Promise(setImmediate);
    else {
      const parsed = parseReply(message);
      replies.set(parsed.unique, parsed);
    }
  }
}

/** A whole block that holds a number used for nothing else. */
function write(disk: number, block: number): { readonly mark: number; readonly sent: bigint } {
  marks += 1;
  const data = Buffer.alloc(BLOCK);
  for (let at = 0; at < BLOCK; at += 8) data.writeDoubleLE(marks, at);
  return { mark: marks, sent: send(WRITE, disk, body(struct(1n, BigInt(block * BLOCK), BLOCK, 0, 0n, 0, 0), data)) };
}

async function must(sent: bigint, what: string): Promise<void> {
  const { errno } = await reply(sent);
  if (errno !== 0) wrong.push(`${what}: errno ${errno}`);
}

/** The number in each block; a block that is torn between two is wrong. */
async function look(disk: number): Promise<number[]> {
  const { payload } = await reply(send(READ, disk, struct(1n, 0n, BLOCKS * BLOCK, 0, 0n, 0, 0)));
  return Array.from({ length: BLOCKS }, (_, block) => {
    const first = payload.readDoubleLE(block * BLOCK);
    for (let at = 0; at < BLOCK; at += 8) if (payload.readDoubleLE(block * BLOCK + at) !== first) wrong.push(`block ${block} of ${disk} is torn`);
    return first;
  });
}

let shared = 0;
for (const disk of server.disks) for (let block = 0; block < BLOCKS; block += 1) await must(write(disk, block).sent, 'a write');
for (let round = 0; round < ROUNDS; round += 1) {
  const [source, target] = [server.disks[round % 3]!, server.disks[(round + 1 + random.below(2)) % 3]!];
  const [sourceBefore, targetBefore] = [await look(source), await look(target)];
  // Nobody waits for these either, but they come first.
  const early = Array.from({ length: random.below(6) }, () => random.below(BLOCKS)).map((block) => ({ block, ...write(source, block) }));
  for (const { block, mark } of early) sourceBefore[block] = mark;
  const copy = send(COPY, source, struct(1n, 0n, BigInt(target), 2n, 0n, BigInt(BLOCKS * BLOCK), 0n));
  const order = Array.from({ length: BLOCKS }, (_, block) => block).sort(() => random.below(3) - 1);
  const later = order.slice(0, 8).map((block) => ({ block, ...write(source, block) }));
  const over = order.slice(4, 14).map((block) => ({ block, ...write(target, block) }));
  for (const { sent } of [...early, ...later, ...over]) await must(sent, 'a write');
  const { errno, payload } = await reply(copy);
  if (errno !== 0 && errno !== EOPNOTSUPP) wrong.push(`a copy: errno ${errno}`);
  if (errno === 0 && payload.readBigUInt64LE(0) !== BigInt(BLOCKS * BLOCK)) wrong.push('a copy is short');
  shared += errno === 0 ? 1 : 0;

  const now = await look(source);
  const expected = [...sourceBefore];
  for (const { block, mark } of later) expected[block] = mark;
  if (now.join() !== expected.join()) wrong.push(`round ${round}: the source is ${now.join()}, not ${expected.join()}`);
  const got = await look(target);
  // Which of the later writes the copy has: the first so many, but where the target was written over.
  const writtenOver = new Map(over.map(({ block, mark }) => [block, mark]));
  const isPossible = (count: number): boolean => {
    const content = errno === 0 ? [...sourceBefore] : [...targetBefore];
    if (errno === 0) for (const { block, mark } of later.slice(0, count)) content[block] = mark;
    // The target's own writes, in their order: those before the copy are gone, those behind it are there.
    const kept = over.map(({ block, mark }) => got[block] === mark);
    if (errno === 0 ? kept.lastIndexOf(false) > kept.indexOf(true) && kept.includes(true) : kept.includes(false)) return false;
    return got.every((value, block) => value === content[block] || value === writtenOver.get(block));
  };
  if (!later.some((_, i) => isPossible(i)) && !isPossible(later.length)) {
    wrong.push(`round ${round}: the target is ${got.join()}; before ${targetBefore.join()}, source ${sourceBefore.join()}, later ${JSON.stringify(later.map(({ block, mark }) => [block, mark]))}, over ${JSON.stringify([...writtenOver])}`);
  }
  // What comes now is nobody's business but the source's.
  for (let block = 0; block < BLOCKS; block += 3) await must(write(source, block).sent, 'a write');
  if ((await look(target)).join() !== got.join()) wrong.push(`round ${round}: a later write to the source is seen in the target`);
  replies.clear();
}
await server.end(true);
rmSync(top, { recursive: true, force: true });
process.stdout.write(JSON.stringify({ copies: ROUNDS, shared, wrong: wrong.slice(0, 5) }));
process.exit(0);
