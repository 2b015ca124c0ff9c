/**
 * What is recorded: a process with a real store in it, which does what guests, jobs and operators do (`guest.ts`).
 *
 *   recorded-program.js MARKER-FILE ROOT WORKLOAD SEED [RUNTIME-DIR]      (the store is ROOT/store, its run-time directory ROOT/run if no other is named)
 */
import path from 'node:path';

import { Guest } from './guest.js';
import { makeOlderStore, migrateOneStepMore } from './older-store.js';
import { runWorkload } from './workloads.js';

const [markerFile = '', root = '', workload = '', seed = '0', runtimeDir = path.join(root, 'run')] = process.argv.slice(2);
const storeDir = path.join(root, 'store');
const [kind, version] = workload.split(':');
if (kind === 'older') makeOlderStore(storeDir, Number(version), markerFile);
else if (kind === 'one-step-more') migrateOneStepMore(storeDir);
else await runWorkload(workload, () => new Guest({ markerFile, root, runtimeDir, seed: Number(seed) }));
process.exit(0);
