/** What a service in memory, which mounts nothing, says of exports: that there are none. */
import { OffshootError } from '../../blockstore/errors.js';
import type { ExportService } from '../../daemon/control/export-schemas.js';

function nothing(): never {
  throw new OffshootError('not-found', 'nothing is presented from memory');
}

export const memoryExports: ExportService = { list: () => Promise.resolve([]), present: nothing, withdraw: nothing, discover: nothing };
