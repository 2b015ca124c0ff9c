/**
 * `offshoot rm TARGET`: a disk, a file, a directory or a container goes.
 */
import type { Command } from 'commander';
import { checkStorePath } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { counted } from '../output.js';
import { formatBytes } from '../sizes.js';

interface RemoveOptions {
  readonly recursive?: boolean;
  readonly keepData?: boolean;
}

export function addRemoveCommand(program: Command, io: CliIo): void {
  program.command('rm')
    .description('Remove a disk, a file, an empty directory or an empty container, and give its space back.')
    .summary('remove a disk, a file, a directory or a container')
    .usage('TARGET [OPTIONS]')
    .argument('<target>', 'what to remove: CONTAINER[/PATH]; a snapshot is removed by offshoot snapshot rm')
    .option('-r, --recursive', 'a directory or container with all that is in it')
    .option('--keep-data', 'although clones stand on it: the name goes, its sealed layers stay for as long as they need them')
    .addHelpText('after', `
Without --keep-data, what clones still stand on is not removed: the error names
them, and what can be done. What is open is not removed either, nor a container
that has snapshots.

Examples:
  offshoot rm vms/web.img
  offshoot rm vms/debian.img --keep-data
  offshoot rm -r vms
`)
    .action(async (target: string, options: RemoveOptions, command: Command) => {
      const context = contextOf(io, command);
      const removed = await context.client().remove(checkStorePath(target), { recursive: options.recursive === true, keepData: options.keepData === true });
      context.output.result(removed, () => {
        const kept = removed.layersKept === 0 ? '' : `; ${counted(removed.layersKept, 'layer')} kept for clones`;
        const more = removed.nodesRemoved > 1 ? ` and ${counted(removed.nodesRemoved - 1, 'other name')}` : '';
        return [`removed ${removed.path}${more}, ${formatBytes(removed.freedBytes)} freed${kept}`];
      });
    });
}
