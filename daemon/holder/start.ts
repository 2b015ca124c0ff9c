/**
 * The holder's composition: checks, lock, mount, server, in an order in which everything can be undone.
 *
 * Runs in the holder process, once. Until the first server is ready, a failure undoes in reverse what was done, so that a start
 * that failed has changed nothing. After that, nothing is undone: the end is the unmount, and `holder.ts` decides when it comes.
 *
 * A crash of the holder between two steps leaves what the next start finds and takes over: an empty store directory, a lock that the
 * kernel has released, a run-time directory of this store, a dead mount that nobody uses.
 */
import { closeSync, mkdirSync, rmSync, rmdirSync } from 'node:fs';
import { join } from 'node:path';

import { OffshootError, exitCodeOf, toOffshootError } from '../../blockstore/errors.js';
import { offshootVersion } from '../control/version.js';
import { endLeftExports } from '../presenter/place.js';
import { createRuntimeDirectory, discardSession, leaveRuntimeDirectory, removeRuntimeDirectory, runtimeDirectoryFor } from '../runtime-directory.js';
import { chosenNumber, withNumber } from '../transport/kernel/device-number.js';
import { FILE_SYSTEM_TYPE, connectionOf, isMounted, mountFuse, openFuseDevice, topmostMount, unmount } from '../transport/kernel/mount.js';
import { Holder } from './holder.js';
import type { HolderEnd } from './holder-ports.js';
import { holderLog, type HolderLog } from './holder-log.js';
import { readHolderState, writeHolderState } from './holder-state.js';
import { lastWordsIn, sizeOf } from './last-words.js';
import { clearDeadMounts, isOurMountThere, lockMountPoint, unmountAnyhow, unmountForServer } from './mount-point.js';
import type { HolderOptions } from './options.js';
import {
  checkApart,
  checkMachine,
  checkMountPoint,
  checkSocket,
  checkStore,
  makeDefaultSocketDirectory,
  resolveMountPoint,
} from './preflight.js';
import { processState, redirectOutput } from './process-guards.js';
import { RestartPolicy, restartLimits } from './restart-policy.js';
import { checkServerEntry } from './server-entry.js';
import { serviceManager, type ServiceManager } from './service-manager.js';
import { SERVER_ENTRY, spawnServer } from './server-process.js';
import type { StartReporter } from './start-reporter.js';
import { lockStoreSoon, undoStoreLock, type StoreLock } from './store-lock.js';
import type { StoredConnection } from './stored-connections.js';

/** What a daemon stands on while it runs. */
interface Ground {
  readonly storeDir: string;
  readonly mountDir: string;
  readonly socketPath: string;
  readonly runtimeDir: string;
  readonly lock: StoreLock;
  /** Null when the server mounts for itself. */
  readonly fuseFd: number | null;
  /** Null for a new mount; otherwise the number of the last server that a holder which died had started. */
  readonly takenOverAfter: number | null;
  /** The service manager keeps the connection as well. */
  readonly connectionIsStored: boolean;
  /** Its number; null without one of ours. */
  readonly connection: number | null;
  readonly manager: ServiceManager;
  /** What the start has to say to people. */
  readonly notes: readonly string[];
  /** The end of what this daemon has written to its log. */
  readonly lastWords: () => string;
}

type Undo = (() => void)[];

const LOG_FILE_NAME = 'offshoot.log';
/** In the store, so that it goes with it. */
const DEVICE_NUMBER_FILE = 'device-number';
const NUMBER_TRIES = 5;
/** A daemon that is just ending may still hold the store's lock for a moment. */
const LOCK_TRIES = 5;
/** The server of a holder that died commits and closes first. */
const LOCK_TRIES_TAKING_OVER = 600;

export interface StartHooks {
  readonly reporter: StartReporter;
  /** Gives the caller the running holder, for the signals that it is sent. */
  readonly running: (holder: Holder) => void;
}

