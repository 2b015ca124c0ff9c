/**
 * A pair of sockets in the place of /dev/fuse: each read(2) gives one whole message, each write(2) sends one.
 *
 * So the real I/O workers and the real dispatcher can be given bytes that no kernel would send. What a kernel checks of a
 * reply is checked by whoever reads the other end.
 */
import { closeSync } from 'node:fs';
import koffi from 'koffi';

import { IoBuffer } from '../../../blockstore/hot/door.js';

const AF_UNIX = 1;
const SOCK_SEQPACKET = 5;
const SOL_SOCKET = 1;
const SO_SNDBUFFORCE = 32;
const MSG_DONTWAIT = 0x40;
const EAGAIN = 11;
/** Room for several of the largest messages. */
const BUFFER_BYTES = 16 * 1024 * 1024;
const MESSAGE_BYTES_MAX = 2 * 1024 * 1024;

const libc = koffi.load('libc.so.6');
const sysSocketpair = libc.func('int socketpair(int domain, int type, int protocol, _Out_ int *sv)') as unknown as (
  domain: number, type: number, protocol: number, sockets: number[],
) => number;
const sysSetsockopt = libc.func('int setsockopt(int fd, int level, int name, int *value, uint32_t length)') as unknown as (
  fd: number, level: number, name: number, value: number[], length: number,
) => number;
const sysSend = libc.func('int64_t send(int fd, const uint8_t *buf, size_t n, int flags)') as unknown as (
  fd: number, bytes: Uint8Array, lengthBytes: number, flags: number,
) => number;
const sysRecv = libc.func('int64_t recv(int fd, uintptr_t buf, size_t n, int flags)') as unknown as (
  fd: number, address: number, lengthBytes: number, flags: number,
) => number;

export class MessageSocket {
  /** The end that stands for /dev/fuse. */
  readonly serverFd: number;
  readonly #fd: number;
  readonly #buffer = new IoBuffer(MESSAGE_BYTES_MAX);

  constructor() {
    const sockets = [-1, -1];
    if (sysSocketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets) !== 0) throw new Error(`socketpair failed with errno ${koffi.errno()}`);
    const [mine, theirs] = sockets as [number, number];
    this.#fd = mine;
    this.serverFd = theirs;
    for (const fd of sockets) {
      if (sysSetsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, [BUFFER_BYTES], 4) !== 0) throw new Error(`setsockopt failed with errno ${koffi.errno()}`);
    }
  }

  send(message: Uint8Array): void {
    const sent = sysSend(this.#fd, message, message.byteLength, 0);
    if (sent !== message.byteLength) throw new Error(`send of ${message.byteLength} bytes gave ${sent}, errno ${koffi.errno()}`);
  }

  /** The next message, or null when there is none now. */
  receive(): Buffer | null {
    const got = sysRecv(this.#fd, this.#buffer.address, MESSAGE_BYTES_MAX, MSG_DONTWAIT);
    if (got >= 0) return Buffer.from(this.#buffer.bytes.subarray(0, got));
    if (koffi.errno() === EAGAIN) return null;
    throw new Error(`recv failed with errno ${koffi.errno()}`);
  }

  /** The server reads the end of it. Its own descriptor stays, for its number would be another file's while a worker still reads from it. */
  hangUp(): void { closeSync(this.#fd); }

  /** When nobody reads any more. */
  closeServerEnd(): void { closeSync(this.serverFd); }
}
