/**
 * The service manager's side door (sd_notify(3), the file descriptor store): says how the daemon is, and has the FUSE connection kept.
 *
 * Runs in a foreground holder that was started with NOTIFY_SOCKET. The connection is the one thing that must not end with this process: with
 * a copy in the service manager's store, guests wait while there is no holder, and the next one takes the mount over. The stored
 * descriptor's name carries the number of the connection, so that it is never taken for another mount's. Without a service manager, or when it
 * does not listen, everything here does nothing: no daemon fails because nobody wanted to know.
 */
import koffi from 'koffi';

import type { HolderLog } from './holder-log.js';
import { FD_NAME } from './stored-connections.js';

const ADDRESS_BYTES_MAX = 108;

const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
/** struct msghdr, struct iovec and struct cmsghdr of 64-bit Linux. */
const MessageHeader = { bytes: 56, name: 0, nameLength: 8, vector: 16, vectorLength: 24, control: 32, controlLength: 40 } as const;
const Vector = { bytes: 16, base: 0, length: 8 } as const;
const Control = { bytes: 24, length: 0, level: 8, type: 12, data: 16, usedBytes: 20 } as const;

type Environment = Readonly<Record<string, string | undefined>>;

export interface ServiceManager {
  /** Guests are served. */
  ready(status: string): void;
  stopping(): void;
  /** True when the service manager was given the connection. */
  keepConnection(fuseFd: number, connection: number): boolean;
  /** The mount is gone: the copy of its connection is of no use. */
  dropConnection(connection: number): void;
}

export function serviceManager(log: HolderLog, environment: Environment = process.env): ServiceManager {
  const address = environment['NOTIFY_SOCKET'] ?? '';
  const send = (lines: readonly string[], fd: number | null = null): boolean => {
    if (address === '') return false;
    const failure = sendNotification(address, lines.join('\n'), fd);
    if (failure !== null) log('warn', `the service manager was not told: ${failure}`, { lines: lines.join(' ') });
    return failure === null;
  };
  return {
    ready: (status) => { send(['READY=1', `STATUS=${status}`]); },
    stopping: () => { send(['STOPPING=1', 'STATUS=stopping']); },
    keepConnection: (fuseFd, connection) => send(['FDSTORE=1', `FDNAME=${FD_NAME}${connection}`], fuseFd),
    dropConnection: (connection) => { send(['FDSTOREREMOVE=1', `FDNAME=${FD_NAME}${connection}`]); },
  };
}

/** Null when it was sent; otherwise why not. */
function sendNotification(address: string, text: string, fd: number | null): string | null {
  if (!/^[/@]/u.test(address)) return `NOTIFY_SOCKET is '${address}', which is no address that this daemon knows`;
  const path = Buffer.from(address);
  if (path.length >= ADDRESS_BYTES_MAX) return 'NOTIFY_SOCKET is too long';
  const sockaddr = Buffer.alloc(2 + path.length + (address.startsWith('/') ? 1 : 0));
  sockaddr.writeUInt16LE(AF_UNIX, 0);
  path.copy(sockaddr, 2);
  // '@' stands for the NUL byte that begins an abstract address.
  if (address.startsWith('@')) sockaddr[2] = 0;

  const body = Buffer.from(text);
  const vector = Buffer.alloc(Vector.bytes);
  vector.writeBigUInt64LE(addressOf(body), Vector.base);
  vector.writeBigUInt64LE(BigInt(body.length), Vector.length);
  const header = Buffer.alloc(MessageHeader.bytes);
  header.writeBigUInt64LE(addressOf(sockaddr), MessageHeader.name);
  header.writeUInt32LE(sockaddr.length, MessageHeader.nameLength);
  header.writeBigUInt64LE(addressOf(vector), MessageHeader.vector);
  header.writeBigUInt64LE(1n, MessageHeader.vectorLength);
  const control = Buffer.alloc(Control.bytes);
  if (fd !== null) {
    control.writeBigUInt64LE(BigInt(Control.usedBytes), Control.length);
    control.writeInt32LE(SOL_SOCKET, Control.level);
    control.writeInt32LE(SCM_RIGHTS, Control.type);
    control.writeInt32LE(fd, Control.data);
    header.writeBigUInt64LE(addressOf(control), MessageHeader.control);
    header.writeBigUInt64LE(BigInt(Control.bytes), MessageHeader.controlLength);
  }

  const calls = systemCalls();
  const socket = calls.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (socket < 0) return `socket failed with errno ${koffi.errno()}`;
  try {
    const sent = calls.sendmsg(socket, header, MSG_DONTWAIT | MSG_NOSIGNAL);
    // Looked at after the call: what the kernel was given addresses of must not be collected before.
    const bytesHeld = sockaddr.length + body.length + vector.length + control.length;
    return sent >= 0 && bytesHeld > 0 ? null : `sendmsg failed with errno ${koffi.errno()}`;
  } finally {
    calls.close(socket);
  }
}

function addressOf(bytes: Buffer): bigint {
  return koffi.address(bytes);
}

interface Calls {
  socket(domain: number, type: number, protocol: number): number;
  sendmsg(socket: number, header: Buffer, flags: number): number;
  close(fd: number): number;
}

let known: Calls | undefined;

/** Looked up when they are first needed: most daemons have no service manager. */
function systemCalls(): Calls {
  if (known === undefined) {
    const libc = koffi.load('libc.so.6');
    known = {
      socket: libc.func('int socket(int domain, int type, int protocol)') as unknown as Calls['socket'],
      sendmsg: libc.func('long sendmsg(int socket, const void *header, int flags)') as unknown as Calls['sendmsg'],
      close: libc.func('int close(int fd)') as unknown as Calls['close'],
    };
  }
  return known;
}
