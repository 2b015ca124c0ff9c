/** What a service in memory, which has no configurations, says of machines: that there are none. */
import { OffshootError } from '../../blockstore/errors.js';
import type { MachineService } from '../../daemon/control/machine-schemas.js';

function nothing(): never {
  throw new OffshootError('not-found', 'there are no machines in memory');
}

export const memoryMachines: MachineService = {
  list: () => Promise.resolve([]), show: nothing, clone: nothing, startImport: nothing, get: nothing, set: nothing, register: nothing, unregister: nothing, start: nothing, stop: nothing,
  remove: nothing,
};
