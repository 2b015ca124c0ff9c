/**
 * A process that carries the workload out on a real store: `actor.js STORE RUNTIME_DIR`.
 *
 * Says `ready MAIN POOL`, the ids of the two threads that make system calls for the store. Before the operation with the number
 * PAUSE_AT it says `paused` and waits for a line on its standard input, so that a tracer can attach to them. By plain writes, for each operation `> NUMBER` before and
 * `< NUMBER OUTCOME` after it, and `! DISK` when a disk is faulted. Behaves as the server does: operating errors are the outcome of
 * their operation and it goes on; what is none ends the process at once, and the store is found as it was left.
 *
 * `KILL_AFTER=LABEL:N` in the environment: the process ends after the N-th system call of that call site in the data
 * path, where no further system call follows before the fact is in the journal. The pool has one thread (the test sees to it).
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';

import { toOffshootError } from '../../../blockstore/errors.js';
import { enterDisk, leaveDisk, REQUEST_BYTES_MAX } from '../../../blockstore/hot/context.js';
import { IoBuffer, realDoor } from '../../../blockstore/hot/door.js';
import { fillStep, newFillProgress } from '../../../blockstore/hot/fill-step.js';
import { ROOT_ID, type NodeKind } from '../../../blockstore/meta/rows.js';
import { Store } from '../../../blockstore/store.js';
import { BLOCK_BYTES } from '../../../blockstore/units.js';
import { faultDoor, type Fault } from '../fault-door.js';
import { patternBytes } from '../model/pattern.js';
import { WORKLOAD, type Operation } from './workload.js';

const OPENAT = new Set(['257', '56']);
const MAIN = String(process.pid);
const PAUSE_AT = Number(process.env['PAUSE_AT'] ?? 0);

const [storeDir = '', runtimeDir = ''] = process.argv.slice(2);
const [killLabel, killCount] = (process.env['KILL_AFTER'] ?? ':').split(':');
let seen = 0;
let store: Store | undefined;
/** Names of the disks that this process may use. */
const ids = new Map<string, number>();
const held = new Set<string>();

function say(line: string): void {
  fs.writeSync(1, `${line}\n`);
}

/** The only thread of the pool: it hangs in the open of a pipe that nobody writes to, where it can be told from the others. */
async function poolThread(): Promise<string> {
  const fifo = path.join(runtimeDir, 'fifo');
  execFileSync('mkfifo', [fifo]);
  const opened = new Promise<number>((resolve, reject) => {
    fs.open(fifo, 'r', (error, fd) => {
      if (error === null) resolve(fd);
      else reject(error);
    });
  });
  for (;;) {
    const found = fs.readdirSync('/proc/self/task').find((task) => task !== MAIN
      && OPENAT.has(fs.readFileSync(`/proc/self/task/${task}/syscall`, 'utf8').split(' ')[0] ?? ''));
    if (found === undefined) continue;
    const writer = fs.openSync(fifo, 'w');
    fs.closeSync(await opened);
    fs.closeSync(writer);
    fs.rmSync(fifo);
    return found;
  }
}

function opened(): Store {
  if (store === undefined) throw new Error('the store is not open');
  return store;
}

function open(): void {
  store = Store.open({
    mapChunks: 2, storeDir, runtimeDir, threads: 1, announcer: { opened: () => undefined, closed: () => undefined },
    onFault: (nodeId) => { say(`! ${store?.meta.nodes.byId(nodeId)?.name ?? String(nodeId)}`); },
    onFull: () => undefined,
    door: faultDoor(realDoor, ({ label }): Fault | undefined => {
      if (label !== killLabel) return undefined;
      seen += 1;
      return seen === Number(killCount) ? { kind: 'then', run: () => { process.kill(process.pid, 'SIGKILL'); } } : undefined;
    }),
  });
}

function addNode(name: string, kind: NodeKind, layerId: number, sizeBytes: number): number {
  return opened().meta.nodes.insert({
    parentId: ROOT_ID, name, kind, mode: 0o600, uid: 0, gid: 0, sizeBytes, atimeUs: 0, mtimeUs: 0, ctimeUs: 0, layerId, linkTarget: null,
    copyOnRead: false, fault: null,
  }).id;
}

/** As `daemon/jobs/imports.ts` does it: a file of its own, durable; then one transaction with the rename in it. */
function importImage(name: string, blocks: number, seed: number): void {
  const { meta, files } = opened();
  const temporary = path.join(storeDir, 'import', '1.raw');
  const sizeBytes = blocks * BLOCK_BYTES;
  try {
    const fd = fs.openSync(temporary, 'w');
    try {
      fs.writeSync(fd, patternBytes(seed, 0, sizeBytes), 0, sizeBytes, 0);
      fs.ftruncateSync(fd, sizeBytes);
      fs.fsyncSync(fd);
    } finally {
      fs.closeSync(fd);
    }
    ids.set(name, meta.transaction(() => {
      const layer = meta.layers.insert({
        kind: 'store', externalPath: null, externalIdentity: null, backingId: null, backingLimitBytes: null, sizeBytes, sealed: false, complete: true,
        createdUs: 0,
      });
      const id = addNode(name, 'disk', layer.id, sizeBytes);
      files.adopt(layer.id, temporary);
      return id;
    }));
  } finally {
    fs.rmSync(temporary, { force: true });
  }
}