/** Runs the daemon to its end. The exit code: 0 after an orderly end. */
export async function runHolder(options: HolderOptions, hooks: StartHooks): Promise<number> {
  const log = holderLog(options.logLevel);
  const undo: Undo = [];
  let ground: Ground;
  try {
    ground = await prepare(options, undo, log);
  } catch (error) {
    return await giveUp(toOffshootError(error), undo, hooks.reporter, log);
  }
  const end = await serve(options, ground, hooks, log);
  switch (end.kind) {
    case 'finished':
      ground.manager.stopping();
      for (const { connection } of options.stored) ground.manager.dropConnection(connection);
      if (ground.connection !== null) ground.manager.dropConnection(ground.connection);
      attempt(() => {
        removeRuntimeDirectory(ground.runtimeDir);
      }, log);
      return 0;
    case 'abandoned':
      attempt(() => {
        discardSession(ground.runtimeDir);
      }, log);
      return exitCodeOf.internal;
    case 'not-started':
      return await giveUp(withLastWords(end.error, ground, log), undo, hooks.reporter, log);
  }
}

async function prepare(options: HolderOptions, undo: Undo, log: HolderLog): Promise<Ground> {
  // 1. Look, and change nothing. A locked store comes first: a daemon started twice fails every other check as well.
  const notes = [...checkMachine(options.transport)];
  const store = checkStore(options.storeDir);
  let lock = store.exists ? await lockSoon(store.path, undo, options.stored.length > 0 ? LOCK_TRIES_TAKING_OVER : LOCK_TRIES) : undefined;
  const mountDir = resolveMountPoint(options.mountDir, isMounted);
  checkApart(store.path, mountDir, options.socketPath);
  const takenOver = store.exists && options.transport === 'kernel' ? livingConnection(options, mountDir) : null;
  if (takenOver === null) {
    // What a daemon that was killed had started for its exports holds the dead mount.
    if (store.exists) notes.push(...await endLeftExports(runtimeDirectoryFor(store.path)));
    notes.push(...clearDeadMounts(mountDir));
    checkMountPoint(mountDir);
  } else {
    notes.push(`took over the mount ${mountDir} from a holder that has ended: the service manager had kept its connection`);
  }
  const socketPath = await checkSocket(options.socketPath);
  checkApart(store.path, mountDir, socketPath);

  // 2. Make what is missing. From here on each step leaves its opposite in `undo`.
  if (lock === undefined) {
    makeStore(store.path, undo);
    lock = await lockSoon(store.path, undo, LOCK_TRIES);
  }
  makeDefaultSocketDirectory(socketPath);
  const runtimeDir = createRuntimeDirectory(store.path);
  if (takenOver === null) {
    discardSession(runtimeDir);
    undo.push(() => {
      leaveRuntimeDirectory(runtimeDir);
    });
  }

  // 3. From here on the log is where people look.
  const logPath = options.foreground ? null : join(store.path, LOG_FILE_NAME);
  const logBytesBefore = logPath === null ? 0 : sizeOf(logPath);
  if (logPath !== null) redirectOutput(logPath);
  for (const note of notes) log('warn', note);

  const lastWords = (): string => (logPath === null ? '' : lastWordsIn(logPath, logBytesBefore));
  const manager = serviceManager(log, options.foreground ? process.env : {});
  const ground = { storeDir: store.path, mountDir, socketPath, runtimeDir, lock, manager, notes, lastWords };

  // 4. Mount, unless guests wait on the mount that is there. From here on nothing may take that away.
  if (takenOver !== null) {
    undo.length = 0;
    const takenOverAfter = readHolderState(runtimeDir)?.restarts ?? 0;
    return { ...ground, fuseFd: takenOver.fd, connection: takenOver.connection, takenOverAfter, connectionIsStored: true };
  }
  const mountPointFd = lockMountPoint(mountDir);
  undo.push(() => {
    closeSync(mountPointFd);
  });
  const unmounting = (): void => {
    unmountAnyhow(mountDir);
  };
  undo.push(unmounting);
  const fuseFd = options.transport === 'kernel' ? mountNumbered(options, { mountDir, storeDir: store.path }, undo, notes, log) : null;
  // Before the connection is closed, which would leave a dead mount.
  undo.push(unmounting);
  const connection = fuseFd === null ? null : connectionOf(mountDir);
  const connectionIsStored = fuseFd !== null && connection !== null && manager.keepConnection(fuseFd, connection);
  return { ...ground, fuseFd, connection, takenOverAfter: null, connectionIsStored };
}

