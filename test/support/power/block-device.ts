/**
 * Records what a real file system tells its disk while a real store lies on it: recorder, loop device, mkfs, mount, workload, and all of it taken away.
 *
 *     store  →  ext4 or XFS  →  loop device, direct  →  FUSE  →  recorder (a process of its own)  →  log on tmpfs
 *
 * This process never touches the mounts above the recorder: only programs do that can be killed and left behind. Whatever goes wrong, the
 * clean-up ends the connection first, which sets everybody free who waits for it.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';

import { command, mustRun } from '../model/command.js';
import { mountEntry, removeMount } from '../model/mounts.js';
import type { Cleanup } from '../temp.js';
import { readBlockLog, type DeviceEvent } from './block-log.js';
import { RUNTIME, STORE } from './power-test.js';

const MIB = 1024 * 1024;
const LONG_MS = 120_000;
const OUTPUT_MAX = 4000;

/**
 * Blocks of 4 KiB, as on file systems of a sensible size: with the 1 KiB that mkfs.ext4 takes for small ones a page of a file is up to four writes, and one of them
 * may be there without the others. XFS refuses less than 300 MB; both keep their journal on the device. Mounted so that what is freed is discarded at once, and ext4 commits by itself too.
 */
export const BLOCK_FILE_SYSTEMS = {
  ext4: { sizeBytes: 96 * MIB, mkfs: ['mkfs.ext4', '-F', '-q', '-b', '4096', '-E', 'lazy_itable_init=0,lazy_journal_init=0'], mountOptions: 'discard,commit=1' },
  xfs: { sizeBytes: 320 * MIB, mkfs: ['mkfs.xfs', '-f', '-q'], mountOptions: 'discard' },
} as const;
export type BlockFileSystem = keyof typeof BLOCK_FILE_SYSTEMS;

export interface BlockPrograms {
  readonly recorder: string;
  readonly actor: string;
}
export const RECORDER_PROGRAM = 'test/support/power/block-recorder.ts';
export const ACTOR_PROGRAM = 'test/support/power/recorded-program.ts';

export interface BlockRecording {
  readonly events: readonly DeviceEvent[];
  readonly sizeBytes: number;
  /** What came before this event is on the disk: the file system was made long ago. */
  readonly firstCut: number;
  /** The workload's last marker. */
  readonly lastCut: number;
}

export interface BlockRecordingOptions {
  readonly fileSystem: BlockFileSystem;
  readonly workload: string;
  readonly seed: number;
  /** The recorder answers flushes and forgets them. */
  readonly isLying: boolean;
  readonly programs: BlockPrograms;
  /** Mounts lie below it. */
  readonly workDir: string;
  /** On a tmpfs. */
  readonly memoryDir: string;
  readonly cleanup: Cleanup;
}

export async function recordBlockDevice(options: BlockRecordingOptions): Promise<BlockRecording> {
  const { sizeBytes, mkfs, mountOptions } = BLOCK_FILE_SYSTEMS[options.fileSystem];
  const name = `${options.fileSystem}-${options.workload}`;
  const [deviceDir, mountDir] = [path.join(options.workDir, `${name}-device`), path.join(options.workDir, `${name}-fs`)];
  const [content, log, runtimeDir] = [`${name}.content`, `${name}.log`, `${name}.run`].map((each) => path.join(options.memoryDir, each)) as [string, string, string];
  for (const directory of [deviceDir, mountDir, runtimeDir]) fs.mkdirSync(directory);

  const recorder = await startRecorder([options.programs.recorder, deviceDir, content, String(sizeBytes), log, ...(options.isLying ? ['--lie-about-flushes'] : [])], deviceDir, options.cleanup);
  const image = path.join(deviceDir, 'img');
  const marks = path.join(deviceDir, 'mark');
  const device = (await mustRun('losetup', ['--find', '--show', '--direct-io=on', image], { timeoutMs: LONG_MS })).stdout.trim();
  let isAttached = true;
  options.cleanup.add(async () => {
    if (!isAttached) return;
    await removeMount(deviceDir);
    if (mountEntry(mountDir) !== null) await command('umount', ['-l', mountDir], { timeoutMs: LONG_MS });
    await command('losetup', ['-d', device], { timeoutMs: LONG_MS });
  });
  if ((await mustRun('losetup', ['-nO', 'DIO', device])).stdout.trim() !== '1') throw new Error(`${device} does no direct I/O: the page cache would write what nobody flushed`);
  await mustRun(mkfs[0], [...mkfs.slice(1), device], { timeoutMs: LONG_MS });
  await mustRun('mount', ['-o', mountOptions, device, mountDir], { timeoutMs: LONG_MS });
  await mustRun('mkdir', ['-m', '700', path.join(mountDir, STORE), path.join(mountDir, RUNTIME)], { timeoutMs: LONG_MS });
  await mustRun('sync', ['-f', mountDir], { timeoutMs: LONG_MS });

  const beginning = { op: 'note', text: 'the workload begins', phase: 'begin' };
  await mustRun('dd', [`of=${marks}`, 'status=none'], { timeoutMs: LONG_MS, input: JSON.stringify(beginning) });
  await mustRun(process.execPath, [options.programs.actor, marks, mountDir, options.workload, String(options.seed), runtimeDir], { timeoutMs: LONG_MS });
  await mustRun('dd', [`of=${marks}`, 'status=none'], { timeoutMs: LONG_MS, input: JSON.stringify({ ...beginning, text: 'the workload has ended' }) });

  await mustRun('umount', [mountDir], { timeoutMs: LONG_MS });
  await mustRun('losetup', ['-d', device], { timeoutMs: LONG_MS });
  isAttached = false;
  await mustRun('umount', [deviceDir], { timeoutMs: LONG_MS });
  await recorder.ended();
  const events = readBlockLog(log);
  for (const file of [content, log]) fs.unlinkSync(file);
  fs.rmSync(runtimeDir, { recursive: true });
  const notes = events.flatMap((event, index) => (event.kind === 'marker' && event.marker.op === 'note' ? [index] : []));
  const [firstCut, lastCut] = [notes[0], notes.at(-1)];
  if (firstCut === undefined || lastCut === undefined || lastCut <= firstCut) throw new Error('the recording has no beginning or no end');
  return { events, sizeBytes, firstCut, lastCut };
}

async function startRecorder(args: readonly string[], deviceDir: string, cleanup: Cleanup): Promise<{ readonly ended: () => Promise<void> }> {
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  child.stderr.on('data', (chunk: Buffer) => { said = (said + chunk.toString()).slice(-OUTPUT_MAX); });
  const closed = once(child, 'close');
  cleanup.add(async () => {
    await removeMount(deviceDir);
    if (child.exitCode === null && child.signalCode === null) child.kill('SIGKILL');
    await closed;
  });
  const isReady = await Promise.race([once(child.stdout, 'data').then(() => true), closed.then(() => false)]);
  if (!isReady) throw new Error(`the recorder did not start: ${said}`);
  return {
    ended: async () => {
      await closed;
      if (child.exitCode !== 0) throw new Error(`the recorder ended with ${child.exitCode ?? child.signalCode ?? 'nothing'}: ${said}`);
    },
  };
}
