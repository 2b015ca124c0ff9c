/** Put into a daemon by `NODE_OPTIONS=--import`: gives it the format and the hypervisor of test-machines.ts, with the daemon's own classes. */
import type * as Errors from '../../blockstore/errors.js';
import type * as Adapters from '../../daemon/machines/adapters.js';
import { TestHypervisorSeat, testFormat, testHypervisor, type NewError } from './test-machines.js';

const dist = process.env['OFFSHOOT_TEST_DIST'] ?? '';
const { machineAdapters } = await import(`${dist}/daemon/machines/adapters.js`) as typeof Adapters;
const { OffshootError } = await import(`${dist}/blockstore/errors.js`) as typeof Errors;
const seat = new TestHypervisorSeat(process.env['OFFSHOOT_TEST_HYPERVISOR'] ?? '');
const error: NewError = (kind, message) => new OffshootError(kind, message);
machineAdapters.addFormat(testFormat(seat, error));
machineAdapters.addHypervisor(testHypervisor(seat, error));
