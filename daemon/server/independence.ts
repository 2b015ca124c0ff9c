/**
 * What users ask for who want a disk to stand on something else, or on nothing: promote and rebase. Main thread of the server.
 *
 * Flatten is a fill with another end, and lives with the fills.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import type { PromoteResult, RebaseRequest, RebaseResult } from '../control/independence-schemas.js';
import type { References } from '../filesystem/references.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { NodeId } from '../filesystem/types.js';

export interface IndependenceOptions {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly references: References;
  readonly forgetAttributes: (nodeId: NodeId) => Promise<void>;
  readonly logger: { info(context: object, message: string): void };
}

export class Independence {
  readonly #options: IndependenceOptions;

  constructor(options: IndependenceOptions) {
    this.#options = options;
  }

  promote(path: string): PromoteResult {
    const { store, logger } = this.#options;
    const { origin, layers } = store.promote(this.#changeable(path).id);
    const result = { path, origin: store.meta.nodes.pathOf(origin.id), layers };
    logger.info({ disk: path, origin: result.origin, layers }, 'promoted');
    return result;
  }

  async rebase({ path, image, force }: RebaseRequest): Promise<RebaseResult> {
    const { store, fileSystem, references, forgetAttributes, logger } = this.#options;
    const row = this.#changeable(path);
    if (fileSystem.openCount(row.id) > 0) throw new OffshootError('in-use', `${path} is open: stop what uses it first, because its content changes`, { path });
    const target = references.resolve(image);
    store.assertSourcesUsable(row.id);
    store.assertSourcesUsable(target.node.id);
    const outcome = await store.rebase(row.id, target.node.id, force);
    if (!outcome.rebased) {
      const { conflicts, conflictsTotal, conflictBytes } = outcome;
      throw new OffshootError('conflict',
        `${path} was not changed: of what it has written, ${conflictsTotal} ${conflictsTotal === 1 ? 'extent' : 'extents'} (${conflictBytes} bytes) ${conflictsTotal === 1 ? 'is' : 'are'} another content in ${image} than in the image that it stands on now; ` +
        'add --force to keep what the disk has written there, or make a new clone of the new image',
        { path, image, conflictsTotal, conflictBytes, conflicts });
    }
    await forgetAttributes(row.id);
    logger.info({ disk: path, image, force }, 'rebased');
    return { path, image, forced: force };
  }

  /** A disk or file that may change. */
  #changeable(path: string): NodeRow {
    const { node, snapshot } = this.#options.references.resolve(path);
    if (snapshot !== null || node.frozen) throw new OffshootError('not-permitted', `${path} is part of a snapshot, which never changes: name a disk`, { path });
    if (node.layerId === null) throw new OffshootError('is-a-directory', `${path} is not a disk or file`, { path });
    return node;
  }
}
