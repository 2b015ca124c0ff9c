/**
 * `offshoot export DISK[@SNAPSHOT] FILE`: a disk becomes a file, as it is at one instant.
 *
 * The daemon makes a clone that holds the disk still; this command opens it, has its name taken away, and writes the file by its own rights.
 */
import { lstat } from 'node:fs/promises';
import { resolve } from 'node:path';
import { Option, type Command } from 'commander';
import { OffshootError } from '../../blockstore/errors.js';
import { checkPathInContainer, visible } from '../../daemon/control/paths.js';
import type { ExtentInfo } from '../../daemon/control/transfer-schemas.js';
import { contextOf, type CliContext } from '../context.js';
import { exportFile } from '../export-file.js';
import { watchInterrupts } from '../follow.js';
import type { CliIo } from '../io.js';
import { extentPages, openMounted, pushExtent } from '../mounted-disk.js';
import { createProgressView } from '../progress.js';
import { formatBytes, formatDuration } from '../sizes.js';

const FORMATS = ['raw', 'qcow2', 'vmdk', 'vhdx'] as const;

interface ExportOptions {
  readonly format: (typeof FORMATS)[number];
  readonly force?: boolean;
}

export function addExportCommand(program: Command, io: CliIo): void {
  program.command('export')
    .description('Write a disk to a file, as it is at this instant or in a snapshot. The disk may be in use.')
    .summary('write a disk to a file')
    .usage('CONTAINER/PATH[@NAME] FILE [OPTIONS]')
    .argument('<disk>', 'CONTAINER/PATH[@NAME]; without @NAME as it is now')
    .argument('<file>', 'the file to make')
    .addOption(new Option('--format <raw|qcow2|vmdk|vhdx>', 'format of the file').choices(FORMATS).default('raw'))
    .option('--force', 'replace a file that exists')
    .addHelpText('after', `
Holes stay holes. The file appears under its name when it is whole and on the disk.
It is written with your rights, as mode 0600. Ctrl-C leaves nothing.

Examples:
  offshoot export vms/db.img /backup/db.raw
  offshoot export vms/db.img@monday db.qcow2 --format qcow2
`)
    .action(async (disk: string, file: string, options: ExportOptions, command: Command) => {
      await runExport(contextOf(io, command), disk, file, options);
    });
}

async function runExport(context: CliContext, reference: string, given: string, { format, force }: ExportOptions): Promise<void> {
  const { io, output } = context;
  checkPathInContainer(reference);
  if (given === '') throw new OffshootError('invalid-argument', 'the name of the file to write is empty: give one');
  const file = resolve(io.cwd(), given);
  await refuseExisting(file, force === true);
  const beganMs = io.nowMs();
  const { transfers } = context.client();
  const view = createProgressView(io, output, `export ${reference}`);
  const interrupts = watchInterrupts(io, () => { view.end(); });
  const instant = await transfers.instant(reference);
  let disk;
  try {
    const extents: ExtentInfo[] = [];
    try {
      disk = await openMounted(instant.mountPath, instant.nodeId);
      // All of them now, while it has a name.
      for await (const page of extentPages(context.client(), instant.path, null, instant.nodeId)) for (const extent of page.extents) pushExtent(extents, extent);
    } finally {
      await transfers.releaseInstant(instant.path);
    }
    await exportFile({
      disk, sizeBytes: instant.sizeBytes, extents, file, format, replace: force === true, signal: interrupts.signal,
      onProgress: (doneBytes, totalBytes) => { view.update({ doneBytes, totalBytes }); },
    });
  } finally {
    view.end();
    interrupts.release();
    await disk?.close();
  }
  const { blocks } = await lstat(file);
  const result = { reference, file, format, sizeBytes: instant.sizeBytes, allocatedBytes: blocks * 512 };
  output.result(result, () => [`exported ${visible(reference)} to ${visible(file)}: ${formatBytes(result.sizeBytes)} in ${formatDuration(io.nowMs() - beganMs)}; takes ${formatBytes(result.allocatedBytes)}`]);
}

async function refuseExisting(file: string, isForced: boolean): Promise<void> {
  const found = await lstat(file).catch(() => null);
  if (found === null) return;
  if (!isForced) throw new OffshootError('already-exists', `${visible(file)} exists: choose another name, or add --force to replace it`, { file });
  if (!found.isFile()) throw new OffshootError('invalid-argument', `${visible(file)} is no regular file, and is not replaced: choose another name`, { file });
}
