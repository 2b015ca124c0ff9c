/**
 * What is compared: each candidate makes fresh, writable disks over the one source file, and takes them away again.
 *
 * All of them read the very same file on the same file system; nothing is copied before a run. Each candidate is started
 * once and lives through all rounds, as it would in use; only its disks are fresh.
 */
import { spawn } from 'node:child_process';
import { rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { startTestDaemon, type TestTransport } from '../../test/support/daemon.js';
import { mustRun } from '../../test/support/model/command.js';
import { mountEntry, removeMount } from '../../test/support/model/mounts.js';
import { waitUntil } from '../../test/support/processes.js';
import type { Cleanup } from '../../test/support/temp.js';

export interface Disk {
  /** Where the source's content is read. */
  readonly readFile: string;
  readonly writeFile: string;
  remove(): Promise<void>;
}

export interface Candidate {
  readonly id: CandidateId;
  makeDisk(): Promise<Disk>;
}

export const candidateIds = ['raw', 'qemu-storage-daemon', 'kernel', 'fuse-native'] as const;
export type CandidateId = (typeof candidateIds)[number];

/** The one that ratios are of. */
export const BASELINE: CandidateId = 'qemu-storage-daemon';
/** The one that the targets are for. */
export const SUBJECT: CandidateId = 'kernel';

export interface Bench {
  /** On the file system that is measured. */
  readonly directory: string;
  readonly source: string;
  readonly cliEntry: string;
  readonly workers: number | null;
  readonly cleanup: Cleanup;
}

const START_TIMEOUT_MS = 10_000;
const END_TIMEOUT_MS = 10_000;

export async function startCandidate(id: CandidateId, bench: Bench): Promise<Candidate> {
  switch (id) {
    case 'raw': return rawFile(bench);
    case 'qemu-storage-daemon': return qemuStorageDaemon(bench);
    case 'kernel':
    case 'fuse-native': return await offshoot(id, bench);
  }
}

/** The source itself for reads; for writes a file of holes, so that its first touches allocate, like everybody's. */
function rawFile({ directory, source }: Bench): Candidate {
  const file = join(directory, 'raw.img');
  return {
    id: 'raw',
    async makeDisk() {
      writeFileSync(file, '');
      truncateSync(file, statSync(source).size);
      return { readFile: source, writeFile: file, remove: async () => { rmSync(file); } };
    },
  };
}

/**
 * A qcow2 image with all that it stands on, exported by FUSE by one process of qemu-storage-daemon, until the result is called. Through the
 * page cache and with threads: measured on tmpfs, that is its quickest configuration, and it is what this daemon does with its own files.
 * What the image stands on is found by what is written in it, and inherits these settings.
 */
export async function exportImage(image: string, mountPoint: string, { writable, cleanup }: { readonly writable: boolean; readonly cleanup: Cleanup }): Promise<() => Promise<void>> {
  writeFileSync(mountPoint, '');
  const child = spawn('qemu-storage-daemon', [
    '--blockdev', `driver=file,node-name=image-file,filename=${image},aio=threads,cache.direct=off,read-only=${writable ? 'off' : 'on'}`,
    '--blockdev', `driver=qcow2,node-name=image,file=image-file,read-only=${writable ? 'off' : 'on'}`,
    '--export', `fuse,id=export,node-name=image,mountpoint=${mountPoint},writable=${writable ? 'on' : 'off'},growable=off,allow-other=off`,
  ], { stdio: ['ignore', 'ignore', 'pipe'] });
  let said = '';
  let ended = false;
  child.stderr.on('data', (chunk: Buffer) => { said += chunk.toString(); });
  child.on('error', (error) => { said += error.message; ended = true; });
  child.on('exit', () => { ended = true; });
  const end = async (): Promise<void> => {
    if (!ended) child.kill('SIGTERM');
    if (!(await waitUntil(() => ended, END_TIMEOUT_MS))) child.kill('SIGKILL');
    await removeMount(mountPoint);
    rmSync(mountPoint, { force: true });
  };
  cleanup.add(end);
  await waitUntil(() => ended || mountEntry(mountPoint) !== null, START_TIMEOUT_MS);
  if (mountEntry(mountPoint) === null) throw new Error(`qemu-storage-daemon did not export ${image}: ${said}`);
  return end;
}

/** A qcow2 overlay over the raw source. */
function qemuStorageDaemon({ directory, source, cleanup }: Bench): Candidate {
  const overlay = join(directory, 'overlay.qcow2');
  const mountPoint = join(directory, 'overlay.img');
  return {
    id: 'qemu-storage-daemon',
    async makeDisk() {
      await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', source, '-F', 'raw', overlay]);
      const end = await exportImage(overlay, mountPoint, { writable: true, cleanup });
      const remove = async (): Promise<void> => {
        await end();
        rmSync(overlay, { force: true });
      };
      return { readFile: mountPoint, writeFile: mountPoint, remove };
    },
  };
}

async function offshoot(transport: TestTransport, { source, cliEntry, workers, cleanup }: Bench): Promise<Candidate> {
  const daemon = await startTestDaemon({ transport, cleanup, cliEntry, ...(workers === null ? {} : { workers }) });
  await daemon.json(['container', 'create', 'bench']);
  await daemon.json(['import', source, 'bench/source.img', '--in-place', '--format', 'raw']);
  let made = 0;
  return {
    id: transport,
    async makeDisk() {
      made += 1;
      const path = `bench/clone-${made}.img`;
      await daemon.json(['clone', 'bench/source.img', path]);
      const file = daemon.path(path);
      return { readFile: file, writeFile: file, remove: async () => { await daemon.json(['rm', path]); } };
    },
  };
}
