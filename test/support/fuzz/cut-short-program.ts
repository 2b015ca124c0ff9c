/**
 * Sends a sound READ, WRITE, FALLOCATE and LSEEK of a disk, each followed by one whose body was cut short by a byte under a header
 * that agrees, and prints the errnos of the replies as JSON.
 */
import { rmSync } from 'node:fs';

import { parseReply, request, struct, body } from '../../protocol/messages.js';
import { makeFuzzDirectory } from './fuzz-target.js';
import { FuzzServer, makeDirectories } from './fuzz-server.js';

const top = makeFuzzDirectory();
const server = new FuzzServer(makeDirectories(`${top}/case`));
const nodeId = BigInt(server.disks[1]!);
const errnos: Record<string, number[]> = {};
let unique = 0n;

async function ask(opcode: number, content: Uint8Array): Promise<number> {
  unique += 2n;
  server.socket.send(request({ opcode, nodeId, unique, body: content }));
  for (;;) {
    const reply = server.socket.receive();
    if (reply !== null) return parseReply(reply).errno;
    if (server.fatal[0] !== undefined) throw server.fatal[0];
    await new Promise(setImmediate);
  }
}

const sound: readonly (readonly [string, number, Uint8Array])[] = [
  ['READ', 15, struct(1n, 0n, 4096, 0, 0n, 0, 0)],
  ['WRITE', 16, body(struct(1n, 0n, 0, 0, 0n, 0, 0))],
  ['FALLOCATE', 43, struct(1n, 0n, 4096n, 3, 0)],
  ['LSEEK', 46, struct(1n, 0n, 3, 0)],
];
for (const [name, opcode, content] of sound) errnos[name] = [await ask(opcode, content), await ask(opcode, content.subarray(0, content.length - 1))];
await server.end(true);
rmSync(top, { recursive: true, force: true });
process.stdout.write(JSON.stringify(errnos));
process.exit(0);
