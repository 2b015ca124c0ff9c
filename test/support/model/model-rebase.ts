/**
 * Rebase in a model run: a clone goes to a newer version of its image and back, or is refused because both changed the same blocks.
 *
 * The model says which: a block of the clone is its own if it was written since the clone was made, and is in the way
 * if the two images differ there. All else of the clone is the new image's.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { ErrorKind } from '../../../blockstore/errors.js';
import { BLOCK_BYTES, disturb, makeIdle, retryBusy, tolerating, type ModelParts, type Operation } from './model-parts.js';

interface ConflictExtent {
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

/** Images with blocks from elsewhere are not compared, and say so. */
const NOT_COMPARED: readonly ErrorKind[] = ['not-supported'];
const REFUSED = 'refused';
const DONE = 'done';

export class ModelRebase {
  readonly operations: readonly Operation[];
  readonly #parts: ModelParts;

  constructor(parts: ModelParts) {
    this.#parts = parts;
    this.operations = [{ name: 'rebase', weight: 3, run: () => this.#rebase() }];
  }

  async #rebase(): Promise<string> {
    const { random, container, daemon, disks, hands, freshName, makeRoom } = this.#parts;
    await makeRoom();
    const image = random.pick(disks.paths);
    const clone = `${container}/${freshName('rebased')}`;
    const newer = `${container}/${freshName('newer')}`;
    await retryBusy(() => daemon.control.clone({ source: image, targets: [clone, newer], fill: false, copyOnRead: false }));
    for (const path of [clone, newer]) disks.clone(image, path);
    // Whether a discard of what reads as zeros makes a block the clone's own is nobody's business; so it only writes, which never leaves what was there.
    await disturb(this.#parts, clone, random.between(1, 3), 0);
    await disturb(this.#parts, newer, random.between(1, 3));
    const own = blocksThatDiffer(disks.content(clone), disks.content(image));
    await makeIdle(this.#parts, clone);
    const said = [await this.#to(clone, image, newer, own)];
    // Back to where it came from; or, if it did not get away, to what it stands on already, which is done at once.
    if (said[0] !== REFUSED) said.push(await this.#to(clone, said[0] === DONE ? newer : image, image, own));
    if (random.chance(0.5)) await disturb(this.#parts, clone, 1);
    await hands.compareWhole(clone);
    await makeIdle(this.#parts, newer);
    await retryBusy(() => daemon.control.remove(newer, { keepData: true, recursive: false }));
    disks.remove(newer);
    await hands.compareWhole(clone);
    return `${clone} of ${image} to ${newer} and back: ${said.join(', ')}`;
  }

  async #to(clone: string, from: string, to: string, own: ReadonlySet<number>): Promise<string> {
    const { daemon, disks, hands } = this.#parts;
    const [before, after] = [disks.content(from), disks.content(to)];
    const inTheWay = [...blocksThatDiffer(before, after)].filter((block) => own.has(block)).sort((a, b) => a - b);
    let found: readonly number[] = [];
    try {
      const done = await tolerating(() => retryBusy(() => daemon.control.rebase({ path: clone, image: to, force: false })), NOT_COMPARED);
      if (done === null) return REFUSED;
    } catch (thrown) {
      if (!(thrown instanceof OffshootError) || thrown.kind !== 'conflict') throw thrown;
      found = (thrown.context['conflicts'] as readonly ConflictExtent[]).flatMap(({ offsetBytes, lengthBytes }) =>
        Array.from({ length: Math.ceil(lengthBytes / BLOCK_BYTES) }, (_, i) => offsetBytes / BLOCK_BYTES + i));
      if (found.length === 0) throw thrown;
    }
    if (found.join(' ') !== inTheWay.join(' ')) throw new Error(`rebase of ${clone} from ${from} to ${to}: blocks in the way are ${inTheWay.join(' ')}, and it said ${found.join(' ')}`);
    if (found.length === 0) {
      const content = Buffer.from(after);
      for (const block of own) disks.content(clone).copy(content, block * BLOCK_BYTES, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
      disks.put(clone, { content, isFile: disks.isFile(clone) });
    }
    await hands.compareWhole(clone);
    return found.length === 0 ? DONE : `${found.length} blocks in the way`;
  }
}

function blocksThatDiffer(one: Buffer, other: Buffer): Set<number> {
  const blocks = new Set<number>();
  for (let block = 0; block * BLOCK_BYTES < one.length; block += 1) {
    const [begin, end] = [block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES];
    if (!one.subarray(begin, end).equals(other.subarray(begin, end))) blocks.add(block);
  }
  return blocks;
}
