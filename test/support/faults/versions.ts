/**
 * The window of each block: the version of the last completed flush, and every version that was written since.
 *
 * A block's whole content is made from its number and its version, so that a block of one version is told from one that is torn, from
 * another place or of another disk. Version 0 is what the disk's image held.
 */
import { BLOCK_BYTES } from '../../../blockstore/units.js';
import { patternBytes } from '../model/pattern.js';

export function versionedBlock(block: number, version: number): Buffer {
  const content = patternBytes(version, block * BLOCK_BYTES, BLOCK_BYTES);
  content.writeDoubleLE(version, 0);
  return content;
}

/** The version of a block's content; null when it is none that was ever written there. */
export function versionOf(content: Buffer, block: number): number | null {
  const version = content.readDoubleLE(0);
  return Number.isSafeInteger(version) && version >= 0 && versionedBlock(block, version).equals(content) ? version : null;
}

export class Window {
  /** What a power cut must leave at least, by block. */
  readonly flushed: number[];
  /** The newest acknowledged version. */
  readonly acknowledged: number[];
  /** Everything that was written, acknowledged or not. */
  private readonly written: number[][];
  private frozen: readonly number[] = [];
  private under: readonly number[] = [];

  constructor(versions: readonly number[]) {
    this.flushed = [...versions];
    this.acknowledged = [...versions];
    this.written = versions.map((version) => [version]);
  }

  /** A line of the writer; gives the errno when it ended. */
  hear(line: string): string | null {
    const [mark, ...values] = line.split(' ');
    if (mark === 'w') {
      this.under = values.map(Number);
      this.forUnder((block, version) => this.written[block]!.push(version));
    } else if (mark === 'W') this.forUnder((block, version) => { this.acknowledged[block] = version; });
    else if (mark === 'f') this.frozen = [...this.acknowledged];
    else if (mark === 'F') this.frozen.forEach((version, block) => { this.flushed[block] = version; });
    return mark === 'e' ? values.join(' ') : null;
  }

  /** Blocks whose content is none that `least` (by block) and what was written since allow. */
  wrong(content: Buffer, least: readonly number[]): string[] {
    return least.flatMap((atLeast, block) => {
      const version = versionOf(content.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES), block);
      if (version !== null && version >= atLeast && this.written[block]!.includes(version)) return [];
      return [`block ${block} holds version ${String(version)}; flushed ${atLeast}, written ${this.written[block]!.join(' ')}`];
    });
  }

  private forUnder(body: (block: number, version: number) => void): void {
    const [block = 0, count = 0, version = 0] = this.under;
    for (let i = 0; i < count; i += 1) body(block + i, version);
  }
}
