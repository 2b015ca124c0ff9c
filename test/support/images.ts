/**
 * Raw images whose every byte is known: each 4 KiB block holds its own index and a seed, or is a hole.
 *
 * So a block that was read from the wrong place, or from the wrong image, is told apart from one that was damaged, and the
 * content of any part can be said without reading the image.
 */
import { createHash } from 'node:crypto';
import { createReadStream, closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';

import { BLOCK_BYTES, blocksFor, offsetOf } from '../../blockstore/units.js';

const CHUNK_BLOCKS = 256;

export interface ImageOptions {
  readonly sizeBytes: number;
  readonly seed: number;
  /** Blocks that stay holes. By default none is. */
  readonly isHole?: (block: number) => boolean;
}

/** What `block` of an image made with `seed` holds, from its first byte on. */
export function patternBlock(seed: number, block: number): Buffer {
  const buffer = Buffer.alloc(BLOCK_BYTES);
  fillPattern(buffer, seed, block);
  return buffer;
}

function fillPattern(buffer: Buffer, seed: number, block: number): void {
  for (let word = 0; word < BLOCK_BYTES; word += 16) {
    buffer.writeUInt32LE(seed, word);
    buffer.writeUInt32LE(word, word + 4);
    buffer.writeDoubleLE(block, word + 8);
  }
}

export function makePatternImage(file: string, options: ImageOptions): void {
  const { sizeBytes, seed, isHole = () => false } = options;
  const blocks = blocksFor(sizeBytes);
  const fd = openSync(file, 'w');
  try {
    ftruncateSync(fd, sizeBytes);
    const chunk = Buffer.alloc(CHUNK_BLOCKS * BLOCK_BYTES);
    let filled = 0;
    const writeOut = (next: number): void => {
      const offset = offsetOf(next - filled);
      writeFully(fd, chunk.subarray(0, Math.min(filled * BLOCK_BYTES, sizeBytes - offset)), offset);
      filled = 0;
    };
    for (let block = 0; block < blocks; block += 1) {
      if (isHole(block)) {
        if (filled > 0) writeOut(block);
        continue;
      }
      fillPattern(chunk.subarray(filled * BLOCK_BYTES, (filled + 1) * BLOCK_BYTES), seed, block);
      filled += 1;
      if (filled === CHUNK_BLOCKS) writeOut(block + 1);
    }
    if (filled > 0) writeOut(blocks);
  } finally {
    closeSync(fd);
  }
}

function writeFully(fd: number, data: Uint8Array, offsetBytes: number): void {
  for (let done = 0; done < data.length;) done += writeSync(fd, data, done, data.length - done, offsetBytes + done);
}

/** Content of a whole file, as a checksum. */
export async function sha256Of(file: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(file, { highWaterMark: 1024 * 1024 })) hash.update(chunk as Buffer);
  return hash.digest('hex');
}
