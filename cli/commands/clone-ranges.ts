/**
 * `offshoot clone SOURCE TARGET --range FROM:TO:LENGTH ...`: blocks of one disk in another, all ranges in one transaction.
 */
import { OffshootError } from '../../blockstore/errors.js';
import { BLOCK_BYTES } from '../../blockstore/units.js';
import { CLONE_RANGES_MAX } from '../../daemon/control/limits.js';
import { checkPathInContainer, visible } from '../../daemon/control/paths.js';
import type { CloneRangesRequest, CloneRangesResult } from '../../daemon/control/schemas.js';
import type { CliContext } from '../context.js';
import { counted } from '../output.js';
import { formatBytes, formatCount, formatDuration, parseDiskSize, parseSize } from '../sizes.js';

export interface CloneRangesOptions {
  readonly ranges: readonly string[];
  readonly size?: string;
  readonly fill?: boolean;
  readonly copyOnRead?: boolean;
}

export async function cloneRanges(context: CliContext, source: string, targets: readonly string[], options: CloneRangesOptions): Promise<void> {
  checkPathInContainer(source);
  const [target, ...others] = targets;
  if (target === undefined || others.length > 0) throw new OffshootError('invalid-argument', '--range takes one TARGET: run the command once for each');
  checkPathInContainer(target);
  if (options.fill === true || options.copyOnRead === true) {
    throw new OffshootError('invalid-argument', '--fill and --copy-on-read are for whole clones: with --range, start a fill by `offshoot fill start` afterwards');
  }
  if (options.ranges.length > CLONE_RANGES_MAX) {
    throw new OffshootError('too-large', `${formatCount(options.ranges.length)} ranges are more than one request can hold (${formatCount(CLONE_RANGES_MAX)}): use several`);
  }
  const ranges = options.ranges.map(parseRange);
  const sizeBytes = options.size === undefined ? null : parseDiskSize(options.size);
  const done = await context.client().cloneRanges({ source, target, ranges, sizeBytes });
  context.output.result(done, () => lines(done, source));
}

/** `FROM:TO:LENGTH`, each a size; the first two in whole blocks. */
export function parseRange(text: string): CloneRangesRequest['ranges'][number] {
  const [from, to, length, ...more] = text.split(':');
  if (from === undefined || to === undefined || length === undefined || more.length > 0) {
    throw new OffshootError('invalid-argument', `'${visible(text)}' is not a range: write SOURCE_START:TARGET_START:LENGTH, as in 1M:0:512M`);
  }
  const range = { sourceAtBytes: parseSize(from), targetAtBytes: parseSize(to), lengthBytes: parseSize(length) };
  for (const bytes of [range.sourceAtBytes, range.targetAtBytes]) {
    if (bytes % BLOCK_BYTES !== 0) {
      const before = Math.floor(bytes / BLOCK_BYTES) * BLOCK_BYTES;
      throw new OffshootError('invalid-argument', `'${visible(text)}' begins at ${bytes}, and only whole blocks of ${BLOCK_BYTES} bytes are cloned: ${before} or ${before + BLOCK_BYTES}`);
    }
  }
  if (range.lengthBytes === 0) throw new OffshootError('invalid-argument', `'${visible(text)}' is a range of no bytes`);
  return range;
}

function lines(done: CloneRangesResult, source: string): string[] {
  const what = `${counted(done.ranges, 'range')} of ${source}, ${formatBytes(done.sharedBytes)}`;
  return [visible(done.mountPath), `${what}, ${done.created ? `in a new disk of ${formatBytes(done.sizeBytes)}` : 'shared'}, in ${formatDuration(done.durationMs)}`];
}
