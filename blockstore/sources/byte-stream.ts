/**
 * Bytes of a socket, waited for by count. Whoever reads says how many bytes come next, and gets exactly those.
 *
 * One reader at a time. The end of the socket, or an error of it, rejects who waits and everybody who asks later.
 */
import type { Duplex } from 'node:stream';

export class ByteStream {
  private readonly socket: Duplex;
  private readonly chunks: Buffer[] = [];
  private waiting: { readonly count: number; readonly resolve: (bytes: Buffer) => void; readonly reject: (error: Error) => void } | null = null;
  private buffered = 0;
  private failure: Error | null = null;

  constructor(socket: Duplex) {
    this.socket = socket;
    socket.on('data', (chunk: Buffer) => {
      this.chunks.push(chunk);
      this.buffered += chunk.length;
      this.serve();
    });
    socket.on('error', (error: Error) => { this.fail(error); });
    socket.on('end', () => { this.fail(new Error('the connection was closed')); });
    socket.on('close', () => { this.fail(new Error('the connection was closed')); });
  }

  /** Exactly `count` bytes. They may be a view of what arrived. */
  async take(count: number): Promise<Buffer> {
    if (this.waiting !== null) throw new Error('two readers of one stream');
    return await new Promise<Buffer>((resolve, reject) => {
      this.waiting = { count, resolve, reject };
      this.serve();
    });
  }

  write(bytes: Uint8Array): void {
    if (this.failure === null) this.socket.write(bytes);
  }

  end(): void {
    this.fail(new Error('the connection was closed here'));
    this.socket.destroy();
  }

  private serve(): void {
    const { waiting } = this;
    if (waiting === null) return;
    if (this.buffered >= waiting.count) {
      this.waiting = null;
      waiting.resolve(this.shift(waiting.count));
    } else if (this.failure !== null) {
      this.waiting = null;
      waiting.reject(this.failure);
    }
  }

  private shift(count: number): Buffer {
    this.buffered -= count;
    const [first] = this.chunks;
    if (first !== undefined && first.length >= count) {
      if (first.length === count) this.chunks.shift();
      else this.chunks[0] = first.subarray(count);
      return first.subarray(0, count);
    }
    const bytes = Buffer.allocUnsafe(count);
    for (let at = 0; at < count; ) {
      const chunk = this.chunks[0]!;
      const part = Math.min(chunk.length, count - at);
      chunk.copy(bytes, at, 0, part);
      at += part;
      if (part === chunk.length) this.chunks.shift();
      else this.chunks[0] = chunk.subarray(part);
    }
    return bytes;
  }

  private fail(error: Error): void {
    this.failure ??= error;
    this.serve();
  }
}
