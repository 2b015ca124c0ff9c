/**
 * What a model run does to disks as a whole: clones, fills, promotion, layers that are merged in the background, other sizes, removal.
 */
import { join } from 'node:path';

import type { ErrorKind } from '../../../blockstore/errors.js';
import { SECTOR_BYTES, pause, retryBusy, tolerating, type ModelParts, type Operation } from './model-parts.js';

export const DISKS_MAX = 9;
const DISKS_MIN = 3;
const SIZE_BYTES_MAX = 5 * 1024 * 1024;
const SIZE_BYTES_MIN = 64 * 1024;
/** What a fill operation may say when there is nothing to do in the disk's present state. */
const FILL_REFUSALS: readonly ErrorKind[] = ['busy', 'in-use', 'already-exists', 'invalid-argument', 'not-found'];

export class ModelLife {
  readonly operations: readonly Operation[];
  readonly #parts: ModelParts;

  constructor(parts: ModelParts) {
    this.#parts = parts;
    this.operations = [
      { name: 'clone', weight: 7, run: () => this.#clone() },
      { name: 'fill', weight: 8, run: () => this.#fill() },
      { name: 'promote', weight: 3, run: () => this.#promote() },
      { name: 'deepen', weight: 2, run: () => this.#deepen() },
      { name: 'resize', weight: 2, run: () => this.#resize() },
      { name: 'remove', weight: 5, run: () => this.remove() },
    ];
  }

  /** Ends every fill that runs, one way or the other, and compares. */
  async fillAll(): Promise<void> {
    const { daemon, disks } = this.#parts;
    for (const path of disks.paths) {
      await tolerating(() => daemon.control.fillStart(path, { rateBytesPerSecond: null }), FILL_REFUSALS);
      await tolerating(() => daemon.control.fillResume(path, { rateBytesPerSecond: null }), FILL_REFUSALS);
    }
    for (const path of disks.paths) {
      for (let tries = 0; tries < 300; tries += 1) {
        const state = await tolerating(() => daemon.control.fillStatus(path), FILL_REFUSALS);
        if (state?.state !== 'running') break;
        await pause(100);
      }
    }
  }

  async remove(): Promise<string> {
    const { random, daemon, disks, hands } = this.#parts;
    if (disks.paths.length <= DISKS_MIN) return 'few disks are left';
    const path = random.pick(disks.paths);
    await hands.closeAll(path);
    await retryBusy(() => daemon.control.remove(path, { keepData: true, recursive: false }));
    disks.remove(path);
    return path;
  }

  async #clone(): Promise<string> {
    const { random, container, daemon, disks, hands, freshName } = this.#parts;
    if (disks.paths.length >= DISKS_MAX) return this.remove();
    const source = random.pick(disks.paths);
    const targets = Array.from({ length: random.between(1, 2) }, () => `${container}/${freshName('clone')}`);
    const fill = random.chance(0.3);
    const copyOnRead = random.chance(0.3);
    await daemon.control.clone({ source, targets, fill, copyOnRead });
    for (const target of targets) disks.clone(source, target);
    await hands.compareWhole(random.pick(targets));
    return `${source} to ${targets.join(' ')}${fill ? ' filling' : ''}${copyOnRead ? ' copy-on-read' : ''}`;
  }

  async #fill(): Promise<string> {
    const { random, daemon: { control }, disks } = this.#parts;
    const path = random.pick(disks.paths);
    const what = random.pick(['start', 'start', 'flatten', 'pause', 'resume', 'status'] as const);
    const rateBytesPerSecond = random.pick([null, 256 * 1024, 1024 * 1024, 4 * 1024 * 1024]);
    const info = await tolerating(() => {
      switch (what) {
        case 'start': return control.fillStart(path, { rateBytesPerSecond });
        case 'flatten': return control.fillStart(path, { rateBytesPerSecond, flatten: true });
        case 'pause': return control.fillPause(path);
        case 'resume': return control.fillResume(path, { rateBytesPerSecond });
        case 'status': return control.fillStatus(path);
      }
    }, FILL_REFUSALS);
    return `${what} ${path}: ${info === null ? 'refused' : `${info.state} ${info.doneBytes}/${info.totalBytes}`}`;
  }

  /** Changes who is whose clone, and no byte. What is no clone, or has lost its source, is refused. */
  async #promote(): Promise<string> {
    const { random, daemon, disks } = this.#parts;
    const path = random.pick(disks.paths);
    const result = await tolerating(() => daemon.control.promote(path), ['invalid-argument']);
    return `${path}: ${result === null ? 'refused' : `of ${result.origin}`}`;
  }

  /** So many layers that some are merged in the background, during whatever comes next. */
  async #deepen(): Promise<string> {
    const { random, container, daemon: { control }, disks, hands, freshName, freshData } = this.#parts;
    const path = random.pick(disks.paths);
    const { agent, fd } = await hands.handleOf(path, 0);
    const layers = random.between(6, 12);
    for (let layer = 0; layer < layers; layer += 1) {
      const offset = SECTOR_BYTES * random.between(0, Math.floor(disks.sizeBytes(path) / SECTOR_BYTES) - 1);
      const data = freshData(SECTOR_BYTES);
      await hands.write(agent, fd, data, offset);
      disks.write(path, offset, data);
      const sealing = `${container}/${freshName('sealing')}`;
      await retryBusy(() => control.clone({ source: path, targets: [sealing], fill: false, copyOnRead: false }));
      await retryBusy(() => control.remove(sealing, { recursive: false, keepData: true }));
    }
    await hands.compareWhole(path);
    return `${path} by ${layers} layers`;
  }

  async #resize(): Promise<string> {
    const path = this.#parts.random.pick(this.#parts.disks.paths);
    const before = this.#parts.disks.sizeBytes(path);
    await resize(this.#parts, path);
    return `${path} from ${before} to ${this.#parts.disks.sizeBytes(path)}`;
  }
}

/** Another size: of a disk by the control API, which wants it closed; of a file also under the mount, where it may be open. */
export async function resize(parts: ModelParts, path: string): Promise<void> {
  const { random, daemon, disks, hands } = parts;
  const sizeBytes = SECTOR_BYTES * random.between(SIZE_BYTES_MIN / SECTOR_BYTES, SIZE_BYTES_MAX / SECTOR_BYTES);
  if (disks.isFile(path) && random.chance(0.7)) {
    await hands.agent(0).call('truncate', join(daemon.mountDir, path), sizeBytes);
  } else {
    await hands.closeAll(path);
    await retryBusy(() => daemon.control.resize(path, sizeBytes));
  }
  disks.resize(path, sizeBytes);
  await hands.compareWhole(path);
}
