/**
 * The door of the exports over NBD: a process of its own that listens, looks who comes, and lets in whom the export's list names: each connection is given to an
 * nbdkit(1) of its own, which has the socket from then on; nobody else hears a byte.
 *
 *     node main.js DIRECTORY/nbd.conf MOUNT
 *
 * The configuration is JSON (`door-config.ts`). SIGHUP: it is read again; what is the same in it is not touched, who is connected to what is gone is cut off.
 * What came of it is written to DIRECTORY/nbd.up. An nbdkit does not end with this process, but with its client: the next door finds it (`guests.ts`). MOUNT is there
 * for people who look at processes.
 */
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { BlockList, createServer, isIPv4, isIPv6, type Server, type Socket } from 'node:net';
import path from 'node:path';

import { writeWhole } from '../export-process.js';
import { parseDoorConfig, stateFileOf, type DoorConfig, type DoorEntry, type DoorState } from './door-config.js';
import { connectionsOf, killGuests, markOf } from './guests.js';

const CONNECTIONS_MAX = 64;
const MAPPED = '::ffff:';
/**
 * nbdkit that serves a socket which it was given asks the kernel for SIGTERM at its parent's death (1.32: `--single` implies `--exit-with-parent`), and a door may be killed. So
 * it is begun by a shell that is gone: only when that is so does it become nbdkit. A background command of a shell has its own input unless it is given one.
 */
const ADOPTED_AWAY = 'exec 3<&0; (while read -r _ _ _ parent _ < /proc/self/stat && [ "$parent" = $$ ]; do :; done; exec -a "$0" "$@" <&3 3<&-) &';

const configFile = process.argv[2] ?? '';
const directory = path.dirname(configFile);
/** By what the configuration says of them, all of it. */
const doors = new Map<string, Server>();
let reading: Promise<void> = Promise.resolve();

function readAgain(): void {
  reading = reading.then(adopt).catch((error: unknown) => {
    process.stderr.write(`${configFile}: ${(error as Error).message}\n`);
    if (doors.size === 0) process.exit(1);
  });
}

async function adopt(): Promise<void> {
  const config = parseDoorConfig(readFileSync(configFile, 'utf8'));
  const wanted = new Map(config.entries.map((entry) => [JSON.stringify(entry), entry]));
  for (const [key, door] of doors) {
    if (wanted.has(key)) continue;
    doors.delete(key);
    await new Promise<void>((resolve) => { door.close(() => { resolve(); }); });
  }
  killGuests(directory, new Set(config.entries.map((entry) => markOf(directory, entry))));
  const failures: Record<string, string> = {};
  for (const [key, entry] of wanted) {
    if (doors.has(key)) continue;
    try {
      doors.set(key, await open(config, entry));
    } catch (error) {
      failures[String(entry.id)] = (error as Error).message;
    }
  }
  writeWhole(stateFileOf(configFile), JSON.stringify({ serial: config.serial, failures } satisfies DoorState));
}

async function open({ program }: DoorConfig, entry: DoorEntry): Promise<Server> {
  const allowed = new BlockList();
  for (const client of entry.clients) {
    const [address = '', prefix] = client.split('/');
    const family = isIPv6(address) ? 'ipv6' : 'ipv4';
    if (prefix === undefined) allowed.addAddress(address, family);
    else allowed.addSubnet(address, Number(prefix), family);
  }
  const mark = markOf(directory, entry);
  // Not a byte is read here: it would be missing there.
  const server = createServer({ pauseOnConnect: true }, (socket) => {
    socket.on('error', () => { socket.destroy(); });
    if (isAllowed(allowed, socket.remoteAddress) && connectionsOf(directory, mark) < CONNECTIONS_MAX) handOver(socket, program, entry, mark);
    else socket.resetAndDestroy();
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen({ host: entry.address, port: entry.port, ipv6Only: isIPv6(entry.address) }, () => {
      server.off('error', reject);
      resolve();
    });
  });
  server.on('error', (error) => { process.stderr.write(`${entry.address}:${entry.port}: ${error.message}\n`); });
  return server;
}

function isAllowed(allowed: BlockList, remote: string | undefined): boolean {
  if (remote === undefined) return false;
  const plain = remote.toLowerCase().startsWith(MAPPED) && isIPv4(remote.slice(MAPPED.length)) ? remote.slice(MAPPED.length) : remote;
  return allowed.check(plain, isIPv6(plain) ? 'ipv6' : 'ipv4');
}

function handOver(socket: Socket, program: string, entry: DoorEntry, mark: string): void {
  socket.setNoDelay(true);
  // A client whose host has died is noticed, and its connection ends.
  socket.setKeepAlive(true, 60_000);
  const guest = spawn('bash', ['-p', '-c', ADOPTED_AWAY, mark, program, ...entry.arguments], { argv0: mark, cwd: '/', detached: true, stdio: [socket, socket, 'inherit'] });
  guest.once('error', (error) => { process.stderr.write(`${program}: ${error.message}\n`); });
  // It has a descriptor of its own; ours would keep the client waiting after its end.
  socket.destroy();
}

// A door with no address left to listen at stays until it is told to end: what it could not do is asked of it, and read from its state.
setInterval(() => undefined, 2 ** 30);
process.on('SIGHUP', readAgain);
process.on('SIGTERM', () => { process.exit(0); });
readAgain();
