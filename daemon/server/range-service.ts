/**
 * Range clones for the control API: names into nodes, one call of the store, what was made as an answer and in the history of jobs. Main thread of the server.
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { NodeRow } from '../../blockstore/meta/rows.js';
import type { Store } from '../../blockstore/store.js';
import { SECTOR_BYTES } from '../../blockstore/units.js';
import type { CloneRangesRequest, CloneRangesResult } from '../control/schemas.js';
import { assertThawed } from '../filesystem/frozen.js';
import { SET_GID } from '../filesystem/node-attributes.js';
import type { StoreFileSystem } from '../filesystem/store-file-system.js';
import type { NodeId } from '../filesystem/types.js';
import type { CloneRecords } from '../jobs/clone-records.js';
import type { ControlViews } from './control-views.js';

export interface RangeServiceParts {
  readonly store: Store;
  readonly fileSystem: StoreFileSystem;
  readonly views: ControlViews;
  readonly logger: { info(context: object, message: string): void };
  /** The kernel may remember attributes of this node that are not true any more; with a new time of change it forgets the content that it has, too. */
  readonly forgetAttributes: (nodeId: NodeId) => Promise<void>;
}

interface Done {
  readonly sizeBytes: number;
  readonly created: boolean;
  /** Whose attributes are other ones now. */
  readonly touched: NodeId;
}

export async function cloneRanges(parts: RangeServiceParts, records: CloneRecords, resolve: (path: string) => NodeRow, request: CloneRangesRequest): Promise<CloneRangesResult> {
  const startedMs = performance.now();
  const summary = { source: request.source, targets: [request.target], ranges: request.ranges.length };
  const { operationId, sizeBytes, created, touched } = records.recording(summary, () => {
    const source = resolve(request.source);
    if (source.layerId === null) throw new OffshootError('is-a-directory', `${request.source} is not a disk or file`, { path: request.source });
    parts.store.assertSourcesUsable(source.id);
    const existing = find(resolve, request.target);
    let jobId = 0;
    const record = (): void => { jobId = records.made(summary, source.id); };
    const done = existing === null ? intoNew(parts, source, request, record) : intoExisting(parts, source, existing, request, record);
    return { ...done, operationId: String(jobId) };
  });
  await parts.forgetAttributes(touched);
  const durationMs = performance.now() - startedMs;
  const sharedBytes = request.ranges.reduce((sum, range) => sum + range.lengthBytes, 0);
  parts.logger.info({ operationId, source: request.source, target: request.target, ranges: request.ranges.length, sharedBytes, durationMs: Math.round(durationMs * 100) / 100 }, 'ranges cloned');
  return { operationId, path: request.target, sizeBytes, mountPath: parts.views.mountPath(request.target), created, ranges: request.ranges.length, sharedBytes, durationMs };
}

function intoNew({ store, fileSystem }: RangeServiceParts, source: NodeRow, request: CloneRangesRequest, record: () => void): Done {
  const { parent, name } = fileSystem.namespace.resolveNew(request.target);
  const end = Math.max(...request.ranges.map((range) => range.targetAtBytes + range.lengthBytes));
  // A file may end anywhere, a disk only behind a whole sector.
  const sizeBytes = request.sizeBytes ?? Math.ceil(end / SECTOR_BYTES) * SECTOR_BYTES;
  if (sizeBytes % SECTOR_BYTES !== 0) throw new OffshootError('invalid-argument', `the size of a disk is a multiple of ${SECTOR_BYTES} bytes, and ${sizeBytes} is not`, { path: request.target });
  const { mode, uid } = source;
  const gid = (parent.mode & SET_GID) === 0 ? source.gid : parent.gid;
  store.cloneRangesToNew(source.id, { parentId: parent.id, name, mode, uid, gid, copyOnRead: false }, sizeBytes, request.ranges, record);
  return { sizeBytes, created: true, touched: parent.id };
}

function intoExisting({ store }: RangeServiceParts, source: NodeRow, target: NodeRow, request: CloneRangesRequest, record: () => void): Done {
  if (target.layerId === null) throw new OffshootError('is-a-directory', `${request.target} is not a disk or file`, { path: request.target });
  if (request.sizeBytes !== null) {
    throw new OffshootError('already-exists', `${request.target} exists and has its size: leave the size away, or change it by offshoot resize`, { path: request.target });
  }
  assertThawed(store.meta, target);
  store.cloneRanges(source.id, target.id, request.ranges, record);
  return { sizeBytes: store.disks.get(target.id)?.shared.sizeBytes() ?? target.sizeBytes, created: false, touched: target.id };
}

function find(resolve: (path: string) => NodeRow, path: string): NodeRow | null {
  try {
    return resolve(path);
  } catch (thrown) {
    if (thrown instanceof OffshootError && thrown.kind === 'not-found') return null;
    throw thrown;
  }
}