/** As the fill worker and `daemon/jobs/fills.ts` do it. */
async function fill(nodeId: number): Promise<void> {
  const { context, disks } = opened();
  const disk = disks.get(nodeId);
  if (disk === undefined) throw new Error('the disk is not open');
  const buffer = new IoBuffer(REQUEST_BYTES_MAX);
  const progress = newFillProgress();
  for (let atEnd = false; !atEnd; ) {
    if (!enterDisk(context, disk.shared)) throw new Error('the disk was retired');
    atEnd = fillStep(context, disk.shared, buffer, progress);
    leaveDisk(context, disk.shared);
    if (progress.failed < 0) throw Object.assign(new Error('the fill stopped'), { code: progress.failed === -28 ? 'ENOSPC' : 'EIO', errno: progress.failed, syscall: 'fill' });
  }
  await opened().flush(nodeId);
  opened().markComplete(nodeId);
}

/** What each block holds, by a hash; every read is checked against the model afterwards. */
function read(nodeId: number): string {
  const sizeBytes = opened().disks.get(nodeId)?.shared.sizeBytes() ?? 0;
  const content = Buffer.alloc(sizeBytes, 0xee);
  const got = opened().data.read(nodeId, 0, content);
  const hashes: string[] = [];
  for (let at = 0; at < got; at += BLOCK_BYTES) hashes.push(createHash('sha1').update(content.subarray(at, Math.min(got, at + BLOCK_BYTES))).digest('hex').slice(0, 12));
  return `ok ${got} ${hashes.join(',')}`;
}

async function obey(operation: Operation): Promise<string> {
  if ('disk' in operation) return await obeyOnDisk(operation);
  if (operation.kind === 'open') open();
  else if (operation.kind === 'commit') await opened().committer.commitAll();
  else if (operation.kind === 'checkpoint') opened().meta.checkpoint({ idle: operation.idle });
  else await opened().close();
  return 'ok';
}

async function obeyOnDisk(operation: Extract<Operation, { readonly disk: string }>): Promise<string> {
  const { disks, data } = opened();
  if (operation.kind === 'import') {
    importImage(operation.disk, operation.blocks, operation.seed);
    return 'ok';
  }
  if (operation.kind === 'create') {
    ids.set(operation.disk, opened().meta.transaction(() => addNode(operation.disk, 'file', opened().createEmptyLayer().id, 0)));
    return 'ok';
  }
  const nodeId = ids.get(operation.disk);
  const needsOpen = operation.kind === 'write' || operation.kind === 'discard' || operation.kind === 'read' || operation.kind === 'fill' || operation.kind === 'release';
  if (nodeId === undefined || (needsOpen && !held.has(operation.disk))) return 'skipped';
  switch (operation.kind) {
    case 'acquire':
      disks.acquire(nodeId);
      held.add(operation.disk);
      break;
    case 'release':
      disks.release(nodeId);
      held.delete(operation.disk);
      disks.retireIdle(nodeId);
      break;
    case 'write': data.write(nodeId, operation.offsetBytes, patternBytes(operation.seed, 0, operation.lengthBytes)); break;
    case 'discard': data.discard(nodeId, operation.offsetBytes, operation.lengthBytes); break;
    case 'flush': await opened().flush(nodeId); break;
    case 'read': return read(nodeId);
    case 'fill': await fill(nodeId); break;
    case 'resize': opened().resize(nodeId, operation.sizeBytes); break;
    case 'clone': {
      const [node] = opened().clone(nodeId, [{ parentId: ROOT_ID, name: operation.target }], { copyOnRead: operation.copyOnRead });
      if (node !== undefined) ids.set(operation.target, node.id);
      break;
    }
    case 'remove':
      // As an unlink does it: the name in one transaction, the rest after it.
      opened().meta.transaction(() => { opened().meta.nodes.orphan(nodeId); });
      opened().discardNode(nodeId);
      ids.delete(operation.disk);
      break;
  }
  return 'ok';
}

process.on('uncaughtException', (error) => {
  say(`# ${String(error.stack)}`.replaceAll('\n', ' '));
  process.kill(process.pid, 'SIGKILL');
});

say(`ready ${MAIN} ${await poolThread()}`);
for (const [number, operation] of WORKLOAD.entries()) {
  if (number === PAUSE_AT) {
    say('paused');
    fs.readSync(0, Buffer.alloc(16));
  }
  say(`> ${number}`);
  let outcome: string;
  try {
    outcome = await obey(operation);
  } catch (thrown) {
    const { kind, message } = toOffshootError(thrown);
    if (kind === 'internal' || operation.kind === 'open') {
      say(`# ${kind} in ${operation.kind}: ${thrown instanceof Error ? String(thrown.stack) : message}`.replaceAll('\n', ' '));
      process.kill(process.pid, 'SIGKILL');
    }
    outcome = kind;
  }
  say(`< ${number} ${outcome}`);
}
process.kill(process.pid, 'SIGKILL');
