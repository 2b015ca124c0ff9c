/**
 * A client of the NBD protocol: reads from an export, many requests at a time, over a socket that somebody else made.
 *
 * Main thread, asynchronous. Fixed newstyle handshake with NBD_OPT_GO, simple replies, READ: what every server speaks, qemu-nbd,
 * qemu-storage-daemon and nbdkit among them, and the fetcher of this directory. A server may answer in any order. It knows no
 * time-outs: who waits too long stops waiting, and the late answer, whose bytes must still be taken off the wire, is thrown
 * away. Whatever is not the protocol ends the connection; nothing is guessed.
 */
import type { Duplex } from 'node:stream';

import { ByteStream } from './byte-stream.js';
import {
  Command, HandshakeFlag, IHAVEOPT, INFO_EXPORT, NBD_MAGIC, OPTION_BYTES_MAX, OPTION_REPLY_BYTES, OPTION_REPLY_MAGIC, Option, OptionReply, REQUEST_BYTES,
  REQUEST_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
} from './nbd.js';

/** The server said no to this request, and goes on with others. */
export class NbdReplyError extends Error {
  readonly errno: number;

  constructor(errno: number) {
    super(`the source answered with error ${errno}`);
    this.errno = errno;
  }
}

/** The server does not offer the export; its words are in the message. */
export class NbdRefusal extends Error {}

interface Pending {
  readonly lengthBytes: number;
  readonly resolve: (bytes: Buffer) => void;
  readonly reject: (error: Error) => void;
}

const HANDLES = 2 ** 32;

export class NbdClient {
  /** Settles when the connection is over; never rejects. */
  readonly closed: Promise<Error>;
  readonly sizeBytes: number;
  private readonly stream: ByteStream;
  private readonly pending = new Map<number, Pending>();
  private nextHandle = 1;
  private failure: Error | null = null;

  private constructor(stream: ByteStream, sizeBytes: number) {
    this.stream = stream;
    this.sizeBytes = sizeBytes;
    this.closed = this.receive();
  }

  /** Shakes hands. NbdRefusal: the server does not offer this export. */
  static async connect(socket: Duplex, exportName = ''): Promise<NbdClient> {
    const stream = new ByteStream(socket);
    try {
      const greeting = await stream.take(18);
      if (greeting.readBigUInt64BE(0) !== NBD_MAGIC || greeting.readBigUInt64BE(8) !== IHAVEOPT) throw new Error('the server does not speak newstyle NBD');
      if ((greeting.readUInt16BE(16) & HandshakeFlag.FIXED_NEWSTYLE) === 0) throw new Error('the server does not speak fixed newstyle NBD');
      stream.write(goRequest(exportName, greeting.readUInt16BE(16) & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)));
      return new NbdClient(stream, await exportSize(stream));
    } catch (thrown) {
      stream.end();
      throw thrown;
    }
  }

  /** Bytes under way. */
  get inFlight(): number {
    return this.pending.size;
  }

  /** Exactly `lengthBytes`; NbdReplyError when the server says no, another error when the connection ended first. */
  async read(offsetBytes: number, lengthBytes: number): Promise<Buffer> {
    if (this.failure !== null) throw this.failure;
    const handle = this.nextHandle;
    this.nextHandle = (handle % (HANDLES - 1)) + 1;
    const request = Buffer.alloc(REQUEST_BYTES);
    request.writeUInt32BE(REQUEST_MAGIC, 0);
    request.writeUInt16BE(Command.READ, 6);
    request.writeUInt32BE(handle, 12);
    request.writeBigUInt64BE(BigInt(offsetBytes), 16);
    request.writeUInt32BE(lengthBytes, 24);
    return await new Promise<Buffer>((resolve, reject) => {
      this.pending.set(handle, { lengthBytes, resolve, reject });
      this.stream.write(request);
    });
  }

  /** Ends the connection; what is under way is rejected. */
  end(): void {
    this.stream.end();
  }

  private async receive(): Promise<Error> {
    let error: Error;
    try {
      for (;;) await this.receiveOne();
    } catch (thrown) {
      error = thrown instanceof Error ? thrown : new Error(String(thrown));
    }
    this.failure = error;
    this.stream.end();
    for (const { reject } of this.pending.values()) reject(error);
    this.pending.clear();
    return error;
  }

  private async receiveOne(): Promise<void> {
    const header = await this.stream.take(SIMPLE_REPLY_BYTES);
    if (header.readUInt32BE(0) !== SIMPLE_REPLY_MAGIC) throw new Error('the server sent something that is no simple reply');
    const errno = header.readUInt32BE(4);
    const handle = header.readUInt32BE(12);
    const pending = this.pending.get(handle);
    if (pending === undefined || header.readUInt32BE(8) !== 0) throw new Error('the server answered a request that was not made');
    if (errno !== 0) {
      this.pending.delete(handle);
      pending.reject(new NbdReplyError(errno));
      return;
    }
    const bytes = await this.stream.take(pending.lengthBytes);
    this.pending.delete(handle);
    pending.resolve(bytes);
  }
}

function goRequest(exportName: string, flags: number): Buffer {
  const name = Buffer.from(exportName, 'utf8');
  const request = Buffer.alloc(4 + 16 + 4 + name.length + 2);
  request.writeUInt32BE(flags, 0);
  request.writeBigUInt64BE(IHAVEOPT, 4);
  request.writeUInt32BE(Option.GO, 12);
  request.writeUInt32BE(4 + name.length + 2, 16);
  request.writeUInt32BE(name.length, 20);
  name.copy(request, 24);
  return request;
}

async function exportSize(stream: ByteStream): Promise<number> {
  let sizeBytes: number | null = null;
  for (;;) {
    const header = await stream.take(OPTION_REPLY_BYTES);
    if (header.readBigUInt64BE(0) !== OPTION_REPLY_MAGIC || header.readUInt32BE(8) !== Option.GO) throw new Error('the server answered an option that was not sent');
    const type = header.readUInt32BE(12);
    const lengthBytes = header.readUInt32BE(16);
    if (lengthBytes > OPTION_BYTES_MAX) throw new Error(`the server sent ${lengthBytes} bytes for an option`);
    const body = lengthBytes === 0 ? Buffer.alloc(0) : await stream.take(lengthBytes);
    if (type >= OptionReply.ERROR) throw new NbdRefusal(body.length > 0 ? body.toString('utf8') : `error ${type - OptionReply.ERROR}`);
    if (type === OptionReply.INFO && body.length >= 12 && body.readUInt16BE(0) === INFO_EXPORT) {
      const size = body.readBigUInt64BE(2);
      if (size > BigInt(Number.MAX_SAFE_INTEGER)) throw new Error('the export is larger than anything');
      sizeBytes = Number(size);
    }
    if (type !== OptionReply.ACK) continue;
    if (sizeBytes === null) throw new Error('the server did not say how large the export is');
    return sizeBytes;
  }
}
