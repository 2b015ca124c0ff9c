/**
 * Copies a tree of the mount onto a file system that is mounted elsewhere: cp(1), which keeps holes, owners, modes, times and attributes, and ends when
 * it is told to. Main thread; how far it is follows from the kernel's count of what was written to the device.
 */
import { writtenBytes } from './losetup.js';
import { runProgram } from './program.js';

export interface CopyOptions {
  readonly signal: AbortSignal;
  /** The device below the target. */
  readonly device: string;
  readonly onProgress: (writtenBytes: number) => void;
}

/** Only a signal ends it: machines may have many TiB. */
const COPY_TIMEOUT_MS = 2_000_000_000;
const PROGRESS_MS = 1_000;

export async function copyTree(source: string, target: string, { signal, device, onProgress }: CopyOptions): Promise<void> {
  const before = writtenBytes(device);
  const timer = setInterval(() => { onProgress(Math.max(0, writtenBytes(device) - before)); }, PROGRESS_MS);
  try {
    await runProgram('cp', ['--archive', '--sparse=always', '--reflink=never', '--one-file-system', '--no-target-directory', '--', `${source}/.`, target], { signal, timeoutMs: COPY_TIMEOUT_MS });
  } finally {
    clearInterval(timer);
  }
}
