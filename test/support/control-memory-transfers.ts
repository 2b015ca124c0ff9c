/** What a service in memory, which has no data, says of sending and receiving: that there is nothing. */
import { OffshootError } from '../../blockstore/errors.js';
import type { TransferService } from '../../daemon/control/transfer-service.js';

function nothing(): never {
  throw new OffshootError('not-found', 'there is no such thing in memory');
}

export const memoryTransfers: TransferService = {
  tree: nothing, extents: nothing, instant: nothing, releaseInstant: nothing, receives: () => Promise.resolve([]), receive: nothing, receiveBegin: nothing,
  receiveRecords: nothing, receivePause: nothing, receiveFinish: nothing, receiveAbort: nothing,
};
