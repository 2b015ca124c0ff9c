/**
 * The check's program: a store that no daemon serves (`offline`), or only the database of one that is served (`database`).
 *
 * Offline it takes the store's lock, so that no daemon begins to serve what is being checked, and opens the database as a
 * server would: SQLite recovers its log, and an older format is brought to this one. Nothing else is changed without `repair`. Journals of a
 * daemon that was killed stay where they are: what they hold is content that the database does not know yet, no finding, and the next server's to
 * commit; faults that only tmpfs knows of are named. Only a fault that is lifted has them replayed first. Speaks in
 * JSON lines on standard output: progress, then one result or one error. SIGTERM ends it between two steps.
 */
import fs from 'node:fs';
import path from 'node:path';

import { databaseFinding, reportOf } from '../../blockstore/check.js';
import { OffshootError, toOffshootError } from '../../blockstore/errors.js';
import { LayerFiles } from '../../blockstore/layer-files.js';
import { checkDatabaseFile } from '../../blockstore/meta/database-check.js';
import { MetaStore } from '../../blockstore/meta/meta-store.js';
import { forgetFault, notedFaults, replayJournals, storeIdOf } from '../../blockstore/recovery.js';
import { readSealNote, sealNotePath } from '../../blockstore/seal-note.js';
import { parseCheckProgramOptions, type CheckProgramMessage, type CheckProgramOptions } from '../control/offline-check.js';
import { lockStoreSoon } from '../holder/store-lock.js';
import { runCheck, type CheckOutcome } from '../jobs/check-run.js';
import { Hasher } from '../jobs/hasher.js';
import { runtimeDirectoryFor } from '../runtime-directory.js';
import { outcomeInfo } from '../server/check-info.js';

const DATABASE_NAME = 'offshoot.db';
const PROGRESS_MS = 100;
/** A daemon that is just ending may still hold the lock for a moment. */
const LOCK_TRIES = 5;

function say(message: CheckProgramMessage): void {
  fs.writeSync(1, `${JSON.stringify(message)}\n`);
}

async function checkOffline(options: CheckProgramOptions, signal: AbortSignal): Promise<CheckOutcome> {
  const { storeDir } = options;
  const database = path.join(storeDir, DATABASE_NAME);
  if (!fs.existsSync(database)) throw new OffshootError('not-found', `there is no store in ${storeDir} (it has no ${DATABASE_NAME}): name another directory`, { storeDir });
  await takeLock(storeDir);
  const files = new LayerFiles(storeDir, { sourceTimeoutMs: 0, onSourceDescriptor: () => undefined });
  let meta: MetaStore;
  try {
    meta = MetaStore.open(database);
  } catch (thrown) {
    const error = toOffshootError(thrown);
    if (error.kind !== 'store-damaged') throw thrown;
    // Nothing can be held against a database that nobody can read.
    return { ...reportOf([databaseFinding(error.message)], []), lifted: [], notLifted: [], layersChecked: 0, layersWithoutChecksums: 0, bytesRead: 0 };
  }
  const runtimeDir = runtimeDirectoryFor(storeDir);
  // Sealed by a server that was killed before it could commit it: the next one needs these layers.
  for (const { newLayerId } of readSealNote(sealNotePath(runtimeDir, storeIdOf(meta)))) meta.layers.prepared.add(newLayerId);
  try {
    const target = options.target === null ? null : meta.nodes.byPath(options.target);
    if (target === undefined) throw new OffshootError('not-found', `there is no ${options.target ?? ''} in the store`, { path: options.target });
    let lastMs = 0;
    return await runCheck({
      meta, files, databaseProblems: () => Promise.resolve(meta.audit.databaseProblems()), makeHasher: () => new Hasher(null),
      notedFaults: () => notedFaults(runtimeDir, meta),
      lift: {
        // Journals of a killed daemon hold what the disk had not committed, and must not be believed once its fault is gone.
        prepare: () => Promise.resolve(fs.existsSync(runtimeDir) ? replayJournals(runtimeDir, meta, files) : undefined).then(() => undefined),
        clear: (nodeId) => {
          meta.nodes.update(nodeId, { fault: null });
          if (fs.existsSync(runtimeDir)) forgetFault(runtimeDir, meta, nodeId);
        },
      },
    }, { target, data: options.data, repair: options.repair }, {
      signal,
      progress: (phase, doneBytes, totalBytes) => {
        if (performance.now() - lastMs < PROGRESS_MS) return;
        lastMs = performance.now();
        say({ type: 'progress', phase, doneBytes, totalBytes });
      },
    });
  } finally {
    meta.close();
  }
}

async function takeLock(storeDir: string): Promise<void> {
  try {
    await lockStoreSoon(storeDir, LOCK_TRIES);
  } catch (thrown) {
    const error = toOffshootError(thrown);
    if (error.kind !== 'store-locked') throw thrown;
    throw new OffshootError('store-locked', `a daemon serves the store ${storeDir}: check it online, by the same command without --store`, error.context, thrown);
  }
}

const options = parseCheckProgramOptions(process.argv[2]);
if (options.mode === 'database') {
  fs.writeSync(1, JSON.stringify({ problems: checkDatabaseFile(path.join(options.storeDir, DATABASE_NAME)) }));
} else {
  const abort = new AbortController();
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => { abort.abort(); });
  // A hash worker that is waited for does not keep a process alive by itself.
  const alive = setInterval(() => undefined, 1000);
  try {
    say({ type: 'result', outcome: outcomeInfo(await checkOffline(options, abort.signal)) });
  } catch (thrown) {
    const error = abort.signal.aborted ? new OffshootError('cancelled', 'the check was ended') : toOffshootError(thrown);
    say({ type: 'error', error: { kind: error.kind, message: error.message } });
    if (error.kind === 'internal') throw thrown;
  } finally {
    clearInterval(alive);
  }
}
