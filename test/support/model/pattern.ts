/**
 * Content that can be computed for any range of any disk: what a block must hold can be told without keeping it.
 *
 * Each 8-byte word is made from the seed and the word's index, so that a block in a wrong place, of a wrong disk or of a
 * wrong offset modulo 2^32 never looks right, and no word of data is zero.
 */
const WORD_BYTES = 8;
const SPAN = 2 ** 32;

export function patternBytes(seed: number, offsetBytes: number, lengthBytes: number): Buffer {
  const firstWord = Math.floor(offsetBytes / WORD_BYTES);
  const skip = offsetBytes - firstWord * WORD_BYTES;
  const words = Math.ceil((skip + lengthBytes) / WORD_BYTES);
  const bytes = Buffer.alloc(words * WORD_BYTES);
  const view = new Uint32Array(bytes.buffer, bytes.byteOffset, words * 2);
  for (let word = 0; word < words; word += 1) {
    const index = firstWord + word;
    const low = mix(index % SPAN, seed);
    view[word * 2] = low;
    view[word * 2 + 1] = mix(Math.floor(index / SPAN) ^ low, seed + 1) | 1;
  }
  return bytes.subarray(skip, skip + lengthBytes);
}

function mix(value: number, seed: number): number {
  let mixed = Math.imul(value ^ seed, 0x9e3779b1);
  mixed = Math.imul(mixed ^ (mixed >>> 15), 0x85ebca6b);
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
  return (mixed ^ (mixed >>> 16)) >>> 0;
}

/** Where two buffers first differ, in words for an error message; null if they are equal. */
export function firstDifference(expected: Buffer, actual: Buffer, offsetBytes: number): string | null {
  if (expected.equals(actual)) return null;
  if (expected.length !== actual.length) return `${actual.length} bytes instead of ${expected.length} at offset ${offsetBytes}`;
  let at = 0;
  while (expected[at] === actual[at]) at += 1;
  let last = expected.length - 1;
  while (expected[last] === actual[last]) last -= 1;
  const show = (bytes: Buffer): string => bytes.subarray(at, at + 16).toString('hex');
  return `bytes ${offsetBytes + at} to ${offsetBytes + last} differ (block ${Math.floor((offsetBytes + at) / 4096)}, +${(offsetBytes + at) % 4096}): expected ${show(expected)}…, found ${show(actual)}…`;
}
