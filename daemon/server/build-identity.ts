/**
 * What this build is, for a holder of another one: decides whether this build's server may follow another's under a mount in use.
 *
 * `RUNTIME_FORMAT` must rise with any change to what the next server reads in the run-time directory: journals, handles.log, session.json,
 * exchange intents. The database has its own number.
 */
import { SCHEMA_VERSION } from '../../blockstore/meta/migrations.js';
import { offshootVersion } from '../control/version.js';
import { HOLDER_PROTOCOL, type BuildIdentity } from '../holder/ipc.js';

const RUNTIME_FORMAT = 1;

export function buildIdentity(): BuildIdentity {
  return { version: offshootVersion(), holderProtocol: HOLDER_PROTOCOL, storeSchema: SCHEMA_VERSION, runtimeFormat: RUNTIME_FORMAT };
}
