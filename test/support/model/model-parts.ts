/**
 * What the parts of a model run have in common: the daemon they drive, the content they know, names and data that nobody had
 * before, and the patience that a call needs whose disk was closed a moment ago.
 */
import { OffshootError } from '../../../blockstore/errors.js';
import type { ErrorKind } from '../../../blockstore/errors.js';
import type { TransportAbilities } from '../../../daemon/transport/abilities.js';
import type { PatientControl } from '../torture/patient-control.js';
import type { ModelDisks } from './model-disks.js';
import type { ModelHands } from './model-hands.js';
import type { Random } from './random.js';

export interface ModelDaemon {
  readonly mountDir: string;
  readonly control: PatientControl;
  /** How the command line is called for what only it can do: `node CLI_ENTRY ARGS --socket SOCKET_PATH`. */
  readonly cliEntry: string;
  readonly socketPath: string;
  /** SIGKILL to the server; resolves when the signal is sent. */
  killServer(): Promise<void>;
  /** Resolves when a server answers again. */
  waitUntilServing(): Promise<void>;
  stop(): Promise<void>;
  start(): Promise<void>;
}

export interface Operation {
  readonly name: string;
  /** How often it comes up in each deck of operations; 0: never. */
  readonly weight: number;
  /** Does it, compares, and says what was done. */
  readonly run: () => Promise<string>;
}

export interface ModelParts {
  readonly daemon: ModelDaemon;
  readonly abilities: TransportAbilities;
  readonly random: Random;
  readonly container: string;
  readonly disks: ModelDisks;
  readonly hands: ModelHands;
  /** Whether somebody else may kill the server during a call, so that it may be made twice. */
  readonly othersKill: boolean;
  /** A name that nothing had before. */
  readonly freshName: (prefix: string) => string;
  /** Content that nothing had before. */
  readonly freshData: (lengthBytes: number) => Buffer;
  /** Takes a disk away if there are many. */
  readonly makeRoom: () => Promise<void>;
}

export const BLOCK_BYTES = 4096;
export const SECTOR_BYTES = 512;
const PUNCH_HOLE_KEEP_SIZE = 3;
const RETRY_MS = 50;
const TRIES_MAX = 40;

export function pause(ms: number): Promise<void> {
  return new Promise((resolve) => { setTimeout(resolve, ms); });
}

/** Null when the call was refused for one of these reasons. */
export async function tolerating<T>(call: () => Promise<T>, kinds: readonly ErrorKind[]): Promise<T | null> {
  try {
    return await call();
  } catch (thrown) {
    if (thrown instanceof OffshootError && kinds.includes(thrown.kind)) return null;
    throw thrown;
  }
}

/** The last close of a file reaches the server a moment after close(2) has returned. */
export async function retryBusy<T>(call: () => Promise<T>): Promise<T> {
  for (let tries = 0; ; tries += 1) {
    const result = await tolerating(call, tries < TRIES_MAX ? ['in-use', 'busy'] : []);
    if (result !== null) return result;
    await pause(RETRY_MS);
  }
}

/** Closes a disk and ends its fill: what replaces its content wants that nobody has it. */
export async function makeIdle({ daemon: { control }, hands }: ModelParts, path: string): Promise<void> {
  await hands.closeAll(path);
  const fill = await tolerating(() => control.fillStatus(path), ['not-found']);
  if (fill?.state !== 'running' && fill?.state !== 'paused') return;
  // It may end by itself meanwhile.
  await tolerating(() => control.cancelJob(fill.jobId), ['invalid-argument', 'not-found']);
}

/** Some writes all over a disk, and discards in the place of some of them if the transport can carry these. */
export async function disturb({ random, disks, hands, freshData, abilities }: ModelParts, path: string, times: number, discards = 0.2): Promise<void> {
  const handle = await hands.handle(path);
  for (let i = 0; i < times; i += 1) {
    const sectors = Math.floor(disks.sizeBytes(path) / SECTOR_BYTES);
    const length = SECTOR_BYTES * Math.min(sectors, random.pick([1, 3, 8, 24, random.between(1, 200)]));
    const offset = SECTOR_BYTES * random.between(0, sectors - length / SECTOR_BYTES);
    if (abilities.fallocate && random.chance(discards)) {
      await hands.agent(handle.agent).call('fallocate', handle.fd, PUNCH_HOLE_KEEP_SIZE, offset, length);
      disks.zero(path, offset, length);
    } else {
      const data = freshData(length);
      await hands.write(handle.agent, handle.fd, data, offset);
      disks.write(path, offset, data);
    }
  }
}
