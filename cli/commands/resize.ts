/**
 * `offshoot resize TARGET SIZE`: another virtual size for a disk.
 */
import type { Command } from 'commander';
import { checkPathInContainer } from '../../daemon/control/paths.js';
import { contextOf } from '../context.js';
import type { CliIo } from '../io.js';
import { formatBytesExactly, parseDiskSize } from '../sizes.js';

export function addResizeCommand(program: Command, io: CliIo): void {
  program.command('resize')
    .description('Give a disk another virtual size. What is added reads as zeros; what is cut off is gone.')
    .summary('give a disk another virtual size')
    .usage('TARGET SIZE [OPTIONS]')
    .argument('<target>', 'the disk, CONTAINER/PATH')
    .argument('<size>', 'the new size, a multiple of 512 bytes: 20G, 512M, 10737418240')
    .addHelpText('after', `
Make the file system and the partitions smaller before you make the disk smaller.
A guest that has the disk open may have to be told of its new size.

Examples:
  offshoot resize vms/web.img 20G
  offshoot resize vms/web.img 1.5T
`)
    .action(async (target: string, size: string, _options: unknown, command: Command) => {
      const context = contextOf(io, command);
      checkPathInContainer(target);
      const disk = await context.client().resize(target, parseDiskSize(size));
      context.output.result(disk, () => [`${disk.path} has ${formatBytesExactly(disk.sizeBytes)} now`]);
    });
}
