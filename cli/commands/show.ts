/**
 * `offshoot show TARGET`: all about one disk.
 */
import type { Command } from 'commander';
import { checkStorePath } from '../../daemon/control/paths.js';
import type { DiskInfo, LayerInfo, SharedInfo } from '../../daemon/control/schemas.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { counted, renderFields } from '../output.js';
import { formatBytes, formatBytesExactly, formatPercent, formatTime } from '../sizes.js';
import { fillText } from './fill.js';

export function addShowCommand(program: Command, io: CliIo): void {
  program.command('show')
    .description('Say all about a disk: size, what it owns, what it reads from where, its fill, who has it open.')
    .summary('say all about one disk')
    .usage('TARGET [OPTIONS]')
    .argument('<target>', 'CONTAINER[/PATH][@NAME]; @NAME: as in that snapshot')
    .addHelpText('after', `
Examples:
  offshoot show vms/web.img
  offshoot show vms/web.img@monday
  offshoot show vms/web.img --json | jq '.ownedBytes, .unownedBytes'
`)
    .action(async (target: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const disk = await context.client().show(checkStorePath(target));
      context.output.result(disk, () => renderFields(disk.path, diskFields(disk), context.output.bold));
    });
}

/** What makes sense for disks and files only. */
const DATA_FIELDS = new Set(['Size', 'Owned', 'Un-owned', 'Takes', 'Clone of', 'Backing chain', 'Shared with', 'Fill', 'Copy-on-read', 'Open']);

export function diskFields(disk: DiskInfo): [string, string | string[]][] {
  const fields: [string, string | string[]][] = [
    ['Kind', disk.kind],
    ['Size', formatBytesExactly(disk.sizeBytes)],
    ['Owned', `${formatBytes(disk.ownedBytes)} (${formatPercent(disk.ownedBytes, disk.ownedBytes + disk.unownedBytes)})`],
    ['Un-owned', unownedText(disk)],
    ['Takes', `${formatBytes(disk.allocatedBytes)} in the store`],
    ['Clone of', disk.cloneOf ?? 'nothing'],
    ['Backing chain', disk.backingChain.map(layerText)],
    ['Shared with', disk.sharedWith.length === 0 ? 'nobody' : disk.sharedWith.map(sharedText)],
    ['Fill', disk.fill === null ? 'none' : fillText(disk.fill)],
    ['Copy-on-read', disk.copyOnRead ? 'yes' : 'no'],
    ['Open', disk.openCount === 0 ? 'no' : counted(disk.openCount, 'time')],
    ['Transport', disk.transport],
    ['Seen at', disk.mountPath],
    ['Inode', String(disk.nodeId)],
    ['Mode, owner', `${disk.mode.toString(8).padStart(4, '0')}, ${disk.uid}:${disk.gid}`],
    ['Created', formatTime(disk.createdAt)],
    ['Modified', formatTime(disk.modifiedAt)],
  ];
  if (disk.fault !== null) fields.splice(1, 0, ['FAULT', disk.fault]);
  const hasData = disk.kind === 'disk' || disk.kind === 'file';
  return hasData ? fields : fields.filter(([name]) => !DATA_FIELDS.has(name));
}

function unownedText(disk: DiskInfo): string {
  if (disk.unownedBytes === 0) return 'nothing: its source is not needed any more';
  const data = disk.unownedDataBytes === null ? '' : `, of which ${formatBytes(disk.unownedDataBytes)} is data`;
  return `${formatBytes(disk.unownedBytes)}${data}`;
}

function sharedText(shared: SharedInfo): string {
  const where = shared.kind === 'external' ? `the file ${shared.path ?? '(unknown)'}` : (shared.disk ?? 'a disk that is gone');
  return `${formatBytes(shared.bytes)} of ${where} (layer ${shared.layerId})`;
}

function layerText(layer: LayerInfo, index: number): string {
  const words = [layer.sealed ? 'sealed' : 'active'];
  if (layer.complete) words.push('complete');
  const where = layer.kind === 'external' ? `, the file ${layer.path ?? '(unknown)'}` : '';
  return `${index === 0 ? '' : '└ '}layer ${layer.layerId}: ${words.join(', ')}, ${formatBytes(layer.sizeBytes)}${where}`;
}
