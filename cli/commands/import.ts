/**
 * `offshoot import FILE CONTAINER/PATH`: a disk image becomes a disk.
 *
 * The import is a job of the daemon; this command follows it. Ctrl-C cancels the job and waits until nothing is left of it.
 */
import { resolve } from 'node:path';
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import type { ControlClient } from '../../daemon/control/client.js';
import { IMPORT_FORMATS } from '../../daemon/control/limits.js';
import { checkPathInContainer, visible } from '../../daemon/control/paths.js';
import type { ImportFormat, JobInfo, JobState } from '../../daemon/control/schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { follow, watchInterrupts } from '../follow.js';
import type { CliIo } from '../io.js';
import { createProgressView } from '../progress.js';
import { formatBytes, formatDuration } from '../sizes.js';

interface ImportOptions {
  readonly inPlace?: boolean;
  readonly format?: ImportFormat;
}

const finalStates: readonly JobState[] = ['completed', 'failed', 'cancelled'];

export function jobHasEnded(job: { readonly state: JobState }): boolean {
  return finalStates.includes(job.state);
}

export function addImportCommand(program: Command, io: CliIo): void {
  program.command('import')
    .description('Import a disk image as a disk, which can then be cloned. The file itself is only read.')
    .summary('import a disk image as a disk')
    .usage('FILE CONTAINER/PATH [OPTIONS]')
    .argument('<file>', 'the image: a raw file, or qcow2, vmdk, vhdx, vdi (converted with qemu-img)')
    .argument('<target>', 'the disk to make, CONTAINER/PATH')
    .option('--in-place', 'copy nothing: read the file where it lies (raw only); it must never change from now on')
    .addOption(new Option('--format <raw|qcow2|vmdk|vhdx|vdi>', 'format of the file (default: raw; a file that has the signature of another format is refused)').choices(IMPORT_FORMATS))
    .addHelpText('after', `
Holes of the file stay holes. A raw file whose size is not a multiple of 512 bytes
gets zeros up to the next one. Ctrl-C cancels the import and leaves nothing of it.

Examples:
  offshoot import debian-12.qcow2 vms/debian.img --format qcow2
  offshoot import /images/debian-12.raw vms/debian.img --in-place
  offshoot import disk.img vms/old.img --format raw
`)
    .action(async (file: string, target: string, options: ImportOptions, command: Command) => {
      await importFile(contextOf(io, command), file, target, options);
    });
}

async function importFile(context: CliContext, file: string, target: string, options: ImportOptions): Promise<void> {
  const { io, output } = context;
  checkPathInContainer(target);
  const absoluteFile = absoluteFileName(io, file);
  const client = context.client();
  const view = createProgressView(io, output, `import ${target}`);
  let job: JobInfo | null = null;
  const interrupts = watchInterrupts(io, () => {
    view.end();
    output.note(job === null ? 'not waiting any longer' : `not waiting any longer; offshoot job show ${job.id} says how job ${job.id} ends`);
  });
  const beganMs = io.nowMs();
  try {
    job = await client.startImport({ file: absoluteFile, target, inPlace: options.inPlace === true, format: options.format ?? null });
    const { id } = job;
    job = await follow(io, {
      first: job,
      ask: async () => await client.job(id),
      ended: jobHasEnded,
      progress: (state) => ({ doneBytes: state.progressDoneBytes, totalBytes: state.progressTotalBytes }),
      view,
      signal: interrupts.signal,
    });
    if (!jobHasEnded(job)) {
      view.end();
      output.note('cancelling the import; Ctrl-C again does not wait for it');
      job = await client.cancelJob(id);
    }
  } finally {
    view.end();
    interrupts.release();
  }
  await reportImport(context, client, job, target, io.nowMs() - beganMs);
}

async function reportImport(context: CliContext, client: ControlClient, job: JobInfo, target: string, tookMs: number): Promise<void> {
  refuseUnlessCompleted(job, `the import of ${target}`, 'nothing of it is left');
  const disk = context.output.json ? null : await client.show(target);
  if (job.message !== null) context.output.note(`note: ${visible(job.message)}`);
  context.output.result(job, () => disk === null ? [] : [
    `imported ${disk.path}: ${formatBytes(disk.sizeBytes)} in ${formatDuration(tookMs)}; takes ${formatBytes(disk.allocatedBytes)} in the store`,
    `seen at ${visible(disk.mountPath)}`,
  ]);
}

/** A job's own error travels on with its kind, and so with its exit code. */
export function refuseUnlessCompleted(job: JobInfo, what: string, left: string): void {
  if (job.state === 'completed') return;
  const context = { jobId: job.id, state: job.state, path: job.path };
  if (job.state === 'cancelled') throw new OffshootError('cancelled', `${what} was cancelled: ${left}`, context);
  throw new OffshootError(job.error?.kind ?? 'io-error', job.error?.message ?? job.message ?? `${what} failed: the daemon's log says why`, context);
}

/** What is in front of a colon and two slashes is no file name: a person who writes that means something else. */
function absoluteFileName(io: CliIo, file: string): string {
  if (/^[a-z][a-z0-9+.-]*:\/\//iu.test(file)) {
    throw new OffshootError('not-supported', `${visible(file)} is a URL, and only local files can be imported: download it first`);
  }
  if (file === '') throw new OffshootError('invalid-argument', 'the name of the file to import is empty: name a disk image');
  return resolve(io.cwd(), file);
}
