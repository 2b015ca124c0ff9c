/**
 * A GPT with one partition on a block device, by sfdisk(8): aligned to 1 MiB, with a GUID of its own for the disk and one for the partition. Main thread; the program is a child.
 *
 * The kernel is not asked to read the table: the partition is reached as a window of the file (see `losetup.ts`).
 */
import { OffshootError } from '../../blockstore/errors.js';
import type { DeviceWindow } from './block-devices.js';
import { runProgram } from './program.js';

/** Linux filesystem. */
export const LINUX_FILE_SYSTEM = '0fc63daf-8483-4772-8e79-3d69d8477de4';
const SECTOR = 512;

export interface PartitionTable {
  readonly diskGuid: string;
  readonly partitionGuid: string;
  readonly name: string;
  readonly window: DeviceWindow;
}

export function sfdiskScript({ diskGuid, partitionGuid, name, window }: PartitionTable): string {
  const start = window.offsetBytes / SECTOR;
  return [
    'label: gpt', `label-id: ${diskGuid}`, `first-lba: ${start}`, 'unit: sectors', '',
    `start=${start}, size=${window.sizeBytes / SECTOR}, type=${LINUX_FILE_SYSTEM}, uuid=${partitionGuid}, name="${name}"`, '',
  ].join('\n');
}

/** Writes it, reads it back, and throws when it is not what was wanted. */
export async function writePartitionTable(device: string, table: PartitionTable, signal: AbortSignal): Promise<void> {
  await runProgram('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', '--wipe', 'never', '--wipe-partitions', 'never', device], { signal, input: sfdiskScript(table) });
  const found = await readPartitionTable(device, signal);
  if (JSON.stringify(found) !== JSON.stringify(table)) throw new OffshootError('io-error', `sfdisk wrote another table to ${device} than it was told: ${JSON.stringify(found)}`);
}

export async function readPartitionTable(device: string, signal: AbortSignal): Promise<PartitionTable | null> {
  const { stdout } = await runProgram('sfdisk', ['--json', device], { signal });
  const { partitiontable: table } = JSON.parse(stdout) as {
    readonly partitiontable: { readonly label: string; readonly id: string; readonly partitions?: readonly { readonly start: number; readonly size: number; readonly type: string; readonly uuid: string; readonly name?: string }[] };
  };
  const [first, ...others] = table.partitions ?? [];
  if (table.label !== 'gpt' || first === undefined || others.length > 0 || first.type.toLowerCase() !== LINUX_FILE_SYSTEM) return null;
  return {
    diskGuid: table.id.toLowerCase(), partitionGuid: first.uuid.toLowerCase(), name: first.name ?? '', window: { offsetBytes: first.start * SECTOR, sizeBytes: first.size * SECTOR },
  };
}
