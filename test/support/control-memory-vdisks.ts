/** What a service in memory, which has no block devices, says of container files: that there are none. */
import { OffshootError } from '../../blockstore/errors.js';
import type { VdiskService } from '../../daemon/control/vdisk-schemas.js';

function nothing(): never {
  throw new OffshootError('not-found', 'there are no container files in memory');
}

export const memoryVdisks: VdiskService = {
  stage: nothing, deploy: nothing, decommission: nothing, staged: () => [], deployed: () => Promise.resolve([]), start: nothing, attached: () => Promise.resolve([]), attach: nothing, detach: nothing,
};
