/**
 * The fetcher's side of NBD: one export, read-only, one client, over a socket pair. Asynchronous; knows nothing of files.
 *
 * Requests are begun as they come and answered as they end. A request that is not understood ends the connection: the client is
 * our own, so it would be a fault of the program.
 */
import type { Duplex } from 'node:stream';

import { ByteStream } from '../byte-stream.js';
import {
  Command, HandshakeFlag, IHAVEOPT, INFO_EXPORT, NBD_MAGIC, NbdError, OPTION_BYTES_MAX, OPTION_HEADER_BYTES, OPTION_REPLY_BYTES, OPTION_REPLY_MAGIC, Option,
  OptionReply, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, TransmissionFlag,
} from '../nbd.js';

export interface NbdExport {
  readonly sizeBytes: number;
  /** Fills `target` from `offsetBytes` on: 0, or an NBD error. */
  read(target: Buffer, offsetBytes: number): Promise<number>;
}

const READ_BYTES_MAX = 32 * 1024 * 1024;

/** Serves until the client is gone. `open` makes the export when the client asks for it; what it throws is the refusal's text. */
export async function serveNbd(socket: Duplex, open: () => Promise<NbdExport>): Promise<void> {
  const stream = new ByteStream(socket);
  const greeting = Buffer.alloc(18);
  greeting.writeBigUInt64BE(NBD_MAGIC, 0);
  greeting.writeBigUInt64BE(IHAVEOPT, 8);
  greeting.writeUInt16BE(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES, 16);
  stream.write(greeting);
  await stream.take(4);
  const exported = await negotiate(stream, open);
  if (exported === null) return;
  for (;;) {
    const request = await stream.take(REQUEST_BYTES);
    if (request.readUInt32BE(0) !== REQUEST_MAGIC) throw new Error('something that is no NBD request');
    const command = request.readUInt16BE(6);
    if (command === Command.DISCONNECT) return;
    const reply = Buffer.alloc(SIMPLE_REPLY_BYTES);
    reply.writeUInt32BE(SIMPLE_REPLY_MAGIC, 0);
    request.copy(reply, 8, 8, 16);
    const offsetBytes = Number(request.readBigUInt64BE(16));
    const lengthBytes = request.readUInt32BE(24);
    if (command !== Command.READ || lengthBytes > READ_BYTES_MAX || offsetBytes + lengthBytes > exported.sizeBytes) {
      reply.writeUInt32BE(NbdError.EINVAL, 4);
      stream.write(reply);
      continue;
    }
    void answer(stream, exported, reply, offsetBytes, lengthBytes);
  }
}

async function answer(stream: ByteStream, exported: NbdExport, reply: Buffer, offsetBytes: number, lengthBytes: number): Promise<void> {
  const data = Buffer.allocUnsafe(lengthBytes);
  const error = await exported.read(data, offsetBytes);
  reply.writeUInt32BE(error, 4);
  stream.write(reply);
  if (error === 0) stream.write(data);
}

async function negotiate(stream: ByteStream, open: () => Promise<NbdExport>): Promise<NbdExport | null> {
  for (;;) {
    const header = await stream.take(OPTION_HEADER_BYTES);
    const option = header.readUInt32BE(8);
    const lengthBytes = header.readUInt32BE(12);
    if (header.readBigUInt64BE(0) !== IHAVEOPT || lengthBytes > OPTION_BYTES_MAX) throw new Error('something that is no NBD option');
    if (lengthBytes > 0) await stream.take(lengthBytes);
    if (option === Option.ABORT) return null;
    if (option !== Option.GO) {
      stream.write(optionReply(option, OptionReply.ERROR + 1, Buffer.alloc(0)));
      continue;
    }
    let exported: NbdExport;
    try {
      exported = await open();
    } catch (thrown) {
      stream.write(optionReply(option, OptionReply.ERR_UNKNOWN, Buffer.from(thrown instanceof Error ? thrown.message : String(thrown), 'utf8')));
      continue;
    }
    const info = Buffer.alloc(12);
    info.writeUInt16BE(INFO_EXPORT, 0);
    info.writeBigUInt64BE(BigInt(exported.sizeBytes), 2);
    info.writeUInt16BE(TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY, 10);
    stream.write(optionReply(option, OptionReply.INFO, info));
    stream.write(optionReply(option, OptionReply.ACK, Buffer.alloc(0)));
    return exported;
  }
}

function optionReply(option: number, type: number, body: Buffer): Buffer {
  const reply = Buffer.alloc(OPTION_REPLY_BYTES + body.length);
  reply.writeBigUInt64BE(OPTION_REPLY_MAGIC, 0);
  reply.writeUInt32BE(option, 8);
  reply.writeUInt32BE(type, 12);
  reply.writeUInt32BE(body.length, 16);
  body.copy(reply, OPTION_REPLY_BYTES);
  return reply;
}
