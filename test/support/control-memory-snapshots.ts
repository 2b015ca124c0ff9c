/** Snapshots of the memory service: names that are made, listed and removed. */
import { OffshootError } from '../../blockstore/errors.js';
import type { SnapshotCreateRequest, SnapshotInfo, SnapshotRemoveResult, SnapshotRevertResult, SnapshotService } from '../../daemon/control/snapshot-schemas.js';

export class MemorySnapshots implements SnapshotService {
  readonly #taken = new Map<string, SnapshotInfo>();

  create(request: SnapshotCreateRequest): Promise<SnapshotInfo> {
    const { reference, quiesce } = request;
    if (this.#taken.has(reference)) throw new OffshootError('already-exists', `${reference} exists already`);
    const at = reference.lastIndexOf('@');
    const [container = '', ...rest] = reference.slice(0, at).split('/');
    const name = reference.slice(at + 1);
    const info: SnapshotInfo = {
      reference, container, name, path: rest.length === 0 ? null : rest.join('/'), uuid: `uuid-${this.#taken.size}`, consistency: quiesce === null ? 'crash' : 'application',
      message: quiesce?.command ?? null, disks: 1, files: 0, sizeBytes: 4096, directory: `${container}/.snapshots/${name}`, createdAt: '2026-01-02T03:04:05.678Z',
    };
    this.#taken.set(reference, info);
    return Promise.resolve(info);
  }

  list(container: string | null): readonly SnapshotInfo[] {
    return [...this.#taken.values()].filter((each) => container === null || each.container === container);
  }

  remove(reference: string): Promise<SnapshotRemoveResult> {
    this.#require(reference);
    this.#taken.delete(reference);
    return Promise.resolve({ name: reference, nodesRemoved: 2, layersRemoved: 1, clonesKept: 0 });
  }

  revert(reference: string): Promise<SnapshotRevertResult> {
    this.#require(reference);
    return Promise.resolve({ name: reference, nodesReverted: 1, nodesRemoved: 0, nodesRestored: 0 });
  }

  #require(reference: string): void {
    if (!this.#taken.has(reference)) throw new OffshootError('not-found', `there is no snapshot ${reference}`);
  }
}
