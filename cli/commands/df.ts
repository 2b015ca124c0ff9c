/**
 * `offshoot df [TARGET]`: what disks, snapshots and containers take, what would be freed with each, and what the store is made of.
 */
import type { Command } from 'commander';
import { checkStorePath } from '../../daemon/control/paths.js';
import type { SpaceReport } from '../../daemon/control/space-schemas.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { counted, renderFields, renderTable, type Column } from '../output.js';
import { formatBytes, formatBytesExactly, formatBytesOf, formatPercent } from '../sizes.js';

/** Paths named in a line; how many more there are is said. */
const NAMED_MAX = 2;
const COSTS: readonly Column[] = [{ header: 'TAKES', right: true }, { header: 'EXCLUSIVE', right: true }, { header: 'SHARED', right: true }];

export function addSpaceCommand(program: Command, io: CliIo): void {
  program.command('df')
    .description('Say what disks, snapshots and containers take in the store, and what would be freed with each.')
    .summary('say what things cost, and what removing them frees')
    .usage('[TARGET] [OPTIONS]')
    .argument('[target]', 'CONTAINER[/PATH][@NAME] (default: all of the store)')
    .addHelpText('after', `
TAKES is what a disk's own layer has allocated. EXCLUSIVE is what the store gets
back when the disk is removed now (rm --keep-data): its own layer, and every
layer below that nobody else reads through. SHARED is the rest that it reads
through, and WITH says who else needs that. A file that is used where it lies
(import --in-place) counts as nothing. What a snapshot holds is one line; name
the snapshot to see each disk in it. DISKS counts files as well.

Examples:
  offshoot df
  offshoot df vms
  offshoot df vms --json | jq '.disks | max_by(.exclusiveBytes).path'
`)
    .action(async (target: string | undefined, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      const report = await context.client().df(target === undefined ? null : checkStorePath(target));
      context.output.result(report, () => spaceLines(report, context.output.bold));
    });
}

function spaceLines(report: SpaceReport, bold: (text: string) => string): string[] {
  const lines: string[] = [];
  const add = (title: string, columns: readonly Column[], rows: readonly (readonly string[])[]): void => {
    if (rows.length === 0) return;
    if (lines.length > 0) lines.push('');
    lines.push(...renderTable([{ header: title }, ...columns], rows, bold));
  };
  const costs = (cost: { readonly allocatedBytes: number; readonly exclusiveBytes: number; readonly sharedBytes: number }): string[] =>
    [formatBytes(cost.allocatedBytes), formatBytes(cost.exclusiveBytes), formatBytes(cost.sharedBytes)];
  // A target within a snapshot has frozen disks only.
  const shown = report.disks.every(({ frozen }) => frozen) ? report.disks : report.disks.filter(({ frozen }) => !frozen);
  add('DISK', [{ header: 'SIZE', right: true }, ...COSTS, { header: 'WITH' }],
    shown.map((disk) => [disk.path, formatBytes(disk.sizeBytes), ...costs(disk), withText(disk.sharedWith, disk.sharedWithCount)]));
  add('SNAPSHOT', [{ header: 'DISKS', right: true }, ...COSTS], report.snapshots.map((snapshot) => [snapshot.path, String(snapshot.disks), ...costs(snapshot)]));
  add('CONTAINER', [{ header: 'DISKS', right: true }, { header: 'SNAPSHOTS', right: true }, ...COSTS, { header: 'USED', right: true }, { header: 'LIMIT', right: true }, { header: '', right: true }], report.containers.map((each) => [
    each.name, String(each.disks), String(each.snapshots), ...costs(each), formatBytes(each.usedBytes), each.limitBytes === null ? '-' : formatBytes(each.limitBytes),
    each.limitBytes === null ? '' : formatPercent(each.usedBytes, each.limitBytes),
  ]));
  if (report.store !== null) lines.push(...(lines.length > 0 ? [''] : []), ...renderFields('Store', storeFields(report.store), bold));
  else if (report.disks.length > 1) {
    lines.push('', `${totalText(report)}: ${formatBytes(report.total.allocatedBytes)}; ${formatBytes(report.total.exclusiveBytes)} freed with all of them, ${formatBytes(report.total.sharedBytes)} shared with others`);
  }
  return lines;
}

function disksText(count: number): string {
  return counted(count, 'disk or file', 'disks and files');
}

/** `3 disks and files, 2 snapshots`. */
function totalText({ disks, total }: SpaceReport): string {
  // A target within a snapshot has frozen disks only.
  if (total.disks === 0 && total.snapshots <= 1) return disksText(disks.length);
  return [total.disks === 0 ? '' : disksText(total.disks), total.snapshots === 0 ? '' : counted(total.snapshots, 'snapshot')].filter((each) => each !== '').join(', ');
}

function storeFields(store: NonNullable<SpaceReport['store']>): [string, string][] {
  const fields: [string, string][] = [
    ['Layers', formatBytesExactly(store.layersBytes)],
    ['Metadata', formatBytes(store.databaseBytes)],
    ['Imports under way', formatBytes(store.importBytes)],
    ['Kept back', formatBytes(store.reserveBytes)],
    ['Log', formatBytes(store.logBytes)],
    ['Together', formatBytesExactly(store.totalBytes)],
    ['Free', formatBytesOf(store.freeBytes, store.fileSystemBytes)],
  ];
  if (store.removedBytes > 0) fields.splice(1, 0, ['  removed, still open', formatBytes(store.removedBytes)]);
  if (store.leftOverBytes > 0) fields.splice(1, 0, ['  needed by nothing', formatBytes(store.leftOverBytes)]);
  return fields;
}

function withText(paths: readonly string[], count: number): string {
  if (count === 0) return '-';
  const named = paths.slice(0, NAMED_MAX);
  return count > named.length ? `${named.join(', ')} and ${count - named.length} more` : named.join(', ');
}
