/**
 * A small real server for the tests of the holder: speaks its messages, and answers the kernel for an empty directory.
 *
 * Knows INIT, GETATTR, OPENDIR, READDIR, STATFS; everything else is ENOSYS. A server that follows another sends RESEND before it reads, and
 * expects no INIT. Its conduct is read from STORE/conduct.json at each start (`Conduct`), and it writes what it sees to
 * STORE/events.log, one JSON object a line. Reads /dev/fuse through libuv, so that the main thread stays free for messages.
 */
import { appendFileSync, existsSync, fstatSync, mkdir, readFileSync, readSync, read, writeSync } from 'node:fs';
import { join } from 'node:path';

import { connectToHolder } from '../../daemon/holder/holder-link.js';
import { HAND_OVER_CODE, type BuildIdentity } from '../../daemon/holder/ipc.js';
import { parseServerOptions, SERVER_FD } from '../../daemon/holder/options.js';
import { mountFuse, openFuseDevice, unmount } from '../../daemon/transport/kernel/mount.js';

export interface Conduct {
  /** Say failed, and end with 1. */
  readonly fail?: { readonly kind: 'store-version'; readonly message: string };
  /** End at once with this code, without a word. */
  readonly exitAtOnce?: number;
  /** Never say ready. */
  readonly neverReady?: boolean;
  /** Read this request and die of it, as a server that crashes on it would. */
  readonly dieOfOpcode?: number;
  /** Die of SIGKILL when the holder has unmounted. */
  readonly dieAfterUnmount?: boolean;
  /** Say that this is another build. */
  readonly build?: BuildIdentity;
  /** End with 3 when told to hand over. */
  readonly dieInsteadOfHandOver?: boolean;
  /** Make this directory, in a thread of its own, before saying ready. */
  readonly makeDirectory?: string;
  /** Ask for the unmount by force. */
  readonly force?: boolean;
}

const Opcode = { FORGET: 2, GETATTR: 3, STATFS: 17, INIT: 26, OPENDIR: 27, READDIR: 28, RELEASEDIR: 29, DESTROY: 38, BATCH_FORGET: 42 } as const;
const ENOSYS = 38;
const RESEND = 7;
const DIRECTORY_MODE = 0o040755;

const options = parseServerOptions(process.argv[2]);
const conductPath = join(options.storeDir, 'conduct.json');
const conduct = existsSync(conductPath) ? (JSON.parse(readFileSync(conductPath, 'utf8')) as Conduct) : {};
let isStopping = false;
let restarts = options.restarts;

function event(what: string, details: object = {}): void {
  appendFileSync(join(options.storeDir, 'events.log'), `${JSON.stringify({ pid: process.pid, what, ...details })}\n`);
}

function die(): void {
  process.kill(process.pid, 'SIGKILL');
}

function reply(fuseFd: number, request: Buffer, error: number, body: Buffer = Buffer.alloc(0)): void {
  const message = Buffer.alloc(16 + body.length);
  message.writeUInt32LE(message.length, 0);
  message.writeInt32LE(-error, 4);
  request.copy(message, 8, 8, 16);
  body.copy(message, 16);
  writeSync(fuseFd, message);
}

function initReply(request: Buffer): Buffer {
  const body = Buffer.alloc(64);
  body.writeUInt32LE(7, 0);
  body.writeUInt32LE(Math.min(40, request.readUInt32LE(44)), 4);
  body.writeUInt32LE(request.readUInt32LE(48), 8);
  body.writeUInt16LE(64, 16);
  body.writeUInt16LE(48, 18);
  body.writeUInt32LE(128 * 1024, 20);
  body.writeUInt32LE(1, 24);
  return body;
}

/** No validity: the kernel asks again each time. */
function rootAttributes(): Buffer {
  const body = Buffer.alloc(104);
  body.writeBigUInt64LE(1n, 16);
  body.writeUInt32LE(DIRECTORY_MODE, 16 + 60);
  body.writeUInt32LE(2, 16 + 64);
  return body;
}