/** With handles for NFS, whose clients keep the number of the mount's device in theirs: it is the store's own, if it can be had. */
function mountNumbered(options: HolderOptions, { mountDir, storeDir }: { readonly mountDir: string; readonly storeDir: string }, undo: Undo, notes: string[], log: HolderLog): number {
  let fuseFd = openConnection(undo);
  const wanted = options.nfs === true ? attempt(() => chosenNumber(join(storeDir, DEVICE_NUMBER_FILE)), log) : undefined;
  if (wanted === undefined) {
    mountFuse(fuseFd, mountDir);
    return fuseFd;
  }
  let number: number | undefined;
  for (let tries = 1; ; tries += 1) {
    const fd = fuseFd;
    withNumber(wanted, () => { mountFuse(fd, mountDir); });
    number = topmostMount(mountDir)?.deviceMinor;
    if (number === wanted) return fuseFd;
    // Somebody else mounted or unmounted something in that moment. The connection goes with its mount; its descriptor is left to the end.
    if (tries === NUMBER_TRIES || unmount(mountDir, { lazy: false }) === 'busy') break;
    fuseFd = openConnection(undo);
  }
  notes.push(`the mount has the device number ${number ?? 0} and not ${wanted}, which something else has: NFS clients have to mount again`);
  log('warn', notes.at(-1) ?? '');
  return fuseFd;
}

/**
 * The kept connection that the mount at `mountDir` hangs on. The others are closed: with nothing mounted on them they keep
 * nobody alive, and a copy too many would keep a dead mount from being noticed.
 */
function livingConnection(options: HolderOptions, mountDir: string): StoredConnection | null {
  const entry = topmostMount(mountDir);
  const isOurs = entry?.fileSystemType === FILE_SYSTEM_TYPE;
  let living: StoredConnection | null = null;
  for (const stored of options.stored) {
    if (isOurs && stored.connection === entry.deviceMinor) living = stored;
    else closeSync(stored.fd);
  }
  return living;
}

