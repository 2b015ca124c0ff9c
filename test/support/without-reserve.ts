/** Opening a store without the space that it keeps back for metadata: on a tmpfs that would be 64 MiB of memory, zeroed for each test. */
import { realDoor } from '../../blockstore/hot/door.js';

export function withoutReserve<T>(open: () => T): T {
  const fallocate = realDoor.fallocate.bind(realDoor);
  realDoor.fallocate = (label, ...call) => (label === 'reserve-allocate' ? 0 : fallocate(label, ...call));
  try {
    return open();
  } finally {
    realDoor.fallocate = fallocate;
  }
}
