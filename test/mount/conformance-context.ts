/**
 * What each part of the conformance suite is given: a started daemon, the abilities of its transport, and hands.
 *
 * The parts define their tests when the file is loaded, before the daemon is there; so the context is looked at inside
 * the tests only. Names are handed out so that no test meets another's files.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import { BLOCK_BYTES, blockOf, offsetOf } from '../../blockstore/units.js';
import type { ControlClient } from '../../daemon/control/client.js';
import type { TransportAbilities } from '../../daemon/transport/abilities.js';
import type { TestDaemon } from '../support/daemon.js';
import { patternBlock } from '../support/images.js';
import type { FileAgent } from '../support/model/file-agent.js';

export interface Conformance {
  readonly abilities: TransportAbilities;
  readonly daemon: TestDaemon;
  readonly control: ControlClient;
  /** An ordinary directory outside mount and store, on a file system that takes files of 16 TiB and more. */
  readonly scratchDir: string;
  /** Acts as root. */
  readonly agent: FileAgent;
  /** The container of the suite, as a path in the store; everybody may look into it. */
  readonly container: string;
  /** Path under the mount of a name in the container. */
  readonly at: (name: string) => string;
  /** A name that no other test has. */
  readonly fresh: (prefix: string) => string;
  /** A new clone of the image: its name in the container. */
  readonly cloneOfImage: (options?: { readonly copyOnRead?: boolean }) => Promise<string>;
  /** The file that the image was imported from, in place. */
  readonly imageFile: string;
}

/** What the log may say on any machine. */
export const REFUSED_ON_SOME_KERNELS = /PR_SET_IO_FLUSHER/;

/** The image of the suite: 24 MiB and three sectors, so that its last block is a part of one, with holes. */
export const IMAGE_BYTES = 24 * 1024 * 1024 + 3 * 512;
export const IMAGE_SEED = 77;
/** First block and number of blocks. */
const IMAGE_HOLES: readonly (readonly [number, number])[] = [[256, 256], [2304, 768], [5888, 16]];

export function isImageHole(block: number): boolean {
  return IMAGE_HOLES.some(([first, count]) => block >= first && block < first + count);
}

/** What the image holds at a range. */
export function imageBytes(offsetBytes: number, lengthBytes: number): Buffer {
  return patternRange(IMAGE_SEED, offsetBytes, lengthBytes, isImageHole);
}

/** What an image that `makePatternImage` made holds at a range. */
export function patternRange(seed: number, offsetBytes: number, lengthBytes: number, isHole: (block: number) => boolean = () => false): Buffer {
  const first = blockOf(offsetBytes);
  const blocks: Buffer[] = [];
  for (let block: number = first; offsetOf(block) < offsetBytes + lengthBytes; block += 1) {
    blocks.push(isHole(block) ? Buffer.alloc(BLOCK_BYTES) : patternBlock(seed, block));
  }
  const skip = offsetBytes - offsetOf(first);
  return Buffer.concat(blocks).subarray(skip, skip + lengthBytes);
}

/** An import whose job has ended well. */
export async function importFile(control: Pick<ControlClient, 'startImport' | 'job'>, file: string, target: string, inPlace: boolean): Promise<void> {
  let job = await control.startImport({ file, target, inPlace, format: 'raw' });
  for (let tries = 0; job.state === 'running' && tries < 600; tries += 1) {
    await sleep(100);
    job = await control.job(job.id);
  }
  if (job.state !== 'completed') throw new Error(`the import of ${file} is ${job.state}: ${job.error?.message ?? job.message ?? ''}`);
}