/** Serves until the end. Resolves, never rejects: there is nobody left who could do something about an error. */
function serve(options: HolderOptions, ground: Ground, hooks: StartHooks, log: HolderLog): Promise<HolderEnd> {
  const { storeDir, mountDir, socketPath, runtimeDir, lock, fuseFd } = ground;
  // When in doubt there is a mount: a server too many does no harm, a mount without one does.
  const isStillMounted = (): boolean => attempt(() => isOurMountThere(mountDir), log) ?? true;
  return new Promise((settle) => {
    const holder = new Holder(
      {
        version: offshootVersion(),
        keepsSpare: options.spare && fuseFd !== null,
        keepsTheMount: fuseFd !== null,
        takenOverAfter: ground.takenOverAfter,
        processState: (pid) => attempt(() => processState(pid), log) ?? '',
        checkServerEntry,
        spawnServer: ({ restarts, standby, entry }, events) => {
          // A mount that its own server made died with it, and is in the way of the next.
          if (fuseFd === null && restarts > 0) {
            attempt(() => {
              unmountAnyhow(mountDir);
            }, log);
          }
          const serverOptions = {
            storeDir,
            mountDir,
            socketPath,
            runtimeDir,
            workers: options.workers,
            transport: options.transport,
            logLevel: options.logLevel,
            ...(options.policy === undefined ? {} : { policy: options.policy }),
            sourceTimeoutSeconds: options.sourceTimeoutSeconds,
            ...(options.scrubRateBytesPerSecond === undefined ? {} : { scrubRateBytesPerSecond: options.scrubRateBytesPerSecond }),
            ...(options.hypervisors === undefined ? {} : { hypervisors: options.hypervisors }),
            ...(options.exportAddress === undefined ? {} : { exportAddress: options.exportAddress }),
            ...(options.nfs === undefined ? {} : { nfs: options.nfs }),
            ...(options.attachLimit === undefined ? {} : { attachLimit: options.attachLimit }),
            restarts,
            holderPid: process.pid,
            holderVersion: offshootVersion(),
            standby,
            connectionIsStored: ground.connectionIsStored,
          };
          return spawnServer({ entry: entry ?? options.serverEntry ?? SERVER_ENTRY, options: serverOptions, fuseFd, lockFd: lock.fd }, events, log);
        },
        unmount: (force) => unmountForServer(mountDir, force),
        isMounted: isStillMounted,
        publish: (state) => {
          attempt(() => {
            writeHolderState(runtimeDir, state);
          }, log);
        },
        log,
        nowMs: () => performance.now(),
        wallClock: () => new Date().toISOString(),
        schedule: (delayMs, body) => {
          const timer = setTimeout(body, delayMs);
          return () => {
            clearTimeout(timer);
          };
        },
        ready: (serverPid) => {
          log('info', 'ready', { storeDir, mountDir, socketPath, serverPid, transport: options.transport, version: offshootVersion() });
          ground.manager.ready(`serving ${mountDir}`);
          void hooks.reporter.report({ ready: true, holderPid: process.pid, serverPid, notes: ground.notes });
        },
        ended: settle,
      },
      new RestartPolicy(() => performance.now(), restartLimits()),
    );
    hooks.running(holder);
    holder.start();
  });
}

async function giveUp(error: OffshootError, undo: Undo, reporter: StartReporter, log: HolderLog): Promise<number> {
  log('error', `the daemon did not start: ${error.message}`, { kind: error.kind, ...error.context });
  for (const step of undo.reverse()) attempt(step, log);
  await reporter.report({ ready: false, error: { kind: error.kind, message: error.message } });
  return exitCodeOf[error.kind];
}

/** A server that died without saying why may have said it in the log, which goes with the store if that was new. */
function withLastWords(error: OffshootError, ground: Ground, log: HolderLog): OffshootError {
  const words = error.kind === 'internal' ? (attempt(ground.lastWords, log) ?? '') : '';
  return words === '' ? error : new OffshootError(error.kind, `${error.message}; its last words:\n${words}`, error.context, error);
}

/** For what must not keep the holder from its next step: an error is said, and that is all. */
function attempt<T>(step: () => T, log: HolderLog): T | undefined {
  try {
    return step();
  } catch (error) {
    log('error', `an error in the holder, which goes on: ${(error as Error).message}`);
    return undefined;
  }
}

async function lockSoon(storeDir: string, undo: Undo, triesMax: number): Promise<StoreLock> {
  const lock = await lockStoreSoon(storeDir, triesMax);
  undo.push(() => {
    undoStoreLock(lock);
  });
  return lock;
}

function makeStore(storeDir: string, undo: Undo): void {
  try {
    mkdirSync(storeDir, { mode: 0o700 });
  } catch (error) {
    const known = toOffshootError(error);
    throw new OffshootError(known.kind, `cannot make the store ${storeDir}: ${known.message}`, { storeDir }, error);
  }
  undo.push(() => {
    for (const name of [LOG_FILE_NAME, DEVICE_NUMBER_FILE]) rmSync(join(storeDir, name), { force: true });
    // Not recursive: what a server has already written there is not thrown away.
    rmdirSync(storeDir);
  });
}

function openConnection(undo: Undo): number {
  const fuseFd = openFuseDevice();
  undo.push(() => {
    closeSync(fuseFd);
  });
  return fuseFd;
}