function answer(fuseFd: number, request: Buffer): void {
  const opcode = request.readUInt32LE(4);
  const isResent = ((request[15] ?? 0) & 0x80) !== 0;
  event('request', { opcode, isResent });
  if (opcode === conduct.dieOfOpcode) {
    die();
    return;
  }
  switch (opcode) {
    case Opcode.FORGET:
    case Opcode.BATCH_FORGET:
      return;
    case Opcode.INIT:
      reply(fuseFd, request, 0, initReply(request));
      return;
    case Opcode.GETATTR:
      reply(fuseFd, request, 0, rootAttributes());
      return;
    case Opcode.STATFS:
      reply(fuseFd, request, 0, Buffer.alloc(80));
      return;
    case Opcode.OPENDIR:
      reply(fuseFd, request, 0, Buffer.alloc(16));
      return;
    case Opcode.READDIR:
    case Opcode.RELEASEDIR:
    case Opcode.DESTROY:
      reply(fuseFd, request, 0);
      return;
    default:
      reply(fuseFd, request, ENOSYS);
  }
}

function serve(fuseFd: number): void {
  const buffer = Buffer.alloc(256 * 1024);
  read(fuseFd, buffer, 0, buffer.length, null, (error, bytes) => {
    if (error?.code === 'ENODEV') {
      // Unmounted, by the holder, whose answer is waited for, or by somebody's hand: everything is committed, so this is the orderly end.
      if (isStopping) return;
      event('unmounted');
      process.exit(0);
    }
    if (error === null) answer(fuseFd, buffer.subarray(0, bytes));
    else if (error.code !== 'EINTR' && error.code !== 'EAGAIN') throw error;
    serve(fuseFd);
  });
}

function openConnection(): number {
  if (options.transport === 'kernel') return SERVER_FD.fuse;
  const fuseFd = openFuseDevice();
  mountFuse(fuseFd, options.mountDir);
  return fuseFd;
}

/** What the holder gave this process: compared by the test with what it should give. */
function inherited(): object {
  const lockText = Buffer.alloc(32);
  const lockBytes = readSync(SERVER_FD.lock, lockText, 0, lockText.length, 0);
  const status = readFileSync('/proc/self/status', 'utf8');
  return {
    threadPool: process.env['UV_THREADPOOL_SIZE'],
    cwd: process.cwd(),
    umask: /^Umask:\s*(\S+)/mu.exec(status)?.[1],
    lockText: lockText.toString('utf8', 0, lockBytes),
    fuseRdev: fstatSync(SERVER_FD.fuse).rdev,
  };
}

async function main(): Promise<void> {
  event('start', { options, inherited: inherited() });
  if (conduct.exitAtOnce !== undefined) process.exit(conduct.exitAtOnce);
  const stop = async (): Promise<void> => {
    isStopping = true;
    if (options.transport === 'fuse-native') unmount(options.mountDir, { lazy: false });
    else await link.unmount({ force: conduct.force ?? false });
    event('unmounted');
    if (conduct.dieAfterUnmount === true) die();
    event('closed');
    process.exit(0);
  };
  const link = connectToHolder({
    shutdown: () => {
      event('shutdown');
      stop().catch((error: unknown) => {
        isStopping = false;
        event('refused', { message: (error as Error).message });
      });
    },
    handOver: () => {
      event('hand-over');
      process.exit(conduct.dieInsteadOfHandOver === true ? 3 : HAND_OVER_CODE);
    },
    lost: () => {
      event('lost');
      if (options.standby && !went) process.exit(0);
      if (options.connectionIsStored) process.exit(HAND_OVER_CODE);
    },
    unknown: (received) => {
      event('unknown', { message: received });
    },
  });
  let went = false;
  await link.hello(conduct.build ?? { version: '1.0.0', holderProtocol: 1, storeSchema: 1, runtimeFormat: 1 });
  if (options.standby) {
    restarts = await link.go();
    went = true;
    event('go', { options: { ...options, restarts } });
  }
  if (conduct.fail !== undefined) {
    await link.failed(conduct.fail);
    process.exit(1);
  }
  const fuseFd = openConnection();
  if (restarts > 0 && options.transport === 'kernel') {
    const resend = Buffer.alloc(16);
    resend.writeUInt32LE(16, 0);
    resend.writeInt32LE(RESEND, 4);
    try {
      writeSync(fuseFd, resend);
    } catch (error) {
      event('resend-failed', { code: (error as NodeJS.ErrnoException).code });
    }
  }
  serve(fuseFd);
  if (conduct.makeDirectory !== undefined) mkdir(conduct.makeDirectory, () => undefined);
  if (conduct.neverReady !== true) await link.ready();
}

await main();
